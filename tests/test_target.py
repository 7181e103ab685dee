"""Profiles: lookup, nearest name, refusals, user folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.errors import TargetFileError, UnknownTargetError
from edgekit.target import load_target, target_files

GOOD = 'schema = 1\ndescription = "mine"\ncandidates = [{ backend = "onnxruntime", precision = "int8" }]\n'
DEVICE = GOOD + '[device]\narch = "aarch64"\n'


def test_every_shipped_profile_loads() -> None:
    for name in target_files():
        target = load_target(name)
        assert target.candidates
        assert target.name == name


def test_unknown_target_offers_the_nearest_name() -> None:
    with pytest.raises(UnknownTargetError, match="did you mean 'openvino'"):
        load_target("openvin")


def test_a_users_folder_wins_over_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "cpu.toml").write_text(GOOD, encoding="utf-8")
    assert load_target("cpu", tmp_path).description == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("description", "descripton"), "perhaps you meant 'description'"),
        (GOOD.replace("onnxruntime", "tensorrt"), "backend = 'tensorrt'"),
        (GOOD.replace("int8", "int7"), "precision = 'int7'"),
        (GOOD.replace("schema = 1", "schema = 9"), "schema 9"),
        ('schema = 1\ndescription = "x"\ncandidates = []\n', "no \\[\\[candidates\\]\\]"),
        ("schema = [", "fix the TOML"),
        (GOOD + 'threads = ["many"]\n', "threads = 'many'"),
        (GOOD + "weight_bits = 6\n", "weight_bits = 6"),
        (GOOD + "threads = 4\n", "threads = 4"),
        (GOOD + "threads = [0]\n", "threads = 0"),
        (GOOD.replace("int8", "float16"), "onnxruntime has no precision 'float16' — it offers float32, int8"),
        ('schema = 1\ndescription = "x"\ncandidates = [1]\n', "candidate 1 is no table"),
        (GOOD.replace('"int8"', "8"), "precision = 8"),
        (GOOD + "weight_bits = 8.0\n", "weight_bits = 8.0"),
        (GOOD + 'arch = "x86_64"\n', "unknown key 'arch'"),
        (GOOD + 'host = "ssh"\n', "unknown key 'host'"),
        (GOOD + "device = 1\n", "device = 1 — give a table"),
        (GOOD + "[device]\n", "lacks the key 'arch'"),
        (GOOD + '[device]\narch = "arm"\n', "arch = 'arm' — one of 'aarch64', 'armv7l', 'x86_64'"),
        (DEVICE + 'memory = "8"\n', "memory = '8' — give it as"),
        (DEVICE + 'memory = "0 GB"\n', "memory = '0 GB'"),
        (DEVICE + "cores = true\n", "cores = True"),
        (DEVICE + 'models = "Pi"\n', "models = 'Pi'"),
        (DEVICE + 'model = "Pi"\n', "perhaps you meant 'models'"),
        (DEVICE + 'runtimes = { tflite = "tflite-runtime" }\n', "runtimes.tflite = 'tflite-runtime'"),
        (DEVICE + 'runtimes = { tensorrt = "x==1" }\n', "runtimes = 'tensorrt'"),
        (DEVICE + 'system_packages = { numpy = "1.24" }\n', "system_packages.numpy = '1.24'"),
    ],
)
def test_a_bad_profile_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(TargetFileError, match=message):
        load_target("mine", tmp_path)


def test_a_device_is_read_with_its_numbers_in_bytes(tmp_path: Path) -> None:
    text = DEVICE + 'memory = "512 MB"\ncores = 4\nmodels = ["Board Two", "Module Two"]\n'
    (tmp_path / "mine.toml").write_text(text + 'runtimes = { tflite = "tflite-runtime==2.14.0" }\n', encoding="utf-8")
    device = load_target("mine", tmp_path).device
    assert device is not None
    assert (device.arch, device.memory_bytes, device.cores) == ("aarch64", 512 * 1024 * 1024, 4)
    assert device.runtime("tflite") == ("tflite-runtime", "2.14.0")
    assert device.runtime("onnxruntime") is None
    assert device.is_model("Board Two Rev 1.0")
    assert device.is_model("Module Two")
    assert device.is_model(None)  # a container does not say
    assert not device.is_model("Board Three")


def test_devices_for_arm_use_full_range_weights() -> None:
    arm = [t for name in target_files() if (t := load_target(name)).device and t.device.arch != "x86_64"]
    assert len(arm) >= 5
    assert {t.weight_bits for t in arm} == {8}
