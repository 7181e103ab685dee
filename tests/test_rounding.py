"""Rounding in the norm of a Gram matrix, against exhaustive search and the nearest integers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.passes import rounding
from edgekit.passes.rounding import damped, descend, error, feedback, round_weights

Array = np.ndarray[Any, Any]


def problem(
    seed: int, groups: int, inputs: int, outputs: int, correlation: float, size: float = 1.0
) -> tuple[Array, Array, Array]:
    """(weight, gram, scales); inputs share `correlation` of their variance."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(groups, 400, 1))
    x = size * (np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.normal(size=(groups, 400, inputs)))
    weight = rng.normal(size=(groups, inputs, outputs))
    scales = np.abs(weight).max(axis=1, keepdims=True) / 7 + 1e-9
    return weight, x.swapaxes(1, 2) @ x / 400, np.broadcast_to(scales, weight.shape)


def nearest(weight: Array, scales: Array, limit: int) -> Array:
    return np.clip(np.rint(weight / scales), -limit, limit)


@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 0.95, 0.999]),
    st.sampled_from([1e-15, 1e-3, 1.0, 1e6, 1e30]),
    st.sampled_from([1, 7, 63, 127]),
)
@settings(max_examples=80, deadline=None)
def test_integers_within_limits_and_never_worse_than_nearest(
    seed: int, groups: int, inputs: int, outputs: int, correlation: float, size: float, limit: int
) -> None:
    weight, gram, scales = problem(seed, groups, inputs, outputs, correlation, size)
    q = round_weights(weight, gram, scales, limit)
    assert q.shape == weight.shape
    assert np.isfinite(q).all()
    assert (q == np.rint(q)).all()
    assert np.abs(q).max() <= limit
    # the norm that is minimized has a hundredth of the mean diagonal added
    plain, ours = (error(p, weight, damped(gram), scales) for p in (nearest(weight, scales, limit), q))
    assert (ours <= plain * (1 + 1e-9)).all()


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.0, 0.9, 0.999]), st.sampled_from([1, 2, 7]))
@settings(max_examples=60, deadline=None)
def test_tiny_problems_are_solved(seed: int, inputs: int, correlation: float, limit: int) -> None:
    """Exhaustive search over all integers within two of the weight; a descent may end beside the best, but not far."""
    weight, gram, scales = problem(seed, 1, inputs, 1, correlation)
    scales = np.broadcast_to(np.abs(weight).max() / limit, (1, 1, 1))
    solid = damped(gram)
    q = round_weights(weight, gram, scales, limit)
    middle = np.clip(np.rint(weight / scales), -limit, limit)[0, :, 0]
    tried = [
        np.clip(middle + np.array(step), -limit, limit).reshape(weight.shape)
        for step in itertools.product(range(-2, 3), repeat=inputs)
    ]
    least = min(float(error(t, weight, solid, scales)[0, 0]) for t in tried)
    plain = float(error(nearest(weight, scales, limit), weight, solid, scales)[0, 0])
    ours = float(error(q, weight, solid, scales)[0, 0])
    # least may be of integers further away than two
    assert ours <= least + 0.5 * (plain - least) + 1e-12
    if inputs == 1:
        assert ours <= least * (1 + 1e-9) + 1e-15


def test_most_tiny_problems_are_solved_exactly() -> None:
    solved = 0
    for seed in range(100):
        weight, gram, _ = problem(seed, 1, 3, 1, 0.9)
        scales = np.full((1, 1, 1), np.abs(weight).max() / 3)
        solid = damped(gram)
        ours = float(error(round_weights(weight, gram, scales, 3), weight, solid, scales)[0, 0])
        every = itertools.product(range(-3, 4), repeat=3)
        least = min(float(error(np.array(t).reshape(1, 3, 1), weight, solid, scales)[0, 0]) for t in every)
        assert ours >= least * (1 - 1e-9)
        solved += ours <= least * (1 + 1e-9) + 1e-15
    assert solved >= 80


@pytest.mark.parametrize("correlation", [0.0, 0.99])
def test_weights_on_the_grid_stay(correlation: float) -> None:
    weight, gram, scales = problem(1, 2, 12, 4, correlation)
    on_grid = nearest(weight, scales, 7)
    np.testing.assert_array_equal(round_weights(on_grid * scales, gram, scales, 7), on_grid)


def test_uncorrelated_inputs_are_rounded_to_the_nearest() -> None:
    weight, _, scales = problem(2, 1, 16, 4, 0.0)
    gram = np.diag(np.linspace(0.1, 3, 16))[None]
    np.testing.assert_array_equal(round_weights(weight, gram, scales, 127), nearest(weight, scales, 127))


def test_correlated_inputs_gain_much() -> None:
    weight, gram, scales = problem(3, 1, 64, 8, 0.98)
    ours = error(round_weights(weight, gram, scales, 7), weight, gram, scales).sum()
    plain = error(nearest(weight, scales, 7), weight, gram, scales).sum()
    assert ours < 0.3 * plain


def test_inputs_that_are_always_zero() -> None:
    weight, gram, scales = problem(4, 2, 6, 3, 0.9)
    gram[:, 2], gram[:, :, 2] = 0, 0
    q = round_weights(weight, gram, scales, 7)
    assert np.isfinite(q).all()
    nothing = round_weights(weight, np.zeros_like(gram), scales, 7)
    np.testing.assert_array_equal(nothing, nearest(weight, scales, 7))


def test_each_group_and_output_by_itself() -> None:
    weight, gram, scales = problem(5, 3, 10, 4, 0.95)
    q = round_weights(weight, gram, scales, 7)
    for group in range(3):
        for output in range(4):
            one = np.s_[group : group + 1, :, output : output + 1]
            alone = round_weights(weight[one], gram[group : group + 1], scales[one], 7)
            np.testing.assert_array_equal(q[one], alone)


@pytest.mark.parametrize("block", [1, 3, 7])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, scales = problem(6, 2, 17, 3, 0.95)
    solid = damped(gram)
    whole = feedback(weight, solid, scales, 7), descend(nearest(weight, scales, 7), weight, solid, scales, 7)
    monkeypatch.setattr(rounding, "_BLOCK", block)
    parts = feedback(weight, solid, scales, 7), descend(nearest(weight, scales, 7), weight, solid, scales, 7)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_feedback_is_what_its_paper_says() -> None:
    """GPTQ as optimal brain surgery states it: fix one weight, move the open ones by the inverse of their own part."""
    weight, gram, scales = problem(7, 1, 8, 3, 0.9)
    solid = damped(gram)
    left, q = weight[0].copy(), np.zeros((8, 3))
    open_rows = list(np.argsort(-np.diag(solid[0]), kind="stable"))
    while open_rows:
        at = open_rows[0]
        inverse = np.linalg.inv(solid[0][np.ix_(open_rows, open_rows)])
        q[at] = np.clip(np.rint(left[at] / scales[0, 0]), -7, 7)
        moved = (left[at] - q[at] * scales[0, 0]) / inverse[0, 0]
        left[open_rows] -= inverse[:, :1] * moved[None]
        open_rows = open_rows[1:]
    np.testing.assert_array_equal(feedback(weight, solid, scales, 7)[0], q)


def test_a_scale_for_each_row() -> None:
    weight, gram, _ = problem(8, 1, 6, 3, 0.9)
    scales = np.abs(np.random.default_rng(0).normal(size=(1, 6, 3))) * 0.1 + 0.05
    q = round_weights(weight, gram, scales, 127)
    plain, ours = (error(p, weight, damped(gram), scales) for p in (nearest(weight, scales, 127), q))
    assert (ours <= plain * (1 + 1e-9)).all()


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.5, 0.99]))
@settings(max_examples=40, deadline=None)
def test_descent_ends_where_no_single_step_helps(seed: int, inputs: int, correlation: float) -> None:
    weight, gram, scales = problem(seed, 1, inputs, 2, correlation)
    solid = damped(gram)
    q = descend(nearest(weight, scales, 7), weight, solid, scales, 7, sweeps=200)
    ours = error(q, weight, solid, scales)
    for row, step in itertools.product(range(inputs), (-1, 1)):
        other = q.copy()
        other[:, row] = np.clip(other[:, row] + step, -7, 7)
        assert (error(other, weight, solid, scales) >= ours * (1 - 1e-9) - 1e-15).all()


def test_limits_of_each_weight() -> None:
    weight, gram, scales = problem(9, 2, 12, 3, 0.95)
    middle = np.rint(weight / scales)
    low, high = middle - 1, middle
    q = round_weights(weight, gram, scales, (low, high))
    assert (q >= low).all()
    assert (q <= high).all()
    assert set(np.unique(q - middle)) == {-1.0, 0.0}
    assert (error(q, weight, damped(gram), scales) <= error(middle, weight, damped(gram), scales) * (1 + 1e-9)).all()
