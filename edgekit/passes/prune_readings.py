"""Layers as regressions: rows of what they read, weights, results; Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU, RNN.

A transposed convolution is a convolution of its input with zeros between the positions. A recurrent layer is what its
gates get before their activations, at each step, from the step's input and the state before it (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes import regression as L
from edgekit.passes.coupling import Coupling, Site
from edgekit.passes.coupling_layers import GATES

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Reading:
    """first: of each of the node's inputs that hold these weights, by position, the first feature that they are for."""

    node: ir.Node
    layer: L.Layer
    first: Mapping[int, int]

    @property
    def key(self) -> str:
        return f"{self.node.name}:{min(self.first)}"

    @property
    def recurrent(self) -> bool:
        return self.node.op_type in GATES

    def sites(self, coupling: Coupling) -> list[Site]:
        """Where its weights read channels."""
        return [s for s in coupling.sites if s.node == self.node.name and s.role == "in" and s.position in self.first]

    def places(self, site: Site) -> Array:
        """(labels, taps): the features of each of the site's labels."""
        size = self.layer.weight.shape[1] if not self.recurrent else len(site.labels)
        taps = size // len(site.labels)
        return np.asarray(self.first[site.position] + np.arange(len(site.labels) * taps).reshape(-1, taps))

    def kept(self, coupling: Coupling, keep: Array) -> tuple[Array, Array]:
        """bool per feature, bool per output (groups, outputs): those that are left."""
        groups, features, outputs = self.layer.weight.shape
        rows, columns = np.ones(features, bool), np.ones((groups, outputs), bool)
        for site in self.sites(coupling):
            rows[self.places(site)] = keep[site.labels][:, None]
        for site in coupling.sites:
            if site.node == self.node.name and site.role == "out" and site.position in self.first:
                columns[:] = keep[site.labels].reshape(-1, outputs)
        return rows, columns

    def inputs(self, x: Array, rows: int, rng: np.random.Generator) -> Array:
        """About `rows` rows of what the node reads, (groups, rows, features) float32."""
        if self.recurrent:
            return some(features(self, x), rows, rng)
        x = stretched(self.node, x)
        return L.inputs(self.layer, x, L.choose_input(self.layer, x, rows, rng))

    def pairs(self, x: Array, y: Array, rows: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """The same of inputs and of what the node is to give; not for recurrent ones."""
        x = stretched(self.node, x)
        chosen = L.choose(self.layer.node, y, rows, rng)
        return L.inputs(self.layer, x, chosen), L.outputs(self.layer, y, chosen)

    def write(self, weight: Array, shift: Array) -> None:
        """Give the node these weights (groups, features, outputs), and its bias a shift (groups, outputs)."""
        node, name = self.node, self.node.name
        if self.recurrent:
            for position, first in self.first.items():
                array = _constant(node, position)
                part = weight[:, first : first + array.shape[2]].swapaxes(1, 2)
                G.set_constant(node, position, f"{name}/{position}", part.astype(np.float32))
            _shift_gates(node, shift, second=1 not in self.first)
            return
        G.set_constant(node, 1, f"{name}/weight", _restored(self, weight).astype(np.float32))
        bias = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            shape = bias.shape if bias.size == shift.size else (shift.size,)
            moved = (bias.reshape(-1) + shift.reshape(-1)).reshape(shape)
            G.set_constant(node, 2, f"{name}/bias", moved.astype(np.float32))


def readings(node: ir.Node) -> list[Reading]:
    """Of a node with constant weights; empty for other operators."""
    weight = G.array(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None or not G.is_op(node, node.op_type):
        return []
    if node.op_type in GATES:
        return _gates(node, weight)
    bias = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if node.op_type == "ConvTranspose":
        return _transposed(node, weight, bias)
    layer = L.layer(node, weight, bias)
    return [] if layer is None else [Reading(node, layer, {1: 0})]


# --- transposed convolutions ------------------------------------------------------------------------
def _transposed(node: ir.Node, weight: Array, bias: Array | None) -> list[Reading]:
    rank = weight.ndim - 2
    if G.integer(node, "group", 1) != 1 or G.integers(node, "output_shape"):
        return []
    if G.text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return []
    dilations = G.integers(node, "dilations") or (1,) * rank
    pads = G.integers(node, "pads") or (0,) * (2 * rank)
    more = G.integers(node, "output_padding") or (0,) * rank
    reach = [(k - 1) * d for k, d in zip(weight.shape[2:], dilations, strict=True)]
    begins = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
    ends = [r - p + m for r, p, m in zip(reach, pads[rank:], more, strict=True)]
    if min(begins + ends) < 0:
        return []
    twin = ir.node("Conv", [None, None], {"pads": [*begins, *ends], "dilations": list(dilations)}, name=node.name)
    layer = L.layer(twin, _turned(weight), bias)
    return [] if layer is None else [Reading(node, layer, {1: 0})]


def _turned(weight: Array) -> Array:
    """Weights of the convolution for those of the transposed one, and back."""
    return np.flip(weight, tuple(range(2, weight.ndim))).swapaxes(0, 1)


def _restored(reading: Reading, weight: Array) -> Array:
    restored = reading.layer.restored(weight)
    return _turned(restored) if reading.node.op_type == "ConvTranspose" else restored


def stretched(node: ir.Node, x: Array) -> Array:
    """What a transposed convolution's twin reads: zeros between the positions. Other nodes' inputs as they are."""
    strides = G.integers(node, "strides") if node.op_type == "ConvTranspose" else None
    if strides is None or max(strides) == 1:
        return x
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    out = np.zeros((*x.shape[:2], *size), x.dtype)
    out[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return out


# --- recurrent layers -------------------------------------------------------------------------------
def _gates(node: ir.Node, w: Array) -> list[Reading]:
    """One regression on inputs and states together; of a GRU two, for its reset gate stands between them."""
    r, b = _constant(node, 2), G.array(node.inputs[3]) if len(node.inputs) > 3 else None
    directions, rows, width = w.shape
    own, other = (np.zeros((directions, rows)),) * 2 if b is None else np.split(b, 2, axis=1)
    columns, states = w.swapaxes(1, 2).astype(np.float64), r.swapaxes(1, 2).astype(np.float64)
    if node.op_type == "GRU":
        return [
            Reading(node, L.Layer(node, columns, own, w.shape), {1: 0}),
            Reading(node, L.Layer(node, states, other, r.shape), {2: 0}),
        ]
    both = np.concatenate([columns, states], axis=1)
    return [Reading(node, L.Layer(node, both, own + other, w.shape), {1: 0, 2: width})]


def features(reading: Reading, x: Array, before: Array | None = None) -> Array:
    """Of a recurrent node over inputs x (steps, batch, n): (directions, steps × batch, features).

    before: states before each step (steps, directions, batch, hidden); the node's own without it.
    """
    node = reading.node
    directions = reading.layer.weight.shape[0]
    parts = []
    if 1 in reading.first:
        parts.append(np.broadcast_to(x.reshape(1, -1, x.shape[-1]), (directions, x.shape[0] * x.shape[1], x.shape[2])))
    if 2 in reading.first:
        h = states(node, x) if before is None else before
        parts.append(h.swapaxes(0, 1).reshape(directions, -1, h.shape[-1]))
    return np.concatenate(parts, axis=2).astype(np.float32)


def states(node: ir.Node, x: Array) -> Array:
    """The state before each step, (steps, directions, batch, hidden) float32."""
    import onnxruntime as ort

    h = onnx.helper
    proto = ir.to_proto(node)
    constants = {v.name or "": c for v in node.inputs[1:] if v is not None and (c := M.constant(v)) is not None}
    del proto.output[:]
    proto.output.append("states")
    graph = h.make_graph(
        [proto], "states", [h.make_tensor_value_info(proto.input[0], onnx.TensorProto.FLOAT, list(x.shape))],
        [h.make_tensor_value_info("states", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(v, order="C"), k) for k, v in constants.items()],
    )  # fmt: skip
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", M.MIN_OPSET)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    after = session.run(None, {proto.input[0]: x})[0]
    start = G.array(node.inputs[5]) if len(node.inputs) > 5 else None
    first = np.zeros_like(after[0]) if start is None else np.broadcast_to(start, after[0].shape).astype(np.float32)
    before = np.concatenate([first[None], after[:-1]])
    if G.text(node, "direction", "forward") != "forward":  # the last direction goes from the end
        before[:, -1] = np.concatenate([after[1:, -1], first[None, -1]])
    return np.asarray(before)


def _shift_gates(node: ir.Node, shift: Array, second: bool) -> None:
    """Add to the first half of the bias, or to the second, which a GRU's reset gate acts on."""
    bias = G.array(node.inputs[3]) if len(node.inputs) > 3 else None
    directions, rows = shift.shape
    moved = np.zeros((directions, 2 * rows)) if bias is None else bias.astype(np.float64)
    moved[:, rows * second : rows * (second + 1)] += shift
    G.set_constant(node, 3, f"{node.name}/3", moved.astype(np.float32))


def some(rows: Array, count: int, rng: np.random.Generator) -> Array:
    """About `count` of the rows of (groups, rows, n)."""
    if rows.shape[1] <= count:
        return rows
    return np.asarray(rows[:, np.sort(rng.choice(rows.shape[1], count, replace=False))])


def _constant(node: ir.Node, position: int) -> Array:
    array = G.array(node.inputs[position])
    if array is None:
        raise TypeError(f"input {position} of '{node.name}' is computed")
    return array


def of_nodes(model: ir.Model, names: Sequence[str]) -> list[Reading]:
    wanted = set(names)
    return [r for node in model.graph if node.name in wanted for r in readings(node)]
