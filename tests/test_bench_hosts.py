"""Measuring on other machines: which is which, what they are worth, and that one that fails stops nobody else."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from edgekit import benching, pipeline
from edgekit.backends import onnxruntime
from edgekit.bench import machine, results
from edgekit.bench.client import Worker
from edgekit.bench.document import document, merged
from edgekit.bench.entry import Entry
from edgekit.bench.host import Golden, LocalHost
from edgekit.bench.run import run_bench
from edgekit.bench.several import each
from edgekit.cli import main
from edgekit.compare import compare
from edgekit.dataset import Dataset
from edgekit.deploy import remote
from edgekit.errors import DeviceError, HostError, LoginError, UsageError
from edgekit.report import summary
from edgekit.report.markdown import render_markdown
from edgekit.report.progress import silent
from edgekit.report.terminal import render_terminal
from edgekit.target import Target
from tests.test_bench_run import FEATURES, PACE, softmax, weights
from tests.test_bench_run import data as data
from tests.test_bench_run import entries as entries
from tests.test_bench_run import x as x
from tests.test_bench_run import y as y
from tests.test_compare import QUICK, onnx_classifier

BIAS = np.array([0.1, -0.2, 0.3], np.float32)  # of test_compare.onnx_classifier
QUIET: dict[str, Any] = {"governor": "performance", "throttle": {"now": [], "ever": []}}


class Elsewhere(LocalHost):
    """This machine under another name: its workers are real, what it tells of itself is told to it."""

    def __init__(self, name: str, states: Sequence[dict[str, Any]] = (), wrong: str = "", **facts: Any) -> None:
        self.name = name
        self._states = list(states)
        self._wrong, self._facts = wrong, facts
        self.checked: list[str] = []
        self.started: list[tuple[str, int, bool]] = []

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "emulated": None, "cpu": f"CPU of {self.name}", **self._facts}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "load_1min": 0.0, **QUIET, **(self._states.pop(0) if self._states else {})}

    def golden(self, entry: Entry) -> Golden:
        """softmax(x·w) of test_bench_run's float32 artifact, within what its int8 one is off; of one that is `wrong`
        something else, or what no artifact takes."""
        x = np.linspace(-2, 2, 3 * FEATURES, dtype=np.float32).reshape(3, FEATURES)

        def difference(outputs: dict[str, np.ndarray]) -> str | None:
            self.checked.append(entry.id)
            want = softmax(x @ weights()) + (3 if entry.id == self._wrong else 0)
            assert outputs["y"].shape == want.shape
            apart = np.abs(outputs["y"] - want).max()
            return None if apart < 0.2 else f"output 'y' differs by {apart:.0f} on {self.name}"

        return Golden({"no such input" if self._wrong == "dies" else "x": x}, difference)

    def worker(self, entry: Entry, threads: int, batch: int, profile: bool = False) -> Worker:
        self.started.append((entry.id, threads, profile))
        return super().worker(entry, threads, batch, profile)


def throttled(*names: str, now: Sequence[str] = ()) -> dict[str, Any]:
    return {"throttle": {"now": list(now), "ever": list(names), "events": None}}


def rendered(told: dict[str, Any], width: int = 200) -> str:
    out = io.StringIO()
    render_terminal(told, Console(file=out, width=width, markup=False, highlight=False))
    return out.getvalue()


# --- one machine --------------------------------------------------------------------------------------


def test_what_was_measured_there_says_so(entries: list[Entry], data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    host = Elsewhere("pi@one")
    told = run_bench(entries, data, threads=(1,), pace=PACE, host=host, results_path=path)
    assert {row["host"] for row in told["artifacts"]} == {"pi@one"}
    assert (told["machine"]["host"], told["machine"]["cpu"]) == ("pi@one", "CPU of pi@one")
    verdict = told["verdict"]["cpu on pi@one"]
    assert (verdict["target"], verdict["host"]) == ("cpu", "pi@one")
    assert host.checked == ["onnxruntime-float32", "onnxruntime-int8"]
    assert document(results.read(path)) == told
    for text in (rendered(told), render_markdown(told).replace("\\", "")):
        assert "cpu on pi@one" in text
        assert "pi@one: CPU of pi@one" in text


def test_an_artifact_that_answers_otherwise_there_is_not_timed(entries: list[Entry], data: Dataset) -> None:
    host = Elsewhere("pi@one", wrong="onnxruntime-int8")
    told = run_bench(entries, data, threads=(1,), pace=PACE, host=host)
    good, bad = told["artifacts"]
    assert good["valid"]
    assert good["latency_s"]["p50"] > 0
    assert not bad["valid"]
    assert bad["reasons"][0] == "output 'y' differs by 3 on pi@one"
    assert (bad["latency_s"]["p50"], bad["quality"]) == (None, None)
    assert [name for name, _, _ in host.started] == ["onnxruntime-float32", "onnxruntime-int8", "onnxruntime-float32"]
    assert told["verdict"]["cpu on pi@one"]["ship"] == "onnxruntime-float32"


def test_without_data_golden_answers_come_first_too(entries: list[Entry]) -> None:
    host = Elsewhere("pi@one", wrong="onnxruntime-int8", emulated="qemu-aarch64")
    told = run_bench(entries, None, threads=(1,), pace=PACE, host=host)
    assert [row["valid"] for row in told["artifacts"]] == [True, False]
    assert host.checked == ["onnxruntime-float32", "onnxruntime-int8"]


def test_one_that_dies_on_the_golden_inputs_is_a_row(entries: list[Entry]) -> None:
    told = run_bench(entries, None, threads=(1,), pace=PACE, host=Elsewhere("pi@one", wrong="dies"))
    assert [row["valid"] for row in told["artifacts"]] == [False, False]
    assert all("infer failed" in row["reasons"][0] for row in told["artifacts"])


def test_what_its_manifest_calls_wrong_is_not_even_checked(entries: list[Entry]) -> None:
    host = Elsewhere("pi@one")
    run_bench([entries[0], replace(entries[1], problems=("parity: 3 LSB",))], None, threads=(1,), pace=PACE, host=host)
    assert host.checked == ["onnxruntime-float32"]


def test_all_threads_are_the_hosts(entries: list[Entry]) -> None:
    host = Elsewhere("pi@one", cores_usable=3, cores_logical=4)
    told = run_bench(entries[:1], None, threads=(1, "all"), pace=PACE, host=host)
    assert [row["threads"] for row in told["artifacts"]] == [1, 3]
    with pytest.raises(UsageError, match="pi@one has 4 cores"):
        run_bench(entries[:1], None, threads=(5,), pace=PACE, host=host)


@pytest.mark.parametrize("after", [throttled("under-voltage"), throttled(now=["under-voltage"])])
def test_times_taken_while_throttling_began_are_kept_and_not_used(
    entries: list[Entry], data: Dataset, tmp_path: Path, after: dict[str, Any]
) -> None:
    path = tmp_path / "results.jsonl"
    host = Elsewhere("pi@one", [throttled(), after])
    told = run_bench(entries, data, threads=(1,), pace=PACE, host=host, results_path=path, profile=True)
    for row in told["artifacts"]:
        assert not row["valid"]
        assert row["reasons"][0].startswith("latency: throttled: under-voltage while measuring")
        numbers = {k: v for k, v in row["latency_s"].items() if k != "samples"}
        assert set(numbers.values()) == {None}
        assert row["latency_s"]["samples"] >= 20
        assert (row["load_s"], row["first_inference_s"], row["layers"]) == (None, None, None)
        assert row["quality"]["accuracy"] is not None
    kept = [m for m in results.read(path) if m.metric == "latency"]
    assert all(m.samples and not m.valid for m in kept)
    verdict = told["verdict"]["cpu on pi@one"]
    assert verdict["ship"] is None
    assert verdict["why"].count("under-voltage") == 1
    assert "under-voltage while measuring" in told["machine"]["warnings"]
    assert "pi@one: under-voltage while measuring" in summary.warnings(told)


def test_throttling_from_before_is_a_warning(entries: list[Entry]) -> None:
    before = throttled("under-voltage", "throttled", now=["under-voltage"])
    told = run_bench(entries, None, threads=(1,), pace=PACE, host=Elsewhere("pi@one", [before, before]))
    assert all(row["valid"] and row["latency_s"]["p50"] > 0 for row in told["artifacts"])
    assert told["machine"]["warnings"][0] == "under-voltage before the start"
    assert "once: throttled;" in told["machine"]["warnings"][1]


def test_each_target_has_a_state_before_it_of_its_own(entries: list[Entry]) -> None:
    """What happened during the first target's measurement is not held against the second's."""
    both = [*entries, *(replace(e, target="openvino") for e in entries)]
    states = [throttled(), throttled("throttled"), throttled("throttled")]
    told = run_bench(both, None, threads=(1,), pace=PACE, host=Elsewhere("pi@one", states))
    assert {(row["target"], row["valid"]) for row in told["artifacts"]} == {("cpu", False), ("openvino", True)}


def test_an_emulated_host_gives_no_times(entries: list[Entry], data: Dataset) -> None:
    host = Elsewhere("pi@one", emulated="qemu-aarch64")
    told = run_bench(entries, data, threads=(1,), pace=PACE, host=host, profile=True)
    for row in told["artifacts"]:
        assert row["valid"]
        assert (row["latency_s"]["p50"], row["latency_s"]["samples"], row["load_s"], row["layers"]) == (
            None,
            0,
            None,
            None,
        )
        assert row["reasons"][0] == "latency: qemu-aarch64 emulates this CPU, a time here is no latency"
        assert row["quality"]["accuracy"] is not None
    assert [threads for _, threads, _ in host.started] == [machine.physical_cores()] * 2  # quality, and nothing else
    assert told["verdict"]["cpu on pi@one"]["why"].count("emulates this CPU") == 1


def test_a_host_that_is_lost_raises_and_leaves_no_line(entries: list[Entry], tmp_path: Path) -> None:
    class Lost(Elsewhere):
        def state(self) -> dict[str, Any]:
            if self.started:
                raise HostError("pi@one: the connection broke", "run it again")
            return super().state()

    with pytest.raises(HostError, match="broke"):
        run_bench(entries, None, threads=(1,), pace=PACE, host=Lost("pi@one"), results_path=tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


# --- several machines ---------------------------------------------------------------------------------


@pytest.fixture
def two(entries: list[Entry], data: Dataset) -> dict[str, Any]:
    """Here, and on a host that finds int8 to differ."""
    hosts = [LocalHost(), Elsewhere("pi@two", wrong="onnxruntime-int8")]
    return merged([run_bench(entries, data, threads=(1,), pace=PACE, host=host) for host in hosts])


def test_machines_are_kept_apart(two: dict[str, Any]) -> None:
    assert list(two["machines"]) == ["", "pi@two"]
    assert two["machine"] == two["machines"][""]
    assert two["machines"]["pi@two"]["cpu"] == "CPU of pi@two"
    assert [(r["host"], r["precision"], r["valid"]) for r in two["artifacts"]] == [
        (None, "float32", True), (None, "int8", True), ("pi@two", "float32", True), ("pi@two", "int8", False),
    ]  # fmt: skip
    assert set(two["verdict"]) == {"cpu", "cpu on pi@two"}
    assert [r["latency_s"]["ratio_to_float"] for r in two["artifacts"]][::2] == [1.0, 1.0]  # each to its own machine's
    json.dumps(two, allow_nan=False)


def test_several_hosts_make_one_table(two: dict[str, Any]) -> None:
    lines = summary.lines(two, "cpu")
    assert [line.host for line in lines] == ["this machine"] * 2 + ["pi@two"] * 2
    assert sum(line.ships for line in lines) == 2
    text, page = rendered(two), render_markdown(two).replace("\\", "")
    assert text.index("cpu: Ship") < text.index("cpu on pi@two: Ship") < text.index("p50 ms")
    assert text.count("p50 ms") == page.count("p50 ms") == 1
    assert page.count("## cpu") == 1
    for told in (text, page):
        assert "onnxruntime-int8 on pi@two: output 'y' differs by 3" in told
        assert "this machine: " in told
        assert "pi@two: CPU of pi@two" in told


def test_a_remark_that_holds_everywhere_is_told_once() -> None:
    row = {"target": "cpu", "backend": "b", "precision": "int8", "threads": 1, "latency_s": {}, "notes": []}
    rows = [{**row, "host": host, "reasons": ["quality: no data were given"]} for host in (None, "pi@two")]
    rows[1]["reasons"] = [*rows[1]["reasons"], "slow"]
    assert summary.remarks({"artifacts": rows}, "cpu") == [
        "b-int8: quality: no data were given",
        "b-int8 on pi@two: slow",
    ]


def test_one_host_needs_no_column(entries: list[Entry]) -> None:
    told = run_bench(entries, None, threads=(1,), pace=PACE, host=Elsewhere("pi@one"))
    assert "host" not in summary.headings(told, "cpu")


def test_at_the_same_time_and_one_that_fails_stops_nobody() -> None:
    together = threading.Barrier(2, timeout=30)
    heard: list[str] = []

    def one(host: str, tell: Any) -> str:
        if host == "pi@gone":
            raise LoginError("pi@gone: it does not let you in", "")
        together.wait()
        tell("measure", 0, 1)
        return host.upper()

    done, failed = each(["pi@a", "pi@gone", "pi@b", "pi@a"], one, lambda stage, share, total: heard.append(stage))
    assert list(done.items()) == [("pi@a", "PI@A"), ("pi@b", "PI@B")]
    assert list(failed) == ["pi@gone"]
    assert sorted(heard) == ["pi@a: measure", "pi@b: measure"]


def test_where_all_fail_the_first_error_is_raised() -> None:
    def one(host: str, tell: Any) -> None:
        if host == "pi@a":
            time.sleep(0.05)
        raise (HostError if host == "pi@a" else LoginError)(host, "")

    with pytest.raises(HostError, match="pi@a"):
        each(["pi@a", "pi@b"], one, silent)


def test_an_interrupt_ends_the_others() -> None:
    waiting = threading.Event()
    ended: list[str] = []

    def one(host: str, tell: Any) -> None:
        try:
            if host == "pi@a":
                waiting.wait(30)
                raise KeyboardInterrupt
            while True:
                waiting.set()
                tell("measure", 0, 1)
                time.sleep(0.01)
        finally:
            ended.append(host)

    with pytest.raises(KeyboardInterrupt):
        each(["pi@a", "pi@b"], one, silent)
    assert sorted(ended) == ["pi@a", "pi@b"]


def test_a_bug_is_not_taken_for_a_host_that_fails() -> None:
    def one(host: str, tell: Any) -> None:
        raise ZeroDivisionError(host)

    with pytest.raises(ZeroDivisionError):
        each(["pi@a", "pi@b"], one, silent)


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as float32 for this CPU and for 64-bit Arm, with data beside it: 90 points of three classes."""
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    here = tmp_path_factory.mktemp("build")
    x = np.random.default_rng(2).uniform(-4, 4, (90, FEATURES)).astype(np.float32)
    model = onnx_classifier(here / "m.onnx", weights().T)
    np.savez(here / "data.npz", x=x, y=(x @ weights() + BIAS).argmax(axis=1))
    pipeline.convert(model, ["cpu", "linux-arm64"], out=here / "build", precisions=["float32"])
    return here / "build"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is of no target's architecture."""
    monkeypatch.setattr(machine, "architecture", lambda: "s390x")


class Unknown(Elsewhere):
    """Without golden answers."""

    def golden(self, entry: Entry) -> None:  # type: ignore[override]
        return None


class FakeSite:
    """Devices of 64-bit Arm that are this machine; those called gone cannot be reached."""

    def __init__(self, name: str, config: Path | None, root: Path) -> None:
        self.name, self.prepared_for = name, []

    def __enter__(self) -> FakeSite:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def is_for(self, target: Target) -> bool:
        return target.device is not None and target.device.arch == "aarch64"

    def prepared(self, target: Target, entries: Sequence[Entry], progress: Any) -> Elsewhere:
        if "gone" in self.name:
            raise HostError(f"{self.name}: it cannot be reached", "is it on?")
        if target.device is None or target.device.arch != "aarch64":
            raise DeviceError(f"{self.name}: it is aarch64, {target.name} is not", "")
        progress("install", 0, 1)
        return Unknown(self.name, emulated="qemu-aarch64" if "emulated" in self.name else None)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "site", FakeSite)


def test_for_another_architecture_quality_is_judged_here_and_nothing_timed(
    build: Path, elsewhere: None, tmp_path: Path
) -> None:
    root = tmp_path / "build"
    shutil.copytree(build, root)
    told = pipeline.bench(root, ["linux-arm64"], data=str(build.parent / "data.npz"), **QUICK)
    assert len(told["artifacts"]) >= 2
    for row in told["artifacts"]:
        assert row["valid"]
        assert row["quality"]["accuracy"] == 1
        assert row["latency_s"]["samples"] == 0
        assert row["reasons"][0] == "latency: this machine is s390x, the target is aarch64; give --host user@device"
    assert told["verdict"]["linux-arm64"]["ship"] is None
    assert benching.ship_of(root, "linux-arm64", None) is None


@pytest.mark.parametrize("kind", ["s390x", "aarch64"])
def test_a_cpu_that_saturates_judges_exactly_what_is_for_another(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where it would run and be timed, it is refused instead."""
    root, data = tmp_path / "build", str(build.parent / "data.npz")
    pipeline.convert(build.parent / "m.onnx", ["linux-arm64"], data=data, out=root, precisions=["int8"])
    monkeypatch.setattr(onnxruntime, "saturates", lambda: True)
    monkeypatch.setattr(machine, "architecture", lambda: kind)
    row = next(
        r
        for r in pipeline.bench(root, data=data, **QUICK)["artifacts"]
        if (r["backend"], r["precision"]) == ("onnxruntime", "int8")
    )
    if kind == "aarch64":
        assert not row["valid"]
        assert "convert it for this CPU" in row["reasons"][0]
    else:
        assert row["valid"]
        assert row["quality"]["accuracy"] > 0.9
        assert any("exact arithmetic" in note for note in row["notes"])


def test_on_a_machine_of_the_targets_kind_it_is_timed(
    build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "architecture", lambda: "aarch64")
    root = tmp_path / "build"
    shutil.copytree(build, root)
    told = pipeline.bench(root, ["linux-arm64"], **QUICK)
    assert all(row["latency_s"]["p50"] > 0 for row in told["artifacts"])


def test_compare_measures_no_times_of_another_architecture(build: Path, elsewhere: None) -> None:
    one, two = (build / "linux-arm64" / f"{name}-float32" for name in ("onnxruntime", "tflite"))
    told = compare(one, two, **QUICK)
    assert told["latency"] == [{"threads": 1, "ratio": None, "ci95": None}]
    assert "no times were measured: this machine is s390x, the target is aarch64" in told["warnings"]
    assert told["max_difference"] < 1e-5
    with pytest.raises(UsageError, match="--max-slowdown"):
        compare(one, two, max_slowdown=2.0, **QUICK)


def test_the_command_measures_on_several_devices(
    build: Path, devices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "build"
    shutil.copytree(build, root)
    words = ["bench", str(root), "--quick", "--threads", "1", "--data", str(build.parent / "data.npz")]
    hosts = ["--host", "pi@b", "--host", "pi@gone", "--host", "pi@a-emulated"]
    done = CliRunner().invoke(main, [*words, *hosts, "--json"])
    assert done.exit_code == HostError.exit_code, done.stderr
    told = json.loads(done.stdout)
    assert {(row["target"], row["host"]) for row in told["artifacts"]} == {
        ("linux-arm64", "pi@a-emulated"), ("linux-arm64", "pi@b"),
    }  # fmt: skip
    assert list(told["machines"]) == ["pi@a-emulated", "pi@b"]
    lost = {"host": "pi@gone", "error": "pi@gone: it cannot be reached — is it on?", "exit_code": HostError.exit_code}
    assert told["failed"] == [lost]
    assert "pi@b: install" in done.stderr
    timed = {row["host"] for row in told["artifacts"] if row["latency_s"]["p50"] is not None}
    assert timed == {"pi@b"}
    assert benching.latest_document(root)["verdict"] == told["verdict"]
    ship = told["verdict"]["linux-arm64 on pi@b"]["ship"]
    for asked in ("pi@b", "pi@new", None):
        assert benching.ship_of(root, "linux-arm64", asked) == (ship, "the best measured on pi@b")
    assert benching.ship_of(root, "cpu", None) is None
    text = rendered(told)
    assert "pi@gone was not measured: pi@gone: it cannot be reached" in text
    assert "## Not measured" in render_markdown(told)


def test_here_and_there_are_shown_together(build: Path, devices: None, elsewhere: None, tmp_path: Path) -> None:
    root = tmp_path / "build"
    shutil.copytree(build, root)
    pipeline.bench(root, ["linux-arm64"], **QUICK)
    pipeline.bench(root, ["linux-arm64"], hosts=["pi@b"], **QUICK)
    shown = pipeline.report(root)
    assert "linux-arm64 on pi@b: Ship" in shown
    assert "give --host user@device" in shown
    assert [host for host, _ in summary.machines(benching.latest_document(root))] == ["", "pi@b"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["{build}", "-t", "cpu", "--host", "pi@b"], 73, "it is aarch64, cpu is not"),
        (["{build}", "--host", "pi@gone"], 70, "cannot be reached"),
        (["{build}", "--ssh-config", "c"], 2, "--host"),
        (["{build}/cpu/tflite-float32/model.tflite", "--host", "pi@b"], 2, "measures builds"),
        (["{build}", "--with", "{build}/cpu/tflite-float32/model.tflite", "--host", "pi@b"], 2, "--with"),
        (["{build}", "--host", "pi@b", "--threads", "1000"], 2, "pi@b has"),
    ],
)
def test_what_cannot_be_measured_is_refused(build: Path, devices: None, words: list[str], code: int, told: str) -> None:
    done = CliRunner().invoke(main, ["bench", *(w.format(build=build) for w in words), "--quick"])
    assert done.exit_code == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in line
