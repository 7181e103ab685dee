"""Broadcasts over many axes written over few: older runtimes abort on them (tflite-runtime 2.14: MUL over five)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from edgekit.backends.tflite.graph import Graph, Operator, Tensor
from edgekit.backends.tflite.rules import RULES

# axes that kernels of tflite-runtime 2.14 broadcast over; its other broadcasting operators take 4
_MOST: Mapping[str, int] = {"ADD": 6, "SUB": 5, "DIV": 5, "MAXIMUM": 5, "MINIMUM": 5}
_DEFAULT = 4
_BROADCASTING = frozenset(
    {"ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "POW", "SQUARED_DIFFERENCE", "FLOOR_DIV", "FLOOR_MOD", "EQUAL"}
    | {"NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL", "LOGICAL_AND", "LOGICAL_OR", "SELECT_V2", "ATAN2"}
)


def narrow(graph: Graph) -> None:
    """Neighbouring axes that broadcast alike become one; what is still too many is spread by BROADCAST_TO before."""
    graph.operators = [made for operator in graph.operators for made in _narrowed(operator)]


def _narrowed(operator: Operator) -> list[Operator]:
    out = operator.outputs[0]
    operands = [t for t in operator.inputs if t is not None]
    rank, most = len(out.shape), _MOST.get(operator.code, _DEFAULT)
    alike = all(t.shape == out.shape and t.dynamic == out.dynamic for t in operands)
    if operator.code not in _BROADCASTING or rank <= most or alike:
        return [operator]
    groups = _groups(operands, out)
    if len(groups) <= most:
        return _merged(operator, operands, groups)
    if any(t.dynamic for t in (*operands, out)) or any(t.kind not in RULES["BROADCAST_TO"].versions for t in operands):
        return [operator]
    return _spread(operator, operands)


def _repeats(tensor: Tensor, axis: int, rank: int) -> bool:
    """Whether the tensor is repeated along the result's axis."""
    own = axis - (rank - len(tensor.shape))
    return own < 0 or (tensor.shape[own] == 1 and own not in tensor.dynamic)


def _groups(operands: Sequence[Tensor], out: Tensor) -> list[list[int]]:
    """The result's axes, in runs along which every operand is either repeated or not."""
    rank = len(out.shape)
    groups: list[list[int]] = []
    kind: tuple[bool, ...] | None = None
    for axis in range(rank):
        own = tuple(_repeats(t, axis, rank) for t in operands)
        if groups and (all(own) or kind is None or own == kind):  # an axis of size 1 joins any run
            groups[-1].append(axis)
        else:
            groups.append([axis])
        kind = kind if all(own) else own
    return groups


def _merged(operator: Operator, operands: Sequence[Tensor], groups: list[list[int]]) -> list[Operator]:
    out = operator.outputs[0]
    before: list[Operator] = []
    inputs = [_reshaped(t, groups, len(out.shape), operator.source, before) for t in operands]
    shape, grown = _sizes(out, groups, len(out.shape))
    small = Tensor(f"{out.name}/merged", out.dtype, shape, grown, out.quant)
    made = Operator(operator.code, list(inputs), [small], operator.options, operator.source)
    return [*before, made, _reshape(small, out, operator.source)]


def _sizes(tensor: Tensor, groups: list[list[int]], rank: int) -> tuple[tuple[int, ...], frozenset[int]]:
    lead = rank - len(tensor.shape)
    own = [[axis - lead for axis in group if axis >= lead] for group in groups]
    shape = tuple(prod(tensor.shape[a] for a in group) for group in own)
    return shape, frozenset(i for i, group in enumerate(own) if any(a in tensor.dynamic for a in group))


def _reshaped(tensor: Tensor, groups: list[list[int]], rank: int, source: str, before: list[Operator]) -> Tensor:
    shape, grown = _sizes(tensor, groups, rank)
    data = None if tensor.data is None else tensor.data.reshape(shape)
    made = Tensor(f"{tensor.name}/merged", tensor.dtype, shape, grown, tensor.quant, data)
    if data is None:
        before.append(_reshape(tensor, made, source))
    return made


def _reshape(tensor: Tensor, made: Tensor, source: str) -> Operator:
    sizes = [-1 if a in made.dynamic else size for a, size in enumerate(made.shape)]
    wanted = Tensor(f"{made.name}/shape", np.dtype(np.int32), (len(sizes),), data=np.array(sizes, np.int32))
    return Operator("RESHAPE", [tensor, wanted], [made], {"newShape": sizes}, source)


def _spread(operator: Operator, operands: Sequence[Tensor]) -> list[Operator]:
    out = operator.outputs[0]
    before: list[Operator] = []
    inputs: list[Tensor | None] = []
    for tensor in operands:
        if tensor.shape == out.shape:
            inputs.append(tensor)
        elif tensor.data is not None:
            data = np.ascontiguousarray(np.broadcast_to(tensor.data, out.shape))
            inputs.append(Tensor(f"{tensor.name}/spread", tensor.dtype, out.shape, quant=tensor.quant, data=data))
        else:
            made = Tensor(f"{tensor.name}/spread", tensor.dtype, out.shape, quant=tensor.quant)
            sizes = np.array(out.shape, np.int32)
            wanted = Tensor(f"{made.name}/shape", sizes.dtype, sizes.shape, data=sizes)
            before.append(Operator("BROADCAST_TO", [tensor, wanted], [made], {}, operator.source))
            inputs.append(made)
    return [*before, Operator(operator.code, inputs, [out], operator.options, operator.source)]
