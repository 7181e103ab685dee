"""`convert --prune` and `inspect --pruning` on the trained examples: what they make, what it is worth, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgekit import artifact, open_dataset, pipeline, prune_latency, pruning
from edgekit.errors import (
    ArtifactError,
    BudgetError,
    CollapsedError,
    DatasetError,
    NoCalibrationDataError,
    UnsupportedOpError,
    UsageError,
)
from edgekit.inspection_pruning import SHARES, inspect
from edgekit.passes import prune_plan_file
from edgekit.passes.prune_plan import FamilyPlan, PruningPlan
from edgekit.pruning import Request, Verdict, latency, request, samples

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
ONLY = """schema = 1
description = "one"
candidates = [ { backend = "onnxruntime", precision = "float32" }, { backend = "onnxruntime", precision = "int8" } ]
"""


def convert(here: Path, model: str = "digits_cnn", **options: Any) -> dict[str, Any]:
    (here / "one.toml").write_text(ONLY, encoding="utf-8")
    options = {"data": DIGITS / "digits_calib.npz", "precisions": ["float32"], **options}
    return pipeline.convert(DIGITS / f"{model}.onnx", ["one"], targets_dir=here, out=here / "b", **options)


def manifest(here: Path, name: str = "onnxruntime-float32-pruned") -> artifact.Manifest:
    return artifact.read_manifest(here / "b" / "one" / name)


def accuracy(path: Path) -> float:
    """Of an ONNX file on the test digits, in ONNX Runtime, from the raw pixels."""
    with np.load(DIGITS / "digits_test.npz") as data:
        x, y = data["x"].astype(np.float32) / 255, data["y"]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shape = [len(x), *(d for d in session.get_inputs()[0].shape[1:])]
    return float((session.run(None, {session.get_inputs()[0].name: x.reshape(shape)})[0].argmax(-1) == y).mean())


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("half é")
    convert(here, prune="0.5", precisions=["float32", "int8"], calibration="minmax")
    return here


def test_half_the_work_and_nearly_the_accuracy(half: Path) -> None:
    """Both files by ONNX Runtime itself; 450 test digits that pruning never saw."""
    told = manifest(half)
    assert told.pruning is not None
    assert told.pruning["macs_kept"] <= 0.5
    whole, pruned = (half / "b" / "one" / f"onnxruntime-float32{v}" / "model.onnx" for v in ("", "-pruned"))
    assert accuracy(whole) - accuracy(pruned) <= 0.02
    assert pruned.stat().st_size < 0.7 * whole.stat().st_size
    seen = set(told.pruning["sample_ids"])
    assert len(seen) == told.pruning["samples"]["fit"] + told.pruning["samples"]["choose"]


def test_int8_is_made_of_the_pruned_model(half: Path) -> None:
    names = sorted(p.name for p in artifact.artifacts(half / "b"))
    assert names == ["onnxruntime-float32", "onnxruntime-float32-pruned", "onnxruntime-int8-pruned"]
    told = manifest(half, "onnxruntime-int8-pruned")
    assert told.pruning == manifest(half).pruning
    assert told.calibration is not None
    assert told.parity is not None
    assert told.parity["ok"]
    assert manifest(half, "onnxruntime-float32").pruning is None


def test_bench_sets_claims_beside_measurements(half: Path) -> None:
    document = pipeline.bench(half / "b", data=DIGITS / "digits_test.npz", quick=True, threads=["1"], targets_dir=half)
    rows = {(r["precision"], r["variant"]): r for r in document["artifacts"]}
    assert rows["float32", "pruned"]["pruning"] == {
        key: manifest(half).pruning[key]
        for key in ("macs_kept", "parameters_kept")  # type: ignore[index]
    }
    assert rows["float32", None]["quality"]["agreement_with_float"] == 1.0
    assert rows["float32", "pruned"]["quality"]["agreement_with_float"] < 1.0
    assert rows["float32", None]["latency_s"]["ratio_to_float"] == 1.0
    text = pipeline.report(half / "b", kind="md")
    assert re.search(r"onnxruntime-int8-pruned.*claimed \d+ % of the MACs.*measured [\d.]+× the time", text)
    assert not [w for w in document["warnings"] if "made again" in w]


def test_the_plan_does_it_again_and_can_be_edited(half: Path, tmp_path: Path) -> None:
    path = half / "b" / prune_plan_file.FILE
    convert(tmp_path, prune=str(path))
    again, first = (h / "b" / "one" / "onnxruntime-float32-pruned" / "model.onnx" for h in (tmp_path, half))
    assert again.read_bytes() == first.read_bytes()
    plan, sha256 = prune_plan_file.read(path)
    family = next(f for f in plan.families if f.keep < f.units)
    text = path.read_text(encoding="utf-8")
    at = text.index(f'name = "{family.name}"')
    edited = tmp_path / "edited.toml"
    edited.write_text(text[:at] + text[at:].replace(f"keep = {family.keep}", f"keep = {family.units}", 1), "utf-8")
    convert(tmp_path, prune=str(edited))
    got = manifest(tmp_path).pruning
    assert got is not None
    assert next(f for f in got["plan"]["families"] if f["name"] == family.name)["keep"] == family.units
    with pytest.raises(ArtifactError, match="another model"):
        convert(tmp_path, "digits_mlp", prune=str(path))
    edited.write_text(text[:at] + text[at:].replace(f"keep = {family.keep}", "keep = 0", 1), "utf-8")
    with pytest.raises(UsageError, match="keeps 0"):
        convert(tmp_path, prune=str(edited))
    assert sha256


def test_zeros_among_the_weights_are_size_and_no_speed(tmp_path: Path) -> None:
    convert(tmp_path, "digits_mlp", prune="2:4")
    told = manifest(tmp_path)
    assert told.pruning is not None
    assert told.pruning["zeros"] == 0.5
    assert told.pruning["deflated_bytes"][1] < 0.75 * told.pruning["deflated_bytes"][0]
    assert any("no speed is claimed" in note for note in told.notes)
    whole, pruned = (tmp_path / "b" / "one" / f"onnxruntime-float32{v}" / "model.onnx" for v in ("", "-pruned"))
    assert accuracy(whole) - accuracy(pruned) <= 0.01


def test_a_budget_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cut as far as it goes"):
        convert(tmp_path, prune="0.001")


def test_latency_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bisection timed is recorded, and it was asked for; how it times elsewhere is the benchmark's."""
    monkeypatch.setattr(prune_latency, "STEPS", 1)
    convert(tmp_path, prune_latency="1.1x")
    told = manifest(tmp_path).pruning
    assert told is not None
    assert told["timed"]["backend"] == "onnxruntime"
    assert told["timed"]["speedup"] >= 1.1
    with pytest.raises(BudgetError, match="cannot make this model 900× faster"):
        convert(tmp_path, prune_latency="900x")
    with pytest.raises(UsageError, match="exclude"):
        convert(tmp_path, prune_latency="2x", prune="0.5")


def test_auto_keeps_the_budget_and_too_tight_ones_are_refused(tmp_path: Path) -> None:
    convert(tmp_path, "digits_mlp", prune="auto", max_accuracy_drop=0.03)
    told = manifest(tmp_path).pruning
    assert told is not None
    assert told["verdict"]["accuracy_drop"] <= 0.03
    assert told["macs_kept"] <= 0.9
    with pytest.raises(BudgetError, match="pruning alone loses"):
        convert(tmp_path, prune="0.12", max_accuracy_drop=0.0001)


def test_a_collapsed_model_is_refused(half: Path, tmp_path: Path) -> None:
    plan = (half / "b" / prune_plan_file.FILE).read_text(encoding="utf-8")
    edited = tmp_path / "least.toml"
    edited.write_text(re.sub(r"keep = \d+\n(?!frozen)", "keep = 1\n", plan), encoding="utf-8")
    with pytest.raises(CollapsedError, match=r"agrees with the float model on \d"):
        convert(tmp_path, prune=str(edited))
    assert CollapsedError.exit_code == 56
    assert not list((tmp_path / "b").glob("one/*pruned*"))


def test_a_latency_of_another_processor_is_not_timed_here(tmp_path: Path) -> None:
    (tmp_path / "there.toml").write_text(ONLY + '[device]\narch = "armv7l"\n', encoding="utf-8")
    with pytest.raises(UsageError, match="armv7l"):
        pipeline.convert(
            DIGITS / "digits_cnn.onnx", ["there"], data=DIGITS / "digits_calib.npz", targets_dir=tmp_path,
            out=tmp_path / "b", prune_latency="2x",
        )  # fmt: skip
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("text", ["2", "0", "-1", "nan", "macs=", "speed=0.5", "4:2", "0:4", "2:4:8", "half", ""])
def test_what_prune_does_not_understand(text: str) -> None:
    with pytest.raises(UsageError, match="--prune"):
        request(text)


@pytest.mark.parametrize("text", ["1x", "0x", "fast", "", "-2x", "infx"])
def test_what_prune_latency_does_not_understand(text: str) -> None:
    with pytest.raises(UsageError, match="--prune-latency"):
        latency(text)


def test_what_prune_understands() -> None:
    assert (request("0.5"), request("macs=0.5")) == (Request("macs", 0.5),) * 2
    assert {request(f"{k}=0.25").kind for k in ("parameters", "params", "size")} == {"parameters"}
    assert str(request("2:4").pattern) == "2:4"
    assert str(request("weights=0.3").pattern) == "70% zeros"
    assert (request("auto").kind, request("zeros").kind) == ("auto", "zeros")
    assert (latency("2x"), latency("2")) == (Request("latency", 2.0),) * 2


def test_samples_are_apart_and_too_few_are_refused(tmp_path: Path) -> None:
    data = open_dataset(DIGITS / "digits_calib.npz")
    split = samples(data, 0)
    ids = [set(part.sample_ids()) for part in (split.fit, split.choose, split.judge)]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 500
    learn, watch = (set(part.sample_ids()) for part in (split.learn, split.watch))
    assert learn.isdisjoint(watch)
    assert learn | watch == ids[0] | ids[1]
    assert len(watch) == 48
    np.savez(tmp_path / "few.npz", x=np.zeros((9, 28, 28), np.uint8))
    with pytest.raises(DatasetError, match="9 samples are too few to prune with"):
        samples(open_dataset(tmp_path / "few.npz"), 0)
    with pytest.raises(NoCalibrationDataError, match="labels are not needed"):
        convert(tmp_path, prune="0.5", data=None)


def test_few_samples_are_said(tmp_path: Path) -> None:
    with np.load(DIGITS / "digits_calib.npz") as data:
        np.savez(tmp_path / "d.npz", x=data["x"][:60])
    convert(tmp_path, "digits_mlp", prune="0.9", data=tmp_path / "d.npz", preprocessing=_scaled())
    assert any("pruned on 36 samples only" in note for note in manifest(tmp_path).notes)
    assert any("without labels, expect to lose about" in note for note in manifest(tmp_path).notes)


def _scaled() -> Any:
    from edgekit.preprocessing import Preprocessing

    return Preprocessing(scale=1 / 255)


def test_nothing_is_zero_in_this_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="no channel of this model is zero"):
        convert(tmp_path, prune="zeros", data=None)


def test_what_is_expected_falls_with_agreement() -> None:
    losses = [Verdict(100, 20.0, a, None).expected for a in (1.0, 0.98, 0.96, 0.92, 0.85, 0.7)]
    assert losses[0] == 0
    assert losses == sorted(losses)  # type: ignore[type-var]
    assert Verdict(100, 20.0, None, None).expected is None
    assert Verdict(100, 2.0, None, None).collapsed
    assert not Verdict(100, 2.0, 0.9, None).collapsed
    assert "accuracy −1.5 points" in Verdict(100, 20.0, 0.9, 0.015).words()


def plan() -> PruningPlan:
    families = (
        FamilyPlan('a "quoted"\\name \x7f é', 4, 2, (3, 1, 0, 2), ((1, 0.5), (2, 0.75))),
        FamilyPlan("out", 3, 3, (0, 1, 2), (), "output 'y' of the model"),
    )
    return PruningPlan("macs", 0.5, 0.48, 0.4, "reconstruction", families)


def test_a_plan_is_written_and_read(tmp_path: Path) -> None:
    prune_plan_file.write(tmp_path / "p.toml", plan(), "abc")
    assert prune_plan_file.read(tmp_path / "p.toml") == (plan(), "abc")
    assert PruningPlan.from_json(json.loads(json.dumps(plan().to_json()))) == plan()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("schema = 1", "schema = 9", "schema 9"),
        ("order = [3, 1, 0, 2]", "order = [3, 1, 0, 0]", "each of its 4 units once"),
        ("units = 4", "units = 'four'", "damaged"),
        ("\nmeasure", "\n[measure", "cannot read"),
        ("budget = 0.5\n", "", "damaged"),
    ],
)
def test_a_damaged_plan_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "p.toml"
    prune_plan_file.write(path, plan(), "abc")
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(ArtifactError, match=re.escape(told)):
        prune_plan_file.read(path)
    with pytest.raises(ArtifactError, match="no pruning plan at"):
        request(str(tmp_path / "none.toml"))


def test_inspect_tells_the_curve(tmp_path: Path) -> None:
    data = open_dataset(DIGITS / "digits_calib.npz")
    told = inspect(DIGITS / "digits_cnn.onnx", data, out=tmp_path / "p.toml")
    assert [row["asked"] for row in told["curve"]] == list(SHARES)
    assert all(row["macs_kept"] <= row["asked"] for row in told["curve"])
    assert told["curve"][0]["agreement"] >= told["curve"][-1]["agreement"]
    frozen = [f for f in told["families"] if f["frozen"]]
    assert frozen
    assert all("Softmax node" in f["frozen"] for f in frozen)
    free = [f for f in told["families"] if not f["frozen"]]
    assert all(d[0] <= d[1] for f in free for d in zip(f["damage"], f["damage"][1:], strict=False))
    assert prune_plan_file.read(tmp_path / "p.toml")[0].macs <= 0.5


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgekit", "inspect", str(DIGITS / "digits_mlp.onnx"), "--pruning"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == NoCalibrationDataError.exit_code
    assert done.stderr.count("\n") == 1
    done = subprocess.run(
        [*command, "--data", str(DIGITS / "digits_calib.npz")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kept at 50 % of the MACs" in done.stdout


def test_losses_are_a_function() -> None:
    agreements = [a for a, _ in pruning.LOSSES]
    assert agreements == sorted(set(agreements))


def test_int8_keeps_the_zeros(tmp_path: Path) -> None:
    """By the integers of the plan: as many zeros as the sparse float weights have."""
    convert(tmp_path, "digits_mlp", prune="2:4", precisions=["int8"])
    told = manifest(tmp_path, "onnxruntime-int8-pruned")
    assert "reconstructed" in (told.quantization or {})["method"]
    with np.load(tmp_path / "b" / "plan.npz") as stored:
        shares = [float((stored[name] == 0).mean()) for name in stored.files]
    assert shares
    assert min(shares) >= 0.5
