"""The accuracy budget: kept on samples that nothing was chosen by, with the fewest layers in float."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit import pipeline
from edgekit.errors import BudgetError
from edgekit.passes import protect as P
from edgekit.passes.apply_plan import apply_plan, prepared
from edgekit.passes.protect import protect
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.roundings import PRODUCTS, idle, leave_out
from tests.quantize_graphs import Array, Batch, Samples, graph, node, normal

F = np.float32
PLAIN = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")


class Pool(Samples):
    """Arrays with class numbers, of which some can be taken in order."""

    def __init__(self, inputs: dict[str, Array], labels: Array | None = None) -> None:
        super().__init__(inputs, labelled=labels is not None)
        self.labels = labels

    def _part(self, rows: slice) -> Pool:
        return Pool({k: v[rows] for k, v in self.inputs.items()}, None if self.labels is None else self.labels[rows])

    def take(self, samples: int, seed: int) -> Pool:
        return self._part(slice(0, samples))

    def rest(self, samples: int, seed: int) -> Pool:
        return self._part(slice(samples, None))

    def batches(self, size: int) -> Iterator[Batch]:
        for batch in super().batches(size):
            yield Batch(batch.inputs, None if self.labels is None else self.labels[batch.index], batch.index)


def net(spread: float) -> Any:
    """Four dense layers; what the second gives differs `spread`-fold from channel to channel, and all of it counts."""
    ranges = np.geomspace(1, spread, 16).astype(F)
    nodes, weights, at = [], {}, "x"
    for i in range(4):
        last = i == 3
        w, b = normal(16, 6 if last else 16, seed=i, scale=0.4), normal(6 if last else 16, seed=10 + i, scale=0.4)
        if i == 1:
            w, b = w * ranges, b * ranges
        if i == 2:
            w = w / ranges[:, None]
        weights |= {f"w{i}": w, f"b{i}": b}
        nodes.append(node("Gemm", [at, f"w{i}", f"b{i}"], ["y" if last else f"a{i}"], name=f"dense{i}"))
        if not last:
            nodes.append(node("Relu", [f"a{i}"], [f"r{i}"], name=f"relu{i}"))
        at = f"r{i}"
    return prepared(graph(nodes, {"x": ["n", 16]}, {"y": ["n", 6]}, weights))


@pytest.fixture(autouse=True)
def _even_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layer goes first depends on what its float kernel takes: here all take the same."""
    monkeypatch.setattr(P, "_times", lambda model: {n.name: 1e-6 for n in model.graph})


def run(model: Any, x: Array) -> Array:
    return M.FloatSession(model, optimize=False, threads=1).run({"x": x})["y"]


def pools(model: Any, *, labels: bool = True, calibration: int = 64, rest: int = 400) -> tuple[Pool, Pool]:
    x = normal(calibration + rest, 16, seed=77)
    pool = Pool({"x": x}, run(model, x).argmax(-1) if labels else None)
    return pool.take(calibration, 0), pool.rest(calibration, 0)


def kept_float(model: Any, budget: float, **options: Any) -> tuple[Any, P.Kept, Pool]:
    data, rest = pools(model, **options)
    plan, kept = protect(PLAIN, model, data, rest, budget)  # type: ignore[arg-type]
    return plan, kept, rest


def test_a_model_within_its_budget_is_left_alone() -> None:
    model = net(1.0)
    plan, kept, _ = kept_float(model, 0.05)
    assert plan == PLAIN.plan(model, pools(model)[0])  # type: ignore[arg-type]
    assert kept.protected == {}
    assert kept.lost == kept.unprotected <= 0.05
    assert kept.slower is None
    assert kept.larger_bytes == 0
    assert kept.measure == "accuracy"
    assert kept.samples == 200
    assert "within the budget of 5.00%" in kept.words()


def test_the_layer_that_loses_it_is_protected_and_no_other() -> None:
    model = net(1e4)
    plan, kept, rest = kept_float(model, 0.03)
    assert kept.unprotected > 0.1
    assert kept.lost <= 0.03
    # the third layer reads what the second gives: in float it needs no integers of it
    assert set(kept.protected) == {"dense2"}
    assert set(plan.weights) == {"dense0", "dense1", "dense3"}
    assert all(plan.float_nodes[n].startswith("protected: ") for n in kept.protected)
    assert kept.larger_bytes == 3 * 16 * 16
    assert kept.slower is not None
    assert kept.slower > 0
    # on the half of the rest that was not used for choosing, as the judge computes it
    x = rest.inputs["x"][200:]
    written = apply_plan(model, plan)
    got = run(leave_out(written, idle(written, PRODUCTS)), x)
    assert kept.lost == pytest.approx((got.argmax(-1) != run(model, x).argmax(-1)).mean())


def test_words_and_json_tell_what_it_costs() -> None:
    _, kept, _ = kept_float(net(1e4), 0.03)
    words = kept.words()
    for part in ("within the budget of 3.00%", "unprotected", "'dense2'", "1 kB", "× the time", "200 samples"):
        assert part in words
    assert json.loads(json.dumps(kept.to_json()))["budget"] == 0.03
    many = replace(kept, protected={f"n{i}": "" for i in range(9)})
    assert "and 5 more" in many.words()


def test_unlabelled_classes_are_counted_by_agreement() -> None:
    model = net(1e4)
    nodes = [*M.to_proto(model).graph.node]
    nodes[-1].output[0] = "z"
    weights = {k: M.constant(v) for k, v in model.graph.initializers.items()}
    soft = prepared(
        graph([*nodes, node("Softmax", ["z"], ["y"], name="soft")], {"x": ["n", 16]}, {"y": ["n", 6]}, weights)  # type: ignore[arg-type]
    )
    _, kept, _ = kept_float(soft, 0.01, labels=False)
    assert kept.measure == "agreement"
    assert kept.lost <= 0.01
    assert kept.unprotected > 0.01
    assert 0 < kept.error < 0.05


def test_a_regression_is_counted_by_its_error() -> None:
    model = net(1e4)
    _, kept, _ = kept_float(model, 0.01, labels=False)
    assert kept.measure == "SQNR"
    assert kept.lost <= 0.01 < kept.unprotected
    assert kept.error == 0


def test_fewer_are_protected_for_a_larger_budget() -> None:
    model = net(1e4)
    sizes = [len(kept_float(model, budget, labels=False)[1].protected) for budget in (2.4e-3, 1e-2, 0.9)]
    assert sizes[0] > sizes[1] > sizes[2] == 0


def test_a_budget_that_cannot_be_kept() -> None:
    model = net(1e4)
    data, rest = pools(model, labels=False)
    with pytest.raises(BudgetError, match="cannot keep within") as caught:
        protect(PLAIN, model, data, rest, 0.0)  # type: ignore[arg-type]
    assert caught.value.exit_code == 55
    assert "--max-accuracy-drop" in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_too_few_samples_to_tell() -> None:
    data, rest = pools(net(1.0), calibration=1, rest=0)
    with pytest.raises(BudgetError, match="1 samples are too few"):
        protect(PLAIN, net(1.0), data, rest, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("calibration", [4, 10, 90])
def test_calibration_gives_samples_up_where_there_are_no_others(calibration: int) -> None:
    model = net(1.0)
    data, rest = pools(model, calibration=calibration, rest=0)
    plan, kept = protect(PLAIN, model, data, rest, 0.9)  # type: ignore[arg-type]
    assert plan.samples == calibration * 2 // 3
    assert kept.samples == -(-(calibration - plan.samples) // 2)


def test_what_is_forced_to_float_stays_so() -> None:
    model = net(1e4)
    data, rest = pools(model)
    step = replace(PLAIN, keep_float=("dense0",))
    plan, kept = protect(step, model, data, rest, 0.03)  # type: ignore[arg-type]
    assert plan.float_nodes["dense0"] == "kept float on request"
    assert "dense0" not in kept.protected


# --- through the command line ------------------------------------------------------------------------------
ONLY = """schema = 1
description = "one"
candidates = [ { backend = "onnxruntime", precision = "float32" }, { backend = "onnxruntime", precision = "int8" } ]
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "one.toml").write_text(ONLY, encoding="utf-8")
    model = net(1e4)
    M.save(model, tmp_path / "m.onnx")
    x = normal(500, 16, seed=77)
    np.savez(tmp_path / "d.npz", x=x, y=run(model, x).argmax(-1))
    return tmp_path


def convert(here: Path, **options: Any) -> dict[str, Any]:
    rows = pipeline.convert(
        here / "m.onnx", ["one"], targets_dir=here, data=here / "d.npz", out=here / "b", samples=100, weight_bits=7,
        **options,
    )["artifacts"]  # fmt: skip
    return next(r for r in rows if r["candidate"] == "onnxruntime-int8")


def test_convert_keeps_the_budget_and_says_so(here: Path) -> None:
    row = convert(here, max_accuracy_drop=0.03, calibration="minmax")
    assert row["status"] == "made"
    (told,) = [n for n in row["notes"] if "within the budget of 3.00%" in n]
    assert "of accuracy on 200 samples" in told
    manifest = json.loads((here / "b/one/onnxruntime-int8/manifest.json").read_text(encoding="utf-8"))
    budget = manifest["quantization"]["budget"]
    assert budget["budget"] == 0.03
    assert budget["lost"] <= 0.03
    assert budget["measure"] == "accuracy"


def test_where_it_cannot_be_kept_int8_is_not_made_and_the_reason_is_told(here: Path) -> None:
    (here / "d.npz").unlink()
    np.savez(here / "d.npz", x=normal(500, 16, seed=77))
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "convert", "m.onnx", "-t", "one", "--targets", ".", "--data", "d.npz",
         "--max-accuracy-drop", "0", "--samples", "100", "--quantize", "minmax", "--json"],
        cwd=here, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = {r["candidate"]: r for r in json.loads(done.stdout)["artifacts"]}
    assert rows["onnxruntime-float32"]["status"] == "made"
    assert rows["onnxruntime-int8"]["status"] == "not run"
    assert "cannot keep within 0.00%" in rows["onnxruntime-int8"]["why"]
