"""The integer network: its interpreter against loops over Python integers, its files, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.backends.fpga import interpreter
from edgekit.backends.fpga.net import IntegerNet, Layer, Tensor
from edgekit.errors import ArtifactError, ShapeError, UnsupportedOpError
from tests.fpga_nets import KINDS, integers, random_net, slow


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_interpreter_equals_integer_loops(seed: int) -> None:
    net = random_net(seed)
    x = integers(net, 2, seed)
    got = interpreter.run(net, x)
    for sample in range(2):
        expected = slow(net, x[sample])
        for name, values in expected.items():
            np.testing.assert_array_equal(got[name][sample], values, err_msg=name)


def test_random_nets_have_every_kind_and_live_outputs() -> None:
    kinds, live = set(), 0
    for seed in range(60):
        net = random_net(seed)
        kinds |= {layer.kind for layer in net.layers}
        values = interpreter.run(net, integers(net, 4, seed))
        live += len(np.unique(values[net.layers[0].output])) > 1
    assert kinds == set(KINDS)
    assert live > 40


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_sums_stay_within_their_stated_width(seed: int) -> None:
    net = random_net(seed)
    x = integers(net, 8, seed)
    x[1] = net.input.limits[1]
    values = interpreter.run(net, x)
    for layer in net.layers:
        if layer.kind == "concat":
            continue
        acc = interpreter._sums(net, layer, [values[n] for n in layer.inputs])
        acc = acc + np.array([1 << (s - 1) if s > 0 else 0 for s in layer.shift])
        bits = net.accumulator_bits(layer)
        assert acc.min() >= -(2 ** (bits - 1))
        assert acc.max() < 2 ** (bits - 1)


def one_dense(weight: int = 1, bias: int = 0, shift: int = 1, **changes: object) -> IntegerNet:
    x, y = Tensor("x", (1,), 8, 0), Tensor("y", (1,), 8, -shift)
    layer = Layer("dense", "d", ("x",), "y", -128, 127, (shift,), np.full((1, 1), weight, np.int8), 8, (0,))
    layer = replace(layer, **{"bias": np.array([bias], np.int64), **changes})  # type: ignore[arg-type]
    return IntegerNet(x, {"x": x, "y": y}, (layer,), "y", source_shape=(1,))


def test_rounding_is_half_up_and_saturates() -> None:
    x = np.array([[-3], [-2], [-1], [0], [1], [2], [3]], np.int8)
    assert interpreter.outputs(one_dense(), x).ravel().tolist() == [-1, -1, 0, 0, 1, 1, 2]
    assert interpreter.outputs(one_dense(shift=-6), x).ravel().tolist() == [-128, -128, -64, 0, 64, 127, 127]


def test_host_rounds_half_up_and_reorders() -> None:
    x = Tensor("x", (1, 2, 2), 8, 1)
    net = IntegerNet(x, {"x": x}, (), "x", source_shape=(2, 1, 2), source_layout="CHW")
    real = np.array([[[[0.25, -0.25]], [[1000.0, -1000.0]]]], np.float32)
    assert net.quantized(real).tolist() == [[[[1, 127], [0, -128]]]]
    assert net.real(np.array([[3]])).tolist() == [[1.5]]
    with pytest.raises(ArtifactError, match="has shape"):
        net.quantized(np.zeros((1, 4), np.float32))


def test_wide_sums_are_exact() -> None:
    """2^24 + 1 is no float32: with a bias that puts the sum on a tie, one less would round down."""
    x, y = Tensor("x", (1025,), 8, 0), Tensor("y", (1,), 8, -20)
    weights = np.full((1, 1025), -128, np.int8)
    weights[0, -1] = 1
    bias = np.array([2**19 - 1], np.int64)
    layer = Layer("dense", "d", ("x",), "y", -128, 127, (20,), weights, 8, (0,), bias)
    net = IntegerNet(x, {"x": x, "y": y}, (layer,), "y", source_shape=(1025,))
    values = np.full((1, 1025), -128, np.int8)
    values[0, -1] = 1
    assert interpreter.outputs(net, values).item() == 17


def test_save_and_load(tmp_path: Path) -> None:
    net = random_net(3)
    path = tmp_path / "net.json"
    net.save(path)
    again = IntegerNet.load(path)
    assert again.to_json() == net.to_json()
    x = integers(net, 3, 0)
    for name, values in interpreter.run(net, x).items():
        np.testing.assert_array_equal(interpreter.run(again, x)[name], values)


@pytest.mark.parametrize("damage", ["cut", "schema", "arrays", "gone"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "net.json"
    random_net(3).save(path)
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[:-20])
    elif damage == "schema":
        path.write_text(text.replace('"schema": 1', '"schema": 99'))
    elif damage == "arrays":
        random_net(4).save(tmp_path / "other.json")
        (tmp_path / "other.npz").replace(path.with_suffix(".npz"))
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"convert again|copy the two files"):
        IntegerNet.load(path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inputs": ("z",)}, "before it is made"),
        ({"weight_bits": 1}, "beyond 1 bits"),
        ({"weights": np.zeros((1, 2), np.int8)}, "weights of shape"),
        ({"bias": np.zeros(1, np.int32)}, "int64"),
        ({"weight_exponents": (0, 0)}, "2 weight exponents"),
        ({"input_shifts": (-1,)}, "shifts"),
        ({"high": 128}, "range"),
    ],
)
def test_unsound_networks_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        one_dense(**changes)  # type: ignore[arg-type]


def test_too_wide_sums_are_refused() -> None:
    with pytest.raises(ArtifactError, match="shifts"):
        one_dense(shift=40)
    with pytest.raises(UnsupportedOpError, match="sums of 34 bits"):
        one_dense(bias=2**32)


def test_inputs_out_of_range_are_refused() -> None:
    with pytest.raises(ShapeError, match="saturate"):
        interpreter.run(one_dense(), np.array([[128]]))
    with pytest.raises(ShapeError, match="quantize"):
        interpreter.run(one_dense(), np.array([[1.0]]))
