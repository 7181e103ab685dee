"""The batches that artifacts are proved with: within the memory they may take, and all of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit import verify
from edgekit.passes.apply_plan import prepared
from tests.quantize_graphs import Samples, graph, node, normal


def net(batch: int | str = "n") -> Any:
    return prepared(
        graph(
            [
                node("Conv", ["x", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
                node("Relu", ["a"], ["r"], name="relu"),
                node("GlobalAveragePool", ["r"], ["y"], name="mean"),
            ],
            {"x": [batch, 2, 8, 8]},
            {"y": [batch, 16, 1, 1]},
            {"w": normal(16, 2, 3, 3)},
        )
    )


def held(size: int) -> int:
    """Bytes of all values of a batch, as ONNX Runtime gives them."""
    values = M.FloatSession(net(), fetch=["a", "r"], optimize=False).run({"x": normal(size, 2, 8, 8)})
    return sum(v.nbytes for v in values.values())


@pytest.mark.parametrize("limit", [1, 10_000, 30_000, 100_000, 10**9])
def test_a_batch_is_as_large_as_its_values_may_be(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "VALUES_BYTES", limit)
    size, exact = verify.batch_for(net())
    assert not exact
    assert 1 <= size <= verify.BATCH
    assert size == 1 or held(size) <= limit
    assert size == verify.BATCH or held(size + 1) > limit


def test_a_models_own_batch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "VALUES_BYTES", 1)
    assert verify.batch_for(net(8)) == (8, True)


@pytest.mark.parametrize("limit", [1, 30_000, 10**9])
def test_small_batches_leave_no_sample_out(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "VALUES_BYTES", limit)
    x = normal(50, 2, 8, 8)
    parts = list(verify.batches(Samples({"x": x}), net()))  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate([p["x"] for p in parts]), x)
