"""Answers to files and streams, by the command line and a bundle's own program: against ONNX Runtime, pillow, numpy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from PIL import Image

import edgekit
from edgekit import artifact, backends, pipeline, running
from edgekit import model as M
from edgekit.bench.client import Worker, local_command
from edgekit.choosing import choose
from edgekit.errors import (
    ArtifactError,
    BundleError,
    DatasetError,
    EdgekitError,
    ImageError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from edgekit.preprocessing import Preprocessing
from tests import models
from tests.models import _model

HOME = Path(edgekit.__file__).parent
RNG = np.random.default_rng(5)
NAMES = ("cat", "hot dog", "café", "日本")
HOW = Preprocessing(resize=(10, 10), scale=1 / 255)
PHOTO = RNG.integers(0, 256, (24, 31, 3), dtype=np.uint8)


def tokens_model(looks_back: bool) -> ir.Model:
    """Per position 3 scores of the token there; or of the mean of all tokens, which padding moves."""
    table = RNG.normal(size=(3, 5)).astype(np.float32)
    mean = "m = ReduceMean<keepdims=1>(e, one)  z = Add(e, m)" if not looks_back else "z = Identity(e)"
    more = {} if looks_back else {"one": np.array([1], np.int64)}
    return _model(
        f"tok (int64[batch,4] ids) => (float[batch,4,3] y) {{ e = Gather(table, ids)  {mean}  y = MatMul(z, w) }}",
        table=table, w=RNG.normal(size=(5, 3)).astype(np.float32), **more,
    )  # fmt: skip


MODELS = {
    "image": models.mobile_nhwc(),
    "fixed": models.cnn_nchw(),
    "row": models.mlp(),
    "two": models.two_inputs_two_outputs(),
    "tokens": tokens_model(looks_back=True),
    "mixed": tokens_model(looks_back=False),
}
TOLD: Mapping[str, tuple[Preprocessing, Sequence[str], Sequence[str]]] = {
    "image": (HOW, NAMES, ("x",)),
    "fixed": (Preprocessing(layout="NCHW"), (), ()),
    "tokens": (Preprocessing(), ("\n", "a", "b"), ()),
    "mixed": (Preprocessing(), ("\n", "a", "b"), ()),
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a build of each of MODELS, one ONNX Runtime artifact in it."""
    root = tmp_path_factory.mktemp("büilds")
    backend = backends.get("onnxruntime")
    for name, model in MODELS.items():
        build = artifact.open_build(root / name)
        how, labels, pixels = TOLD.get(name, (Preprocessing(), (), ()))
        with artifact.staged(build, build / "cpu" / "onnxruntime-float32") as folder:
            backend.lower(model, "float32", folder)
            manifest = artifact.Manifest(
                "cpu", "onnxruntime", "float32", "id", M.signature(model).to_json(), {"file": f"{name}.onnx"},
                preprocessing=how.to_json(), labels=tuple(labels), pixels=tuple(pixels),
            )  # fmt: skip
            artifact.write_manifest(folder, manifest)
    return root


def session(name: str) -> ort.InferenceSession:
    return ort.InferenceSession(M.to_bytes(MODELS[name]), providers=["CPUExecutionProvider"])


def asked(build: Path, *files: Path | str, lines: bytes | None = None, **given: Any) -> list[dict[str, Any]]:
    """The documents that a call answers with."""
    said: list[str] = []
    stream = None if lines is None else lines.splitlines(keepends=True)
    running.answers(build, None, files, stream=stream, say=said.append, as_json=True, **given)
    return [json.loads(text) for text in said]


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    return powers / powers.sum()


# --- images ----------------------------------------------------------------------------------------
def expected_scores(x: np.ndarray) -> np.ndarray:
    small = np.asarray(Image.fromarray(x).resize((10, 10), Image.Resampling.BILINEAR))
    return session("image").run(None, {"x": small[None].astype(np.float32) * np.float32(1 / 255)})[0][0]


def test_a_picture_gets_the_names_and_scores_of_its_classes(builds: Path, tmp_path: Path) -> None:
    path = tmp_path / "phöto 日本.png"
    Image.fromarray(PHOTO).save(path)
    (document,) = asked(builds / "image", path, top=3)
    scores = expected_scores(PHOTO)
    order = np.argsort(-scores)[:3]
    assert {k: document[k] for k in ("schema", "input", "candidate", "notes")} == {
        "schema": 1, "input": str(path), "candidate": "onnxruntime-float32", "notes": [],
    }  # fmt: skip
    answer = document["answers"][0]["y"]
    assert (answer["kind"], answer["unit"]) == ("classes", "score")
    assert [row["index"] for row in answer["top"]] == order.tolist()
    assert [row["label"] for row in answer["top"]] == [NAMES[i] for i in order]
    # one float32 model in two builds of the same kernels
    np.testing.assert_allclose([row["score"] for row in answer["top"]], scores[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([row["softmax"] for row in answer["top"]], softmax(scores)[order], rtol=1e-4)


def test_options_win_over_the_manifest(builds: Path, tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "p.png")
    (document,) = asked(builds / "image", tmp_path / "p.png", preprocessing={"resize": "14x12", "crop": "10x10"})
    large = np.asarray(Image.fromarray(PHOTO).resize((12, 14), Image.Resampling.BILINEAR))[2:12, 1:11]
    scores = session("image").run(None, {"x": large[None].astype(np.float32) / np.float32(255)})[0][0]
    assert document["answers"][0]["y"]["top"][0]["index"] == int(np.argmax(scores))
    np.testing.assert_allclose(document["answers"][0]["y"]["top"][0]["score"], scores.max(), rtol=1e-5)


def test_undeclared_pixels_are_remarked(builds: Path, tmp_path: Path) -> None:
    Image.fromarray(PHOTO[:11, :13].transpose(1, 0, 2).copy()).save(tmp_path / "p.png")  # 13 x 11, as the model takes
    (document,) = asked(builds / "fixed", tmp_path / "p.png")
    assert len(document["notes"]) == 1
    assert "0 to 255" in document["notes"][0]
    assert asked(builds / "fixed", tmp_path / "p.png", preprocessing={"scale": "1/255"})[0]["notes"] == []


def test_a_fixed_batch_is_filled_and_probabilities_stay(builds: Path, tmp_path: Path) -> None:
    x = RNG.random((3, 13, 11, 3)).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x, y=np.zeros(3))
    (document,) = asked(builds / "fixed", tmp_path / "s.npz", top=7, out=tmp_path / "o.npz")
    first = session("fixed").run(None, {"x": np.ascontiguousarray(x[:2].transpose(0, 3, 1, 2))})[0]
    last = session("fixed").run(None, {"x": np.ascontiguousarray(x[[2, 2]].transpose(0, 3, 1, 2))})[0]
    expected = np.concatenate([first, last[:1]])
    saved = np.load(tmp_path / "o.npz")["y"]
    np.testing.assert_allclose(saved, expected, rtol=1e-5)
    assert len(document["answers"]) == 3
    for answer, probabilities in zip(document["answers"], expected, strict=True):
        assert answer["y"]["unit"] == "probability"
        assert all(row["label"] is None and "softmax" not in row for row in answer["y"]["top"])
        scores = {row["index"]: row["score"] for row in answer["y"]["top"]}
        np.testing.assert_allclose([scores[i] for i in range(7)], probabilities, rtol=1e-5)


def test_one_array_may_be_one_sample_or_many(builds: Path, tmp_path: Path) -> None:
    one = RNG.random((10, 10, 3)).astype(np.float32)
    np.save(tmp_path / "one.npy", one)
    np.save(tmp_path / "many.npy", one[None])
    np.save(tmp_path / "flat.npy", RNG.random(12))
    same = [asked(builds / "image", tmp_path / f"{name}.npy")[0]["answers"] for name in ("one", "many")]
    assert same[0] == same[1]
    assert len(asked(builds / "row", tmp_path / "flat.npy")[0]["answers"]) == 1


# --- rows, several inputs --------------------------------------------------------------------------
def row_values(x: np.ndarray) -> np.ndarray:
    return session("row").run(None, {"x": x.astype(np.float32)})[0]


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
@pytest.mark.parametrize("header", [False, True])
def test_rows_of_a_table(builds: Path, tmp_path: Path, separator: str, header: bool) -> None:
    x = RNG.normal(size=(2, 12))
    lines = [separator.join(repr(float(v)) for v in row) for row in x]
    if header:
        lines = [separator.join([f"f{i}" for i in range(12)]), *lines]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    (document,) = asked(builds / "row", tmp_path / "t.csv")
    got = [a["y"] for a in document["answers"]]
    assert [g["kind"] for g in got] == ["values", "values"]
    np.testing.assert_allclose([g["values"] for g in got], row_values(x), rtol=1e-5, atol=1e-6)


def test_a_label_column_is_left_out(builds: Path, tmp_path: Path) -> None:
    x = RNG.normal(size=12)
    names = [f"f{i}" for i in range(12)]
    cells = [repr(float(v)) for v in x]
    (tmp_path / "t.csv").write_text(
        ",".join([*names[:3], "label", *names[3:]]) + "\n" + ",".join([*cells[:3], "cat", *cells[3:]])
    )
    (document,) = asked(builds / "row", tmp_path / "t.csv")
    np.testing.assert_allclose(document["answers"][0]["y"]["values"], row_values(x[None])[0], rtol=1e-5, atol=1e-6)


def test_several_inputs_come_by_name(builds: Path, tmp_path: Path) -> None:
    a, b = RNG.random((2, 6)).astype(np.float32), RNG.random((2, 4)).astype(np.float32)
    np.savez(tmp_path / "s.npz", b=b, a=a)
    (document,) = asked(builds / "two", tmp_path / "s.npz")
    expected = dict(zip(("h", "y"), session("two").run(["h", "y"], {"a": a, "b": b}), strict=True))
    for at, answer in enumerate(document["answers"]):
        for name, value in expected.items():
            np.testing.assert_allclose(answer[name]["values"], value[at], rtol=1e-5, atol=1e-6)
    np.savez(tmp_path / "c.npz", a=a, bb=b)
    with pytest.raises(DatasetError, match=r"no array 'b' .* did you mean 'bb'"):
        asked(builds / "two", tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", a=a, b=b[:1])
    with pytest.raises(ShapeError, match="different numbers of samples"):
        asked(builds / "two", tmp_path / "d.npz")
    (tmp_path / "t.csv").write_text("1,2,3")
    with pytest.raises(DatasetError, match=r"give a \.npz with a, b"):
        asked(builds / "two", tmp_path / "t.csv")


# --- text ------------------------------------------------------------------------------------------
def test_text_becomes_tokens_and_the_next_one_is_told(builds: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ab\n")
    scores = session("tokens").run(None, {"ids": np.array([[1, 2, 0, 0]])})[0][0, 1]
    (document,) = asked(builds / "tokens", tmp_path / "t.txt")
    answer = document["answers"][0]["y"]
    assert (answer["kind"], answer["position"]) == ("next token", 1)
    assert [row["label"] for row in answer["top"]] == [("\n", "a", "b")[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([row["score"] for row in answer["top"]], np.sort(scores)[::-1], rtol=1e-5)
    (document,) = asked(builds / "tokens", lines=b"bbbab")
    assert document["notes"] == ["the last 4 of 5 tokens: it takes no more"]
    (tmp_path / "t.txt").write_text("é", encoding="utf-8")
    with pytest.raises(DatasetError, match="character 'é' is no token"):
        asked(builds / "tokens", tmp_path / "t.txt")


def test_a_model_that_looks_at_all_tokens_takes_no_fewer(builds: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ab")
    with pytest.raises(DatasetError, match="looks at all of them — give 4 tokens"):
        asked(builds / "mixed", tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("abab")
    assert asked(builds / "mixed", tmp_path / "t.txt")[0]["answers"][0]["y"]["position"] == 3


def test_tokens_without_names_are_numbers(builds: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(["<end>", "yes", "no"]))
    (document,) = asked(builds / "tokens", lines=b"1 2, 1\n", labels=tmp_path / "names.json")
    assert {row["label"] for row in document["answers"][0]["y"]["top"]} == {"<end>", "yes", "no"}
    (document,) = asked(builds / "tokens", lines=b"1 7", labels=tmp_path / "names.json")
    assert document["error"] == "token 7 is outside the model's 3"


# --- what cannot be answered -----------------------------------------------------------------------
def test_bad_files_are_refused_with_what_and_why(builds: Path, tmp_path: Path) -> None:
    build, file = builds / "image", tmp_path / "f.png"
    for name, error, words in (
        ("none.png", DatasetError, "no file"),
        ("folder", DatasetError, "is a folder"),
        ("f.exe", DatasetError, "no known form"),
        ("truncated.png", ImageError, "truncated"),
        ("text.png", ImageError, "cannot identify"),
        ("nan.npz", NonFiniteError, "NaN or Inf"),
        ("pickle.npz", DatasetError, "cannot read"),
        ("broken.npz", DatasetError, "cannot read"),
        ("size.npz", ShapeError, r"\(5,\), which are no images.*shape \(10, 10, 3\)"),
        ("empty.csv", DatasetError, "no row of numbers"),
        ("words.csv", DatasetError, "line 2: 'x' is no number"),
    ):
        file = tmp_path / name
        if name == "folder":
            file.mkdir()
        elif name == "truncated.png":
            Image.fromarray(PHOTO).save(file)
            file.write_bytes(file.read_bytes()[:200])
        elif name == "nan.npz":
            np.savez(file, x=np.full((10, 10, 3), np.nan))
        elif name == "pickle.npz":
            np.savez(file, x=np.array([{}], dtype=object))
        elif name == "size.npz":
            np.savez(file, x=np.zeros((2, 5)))
        elif name == "words.csv":
            file.write_text("a,b\n1,x\n")
        elif name != "none.png":
            file.write_text("" if name == "empty.csv" else "words")
        with pytest.raises(error, match=words) as caught:
            asked(build, file)
        assert isinstance(caught.value, EdgekitError)
        assert caught.value.remedy, name


def test_a_picture_of_another_size_names_the_option(builds: Path, tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "p.png")
    with pytest.raises(ShapeError, match="--layout NCHW --resize 13x11") as caught:
        asked(builds / "fixed", tmp_path / "p.png", preprocessing={"layout": "NHWC"})
    assert caught.value.exit_code == 12
    assert asked(builds / "fixed", tmp_path / "p.png", preprocessing={"resize": "13x11"})


def test_a_picture_too_large_to_be_one_is_refused(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # pillow refuses twice as many; a real one takes seconds
    Image.fromarray(PHOTO).save(tmp_path / "p.png")
    with pytest.raises(ImageError, match="decompression bomb"):
        asked(builds / "image", tmp_path / "p.png")


def test_labels_must_be_as_many_as_classes(builds: Path, tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "p.png")
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    with pytest.raises(DatasetError, match="name 3 classes, the model has 4"):
        asked(builds / "image", tmp_path / "p.png", labels=tmp_path / "three.txt")


def test_nothing_or_too_much_to_answer(builds: Path, tmp_path: Path) -> None:
    for given in ({}, {"lines": b"1", "files": ("a",)}):
        with pytest.raises(UsageError):
            asked(builds / "row", *given.get("files", ()), lines=given.get("lines"))  # type: ignore[misc]
    with pytest.raises(UsageError, match="--out"):
        asked(builds / "row", lines=b"1", out=tmp_path / "o.npz")
    with pytest.raises(ArtifactError, match="no candidate 'tflite-int8'"):
        asked(builds / "row", lines=b"1", candidate="tflite-int8")
    (tmp_path / "x.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(BundleError, match="no bundle"):
        asked(tmp_path / "x.tar", lines=b"1")


def test_a_failing_runtime_costs_one_line_of_a_stream(builds: Path, tmp_path: Path) -> None:
    """A worker that answers, one that reports a failure, and the next line still answered."""
    with running.opened(builds / "row") as ready:
        good = {"x": np.zeros((1, 12), np.float32)}
        with pytest.raises(running.RunError, match="infer failed"):
            ready.model.infer({"x": np.zeros((1, 5), np.float32)})
        assert ready.model.infer(good)["y"].shape == (1, 5)


# --- streams, the command line, the bundle's program -----------------------------------------------
def test_every_line_gets_its_line(builds: Path, tmp_path: Path) -> None:
    x = RNG.normal(size=(2, 12))
    np.savez(tmp_path / "ö.npz", x=x[1])
    row = ",".join(repr(float(v)) for v in x[0])
    text = f"{row}\n\n{tmp_path / 'ö.npz'}\r\nnothing\n1,2\n".encode() + b"\xff\xfe\n" + row.replace(",", " ").encode()
    documents = asked(builds / "row", lines=text)
    expected = row_values(x)
    assert [sorted(d) for d in documents] == [
        sorted(("schema", "input", "candidate", *k))
        for k in [
            ("answers", "notes"),
            ("error", "remedy"),
            ("answers", "notes"),
            *[("error", "remedy")] * 3,
            ("answers", "notes"),
        ]
    ]
    for at, sample in ((0, 0), (2, 1), (6, 0)):
        values = documents[at]["answers"][0]["y"]["values"]
        np.testing.assert_allclose(values, expected[sample], rtol=1e-5, atol=1e-6)
    assert documents[1]["error"] == "an empty line"
    assert documents[3]["error"] == "no file 'nothing'"


def bundle(build: Path, folder: Path) -> Path:
    """A bundle of the build's only artifact, by hand: what `run.py` reads of one."""
    (made,) = artifact.artifacts(build)
    manifest = artifact.read_manifest(made)
    shutil.copytree(made, folder / "artifacts" / manifest.id)
    (folder / "runners").mkdir()
    shutil.copy(backends.get(manifest.backend).RUNNER, folder / "runners" / "runner.py")
    for name in ("run", "inputs", "answers"):
        shutil.copy(HOME / "deploy/on_device" / f"{name}.py", folder)
    shutil.copy(HOME / "transform.py", folder)
    entry = {"backend": manifest.backend, "folder": f"artifacts/{manifest.id}", "runner": "runners/runner.py"}
    told = {
        "schema": 1, "kind": "bundle", "name": "x", "ship": manifest.id, "candidates": {manifest.id: entry},
        **manifest.signature, "preprocessing": manifest.preprocessing, "labels": list(manifest.labels), "threads": 1,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def on_device(folder: Path, *words: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The program of a bundle, where an edgekit lies in the way that must not be imported, and the locale is C."""
    decoy = folder.parent / "decoy"
    decoy.mkdir(exist_ok=True)
    (decoy / "edgekit.py").write_text("raise RuntimeError('imported on a device')")
    environment = {**os.environ, "PYTHONPATH": str(decoy), "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(folder / "run.py"), *words]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=environment, timeout=120, check=False)


def command_line(*words: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edgekit", "run", *words]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=120, check=False)


def test_a_device_says_what_the_host_says(builds: Path, tmp_path: Path) -> None:
    folder = bundle(builds / "image", tmp_path / "bündle")
    work = tmp_path / "work"
    work.mkdir()
    Image.fromarray(PHOTO).save(work / "phöto.png")
    for options in ([], ["--json", "--top", "2", "--resize", "12x12", "--crop", "10"]):
        there = on_device(folder, "phöto.png", *options, cwd=work)
        assert (there.returncode, there.stderr) == (0, b"")
        for what in (builds / "image", folder):
            here = command_line(str(what), "--input", "phöto.png", *options, cwd=work)
            assert here.returncode == 0, here.stderr
            assert here.stdout == there.stdout
    label = NAMES[int(np.argmax(expected_scores(PHOTO)))]
    assert on_device(folder, "phöto.png", cwd=work).stdout.decode().startswith(f"phöto.png: {label}  score ")


def test_a_device_answers_a_stream_while_it_is_open(builds: Path, tmp_path: Path) -> None:
    """One line in, one out, before the next is written."""
    folder = bundle(builds / "row", tmp_path / "b")
    row = b"1 " * 11 + b"1\n"
    command = [sys.executable, str(folder / "run.py"), "--stdin", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        expected = row_values(np.ones((1, 12)))[0]
        for line in (row, b"\n", row):
            process.stdin.write(line)
            process.stdin.flush()
            document = json.loads(process.stdout.readline())
            if line == row:
                np.testing.assert_allclose(document["answers"][0]["y"]["values"], expected, rtol=1e-5, atol=1e-6)
            else:
                assert document["error"] == "an empty line"
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_on_a_device_what_is_wrong_is_one_line_and_code_2(builds: Path, tmp_path: Path) -> None:
    folder = bundle(builds / "row", tmp_path / "b")
    work = tmp_path / "work"
    work.mkdir()
    (work / "short.csv").write_text("1,2,3\n")
    (work / "photo.png").write_bytes(b"no image")

    def refused(*words: str) -> str:
        done = on_device(folder, *words, cwd=work)
        assert done.returncode == 2, done.stderr
        assert done.stdout == b""
        text = done.stderr.decode()
        assert "Traceback" not in text
        assert len(text.splitlines()) == 1, text
        return text

    assert refused("none.csv") == "error: no file 'none.csv' — check the path\n"
    assert "samples have shape (n, 3), model input 'x' takes (n, 12)" in refused("short.csv")
    assert "cannot decode image 'photo.png'" in refused("photo.png")
    assert "--resize 0x4 — give height x width" in refused("photo.png", "--resize", "0x4")
    (work / "row.csv").write_text("1 " * 11 + "1")
    assert "cannot write 'none/o.npz'" in refused("row.csv", "--out", "none/o.npz")
    (folder / "artifacts/onnxruntime-float32/model.onnx").write_bytes(b"")
    assert "cannot be opened" in refused("row.csv")
    (folder / "manifest.json").write_text("{}")
    assert "the bundle's manifest is damaged" in refused("row.csv")
    assert on_device(folder, cwd=work).returncode == 2


def test_the_command_line_refuses_in_one_line(builds: Path, tmp_path: Path) -> None:
    done = command_line(str(builds / "row"), "--input", "none.csv", cwd=tmp_path)
    assert done.returncode == DatasetError.exit_code
    assert done.stdout == b""
    assert done.stderr.decode().splitlines()[-1] == "error: no file 'none.csv' — check the path"


# --- which artifact; end to end ---------------------------------------------------------------------
def test_what_measured_best_runs(builds: Path, tmp_path: Path) -> None:
    chosen, why = choose(builds / "row", "cpu")
    assert chosen == "onnxruntime-float32"
    assert "not measured yet" in why
    with pytest.raises(ArtifactError, match="no candidate 'x'"):
        choose(builds / "row", "cpu", candidate="x")


def test_convert_records_names_and_pixels_and_run_uses_them(tmp_path: Path) -> None:
    """From image folders to a named answer, by the commands that a user types."""
    for at, name in enumerate(NAMES):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.roll(PHOTO, at * 7 + k, axis=1)).save(tmp_path / "data" / name / f"{k}.png")
    M.save(MODELS["image"], tmp_path / "m.onnx")
    build = tmp_path / "build"
    pipeline.convert(
        tmp_path / "m.onnx", targets=("tflite",), data=tmp_path / "data", precisions=("float32",), out=build,
        preprocessing=HOW,
    )  # fmt: skip
    (made,) = artifact.artifacts(build)
    manifest = artifact.read_manifest(made)
    assert manifest.labels == tuple(sorted(NAMES))
    assert manifest.pixels == ("x",)
    (document,) = asked(build, tmp_path / "data" / NAMES[0] / "0.png")
    scores = expected_scores(PHOTO)
    best = document["answers"][0]["y"]["top"][0]
    assert best["label"] == sorted(NAMES)[int(np.argmax(scores))]
    np.testing.assert_allclose(best["score"], scores.max(), rtol=1e-4)
    # the same file without its manifest, by the names and the normalization that it brings along
    small = Image.fromarray(PHOTO).resize((10, 10), Image.Resampling.BILINEAR)
    small.save(tmp_path / "small.png")
    (alone,) = asked(made / "model.tflite", tmp_path / "small.png")
    assert alone["answers"][0]["y"]["top"][0]["label"] == best["label"]
    np.testing.assert_allclose(alone["answers"][0]["y"]["top"][0]["score"], best["score"], rtol=1e-4)


def test_photographs_of_a_trained_model(zoo: Path, tmp_path: Path) -> None:
    """Images of the CIFAR test set as .png, streamed: named as ONNX Runtime's scores of the model as it came say."""
    model, names = zoo / "models/mobilenet_v2_cifar.onnx", (zoo / "data/cifar10_labels.txt").read_text().split()
    how = Preprocessing(scale=1 / 127.5, mean=(1.0,))
    pipeline.convert(
        model, targets=("tflite",), data=zoo / "data/cifar10_folder_test50", precisions=("float32",), samples=32,
        out=tmp_path / "b", preprocessing=how,
    )  # fmt: skip
    images = np.load(zoo / "data/cifar10_test.npz")["x"][:40]
    for at, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{at}.png")
    lines = "\n".join(str(tmp_path / f"{at}.png") for at in range(len(images)))
    documents = asked(tmp_path / "b", lines=lines.encode(), top=10)
    whole = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    scores = whole.run(None, {whole.get_inputs()[0].name: (images / 127.5 - 1).astype(np.float32)})[0]
    for document, expected in zip(documents, scores, strict=True):
        (answer,) = document["answers"][0].values()
        assert answer["top"][0]["label"] == names[int(np.argmax(expected))]
        got = {row["index"]: row["score"] for row in answer["top"]}
        # float32 through 20 layers in another runtime
        np.testing.assert_allclose([got[i] for i in range(10)], expected, atol=1e-4 * np.abs(expected).max())


def test_a_worker_tells_whether_it_runs(builds: Path) -> None:
    (made,) = artifact.artifacts(builds / "row")
    worker = Worker(local_command(backends.get("onnxruntime").RUNNER, made, 1), "row")
    assert not worker.running
    with worker:
        worker.load()
        assert worker.running
    assert not worker.running
