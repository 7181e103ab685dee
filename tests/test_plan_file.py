"""plan.toml: written and read back to the last bit, changed by people, refused in one line where it makes no sense."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit import pipeline
from edgekit.errors import ArtifactError, EdgekitError, UsageError
from edgekit.passes import plan_file
from edgekit.passes.plan import Activation, QuantizationPlan, Weight, activation
from tests.models import MODELS
from tests.quantize_graphs import normal

# --- a round trip ----------------------------------------------------------------------------------------
names = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        'a"b',
        "a'b",
        "a\\b",
        "a.b",
        "[x]",
        "a = 1",
        "#",
        "a\nb",
        "a\r\nb",
        "\x00",
        "\x1f",
        "\x7f",
        "\x85",
        "\u2028",
        "日本",
        "🙂",
    ]
)
reals = st.floats(-(2.0**100), 2.0**100, width=32)
scales = st.floats(2.0**-100, 2.0**60, width=32)


@st.composite
def plans(draw: st.DrawFn) -> QuantizationPlan:
    nodes = draw(st.lists(names, unique=True, max_size=5))
    quantized = nodes[: draw(st.integers(0, len(nodes)))]
    tensors = draw(st.lists(names, unique=True, max_size=4))
    weights, shifts = {}, {}
    for name in quantized:
        if draw(st.booleans()):
            count = draw(st.integers(1, 4))
            raw = draw(st.binary(max_size=16))
            own = tuple(draw(st.lists(scales, min_size=count, max_size=count)))
            weights[name] = Weight(draw(names), draw(st.integers(0, 3)), draw(st.sampled_from([7, 8])), own, raw)
            if draw(st.booleans()):
                shifts[name] = tuple(draw(st.lists(reals, min_size=count, max_size=count)))
    return QuantizationPlan(
        weight_bits=draw(st.sampled_from([7, 8])),
        activation_bits=draw(st.sampled_from([8, 16])),
        method=draw(names),
        quantized=tuple(quantized),
        fused={n: draw(st.sampled_from(["kept", "removed"])) for n in quantized if draw(st.booleans())},
        float_nodes={n: draw(names) for n in nodes[len(quantized) :]},
        activations={
            n: replace(activation(draw(reals), draw(reals), "kl"), method=draw(st.sampled_from(["kl", "given"])))
            for n in tensors
        },
        weights=weights,
        groups=tuple(tuple(draw(st.lists(names, min_size=1, max_size=3))) for _ in range(draw(st.integers(0, 2)))),
        factors={n: tuple(draw(st.lists(scales, max_size=3))) for n in tensors if draw(st.booleans())},
        bias_shifts=shifts,
        scores={draw(names): {"sqnr_db": draw(reals), "agreement": 0.5}},
        samples=draw(st.integers(0, 10**6)),
        seed=draw(st.integers(0, 2**31)),
    )


@given(plans(), st.text("0123456789abcdef", min_size=1))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, plan: QuantizationPlan, digest: str) -> None:
    path = tmp_path_factory.getbasetemp() / "round" / "plan.toml"
    path.parent.mkdir(exist_ok=True)
    plan_file.write(path, plan, digest, {"a": "Conv"})
    tomllib.loads(path.read_text(encoding="utf-8"))
    again = plan_file.read(path)
    assert again.plan == plan
    assert list(again.plan.quantized) == list(plan.quantized)
    assert list(again.plan.activations) == list(plan.activations)
    assert again.model_sha256 == digest
    assert not again.overrides
    assert not list(path.parent.glob(".*"))


def sample_plan() -> QuantizationPlan:
    return QuantizationPlan(
        weight_bits=8,
        method="minmax",
        quantized=("dense", "relu"),
        fused={"relu": "removed"},
        float_nodes={"lstm": "LSTM has no integer form"},
        activations={"x": activation(-1, 2, "minmax"), "h": activation(0, 3, "mse")},
        weights={"dense": Weight("w", 1, 8, (0.5, 0.25), bytes(range(8)))},
        bias_shifts={"dense": (0.125, -1e-9)},
        groups=(("h", "x"),),
        factors={"h": (1.0, 2.0)},
        scores={"minmax": {"sqnr_db": 31.5}},
        samples=7,
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    plan_file.write(path, sample_plan(), "00ff", {"dense": "Gemm", "relu": "Relu"})
    return path


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path, written: Path) -> None:
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "plan.toml"
    plan_file.write(other, sample_plan(), "00ff", {"dense": "Gemm", "relu": "Relu"})
    assert other.read_bytes() == written.read_bytes()
    assert other.with_suffix(".npz").read_bytes() == written.with_suffix(".npz").read_bytes()


def test_integers_of_an_earlier_plan_do_not_stay(written: Path) -> None:
    plan = sample_plan()
    plain = replace(plan, weights={"dense": replace(plan.weights["dense"], integers=b"")})
    plan_file.write(written, plain, "00ff", {})
    assert not written.with_suffix(".npz").exists()
    assert plan_file.read(written).plan == plain


def test_a_plan_in_which_all_is_float(tmp_path: Path) -> None:
    plan = QuantizationPlan(8, "minmax", (), {}, {"a": "kept float on request"}, {}, {})
    plan_file.write(tmp_path / "plan.toml", plan, "00", {})
    assert plan_file.read(tmp_path / "plan.toml").plan == plan


# --- what is refused -------------------------------------------------------------------------------------
def refused(path: Path, kind: type[EdgekitError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        plan_file.read(path)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value), str(caught.value)


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_missing_or_no_toml(tmp_path: Path) -> None:
    refused(tmp_path / "plan.toml", ArtifactError, "no plan at")
    for content in (b"\xff\xfe", b"[", b"a = \n", b"a = 1\na = 2\n"):
        (tmp_path / "plan.toml").write_bytes(content)
        refused(tmp_path / "plan.toml", ArtifactError, "cannot read the plan")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", ArtifactError, "cannot read the plan")


@pytest.mark.parametrize(("old", "new"), [("schema = 1", "schema = 99"), ("plan_schema = 4", "plan_schema = 1")])
def test_another_schema(written: Path, old: str, new: str) -> None:
    refused(edited(written, old, new), ArtifactError, "schema")


def test_another_schema_of_overrides_only(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('schema = 2\n[override.layers]\n"a" = "float"\n', encoding="utf-8")
    refused(tmp_path / "p.toml", ArtifactError, "schema 2")


def test_damaged_moved_or_missing_integers(written: Path) -> None:
    beside = written.with_suffix(".npz")
    content = beside.read_bytes()
    beside.write_bytes(content[:-3] + b"abc")
    refused(written, ArtifactError, "plan.npz", "copy the two files together")
    beside.unlink()
    refused(written, ArtifactError, "plan.npz", "missing")
    for junk in (b"", b"no zip", content[: len(content) // 2]):
        beside.write_bytes(junk)
        digest = hashlib.sha256(content).hexdigest()
        text = written.read_text(encoding="utf-8")
        written.write_text(text.replace(digest, hashlib.sha256(junk).hexdigest()), encoding="utf-8")
        refused(written, ArtifactError, "damaged")
        written.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scale = ", "scale = -"),
        ("zero_point = ", "zero_point = 9"),
        ('name = "x"', 'nam = "x"'),
        ("weight_scales = [0.5", "weight_scales = [0.0"),
        ("weight_scales = [0.5", "weight_scales = [nan"),
        ("bits = 8\n\n", "bits = 9\n\n"),
        ("weight_bits = 8\nweight_r", "weight_bits = 9\nweight_r"),
        ('integers = "plan.npz"', 'integers = "../plan.npz"'),
        ('integers = "plan.npz"', "integers = 5"),
        ('integers = "plan.npz"\n', ""),
        ("samples = 7\n", ""),
        ("[[tensor]]", "[[tensor]]\nsurprise = 1"),
        ("members = [", "members = [3, "),
        ('"h" = [1.0', '"h" = 3 # ['),
    ],
)
def test_damaged_by_hand(written: Path, old: str, new: str) -> None:
    refused(edited(written, old, new), ArtifactError, "damaged")


def test_layers_as_text(written: Path) -> None:
    head = written.read_text(encoding="utf-8").split("\n[override")[0]
    written.write_text(f'{head}layer = ["dense"]\n', encoding="utf-8")
    refused(written, ArtifactError, "damaged")


def test_a_layer_made_float_in_its_row(written: Path) -> None:
    refused(edited(written, 'precision = "int8"', 'precision = "float"'), UsageError, "dense", "[override.layers]")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[overide.layers]\n", "overide"),
        ("surprise = 1\n", "surprise"),
        ("override = 3\n", "override"),
        ("[override]\nlayers = 3\n", "layers"),
        ("[override.layer]\n", "layer"),
        ('[override.layers]\n"a" = "int4"\n', "int4"),
        ('[override.layers]\n"a" = 8\n', "8"),
        ('[override.layers]\n"a" = ["float"]\n', "a"),
        ('[override.tensors]\n"a" = 3\n', "a"),
        ('[override.tensors]\n"a" = { low = 1.0 }\n', "a"),
        ('[override.tensors]\n"a" = { low = 1.0, high = 1.0 }\n', "a"),
        ('[override.tensors]\n"a" = { low = 0.0, high = inf }\n', "a"),
        ('[override.tensors]\n"a" = { low = "0", high = 1 }\n', "a"),
        ('[override.tensors]\n"a" = { method = "best" }\n', "best"),
        ('[override.tensors]\n"a" = { method = ["kl"] }\n', "kl"),
        ('[override.tensors]\n"a" = { method = "kl", low = 0 }\n', "a"),
    ],
)
def test_overrides_that_make_no_sense(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
    refused(tmp_path / "plan.toml", UsageError, word)


def test_a_misspelt_table_in_a_whole_plan_is_not_overlooked(written: Path) -> None:
    refused(edited(written, "\n[override.layers]", "\n[overrides.layers]"), UsageError, "overrides")


def test_overrides_are_read(written: Path) -> None:
    edited(written, "\n[override.layers]", '\n[override.layers]\n"a*" = "float"\n"b" = "int8"')
    edited(
        written, "\n[override.tensors]", '\n[override.tensors]\n"x" = { low = -1, high = 2.5 }\n"y" = { method = "kl" }'
    )
    told = plan_file.read(written)
    assert told.overrides.layers == {"a*": "float", "b": "int8"}
    assert told.overrides.tensors == {"x": {"low": -1, "high": 2.5}, "y": {"method": "kl"}}
    assert told.plan == sample_plan()


# --- matching --------------------------------------------------------------------------------------------
def test_patterns_match_names() -> None:
    found = plan_file.match(
        {"block4/*": "float", "a?": 1, "[x]": 2}, ["block4/a", "block4/b", "ab", "abc", "[x]", "x"], "layer"
    )
    assert found == {"block4/a": "float", "block4/b": "float", "ab": 1, "[x]": 2}


@given(st.lists(names, min_size=1, unique=True))
def test_a_whole_name_matches_itself_whatever_it_holds(given_names: list[str]) -> None:
    for name in given_names:
        assert plan_file.match({name: 1}, given_names, "layer") == {name: 1}


def test_what_matches_nothing_and_what_contradicts() -> None:
    with pytest.raises(UsageError, match="'blok' matches no layer"):
        plan_file.match({"blok": "float"}, ["block"], "layer")
    with pytest.raises(UsageError, match=r"'a\*' and 'ab' contradict each other for layer 'ab'"):
        plan_file.match({"a*": "float", "ab": "int8"}, ["ab"], "layer")
    assert plan_file.match({"a*": "float", "ab": "float"}, ["ab"], "layer") == {"ab": "float"}


# --- through convert -------------------------------------------------------------------------------------
PLAN, INTEGERS = "first/plan-w7a8.toml", "first/plan-w7a8.npz"
ONLY = """schema = 1
description = "one"
candidates = [ { backend = "onnxruntime", precision = "float32" }, { backend = "onnxruntime", precision = "int8" } ]
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a build of them in 7 bits, which is right on every CPU."""
    here = tmp_path_factory.mktemp("built")
    (here / "one.toml").write_text(ONLY, encoding="utf-8")
    M.save(MODELS["mlp"](), here / "m.onnx")
    M.save(MODELS["conv1d"](), here / "other.onnx")
    np.savez(here / "d.npz", x=normal(60, 12, seed=5))
    convert(here, "first", data=here / "d.npz")
    return here


def convert(here: Path, out: str, **options: Any) -> dict[str, Any]:
    model = options.pop("model", "m.onnx")
    return pipeline.convert(here / model, ["one"], targets_dir=here, out=here / out, **{"weight_bits": 7, **options})


def artifact(here: Path, out: str) -> tuple[bytes, dict[str, Any]]:
    folder = here / out / "one" / "onnxruntime-int8"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return (folder / "model.onnx").read_bytes(), manifest["quantization"]


def test_a_plan_makes_the_same_artifact_without_data(built: Path) -> None:
    done = convert(built, "again", plan=built / PLAN)
    assert {r["status"] for r in done["artifacts"]} == {"made"}
    again, record = artifact(built, "again")
    before, first = artifact(built, "first")
    assert again == before
    for key in ("activations", "weights", "bias_shifts", "quantized", "float_nodes", "factors", "method"):
        assert record[key] == first[key]


def test_a_plan_from_a_build_is_for_the_cached_model_as_well(built: Path) -> None:
    """The second run reads the cleaned-up model from the cache: its digest must be the same."""
    done = convert(built, "first", plan=built / PLAN)
    assert {r["status"] for r in done["artifacts"]} <= {"made", "reused"}


def test_a_plan_for_another_model(built: Path) -> None:
    with pytest.raises(ArtifactError, match="for another model"):
        convert(built, "o", model="other.onnx", plan=built / PLAN)


def test_a_plan_of_other_bits(built: Path) -> None:
    rows = convert(built, "eight", plan=built / PLAN, weight_bits=8)["artifacts"]
    (row,) = [r for r in rows if r["candidate"] == "onnxruntime-int8"]
    assert row["status"] == "not run"
    assert "7-bit weights" in row["why"]


def changed(built: Path, name: str, text: str) -> Path:
    """The build's plan, its integers, and overrides."""
    folder = built / name
    folder.mkdir()
    plan = folder / "plan.toml"
    (folder / "plan-w7a8.npz").write_bytes((built / INTEGERS).read_bytes())
    content = (built / PLAN).read_text(encoding="utf-8")
    head, tail = content.split("[override.layers]\n\n[override.tensors]\n")
    plan.write_text(f"{head}{text}{tail}", encoding="utf-8")
    return plan


def layer_names(built: Path) -> list[str]:
    plan = plan_file.read(built / PLAN).plan
    assert plan is not None
    return [n for n in plan.quantized if n in plan.weights]


def test_a_layer_is_kept_float(built: Path) -> None:
    first, second = layer_names(built)
    plan = changed(built, "float", f'[override.layers]\n"{first}" = "float"\n')
    convert(built, "float/b", plan=plan, data=built / "d.npz")
    _, record = artifact(built, "float/b")
    assert first in record["float_nodes"]
    assert first not in record["weights"]
    assert second in record["weights"]


def test_a_range_is_given(built: Path) -> None:
    plan = changed(built, "range", '[override.tensors]\n"x" = { low = -20.0, high = 10.0 }\n')
    convert(built, "range/b", plan=plan, data=built / "d.npz")
    _, record = artifact(built, "range/b")
    x = record["activations"]["x"]
    assert (x["low"], x["high"], x["method"]) == (-20.0, 10.0, "given")
    assert x["scale"] == float(np.float32(30 / 255))


def test_an_estimator_is_given(built: Path) -> None:
    plan = changed(built, "method", '[override.tensors]\n"x" = { method = "average" }\n')
    convert(built, "method/b", plan=plan, data=built / "d.npz")
    _, record = artifact(built, "method/b")
    assert record["activations"]["x"]["method"] == "average"


def test_overrides_alone(built: Path) -> None:
    path = built / "only.toml"
    first, _ = layer_names(built)
    path.write_text(f'[override.layers]\n"{first}" = "float"\n', encoding="utf-8")
    convert(built, "only", plan=path, data=built / "d.npz")
    assert first in artifact(built, "only")[1]["float_nodes"]


def test_overrides_need_data(built: Path) -> None:
    path = built / "nodata.toml"
    path.write_text('[override.layers]\n"*" = "float"\n', encoding="utf-8")
    with pytest.raises(EdgekitError) as caught:
        convert(built, "nodata", plan=path)
    assert caught.value.exit_code == 23


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('[override.layers]\n"nothing/*" = "float"\n', "nothing/"),
        ('[override.tensors]\n"nope" = { method = "kl" }\n', "nope"),
    ],
)
def test_overrides_of_nothing(built: Path, text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=word):
        convert(built, "nothing", plan=tmp_path / "p.toml", data=built / "d.npz")


def test_the_file_tells_what_the_manifest_tells(built: Path) -> None:
    told = plan_file.read(built / PLAN).plan
    _, record = artifact(built, "first")
    assert told is not None
    assert told.method == record["method"]
    assert {n: Activation(**a) for n, a in record["activations"].items()} == told.activations
    assert told.samples == 60
