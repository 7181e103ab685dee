"""Label-free recovery: what is trained comes nearer to its teacher, by ONNX Runtime's results, and never farther."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit import errors, recover
from edgekit import model as M
from edgekit.dataset import Dataset, Preprocessing
from edgekit.passes.fold import Fold
from edgekit.passes.prune_channels import PruneChannels, prepared_for_pruning
from edgekit.readers.arrays import ArrayReader, MemoryColumn
from edgekit.sources import keras_hints, keras_trainer
from tests import models
from tests import quantize_graphs as graphs
from tests.test_sources_keras import keras_python  # noqa: F401 (a fixture)

Array = np.ndarray[Any, Any]


def _data(model: ir.Model, samples: int, seed: int) -> Dataset:
    """Samples that fit the model: normal numbers."""
    sig = M.signature(model)
    rng = np.random.default_rng(seed)
    columns = {
        s.name: MemoryColumn(rng.normal(size=(samples, *s.concrete(1)[1:])).astype(np.float32)) for s in sig.inputs
    }
    return Dataset("seeded", Preprocessing(), ArrayReader(columns, None)).bind(sig)


def _outputs(model: ir.Model, data: Dataset) -> dict[str, Array]:
    session = M.FloatSession(model)
    parts = [session.run(b.inputs) for b in data.batches(2)]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _disturbed(model: ir.Model, share: float) -> ir.Model:
    """The same graph with noise on its weights, in proportion to their size."""
    out = M.clone(model)
    rng = np.random.default_rng(7)
    for name, value in out.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.dtype == np.float32 and array.size > 1:
            noise = rng.normal(size=array.shape) * array.std() * share
            value.const_value = ir.tensor((array + noise).astype(np.float32), name=name)
    return out


# --- without Keras --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("places", [(1, 2), (2, 3)])
@pytest.mark.parametrize("mirror", [False, True])
def test_moved_images_are_crops_of_the_reflected_image(places: tuple[int, int], mirror: bool) -> None:
    """Each result is found among all crops of numpy's own reflecting pad, mirrored or not."""
    rng = np.random.default_rng(0)
    shape = (20, 8, 10, 3) if places == (1, 2) else (20, 3, 8, 10)
    images = rng.random(shape).astype(np.float32)
    got = keras_trainer.moved(images, places, 0.25, np.random.default_rng(1), mirror=mirror)
    assert got.shape == shape
    assert got.dtype == np.float32
    last = np.moveaxis(images, 1, -1) if places == (2, 3) else images
    seen = np.moveaxis(got, 1, -1) if places == (2, 3) else got
    mirrored = 0
    for image, result in zip(last, seen, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        crops = [padded[y : y + 8, x : x + 10] for y in range(5) for x in range(5)]
        plain = any(np.array_equal(result, c) for c in crops)
        turned = any(np.array_equal(result, c[:, ::-1]) for c in crops)
        assert plain or (mirror and turned)
        mirrored += not plain
    assert (0 < mirrored < 20) == mirror


def test_mixed_samples_lie_between_two_samples() -> None:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    (got,) = keras_trainer.mixed([x], np.random.default_rng(0))
    assert got.dtype == np.float32
    assert got.shape == x.shape
    np.testing.assert_allclose(got[:, 1] - got[:, 0], 1.0, atol=1e-5)  # all samples lie on this line
    assert got.min() >= 0
    assert got.max() <= 11
    assert not np.array_equal(got, x)


@pytest.mark.parametrize(
    ("losses", "way"),
    [
        ({"plain": 0.5, "moved": 0.52, "mixed": 0.55}, "mixed"),  # 90 % of the best one's gain
        ({"plain": 0.5, "moved": 0.52, "mixed": 0.70}, "moved"),
        ({"plain": 1.1, "moved": 1.2, "mixed": 1.3}, "plain"),  # nothing gains
        ({"plain": 0.5, "moved": float("nan"), "mixed": float("inf")}, "plain"),
        ({"plain": float("nan"), "moved": float("nan")}, "plain"),
    ],
)
def test_the_strongest_way_is_taken_that_gains_enough(losses: dict[str, float], way: str) -> None:
    assert keras_trainer.chosen(losses, 1.0, 0.75) == way


@pytest.mark.parametrize("axis", [1, 3])
def test_the_channels_of_the_teacher_are_told_from_fewer(axis: int) -> None:
    """Over two batches as numpy's least squares has it over all rows at once."""
    rng = np.random.default_rng(0)
    got = rng.normal(size=(12, 3, 4, 3)).astype(np.float32) + 2
    mixing = rng.normal(size=(3, 7)).astype(np.float32)
    last = np.moveaxis(got, axis, -1) @ mixing + rng.normal(size=(12, *np.moveaxis(got, axis, -1).shape[1:3], 7)) + 1
    want = np.ascontiguousarray(np.moveaxis(last, -1, axis)).astype(np.float32)
    moments = keras_hints.Moments(want[:8], got[:8])
    for part in (slice(0, 8), slice(8, 12)):
        moments.extend(want[part], got[part])
    hint = moments.hint()
    x = np.c_[np.moveaxis(got, axis, -1).reshape(-1, 3), np.ones(got.size // 3)]
    best = np.linalg.lstsq(x, np.moveaxis(want, axis, -1).reshape(-1, 7), rcond=None)[0]
    assert hint.axis == axis
    np.testing.assert_allclose(hint.matrix, best[:3], atol=2e-3)
    np.testing.assert_allclose(hint.shift, best[3], atol=5e-3)
    assert hint.spread == pytest.approx(want.var(), rel=1e-5)


def test_as_many_channels_are_compared_one_by_one() -> None:
    want, got = (np.random.default_rng(seed).normal(size=(6, 5, 4)).astype(np.float32) for seed in (0, 1))
    moments = keras_hints.Moments(want, got)
    moments.extend(want, got)
    hint = moments.hint()
    assert hint.axis is None
    assert hint.spread == pytest.approx(want.var(), rel=1e-5)


def test_values_that_blocks_hand_on() -> None:
    """A linear bottleneck, and a sum behind its activation; nothing within blocks, and nothing of other shapes."""

    def net(inner: int, stream: int, pixels: int = 6) -> ir.Model:
        weights = {
            "w0": graphs.normal(stream, 3, 1, 1),
            "w1": graphs.normal(inner, stream, 1, 1),
            "w2": graphs.normal(stream, inner, 1, 1),
        }
        weights |= {"w3": graphs.normal(8, stream, 1, 1), "w4": graphs.normal(8, 8, 1, 1), "w5": graphs.normal(8, 4)}
        nodes = [
            graphs.node("Conv", ["x", "w0"], ["bottleneck"]),
            graphs.node("Conv", ["bottleneck", "w1"], ["wide"]), graphs.node("Relu", ["wide"], ["active"]),
            graphs.node("Conv", ["active", "w2"], ["narrow"]),
            graphs.node("Conv", ["narrow", "w3"], ["raw"]), graphs.node("Relu", ["raw"], ["way"]),
            graphs.node("Conv", ["way", "w4"], ["other"]),
            graphs.node("Add", ["way", "other"], ["sum"]), graphs.node("Relu", ["sum"], ["handed"]),
            graphs.node("GlobalAveragePool", ["handed"], ["mean"]), graphs.node("Flatten", ["mean"], ["flat"]),
            graphs.node("Gemm", ["flat", "w5"], ["y"]),
        ]  # fmt: skip
        return Fold()(graphs.graph(nodes, {"x": ["n", 3, pixels, pixels]}, {"y": ["n", 4]}, weights), None)

    assert recover.handed_on(net(12, 6), net(5, 4)) == ["bottleneck", "narrow", "handed"]
    assert recover.handed_on(net(12, 6), net(5, 4, pixels=8)) == []


def test_shared_constants_are_taken_apart_and_nothing_changes() -> None:
    model = Fold()(models.mlp(), None)
    gemms = [n for n in model.graph if n.op_type == "Gemm"]
    square = np.eye(16, dtype=np.float32)
    for node in gemms:  # a weight that two nodes read
        node.replace_input_with(0, model.graph.inputs[0])
    shared = ir.Value(name="w", shape=ir.Shape((5, 12)), type=ir.TensorType(ir.DataType.FLOAT))
    shared.const_value = ir.tensor(square[:5, :12].copy(), name="w")
    model.graph.register_initializer(shared)
    for node, trans in zip(gemms, (1, 1), strict=True):
        node.replace_input_with(1, shared)
        node.attributes["transB"] = ir.AttrInt64("transB", trans)
        node.resize_inputs(2)
    out = recover.unshared(model)
    names = [n.inputs[1].name for n in out.graph if n.op_type == "Gemm" and n.inputs[1] is not None]
    assert len(set(names)) == 2
    assert "w" in names
    for name in names:
        value = out.graph.initializers[name or ""].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), square[:5, :12])


def test_models_of_different_signature_are_refused() -> None:
    teacher, student = Fold()(models.mlp(), None), Fold()(models.mobile_nhwc(), None)
    with pytest.raises(errors.ShapeError, match="different inputs"):
        recover.distill(teacher, student, _data(teacher, 4, 0), _data(teacher, 4, 1), 1.0)
    with pytest.raises(errors.UsageError, match="0 seconds"):
        recover.distill(teacher, teacher, _data(teacher, 4, 0), _data(teacher, 4, 1), 0.0)


def test_a_python_without_tensorflow_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"  # a real Python that sees the standard library only
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("EDGEKIT_KERAS_PYTHON", str(bare))
    model = Fold()(models.mlp(), None)
    with pytest.raises(errors.MissingExtraError, match=r"needs tensorflow.*pip install 'edgekit\[keras\]'"):
        recover.distill(model, model, _data(model, 4, 0), _data(model, 4, 1), 1.0)


def test_an_interrupt_ends_the_process_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    body += "print(json.dumps({'step': [0.1, 1.0]}), flush=True)\ntime.sleep(600)"
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport json, os, sys, time\nsys.stdin.readline()\n{body}\n")
    python.chmod(0o755)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("EDGEKIT_KERAS_PYTHON", str(python))
    told: list[tuple[str, float, float]] = []

    def interrupt(stage: str, done: float, total: float) -> None:
        told.append((stage, done, total))
        raise KeyboardInterrupt

    model = Fold()(models.mlp(), None)
    with pytest.raises(KeyboardInterrupt):
        recover.distill(model, model, _data(model, 4, 0), _data(model, 4, 1), 60.0, progress=interrupt)
    assert told == [("distill", 0.1, 1.0)]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list(tmp_path.glob("edgekit-*"))


# --- with Keras -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_and_the_same_steps_give_the_same_weights(
    keras_python: str,  # noqa: F811
) -> None:
    teacher = Fold()(models.mobile_nhwc(), None)
    student = _disturbed(teacher, 0.3)
    data, held, fresh = (_data(teacher, n, seed) for n, seed in ((96, 0), (48, 1), (64, 2)))
    runs = [recover.distill(teacher, student, data, held, 60.0, seed=3, steps=120) for _ in range(2)]
    (out, record), (again, _) = runs
    assert M.to_bytes(out) == M.to_bytes(again)
    assert record["steps"] == 120
    assert set(record["trials"]) == {"plain", "moved", "moved+mixed", "mirrored+mixed"}
    assert record["loss_after"] < record["loss_before"]
    assert [n.name for n in out.graph] == [n.name for n in student.graph]
    assert set(out.graph.initializers) == set(student.graph.initializers)
    want, before, after = (_outputs(m, fresh)["y"] for m in (teacher, student, out))
    assert np.square(after - want).mean() < 0.5 * np.square(before - want).mean()


@pytest.mark.slow
def test_a_student_with_fewer_channels_follows_inner_values_too(keras_python: str) -> None:  # noqa: F811
    model = Fold()(models.mobile_nhwc(), None)
    data, held, fresh = (_data(model, n, seed) for n, seed in ((96, 0), (48, 1), (64, 2)))
    step = PruneChannels(budget=0.6, multiple=1)
    student, _ = step.apply(model, step.plan(model, data, held), data)
    out, record = recover.distill(prepared_for_pruning(model), student, data, held, 60.0, steps=200)
    assert record["hints"] == ["e"]
    assert record["loss_after"] < record["loss_before"]
    assert [v.name for v in out.graph.outputs] == ["y"]
    want, before, after = (_outputs(m, fresh)["y"] for m in (model, student, out))
    assert np.square(after - want).mean() < np.square(before - want).mean()


@pytest.mark.slow
def test_what_training_makes_worse_is_not_kept(
    keras_python: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Steps of a hundred times the weights' size wreck any net; two outputs, and a batch that is fixed."""
    monkeypatch.setattr(recover, "RATE", 100.0)
    teacher = Fold()(models.cnn_nchw(), None)
    student = _disturbed(teacher, 0.05)
    out, record = recover.distill(teacher, student, _data(teacher, 21, 0), _data(teacher, 9, 1), 60.0, steps=8)
    assert record["loss_after"] == record["loss_before"]
    assert record["samples"] == 20  # whole batches of two
    assert M.to_bytes(out) == M.to_bytes(recover.unshared(student))
