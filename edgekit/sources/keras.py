"""Keras 3 `.keras`, Keras 2 `.h5` and SavedModel folders as ONNX, with the original's own results.

TensorFlow lives in a process of its own (`keras_worker.py`), in the Python that EDGEKIT_KERAS_PYTHON names or in this
one. What can be refused without it is refused before it starts.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx

from edgekit.errors import DatasetError, ModelFileError, ShapeError
from edgekit.model import Signature, Tensors, TensorSpec, batch_of, seeded_inputs
from edgekit.sources import keras_worker
from edgekit.sources.keras_process import PYTHON_VARIABLE as PYTHON_VARIABLE
from edgekit.sources.keras_process import KerasProcess, as_error

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

CHECK_SAMPLES = 16
_HDF5 = b"\x89HDF\r\n\x1a\n"
_SCRIPT = Path(keras_worker.__file__)


@dataclass(frozen=True)
class Converted:
    """A Keras model as ONNX.

    proto: opset 18 as tf2onnx wrote it; inputs and outputs have the original's names, a free batch is called "batch".
    inputs: the batches that the original was run on, by input name: float32 or integer, batch first.
    outputs: the original's own results on them, by output name.
    versions: of python, tensorflow, keras, tf2onnx. checked_on: what the inputs are.
    """

    proto: onnx.ModelProto
    inputs: tuple[Tensors, ...]
    outputs: tuple[Tensors, ...]
    versions: dict[str, str]
    checked_on: Literal["real", "seeded"]


def convert(
    path: Path,
    kind: Literal["keras", "h5", "savedmodel"],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    trust: bool,
    data: Dataset | None,
    progress: Callable[[str], None],
) -> Converted:
    """Load, convert and run a Keras model in another process.

    shapes: input name -> full shape for sizes the file leaves open; -1 keeps the batch open. trust: let code in the
    file run. data: real samples to run the original on, if they fit; seeded ones otherwise.
    Raises ModelFileError, UnsafeModelError, UnsupportedOpError, ShapeError, NonFiniteError, MissingExtraError.
    """
    check_file(path, kind, trust=trust)
    with tempfile.TemporaryDirectory(prefix="edgekit-keras-") as folder, KerasProcess(_SCRIPT, path.name) as worker:
        work = Path(folder)
        worker.say(
            {
                "path": str(path.resolve()),
                "kind": kind,
                "trust": trust,
                "shapes": {name: list(shape) for name, shape in shapes.items()},
                "work": folder,
            }
        )
        specs = worker.until("signature", progress)
        real = _real_batches(specs, data)
        batches = real or _seeded_batches(specs)
        names = [_save(work / f"batch{i}.npz", specs, batch) for i, batch in enumerate(batches)]
        worker.say({"batches": names})
        done = worker.until("done", progress)
        proto = onnx.load(str(work / done["model"]))
        results = tuple(_load(work / name, done["names"]) for name in done["outputs"])
    _shape_outputs(proto, batches, results)
    return Converted(proto, tuple(batches), results, done["versions"], "real" if real else "seeded")


# --- before any process is started ----------------------------------------------------------------------------------
def check_file(path: Path, kind: Literal["keras", "h5", "savedmodel"], *, trust: bool) -> None:
    """Refuse what plainly is no model of that kind, and code or foreign classes in a .keras, by reading alone.

    Raises ModelFileError, UnsafeModelError, UnsupportedOpError.
    """
    if kind == "keras":
        config = _keras_config(path)
        try:
            keras_worker.scan_config(config, path.name, trust=trust)
        except keras_worker.Refused as refused:
            raise as_error(refused.kind, refused.what, refused.remedy) from refused
    elif kind == "h5":
        with _reading(path), path.open("rb") as file:
            head = file.read(len(_HDF5))
        if head != _HDF5:
            raise ModelFileError(f"'{path}' is no HDF5 file", "pass a Keras model saved as .h5")
    elif not (path / "saved_model.pb").is_file():
        raise ModelFileError(f"folder '{path}' is no SavedModel (it has no saved_model.pb)", "export the model again")


def _keras_config(path: Path) -> Any:
    """config.json of a .keras file whose members are all there and whole."""
    again = "save or copy it again"
    try:
        with _reading(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for member in ("config.json", "model.weights.h5"):  # metadata.json only tells who wrote it
                if member not in names:
                    raise ModelFileError(
                        f"'{path}' is a zip but no Keras file (it has no {member})",
                        "save the model with model.save('model.keras')",
                    )
            damaged = archive.testzip()
            if damaged is not None:
                raise ModelFileError(f"'{path}' is damaged in {damaged}", again)
            return json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise ModelFileError(f"'{path}' is truncated or no Keras file: {error}", again) from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"config.json in '{path}' is no JSON", again) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror or error}", "check the path") from error


# --- what the original is run on ------------------------------------------------------------------------------------
def _real_batches(specs: Sequence[Mapping[str, Any]], data: Dataset | None) -> list[Tensors]:
    """Real samples, all together and one alone; one size only where the batch is fixed, none if it is not filled."""
    sig = Signature(tuple(_spec(s) for s in specs), ())
    fixed = batch_of(sig)
    real = None if data is None else _real(sig, data, fixed or CHECK_SAMPLES)
    if real is None:
        return []
    samples = len(next(iter(real.values())))
    if fixed is not None:
        return [real] if samples == fixed else []
    # a second size shows whether the batch is really free
    return [real, {k: v[:1] if samples > 1 else np.repeat(v, 3, axis=0) for k, v in real.items()}]


def _seeded_batches(specs: Sequence[Mapping[str, Any]]) -> list[Tensors]:
    """Seeded samples, at two sizes where the batch is free."""
    fixed = batch_of(Signature(tuple(_spec(s) for s in specs), ()))
    return [
        {
            s["name"]: seeded_inputs(Signature((_spec(s),), ()), size, seed=i, high=s["high"])[s["name"]]
            for i, s in enumerate(specs)
        }
        for size in ((fixed,) if fixed is not None else (3, 1))
    ]


def _spec(given: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(given["name"], given["dtype"], tuple("batch" if s is None else s for s in given["shape"]))


def _real(sig: Signature, data: Dataset, samples: int) -> Tensors | None:
    """Up to `samples` of the data, or None if they do not fit this model: whoever asked for them reports why."""
    try:
        for batch in data.bind(sig).take(samples).batches(samples):
            return batch.inputs
    except (DatasetError, ShapeError):
        return None
    return None


def _save(path: Path, specs: Sequence[Mapping[str, Any]], batch: Tensors) -> str:
    np.savez(path, **{f"t{i}": batch[s["name"]] for i, s in enumerate(specs)})  # type: ignore[arg-type]
    return path.name


def _load(path: Path, names: Sequence[str]) -> Tensors:
    with np.load(path) as stored:
        return {name: stored[f"t{i}"] for i, name in enumerate(names)}


def _shape_outputs(proto: onnx.ModelProto, batches: Sequence[Tensors], results: Sequence[Tensors]) -> None:
    """Sizes of outputs that tf2onnx lost, from what the original gave for batches of different size."""
    given = [len(next(iter(batch.values()))) for batch in batches]
    free = len(set(given)) > 1
    if not free and any(v.type.tensor_type.shape.dim[0].dim_param for v in proto.graph.input):
        return  # one size seen of a batch that may have any: nothing can be told from it
    for value in proto.graph.output:
        seen = [result[value.name].shape for result in results]
        value.type.tensor_type.shape.SetInParent()
        dims = value.type.tensor_type.shape.dim
        while len(dims) < len(seen[0]):
            dims.add()
        for axis, dim in enumerate(dims):
            sizes = [shape[axis] for shape in seen]
            if dim.dim_value:
                continue
            if free and axis == 0 and sizes == given:
                dim.dim_param = "batch"
            elif len(set(sizes)) == 1:
                dim.dim_value = sizes[0]
