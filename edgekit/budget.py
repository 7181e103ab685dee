"""What a model may lose to quantization, and in what it is counted."""

from __future__ import annotations

from typing import Literal

Measure = Literal["accuracy", "agreement", "SQNR"]

# Unlabelled agreement >= .96 went with a loss of <= 0.2 points, .92 with 1.6: docs/adr/0003
AGREEMENT_PER_DROP = 4.0


def lost(drop: float | None, agreement: float | None, sqnr_db: float) -> tuple[float, Measure]:
    """The loss to compare with `--max-accuracy-drop`, and what it was taken from.

    Accuracy where there are labels; else a quarter of the labels that changed; else, where nothing tells of classes,
    the share of variance that is error.
    """
    if drop is not None:
        return drop, "accuracy"
    if agreement is not None:
        return (1 - agreement) / AGREEMENT_PER_DROP, "agreement"
    return float(10 ** (-sqnr_db / 10)), "SQNR"
