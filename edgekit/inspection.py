"""What a model is made of and what it costs: operators, parameters, multiply-accumulates, activation memory.

Every figure is for one sample (batch 1) and is counted from the graph, not measured.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import onnx_ir as ir

from edgekit import backends
from edgekit import model as M
from edgekit.errors import EdgekitError

INSPECT_SCHEMA = 1  # 1: first

Shape = tuple[int, ...]

_FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)

# Runtimes hand on the same buffer under another shape.
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})


@dataclass(frozen=True)
class Layer:
    """One node.

    shape: of the first output at batch 1, None if unknown. macs: 0 for an operator that multiplies and accumulates
    nothing, None for one whose shapes are unknown. parameters: elements of its learned constants.
    """

    name: str
    op: str
    shape: Shape | None
    macs: int | None
    parameters: int
    weight_bytes: int


def inspect(model: ir.Model, lowered: ir.Model | None = None, *, backends_too: bool = True) -> dict[str, Any]:
    """Describe a model; JSON-ready. lowered: what the backends would be handed, if it is not the model itself.

    Keys: schema, signature, opset, nodes, ops {operator: count}, parameters, weight_bytes, macs, activation_peak_bytes,
    activation_peak_at (node), layers [Layer], backends {name: {takes, refuses, missing}}, reasons (of null figures).
    Raises ShapeError when a size other than the batch is unknown.
    """
    proto = M.to_proto(model)
    shapes = tensor_shapes(model)
    constants = _constants(proto.graph)
    rows = layers(proto.graph, shapes, constants)
    peak, at = activation_peak(proto.graph, shapes, _itemsizes(model), set(constants))
    macs = None if any(r.macs is None for r in rows) else sum(r.macs or 0 for r in rows)
    reasons = [f"MACs: the shapes at node '{r.name}' ({r.op}) are unknown" for r in rows if r.macs is None]
    reasons += [
        f"operators inside '{name}' are listed, their MACs are not counted" for name in _with_subgraphs(proto.graph)
    ]
    if peak is None:
        reasons.append(f"activation memory: the shape of '{at}' is unknown")
    return {
        "schema": INSPECT_SCHEMA,
        "signature": M.signature(model).to_json(),
        "opset": M.opset(model),
        "nodes": len(proto.graph.node),
        "ops": dict(sorted(Counter(_operators(proto.graph)).items(), key=lambda item: (-item[1], item[0]))),
        "parameters": sum(r.parameters for r in rows),
        "weight_bytes": sum(constants.values()),
        "macs": macs,
        "activation_peak_bytes": peak,
        "activation_peak_at": at if peak is not None else None,
        "layers": [asdict(r) for r in rows],
        "backends": {name: _verdict(name, lowered or model) for name in backends.BACKENDS if backends_too},
        "reasons": reasons,
    }


def tensor_shapes(model: ir.Model) -> dict[str, Shape]:
    """Shape of every tensor at batch 1, by name: inferred, and observed on one seeded input where inference gives up.

    Tensors inside subgraphs, and those that only a failing run could show, are absent.
    """
    proto = M.to_proto(model)
    sig = M.signature(model)
    known: dict[str, Shape] = {s.name: s.concrete(1) for s in sig.inputs}
    known.update({t.name: tuple(t.dims) for t in proto.graph.initializer})
    del proto.graph.value_info[:]
    for value in proto.graph.input:
        if value.name in known:
            for dim, size in zip(value.type.tensor_type.shape.dim, known[value.name], strict=True):
                dim.dim_value = size
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    for value in (*inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            known[value.name] = tuple(d.dim_value for d in dims)
    missing = [name for node in proto.graph.node for name in node.output if name and name not in known]
    return known | _observed(model, sig, missing) if missing else known


def _observed(model: ir.Model, sig: M.Signature, names: Sequence[str]) -> dict[str, Shape]:
    """Shapes of `names` in a run on one seeded sample; empty if ONNX Runtime cannot run the model."""
    try:
        outputs = M.FloatSession(model, fetch=names, optimize=False, threads=1).run(M.seeded_inputs(sig, 1))
    except EdgekitError:
        raise
    except Exception:  # ONNX Runtime's own errors share no base class; what cannot be run stays unknown
        return {}
    return {name: tuple(outputs[name].shape) for name in names if hasattr(outputs.get(name), "shape")}


def layers(graph: onnx.GraphProto, shapes: Mapping[str, Shape], constants: Mapping[str, int]) -> list[Layer]:
    """One row per node of the main graph, in its order. constants: bytes of each constant by name.

    A constant that several nodes read is counted at the first of them.
    """
    floating = {t.name for t in _constant_tensors(graph) if t.data_type in _FLOATING}
    seen: set[str] = set()
    rows = []
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant":
            continue
        own = [name for name in node.input if name in constants and name not in seen]
        seen.update(own)
        rows.append(
            Layer(
                name=node.name or f"{node.op_type}_{index}",
                op=node.op_type,
                shape=shapes.get(node.output[0]) if node.output else None,
                macs=macs(node, shapes),
                parameters=sum(_parameters(node, n, shapes.get(n, ()), n in floating) for n in own),
                weight_bytes=sum(constants[n] for n in own),
            )
        )
    return rows


def _parameters(node: onnx.NodeProto, name: str, shape: Shape, floating: bool) -> int:
    """Elements of a learned array: floating point, or the integers that a DequantizeLinear reads.

    Scalars, scales, zero points and shapes are not learned: 0.
    """
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return math.prod(shape) if node.op_type == "DequantizeLinear" and node.input[0] == name else 0
    return math.prod(shape) if floating and shape and math.prod(shape) > 1 else 0


def _constant_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and the tensors of Constant nodes, under the name other nodes read them by."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensor = onnx.TensorProto()
                    tensor.CopyFrom(attribute.t)
                    tensor.name = node.output[0]
                    yield tensor


def _constants(graph: onnx.GraphProto) -> dict[str, int]:
    """Bytes of every constant by name."""
    return {
        t.name: math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        for t in _constant_tensors(graph)
        if t.data_type != onnx.TensorProto.STRING
    }


# --- multiply-accumulates -----------------------------------------------------------------------------


def macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """Multiply-accumulates of one node: 0 if its operator has none, None if a shape it needs is unknown.

    Padding is counted as if it were data, as the published figures of the MLPerf Tiny models do.
    """
    count = _MACS.get(node.op_type)
    if count is None:
        return 0
    try:
        return count(node, shapes)
    except KeyError:
        return None


def _conv(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Each output element reads C_in/group × the kernel; weights (C_out, C_in/group, k...)."""
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _conv_transpose(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Each input element is spread over C_out/group × the kernel; weights (C_in, C_out/group, k...)."""
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _gemm(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """A is (M, K), or (K, M) with transA."""
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _matmul(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _recurrent(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """X (steps, batch, inputs) or, with layout 1, (batch, steps, inputs); W and R hold all gates and directions."""
    steps_times_batch = math.prod(shapes[node.input[0]][:2])
    return steps_times_batch * (math.prod(shapes[node.input[1]]) + math.prod(shapes[node.input[2]]))


def _einsum(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """The product of the sizes of all letters; an ellipsis counts as the leading sizes it stands for."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    sizes: dict[str, int] = {}
    for term, name in zip(equation.split("->", maxsplit=1)[0].split(","), node.input, strict=True):
        shape = shapes[name]
        before, dots, after = term.partition("...")
        tail = len(shape) - len(after)
        sizes.update(zip(before, shape[: len(before)], strict=True))
        sizes.update(zip(after, shape[tail:], strict=True))
        if dots:
            sizes["..."] = max(sizes.get("...", 1), math.prod(shape[len(before) : tail]))
    return math.prod(sizes.values())


_MACS: Mapping[str, Callable[[onnx.NodeProto, Mapping[str, Shape]], int]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}


def product_macs(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of all multiply-accumulates the share of matrix products and recurrent layers; None where some are unknown.

    rows: "layers" of `inspect`.
    """
    if any(row["macs"] is None for row in rows):
        return None
    products = sum(int(row["macs"]) for row in rows if not row["op"].startswith("Conv"))
    return products / max(1, sum(int(row["macs"]) for row in rows))


# --- activation memory --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One operator as the memory sees it. view: its first output is its first input under another shape."""

    name: str
    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    view: bool = False


def activation_peak(
    graph: onnx.GraphProto, shapes: Mapping[str, Shape], itemsizes: Mapping[str, int], constants: set[str]
) -> tuple[int | None, str]:
    """`peak` of a graph; (None, tensor) if that tensor's shape is unknown."""
    steps = [
        Step(
            node.name or node.op_type,
            tuple(n for n in (*node.input, *_captured(node)) if n and n not in constants),
            tuple(n for n in node.output if n and n not in constants),
            node.op_type in _VIEWS and node.output[0] != "" and node.input[0] not in constants,
        )
        for node in graph.node
    ]
    sizes = {name: math.prod(shape) * itemsizes.get(name, 4) for name, shape in shapes.items()}
    found, at = peak(
        steps, [v.name for v in graph.input if v.name not in constants], [v.name for v in graph.output], sizes
    )
    return found, str(at)


def peak(
    steps: Sequence[Step], inputs: Iterable[Hashable], outputs: Iterable[Hashable], sizes: Mapping[Any, int]
) -> tuple[int | None, Hashable]:
    """(largest sum of bytes that are alive at once, the step where), steps run in their order.

    A tensor lives from its producer to its last reader, inputs from the start, outputs to the end; a step's reads and
    writes are alive together; views share their input's bytes. (None, tensor) if that tensor's size is unknown.
    """
    if not steps:
        return 0, ""
    root: dict[Hashable, Hashable] = {}
    born: dict[Hashable, int] = dict.fromkeys(inputs, 0)
    last: dict[Hashable, int] = dict.fromkeys(born, 0)
    for index, step in enumerate(steps):
        for name in step.reads:
            last[root.get(name, name)] = index
        for position, name in enumerate(step.writes):
            if step.view and position == 0:
                root[name] = root.get(step.reads[0], step.reads[0])
            else:
                born[name] = index
            last[root.get(name, name)] = index
    for name in outputs:
        last[root.get(name, name)] = len(steps) - 1
    change = [0] * (len(steps) + 1)
    for name, start in born.items():
        if name not in sizes:
            return None, name
        change[start] += sizes[name]
        change[last[name] + 1] -= sizes[name]
    alive = list(itertools.accumulate(change[:-1]))
    most = max(alive)
    return most, steps[alive.index(most)].name


def _itemsizes(model: ir.Model) -> dict[str, int]:
    """Bytes per element of every tensor of known type; float32 where the graph does not say."""
    proto = onnx.shape_inference.infer_shapes(M.to_proto(model)).graph
    return {
        v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).itemsize
        for v in (*proto.input, *proto.value_info, *proto.output)
        if v.type.tensor_type.elem_type not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
    }


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that the node's subgraphs read, their own included: only those of the outer graph matter to the caller."""
    return {name for graph in _subgraphs(node) for inner in graph.node for name in (*inner.input, *_captured(inner))}


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    """Every operator, subgraphs included; of another domain with its domain."""
    for node in graph.node:
        yield f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for inner in _subgraphs(node):
            yield from _operators(inner)


def _with_subgraphs(graph: onnx.GraphProto) -> list[str]:
    return [node.name or node.op_type for node in graph.node if _subgraphs(node)]


def _verdict(name: str, model: ir.Model) -> dict[str, Any]:
    """takes: None when the runtime is not installed and nothing can be said."""
    backend = backends.get(name)
    install = backend.missing()
    if install:
        return {"takes": None, "refuses": [], "missing": install}
    refused = backend.refuses(model)
    return {"takes": not refused, "refuses": refused, "missing": None}
