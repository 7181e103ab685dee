"""Small dense networks for tests of designs: random integers, every form of requantization."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from edgekit.backends.fpga.net import IntegerNet, Layer, Tensor, limits

Array = np.ndarray[Any, Any]


def dense_net(sizes: Sequence[int], bits: int, seed: int, zeros: float = 0.0) -> IntegerNet:
    """sizes: inputs, then outputs of each layer. zeros: share of weights that are 0.

    Shifts differ by channel, some to the left; ranges are those of no activation, ReLU, ReLU6 and a clip.
    """
    rng = np.random.default_rng(seed)
    tensors = [Tensor("x", (sizes[0],), bits, 2)]
    layers = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        low, high = limits(bits)
        weights = rng.integers(low, high + 1, (outputs, inputs)).astype(np.int8)
        weights[rng.random(weights.shape) < zeros] = 0
        span = int(np.abs(weights.astype(np.int64)).sum(axis=1).max()) * high
        usual = max(0, span.bit_length() - bits - 1)
        shifts = tuple(int(s) for s in usual + rng.integers(-1, 3, outputs)) if bits > 2 else (-1,)
        bounds = [(low, high), (0, high), (0, max(1, high * 3 // 4)), (low // 2, max(1, high // 2))][rng.integers(4)]
        tensors.append(Tensor(f"t{index}", (outputs,), bits, 0))
        layers.append(
            Layer(
                "dense",
                f"dense{index}",
                (tensors[-2].name,),
                tensors[-1].name,
                *bounds,
                shifts,
                weights,
                bits,
                (0,) * len(shifts),
                rng.integers(-span // 4 - 1, span // 4 + 2, outputs),
            )
        )
    return IntegerNet(tensors[0], {t.name: t for t in tensors}, tuple(layers), tensors[-1].name)


def samples(net: IntegerNet, n: int, seed: int) -> Array:
    """int8 (n, inputs) over the whole range, the extremes among them."""
    low, high = net.input.limits
    x = np.random.default_rng(seed).integers(low, high + 1, (n, net.input.size)).astype(np.int8)
    x[0], x[-1] = low, high
    return x
