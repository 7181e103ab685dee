"""Several .tflite files as one, a signature for each; weights that they share are stored once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.backends.tflite import FILE
from edgekit.errors import ConversionMismatchError, DiskError, ModelFileError, UsageError
from edgekit.sources import tflite as source

_BATCH = 1  # that the check runs with where the batch is open
_DIFFERS = 3  # exit status of the check


def join(files: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `out`, whose signature NAME computes what files[NAME], a .tflite or an artifact folder, computes.

    Each signature is then run beside its file on seeded inputs: both must give the same bits, else nothing is written.
    Metadata (labels, normalization) belong to one graph and stay behind. Raises ModelFileError for a file of several
    graphs, UsageError for fewer than two, ConversionMismatchError, DiskError, MissingExtraError.
    """
    if len(files) < 2:
        raise UsageError("joining needs two files or more", "pass NAME=FILE for each")
    paths = {name: path / FILE if path.is_dir() else path for name, path in files.items()}
    for path in paths.values():
        found = source.read(path)
        if len(found.subgraphs) != 1:
            raise ModelFileError(f"'{path}' holds {len(found.subgraphs)} graphs", "join files of one graph each")
    data = _joined(paths)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        for name, path in paths.items():
            _check(name, path, partial)
        partial.replace(out)
    except OSError as error:
        raise DiskError(f"cannot write '{out}': {error.strerror}", "free some space or choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)
    whole = sum(path.stat().st_size for path in paths.values())
    return {"schema": 1, "path": str(out), "signatures": list(paths), "size_bytes": len(data), "apart_bytes": whole}


def _joined(paths: Mapping[str, Path]) -> bytearray:
    from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped,unused-ignore]

    from edgekit.backends.tflite.writer import aligned, pack

    whole = schema.ModelT()
    whole.version, whole.description = 3, "joined by edgekit"
    whole.buffers, whole.operatorCodes, whole.subgraphs, whole.signatureDefs = [aligned(schema, None)], [], [], []
    stored: dict[bytes, int] = {}
    size = 0
    for name, path in paths.items():
        part = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
        numbers = []
        for buffer in part.buffers:
            content = np.zeros(0, np.uint8) if buffer.data is None else np.asarray(buffer.data, np.uint8)
            key = hashlib.sha256(content.data).digest()
            # buffers without bytes are kept apart: that of a constant without elements is not "none"
            if not content.size or key not in stored:
                stored[key] = len(whole.buffers)
                whole.buffers.append(aligned(schema, content))
                size += content.nbytes
            numbers.append(stored[key] if content.size else len(whole.buffers) - 1)
        first = len(whole.operatorCodes)
        whole.operatorCodes += part.operatorCodes
        graph = part.subgraphs[0]
        for tensor in graph.tensors:
            tensor.buffer = numbers[tensor.buffer] if tensor.buffer else 0
        for operator in graph.operators:
            operator.opcodeIndex += first
        whole.signatureDefs.append(_signature(schema, part, name, len(whole.subgraphs)))
        graph.name = name
        whole.subgraphs.append(graph)
    return pack(whole, size)


def _signature(schema: Any, part: Any, name: str, index: int) -> Any:
    """The file's only signature under its new name; one of the tensors' own names where it has none."""
    graph = part.subgraphs[0]
    if len(part.signatureDefs or ()) == 1:
        made = part.signatureDefs[0]
    else:
        made = schema.SignatureDefT()
        made.inputs = [_named(schema, graph, i) for i in graph.inputs]
        made.outputs = [_named(schema, graph, i) for i in graph.outputs]
    made.signatureKey, made.subgraphIndex = name, index
    return made


def _named(schema: Any, graph: Any, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = graph.tensors[index].name, int(index)
    return entry


def _check(name: str, path: Path, joined: Path) -> None:
    """Raise ConversionMismatchError unless the signature gives the bits of the file; a kernel may abort its process."""
    command = [sys.executable, "-m", "edgekit.join", name, str(path), str(joined)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = "gives other results" if done.returncode == _DIFFERS else (lines[-1] if lines else "LiteRT aborts")
    raise ConversionMismatchError(f"'{path}' cannot be joined: {told}", "leave it out, or report these files")


def _same(name: str, path: str, whole: str) -> bool:
    from ai_edge_litert.interpreter import Interpreter

    alone, joined = Interpreter(model_path=path, num_threads=1), Interpreter(model_path=whole, num_threads=1)
    runner = joined.get_signature_runner(name)
    signed = len(alone.get_signature_list()) == 1
    rng = np.random.default_rng(0)
    feeds = {}
    for key, detail in runner.get_input_details().items():
        shape = [_BATCH if size == -1 else size for size in detail["shape_signature"]]
        drawn = rng.uniform(0, 1, shape)
        numbers = np.issubdtype(detail["dtype"], np.integer)
        feeds[key] = (rng.integers(0, 2, shape) if numbers else drawn).astype(detail["dtype"])
    got = runner(**feeds)
    if signed:
        want = alone.get_signature_runner()(**feeds)
    else:
        for detail in alone.get_input_details():
            alone.resize_tensor_input(detail["index"], feeds[detail["name"]].shape)
        alone.allocate_tensors()
        for detail in alone.get_input_details():
            alone.set_tensor(detail["index"], feeds[detail["name"]])
        alone.invoke()
        want = {d["name"]: alone.get_tensor(d["index"]) for d in alone.get_output_details()}
    return all(got[key].tobytes() == value.tobytes() for key, value in want.items())


if __name__ == "__main__":
    sys.exit(0 if _same(*sys.argv[1:]) else _DIFFERS)
