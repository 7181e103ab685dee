"""The engine's program: widths of everything, contents of its memories, and the fields of each step's registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.backends.fpga.mac_array.buffers import Places
from edgekit.backends.fpga.mac_array.config import Config, bits_for
from edgekit.backends.fpga.mac_array.steps import LOOPS, MOST_LEFT, Step, lane_weight_bits, steps_of
from edgekit.backends.fpga.net import IntegerNet, Layer

Array = np.ndarray[Any, Any]

# The widest port of an ECP5 block RAM (Lattice FPGA-TN-02204).
PROGRAM_WORD = 36


@dataclass(frozen=True)
class Widths:
    """Bits of the engine's registers, memories and counters; the numbers of words of its memories."""

    activation: int
    weight: int
    accumulator: int
    bias: int
    shift: int
    left: int  # the largest shift to the left
    wide: int  # of a sum that is being shifted
    multiplier: int  # 0: no average pool needs one
    multiplicand: int
    drain: int
    idle: int
    count: int
    coordinate: int
    feature_address: int
    weight_address: int
    bias_address: int
    step_number: int
    slice: int


@dataclass(frozen=True, eq=False)
class Program:
    """Everything that the engine needs to run one network.

    weights: int64 (words, p, q). biases, shifts: int64 (words, q). weight_bases, bias_bases: of each step.
    places: of the feature maps in their memory.
    """

    net: IntegerNet
    config: Config
    widths: Widths
    steps: tuple[Step, ...]
    places: Places
    weights: Array
    biases: Array
    shifts: Array
    weight_bases: tuple[int, ...]
    bias_bases: tuple[int, ...]

    @property
    def input_words(self) -> int:
        return self._words(self.net.input.name)

    @property
    def output_words(self) -> int:
        return self._words(self.net.output)

    def _words(self, tensor: str) -> int:
        height, width, _ = self.net.tensors[tensor].hwc
        return height * width * self.places.pitch[tensor]

    @property
    def bank_words(self) -> int:
        return -(-self.places.size // self.config.banks)

    @property
    def step_words(self) -> int:
        """Program words of one step."""
        return -(-sum(width for _, width in self.fields) // PROGRAM_WORD)

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """Name and width of each register of a step, lowest bit first."""
        w = self.widths
        return (
            ("loop_last", LOOPS * w.count),
            ("feature_increment", LOOPS * w.feature_address),
            ("row_increment", LOOPS * w.coordinate),
            ("column_increment", LOOPS * w.coordinate),
            ("feature_base", w.feature_address),
            ("row_base", w.coordinate),
            ("column_base", w.coordinate),
            ("rows", w.coordinate),
            ("columns", w.coordinate),
            ("padded", 1),
            ("weight_base", w.weight_address),
            ("weight_fixed", 1),
            ("idle", w.idle),
            ("by_channel", 1),
            ("maximum", 1),
            ("words_full", w.drain),
            ("words_last", w.drain),
            ("output_base", w.feature_address),
            ("output_pixel", w.feature_address),
            ("bias_base", w.bias_address),
            ("bias_repeat", 1),
            ("scaled", 1),
            ("multiplier", max(1, w.multiplier)),
            ("low", w.activation),
            ("high", w.activation),
            ("sends", 1),
        )

    def program_words(self) -> list[int]:
        """All steps, and the one that sends the output."""
        values = [self._values(index) for index in range(len(self.steps))]
        values.append({"feature_base": self.places.base[self.net.output], "sends": 1})
        made: list[int] = []
        for step in values:
            bits, at = 0, 0
            for name, width in self.fields:
                bits |= (step.get(name, 0) & ((1 << width) - 1)) << at
                at += width
            made += [(bits >> (PROGRAM_WORD * k)) & ((1 << PROGRAM_WORD) - 1) for k in range(self.step_words)]
        return made

    def _values(self, index: int) -> dict[str, int]:
        step, w = self.steps[index], self.widths
        return {
            "loop_last": _packed([n - 1 for n in step.counts], w.count),
            "feature_increment": _packed(step.increments(step.strides), w.feature_address),
            "row_increment": _packed(step.increments(step.rows_moved), w.coordinate),
            "column_increment": _packed(step.increments(step.columns_moved), w.coordinate),
            "feature_base": step.base,
            "row_base": step.row_base,
            "column_base": step.column_base,
            "rows": step.rows,
            "columns": step.columns,
            "padded": step.padded,
            "weight_base": self.weight_bases[index],
            "weight_fixed": step.weight_fixed,
            "idle": step.idle,
            "by_channel": step.by_channel,
            "maximum": step.maximum,
            "words_full": step.words_full,
            "words_last": step.words_last,
            "output_base": step.output_base,
            "output_pixel": step.output_pixel,
            "bias_base": self.bias_bases[index],
            "bias_repeat": step.bias_repeat,
            "scaled": step.multiplier != 1,
            "multiplier": step.multiplier,
            "low": step.low,
            "high": step.high,
        }


def compiled(net: IntegerNet, config: Config) -> Program:
    """Raises UnsupportedOpError for what the array has no form for."""
    weight_bits = lane_weight_bits(net)
    steps, places = steps_of(net, config, weight_bits)
    weights, weight_bases = _stacked([s.weights for s in steps])
    results, bias_bases = _stacked([np.stack([s.biases, s.shifts]) for s in steps], axis=1)
    biases, shifts = results
    return Program(
        net=net,
        config=config,
        widths=_widths(net, config, steps, weight_bits, places, len(weights), biases, shifts),
        steps=steps,
        places=places,
        weights=weights,
        biases=biases,
        shifts=shifts,
        weight_bases=weight_bases,
        bias_bases=bias_bases,
    )


def _packed(values: list[int] | tuple[int, ...], width: int) -> int:
    return sum((v & ((1 << width) - 1)) << (k * width) for k, v in enumerate(values))


def _stacked(parts: list[Array], axis: int = 0) -> tuple[Array, tuple[int, ...]]:
    """All words one after the other, and where each part begins; a part that was seen before is not stored again."""
    seen: dict[bytes, int] = {}
    kept: list[Array] = []
    bases, used = [], 0
    for part in parts:
        key = part.tobytes()
        if key not in seen:
            seen[key] = used
            kept.append(part)
            used += part.shape[axis]
        bases.append(seen[key])
    return np.concatenate(kept, axis=axis), tuple(bases)


def _widths(
    net: IntegerNet,
    config: Config,
    steps: tuple[Step, ...],
    weight_bits: int,
    places: Places,
    weight_words: int,
    biases: Array,
    shifts: Array,
) -> Widths:
    accumulator = max(_signed(*_sum_range(net, layer)) for layer in net.layers)
    left = min(MOST_LEFT, max(0, -int(shifts.min())))
    averages = [layer for layer in net.layers if layer.multiplier != 1]
    multiplier = max((layer.multiplier.bit_length() for layer in averages), default=0)
    multiplicand = max((_signed(*_sum_range(net, layer)) for layer in averages), default=1)
    activation = max(tensor.bits for tensor in net.tensors.values())
    # what is multiplied is no longer than multiplicand and multiplier together; a result is cut out of a shifted sum
    wide = max(accumulator, activation, multiplicand + multiplier if averages else 0) + left + 1
    spans = [s.rows + s.columns for s in steps if s.padded]
    kernels = [max(layer.kernel) + max(layer.strides) + max(layer.pads) for layer in net.layers]
    return Widths(
        activation=activation,
        weight=weight_bits,
        accumulator=accumulator,
        bias=max(2, _signed(int(biases.min()), int(biases.max()))),
        shift=max(3, bits_for(wide)),
        left=left,
        wide=wide,
        multiplier=multiplier,
        multiplicand=multiplicand,
        drain=max(s.words_full for s in steps).bit_length(),
        idle=max(1, max(s.idle for s in steps).bit_length()),
        count=bits_for(max(max(s.counts) for s in steps)),
        # positions before the map are large numbers when read without sign: one bit more than the last position needs
        coordinate=(max(spans, default=1) + 2 * max(kernels)).bit_length() + 1,
        feature_address=max(bits_for(places.size), config.banks.bit_length()),
        weight_address=bits_for(weight_words),
        bias_address=bits_for(len(biases)),
        step_number=(len(steps) + 1).bit_length(),
        slice=bits_for(config.q),
    )


def _signed(low: int, high: int) -> int:
    """Bits of two's complement that hold low .. high."""
    return max((-low - 1 if low < 0 else 0).bit_length(), max(high, 0).bit_length()) + 1


def _sum_range(net: IntegerNet, layer: Layer) -> tuple[int, int]:
    """What the accumulator of a layer may hold: any partial sum, with and without the bias, before any multiplier."""
    spans = [net.tensors[name].limits for name in layer.inputs]
    if layer.weights is None:
        count = layer.kernel[0] * layer.kernel[1] if layer.kind == "avgpool" else 1
        factors = [1 << s for s in layer.input_shifts] or [count]
        return sum(s[0] * f for s, f in zip(spans, factors, strict=False)), sum(
            s[1] * f for s, f in zip(spans, factors, strict=False)
        )
    assert layer.bias is not None
    low, high = spans[0]
    flat = layer.weights.reshape(len(layer.weights), -1).astype(np.int64)
    above, below = np.maximum(flat, 0).sum(axis=1), np.minimum(flat, 0).sum(axis=1)
    least, most = above * low + below * high, above * high + below * low
    return int(min(least.min(), (least + layer.bias).min())), int(max(most.max(), (most + layer.bias).max()))


def encoded_shifts(program: Program) -> Array:
    """Shift registers: the bit for rounding and the largest shift to the left are added; all sign from `wide` on."""
    return np.asarray(np.clip(program.shifts + program.widths.left, 0, program.widths.wide - 1))
