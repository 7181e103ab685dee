"""Reads a prepared model's samples, one by one; numpy only, since every tool's environment has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray[Any, Any]]
LABELS = "y"


def calibration(folder: Path) -> list[Feeds]:
    """Each sample as a batch of one, by input name."""
    return list(_rows(np.load(folder / "calib.npz")))


def validation(folder: Path) -> list[tuple[Feeds, int]]:
    """Samples with their class; empty if there are no labels."""
    arrays = np.load(folder / "validation.npz")
    if LABELS not in arrays:
        return []
    return [(row, int(label)) for row, label in zip(_rows(arrays), arrays[LABELS], strict=True)]


def _rows(arrays: Any) -> Iterator[Feeds]:
    inputs = {name: arrays[name] for name in arrays.files if name != LABELS}
    for i in range(len(next(iter(inputs.values())))):
        yield {name: values[i : i + 1] for name, values in inputs.items()}
