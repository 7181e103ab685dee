"""Fits the polynomial by which edgekit writes log(1 + y) for LiteRT: 2s · P(s²) with s = y / (2 + y), for 0 ≤ y ≤ 1.

LiteRT's LOG (XNNPACK) is off by 1.2e-7 near 1, which is all of the result where y is small. Chebyshev interpolation
of atanh(s) / s in s² on [0, 1/9], in float64; then the error of its evaluation in float32.
"""

from __future__ import annotations

import numpy as np

DEGREE = 4


def fit() -> np.ndarray:
    """Coefficients of P, lowest power first."""

    def function(t: np.ndarray) -> np.ndarray:
        root = np.sqrt(np.maximum(t, 1e-30))
        return np.arctanh(root) / root

    series = np.polynomial.Chebyshev.interpolate(function, DEGREE, domain=[0, 1 / 9])
    return series.convert(kind=np.polynomial.Polynomial).coef


def evaluated(coefficients: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As the lowering does it, in float32."""
    s = y / (y + np.float32(2))
    square = s * s
    total = np.full_like(s, np.float32(coefficients[-1]))
    for c in coefficients[-2::-1]:
        total = total * square + np.float32(c)
    return (s + s) * total


if __name__ == "__main__":
    found = fit()
    print("P", [float(f"{c:.9g}") for c in found])
    points = np.concatenate([np.linspace(1e-6, 1, 200001), np.logspace(-30, 0, 3000)]).astype(np.float32)
    exact = np.log1p(points.astype(np.float64))
    print(f"float32 {np.max(np.abs(evaluated(found, points) / exact - 1)):.2e}")
