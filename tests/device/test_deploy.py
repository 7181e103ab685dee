"""Deploys of a real model to devices behind real ssh: what is installed, what is refused, what a break leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import errors, pipeline
from edgekit.bench import machine
from edgekit.deploy import bundle as bundles
from edgekit.deploy import shipping
from edgekit.deploy.shipping import Where
from edgekit.deploy.wheels import Described
from edgekit.target import load_target
from tests.device.devices import Device, RealPi

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits"
TARGETS = ("tflite", "linux-arm64", "linux-armv7")
INT8 = ("tflite-int8", "onnxruntime-int8")
native = pytest.mark.skipif(machine.architecture() != "x86_64", reason="the native device is an x86-64 Debian")
pytestmark = pytest.mark.usefixtures("fetched_wheels")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits CNN for every kind of device here."""
    out = tmp_path_factory.mktemp("deploy") / "build"
    pipeline.convert(
        DIGITS / "digits_cnn.onnx", TARGETS, data=DIGITS / "digits_calib.npz", out=out, calibration="minmax",
        precisions=("float32", "int8"),
    )  # fmt: skip
    return out


def where(*devices: Device | RealPi, **given: Any) -> Where:
    return Where(tuple(d.alias for d in devices), devices[0].config, **given)


def row(document: dict[str, Any]) -> dict[str, Any]:
    (found,) = document["hosts"]
    return dict(found)


def ship(build: Path, device: Device | RealPi, target: str = "tflite", **given: Any) -> dict[str, Any]:
    return row(shipping.deploy(build, target, where(device), **given))


def current(device: Device, slot: str = "digits_cnn") -> str | None:
    link = device.home / ".local/share/edgekit/slots" / slot / "current"
    return os.readlink(link) if link.is_symlink() else None


def left_overs(device: Device) -> list[Path]:
    return [p for p in (device.home / ".local/share/edgekit").rglob(".incoming-*")]


def answers(device: Device | RealPi, slot: str = "digits_cnn") -> list[int]:
    """What ./run on the device says to a csv of test images."""
    with np.load(DIGITS / "digits_test.npz") as data:
        images, labels = data["x"][:4], data["y"][:4]
    rows = "\n".join(",".join(str(v) for v in image.reshape(-1)) for image in images)
    done = device.run(f"~/.local/share/edgekit/slots/{slot}/current/run --stdin --json", rows.encode() + b"\n")
    assert done.returncode == 0, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(labels), lines
    return [first(line) for line in lines]


def first(told: dict[str, Any]) -> int:
    """The best class of the only sample and output."""
    (sample,) = told["answers"]
    (output,) = sample.values()
    return int(output["top"][0]["index"])


@native
def test_deploys_once_and_a_second_time_does_nothing(build: Path, amd64_device: Device) -> None:
    first = ship(build, amd64_device, candidate="tflite-int8")
    assert first["status"] == "installed"
    assert first["trips"] <= 3
    assert current(amd64_device) == first["digest"]
    again = ship(build, amd64_device, candidate="tflite-int8")
    assert again["status"] == "already there"
    assert again["trips"] <= 3
    assert again["uploaded_bytes"] == 0
    assert again["digest"] == first["digest"]
    # another model of the same runtime brings only itself
    other = ship(build, amd64_device, candidate="tflite-float32")
    assert other["uploaded_bytes"] < 1_000_000
    back = row(shipping.rollback_to_last("digits_cnn", where(amd64_device)))
    assert back["digest"] == first["digest"]
    assert current(amd64_device) == first["digest"]
    looked = row(shipping.show(where(amd64_device)))
    assert looked["slots"]["digits_cnn"]["current"] == first["digest"]
    assert left_overs(amd64_device) == []
    row(shipping.take_away("digits_cnn", where(amd64_device)))
    assert current(amd64_device) is None


@native
def test_a_bundle_file_is_deployed_as_it_is_and_runs_where_it_was_unpacked(
    build: Path, amd64_device: Device, tmp_path: Path
) -> None:
    out = tmp_path / "digits ü.tar"
    written = shipping.write(build, "tflite", out, where(amd64_device), candidate="tflite-int8")
    assert written["bundle"]["size_bytes"] < 60e6
    (amd64_device.home / "unpacked").mkdir()
    shutil.unpack_archive(out, amd64_device.home / "unpacked", "tar", filter="data")
    with np.load(DIGITS / "digits_test.npz") as data:
        np.savez(amd64_device.home / "one.npz", image=data["x"][:1])
    done = amd64_device.run("cd unpacked && ./run ../one.npz --json")
    assert done.returncode == 0, done.stderr.decode()
    shipped = row(shipping.deploy(out, None, where(amd64_device), name="as-a-file"))
    assert shipped["digest"] == written["bundle"]["digest"]
    assert current(amd64_device, "as-a-file") == shipped["digest"]
    with pytest.raises(errors.BundleError, match="not linux-arm64"):
        shipping.deploy(out, "linux-arm64", where(amd64_device))
    blob = bytearray(out.read_bytes())
    blob[len(blob) // 2] ^= 1
    out.write_bytes(blob)
    with pytest.raises(errors.BundleError, match="altered"):
        shipping.deploy(out, None, where(amd64_device))


def test_arm64_installs_tests_and_runs(build: Path, arm64_device: Device | RealPi) -> None:
    made: dict[str, Any] = {}
    for candidate in ("onnxruntime-int8", "tflite-int8"):
        before = made
        made = ship(build, arm64_device, "linux-arm64", candidate=candidate)
        assert made["status"] in ("installed", "already there")
        assert made["bundle"]["size_bytes"] < 60e6
    with np.load(DIGITS / "digits_test.npz") as data:
        assert answers(arm64_device) == [int(v) for v in data["y"][:4]]
    assert row(shipping.rollback_to_last("digits_cnn", where(arm64_device)))["digest"] == before["digest"]


def test_int8_sums_are_the_same_bits_on_arm64(arm64_device: Device | RealPi, tmp_path: Path) -> None:
    """LiteRT on integers from end to end. ONNX Runtime rounds a few sums the other way there: its bound is wider."""
    net = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "v"], ["y"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [
            numpy_helper.from_array(np.random.default_rng(0).normal(size=(24, 3, 3, 3)).astype(np.float32), "w"),
            numpy_helper.from_array(np.random.default_rng(1).normal(size=(24, 10)).astype(np.float32), "v"),
        ],
    )  # fmt: skip
    onnx.save(helper.make_model(net, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(2).normal(size=(64, 3, 16, 16)).astype(np.float32))
    build, target = tmp_path / "build", load_target("linux-arm64")
    pipeline.convert(tmp_path / "net.onnx", ["linux-arm64"], data=tmp_path / "x.npz", out=build, io="int8")
    described = Described("aarch64", "3.11", "2.36")
    told = {c: bundles.make(build, target, (c,), described).manifest["candidates"][c]["tolerance"] for c in INT8}
    assert told["tflite-int8"] == {"kind": "exact"}
    assert told["onnxruntime-int8"]["kind"] == "relative"
    for candidate in INT8:
        assert ship(build, arm64_device, "linux-arm64", candidate=candidate)["status"] == "installed"


def test_armhf_takes_the_old_runtime_only(build: Path, armhf_device: Device) -> None:
    made = ship(build, armhf_device, "linux-armv7", candidate="tflite-int8")
    assert made["status"] == "installed"
    assert made["bundle"]["size_bytes"] < 25e6
    assert made["device"]["arch"] == "armv7l"
    with np.load(DIGITS / "digits_test.npz") as data:
        assert answers(armhf_device) == [int(v) for v in data["y"][:4]]
    with pytest.raises(errors.DeviceError, match="linux-armv7"):
        ship(build, armhf_device, "linux-arm64")
    assert current(armhf_device) == made["digest"]


# --- what goes wrong -------------------------------------------------------------------------------
@native
def test_another_architecture_is_refused_and_nothing_is_left(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64")
    with pytest.raises(errors.DeviceError, match="x86_64"):
        ship(build, device, "linux-arm64")
    assert not (device.home / ".local").exists()


@native
def test_a_full_disk(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64", disk_bytes=40 << 20)
    with pytest.raises(errors.DeviceDiskError, match="MB free"):
        ship(build, device)
    assert not (device.home / ".local/share/edgekit").exists()


@native
def test_a_disk_that_fills_up_while_installing(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64", disk_bytes=300 << 20)
    first = ship(build, device, candidate="tflite-float32")
    filler = device.fill(leave_bytes=60_000)
    from edgekit.deploy import device as devices

    with shipping.Where((device.alias,), device.config).open(device.alias) as host:
        looked = devices.probe(host, "digits_cnn", bundles.PACKAGES)
        made = bundles.make(build, load_target("tflite"), ("tflite-int8",), looked)
        with pytest.raises(errors.DeviceDiskError):
            host.call({"cmd": "install", "slot": "digits_cnn", "digest": made.digest}, made.tar_stream(looked.store))
    assert current(device) == first["digest"]
    assert left_overs(device) == []
    filler.unlink()
    assert ship(build, device, candidate="tflite-int8")["status"] == "installed"


@native
def test_a_home_that_cannot_be_written(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64")
    with device.read_only_home(), pytest.raises(errors.DeviceDiskError, match="cannot write"):
        ship(build, device)
    assert not (device.home / ".local").exists()


@native
def test_a_wrong_clock(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64", clock=-86400 * 400)
    with pytest.raises(errors.DeviceError, match="400 days behind"):
        ship(build, device)
    assert not (device.home / ".local").exists()
    assert ship(build, device, ignore_clock=True)["status"] == "installed"


@native
@pytest.mark.parametrize(
    ("name", "python", "told"),
    [("amd64", "none", "no 'python3'"), ("amd64-bullseye", "/usr/bin/python2.7", "does not run edgekit's agent")],
)
def test_no_python_and_an_old_one(
    build: Path, make_device: Callable[..., Device], name: str, python: str, told: str
) -> None:
    device = make_device(name, python=python)
    with pytest.raises(errors.DeviceError, match=told):
        ship(build, device)


@native
def test_a_python_that_no_wheels_were_fetched_for(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64-bullseye")
    assert row(shipping.show(where(device)))["device"]["python"] == "3.9"
    with pytest.raises(errors.WheelError, match=r"3\.9"):
        ship(build, device)
    assert not (device.home / ".local").exists()


@native
def test_keys(build: Path, make_device: Callable[..., Device], tmp_path: Path) -> None:
    device = make_device("amd64")
    config = tmp_path / "config"
    nothing = tmp_path / "known_hosts"
    nothing.write_text("")
    config.write_text(
        f"Host *\n    UserKnownHostsFile {nothing}\n    StrictHostKeyChecking no\nInclude {device.config}\n"
    )
    with pytest.raises(errors.HostKeyError, match="not known"):
        shipping.deploy(build, "tflite", Where((device.alias,), config))
    assert nothing.read_text() == "", "a key was accepted silently"
    device.remove_key()
    with pytest.raises(errors.LoginError):
        ship(build, device)
    device.change_host_key()
    with pytest.raises(errors.HostKeyError, match="not the one"):
        ship(build, device)
    device.stop()
    with pytest.raises(errors.HostError, match="no ssh server"):
        ship(build, device)
    with pytest.raises(errors.HostError, match="no host of that name"):
        shipping.deploy(build, "tflite", Where(("nobody@no-such-host.invalid",)))


@native
def test_a_killed_upload_and_a_dropped_connection(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64")
    first = ship(build, device, candidate="tflite-float32")
    shutil.rmtree(device.home / ".local/share/edgekit/store")  # so that the next one is long
    for harm in ("kill", "drop"):
        code = (
            "from pathlib import Path\nfrom edgekit.deploy import shipping\n"
            f"shipping.deploy(Path({str(build)!r}), 'tflite', shipping.Where(({device.alias!r},), "
            f"Path({str(device.config)!r})), candidate='tflite-int8')\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not left_overs(device) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it was over before it could be broken"
        if harm == "kill":
            process.send_signal(signal.SIGKILL)
        else:
            device.drop_connections()
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
        if harm == "drop":
            assert b"HostError" in said
        assert current(device) == first["digest"]
        deadline = time.monotonic() + 60
        while harm == "kill" and left_overs(device) and time.monotonic() < deadline:
            time.sleep(0.1)  # the agent there sees its input end, and clears up
    assert ship(build, device, candidate="tflite-int8")["status"] == "installed"
    assert left_overs(device) == []


@native
def test_a_file_that_was_altered_there_is_noticed(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64")
    first = ship(build, device, candidate="tflite-int8")
    model = next((device.home / ".local/share/edgekit/slots/digits_cnn").glob("*/artifacts/*/model.tflite"))
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    again = ship(build, device, candidate="tflite-int8")
    assert again["status"] == "installed"
    assert again["digest"] == first["digest"]
    assert model.read_bytes() == (build / "tflite/tflite-int8/model.tflite").read_bytes()


@native
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen (openssh-client)")
def test_a_device_that_trusts_signers(build: Path, make_device: Callable[..., Device], tmp_path: Path) -> None:
    device = make_device("amd64")
    for name in ("friend", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    allowed = device.home / ".config/edgekit/allowed_signers"
    allowed.parent.mkdir(parents=True)
    allowed.write_text("friend@home " + (tmp_path / "friend.pub").read_text())
    with pytest.raises(errors.SignatureError, match="signed"):
        ship(build, device)
    with pytest.raises(errors.SignatureError):
        ship(build, device, sign=tmp_path / "stranger")
    assert not (device.home / ".local").exists()
    assert ship(build, device, sign=tmp_path / "friend")["status"] == "installed"


@native
def test_several_devices_and_one_of_them_fails(build: Path, make_device: Callable[..., Device], tmp_path: Path) -> None:
    good, full = make_device("amd64"), make_device("amd64", disk_bytes=30 << 20)
    config = tmp_path / "both"
    for device, name in ((good, "good"), (full, "full")):
        text = device.config.read_text().replace(f"Host {device.alias}", f"Host {name}")
        config.write_text((config.read_text() if config.exists() else "") + text + "\n")
    document = shipping.deploy(build, "tflite", Where(("good", "full"), config))
    assert [(r["host"], r["status"]) for r in document["hosts"]] == [("good", "installed"), ("full", "failed")]
    assert document["hosts"][1]["exit_code"] == errors.DeviceDiskError.exit_code


@native
def test_the_command_line(build: Path, make_device: Callable[..., Device]) -> None:
    device = make_device("amd64")
    at = ["--host", device.alias, "--ssh-config", str(device.config)]

    def edgekit(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgekit", *words, *at], capture_output=True, text=True, check=False
        )

    done = edgekit("deploy", str(build), "-t", "tflite", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hosts"][0]["status"] == "installed"
    assert "already there" in edgekit("deploy", str(build), "-t", "tflite").stdout
    assert "digits_cnn" in edgekit("deploy", "--list").stdout
    with np.load(DIGITS / "digits_test.npz") as data:
        np.savez(device.home / "one.npz", image=data["x"][:1])
        label = int(data["y"][0])
    ran = edgekit("run", str(build), "-t", "tflite", "--input", str(device.home / "one.npz"), "--json")
    assert ran.returncode == 0, ran.stderr
    assert first(json.loads(ran.stdout)) == label
    done = edgekit("deploy", str(build), "-t", "tflite", "--rollback")
    assert done.returncode == errors.DeviceError.exit_code
    assert done.stderr.splitlines()[-1].startswith("error:")
    assert edgekit("deploy", str(build), "-t", "tflite", "--remove").returncode == 0
    assert edgekit("deploy", str(build)).returncode == 2  # three targets: which?
