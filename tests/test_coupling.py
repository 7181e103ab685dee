"""Which channels go together, on graphs made by hand and on real exports; and that cutting them is exact."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser

from edgekit import model as M
from edgekit import pipeline
from edgekit.passes import surgery
from edgekit.passes.coupling import Coupling, Meter, components
from edgekit.passes.coupling_trace import trace
from edgekit.passes.fold import Fold
from tests import coupling_graphs as C
from tests.models import MODELS, attention
from tests.quantize_graphs import Array, graph, node, normal
from tests.test_sources_keras import keras_python  # noqa: F401 (a fixture)

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def traced(model: Any) -> Coupling:
    return trace(surgery.ready(model))


def families(model: Any) -> dict[str, tuple[int, str]]:
    """By name: how many units, and why none of them may go."""
    return {f.name: (len(f.units), f.frozen) for f in traced(model).families()}


def free(model: Any) -> dict[str, int]:
    return {name: units for name, (units, frozen) in families(model).items() if not frozen}


def conv(x: str, y: str, **attributes: Any) -> Any:
    return node("Conv", [x, f"w{y}"], [y], name=y, **attributes)


# --- random graphs --------------------------------------------------------------------------------------------------
@PATIENT
@given(C.networks(), st.integers(0, 99))
def test_cut_channels_are_as_if_nothing_read_them(network: tuple[Any, int], seed: int) -> None:
    model, inputs = network
    C.check_cut(model, C.sample(inputs), seed)


@pytest.mark.parametrize("kind", sorted(C.OWN))
def test_each_construct_lets_channels_go(kind: str) -> None:
    """Not one of the drawn graphs is cut exactly only because nothing is cut."""
    gone = []

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    @given(C.networks((kind,)))
    def each(network: tuple[Any, int]) -> None:
        gone.append(C.check_cut(network[0], C.sample(network[1])))

    each()
    assert max(gone) > 0


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_of_every_shape(name: str) -> None:
    model = MODELS[name]()
    C.check_cut(model, M.seeded_inputs(M.signature(model), M.batch_of(M.signature(model)) or 2))


# --- families -------------------------------------------------------------------------------------------------------
def test_a_residual_block_is_one_family() -> None:
    model = graph(
        [conv("x", "a"), conv("a", "b"), node("Relu", ["b"], ["r"]), conv("r", "c"), node("Add", ["a", "c"], ["s"]),
         conv("s", "y")],
        {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(4, 3, 1, 1), "wb": normal(6, 4, 1, 1), "wc": normal(4, 6, 1, 1), "wy": normal(2, 4, 1, 1)},
    )  # fmt: skip
    found = traced(model)
    assert families(model) == {"a": (4, ""), "b": (6, ""), "y": (2, "output 'y' of the model")}
    first = found.families()[0]
    sites = {(s.node, s.axis, s.role) for s in found.sites if set(found.roots(s.labels)) == set(first.units)}
    assert sites == {("a", 0, "out"), ("b", 1, "in"), ("c", 0, "out"), ("y", 1, "in")}


def test_a_squeeze_and_excite_gate_goes_with_its_channels() -> None:
    model = graph(
        [conv("x", "a"), node("GlobalAveragePool", ["a"], ["p"]), conv("p", "b"), node("Relu", ["b"], ["r"]),
         conv("r", "c"), node("Sigmoid", ["c"], ["g"]), node("Mul", ["a", "g"], ["m"]), conv("m", "y")],
        {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(4, 3, 1, 1), "wb": normal(2, 4, 1, 1), "wc": normal(4, 2, 1, 1), "wy": normal(2, 4, 1, 1)},
    )  # fmt: skip
    assert free(model) == {"a": 4, "b": 2}


def heads(width: int = 8, count: int = 4, *, scores: bool = False) -> Any:
    """Self-attention of `count` heads; scores: the model gives its attention maps too."""
    depth = width // count
    cut = """
          kk = MatMul(x, wk)  kh = Reshape(kk, apart)  kt = Transpose<perm=[0,2,3,1]>(kh)
          qq = MatMul(x, wq)  qh = Reshape(qq, apart)  qt = Transpose<perm=[0,2,1,3]>(qh)
          vv = MatMul(x, wv)  vh = Reshape(vv, apart)  vt = Transpose<perm=[0,2,1,3]>(vh)
          s = MatMul(qt, kt)  p = Softmax<axis=-1>(s)  o = MatMul(p, vt)
          ot = Transpose<perm=[0,2,1,3]>(o)  om = Reshape(ot, whole)  y = MatMul(om, wo) }"""
    outputs = f"float[n,5,{width}] y" + (f", float[n,{count},5,5] p" if scores else "")
    proto = parser.parse_graph(f"g (float[n,5,{width}] x) => ({outputs}) {{{cut}")
    arrays = {w: normal(width, width, seed=i) for i, w in enumerate(("wk", "wq", "wv", "wo"))}
    arrays |= {"apart": np.array([0, 5, count, depth]), "whole": np.array([0, 5, width])}
    proto.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return M.from_proto(onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))


def test_heads_go_whole() -> None:
    assert list(free(heads()).values()) == [4]


def test_heads_whose_maps_are_an_output_stay() -> None:
    """What may go then is a position in the depth of all heads' values."""
    found = families(heads(scores=True))
    assert [units for units, why in found.values() if not why] == [2]
    assert "no weights read these channels" in [why for _, why in found.values()]


def test_one_head_without_an_axis_keeps_what_it_contracts() -> None:
    """Values may go (the sum with the input keeps these); queries and keys meet no weights."""
    assert not free(attention())


def test_every_channel_of_a_shuffled_group_pair() -> None:
    """Of a split axis the one with more units keeps its labels: pairs of channels, not whole groups."""
    model = graph(
        [conv("x", "a"), node("Reshape", ["a", "apart"], ["r"]), node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3, 4]),
         node("Reshape", ["t", "whole"], ["z"]), conv("z", "y")],
        {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(8, 3, 1, 1), "wy": normal(2, 8, 1, 1), "apart": np.array([0, 2, 4, 5, 5]),
         "whole": np.array([0, 8, 5, 5])},
    )  # fmt: skip
    assert free(model) == {"a": 4}


def test_positions_of_a_pixel_share_a_channel() -> None:
    for mode, like in (("DCR", [0, 1, 2] * 4), ("CRD", [0] * 4 + [1] * 4 + [2] * 4)):
        model = graph(
            [conv("x", "a"), node("DepthToSpace", ["a"], ["d"], blocksize=2, mode=mode), conv("d", "y")],
            {"x": ["n", 3, 2, 2]}, {"y": ["n", 2, 4, 4]}, {"wa": normal(12, 3, 1, 1), "wy": normal(2, 3, 1, 1)},
        )  # fmt: skip
        found = traced(model)
        assert np.unique(found.roots(found.on["a"][1]), return_inverse=True)[1].tolist() == like


def test_layers_that_share_weights_are_cut_alike() -> None:
    nodes = [conv("x", "a"), node("Conv", ["a", "ws"], ["b"]), node("Conv", ["b", "ws"], ["c"]), conv("c", "y")]
    model = graph(
        nodes, {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(4, 3, 1, 1), "ws": normal(4, 4, 1, 1), "wy": normal(2, 4, 1, 1)},
    )  # fmt: skip
    ready = surgery.ready(model)
    found = trace(ready)
    assert [len(f.units) for f in found.families() if not f.frozen] == [4]
    cut = surgery.cut(ready, found, found.without(found.families()[0].units[:1]))
    shared = {n.inputs[1].name for n in cut.graph if n.name not in ("a", "y")}
    assert len(shared) == 1  # one array still
    assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0


# --- what stays -----------------------------------------------------------------------------------------------------
STAYS: dict[str, tuple[list[Any], str]] = {
    "an unknown one": ([node("Hardmax", ["a"], ["z"], name="odd", axis=1)], "Hardmax node 'odd' is not understood"),
    "another domain": ([node("Relu", ["a"], ["z"], name="odd", domain="ours")], "Relu node 'odd' is not understood"),
    "the norm over channels": ([node("LRN", ["a"], ["z"], name="odd", size=3)], "LRN node 'odd' is not understood"),
    "softmax": ([node("Softmax", ["a"], ["z"], name="s", axis=1)], "Softmax node 's' works along that axis"),
    "a mean over channels": (
        [node("ReduceMean", ["a", "one"], ["m"], name="m"), node("Add", ["a", "m"], ["z"])],
        "ReduceMean node 'm' works along that axis",
    ),
    "a sum with an input": ([node("Add", ["a", "u"], ["z"])], "meets a value whose channels stay"),
    "padded channels": ([node("Pad", ["a", "pads"], ["z"], name="p")], "Pad node 'p' works along that axis"),
    "reversed channels": (
        [node("Slice", ["a", "m1", "m9", "one", "m1"], ["z"], name="s")],
        "Slice node 's' is not understood",
    ),
    "picked channels": (
        [node("Gather", ["a", "order"], ["z"], name="g", axis=1)],
        "Gather node 'g' picks some",
    ),
    "their number": (
        [node("Shape", ["a"], ["s"], name="s", start=-3), node("Cast", ["s"], ["f"], to=1),
         node("ReduceSum", ["f"], ["t"]), node("Mul", ["a", "t"], ["z"])],
        "Shape node 's' is not understood",
    ),
    "indices of a pool": (
        [node("MaxPool", ["a"], ["z", "where"], name="p", kernel_shape=[1, 1])],
        "MaxPool node 'p' is not understood",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(STAYS))
def test_what_is_not_understood_stays_with_its_reason(what: str) -> None:
    nodes, why = STAYS[what]
    made = {o for n in nodes for o in n.output}
    shape = {"padded channels": 6}.get(what, 4)
    weights = {
        "wa": normal(4, 3, 1, 1), "wy": normal(2, shape, 1, 1), "one": np.array([1]), "m1": np.array([-1]),
        "m9": np.array([-9]), "order": np.array([2, 0, 1, 3]), "pads": np.array([0, 1, 0, 0, 0, 1, 0, 0]),
    }  # fmt: skip
    used = {i for n in nodes for i in n.input} | {"wa", "wy"}
    inputs: dict[str, Any] = {"x": ["n", 3, 5, 5]} | ({"u": ["n", 4, 5, 5]} if "u" in used else {})
    model = M.from_proto(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [conv("x", "a"), *nodes, conv("z", "y")],
                "g",
                [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in inputs.items()],
                [onnx.helper.make_tensor_value_info("y", 1, ["n", 2, 5, 5])]
                + ([onnx.helper.make_tensor_value_info("where", 7, ["n", 4, 5, 5])] if "where" in made else []),
                [onnx.numpy_helper.from_array(a, n) for n, a in weights.items() if n in used],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("ours", 1)],
            ir_version=10,
        )
    )
    assert families(model)["a"] == (4, why)


@pytest.mark.parametrize("kind", ["If", "Loop"])
def test_what_a_branch_or_loop_reads_stays(kind: str) -> None:
    bodies = {
        "If": """z = If(yes) <then_branch = t () => (float[n,4,5,5] u) { u = Relu(a) },
                             else_branch = e () => (float[n,4,5,5] v) { v = Exp(a) }>""",
        "Loop": """z = Loop(twice, yes, x4) <body = l (int64 i, bool c, float[n,4,5,5] before)
                             => (bool d, float[n,4,5,5] after) { d = Identity(c)  after = Add(before, a) }>""",
    }
    proto = parser.parse_graph(
        f"""g (float[n,3,5,5] x, float[n,4,5,5] x4) => (float[n,2,5,5] y) {{
          a = Conv(x, wa)  {bodies[kind]}  b = Conv(z, wb)  r = Relu(b)  y = Conv(r, wy) }}"""
    )
    arrays = {
        "wa": normal(4, 3, 1, 1), "wb": normal(5, 4, 1, 1), "wy": normal(2, 5, 1, 1), "yes": np.array(True),
        "twice": np.array(2),
    }  # fmt: skip
    proto.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    for made in proto.node:
        made.name = made.output[0]
    model = M.from_proto(onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))
    assert families(model)["a"] == (4, f"control flow: {kind} node 'z'")
    if kind == "If":
        assert free(model) == {"b": 5}
        assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0
    else:  # what a loop gives has sizes that nobody knows
        assert families(model)["b"] == (5, "Relu node 'r' has a result of unknown sizes")


def test_one_channel_alone_stays() -> None:
    """A spatial gate, which broadcasts over the channels that it multiplies."""
    model = graph(
        [conv("x", "a"), conv("a", "b"), node("Sigmoid", ["b"], ["s"]), node("Mul", ["a", "s"], ["m"]),
         node("Concat", ["m", "b"], ["z"], axis=1), conv("z", "y")],
        {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(4, 3, 1, 1), "wb": normal(1, 4, 1, 1), "wy": normal(2, 5, 1, 1)},
    )  # fmt: skip
    assert families(model)["b"] == (1, "a single channel")
    assert free(model) == {"a": 4}


def test_a_part_that_would_be_empty_is_named() -> None:
    model = graph(
        [conv("x", "a"), node("Split", ["a", "parts"], ["s", "t"], axis=1), conv("s", "b"), conv("t", "c"),
         node("Add", ["b", "c"], ["y"])],
        {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(6, 3, 1, 1), "wb": normal(2, 2, 1, 1), "wc": normal(2, 4, 1, 1), "parts": np.array([2, 4])},
    )  # fmt: skip
    found = traced(model)
    units = next(f.units for f in found.families() if f.name == "a")
    assert found.emptied(found.without(units[:2])) == "s"
    assert found.emptied(found.without(units[[0, 2]])) == ""


def test_a_size_that_counts_no_channels_is_left() -> None:
    """A Resize along an axis of tokens, beside one of channels."""
    model = graph(
        [conv("x", "a"), node("Reshape", ["a", "flat"], ["f"]), node("MatMul", ["f", "wm"], ["m"], name="m"),
         node("Reshape", ["m", "image"], ["i"]), node("Resize", ["i", "", "", "to"], ["z"], axes=[2, 3], mode="linear"),
         node("MatMul", ["z", "wy"], ["y"], name="y")],
        {"x": ["n", 3, 2, 2]}, {"y": ["n", 1, 7, 2]},
        {"wa": normal(6, 3, 1, 1), "wm": normal(4, 5), "wy": normal(5, 2), "flat": np.array([0, 6, 4]),
         "image": np.array([0, 1, 6, 5]), "to": np.array([7, 5])},
    )  # fmt: skip
    assert free(model) == {"m": 5}
    assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0


# --- numbers --------------------------------------------------------------------------------------------------------
@given(st.integers(1, 40), st.data())
def test_components_are_those_of_a_walk(count: int, data: st.DataObject) -> None:
    number = st.integers(0, count - 1)
    edges = data.draw(st.lists(st.tuples(number, number), max_size=60))
    wanted = np.arange(count)
    for _ in range(count):
        for a, b in edges:
            wanted[a] = wanted[b] = min(wanted[a], wanted[b])
    pairs = [(np.array([a]), np.array([b])) for a, b in edges]
    np.testing.assert_array_equal(components(count, pairs), wanted)


def test_parameters_are_counted_as_cut() -> None:
    model = surgery.ready(MODELS["cnn_nchw"]())
    found = trace(model)
    constants = {f"{s.node}:{s.position}" for s in found.sites}
    nodes = {n.name: n for n in model.graph}

    def counted(of: Any) -> dict[str, Array]:
        return {c: of[c.split(":")[0]].inputs[int(c.split(":")[1])].const_value.numpy() for c in constants}

    meter = Meter(found, {c: a.shape for c, a in counted(nodes).items()})
    keep = C.chosen(found, np.random.default_rng(0))
    cut = surgery.cut(model, found, keep)
    assert not keep.all()
    assert meter.parameters(keep) == pytest.approx(
        sum(a.size for a in counted({n.name: n for n in cut.graph}).values())
    )


# --- real exports ---------------------------------------------------------------------------------------------------
def torch_like(*, fixed: bool) -> Any:
    """NCHW with sizes gathered while it runs, as torch exports `x.view(x.size(0), -1)` and heads."""
    batch = "2" if fixed else "n"
    proto = parser.parse_graph(
        f"""g (float[{batch},3,8,8] x) => (float[{batch},5] y) {{
          a = Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(x, wa, ba)  r = Relu(a)
          p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r)
          b = Conv<kernel_shape=[3,3],pads=[1,1,1,1],group=2>(p, wb)  q = Clip(b, lo, hi)
          sh = Shape(q)  first = Gather<axis=0>(sh, zero)  row = Unsqueeze(first, axes)
          to = Concat<axis=0>(row, rest)  f = Reshape(q, to)  d = Gemm<transB=1>(f, wd, bd)  e = Relu(d)
          y = Gemm<transB=1>(e, wy, by) }}"""
    )
    arrays = {
        "wa": normal(8, 3, 3, 3), "ba": normal(8), "wb": normal(12, 4, 3, 3), "wd": normal(10, 192), "bd": normal(10),
        "wy": normal(5, 10), "by": normal(5), "lo": np.float32(0), "hi": np.float32(6), "zero": np.array(0),
        "axes": np.array([0]), "rest": np.array([-1]),
    }  # fmt: skip
    proto.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items())
    return M.from_proto(onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize("fixed", [False, True])
def test_torch_like_graphs(fixed: bool) -> None:
    model = Fold()(torch_like(fixed=fixed), None)
    assert sorted(free(model).values()) == [4, 6, 10]  # pairs of the two groups, positions of both groups, neurons
    assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0


_KERAS = """
import sys, keras
from keras import layers as L
image = keras.Input((12, 12, 3), name="image")
x = L.Conv2D(8, 3, padding="same", use_bias=False)(image)
x = start = L.ReLU(6.0)(L.BatchNormalization()(x))
x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=1)(L.Conv2D(24, 1)(x))
x = L.ReLU(6.0)(L.BatchNormalization()(x))
gate = L.Conv2D(6, 1, activation="relu")(L.GlobalAveragePooling2D(keepdims=True)(x))
gate = L.Conv2D(24, 1, activation="hard_sigmoid")(gate)
x = L.Add()([start, L.Conv2D(8, 1)(L.Multiply()([x, gate]))])
x = L.Dense(10, activation="relu")(L.Flatten()(L.Conv2D(7, 3, strides=2, activation="silu")(x)))
words = keras.Input((7, 16), name="words")
h = L.Add()([words, L.MultiHeadAttention(4, 8)(L.LayerNormalization()(words), words)])
h = L.Add()([h, L.Dense(16)(L.Dense(32, activation="gelu")(L.LayerNormalization()(h)))])
h = L.Bidirectional(L.LSTM(5))(h)
keras.Model([image, words], L.Dense(3)(L.Concatenate()([x, h]))).save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_keras_model_of_most_layers(keras_python: str, tmp_path: Path) -> None:  # noqa: F811 (the fixture)
    path = tmp_path / "model.keras"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([keras_python, "-c", _KERAS, str(path)], check=True, capture_output=True, env=environment)
    model = Fold()(pipeline.load(path).model, None)
    # heads, neurons, hidden units, the residual pair, the expanded channels, the gate, a layer, neurons
    assert sorted(free(model).values()) == sorted([4, 32, 5, 8, 24, 6, 7, 10])
    assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0


@pytest.mark.parametrize(
    "name",
    ["mobilenet_v2_cifar", "mlp_784_mnist", "lstm_mnist_rows", "dcgan_mnist_generator", "gpt_char_tinyshakespeare"],
)
def test_zoo(zoo: Path, name: str) -> None:
    model = Fold()(pipeline.load(zoo / "models" / f"{name}.onnx").model, None)
    kept = families(model)
    layers = [
        n for n, (_, why) in kept.items() if why and not why.startswith(("output", "LayerNormalization", "a single"))
    ]
    assert not layers
    assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0
