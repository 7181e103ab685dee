"""Which channels of which tensors may be rescaled together without changing what the model computes.

Every channel of a value along one axis has a label; operators join labels that must be scaled by the same factor and
freeze those that may not be scaled. What is not understood freezes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G

Array = np.ndarray[Any, Any]

# f(k x) = k f(x) for k > 0, element by element
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "Identity", "Dropout", "Abs", "Neg"})
# the same within a channel, which for these is axis 1
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_GATES = frozenset({"Sigmoid", "HardSigmoid", "Softmax", "Tanh"})


@dataclass(frozen=True)
class End:
    """A node whose parameters take up a factor: of its outputs (producer) or of its inputs (consumer).

    labels: one per output, or per input, channel. value: the tensor that carries them, on `axis`.
    """

    node: ir.Node
    labels: Array
    value: ir.Value
    axis: int


@dataclass
class Channels:
    """Labels of a prepared model's values. `root` of two labels is equal if they must share a factor."""

    producers: list[End] = field(default_factory=list)
    consumers: list[End] = field(default_factory=list)
    offsets: list[tuple[End, int]] = field(default_factory=list)  # Add, Sub of a constant: (end, its input position)
    bounds: list[tuple[End, int]] = field(default_factory=list)  # Min, Max of a constant: (end, its input position)
    clips: list[End] = field(default_factory=list)  # a Clip with an upper bound other than infinity
    _parent: list[int] = field(default_factory=list)
    _frozen: set[int] = field(default_factory=set)
    _on: dict[str, tuple[int, Array]] = field(default_factory=dict)

    def ends(self) -> list[End]:
        """All values whose factors nodes take up."""
        return [*self.producers, *self.consumers, *(end for end, _ in (*self.offsets, *self.bounds))]

    # --- labels --------------------------------------------------------------------------------------
    def root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def roots(self, labels: Array) -> Array:
        return np.array([self.root(int(n)) for n in labels], np.int64)

    def free(self, labels: Array) -> Array:
        """bool: which of them may be scaled."""
        frozen = {self.root(n) for n in self._frozen}
        return np.array([self.root(int(n)) not in frozen for n in labels], bool)

    def fresh(self, count: int) -> Array:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def join(self, a: Array, b: Array) -> None:
        for left, right in zip(a, b, strict=True):
            self._parent[self.root(int(right))] = self.root(int(left))

    def hold(self, label: int) -> None:
        self._frozen.add(label)

    def count(self) -> int:
        return len(self._parent)

    def freeze(self, value: ir.Value | None) -> None:
        if value is not None and value.name in self._on:
            self._frozen.update(int(n) for n in self._on[value.name][1])

    def of(self, value: ir.Value | None, axis: int) -> Array | None:
        """Labels of the value if they run along this axis; otherwise what it has is frozen."""
        found = None if value is None else self._on.get(value.name or "")
        if found is not None and found[0] == axis:
            return found[1]
        self.freeze(value)
        return None

    def put(self, value: ir.Value, axis: int, labels: Array) -> None:
        self._on[value.name or ""] = (axis, labels)


def trace(model: ir.Model) -> Channels:
    """model: prepared (named nodes, inferred shapes)."""
    found = Channels()
    for node in model.graph:
        if any(isinstance(a, ir.Attr) and a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            for inner in ir.traversal.RecursiveGraphIterator(model.graph):
                if inner.graph is not model.graph:
                    for value in inner.inputs:
                        found.freeze(value)
        if not _step(found, node):
            for value in node.inputs:
                found.freeze(value)
    for value in model.graph.outputs:
        found.freeze(value)
    return found


def _step(found: Channels, node: ir.Node) -> bool:
    """Whether the node is understood; if not, the caller freezes all that it reads."""
    op = node.op_type
    if not G.is_op(node, op):
        return False  # of another domain: whatever its name says
    if op in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
        return _weighted(found, node) if G.array(node.inputs[1]) is not None else False
    if op == "LayerNormalization":
        return _normalization(found, node)
    if op == "Clip":
        return _clip(found, node)
    if op in {"Add", "Sub"}:
        return _sum(found, node)
    if op in {"Min", "Max"}:
        return len(node.inputs) == 2 and _offset(found, node, found.bounds)
    if op == "Mul":
        return _product(found, node)
    if op == "PRelu":
        return G.array(node.inputs[1]) is not None and _pass(found, node)
    if op == "Pad":
        return _pad(found, node)
    if op == "Resize":
        return _resize(found, node)
    if op in _POOLS:
        return _axis(found, node) in (None, 1) and _pass(found, node)
    if op == "Concat":
        return _concat(found, node)
    if op == "Transpose":
        return _transpose(found, node)
    if op in {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}:
        return _reshape(found, node)
    return op in _HOMOGENEOUS and _pass(found, node)


# --- ends -------------------------------------------------------------------------------------------
def _weighted(found: Channels, node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    weight = G.array(node.inputs[1])
    rank = None if x is None or x.shape is None else len(x.shape)
    if x is None or weight is None or rank is None or (weight.ndim != 2 and node.op_type in {"Gemm", "MatMul"}):
        return False
    if node.op_type == "Gemm" and (G.integer(node, "transA", 0) or G.number(node, "alpha", 1.0) != 1.0):
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and G.array(node.inputs[2]) is None:
        return False
    axis = 1 if node.op_type in {"Conv", "ConvTranspose"} else rank - 1
    if node.op_type == "ConvTranspose" and G.integer(node, "group", 1) != 1:
        return False
    inputs, outputs = input_channels(node, weight), output_channels(node, weight)
    labels = found.of(x, axis)
    if labels is not None and len(labels) != inputs:
        found.freeze(x)
    elif labels is not None:
        found.consumers.append(End(node, labels, x, axis))
    made = found.fresh(outputs)
    found.put(y, axis, made)
    found.producers.append(End(node, made, y, axis))
    return True


def input_channels(node: ir.Node, weight: Array) -> int:
    if node.op_type == "Conv":
        return int(weight.shape[1]) * G.integer(node, "group", 1)
    if node.op_type == "Gemm":
        return int(weight.shape[1 if G.integer(node, "transB", 0) else 0])
    return int(weight.shape[0])


def output_channels(node: ir.Node, weight: Array) -> int:
    if node.op_type == "Conv":
        return int(weight.shape[0])
    if node.op_type == "Gemm":
        return int(weight.shape[0 if G.integer(node, "transB", 0) else 1])
    return int(weight.shape[1])


def _normalization(found: Channels, node: ir.Node) -> bool:
    """Its scale and offset take up a factor; its input may have none, for the mean runs over the channels."""
    found.freeze(node.inputs[0])
    scale, value = G.array(node.inputs[1]), node.outputs[0]
    bias = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or scale.ndim != 1 or value.shape is None or any(o.uses() for o in node.outputs[1:]):
        return True
    if (len(node.inputs) > 2 and node.inputs[2] is not None and bias is None) or G.integer(node, "axis", -1) not in (
        -1,
        len(value.shape) - 1,
    ):
        return True
    labels = found.fresh(len(scale))
    found.put(value, len(value.shape) - 1, labels)
    found.producers.append(End(node, labels, value, len(value.shape) - 1))
    return True


# --- what passes factors on --------------------------------------------------------------------------
def _pass(found: Channels, node: ir.Node) -> bool:
    known = found._on.get(node.inputs[0].name or "") if node.inputs[0] is not None else None
    if known is not None:
        axis, labels = known
        shape = node.outputs[0].shape
        if shape is None or axis >= len(shape) or shape[axis] != len(labels):
            return False
        found.put(node.outputs[0], axis, labels)
    return True


def _axis(found: Channels, node: ir.Node) -> int | None:
    """The axis of the first input's labels, if it has any."""
    known = found._on.get(node.inputs[0].name or "") if node.inputs[0] is not None else None
    return None if known is None else known[0]


def _pad(found: Channels, node: ir.Node) -> bool:
    """With zeros, and not along the labels: one more at the front and one less at the end shifts them."""
    given = [G.array(node.inputs[i]) if len(node.inputs) > i else None for i in range(4)]
    if any(len(node.inputs) > i and node.inputs[i] is not None and given[i] is None for i in (1, 2, 3)):
        return False
    pads, fill, axes = given[1:]
    at, shape = _axis(found, node), node.outputs[0].shape
    if at is None or pads is None or shape is None or (fill is not None and np.any(fill)):
        return at is None
    padded = [int(a) % len(shape) for a in axes] if axes is not None else list(range(len(shape)))
    along = padded.index(at) if at in padded else None
    moved = along is not None and bool(np.any(pads.reshape(2, -1)[:, along]))
    return not moved and _pass(found, node)


def _resize(found: Channels, node: ir.Node) -> bool:
    """Weighted sums within a channel, unless it resizes along the labels or has a value of its own for the outside."""
    if G.text(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return False
    scales, at = G.array(node.inputs[2]) if len(node.inputs) > 2 else None, _axis(found, node)
    axes = G.integers(node, "axes")
    if at is not None and scales is not None and scales.size:
        rank = len(node.outputs[0].shape or ())
        resized = [a % rank for a in axes] if axes is not None and rank else list(range(scales.size))
        if at in resized and float(scales[resized.index(at)]) != 1.0:
            return False
    return _pass(found, node)


def _clip(found: Channels, node: ir.Node) -> bool:
    bounds = [G.array(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2)]
    if any(len(node.inputs) > i and node.inputs[i] is not None and bounds[i - 1] is None for i in (1, 2)):
        return False
    if bounds[0] is None or float(bounds[0].reshape(-1)[0]) != 0.0 or not _pass(found, node):
        return False
    known = found._on.get(node.outputs[0].name or "")
    if known is not None and bounds[1] is not None and np.isfinite(bounds[1]).all():
        found.clips.append(End(node, known[1], node.outputs[0], known[0]))
    return True


def _sum(found: Channels, node: ir.Node) -> bool:
    if any(G.array(v) is not None for v in node.inputs):
        return _offset(found, node, found.offsets)
    a, b = (found._on.get(v.name or "") if v is not None else None for v in node.inputs)
    if a is None or b is None:
        return False
    shapes = [v.shape for v in node.inputs if v is not None]
    if a[0] != b[0] or len(a[1]) != len(b[1]) or len({len(s) if s is not None else -1 for s in shapes}) != 1:
        return False
    found.join(a[1], b[1])
    found.put(node.outputs[0], a[0], a[1])
    return True


def _offset(found: Channels, node: ir.Node, kept: list[tuple[End, int]]) -> bool:
    """An operator of a value and a constant that must take the value's factors."""
    constants = [i for i, v in enumerate(node.inputs) if G.array(v) is not None]
    if len(constants) != 1:
        return False
    at = constants[0]
    value = node.inputs[1 - at]
    known = found._on.get(value.name or "") if value is not None else None
    if known is None:
        return True
    axis, labels = known
    constant, shape = G.array(node.inputs[at]), node.outputs[0].shape
    if constant is None or shape is None or not _per_channel(constant, len(shape), axis, len(labels)):
        return False
    if not _pass_from(found, node, 1 - at):
        return False
    kept.append((End(node, labels, node.outputs[0], axis), at))
    return True


def _per_channel(constant: Array, rank: int, axis: int, channels: int) -> bool:
    """Whether a constant has a value of its own for each channel, whatever else it varies along."""
    sizes = (1,) * (rank - constant.ndim) + constant.shape
    return constant.ndim <= rank and sizes[axis] == channels


def _pass_from(found: Channels, node: ir.Node, position: int) -> bool:
    value, out = node.inputs[position], node.outputs[0]
    known = found._on.get(value.name or "") if value is not None else None
    if value is None or known is None or value.shape is None or out.shape is None:
        return False
    if len(value.shape) != len(out.shape) or out.shape[known[0]] != len(known[1]):
        return False
    found.put(out, *known)
    return True


def _product(found: Channels, node: ir.Node) -> bool:
    """One operand carries the factor; the other is a constant or a gate, which may carry none."""
    constants = [i for i, v in enumerate(node.inputs) if G.array(v) is not None]
    if constants:
        return len(constants) == 1 and (
            (v := node.inputs[1 - constants[0]]) is None
            or v.name not in found._on
            or _pass_from(found, node, 1 - constants[0])
        )
    gates = [i for i, v in enumerate(node.inputs) if v is not None and _is_gate(v)]
    if len(gates) != 1:
        return False
    found.freeze(node.inputs[gates[0]])
    carrier = node.inputs[1 - gates[0]]
    if carrier is None or carrier.name not in found._on:
        return True
    return _pass_from(found, node, 1 - gates[0])


def _is_gate(value: ir.Value) -> bool:
    producer = value.producer()
    while producer is not None and producer.op_type in {"Reshape", "Unsqueeze", "Transpose", "Squeeze", "Identity"}:
        source = producer.inputs[0]
        producer = source.producer() if source is not None else None
    return producer is not None and producer.op_type in _GATES


def _concat(found: Channels, node: ir.Node) -> bool:
    known = [found._on.get(v.name or "") if v is not None else None for v in node.inputs]
    rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
    if rank is None or any(k is None for k in known):
        return False
    axis = G.integer(node, "axis", 0) % rank
    carried = [k for k in known if k is not None]
    if len({k[0] for k in carried}) != 1:
        return False
    if carried[0][0] == axis:
        found.put(node.outputs[0], axis, np.concatenate([k[1] for k in carried]))
        return True
    for other in carried[1:]:
        if len(other[1]) != len(carried[0][1]):
            return False
        found.join(carried[0][1], other[1])
    found.put(node.outputs[0], *carried[0])
    return True


def _transpose(found: Channels, node: ir.Node) -> bool:
    known = found._on.get(node.inputs[0].name or "") if node.inputs[0] is not None else None
    if known is None:
        return True
    order = G.integers(node, "perm")
    if order is None:
        return False
    found.put(node.outputs[0], order.index(known[0]), known[1])
    return True


def _reshape(found: Channels, node: ir.Node) -> bool:
    """The channel axis may stay, or be merged with the axes behind it (each channel then many features)."""
    source, target = node.inputs[0], node.outputs[0]
    known = found._on.get(source.name or "") if source is not None else None
    if known is None:
        return True
    before, after = G.dims(source), G.dims(target)
    if before is None or after is None:
        return False
    axis, labels = known
    behind, inner = _count(before[axis + 1 :]), 1
    if behind is None:
        return False
    for at in range(len(after) - 1, -1, -1):
        size = after[at]
        if inner == behind and size == len(labels):
            found.put(target, at, labels)
            return True
        if inner == 1 and size == len(labels) * behind:
            found.put(target, at, np.repeat(labels, behind))
            return True
        if not isinstance(size, int):
            return False
        inner *= size
    return False


def _count(sizes: Sequence[int | str]) -> int | None:
    return (
        int(np.prod([s for s in sizes if isinstance(s, int)], dtype=np.int64))
        if all(isinstance(s, int) for s in sizes)
        else None
    )
