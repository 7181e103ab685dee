"""Workers on a device through ssh: real connections that are dropped, real workers that die. No runtime is needed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bench import machine
from edgekit.bench.client import WORKER_FILE, thread_environment
from edgekit.bench.entry import Entry
from edgekit.bench.run import run_bench
from edgekit.deploy.bundle import Bundle
from edgekit.deploy.remote import DeviceHost
from edgekit.deploy.ssh import Host
from edgekit.errors import HostError, WorkerError
from edgekit.model import Signature, TensorSpec
from tests.device.devices import Device
from tests.test_bench_run import NUMPY_RUNNER, PACE
from tests.test_deploy_agent import ON_DEVICE
from tests.test_deploy_agent import numpy_wheel as numpy_wheel

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux" or machine.architecture() != "x86_64",
    reason="this Python's numpy is sent to a Debian 12 on x86-64",
)
X = np.arange(6, dtype=np.float32).reshape(2, 3)
SIGNATURE = Signature((TensorSpec("x", "float32", ("n", 3)),), (TensorSpec("x_out", "float32", ("n", 3)),))
BEHAVIOUR: dict[str, dict[str, Any]] = {
    "numpy-float32": {},
    "numpy-int8": {"scale": 2.5},  # its golden answers are 2 x
    "other-float32": {"fail": "die"},
}


@pytest.fixture(scope="module")
def bundle(numpy_wheel: bytes) -> tuple[Bundle, str, bytes]:
    """(it, its digest, as a tar) of three candidates that multiply by two: one does, one does not, one dies."""
    golden = io.BytesIO()
    np.savez(golden, **{"in.x": X, "out.x_out": 2 * X})
    files = {
        "golden/all.npz": golden.getvalue(),
        "runners/numpy.py": NUMPY_RUNNER.read_bytes(),
        "worker.py": WORKER_FILE.read_bytes(),
        "selftest.py": (ON_DEVICE / "selftest.py").read_bytes(),
        "wheels/numpy-1-py3-none-any.whl": numpy_wheel,
    }
    for name, behaviour in BEHAVIOUR.items():
        files[f"artifacts/{name}/behaviour.json"] = json.dumps(behaviour).encode()
    told = {"runner": "runners/numpy.py", "golden": "golden/all.npz", "tolerance": {"kind": "exact"}}
    wheel = {"file": "wheels/numpy-1-py3-none-any.whl", "name": "numpy", "version": "1"}
    manifest = {
        "schema": 1, "kind": "bundle", "name": "m", "target": "t", "ship": "numpy-float32", "edgekit": "0",
        "candidates": {name: {**told, "folder": f"artifacts/{name}"} for name in BEHAVIOUR},
        "requires": {}, "wheels": [{**wheel, "sha256": hashlib.sha256(numpy_wheel).hexdigest()}],
        "files": {n: {"sha256": hashlib.sha256(d).hexdigest(), "size_bytes": len(d)} for n, d in files.items()},
    }  # fmt: skip
    text = json.dumps(manifest).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in {"manifest.json": text, **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Bundle(text, files, manifest=manifest), hashlib.sha256(text).hexdigest(), out.getvalue()


def brought(host: Host, bundle: tuple[Bundle, str, bytes]) -> DeviceHost:
    made, digest, tar = bundle
    request = {"cmd": "install", "slot": "bench-m", "digest": digest, "keep": 0, "test": False}
    reply = host.call(request, [tar])
    facts = host.call({"cmd": "state"})["facts"]
    return DeviceHost(host, facts, reply["folder"], reply["environment"], made)


@pytest.fixture(scope="module")
def there(amd64_device: Device, bundle: tuple[Bundle, str, bytes]) -> Iterator[DeviceHost]:
    with Host(amd64_device.alias, config=amd64_device.config) as host:
        yield brought(host, bundle)


def entry(name: str) -> Entry:
    backend, _, precision = name.partition("-")
    return Entry("t", backend, precision, Path("-"), Path("-"), "0" * 64, 1, SIGNATURE)


def test_a_worker_there_computes_with_the_threads_that_were_asked(
    there: DeviceHost, bundle: tuple[Bundle, str, bytes]
) -> None:
    with there.worker(entry("numpy-float32"), 3, 2) as worker:
        assert worker.load().version.startswith("numpy ")
        np.testing.assert_array_equal(worker.infer({"x": X})["x_out"], 2 * X)
        mine = f"{bundle[1]}/worker.py\0--runner".encode()
        (process,) = [p for p in Path("/proc").glob("[0-9]*") if mine in _read(p / "cmdline")]
        environment = dict(v.split(b"=", 1) for v in _read(process / "environ").split(b"\0") if b"=" in v)
    for name in thread_environment(3).keys() - os.environ.keys():
        assert environment[name.encode()] == b"3"
    assert mine not in _read(process / "cmdline")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_golden_answers_are_compared_with_what_came_along(there: DeviceHost) -> None:
    golden = there.golden(entry("numpy-float32"))
    np.testing.assert_array_equal(golden.inputs["x"], X)
    assert golden.difference({"x_out": 2 * X}) is None
    told = golden.difference({"x_out": np.float32(2.5) * X})
    assert told == f"answers otherwise on {there.name} than here: output 'x_out' differs in 5 of 6 values"


def test_a_worker_that_a_signal_ends_is_no_lost_connection(there: DeviceHost) -> None:
    with there.worker(entry("other-float32"), 1, 0) as worker:
        worker.load()
        with pytest.raises(WorkerError, match="the worker died with signal 6: fatal: kernel aborted"):
            worker.infer({"x": X})


def test_the_bench_there(there: DeviceHost, tmp_path: Path) -> None:
    entries = [entry(name) for name in BEHAVIOUR]
    told = run_bench(entries, None, threads=(1,), pace=PACE, host=there, results_path=tmp_path / "results.jsonl")
    good, wrong, dead = told["artifacts"]
    assert [good["valid"], wrong["valid"], dead["valid"]] == [True, False, False]
    assert "differs in 5 of 6 values" in wrong["reasons"][0]
    assert "the worker died with signal 6: fatal: kernel aborted" in dead["reasons"][0]
    assert good["latency_s"]["samples"] >= 20
    assert good["latency_s"]["p50"] > 0
    assert told["machine"]["host"] == there.name
    assert told["machine"]["before"].keys() == machine.state().keys()


def test_a_connection_that_drops_is_named(make_device: Any, bundle: tuple[Bundle, str, bytes]) -> None:
    device = make_device("amd64")
    with Host(device.alias, config=device.config) as host:
        there = brought(host, bundle)
        with there.worker(entry("numpy-float32"), 1, 0) as worker:
            worker.load()
            assert device.drop_connections() > 0
            with pytest.raises(WorkerError, match=f"the connection to {device.alias} was lost"):
                worker.infer({"x": X})
        device.stop()
        with pytest.raises(HostError, match=device.alias):
            there.state()
