"""Seconds per operator from LiteRT's own profiler: the same outputs as the interpreter's, one row per operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.backends import tflite as backend
from edgekit.bench.client import Worker, local_command, thread_environment
from edgekit.dataset import random_dataset
from edgekit.errors import WorkerError
from edgekit.model import signature
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from tests.models import mobile_nhwc

pytest.importorskip("ai_edge_litert")

RUNS = 3


def batch(size: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(size).standard_normal((size, 10, 10, 3)).astype(np.float32)}


@pytest.fixture(scope="module", params=["float32", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(f"profiled-ü-{request.param}")
    model = Fold()(mobile_nhwc(), None)
    if request.param == "int8":
        model = QuantizeInt8()(model, random_dataset(signature(model), 64))
    backend.lower(model, request.param, home)
    return home


@pytest.mark.parametrize("size", [1, 3])
def test_it_runs_the_same_file_to_the_same_outputs(folder: Path, size: int) -> None:
    from edgekit.backends.runners.tflite import open_session

    session = open_session(str(folder), 1, profile=True)
    feeds = batch(size)
    call = session.bind(feeds)
    for _ in range(RUNS):
        call()
    assert session._profiled is not None
    shape, content = session._profiled.read("y")
    wanted = session.run(feeds)["y"]
    assert shape == wanted.shape
    np.testing.assert_array_equal(np.frombuffer(content, np.float32).reshape(shape), wanted)
    rows = session.layers()
    assert [row["calls"] for row in rows] == [RUNS] * len(rows)
    # the file's two 1×1 CONV_2D and its FULLY_CONNECTED are one kind of operator to XNNPACK; an int8 RELU it leaves
    told = [row["op"].partition(" (")[0] for row in rows]
    assert (told.count("Fully Connected"), told.count("Convolution"), told.count("Add")) == (3, 1, 1), rows
    assert [row["op"] for row in rows if "LiteRT" in row["op"]] == (["RELU (LiteRT)"] if told.count("RELU") else [])
    assert len({row["name"] for row in rows}) == len(rows)


def test_kernels_that_are_no_delegates_are_told_by_litert(folder: Path) -> None:
    environment = {**thread_environment(1), "EDGEKIT_TFLITE_KERNELS": "builtin"}
    with Worker(local_command(backend.RUNNER, folder, 1, profile=True), "t", env=environment) as worker:
        worker.load()
        worker.first(batch(1))
        worker.warmup(RUNS, 0.0, 5.0)
        ops = [row["op"] for row in worker.layers()]
    assert any(op == "CONV_2D (LiteRT)" for op in ops), ops
    assert not any("XNNPACK" in op for op in ops), ops


def test_what_it_cannot_time_is_said(folder: Path) -> None:
    environment = {**thread_environment(1), "EDGEKIT_TFLITE_KERNELS": "reference"}
    with (
        Worker(local_command(backend.RUNNER, folder, 1, profile=True), "t", env=environment) as worker,
        pytest.raises(WorkerError, match="profiler does not run the reference kernels"),
    ):
        worker.load()
