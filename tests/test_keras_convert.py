"""Conversion of Keras models against the numbers that Keras itself wrote, and what is refused without TensorFlow."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import errors
from edgekit.dataset import open_dataset
from edgekit.sources import keras, keras_worker

BOUND = 1e-4  # of the largest output: float32 rounding, no more
SAMPLES = 5

_BUILD = """
import json, sys
from pathlib import Path
import h5py, keras, numpy as np, tensorflow as tf
from keras import layers as L
OUT = Path(sys.argv[1])
keras.utils.set_random_seed(3)
rng = np.random.default_rng(5)

def keep(name, call, model, names, outputs):
    shapes = [tuple(t.shape) for t in model.inputs]
    given = [rng.integers(0, 9, (5, *s[1:])).astype("int32") if str(t.dtype).startswith("int")
             else rng.normal(size=(5, *[n or 9 for n in s[1:]])).astype(str(t.dtype))
             for t, s in zip(model.inputs, shapes)]
    got = keras.tree.flatten(call(given))
    arrays = {f"in:{n}": v for n, v in zip(names, given)} | {f"out:{n}": np.asarray(v) for n, v in zip(outputs, got)}
    np.savez(OUT / f"{name}.npz", **arrays)

def write(name, model, names, outputs, suffixes):
    # batch norm with numbers that matter
    model.set_weights([w + rng.random(w.shape).astype(w.dtype) * .2 for w in model.get_weights()])
    keep(name, lambda g: model(g[0] if len(g) == 1 else g, training=False), model, names, outputs)
    for suffix in suffixes:
        path = OUT / f"{name}{suffix}"
        model.export(path, verbose=False) if suffix == "_saved" else model.save(path)

image = keras.Input((9, 8, 3), name="image")
x = L.BatchNormalization()(L.Conv2D(6, 3, padding="same", activation="relu")(image))
x = L.BatchNormalization()(L.DepthwiseConv2D(3, strides=2, padding="same")(x))
x = L.Dense(4, name="scores")(L.GlobalAveragePooling2D()(x))
write("cnn", keras.Model(image, x), ["image"], ["scores"], [".keras", ".h5"])

a, b = keras.Input((6,), name="zeta"), keras.Input((4,), name="alpha")
h = L.Concatenate()([L.Dense(5, activation="tanh")(a), L.Dense(3)(b)])
two = keras.Model([a, b], [L.Dense(2, name="left")(h), L.Dense(3, name="apart")(h), a])
write("two", two, ["zeta", "alpha"], ["left", "apart"], [".keras", ".h5"])

inner = keras.Sequential([keras.Input((6,)), L.Dense(8, activation="gelu"), L.Dense(6)], name="block")
a = keras.Input((6,), name="x")
write("gelu", keras.Model(a, inner(inner(a))), ["x"], ["block"], [".keras", ".h5"])

a = keras.Input((7, 3), name="seq")
s, h, c = L.LSTM(4, return_sequences=True, return_state=True, name="cell")(a)
write("lstm", keras.Model(a, [s, h, c, L.Bidirectional(L.GRU(3), name="both")(s)]), ["seq"],
      ["cell", "cell_1", "cell_2", "both"], [".keras", ".h5"])

a = keras.Input((7,), dtype="int32", name="ids")
write("tokens", keras.Model(a, L.LSTM(4, name="last")(L.Embedding(9, 5, mask_zero=True)(a))), ["ids"], ["last"],
      [".keras"])

a = keras.Input((6, 8, 3), name="file")  # the name of numpy.savez's own argument
x = L.Normalization(mean=[.1, .2, .3], variance=[1., 2., 3.])(L.Rescaling(1 / 4)(a))
write("scaled", keras.Model(a, L.GlobalAveragePooling2D(name="mean")(L.Resizing(3, 4)(x))), ["file"], ["mean"],
      [".keras"])

a = keras.Input((None, 3), name="seq")
write("unknown", keras.Model(a, L.Conv1D(4, 3, name="conv")(a)), ["seq"], ["conv"], [".keras"])

a = keras.Input((6,), name="x")
dense = keras.Model(a, [L.Dense(4, activation="relu")(a)])
write("dense", dense, ["x"], ["output_0"], ["_saved"])

a, b = keras.Input((4,), name="zeta"), keras.Input((4,), name="alpha")
keyed = keras.Model({"zeta": a, "alpha": b}, {"second": L.Subtract()([a, b]), "first": L.Dense(3)(a)})
keep("keyed", lambda g: keyed({"alpha": g[0], "zeta": g[1]}), keyed, ["alpha", "zeta"], ["first", "second"])
keyed.save(OUT / "keyed.keras")
keyed.export(OUT / "keyed_saved", verbose=False)

# as Keras 2 wrote them: no modules, and keys that Keras 3 no longer takes
a = keras.Input((8, 8, 3), name="image")
x = L.Conv2DTranspose(3, 2)(L.SeparableConv2D(4, 3)(L.DepthwiseConv2D(3)(a)))
write("legacy", keras.Model(a, L.LSTM(2, name="last")(L.Reshape((5, 15))(x))), ["image"], ["last"], [".h5"])
with h5py.File(OUT / "legacy.h5", "r+") as file:
    config = json.loads(file.attrs["model_config"])
    for layer in config["config"]["layers"]:
        if "Conv" in layer["class_name"]:
            layer["config"]["groups"] = 1
        if layer["class_name"] == "LSTM":
            layer["config"].update(time_major=False, implementation=2)
        for key in ("module", "registered_name", "build_config"):
            layer.pop(key, None)
    file.attrs["model_config"] = json.dumps(config)

small = keras.Sequential([keras.Input((3,)), L.Dense(2, name="bad")])
small.save_weights(OUT / "only.weights.h5")
small.save(OUT / "linked.h5")
with h5py.File(OUT / "linked.h5", "r+") as file:
    file["model_weights/evil"] = h5py.ExternalLink("elsewhere.h5", "/x")
(OUT / "cut.h5").write_bytes((OUT / "linked.h5").read_bytes()[:3000])
kernel, bias = small.get_weights()
kernel[1, 1] = np.nan
small.set_weights([kernel, bias])
small.save(OUT / "nan.keras"), small.save(OUT / "nan.h5"), small.export(OUT / "nan_saved", verbose=False)

twice = keras.Sequential([keras.Input((3,), name="x"), L.Lambda(lambda x: x * 2, name="double")])
twice.save(OUT / "twice.keras"), twice.save(OUT / "twice.h5")

@keras.saving.register_keras_serializable("pkg")
class Mine(L.Layer):
    def call(self, x):
        return x + 1

@keras.saving.register_keras_serializable("pkg")
def bend(x):
    return x * 2

own = keras.Sequential([keras.Input((3,)), Mine(name="mine")])
own.save(OUT / "own.keras"), own.save(OUT / "own.h5")
keras.Sequential([keras.Input((3,)), L.Dense(2, activation=bend, name="bent")]).save(OUT / "bent.keras")
a = keras.Input((4, 4), name="a")
keras.Model(a, keras.ops.svd(a, compute_uv=False)).save(OUT / "svd.keras")
keras.Sequential([L.Dense(2)]).save(OUT / "unbuilt.keras")

class Python(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def run(self, x):
        return tf.numpy_function(lambda v: v, [x], tf.float32)

module = Python()
tf.saved_model.save(module, str(OUT / "python_saved"), signatures={"serving_default": module.run})
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small models written by a real Keras, and its own results beside them."""
    python = os.environ.get(keras.PYTHON_VARIABLE) or sys.executable
    needed = ", ".join(repr(name) for name in keras_worker.NEEDED)
    probe = f"import importlib.util as u; print(*[n for n in ({needed},) if u.find_spec(n) is None])"
    missing = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    if missing:
        pytest.skip(f"{missing} not installed in {python} (set {keras.PYTHON_VARIABLE} to a Python that has them)")
    folder = tmp_path_factory.mktemp("keras")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    script = folder / "build.py"  # a file, for TensorFlow reads the source of what it traces
    script.write_text(_BUILD)
    done = subprocess.run(
        [python, str(script), str(folder)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _kind(path: Path) -> Any:
    return {".keras": "keras", ".h5": "h5"}.get(path.suffix, "savedmodel")


def _convert(path: Path, **given: Any) -> keras.Converted:
    options: dict[str, Any] = {"shapes": {}, "trust": False, "data": None, "progress": lambda stage: None}
    return keras.convert(path, _kind(path), **(options | given))


def _run(proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _error(want: np.ndarray, got: np.ndarray) -> float:
    assert want.shape == got.shape
    return float(np.abs(want - got).max() / np.abs(want).max())


_SOUND = ["cnn.keras", "cnn.h5", "two.keras", "two.h5", "gelu.keras", "gelu.h5", "lstm.keras", "lstm.h5"]
_SOUND += ["tokens.keras", "scaled.keras", "dense_saved", "keyed.keras", "keyed_saved", "legacy.h5"]


@pytest.mark.slow
@pytest.mark.parametrize("name", _SOUND)
def test_the_onnx_model_gives_what_keras_gave(built: Path, name: str) -> None:
    done = _convert(built / name)
    onnx.checker.check_model(done.proto, full_check=True)
    with np.load(built / f"{name.removesuffix('_saved').split('.')[0]}.npz") as stored:
        given = {k[3:]: stored[k] for k in stored if k.startswith("in:")}
        wanted = {k[4:]: stored[k] for k in stored if k.startswith("out:")}
    inputs = [v.name for v in done.proto.graph.input]
    if name == "dense_saved":  # an export has its own names
        given = dict(zip(inputs, given.values(), strict=True))
    assert set(inputs) == set(given)
    for size in (SAMPLES, 1):
        got = _run(done.proto, {k: v[:size] for k, v in given.items()})
        assert set(wanted) <= set(got)
        assert max(_error(wanted[k][:size], got[k]) for k in wanted) <= BOUND
    for batch, results in zip(done.inputs, done.outputs, strict=True):  # what the worker says the original gave
        got = _run(done.proto, batch)
        assert max(_error(results[k], got[k]) for k in results) <= BOUND
    assert {len(next(iter(b.values()))) for b in done.inputs} == {1, 3}
    for value in (*done.proto.graph.input, *done.proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param == "batch"
        assert all(d.dim_value > 0 for d in dims[1:])
    assert {"python", "tensorflow", "keras", "tf2onnx"} == set(done.versions)
    assert {o.version for o in done.proto.opset_import if o.domain == ""} == {18}


@pytest.mark.slow
def test_ids_stay_below_what_the_embedding_knows_and_use_all_of_it(built: Path) -> None:
    ids = np.concatenate([b["ids"].ravel() for b in _convert(built / "tokens.keras").inputs])
    assert ids.min() >= 0
    assert 2 < ids.max() < 9


@pytest.mark.slow
def test_the_same_file_gives_the_same_model(built: Path) -> None:
    first, second = (_convert(built / "scaled.keras").proto.SerializeToString() for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_unknown_sizes_are_asked_for_by_name(built: Path) -> None:
    path = built / "unknown.keras"
    with pytest.raises(errors.ShapeError, match=r"size 1 of input 'seq' is unknown — pass --shape seq=-1,N,3"):
        _convert(path)
    with pytest.raises(errors.ShapeError, match="no input 'sequence' — its inputs: seq"):
        _convert(path, shapes={"sequence": (-1, 9, 3)})
    done = _convert(path, shapes={"seq": (-1, 9, 3)})
    with np.load(built / "unknown.npz") as stored:
        assert _error(stored["out:conv"], _run(done.proto, {"seq": stored["in:seq"]})["conv"]) <= BOUND
    fixed = _convert(path, shapes={"seq": (2, 9, 3)})
    assert [b["seq"].shape for b in fixed.inputs] == [(2, 9, 3)]


@pytest.mark.slow
def test_real_samples_are_what_the_original_runs_on(built: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(1).normal(size=(20, 9, 8, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    batches = _convert(built / "cnn.keras", data=open_dataset(tmp_path / "images.npy")).inputs
    assert [len(b["image"]) for b in batches] == [16, 1]
    assert all((images == one).all(axis=(1, 2, 3)).any() for one in batches[0]["image"])
    np.save(tmp_path / "other.npy", images[:, :4])
    unfit = _convert(built / "cnn.keras", data=open_dataset(tmp_path / "other.npy")).inputs
    assert [b["image"].shape for b in unfit] == [(3, 9, 8, 3), (1, 9, 8, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("twice.keras", errors.UnsafeModelError, "'double'.*--trust"),
        ("twice.h5", errors.UnsafeModelError, "'double'.*--trust"),
        ("linked.h5", errors.UnsafeModelError, "/model_weights/evil.*another file"),
        ("python_saved", errors.UnsafeModelError, "PyFunc"),
        ("own.keras", errors.UnsupportedOpError, "'mine'.*class 'pkg>Mine'"),
        ("own.h5", errors.UnsupportedOpError, "'mine'.*class 'pkg>Mine'"),
        ("bent.keras", errors.UnsupportedOpError, "'bent'.*function 'pkg>bend'"),
        ("svd.keras", errors.UnsupportedOpError, "'Svd' of node"),
        ("nan.keras", errors.NonFiniteError, "'bad/kernel'"),
        ("nan.h5", errors.NonFiniteError, "bad/kernel'"),
        ("nan_saved", errors.NonFiniteError, "bad/kernel'"),
        ("only.weights.h5", errors.ModelFileError, "weights only"),
        ("cut.h5", errors.ModelFileError, "damaged"),
        ("unbuilt.keras", errors.ModelFileError, "no defined inputs"),
    ],
)
def test_what_keras_wrote_and_is_refused(built: Path, name: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        _convert(built / name)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twice.keras", "twice.h5"])
def test_trusted_code_runs(built: Path, name: str) -> None:
    done = _convert(built / name, trust=True)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(next(iter(_run(done.proto, {done.proto.graph.input[0].name: x}).values())), 2 * x)


# --- without TensorFlow ---------------------------------------------------------------------------------------------
def _archive(path: Path, config: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
        archive.writestr("model.weights.h5", b"weights" * 500)
    return path


def _layer(kind: str, **given: object) -> dict[str, object]:
    return {"module": "keras.layers", "class_name": kind, "config": {"name": "one"}, "registered_name": None} | given


def _model(*layers: object, **given: object) -> dict[str, object]:
    return {"module": "keras", "class_name": "Sequential", "config": {"name": "net", "layers": layers}} | given


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        (_model(_layer("Lambda")), errors.UnsafeModelError, "'one'"),
        (_model(_model(_layer("Lambda"))), errors.UnsafeModelError, "'one'"),
        (
            _model(_layer("TimeDistributed", config={"name": "t", "layer": _layer("Lambda")})),
            errors.UnsafeModelError,
            "one",
        ),
        (
            _model(_layer("Dense", config={"name": "d", "activation": {"class_name": "__lambda__", "config": {}}})),
            errors.UnsafeModelError,
            "'d'",
        ),
        (_model(_layer("get_file", module="keras.utils")), errors.UnsafeModelError, "keras.utils.get_file"),
        (_model(_layer("get_file", module="keras.src.utils.x")), errors.UnsafeModelError, "get_file"),
        (_model(_layer("system", module="os")), errors.UnsupportedOpError, "'system' of module 'os'"),
        (_model(_layer("Mine", module=None, registered_name="pkg>Mine")), errors.UnsupportedOpError, "pkg>Mine"),
        ("{", errors.ModelFileError, "no JSON"),
    ],
)
def test_a_config_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: object, kind: type[Exception], text: str
) -> None:
    monkeypatch.setenv(keras.PYTHON_VARIABLE, str(tmp_path / "must-not-start"))
    with pytest.raises(kind, match=text):
        _convert(_archive(tmp_path / "m.keras", config))


def test_training_settings_are_not_loaded_and_not_judged() -> None:
    loss = {"module": "my.losses", "class_name": "Mine", "config": {}}
    keras_worker.scan_config(_model(_layer("Dense"), compile_config={"loss": loss}), "m", trust=False)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "docs.keras", "w") as archive:
        archive.writestr("readme.txt", "no model")
    whole = _archive(tmp_path / "whole.keras", _model()).read_bytes()
    (tmp_path / "cut.keras").write_bytes(whole[:-40])
    at = whole.index(b"weightsweights")
    (tmp_path / "flipped.keras").write_bytes(whole[:at] + b"W" + whole[at + 1 :])
    (tmp_path / "text.h5").write_text("no model")
    (tmp_path / "empty_saved").mkdir()
    for name, text in [
        ("docs.keras", "is a zip but no Keras file.*config.json"),
        ("cut.keras", "truncated"),
        ("flipped.keras", "damaged in model.weights.h5"),
        ("text.h5", "no HDF5"),
        ("empty_saved", "no SavedModel"),
        ("missing.keras", "cannot read"),
    ]:
        with pytest.raises(errors.ModelFileError, match=text) as caught:
            _convert(tmp_path / name)
        assert name in str(caught.value)


def _interpreter(path: Path, body: str) -> Path:
    """A stand-in for a Python whose TensorFlow does `body`."""
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\nsys.stdin.readline()\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("sys.exit('Illegal instruction in oneDNN')", "ended with code 1: Illegal instruction in oneDNN"),
        ("os.kill(os.getpid(), 11)", "died by signal 11"),
    ],
)
def test_a_crash_is_one_line_and_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, text: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(keras.PYTHON_VARIABLE, str(_interpreter(tmp_path / "python", body)))
    with pytest.raises(errors.ModelFileError, match=text) as caught:
        _convert(_archive(tmp_path / "m.keras", _model()))
    (log,) = tmp_path.glob("edgekit-keras-*.log")
    assert str(log) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("edgekit-keras-*")) == [log]


def test_an_interrupt_ends_the_process_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    body += "print(json.dumps({'stage': 'import'}), flush=True)\ntime.sleep(600)"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(keras.PYTHON_VARIABLE, str(_interpreter(tmp_path / "python", body)))

    def interrupt(stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _convert(_archive(tmp_path / "m.keras", _model()), progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list(tmp_path.glob("edgekit-keras-*"))


def test_a_python_without_tensorflow_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _archive(tmp_path / "m.keras", _model())
    monkeypatch.setenv(keras.PYTHON_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(errors.MissingExtraError, match=r"nowhere.*pip install 'edgekit\[keras\]'"):
        _convert(path)
    bare = tmp_path / "python"  # a real Python that sees the standard library only
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv(keras.PYTHON_VARIABLE, str(bare))
    with pytest.raises(errors.MissingExtraError, match=r"needs tensorflow.*pip install 'edgekit\[keras\]'"):
        _convert(path)


def test_legacy_keys_that_change_nothing_are_dropped_and_others_refused() -> None:
    config = {"layers": [{"class_name": "DepthwiseConv2D", "config": {"name": "d", "groups": 1, "kernel_size": 3}}]}
    assert keras_worker.drop_legacy(config, "m.h5")
    assert config["layers"][0]["config"] == {"name": "d", "kernel_size": 3}
    assert not keras_worker.drop_legacy(config, "m.h5")
    with pytest.raises(keras_worker.Refused, match=r"'r'.*time_major=True"):
        keras_worker.drop_legacy([{"class_name": "LSTM", "config": {"name": "r", "time_major": True}}], "m.h5")


def test_shapes_fill_what_is_open_and_contradict_nothing() -> None:
    known: dict[str, tuple[int | None, ...]] = {"x": (None, None, 3)}
    assert keras_worker.merge_shapes(known, {"x": [-1, 5, 3]}) == {"x": (None, 5, 3)}
    assert keras_worker.merge_shapes(known, {"x": [1, 5, -1]}) == {"x": (1, 5, 3)}
    for asked, text in (([-1, 5], "has 2 sizes"), ([1, 5, 4], "size 2 is 3"), ([1, -1, 3], "seq|size 1")):
        with pytest.raises(keras_worker.Refused, match=text):
            keras_worker.merge_shapes(known, {"x": asked})


def test_names_are_clean_and_unique() -> None:
    assert keras_worker.clean_names(["a:0", "a", "b/c:0", ""], {"b/c"}) == ("a", "a_1", "b/c_1", "tensor")


def _graph() -> onnx.GraphProto:
    """y = x if x.sum() > 0 else -x, with a value inside that bears the name the output is to get."""
    branches = {
        key: helper.make_graph(
            [helper.make_node(op, ["x:0"], [f"{key}_out"])],
            key,
            [],
            [helper.make_tensor_value_info(f"{key}_out", TensorProto.FLOAT, [None])],
        )
        for key, op in (("then_branch", "Identity"), ("else_branch", "Neg"))
    }
    nodes = [
        helper.make_node("ReduceSum", ["x:0"], ["y"], keepdims=0),
        helper.make_node("Greater", ["y", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y:0"], **branches),
    ]
    vector = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in ("x:0", "y:0")]
    zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")
    return helper.make_graph(nodes, "g", vector[:1], vector[1:], [zero])


def test_renaming_reaches_inner_graphs_and_makes_way() -> None:
    graph = _graph()
    keras_worker.rename_values(graph, {"x:0": "x", "y:0": "y"})
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    x = np.array([1, -3, 0.5], np.float32)
    assert np.array_equal(_run(model, {"x": x})["y"], -x)


def test_erfc_is_rewritten_exactly() -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Erfc", ["x"], ["y"], name="gelu/Erfc")], "g", values[:1], values[1:])
    keras_worker.rewrite_erfc(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    x = np.linspace(-5, 5, 41, dtype=np.float32)
    want = np.array([math.erfc(v) for v in x])
    assert np.abs(_run(model, {"x": x})["y"] - want).max() <= 4e-7  # two float32 roundings of numbers up to 2
