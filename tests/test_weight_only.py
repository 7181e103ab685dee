"""Artifacts of quantized weights: each runtime against the ONNX reference on the portable model, and the files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

from edgekit import artifact, backends, pipeline, verify, weighing
from edgekit import model as M
from edgekit.backends import ort_weights
from edgekit.backends.whole_groups import with_whole_groups
from edgekit.cli import main
from edgekit.errors import TargetFileError, UnsupportedOpError
from edgekit.inspection import inspect, product_macs
from edgekit.passes.fold import Fold
from edgekit.passes.quantize_weights import QuantizeWeights, product_share
from edgekit.target import load_target, read_target

from .models import MODELS
from .test_conformance import installed, run_artifact
from .test_quantize_weights import build, by_hand, calibration, normal

Array = np.ndarray[Any, Any]


def odd() -> ir.Model:
    """Short last groups, one group, one output, a bias that is a row, one that is computed, beta, many rows at once."""
    return build(
        """odd (float[batch,33] x, float[batch,7] s) => (float[batch,1] y, float[batch,40,7] z) {
          a = Gemm<beta=2.0>(x, w0, b0)  b = Gemm<beta=0.5,transB=1>(a, w1, s)  c = MatMul(b, w2)
          y = Gemm<alpha=3.0>(c, w3, b3)  r = Unsqueeze(b, axes)  t = Mul(r, steps)  z = MatMul(t, w4) }""",
        w0=normal(33, 50), b0=normal(1, 50, seed=1), w1=normal(7, 50, seed=2), w2=normal(7, 20, seed=3),
        w3=normal(20, 1, seed=4), b3=np.array(0.25, np.float32), w4=normal(7, 7, seed=5),
        axes=np.array([1], np.int64), steps=np.linspace(0, 1, 40, dtype=np.float32).reshape(40, 1),
    )  # fmt: skip


def tied() -> ir.Model:
    """A table that rows are gathered from and that a product reads too, and a product that two nodes share."""
    return build(
        """tied (int32[batch,5] ids) => (float[batch,5,48] y) {
          e = Gather<axis=0>(table, ids)  h = MatMul(e, w)  g = Tanh(h)  k = MatMul(g, w)  t = Transpose(table)
          y = MatMul(k, t) }""",
        table=normal(48, 32), w=normal(32, 32, seed=1) / 4,
    )  # fmt: skip


def bidirectional() -> ir.Model:
    """An LSTM in both directions with its activations spelled out, and a product of a vector."""
    return build(
        """both (float[4,3,6] x, float[24] v) => (float[4,2,3,5] y, float[9] u) {
          y = LSTM<hidden_size=5,direction="bidirectional",
                   activations=["Sigmoid","Tanh","Tanh","Sigmoid","Tanh","Tanh"]>(x, w, r, b)
          u = MatMul(v, m) }""",
        w=normal(2, 20, 6), r=normal(2, 20, 5, seed=1), b=normal(2, 40, seed=2), m=normal(24, 9, seed=5),
    )  # fmt: skip


def gated() -> ir.Model:
    return build(
        "gru (float[4,3,6] x) => (float[4,1,3,7] z) { z = GRU<hidden_size=7>(x, w, r) }",
        w=normal(1, 21, 6, seed=3), r=normal(1, 21, 7, seed=4),
    )  # fmt: skip


CASES = {**MODELS, "odd": odd, "tied": tied, "bidirectional": bidirectional, "gated": gated}
KINDS = [(b, p) for b in backends.BACKENDS for p in backends.get(b).PRECISIONS if backends.get(b).weight_pass(p)]

ZERO_POINTS = [(*k, "off") for k in KINDS if k[1] == "int4-weights"]


def weighed(model: ir.Model, backend: backends.Backend, precision: str, **options: Any) -> ir.Model:
    step = backend.weight_pass(precision)
    assert step is not None
    return replace(step, least=1, **options)(model, None)


# --- numbers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend_name", "precision", "symmetric"), [*((*k, "on") for k in KINDS), *ZERO_POINTS])
def test_artifacts_equal_the_onnx_reference(
    backend_name: str, precision: str, symmetric: Any, name: str, tmp_path: Path
) -> None:
    backend = installed(backend_name)
    model = weighed(Fold()(CASES[name](), None), backend, precision, symmetric=symmetric)
    try:
        notes = backend.lower(model, precision, tmp_path)
    except UnsupportedOpError as refusal:
        assert precision == "int8-dynamic"
        assert "convolutions" in refusal.what  # noqa: PT017
        return
    inputs = M.seeded_inputs(M.signature(model), 1 if notes else 3, high=40)
    got = run_artifact(backend, tmp_path, inputs)
    expected = ReferenceEvaluator(M.to_proto(model)).run(None, inputs)
    for spec, value in zip(M.signature(model).outputs, expected, strict=True):
        assert got[spec.name].shape == value.shape
        if (
            backend.rounds_activations(model, precision) and name != "spread_out"
        ):  # which wants evening out first: below
            share = np.linalg.norm(got[spec.name] - value) / np.linalg.norm(value)
            assert share < 0.03  # activations in 8 bits, a few layers deep
        elif not backend.rounds_activations(model, precision):
            np.testing.assert_allclose(got[spec.name], value, atol=1e-5 * max(1.0, float(np.abs(value).max())))


def test_matmulnbits_holds_the_portable_models_integers() -> None:
    model = QuantizeWeights(bits=4, least=1, symmetric="off")(odd(), None)
    lowered = ort_weights.weight_only(model)
    nodes = [n for n in lowered.graph if n.op_type == "MatMulNBits"]
    want = {w.shape: w for w in by_hand(model).values()}
    assert len(nodes) == len(want) == 5
    for node in nodes:
        inputs, outputs, block = (node.attributes.get_int(k, 0) for k in ("K", "N", "block_size"))
        assert block >= 16
        assert block & (block - 1) == 0
        packed, scale, zero = (M.constant(node.inputs[i]) for i in (1, 2, 3))
        assert packed is not None
        assert scale is not None
        assert zero is not None
        groups = -(-inputs // block)
        assert packed.shape == (outputs, groups, block // 2)
        q = np.stack([packed & 15, packed >> 4], -1).reshape(outputs, groups, block).astype(np.float64)
        z = np.stack([zero & 15, zero >> 4], -1).reshape(outputs, -1)[:, :groups].astype(np.float64)
        real = (q - z[..., None]) * scale.reshape(outputs, groups, 1)
        np.testing.assert_array_equal(real.reshape(outputs, -1)[:, :inputs].T, want[inputs, outputs])


# --- form of the files -----------------------------------------------------------------------------------------
def optimized(model: Path, folder: Path) -> Counter[str]:
    """Operators of what ONNX Runtime runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


def test_onnxruntime_restores_8_bit_weights_once(tmp_path: Path) -> None:
    backend = installed("onnxruntime")
    for name in ("mlp", "recurrent", "cnn_nchw"):
        model = weighed(MODELS[name](), backend, "int8-weights")
        backend.lower(model, "int8-weights", tmp_path)
        ran = optimized(tmp_path / "model.onnx", tmp_path)
        assert not ran & Counter(["Cast", "Mul", "DequantizeLinear", "MatMulNBits"]), ran


def test_onnxruntime_rounds_activations_of_few_rows_only() -> None:
    model = QuantizeWeights(bits=4, least=1)(odd(), None)
    levels = {
        node.attributes.get_int("N", 0): node.attributes.get_int("accuracy_level", 0)
        for node in ort_weights.weight_only(model).graph
        if node.op_type == "MatMulNBits" and node.attributes.get_int("K", 0) != 50
    }
    assert levels == {50: 4, 20: 4, 1: 4, 7: 1}  # w4 multiplies 40 rows of each sample
    assert ort_weights.rounds_activations(model)
    many = build("g (float[batch,17,64] x) => (float[batch,17,8] y) { y = MatMul(x, w) }", w=normal(64, 8))
    assert not ort_weights.rounds_activations(QuantizeWeights(bits=4, least=1)(many, None))


def test_a_dynamic_lstm_and_one_that_cannot_be(tmp_path: Path) -> None:
    backend = installed("onnxruntime")
    model = weighed(MODELS["recurrent"](), backend, "int8-dynamic")
    assert [n.op_type for n in ort_weights.dynamic(model).graph].count("DynamicQuantizeLSTM") == 1
    lstm = next(n for n in model.graph if n.op_type == "LSTM")
    lstm.attributes.add(ir.AttrStrings("activations", ["Sigmoid", "Relu", "Tanh"]))
    lowered = ort_weights.dynamic(model)
    assert "LSTM" in [n.op_type for n in lowered.graph]
    backend.lower(model, "int8-dynamic", tmp_path)
    inputs = M.seeded_inputs(M.signature(model), 2)
    want = M.FloatSession(model, optimize=False).run(inputs)["y"]
    np.testing.assert_allclose(run_artifact(backend, tmp_path, inputs)["y"], want, atol=0.05)


def test_whole_groups_change_no_result() -> None:
    model = QuantizeWeights(bits=4, least=1, symmetric="off")(odd(), None)
    whole = with_whole_groups(model)
    onnx.checker.check_model(M.to_proto(whole), full_check=True)
    for node in whole.graph:
        block = node.attributes.get_int("block_size", 0)
        stored = M.constant(node.inputs[0]) if block else None
        assert stored is None or len(stored) % block == 0
    inputs = M.seeded_inputs(M.signature(model), 3)
    for want, got in zip(*(ReferenceEvaluator(M.to_proto(m)).run(None, inputs) for m in (model, whole)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "kind"), [("int8-weights", "i8"), ("int4-weights", "i4")])
def test_openvino_multiplies_by_the_compressed_weights(precision: str, kind: str, tmp_path: Path) -> None:
    backend = installed("openvino")
    import openvino as ov

    model = build("g (float[1,256] x) => (float[1,128] y) { y = MatMul(x, w) }", w=normal(256, 128))
    backend.lower(weighed(model, backend, precision), precision, tmp_path)
    compiled = ov.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = [n for n in compiled.get_runtime_model().get_ordered_ops() if "FullyConnected" in _type(n)]
    assert [n.get_input_element_type(1).to_string() for n in layers] == [kind]
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0  # activations stay float on any CPU
    assert (tmp_path / "model.bin").stat().st_size < 256 * 128 * (1.1 if kind == "i8" else 0.7)


def _type(node: Any) -> str:
    return str(node.get_rt_info()["layerType"].value)


# --- proof -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("backend_name", "precision"), KINDS)
def test_the_proof_tells_right_from_wrong(backend_name: str, precision: str, tmp_path: Path) -> None:
    backend, original = installed(backend_name), Fold()(MODELS["mlp"](), None)
    model = weighed(original, backend, precision)
    data = calibration(tmp_path, normal(40, 12))
    data = data.bind(M.signature(original))
    folder = tmp_path / "right"
    folder.mkdir()
    backend.lower(model, precision, folder)
    record = verify.weights(backend, folder, model, original, data, precision)
    assert record["ok"], record
    assert record["samples"] == 40
    assert (record["bound"] is None) == backend.rounds_activations(model, precision)
    assert 5 < record["from_original"]["sqnr_db"] < 60
    (note,) = verify.notes(backend.NAME, record)
    assert "dB from the original" in note
    other = M.clone(original)
    weight = other.graph.initializers["w1"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(-weight.const_value.numpy(), name="w1")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    backend.lower(weighed(other, backend, precision), precision, wrong)
    record = verify.weights(backend, wrong, model, original, data, precision)
    assert not record["ok"]
    assert record["reasons"]


# --- conversions ---------------------------------------------------------------------------------------------------
def converted(here: Path, name: str, **options: Any) -> dict[str, dict[str, Any]]:
    model = CASES[name]()
    M.save(model, here / f"{name}.onnx")
    spec = M.signature(model).inputs[0]
    sources = normal(3, *(int(size) for size in spec.shape[1:]))  # correlated inputs, as real ones are
    np.savez(here / "d.npz", x=np.tensordot(normal(40, 3, seed=1), sources, 1) + 0.1)
    done = pipeline.convert(here / f"{name}.onnx", ["one"], targets_dir=here, out=here / "b", **options)
    return {row["candidate"]: row for row in done["artifacts"]}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    rows = [("float32", ""), ("int8-dynamic", ', for_models = "products"'), ("int4-weights", ", on_request = true")]
    table = "".join(f'{{ backend = "onnxruntime", precision = "{p}"{more} }},\n' for p, more in rows)
    (tmp_path / "one.toml").write_text(f'schema = 1\ndescription = "one"\ncandidates = [\n{table}]\n', encoding="utf-8")
    return tmp_path


def wide() -> ir.Model:
    """Large enough that weights are worth it."""
    return build(
        """wide (float[batch,64] x) => (float[batch,10] y) { a = Gemm(x, w0, b0)  r = Relu(a)  y = MatMul(r, w1) }""",
        w0=normal(64, 120) / 8, b0=normal(120, seed=1), w1=normal(120, 10, seed=2) / 11,
    )  # fmt: skip


CASES["wide"] = wide


def test_without_data_nearest_with_data_reconstructed(here: Path) -> None:
    rows = converted(here, "wide", precisions=["int4-weights"])
    assert {k: r["status"] for k, r in rows.items()} == {
        "onnxruntime-float32": "made",
        "onnxruntime-int4-weights": "made",
    }
    plain = artifact.read_manifest(Path(rows["onnxruntime-int4-weights"]["path"]))
    rows = converted(here, "wide", precisions=["int4-weights"], data=here / "d.npz")
    fitted = artifact.read_manifest(Path(rows["onnxruntime-int4-weights"]["path"]))
    ways = [{r["rounding"] for r in (m.quantization or {})["layers"].values()} for m in (plain, fitted)]
    assert ways[0] == {"nearest"}
    assert "reconstruct" in ways[1]
    assert plain.calibration is None
    assert (fitted.calibration or {})["samples"] == 40
    assert (fitted.parity or {})["from_original"]["sqnr_db"] > 20
    assert json.loads(json.dumps(fitted.parity)) == fitted.parity


def test_made_unasked_only_of_models_of_products(here: Path) -> None:
    assert set(converted(here, "wide")) == {"onnxruntime-float32", "onnxruntime-int8-dynamic"}
    assert set(converted(here, "cnn_nchw")) == {"onnxruntime-float32"}
    asked = converted(here, "cnn_nchw", precisions=["int8-dynamic"])
    assert asked["onnxruntime-int8-dynamic"]["status"] == "not run"


def series() -> ir.Model:
    """Convolutions over 200 steps, then a dense layer that has most of the weights and the least of the arithmetic."""
    return build(
        """series (float[batch,4,200] x) => (float[batch,6] y) {
          a = Conv<pads=[2,2]>(x, w0, b0)  r = Relu(a)  c = Conv<pads=[2,2]>(r, w1)  s = Relu(c)  f = Flatten(s)
          y = Gemm(f, w2) }""",
        w0=normal(16, 4, 5), b0=normal(16, seed=1), w1=normal(16, 16, 5, seed=2), w2=normal(3200, 6, seed=3),
    )  # fmt: skip


def spread_out() -> ir.Model:
    """The same function as `wide`, the channels between its layers three decades apart."""
    model = wide()
    factors = np.geomspace(1, 1e3, 120, dtype=np.float32)
    for name, by in (("w0", factors), ("b0", factors), ("w1", 1 / factors[:, None])):
        value = model.graph.initializers[name]
        array = M.constant(value)
        assert array is not None
        value.const_value = ir.tensor(array * by, name=name)
    return model


CASES |= {"series": series, "spread_out": spread_out}


def test_a_cnn_with_one_large_dense_layer_is_no_model_of_products(here: Path) -> None:
    assert product_share(series()) > 0.9
    assert product_macs(inspect(series(), backends_too=False)["layers"]) == pytest.approx(19200 / 339200)
    assert set(converted(here, "series")) == {"onnxruntime-float32"}
    asked = converted(here, "series", precisions=["int8-dynamic"])
    assert asked["onnxruntime-int8-dynamic"]["status"] == "made"


def test_recurrent_layers_count_as_products() -> None:
    assert product_macs(inspect(CASES["gated"](), backends_too=False)["layers"]) == 1
    assert product_macs([{"op": "Conv", "macs": None}]) is None


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("precision", ["int8-dynamic", "int4-weights"])
def test_channels_far_apart_are_brought_together_first(precision: str, with_data: bool, here: Path) -> None:
    """What it costs is told against the original, and is what the same layers cost with even channels."""
    data = {"data": here / "d.npz"} if with_data else {}
    lost = {}
    for name in ("wide", "spread_out"):
        row = converted(here, name, precisions=[precision], **data)[f"onnxruntime-{precision}"]
        manifest = artifact.read_manifest(Path(row["path"]))
        lost[name] = (manifest.parity or {})["from_original"]["sqnr_db"]
    weights: Any = manifest.quantization
    assert weights["equalized"] or weights["smoothed"]
    assert set(weights["sqnr_db"]) == {"as it is", "equalized", *(["smoothed"] if with_data else [])}
    assert max(weights["sqnr_db"].values()) > weights["sqnr_db"]["as it is"] + 6
    assert lost["spread_out"] > lost["wide"] - 3
    assert (manifest.calibration is not None) == with_data
    assert any("before its weights were rounded" in note for note in manifest.notes)


@pytest.mark.parametrize("precision", ["int8-weights", "int8-dynamic"])
def test_weights_that_a_backend_quantizes_itself_are_brought_together_first(precision: str, here: Path) -> None:
    installed("tflite")
    row = f'{{ backend = "tflite", precision = "{precision}" }}'
    (here / "one.toml").write_text(f'schema = 1\ndescription = "one"\ncandidates = [{row}]\n', encoding="utf-8")
    lost = {}
    for name in ("wide", "spread_out"):
        made = converted(here, name, precisions=[precision], data=here / "d.npz")[f"tflite-{precision}"]
        manifest = artifact.read_manifest(Path(made["path"]))
        lost[name] = (manifest.parity or {})["max_rel_error"]
    weights: Any = manifest.quantization
    assert weights["equalized"] or weights["smoothed"]
    assert lost["spread_out"] < 2 * lost["wide"]
    assert any("before its weights were rounded" in note for note in manifest.notes)


def test_nothing_to_even_out_is_nothing_tried(here: Path) -> None:
    row = converted(here, "deep", precisions=["int4-weights"])["onnxruntime-int4-weights"]
    weights = artifact.read_manifest(Path(row["path"])).quantization or {}
    assert not weights["equalized"]
    assert not weights["smoothed"]
    assert weights["sqnr_db"] == {}


def deep() -> ir.Model:
    """Layers that a Tanh parts: no factor crosses it."""
    return build(
        "deep (float[batch,64] x) => (float[batch,40] y) { a = Gemm(x, w0)  t = Tanh(a)  y = MatMul(t, w1) }",
        w0=normal(64, 40) / 8, w1=normal(40, 40, seed=1),
    )  # fmt: skip


CASES["deep"] = deep


def test_products_as_they_run_round_what_they_read() -> None:
    model = QuantizeWeights(least=1)(tied_products(), None)
    ran = weighing.as_it_runs(model)
    onnx.checker.check_model(M.to_proto(ran), full_check=True)
    assert [n.op_type for n in ran.graph].count("DynamicQuantizeLinear") == 1
    x = normal(5, 16, seed=3)
    step = (max(x.max(), 0) - min(x.min(), 0)) / np.float32(255)
    zero = np.clip(np.rint(-min(x.min(), 0) / step), 0, 255)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    wanted = M.FloatSession(model, optimize=False).run({"x": rounded.astype(np.float32)})
    got = M.FloatSession(ran, optimize=False).run({"x": x})
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=1e-4)


def tied_products() -> ir.Model:
    return build(
        "two (float[n,16] x) => (float[n,8] y, float[n,4] z) { y = MatMul(x, w)  z = Gemm(x, v) }",
        w=normal(16, 8), v=normal(16, 4, seed=1),
    )  # fmt: skip


def test_too_few_weights_are_said(here: Path) -> None:
    row = converted(here, "mlp", precisions=["int4-weights"])["onnxruntime-int4-weights"]
    assert row["status"] == "not run"
    assert "no weights of this model can have 4 bits" in row["why"]


def test_the_profile_key(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    row = '{ backend = "openvino", precision = "int8-weights", for_models = %s }'
    text = f'schema = 1\ndescription = "d"\ncandidates = [{row}]'
    path.write_text(text % '"products"', encoding="utf-8")
    assert read_target(path).candidates[0].for_models == "products"
    path.write_text(text % '"cnn"', encoding="utf-8")
    with pytest.raises(TargetFileError, match="for_models"):
        read_target(path)
    assert any(c.for_models == "products" for c in load_target("cpu").candidates)


def test_the_list_of_profiles_says_when_a_candidate_is_made(here: Path) -> None:
    told = CliRunner().invoke(main, ["targets", "--targets", str(here)]).output
    line = next(row for row in told.splitlines() if "onnxruntime-int8-dynamic" in row)
    assert "onnxruntime-int8-dynamic (of transformers and recurrent models)" in line
    assert "onnxruntime-int4-weights (with --precision int4-weights)" in line


# --- a real model ----------------------------------------------------------------------------------------------------
def test_four_bits_keep_the_perplexity_of_a_gpt(zoo: Path, tmp_path: Path) -> None:
    tokens = np.load(zoo / "data" / "tinyshakespeare_tokens.npz")
    model = Fold()(pipeline.load(zoo / "models" / "gpt_char_tinyshakespeare.onnx").model, None)
    train = np.stack([tokens["train"][i : i + 64] for i in range(0, 64 * 3000, 3000)]).astype(np.int32)
    made = QuantizeWeights(bits=4)(model, calibration(tmp_path, train))
    windows = np.stack([tokens["val"][i : i + 65] for i in range(0, 64 * 300, 64)]).astype(np.int64)

    def perplexity(session: M.FloatSession) -> float:
        (scores,) = session.run({"ids": windows[:, :-1].astype(np.int32)}).values()
        scores = scores - scores.max(-1, keepdims=True)
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        return float(np.exp(-np.take_along_axis(logs, windows[:, 1:, None], -1).mean()))

    before = perplexity(M.FloatSession(model))
    assert perplexity(M.FloatSession(made, optimize=False)) < 1.01 * before
    assert len(M.to_bytes(made)) < 0.22 * len(M.to_bytes(model))
