"""Keeps numpy's BLAS to one thread where it multiplies many small matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def single_threaded(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with BLAS on one thread.

    Small products gain nothing by its threads and wait for them: on two busy cores the search for an MLP took 29 s of
    CPU with them and 4 without, ResNet8 43 and 13. ONNX Runtime's threads are its own.
    """

    @functools.wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited
