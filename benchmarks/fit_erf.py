"""Fits the rational function by which edgekit writes Erf for LiteRT: erf(x) = x · P(x²) / Q(x²) for |x| ≤ LIMIT.

Iteratively reweighted least squares towards the smallest largest relative error, in float64; then the error of its
evaluation in float32. Prints the coefficients of edgekit/backends/tflite/ops/unary.py.
"""

from __future__ import annotations

import math

import numpy as np

LIMIT = 3.92  # erf(3.92) is 1 - 3e-8, which float32 rounds to 1
NUMERATOR, DENOMINATOR = 5, 5  # degrees in x²


def fit(rounds: int = 400) -> tuple[np.ndarray, np.ndarray, float]:
    """(coefficients of P, of Q with Q(0) = 1, lowest power first; largest relative error)."""
    x = LIMIT * np.sin(np.linspace(1e-4, 1, 6000) * np.pi / 2)
    wanted = np.array([math.erf(v) for v in x]) / x
    t = x * x
    scale = LIMIT**2
    powers = (t / scale)[:, None] ** np.arange(max(NUMERATOR, DENOMINATOR) + 1)
    weight, q = np.ones_like(t), np.ones_like(t)
    best: tuple[np.ndarray, np.ndarray, float] | None = None
    for _ in range(rounds):
        factor = (np.sqrt(weight) / (q * wanted))[:, None]
        matrix = np.hstack([powers[:, : NUMERATOR + 1], -wanted[:, None] * powers[:, 1 : DENOMINATOR + 1]])
        solution = np.linalg.lstsq(factor * matrix, factor[:, 0] * wanted, rcond=None)[0]
        a, b = solution[: NUMERATOR + 1], np.concatenate([[1.0], solution[NUMERATOR + 1 :]])
        q = powers[:, : DENOMINATOR + 1] @ b
        error = np.abs(powers[:, : NUMERATOR + 1] @ a / q / wanted - 1)
        if best is None or error.max() < best[2]:
            best = a / scale ** np.arange(len(a)), b / scale ** np.arange(len(b)), float(error.max())
        weight *= error / error.mean() + 1e-3
        weight /= weight.mean()
    assert best is not None
    return best


def evaluated(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """As the lowering does it, in float32."""
    x = np.clip(x.astype(np.float32), np.float32(-LIMIT), np.float32(LIMIT))
    t = x * x
    values = []
    for coefficients in (a, b):
        total = np.full_like(t, np.float32(coefficients[-1]))
        for c in coefficients[-2::-1]:
            total = total * t + np.float32(c)
        values.append(total)
    return x * values[0] / values[1]


if __name__ == "__main__":
    numerator, denominator, largest = fit()
    print("P", [float(f"{c:.9g}") for c in numerator])
    print("Q", [float(f"{c:.9g}") for c in denominator])
    points = np.concatenate([np.linspace(-6, 6, 400001), np.logspace(-30, 0, 1000)]).astype(np.float32)
    exact = np.array([math.erf(float(v)) for v in points])
    got = evaluated(numerator, denominator, points).astype(np.float64)
    nonzero = exact != 0
    print(f"fit {largest:.2e}, float32 {np.max(np.abs(got[nonzero] / exact[nonzero] - 1)):.2e}")
