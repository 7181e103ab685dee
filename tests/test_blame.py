"""Blame: a culprit that was planted is found, named, and told apart by its cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit.passes import blame as B
from edgekit.passes.apply_plan import prepared
from edgekit.passes.blame import Blame, blame
from edgekit.passes.quantize import QuantizeInt8
from tests.quantize_graphs import Array, Samples, graph, node, normal

F = np.float32
PLAIN = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")


class Data(Samples):
    """Arrays of which some can be taken."""

    def take(self, samples: int, seed: int) -> Data:
        return Data({k: v[:samples] for k, v in self.inputs.items()})


def rows_of(model: Any, x: Array, step: QuantizeInt8 = PLAIN) -> list[Blame]:
    data = Data({"x": x})
    return blame(model, step.plan(model, data), data)  # type: ignore[arg-type]


def net(**changed: Array) -> Any:
    """Conv, Relu, depthwise, Relu, Conv, mean, Gemm."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], name="first", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["r"], name="relu"),
        node("Conv", ["r", "u"], ["d"], name="depthwise", pads=[1, 1, 1, 1], group=8),
        node("Relu", ["d"], ["q"], name="relu2"),
        node("Conv", ["q", "v"], ["c"], name="point"),
        node("GlobalAveragePool", ["c"], ["g"], name="mean"),
        node("Flatten", ["g"], ["f"], name="flat"),
        node("Gemm", ["f", "e"], ["y"], name="dense"),
    ]
    weights = {
        "w": normal(8, 3, 3, 3), "b": normal(8), "u": normal(8, 1, 3, 3, seed=1), "v": normal(6, 8, 1, 1, seed=2),
        "e": normal(6, 4, seed=3), **changed,
    }  # fmt: skip
    return prepared(graph(nodes, {"x": ["n", 3, 6, 6]}, {"y": ["n", 4]}, weights))


X = normal(48, 3, 6, 6, seed=7)


def outlier_channel() -> Any:
    """A thousandfold channel in what the first layer gives, which the depthwise layer takes back."""
    w, b, u = normal(8, 3, 3, 3), normal(8), normal(8, 1, 3, 3, seed=1)
    w[5], b[5], u[5] = w[5] * 1000, b[5] * 1000, u[5] / 1000
    return net(w=w, b=b, u=u)


def test_an_outlier_channel() -> None:
    rows = rows_of(outlier_channel(), X)
    assert rows[0].node == "first"
    assert rows[0].op == "Conv"
    assert rows[0].alone > 0.8
    assert rows[0].weight < 0.1 * rows[0].alone
    assert "activation range" in rows[0].cause
    assert (
        "1000×" in rows[0].cause.replace(",", "") or "outlier channel (5)" in rows[0].cause or "differ" in rows[0].cause
    )
    assert rows[0].damage > 10 * rows[1].damage


def test_a_depthwise_layer_whose_channels_differ() -> None:
    """Of weights a thousand times apart, per-tensor scales leave nothing of the small ones."""
    u = normal(8, 1, 3, 3, seed=1)
    spread = np.geomspace(1, 1000, 8).astype(F)
    u *= spread[:, None, None, None]
    v = normal(6, 8, 1, 1, seed=2) / spread[None, :, None, None]
    rows = rows_of(net(u=u, v=v), X, QuantizeInt8(**{**vars(PLAIN), "per_channel": False}))
    assert rows[0].node == "depthwise"
    assert rows[0].cause.startswith(("depthwise, its weights", "activation range"))
    assert "channel ranges differ" in rows[0].cause
    own = {r.node: r for r in rows}["depthwise"]
    assert own.weight > 0


def test_one_weight_far_beyond_the_others_of_its_channel() -> None:
    w = np.abs(normal(4, 32, seed=1)) * F(0.01)
    w[:, 0] = 10
    model = prepared(
        graph(
            [node("Gemm", ["x", "w"], ["h"], name="lopsided", transB=1), node("Gemm", ["h", "v"], ["y"], name="next")],
            {"x": ["n", 32]},
            {"y": ["n", 3]},
            {"w": w, "v": normal(4, 3)},
        )
    )
    x = normal(48, 32, seed=2)
    x[:, 0] = 0  # and it is not even read
    found = {r.node: r for r in rows_of(model, x)}["lopsided"]
    assert found.weight > 0.5 * found.alone
    assert "median of its channel" in found.cause


def test_the_models_input() -> None:
    """Pixels of 1/1000 beside a channel of a thousand: the input itself is what int8 cannot hold."""
    w = normal(8, 3, 3, 3)
    w[:, 1:] *= 1000
    x = X.copy()
    x[:, 1:] /= 1000
    x[:, 0] *= 100
    w[:, 0] /= 100
    rows = rows_of(net(w=w), x)
    assert (rows[0].node, rows[0].op) == ("x", "input")
    assert "the model's input" in rows[0].cause


def test_every_rounding_has_a_row_and_the_worst_comes_first() -> None:
    model = net()
    rows = rows_of(model, X)
    assert {r.node for r in rows} == {"x", "first", "depthwise", "point", "mean", "dense"}
    assert [r.damage for r in rows] == sorted((r.damage for r in rows), reverse=True)
    for row in rows:
        assert row.weight <= row.alone
        assert set(row.to_json()) == {"node", "op", "alone", "without", "weight", "cause"}
    # nearly independent errors: the shares are of a whole
    assert 0.5 < sum(r.alone for r in rows) < 2


def test_shares_are_what_their_words_say() -> None:
    """Against the same sums taken from the switchboard itself."""
    from edgekit.passes.switchboard import Switchboard

    model, data = net(), Data({"x": X})
    plan = PLAIN.plan(model, data)  # type: ignore[arg-type]
    board = Switchboard(model, plan, ["y"])
    x = X[: B.SAMPLES]

    def error(on: Any) -> float:
        parts = [x[i : i + 8] for i in range(0, len(x), 8)]
        exact = [board.run({"x": p}, [])["y"] for p in parts]
        got = [board.run({"x": p}, on)["y"] for p in parts]
        return sum(float(((g - e) ** 2).sum() / (e**2).sum()) for g, e in zip(got, exact, strict=True))

    whole = error(board.parts)
    for row in blame(model, plan, data):
        own = [p for p in board.parts if p[0] == row.node]
        assert row.alone == pytest.approx(error(own) / whole, rel=1e-3, abs=1e-6)
        rest = [p for p in board.parts if p[0] != row.node]
        assert row.without == pytest.approx((whole - error(rest)) / whole, rel=1e-3, abs=1e-3)


def test_a_model_without_error_blames_nobody() -> None:
    """Weights and values on the grid: nothing is rounded."""
    model = prepared(
        graph([node("Gemm", ["x", "w"], ["h"], name="one"), node("Gemm", ["h", "w"], ["y"], name="two")],
              {"x": ["n", 2]}, {"y": ["n", 2]}, {"w": np.eye(2, dtype=F) * 127}))  # fmt: skip
    x = np.array([[127, -128], [0, 1], [5, -7]] * 8, F)
    rows = rows_of(model, x)
    assert all(np.isfinite([r.alone, r.without, r.weight]).all() for r in rows)


@pytest.mark.parametrize("x", [X[:1], X[:2], np.zeros((20, 3, 6, 6), F), np.full((20, 3, 6, 6), 2, F), X * F(1e15)])
def test_data_that_say_little(x: Array) -> None:
    rows = rows_of(net(), x)
    assert all(np.isfinite([r.alone, r.without, r.weight]).all() for r in rows)
    assert all("\n" not in r.cause for r in rows)


def test_dead_channels_are_no_spread() -> None:
    w, b = normal(8, 3, 3, 3), normal(8)
    w[2], b[2] = 0, 0
    rows = rows_of(net(w=w, b=b), X)
    assert "differ" not in {r.node: r for r in rows}["first"].cause


def test_repeats_itself_and_edits_nothing() -> None:
    model = net()
    before = M.to_bytes(model)
    assert rows_of(model, X) == rows_of(model, X)
    assert M.to_bytes(model) == before


def test_progress_counts_the_layers() -> None:
    model, data, told = net(), Data({"x": X}), []
    blame(model, PLAIN.plan(model, data), data, lambda *args: told.append(args))  # type: ignore[arg-type]
    assert [t[1] for t in told] == list(range(6))
    assert {t[2] for t in told} == {6}


def test_one_outlier_channel_among_many_is_named() -> None:
    """The channel is rare enough (one of 64, mostly 0) for 99.9 % of the values to be without it."""
    channels = 64
    w, b = normal(channels, 3, 1, 1), np.zeros(channels, F)
    w[:], b[:] = np.abs(w) * 0.1, 0.1
    w[17], b[17] = [[[90.0]], [[0.0]], [[0.0]]], -230.0
    v = normal(4, channels, 1, 1, seed=2)
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], name="wide"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("Conv", ["r", "v"], ["y"], name="reader"),
    ]
    model = prepared(graph(nodes, {"x": ["n", 3, 6, 6]}, {"y": ["n", 4, 6, 6]}, {"w": w, "b": b, "v": v}))
    rows = rows_of(model, X)
    found = {r.node: r for r in rows}["wide"]
    assert rows[0].node == "wide"
    assert "one outlier channel (17)" in found.cause
