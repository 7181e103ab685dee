"""A layer as a linear regression: rows of inputs, rows of outputs, one per position that its weights are applied at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.windows import Window, pad_spatial, window

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer:
    """A node as y[g] = x[g] @ weight[g] + bias[g] over its groups g.

    weight: (groups, inputs, outputs) float64. bias: (groups, outputs) or None.
    """

    node: ir.Node
    weight: Array
    bias: Array | None
    shape: tuple[int, ...]

    def restored(self, weight: Array) -> Array:
        """(groups, inputs, outputs) back in the node's own layout."""
        if self.node.op_type == "Conv":
            moved: Array = weight.swapaxes(1, 2).reshape(self.shape)
            return moved
        flat = weight[0]
        return np.asarray(flat.T if _transposed(self.node) else flat)

    def along(self, channels: Array) -> Array:
        """One number per output channel as (groups, 1, outputs)."""
        groups, _, outputs = self.weight.shape
        return np.asarray(channels).reshape(groups, 1, outputs)


def layer(node: ir.Node, weight: Array, bias: Array | None) -> Layer | None:
    """The node with its folded weight and bias, or None if it is no Conv, Gemm or MatMul with a matrix on the right."""
    if node.op_type == "Conv":
        groups = int(node.attributes.get_int("group", 1) or 1)
        flat = weight.reshape(groups, weight.shape[0] // groups, -1).swapaxes(1, 2)
    elif node.op_type in {"Gemm", "MatMul"} and weight.ndim == 2:
        groups = 1
        flat = (weight.T if _transposed(node) else weight)[None]
    else:
        return None
    offset = None if bias is None else np.asarray(bias, np.float64).reshape(groups, -1)
    return Layer(node, flat.astype(np.float64), offset, weight.shape)


def _transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))


@dataclass(frozen=True)
class Rows:
    """Which rows of a layer to look at: of some samples, (n,) in order, flat output positions (n, per sample)."""

    samples: Array
    picks: Array


def choose(node: ir.Node, output: Array, rows: int, rng: np.random.Generator) -> Rows:
    """About `rows` rows, the same number from each sample; all of them if there are not more."""
    inner = output.shape[2:] if node.op_type == "Conv" else output.shape[1:-1]
    positions = int(np.prod(inner, dtype=np.int64))
    samples = np.arange(len(output))
    if len(samples) > rows:
        samples = np.sort(rng.choice(samples, rows, replace=False))
    each = min(positions, max(1, -(-rows // len(samples))))
    if each == positions:
        return Rows(samples, np.broadcast_to(np.arange(positions), (len(samples), positions)))
    # each sample takes its part of one order, from a place of its own on
    first = rng.integers(positions, size=(len(samples), 1))
    return Rows(samples, rng.permutation(positions)[(first + np.arange(each)) % positions])


def choose_input(layer: Layer, x: Array, rows: int, rng: np.random.Generator) -> Rows:
    """As `choose`, from what the layer reads; the same rows for the same state of `rng`."""
    if layer.node.op_type == "Conv":
        size = window(layer.node, layer.shape[2:], x.shape[2:]).out(x.shape[2:])
        return choose(layer.node, np.broadcast_to(np.float32(0), (len(x), 1, *size)), rows, rng)
    return choose(layer.node, x, rows, rng)


def inputs(layer: Layer, x: Array, rows: Rows) -> Array:
    """The chosen rows of x as (groups, rows, inputs), sample by sample; float32."""
    if layer.node.op_type == "Conv":
        return _patches(layer, x, rows)
    flat = x[rows.samples].reshape(len(rows.samples), -1, x.shape[-1])
    return np.take_along_axis(flat, rows.picks[:, :, None], axis=1).reshape(1, -1, x.shape[-1])


def outputs(layer: Layer, y: Array, rows: Rows) -> Array:
    """The chosen rows of the node's result as (groups, rows, outputs)."""
    groups, _, per = layer.weight.shape
    if layer.node.op_type == "Conv":
        maps = y[rows.samples].reshape(len(rows.samples), groups, per, -1)
        taken = np.take_along_axis(maps, rows.picks[:, None, None, :], axis=3)  # (n, g, m, r)
        return taken.transpose(1, 0, 3, 2).reshape(groups, -1, per)
    flat = y[rows.samples].reshape(len(rows.samples), -1, y.shape[-1])
    return np.take_along_axis(flat, rows.picks[:, :, None], axis=1).reshape(1, -1, per)


def _patches(layer: Layer, x: Array, rows: Rows) -> Array:
    groups = layer.weight.shape[0]
    kernel = layer.shape[2:]
    win: Window = window(layer.node, kernel, x.shape[2:])
    size = win.out(x.shape[2:])
    padded = pad_spatial(x, win.begins, win.ends)
    starts = np.unravel_index(rows.picks, size)  # per axis (n, r)
    n, r = rows.picks.shape
    each, taps = x.shape[1] // groups, math.prod(kernel)
    places = [
        [s * win.strides[a] + tap[a] * win.dilations[a] for a, s in enumerate(starts)] for tap in np.ndindex(*kernel)
    ]
    if groups > 1:  # a channel's taps lie side by side
        flat = np.stack([np.ravel_multi_index(at, padded.shape[2:]) for at in places], axis=-1).reshape(n, 1, r * taps)
        maps = padded.reshape(*padded.shape[:2], -1)
        taken = np.take_along_axis(maps if n == len(x) else maps[rows.samples], flat, axis=2)
        out = taken.reshape(n, groups, each, r, taps).transpose(1, 0, 3, 2, 4)
        return np.ascontiguousarray(out).reshape(groups, n * r, each * taps)
    out = np.empty((n, r, each, taps), x.dtype)
    for number, at in enumerate(places):
        out[..., number] = padded[(rows.samples[:, None], slice(None), *at)]
    return out.reshape(1, n * r, each * taps)
