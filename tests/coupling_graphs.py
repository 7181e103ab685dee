"""Random graphs of the operators that channels pass, and what a graph computes once some of its channels are unread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import reject
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit import model as M
from edgekit.inspection import inspect
from edgekit.passes import fold_graph as G
from edgekit.passes import surgery
from edgekit.passes.coupling import Coupling, Meter
from edgekit.passes.coupling_trace import trace
from tests import random_graphs
from tests.random_graphs import INPUT, Array, Builder

CLOSE = 1e-5  # relative: the same sums in float32, some terms of 0 left out


# --- one construct each; a value of a shape that does not fit stays as it is ---------------------------------------
def _image(b: Builder) -> bool:
    return len(b.shape) == 3 and b.shape[0] % 2 == 0


def _half(b: Builder, value: str, start: int) -> str:
    channels, *size = b.values[value]
    far = b.pick(channels, 2**62) if start else b.pick(channels // 2, channels // 2 - channels)
    bounds = [b.constant([start]), b.constant([far]), b.constant([1])]
    return b.add("Slice", [value, *bounds], (channels // 2, *size))


def gated(b: Builder) -> None:
    """A gated linear unit: one half times the sigmoid of the other, by Slice or by Split."""
    if not _image(b):
        return
    channels, *size = b.shape
    half = (channels // 2, *size)
    if b.draw(st.booleans()):
        x, first, second = b.at, b.fresh("first"), b.fresh("second")
        parts = [b.constant([channels // 2] * 2)] if b.draw(st.booleans()) else []
        counted = {} if parts else {"num_outputs": 2}
        b.nodes.append(
            helper.make_node("Split", [x, *parts], [first, second], name=f"Split_{first}", axis=1, **counted)
        )
        b.values |= {first: half, second: half}
    else:
        x = b.at
        first, second = _half(b, x, 0), _half(b, x, channels // 2)
    b.add("Sigmoid", [second], half)
    b.add("Mul", [first, b.at], half)


def crossed(b: Builder) -> None:
    """A cross-stage block: one part through a convolution, beside the other."""
    if not _image(b):
        return
    channels, *size = b.shape
    x = b.at
    first, second = _half(b, x, 0), _half(b, x, channels // 2)
    made = b.pick(2, 4)
    b.add("Conv", [second, b.weight(made, channels // 2, 1, 1)], (made, *size))
    b.add("Concat", [b.at, first], (made + channels // 2, *size), axis=1)


def shuffle(b: Builder) -> None:
    """ShuffleNet's: channels of all groups, in turn."""
    if not _image(b):
        return
    channels, height, width = b.shape
    b.add("Reshape", [b.at, b.constant([-1, 2, channels // 2, height, width])], (2, channels // 2, height, width))
    b.add("Transpose", [b.at], (channels // 2, 2, height, width), perm=[0, 2, 1, 3, 4])
    b.add("Reshape", [b.at, b.constant([b.pick(-1, 0), channels, height, width])], (channels, height, width))


def bottleneck(b: Builder) -> None:
    """A residual block, its inside grouped, depthwise or whole."""
    if len(b.shape) != 3:
        return
    x, (channels, *size) = b.at, b.shape
    wide = 6
    group = b.pick(1, 2, 3, wide)
    b.add("Conv", [x, b.weight(wide, channels, 1, 1), b.weight(wide)], (wide, *size))
    b.add("Relu", [b.at], (wide, *size))
    b.add("Conv", [b.at, b.weight(wide, wide // group, 3, 3)], (wide, *size), group=group, pads=[1] * 4)
    b.add("Conv", [b.at, b.weight(channels, wide, 1, 1), b.weight(channels)], (channels, *size))
    b.add("Add", [x, b.at], (channels, *size))


def upsampled(b: Builder) -> None:
    """Depth to space of either mode, or the Reshape and Transpose that stand for it; and perhaps back."""
    if len(b.shape) != 3 or int(np.prod(b.shape)) > 150:
        return
    _, height, width = b.shape
    made, way = 3, b.pick("DCR", "CRD", "apart")
    b.add("Conv", [b.at, b.weight(made * 4, b.shape[0], 1, 1), b.weight(made * 4)], (made * 4, height, width))
    large = (made, 2 * height, 2 * width)
    if way == "apart":
        split = (made, 2, 2, height, width)
        b.add("Reshape", [b.at, b.constant([-1, *split])], split)
        b.add("Transpose", [b.at], (made, height, 2, width, 2), perm=[0, 1, 4, 2, 5, 3])
        b.add("Reshape", [b.at, b.constant([-1, *large])], large)
    else:
        b.add("DepthToSpace", [b.at], large, blocksize=2, mode=way)
    if b.draw(st.booleans()):
        b.add("SpaceToDepth", [b.at], (made * 4, height, width), blocksize=2)


def normalized(b: Builder) -> None:
    if len(b.shape) < 2:
        return
    channels = b.shape[0]
    if b.draw(st.booleans()):
        b.add("InstanceNormalization", [b.at, b.weight(channels), b.weight(channels)], b.shape, epsilon=0.1)
    else:
        spread = b.constant(np.random.default_rng(b.seed).uniform(0.5, 2, channels), np.float32)
        b.add("BatchNormalization", [b.at, *(b.weight(channels) for _ in range(3)), spread], b.shape)


def resized(b: Builder) -> None:
    if len(b.shape) != 3 or int(np.prod(b.shape)) > 150:
        return
    channels, height, width = b.shape
    to = b.constant([height + 1, width])
    b.add("Resize", [b.at, "", "", to], (channels, height + 1, width), axes=[2, 3], mode="linear")


def reduced(b: Builder) -> None:
    """Means and the like over the last axis, spread again by Expand."""
    if len(b.shape) < 2:
        return
    op, shape = b.pick("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"), b.shape
    b.add(op, [b.at, b.constant([b.pick(-1, len(shape))])], (*shape[:-1], 1), keepdims=1)
    if b.draw(st.booleans()):
        target = b.pick([1, *shape], [1] * len(shape) + [shape[-1]])
        b.add("Expand", [b.at, b.constant(target)], shape)


def dense(b: Builder) -> None:
    """Flatten of either layout, and a product over all channels of all positions."""
    if len(b.shape) != 3:
        return
    channels, height, width = b.shape
    if b.draw(st.booleans()):
        b.add("Transpose", [b.at], (height, width, channels), perm=[0, 2, 3, 1])
    size = channels * height * width
    if b.draw(st.booleans()):
        b.add("Flatten", [b.at], (size,), axis=1)
    else:
        b.add("Reshape", [b.at, b.constant(b.pick([-1, size], [0, -1]))], (size,))
    made = b.pick(4, 6)
    b.add("Gemm", [b.at, b.weight(made, size), b.weight(made)], (made,), transB=1)


def _tokens(b: Builder) -> tuple[int, int]:
    """Make the value (tokens, channels), its channels made by a product."""
    if len(b.shape) == 1:
        b.add("Unsqueeze", [b.at, b.constant([1])], (1, *b.shape))
    if len(b.shape) > 2:
        channels, tokens = b.shape[0], int(np.prod(b.shape[1:]))
        b.add("Reshape", [b.at, b.constant([-1, channels, tokens])], (channels, tokens))
        b.add("Transpose", [b.at], (tokens, channels), perm=[0, 2, 1])
    return b.shape[0], b.shape[1]


def _product(b: Builder, value: str, made: int) -> str:
    tokens, channels = b.values[value]
    b.add("MatMul", [value, b.weight(channels, made)], (tokens, made))
    return b.add("Add", [b.at, b.weight(made)], (tokens, made)) if b.draw(st.booleans()) else b.at


def attention(b: Builder) -> None:
    """Multi-head attention: heads on an axis of their own or beside the batch, three products or one, a residual."""
    tokens, channels = _tokens(b)
    x, heads, depth = b.at, b.pick(2, 3), 2
    merged, fused = b.draw(st.booleans()), b.draw(st.booleans())
    cut = (tokens, heads, depth)
    if fused:
        _product(b, x, 3 * heads * depth)
        b.add("Reshape", [b.at, b.constant([-1, tokens, 3, heads, depth])], (tokens, 3, heads, depth))
        # the batch no longer comes first: shapes are written as the builder keeps them, without it
        all_three = b.add("Transpose", [b.at], (heads, tokens, depth), perm=[2, 0, 3, 1, 4])
        parts = [b.add("Gather", [all_three, b.constant(i)], (heads, tokens, depth), axis=0) for i in range(3)]
    else:
        parts = []
        for _ in range(3):
            _product(b, x, heads * depth)
            b.add("Reshape", [b.at, b.constant([-1, *cut])], cut)
            parts.append(b.add("Transpose", [b.at], (heads, tokens, depth), perm=[0, 2, 1, 3]))
    outer, last = (heads, tokens), [0, 1, 3, 2]
    if merged:
        parts = [b.add("Reshape", [p, b.constant([-1, tokens, depth])], (tokens, depth)) for p in parts]
        outer, last = (tokens,), [0, 2, 1]
    query, key, value = parts
    b.add("Transpose", [key], (*outer[:-1], depth, tokens), perm=last)
    b.add("MatMul", [query, b.at], (*outer, tokens))
    b.add("Softmax", [b.at], (*outer, tokens), axis=-1)
    b.add("MatMul", [b.at, value], (*outer, depth))
    if merged:
        b.add("Reshape", [b.at, b.constant([-1, heads, tokens, depth])], (heads, tokens, depth))
    b.add("Transpose", [b.at], cut, perm=[0, 2, 1, 3])
    b.add("Reshape", [b.at, b.constant([b.pick(-1, 0), tokens, heads * depth])], (tokens, heads * depth))
    _product(b, b.at, channels)
    b.add("Add", [b.at, x], (tokens, channels))


def perceptron(b: Builder) -> None:
    """A transformer's block of two products and a residual, perhaps normalized before."""
    tokens, channels = _tokens(b)
    x = b.at
    if b.draw(st.booleans()):
        b.add("LayerNormalization", [x, b.weight(channels), b.weight(channels)], b.shape, axis=-1)
    _product(b, b.at, 6)
    b.add(b.pick("Gelu", "Relu"), [b.at], (tokens, 6))
    _product(b, b.at, channels)
    b.add("Add", [x, b.at], (tokens, channels))


def recurrent(b: Builder) -> None:
    """LSTM, GRU or RNN, one direction or both, all steps or the last state."""
    steps, inputs = _tokens(b)
    op, ways, hidden = b.pick("LSTM", "GRU", "RNN"), b.pick(1, 2), 4
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    b.add("Transpose", [b.at], (steps, inputs), perm=[1, 0, 2])
    arrays = [b.at, b.weight(ways, gates * hidden, inputs), b.weight(ways, gates * hidden, hidden)]
    arrays += [b.weight(ways, 2 * gates * hidden)] if b.draw(st.booleans()) else []
    name = b.fresh("r")
    b.nodes.append(
        helper.make_node(
            op, arrays, [f"{name}_all", f"{name}_last"], name=name, hidden_size=hidden,
            direction="bidirectional" if ways == 2 else "forward",
        )
    )  # fmt: skip
    if b.draw(st.booleans()):
        b.add("Transpose", [f"{name}_all"], (steps, ways, hidden), perm=[2, 0, 1, 3])
        b.add("Reshape", [b.at, b.constant([-1, steps, ways * hidden])], (steps, ways * hidden))
    else:
        b.add("Transpose", [f"{name}_last"], (ways, hidden), perm=[1, 0, 2])
        b.add("Reshape", [b.at, b.constant([-1, ways * hidden])], (ways * hidden,))


def embedded(b: Builder) -> None:
    """A row of a table for the largest position along the last axis."""
    if len(b.shape) < 2:
        return
    b.add("ArgMax", [b.at], b.shape[:-1], axis=-1, keepdims=0)
    b.add("Gather", [b.weight(INPUT[0] * 15, 4), b.at], (*b.shape, 4), axis=0)


OWN: dict[str, Callable[[Builder], None]] = {
    f.__name__: f
    for f in (
        gated, crossed, shuffle, bottleneck, upsampled, normalized, resized, reduced, dense, attention, perceptron,
        recurrent, embedded,
    )
}  # fmt: skip
OPERATORS = {**random_graphs.OPERATORS, **OWN}


@st.composite
def networks(draw: st.DrawFn, kinds: Sequence[str] = (), most: int = 6, fixed: bool | None = None) -> tuple[Any, int]:
    """(model, a seed for its inputs). A layer first, then constructs of these kinds or of any, then a layer.

    fixed: the batch is 3 in the file too, else symbolic.
    """
    b = Builder(draw, draw(st.integers(0, 10**6)))
    b.values["x"] = INPUT
    b.add("Conv", ["x", b.weight(6, INPUT[0], 3, 3), b.weight(6)], (6, *INPUT[1:]), pads=[1] * 4)
    chosen = kinds or draw(st.lists(st.sampled_from((*OWN, *OWN, *OPERATORS)), min_size=1, max_size=most))
    for kind in chosen:
        if int(np.prod(b.shape)) <= 1500:
            OPERATORS[kind](b)
    if len(b.shape) == 3 and draw(st.integers(0, 5)):
        b.add("Conv", [b.at, b.weight(3, b.shape[0], *[1] * (len(b.shape) - 1))], (3, *b.shape[1:]))
    else:
        b.add("MatMul", [b.at, b.weight(b.shape[-1], 3)], (*b.shape[:-1], 3))
    inner = [n for n in b.values if n not in ("x", b.at)]
    model = _model(b, [b.at, draw(st.sampled_from(inner))] if draw(st.integers(0, 5)) == 0 else [b.at])
    if draw(st.booleans()) if fixed is None else fixed:
        model = M.with_batch(model, 3)
    try:
        run(model, sample(b.seed))
        if M.batch_of(M.signature(model)) is None:
            run(model, {"x": sample(b.seed)["x"][:1]})
    except Exception:  # two values that differ in batch only, beside each other: the builder does not see it
        reject()
    return model, b.seed


def sample(seed: int) -> dict[str, Array]:
    """x: float32 (3, 4, 5, 3)."""
    return {"x": np.random.default_rng(seed).normal(size=(3, *INPUT)).astype(np.float32)}


def _model(b: Builder, outputs: Sequence[str]) -> Any:
    """As `Builder.model`, for graphs in which the batch is not always first: outputs are checked by inference alone."""
    graph = helper.make_graph(
        b.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *INPUT])],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in b.weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    onnx.checker.check_model(inferred)
    return M.from_proto(inferred)


# --- what a cut model is compared with -----------------------------------------------------------------------------
def unread(model: Any, coupling: Coupling, keep: Array) -> Any:
    """The `ready` model with zeros in place of the weights that read what goes, and of what two values contract."""
    out = M.clone(model)
    nodes = {n.name: n for n in out.graph}
    for site in coupling.sites:
        if site.role == "in" and not keep[site.labels].all():
            array = np.array(G.array(nodes[site.node].inputs[site.position]))
            np.moveaxis(array, site.axis, 0)[~keep[site.labels]] = 0
            G.set_constant(nodes[site.node], site.position, f"{site.node}/unread", array)
    for node in list(out.graph):
        if node.op_type == "MatMul" and G.array(node.inputs[1]) is None:
            _without(out.graph, node, coupling, keep)
    return out


def _without(graph: Any, node: Any, coupling: Coupling, keep: Array) -> None:
    value = node.inputs[0]
    labels = coupling.axes(value).get(len(value.shape) - 1)
    if labels is None or keep[labels].all():
        return
    mask = G.new_constant(graph, f"{node.name}/mask", keep[labels].astype(np.float32))
    product = ir.node("Mul", [value, mask], name=f"{node.name}/mask")
    graph.insert_before(node, product)
    node.replace_input_with(0, product.outputs[0])


def run(model: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Node by node: no optimization of the runtime may hide or cause a difference."""
    return M.FloatSession(model, optimize=False, threads=1).run(inputs)


def chosen(coupling: Coupling, rng: np.random.Generator) -> Array:
    """bool per label: random units of every family that is not frozen go, never all of a family nor all of a value."""
    gone: list[int] = []
    for family in coupling.families():
        if not family.frozen:
            for unit in rng.permutation(family.units)[: int(rng.integers(1, len(family.units)))]:
                if not coupling.emptied(coupling.without([*gone, int(unit)])):
                    gone.append(int(unit))
    return coupling.without(gone)


def check_cut(model: Any, inputs: Mapping[str, Array], seed: int = 0) -> int:
    """Cut random channels of a model and compare; returns how many labels went."""
    ready = surgery.ready(model)
    coupling = trace(ready)
    same = surgery.cut(ready, coupling, coupling.everything())
    assert weights(same) == weights(ready)
    keep = chosen(coupling, np.random.default_rng(seed))
    cut = surgery.cut(ready, coupling, keep)
    surgery.check(cut)
    assert M.signature(cut) == M.signature(ready)
    wanted, got = run(unread(ready, coupling, keep), inputs), run(cut, inputs)
    for name, value in wanted.items():
        assert M.difference(value, got[name]) <= CLOSE, name
    counted = inspect(cut, backends_too=False)["macs"]
    if counted is not None:
        assert Meter(coupling, {}).macs(keep) == pytest.approx(counted, rel=1e-9)
    return int((~keep).sum())


def weights(model: Any) -> dict[str, bytes]:
    return {n: v.const_value.numpy().tobytes() for n, v in model.graph.initializers.items()}
