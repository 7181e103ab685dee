"""The operands of the saturation probe, shared by every backend.

x86 without VNNI multiplies u8 by s8 with VPMADDUBSW, which adds pairs of products in saturating int16: 2·255·127 =
64770 does not fit in 32767. Same operands, so the same definition of "saturates", for each runtime.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DEPTH = 64  # products summed; 2,072,640 exact, 1,048,544 when every pair saturates
PAIRS = DEPTH // 2
SATURATED_BELOW = 2 * 255 * 127 - 1  # an exact pair sum is 64770


def probe_operands() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x: uint8 (8, 64) of 255; w: int8 (64, 16) of 127."""
    return np.full((8, DEPTH), 255, np.uint8), np.full((DEPTH, 16), 127, np.int8)
