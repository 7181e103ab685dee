"""Resize of images, and blocks of pixels traded for channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, channels_last
from edgekit.backends.tflite.graph import Tensor
from edgekit.backends.tflite.ops.moves import same_scale
from edgekit.backends.tflite.values import Node, Refused, Value

# LiteRT's flags: (align_corners, half_pixel_centers)
_FLAGS = ((False, False), (False, True), (True, False))
_LINEAR = {"asymmetric": (False, False), "half_pixel": (False, True), "align_corners": (True, False)}


def _resize(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    mode, coordinates = n.str("mode", "nearest"), n.str("coordinate_transformation_mode", "half_pixel")
    if x.rank not in (3, 4) or x.shape[:2] != out.shape[:2] or 0 in out.shape:
        raise Refused("it resizes other axes than the spatial ones", "LiteRT resizes images")
    if n.int("antialias", 0) and any(a > b for a, b in zip(x.shape, out.shape, strict=True)):
        raise Refused("antialiasing", "LiteRT has none")
    if coordinates == "half_pixel_symmetric" and _exact(n, x, out):
        coordinates = "half_pixel"
    if coordinates == "pytorch_half_pixel" and min(out.shape[2:]) > 1:
        coordinates = "half_pixel"
    scales = _scales(n, x, out)
    layout = channels_last(x.rank)
    tensor = e.tensor(x, layout)
    sizes = out.shape[2:]
    if x.rank == 3:
        tensor, sizes = e.reshape(tensor, (tensor.shape[0], 1, *tensor.shape[1:])), (1, *sizes)
    if mode == "nearest":
        y = _nearest(e, n, tensor, sizes, coordinates, scales)
    elif mode == "linear":
        y = _linear(e, tensor, sizes, coordinates, scales, x, out)
    else:
        raise Refused("cubic interpolation", "LiteRT interpolates linearly")
    if x.rank == 3:
        y = e.reshape(y, (y.shape[0], *y.shape[2:]))
    y.name = out.name
    e.define(out, y, layout)


def _scales(n: Node, x: Value, out: Value) -> tuple[float, ...]:
    """The spatial scales that ONNX computes with: as given, or sizes over sizes."""
    given = n.const(2)
    if given is not None and given.size:
        axes = n.ints("axes", tuple(range(x.rank)))
        known = dict(zip((a % x.rank for a in axes), (float(s) for s in given.reshape(-1)), strict=True))
        return tuple(known.get(a, 1.0) for a in range(2, x.rank))
    return tuple(b / a for a, b in zip(x.shape[2:], out.shape[2:], strict=True))


def _exact(n: Node, x: Value, out: Value) -> bool:
    return all(s * a == b for s, a, b in zip(_scales(n, x, out), x.shape[2:], out.shape[2:], strict=True))


def _nearest(
    e: Emitter, n: Node, x: Tensor, sizes: tuple[int, ...], coordinates: str, scales: tuple[float, ...]
) -> Tensor:
    """LiteRT's own where it picks the same elements, else a GATHER of each axis."""
    picks = []
    scales = (1.0,) * (len(sizes) - len(scales)) + scales
    for size, wanted, scale in zip(x.shape[1:3], sizes, scales, strict=True):
        picks.append(_picked(size, wanted, scale, coordinates, n.str("nearest_mode", "round_prefer_floor")))
    for corners, half in _FLAGS:
        if all(
            np.array_equal(p, _litert(s, w, corners, half)) for p, s, w in zip(picks, x.shape[1:3], sizes, strict=True)
        ):
            size = e.constant(np.array(sizes, np.int32))
            shape = (x.shape[0], *sizes, x.shape[3])
            return e.op(
                "RESIZE_NEAREST_NEIGHBOR", [x, size], shape, quant=x.quant, alignCorners=corners, halfPixelCenters=half
            )
    for axis, pick in enumerate(picks, 1):
        if not np.array_equal(pick, np.arange(x.shape[axis])):
            shape = (*x.shape[:axis], len(pick), *x.shape[axis + 1 :])
            x = e.op("GATHER", [x, e.constant(pick.astype(np.int32))], shape, quant=x.quant, axis=axis, batchDims=0)
    return x


def _source(size: int, wanted: int, scale: float, coordinates: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Where each output element lies in the input: ONNX's Resize."""
    place = np.arange(wanted, dtype=np.float64)
    if coordinates == "asymmetric":
        return place / scale
    if coordinates == "align_corners":
        return place * (size - 1) / (wanted - 1) if wanted > 1 else place * 0
    if coordinates == "half_pixel":
        return (place + 0.5) / scale - 0.5
    if coordinates == "pytorch_half_pixel":
        return (place + 0.5) / scale - 0.5 if wanted > 1 else place * 0
    if coordinates == "half_pixel_symmetric":
        adjusted = wanted / (scale * size)
        return size / 2 * (1 - adjusted) + (place + 0.5) / scale - 0.5
    raise Refused(
        f"coordinate_transformation_mode {coordinates}", "export with half_pixel, asymmetric or align_corners"
    )


def _picked(
    size: int, wanted: int, scale: float, coordinates: str, rounding: str
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    at = _source(size, wanted, scale, coordinates)
    rounded = {
        "floor": np.floor(at),
        "ceil": np.ceil(at),
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
    }[rounding]
    return np.clip(rounded, 0, size - 1).astype(np.int64)


def _litert(size: int, wanted: int, corners: bool, half: bool) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The elements that RESIZE_NEAREST_NEIGHBOR picks: reference_ops::GetNearestNeighbor, in float32."""
    scale = np.float32((size - 1) / (wanted - 1)) if corners and wanted > 1 else np.float32(size) / np.float32(wanted)
    at = (np.arange(wanted, dtype=np.float32) + np.float32(0.5 if half else 0.0)) * scale
    places = np.floor(at + np.float32(0.5)) if corners else np.floor(at)
    return np.clip(places, 0, size - 1).astype(np.int64)


def _linear(
    e: Emitter, x: Tensor, sizes: tuple[int, ...], coordinates: str, scales: tuple[float, ...], a: Value, b: Value
) -> Tensor:
    flags = _LINEAR.get(coordinates)
    if flags is None:
        raise Refused(
            f"coordinate_transformation_mode {coordinates}", "export with half_pixel, asymmetric or align_corners"
        )
    fits = all(abs(s * m - w) < 1e-3 for s, m, w in zip(scales, a.shape[2:], b.shape[2:], strict=True))
    if not fits and coordinates != "align_corners":
        raise Refused("its scale is not output size over input size", "export with sizes instead of scales")
    corners, half = flags
    shape = (x.shape[0], *sizes, x.shape[3])
    size = e.constant(np.array(sizes, np.int32))
    return e.op("RESIZE_BILINEAR", [x, size], shape, quant=x.quant, alignCorners=corners, halfPixelCenters=half)


def _depth_to_space(e: Emitter, n: Node) -> None:
    x, out, block = n.require(0), n.outputs[0], n.int("blocksize", 1)
    same_scale(x, out)
    layout = channels_last(4)
    tensor = e.tensor(x, layout)
    if n.str("mode", "DCR") == "DCR":
        e.emit(out, "DEPTH_TO_SPACE", [tensor], layout, blockSize=block)
        return
    # CRD keeps the channel outermost: put it innermost, where LiteRT has it
    depth = x.shape[1] // block**2
    places = np.arange(x.shape[1]).reshape(depth, block * block).T.reshape(-1)
    turned = e.op(
        "GATHER", [tensor, e.constant(places.astype(np.int32))], tensor.shape, quant=x.quant, axis=3, batchDims=0
    )
    e.emit(out, "DEPTH_TO_SPACE", [turned], layout, blockSize=block)


def _space_to_depth(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    layout = channels_last(4)
    e.emit(out, "SPACE_TO_DEPTH", [e.tensor(x, layout)], layout, blockSize=n.int("blocksize", 1))


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
