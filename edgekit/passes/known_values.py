"""Which elements of a model's values are the same number whatever its inputs are, and which number.

Every operator is run on what is known and once more on what is unknown, both as arrays of one sample: an element of a
result is known where nothing unknown has a part in it. A product with a known 0 is 0, as all values are taken to be
finite. Operators without a rule here have unknown results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import ModelProto, helper

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes.coupling_trace import BROADCAST, UNARY

Array = np.ndarray[Any, Any]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
# what only moves elements, or sums with factors that are never below 0: a result is unknown where a part of it is
MIXED = frozenset(
    {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Expand", "Tile"}
    | {"DepthToSpace", "SpaceToDepth", "Pad", "Resize", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
    | {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
)
AVERAGED = frozenset(n for n in MIXED if "Pool" in n or n.startswith("Reduce")) | {"Resize"}
ELEMENTWISE = frozenset(UNARY.split()) | frozenset(BROADCAST.split())
# gates of a recurrent layer that turn 0 into 0: position of those among its activations, and how many it has
_ODD = {"LSTM": ((1, 2), 3), "GRU": ((1,), 2), "RNN": ((0,), 1)}


@dataclass(frozen=True)
class Known:
    """A value at one sample. unknown: bool, of its shape; what is unknown is 0 in `value`."""

    value: Array
    unknown: Array

    @property
    def zero(self) -> Array:
        known: Array = ~self.unknown & (self.value == 0)
        return known


def known_values(model: ir.Model) -> dict[str, Known]:
    """name -> what is known, for the values of the main graph of which something is; batch 1 where it is symbolic."""
    if M.batch_of(M.signature(model)) is None:
        model = M.with_batch(model, 1)
    found: dict[str, Known] = {}
    for node in model.graph:
        rule = _rule(node)
        if rule is None:
            continue
        inputs = [_known(v, found) for v in node.inputs]
        if not _says_something(node, found) or any(
            known is None for known, value in zip(inputs, node.inputs, strict=True) if value is not None
        ):
            continue
        for value, known in zip(node.outputs, rule(node, inputs), strict=False):
            unknown = known.unknown | ~np.isfinite(known.value)
            if value.name and not unknown.all():
                found[value.name] = Known(np.where(unknown, np.zeros((), known.value.dtype), known.value), unknown)
    return found


def _known(value: ir.Value | None, found: dict[str, Known]) -> Known | None:
    """What is known of an input, perhaps nothing; None for no input, or one of unknown size or of no numbers."""
    if value is None:
        return None
    array = G.array(value)
    if array is not None:
        return Known(array, np.zeros(array.shape, bool))
    if value.name in found:
        return found[value.name]
    sizes = G.dims(value)
    if sizes is None or value.dtype is None or not all(isinstance(d, int) for d in sizes):
        return None
    try:
        kind = np.dtype(value.dtype.numpy())
    except TypeError:
        return None
    shape = [int(d) for d in sizes]
    return Known(np.zeros(shape, kind), np.ones(shape, bool)) if kind.kind in "fiub" else None


def _says_something(node: ir.Node, found: dict[str, Known]) -> bool:
    """Whether a result can be known: an input is in part, or a constant has zeros that make it so."""
    if any(v is not None and v.name in found for v in node.inputs):
        return True
    if node.op_type in (*WEIGHTED, *_ODD, "MatMul", "Mul", "BatchNormalization"):
        return any((a := G.array(v)) is not None and not a.all() for v in node.inputs[:3])
    return False


Rule = Callable[[ir.Node, list[Known | None]], list[Known]]


def _rule(node: ir.Node) -> Rule | None:
    kind = node.op_type
    if not G.is_op(node, kind):
        return None
    if kind in WEIGHTED:
        return _weighted
    if kind == "MatMul":
        return _product
    if kind in ELEMENTWISE:
        return None if kind == "Dropout" and len(node.inputs) > 2 else _elementwise
    if kind in MIXED:
        return None if kind == "Resize" and G.text(node, "mode", "nearest") == "cubic" else _mixed
    if kind == "BatchNormalization":
        return None if G.integer(node, "training_mode", 0) else _batch_norm
    return _recurrent if kind in _ODD and not G.integer(node, "layout", 0) else None


# --- rules: what is known of the inputs -> of the outputs --------------------------------------------
def _weighted(node: ir.Node, inputs: list[Known | None]) -> list[Known]:
    x, weight, *bias = inputs
    if x is None or weight is None or any(b is not None and b.unknown.any() for b in (weight, *bias)):
        return []
    value = run(node, [x.value, weight.value, *map(_value, bias)])[0]
    reads = (weight.value != 0).astype(x.value.dtype)
    return [Known(value, run(node, [x.unknown.astype(x.value.dtype), reads])[0] != 0)]


def _product(node: ir.Node, inputs: list[Known | None]) -> list[Known]:
    a, b = inputs
    if a is None or b is None:
        return []
    kind = a.value.dtype
    unknown = [
        run(node, [left.astype(kind), right.astype(kind)])[0]
        for left, right in ((a.unknown, ~b.zero), (~a.zero, b.unknown))
    ]
    return [Known(run(node, [a.value, b.value])[0], (unknown[0] + unknown[1]) != 0)]


def _elementwise(node: ir.Node, inputs: list[Known | None]) -> list[Known]:
    given = [k for k in inputs if k is not None]
    value = run(node, [_value(k) for k in inputs])[0]
    unknown = np.broadcast_to(_any([k.unknown for k in given]), value.shape)
    if node.op_type == "Mul":
        unknown = unknown & ~np.broadcast_to(_any([k.zero for k in given]), value.shape)
    return [Known(value, unknown)]


def _value(known: Known | None) -> Array | None:
    return None if known is None else known.value


def _any(arrays: Sequence[Array]) -> Array:
    out = arrays[0]
    for array in arrays[1:]:
        out = out | array
    return out


def _mixed(node: ir.Node, inputs: list[Known | None]) -> list[Known]:
    data = len(inputs) if node.op_type == "Concat" else 1
    if inputs[0] is None or any(k is not None and k.unknown.any() for k in inputs[data:]):
        return []
    if inputs[0].value.dtype.kind != "f" and node.op_type in AVERAGED:
        return []  # the mean of a few marks, as an integer, is 0
    values = run(node, [_value(k) for k in inputs])
    marks = [k.unknown.astype(k.value.dtype) if k is not None and i < data else _value(k) for i, k in enumerate(inputs)]
    if node.op_type == "Pad" and len(marks) > 2:
        marks[2] = None  # what is padded is known
    return [Known(v, u != 0) for v, u in zip(values, run(node, marks), strict=True)]


def _batch_norm(node: ir.Node, inputs: list[Known | None]) -> list[Known]:
    x, *parameters = inputs
    if x is None or any(p is None or p.unknown.any() for p in parameters):
        return []
    value = run(node, [_value(k) for k in inputs])[0]
    scale = parameters[0].value if parameters[0] is not None else np.ones(1)
    return [Known(value, x.unknown & (scale != 0).reshape(-1, *[1] * (value.ndim - 2)))]


def _recurrent(node: ir.Node, inputs: list[Known | None]) -> list[Known]:
    """A hidden unit is 0 throughout if all of its weights and biases are, and its activations keep 0."""
    x, *given = [*inputs, *[None] * 8][:8]
    places, count = _ODD[node.op_type]
    named = node.attributes.get("activations")
    kinds = [] if named is None else list(named.as_strings())
    odd = all(k in ("Tanh", "Relu") for i, k in enumerate(kinds) if i % count in places)
    if x is None or given[0] is None or given[1] is None or not odd:
        return []
    if any(k.unknown.any() for k in given if k is not None) or any(k and k.value.any() for k in given[4:6]):
        return []
    ways, rows, _ = given[0].value.shape
    hidden = given[1].value.shape[2]
    arrays = [k.value.reshape(ways, -1, rows // hidden, hidden, k.value.shape[-1] if i < 2 else 1)
              for i, k in enumerate(given[:3]) if k is not None]  # fmt: skip
    unknown = _any([(a != 0).any(axis=(1, 2, 4)) for a in arrays])  # (ways, hidden)
    steps, batch = x.value.shape[:2]
    shapes = [(steps, ways, batch, hidden), (ways, batch, hidden), (ways, batch, hidden)][: len(node.outputs)]
    marks = [np.broadcast_to(unknown[:, None], s) for s in shapes]
    return [Known(np.zeros(s, x.value.dtype), m) for s, m in zip(shapes, marks, strict=True)]


# --- running ------------------------------------------------------------------------------------------
def run(node: ir.Node, arrays: Sequence[Array | None]) -> list[Array]:
    """One node on these inputs, by ONNX Runtime."""
    proto = ir.to_proto(node)
    names = [f"i{n}" if a is not None else "" for n, a in enumerate(arrays)]
    outputs = [f"o{n}" for n in range(len(node.outputs))]
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(outputs)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in zip(names, arrays, strict=True)
        if a is not None
    ]
    graph = helper.make_graph([proto], "node", infos, [helper.make_empty_tensor_value_info(o) for o in outputs])
    version = G.graph_of(node).opset_imports[""]
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)
    session = M.FloatSession(M.from_proto(model), optimize=False, threads=1)
    results = session.run({n: a for n, a in zip(names, arrays, strict=True) if a is not None})
    return [results[o] for o in outputs]
