"""Small float graphs and an in-memory dataset for the tests of quantization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit import model as M

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Array]
    labels: Array | None
    index: Array


@dataclass
class Samples:
    """Arrays as a dataset."""

    inputs: dict[str, Array]
    name: str = "samples"
    labelled: bool = False

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def bind(self, sig: M.Signature) -> Samples:
        assert {s.name for s in sig.inputs} == set(self.inputs)
        return self

    def batches(self, size: int) -> Iterator[Batch]:
        for i in range(0, self.samples, size):
            part = {k: v[i : i + size] for k, v in self.inputs.items()}
            yield Batch(part, None, np.arange(i, min(i + size, self.samples)))


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    weights: dict[str, Array] | None = None,
    opset: int = 21,
) -> Any:
    """An ir.Model of float32 inputs and outputs; weights keep their dtype."""

    def infos(shapes: dict[str, Sequence[int | str]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in shapes.items()]

    arrays = [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()]
    proto = helper.make_graph(list(nodes), "g", infos(inputs), infos(outputs), arrays)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return M.from_proto(model)


node = helper.make_node


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def evaluate(model: Any, inputs: dict[str, Array]) -> dict[str, Array]:
    """The model by onnx's own reference evaluator: no code of ours."""
    from onnx.reference import ReferenceEvaluator

    proto = M.to_proto(model)
    outputs = ReferenceEvaluator(proto).run(None, inputs)
    return {o.name: np.asarray(v) for o, v in zip(proto.graph.output, outputs, strict=True)}


def types(model: Any) -> list[str]:
    return [n.op_type for n in model.graph]


def sqnr_db(wanted: Array, got: Array) -> float:
    noise = float(((wanted.astype(np.float64) - got) ** 2).sum())
    return float(10 * np.log10(float((wanted.astype(np.float64) ** 2).sum()) / max(noise, 1e-30)))
