"""Which candidate ships, and the sentence that says why."""

from __future__ import annotations

from typing import Any

import pytest

from edgekit.bench.verdict import decide, quality_problem


def row(
    backend: str, precision: str, p50: float | None, ratio: tuple[float, float, float] | None = None, **changes: Any
) -> dict[str, Any]:
    value, low, high = ratio or (1.0, 1.0, 1.0)
    latency = {"p50": p50, "ratio_to_best_float": value, "ratio_to_best_float_ci95": [low, high]}
    plain = {
        "backend": backend, "precision": precision, "valid": True, "reasons": [], "threads": 1,
        "size_bytes": 3600 if precision == "float32" else 1000, "latency_s": latency,
        "quality": {"accuracy": 0.95, "agreement_with_float": 1.0},
    }  # fmt: skip
    return {**plain, **changes}


ORT = row("onnxruntime", "float32", 2.0, (1.25, 1.2, 1.3))
OV = row("openvino", "float32", 1.6)


def test_the_fastest_int8_ships_with_its_reasons() -> None:
    quality = {"accuracy": 0.948, "flips_to_wrong": 6, "flips_to_right": 2, "positions": 2000}
    int8 = row("onnxruntime", "int8", 1.0, (0.625, 0.588, 0.667), quality=quality)
    slow = row("openvino", "int8", 1.7, (1.06, 1.0, 1.1))
    v = decide([ORT, OV, int8, slow], 0.01)
    assert v["ship"] == "onnxruntime-int8"
    assert v["threads"] == 1
    assert v["why"] == (
        "ship onnxruntime-int8: 1.60× faster than the best float32 (openvino-float32) [1.50, 1.70], "
        "accuracy −0.2 points (± 0.1), 3.6× smaller; "
        "openvino-int8 is not faster here: 1.06× the time of the best float32 [1.00, 1.10]"
    )


def test_float_ships_when_int8_is_not_surely_faster() -> None:
    v = decide([ORT, OV, row("onnxruntime", "int8", 1.55, (0.97, 0.93, 1.01))], 0.01)
    assert v["ship"] == "openvino-float32"
    assert (
        "onnxruntime-int8 is not shown to be faster by these samples: 0.97× the time of the best float32 [0.93, 1.01]"
        in v["why"]
    )


def test_float_ships_when_int8_loses_too_much() -> None:
    int8 = row("onnxruntime", "int8", 1.0, (0.6, 0.5, 0.7), quality={"accuracy": 0.93})
    v = decide([ORT, OV, int8], 0.01)
    assert v["ship"] == "openvino-float32"
    assert "onnxruntime-int8 loses 2.0 points of accuracy, more than the 1.0 points allowed" in v["why"]
    assert decide([ORT, OV, int8], 0.02)["ship"] == "onnxruntime-int8"


def test_a_candidate_that_was_not_judged_does_not_ship() -> None:
    int8 = row("onnxruntime", "int8", 1.0, (0.6, 0.5, 0.7), quality=None)
    v = decide([row("onnxruntime", "float32", 2.0, quality=None), int8], 0.01)
    assert v["ship"] == "onnxruntime-float32"
    assert "not compared with float (pass --data)" in v["why"]


def test_an_invalid_candidate_is_out_and_its_reason_is_told() -> None:
    int8 = row("onnxruntime", "int8", None, valid=False, reasons=["NaN or Inf in the outputs of 3 samples"])
    v = decide([OV, int8], 0.01)
    assert v["ship"] == "openvino-float32"
    assert "onnxruntime-int8 is invalid (NaN or Inf in the outputs of 3 samples)" in v["why"]


def test_each_competes_with_its_best_threads() -> None:
    four = row("onnxruntime", "int8", 0.7, (0.44, 0.4, 0.5), threads=4)
    v = decide([OV, row("onnxruntime", "int8", 1.5, (0.94, 0.9, 0.95)), four], 0.01)
    assert (v["ship"], v["threads"]) == ("onnxruntime-int8", 4)


def test_of_equal_candidates_the_smaller_ships() -> None:
    big = row("openvino", "int8", 1.00, (0.62, 0.60, 0.64), size_bytes=2000)
    small = row("onnxruntime", "int8", 1.01, (0.63, 0.61, 0.65), size_bytes=1000)
    assert decide([OV, big, small], 0.01)["ship"] == "onnxruntime-int8"
    apart = row("onnxruntime", "int8", 1.06, (0.66, 0.65, 0.67), size_bytes=1000)
    assert decide([OV, big, apart], 0.01)["ship"] == "openvino-int8"


def test_without_float_nothing_ships() -> None:
    v = decide([row("fpga", "fixed", 1.0, None), row("fpga", "int8", 2.0, None)], 0.01)
    assert (v["ship"], v["threads"]) == (None, None)
    assert v["why"] == "no valid float32 candidate to compare with: none was measured"
    broken = row("onnxruntime", "float32", None, valid=False, reasons=["the worker died"])
    v = decide([broken, row("fpga", "int8", 2.0, None)], 0.01)
    assert v["ship"] is None
    assert v["why"] == ("no valid float32 candidate to compare with: onnxruntime-float32 is invalid (the worker died)")


def test_unknown_scores_keep_their_quality_by_either_figure() -> None:
    def problem(agreement: float, sqnr_db: float) -> str | None:
        own = {"task": "unknown scores", "agreement_with_float": agreement, "sqnr_db": sqnr_db, "max_abs_err": 0.1}
        return quality_problem({"quality": own}, {"quality": {}}, 0.01)

    assert problem(0.375, 38.0) is None
    assert problem(0.97, 12.0) is None
    told = problem(0.375, 12.0)
    assert told is not None
    assert "37.5 %" in told
    assert "12.0 dB" in told


def test_unknown_scores_are_told_by_both_figures() -> None:
    own = {"task": "unknown scores", "agreement_with_float": 0.375, "sqnr_db": 38.0, "max_abs_err": 0.1}
    v = decide([OV, row("onnxruntime", "int8", 1.0, (0.6, 0.5, 0.7), quality=own)], 0.01)
    assert v["ship"] == "onnxruntime-int8"
    assert "37.5 % agreement with float (no labels), SQNR 38.0 dB" in v["why"]


def test_nothing_timed_nothing_ships() -> None:
    v = decide([row("onnxruntime", "float32", None, reasons=["latency: qemu-aarch64 emulates this CPU"])], 0.01)
    assert v["ship"] is None
    assert "qemu-aarch64" in v["why"]
    assert decide([], 0.01)["ship"] is None


@pytest.mark.parametrize(
    ("own", "float_", "keeps"),
    [
        ({"accuracy": 0.94}, {"accuracy": 0.95}, True),
        ({"accuracy": 0.9399}, {"accuracy": 0.95}, False),
        ({"accuracy": 0.99}, {"accuracy": 0.95}, True),
        ({"r2": 0.90}, {"r2": 0.905}, True),
        ({"r2": 0.89}, {"r2": 0.905}, False),
        ({"agreement_with_float": 0.96}, {}, True),
        ({"agreement_with_float": 0.959}, {}, False),
        ({"max_abs_err": 0.1, "sqnr_db": 20.0}, {}, True),
        ({"max_abs_err": 0.1, "sqnr_db": 19.9}, {}, False),
        ({"max_abs_err": 0.0, "sqnr_db": None}, {}, True),
        ({"max_abs_err": 0.1, "sqnr_db": None}, {}, False),
        ({}, {}, False),
    ],
)
def test_keeping_the_quality(own: dict[str, Any], float_: dict[str, Any], keeps: bool) -> None:
    problem = quality_problem({"quality": own}, {"quality": float_}, 0.01)
    assert (problem is None) is keeps


def test_a_budget_of_zero() -> None:
    assert quality_problem({"quality": {"accuracy": 0.95}}, {"quality": {"accuracy": 0.95}}, 0.0) is None
    assert quality_problem({"quality": {"max_abs_err": 0.1, "sqnr_db": 90.0}}, None, 0.0) is not None
