"""Weights onto a grid so that a layer's *output* moves least, given the Gram matrix of its inputs.

Rounding each weight to the nearest ignores that inputs are correlated. Here the error tr(Eᵀ H E), E = Q - W, is reduced
in two steps: `feedback` rounds one input row after another and moves what is left to make up for it (Frantar et al.
2023, GPTQ, after Hassibi & Stork 1993, OBS), and `descend` revisits each row with all others fixed (Behdin et al. 2023,
QuantEase). Neither can end worse than it began, because the best of all, nearest included, is returned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SWEEPS = 3  # of coordinate descent; further ones change next to nothing (benchmarks/rounding.py)
FEW = 32  # inputs up to which descent from the nearest integers is tried too; with more, feedback ends better
DAMPING = 0.01  # of the Gram matrix' mean diagonal; GPTQ's own default
_BLOCK = 128  # rows whose effect on the rest is added at once

Limit = int | tuple[Array, Array]
"""The largest magnitude of an integer; or the (lowest, highest), each to be broadcast to the weight."""


def round_weights(weight: Array, gram: Array, scales: Array, limit: Limit) -> Array:
    """Integers q within the limit for weight ≈ q · scales with a small error in the norm of `gram`.

    weight: float (groups, inputs, outputs). gram: (groups, inputs, inputs), Xᵀ X of the layer's inputs up to a factor.
    scales: (groups, 1 or inputs, outputs), > 0. Returns float64 of integers, shaped like weight.
    """
    weight, scales = weight.astype(np.float64), np.broadcast_to(scales, weight.shape).astype(np.float64)
    gram = damped(gram)
    nearest = np.clip(np.rint(weight / scales), *_bounds(limit, weight))
    best = descend(nearest, weight, gram, scales, limit) if weight.shape[1] <= FEW else nearest
    other = descend(feedback(weight, gram, scales, limit), weight, gram, scales, limit)
    better = error(other, weight, gram, scales) < error(best, weight, gram, scales)
    return np.where(better[:, None, :], other, best)


def damped(gram: Array) -> Array:
    """float64, with DAMPING of its mean diagonal added; an input that is always 0 costs nothing but may not be free."""
    gram = gram.astype(np.float64)
    size = gram.shape[-1]
    mean = np.trace(gram, axis1=-2, axis2=-1) / size
    return np.asarray(gram + np.maximum(DAMPING * mean, 1e-12)[:, None, None] * np.eye(size))


def error(q: Array, weight: Array, gram: Array, scales: Array) -> Array:
    """Σ over rows of (E Hᵀ E) per (group, output)."""
    e = q * scales - weight
    return np.asarray((e * (gram @ e)).sum(axis=1))


def _bounds(limit: Limit, weight: Array) -> tuple[Array, Array]:
    low, high = (np.float64(-limit), np.float64(limit)) if isinstance(limit, int) else limit
    return np.broadcast_to(low, weight.shape), np.broadcast_to(high, weight.shape)


def feedback(weight: Array, gram: Array, scales: Array, limit: Limit) -> Array:
    """GPTQ: rows from the most to the least active; each error is spread over the rows still open."""
    groups, size, _ = weight.shape
    order = np.argsort(-np.diagonal(gram, axis1=1, axis2=2), axis=1, kind="stable")
    rows = np.arange(groups)[:, None]
    left = weight[rows, order].copy()
    steps = scales[rows, order]
    low, high = (bound[rows, order] for bound in _bounds(limit, weight))
    permuted = gram[rows[:, :, None], order[:, :, None], order[:, None, :]]
    inverse = np.linalg.inv(permuted)
    inverse = (inverse + inverse.swapaxes(1, 2)) / 2
    # upper factor U with UᵀU = H⁻¹: row k of U, over its diagonal, is how error k moves to the rows after it
    upper = np.linalg.cholesky(inverse).swapaxes(1, 2)
    q = np.empty_like(left)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = np.zeros((groups, stop - start, weight.shape[2]))
        for k in range(start, stop):
            q[:, k] = np.clip(np.rint(left[:, k] / steps[:, k]), low[:, k], high[:, k])
            e = (left[:, k] - q[:, k] * steps[:, k]) / upper[:, k, k, None]
            left[:, k:stop] -= upper[:, k, k:stop, None] * e[:, None, :]
            errors[:, k - start] = e
        if stop < size:
            left[:, stop:] -= upper[:, start:stop, stop:].swapaxes(1, 2) @ errors
    out = np.empty_like(q)
    out[rows, order] = q
    return out


def descend(q: Array, weight: Array, gram: Array, scales: Array, limit: Limit, sweeps: int = SWEEPS) -> Array:
    """Cyclic coordinate descent: each row to the integer that is best with all others as they are."""
    q = q.copy()
    size = weight.shape[1]
    low, high = _bounds(limit, weight)
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    slope = gram @ (q * scales - weight)
    for _ in range(sweeps):
        moved = False
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
            local = slope[:, start:stop]
            inner = gram[:, start:stop, start:stop]
            before = q[:, start:stop].copy()
            for k in range(stop - start):
                at = start + k
                wish = q[:, at] - local[:, k] / (diagonal[:, at, None] * scales[:, at])
                new = np.clip(np.rint(wish), low[:, at], high[:, at])
                change = (new - q[:, at]) * scales[:, at]
                if change.any():
                    local += inner[:, :, k, None] * change[:, None, :]
                    q[:, at] = new
            change = (q[:, start:stop] - before) * scales[:, start:stop]
            if change.any():
                moved = True
                update = gram[:, :, start:stop] @ change
                update[:, start:stop] = 0.0  # already in `local`, which is a view of it
                slope += update
        if not moved:
            break
    return q
