"""Several .tflite files in one: every signature computes what its file computed, and equal weights are one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgekit import model as M
from edgekit.backends import tflite
from edgekit.cli import main
from edgekit.dataset import random_dataset
from edgekit.errors import ModelFileError, UsageError
from edgekit.join import join
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from edgekit.sources import tflite as source
from tests.models import cnn_nchw, mobile_nhwc, two_inputs_two_outputs

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("jöin")
    made = {}
    for name, model in {"mobile": mobile_nhwc(), "cnn": cnn_nchw(), "two": two_inputs_two_outputs()}.items():
        made[name] = home / name
        made[name].mkdir()
        tflite.lower(Fold()(model, None), "float32", made[name])
    made["int8"] = home / "int8"
    made["int8"].mkdir()
    folded = Fold()(mobile_nhwc(), None)
    tflite.lower(QuantizeInt8()(folded, random_dataset(M.signature(folded), 16)), "int8", made["int8"])
    return made


def test_every_signature_computes_what_its_file_computed(files: dict[str, Path], tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    out = tmp_path / "all.tflite"
    document = join(files, out)
    assert document["signatures"] == list(files)
    assert document["size_bytes"] == out.stat().st_size
    both = Interpreter(model_path=str(out))
    assert set(both.get_signature_list()) == set(files)
    rng = np.random.default_rng(7)
    for name, folder in files.items():
        alone = Interpreter(model_path=str(folder / "model.tflite")).get_signature_runner()
        for batch in (1, 3):
            shapes = {k: d["shape_signature"] for k, d in alone.get_input_details().items()}
            feeds = {k: rng.normal(size=[batch if n == -1 else n for n in s]).astype("f") for k, s in shapes.items()}
            want, got = alone(**feeds), both.get_signature_runner(name)(**feeds)
            assert set(want) == set(got)
            for key, value in want.items():
                np.testing.assert_array_equal(got[key], value)


def test_equal_weights_are_stored_once(files: dict[str, Path], tmp_path: Path) -> None:
    document = join({"a": files["cnn"], "b": files["cnn"]}, tmp_path / "twice.tflite")
    found = source.read(tmp_path / "twice.tflite")
    starts = [{t.start for t in g.tensors if t.constant and t.size_bytes} for g in found.subgraphs]
    assert starts[0] == starts[1]
    assert document["size_bytes"] < document["apart_bytes"]


def test_weights_stay_aligned(files: dict[str, Path], tmp_path: Path) -> None:
    join(files, tmp_path / "all.tflite")
    found = source.read(tmp_path / "all.tflite")
    assert all((t.start or 0) % 16 == 0 for g in found.subgraphs for t in g.tensors if t.constant)


def test_what_cannot_be_joined_is_refused_and_nothing_is_left(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.tflite"
    with pytest.raises(UsageError, match="two files"):
        join({"a": files["cnn"]}, out)
    join({"a": files["cnn"], "b": files["two"]}, tmp_path / "both.tflite")
    with pytest.raises(ModelFileError, match="holds 2 graphs"):
        join({"a": files["cnn"], "b": tmp_path / "both.tflite"}, out)
    with pytest.raises(ModelFileError, match="no model"):
        join({"a": files["cnn"], "b": tmp_path / "none.tflite"}, out)
    assert [p.name for p in tmp_path.iterdir()] == ["both.tflite"]


def test_the_command(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.tflite"
    arguments = [f"encode={files['mobile']}", f"decode={files['cnn'] / 'model.tflite'}", "-o", str(out), "--json"]
    done = CliRunner().invoke(main, ["join", *arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["signatures"] == ["encode", "decode"]
    wrong = CliRunner().invoke(main, ["join", "a=x", "a=y", "-o", str(out)])
    assert wrong.exit_code == UsageError.exit_code
