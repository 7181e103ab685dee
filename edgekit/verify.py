"""Proves an artifact against its reference before anybody measures it; the record goes into the manifest.

The runtime runs in a worker process of its own: a kernel that aborts must not take the conversion with it.
"""

from __future__ import annotations

import contextlib
import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import arithmetic
from edgekit import model as M
from edgekit.backends import About, Backend
from edgekit.errors import UnsupportedOpError, WorkerError
from edgekit.passes.roundings import leave_out

if TYPE_CHECKING:
    from edgekit.bench.client import Worker
    from edgekit.dataset import Dataset

# of the largest output: what float32 kernels that sum in another order may differ by
FLOAT_BOUND = {"float32": 1e-4}
# float16 weights move a result by up to 2^-11 a layer, and rounding decides ties: the labels must hold all the same
FLOAT_MIN_AGREEMENT = 0.97
# of one operator's result: rounding, and in 16 bits LiteRT's tables for the logistic function and the exponential
# (8 LSB seen; an eighth of an int8 step)
MAX_LSB = {"int8": 1, "int8x16": 32}
MIN_LABEL_AGREEMENT = 0.95  # a flipped LSB cascades, for every runtime; below this something else is wrong, unless
MIN_SQNR_DB = 20.0  # the outputs differ by less than 1 % in power: near ties, or values that are no class scores
# of SQNR against the float model, that an artifact may lose to its own integers in exact arithmetic: flipped LSBs cost
# tenths, the wrong rows of a LiteRT bug 25, saturation 10 to 40
MAX_LOST_DB, TOLD_LOST_DB = 10.0, 2.0
BATCH = 32
# of all values that a batch gives, at most: a proof operator by operator holds them several times, in two processes
VALUES_BYTES = 256 * 2**20


@contextlib.contextmanager
def opened(backend: Backend, folder: Path, *, batch: int = 0, environment: Mapping[str, str] = {}) -> Iterator[Worker]:
    """A loaded worker for an artifact folder, single-threaded."""
    from edgekit.bench.client import Worker, local_command, thread_environment

    command = local_command(backend.RUNNER, folder, 1, batch)
    with Worker(command, backend.NAME, env={**thread_environment(1), **environment}) as worker:
        worker.load()
        yield worker


def batch_for(model: ir.Model) -> tuple[int, bool]:
    """(samples to hand over at once, whether the model takes exactly that many)."""
    fixed = M.batch_of(M.signature(model))
    return fixed or int(np.clip(VALUES_BYTES // max(1, _sample_bytes(model)), 1, BATCH)), fixed is not None


def _sample_bytes(model: ir.Model) -> int:
    """Of one sample's values as float32, as far as their shapes are known."""
    shapes = [v.shape for n in model.graph for v in n.outputs if v.shape is not None]
    return sum(4 * math.prod(d for d in shape if isinstance(d, int)) for shape in shapes)


def floating(backend: Backend, folder: Path, original: ir.Model, data: Dataset, precision: str) -> dict[str, Any]:
    """Compare a float artifact with the imported model in ONNX Runtime, unoptimized.

    Returns {"kind", "max_rel_error", "bound", "label_agreement", "samples", "ok", "reasons"}; errors are relative to
    the largest magnitude of each output.
    """
    reference = M.FloatSession(original, optimize=False)
    worst, same, labels, samples = 0.0, 0, 0, 0
    reasons: list[str] = []
    with opened(backend, folder) as worker:
        for part in batches(data, original):
            expected, got = reference.run(part), worker.infer(part)
            samples += len(next(iter(part.values())))
            for name, value in expected.items():
                if name not in got or got[name].shape != value.shape:
                    shape = got[name].shape if name in got else "none"
                    reasons.append(f"output '{name}' has shape {shape}, not {value.shape}")
                    continue
                floating_point = np.issubdtype(value.dtype, np.floating)
                if floating_point:
                    worst = max(worst, M.difference(value, got[name]))
                    if value.ndim < 2 or value.shape[-1] < 2:
                        continue
                equal = value.argmax(-1) == got[name].argmax(-1) if floating_point else value == got[name]
                same, labels = same + int(equal.sum()), labels + equal.size
    reasons = list(dict.fromkeys(reasons))
    bound = FLOAT_BOUND.get(precision)
    agreement = same / labels if labels else None
    if samples == 0:
        reasons.append("there were no samples to compare on")
    if not np.isfinite(worst):
        reasons.append("the artifact's output is NaN or Inf where the original's is not")
    elif bound is not None and worst > bound:
        reasons.append(f"differs from the original by {worst:.1e} of the largest output (bound {bound:.0e})")
    if agreement is not None and agreement < FLOAT_MIN_AGREEMENT:
        reasons.append(f"only {agreement:.1%} of the labels are the original's")
    return {
        "kind": "float",
        "max_rel_error": worst if np.isfinite(worst) else None,
        "bound": bound,
        "label_agreement": agreement,
        "samples": samples,
        "ok": not reasons,
        "reasons": reasons,
    }


def weights(
    backend: Backend, folder: Path, model: ir.Model, original: ir.Model, data: Dataset, precision: str
) -> dict[str, Any]:
    """Compare an artifact of quantized weights with float arithmetic on the same weights, and with the imported model.

    model: with quantized weights, what the artifact was lowered from. An artifact that computes in float must equal it
    as float artifacts equal theirs; one that rounds activations must stay MIN_SQNR_DB near it. What the weights cost is
    told by "from_original" and no reason to call an artifact wrong. Returns "kind", "max_rel_error" and "bound" (None
    where activations are rounded), "label_agreement", "sqnr_db", "samples", "from_original", "ok", "reasons".
    """
    rounds = backend.rounds_activations(model, precision)
    exact, first = M.FloatSession(model, optimize=False), M.FloatSession(original, optimize=False)
    near, far = arithmetic.Distance(), arithmetic.Distance()
    with opened(backend, folder) as worker:
        for part in batches(data, original):
            got = worker.infer(part)
            near.add(exact.run(part), got)
            far.add(first.run(part), got)
    bound = None if rounds else FLOAT_BOUND["float32"]
    reasons = list(dict.fromkeys(near.problems))
    sqnr = near.sqnr_db()
    if near.samples == 0:
        reasons.append("there were no samples to compare on")
    if not np.isfinite(near.worst):
        reasons.append("the artifact's output is NaN or Inf where the model's is not")
    elif bound is not None and near.worst > bound:
        reasons.append(f"differs from its own weights in float by {near.worst:.1e} of the largest output ({bound:.0e})")
    elif rounds and sqnr is not None and sqnr < MIN_SQNR_DB:
        reasons.append(f"the outputs are {sqnr:.1f} dB from the same weights' in float (at least {MIN_SQNR_DB:.0f})")
    record = {
        "kind": "weights",
        "max_rel_error": near.worst if bound is not None and np.isfinite(near.worst) else None,
        "bound": bound,
        **near.figures(),
        "samples": near.samples,
        "from_original": far.figures(),
        "ok": not reasons,
        "reasons": reasons,
    }
    # kernels that saturate elsewhere give something else there
    return {**record, "machine": platform.machine(), "saturates": backend.saturates()} if rounds else record


def batches(data: Dataset, model: ir.Model) -> Iterator[M.Tensors]:
    """The data as the model takes them.

    Of a fixed-batch model a short last batch is left out or, if there is no other, filled by repeating its samples.
    """
    for inputs, _ in _parts(data, model):
        yield inputs


def _parts(data: Dataset, model: ir.Model) -> Iterator[tuple[M.Tensors, np.ndarray[Any, Any] | None]]:
    """(inputs, labels or None) of each batch."""
    size, exact = batch_for(model)
    for number, part in enumerate(data.batches(size)):
        if len(part.index) == size or not exact:
            yield part.inputs, part.labels
        elif number == 0:
            repeated = np.arange(size) % len(part.index)
            labels = None if part.labels is None else part.labels[repeated]
            yield {k: v[repeated] for k, v in part.inputs.items()}, labels


def quantized(
    backend: Backend,
    folder: Path,
    model: ir.Model,
    data: Dataset,
    precision: str = "int8",
    *,
    original: ir.Model | None = None,
    exact_device: bool = False,
    machine: str = "",
) -> dict[str, Any]:
    """Compare an artifact of integers with the exact integer reference: operator by operator, and end to end.

    Each operator gets the reference's own inputs. model: the QDQ model that the artifact was lowered from. original:
    the float model; with it "arithmetic" tells how near to it the artifact is on each class of CPU. exact_device: it is
    for a CPU that sums exactly, also where this one's kernels saturate. machine: which, see `backends.About`.
    Returns parity.ParityRecord as JSON with "kind", "ok", "reasons", "arithmetic", and "unrounded",
    "label_agreement_unrounded": the tensors that the runtime is known not to round, and the agreement once the
    reference does not round them either.
    """
    from edgekit import parity

    labels: list[np.ndarray[Any, Any]] = []
    elsewhere_only = exact_device and precision == "int8" and backend.saturates()
    environment = (backend.EXACT or {}) if elsewhere_only else {}
    unproved = elsewhere_only and backend.EXACT is None
    labels_of = (given for _, given in _parts(data, model))
    near = arithmetic.Distances(original, labels_of) if original is not None else None
    with contextlib.ExitStack() as stack:
        artifact_worker = stack.enter_context(opened(backend, folder, environment=environment))
        cut: dict[int, Worker] = {}

        def run(loose: ir.Model, inputs: M.Tensors) -> M.Tensors:
            if unproved:
                raise parity.Unreadable("its kernels saturate on this CPU: run it on one that sums exactly")
            try:
                if id(loose) not in cut:
                    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekit-parity-")))
                    backend.lower(loose, precision, home, About(machine=machine))
                    cut[id(loose)] = stack.enter_context(opened(backend, home, environment=environment))
                return cut[id(loose)].infer(inputs)
            except (UnsupportedOpError, WorkerError) as error:
                raise parity.Unreadable(error.what) from error

        def end_to_end(inputs: M.Tensors) -> M.Tensors:
            outputs = artifact_worker.infer(inputs)
            labels.append(_labels(model, outputs))
            return outputs

        elsewhere = {name: _on_other_kernels(backend, folder, e, stack) for name, e in backend.KERNELS.items()}
        if near is not None and environment:
            near.natively = stack.enter_context(opened(backend, folder)).infer
        observe = None if near is None else near.add
        record = parity.check(model, run, end_to_end, batches(data, model), elsewhere, observe)
    out: dict[str, Any] = {"kind": precision, **record.to_json(), **_explained(backend, model, data, labels)}
    reasons = _reasons(out, precision, end_to_end=not unproved)
    lost = None if near is None or elsewhere_only else near.lost_db()
    out["lost_here_db"] = lost
    if lost is not None and lost > MAX_LOST_DB:
        reasons.append(f"it is {lost:.0f} dB further from the float model than its integers are in exact arithmetic")
    if reasons and not exact_device and _may_saturate(backend, model):
        reasons.append("8-bit weights saturate in this CPU's kernels: leave out --weight-bits 8")
    # what the proof holds for: the same file may compute something else where kernels saturate
    saturates = backend.saturates() and not elsewhere_only
    out.update(machine=platform.machine(), saturates=saturates, ok=not reasons, reasons=reasons)
    if near is not None:
        out["arithmetic"] = near.classes(backend, saturates=backend.saturates(), safe=not _may_saturate(backend, model))
    return out


def _may_saturate(backend: Backend, model: ir.Model) -> bool:
    """Whether some weight needs its eighth bit, in a runtime that adds pairs of products in 16 bits."""
    return backend.PAIR_SUMS and any(
        array.dtype == np.int8 and array.ndim > 1 and int(np.abs(array.astype(np.int16)).max(initial=0)) > 63
        for value in model.graph.initializers.values()
        if (array := M.constant(value)) is not None
    )


def _reasons(out: Mapping[str, Any], precision: str, *, end_to_end: bool) -> list[str]:
    """Why an artifact of integers is not what it was lowered from."""
    reasons = []
    off, most = out["per_op_max_lsb"], MAX_LSB[precision]
    if off is not None and off > most:
        reasons.append(f"an operator is {off} LSB off the reference (at most {most} is rounding)")
    far = end_to_end and out["sqnr_db"] is not None and out["sqnr_db"] < MIN_SQNR_DB
    if far and (out["label_agreement"] is None or out["label_agreement"] < MIN_LABEL_AGREEMENT):
        labels = out["label_agreement"]
        told = "" if labels is None else f", and only {labels:.1%} of the labels are its"
        reasons.append(f"the outputs are {out['sqnr_db']:.1f} dB from the integer reference's{told}")
    if out["samples"] == 0:
        reasons.append("there were no samples to compare on")
    return reasons


def _on_other_kernels(
    backend: Backend, folder: Path, environment: Mapping[str, str], stack: contextlib.ExitStack
) -> Callable[[M.Tensors], M.Tensors]:
    """Runs the artifact there; what fails there is no fault of the artifact here."""
    from edgekit import parity

    workers: list[Worker] = []

    def run(inputs: M.Tensors) -> M.Tensors:
        try:
            if not workers:
                workers.append(stack.enter_context(opened(backend, folder, environment=environment)))
            return workers[0].infer(inputs)
        except WorkerError as error:
            raise parity.Unreadable(error.what) from error

    return run


def _labels(model: ir.Model, outputs: M.Tensors) -> np.ndarray[Any, Any]:
    """The most likely class on the last axis of the first output."""
    first = outputs[model.graph.outputs[0].name or ""]
    return np.asarray(first.argmax(-1)) if first.ndim else np.zeros((), np.int64)


def _explained(backend: Backend, model: ir.Model, data: Dataset, labels: list[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Agreement with a reference that leaves out the roundings which this runtime is known to leave out."""
    from edgekit.backends.reference import Reference

    names = backend.unrounded(model)
    if not names:
        return {"unrounded": [], "label_agreement_unrounded": None}
    reference = Reference(leave_out(model, names))
    same = total = 0
    for inputs, got in zip(batches(data, model), labels, strict=True):
        equal = _labels(model, reference.run(inputs)) == got
        same, total = same + int(equal.sum()), total + equal.size
    return {"unrounded": names, "label_agreement_unrounded": same / total if total else None}


def notes(backend_name: str, record: dict[str, Any]) -> list[str]:
    """What a user should know of how an int8 artifact differs from the reference end to end, in sentences."""
    told = [_residuals(backend_name, record), _cost(record)]
    for name, agreement in record.get("elsewhere", {}).items():
        if agreement is not None and agreement < record["label_agreement"]:
            here = f"{record['label_agreement']:.1%}"
            told.append(f"on {name} {agreement:.1%} of the labels are the integer reference's; here {here}")
    return [t for t in told if t]


def _cost(record: dict[str, Any]) -> str:
    """What quantized weights change of the original model's results."""
    found = record.get("from_original")
    if found is None or found["sqnr_db"] is None:
        return ""
    labels = found["label_agreement"]
    told = "" if labels is None else f", {labels:.1%} of the labels are its"
    return f"{found['sqnr_db']:.1f} dB from the original model's outputs{told}"


def _residuals(backend_name: str, record: dict[str, Any]) -> str:
    """Why its labels are not all the reference's, where that is known; empty when there is nothing to say."""
    if not record.get("unrounded") or record["label_agreement"] is None or record["label_agreement"] == 1:
        return ""
    if record["label_agreement_unrounded"] <= record["label_agreement"]:
        return (
            f"{record['label_agreement']:.1%} of {backend_name}'s labels are the integer reference's; that it adds "
            f"{len(record['unrounded'])} residual(s) before rounding does not explain the rest"
        )
    return (
        f"{backend_name} adds {len(record['unrounded'])} residual(s) inside the convolution, before rounding: "
        f"{record['label_agreement']:.1%} of the labels are the integer reference's, "
        f"{record['label_agreement_unrounded']:.1%} those of a reference that does the same"
    )
