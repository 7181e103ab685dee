"""Quantization for an FPGA: powers of two, the full range, widths by layer; judged against the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from edgekit import model as M
from edgekit import quantizing
from edgekit.backends.fpga import interpreter
from edgekit.backends.fpga.lower import lower
from edgekit.dataset import open_dataset
from edgekit.errors import ArtifactError, UnsupportedOpError, UsageError
from edgekit.passes import plan_file
from edgekit.passes.fold import Fold
from edgekit.passes.grids import LiteRT, PowerOfTwo, finest, power_of_two, weight_scales
from edgekit.passes.plan import QuantizationPlan, integer_range
from edgekit.passes.quantize import QuantizeInt8, apply_plan
from edgekit.report.progress import silent
from edgekit.sources import load
from tests.quantize_graphs import Samples, evaluate, graph, normal, sqnr_db, types

Array = np.ndarray[Any, Any]


EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"


def net(classes: int = 6) -> Any:
    """x (n, 3, 9, 8): a residual block, a depthwise layer, a pool, two dense layers, Softmax."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu0"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], name="inner", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["r0", "c1"], ["a"], name="sum"),
        helper.make_node("Relu", ["a"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="deep", group=8, strides=[2, 2]),
        helper.make_node("Clip", ["c2", "zero", "six"], ["r2"], name="relu6"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="mean"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["d"], name="hidden"),
        helper.make_node("Relu", ["d"], ["r3"], name="relu3"),
        helper.make_node("Gemm", ["r3", "w4", "b4"], ["logits"], name="last"),
        helper.make_node("Softmax", ["logits"], ["y"], name="softmax"),
    ]
    weights = {
        "w0": normal(8, 3, 3, 3, seed=1, scale=0.3),
        "b0": normal(8, seed=2, scale=0.2),
        "w1": normal(8, 8, 3, 3, seed=3, scale=0.15),
        "b1": normal(8, seed=4, scale=0.2),
        "w2": normal(8, 1, 3, 3, seed=5, scale=0.4),
        "b2": normal(8, seed=6, scale=0.5),
        "w3": normal(8, 16, seed=7, scale=0.6),
        "b3": normal(16, seed=8, scale=0.2),
        "w4": normal(16, classes, seed=9, scale=0.4),
        "b4": normal(classes, seed=10, scale=0.1),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    return graph(nodes, {"x": ["n", 3, 9, 8]}, {"y": ["n", classes]}, {k: np.asarray(v) for k, v in weights.items()})


X = normal(80, 3, 9, 8, seed=20)
QUICK = {"smooth": "off", "search_time": 0.0}


class Some(Samples):
    def take(self, n: int, seed: int = 0) -> Some:
        return Some({k: v[:n] for k, v in self.inputs.items()})


def planned(**options: Any) -> QuantizationPlan:
    return QuantizeInt8(scheme="fpga", **{**QUICK, **options}).plan(net(), Samples({"x": X}))


@pytest.fixture(scope="module")
def plan() -> QuantizationPlan:
    return planned()


def test_scales_are_powers_of_two_around_zero(plan: QuantizationPlan) -> None:
    scales = [a.scale for a in plan.activations.values()] + [s for w in plan.weights.values() for s in w.scales]
    assert all(np.frexp(s)[0] == 0.5 for s in scales)
    assert not any(a.zero_point for a in plan.activations.values())
    assert set(plan.float_nodes) == {"softmax"}


def test_the_integer_network_is_near_the_float_model(plan: QuantizationPlan) -> None:
    fresh = normal(64, 3, 9, 8, seed=21)
    found = lower(apply_plan(net(), plan))
    assert {layer.kind for layer in found.layers} == {"conv", "depthwise", "dense", "add", "avgpool"}
    assert found.host_ops == ("Softmax",)
    logits = found.real(interpreter.outputs(found, found.quantized(fresh)))
    exact = M.FloatSession(net(), fetch=["logits"]).run({"x": fresh})["logits"]
    assert sqnr_db(exact, logits) > 25


def test_the_integer_network_is_the_quantized_model(plan: QuantizationPlan) -> None:
    """By onnx's reference evaluator, but for ties: probabilities differ by what a step of the logits makes."""
    model = apply_plan(net(), plan)
    found = lower(model)
    logits = found.real(interpreter.outputs(found, found.quantized(X[:16]))).astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    step = 2.0 ** -found.tensors[found.output].exponent
    assert np.abs(evaluate(model, {"x": X[:16]})["y"] - shares).max() < 2 * step


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_fewer_bits_stay_in_their_range(bits: int) -> None:
    chosen = planned(weight_bits=bits, activation_bits=bits)
    found = lower(apply_plan(net(), chosen))
    assert found.tensors[found.output].bits == 8
    widths = [t.bits for name, t in found.tensors.items() if name != found.output]
    assert max(widths) == bits
    assert max(layer.weight_bits for layer in found.layers) == bits
    assert min(int(y.weights.min()) for y in found.layers if y.weights is not None) == integer_range(bits)[0]  # type: ignore[arg-type]


def test_more_bits_are_nearer() -> None:
    exact = M.FloatSession(net(), fetch=["logits"]).run({"x": X})["logits"]
    told = []
    for bits in (3, 5, 8):
        found = lower(apply_plan(net(), planned(weight_bits=bits, activation_bits=bits)))
        told.append(sqnr_db(exact, found.real(interpreter.outputs(found, found.quantized(X)))))
    assert told[0] + 4 < told[1]
    assert told[1] + 6 < told[2]


def test_widths_by_layer() -> None:
    chosen = planned(layer_bits=(("x", (8, 5)), ("inner", (4, 6)), ("last", (3, 7)), ("sum", (8, 4))))
    found = lower(apply_plan(net(), chosen))
    made = {layer.name: layer for layer in found.layers}
    bits = {name: found.tensors[layer.output].bits for name, layer in made.items()}
    assert found.input.bits == 5
    assert (made["inner"].weight_bits, bits["inner"]) == (4, 6)
    assert (made["last"].weight_bits, bits["last"]) == (3, 7)
    assert bits["sum"] == 4
    assert made["first"].weight_bits == 8


def test_one_exponent_for_a_layer() -> None:
    chosen = planned(per_channel=False)
    assert all(len(set(w.scales)) == 1 for w in chosen.weights.values())
    assert all(len(layer.shift) == 1 for layer in lower(apply_plan(net(), chosen)).layers)


def test_plan_files_come_back(tmp_path: Path) -> None:
    chosen = planned(weight_bits=5, layer_bits=(("inner", (4, 6)),))
    path = tmp_path / "plan.toml"
    plan_file.write(path, chosen, "digest", {})
    again = plan_file.read(path).plan
    assert again is not None
    assert again == chosen
    assert QuantizationPlan.from_json(chosen.to_json()) == chosen
    assert M.to_bytes(apply_plan(net(), again)) == M.to_bytes(apply_plan(net(), chosen))
    scale = next(a.scale for a in chosen.activations.values())
    path.write_text(path.read_text().replace(f"scale = {scale!r}", "scale = 0.3"))
    with pytest.raises(ArtifactError, match="no power of two"):
        plan_file.read(path)


def test_widths_by_pattern_in_a_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        '[override.layers]\n"in*" = "w4a6"\n"x" = "w8a5"\n[override.tensors]\n"p" = {low = -0.99, high = 0.99}\n'
    )
    step = quantizing.overridden(QuantizeInt8(scheme="fpga", **QUICK), plan_file.read(path), net())  # type: ignore[arg-type]
    chosen = step.plan(net(), Samples({"x": X}))
    assert (chosen.weights["inner"].bits, chosen.activations["x"].bits, chosen.activations["c1"].bits) == (4, 5, 6)
    assert chosen.activations["p"].scale == 2.0**-7
    # and a plan with widths is planned again with them
    plan_file.write(path, chosen, quantizing.digest(net()), {})
    text = path.read_text().replace("\n[override.layers]\n", '\n[override.layers]\n"last" = "w5a8"\n')
    path.write_text(text)
    again = quantizing.overridden(QuantizeInt8(scheme="fpga", **QUICK), plan_file.read(path), net())  # type: ignore[arg-type]
    assert dict(again.layer_bits) == {"inner": (4, 6), "x": (8, 5), "last": (5, 8)}
    with pytest.raises(UnsupportedOpError, match="scheme 'fpga', not 'litert'"):
        quantizing.overridden(QuantizeInt8(), plan_file.read(path), net())
    path.write_text('[override.layers]\n"in*" = "w1a9"\n')
    with pytest.raises(UsageError, match="w4a6"):
        plan_file.read(path)


def test_blame_and_notes_of_a_plan() -> None:
    step = QuantizeInt8(scheme="fpga", weight_bits=4, layer_bits=(("deep", (8, 8)),), **QUICK)  # type: ignore[arg-type]
    data = Some({"x": X})
    samples = quantizing.Samples(data, data)  # type: ignore[arg-type]
    chosen, record = quantizing.plan(net(), step, samples, 0.01, silent)
    assert {row["node"] for row in record["plan"]["blame"]} >= {"first", "inner", "hidden", "last"}
    assert any("no layer in float" in note for note in record["told"])
    assert record["plan"]["scheme"] == "fpga"
    assert chosen.describe()[0].startswith("12 nodes in fixed")


@pytest.mark.parametrize(("bits", "least"), [(8, 0.015), (4, 0.04)])
def test_digits_keep_their_accuracy(bits: Any, least: float) -> None:
    """The trained example, depthwise convolutions too, on its test images; ranges searched and biases corrected."""
    model = Fold()(load(EXAMPLE / "digits_cnn.onnx").model, None)
    data = [open_dataset(EXAMPLE / f"digits_{part}.npz").bind(M.signature(model)) for part in ("calib", "test")]
    step = QuantizeInt8(scheme="fpga", weight_bits=bits, activation_bits=8, rounding="nearest", **QUICK)  # type: ignore[arg-type]
    found = lower(apply_plan(model, step.plan(model, data[0].take(128))))
    right = {"float": 0, "fixed": 0}
    session = M.FloatSession(model)
    for batch in data[1].batches(64):
        (name,) = batch.inputs
        scores = next(iter(session.run(batch.inputs).values()))
        logits = interpreter.outputs(found, found.quantized(batch.inputs[name]))
        right["float"] += int((scores.argmax(axis=1) == batch.labels).sum())
        right["fixed"] += int((logits.argmax(axis=1) == batch.labels).sum())
    assert right["float"] > 0.97 * data[1].samples
    assert right["fixed"] >= right["float"] - least * data[1].samples


def test_the_search_beats_the_range_that_holds_everything() -> None:
    """Inputs with a rare outlier: the finer grid that clips it leaves less error, and the outputs show it."""
    model = graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="only")],
        {"x": ["n", 32]},
        {"y": ["n", 8]},
        {"w": normal(32, 8, seed=1), "b": normal(8, seed=2)},
    )
    x = np.clip(normal(400, 32, seed=3, scale=0.5), -1.9, 1.9)
    x[7, 3] = 2.1
    scales = {}
    for way in ("minmax", "output"):
        options = {"calibration": way, "rounding": "nearest", **QUICK}
        chosen = QuantizeInt8(scheme="fpga", activation_bits=4, **options).plan(model, Samples({"x": x}))  # type: ignore[arg-type]
        scales[way] = chosen.activations["x"].scale
    assert scales["output"] < scales["minmax"]


@given(st.floats(1e-6, 1e6), st.floats(0, 1e6), st.integers(2, 8))
def test_the_range_fits_and_a_finer_one_does_not(high: float, below: float, bits: Any) -> None:
    found = power_of_two(-below, high, "minmax", bits)
    lowest, highest = integer_range(bits)

    def fits(scale: float) -> bool:
        return -below / scale >= lowest - 0.5 and high / scale <= highest + 0.5

    assert fits(found.scale)
    assert not fits(found.scale / 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_weight_scales_leave_the_least_error(seed: int, bits: int, per_channel: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(3, 5, 2)) * np.exp2(rng.integers(-3, 4, (3, 1, 1)))
    scales = weight_scales(weight, 0, bits, 0.0, per_channel=per_channel)
    low, high = integer_range(bits)  # type: ignore[arg-type]

    def error(scale: float, rows: Array) -> float:
        return float(np.square(np.clip(np.rint(rows / scale), low, high) * scale - rows).sum())

    parts = list(zip(scales, weight, strict=True)) if per_channel else [(scales[0], weight)]
    for scale, rows in parts:
        needed = finest(max(rows.max() / (high + 0.5), rows.min() / (low - 0.5)))
        assert error(float(scale), rows) == min(error(2.0 ** (needed - k), rows) for k in range(4))


def test_a_layer_without_weights_keeps_its_bias() -> None:
    dead = {"w": np.zeros((4, 2), np.float32), "b": np.array([0.3, -0.7], np.float32)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="only")]
    model = graph(nodes, {"x": ["n", 4]}, {"y": ["n", 2]}, dead)
    chosen = QuantizeInt8(scheme="fpga", **QUICK).plan(model, Samples({"x": normal(16, 4)}))  # type: ignore[arg-type]
    found = lower(apply_plan(model, chosen))
    got = found.real(interpreter.outputs(found, found.quantized(normal(2, 4))))
    np.testing.assert_allclose(got, [dead["b"]] * 2, atol=2.0**-7)


def test_grids_of_both_schemes() -> None:
    assert LiteRT().activation(["a"], -1, 3, "minmax").zero_point != 0
    grids = PowerOfTwo(6, {"a": 4, "b": 8})
    assert [grids.activation(n, -1, 3, "minmax").bits for n in (["a"], ["c"], ["a", "b"], ["a", "c"])] == [4, 6, 8, 4]
    counts, centres = np.array([1.0, 1.0]), np.array([0.3, 20.0])
    how = power_of_two(-1, 1, "minmax", 4)
    assert how.scale == 1 / 4  # 1 / 0.125 = 8 is beyond 7.5
    assert grids.error(counts, centres, how, None) == pytest.approx((0.05**2 + 18.25**2) / 2)


def test_narrow_widths_are_clipped_before_they_are_rounded() -> None:
    written = apply_plan(net(), planned(activation_bits=4))
    clips = [
        n for n in written.graph if n.op_type == "Clip" and n.outputs[0].uses()[0].node.op_type == "QuantizeLinear"
    ]
    assert types(written).count("QuantizeLinear") - len(clips) == 1  # the logits


def test_operators_without_integers_are_refused_before_anything_is_computed() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="first"),
        helper.make_node("Tanh", ["h"], ["t"], name="bend"),
        helper.make_node("Gemm", ["t", "w"], ["y"], name="last"),
    ]
    model = graph(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, {"w": normal(4, 4)})
    with pytest.raises(UnsupportedOpError, match="Tanh 'bend' cannot become integers of an FPGA: Tanh has no integer"):
        QuantizeInt8(scheme="fpga").search(model, Samples({"x": normal(16, 4)}))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"scheme": "fpga", "activation_bits": 16}, UsageError, "16 bits for an FPGA"),
        ({"scheme": "fpga", "layer_bits": (("first", (9, 8)),)}, UsageError, "9 bits"),
        ({"scheme": "fpga", "layer_bits": (("nobody", (4, 4)),)}, UnsupportedOpError, "'nobody' to give bits"),
        ({"scheme": "fpga", "keep_float": ("inner",)}, UnsupportedOpError, "Conv 'inner' cannot .* on request"),
        ({"weight_bits": 4}, UsageError, "4-bit weights"),
        ({"layer_bits": (("first", (8, 8)),)}, UsageError, "by layer"),
    ],
)
def test_wrong_widths_are_refused(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        QuantizeInt8(**options).plan(net(), Samples({"x": X}))
