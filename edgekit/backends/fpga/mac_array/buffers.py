"""Places of feature maps in the one memory that holds them: maps that are never needed together share words."""

from __future__ import annotations

from edgekit.backends.fpga.mac_array.config import words
from edgekit.backends.fpga.net import IntegerNet, Tensor


def map_words(tensor: Tensor, q: int) -> int:
    height, width, channels = tensor.hwc
    return height * width * words(channels, q)


def placed(net: IntegerNet, q: int) -> tuple[dict[str, int], int]:
    """First word of every tensor, and the words in all.

    The largest first, each at the lowest place that no tensor alive at the same time covers. A tensor is alive from the
    layer that makes it to the last that reads it, both included: no layer overwrites what it reads.
    """
    lives = _lives(net)
    sizes = {name: map_words(net.tensors[name], q) for name in lives}
    bases: dict[str, int] = {}
    for name in sorted(lives, key=lambda n: (-sizes[n], lives[n])):
        taken = sorted((bases[n], sizes[n]) for n in bases if _meet(lives[n], lives[name]))
        base = 0
        for other, size in taken:
            if base + sizes[name] <= other:
                break
            base = max(base, other + size)
        bases[name] = base
    return bases, max(bases[n] + sizes[n] for n in bases)


def _lives(net: IntegerNet) -> dict[str, tuple[int, int]]:
    """Index of the layer that makes a tensor (-1: the input) and of the last that reads it."""
    lives = {net.input.name: (-1, -1)}
    for index, layer in enumerate(net.layers):
        for name in layer.inputs:
            lives[name] = (lives[name][0], index)
        lives[layer.output] = (index, index)
    lives[net.output] = (lives[net.output][0], len(net.layers))
    return lives


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]
