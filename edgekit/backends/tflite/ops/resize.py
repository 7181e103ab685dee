"""Resize: LiteRT's own where it computes the same, else a GATHER or a product with a constant matrix for each axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.backends.tflite.emitter import Emitter, channels_last
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.ops.moves import same_scale
from edgekit.backends.tflite.values import Node, Refused, Value

Floats = NDArray[np.float64]
# LiteRT's flags: (align_corners, half_pixel_centers)
_FLAGS = ((False, False), (False, True), (True, False))
_NO_SCALE = 1e-6  # what float32 makes of 1
_CENTRED = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel")


@dataclass(frozen=True)
class _Axis:
    """One resized axis: its sizes, ONNX's scale (output over input), and how outputs lie on inputs."""

    size: int
    out: int
    scale: float
    coordinates: str

    @property
    def fits(self) -> bool:
        """Whether the output's size is exactly the input's times the scale."""
        return abs(self.scale * self.size - self.out) < 1e-3

    def places(self) -> Floats:
        """Where each output lies among the inputs. In float32, as ONNX Runtime computes it: ties decide `nearest`."""
        at, scale = np.arange(self.out, dtype=np.float32), np.float32(self.scale)
        half = np.float32(0.5)
        if self.coordinates == "asymmetric":
            places = at / scale
        elif self.coordinates == "align_corners":
            places = at * np.float32(self.size - 1) / np.float32(max(self.out - 1, 1))
        elif self.coordinates == "half_pixel" or (self.coordinates == "pytorch_half_pixel" and self.out > 1):
            places = (at + half) / scale - half
        elif self.coordinates == "pytorch_half_pixel":
            places = at * 0
        else:
            adjusted = np.float32(self.out) / (scale * np.float32(self.size))
            places = np.float32(self.size) / 2 * (1 - adjusted) + (at + half) / scale - half
        return places.astype(np.float64)

    def picked(self, rounding: str) -> NDArray[np.int64]:
        """The input that each output is, for `nearest`."""
        at = self.places()
        functions: dict[str, Callable[[Floats], Floats]] = {
            "floor": np.floor,
            "ceil": np.ceil,
            "round_prefer_floor": lambda a: np.ceil(a - 0.5),
            "round_prefer_ceil": lambda a: np.floor(a + 0.5),
        }
        return np.clip(functions[rounding](at), 0, self.size - 1).astype(np.int64)


def _resize(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    axes = _axes(n, x, out)
    if n.str("mode", "nearest") == "nearest":
        return _nearest(e, n, axes)
    if x.dtype != np.float32 and x.quant is None:
        raise Refused(f"interpolation of {x.dtype}", "cast to float32")
    if not _bilinear(e, n, axes):
        _weighted(e, n, axes)


def _axes(n: Node, x: Value, out: Value) -> dict[int, _Axis]:
    """The axes that change, by their place in ONNX's order."""
    coordinates = n.str("coordinate_transformation_mode", "half_pixel")
    if coordinates == "tf_crop_and_resize":
        raise Refused("coordinate_transformation_mode tf_crop_and_resize", "crop with Slice, then Resize")
    sizes = n.input(3)
    if sizes is not None and sizes.data is None and sizes.sizes is None:
        raise Refused("its sizes are computed", "fix them in the model")
    axes = n.ints("axes", tuple(range(x.rank)))
    given = n.const(2)
    scales: dict[int, float] = {}
    if given is not None and given.size:
        scales = dict(zip((a % x.rank for a in axes), (float(s) for s in given.reshape(-1)), strict=True))
    found = {}
    for a, (size, new) in enumerate(zip(x.shape, out.shape, strict=True)):
        scale = scales.get(a, new / size if size else 1.0)
        if size == new and (abs(scale - 1) < _NO_SCALE or a in x.dynamic):
            continue
        if size == new and given is not None:
            raise Refused("its scale changes no size", "runtimes disagree on what that is: leave the Resize out")
        if a in x.dynamic or 0 in (size, new):
            raise Refused("it resizes the batch, or to nothing")
        found[a] = _Axis(size, new, scale, coordinates)
    if n.str("keep_aspect_ratio_policy", "stretch") != "stretch":  # ONNX rounds sizes, and keeps the common scale
        common = (min if n.str("keep_aspect_ratio_policy", "") == "not_larger" else max)(
            w / x.shape[a % x.rank]
            for a, w in zip(axes, (int(s) for s in n.const(3).reshape(-1)), strict=True)  # type: ignore[union-attr]
        )
        found = {a: _Axis(f.size, f.out, common, coordinates) for a, f in found.items()}
    if coordinates == "align_corners" and not all(a.fits for a in found.values()):
        raise Refused("its scale is not output size over input size", "export with sizes instead of scales")
    return found


# --- nearest -------------------------------------------------------------------------------------------------
def _nearest(e: Emitter, n: Node, axes: dict[int, _Axis]) -> None:
    x, out = n.require(0), n.outputs[0]
    picks = {a: axis.picked(n.str("nearest_mode", "round_prefer_floor")) for a, axis in axes.items()}
    flags = next((f for f in _FLAGS if all(np.array_equal(p, _litert(axes[a], *f)) for a, p in picks.items())), None)
    layout = channels_last(x.rank) if x.rank in (3, 4) else existing(e, x)
    if (
        flags is not None
        and x.rank in (3, 4)
        and all(a >= 2 for a in axes)
        and (x.dtype == np.float32 or x.quant is not None)
    ):
        return _images(e, n, "RESIZE_NEAREST_NEIGHBOR", flags)
    tensor = e.tensor(x, layout)
    for axis, pick in picks.items():
        if not np.array_equal(pick, np.arange(x.shape[axis])):
            where = layout.index(axis)
            shape = (*tensor.shape[:where], len(pick), *tensor.shape[where + 1 :])
            places = e.constant(pick.astype(np.int32))
            tensor = e.op(
                "GATHER", [tensor, places], shape, quant=x.quant, dynamic=tensor.dynamic, axis=where, batchDims=0
            )
    e.define(out, tensor, layout)


def _litert(axis: _Axis, corners: bool, half: bool) -> NDArray[np.int64]:
    """The elements that RESIZE_NEAREST_NEIGHBOR picks: reference_ops::GetNearestNeighbor, in float32."""
    size, out = axis.size, axis.out
    scale = np.float32((size - 1) / (out - 1)) if corners and out > 1 else np.float32(size) / np.float32(out)
    at = (np.arange(out, dtype=np.float32) + np.float32(0.5 if half else 0.0)) * scale
    places = np.floor(at + np.float32(0.5)) if corners else np.floor(at)
    picked: NDArray[np.int64] = np.clip(places, 0, size - 1).astype(np.int64)
    return picked


def _images(e: Emitter, n: Node, code: str, flags: tuple[bool, bool]) -> None:
    """LiteRT's operator on (batch, height, width, channels); one spatial axis is two with the first of size 1."""
    x, out = n.require(0), n.outputs[0]
    layout = channels_last(x.rank)
    tensor, sizes = e.tensor(x, layout), out.shape[2:]
    if x.rank == 3:
        tensor, sizes = e.reshape(tensor, (tensor.shape[0], 1, *tensor.shape[1:])), (1, *sizes)
    shape = (tensor.shape[0], *sizes, tensor.shape[3])
    size = e.constant(np.array(sizes, np.int32))
    y = e.op(code, [tensor, size], shape, quant=out.quant, alignCorners=flags[0], halfPixelCenters=flags[1])
    if x.rank == 3:
        y = e.reshape(y, (shape[0], *shape[2:]))
    y.name = out.name
    e.define(out, y, layout)


# --- interpolation -------------------------------------------------------------------------------------------
def _bilinear(e: Emitter, n: Node, axes: dict[int, _Axis]) -> bool:
    """Written as RESIZE_BILINEAR if that is what the node computes."""
    x = n.require(0)
    coordinates = n.str("coordinate_transformation_mode", "half_pixel")
    if n.str("mode", "nearest") != "linear" or x.rank not in (3, 4) or any(a < 2 for a in axes):
        return False
    if n.int("exclude_outside", 0) or (n.int("antialias", 0) and any(a.scale < 1 for a in axes.values())):
        return False
    if not all(a.fits for a in axes.values()) or (coordinates == "pytorch_half_pixel" and 1 in n.outputs[0].shape[2:]):
        return False
    if coordinates == "align_corners" and any(a.out == 1 for a in axes.values()):
        return False
    _images(e, n, "RESIZE_BILINEAR", (coordinates == "align_corners", coordinates in _CENTRED))
    return True


def _weighted(e: Emitter, n: Node, axes: dict[int, _Axis]) -> None:
    """Each axis by a matrix (outputs, inputs) from the left: no axis has to move."""
    x, out = n.require(0), n.outputs[0]
    if x.quant is not None:
        raise Refused("LiteRT has no integer form of this interpolation", "leave it in float")
    layout: Layout = existing(e, x)
    tensor = e.tensor(x, layout)
    for axis, spec in axes.items():
        matrix = e.constant(_matrix(n, spec).astype(np.float32)[None])
        where = layout.index(axis)
        before, after = tensor.shape[:where], tensor.shape[where + 1 :]
        grows = {0} if any(k < where for k in tensor.dynamic) else {2} if tensor.dynamic else set()
        flat = (int(np.prod(before)), spec.size, int(np.prod(after)))
        three = e.reshape(tensor, flat, grows)
        made = e.op("BATCH_MATMUL", [matrix, three], (flat[0], spec.out, flat[2]), dynamic=grows)
        tensor = e.reshape(made, (*before, spec.out, *after), tensor.dynamic)
    tensor.name = out.name
    e.define(out, tensor, layout)


def _matrix(n: Node, axis: _Axis) -> Floats:
    """Row i holds the weights of the inputs in output i: ONNX's Resize, one axis."""
    cubic = n.str("mode", "nearest") == "cubic"
    stretch = max(1.0, 1 / axis.scale) if n.int("antialias", 0) else 1.0
    reach = int(np.ceil((2 if cubic else 1) * stretch)) + 1
    matrix = np.zeros((axis.out, axis.size))
    for row, place in zip(matrix, axis.places(), strict=True):
        near = np.floor(place) + np.arange(-reach, reach + 1)
        distance = np.abs(near - place) / stretch
        weights = _cubic(distance, n.float("cubic_coeff_a", -0.75)) if cubic else np.maximum(0.0, 1 - distance)
        inside = (near >= 0) & (near < axis.size)
        if n.int("exclude_outside", 0):
            weights = weights * inside
        np.add.at(row, np.clip(near, 0, axis.size - 1).astype(np.int64), weights / weights.sum())
    return matrix


def _cubic(t: Floats, a: float) -> Floats:
    """Keys 1981, eq. 15, with the parameter a."""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    result: Floats = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
    return result


# --- blocks of pixels for channels ---------------------------------------------------------------------------
def _depth_to_space(e: Emitter, n: Node) -> None:
    """CRD keeps the channel outermost: it goes innermost, where LiteRT has it."""
    x, out, block = n.require(0), n.outputs[0], n.int("blocksize", 1)
    same_scale(x, out)
    layout = channels_last(4)
    tensor = e.tensor(x, layout)
    if n.str("mode", "DCR") == "CRD":
        tensor = _swapped(e, tensor, x.shape[1] // block**2)
    e.emit(out, "DEPTH_TO_SPACE", [tensor], layout, blockSize=block)


def _space_to_depth(e: Emitter, n: Node) -> None:
    x, out, block = n.require(0), n.outputs[0], n.int("blocksize", 1)
    same_scale(x, out)
    layout = channels_last(4)
    if n.str("mode", "DCR") != "CRD":
        e.emit(out, "SPACE_TO_DEPTH", [e.tensor(x, layout)], layout, blockSize=block)
        return
    blank = e.blank(out, layout)
    made = e.op(
        "SPACE_TO_DEPTH", [e.tensor(x, layout)], blank.shape, quant=out.quant, dynamic=blank.dynamic, blockSize=block
    )
    e.define(out, _swapped(e, made, block**2), layout)


def _swapped(e: Emitter, x: Tensor, outer: int) -> Tensor:
    """Channels that lie as (outer, inner) as (inner, outer): a TRANSPOSE of the last two of three axes."""
    inner = x.shape[3] // outer
    pixels = int(np.prod(x.shape[:3]))
    three: Sequence[int] = (pixels, outer, inner)
    dynamic = {0} if x.dynamic else set[int]()
    perm = e.constant(np.array([0, 2, 1], np.int32))
    options: dict[str, Any] = {"quant": x.quant, "dynamic": dynamic}
    made = e.op("TRANSPOSE", [e.reshape(x, three, dynamic), perm], (pixels, inner, outer), **options)
    return e.reshape(made, x.shape, x.dynamic)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
