"""ONNX operators that work on each element, as Keras layers and functions: activations, arithmetic, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.sources.keras_plan import Ref, View, refused

if TYPE_CHECKING:
    from edgekit.sources.keras_lower import Lowering

Rule = Callable[["Lowering", ir.Node], None]
_SIXTH = 1 / 6  # slope of Keras's hard sigmoid; ONNX's default is another


# --- one operand ----------------------------------------------------------------------------------------------------
def _activation(function: str) -> Rule:
    def rule(low: Lowering, node: ir.Node) -> None:
        low.put(node, low.activation(node, low.view(node), function))

    return rule


def _function(function: str) -> Rule:
    def rule(low: Lowering, node: ir.Node) -> None:
        given = low.view(node)
        low.put(node, View(low.call(function, Ref(given.ref)), given.dims, given.groups))

    return rule


def _layer(low: Lowering, node: ir.Node, kind: str, **config: Any) -> None:
    given = low.view(node)
    low.put(node, View(low.named(kind, given.ref, node, [], **config), given.dims, given.groups))


def _leaky(low: Lowering, node: ir.Node) -> None:
    _layer(low, node, "LeakyReLU", negative_slope=G.number(node, "alpha", 0.01))


def _elu(low: Lowering, node: ir.Node) -> None:
    _layer(low, node, "ELU", alpha=G.number(node, "alpha", 1.0))


def _gelu(low: Lowering, node: ir.Node) -> None:
    if G.text(node, "approximate", "none") == "none":
        low.put(node, low.activation(node, low.view(node), "gelu"))
        return
    given = low.view(node)
    low.put(node, View(low.call("gelu", Ref(given.ref), approximate=True), given.dims, given.groups))


def _hard_sigmoid(low: Lowering, node: ir.Node) -> None:
    alpha, beta, given = G.number(node, "alpha", 0.2), G.number(node, "beta", 0.5), low.view(node)
    if abs(alpha - _SIXTH) < 1e-6 and beta == 0.5:
        low.put(node, low.activation(node, given, "hard_sigmoid"))
        return
    line = low.call("add", Ref(low.call("multiply", Ref(given.ref), alpha)), beta)
    low.put(node, View(low.call("clip", Ref(line), 0.0, 1.0), given.dims, given.groups))


def _clip(low: Lowering, node: ir.Node) -> None:
    least, most = (low.constant(node, i) for i in (1, 2))
    low_end = None if least is None else float(least.item())
    high_end = None if most is None else float(most.item())
    given = low.view(node)
    if low_end == 0.0 and (high_end is None or high_end > 0):
        _layer(low, node, "ReLU", **({} if high_end is None else {"max_value": high_end}))
        return
    ref = given.ref
    if low_end is not None and high_end is not None:
        ref = low.call("clip", Ref(ref), low_end, high_end)
    elif low_end is not None or high_end is not None:
        end = low_end if low_end is not None else high_end
        ref = low.call("maximum" if low_end is not None else "minimum", Ref(ref), end)
    low.put(node, View(ref, given.dims, given.groups))


def _prelu(low: Lowering, node: ir.Node) -> None:
    """Slopes for each channel become a PReLU layer, which shares them along the other axes."""
    given, slope = low.separate(low.view(node)), low.weight(node, 1)
    rank = len(given.groups)
    if slope is None or slope.values.ndim > rank:
        raise refused("PRelu", node.name, "its slopes have more axes than the value")
    shape = (1,) * (rank - slope.values.ndim) + slope.values.shape
    if shape[0] != 1:
        raise refused("PRelu", node.name, "it has a slope for each sample")
    axes = {given.single(a): size for a, size in enumerate(shape) if a and given.single(a) is not None}
    sizes = [axes.get(i, 1) for i in range(1, len(given.dims))]
    order = sorted((a for a in range(rank) if given.single(a) is not None), key=lambda a: given.groups[a][0])
    moved = slope.moved(lambda v: v.reshape(shape).transpose([*order, *(set(range(rank)) - set(order))]).reshape(sizes))
    shared = [i + 1 for i, size in enumerate(sizes) if size == 1]
    ref = low.named("PReLU", given.ref, node, [moved], shared_axes=shared)
    low.put(node, View(ref, given.dims, given.groups))


def _softmax(function: str) -> Rule:
    def rule(low: Lowering, node: ir.Node) -> None:
        given = low.view(node)
        axis = G.integer(node, "axis", -1) % len(given.groups)
        if given.single(axis) is None:
            given = low.separate(given)
        at = given.single(axis)
        if at is None:
            raise refused(node.op_type, node.name, "it runs over an axis of size 1")
        last = at == len(given.dims) - 1
        if function == "softmax" and last:
            low.put(node, low.activation(node, given, "softmax"))
            return
        if function == "softmax":
            low.put(node, View(low.named("Softmax", given.ref, node, [], axis=at), given.dims, given.groups))
            return
        low.put(node, View(low.call(function, Ref(given.ref), axis=at), given.dims, given.groups))

    return rule


def _cast(low: Lowering, node: ir.Node) -> None:
    given, value = low.view(node), node.inputs[0]
    to = ir.DataType(G.integer(node, "to", 1))
    if value is not None and value.dtype == to:
        low.put(node, given)
        return
    low.put(node, View(low.call("cast", Ref(given.ref), dtype=to.numpy().name), given.dims, given.groups))


def _same(low: Lowering, node: ir.Node) -> None:
    low.put(node, low.view(node))


# --- several operands -----------------------------------------------------------------------------------------------
# Layers for what is computed, with tensors of equal size: they show in a summary; functions for everything else.
_LAYERS = {"add": "Add", "multiply": "Multiply", "subtract": "Subtract"}


def _combined(function: str) -> Rule:
    def rule(low: Lowering, node: ir.Node) -> None:
        operands = [v for i in range(len(node.inputs)) if (v := low.operand(node, i)) is not None]
        ready, out = low.aligned(operands, low.shape(node.outputs[0]))
        tensors = [r for r in ready if isinstance(r, str)]
        ranks = {len(v.groups) for v in operands if isinstance(v, View)}
        if function in _LAYERS and len(tensors) == len(ready) == 2 and len(set(tensors)) == 2 and len(ranks) == 1:
            low.put(node, View(low.named(_LAYERS[function], tensors, node, []), out.dims, out.groups))
            return
        given: list[Any] = [Ref(r) if isinstance(r, str) else _plain(r) for r in ready]
        ref = given[0]
        for other in given[1:]:
            ref = Ref(low.call(function, ref, other))
        low.put(node, View(ref.name, out.dims, out.groups))

    return rule


def _divided(low: Lowering, node: ir.Node) -> None:
    whole = np.issubdtype(node.outputs[0].dtype.numpy(), np.integer) if node.outputs[0].dtype is not None else False
    if whole:
        raise refused("Div", node.name, "it divides integers")
    _combined("divide")(low, node)


def _where(low: Lowering, node: ir.Node) -> None:
    operands = [v for i in range(3) if (v := low.operand(node, i)) is not None]
    ready, out = low.aligned(operands, low.shape(node.outputs[0]))
    given = [Ref(r) if isinstance(r, str) else r for r in ready]
    low.put(node, View(low.call("where", *given), out.dims, out.groups))


def _plain(array: Any) -> Any:
    """A number where the array is one."""
    return array.item() if array.ndim == 0 else array


RULES: dict[str, Rule] = {
    **{
        op: _activation(name)
        for op, name in {
            "Sigmoid": "sigmoid", "Tanh": "tanh", "HardSwish": "hard_silu", "Softplus": "softplus",
            "Softsign": "softsign", "Selu": "selu", "Mish": "mish", "Relu": "relu",
        }.items()
    },
    **{
        op: _function(name)
        for op, name in {
            "Erf": "erf", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Abs": "absolute", "Neg": "negative",
            "Reciprocal": "reciprocal", "Sin": "sin", "Cos": "cos", "Floor": "floor", "Ceil": "ceil", "Round": "round",
            "Sign": "sign", "Not": "logical_not",
        }.items()
    },
    **{
        op: _combined(name)
        for op, name in {
            "Add": "add", "Sub": "subtract", "Mul": "multiply", "Pow": "power", "Min": "minimum", "Max": "maximum",
            "Less": "less", "LessOrEqual": "less_equal", "Greater": "greater", "GreaterOrEqual": "greater_equal",
            "Equal": "equal", "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor", "Sum": "add",
        }.items()
    },
    "Div": _divided, "Where": _where, "Clip": _clip, "LeakyRelu": _leaky, "Elu": _elu, "Gelu": _gelu, "PRelu": _prelu,
    "HardSigmoid": _hard_sigmoid, "Softmax": _softmax("softmax"), "LogSoftmax": _softmax("log_softmax"),
    "Cast": _cast, "Identity": _same, "Dropout": _same,
}  # fmt: skip
