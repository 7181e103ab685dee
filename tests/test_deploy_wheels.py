"""Wheels for a device: which are chosen, and what is said where there are none. pip reads a local folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from edgekit import backends
from edgekit.deploy import wheels
from edgekit.deploy.wheels import Described, choose, meets, platforms
from edgekit.errors import DeviceError, WheelError
from edgekit.target import DeviceSpec, load_target
from tests.wheel_files import only_from, wheel

pytest.importorskip("pip", reason="needs pip")
HERE = {name: version(name) for name in ("onnxruntime", "numpy")}
ARM64 = Described("aarch64", "3.11", "2.36")
CPUS = "manylinux_2_27_aarch64.manylinux_2_28_aarch64"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    only_from(monkeypatch, tmp_path / "index", tmp_path / "cache")
    monkeypatch.setattr(wheels, "_PYTHONS", ("3.10", "3.11", "3.12"))  # each is asked for by a pip of its own
    return tmp_path / "index"


def ours(index: Path, python: str = "311", onnxruntime: str = HERE["onnxruntime"], numpy: str = HERE["numpy"]) -> None:
    wheel(index, "onnxruntime", onnxruntime, f"cp{python}-cp{python}-manylinux_2_28_aarch64")
    wheel(index, "numpy", numpy, f"cp{python}-cp{python}-{CPUS}")


def test_the_version_that_is_here_is_chosen_where_it_has_a_wheel(index: Path) -> None:
    ours(index)
    ours(index, onnxruntime="99.0", numpy="99.0")
    ours(index, python="313")
    chosen = choose(["onnxruntime"], ARM64)
    assert [(w.name, w.version) for w in chosen.wheels] == sorted(HERE.items())
    assert {w.path.name.split("-")[2] for w in chosen.wheels} == {"cp311"}
    # the older of two tags is enough for one, the other needs 2.28
    assert {w.name: w.glibc for w in chosen.wheels} == {"numpy": "2.27", "onnxruntime": "2.28"}
    assert chosen.glibc == "2.28"
    assert chosen.versions == {"onnxruntime": HERE["onnxruntime"]}
    assert chosen.notes == ()


def test_else_the_newest_for_that_python_and_it_is_said(index: Path) -> None:
    ours(index)
    ours(index, python="39", onnxruntime="1.0")
    ours(index, python="39", onnxruntime="1.2")
    chosen = choose(["onnxruntime"], Described("aarch64", "3.9", "2.31", host="pi@den"))
    assert chosen.versions == {"onnxruntime": "1.2"}
    (note,) = chosen.notes
    assert f"onnxruntime 1.2 on pi@den, {HERE['onnxruntime']} here" in note
    assert "Python 3.9" in note


def test_a_choice_holds_without_the_index_and_only_with_the_same_bytes(index: Path) -> None:
    ours(index)
    first = choose(["onnxruntime"], ARM64)
    for path in index.iterdir():
        path.unlink()
    ours(index, onnxruntime="99.0", numpy="99.0")  # newer ones change nothing
    again = choose(["onnxruntime"], ARM64)
    assert again == first
    (altered,) = [w.path for w in again.wheels if w.name == "numpy"]
    altered.write_bytes(altered.read_bytes() + b"!")
    assert [w.version for w in choose(["onnxruntime"], ARM64).wheels if w.name == "numpy"] == ["99.0"]


def test_no_wheel_names_the_runtime_the_python_and_those_that_would_do(index: Path) -> None:
    ours(index, python="311")
    ours(index, python="312")
    with pytest.raises(WheelError) as caught:
        choose(["onnxruntime"], Described("aarch64", "3.14", "2.41"))
    assert f"onnxruntime {HERE['onnxruntime']} has no wheel for Python 3.14 on aarch64" in caught.value.what
    assert "wheels for Python 3.11, 3.12" in caught.value.remedy


def test_a_glibc_that_is_too_old_is_told_from_no_wheel(index: Path) -> None:
    ours(index)
    with pytest.raises(WheelError, match=r"glibc 2\.24: they need a newer glibc"):
        choose(["onnxruntime"], Described("aarch64", "3.11", "2.24"))


def test_a_32_bit_python_under_a_64_bit_kernel_is_named(index: Path) -> None:
    class Mixed(Described):
        machine = "aarch64"

    ours(index)
    with pytest.raises(WheelError, match="armv7l \\(32-bit on a aarch64 kernel\\)") as caught:
        choose(["onnxruntime"], Mixed("armv7l", "3.11", "2.36"))
    assert "64-bit system" in caught.value.remedy


def test_musl_is_refused_before_anything_is_fetched(index: Path) -> None:
    with pytest.raises(DeviceError, match="not glibc") as caught:
        choose(["onnxruntime"], Described("aarch64", "3.11", None))
    assert "Raspberry Pi OS" in caught.value.remedy


def test_what_the_profile_names_is_never_another_version(index: Path) -> None:
    spec = DeviceSpec("armv7l", runtimes={"tflite": "tflite-runtime==2.14.0"}, system_packages={"numpy": ">=1.23,<2"})
    device = Described("armv7l", "3.11", "2.36", packages={"numpy": "1.24.2"})
    wheel(index, "tflite-runtime", "2.15.0", "cp311-cp311-manylinux_2_34_armv7l")
    with pytest.raises(WheelError, match=r"tflite-runtime 2\.14\.0 has no wheel"):
        choose(["tflite"], device, spec)
    wheel(index, "tflite-runtime", "2.14.0", "cp311-cp311-manylinux_2_34_armv7l")
    chosen = choose(["tflite"], device, spec, images=True)
    assert [w.name for w in chosen.wheels] == ["tflite-runtime"]  # numpy is the system's, and so is pillow
    assert chosen.versions == {"tflite": "tflite-runtime 2.14.0"}
    assert chosen.system_packages == {"numpy": ">=1.23,<2"}
    assert "python3-pil" in chosen.notes[0]


@pytest.mark.parametrize(
    ("have", "told"), [(None, "has no numpy"), ("1.19.5", "numpy 1.19.5"), ("2.1.0", "numpy 2.1.0")]
)
def test_a_device_must_have_what_no_wheel_exists_for(have: str | None, told: str) -> None:
    spec = load_target("linux-armv7").device
    with pytest.raises(DeviceError, match=told) as caught:
        choose(["tflite"], Described("armv7l", "3.11", "2.36", packages={"numpy": have}), spec)
    assert "sudo apt install python3-numpy" in caught.value.remedy


def test_pillow_comes_with_models_of_images_only(index: Path) -> None:
    ours(index)
    wheel(index, "pillow", "13.0.0", f"cp311-cp311-{CPUS}")
    assert [w.name for w in choose(["onnxruntime"], ARM64, images=True).wheels] == ["numpy", "onnxruntime", "pillow"]
    assert [w.name for w in choose(["onnxruntime"], ARM64).wheels] == ["numpy", "onnxruntime"]


def test_a_device_that_fetches_itself_is_asked_for_no_more_than_is_here(index: Path) -> None:
    chosen = choose(["onnxruntime"], ARM64, online=True)
    assert chosen.wheels == ()
    assert chosen.requirements == (f"numpy<={HERE['numpy']}", f"onnxruntime<={HERE['onnxruntime']}")


def test_a_lost_network_is_not_called_a_missing_wheel(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    start = time.monotonic()
    with pytest.raises(WheelError, match="could not be fetched") as caught:
        choose(["onnxruntime"], ARM64)
    assert "network" in caught.value.remedy
    assert time.monotonic() - start < 120


def test_a_python_without_pip_is_named(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / "python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(WheelError, match="has no pip") as caught:
        choose(["onnxruntime"], ARM64)
    assert "ensurepip" in caught.value.remedy


def test_a_full_disk_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Exception, match="cannot write") as caught:
        choose(["onnxruntime"], ARM64)
    assert type(caught.value).__name__ == "DiskError"


def test_ranges_mean_what_they_mean_to_pip() -> None:
    for text in (">=1.23.2,<2", ">=1.23", ">=1.23.2"):
        for have in ("1.23.1", "1.23.2", "1.24", "1.26.4", "2.0", "2.0.1", "1.9.9"):
            assert meets(have, text) == SpecifierSet(text).contains(have), (have, text)


def test_platform_tags_are_those_that_a_glibc_can_run() -> None:
    tags = platforms("aarch64", "2.28")
    assert tags[0] == "manylinux_2_28_aarch64"
    assert "manylinux_2_17_aarch64" in tags
    assert "manylinux2014_aarch64" in tags
    assert "manylinux_2_29_aarch64" not in tags
    assert "manylinux2014_armv7l" not in platforms("armv7l", "2.5")


@pytest.mark.parametrize("name", [n for n in backends.BACKENDS if backends.get(n).missing() is None])
def test_a_runner_needs_no_package_but_those_that_travel(name: str, tmp_path: Path) -> None:
    """In a folder that holds links to these and nothing else."""
    backend = backends.get(name)
    for package in backend.WHEELS:
        module = find_spec(wheels.MODULES.get(package, package.replace("-", "_")))
        assert module is not None
        assert module.origin is not None
        home = Path(module.origin).parent
        for beside in home.parent.iterdir():
            stem = beside.name.split("-")[0].removesuffix(".libs")
            if stem == home.name:
                (tmp_path / beside.name).symlink_to(beside)
    program = (
        "import importlib.util as u,sys;"
        "s=u.spec_from_file_location('runner',sys.argv[1]);m=u.module_from_spec(s);s.loader.exec_module(m);"
        "print(m.version())"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", program, str(backend.RUNNER)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split()[-1][0].isdigit()
