"""ONNX model -> values and nodes: shapes known, constants computed, Q/DQ turned into types, activations attached."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.reference.fallback import captured, runner
from edgekit.backends.tflite.graph import Array, Quant
from edgekit.backends.tflite.shapes import Shapes, shapes
from edgekit.backends.tflite.values import Node, Refused, Value

_MOST = 1 << 26  # elements of a constant that is computed here
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)

# inputs whose numbers decide the shape of the result: an observed shape holds for the observed numbers only
_SHAPE_INPUTS = {
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Expand", "Tile", "OneHot", "TopK", "Split", "Compress"), (1,)),
    "Slice": (1, 2, 3, 4),
    "Resize": (2, 3),
    "Range": (0, 1, 2),
    "Pad": (1, 3),
    "ConstantOfShape": (0,),
    "AffineGrid": (1,),
    "Col2Im": (1, 2),
    "CenterCropPad": (1,),
    "MaxUnpool": (2,),
    "Upsample": (1,),
}


@dataclass(eq=False)
class Prepared:
    """inputs, outputs: in the model's order, named as the model names them. refused: (node, operator, Refused).

    integers: the model's type of outputs that are quantized integers, not the numbers they stand for.
    """

    inputs: list[tuple[str, Value]] = field(default_factory=list)
    outputs: list[tuple[str, Value]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    refused: list[tuple[str, str, Refused]] = field(default_factory=list)
    fixed_batch: bool = False
    integers: dict[str, np.dtype[Any]] = field(default_factory=dict)


def prepare(model: ir.Model) -> Prepared:
    """model: opset >= 21, float or QDQ. Raises ShapeError if a size other than the batch is open."""
    return _Reader(model).read()


class _Reader:
    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opsets = dict(model.opset_imports)
        self.shapes: Shapes = shapes(model)
        self.values: dict[str, Value] = {}
        self.pairs: dict[str, tuple[Array, ...]] = {}  # what a constant is at each batch of `shapes`
        self.out = Prepared(fixed_batch=len(self.shapes.batches) == 1)

    def read(self) -> Prepared:
        for name, value in self.graph.initializers.items():
            array = M.constant(value)
            if array is not None:
                self._set_constant(name, (array,) * len(self.shapes.batches))
        given = set(self.graph.initializers)
        for value in self.graph.inputs:
            if value.name not in given:
                self.out.inputs.append((value.name or "", self._new(value)))
        for node in self.graph:
            try:
                self._node(node)
            except Refused as refused:
                self.out.refused.append((node.name or "", node.op_type, refused))
                for output in node.outputs:
                    if output.name and output.name not in self.values:
                        with suppress(Refused):
                            self._new(output)
        for value in self.graph.outputs:
            found = self.values[value.name or ""]
            self.out.outputs.append((value.name or "", found))
            if found.quant is not None and value.dtype is not None and value.dtype.is_integer():
                self.out.integers[value.name or ""] = np.dtype(value.dtype.numpy())
        _attach_activations(self.out)
        return self.out

    # --- values ------------------------------------------------------------------------------------
    def _new(self, value: ir.Value) -> Value:
        name = value.name or ""
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        found = self.shapes.of(name)
        if found is None:
            made = Value(name, np.dtype(dtype), ())
            self.values[name] = made
            raise Refused(f"the shape of '{name}' depends on the data", "fix it in the model")
        made = Value(name, np.dtype(dtype), *found)
        self.values[name] = made
        return made

    def _set_constant(self, name: str, pair: tuple[Array, ...]) -> Value | None:
        """Note a constant; None if it differs between batches in a way that is no size."""
        first, last = pair[0], pair[-1]
        self.pairs[name] = pair
        value = Value(name, first.dtype, first.shape)
        if first.shape == last.shape and np.array_equal(first, last, equal_nan=first.dtype.kind == "f"):
            value.data = first
        elif first.shape == last.shape and first.dtype.kind in "iu":
            value.sizes = np.where(first == last, first, -1)
        elif _grows(first, last):
            value.data = first  # the same row for each sample: broadcast
            value.dynamic = frozenset(a for a, (m, n) in enumerate(zip(first.shape, last.shape, strict=True)) if m != n)
        else:
            return None
        self.values[name] = value
        return value

    # --- nodes -------------------------------------------------------------------------------------
    def _node(self, node: ir.Node) -> None:
        name = node.outputs[0].name or ""
        if node.domain not in ("", "ai.onnx"):
            raise Refused(f"operator {node.domain}.{node.op_type} is not ONNX's own", "export with standard operators")
        if node.op_type == "Identity" and node.inputs[0] is not None:
            self._alias(name, node.inputs[0].name or "")
        elif node.op_type == "DequantizeLinear":
            self._dequantize(node)
        elif node.op_type == "QuantizeLinear":
            self._quantize(node)
        elif not self._computed(node):
            self._compute(node)

    def _alias(self, name: str, source: str) -> None:
        self.values[name] = self.values[source]
        if source in self.pairs:
            self.pairs[name] = self.pairs[source]

    def _computed(self, node: ir.Node) -> bool:
        """Whether the node's outputs are constants, which are then known."""
        if node.op_type in _RANDOM or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            return False
        names = [v.name or "" for v in node.inputs if v is not None]
        if node.op_type in ("Shape", "Size") and names[0] not in self.pairs:
            pair = self._shape_pair(node, names[0])
        elif all(n in self.pairs for n in names) and not captured(node):
            pair = self._evaluated(node)
        else:
            return False
        if pair is None or any(p is None for one in pair for p in one):
            return False
        done = True
        for value, results in zip(node.outputs, pair, strict=False):
            if value.name:
                done = self._set_constant(value.name, tuple(results)) is not None and done
        return done

    def _shape_pair(self, node: ir.Node, source: str) -> list[tuple[Array, ...]] | None:
        if any(source not in at for at in self.shapes.at):
            return None
        out = []
        for at in self.shapes.at:
            shape = np.array(at[source], np.int64)
            if node.op_type == "Size":
                out.append(np.array(shape.prod(), np.int64))
                continue
            end = node.attributes.get_int("end", len(shape))
            out.append(shape[slice(node.attributes.get_int("start", 0), end)])
        return [tuple(out)]

    def _evaluated(self, node: ir.Node) -> list[tuple[Array, ...]] | None:
        """Outputs of a node of constants, at each batch; None if they are too large to keep."""
        for value in node.outputs:
            found = self.shapes.of(value.name or "")
            if found is not None and np.prod(found[0], dtype=np.int64) > _MOST:
                return None
        run = runner(node, self.opsets, slow=False)
        results = []
        for batch in range(len(self.shapes.batches)):
            feeds = [None if v is None else self.pairs[v.name or ""][batch] for v in node.inputs]
            results.append([np.asarray(r) for r in run(feeds) if r is not None])
        return list(zip(*results, strict=True))

    def _compute(self, node: ir.Node) -> None:
        for index in _SHAPE_INPUTS.get(node.op_type, ()):
            given = node.inputs[index] if index < len(node.inputs) else None
            if given is not None and given.name and given.name not in self.pairs:
                raise Refused(f"'{given.name}', which decides the shape of its result, is computed", "make it constant")
        inputs = [None if v is None else self.values[v.name or ""] for v in node.inputs]
        outputs = [self._new(v) if v.name else Value("", np.dtype(np.float32), ()) for v in node.outputs]
        self.out.nodes.append(Node(node.op_type, node.name or node.op_type, inputs, outputs, node))

    # --- quantization ------------------------------------------------------------------------------
    def _dequantize(self, node: ir.Node) -> None:
        """A DequantizeLinear costs nothing: its readers see the stored tensor, which knows its scale."""
        source = node.inputs[0]
        assert source is not None
        stored = self.values[source.name or ""]
        quant = self._quant(node, stored.rank)
        _check_int16(stored.dtype, quant)
        if stored.quant is not None and not stored.quant.same(_as_stored(node, quant)):
            raise Refused("it reads integers with another scale than they were written with", "quantize anew")
        if stored.data is not None:
            stored = Value(stored.name, stored.dtype, stored.shape, stored.dynamic, stored.data)
            _signed(stored, quant)
        elif stored.quant is None:
            stored.quant = quant
            if stored.dtype == np.uint8:
                raise Refused("it reads a computed uint8 tensor that nothing quantizes", "quantize anew with edgekit")
        self.values[node.outputs[0].name or ""] = stored

    def _quantize(self, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None
        before = self.values[source.name or ""]
        after = self._new(node.outputs[0])
        zero = M.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        code = node.attributes.get_int("output_dtype", 0)
        after.dtype = zero.dtype if zero is not None else np.dtype(ir.DataType(code).numpy() if code else np.uint8)
        quant = self._quant(node, after.rank)
        _check_int16(after.dtype, quant)
        _signed(after, quant)
        if after.dtype not in (np.int8, np.int16):
            raise Refused(f"it quantizes to {after.dtype}", "quantize to int8 with edgekit")
        producer = self._writer(before)
        alone = len(source.uses()) == 1 and not source.is_graph_output()
        if producer is not None and alone and before.quant is None:
            producer.outputs[producer.outputs.index(before)] = after
        else:
            self.out.nodes.append(Node("QuantizeLinear", node.name or "", [before], [after], node))

    def _writer(self, value: Value) -> Node | None:
        return next((n for n in reversed(self.out.nodes) if value in n.outputs), None)

    def _quant(self, node: ir.Node, rank: int) -> Quant:
        scale = M.constant(node.inputs[1])
        zero = M.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None or (len(node.inputs) > 2 and node.inputs[2] is not None and zero is None):
            raise Refused("its scale or zero point is computed", "use constant quantization parameters")
        if node.attributes.get_int("block_size", 0) or scale.ndim > 1:
            raise Refused("it has a scale per block", "quantize per tensor or per channel")
        axis = int(node.attributes.get_int("axis", 1) or 0) % max(rank, 1)
        scales = scale.astype(np.float32).reshape(-1)
        zeros = np.zeros(len(scales), np.int64) if zero is None else zero.astype(np.int64).reshape(-1)
        return Quant(scales, zeros, axis)


def _check_int16(dtype: np.dtype[Any], quant: Quant) -> None:
    if dtype == np.int16 and quant.zeros.any():
        raise Refused("int16 with a zero point", "LiteRT takes symmetric int16: quantize anew")


def _as_stored(node: ir.Node, quant: Quant) -> Quant:
    """What a DequantizeLinear says of a uint8 tensor, once that is int8 with all moved by 128."""
    zero, source = (M.constant(node.inputs[2]) if len(node.inputs) > 2 else None), node.inputs[0]
    unsigned = zero.dtype == np.uint8 if zero is not None else source is not None and source.dtype == ir.DataType.UINT8
    if unsigned:
        return Quant(quant.scales, quant.zeros - 128, quant.axis)
    return quant


def _signed(value: Value, quant: Quant) -> None:
    """Give a value its quantization; uint8 becomes int8 with all moved by 128, which changes no number."""
    if value.dtype == np.uint8:
        quant = Quant(quant.scales, quant.zeros - 128, quant.axis)
        value.dtype = np.dtype(np.int8)
        if value.data is not None:
            value.data = (value.data.astype(np.int16) - 128).astype(np.int8)
    value.quant = quant


def _grows(first: Array, last: Array) -> bool:
    """Whether `last` is `first` repeated along axes of size 1."""
    if first.ndim != last.ndim:
        return False
    if any(m != n and m != 1 for m, n in zip(first.shape, last.shape, strict=True)):
        return False
    return bool(np.array_equal(np.broadcast_to(first, last.shape), last))


# --- activations -----------------------------------------------------------------------------------------
_FUSES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "MaxPool", "AveragePool"})


def _attach_activations(prepared: Prepared) -> None:
    """A Relu or Clip that alone reads an operator's unrounded result becomes part of that operator."""
    outputs = {id(v) for _, v in prepared.outputs}
    readers = _readers(prepared.nodes)
    gone: set[int] = set()
    for node in prepared.nodes:
        if node.op not in _FUSES or len(node.outputs) != 1 or node.outputs[0].quant is not None:
            continue
        found = readers.get(id(node.outputs[0]), [])
        if len(found) != 1 or id(node.outputs[0]) in outputs or node.outputs[0].dtype != np.float32:
            continue
        activation = activation_of(found[0])
        if activation and found[0].inputs[0] is node.outputs[0] and _can_fuse(node):
            node.activation = activation
            node.outputs = found[0].outputs
            gone.add(id(found[0]))
    prepared.nodes = [n for n in prepared.nodes if id(n) not in gone]


def _can_fuse(node: Node) -> bool:
    """A product of two computed matrices has no fused activation."""
    if node.op not in ("MatMul", "Gemm"):
        return True
    weight = node.input(1)
    return weight is not None and weight.data is not None and weight.rank == 2


def _readers(nodes: Iterable[Node]) -> dict[int, list[Node]]:
    out: dict[int, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None:
                out.setdefault(id(value), []).append(node)
    return out


_CLIPS: dict[tuple[Any, Any], str] = {(0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1", (0.0, np.inf): "RELU"}


def activation_of(node: Node) -> str | None:
    """The name of a fusable activation that `node` is, or None."""
    if node.op == "Relu":
        return "RELU"
    if node.op != "Clip":
        return None
    bounds = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = node.input(index)
        if value is not None and value.data is None:
            return None
        bounds.append(default if value is None or value.real is None else float(value.real.reshape(-1)[0]))
    return _CLIPS.get((bounds[0], bounds[1]))
