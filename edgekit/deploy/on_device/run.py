"""Answers inputs with a bundle's model: python run.py photo.png, row.csv, sample.npz, text.txt, or a stream of lines.

Standard library, numpy and the runtime, pillow where an image is read; Python 3.9: this file travels to devices, where
`transform.py`, `inputs.py` and `answers.py` lie beside it. On the host `running.py` answers with the same functions.

A document (RUN_SCHEMA 1) is one input's answers: {"schema", "input", "candidate", "answers": [{output: ANSWER}, ...one
for each sample], "notes": [text]}, or {"schema", "input", "candidate", "error", "remedy"}. ANSWER: see `answers.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

if __package__:  # a part of edgekit, on the host
    from edgekit import transform
    from edgekit.deploy.on_device.answers import describe, line, lines
    from edgekit.deploy.on_device.inputs import (
        Array,
        Given,
        Model,
        RunError,
        Tensors,
        of_line,
        read,
        read_labels,
        vocabulary,
    )
else:  # beside it, in a bundle
    import transform  # type: ignore[import-not-found, no-redef]
    from answers import describe, line, lines  # type: ignore[import-not-found, no-redef]
    from inputs import Array, Given, Model, RunError, Tensors, of_line, read, read_labels, vocabulary  # type: ignore[import-not-found, no-redef]

RUN_SCHEMA = 1  # 1: first
BUNDLE_SCHEMA = 1
TOP = 5
FAILED = 2  # exit code where an input cannot be answered
# of the outputs' range. Where integer kernels scale as they run, padding moves the rest: a GPT in ONNX Runtime by .9 %
_PADDING_MOVES = 0.05


# --- running ---------------------------------------------------------------------------------------
def answer(given: Given, model: Model, top: int) -> tuple[list[dict[str, Any]], Tensors, list[str]]:
    """(an answer by output for each sample, the raw outputs (n, ...), notes). Raises RunError or TransformError."""
    notes = list(given.notes)
    for name, array in given.arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RunError(f"input '{name}' has NaN or Inf", "repair it", "range")
    feeds = _pad(given, model) if given.last is not None else _deliver(given, model)
    outputs = _inferred(feeds, model)
    if given.last is not None:
        _check_padding(given, model, feeds, outputs)
    if given.image:
        notes += _pixel_notes(model)
    count = len(next(iter(feeds.values())))
    told = [
        {
            s["name"]: describe(outputs[s["name"]][at], model.labels, top, tokens=model.takes_tokens, last=given.last)
            for s in model.outputs
        }
        for at in range(count)
    ]
    return told, outputs, notes


def _deliver(given: Given, model: Model) -> Tensors:
    """The samples as the model takes them; where the file does not say whether it holds one or many, what fits."""
    alone = len(model.inputs) == 1

    def prepared(counted: bool) -> Tensors:
        out = {}
        for spec in model.inputs:
            raw = given.arrays[spec["name"]]
            raw = raw if counted and raw.ndim else raw[None]
            if not len(raw):
                raise RunError(f"input '{spec['name']}' holds no samples", "give at least one")
            out[spec["name"]] = transform.deliver(raw, spec, model.how, alone)
        if len({len(v) for v in out.values()}) > 1:
            sizes = ", ".join(f"'{n}' {len(v)}" for n, v in out.items())
            raise transform.TransformError(
                "shape", f"inputs hold different numbers of samples: {sizes}", "give as many"
            )
        return out

    if given.counted is not None:
        return prepared(given.counted)
    spec = model.inputs[0]
    many = given.arrays[spec["name"]].ndim != len(spec["shape"]) - 1
    try:
        return prepared(many)
    except transform.TransformError as error:
        if error.kind != "shape":
            raise
        try:
            return prepared(not many)
        except transform.TransformError:
            raise error from None


def _inferred(feeds: Tensors, model: Model) -> Tensors:
    """Outputs (n, ...) of any number of samples; the last ones fill a model whose batch is fixed."""
    count, batch = len(next(iter(feeds.values()))), model.batch
    parts: dict[str, list[Array]] = {}
    for start in range(0, count, batch):
        index = np.minimum(np.arange(start, start + batch), count - 1)
        got = model.infer({n: np.ascontiguousarray(v[index]) for n, v in feeds.items()})
        for spec in model.outputs:
            value = np.asarray(got[spec["name"]])
            # an output without a batch is of all samples that went in together
            each = value if value.ndim and len(value) == batch else np.stack([value] * batch)
            parts.setdefault(spec["name"], []).append(each[: count - start])
    return {n: np.concatenate(v) for n, v in parts.items()}


def _pad(given: Given, model: Model, token: int = 0) -> Tensors:
    """Tokens (1, t) filled up to the model's length."""
    spec = model.inputs[0]
    found = given.arrays[spec["name"]]
    length = spec["shape"][1] if isinstance(spec["shape"][1], int) else found.shape[1]
    out = np.full((1, length), token, np.dtype(spec["dtype"]))
    out[:, : found.shape[1]] = found
    return {spec["name"]: out}


def _check_padding(given: Given, model: Model, feeds: Tensors, outputs: Tensors) -> None:
    """Raise RunError if what stands behind the text changes the answer, as it does unless a model looks back only."""
    last, length = given.last or 0, next(iter(feeds.values())).shape[1]
    if last + 1 == length:
        return
    other = _inferred(_pad(given, model, max(1, (vocabulary(model) or 2) - 1)), model)
    for name, value in outputs.items():
        at = value[0][last] if value.ndim == 3 and value.shape[1] == length else value[0]
        again = other[name][0][last] if value.ndim == 3 and value.shape[1] == length else other[name][0]
        if float(np.max(np.abs(at - again))) > _PADDING_MOVES * float(np.ptp(at)):
            what = f"{last + 1} tokens are given; the model takes {length} and looks at all of them"
            raise RunError(what, f"give {length} tokens")


def _pixel_notes(model: Model) -> list[str]:
    """A remark where nothing was declared that turns pixels into what the model takes."""
    spec = model.inputs[0]
    if transform.numeric(model.how) or spec["name"] in model.pixels or "float" not in spec["dtype"]:
        return []
    return ["the pixels go in as 0 to 255, for no scale was declared; a model that takes 0 to 1 needs --scale 1/255"]


# --- the program -----------------------------------------------------------------------------------
def document(source: str, model: Model, top: int, stream: bool = False) -> tuple[dict[str, Any], Tensors]:
    """(the document of one input, its raw outputs). In a stream what goes wrong becomes a document too."""
    head = {"schema": RUN_SCHEMA, "input": source, "candidate": model.name}
    try:
        try:
            given = of_line(source, model) if stream else read(source, model)
            answers, outputs, notes = answer(given, model, top)
        except transform.TransformError as error:
            raise RunError(error.what, _remedy(error, model), error.kind) from error
        except MemoryError:
            raise RunError(f"'{source}' does not fit into memory", "give a smaller one") from None
        return {**head, "answers": answers, "notes": notes}, outputs
    except RunError as error:
        if not stream:
            raise
        return {**head, "error": error.what, "remedy": error.remedy}, {}


def _remedy(error: transform.TransformError, model: Model) -> str:
    if error.kind == "pillow":
        return "python -m pip install pillow, here"
    if error.remedy.startswith("drop "):  # an option; here the model's own declaration asks
        sizes = ", ".join(str(size) for size in model.inputs[0]["shape"][1:])
        return f"give pictures, or samples of shape ({sizes})" if transform.geometric(model.how) else error.remedy
    return error.remedy


def answer_stream(source: Iterable[bytes], model: Model, top: int, as_json: bool, say: Callable[[str], None]) -> None:
    """One line out for each line in, as soon as it is there; a line that cannot be answered says so in its place."""
    for raw in source:
        text = raw.decode("utf-8", errors="surrogateescape").rstrip("\r\n")
        told = document(text, model, top, stream=True)[0]
        say(json.dumps(told, allow_nan=False) if as_json else line(told))


def save(path: str, outputs: Tensors) -> None:
    """Raw outputs (n, ...) by name as a .npz, written beside and renamed."""
    beside = f"{path}.{os.getpid()}"
    try:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)
        os.replace(beside, path)
    except OSError as error:
        raise RunError(f"cannot write '{path}': {error.strerror}", "choose another --out") from error
    finally:
        if os.path.exists(beside):
            os.unlink(beside)


def one_line(error: BaseException) -> str:
    text = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def shipped(manifest: Mapping[str, Any], pixels: Sequence[str]) -> tuple[Model, dict[str, Any]]:
    """(what a bundle ships, not loaded yet, its entry in the manifest). Raises RunError for a bundle of another kind.

    pixels: of the artifact's own manifest.
    """
    try:
        if manifest["schema"] != BUNDLE_SCHEMA or manifest["kind"] != "bundle":
            raise RunError(f"the bundle has schema {manifest['schema']!r}", "bundle it again")
        entry = dict(manifest["candidates"][manifest["ship"]])
        how, labels = manifest["preprocessing"] or {}, manifest["labels"]
        return Model(manifest["ship"], closed, manifest["inputs"], manifest["outputs"], how, labels, pixels), entry
    except (KeyError, TypeError) as error:
        raise RunError(f"the bundle's manifest is damaged: {one_line(error)}", "deploy it again") from error


def is_bundle(folder: str) -> bool:
    """Whether a folder says that it is one; an artifact has a manifest of the same name."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            return bool(json.load(file).get("kind") == "bundle")
    except (OSError, ValueError, AttributeError):
        return False


def read_bundle(folder: str) -> tuple[Model, dict[str, Any], int]:
    """(model, not loaded yet; its entry; threads) of a bundle folder. Raises RunError."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            manifest = json.load(file)
        _, entry = shipped(manifest, ())
        with open(os.path.join(folder, entry["folder"], "manifest.json"), encoding="utf-8") as file:
            pixels = json.load(file).get("pixels", ())
        return shipped(manifest, pixels)[0], entry, int(manifest.get("threads") or 1)
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"the bundle '{folder}' is damaged: {one_line(error)}", "deploy it again") from error


def open_bundle(folder: str, threads: int | None) -> Model:
    """The model that a bundle ships, loaded. Raises RunError."""
    model, entry, usual = read_bundle(folder)
    try:
        with _quiet():
            runner = _load(os.path.join(folder, entry["runner"]))
            session = runner.open_session(os.path.join(folder, entry["folder"]), threads or usual, model.batch, False)
    except Exception as error:  # whatever a runtime throws
        raise RunError(f"{model.name} cannot be opened: {one_line(error)}", "deploy it again") from error

    def infer(feeds: Tensors) -> Tensors:
        try:
            return dict(session.run(feeds))
        except Exception as error:  # whatever a runtime throws
            raise RunError(f"{model.name} failed: {one_line(error)}", "check the input's values") from error

    model.infer = infer
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a runtime tells of itself while it loads goes nowhere; its errors are exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def closed(feeds: Tensors) -> Tensors:
    """The `infer` of a model that is not loaded yet."""
    raise RunError("the model is not loaded", "open it first")


def _load(path: str) -> Any:
    """Import a file by path, under a name that shadows no runtime's."""
    spec = importlib.util.spec_from_file_location("edgekit_runner", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["edgekit_runner"] = module
    spec.loader.exec_module(module)
    return module


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run", description="Answer inputs with this bundle's model.")
    parser.add_argument("inputs", nargs="*", metavar="FILE", help="image, .csv, .npz, .npy or .txt")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON document a line")
    parser.add_argument("--top", type=int, default=TOP, help="classes to show (default: %(default)s)")
    parser.add_argument("--stdin", action="store_true", help="answer line by line: paths, rows of numbers or text")
    parser.add_argument("--out", metavar="FILE.npz", help="save the outputs")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line, or a .json list")
    parser.add_argument("--threads", type=int, help="default: as many as the bundle says")
    for name in transform.OPTIONS:
        parser.add_argument("--" + name.replace("_", "-"), help="instead of what was declared")
    given = parser.parse_args(arguments)
    if given.stdin == bool(given.inputs):
        parser.error("give files, or --stdin")
    if given.out and len(given.inputs) != 1:
        parser.error("--out takes the outputs of one file")
    if given.top < 1 or (given.threads is not None and given.threads < 1):
        parser.error("--top and --threads start at 1")
    return given


def main(arguments: Sequence[str] | None, answers: BinaryIO) -> int:
    """answers: where they go; runtimes may write to standard output what they like."""
    given = _arguments(arguments)

    def say(text: str) -> None:
        answers.write(text.encode("utf-8", errors="backslashreplace") + b"\n")
        answers.flush()

    try:
        model = open_bundle(os.path.dirname(os.path.abspath(__file__)), given.threads)
        try:
            model.how = transform.merged(model.how, {name: getattr(given, name) for name in transform.OPTIONS})
        except transform.TransformError as error:
            raise RunError(error.what, error.remedy) from error
        if given.labels:
            model.labels = read_labels(given.labels, model)
        if given.stdin:
            answer_stream(sys.stdin.buffer, model, given.top, given.as_json, say)
        for path in given.inputs:
            told, outputs = document(path, model, given.top)
            if given.out:
                save(given.out, outputs)
            for text in [json.dumps(told, allow_nan=False)] if given.as_json else lines(told):
                say(text)
            for note in () if given.as_json else told["notes"]:
                print(f"note: {note}", file=sys.stderr)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _code = main(None, _answers)
    except BrokenPipeError:  # whoever reads has left
        _code = 0
    except KeyboardInterrupt:
        _code = 130
    except SystemExit as error:  # argparse
        _code = error.code if isinstance(error.code, int) else FAILED
    sys.stderr.flush()
    os._exit(_code)  # runtimes' thread pools sometimes hang while the interpreter is torn down
