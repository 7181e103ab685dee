"""LiteRT (TFLite) on the CPU: edgekit's own lowering of the one model, float or QDQ, to a .tflite file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import DiskError, LabelError, UnsupportedOpError
from edgekit.passes.roundings import small_tail
from edgekit.target import STATIC

if TYPE_CHECKING:
    from edgekit.backends import About, Repeats
    from edgekit.backends.tflite.lowering import Lowered, Refusal
    from edgekit.passes.quantize_weights import QuantizeWeights

NAME = "tflite"
PRECISIONS = ("float32", "float16", "int8", "int8x16", "int8-dynamic", "int8-weights")
RUNNER = Path(__file__).parent.parent / "runners" / "tflite.py"
WHEELS = ("ai-edge-litert", "numpy")
KERNELS = {"reference kernels (microcontrollers, runtimes without XNNPACK)": {"EDGEKIT_TFLITE_KERNELS": "reference"}}
PAIR_SUMS = False
EXACT: Mapping[str, str] | None = {}
FILE = "model.tflite"
_TOLD = 8  # refusals that one error line spells out
SMALL = 0.05  # of a model's weights: stored in float32 they add at most 15 % to the file


def missing() -> str | None:
    return None if find_spec("ai_edge_litert") else "pip install 'edgekit[tflite]'"


def version() -> str:
    try:
        return _installed("ai-edge-litert")
    except PackageNotFoundError:
        return _installed("tflite-runtime")


def lacks(folder: Path, package: str, version: str) -> list[str]:
    """Operators that a TFLite runtime of before LiteRT does not have, or not in the version that the file asks for."""
    from edgekit.sources.tflite import read
    from edgekit.sources.tflite_versions import oldest_runtime

    if package != "tflite-runtime":
        return []
    has, out = _numbers(version), []
    operators = {(o.name, o.version) for graph in read(folder / FILE).subgraphs for o in graph.operators}
    for name, number in sorted(operators):
        oldest, _ = oldest_runtime([(name, number)])
        if oldest is None or _numbers(oldest) > has:
            out.append(f"{name} version {number}" + (f" (TFLite {oldest})" if oldest else ""))
    return out


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def repeats(folder: Path) -> Repeats:
    """int8 sums round in one way on x86 and Arm; what is computed in float and then quantized again may not.

    Neither may an int8 softmax, whose table is made by the system's exp: 1 LSB in 0.15 % of ResNet8's on arm64.
    """
    from edgekit.sources.tflite import read

    computed = False
    for graph in read(folder / FILE).subgraphs:
        real = {i for i, tensor in enumerate(graph.tensors) if tensor.dtype.startswith("float")}
        inner: set[int] = set()  # float results of float arithmetic
        for operator in graph.operators:
            quantized_again = operator.name == "QUANTIZE" and inner.intersection(operator.inputs)
            table = operator.name in ("SOFTMAX", "LOG_SOFTMAX") and not real.intersection(operator.outputs)
            if quantized_again or table:
                return "flips"
            if operator.name != "DEQUANTIZE":
                inner |= real.intersection(operator.outputs)
        computed = computed or bool(inner)
    return "sums" if computed else "bits"


def refuses(model: ir.Model) -> list[str]:
    """Every node that cannot be lowered, with the reason and the remedy."""
    return [str(r) for r in _lowered(model)[0].refusals]


def saturates() -> bool:
    """Never: XNNPACK's and LiteRT's int8 kernels sum in int32 on every CPU."""
    return False


def unrounded(model: ir.Model) -> list[str]:
    """None: LiteRT rounds every tensor that its file says is int8."""
    return []


def unneeded(model: ir.Model) -> list[str]:
    """The last products, where float32 arithmetic on the same integers costs next to nothing (`SMALL` of all MACs).

    LiteRT has no kernel from int8 to float32: such a product is computed in float, its weights are stored as they are.
    """
    return small_tail(model, SMALL)


def weight_pass(precision: str) -> QuantizeWeights | None:
    """None: weights shrink while the float model is lowered, by LiteRT's own rules."""
    return None


def rounds_activations(model: ir.Model, precision: str) -> bool:
    return precision == "int8-dynamic"


def lower(model: ir.Model, precision: str, folder: Path, about: About | None = None) -> list[str]:
    """Write model.tflite. Nothing is written if a node is refused: the error names every one.

    float16: weights in float16, arithmetic in float32. int8-weights: the same with int8 weights. int8-dynamic: float32
    activations, quantized row by row as kernels run. int8, int8x16: what the QDQ model says.
    """
    from edgekit.backends.tflite import check
    from edgekit.backends.tflite.weights import shrink

    lowered, notes = _lowered(model, "float32" if about is None or precision not in STATIC else about.io)
    if lowered.refusals:
        raise UnsupportedOpError(f"LiteRT cannot take this model: {_told(lowered.refusals)}", "leave this backend out")
    if precision in ("float16", "int8-weights", "int8-dynamic"):
        notes += shrink(lowered.graph, precision)  # type: ignore[arg-type]
    if lowered.islands:
        notes.append(f"computed in float between int8: {_names(lowered.islands)}")
    if lowered.requantized:
        notes.append(f"requantized from one scale to another: {_names(lowered.requantized)}")
    if precision in STATIC:
        notes += check.remarks(lowered.graph)
    data, told = _file(lowered, M.signature(model), about)
    notes += told
    try:
        (folder / FILE).write_bytes(data)
    except OSError as error:
        raise DiskError(
            f"cannot write into '{folder}': {error.strerror}", "free some space or choose another --out"
        ) from error
    return notes


def _file(lowered: Lowered, sig: M.Signature, about: About | None) -> tuple[bytes | bytearray, list[str]]:
    """The file's bytes, with the metadata that apps read where there is something to say, and notes."""
    from edgekit.backends.tflite.describe import describe, label_files
    from edgekit.backends.tflite.metadata import ENTRY, append_files, model_metadata
    from edgekit.backends.tflite.writer import write
    from edgekit.preprocessing import Preprocessing

    if about is None:
        return write([lowered.graph], "edgekit"), []
    labels, notes = about.labels, []
    how = about.preprocessing or Preprocessing()
    told = describe(about.name, sig, how, images=about.images, labels=labels, text=about.description)
    try:
        files = label_files(told, labels)
    except LabelError as error:
        files, notes = {}, [f"no labels in the file: {error.what}"]
        told = describe(about.name, sig, how, images=about.images, text=about.description)
    data = write([lowered.graph], about.description, {ENTRY: model_metadata(told)})
    return append_files(data, files), notes


def _lowered(model: ir.Model, io: str = "float32") -> tuple[Lowered, list[str]]:
    """With an open batch if every node can have one, else for one sample."""
    from edgekit.backends.tflite.lowering import lower as lowered

    first = lowered(model, io)
    if not first.refusals or first.fixed_batch or M.batch_of(M.signature(model)) is not None:
        return first, []
    fixed = lowered(M.with_batch(model, 1), io)
    if fixed.refusals:
        return first, []
    told = first.refusals[0]
    return fixed, [f"written for batch 1: at '{told.node}' ({told.op}) {told.reason}"]


def _told(refusals: list[Refusal]) -> str:
    """All refusals in a line: the same reason once, with the number of nodes."""
    counts = Counter((r.op, r.reason, r.remedy) for r in refusals)
    first = {(r.op, r.reason, r.remedy): r.node for r in reversed(refusals)}
    lines = [
        f"{op} '{first[op, reason, remedy]}'{f' and {n - 1} more' if n > 1 else ''}: {reason} — {remedy}"
        for (op, reason, remedy), n in counts.most_common()
    ]
    more = f"; and {len(lines) - _TOLD} more reasons" if len(lines) > _TOLD else ""
    return "; ".join(lines[:_TOLD]) + more


def _names(nodes: list[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in nodes[:4])
    return shown + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
