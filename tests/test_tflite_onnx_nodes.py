"""Every node test case of the onnx package through the TFLite lowering: right, or refused with a reason."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tflite_node_child import Case

WORKERS = 2
CASE_SECONDS = 60  # a case takes milliseconds
ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "data" / "tflite_node_counts.json"

pytest.importorskip("ai_edge_litert.interpreter")


def collected() -> list[Case]:
    """ONNX's own cases with their expected results, as they can be sent to another process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return [
            Case(c.name, c.model.SerializeToString(), [(arrays(i), arrays(o)) for i, o in c.data_sets or []])
            for c in collect_testcases(None)
        ]


def arrays(values: Any) -> list[Any]:
    """Numbers and stored tensors as arrays; sequences, maps and missing values as they are."""
    from onnx import TensorProto, numpy_helper

    stored = (numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for v in values)
    return [np.asarray(v) if isinstance(v, np.ndarray | np.generic) else v for v in stored]


def operator(case: Case) -> str:
    """What the case tests: its name's first word, as ONNX names the operator."""
    import onnx

    nodes = onnx.ModelProto.FromString(case.model).graph.node
    return nodes[0].op_type if len(nodes) == 1 else f"{case.name.removeprefix('test_').split('_')[0]} as a function"


class Worker:
    """A child process that judges cases; started again after each crash."""

    def __init__(self, cases: Path) -> None:
        self.cases = cases
        self.process: subprocess.Popen[str] | None = None

    def judge(self, index: int) -> tuple[str, str]:
        if self.process is None:
            command = [sys.executable, "-m", "tests.tflite_node_child", str(self.cases)]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{index}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            self.close()
            return "crashed", f"the process ended with {code}"
        status, why = json.loads(answer)
        return status, why

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def judged(cases: list[Case], folder: Path) -> list[tuple[str, str]]:
    """(status, why) of each case, in order."""
    stored = folder / "cases.pickle"
    stored.write_bytes(pickle.dumps(cases))
    results: list[tuple[str, str]] = [("", "")] * len(cases)

    def work(part: int) -> None:
        worker = Worker(stored)
        try:
            for index in range(part, len(cases), WORKERS):
                results[index] = worker.judge(index)
        finally:
            worker.close()

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))
    return results


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, str, str]]:
    """By name: the case, its status, and why."""
    cases = collected()
    found = judged(cases, tmp_path_factory.mktemp("cases"))
    return {c.name: (c, status, why) for c, (status, why) in zip(cases, found, strict=True)}


def table(verdicts: dict[str, tuple[Case, str, str]]) -> str:
    """right / refused / wrong / crashed by operator, and in all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case, status, _ in verdicts.values():
        counts[operator(case)][status] += 1
        counts["all"][status] += 1
    columns = ("right", "refused", "wrong", "crashed")
    rows = [f"{name:40}" + "".join(f"{count[c]:9}" for c in columns) for name, count in sorted(counts.items())]
    return "\n".join([f"{'operator':40}" + "".join(f"{c:>9}" for c in columns), *rows])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_onnx_node_case_is_right_or_refused(
    verdicts: dict[str, tuple[Case, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: dict[str, Any] = json.loads(RECORDED.read_text())
    right = {name for name, (_, status, _) in verdicts.items() if status == "right"}
    with capsys.disabled():
        print("\n" + table(verdicts))
    bad = [f"{name}: {status}: {why}" for name, (_, status, why) in verdicts.items() if status in ("wrong", "crashed")]
    assert not bad, "\n".join(bad)
    assert all(why for _, status, why in verdicts.values() if status == "refused"), "a refusal without a reason"
    if len(verdicts) == recorded["cases"]:  # another version of onnx has other cases
        assert len(right) >= recorded["right"], f"{len(right)} right, {recorded['right']} when last recorded"


@pytest.mark.slow
def test_a_case_with_another_expected_value_is_found_wrong(tmp_path: Path) -> None:
    """The comparison itself: one changed number, one changed integer, one lost axis."""
    cases = {c.name: c for c in collected() if c.name in ("test_add", "test_argmax_no_keepdims_example", "test_abs")}
    spoilt = []
    for name, change in (
        ("test_add", lambda a: a + np.float32(1e-2) * (np.arange(a.size).reshape(a.shape) == 3)),
        ("test_argmax_no_keepdims_example", lambda a: a + 1),
        ("test_abs", lambda a: a[0]),
    ):
        inputs, outputs = cases[name].data[0]
        spoilt.append(
            Case(name, cases[name].model, [(inputs, [np.asarray(change(o)).astype(o.dtype) for o in outputs])])
        )
    assert [status for status, _ in judged(spoilt, tmp_path)] == ["wrong"] * 3


def test_a_process_that_dies_counts_as_a_crash_and_the_next_case_runs(tmp_path: Path) -> None:
    """Indexes past the end kill the child as an abort would."""
    stored = tmp_path / "cases.pickle"
    stored.write_bytes(pickle.dumps([c for c in collected() if c.name == "test_add"]))
    worker = Worker(stored)
    try:
        assert worker.judge(5)[0] == "crashed"
        assert worker.judge(0) == ("right", "")
    finally:
        worker.close()
