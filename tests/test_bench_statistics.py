"""Percentiles, the coverage of the bootstrap interval, and the judgement of stability."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.bench.statistics import ratio_of_medians, stability, summarize


def rounds(seed: int, count: int = 25, size: int = 60, centre: float = 1e6, spread: float = 0.02) -> list[np.ndarray]:
    """A drifting machine: the level of each round wanders, samples scatter around it."""
    rng = np.random.default_rng(seed)
    return [
        (centre * (1 + 0.01 * rng.standard_normal()) * (1 + spread * rng.standard_normal(size))).astype(np.int64)
        for _ in range(count)
    ]


def test_summary_is_in_seconds() -> None:
    data = [np.arange(1, 601) * 1000, np.arange(601, 1201) * 1000]
    s = summarize(data)
    every = np.concatenate(data) * 1e-9
    assert s.samples == 1200
    assert (s.p50, s.mean) == pytest.approx((np.median(every), every.mean()))
    assert (s.p90, s.p99) == pytest.approx(tuple(np.percentile(every, [90, 99])))
    assert s.reasons == ()


@pytest.mark.parametrize(
    ("samples", "has_p90", "has_p99"), [(1, False, False), (20, True, False), (999, True, False), (1000, True, True)]
)
def test_a_percentile_that_the_sample_cannot_support_is_refused(samples: int, has_p90: bool, has_p99: bool) -> None:
    s = summarize([np.full(samples, 1000)])
    assert (s.p90 is not None, s.p99 is not None) == (has_p90, has_p99)
    assert len(s.reasons) == (not has_p90) + (not has_p99)
    assert all(str(samples) in r for r in s.reasons)


def test_the_ratio_of_a_series_to_itself_is_exactly_one() -> None:
    data = rounds(0)
    r = ratio_of_medians(data, data)
    assert (r.value, r.low, r.high) == (1.0, 1.0, 1.0)


def test_the_interval_is_seeded() -> None:
    a, b = rounds(1), rounds(2)
    assert ratio_of_medians(a, b, 5) == ratio_of_medians(a, b, 5)
    assert ratio_of_medians(a, b, 5) != ratio_of_medians(a, b, 6)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(60):
        r = ratio_of_medians(rounds(seed, centre=1.3e6), rounds(1000 + seed, centre=1e6), seed)
        hits += r.low <= 1.3 <= r.high
    assert 49 <= hits <= 60  # 95 % of 60 is 57; a bootstrap over 25 blocks covers a little less


def test_pairing_cancels_what_slows_both() -> None:
    """Twice as slow in half of the cycles, for both: the ratio stays sharp, as unpaired samples would not let it."""
    rng = np.random.default_rng(0)
    slow = np.where(rng.random(25) < 0.4, 2.0, 1.0)
    a = [r * s for r, s in zip(rounds(3, centre=1.1e6), slow, strict=True)]
    b = [r * s for r, s in zip(rounds(4), slow, strict=True)]
    r = ratio_of_medians(a, b)
    shuffled = ratio_of_medians(a, [b[i] for i in rng.permutation(25)])
    assert r.low <= 1.1 <= r.high
    assert r.high - r.low < (shuffled.high - shuffled.low) / 2


def test_the_value_lies_inside_its_interval() -> None:
    for seed in range(20):
        r = ratio_of_medians(rounds(seed, count=3, size=2), rounds(seed + 50, count=3, size=2), seed)
        assert r.low <= r.value <= r.high


def test_many_samples_are_thinned_without_moving_the_interval() -> None:
    few = ratio_of_medians(rounds(0, size=150), rounds(1, size=150))
    many = ratio_of_medians(rounds(0, size=20_000), rounds(1, size=20_000))
    assert many.high - many.low < 2 * (few.high - few.low)
    assert many.low <= many.value <= many.high


def test_rounds_of_unequal_number_and_single_samples() -> None:
    r = ratio_of_medians([np.array([4.0])] * 5, [np.array([2.0])] * 7)
    assert (r.value, r.low, r.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_steady_series_has_no_notes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert stability([1e6 * (1 + 0.01 * rng.standard_normal(100)) for _ in range(20)]) == []
    assert stability([1e6 + 1e4 * rng.exponential(1.0, 100) for _ in range(20)]) == []  # a long tail is normal


def test_two_speeds_are_noticed() -> None:
    rng = np.random.default_rng(0)
    data = [np.where(rng.random(100) < 0.3, 1.6e6, 1e6) * (1 + 0.01 * rng.standard_normal(100)) for _ in range(20)]
    assert any("two speeds: around 1 ms and 1.6 ms" in n for n in stability(data))


def test_a_trend_is_noticed_but_not_noise() -> None:
    rng = np.random.default_rng(0)
    hotter = [1e6 * (1 + 0.02 * i) * (1 + 0.01 * rng.standard_normal(50)) for i in range(15)]
    assert any("drift" in n and "+" in n for n in stability(hotter))
    assert not any("drift" in n for n in stability(rounds(0)))


def test_constant_and_tiny_series() -> None:
    assert stability([np.full(100, 5)] * 5) == []
    assert stability([np.array([7])]) == []
