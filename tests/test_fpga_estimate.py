"""Estimates against what tools counted, and the refusal of what cannot fit."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.backends.fpga import estimate
from edgekit.backends.fpga.mac_array.config import Config
from edgekit.backends.fpga.mac_array.program import compiled
from edgekit.backends.fpga.unrolled import trace
from edgekit.errors import FitError, UnsupportedOpError
from edgekit.part import Part
from tests.fpga_dense import dense_net
from tests.fpga_nets import random_net

SMALL = Part("LFE5U-25F", "ecp5", "25k", "CABGA381", "6", 24288, 24288, 28, 56, 18)


@given(st.integers(-128, 127))
def test_signed_digits_are_the_fewest(weight: int) -> None:
    """Against the definition: the digits that differ between 3w and w, in binary (Prodinger 2000)."""
    w = abs(weight)
    expected = bin((3 * w) ^ w).count("1")
    assert estimate._signed_digits(np.array([weight], np.int8))[0] == expected


@pytest.mark.parametrize(("bits", "zeros"), [(2, 0.0), (4, 0.5), (6, 0.0), (8, 0.75)])
def test_a_trace_lies_within_the_estimate_from_the_weights(bits: int, zeros: float) -> None:
    pytest.importorskip("da4ml", reason="da4ml of the extra 'fpga'")
    net = dense_net((32, 16, 8), bits, 1, zeros)
    early = estimate.unrolled(net)
    late = estimate.traced(trace.unroll(net), 10)
    assert early.low <= late.lut <= early.high
    assert (late.cycles, late.interval, late.dsp, late.ram) == (10, 1, 0, 0)


def test_what_cannot_fit_is_refused_with_numbers_and_a_way_out() -> None:
    net = dense_net((256, 128, 10), 8, 1)
    told = estimate.unrolled(net)
    assert told.low > SMALL.lut
    line = (
        f"unrolled needs about {round(told.lut / 1000)}k LUT, LFE5U-25F has 24k — use mac-array, fewer bits or pruning"
    )
    with pytest.raises(FitError, match=f"^{re.escape(line)}$"):
        estimate.check(told, SMALL)


def test_what_may_fit_is_not_refused() -> None:
    told = estimate.unrolled(dense_net((32, 16, 8), 4, 1))
    estimate.check(told, SMALL)
    assert not told.may_not_fit(SMALL)


def test_an_array_with_more_lanes_than_multipliers_is_refused() -> None:
    told = estimate.mac_array(compiled(dense_net((32, 16, 8), 8, 1), Config(16, 4)))
    assert told.dsp == 64
    assert told.cycles == told.interval
    with pytest.raises(FitError, match="mac-array needs about 64 multipliers, LFE5U-25F has 28 — use fewer lanes"):
        estimate.check(told, SMALL)


# lanes and LUTs that yosys counted: (p, q, LUT) of the smallest and the largest array that were mapped
@pytest.mark.parametrize(("p", "q", "lut"), [(4, 1, 1169), (16, 8, 7392)])
def test_arrays_that_were_mapped_lie_within_the_estimate(p: int, q: int, lut: int) -> None:
    told = estimate.mac_array(compiled(dense_net((32, 16, 8), 8, 1), Config(p, q)))
    assert told.low <= lut <= told.high


def test_other_networks_are_refused_before_any_count() -> None:
    net = next(n for n in map(random_net, range(20)) if n.layers[0].kind != "dense")
    with pytest.raises(UnsupportedOpError, match="only dense layers"):
        estimate.unrolled(net)
