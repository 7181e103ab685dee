"""`edgekit run --host` and a deployed `./run` against the same artifact here, through real ssh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit import errors, pipeline, running
from edgekit.deploy import shipping
from edgekit.deploy.shipping import Where
from tests.device.devices import Device, RealPi
from tests.device.test_deploy import DIGITS, native

NAME = "digits_cnn"
pytestmark = pytest.mark.usefixtures("fetched_wheels")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run there") / "build"
    pipeline.convert(
        DIGITS / "digits_cnn.onnx", ("tflite", "linux-arm64", "cpu"), data=DIGITS / "digits_calib.npz", out=out,
        calibration="minmax", precisions=("float32", "int8"),
    )  # fmt: skip
    return out


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    with np.load(DIGITS / "digits_test.npz") as data:
        np.savez(tmp_path / "s.npz", x=data["x"][:8])
    return tmp_path / "s.npz"


def asked(what: Path, device: Device | RealPi | None, *files: Path, **given: Any) -> list[dict[str, Any]]:
    said: list[str] = []
    name, config = (None, None) if device is None else (device.alias, device.config)
    with running.reached(name, config) as host:
        running.answers(what, None, files, say=said.append, as_json=True, host=host, **given)
    return [json.loads(text) for text in said]


def ranked(document: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The classes of each sample, the likeliest first."""
    return [next(iter(outputs.values()))["top"] for outputs in document["answers"]]


def deployed(build: Path, device: Device | RealPi, target: str, name: str, candidate: str = "tflite-int8") -> None:
    where = Where((device.alias,), device.config)
    (row,) = shipping.deploy(build, target, where, candidate=candidate, name=name)["hosts"]
    assert row["status"] in ("installed", "already there"), row


@native
def test_a_device_answers_as_this_machine_does(build: Path, samples: Path, amd64_device: Device) -> None:
    deployed(build, amd64_device, "tflite", "run-there")
    here = asked(build / "tflite" / "tflite-int8", None, samples)
    assert asked(build, amd64_device, samples, name="run-there") == here
    (there,) = asked(build, amd64_device, samples, name="run-there", top=1, out=samples.with_name("o.npz"))
    (scores,) = np.load(samples.with_name("o.npz")).values()
    assert [rows[0]["index"] for rows in ranked(there)] == np.argmax(scores, axis=1).tolist()
    # the program on the device, fed over the same connection, says the same
    (amd64_device.home / "s.npz").write_bytes(samples.read_bytes())
    done = amd64_device.run("~/.local/share/edgekit/slots/run-there/current/run --json s.npz")
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["answers"] == here[0]["answers"]


@native
def test_a_stream_stays_open_through_the_command_line(build: Path, samples: Path, amd64_device: Device) -> None:
    deployed(build, amd64_device, "tflite", "run-there")
    command = [sys.executable, "-m", "edgekit", "run", str(build), "--host", amd64_device.alias, "--name", "run-there"]
    command += ["--ssh-config", str(amd64_device.config), "--stdin", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line, key in (
            (f"{samples}\n", "answers"),
            ("\n", "error"),
            ("none.npz\n", "error"),
            (f"{samples}\n", "answers"),
        ):
            process.stdin.write(line.encode())
            process.stdin.flush()
            assert key in json.loads(process.stdout.readline())
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@native
def test_what_is_not_there_is_one_line(build: Path, samples: Path, amd64_device: Device) -> None:
    with pytest.raises(errors.DeviceError, match="'nothing' is not deployed there — run `edgekit deploy"):
        asked(build, amd64_device, samples, name="nothing")
    with pytest.raises(errors.UsageError, match="--candidate with --host"):
        asked(build, amd64_device, samples, candidate="tflite-int8")


@native
def test_python_3_9_of_debian_11_runs_what_travels(
    build: Path, samples: Path, make_device: Callable[..., Device]
) -> None:
    """Its files are read and its functions exist there, with the runtime, numpy and pillow of that time."""
    device = make_device("amd64-bullseye")
    deployed(build, device, "cpu", NAME, "onnxruntime-float32")
    (here,), (there,) = asked(build / "cpu" / "onnxruntime-float32", None, samples), asked(build, device, samples)
    for expected, got in zip(ranked(here), ranked(there), strict=True):
        assert [row["index"] for row in got] == [row["index"] for row in expected]
        # another version of the runtime: float32 in another order
        np.testing.assert_allclose(*([row["score"] for row in rows] for rows in (got, expected)), rtol=1e-4)
    (device.home / "s.npz").write_bytes(samples.read_bytes())
    with np.load(samples) as data:
        Image.fromarray(np.uint8(data["x"][0])).save(device.home / "0.png")
    folder = f".local/share/edgekit/slots/{NAME}/current"
    done = device.run(f"{folder}/run s.npz --json && {folder}/run 0.png --json && {folder}/run --stdin", b"0 1\n\n")
    assert done.returncode == 0, done.stderr.decode()
    arrays, picture, *lines = done.stdout.decode().splitlines()
    assert json.loads(arrays)["answers"] == there["answers"]
    assert json.loads(picture)["answers"] == there["answers"][:1]
    assert lines[0].startswith("error: samples have shape (n, 2)")
    assert lines[1].startswith("error: an empty line")


def test_arm64_answers_bit_for_bit(build: Path, samples: Path, arm64_device: Device | RealPi) -> None:
    deployed(build, arm64_device, "linux-arm64", "run-there")
    here = asked(build / "linux-arm64" / "tflite-int8", None, samples)
    assert asked(build, arm64_device, samples, name="run-there") == here
