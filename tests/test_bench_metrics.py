"""Every quality figure against scikit-learn, on random and on awkward data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from edgekit.bench import metrics
from edgekit.errors import LabelError


def scores_and_labels(seed: int, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, classes)).astype(np.float32)
    return logits, rng.integers(0, classes, n)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def classify(scores: np.ndarray, labels: np.ndarray, batch: int) -> tuple[dict, list[str]]:
    meter = metrics.Classification(scores.shape[1])
    for i in range(0, len(labels), batch):
        meter.update(scores[i : i + batch], labels[i : i + batch])
    return meter.result()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), classes=st.integers(2, 12), batch=st.integers(1, 20))
def test_classification_equals_scikit_learn(seed: int, n: int, classes: int, batch: int) -> None:
    scores, labels = scores_and_labels(seed, n, classes)
    figures, _ = classify(scores, labels, batch)
    predicted = scores.argmax(axis=1)
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    p, r, f, _ = sk.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    assert [figures[k + "_macro"] for k in ("precision", "recall", "f1")] == pytest.approx([p, r, f])
    seen = np.union1d(labels, predicted)
    p, r, f, s = sk.precision_recall_fscore_support(labels, predicted, labels=seen, zero_division=0)
    rows = figures["per_class"]
    assert [row["class"] for row in rows] == seen.tolist()
    for key, expected in (("precision", p), ("recall", r), ("f1", f), ("support", s)):
        assert [row[key] for row in rows] == pytest.approx(expected.tolist())
    matrix = sk.confusion_matrix(labels, predicted, labels=range(classes))
    np.testing.assert_array_equal(figures["confusion_matrix"], matrix)
    if classes > 5:
        assert figures["top5"] == pytest.approx(sk.top_k_accuracy_score(labels, scores, k=5, labels=range(classes)))
    else:
        assert figures["top5"] is None


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("as_logits", [True, False])
def test_auc_equals_scikit_learn(classes: int, as_logits: bool) -> None:
    logits, labels = scores_and_labels(classes, 400, classes)
    logits[np.arange(400), labels] += 0.7
    probabilities = softmax(logits) if as_logits else softmax(logits).astype(np.float32)
    figures, reasons = classify(logits if as_logits else probabilities, labels, 64)
    given_ = probabilities[:, 1] if classes == 2 else probabilities
    # float32 merges ranks that float64 tells apart
    assert figures["auc"] == pytest.approx(sk.roc_auc_score(labels, given_, multi_class="ovr"), abs=2e-5)
    assert not [r for r in reasons if r.startswith("auc")]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_auc_with_ties_equals_scikit_learn(values: list[tuple[int, bool]]) -> None:
    scores = np.array([v for v, _ in values], float)
    positive = np.array([p for _, p in values])
    if positive.all() or not positive.any():
        assert metrics.auc(scores, positive) is None
    else:
        assert metrics.auc(scores, positive) == pytest.approx(sk.roc_auc_score(positive, scores))


def test_one_class_only() -> None:
    scores, _ = scores_and_labels(0, 20, 4)
    figures, reasons = classify(scores, np.full(20, 2), 7)
    assert figures["auc"] is None
    assert any("two classes" in r for r in reasons)
    assert figures["accuracy"] == pytest.approx((scores.argmax(1) == 2).mean())


def test_absent_classes_are_left_out_of_auc_and_named() -> None:
    scores, labels = scores_and_labels(0, 50, 4)
    labels %= 3
    figures, reasons = classify(scores, labels, 50)
    expected = [sk.roc_auc_score(labels == c, softmax(scores)[:, c]) for c in range(3)]
    assert figures["auc"] == pytest.approx(np.mean(expected))
    assert any("leaves out 1 classes" in r for r in reasons)


def test_top5_of_tied_scores_agrees_with_top1() -> None:
    labels = np.arange(8)
    figures, _ = classify(np.zeros((8, 8), np.float32), labels, 3)
    assert figures["accuracy"] == 1 / 8  # the first class wins
    assert figures["top5"] == 5 / 8


def test_nan_scores_give_no_auc_and_never_win() -> None:
    scores = np.array([[np.nan, 1.0], [2.0, np.nan]], np.float32)
    assert metrics.predictions(scores).tolist() == [1, 0]
    figures, reasons = classify(scores, np.array([1, 0]), 2)
    assert figures["auc"] is None
    assert any("finite" in r for r in reasons)


def test_scores_beyond_the_limit_are_dropped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SCORES_KEPT", 100)
    scores, labels = scores_and_labels(0, 60, 3)
    figures, reasons = classify(scores, labels, 10)
    assert figures["auc"] is None
    assert "auc keeps at most 100 scores" in reasons
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(labels, scores.argmax(1)))


def test_large_confusion_matrices_are_left_out() -> None:
    scores, labels = scores_and_labels(0, 300, 101)
    figures, reasons = classify(scores, labels, 100)
    assert figures["confusion_matrix"] is None
    assert any("confusion" in r for r in reasons)


@pytest.mark.parametrize("logits", [True, False])
def test_binary_equals_scikit_learn(logits: bool) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    raw = (labels - 0.5 + rng.standard_normal(200)).astype(np.float32)
    scores = raw if logits else (1 / (1 + np.exp(-raw))).astype(np.float32)
    meter = metrics.Binary()
    for i in range(0, 200, 33):
        meter.update(scores[i : i + 33], labels[i : i + 33], None)
    figures, _ = meter.result()
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(labels, raw > 0))
    assert figures["f1_macro"] == pytest.approx(sk.f1_score(labels, raw > 0, average="macro"))
    assert figures["auc"] == pytest.approx(sk.roc_auc_score(labels, scores))


def test_the_float_scores_decide_what_a_score_is() -> None:
    """A candidate whose logits happen to lie in [0, 1] is still judged as logits when the float model's do not."""
    meter = metrics.Binary()
    meter.update(np.array([0.1, 0.9], np.float32), np.array([1, 1]), np.array([-3.0, 2.0], np.float32))
    assert meter.result()[0]["accuracy"] == 1.0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(2, 40), k=st.integers(1, 4), batch=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1e6]),
)  # fmt: skip
def test_regression_equals_scikit_learn(seed: int, n: int, k: int, batch: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n, k)) + offset
    outputs = truth + 0.3 * rng.standard_normal((n, k))
    meter = metrics.Regression()
    for i in range(0, n, batch):
        meter.update(outputs[i : i + batch], truth[i : i + batch])
    figures, reasons = meter.result()
    assert reasons == []
    assert figures["mae"] == pytest.approx(sk.mean_absolute_error(truth, outputs))
    assert figures["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, outputs))
    assert figures["r2"] == pytest.approx(sk.r2_score(truth, outputs), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("error", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_r2_of_a_constant_target(error: float, expected: float) -> None:
    truth = np.ones((5, 1))
    meter = metrics.Regression()
    meter.update(truth + error, truth)
    assert meter.result()[0]["r2"] == expected == sk.r2_score(truth, truth + error)


def test_r2_of_one_sample_is_absent() -> None:
    meter = metrics.Regression()
    meter.update(np.ones((1, 1)), np.zeros((1, 1)))
    figures, reasons = meter.result()
    assert figures["r2"] is None
    assert reasons


@pytest.mark.parametrize("logits", [True, False])
def test_perplexity_equals_the_log_loss(logits: bool) -> None:
    rng = np.random.default_rng(3)
    raw = rng.standard_normal((6, 5, 11)).astype(np.float32)
    labels = rng.integers(0, 11, (6, 5))
    meter = metrics.TokenPrediction()
    outputs = raw if logits else softmax(raw).astype(np.float32)
    meter.update(outputs[:4], labels[:4])
    meter.update(outputs[4:], labels[4:])
    figures, _ = meter.result()
    loss = sk.log_loss(labels.ravel(), softmax(raw).reshape(-1, 11), labels=range(11))
    assert figures["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert figures["bits_per_token"] == pytest.approx(loss / np.log(2), rel=1e-5)
    assert figures["accuracy"] == pytest.approx((raw.argmax(-1) == labels).mean())


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_named(label: int) -> None:
    with pytest.raises(LabelError, match=rf"label {label} of sample 7 .* 4 classes"):
        metrics.check_labels(np.array([0, label]), 4, np.array([6, 7]))
