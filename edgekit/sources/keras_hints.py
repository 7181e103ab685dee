"""Inner values that a student follows besides the outputs; of numpy and TensorFlow alone, for `keras_trainer`.

Where the student has fewer channels, the teacher's are told from them by a linear map that is fitted once, before
training (the regressors of FitNets, Romero et al. 2015, in closed form): what repair left is near enough to know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RIDGE = 1e-4  # of the mean diagonal
LEAST = 1e-12


@dataclass(frozen=True)
class Hint:
    """How a value of the student's stands for the teacher's.

    axis: on which it has fewer channels, None where it has as many. matrix, shift: from the student's channels to the
    teacher's, by least squares before training, and fixed. spread: the teacher's variance.
    """

    axis: int | None
    matrix: Any
    shift: Any
    spread: float

    def loss(self, want: Any, got: Any) -> Any:
        """Mean square over the teacher's variance."""
        import tensorflow as tf

        if self.axis is not None:
            want = tf.transpose(want, _last(self.axis, len(want.shape)))
            got = tf.tensordot(got, self.matrix, [[self.axis], [0]]) + self.shift
        return tf.reduce_mean(tf.square(want - got)) / self.spread


def _last(axis: int, rank: int) -> list[int]:
    return [*(i for i in range(rank) if i != axis), axis]


class Moments:
    """Sums over batches of what one hint follows from; arrays batch first, of one rank."""

    def __init__(self, want: Any, got: Any) -> None:
        """want, got: what the teacher and the student make of a batch."""
        differ = [i for i, (a, b) in enumerate(zip(want.shape, got.shape, strict=True)) if i and a != b]
        self.axis = differ[0] if differ else None
        self.wide = want.shape[self.axis] if self.axis is not None else 1
        self.rows = 0
        self.total: Any = 0.0  # of the teacher's channels and, behind them, the student's
        self.squares: Any = 0.0

    def extend(self, want: Any, got: Any) -> None:
        import numpy as np

        if self.axis is None:
            both = want.reshape(-1, 1).astype(np.float64)
        else:
            sides = [a.transpose(_last(self.axis, a.ndim)).reshape(-1, a.shape[self.axis]) for a in (want, got)]
            both = np.concatenate(sides, axis=1).astype(np.float64)
        self.rows += len(both)
        self.total = self.total + both.sum(axis=0)
        self.squares = self.squares + both.T @ both

    def hint(self) -> Hint:
        import numpy as np

        mean = self.total / self.rows
        covariance = self.squares / self.rows - np.outer(mean, mean)
        theirs, own = slice(0, self.wide), slice(self.wide, None)
        spread = float(covariance[theirs, theirs].trace() / self.wide + np.var(mean[theirs]))
        if self.axis is None:
            return Hint(None, None, None, max(spread, LEAST))
        gram = covariance[own, own]
        gram = gram + (RIDGE * np.trace(gram) / len(gram) + LEAST) * np.eye(len(gram))
        matrix = np.linalg.solve(gram, covariance[own, theirs])
        shift = mean[theirs] - mean[own] @ matrix
        return Hint(self.axis, matrix.astype(np.float32), shift.astype(np.float32), max(spread, LEAST))
