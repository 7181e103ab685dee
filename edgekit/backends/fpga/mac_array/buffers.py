"""Places of feature maps in the one memory that holds them: maps that are never needed together share words."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.backends.fpga.mac_array.config import Config, words
from edgekit.backends.fpga.net import IntegerNet, Layer


@dataclass(frozen=True)
class Places:
    """base: first word of every tensor. pitch: words of its pixels, those in between included. size: words in all."""

    base: dict[str, int]
    pitch: dict[str, int]
    size: int


def by_channel(layer: Layer) -> bool:
    """Layers in which every channel is by itself: they read whole rows of banks."""
    return layer.kind not in {"conv", "dense"}


def placed(net: IntegerNet, config: Config) -> Places:
    """The largest first, each at the lowest place that no tensor alive at the same time covers.

    A tensor is alive from the layer that makes it to the last that reads it, both included: no layer overwrites what it
    reads. Pixels that a step by channel reads begin with the first bank.
    """
    rows = {name for layer in net.layers if by_channel(layer) for name in layer.inputs}
    pitch, sizes = {}, {}
    for name, tensor in net.tensors.items():
        height, width, channels = tensor.hwc
        own = words(channels, config.q)
        pitch[name] = _up(own, config.banks) if name in rows else own
        sizes[name] = _up(height * width * pitch[name], config.banks)
    lives = _lives(net)
    base: dict[str, int] = {}
    for name in sorted(lives, key=lambda n: (-sizes[n], lives[n])):
        place = 0
        for other in sorted((n for n in base if _meet(lives[n], lives[name])), key=lambda n: base[n]):
            if place + sizes[name] <= base[other]:
                break
            place = max(place, base[other] + sizes[other])
        base[name] = place
    return Places(base, pitch, max(base[n] + sizes[n] for n in base))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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
