"""Random integer networks of every kind of layer, and their meaning once more: loops over Python integers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgekit.backends.fpga.net import AVERAGE_BITS, IntegerNet, Kind, Layer, Tensor, limits, windows

Array = np.ndarray[Any, Any]
KINDS: tuple[Kind, ...] = ("conv", "depthwise", "dense", "add", "maxpool", "avgpool", "concat")


class Builder:
    """Grows a network at random; every choice comes from one generator. bits: of everything, None for 2 to 8."""

    def __init__(self, seed: int, shape: tuple[int, ...], bits: int | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.bits = bits
        self.tensors = {"x": Tensor("x", shape, self.width(), self.exponent())}
        self.layers: list[Layer] = []

    def width(self) -> int:
        return self.bits or int(self.rng.integers(2, 9))

    def exponent(self) -> int:
        return int(self.rng.integers(-2, 9))

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def net(self) -> IntegerNet:
        first = self.tensors["x"]
        return IntegerNet(first, self.tensors, tuple(self.layers), list(self.tensors)[-1], source_shape=first.shape)

    def last(self) -> Tensor:
        return list(self.tensors.values())[-1]

    def put(self, layer: Layer, shape: tuple[int, ...], exponent: int) -> None:
        bits = self.width()
        low, high = limits(bits)
        low = self.pick(low, 0)
        high = self.pick(high, max(low + 1, high // 2))
        self.tensors[layer.output] = Tensor(layer.output, shape, bits, exponent)
        self.layers.append(replace(layer, low=low, high=high))

    def window(self, source: Tensor) -> dict[str, Any]:
        height, width, _ = source.hwc
        pads = tuple(int(p) for p in self.rng.integers(0, 3, 4))
        kernel = (
            int(self.rng.integers(1, min(4, height + pads[0] + pads[2]) + 1)),
            int(self.rng.integers(1, min(4, width + pads[1] + pads[3]) + 1)),
        )
        # a window of padding only has no maximum of its own
        pads = (min(pads[0], kernel[0] - 1), min(pads[1], kernel[1] - 1), min(pads[2], kernel[0] - 1), pads[3])
        pads = (*pads[:3], min(pads[3], kernel[1] - 1))
        if height + pads[0] + pads[2] < kernel[0] or width + pads[1] + pads[3] < kernel[1]:
            kernel, pads = (1, 1), (0, 0, 0, 0)
        return {"kernel": kernel, "pads": pads, "strides": (self.pick(1, 1, 2, 3), self.pick(1, 1, 2))}

    def add_layer(self, kind: Kind, source: Tensor | None = None) -> None:
        source = source or self.last()
        name = f"{kind}_{len(self.layers)}"
        base = Layer(kind, name, (source.name,), f"{name}_out", 0, 1, (0,))
        if kind in {"conv", "depthwise", "dense"}:
            self._product(base, source)
        elif kind in {"maxpool", "avgpool"}:
            self._pool(base, source)
        else:
            self._join(base, source)

    def _product(self, base: Layer, source: Tensor) -> None:
        bits = self.width()
        low, high = limits(bits)
        cout = source.hwc[2] if base.kind == "depthwise" else int(self.rng.integers(1, 7))
        how = {} if base.kind == "dense" else self.window(source)
        kernel = how.get("kernel", (1, 1))
        shape = {"conv": (cout, *kernel, source.hwc[2]), "depthwise": (cout, *kernel), "dense": (cout, source.size)}
        weights = self.rng.integers(low, high + 1, shape[base.kind]).astype(np.int8)
        count = cout if self.pick(True, False) else 1
        exponents = tuple(int(e) for e in self.rng.integers(3, 9, count))
        # a sum's usual size, so that what comes out is neither always 0 nor always saturated
        spread = max(1.0, float(np.sqrt(weights[0].size)) * (1 << (bits - 1)) * (1 << (source.bits - 1)) / 4)
        fitting = round(np.log2(spread)) - 4 + self.pick(-1, 0, 1)
        out = source.exponent + min(exponents) - fitting
        bias = self.rng.integers(-int(spread), int(spread) + 1, cout).astype(np.int64)
        layer = replace(
            base,
            weights=weights,
            weight_bits=bits,
            weight_exponents=exponents,
            bias=bias,
            shift=tuple(source.exponent + e - out for e in exponents),
            **how,
        )
        flat = base.kind == "dense"
        size = (cout,) if flat else (*windows(layer, source), cout)
        self.put(layer, size, out)

    def _pool(self, base: Layer, source: Tensor) -> None:
        layer = replace(base, **self.window(source))
        if layer.kind == "avgpool":
            count = layer.kernel[0] * layer.kernel[1]
            power = count.bit_length() - 1
            exact = count == 1 << power
            bits = power if exact else AVERAGE_BITS
            layer = replace(layer, multiplier=1 if exact else round(2**bits / count), shift=(bits,))
        self.put(layer, (*windows(layer, source), source.hwc[2]), source.exponent)

    def _join(self, base: Layer, source: Tensor) -> None:
        add = base.kind == "add"
        fits = [
            t
            for t in self.tensors.values()
            if len(t.shape) == len(source.shape) and (t.hwc == source.hwc if add else t.hwc[:2] == source.hwc[:2])
        ]
        other = self.pick(*fits)
        exponents = (source.exponent, other.exponent)
        most, out = max(exponents), self.exponent()
        if add:
            shift, before = (most - out,), tuple(most - e for e in exponents)
            shape = source.shape
        else:
            shift, before = tuple(e - out for e in exponents), ()
            shape = (*source.shape[:-1], source.hwc[2] + other.hwc[2])
        self.put(replace(base, inputs=(source.name, other.name), shift=shift, input_shifts=before), shape, out)


def random_net(seed: int, layers: int = 6, bits: int | None = None) -> IntegerNet:
    """A chain with branches of `layers` layers, odd sizes, on a feature map of at most 9 × 8 × 5."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 10)), int(rng.integers(1, 9)), int(rng.integers(1, 6)))
    builder = Builder(seed + 1, shape, bits)
    for _ in range(layers):
        flat = len(builder.last().shape) == 1
        builder.add_layer(builder.pick("dense", "add", "concat") if flat else builder.pick(*KINDS))
    return builder.net()


def integers(net: IntegerNet, count: int, seed: int) -> Array:
    """Inputs over the whole range, extremes included."""
    low, high = net.input.limits
    x = np.random.default_rng(seed).integers(low, high + 1, (count, *net.input.shape)).astype(np.int8)
    x[0] = low
    return x


# --- the semantics, one integer after another ----------------------------------------------------------
def slow(net: IntegerNet, x: Array) -> dict[str, Array]:
    """One sample, without batch axis."""
    values = {net.input.name: x.reshape(net.input.hwc).tolist()}
    for layer in net.layers:
        values[layer.output] = _slow_layer(net, layer, [values[n] for n in layer.inputs])
    return {n: np.array(v).reshape(net.tensors[n].shape) for n, v in values.items()}


def finished(acc: int, shift: int, layer: Layer) -> int:
    if shift > 0:
        acc = (acc + (1 << (shift - 1))) // (1 << shift)  # the floor of an exact quotient
    else:
        acc = acc * (1 << -shift)
    return min(max(acc, layer.low), layer.high)


def _slow_layer(net: IntegerNet, layer: Layer, given: list[Any]) -> list[Any]:
    height, width, channels = net.tensors[layer.output].hwc
    return [[[_one(net, layer, given, r, c, k) for k in range(channels)] for c in range(width)] for r in range(height)]


def _one(net: IntegerNet, layer: Layer, given: list[Any], row: int, column: int, channel: int) -> int:
    if layer.kind == "concat":
        for values, shift in zip(given, layer.shift, strict=True):
            if channel < len(values[0][0]):
                return finished(values[row][column][channel], shift, layer)
            channel -= len(values[0][0])
    if layer.kind == "add":
        terms = [v[row][column][channel] * 2**s for v, s in zip(given, layer.input_shifts, strict=True)]
        return finished(sum(terms), layer.shift[0], layer)
    shift = layer.shift[channel] if len(layer.shift) > 1 else layer.shift[0]
    if layer.kind == "dense":
        flat = [v for line in given[0] for position in line for v in position]
        return finished(
            int(layer.bias[channel]) + sum(int(w) * v for w, v in zip(layer.weights[channel], flat, strict=True)),
            shift,
            layer,
        )
    taps = []  # (row and column of the kernel, input position or None)
    for i in range(layer.kernel[0]):
        for j in range(layer.kernel[1]):
            r, c = row * layer.strides[0] + i - layer.pads[0], column * layer.strides[1] + j - layer.pads[1]
            inside = 0 <= r < len(given[0]) and 0 <= c < len(given[0][0])
            taps.append((i, j, given[0][r][c] if inside else None))
    real = [(i, j, v) for i, j, v in taps if v is not None]
    if layer.kind == "maxpool":
        return finished(max(v[channel] for _, _, v in real), shift, layer)
    if layer.kind == "avgpool":
        return finished(sum(v[channel] for _, _, v in real) * layer.multiplier, shift, layer)
    acc = int(layer.bias[channel])
    for i, j, v in real:
        if layer.kind == "depthwise":
            acc += int(layer.weights[channel, i, j]) * v[channel]
        else:
            acc += sum(int(layer.weights[channel, i, j, k]) * v[k] for k in range(len(v)))
    return finished(acc, shift, layer)
