"""Steps of the engine's program: what the sequencer, the lanes and the requantizer do for one layer.

A step is six nested loops, from the inside out: word of the tap, column and row of the window, group of outputs, output
column, output row. For each loop it has the distance, in words of memory, that one more iteration moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.backends.fpga.mac_array.buffers import Places, placed
from edgekit.backends.fpga.mac_array.config import Config, words
from edgekit.backends.fpga.net import IntegerNet, Layer, limits
from edgekit.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]

LOOPS = 6
# A shift of 8 to the left moves every sum but 0 out of any range of 8 bits: more changes nothing.
MOST_LEFT = 8
# An operand of an addition that has to be shifted further is added up from several taps; 2^6 of them are still cheap.
MOST_ADD_SHIFT = 12


@dataclass(frozen=True, eq=False)
class Step:
    """One pass over the memory.

    counts, strides: of the loops, from the inside out. rows_moved, columns_moved: of the window, per loop.
    weights: int64 (words, p, q). biases, shifts: int64 (words of results, q).
    macs: products that the network asks for; the lanes do more where channels do not fill them.
    """

    layer: str
    kind: str
    counts: tuple[int, ...]
    strides: tuple[int, ...]
    base: int
    output_base: int
    output_pixel: int
    weights: Array
    biases: Array
    shifts: Array
    low: int
    high: int
    words_full: int
    words_last: int
    macs: int
    rows_moved: tuple[int, ...] = (0,) * LOOPS
    columns_moved: tuple[int, ...] = (0,) * LOOPS
    row_base: int = 0
    column_base: int = 0
    rows: int = 0
    columns: int = 0
    by_channel: bool = False
    maximum: bool = False
    weight_fixed: bool = False
    bias_repeat: bool = False
    multiplier: int = 1

    @property
    def padded(self) -> bool:
        return self.rows > 0

    @property
    def taps(self) -> int:
        """Cycles in which one group of outputs accumulates."""
        return self.counts[0] * self.counts[1] * self.counts[2]

    @property
    def idle(self) -> int:
        """Cycles after a group in which its results leave and no others may come."""
        return max(0, self.words_full - self.taps)

    @property
    def groups(self) -> int:
        """Groups of outputs of all pixels."""
        return self.counts[3] * self.counts[4] * self.counts[5]

    def increments(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """What is added when a loop goes on, which ends all loops inside it."""
        ended = [sum((n - 1) * s for n, s in zip(self.counts[:k], strides[:k], strict=True)) for k in range(LOOPS)]
        return tuple(stride - back for stride, back in zip(strides, ended, strict=True))


def steps_of(net: IntegerNet, config: Config, weight_bits: int) -> tuple[tuple[Step, ...], Places]:
    """weight_bits: width of a lane's weight."""
    places = placed(net, config)
    made: list[Step] = []
    for layer in net.layers:
        if layer.kind in {"conv", "dense"}:
            made.append(_product(net, layer, config, places))
        elif layer.kind == "add":
            made.append(_add(net, layer, config, places, weight_bits))
        elif layer.kind == "concat":
            made.extend(_concat(net, layer, config, places))
        else:
            made.append(_by_channel(net, layer, config, places))
    return tuple(made), places


def lane_weight_bits(net: IntegerNet) -> int:
    """Width of a lane's weight: that of the widest layer, and enough for the factor of an addition's shift."""
    shifts = [s for layer in net.layers for s in layer.input_shifts]
    return max([2, min(8, max(shifts, default=0) + 2)] + [layer.weight_bits for layer in net.layers])


# --- window arithmetic -----------------------------------------------------------------------------------
def _window(net: IntegerNet, layer: Layer, config: Config, places: Places) -> dict[str, Any]:
    """What convolutions and pools have in common: the walk of a window over a padded map."""
    height, width, _ = net.tensors[layer.inputs[0]].hwc
    pixel = places.pitch[layer.inputs[0]]
    (down, across), (top, left, bottom, right) = layer.strides, layer.pads
    padded = (top, left, bottom, right) != (0, 0, 0, 0)
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "strides": (1, pixel, width * pixel, 0, across * pixel, down * width * pixel),
        "base": places.base[layer.inputs[0]] - (top * width + left) * pixel,
        **_target(net, layer, config, places),
        "rows_moved": (0, 0, 1, 0, 0, down),
        "columns_moved": (0, 1, 0, 0, across, 0),
        "row_base": -top,
        "column_base": -left,
        "rows": height if padded else 0,
        "columns": width if padded else 0,
        "low": layer.low,
        "high": layer.high,
        "macs": net.macs(layer),
    }


def _target(net: IntegerNet, layer: Layer, config: Config, places: Places) -> dict[str, Any]:
    """Where results go: after the last word of a pixel the address moves on to the next pixel."""
    own = words(net.tensors[layer.output].hwc[2], config.q)
    return {"output_base": places.base[layer.output], "output_pixel": 1 + places.pitch[layer.output] - own}


def _grouped(count: int, most: int) -> dict[str, Any]:
    """Result words of a pixel's groups, all but the last and the last."""
    full = min(count, most)
    return {"words_full": full, "words_last": count - (-(-count // full) - 1) * full}


def _product(net: IntegerNet, layer: Layer, config: Config, places: Places) -> Step:
    """A convolution; a dense layer is one whose window is the whole map."""
    source, target = net.tensors[layer.inputs[0]], net.tensors[layer.output]
    height, width, channels = source.hwc
    rows, columns = (height, width) if layer.kind == "dense" else layer.kernel
    out_height, out_width, out_channels = target.hwc
    assert layer.weights is not None
    weights = layer.weights.reshape(out_channels, rows, columns, channels)
    groups = -(-out_channels // config.p)
    return Step(
        **_window(net, layer, config, places),
        counts=(words(channels, config.q), columns, rows, groups, out_width, out_height),
        weights=_lane_words(weights, config),
        **_results(layer, config),
        **_grouped(words(out_channels, config.q), config.p // config.q),
    )


def _lane_words(weights: Array, config: Config) -> Array:
    """(cout, kh, kw, cin) -> (words, p, q) in the order of the loops; lanes without a channel get 0."""
    out_channels, rows, columns, channels = weights.shape
    groups, deep = -(-out_channels // config.p), words(channels, config.q)
    filled = np.zeros((groups * config.p, rows, columns, deep * config.q), np.int64)
    filled[:out_channels, :, :, :channels] = weights
    split = filled.reshape(groups, config.p, rows * columns * deep, config.q)
    return split.transpose(0, 2, 1, 3).reshape(-1, config.p, config.q)


def _results(layer: Layer, config: Config) -> dict[str, Any]:
    """Biases and shifts of product layers, q channels a word."""
    assert layer.bias is not None
    channels = len(layer.bias)
    biases = np.zeros(words(channels, config.q) * config.q, np.int64)
    shifts = np.zeros_like(biases)
    biases[:channels] = layer.bias
    shifts[:channels] = layer.shift
    return {"biases": biases.reshape(-1, config.q), "shifts": shifts.reshape(-1, config.q)}


# --- steps by channel ------------------------------------------------------------------------------------
def _by_channel(net: IntegerNet, layer: Layer, config: Config, places: Places) -> Step:
    """Depthwise convolution and pools: every channel by itself, a row of banks at a time."""
    out_height, out_width, channels = net.tensors[layer.output].hwc
    groups = -(-channels // config.row)
    common = _window(net, layer, config, places)
    one, word, row, _, column, line = common.pop("strides")
    if layer.weights is not None:
        filled = np.zeros((*layer.kernel, groups * config.row), np.int64)
        filled[:, :, :channels] = layer.weights.transpose(1, 2, 0)
        slices = filled.reshape(-1, groups, config.row).transpose(1, 0, 2).reshape(-1, config.row)
        own = {"weights": _slice_words(slices, config), **_results(layer, config)}
    else:
        own = {**_unit(layer.shift[0], config), "weight_fixed": True, "bias_repeat": True}
    return Step(
        **common,
        counts=(1, layer.kernel[1], layer.kernel[0], groups, out_width, out_height),
        strides=(one, word, row, config.banks, column, line),
        **own,
        **_grouped(words(channels, config.q), config.banks),
        by_channel=True,
        maximum=layer.kind == "maxpool",
        multiplier=layer.multiplier,
    )


def _slice_words(slices: Array, config: Config) -> Array:
    """(taps, row) -> (words, p, q): q taps share a word, in the q lanes of the output of their channel."""
    filled = np.zeros((-(-len(slices) // config.q) * config.q, config.p), np.int64)
    filled[: len(slices), : config.row] = slices
    return np.ascontiguousarray(filled.reshape(-1, config.q, config.p).transpose(0, 2, 1))


def _unit(shift: int, config: Config) -> dict[str, Any]:
    """Weight 1, bias 0 and one shift for all channels."""
    return {
        "weights": _slice_words(np.ones((1, config.row), np.int64), config),
        "biases": np.zeros((1, config.q), np.int64),
        "shifts": np.full((1, config.q), shift, np.int64),
    }


def _add(net: IntegerNet, layer: Layer, config: Config, places: Places, weight_bits: int) -> Step:
    """Two taps a row, one from each operand, whose weights are the operands' shifts to the left.

    A shift beyond the width of a weight takes several taps of the largest power of two.
    """
    largest = limits(weight_bits)[1].bit_length() - 1
    if max(layer.input_shifts) > MOST_ADD_SHIFT:
        raise UnsupportedOpError(
            f"add '{layer.name}' shifts an operand by {max(layer.input_shifts)} bits, the array by {MOST_ADD_SHIFT}",
            "quantize with closer exponents for its operands",
        )
    repeats = [1 << max(0, s - largest) for s in layer.input_shifts]
    taps = np.zeros((2, max(repeats)), np.int64)
    for operand, (repeat, shift) in enumerate(zip(repeats, layer.input_shifts, strict=True)):
        taps[operand, :repeat] = 1 << min(shift, largest)
    slices = np.repeat(taps.reshape(-1, 1), config.row, axis=1)
    groups = -(-net.tensors[layer.output].hwc[2] // config.row)
    first, second = (places.base[name] for name in layer.inputs)
    return Step(
        **_walk(net, layer, layer.inputs[0], config, places),
        **{**_unit(layer.shift[0], config), "weights": _slice_words(np.tile(slices, (groups, 1)), config)},
        counts=(1, max(repeats), 2, *_walked(net, layer.inputs[0], config)),
        strides=(0, 0, second - first, *_pixels(net, layer.inputs[0], config, places)),
    )


def _concat(net: IntegerNet, layer: Layer, config: Config, places: Places) -> list[Step]:
    """A copy of each operand, requantized, into its words of the output's pixels."""
    done = 0
    made = []
    for index, name in enumerate(layer.inputs):
        channels = net.tensors[name].hwc[2]
        if channels % config.q and index + 1 < len(layer.inputs):
            raise UnsupportedOpError(
                f"concat '{layer.name}': operand '{name}' has {channels} channels, memory words hold {config.q}",
                f"all operands but the last need a multiple of {config.q} channels",
            )
        walk = _walk(net, layer, name, config, places)
        own = words(channels, config.q)
        made.append(
            Step(
                **{
                    **walk,
                    "output_base": walk["output_base"] + done,
                    "output_pixel": 1 + places.pitch[layer.output] - own,
                },
                **_unit(layer.shift[index], config),
                counts=(1, 1, 1, *_walked(net, name, config)),
                strides=(0, 0, 0, *_pixels(net, name, config, places)),
                weight_fixed=True,
            )
        )
        done += own
    return made


def _walk(net: IntegerNet, layer: Layer, name: str, config: Config, places: Places) -> dict[str, Any]:
    """What steps have in common that go once over the pixels of a tensor."""
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "base": places.base[name],
        **_target(net, layer, config, places),
        "low": layer.low,
        "high": layer.high,
        **_grouped(words(net.tensors[name].hwc[2], config.q), config.banks),
        "macs": 0,
        "by_channel": True,
        "bias_repeat": True,
    }


def _walked(net: IntegerNet, name: str, config: Config) -> tuple[int, int, int]:
    """Loops over the rows of banks of a pixel, columns and rows of a tensor."""
    height, width, channels = net.tensors[name].hwc
    return -(-channels // config.row), width, height


def _pixels(net: IntegerNet, name: str, config: Config, places: Places) -> tuple[int, int, int]:
    """Words that these loops move."""
    _, width, _ = net.tensors[name].hwc
    return config.banks, places.pitch[name], width * places.pitch[name]
