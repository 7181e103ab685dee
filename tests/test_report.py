"""Reports: what a person reads must be what the document says, in the terminal and in markdown."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edgekit.errors import ArtifactError, EdgekitError
from edgekit.report import summary
from edgekit.report.markdown import render_markdown
from edgekit.report.render import kind_of, render
from edgekit.report.terminal import print_convert, print_doctor, print_inspection, render_terminal


def row(**changes: Any) -> dict[str, Any]:
    made = {
        "target": "cpu",
        "backend": "onnxruntime",
        "precision": "float32",
        "path": "build/cpu/onnxruntime-float32",
        "sha256": "ab" * 32,
        "size_bytes": 941_234,
        "valid": True,
        "reasons": ["p99 needs 1000 samples, there are 60"],
        "notes": [],
        "latency_s": {
            "p50": 0.0123456,
            "p90": 0.013,
            "p99": None,
            "mean": 0.0125,
            "samples": 60,
            "ratio_to_float": 1.0,
            "ratio_ci95": [1.0, 1.0],
        },
        "load_s": 0.05,
        "first_inference_s": 0.02,
        "peak_rss_bytes": 52_000_000,
        "runtime_version": "1.32.0",
        "threads": 1,
        "quality": {"accuracy": 0.9911, "agreement_with_float": 1.0, "sqnr_db": None},
        "parity": {"per_op_max_lsb": None, "fraction_equal": None, "label_agreement": 1.0},
        "layers": None,
    }
    return {**made, **changes}


def int8(**changes: Any) -> dict[str, Any]:
    latency = {**row()["latency_s"], "p50": 0.0046, "ratio_to_float": 0.3726, "ratio_ci95": [0.361, 0.384]}
    made = {
        "precision": "int8",
        "path": "build/cpu/onnxruntime-int8",
        "size_bytes": 240_000,
        "latency_s": latency,
        "quality": {"accuracy": 0.9889, "agreement_with_float": 0.9978, "sqnr_db": 31.26},
        "parity": {"per_op_max_lsb": 1, "fraction_equal": 0.9999, "label_agreement": 0.9955},
    }
    return row(**{**made, **changes})


@pytest.fixture
def document() -> dict[str, Any]:
    why = "ship onnxruntime-int8: 2.68× faster than the best float32 (onnxruntime-float32) [2.60, 2.77]"
    return {
        "schema": 1,
        "run": "r1",
        "taken": "2030-01-02T03:04:05Z",
        "settings": {"seed": 0, "quick": False},
        "dataset": {"name": "digits_test.npz", "digest": "cd" * 32, "samples": 450},
        "machine": {
            "cpu": "A CPU",
            "isa": ["avx2", "avx512_vnni"],
            "cores_allowed": 4,
            "os": "An OS",
            "before": {"load_1min": 0.1, "governor": "performance", "temperature_c": None},
            "after": {"load_1min": 1.2, "governor": "performance", "temperature_c": None},
            "warnings": [],
        },
        "artifacts": [row(), int8()],
        "verdict": {"cpu": {"ship": "onnxruntime-int8", "threads": 1, "why": why}},
    }


def terminal(document: dict[str, Any], width: int = 160) -> str:
    out = io.StringIO()
    render_terminal(document, Console(file=out, width=width, markup=False, highlight=False))
    return out.getvalue()


def test_every_column_has_a_heading() -> None:
    assert [f.name for f in fields(summary.Line)] == [*summary.HEADINGS, "ships"]


def test_the_verdict_comes_first(document: dict[str, Any]) -> None:
    assert terminal(document).splitlines()[0].startswith("cpu: Ship onnxruntime-int8: 2.68× faster")
    after_title = render_markdown(document).split("\n\n")[1:3]
    assert after_title[0] == "## cpu"
    assert after_title[1].startswith("**Ship onnxruntime-int8: 2.68× faster")


def test_the_figures_are_the_documents(document: dict[str, Any]) -> None:
    line = summary.lines(document, "cpu")[1]
    assert (line.candidate, line.threads, line.p50) == ("onnxruntime-int8", "1", "4.60")
    assert (line.ratio, line.quality, line.delta) == ("0.37 [0.36, 0.38]", "98.89 %", "−0.22")
    assert (line.agreement, line.sqnr, line.parity) == ("99.8 %", "31.3", "≤ 1 LSB, 99.6 %")
    assert (line.size, line.load, line.rss, line.ships) == ("240 kB", "50.0", "52.0 MB", True)
    for text in (terminal(document), render_markdown(document).replace("\\", "")):
        for cell in (line.p50, line.ratio, line.quality, line.delta, line.agreement, line.parity, line.size):
            assert cell in text


def test_only_the_verdicts_thread_count_is_marked(document: dict[str, Any]) -> None:
    document["artifacts"].append(int8(threads=4))
    assert [line.ships for line in summary.lines(document, "cpu")] == [False, True, False]
    assert terminal(document).count("→ onnxruntime-int8") == 1


def test_absent_figures_are_dashes_with_their_reason(document: dict[str, Any]) -> None:
    empty = {**dict.fromkeys(document["artifacts"][0]["latency_s"]), "samples": 0}
    gone = int8(
        backend="openvino",
        valid=False,
        reasons=["the worker died in 'load' with signal 11"],
        latency_s=empty,
        quality=None,
        parity=None,
        load_s=None,
        peak_rss_bytes=None,
    )
    document["artifacts"].append(gone)
    line = summary.lines(document, "cpu")[2]
    assert {line.p50, line.ratio, line.quality, line.delta, line.sqnr, line.load, line.rss, line.parity} == {
        summary.NONE
    }
    for text in (terminal(document), render_markdown(document)):
        assert "openvino-int8: the worker died in 'load' with signal 11" in text


def test_without_any_time_a_candidate_is_one_line(document: dict[str, Any]) -> None:
    none = {**row()["latency_s"], "p50": None}
    timeless = [make(latency_s=none, threads=n) for make in (row, int8) for n in (1, 4)]
    lines = summary.lines({**document, "artifacts": timeless}, "cpu")
    assert [(line.candidate, line.threads) for line in lines] == [
        ("onnxruntime-float32", summary.NONE),
        ("onnxruntime-int8", summary.NONE),
    ]
    timed = [*timeless[:3], int8(threads=4)]
    assert len(summary.lines({**document, "artifacts": timed}, "cpu")) == 4


def test_a_reason_shared_by_several_is_told_once_and_unshown_percentiles_not_at_all(document: dict[str, Any]) -> None:
    document["artifacts"][0]["notes"] = document["artifacts"][1]["notes"] = ["two modes"]
    assert summary.remarks(document, "cpu") == ["onnxruntime-float32, onnxruntime-int8: two modes"]


def test_a_remark_names_the_thread_count_it_is_about(document: dict[str, Any]) -> None:
    document["artifacts"].append(int8(threads=4, notes=["two speeds"]))
    assert summary.remarks(document, "cpu") == ["onnxruntime-int8 on 4 threads: two speeds"]
    document["artifacts"][1]["notes"] = ["two speeds"]
    assert summary.remarks(document, "cpu") == ["onnxruntime-int8: two speeds"]


def test_equal_outputs_have_an_infinite_ratio(document: dict[str, Any]) -> None:
    document["artifacts"][0]["reasons"].append("sqnr_db is infinite: the outputs equal the float model's")
    assert [line.sqnr for line in summary.lines(document, "cpu")] == ["∞", "31.3"]
    assert summary.remarks(document, "cpu") == []


def test_a_regression_shows_its_own_figure(document: dict[str, Any]) -> None:
    for artifact, value in zip(document["artifacts"], (0.91234, 0.91), strict=True):
        artifact["quality"] = {"accuracy": None, "r2": value, "agreement_with_float": None, "sqnr_db": 30.0}
    assert summary.headings(document, "cpu")["quality"] == "R²"
    line = summary.lines(document, "cpu")[1]
    assert (line.quality, line.delta, line.agreement) == ("0.9100", "−0.0023", summary.NONE)


def test_what_limits_the_trust_is_said(document: dict[str, Any]) -> None:
    assert summary.warnings(document) == []
    document["machine"]["warnings"] = ["the machine was busy before the start: load 3.10 on 4 cores"]
    document["settings"]["quick"] = True
    document["dataset"]["samples"] = 20
    for text in (terminal(document), render_markdown(document).replace("\\", "")):
        assert "load 3.10 on 4 cores" in text
        assert "quick run" in text
        assert "only 20 test samples" in text
    document["dataset"] = None
    assert any("no test data" in w for w in summary.warnings(document))


def test_a_failed_parity_cannot_be_overlooked() -> None:
    assert summary.parity({"per_op_max_lsb": 7, "label_agreement": 0.5, "ok": False}) == "FAILED (≤ 7 LSB, 50.0 %)"
    assert summary.parity({"per_op_max_lsb": 0, "label_agreement": 1.0}) == "0 LSB, 100.0 %"
    assert summary.parity({"max_rel_error": 2.4e-7, "label_agreement": 1.0}) == "2e-07"
    assert summary.parity(None) == summary.NONE


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_narrow_terminal_keeps_names_and_latencies_whole(document: dict[str, Any], width: int) -> None:
    text = terminal(document, width)
    assert "→ onnxruntime-int8" in text
    assert "0.37 [0.36, 0.38]" in text
    table = [
        line for line in text.splitlines() if "onnxruntime" in line and "Ship" not in line and "float32)" not in line
    ]
    assert all(len(line) <= width for line in table)


def test_several_targets_each_get_their_table(document: dict[str, Any]) -> None:
    second = [{**copy.deepcopy(a), "target": "openvino"} for a in document["artifacts"]]
    document["artifacts"] += second
    document["verdict"]["openvino"] = {"ship": None, "threads": None, "why": "nothing ships: because"}
    assert summary.targets(document) == ["cpu", "openvino"]
    text = render_markdown(document)
    assert text.index("## cpu") < text.index("## openvino") < text.index("**Nothing ships: because**")


def test_markdown_tables_stay_tables(document: dict[str, Any]) -> None:
    document["artifacts"][1]["layers"] = [
        {"name": "a|b*c_d", "op": "Conv", "seconds": 0.003, "calls": 10},
        {"name": "tail", "op": "Gemm", "seconds": 0.001, "calls": 10},
    ]
    text = render_markdown(document)
    assert "a\\|b\\*c\\_d | Conv | 3.00 | 75.0 % |" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            columns = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(columns) == 1


def test_another_schema_is_refused(document: dict[str, Any]) -> None:
    document["schema"] = 2
    with pytest.raises(ArtifactError, match="schema 2"):
        render_markdown(document)
    with pytest.raises(ArtifactError, match="schema 2"):
        terminal(document)


@given(st.floats(1e-9, 1e6))
def test_three_significant_digits_are_within_half_a_unit(value: float) -> None:
    text = summary.significant(value)
    assert "e" not in text
    assert abs(float(text) - value) <= 0.00501 * value


@given(st.floats(0, 1))
def test_a_percentage_never_rounds_up_to_all(share: float) -> None:
    assert (summary.percentage(share) == "100.0 %") == (share == 1)


def test_sizes_carry_their_unit() -> None:
    sizes = [summary.size(n) for n in (0, 999, 1000, 941_234, 999_700, 12_500_000, 3e9)]
    assert sizes == ["0 B", "999 B", "1.00 kB", "941 kB", "1.00 MB", "12.5 MB", "3.00 GB"]


def test_no_change_has_no_sign() -> None:
    assert [summary.signed(v, 2) for v in (0.0, -0.001, 0.5, -0.5)] == ["0.00", "0.00", "+0.50", "−0.50"]


def test_conversion_inspection_and_doctor_print_what_they_are_given() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160, markup=False, highlight=False)
    bad = {"per_op_max_lsb": 3, "label_agreement": 0.9, "ok": False, "reasons": ["an operator is 3 LSB off"]}
    print_convert(
        {
            "build": "some/build",
            "warnings": ["the data look like 0 to 255"],
            "artifacts": [
                {
                    "target": "cpu",
                    "candidate": "onnxruntime-int8",
                    "status": "made",
                    "path": "some/build/cpu/onnxruntime-int8",
                    "size_bytes": 1000,
                    "parity": bad,
                    "notes": ["written with a batch of 1"],
                },
                {
                    "target": "cpu",
                    "candidate": "openvino-int8",
                    "status": "not run",
                    "why": "needs openvino: pip install x",
                },
            ],
        },
        console,
    )
    text = out.getvalue()
    for told in (
        "FAILED (≤ 3 LSB, 90.0 %)",
        "NOT to be shipped: an operator is 3 LSB off",
        "needs openvino: pip install x",
    ):
        assert told in text
    assert "warning: the data look like 0 to 255" in text
    assert text.rstrip().endswith("some/build")


def test_real_inspection_and_doctor_documents_print() -> None:
    import onnx_ir as ir

    from edgekit.demo import digits
    from edgekit.doctor import examine
    from edgekit.inspection import inspect

    out = io.StringIO()
    console = Console(file=out, width=160, markup=False, highlight=False)
    print_inspection(inspect(ir.load(digits("digits_mlp.onnx"))), layers=True, out=console)
    assert "234,752 per sample" in out.getvalue()
    assert "image: float32" in out.getvalue()
    print_doctor(examine(), console)
    assert "instruction sets" in out.getvalue()


def test_the_files_name_decides_the_form() -> None:
    assert [kind_of(n) for n in (None, "r.md", "R.MD", "r.json", "r.txt")] == ["text", "md", "md", "json", "text"]
    with pytest.raises(EdgekitError, match=r"r\.pdf"):
        kind_of("r.pdf")


def test_every_form_holds_the_same_document(document: dict[str, Any]) -> None:
    assert json.loads(render(document, "json")) == document
    assert render(document, "md") == render_markdown(document)
    assert "\x1b" not in render(document, "text")
    assert "0.37 [0.36, 0.38]" in render(document, "text")
