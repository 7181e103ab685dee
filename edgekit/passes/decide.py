"""Decides which nodes of a float model compute on integers, which values get a scale, and which must share one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes.plan import Activation, Bits, fixed
from edgekit.scheme import BINARY, EQUAL_SCALES, JOINS, WEIGHTED, Scheme, integer

MOVES = EQUAL_SCALES
# moves that are worth doing on int8 when only what follows is quantized: they do not shrink the tensor
LEADING = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Pad", "DepthToSpace", "SpaceToDepth"})
# LiteRT fuses Relu and Relu6 into these
FUSING = WEIGHTED | BINARY
# the bounds that it fuses; in 8 bits any others become the ends of the quantized range, which in 16 is symmetric
FUSED_BOUNDS = frozenset({(0.0, np.inf), (0.0, 6.0), (-1.0, 1.0)})
# A constant beyond this is a mask ("minus infinity"), not a number to be multiplied: quantizing it wipes out the rest.
HUGE = 1e30
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Decision:
    """quantized, fused, float_nodes, groups: as in QuantizationPlan; fused maps a node to its producer.

    activations: computed values (and graph inputs) that get a scale. constants: constant operands that do.
    fixed: values whose parameters the scheme dictates. outputs: values that reach a graph output unscaled, of an FPGA
    also those that are left to the host.
    """

    quantized: tuple[str, ...]
    fused: dict[str, str]
    float_nodes: dict[str, str]
    activations: tuple[str, ...]
    constants: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    fixed: dict[str, Activation]
    outputs: frozenset[str] = field(default_factory=frozenset)


def decide(
    model: ir.Model,
    forced: Mapping[str, str],
    bits: Bits = 8,
    *,
    integer_softmax: bool = False,
    scheme: Scheme = "litert",
) -> Decision:
    """model: prepared (named nodes, inferred types). forced: node -> reason, for nodes that must stay float.

    bits: of activations. integer_softmax: whether a Softmax inside the model is to run on integers, whose kernels give
    steps of 1/256 only; computed in float, the weights of an attention over many tokens keep finer ones.
    """
    reasons = dict(forced)
    while True:
        decision, conflicts = _decide(model, reasons, bits, integer_softmax, scheme)
        if not conflicts:
            return decision
        reasons.update(conflicts)


def _decide(
    model: ir.Model, forced: Mapping[str, str], bits: Bits, integer_softmax: bool, scheme: Scheme
) -> tuple[Decision, dict[str, str]]:
    graph = model.graph
    float_nodes: dict[str, str] = {}
    chosen: dict[str, ir.Node] = {}
    for node in graph:
        if node.op_type in {"Constant", "Identity"}:
            continue
        name = node.name or ""
        reason = forced.get(name) or refusal(node, bits, scheme)
        if reason:
            float_nodes[name] = reason
        else:
            chosen[name] = node
    fused = {
        name: producer.name or ""
        for name, node in chosen.items()
        if (producer := _fusable(node, bits)) is not None and producer.name in chosen
    }
    for name in _trim(chosen, fused):
        float_nodes[name] = "no integer neighbour: rounding it would only add error"
        chosen.pop(name)
    fused = {name: producer for name, producer in fused.items() if producer in chosen}
    activations, constants = _values(chosen, fused)
    groups = _groups(chosen, fused)
    free = frozenset() if integer_softmax or bits == 16 else _inner_softmax(chosen)
    pinned, conflicts = _pins(chosen, fused, groups, activations, bits, free)
    order = [n.name or "" for n in graph]
    decision = Decision(
        quantized=tuple(n for n in order if n in chosen),
        fused=fused,
        float_nodes={n: float_nodes[n] for n in order if n in float_nodes},
        activations=tuple(activations),
        constants=tuple(constants),
        groups=tuple(tuple(g) for g in groups),
        fixed=pinned,
        outputs=_reach_output(graph, groups, _left(chosen, activations, graph) if scheme == "fpga" else set()),
    )
    return decision, conflicts


def data_inputs(node: ir.Node) -> list[int]:
    """Positions of the inputs that are activations or constant operands (weights and biases are neither)."""
    if node.op_type in {"Conv", "ConvTranspose", "Gemm"}:
        return [0]
    if node.op_type == "MatMul":
        return [0] if weight_of(node) is not None else [0, 1]
    if node.op_type in BINARY | JOINS:
        return [i for i, v in enumerate(node.inputs) if v is not None]
    return [0]


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant weight of a weighted node: rank >= 2 for MatMul."""
    if node.op_type not in WEIGHTED or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    array = M.constant(value)
    return value if array is not None and array.ndim >= 2 else None


def weight_axis(node: ir.Node) -> int:
    """The output channel axis of the weight, non-negative."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if _int(node, "transB", 0) else 1
    weight = M.constant(node.inputs[1])
    return 1 if weight is None else weight.ndim - 1


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes.get_int(name, default) or 0)


def _str(node: ir.Node, name: str, default: str) -> str:
    return str(node.attributes.get_string(name, default))


# --- may this node be quantized at all? ------------------------------------------------------------------
def refusal(node: ir.Node, bits: Bits = 8, scheme: Scheme = "litert") -> str | None:
    """Why the node cannot compute on integers whatever its ranges are, or None."""
    if node.outputs and all(v.dtype is not None and not v.dtype.is_floating_point() for v in node.outputs):
        return "it computes no real numbers"
    if node.domain not in {"", "ai.onnx"} or node.op_type not in integer(bits, scheme):
        return f"{node.op_type} has no integer form" + ("" if bits == 8 else f" of {bits} bits")
    if not node.inputs or node.inputs[0] is None:
        return "no input"
    positions = data_inputs(node)
    values = [v for i in positions if (v := node.inputs[i]) is not None] + list(node.outputs)
    for value in values:
        if value.dtype != FLOAT:
            return f"'{value.name}' is {value.dtype.name.lower() if value.dtype is not None else 'of unknown type'}"
    if any(v.shape is not None and not len(v.shape) and M.constant(v) is None for v in values):
        return "it works on a single number"
    constants = [c for i in positions if (c := M.constant(node.inputs[i])) is not None]
    if len(constants) == len(positions):
        return "its inputs are constant"
    if any(c.size and not np.abs(c).max() < HUGE for c in constants):
        return "a constant operand is as good as infinite"
    if scheme == "fpga" and (constants or (node.op_type == "MatMul" and weight_of(node) is None)):
        return "one of its operands is constant" if constants else "both its operands are computed"
    return _refuse_weighted(node, bits) if node.op_type in WEIGHTED else _refuse_other(node)


def _refuse_weighted(node: ir.Node, bits: Bits) -> str | None:
    weight = weight_of(node)
    if node.op_type == "MatMul":
        if weight is None and any(M.constant(v) is not None for v in node.inputs):
            return "its constant operand is not a matrix on the right"
        return _too_long(node) if weight is None and bits == 8 else None
    if weight is None:
        return "its weights are not constant"
    if node.op_type == "Gemm" and _int(node, "transA", 0):
        return "its input is transposed"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias, array = M.constant(node.inputs[2]), M.constant(weight)
        if bias is None or array is None:
            return "its bias is not constant"
        if node.op_type == "Gemm" and bias.size not in {1, array.shape[weight_axis(node)]}:
            return "its bias is not one value per output"
        if node.op_type == "Gemm" and bias.ndim > 1 and any(n != 1 for n in bias.shape[:-1]):
            return "its bias differs from row to row"
    return None


def _too_long(node: ir.Node) -> str | None:
    """255 * 255 * K must stay below 2**31 when both operands are activations."""
    shape = node.inputs[1].shape if node.inputs[1] is not None else None
    length = shape[-2] if shape is not None and len(shape) > 1 else None
    return "its sums would overflow int32" if isinstance(length, int) and length * 255 * 255 >= 2**31 else None


def _refuse_other(node: ir.Node) -> str | None:
    op = node.op_type
    if op == "Pad":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        value = M.constant(fill)
        if _str(node, "mode", "constant") == "constant" and fill is not None and (value is None or np.any(value != 0)):
            return "it pads with something else than 0"
    if op == "Resize" and _str(node, "mode", "nearest") == "cubic":
        return "cubic interpolation overshoots"
    if op == "Gather" and M.constant(node.inputs[0]) is not None:
        return "it looks up a constant table"
    if op == "Clip" and clip_bounds(node) is None:
        return "its bounds are not constant"
    if op in {"MaxPool"} and len(node.outputs) > 1 and node.outputs[1].uses():
        return "its indices are used"
    return None


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """(low, high) of a Relu or a Clip with constant bounds; None for anything else."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for i in (1, 2):
        value = node.inputs[i] if len(node.inputs) > i else None
        if value is not None:
            array = M.constant(value)
            if array is None or array.size != 1:
                return None
            bounds[i - 1] = float(array.reshape(()))
    return bounds[0], bounds[1]


# --- is it worth it? ---------------------------------------------------------------------------------------
def _fusable(node: ir.Node, bits: Bits) -> ir.Node | None:
    """The producer that a Relu or Clip can be fused into: its only reader, of an operator with a fused form."""
    bounds = clip_bounds(node)
    if bounds is None or node.inputs[0] is None or (bits == 16 and bounds not in FUSED_BOUNDS):
        return None
    value = node.inputs[0]
    producer = value.producer()
    if producer is None or producer.op_type not in FUSING or value.is_graph_output() or len(value.uses()) != 1:
        return None
    return producer


def _trim(chosen: Mapping[str, ir.Node], fused: Mapping[str, str]) -> list[str]:
    """Nodes that gain nothing: those that would have to round float values only to hand them to float readers."""
    alive = dict(chosen)
    while True:
        fed = _fed(alive)
        drop = [n for n, node in alive.items() if not _worthwhile(node, alive, fused, fed)]
        if not drop:
            return [n for n in chosen if n not in alive]
        for name in drop:
            del alive[name]


def _fed(alive: Mapping[str, ir.Node]) -> frozenset[str]:
    """Nodes whose output is integers before anything is computed on it: operators that compute, and what moves theirs.

    Moves of a graph input count, which a device may hand over as integers; moves of what a float operator computed
    don't. alive: in the graph's order.
    """
    fed: set[str] = set()
    for name, node in alive.items():
        reads = [v for i in data_inputs(node) if (v := node.inputs[i]) is not None]
        moved = any(v.is_graph_input() or ((p := v.producer()) is not None and p.name in fed) for v in reads)
        if node.op_type not in MOVES or moved:
            fed.add(name)
    return frozenset(fed)


def _worthwhile(node: ir.Node, alive: Mapping[str, ir.Node], fused: Mapping[str, str], fed: frozenset[str]) -> bool:
    if node.op_type in WEIGHTED:
        return True
    if (producer := fused.get(node.name or "")) is not None:
        return producer in alive
    reads = [v for i in data_inputs(node) if (v := node.inputs[i]) is not None]
    # Rounding what a float operator gives is put off behind moves that leave a part of it, with a range of its own.
    from_integers = any((p := v.producer()) is not None and p.name in fed for v in reads)
    readers = [_reads(user, i, node, alive) for v in node.outputs for user, i in v.uses()]
    to_output = any(v.is_graph_output() for v in node.outputs)
    if node.op_type in LEADING and not from_integers:
        return bool(readers) and all(readers) and not to_output
    if node.op_type in MOVES - JOINS:
        # Costs no accuracy, and a float one here makes ONNX Runtime 1.32 move the DequantizeLinear behind it by
        # itself, wrongly for int8 at opset >= 21 ("output_dtype INT8 does not match y_zero_point type UINT8").
        return from_integers
    return from_integers and (to_output or any(readers))


def _reads(user: ir.Node, position: int, node: ir.Node, alive: Mapping[str, ir.Node]) -> bool:
    # a node inside a subgraph may bear the name of one outside
    return user.name in alive and user.graph is node.graph and position in data_inputs(user)


# --- which values -----------------------------------------------------------------------------------------
def _values(chosen: Mapping[str, ir.Node], fused: Mapping[str, str]) -> tuple[list[str], list[str]]:
    activations: dict[str, None] = {}
    constants: dict[str, None] = {}
    swallowed = set(fused.values())
    for name, node in chosen.items():
        if name not in fused:
            for i in data_inputs(node):
                value = node.inputs[i]
                if value is not None and value.name:
                    (activations if M.constant(value) is None else constants)[value.name] = None
        if name not in swallowed:
            activations.update((v.name, None) for v in node.outputs if v.name and _is_data(node, v))
    return list(activations), list(constants)


def _is_data(node: ir.Node, value: ir.Value) -> bool:
    return not (node.op_type == "MaxPool" and value.index() == 1)


def _groups(chosen: Mapping[str, ir.Node], fused: Mapping[str, str]) -> list[list[str]]:
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for node in chosen.values():
        if node.op_type in MOVES:
            members = [v.name for i in data_inputs(node) if (v := node.inputs[i]) is not None and v.name]
            members += [v.name for v in node.outputs if v.name and _is_data(node, v)]
            for other in members[1:]:
                parent[root(other)] = root(members[0])
    sets: dict[str, list[str]] = {}
    for name in parent:
        sets.setdefault(root(name), []).append(name)
    return [sorted(s) for _, s in sorted(sets.items())]


def _inner_softmax(chosen: Mapping[str, ir.Node]) -> frozenset[str]:
    """Softmax nodes that only matrix products read: of an attention."""
    return frozenset(
        name
        for name, node in chosen.items()
        if node.op_type == "Softmax"
        and (readers := [use.node for use in node.outputs[0].uses()])
        and all(r.op_type == "MatMul" for r in readers)
        and not node.outputs[0].is_graph_output()
    )


def _pins(
    chosen: Mapping[str, ir.Node],
    fused: Mapping[str, str],
    groups: list[list[str]],
    activations: list[str],
    bits: Bits,
    free: frozenset[str],
) -> tuple[dict[str, Activation], dict[str, str]]:
    """Fixed parameters, spread over each group; and the joins that would force them on a value they do not fit."""
    produced: dict[str, ir.Node] = {v.name: n for n in chosen.values() for v in n.outputs if v.name}
    swallowed = set(fused.values())
    pinned: dict[str, Activation] = {}
    conflicts: dict[str, str] = {}
    for group in [*groups, *([name] for name in activations)]:
        sources = [n for n in group if n not in produced or produced[n].op_type not in MOVES]
        pins = {
            fixed(produced[n].op_type, bits) if n in produced and produced[n].name not in swallowed | free else None
            for n in sources
        }
        if len(pins) == 1 and (pin := next(iter(pins))) is not None:
            pinned.update((n, pin) for n in group)
        elif any(p is not None for p in pins):
            members = set(group)
            for name, node in chosen.items():
                if node.op_type in JOINS and node.outputs[0].name in members:
                    conflicts[name] = "it joins values whose scales the scheme fixes differently"
    return pinned, conflicts


def _left(chosen: Mapping[str, ir.Node], activations: list[str], graph: ir.Graph) -> set[str]:
    """Values that float operators read: of an FPGA the host's, a Softmax at the end."""
    read = {v.name for node in graph if node.name not in chosen for v in node.inputs if v is not None and v.name}
    return read & set(activations)


def _reach_output(graph: ir.Graph, groups: list[list[str]], left: set[str]) -> frozenset[str]:
    reach = left | {v.name for v in graph.outputs if v.name}
    for group in groups:
        if reach & set(group):
            reach |= set(group)
    return frozenset(reach)


def candidate_values(model: ir.Model, bits: Bits = 8, scheme: Scheme = "litert") -> Iterator[str]:
    """Every computed float value beside a node that may be quantized: what must be observed before ranges decide."""
    seen: set[str] = set()
    for node in model.graph:
        if refusal(node, bits, scheme) is not None:
            continue
        for value in [*(node.inputs[i] for i in data_inputs(node)), *node.outputs]:
            if value is None or not value.name or value.name in seen or value.dtype != FLOAT:
                continue
            if M.constant(value) is None:
                seen.add(value.name)
                yield value.name
