"""Layers as regressions: their rows times their weights are what the layer gives, by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.passes import prune_readings as R
from edgekit.passes.prune_grams import MOST_FEATURES, Moments, taps
from tests.prune_nets import outputs
from tests.quantize_graphs import Array, graph, node, normal

CLOSE = 2e-5


def only(model: Any, name: str = "it") -> list[R.Reading]:
    return R.of_nodes(model, [name])


TRANSPOSED = {
    "plain": {},
    "strided": {"strides": [2, 2], "pads": [1, 1, 1, 1]},
    "uneven": {"strides": [2, 3], "pads": [0, 1, 1, 0], "output_padding": [1, 0]},
    "dilated": {"dilations": [2, 1], "strides": [1, 2]},
}


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_a_transposed_convolution_is_one_of_a_stretched_input(kind: str) -> None:
    w = {"w": normal(5, 3, 3, 3, seed=1), "b": normal(3, seed=2)}
    x = normal(2, 5, 4, 6, seed=3)
    model = graph(
        [node("ConvTranspose", ["x", "w", "b"], ["y"], name="it", **TRANSPOSED[kind])],
        {"x": ["n", 5, 4, 6]}, {"y": ["n", 3, None, None]}, w,
    )  # fmt: skip
    y = outputs(model, x)
    reading = only(model)[0]
    rows, wanted = reading.pairs(x, y, 10**6, np.random.default_rng(0))
    assert rows.shape[1] == y.shape[0] * y.shape[2] * y.shape[3]
    assert reading.layer.bias is not None
    got = rows @ reading.layer.weight + reading.layer.bias[:, None]
    np.testing.assert_allclose(got, wanted, atol=CLOSE * np.abs(wanted).max())
    other = only(graph_with(model, reading))[0]
    np.testing.assert_allclose(other.layer.weight, 2 * reading.layer.weight, rtol=1e-6)


def graph_with(model: Any, reading: R.Reading) -> Any:
    """The model with twice the weights, through `write`."""
    reading.write(2 * reading.layer.weight, np.zeros(reading.layer.weight.shape[::2]))
    return model


@pytest.mark.parametrize("attributes", [{"output_shape": [9, 9]}, {"auto_pad": "SAME_UPPER"}, {"pads": [3, 3, 3, 3]}])
def test_geometries_that_are_not_read(attributes: dict[str, Any]) -> None:
    model = graph(
        [node("ConvTranspose", ["x", "w"], ["y"], name="it", **attributes)],
        {"x": ["n", 2, 9, 9]}, {"y": ["n", 2, None, None]}, {"w": normal(2, 2, 3, 3)},
    )  # fmt: skip
    assert only(model) == []


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def recurrent(op: str, direction: str = "forward", **attributes: Any) -> tuple[Any, Array]:
    count, gates = 2 if direction == "bidirectional" else 1, {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    w = {
        "w": normal(count, gates * 6, 5, seed=1, scale=0.5), "r": normal(count, gates * 6, 6, seed=2, scale=0.5),
        "b": normal(count, gates * 12, seed=3, scale=0.5), "h": normal(count, 1, 6, seed=5),
    }  # fmt: skip
    if op == "LSTM":
        w["c"] = normal(count, 1, 6, seed=6)
    wide = {k: (np.repeat(v, 3, axis=1) if k in ("h", "c") else v) for k, v in w.items()}
    given = ["x", "w", "r", "b", "", "h", *(["c"] if op == "LSTM" else [])]
    model = graph(
        [node(op, given, ["y"], name="it", hidden_size=6, direction=direction, **attributes)],
        {"x": [7, 3, 5]}, {"y": [7, count, 3, 6]}, wide,
    )  # fmt: skip
    return model, normal(7, 3, 5, seed=4)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_an_lstm_follows_from_its_gates(direction: str) -> None:
    model, x = recurrent("LSTM", direction)
    y = outputs(model, x)
    reading = only(model)[0]
    assert reading.layer.bias is not None
    z = R.features(reading, x) @ reading.layer.weight + reading.layer.bias[:, None]
    i, o, f, g = np.split(z.reshape(len(z), 7, 3, -1), 4, axis=-1)
    initial = np.broadcast_to(normal(len(z), 1, 6, seed=6), (len(z), 3, 6))
    for at in range(len(z)):
        c = initial[at]
        backwards = direction == "reverse" or at == 1
        for step in reversed(range(7)) if backwards else range(7):
            c = sigmoid(f[at, step]) * c + sigmoid(i[at, step]) * np.tanh(g[at, step])
            np.testing.assert_allclose(sigmoid(o[at, step]) * np.tanh(c), y[step, at], atol=CLOSE)


@pytest.mark.parametrize("after", [0, 1])
def test_a_gru_follows_from_its_two_parts(after: int) -> None:
    model, x = recurrent("GRU", linear_before_reset=after)
    own, state = only(model)
    assert (own.key, state.key) == ("it:1", "it:2")
    assert own.layer.bias is not None
    assert state.layer.bias is not None
    h = R.features(state, x)
    zx, rx, nx = np.split((R.features(own, x) @ own.layer.weight + own.layer.bias[:, None])[0], 3, axis=-1)
    zh, rh, nh = np.split((h @ state.layer.weight + state.layer.bias[:, None])[0], 3, axis=-1)
    reset = sigmoid(rx + rh)
    if not after:
        nh = (reset * h[0]) @ state.layer.weight[0, :, 12:] + state.layer.bias[0, 12:]
    update, new = sigmoid(zx + zh), np.tanh(nx + (reset * nh if after else nh))
    y = (1 - update) * new + update * h[0]
    np.testing.assert_allclose(y.reshape(7, 3, 6), outputs(model, x)[:, 0], atol=CLOSE)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_is_written_as_it_was_read(op: str) -> None:
    model, x = recurrent(op)
    before = outputs(model, x)
    for reading in only(model):
        reading.write(reading.layer.weight, np.zeros(reading.layer.weight.shape[::2]))
    np.testing.assert_allclose(outputs(model, x), before, atol=1e-6)


def test_large_windows_are_looked_at_by_channel() -> None:
    x = normal(3, 300, 4, 4, seed=1)
    weights = {"w": normal(4, 300, 3, 3, seed=2)}
    model = graph(
        [node("Conv", ["x", "w"], ["y"], name="it", kernel_shape=[3, 3])], {"x": ["n", 300, 4, 4]},
        {"y": ["n", 4, 2, 2]}, weights,
    )  # fmt: skip
    reading = only(model)[0]
    assert reading.layer.weight.shape[1] > MOST_FEATURES
    assert taps(reading) == 9
    found = Moments(reading, 9)
    rows = reading.inputs(x, 10**6, np.random.default_rng(0))
    found.extend(rows)
    by_tap = rows[0].reshape(-1, 300, 9).transpose(0, 2, 1).reshape(-1, 300).astype(np.float64)
    np.testing.assert_allclose(found.covariance[0], np.cov(by_tap.T, bias=True), atol=1e-5)
    np.testing.assert_array_equal(found.by_tap(found.weight), reading.layer.weight)
