"""Keras out: graphs become files that a bare Keras loads, runs alike and trains further; compared with ONNX Runtime."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from onnx import helper, numpy_helper, parser

from edgekit import errors
from edgekit import model as M
from edgekit.passes.fold import Fold
from edgekit.sources import keras_builder
from edgekit.sources.keras_lower import lower
from edgekit.sources.keras_plan import FREE, Ref, View, view
from edgekit.sources.keras_writer import difference, restore, save_batch, save_plan, write_keras
from tests import models
from tests.random_graphs import networks
from tests.test_sources_keras import keras_python  # noqa: F401 (a fixture)

Array = np.ndarray[Any, Any]


def _model(text: str, **weights: Array) -> ir.Model:
    graph = parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return Fold()(M.from_proto(proto), None)


def _normal(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * 0.3).astype(np.float32)


# --- the translation, without Keras ---------------------------------------------------------------------------------
def test_transposes_cancel_and_layers_keep_their_order() -> None:
    """NHWC in, NCHW inside: nothing is moved, and the pool and the Flatten cost no layer."""
    plan = lower(Fold()(models.mobile_nhwc(), None))
    kinds = [s.layer or s.function for s in plan.steps]
    assert kinds == ["Conv2D", "ReLU", "DepthwiseConv2D", "ReLU", "Conv2D", "Add", "GlobalAveragePooling2D", "Dense"]
    assert plan.inputs == (("x", "float32", (None, 10, 10, 3)),)
    assert plan.output_names == ("y",)


def test_flattened_channels_first_permute_the_rows_of_the_dense_layer_instead_of_the_image() -> None:
    plan = lower(
        _model(
            """m (float[n,3,4,5] x) => (float[n,2] y) {
              c = Conv<kernel_shape=[1,1]>(x, w)  f = Flatten(c)  y = Gemm(f, v, b) }""",
            w=_normal(6, 3, 1, 1), v=_normal(120, 2), b=_normal(2),
        )
    )  # fmt: skip
    assert [s.layer for s in plan.steps] == ["Permute", "Conv2D", "Flatten", "Dense"]  # the input is NCHW: one Permute
    dense = plan.steps[-1].weights[0]
    want = _normal(120, 2).reshape(6, 4, 5, 2).transpose(1, 2, 0, 3).reshape(120, 2)
    np.testing.assert_array_equal(dense.values, want)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((FREE, 24), ((0,), (1, 2))),
        ((4 * FREE, 6), ((0, 1), (2,))),
        ((FREE, 1, 4, 6, 1), ((0,), (), (1,), (2,), ())),
        ((FREE, 3, 8), None),
    ],
)
def test_a_reshape_is_a_view_where_axes_are_only_joined_or_separated(shape: Any, groups: Any) -> None:
    seen = view("t", (FREE, 4, 6)).regrouped(shape)
    assert (None if seen is None else seen.groups) == groups
    assert seen is None or seen.shape == shape


def test_joined_axes_separate_again() -> None:
    joined = View("t", (FREE, 7, 5), ((0,), (2, 1)))
    assert joined.regrouped((FREE, 5, 7)) == View("t", (FREE, 7, 5), ((0,), (2,), (1,)))
    assert joined.regrouped((FREE, 7, 5)) is None


def test_layers_are_called_as_exporters_left_their_names() -> None:
    """Keras counts scopes anew on export ("stem" becomes "stem_1"); a folded convolution has it in its weight only."""

    def made(first: str, weight: str) -> ir.Model:
        graph = parser.parse_graph(
            "m (float[n,4,4,3] x) => (float[n,2] y) { t = Transpose<perm=[0,3,1,2]>(x)  c = Conv(t, w)  r = Relu(c)"
            "  g = GlobalAveragePool(r)  f = Flatten(g)  y = Gemm(f, v) }"
        )
        for node, name in zip(
            graph.node,
            ["net_1/stem_1/t", first, "net_1/act_1/Relu", "net_1/gap_1/Mean", "net_1/gap_1/f", "net_1/top_2_1/MatMul"],
            strict=True,
        ):
            node.name = name
            node.input[:] = [weight if i == "w" else i for i in node.input]
        arrays = {weight: _normal(6, 3, 1, 1), "v": _normal(6, 2)}
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
        return M.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))

    exported = made("Conv__7", "net_1/stem_1/convolution/merged_input:0")
    assert [s.name for s in lower(exported).steps] == ["stem", "act", "gap", "y"]
    pruned = made("Conv__7", "Conv__7/weight")
    assert [s.name for s in lower(pruned).steps] == ["conv", "act", "gap", "y"]
    assert [s.name for s in lower(pruned, like=exported).steps] == ["stem", "act", "gap", "y"]


def test_an_operator_without_translation_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = _model("m (float[n,4] x) => (float[n,4] y) { y = Hardmax(x) }")
    with pytest.raises(errors.UnsupportedOpError, match="Hardmax"):
        write_keras(model, tmp_path / "m.keras")
    assert not list(tmp_path.iterdir())


def test_no_python_for_keras_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_KERAS_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(errors.MissingExtraError, match="EDGEKIT_KERAS_PYTHON"):
        write_keras(models.mlp(), tmp_path / "m.keras")
    assert not list(tmp_path.iterdir())


def test_weights_go_back_to_the_places_they_came_from() -> None:
    """Every weight moved by a known function of its own value: the graph's initializers are those, moved alike."""
    model = Fold()(models.cnn_nchw(), None)
    plan = lower(model)
    out = restore(model, [(w, w.values * 2 + 1) for w in plan.weights])
    changed = {w.name for w in plan.weights}
    assert changed
    for name, value in out.graph.initializers.items():
        before = model.graph.initializers[name].const_value
        assert before is not None
        assert value.const_value is not None
        want = before.numpy() * 2 + 1 if name in changed else before.numpy()
        np.testing.assert_allclose(value.const_value.numpy(), want, rtol=1e-6)


# --- with Keras -----------------------------------------------------------------------------------------------------
def _attention() -> ir.Model:
    """Two heads over six tokens, as exporters write them: batch and heads joined for the products."""
    return _model(
        """m (float[n,6,8] x) => (float[n,6,8] y, float[n,4] z) {
          l = LayerNormalization<axis=-1,epsilon=1e-6>(x, g, b)  r = Reshape(l, rows)
          q0 = Gemm(r, wq, bq)  k0 = Gemm(r, wk, bk)  v0 = Gemm(r, wv, bv)
          q1 = Reshape(q0, heads)  k1 = Reshape(k0, heads)  v1 = Reshape(v0, heads)
          q2 = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,3,1]>(k1)  v2 = Transpose<perm=[0,2,1,3]>(v1)
          s0 = MatMul(q2, k2)  s1 = Mul(s0, half)  s2 = Add(s1, mask)  s3 = Softmax<axis=-1>(s2)
          a0 = MatMul(s3, v2)  a1 = Transpose<perm=[0,2,1,3]>(a0)  a2 = Reshape(a1, rows)
          a3 = Gemm(a2, wo, bo)  a4 = Reshape(a3, tokens)  a5 = Add(a4, x)  y = Gelu(a5)
          p = ReduceMean<keepdims=0>(y, one)  z = Gemm(p, wz, bz) }""",
        g=_normal(8) + 1, b=_normal(8, seed=1), wq=_normal(8, 8, seed=2), bq=_normal(8, seed=3),
        wk=_normal(8, 8, seed=4), bk=_normal(8, seed=5), wv=_normal(8, 8, seed=6), bv=_normal(8, seed=7),
        wo=_normal(8, 8, seed=8), bo=_normal(8, seed=9), wz=_normal(8, 4, seed=10), bz=_normal(4, seed=11),
        rows=np.array([-1, 8], np.int64), heads=np.array([-1, 6, 2, 4], np.int64),
        tokens=np.array([-1, 6, 8], np.int64), half=np.float32(0.5), one=np.array([1], np.int64),
        mask=np.triu(np.full((6, 6), -1e9, np.float32), 1),
    )  # fmt: skip


def _pieces() -> ir.Model:
    """Squeeze and excite, hard swish by hand, pools and pads of both kinds, Concat, Split, Slice, Where, one output
    that is inside."""
    return _model(
        """m (float[n,9,7,4] x) => (float[n,3] y, float[n,4,5,4] h) {
          t = Transpose<perm=[0,3,1,2]>(x)  c = Conv<pads=[0,1,2,1],strides=[2,1]>(t, w0, b0)
          c3 = Add(c, three)  c4 = Clip(c3, zero, six)  c5 = Mul(c, c4)  c6 = Mul(c5, sixth)
          s = GlobalAveragePool(c6)  e0 = Conv(s, w1, b1)  e1 = Relu(e0)  e2 = Conv(e1, w2)
          e3 = HardSigmoid<alpha=0.16666667,beta=0.5>(e2)  e = Mul(c6, e3)
          m = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1],strides=[1,1]>(e)
          a = AveragePool<kernel_shape=[2,2],pads=[0,0,1,1],strides=[1,1],count_include_pad=1>(e)
          j = Concat<axis=1>(m, a)  k, l = Split<axis=1>(j, parts)  d = Sub(k, l)
          u = Slice(d, one, four, three_axis, step)  g = Greater(u, half)  o = Where(g, u, tenth)
          p = Pad<mode="constant">(o, pads)  q = Conv<group=2,kernel_shape=[3,3]>(p, w3)
          i = Transpose<perm=[0,2,3,1]>(q)  h = Identity(i)
          f = Flatten(q)  z = Gemm(f, w4, b4)  y = LeakyRelu<alpha=0.2>(z) }""",
        w0=_normal(8, 4, 3, 3), b0=_normal(8, seed=1), w1=_normal(2, 8, 1, 1, seed=2), b1=_normal(2, seed=3),
        w2=_normal(8, 2, 1, 1, seed=4), w3=_normal(4, 4, 3, 3, seed=5), w4=_normal(80, 3, seed=6),
        b4=_normal(3, seed=7),
        three=np.float32(3), zero=np.float32(0), six=np.float32(6), sixth=np.float32(1 / 6), half=np.float32(0.05),
        tenth=np.float32(0.1), parts=np.array([8, 8], np.int64), one=np.array([0], np.int64),
        four=np.array([9], np.int64), three_axis=np.array([3], np.int64), step=np.array([2], np.int64),
        pads=np.array([0, 0, 1, 1, 0, 0, 0, 2], np.int64),
    )  # fmt: skip


def _recurrent() -> ir.Model:
    """Ids, an embedding, an LSTM both ways, a GRU, the last step of another LSTM."""
    return _model(
        """m (int32[n,5] ids) => (float[n,16] y) {
          e = Gather(table, ids)  t = Transpose<perm=[1,0,2]>(e)
          a = LSTM<hidden_size=3,direction="bidirectional">(t, wa, ra, ba)
          f = Slice(a, zero, one, one)  b = Slice(a, one, two, one)
          f1 = Squeeze(f, one)  b1 = Squeeze(b, one)  c = Concat<axis=2>(f1, b1)
          g, gh = GRU<hidden_size=4,linear_before_reset=1>(c, wg, rg, bg)  g1 = Squeeze(g, one)
          u, uh = GRU<hidden_size=2,direction="reverse">(g1, wu, ru, bu)
          v = Squeeze(u, one)  v1 = ReduceSum<keepdims=0>(v, zero)
          d, dh = LSTM<hidden_size=2,direction="bidirectional">(g1, wd, rd, bd)  d1 = ReduceMean<keepdims=0>(d, both)
          dh1 = Transpose<perm=[1,0,2]>(dh)  dh2 = Flatten(dh1)
          l = LSTM<hidden_size=2>(g1, wl, rl, bl)  l1 = Squeeze(l, one)  l2 = Slice(l1, minus, end, zero)
          l3 = Squeeze(l2, zero)  h = Squeeze(gh, zero)  uh1 = Squeeze(uh, zero)
          y = Concat<axis=1>(l3, h, v1, uh1, d1, dh2) }""",
        wu=_normal(1, 6, 4, seed=11), ru=_normal(1, 6, 2, seed=12), bu=_normal(1, 12, seed=13),
        wd=_normal(2, 8, 4, seed=14), rd=_normal(2, 8, 2, seed=15), bd=_normal(2, 16, seed=16),
        both=np.array([0, 1], np.int64),
        table=_normal(7, 4), wa=_normal(2, 12, 4, seed=1), ra=_normal(2, 12, 3, seed=2), ba=_normal(2, 24, seed=3),
        wg=_normal(1, 12, 6, seed=4), rg=_normal(1, 12, 4, seed=5), bg=_normal(1, 24, seed=6),
        wl=_normal(1, 8, 4, seed=7), rl=_normal(1, 8, 2, seed=8), bl=_normal(1, 16, seed=9),
        zero=np.array([0], np.int64), one=np.array([1], np.int64), two=np.array([2], np.int64),
        minus=np.array([-1], np.int64), end=np.array([2**31 - 1], np.int64),
    )  # fmt: skip


_GRAPHS = {
    "mobile": models.mobile_nhwc, "cnn": models.cnn_nchw, "two": models.two_inputs_two_outputs,
    "generator": models.generator, "attention": _attention, "pieces": _pieces, "recurrent": _recurrent,
}  # fmt: skip

_TRAIN = """
import json, sys
import keras, numpy as np
out = {}
for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    rng = np.random.default_rng(0)
    shapes = [(t.name, [s or 4 for s in t.shape], t.dtype) for t in model.inputs]
    x = [rng.random(s).astype(d) if d == "float32" else rng.integers(0, 5, s).astype(d) for _, s, d in shapes]
    x = x[0] if len(x) == 1 else x
    y = model(x)
    wanted = [np.asarray(t) * 0 for t in (y if isinstance(y, list) else [y])]
    before = [v.numpy() for v in model.trainable_variables]
    model.compile("sgd", "mse")
    model.fit(x, wanted if isinstance(y, list) else wanted[0], epochs=1, batch_size=4, verbose=0)
    moved = [bool((a != v.numpy()).any()) for a, v in zip(before, model.trainable_variables)]
    out[path] = {"inputs": shapes, "outputs": model.output_names, "moved": moved,
                 "package": sorted({type(l).__module__.split(".")[0] for l in model.layers})}
print(json.dumps(out))
"""


@pytest.mark.slow
def test_files_load_in_a_bare_keras_and_train_further(
    keras_python: str, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    for name, make in _GRAPHS.items():
        record = write_keras(Fold()(make(), None), tmp_path / f"{name}.keras")
        assert record["max_rel_error"] <= 1e-4, name
        assert record["checked_on"] == "seeded"
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == sorted(f"{n}.keras" for n in _GRAPHS)  # no halves left behind
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [keras_python, "-c", _TRAIN, *map(str, files)], check=True, capture_output=True, text=True, env=environment
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for file in files:
        seen = found[str(file)]
        assert seen["package"] == ["keras"], file
        assert sum(seen["moved"]) > len(seen["moved"]) / 2, file  # a dead ReLU may keep some
    sig = M.signature(models.two_inputs_two_outputs())
    two = found[str(tmp_path / "two.keras")]
    assert [s[0] for s in two["inputs"]] == [s.name for s in sig.inputs]
    assert found[str(tmp_path / "mobile.keras")]["outputs"] == ["y"]


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(
    keras_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """A layer given other weights than the graph's is found out by running it."""
    from edgekit.sources import keras_writer

    honest = keras_writer.lower

    def wrong(model: ir.Model, **given: Any) -> Any:
        plan = honest(model, **given)
        plan.weights[0].values[...] *= 1.01
        return plan

    monkeypatch.setattr(keras_writer, "lower", wrong)
    with pytest.raises(errors.ConversionMismatchError, match="differs"):
        write_keras(models.mlp(), tmp_path / "m.keras")
    assert not list(tmp_path.iterdir())


_BUILD_ALL = """
import importlib.util, sys
from pathlib import Path
import numpy as np
spec = importlib.util.spec_from_file_location("builder", sys.argv[1])
builder = importlib.util.module_from_spec(spec)
sys.modules["builder"] = builder
spec.loader.exec_module(builder)
for plan in sorted(Path(sys.argv[2]).glob("*.json")):
    model = builder.build(plan).model
    with np.load(plan.with_suffix(".x.npz")) as stored:
        out = model(stored["t0"])
    out = out if isinstance(out, list) else [out]
    np.savez(plan.with_suffix(".y.npz"), **{f"t{i}": np.asarray(t) for i, t in enumerate(out)})
"""
RANDOM_GRAPHS = 30


@pytest.mark.slow
def test_random_graphs_are_translated_exactly_or_refused(keras_python: str, tmp_path: Path) -> None:  # noqa: F811
    """Layouts, joined axes, broadcasts and shared constants in every order; all graphs in one process."""
    found: list[tuple[Any, dict[str, Array]]] = []

    @settings(max_examples=RANDOM_GRAPHS, database=None, deadline=None, phases=[Phase.generate], derandomize=True)
    @given(networks())
    def collect(case: tuple[ir.Model, Array]) -> None:
        model, x = case
        folded = Fold()(model, None)
        wanted = M.FloatSession(folded, optimize=False).run({"x": x})
        with suppress(errors.UnsupportedOpError):
            plan = lower(folded)
            save_plan(plan, tmp_path / f"{len(found):03}.json")
            save_batch(tmp_path / f"{len(found):03}.x.npz", plan, {"x": x})
            found.append((plan, wanted))

    collect()
    assert len(found) > RANDOM_GRAPHS / 2
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [keras_python, "-c", _BUILD_ALL, keras_builder.__file__, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    for number, (plan, wanted) in enumerate(found):
        assert difference(plan, wanted, tmp_path / f"{number:03}.y.npz") <= 1e-4


def test_references_are_what_steps_read() -> None:
    """Steps come after what they read, and each tensor is made once."""
    for make in _GRAPHS.values():
        plan = lower(Fold()(make(), None))
        known = {name for name, _, _ in plan.inputs}
        for step in plan.steps:
            flat = [a for given in step.arguments for a in (given if isinstance(given, list) else [given])]
            assert {a.name for a in flat if isinstance(a, Ref)} <= known
            assert step.output not in known
            known.add(step.output)
        assert set(plan.outputs) <= known
