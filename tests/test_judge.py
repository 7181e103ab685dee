"""What a quantized model loses: shares, decibels and drops by hand, and when one is surely better than another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.budget import lost
from edgekit.errors import NoCalibrationDataError, NonFiniteError
from edgekit.passes import judge as J
from edgekit.passes.apply_plan import apply_plan, prepared
from edgekit.passes.judge import Judge, Score, best, better, class_scores, judged
from edgekit.passes.quantize import QuantizeInt8
from tests.quantize_graphs import Array, Batch, Samples, graph, node, normal

F = np.float32


class Labelled(Samples):
    """Arrays with class numbers."""

    def __init__(self, inputs: dict[str, Array], labels: Array) -> None:
        super().__init__(inputs, labelled=True)
        self.labels = labels

    def batches(self, size: int) -> Iterator[Batch]:
        for batch in super().batches(size):
            yield Batch(batch.inputs, self.labels[batch.index], batch.index)


def classifier(*, softmax: bool = True, batch: Any = "n") -> Any:
    nodes = [node("Gemm", ["x", "w"], ["z" if softmax else "y"], name="dense")]
    nodes += [node("Softmax", ["z"], ["y"], name="soft", axis=-1)] if softmax else []
    return prepared(graph(nodes, {"x": [batch, 8]}, {"y": [batch, 6]}, {"w": normal(8, 6)}))


X = normal(60, 8, seed=1)
EVERY: frozenset[int] = frozenset()


def test_a_model_against_itself() -> None:
    judge = Judge(classifier(), Samples({"x": X}), EVERY, 16)  # type: ignore[arg-type]
    score = judge.compare(judge.wanted)
    assert score.agreement == 1
    assert score.drop is None
    assert (score.errors == 0).all()
    assert score.sqnr_db > 200
    assert judge.samples == 60


def test_figures_by_hand() -> None:
    """On logits: what goes into the Softmax is judged."""
    judge = Judge(classifier(), Samples({"x": X}), EVERY, 16)  # type: ignore[arg-type]
    assert judge.names == ["z"]
    noise = normal(60, 6, seed=5, scale=0.3)
    exact = X @ normal(8, 6)
    parts = [{"z": (exact + noise)[i : i + 16]} for i in range(0, 60, 16)]
    score = judge.compare(parts)
    assert score.agreement == pytest.approx(((exact + noise).argmax(-1) == exact.argmax(-1)).mean())
    assert score.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / (noise**2).sum()), abs=1e-3)
    np.testing.assert_allclose(score.errors, (noise**2).sum(1) / (exact**2).sum(1).mean(), rtol=1e-3)


def test_a_drop_is_accuracy_lost_against_the_float_model() -> None:
    exact = X @ normal(8, 6)
    labels = exact.argmax(-1)
    labels[:6] = (labels[:6] + 1) % 6  # the float model is wrong on these
    judge = Judge(classifier(softmax=False), Labelled({"x": X}, labels), EVERY, 60)  # type: ignore[arg-type]
    got = exact.copy()
    got[:3] = np.eye(6, dtype=F)[labels[:3]] * 9  # repaired
    got[20:29] = np.eye(6, dtype=F)[(labels[20:29] + 1) % 6] * 9  # lost
    score = judge.compare([{"y": got}])
    assert score.drop == pytest.approx((9 - 3) / 60)
    assert score.agreement == pytest.approx(1 - 12 / 60)
    assert set(score.figures()) == {"sqnr_db", "agreement", "accuracy_drop"}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_only_the_rows_that_judge(batch_size: int) -> None:
    rows = frozenset({3, 17, 42})
    judge = Judge(classifier(), Labelled({"x": X}, np.arange(60)), rows, batch_size)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate([i["x"] for i in judge.inputs]), X[[3, 17, 42]])
    assert judge.labels is not None
    assert judge.labels.tolist() == [3, 17, 42]
    assert judge.samples == 3


def test_no_more_than_were_asked_for_and_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Samples({"x": normal(500, 8)})
    assert Judge(classifier(), data, EVERY, 10, most=25).samples == 30  # type: ignore[arg-type]
    monkeypatch.setattr(J, "JUDGE_BYTES", 10 * 8 * 4 * 3)
    assert Judge(classifier(), data, EVERY, 10).samples == 40  # type: ignore[arg-type]


def test_a_fixed_batch() -> None:
    model = classifier(batch=4)
    judge = Judge(model, Samples({"x": X[:10]}), frozenset({9}), 32)  # type: ignore[arg-type]
    assert [len(i["x"]) for i in judge.inputs] == [4]
    plan = QuantizeInt8(rounding="nearest").plan(model, Samples({"x": X}))  # type: ignore[arg-type]
    assert judge.score(apply_plan(model, plan)).sqnr_db > 20


def test_the_score_of_a_quantized_model_is_that_of_its_own_run() -> None:
    model = classifier()
    plan = QuantizeInt8(rounding="nearest").plan(model, Samples({"x": X}))  # type: ignore[arg-type]
    written = apply_plan(model, plan)
    judge = Judge(model, Samples({"x": X}), EVERY, 60)  # type: ignore[arg-type]
    score = judge.score(written)
    exact = X @ normal(8, 6)
    assert 25 < score.sqnr_db < 60
    assert score.agreement is not None
    assert score.agreement > 0.9
    assert len(score.errors) == 60
    assert score.errors.sum() / 60 == pytest.approx(10 ** (-score.sqnr_db / 10), rel=1e-6)
    assert np.isfinite(exact).all()


def test_nan_of_the_float_model_is_named() -> None:
    model = prepared(
        graph(
            [node("Sqrt", ["x"], ["s"], name="root"), node("Gemm", ["s", "w"], ["y"], name="dense")],
            {"x": ["n", 4]},
            {"y": ["n", 2]},
            {"w": normal(4, 2)},
        )
    )
    with pytest.raises(NonFiniteError, match="output 'y'"):
        Judge(model, Samples({"x": normal(12, 4)}), EVERY, 8)  # type: ignore[arg-type]
    with pytest.raises(NoCalibrationDataError):
        Judge(model, Samples({"x": normal(0, 4)}), EVERY, 8)  # type: ignore[arg-type]


def test_an_integer_output_is_not_judged() -> None:
    nodes = [node("Gemm", ["x", "w"], ["z"], name="dense"), node("ArgMax", ["z"], ["y"], name="best", axis=1)]
    from onnx import TensorProto, helper, numpy_helper

    proto = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [
            helper.make_tensor_value_info("y", TensorProto.INT64, ["n", 1]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 6]),
        ],
        [numpy_helper.from_array(normal(8, 6), "w")],
    )
    model = prepared(M.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)))
    plan = QuantizeInt8(rounding="nearest").plan(model, Samples({"x": X}))  # type: ignore[arg-type]
    score = Judge(model, Samples({"x": X}), EVERY, 16).score(apply_plan(model, plan))  # type: ignore[arg-type]
    assert score.sqnr_db > 20
    assert len(score.errors) == 60


def test_a_softmax_is_judged_by_what_goes_in() -> None:
    assert judged(classifier()) == ["z"]
    assert judged(classifier(softmax=False)) == ["y"]
    assert class_scores(classifier(), [{"z": X[:, :6]}], None) == frozenset({"z"})


# --- which is better -------------------------------------------------------------------------------------
def score(errors: Any, agreement: float | None = None, sqnr: float = 20.0) -> Score:
    return Score(sqnr, agreement, None, np.asarray(errors, np.float64))


def test_labels_beyond_noise_decide() -> None:
    low, high = score(np.ones(50), 0.90), score(np.full(50, 2.0), 0.99)
    assert better(high, low)
    assert not better(low, high)


def test_within_noise_the_error_decides_and_only_if_it_is_sure() -> None:
    rng = np.random.default_rng(0)
    heavy = np.abs(rng.standard_t(1.5, 50))
    assert better(score(heavy * 0.5, 0.97), score(heavy, 0.99))
    shuffled = rng.permutation(heavy)
    assert not better(score(shuffled), score(heavy))
    assert not better(score(heavy), score(heavy))


def test_one_sample_that_went_wrong_does_not_decide() -> None:
    """Better on 49 of 50 by little, worse on one by much: not surely better."""
    errors = np.ones(50)
    other = np.full(50, 0.99)
    other[7] = 5
    assert not better(score(other), score(errors))


def test_without_samples_decibels_decide() -> None:
    assert better(score([], sqnr=21), score([], sqnr=20))
    assert not better(score([], sqnr=20), score([], sqnr=20))
    assert better(score([1.0], sqnr=21), score([1.0, 1.0], sqnr=20))


@given(st.lists(st.floats(0, 1), min_size=5, max_size=30), st.lists(st.floats(0, 1), min_size=5, max_size=30))
def test_never_both_better(a: list[float], b: list[float]) -> None:
    size = min(len(a), len(b))
    one, two = score(a[:size]), score(b[:size])
    assert not (better(one, two) and better(two, one))


def test_the_first_has_the_prior() -> None:
    same = score(np.ones(40))
    assert best({"a": same, "b": same, "c": same}) == "a"
    assert best({"a": same, "b": score(np.full(40, 0.5)), "c": score(np.full(40, 0.4))}) == "c"


# --- what is lost ----------------------------------------------------------------------------------------
def test_loss_is_accuracy_else_a_quarter_of_changed_labels_else_error() -> None:
    assert lost(0.02, 0.9, 10) == (0.02, "accuracy")
    assert lost(-0.01, 0.9, 10) == (-0.01, "accuracy")
    assert lost(None, 0.96, 10) == (pytest.approx(0.01), "agreement")
    assert lost(None, None, 20) == (pytest.approx(0.01), "SQNR")
