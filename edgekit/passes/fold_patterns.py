"""What exporters write in pieces although ONNX has one operator, Gelu say, and Expand where operators broadcast."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G

# operators that broadcast, or take each element alone: an Expand before them may be needless
_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
    | {"Where", "Min", "Max", "Pow", "Mod", "Cast", "Not", "Neg", "Relu", "Sigmoid", "Tanh", "Sqrt", "Exp", "Abs"}
)
_CUBE = 0.044715  # the factor of x³ in the tanh form of Gelu
_CLOSE = 1e-6  # relative; the constants of these formulas are written in float32


def fold(graph: ir.Graph) -> bool:
    """One sweep over the graph; True if anything changed."""
    changed = False
    for node in list(graph):
        if node.graph is None:
            continue
        changed = _zero_state(node) or changed
        if len(node.outputs) != 1:
            continue
        changed = (
            _expand(node)
            or _activation(node)
            or _layer_norm(node)
            or _global_pool(node)
            or _known_size(node)
            or changed
        )
    return changed


# --- recurrent layers -------------------------------------------------------------------------------
def _zero_state(node: ir.Node) -> bool:
    """A recurrent layer starts from zeros anyway: zeros of the batch's size need not be computed for it."""
    if not G.is_op(node, "LSTM", "GRU", "RNN"):
        return False
    found = [i for i in (5, 6) if i < len(node.inputs) and node.inputs[i] is not None and _is_zero(node.inputs[i])]
    for index in found:
        node.replace_input_with(index, None)
    return bool(found)


def _is_zero(value: ir.Value | None) -> bool:
    constant = G.array(value)
    if constant is not None:
        return not constant.any()
    node = None if value is None else value.producer()
    if G.is_op(node, "Concat"):  # of both directions
        return node is not None and all(_is_zero(v) for v in node.inputs)
    return node is not None and G.is_op(node, "Expand", "Unsqueeze", "Squeeze", "Reshape") and _is_zero(node.inputs[0])


# --- sizes ----------------------------------------------------------------------------------------
def _known_size(node: ir.Node) -> bool:
    """A size that is the same for every batch, read from a tensor's shape: exporters compute √d of an attention so."""
    source = node.inputs[0] if G.is_op(node, "Gather") else None
    shape = None if source is None else source.producer()
    index = G.array(node.inputs[1]) if shape is not None else None
    if shape is None or index is None or not G.is_op(shape, "Shape") or "start" in shape.attributes:
        return False
    sizes = G.dims(shape.inputs[0])
    if sizes is None or "end" in shape.attributes or not all(-len(sizes) <= i < len(sizes) for i in index.reshape(-1)):
        return False
    picked = [sizes[int(i)] for i in index.reshape(-1)]
    if not all(isinstance(size, int) for size in picked) or node.outputs[0].is_graph_output():
        return False
    data = np.array(picked, np.int64).reshape(index.shape)
    G.bypass(node, G.new_constant(G.graph_of(node), f"{node.name}/size", data))
    return True


# --- pooling --------------------------------------------------------------------------------------
def _global_pool(node: ir.Node) -> bool:
    """An average over all positions is said to be one: kernels then need not keep the input's scale for the mean."""
    sizes = G.dims(node.inputs[0]) if G.is_op(node, "AveragePool") else None
    if sizes is None or G.integers(node, "kernel_shape") != sizes[2:] or any(G.integers(node, "pads") or ()):
        return False
    if G.text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or G.integer(node, "ceil_mode", 0):
        return False
    if any(d != 1 for d in G.integers(node, "dilations") or ()):
        return False
    G.become(node, "GlobalAveragePool", [node.inputs[0]])
    return True


# --- Expand ---------------------------------------------------------------------------------------
def _expand(node: ir.Node) -> bool:
    """An Expand goes if, past elementwise operators, all its readers reach the same size without it."""
    x, full = (node.inputs[0], node.outputs[0]) if G.is_op(node, "Expand") else (None, None)
    small = G.dims(x)
    if x is None or full is None or small is None or full.is_graph_output() or not full.uses():
        return False
    shrunk: dict[ir.Value, G.Dims] = {full: small}
    waiting = [full]
    while waiting:
        for reader in {use.node: None for use in waiting.pop().uses()}:
            if not G.is_op(reader, *_ELEMENTWISE) or reader.graph is not node.graph:
                return False
            output, sizes = reader.outputs[0], _broadcast([shrunk.get(v) or G.dims(v) for v in reader.inputs if v])
            if sizes is None or (sizes != G.dims(output) and output.is_graph_output()):
                return False
            if sizes != G.dims(output) and shrunk.get(output) != sizes:
                shrunk[output] = sizes
                waiting.append(output)
    for value, sizes in shrunk.items():
        value.shape = ir.Shape(sizes)
    G.bypass(node, x)
    return True


def _broadcast(shapes: list[G.Dims | None]) -> G.Dims | None:
    """Numpy's rule; None if a size is unknown or symbols meet numbers other than 1."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes):
        return None
    out: list[int | str] = []
    for axis in range(-max(map(len, known)), 0):
        found = {s[axis] for s in known if len(s) >= -axis} - {1}
        if len(found) > 1:
            return None
        out.append(found.pop() if found else 1)
    return tuple(out)


# --- products: Gelu, HardSwish ----------------------------------------------------------------------
def _activation(node: ir.Node) -> bool:
    """x·0.5·(1 + erf(x/√2)), its tanh form, and x·clip(x + 3, 0, 6)/6, in whatever order they are multiplied."""
    if not G.is_op(node, "Mul", "Div"):
        return False
    factor, values = _factors(node)
    if len(values) != 2 or G.dims(values[0]) != G.dims(node.outputs[0]) or G.dims(values[0]) != G.dims(values[1]):
        return False
    for x, gate in (values, values[::-1]):
        if _near(factor, 0.5) and _is_gauss(gate, x):
            G.become(node, "Gelu", [x])
            return True
        if _near(factor, 0.5) and _is_tanh_gauss(gate, x):
            G.become(node, "Gelu", [x], approximate="tanh")
            return True
        if _near(factor, 1 / 6) and _is_ramp(gate, x):
            G.become(node, "HardSwish", [x])
            return True
    return False


def _factors(node: ir.Node) -> tuple[float, list[ir.Value]]:
    """A product as one number and the values that are multiplied, through nested Mul and Div that nobody else reads."""
    number, values = 1.0, list[ir.Value]()
    for index, value in enumerate(node.inputs):
        constant = _scalar(value)
        inner = G.sole_producer(value, "Mul", "Div")
        if constant is not None and not (index == 1 and node.op_type == "Div" and constant == 0):
            number *= 1 / constant if index == 1 and node.op_type == "Div" else constant
        elif value is None or (node.op_type == "Div" and index == 1):
            return math.nan, []
        elif inner is not None:
            more, below = _factors(inner)
            if not below or math.isnan(more):
                values.append(value)
            else:
                number, values = number * more, values + below
        else:
            values.append(value)
    return number, values


def _is_gauss(gate: ir.Value, x: ir.Value) -> bool:
    """Whether gate = 1 + erf(x/√2), or 1 - erf(-x/√2) as the complement is written."""
    for op, sign in (("Add", 1), ("Sub", -1)):
        for one, erf in _operands(gate, op):
            inside = G.sole_producer(erf, "Erf")
            if not _near(_scalar(one), 1.0) or inside is None or inside.inputs[0] is None:
                continue
            scaled = inside.inputs[0].producer()
            if scaled is None or not G.is_op(scaled, "Mul", "Div"):
                continue
            factor, values = _factors(scaled)
            if len(values) != 1:
                continue
            source = values[0]
            negated = source.producer()
            if negated is not None and G.is_op(negated, "Neg") and source is not x and negated.inputs[0] is not None:
                source, factor = negated.inputs[0], -factor
            if source is x and _near(factor * sign, math.sqrt(0.5)):
                return True
    return False


def _is_tanh_gauss(gate: ir.Value, x: ir.Value) -> bool:
    """Whether gate = 1 + tanh(√(2/π)·(x + 0.044715·x³)): Hendrycks & Gimpel 2016."""
    for one, squashed in _operands(gate, "Add"):
        tanh = G.sole_producer(squashed, "Tanh")
        scaled = None if tanh is None or tanh.inputs[0] is None else tanh.inputs[0].producer()
        if not _near(_scalar(one), 1.0) or scaled is None or not G.is_op(scaled, "Mul", "Div"):
            continue
        factor, values = _factors(scaled)
        if not _near(factor, math.sqrt(2 / math.pi)):
            continue
        if len(values) == 1 and any(a is x and _power(b, x) == (3, _CUBE) for a, b in _operands(values[0], "Add")):
            return True
        for inner, outer in (values, values[::-1]) if len(values) == 2 else ():  # x·(1 + 0.044715·x²)
            pairs = _operands(inner, "Add")
            if outer is x and any(_near(_scalar(a), 1.0) and _power(b, x) == (2, _CUBE) for a, b in pairs):
                return True
    return False


def _power(value: ir.Value, x: ir.Value) -> tuple[int, float] | None:
    """(exponent, factor) if value = factor · x^exponent; a factor as near as matters is _CUBE."""
    node = value.producer()
    factor, values = _factors(node) if node is not None and G.is_op(node, "Mul", "Div") else (1.0, [value])
    exponent = 0
    for part in values:
        raised = [b for a, b in _operands(part, "Pow") if a is x]
        number = 1.0 if part is x else _scalar(raised[0]) if raised else None
        if number is None or number != int(number):
            return None
        exponent += int(number)
    return exponent, _CUBE if _near(factor, _CUBE) else factor


def _is_ramp(gate: ir.Value, x: ir.Value) -> bool:
    """Whether gate = clip(x + 3, 0, 6)."""
    clip = G.sole_producer(gate, "Clip")
    if clip is None or len(clip.inputs) != 3 or clip.inputs[0] is None:
        return False
    if _scalar(clip.inputs[1]) != 0 or _scalar(clip.inputs[2]) != 6:
        return False
    return any(a is x and _scalar(b) == 3 for a, b in _operands(clip.inputs[0], "Add"))


# --- layer normalization ----------------------------------------------------------------------------
def _layer_norm(node: ir.Node) -> bool:
    """Ba et al. 2016 over the last axis, as d/s·γ + β or, as Keras writes it, x·(γ/s) + (β - mean·(γ/s))."""
    if not G.is_op(node, "Add", "Sub"):
        return False
    for left, right in _operands(node.outputs[0], node.op_type):
        found = _plain(left, right) if node.op_type == "Add" else None
        found = found or (_split(left, right) if node.op_type == "Add" else None)
        if found is None:
            continue
        x, scale, offset, epsilon = found
        size = None if G.dims(x) is None else (G.dims(x) or ())[-1]
        gamma, beta = _row(scale, size), None if offset is None else _row(offset, size)
        if (
            gamma is None
            or (beta is None and offset is not None)
            or x.dtype != ir.DataType.FLOAT
            or G.dims(x) != G.dims(node.outputs[0])
        ):
            continue
        graph, name = G.graph_of(node), node.name
        inputs = [x, G.new_constant(graph, f"{name}/scale", gamma)]
        inputs += [] if beta is None else [G.new_constant(graph, f"{name}/bias", beta)]
        G.become(node, "LayerNormalization", inputs, axis=-1, epsilon=epsilon)
        return True
    return False


_Norm = tuple[ir.Value, ir.Value, ir.Value | None, float]  # x, scale, offset, epsilon


def _plain(product: ir.Value, offset: ir.Value) -> _Norm | None:
    """d/s·γ + β."""
    for normal, scale in _operands(product, "Mul"):
        quotient = normal.producer()
        if G.array(scale) is None or quotient is None or len(quotient.inputs) != 2:
            continue
        for d, s in _operands(normal, "Div"):
            found = _deviation(s)
            if found is not None and found[1] is d:
                return found[0], scale, offset, found[3]
        for d, inverse in _operands(normal, "Mul"):
            found = _deviation(_argument(inverse, "Reciprocal"))
            if found is not None and found[1] is d:
                return found[0], scale, offset, found[3]
    return None


def _split(product: ir.Value, rest: ir.Value) -> _Norm | None:
    """x·m + (β - mean·m) with m = γ/s; β may be missing."""
    for x, m in _operands(product, "Mul"):
        for inverse, scale in _operands(m, "Mul"):
            found = _deviation(_argument(inverse, "Reciprocal"))
            if G.array(scale) is None or found is None or found[0] is not x:
                continue
            shifts = [(rest, None), *_operands(rest, "Add")]
            for shift, offset in shifts:
                for a, b in _operands(shift, "Mul"):
                    if b is m and _argument(a, "Neg") is found[2]:
                        return x, scale, offset, found[3]
            for offset, shift in _operands(rest, "Sub"):
                if any(a is found[2] and b is m for a, b in _operands(shift, "Mul")):
                    return x, scale, offset, found[3]
    return None


def _deviation(s: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value, float] | None:
    """(x, x - mean, mean, ε) if s = √(mean((x - mean)²) + ε) over the last axis."""
    for variance, epsilon in _operands(_argument(s, "Sqrt"), "Add"):
        number, squares = _scalar(epsilon), _mean_of(variance)
        if number is None or squares is None:
            continue
        root = [a for a, b in _operands(squares, "Mul") if a is b]
        root += [a for a, b in _operands(squares, "Pow") if _scalar(b) == 2]
        for d in root:
            for x, mean in _operands(d, "Sub"):
                if _mean_of(mean) is x:
                    return x, d, mean, number
    return None


def _mean_of(value: ir.Value | None) -> ir.Value | None:
    """What the value is the mean of, along the last axis, which it keeps."""
    node = None if value is None else value.producer()
    x = None if node is None or not node.inputs else node.inputs[0]
    if node is None or x is None or x.shape is None:
        return None
    rank = len(x.shape)
    if G.is_op(node, "GlobalAveragePool"):
        return x if rank == 3 else None
    if not G.is_op(node, "ReduceMean") or not G.integer(node, "keepdims", 1) or len(node.inputs) < 2:
        return None
    axes = G.array(node.inputs[1])
    return x if axes is not None and axes.tolist() in ([-1], [rank - 1]) else None


# --- reading --------------------------------------------------------------------------------------
def _operands(value: ir.Value | None, op_type: str) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two operands of the node that computes the value, in both orders if the operator commutes."""
    node = None if value is None else value.producer()
    if node is None or not G.is_op(node, op_type) or len(node.inputs) != 2:
        return
    first, second = node.inputs
    if first is None or second is None:
        return
    yield first, second
    if op_type in ("Add", "Mul"):
        yield second, first


def _argument(value: ir.Value | None, op_type: str) -> ir.Value | None:
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and G.is_op(node, op_type) else None


def _scalar(value: ir.Value | None) -> float | None:
    """A constant of one element that broadcasts without adding axes worth keeping."""
    constant = G.array(value)
    if value is None or constant is None or constant.size != 1 or constant.dtype.kind not in "fiu":
        return None
    if constant.ndim > 1 and not all(_as_deep(use.node, value, constant.ndim) for use in value.uses()):
        return None
    return float(constant.reshape(()))


def _as_deep(reader: ir.Node, constant: ir.Value, rank: int) -> bool:
    """Whether the reader's other operand is known to have at least as many axes."""
    others = [v.shape for v in reader.inputs if v is not None and v is not constant]
    return any(shape is not None and len(shape) >= rank for shape in others)


def _row(value: ir.Value, size: int | str | None) -> G.Array | None:
    """A constant that varies along the last axis only, as float32 of that size."""
    constant = G.array(value)
    if constant is None or not isinstance(size, int) or constant.size not in (1, size):
        return None
    if constant.ndim and constant.shape[-1] != constant.size:
        return None
    return np.broadcast_to(constant.reshape(-1), (size,)).astype(np.float32)


def _near(number: float | None, expected: float) -> bool:
    return number is not None and abs(number - expected) <= _CLOSE * abs(expected)
