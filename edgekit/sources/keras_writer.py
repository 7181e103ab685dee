"""Writes an ONNX model as a `.keras` of standard layers, which loads without edgekit and can be trained further.

Method: the graph is translated here, without TensorFlow, into steps (`keras_lower`); a process of Keras's own builds
and saves them (`keras_builder.py`), loads the file again and runs it; only a file that computes the same is kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ConversionMismatchError, DatasetError, DiskError, ShapeError
from edgekit.sources import keras_builder
from edgekit.sources.keras_lower import Plan, lower
from edgekit.sources.keras_plan import Ref, Weight
from edgekit.sources.keras_process import KerasProcess

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

SCRIPT = Path(keras_builder.__file__)
BOUND = 1e-4  # |difference| / max |ONNX|: float32 rounding through a deep network, no more
CHECK_SAMPLES = 16


def write_keras(
    model: ir.Model,
    path: Path,
    progress: Callable[[str], None] = lambda stage: None,
    *,
    data: Dataset | None = None,
    like: ir.Model | None = None,
) -> dict[str, Any]:
    """Write `model` (float, folded) to `path`.

    data: real samples to check on, seeded ones otherwise. like: the folded model that this one was pruned from: its
    layers' names are kept. Weights can be trained further; arrays that are added or multiplied stay constants.
    Returns {max_rel_error, bound, samples, checked_on, layers: {class: count}, parameters, constants, versions};
    parameters: numbers that are trainable, constants: numbers in such arrays.
    Raises UnsupportedOpError naming an operator without translation, ShapeError, ConversionMismatchError,
    MissingExtraError without TensorFlow, DiskError; then nothing is written.
    """
    plan = lower(model, like=like)
    checked_on, batches = _batches(model, data)
    session = M.FloatSession(model, optimize=False)
    wanted = [session.run(batch) for batch in batches]
    with tempfile.TemporaryDirectory(prefix="edgekit-keras-") as folder:
        work = Path(folder)
        save_plan(plan, work / "plan.json")
        names = [save_batch(work / f"batch{i}.npz", plan, batch) for i, batch in enumerate(batches)]
        with KerasProcess(SCRIPT, path.name) as process:
            process.say({"task": "write", "plan": "plan.json", "work": folder, "batches": names})
            done = process.until("done", progress)
        worst = max(difference(plan, want, work / name) for want, name in zip(wanted, done["outputs"], strict=True))
        if worst > BOUND:
            raise ConversionMismatchError(
                f"the Keras model differs from the ONNX model by {worst:.1e} of its largest output (bound {BOUND:.0e})",
                "please report this model; the ONNX file is right",
            )
        _publish(work / done["model"], path)
    return {
        "max_rel_error": worst,
        "bound": BOUND,
        "samples": sum(len(next(iter(b.values()))) for b in batches),
        "checked_on": checked_on,
        "layers": dict(Counter(done["layers"])),
        "parameters": done["parameters"],
        "constants": plan.constants,
        "versions": done["versions"],
    }


def _publish(made: Path, path: Path) -> None:
    """Beside its place first: what was there stays whole until the new file is."""
    beside = path.with_name(f".{path.name}.part")
    try:
        shutil.copyfile(made, beside)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DiskError(
            f"cannot write '{path}': {error.strerror or error}", "check the folder and its space"
        ) from error


def _batches(model: ir.Model, data: Dataset | None) -> tuple[str, list[M.Tensors]]:
    """What to compare on: real samples if they fit, in two sizes where the batch is free."""
    from edgekit.sources.onnx import index_limit

    sig = M.signature(model)
    fixed = M.batch_of(sig)
    if data is not None:
        try:
            real = next(iter(data.bind(sig).take(fixed or CHECK_SAMPLES).batches(fixed or CHECK_SAMPLES))).inputs
        except (DatasetError, ShapeError):
            real = {}  # they are of another model: whoever asked for them reports why
        if real and (fixed is None or len(next(iter(real.values()))) == fixed):
            return "real", [real] if fixed else [real, {k: v[:1] for k, v in real.items()}]
    high = index_limit(model)
    return "seeded", [M.seeded_inputs(sig, n, seed=n, high=high) for n in ((fixed,) if fixed else (3, 1))]


# --- what travels to the process ------------------------------------------------------------------------------------
def save_plan(plan: Plan, path: Path) -> None:
    """path: .json; its arrays lie in an .npz of the same stem: a0… constants, w0… weights in the order of the steps."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def argument(given: Any) -> Any:
        if isinstance(given, Ref):
            return {"ref": given.name}
        if isinstance(given, np.ndarray):
            arrays[f"a{len(arrays)}"] = given
            return {"array": f"a{len(arrays) - 1}"}
        return [argument(g) for g in given] if isinstance(given, (list, tuple)) else given

    steps, count = [], 0
    for step in plan.steps:
        keys = [f"w{count + i}" for i in range(len(step.weights))]
        count += len(keys)
        steps.append(
            {
                "output": step.output, "layer": step.layer, "function": step.function, "name": step.name,
                "config": step.config, "inner": step.inner, "keywords": step.keywords, "takes": step.takes,
                "arguments": [argument(a) for a in step.arguments], "weights": keys,
            }
        )  # fmt: skip
    weights = {f"w{i}": np.ascontiguousarray(w.values) for i, w in enumerate(plan.weights)}
    np.savez(path.with_suffix(".npz"), **arrays, **weights)  # type: ignore[arg-type]
    document = {
        "name": plan.name, "inputs": plan.inputs, "steps": steps, "outputs": plan.outputs, "logits": plan.logits,
    }  # fmt: skip
    path.write_text(json.dumps(document), encoding="utf-8")


def save_batch(path: Path, plan: Plan, batch: M.Tensors) -> str:
    np.savez(path, **{f"t{i}": batch[name] for i, (name, _, _) in enumerate(plan.inputs)})  # type: ignore[arg-type]
    return path.name


def difference(plan: Plan, wanted: M.Tensors, path: Path) -> float:
    """Largest difference of the outputs that the process left in an .npz, relative to the largest of each output."""
    with np.load(path) as stored:
        got = {name: stored[f"t{i}"] for i, name in enumerate(plan.output_names)}
    return max(M.difference(want, got[name].astype(want.dtype, copy=False)) for name, want in wanted.items())


# --- weights that were trained, back in the graph -------------------------------------------------------------------
def restore(model: ir.Model, weights: list[tuple[Weight, np.ndarray[Any, Any]]]) -> ir.Model:
    """A copy of the model with initializers of the same names set to what layers now hold."""
    out = M.clone(model)
    new: dict[str, np.ndarray[Any, Any]] = {}
    for was, values in weights:
        if not was.name or was.index is None:
            continue
        initializer = out.graph.initializers[was.name]
        tensor = initializer.const_value
        assert tensor is not None
        array = new.setdefault(was.name, np.array(tensor.numpy()))
        array.reshape(-1)[was.index] = (values - (0.0 if was.offset is None else was.offset)) / was.scale
    for name, array in new.items():
        out.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return out
