"""Random graphs, float and int8, against ONNX Runtime and the exact integer reference; and proof that this would tell.

A lowering that is broken on purpose must fail on some of the same graphs.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit import parity
from edgekit.backends.tflite import emitter
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.ops import convolution, elementwise, moves, windows
from edgekit.backends.tflite.writer import write
from edgekit.dataset import random_dataset
from edgekit.model import Tensors
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8, apply_plan
from tests.tflite_graphs import random_model
from tests.tflite_interpreter import run

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

BOUND = 1e-5  # of the largest value: float32 sums in another order
MAX_STEPS = 12
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def lowered(model: ir.Model) -> bytes:
    result = lower(model)
    assert not result.refusals, [str(r) for r in result.refusals]
    return bytes(write([result.graph], "test"))


def float_error(rng: random.Random) -> float:
    """Largest relative difference from ONNX Runtime, at two batch sizes if the batch is open."""
    dynamic = rng.random() < 0.5
    model = random_model(rng, rng.randrange(1, MAX_STEPS), dynamic=dynamic)
    data = lowered(model)
    sizes = model.graph.inputs[0].shape
    assert sizes is not None
    worst = 0.0
    for batch in (1, 3) if dynamic else (2,):
        feeds = {"x": np.random.default_rng(batch).normal(size=(batch, *sizes[1:])).astype(np.float32)}
        want = M.FloatSession(model, optimize=False, threads=1).run(feeds)
        got = run(data, feeds)
        worst = max([worst, *(M.difference(want[k], got[k]) for k in want)])
    return worst


@settings(QUIET, max_examples=300)
@given(st.randoms(use_true_random=False))
def test_float_graphs_agree_with_onnx_runtime(rng: random.Random) -> None:
    assert float_error(rng) <= BOUND


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_float_graphs_of_plain_seeds_agree_too(start: int) -> None:
    """Hypothesis likes small graphs; these are of every size."""
    for seed in range(start, start + 50):
        assert float_error(random.Random(seed)) <= BOUND, seed


@pytest.mark.parametrize("kernels", ["AUTO", "BUILTIN_REF"])
@settings(QUIET, max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_int8_graphs_are_within_one_step_of_the_reference(kernels: str, rng: random.Random) -> None:
    model = Fold()(random_model(rng, rng.randrange(1, MAX_STEPS), dynamic=rng.random() < 0.5), None)
    data = random_dataset(M.signature(model), 8, 0)
    plan = QuantizeInt8(calibration="minmax").plan(model, data)
    quantized = apply_plan(model, plan)
    result = lower(quantized)
    assert not result.refusals, [str(r) for r in result.refusals]
    assert not result.requantized
    whole = bytes(write([result.graph], "test"))
    loose: dict[int, bytes] = {}

    def cut(model: ir.Model, feeds: Tensors) -> Tensors:
        if id(model) not in loose:
            loose[id(model)] = lowered(model)
        return run(loose[id(model)], feeds, kernels=kernels)

    batches = (part.inputs for part in data.batches(M.batch_of(M.signature(model)) or 8))
    record = parity.check(quantized, cut, lambda feeds: run(whole, feeds, kernels=kernels), batches)
    assert (record.per_op_max_lsb or 0) <= 1, record.worst[:3]


def _rename_without_order(self: Any, value: Any, source: Any, perm: Any) -> None:
    self._renamed[value] = (source, tuple(range(len(perm))))


def _shuffle_without_order(self: Any, value: Any, tensor: Any, order: Any) -> None:
    self._shuffled[value] = (tensor, np.arange(len(order)))


def _operand_in_its_own_layout(self: Any, value: Any, layout: Any) -> Any:
    return self.tensor(value, (self.layouts(value) or [None])[0])


def _window_without_dilation(n: Any, kernel: Any, sizes: Any) -> windows.Window:
    return replace(windows.window(n, kernel, sizes), dilations=(1,) * len(kernel))


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "a transpose forgets its order": (emitter.Emitter, "rename", _rename_without_order),
    "padding is always SAME": (windows.Window, "padding", lambda self, sizes: "SAME"),
    "a reshape takes any layout": (moves, "_carried", lambda x, out, groups, layout: emitter.identity(out.rank)),
    "a flattened tensor keeps its order": (emitter.Emitter, "shuffle", _shuffle_without_order),
    "size-1 axes may move anywhere": (emitter, "_same_order", lambda shape, first, second, dynamic=(): True),
    "operands keep their own layout": (emitter.Emitter, "widened", _operand_in_its_own_layout),
    "softmax on whatever axis is last": (elementwise, "existing", lambda e, value: emitter.identity(value.rank)),
    "a convolution drops its dilation": (convolution, "window", _window_without_dilation),
}
HARMLESS = {"softmax on whatever axis is last"}  # a layout is a choice: this one only costs TRANSPOSEs


@pytest.mark.parametrize("name", [m for m in MUTATIONS if m not in HARMLESS])
def test_a_broken_lowering_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, broken)
    for seed in range(400):
        try:
            if float_error(random.Random(seed)) > BOUND:
                return
        except AssertionError:
            raise  # a refusal finds nothing
        except Exception:  # LiteRT rejects the file, or the lowering trips over itself: found as well
            return
    pytest.fail(f"400 random graphs did not notice: {name}")


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_choice_of_layout_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, other = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, other)
    for seed in range(60):
        assert float_error(random.Random(seed)) <= BOUND, seed
