"""Small repairs of the written graph: a RESHAPE of a RESHAPE is one, and one that changes nothing is none."""

from __future__ import annotations

from edgekit.backends.tflite.graph import Graph, Operator, Tensor


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
