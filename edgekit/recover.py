"""Label-free recovery: the float model teaches the pruned one on samples without labels.

Knowledge distillation (Hinton et al. 2015) in a process of Keras's own: both models are translated (`keras_lower`), the
student's weights follow the teacher's outputs, and what its blocks hand on, for a given time, and go back into the ONNX
student.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ConversionMismatchError, DatasetError, ShapeError, UsageError
from edgekit.passes import fold_graph as G
from edgekit.report.progress import Progress, silent
from edgekit.sources import keras_trainer
from edgekit.sources.keras_lower import Plan, lower
from edgekit.sources.keras_process import KerasProcess
from edgekit.sources.keras_writer import BOUND, difference, restore, save_plan

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Loss = Literal["scores", "values", "none"]
SCRIPT = Path(keras_trainer.__file__)
BATCH = 64
# A hundredth of a tensor's RMS a step, which raw 0-255 inputs bear as well. On a pruned ResNet8, one run each, twice as
# much was a point worse and less than half as much no better.
RATE, FLOOR, WARMUP = 0.01, 1e-3, 20
TEMPERATURE = 3.0  # on the same net half a point better than 1 in one run, which is within noise
# Inner values, against the outputs. On pruned nets after equal steps, KL on unseen samples without and with: ResNet8 at
# 79 % .142 and .114 (10 times as much: .114, a tenth: .128), MobileNetV2 at 30 % .059 and .047.
HINT = 100.0
AVERAGE = 0.99  # the weights are judged and kept as the mean over about a hundred steps
JUDGED = 20  # times in a run: often enough to stop where overfitting starts, a few per cent of the time
TRIAL, ENOUGH = 0.05, 0.75  # of the budget to try each way of altering samples; of the best one's gain, see `chosen`
SHIFT = 0.125  # four of 32 pixels, as is usual on CIFAR
# what follows a layer within a block
ACTIVATIONS = (
    "Relu",
    "Clip",
    "LeakyRelu",
    "PRelu",
    "Elu",
    "Selu",
    "HardSigmoid",
    "HardSwish",
    "Sigmoid",
    "Tanh",
    "Gelu",
)
_CHUNK = 256  # samples at a time that are written for the process


def distill(
    teacher: ir.Model,
    student: ir.Model,
    data: Dataset,
    held: Dataset,
    seconds: float,
    seed: int = 0,
    progress: Progress = silent,
    steps: int | None = None,
) -> tuple[ir.Model, dict[str, Any]]:
    """The student with weights that answer more like the teacher's; same graph, same names.

    teacher, student: float, folded, of one signature. data: bound to it, what is trained on; labels are not looked at.
    held: other samples, bound: the weights that are nearest to the teacher on them are kept, which may be the first.
    seconds: for training, without starting Keras. steps: a number of steps instead, which the same seed repeats
    exactly.
    Returns the student and {seconds, steps, loss, hints, loss_before, loss_after, agreement_before, agreement_after,
    samples, held, seed, versions, max_rel_error}; the figures before and after are of the held samples.
    Raises UnsupportedOpError, ShapeError, MissingExtraError without TensorFlow, ConversionMismatchError.
    """
    if seconds <= 0:
        raise UsageError(f"{seconds:g} seconds of distillation", "give more than none")
    _check_pair(teacher, student)
    student = unshared(student)
    shared = handed_on(teacher, student)
    plans = {name: lower(_telling(m, shared), fuse=False) for name, m in (("teacher", teacher), ("student", student))}
    losses = [_loss(plans["teacher"], i, v) for i, v in enumerate(teacher.graph.outputs)]
    sets = {"data": data, "held": held}
    with tempfile.TemporaryDirectory(prefix="edgekit-distill-") as folder:
        work = Path(folder)
        for name, plan in plans.items():
            save_plan(plan, work / f"{name}.json")
        fixed = M.batch_of(M.signature(teacher))
        samples = {name: _save(work, name, plans["teacher"], found, fixed or 1) for name, found in sets.items()}
        request: dict[str, Any] = {
            name: [f"{name}{i}.npy" for i in range(len(plans["teacher"].inputs))] for name in sets
        }
        settings = asdict(_settings(teacher, seconds, steps or 0, seed))
        request |= {
            "task": "train", "teacher": "teacher.json", "student": "student.json", "work": folder, "losses": losses,
            "hints": len(shared),
            "free": [bool(w.name) and w.values.dtype.kind == "f" for w in plans["student"].weights],
            "settings": settings,
        }  # fmt: skip
        with KerasProcess(SCRIPT, "the student") as process:
            process.say(request)
            done = process.until("done", lambda stage: progress(stage, 0, 0), lambda m: _tell(m, progress))
        with np.load(work / done["weights"]) as stored:
            out = restore(student, [(w, stored[f"w{i}"]) for i, w in enumerate(plans["student"].weights)])
        error = _check(_telling(out, shared), plans["student"], work, done)
    record = {k: v for k, v in done.items() if k not in ("weights", "outputs", "rows")}
    return out, {
        **record, "loss": losses, "hints": shared, "samples": samples["data"], "held": samples["held"], "seed": seed,
        "settings": settings, "max_rel_error": error,
    }  # fmt: skip


def _tell(message: Any, progress: Progress) -> None:
    if "step" in message:
        done, total = message["step"]
        progress("distill", done, total)


def _check_pair(teacher: ir.Model, student: ir.Model) -> None:
    a, b = M.signature(teacher), M.signature(student)
    if [(s.name, s.dtype, s.shape) for s in (*a.inputs, *a.outputs)] != [
        (s.name, s.dtype, s.shape) for s in (*b.inputs, *b.outputs)
    ]:
        raise ShapeError("teacher and student have different inputs or outputs", "give the model that was pruned")


def handed_on(teacher: ir.Model, student: ir.Model) -> list[str]:
    """Values of both models that blocks hand on to each other, which may have fewer channels in the student.

    Sums, behind their activation, and results of convolutions that are neither activated nor added to anything.
    """
    there = {v.name: G.dims(v) for n in teacher.graph for v in n.outputs}
    ends = {v.name for v in student.graph.outputs}
    found = []
    for node in student.graph:
        value = node.outputs[0]
        known, own = there.get(value.name), G.dims(value)
        if value.name in ends or not known or not own or len(known) != len(own) or known[0] != own[0]:
            continue
        if value.dtype != ir.DataType.FLOAT:
            continue
        if sum(a != b for a, b in zip(known, own, strict=True)) <= 1 and _ends_block(node):
            found.append(value.name or "")
    return found


def _ends_block(node: ir.Node) -> bool:
    if G.is_op(node, *ACTIVATIONS):
        return node.inputs[0] is not None and _is_sum(node.inputs[0].producer())
    readers = [use.node for use in node.outputs[0].uses()]
    if not readers or all(G.is_op(r, *ACTIVATIONS) for r in readers):
        return False
    return _is_sum(node) or (G.is_op(node, "Conv") and not any(_is_sum(r) for r in readers))


def _is_sum(node: ir.Node | None) -> bool:
    """Of two values; a bias is none."""
    return node is not None and G.is_op(node, "Add") and all(G.array(v) is None for v in node.inputs)


def _telling(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """The model with these values as outputs behind its own."""
    out = M.clone(model)
    values = {v.name: v for n in out.graph for v in n.outputs}
    out.graph.outputs.extend(values[name] for name in names)
    return out


def _loss(plan: Plan, index: int, value: ir.Value) -> Loss:
    """What an output is taken for: scores of classes where it is a Softmax or may be its input, else values.

    The loss of scores holds that of values: both are least where the student equals the teacher, so that targets taken
    for scores are learned all the same.
    """
    if value.dtype != ir.DataType.FLOAT:
        return "none"
    dims, producer = G.dims(value), value.producer()
    if dims is None or len(dims) < 2 or dims[-1] == 1 or G.is_op(producer, "Sigmoid", "Tanh", "Relu", "Clip"):
        return "values"
    if plan.logits[index] is None or producer is None:
        return "scores" if len(dims) < 4 else "values"  # images
    return "scores" if G.integer(producer, "axis", -1) in (-1, len(dims) - 1) else "values"


def _settings(model: ir.Model, seconds: float, steps: int, seed: int) -> keras_trainer.Settings:
    """Real numbers can be mixed, images (one or three channels) moved and mirrored; each way is tried first."""
    specs = M.signature(model).inputs
    ways: list[str] = ["plain"]
    places: list[int] = []
    if all(s.dtype == "float32" for s in specs):
        ways, places = ["plain", "mixed"], _places(specs[0].shape) if len(specs) == 1 else []
    if len(places) == 2:
        ways = ["plain", "moved", "moved+mixed", "mirrored+mixed"]
    return keras_trainer.Settings(
        RATE, FLOOR, WARMUP, TEMPERATURE, HINT, AVERAGE, M.batch_of(M.signature(model)) or BATCH, seconds, steps, seed,
        JUDGED, ways, TRIAL, ENOUGH, places, SHIFT,
    )  # fmt: skip


def _places(shape: tuple[int | str, ...]) -> list[int]:
    """The axes of height and width of an image."""
    if len(shape) != 4:
        return []
    return [1, 2] if shape[3] in (1, 3) else [2, 3] if shape[1] in (1, 3) else []


def _save(work: Path, stem: str, plan: Plan, data: Dataset, whole: int) -> int:
    """Writes the samples as one .npy for each input, a batch at a time; whole: they come in full batches of this size.

    Returns how many there are.
    """
    files: list[Any] = []
    at, count = 0, data.samples // whole * whole
    if not count:
        raise DatasetError(f"{data.samples} samples to distill on", f"give a few hundred, {whole} at least")
    for batch in data.batches(_CHUNK):
        for i, (name, _, _) in enumerate(plan.inputs):
            array = batch.inputs[name][: count - at]
            if at == 0:
                path = work / f"{stem}{i}.npy"
                files.append(np.lib.format.open_memmap(path, "w+", array.dtype, (count, *array.shape[1:])))
            files[i][at : at + len(array)] = array
        at += len(next(iter(batch.inputs.values())))
        if at >= count:
            break
    for file in files:
        file.flush()
    return count


def _check(model: ir.Model, plan: Plan, work: Path, done: dict[str, Any]) -> float:
    """The trained graph against the trained Keras model, on held samples."""
    rows = done["rows"]
    batch = {name: np.load(work / f"held{i}.npy", mmap_mode="r")[:rows] for i, (name, _, _) in enumerate(plan.inputs)}
    wanted = M.FloatSession(model, optimize=False).run({k: np.ascontiguousarray(v) for k, v in batch.items()})
    error = difference(plan, wanted, work / done["outputs"])
    if error > BOUND:
        raise ConversionMismatchError(
            f"the distilled ONNX model differs from the Keras model by {error:.1e} (bound {BOUND:.0e})",
            "please report this model",
        )
    return error


def unshared(model: ir.Model) -> ir.Model:
    """A copy in which each node reads floating point constants of its own: layers are trained apart."""
    out = M.clone(model)
    uses = Counter(v.name for n in out.graph for v in n.inputs if v is not None and v.is_initializer())
    seen: set[str] = set()
    for node in out.graph:
        for index, value in enumerate(node.inputs):
            array = G.array(value)
            if value is None or array is None or array.dtype.kind != "f" or uses[value.name] < 2 or array.size < 2:
                continue
            name = value.name or ""
            if name in seen:
                node.replace_input_with(index, G.new_constant(out.graph, name, array))
            seen.add(name)
    return out
