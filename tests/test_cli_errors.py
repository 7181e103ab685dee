"""Bad input through the command line: one line on standard error, the remedy, its own exit code, nothing half-made."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import backends

CLI = [sys.executable, "-m", "edgekit"]
CLASSES = 4


def run(*arguments: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **options
    )  # type: ignore[call-overload, no-any-return]


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit code, exactly one `error:` line as the last, no traceback, and the words that name value and remedy."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error:") for line in lines) == 1
    for word in words:
        assert word in lines[-1], lines[-1]


def mlp(path: Path, features: int = 6, weights: np.ndarray | None = None, batch: int | str = "batch") -> Path:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(features, CLASSES)).astype(np.float32) if weights is None else weights
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["g"], name="dense"), helper.make_node("Relu", ["g"], ["y"])],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.ones(CLASSES, np.float32), "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a good model and good data."""
    mlp(tmp_path / "m.onnx")
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "d.npz", x=rng.random((40, 6), np.float32), y=np.arange(40) % CLASSES)
    return tmp_path


def no_artifacts(folder: Path) -> bool:
    build = folder / "build"
    return not build.exists() or not [p for p in build.rglob("*") if p.name != ".edgekit" and ".cache" not in str(p)]


def test_missing_corrupt_and_truncated_models(here: Path) -> None:
    refused(run("convert", "nowhere.onnx", "--data", "d.npz", cwd=here), 10, "nowhere.onnx")
    (here / "c.onnx").write_bytes(b"\x00\xffgarbage" * 50)
    refused(run("convert", "c.onnx", "--data", "d.npz", cwd=here), 10, "c.onnx")
    (here / "t.onnx").write_bytes((here / "m.onnx").read_bytes()[:-40])
    refused(run("convert", "t.onnx", "--data", "d.npz", cwd=here), 10, "t.onnx")
    (here / "empty.onnx").write_bytes(b"")
    refused(run("convert", "empty.onnx", "--data", "d.npz", cwd=here), 10, "empty.onnx")
    assert not (here / "build").exists()


def test_wrong_extension_and_a_zip_that_is_no_keras_file(here: Path) -> None:
    (here / "m.keras").write_bytes((here / "m.onnx").read_bytes())
    refused(run("convert", "m.keras", "--data", "d.npz", cwd=here), 10, "m.keras")
    with zipfile.ZipFile(here / "z.keras", "w") as archive:
        archive.writestr("notes.txt", "hello")
    refused(run("convert", "z.keras", "--data", "d.npz", cwd=here), 10, "z.keras")
    (here / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(run("convert", "photo.png", "--data", "d.npz", cwd=here), 10, "photo.png")


def test_external_data_outside_the_folder(here: Path) -> None:
    model = onnx.load(here / "m.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    (here / "e.onnx").write_bytes(model.SerializeToString())
    refused(run("convert", "e.onnx", "--data", "d.npz", cwd=here), 14, "../secret.bin")


def test_unsupported_operator_is_named_with_its_node(here: Path) -> None:
    model = onnx.load(here / "m.onnx")
    model.graph.node[1].op_type = "FancyActivation"
    model.graph.node[1].name = "act7"
    model.graph.node[1].domain = "my.company"
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    (here / "u.onnx").write_bytes(model.SerializeToString())
    refused(run("convert", "u.onnx", "--data", "d.npz", cwd=here), 11, "FancyActivation", "act7")


def test_nan_in_weights_and_in_data(here: Path) -> None:
    weights = np.zeros((6, CLASSES), np.float32)
    weights[2, 1] = np.nan
    mlp(here / "n.onnx", weights=weights)
    refused(run("convert", "n.onnx", "--data", "d.npz", cwd=here), 15, "w")
    x = np.zeros((8, 6), np.float32)
    x[3, 0] = np.inf
    np.savez(here / "n.npz", x=x)
    refused(run("convert", "m.onnx", "--data", "n.npz", cwd=here), 15, "3")
    assert no_artifacts(here)


def test_wrong_shape_dtype_and_unknown_size(here: Path) -> None:
    np.savez(here / "s.npz", x=np.zeros((8, 7), np.float32))
    refused(run("convert", "m.onnx", "--data", "s.npz", cwd=here), 12, "7", "6")
    np.savez(here / "t.npz", x=np.array([["a"] * 6] * 4))
    assert run("convert", "m.onnx", "--data", "t.npz", cwd=here).returncode in (12, 20)
    model = onnx.load(here / "m.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "features"
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "features"
    (here / "d.onnx").write_bytes(model.SerializeToString())
    refused(run("convert", "d.onnx", "--data", "d.npz", cwd=here), 12, "--shape x=")


def test_no_data_for_int8(here: Path) -> None:
    refused(run("convert", "m.onnx", cwd=here), 23, "--data", "--precision float32")
    assert not (here / "build").exists()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_pickled_arrays_are_never_unpickled(here: Path) -> None:
    array = np.array([Evil(), Evil()], dtype=object)
    np.savez(here / "p.npz", x=array)
    refused(run("convert", "m.onnx", "--data", "p.npz", cwd=here), 20, "p.npz")
    (here / "q.npy").write_bytes(pickle.dumps(Evil()))
    refused(run("convert", "m.onnx", "--data", "q.npy", cwd=here), 20, "q.npy")
    assert not (here / "pwned").exists()


def test_empty_missing_and_unreadable_data(here: Path) -> None:
    (here / "empty").mkdir()
    refused(run("convert", "m.onnx", "--data", "empty", cwd=here), 20, "empty")
    np.savez(here / "zero.npz", x=np.zeros((0, 6), np.float32))
    refused(run("convert", "m.onnx", "--data", "zero.npz", cwd=here), 20, "zero.npz")
    refused(run("convert", "m.onnx", "--data", "gone.npz", cwd=here), 20, "gone.npz")
    (here / "images" / "cat").mkdir(parents=True)
    (here / "images" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xffnot a jpeg")
    refused(run("convert", "m.onnx", "--data", "images", cwd=here), 22, "broken.jpg")


def test_labels_out_of_range_and_one_class(here: Path) -> None:
    assert run("convert", "m.onnx", "--data", "d.npz", "--precision", "float32", cwd=here).returncode == 0
    x = np.random.default_rng(0).random((12, 6), np.float32)
    np.savez(here / "l.npz", x=x, y=np.full(12, 9))
    refused(run("bench", "build", "--data", "l.npz", "--quick", cwd=here), 21, "9", str(CLASSES))
    np.savez(here / "o.npz", x=x, y=np.zeros(12, np.int64))
    refused(run("bench", "build", "--data", "o.npz", "--quick", cwd=here), 21, "class")


def test_unknown_target_precision_and_bad_profile(here: Path) -> None:
    refused(run("convert", "m.onnx", "-t", "cpuu", "--data", "d.npz", cwd=here), 30, "did you mean 'cpu'")
    refused(run("convert", "m.onnx", "--precision", "int9", "--data", "d.npz", cwd=here), 32, "int8")
    (here / "own").mkdir()
    (here / "own" / "mine.toml").write_text("schema = 1\ndescription = 3\n")
    refused(run("convert", "m.onnx", "-t", "mine", "--targets", "own", cwd=here), 31, "candidates")


def test_an_output_folder_that_is_not_ours(here: Path) -> None:
    (here / "build").mkdir()
    (here / "build" / "thesis.txt").write_text("years of work")
    refused(run("convert", "m.onnx", "--data", "d.npz", cwd=here), 50, "not empty")
    assert [p.name for p in (here / "build").iterdir()] == ["thesis.txt"]


def test_bench_and_report_without_a_build(here: Path) -> None:
    refused(run("bench", "nothing", cwd=here), 52, "edgekit convert")
    assert run("convert", "m.onnx", "--data", "d.npz", "--precision", "float32", cwd=here).returncode == 0
    refused(run("report", "build", cwd=here), 52, "edgekit bench")
    refused(run("bench", "build", "-t", "openvino", cwd=here), 52, "openvino")
    for threads in ("0", "-1", "many", "100000"):
        refused(run("bench", "build", f"--threads={threads}", cwd=here), 2, threads, "all")


def test_a_file_that_outgrows_the_disk(here: Path) -> None:
    """RLIMIT_FSIZE makes every write past 2 kB fail, as a full disk does; a repeat without it goes on."""
    resource = pytest.importorskip("resource")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    mlp(here / "big.onnx", weights=np.ones((6, CLASSES), np.float32))
    mlp(here / "wide.onnx", features=600)
    np.savez(here / "wide.npz", x=np.random.default_rng(0).random((4, 600), np.float32))
    arguments = ("convert", "wide.onnx", "--data", "wide.npz", "--precision", "float32")
    refused(run(*arguments, cwd=here, preexec_fn=limit), 51, "free some space")
    assert no_artifacts(here)
    assert run(*arguments, cwd=here).returncode == 0


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_backend_tells_a_full_disk_from_a_bug(backend: str, here: Path) -> None:
    """The stages before are in the cache; what fails to be written is the runtime's own file."""
    remedy = backends.get(backend).missing()
    if remedy:
        pytest.skip(f"{backend} is not installed: {remedy}")
    resource = pytest.importorskip("resource")
    mlp(here / "wide.onnx", features=600)
    arguments = ("convert", "wide.onnx", "-t", "only", "--targets", ".", "--precision", "float32")
    (here / "only.toml").write_text(
        f'schema = 1\ndescription = "one"\ncandidates = [{{ backend = "{backend}", precision = "float32" }}]\n'
    )
    assert run(*arguments, cwd=here).returncode == 0
    shutil.rmtree(here / "build" / "only")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    refused(run(*arguments, cwd=here, preexec_fn=limit), 51, "free some space")
    assert no_artifacts(here)


def test_ctrl_c_leaves_nothing_half_made_and_a_repeat_goes_on(here: Path) -> None:
    arguments = [*CLI, "convert", "m.onnx", "--data", "d.npz"]
    process = subprocess.Popen(arguments, cwd=here, stderr=subprocess.PIPE, text=True)
    while not (here / "build" / ".cache").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors.strip().splitlines()[-1]
    assert not list((here / "build").glob(".staging-*"))
    for manifest in (here / "build").glob("cpu/*"):
        assert (manifest / "manifest.json").is_file()
    again = subprocess.run(arguments, cwd=here, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert len(list((here / "build").glob("cpu/*/manifest.json"))) >= 2


def test_a_missing_extra_is_named_with_its_install_command(here: Path) -> None:
    """Keras asked for where TensorFlow is not importable."""
    with zipfile.ZipFile(here / "k.keras", "w") as archive:
        archive.writestr("config.json", '{"class_name": "Sequential", "config": {"layers": []}}')
        archive.writestr("metadata.json", "{}")
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")
    blocked = here / "blocked"
    for name in ("tensorflow", "keras", "tf2onnx"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('blocked')")
    env = {k: v for k, v in os.environ.items() if k != "EDGEKIT_KERAS_PYTHON"}
    env["PYTHONPATH"] = str(blocked)
    refused(run("convert", "k.keras", "--data", "d.npz", cwd=here, env=env), 40, "edgekit[keras]")
