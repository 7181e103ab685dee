"""ConvTranspose: as a convolution with an output per phase of the stride, so that the batch may stay open.

With stride s, output s·q + r reads taps r, r + s, r + 2s, ... of the kernel: a convolution that makes all s phases of
each q as channels, and a DEPTH_TO_SPACE that puts them side by side (Shi et al. 2016, "Is the deconvolution layer the
same as a convolutional layer?"). TRANSPOSE_CONV wants its output's whole shape, batch included, as a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, channels_last
from edgekit.backends.tflite.graph import Array, Quant, Tensor
from edgekit.backends.tflite.ops.dense import bias_tensor
from edgekit.backends.tflite.ops.windows import Window, cropped, padded
from edgekit.backends.tflite.values import Node, Refused


@dataclass(frozen=True)
class _Axis:
    """One spatial axis: input size, kernel size (dilation written out), stride, padding before, output size."""

    size: int
    kernel: int
    stride: int
    begin: int
    out: int

    @property
    def lead(self) -> int:
        """Zeros before the kernel that make the first output a phase 0, where they cost no tap: then nothing is cut."""
        lead = -self.begin % self.stride
        return lead if -(-(self.kernel + lead) // self.stride) == self.taps else 0

    @property
    def taps(self) -> int:
        """Kernel elements per phase."""
        return -(-self.kernel // self.stride)

    @property
    def first(self) -> int:
        """The first output's q."""
        return (self.begin + self.lead) // self.stride

    @property
    def steps(self) -> int:
        """Number of q's."""
        return (self.begin + self.lead + self.out - 1) // self.stride - self.first + 1

    @property
    def cut(self) -> int:
        """Outputs to drop at the beginning."""
        return self.begin + self.lead - self.first * self.stride


def _conv_transpose(e: Emitter, n: Node) -> None:
    x, weight, out = n.require(0), n.require(1), n.outputs[0]
    data, bias = weight.data, n.input(2)
    if data is None or (bias is not None and bias.data is None):
        raise Refused("its weights or its bias are computed", "make them constant")
    rank = x.rank - 2
    if rank not in (1, 2, 3):
        raise Refused(f"it has {rank} spatial axes", "LiteRT convolves 1 to 3")
    data = _dilated(data, n.ints("dilations", (1,) * rank))
    axes = _axes(n, x.shape[2:], data.shape[2:])
    if tuple(a.out for a in axes) != out.shape[2:]:
        raise Refused(f"its output has the sizes {out.shape[2:]}, not {tuple(a.out for a in axes)}")
    layout = channels_last(x.rank)
    tensor = e.tensor(x, layout)
    if rank == 1:
        tensor, data = e.reshape(tensor, (tensor.shape[0], 1, *tensor.shape[1:])), data[:, :, None]
        axes = (_Axis(1, 1, 1, 0, 1), *axes)
    made = _phases(e, n, tensor, data, axes)
    made = _interleaved(e, n, made, axes)
    made = _cut(e, made, axes)
    if rank == 1:
        made = e.reshape(made, (made.shape[0], *made.shape[2:]))
    made.name = out.name
    e.define(out, made, layout)


def _dilated(data: Array, dilations: Sequence[int]) -> Array:
    """The kernel with zeros between its elements."""
    if all(d == 1 for d in dilations):
        return data
    sizes = [(k - 1) * d + 1 for k, d in zip(data.shape[2:], dilations, strict=True)]
    out = np.zeros((*data.shape[:2], *sizes), data.dtype)
    out[(slice(None), slice(None), *(slice(None, None, d) for d in dilations))] = data
    return out


def _axes(n: Node, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[_Axis, ...]:
    """Padding and output sizes by ONNX's formulas for ConvTranspose."""
    rank = len(sizes)
    strides, extra = n.ints("strides", (1,) * rank), n.ints("output_padding", (0,) * rank)
    pads, wanted = n.ints("pads", (0,) * 2 * rank), n.ints("output_shape")[-rank:]
    auto = n.str("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER") and not wanted:
        wanted = tuple(size * s for size, s in zip(sizes, strides, strict=True))
    axes = []
    for a, (size, k, s) in enumerate(zip(sizes, kernel, strides, strict=True)):
        full = (size - 1) * s + k + extra[a]
        if wanted:
            total = max(0, full - wanted[a])  # what is larger than the kernel covers is bias at the end
            begin, out = (total // 2 if auto == "SAME_UPPER" else total - total // 2), wanted[a]
        else:
            begin, end = (0, 0) if auto == "VALID" else (pads[a], pads[a + rank])
            out = full - begin - end
        if begin < 0:
            raise Refused("its padding is negative", "pad the result instead")
        axes.append(_Axis(size, k, s, begin, out))
    return tuple(axes)


# --- the convolution -----------------------------------------------------------------------------------------
def _phases(e: Emitter, n: Node, x: Tensor, data: Array, axes: Sequence[_Axis]) -> Tensor:
    """(batch, q..., group · phases · outputs of a group): the convolution. data: (inputs, outputs / group, k...)."""
    group, quant = n.int("group", 1), n.require(1).quant
    count = int(np.prod([a.stride for a in axes]))
    kernel = _kernel(data, axes, group)
    scales = _per_output(quant, group, count)
    if len(axes) == 3:
        kernel = np.moveaxis(kernel, 0, -1)
        scales = None if scales is None else scales.on(4)
    constant = e.constant(np.ascontiguousarray(kernel), n.require(1).name, scales)
    bias = n.input(2)
    values, bias_quant = (None, None) if bias is None or bias.data is None else (bias.data, bias.quant)
    if values is not None:
        values = np.repeat(values.reshape(group, 1, -1), count, 1).reshape(-1)
        bias_quant = _repeated(bias_quant, group, count)
    outputs = group * count * data.shape[1]
    w = Window(
        tuple(a.taps for a in axes), (1,) * len(axes), (1,) * len(axes),
        tuple(a.taps - 1 - a.first for a in axes), tuple(a.first + a.steps - a.size for a in axes),
    )  # fmt: skip
    x, w = cropped(e, x, w)
    padding = w.padding(x.shape[1:-1])
    if padding is None:
        x, padding = padded(e, x, w), "VALID"
    shape = (x.shape[0], *(a.steps for a in axes), outputs)
    options: dict[str, Any] = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    if len(axes) == 3:
        if group != 1:
            raise Refused("a grouped convolution over 3 axes", "LiteRT has none")
        options |= {"strideD": 1, "dilationDFactor": 1}
    inputs = [x, constant, bias_tensor(e, n, x, constant, outputs, values, bias_quant)]
    return e.op(
        "CONV_3D" if len(axes) == 3 else "CONV_2D", inputs, shape, quant=n.outputs[0].quant, dtype=n.outputs[0].dtype,
        padding=padding, fusedActivationFunction=n.activation, **options,
    )  # fmt: skip


def _kernel(data: Array, axes: Sequence[_Axis], group: int) -> Array:
    """(group · phases · outputs of a group, taps..., inputs of a group): the taps of each phase, last one first."""
    rank = len(axes)
    spare = [(a.lead, a.taps * a.stride - a.kernel - a.lead) for a in axes]
    data = np.pad(data, [(0, 0), (0, 0), *spare])
    inputs, outputs = data.shape[0] // group, data.shape[1]
    pairs = [size for a in axes for size in (a.taps, a.stride)]
    data = data.reshape(group, inputs, outputs, *pairs)
    taps, phases = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
    data = np.flip(data, tuple(taps)).transpose(0, *phases, 2, *taps, 1)
    return data.reshape(-1, *(a.taps for a in axes), inputs)


def _per_output(quant: Quant | None, group: int, count: int) -> Quant | None:
    """The scales of the kernel that `_kernel` makes."""
    if quant is None or quant.per_tensor:
        return quant if quant is None else quant.on(0)
    if quant.axis != 1:
        raise Refused("its weights are quantized along another axis", "quantize per output channel")
    return Quant(np.tile(quant.scales, group * count), np.tile(quant.zeros, group * count), 0)


def _repeated(quant: Quant | None, group: int, count: int) -> Quant | None:
    """A bias's scales, one per output or one for all, once per phase."""
    if quant is None or quant.per_tensor:
        return quant
    scales, zeros = (np.repeat(a.reshape(group, 1, -1), count, 1).reshape(-1) for a in (quant.scales, quant.zeros))
    return Quant(scales, zeros, 0)


# --- phases side by side -------------------------------------------------------------------------------------
def _interleaved(e: Emitter, n: Node, x: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """(batch, q · s..., outputs) of (batch, q..., group · phases · outputs of a group)."""
    group, quant = n.int("group", 1), x.quant
    strides = [a.stride for a in axes]
    outputs = x.shape[-1] // int(np.prod(strides))
    shape = (x.shape[0], *(a.steps * a.stride for a in axes), outputs)
    if all(s == 1 for s in strides):
        return x
    if len(axes) == 2 and group == 1 and strides[0] == strides[1]:
        return e.op("DEPTH_TO_SPACE", [x], shape, quant=quant, blockSize=strides[0])
    if strides.count(1) == len(strides) - 1 and group == 1 and strides[-1] != 1:
        return e.reshape(x, shape)
    for k in range(len(axes)):
        x = _one_axis(e, x, axes, k, group)
    return e.reshape(x, shape)


def _one_axis(e: Emitter, x: Tensor, axes: Sequence[_Axis], k: int, group: int) -> Tensor:
    """The phases of axis k, the outermost that are still channels, behind its q's.

    In five axes: everything up to q, what lies between q and the channels, groups, the phases, the rest.
    """
    before = int(np.prod(x.shape[1 : k + 2])) if x.dynamic else int(np.prod(x.shape[: k + 2]))
    between = int(np.prod(x.shape[k + 2 : -1]))
    rest = x.shape[-1] // group // axes[k].stride
    if x.dynamic:
        before *= x.shape[0]
    x5 = e.reshape(x, (before, between, group, axes[k].stride, rest), (0,) if x.dynamic else ())
    turned = (before, axes[k].stride, between, group, rest)
    perm = e.constant(np.array([0, 3, 1, 2, 4], np.int32))
    moved = e.op("TRANSPOSE", [x5, perm], turned, quant=x.quant) if axes[k].stride > 1 else x5
    sizes = [a.steps * a.stride if i <= k else a.steps for i, a in enumerate(axes)]
    return e.reshape(moved, (x.shape[0], *sizes, group * rest), (0,) if x.dynamic else ())


def _cut(e: Emitter, x: Tensor, axes: Sequence[_Axis]) -> Tensor:
    shape = (x.shape[0], *(a.out for a in axes), x.shape[-1])
    if shape == x.shape:
        return x
    begin = e.constant(np.array([0, *(a.cut for a in axes), 0], np.int32))
    size = e.constant(np.array([-1, *shape[1:]], np.int32))
    return e.op("SLICE", [x, begin, size], shape, quant=x.quant)


LOWERINGS = {"ConvTranspose": _conv_transpose}
