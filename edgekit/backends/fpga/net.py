"""IntegerNet: a network of small integers as plain data, the one form that simulators and hardware generators read.

docs/fpga.md says what each layer computes. Version history of the file: 1, first.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from edgekit.errors import ArtifactError, UnsupportedOpError

Array = np.ndarray[Any, Any]
Kind = Literal["conv", "depthwise", "dense", "add", "maxpool", "avgpool", "concat"]
Layout = Literal["HWC", "CHW"]

NET_SCHEMA = 1
MIN_BITS, MAX_BITS = 2, 8
ACCUMULATOR_BITS = 32
# A sum of 32 bits shifted by more is 0 or saturated; a hardware shifter of five stages reaches it.
MAX_SHIFT = 31
AVERAGE_BITS = 16  # fraction bits of 1/count where the count is no power of two


@dataclass(frozen=True)
class Tensor:
    """Integers q of `bits`, two's complement, of the real value q · 2^-exponent.

    shape: (height, width, channels), or (channels,); in memory channels are innermost.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    exponent: int

    @property
    def hwc(self) -> tuple[int, int, int]:
        return self.shape if len(self.shape) == 3 else (1, 1, self.shape[0])

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def limits(self) -> tuple[int, int]:
        return limits(self.bits)


@dataclass(frozen=True, eq=False)
class Layer:
    """One operation; every kind ends with requantization by `shift` and saturation to [low, high].

    weights: int8 (cout, kh, kw, cin) of conv, (c, kh, kw) of depthwise, (cout, cin) of dense; None of the others.
    weight_exponents: one for all output channels or one for each. bias: int64 (cout,).
    kernel, strides: (height, width). pads: (top, left, bottom, right). multiplier: of an average pool's sum.
    input_shifts: of add, to the left. shift: one, or one per output channel; of concat, one per operand.
    """

    kind: Kind
    name: str
    inputs: tuple[str, ...]
    output: str
    low: int
    high: int
    shift: tuple[int, ...]
    weights: Array | None = None
    weight_bits: int = 0
    weight_exponents: tuple[int, ...] = ()
    bias: Array | None = None
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    multiplier: int = 1
    input_shifts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class IntegerNet:
    """layers: in an order in which they can run. tensors: by name, the input's included.

    source: name, shape of one sample and layout of the model's input, which the host quantizes to `input`.
    result: name of the model's output, which is `output` · 2^-exponent after `host_ops` (operators, such as Softmax).
    notes: what a person should know, one line each.
    """

    input: Tensor
    tensors: dict[str, Tensor]
    layers: tuple[Layer, ...]
    output: str
    source: str = "input"
    source_shape: tuple[int, ...] = ()
    source_layout: Layout = "HWC"
    result: str = "output"
    host_ops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    # --- the host's part ----------------------------------------------------------------------------------
    def quantized(self, x: Array) -> Array:
        """Real samples (n, *source_shape) -> int8 (n, *input.shape) in HWC: rounded half up, saturated."""
        if tuple(x.shape[1:]) != self.source_shape:
            raise ArtifactError(
                f"input '{self.source}' has shape {tuple(x.shape[1:])}, the network takes {self.source_shape}",
                "give samples as the model takes them",
            )
        if self.source_layout == "CHW":
            height, width, channels = self.input.hwc
            x = x.reshape(len(x), channels, height, width).transpose(0, 2, 3, 1)
        q = np.floor(np.ldexp(x.astype(np.float64), self.input.exponent) + 0.5)
        return np.clip(q, *self.input.limits).astype(np.int8).reshape(len(x), *self.input.shape)

    def real(self, q: Array) -> Array:
        """Integers of the output -> float32 logits (n, *output shape)."""
        return np.ldexp(q.astype(np.float32), -self.tensors[self.output].exponent)

    # --- figures ------------------------------------------------------------------------------------------
    def readers(self, tensor: str) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if tensor in layer.inputs)

    def macs(self, layer: Layer) -> int:
        """Products of one inference."""
        if layer.weights is None:
            return 0
        height, width, channels = self.tensors[layer.output].hwc
        return height * width * channels * int(layer.weights[0].size)

    def sum_limits(self, layer: Layer) -> tuple[int, int]:
        """Lowest and highest sum that any input could give, the rounding offset of the shift included."""
        spans = [self.tensors[name].limits for name in layer.inputs]
        if layer.weights is not None and layer.bias is not None:
            (low, high), flat = spans[0], layer.weights.reshape(len(layer.weights), -1).astype(np.int64)
            above, below = np.maximum(flat, 0).sum(axis=1), np.minimum(flat, 0).sum(axis=1)
            least, most = above * low + below * high + layer.bias, above * high + below * low + layer.bias
            offset = np.array([half(s) for s in layer.shift])
            return int(min(least.min(), (least + offset).min())), int(max(most.max(), (most + offset).max()))
        if layer.kind == "avgpool":
            count = layer.kernel[0] * layer.kernel[1] * layer.multiplier
            return spans[0][0] * count, spans[0][1] * count + half(layer.shift[0])
        if layer.kind == "add":
            pairs = list(zip(spans, layer.input_shifts, strict=True))
            least, most = (sum(span[side] << shift for span, shift in pairs) for side in (0, 1))
            return least, most + half(layer.shift[0])
        return min(s[0] for s in spans), max(s[1] for s in spans) + max(half(s) for s in layer.shift)

    def accumulator_bits(self, layer: Layer) -> int:
        """Width of the two's complement sum of a layer, the rounding offset included."""
        low, high = self.sum_limits(layer)
        return max((-low - 1 if low < 0 else 0).bit_length(), max(high, 0).bit_length()) + 1

    # --- files --------------------------------------------------------------------------------------------
    def to_json(self, digest: str = "") -> str:
        """Everything but the arrays, of which only the SHA-256 of their file is kept."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"input", "tensors", "layers"}}
        data["input"] = self.input.name
        data["tensors"] = [vars(t) for t in self.tensors.values()]
        data["layers"] = [{k: v for k, v in vars(y).items() if not isinstance(v, np.ndarray)} for y in self.layers]
        return json.dumps({"schema": NET_SCHEMA, "arrays_sha256": digest, **data}, indent=1)

    def save(self, path: Path) -> None:
        """path: of the JSON; the arrays go beside it, in an .npz."""
        buffer = io.BytesIO()
        arrays = {f"{i}_{k}": v for i, y in enumerate(self.layers) for k, v in vars(y).items() if _stored(v)}
        np.savez_compressed(buffer, **arrays)
        content = buffer.getvalue()
        text = self.to_json(hashlib.sha256(content).hexdigest())
        for target, data in ((path.with_suffix(".npz"), content), (path, text.encode("utf-8"))):
            staged = target.with_name(f".{target.name}.new")
            staged.write_bytes(data)
            staged.replace(target)

    @staticmethod
    def load(path: Path) -> IntegerNet:
        """Raises ArtifactError for what `save` did not write."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            content = path.with_suffix(".npz").read_bytes()
            if data.pop("schema") != NET_SCHEMA:
                raise ArtifactError(
                    f"'{path}' is of another schema", f"this edgekit reads schema {NET_SCHEMA}: convert again"
                )
            if data.pop("arrays_sha256") != hashlib.sha256(content).hexdigest():
                raise ArtifactError(f"the arrays beside '{path}' are not its own", "copy the two files together")
            with np.load(io.BytesIO(content)) as stored:
                arrays = {k: stored[k] for k in stored.files}
            return _built(data, arrays)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise ArtifactError(f"the network '{path}' is missing or damaged ({told})", "convert again") from error


def limits(bits: int) -> tuple[int, int]:
    """The lowest and the highest integer in two's complement."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def half(shift: int) -> int:
    """What is added before a shift to the right, so that it rounds half up."""
    return 1 << (shift - 1) if shift > 0 else 0


def _stored(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _built(data: dict[str, Any], arrays: dict[str, Array]) -> IntegerNet:
    def frozen(row: dict[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}

    rows = [frozen(row) for row in data.pop("tensors")]
    tensors = {row["name"]: Tensor(**row) for row in rows}
    layers = []
    for index, row in enumerate(data.pop("layers")):
        own = {k: arrays[f"{index}_{k}"] for k in ("weights", "bias") if f"{index}_{k}" in arrays}
        layers.append(Layer(**{"weights": None, "bias": None, **frozen(row), **own}))
    return IntegerNet(tensors[data.pop("input")], tensors, tuple(layers), **frozen(data))


# --- soundness -------------------------------------------------------------------------------------------
def _check(net: IntegerNet) -> None:
    """Raises ArtifactError for what contradicts itself, UnsupportedOpError for a sum wider than 32 bits."""
    for told in _faults(net):
        raise ArtifactError(f"unsound integer network: {told}", "convert again")
    for layer in net.layers:
        if (bits := net.accumulator_bits(layer)) > ACCUMULATOR_BITS:
            raise UnsupportedOpError(
                f"{layer.kind} '{layer.name}' needs sums of {bits} bits, the hardware has {ACCUMULATOR_BITS}",
                "fewer bits for its weights or inputs, or fewer inputs",
            )


def _faults(net: IntegerNet) -> Iterator[str]:
    for name, tensor in net.tensors.items():
        if name != tensor.name or len(tensor.shape) not in (1, 3) or min(tensor.shape) < 1:
            yield f"tensor '{name}' has shape {tensor.shape}"
        if not MIN_BITS <= tensor.bits <= MAX_BITS:
            yield f"tensor '{name}' has {tensor.bits} bits"
    if net.tensors.get(net.input.name) != net.input:
        yield "its input is none of its tensors"
    made = {net.input.name}
    for layer in net.layers:
        missing = [n for n in layer.inputs if n not in made]
        if missing or layer.output not in net.tensors or layer.output in made:
            yield f"layer '{layer.name}' reads {missing} before it is made, or writes '{layer.output}' again"
            return
        made.add(layer.output)
        for told in _layer_faults(net, layer):
            yield f"layer '{layer.name}' ({layer.kind}): {told}"
    if net.output not in made:
        yield f"nothing makes the output '{net.output}'"


def _layer_faults(net: IntegerNet, layer: Layer) -> Iterator[str]:
    source, target = net.tensors[layer.inputs[0]], net.tensors[layer.output]
    if layer.kind not in get_args(Kind):
        yield "no such kind"
        return
    low, high = target.limits
    if not low <= layer.low < layer.high <= high:
        yield f"range [{layer.low}, {layer.high}] in {target.bits} bits"
    if any(abs(s) > MAX_SHIFT for s in (*layer.shift, *layer.input_shifts)) or min(layer.input_shifts, default=0) < 0:
        yield f"shifts {layer.shift}, {layer.input_shifts}"
    channels = target.hwc[2]
    if layer.kind == "concat":
        sides = [net.tensors[n].hwc for n in layer.inputs]
        if {s[:2] for s in sides} != {target.hwc[:2]} or sum(s[2] for s in sides) != channels:
            yield f"operands {sides} for {target.hwc}"
    elif layer.kind == "add":
        if [net.tensors[n].hwc for n in layer.inputs] != [target.hwc] * 2 or len(layer.input_shifts) != 2:
            yield "operands of different shapes"
    elif layer.kind != "dense" and target.hwc[:2] != windows(layer, source):
        yield f"{windows(layer, source)} windows for {target.hwc}"
    if layer.weights is None:
        if layer.kind in {"conv", "depthwise", "dense"}:
            yield "no weights"
        elif layer.kind in {"maxpool", "avgpool"} and source.hwc[2] != channels:
            yield f"{source.hwc[2]} channels become {channels}"
        if layer.kind in {"maxpool", "avgpool"} and _empty_windows(layer):
            yield f"a window of {layer.kernel} can lie in the padding {layer.pads}"
        expected = len(layer.inputs) if layer.kind == "concat" else 1
        if len(layer.shift) != expected:
            yield f"{len(layer.shift)} shifts"
        return
    yield from _weight_faults(layer, source, channels)


def _weight_faults(layer: Layer, source: Tensor, channels: int) -> Iterator[str]:
    weights, bias = layer.weights, layer.bias
    inner = {"conv": (*layer.kernel, source.hwc[2]), "depthwise": layer.kernel, "dense": (source.size,)}[layer.kind]
    if weights is None or weights.shape != (channels, *inner) or weights.dtype != np.int8:
        yield f"weights of shape {None if weights is None else weights.shape}, not {(channels, *inner)}"
        return
    low, high = limits(layer.weight_bits) if MIN_BITS <= layer.weight_bits <= MAX_BITS else (0, 0)
    if weights.min() < low or weights.max() > high:
        yield f"weights beyond {layer.weight_bits} bits"
    if layer.kind == "depthwise" and source.hwc[2] != channels:
        yield f"{source.hwc[2]} channels become {channels}"
    if bias is None or bias.shape != (channels,) or bias.dtype != np.int64:
        yield "no bias of one int64 per output"
    if len(layer.shift) not in (1, channels) or len(layer.weight_exponents) != len(layer.shift):
        yield f"{len(layer.shift)} shifts, {len(layer.weight_exponents)} weight exponents"


def _empty_windows(layer: Layer) -> bool:
    top, left, bottom, right = layer.pads
    return max(top, bottom) >= layer.kernel[0] or max(left, right) >= layer.kernel[1]


def windows(layer: Layer, source: Tensor) -> tuple[int, int]:
    """Rows and columns of windows that fit into the padded input."""
    top, left, bottom, right = layer.pads
    height, width, _ = source.hwc
    rows = (height + top + bottom - layer.kernel[0]) // layer.strides[0] + 1
    return rows, (width + left + right - layer.kernel[1]) // layer.strides[1] + 1
