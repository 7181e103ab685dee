"""Small repairs of the written graph: a RESHAPE of a RESHAPE is one, slices that make up a whole are a SPLIT."""

from __future__ import annotations

import numpy as np

from edgekit.backends.tflite.graph import Graph, Operator, Tensor
from edgekit.backends.tflite.rules import RULES

_MOST_PARTS = 4  # of a SPLIT that XNNPACK takes


def clean(graph: Graph) -> None:
    """In place; what no output needs is dropped."""
    maker = {t: o for o in graph.operators for t in o.outputs}
    outputs = {t for _, t in graph.outputs}
    same: dict[Tensor, Tensor] = {}
    for operator in graph.operators:
        operator.inputs[:] = [same.get(t, t) if t is not None else None for t in operator.inputs]
        if operator.code != "RESHAPE":
            continue
        source = _origin(operator.inputs[0], maker)
        operator.inputs[0] = source
        made = operator.outputs[0]
        if source.shape == made.shape and source.dynamic == made.dynamic and made not in outputs:
            same[made] = source
    _prune(graph)
    _keep_axes(graph, outputs)
    _split(graph)


def _keep_axes(graph: Graph, outputs: set[Tensor]) -> None:
    """A MEAN whose result is only given back its axes of size 1 keeps them."""
    readers: dict[Tensor, list[Operator]] = {}
    for operator in graph.operators:
        for tensor in operator.inputs:
            if tensor is not None:
                readers.setdefault(tensor, []).append(operator)
    dead: set[Operator] = set()
    for operator in graph.operators:
        made = operator.outputs[0]
        if (
            operator.code != "MEAN"
            or operator.options.get("keepDims")
            or made in outputs
            or len(readers.get(made, ())) != 1
        ):
            continue
        reshape, source = readers[made][0], operator.inputs[0]
        axes = operator.inputs[1]
        if reshape.code != "RESHAPE" or source is None or axes is None or axes.data is None:
            continue
        flat = {int(a) for a in axes.data.reshape(-1)}
        if reshape.outputs[0].shape != tuple(1 if k in flat else size for k, size in enumerate(source.shape)):
            continue
        operator.options = {**operator.options, "keepDims": True}
        operator.outputs[0] = reshape.outputs[0]
        dead.add(reshape)
    graph.operators[:] = [o for o in graph.operators if o not in dead]


def _split(graph: Graph) -> None:
    """Slices of an open batch that make up a tensor in equal parts: XNNPACK takes no size of "the rest"."""
    slices: dict[Tensor, list[Operator]] = {}
    for operator in graph.operators:
        source = operator.inputs[0]
        if operator.code == "SLICE" and source is not None and source.dynamic:
            slices.setdefault(source, []).append(operator)
    for source, operators in slices.items():
        axis = _parted(source, operators)
        if axis is None or source.kind not in RULES["SPLIT"].xnnpack:
            continue
        operators = sorted(operators, key=lambda o: _begin(o)[axis])
        place = min(graph.operators.index(o) for o in operators)
        where = Tensor(f"{source.name}/axis", np.dtype(np.int32), (), data=np.array(axis, np.int32))
        made = [o.outputs[0] for o in operators]
        whole = Operator("SPLIT", [where, source], made, {"numSplits": len(made)}, operators[0].source)
        graph.operators.insert(place, whole)
        graph.operators[:] = [o for o in graph.operators if o not in operators]


def _parted(source: Tensor, operators: list[Operator]) -> int | None:
    """The axis along which the slices are the equal parts of `source`, each once."""
    count, shape = len(operators), operators[0].outputs[0].shape
    if not 2 <= count <= _MOST_PARTS or any(o.outputs[0].shape != shape for o in operators):
        return None
    if any(t is None or t.data is None for o in operators for t in o.inputs[1:]):
        return None
    axes = [a for a, size in enumerate(source.shape) if size != shape[a]]
    if len(axes) != 1 or axes[0] in source.dynamic or source.shape[axes[0]] != count * shape[axes[0]]:
        return None
    axis = axes[0]
    begins = [_begin(o) for o in operators]
    if any(b for begin in begins for a, b in enumerate(begin) if a != axis):
        return None
    return axis if sorted(b[axis] for b in begins) == [i * shape[axis] for i in range(count)] else None


def _begin(operator: Operator) -> list[int]:
    begin = operator.inputs[1]
    assert begin is not None
    assert begin.data is not None
    return [int(b) for b in begin.data]


def _origin(tensor: Tensor | None, maker: dict[Tensor, Operator]) -> Tensor:
    assert tensor is not None
    while tensor in maker and maker[tensor].code == "RESHAPE" and maker[tensor].inputs[0] is not None:
        tensor = maker[tensor].inputs[0] or tensor
    return tensor


def _prune(graph: Graph) -> None:
    needed = {t for _, t in graph.outputs}
    kept = []
    for operator in reversed(graph.operators):
        if any(t in needed for t in operator.outputs):
            kept.append(operator)
            needed.update(t for t in operator.inputs if t is not None)
    graph.operators[:] = reversed(kept)
