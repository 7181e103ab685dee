"""The meter: tasks told apart, agreement, flips, SQNR, and outputs that are no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.bench.quality import Meter, canonical_labels, canonical_output, task_of
from edgekit.errors import LabelError


def judge(
    outputs: np.ndarray, reference: np.ndarray | None, labels: np.ndarray | None, batch: int = 7
) -> tuple[dict[str, Any], list[str], list[str]]:
    meter = Meter()
    for i in range(0, len(outputs), batch):
        part = slice(i, i + batch)
        meter.update(
            {"y": outputs[part]},
            None if reference is None else {"y": reference[part]},
            None if labels is None else labels[part],
            np.arange(len(outputs))[part],
        )
    return meter.result()


@pytest.mark.parametrize(
    ("output", "labels", "task"),
    [
        (np.zeros((4, 3)), np.arange(4) % 3, "classes"),
        (np.zeros((4, 1, 1, 3)), np.arange(4) % 3, "classes"),
        (np.zeros((4, 3)), np.arange(4).reshape(4, 1) % 3, "classes"),
        (np.zeros((4, 3)), (np.arange(4) % 3).astype(np.float64), "classes"),
        (np.zeros((4, 3)), np.eye(4, 3) + np.eye(4, 3, -3), "classes"),
        (np.zeros((4, 1)), np.array([0, 1, 1, 0]), "binary"),
        (np.zeros((4, 1)), np.array([0, 3, 1, 0]), "regression"),
        (np.zeros((4, 1)), np.array([0.5, 1, 1, 0]), "regression"),
        (np.zeros((4, 3)), np.full((4, 3), 0.5), "regression"),
        (np.zeros(4, np.int64), np.arange(4), "class numbers"),
        (np.zeros((4, 5, 9)), np.zeros((4, 5), np.int64), "tokens"),
        (np.eye(4, 3) + np.eye(4, 3, -3), None, "classes"),
        (np.full((4, 5, 8), 0.125), None, "tokens"),
        (np.zeros((4, 3)), None, "unknown scores"),
        (np.array([[1.5, -0.5]]), None, "unknown scores"),
        (np.zeros((4, 5, 8)), None, "unknown scores"),
        (np.zeros((4, 1)), None, "unknown"),
        (np.zeros((4, 8, 8, 3)), None, "unknown"),
    ],
)
def test_the_task_is_told_from_shapes(output: np.ndarray, labels: np.ndarray | None, task: str) -> None:
    main = canonical_output(output)
    assert task_of(main, None if labels is None else canonical_labels(labels, main)) == task


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LabelError, match=r"labels of shape \[4, 2\]"):
        judge(np.zeros((4, 3), np.float32), None, np.zeros((4, 2), np.int64))


def test_labels_out_of_range_name_the_sample() -> None:
    labels = np.zeros(9, np.int64)
    labels[8] = 3
    with pytest.raises(LabelError, match="label 3 of sample 8"):
        judge(np.zeros((9, 3), np.float32), None, labels)


def test_agreement_flips_and_their_effect() -> None:
    labels = np.array([0, 1, 2, 0, 1])
    reference = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 1]]  # wrong at 2 and 3
    outputs = np.eye(3, dtype=np.float32)[[0, 0, 2, 2, 1]]  # 1 becomes wrong, 2 becomes right
    figures, _, problems = judge(outputs, reference, labels, batch=2)
    assert figures["agreement_with_float"] == 3 / 5
    assert (figures["flips"], figures["flip_index"]) == (2, [1, 2])
    assert (figures["flips_to_wrong"], figures["flips_to_right"]) == (1, 1)
    assert figures["accuracy"] == 3 / 5
    assert not problems


def test_binary_agreement() -> None:
    figures, _, _ = judge(
        np.array([[0.6], [0.2], [0.9]], np.float32), np.array([[0.4], [0.1], [0.8]], np.float32), np.array([1, 0, 1])
    )
    assert figures["agreement_with_float"] == pytest.approx(2 / 3)
    assert figures["flip_index"] == [0]
    assert figures["flips_to_right"] == 1


def test_agreement_without_labels() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((50, 4)).astype(np.float32)
    figures, reasons, _ = judge(reference + 0.5 * rng.standard_normal((50, 4)).astype(np.float32), reference, None)
    assert 0.5 < figures["agreement_with_float"] < 1
    assert figures["accuracy"] is None
    assert "accuracy needs labels" in reasons
    assert figures["task"] == "unknown scores"
    assert figures["sqnr_db"] > 0


def test_the_float_model_tells_the_task() -> None:
    """An int8 softmax sums to 1 only roughly."""
    reference = np.array([[0.5, 0.3, 0.2]], np.float32)
    figures, _, _ = judge(np.array([[0.508, 0.305, 0.203]], np.float32), reference, None)
    assert figures["task"] == "classes"


def test_the_list_of_flips_is_bounded() -> None:
    reference = np.tile(np.array([[1.0, 0.0]], np.float32), (500, 1))
    figures, _, _ = judge(1 - reference, reference, None)
    assert figures["flips"] == 500
    assert figures["flip_index"] == list(range(100))


def test_sqnr_is_the_ratio_of_powers() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((64, 8)).astype(np.float32)
    noise = (0.01 * rng.standard_normal((64, 8))).astype(np.float32)
    outputs = reference + noise
    figures, _, _ = judge(outputs, reference, None)
    difference = outputs.astype(np.float64) - reference
    expected = 10 * np.log10((reference.astype(np.float64) ** 2).sum() / (difference**2).sum())
    assert figures["sqnr_db"] == pytest.approx(expected)
    assert figures["max_abs_err"] == pytest.approx(np.abs(difference).max())


def test_equal_outputs_have_no_sqnr_but_a_reason() -> None:
    reference = np.ones((3, 2), np.float32)
    figures, reasons, _ = judge(reference, reference, None)
    assert figures["sqnr_db"] is None
    assert figures["max_abs_err"] == 0
    assert any("infinite" in r for r in reasons)


def test_nan_makes_a_candidate_invalid() -> None:
    reference = np.ones((20, 2), np.float32)
    outputs = reference.copy()
    outputs[3, 1] = np.nan
    outputs[9, 0] = np.inf
    _, _, problems = judge(outputs, reference, np.zeros(20, np.int64))
    assert problems == ["NaN or Inf in the outputs of 2 samples"]


def test_an_infinity_of_the_float_model_is_legitimate() -> None:
    reference = np.array([[1.0, -np.inf]], np.float32)
    assert judge(reference, reference, None)[2] == []


def test_regression_has_no_agreement() -> None:
    figures, reasons, _ = judge(np.ones((4, 1), np.float32), np.ones((4, 1), np.float32), np.full(4, 1.5))
    assert figures["agreement_with_float"] is None
    assert any(r.startswith("agreement_with_float") for r in reasons)
    assert figures["mae"] == 0.5


def test_half_precision_outputs() -> None:
    reference = np.eye(3, dtype=np.float32)
    figures, _, problems = judge(reference.astype(np.float16), reference, np.arange(3))
    assert figures["accuracy"] == 1
    assert not problems


def test_real_valued_maps_keep_a_last_axis_of_one() -> None:
    """An autoencoder's targets have its outputs' shape; class numbers of a map need no last axis."""
    from edgekit.binding import class_labels

    index = np.arange(3)
    assert class_labels(np.full((3, 8, 8, 1), 0.5, np.float32), "as stored", index).shape == (3, 8, 8, 1)
    assert class_labels(np.full((3, 1), 0.5, np.float32), "as stored", index).shape == (3,)
    assert class_labels(np.ones((3, 8, 8, 1), np.uint8), "as stored", index).shape == (3, 8, 8)
