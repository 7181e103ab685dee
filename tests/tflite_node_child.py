"""A process of its own that lowers ONNX's node test cases and runs them in LiteRT: a kernel that aborts kills only it.

Reads the pickled cases named in argv[1], then a case's number a line from stdin; answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.writer import write
from edgekit.errors import EdgekitError
from edgekit.passes.fold import Fold
from edgekit.sources import onnx as onnx_source

Array = np.ndarray[Any, Any]
# float32 rounding in chains of up to about 40 operators (the cases whose operator is written as a function); a wrong
# axis, edge or rounding mode is off by far more. Chains of float16 round by half of 2^-10 at each step, in whatever
# order ONNX's reference chose.
RELATIVE, RELATIVE_HALF = 1e-4, 4e-3
ABSOLUTE, ABSOLUTE_HALF = 1e-5, 1e-3  # of the largest expected value, for results that cancel to almost zero
PRINTED = {"test_averagepool_2d_ceil_last_window_starts_on_pad": 1e-3}  # expected values typed with four digits


@dataclass(frozen=True)
class Case:
    """A node test case. model: serialized. data: (inputs, outputs) in the model's order, a list for each data set."""

    name: str
    model: bytes
    data: list[tuple[list[Any], list[Any]]]


class Unusable(Exception):
    """The variant cannot be built, or edgekit's own source refuses it."""


def modern(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Cases of operators that have not changed since before the oldest opset that edgekit reads, at that opset."""
    oldest, version = onnx_source.OLDEST_OPSET, onnx_source.opset(proto)
    if not 0 < version < oldest:
        return proto
    if all(onnx.defs.get_schema(n.op_type, oldest).since_version <= version for n in proto.graph.node):
        for entry in proto.opset_import:
            entry.version = oldest
    return proto


def variants(case: Case) -> Iterator[tuple[onnx.ModelProto, list[tuple[list[Array], list[Array]]]]]:
    """The case as it is; then with its later integer inputs as weights (axes, shapes), then with all but the first."""
    proto = modern(onnx.ModelProto.FromString(case.model))
    yield proto, case.data
    inputs, outputs = case.data[0]
    if not all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in inputs):
        return
    integers = [i for i, a in enumerate(inputs) if i and a.dtype.kind in "iu"]
    later = list(range(1, len(inputs)))
    for fixed in (integers, later) if integers != later else (later,):
        if fixed and len(case.data) == 1:
            kept = [a for i, a in enumerate(inputs) if i not in fixed]
            yield with_weights(proto, fixed, inputs), [(kept, outputs)]


def with_weights(proto: onnx.ModelProto, fixed: list[int], values: list[Array]) -> onnx.ModelProto:
    """A copy whose inputs at `fixed` are initializers."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    for index in fixed:
        out.graph.initializer.append(numpy_helper.from_array(values[index], proto.graph.input[index].name))
    kept = [v for i, v in enumerate(proto.graph.input) if i not in fixed]
    del out.graph.input[:]
    out.graph.input.extend(kept)
    return out


def file_of(proto: onnx.ModelProto) -> bytes:
    """The .tflite. Raises EdgekitError or Unusable where edgekit refuses the model."""
    path = Path("case.onnx")
    onnx_source.check(proto, path)
    upgraded = onnx_source.upgrade(proto, {}, path)
    lowered = lower(Fold()(ir.from_proto(upgraded), None))
    if lowered.refusals:
        raise Unusable("; ".join(str(r) for r in lowered.refusals))
    return bytes(write([lowered.graph], "node test"))


def run(file: bytes, inputs: list[Array]) -> list[Array]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=file, num_threads=1)
    for detail, array in zip(interpreter.get_input_details(), inputs, strict=True):
        if tuple(detail["shape"]) != np.shape(array):
            interpreter.resize_tensor_input(detail["index"], np.shape(array))
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(detail["index"], np.asarray(array))
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]


def difference(got: Array, wanted: Array, printed: float = 0.0) -> str:
    """What is wrong with `got`, or "". Integers and booleans are compared for equality."""
    wanted = np.asarray(wanted)
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{got.dtype}{got.shape} instead of {wanted.dtype}{wanted.shape}"
    if wanted.dtype.kind in "iub":
        return "" if np.array_equal(got, wanted) else f"{_head(got)} instead of {_head(wanted)}"
    finite = np.abs(wanted[np.isfinite(wanted)].astype(np.float64))
    half = wanted.dtype == np.float16
    relative = max(printed, RELATIVE_HALF if half else RELATIVE)
    bound = (ABSOLUTE_HALF if half else ABSOLUTE) * finite.max(initial=0)
    near = np.allclose(got.astype(np.float64), wanted.astype(np.float64), relative, bound, equal_nan=True)
    if near:
        return ""
    worst = np.argmax(np.abs(np.nan_to_num(got.astype(np.float64) - wanted.astype(np.float64), nan=np.inf)))
    return f"{_head(got)} instead of {_head(wanted)}; at {worst}: {got.flat[worst]}, {wanted.flat[worst]}"


def _head(array: Array) -> str:
    return str(array.reshape(-1)[:6].tolist())


def outcome(
    proto: onnx.ModelProto, data: list[tuple[list[Array], list[Array]]], printed: float = 0.0
) -> tuple[str, str]:
    """(right, refused, wrong or crashed; why)."""
    if not all(isinstance(a, np.ndarray | np.generic) for one in data for part in one for a in part):
        return "refused", "inputs or outputs that are no tensors"
    try:
        file = file_of(proto)
    except (EdgekitError, Unusable) as refused:
        return "refused", str(refused)
    for inputs, outputs in data:
        results = run(file, inputs)
        for got, wanted in zip(results, outputs, strict=True):
            told = difference(got, wanted, printed)
            if told:
                return "wrong", told
    return "right", ""


def judge(case: Case) -> tuple[str, str]:
    """Wrong or crashed if any variant is; else right if any is; else refused with the last variant's reason."""
    best = ("refused", "")
    for proto, data in variants(case):
        try:
            found = outcome(proto, data, PRINTED.get(case.name, 0.0))
        except Exception as error:  # whatever is raised here is a bug: edgekit refuses by its own errors
            return "crashed", f"{type(error).__name__}: {error}"
        if found[0] == "wrong":
            return found
        best = best if best[0] == "right" else found
    return best


def main() -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LiteRT's own notes on stdout must not mix with the answers
    cases: list[Case] = pickle.loads(Path(sys.argv[1]).read_bytes())
    for line in sys.stdin:
        status, why = judge(cases[int(line)])
        print(json.dumps([status, why]), file=answers, flush=True)


if __name__ == "__main__":
    main()
