"""One suite over every backend, pass and model: a new entry in a table is tested for free.

Float results are compared with the ONNX reference evaluator, int8 results with the exact integer reference.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from edgekit import backends, verify
from edgekit import model as M
from edgekit.dataset import Dataset, open_dataset
from edgekit.passes import PASSES
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8

from .models import MODELS

SAMPLES = 48


def installed(name: str) -> backends.Backend:
    backend = backends.get(name)
    remedy = backend.missing()
    if remedy:
        pytest.skip(f"{name} is not installed: {remedy}")
    return backend


def dataset(model: ir.Model, folder: Path) -> Dataset:
    """Seeded normal inputs for every input of a model, through a file as a user would."""
    rng = np.random.default_rng(7)
    arrays = {s.name: rng.normal(size=s.concrete(SAMPLES)).astype(np.float32) for s in M.signature(model).inputs}
    arrays = {k: rng.normal(size=(SAMPLES, *v.shape[1:])).astype(np.float32) for k, v in arrays.items()}
    path = folder / "données.npz"
    np.savez(path, **(arrays if len(arrays) > 1 else {"x": next(iter(arrays.values()))}))
    return open_dataset(path).bind(M.signature(model))


def run_artifact(backend: backends.Backend, folder: Path, inputs: M.Tensors) -> M.Tensors:
    spec = importlib.util.spec_from_file_location(f"runner_{backend.NAME}", backend.RUNNER)
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    return runner.open_session(str(folder), 1).run(inputs)  # type: ignore[no-any-return]


FLOAT_CASES = [(b, p) for b in backends.BACKENDS for p in backends.get(b).PRECISIONS if p.startswith("float")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("backend_name", "precision"), FLOAT_CASES)
def test_float_artifacts_equal_the_onnx_reference(backend_name: str, precision: str, name: str, tmp_path: Path) -> None:
    backend, model = installed(backend_name), MODELS[name]()
    notes = backend.lower(Fold()(model, None), precision, tmp_path)
    inputs = M.seeded_inputs(M.signature(model), 1 if notes else 3)
    expected = ReferenceEvaluator(M.to_proto(model)).run(None, inputs)
    got = run_artifact(backend, tmp_path, inputs)
    # float32: another order of summation; float16 weights: 2^-11 each, a few layers deep
    bound = 1e-5 if precision == "float32" else 1e-2
    for spec, value in zip(M.signature(model).outputs, expected, strict=True):
        assert got[spec.name].shape == value.shape
        np.testing.assert_allclose(got[spec.name], value, atol=bound * max(1.0, float(np.abs(value).max())))


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend_name", [b for b in backends.BACKENDS if "int8" in backends.get(b).PRECISIONS])
def test_int8_artifacts_equal_the_integer_reference(backend_name: str, name: str, bits: Any, tmp_path: Path) -> None:
    backend = installed(backend_name)
    if bits == 8 and backend.saturates():
        pytest.skip("this CPU's u8×s8 kernels saturate: 8-bit weights are not shipped here")
    model = Fold()(MODELS[name](), None)
    data = dataset(model, tmp_path)
    quantized = QuantizeInt8(weight_bits=bits)(model, data)
    folder = tmp_path / "artifact"
    folder.mkdir()
    backend.lower(quantized, "int8", folder)
    record = verify.quantized(backend, folder, quantized, data)
    assert record["ok"], record
    assert record["per_op_max_lsb"] is None or record["per_op_max_lsb"] <= 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pass_name", PASSES)
def test_a_pass_never_edits_its_input_and_repeats_itself(pass_name: str, name: str, tmp_path: Path) -> None:
    module, _, attribute = PASSES[pass_name].partition(":")
    step = getattr(import_module(module), attribute)()
    model = MODELS[name]() if pass_name == "fold" else Fold()(MODELS[name](), None)
    data = dataset(model, tmp_path)
    before = M.to_bytes(model)
    first = step(model, data)
    assert M.to_bytes(model) == before
    assert M.to_bytes(step(model, data)) == M.to_bytes(first)
    assert [s.name for s in M.signature(first).inputs] == [s.name for s in M.signature(model).inputs]
    assert [s.name for s in M.signature(first).outputs] == [s.name for s in M.signature(model).outputs]


@pytest.mark.parametrize("backend_name", backends.BACKENDS)
def test_a_backend_names_the_operator_it_refuses(backend_name: str) -> None:
    backend = installed(backend_name)
    model = MODELS["mlp"]()
    assert backend.refuses(model) == []
    node = next(n for n in model.graph if n.op_type == "Relu")
    node.op_type = "NoSuchOperator"
    (reason, *_) = backend.refuses(model)
    assert "NoSuchOperator" in reason


@pytest.mark.parametrize("backend_name", backends.BACKENDS)
def test_the_table_the_module_and_its_runner_agree(backend_name: str) -> None:
    backend = backends.get(backend_name)
    assert backend_name == backend.NAME
    assert backend.RUNNER.is_file()
    if backend.missing() is None:
        assert backend.version()[0].isdigit()
        assert backend.saturates() in (True, False)


@pytest.mark.parametrize("name", ["mlp", "cnn_nchw", "mobile_nhwc", "generator"])
@pytest.mark.parametrize("backend_name", [b for b in backends.BACKENDS if "int8" in backends.get(b).PRECISIONS])
def test_a_layer_left_in_float_computes_in_float(backend_name: str, name: str, tmp_path: Path) -> None:
    """Between integers, where a runtime may be tempted to quantize its weights by itself."""
    backend = installed(backend_name)
    model = Fold()(MODELS[name](), None)
    layers = [n for n in model.graph if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    data = dataset(model, tmp_path)
    for layer in layers:
        quantized = QuantizeInt8(weight_bits=7, keep_float=(layer.name,), rounding="nearest", smooth="off")(model, data)
        folder = tmp_path / str(layer.name).replace("/", "_")
        folder.mkdir()
        backend.lower(quantized, "int8", folder)
        record = verify.quantized(backend, folder, quantized, data)
        assert record["ok"], record
        assert record["per_op_max_lsb"] is None or record["per_op_max_lsb"] <= 1
