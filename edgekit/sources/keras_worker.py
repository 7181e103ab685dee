"""The process that loads a Keras model, writes it as ONNX and runs the original: `python keras_worker.py`.

One file that needs the standard library, numpy, h5py, onnx, TensorFlow, Keras and tf2onnx, and nothing of edgekit, so
that it runs in any environment that has those. It is commanded by JSON lines on stdin and answers in JSON lines on
stdout; arrays and the model travel as files in the folder that the request names:

    -> {path, kind, shapes, trust, work}     <- {stage}, …, {signature: [{name, dtype, shape, high}]}
    -> {batches: [file.npz]}                 <- {stage}, …, {done: {versions, model, outputs: [file.npz]}}

or, at any point, <- {error: {kind, what, remedy}}, kind being the name of a class in edgekit.errors.
Arrays in an .npz are t0, t1, … in the order of the signature; a free batch is null in a shape.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPSET = 18  # the newest that tf2onnx 1.17 writes
NEEDED = ("tensorflow", "keras", "tf2onnx", "h5py", "onnx")
_INPUT, _OUTPUT = "edgekit_in_", "edgekit_out_"  # names nobody's layer has, until the real ones are given
_KERAS_ROOTS = ("keras", "builtins", "tensorflow")
# parts of Keras whose functions read files, fetch addresses or change settings: no layer lives there
_NO_LAYERS = frozenset({"utils", "config", "datasets", "callbacks", "saving", "export", "trainers", "wrappers"})
# TensorFlow operators that run Python or touch files when the graph runs
_UNSAFE_OPS = frozenset({"PyFunc", "PyFuncStateless", "EagerPyFunc", "ReadFile", "WriteFile", "MatchingFiles"})
# Keras 2 wrote these for layers whose Keras 3 class takes no such argument: (key, the one value that changes nothing)
_LEGACY_KEYS: dict[str, tuple[tuple[str, Any], ...]] = {
    "DepthwiseConv1D": (("groups", 1),),
    "DepthwiseConv2D": (("groups", 1),),
    "Conv1DTranspose": (("groups", 1),),
    "Conv2DTranspose": (("groups", 1),),
    "Conv3DTranspose": (("groups", 1),),
    "SeparableConv1D": (("groups", 1),),
    "SeparableConv2D": (("groups", 1),),
    "LSTM": (("time_major", False),),
    "GRU": (("time_major", False),),
    "RNN": (("time_major", False),),
    "SimpleRNN": (("time_major", False),),
    "BatchNormalization": (("fused", None), ("renorm", False), ("virtual_batch_size", None), ("adjustment", None)),
}


class Refused(Exception):
    """An expected failure: kind is the name of an edgekit error class."""

    def __init__(self, kind: str, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.kind, self.what, self.remedy = kind, what, remedy


@dataclass(frozen=True)
class Input:
    """shape: None is the free batch. high: ids below it are valid, for integer inputs that an embedding reads."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    high: int = 2


@dataclass(frozen=True)
class Original:
    """A loaded model: run gives the outputs in order; convert gives ONNX whose names are _INPUT/_OUTPUT + position."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    run: Callable[[list[Any]], list[Any]]
    convert: Callable[[], Any]


# --- what a file says before anything of it is run ------------------------------------------------------------------
def scan_config(config: Any, name: str, *, trust: bool) -> None:
    """Refuse Python code and foreign classes in a model's JSON; name is the file's. Raises Refused."""
    for node, owner in _objects(config, "model"):
        kind = str(node.get("class_name"))
        if kind in ("Lambda", "__lambda__") and not trust:
            raise Refused(
                "UnsafeModelError",
                f"layer '{owner}' of '{name}' holds Python code (Lambda) that would run on loading",
                "pass --trust if you know who made the file, or replace the layer",
            )
        module = node.get("module")
        parts = [p for p in str(module or "").split(".") if p != "src"]
        registered = str(node.get("registered_name") or kind)
        if kind == "function" and isinstance(node.get("config"), str):
            registered = node["config"]
        if (module and parts[0] not in _KERAS_ROOTS) or ">" in registered:  # "package>name" is how Keras registers it
            raise Refused(
                "UnsupportedOpError",
                f"layer '{owner}' of '{name}' needs the custom {'function' if kind == 'function' else 'class'} "
                f"'{registered or kind}'" + (f" of module '{module}'" if module and module != "builtins" else ""),
                "its code is not in the file: export the model to ONNX or a SavedModel where the class is known",
            )
        if len(parts) > 1 and parts[1] in _NO_LAYERS and not trust:
            raise Refused(
                "UnsafeModelError",
                f"'{owner}' of '{name}' would call '{module}.{kind}', which is no layer",
                "do not load files from strangers; pass --trust if you made it yourself",
            )


def _objects(node: Any, owner: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every serialized object with the name of the layer that it belongs to; training settings are never loaded."""
    if isinstance(node, list):
        for item in node:
            yield from _objects(item, owner)
    if not isinstance(node, dict):
        return
    inner = node.get("config")
    if isinstance(inner, dict) and isinstance(inner.get("name"), str):
        owner = inner["name"]
    if "class_name" in node:
        yield node, owner
    for key, value in node.items():
        if key not in ("compile_config", "training_config"):
            yield from _objects(value, owner)


def scan_links(file: Any, name: str) -> None:
    """Refuse HDF5 weights that lie in other files. file: an open h5py.File."""
    import h5py

    def visit(group: Any, path: str) -> None:
        for key in group:
            where = f"{path}/{key}"
            link = group.get(key, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise Refused("UnsafeModelError", f"weight '{where}' of '{name}' lies in another file", "save it whole")
            if isinstance(link, h5py.SoftLink):
                continue  # to a place in the same file, which is visited by its own name
            item = group[key]
            if isinstance(item, h5py.Dataset) and item.external:
                raise Refused("UnsafeModelError", f"weight '{where}' of '{name}' lies in another file", "save it whole")
            if isinstance(item, h5py.Group):
                visit(item, where)

    visit(file, "")


# --- loading --------------------------------------------------------------------------------------------------------
def load_keras(path: Path, trust: bool) -> Any:
    """A .keras file as a keras.Model."""
    import h5py

    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".h5"):
                with h5py.File(io.BytesIO(archive.read(member)), "r") as file:
                    scan_links(file, path.name)
    return _deserialize(path, path.name, trust)


def load_h5(path: Path, trust: bool, work: Path) -> Any:
    """A Keras .h5 file as a keras.Model; what Keras 3 no longer takes from Keras 2 is dropped from a copy."""
    import h5py

    remedy = "save the whole model again with model.save('model.keras')"
    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
            scan_links(file, path.name)
    except OSError as error:
        raise Refused("ModelFileError", f"'{path.name}' is damaged: {_line(error)}", "copy it again") from error
    if text is None:
        raise Refused("ModelFileError", f"'{path.name}' holds weights only, or no Keras model at all", remedy)
    config = json.loads(text)
    scan_config(config, path.name, trust=trust)
    if not drop_legacy(config, path.name):
        return _deserialize(path, path.name, trust)
    copy = work / "model.h5"
    shutil.copyfile(path, copy)
    with h5py.File(copy, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    return _deserialize(copy, path.name, trust)


def drop_legacy(config: Any, name: str) -> bool:
    """Remove what Keras 2 wrote and Keras 3 refuses, in place; True if anything was. Raises Refused if it mattered."""
    changed = False
    for node, owner in _objects(config, "model"):
        inner = node.get("config")
        for key, harmless in _LEGACY_KEYS.get(str(node["class_name"]), ()):
            if not isinstance(inner, dict) or key not in inner:
                continue
            value = inner.pop(key)
            changed = True
            if key != "fused" and value != harmless:
                raise Refused(
                    "UnsupportedOpError",
                    f"layer '{owner}' ({node['class_name']}) of '{name}' has {key}={value}, unknown to Keras 3",
                    f"build the model with {key}={harmless}",
                )
    return changed


def _deserialize(path: Path, name: str, trust: bool) -> Any:
    import keras

    try:
        return keras.saving.load_model(str(path), compile=False, safe_mode=not trust)
    except Exception as error:
        traceback.print_exc()
        text = _line(error)
        if any(sign in str(error) for sign in ("Could not locate", "Unknown layer", "Unknown object")):
            raise Refused(
                "UnsupportedOpError",
                f"'{name}' needs code that is not in the file: {text.split('. ')[0]}",
                "export it to ONNX",
            ) from error
        if "safe_mode" in str(error) or "Lambda" in str(error):
            raise Refused(
                "UnsafeModelError", f"'{name}' holds Python code: {text}", "pass --trust if you know who made the file"
            ) from error
        raise Refused(
            "ModelFileError", f"Keras cannot load '{name}': {text}", "save it again with a recent Keras"
        ) from error


def open_keras(model: Any, name: str, shapes: dict[str, list[int]]) -> Original:
    """A loaded keras.Model of any kind."""
    import numpy as np
    import tensorflow as tf
    from keras import tree

    if not getattr(model, "inputs", None):
        raise Refused("ModelFileError", f"'{name}' has no defined inputs", "call the model on data before saving it")
    for weight in model.weights:
        value = np.asarray(weight)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise Refused("NonFiniteError", f"weight '{weight.path}' of '{name}' has NaN or Inf", "train it again")
    struct: Any = getattr(model, "_inputs_struct", None)
    keyed = isinstance(struct, dict) and all(not isinstance(v, (dict, list, tuple)) for v in struct.values())
    tensors = [struct[k] for k in struct] if keyed else list(model.inputs)
    names = clean_names(list(struct) if keyed else [t.name for t in tensors], set())
    ids = _id_limits(model, tensors)
    sizes = merge_shapes({n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)}, shapes)
    inputs = tuple(Input(n, str(t.dtype), sizes[n], high) for n, t, high in zip(names, tensors, ids, strict=True))
    keys = list(struct) if keyed else []

    def call(given: Any) -> list[Any]:
        if keyed:
            packed: Any = dict(zip(keys, given, strict=True))
        else:
            packed = given[0] if len(given) == 1 and not isinstance(struct, dict) else list(given)
            if isinstance(struct, dict):
                packed = tree.pack_sequence_as(struct, list(given))
        return list(tree.flatten(model(packed, training=False)))

    def run(given: list[Any]) -> list[Any]:
        return [np.asarray(t) for t in call([tf.constant(g) for g in given])]

    outputs = clean_names(_output_names(model), set(names))
    return Original(inputs, outputs, run, lambda: convert_function(call, inputs))


def _output_names(model: Any) -> list[str]:
    struct = getattr(model, "_outputs_struct", None)
    if isinstance(struct, dict) and len(struct) == len(model.outputs):
        return sorted(struct)  # the order in which keras.tree flattens
    names = getattr(model, "output_names", None)
    if names and len(names) == len(model.outputs):
        return [str(n) for n in names]
    return [str(t._keras_history.operation.name) for t in model.outputs]


def _id_limits(model: Any, tensors: list[Any]) -> list[int]:
    """For each input, the number of ids that are valid: that of the embedding that reads it, else the smallest."""
    import keras

    found = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Embedding)]
    smallest = min((int(e.input_dim) for e in found), default=2)
    limits = [smallest] * len(tensors)
    for layer in found:
        for node in layer._inbound_nodes:
            for given in node.input_tensors:
                for i, tensor in enumerate(tensors):
                    if given is tensor:
                        limits[i] = int(layer.input_dim)
    return limits


def open_saved_model(path: Path, trust: bool, shapes: dict[str, list[int]]) -> Original:
    """A SavedModel folder, by TensorFlow 2's loader or, where that refuses an old one, by TensorFlow 1's."""
    import tensorflow as tf

    _scan_saved_model(path, trust)
    try:
        loaded = tf.saved_model.load(str(path))
        signatures = dict(loaded.signatures)
    except Exception:
        traceback.print_exc()  # for the log; the older loader reads folders that this one refuses
        return _open_by_session(path, shapes)
    return _open_by_function(loaded, signatures[_choose(list(signatures), path.name)], path.name, shapes)


def _scan_saved_model(path: Path, trust: bool) -> None:
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString((path / "saved_model.pb").read_bytes())
    except DecodeError as error:
        raise Refused("ModelFileError", f"'{path.name}/saved_model.pb' is damaged", "copy it again") from error
    for meta in proto.meta_graphs:
        functions = [node for f in meta.graph_def.library.function for node in f.node_def]
        for node in (*meta.graph_def.node, *functions):
            if node.op in _UNSAFE_OPS and not trust:
                raise Refused(
                    "UnsafeModelError",
                    f"node '{node.name}' ({node.op}) of '{path.name}' runs Python code or touches files",
                    "pass --trust if you know who made it",
                )


def _choose(found: list[str], name: str) -> str:
    usable = [s for s in found if not s.startswith("__")]
    if "serving_default" in usable:
        return "serving_default"
    if len(usable) != 1:
        raise Refused(
            "ModelFileError",
            f"SavedModel '{name}' has no signature 'serving_default' (it has: {', '.join(usable) or 'none'})",
            "export it with model.export(), or with one signature",
        )
    return usable[0]


def _open_by_function(loaded: Any, function: Any, name: str, shapes: dict[str, list[int]]) -> Original:
    import numpy as np
    import tensorflow as tf

    for variable in getattr(function, "variables", ()):
        value = variable.numpy()
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise Refused(
                "NonFiniteError", f"weight '{variable.name.split(':')[0]}' of '{name}' has NaN or Inf", "train it again"
            )
    specs = function.structured_input_signature[1]
    keys, given_outputs = list(specs), sorted(function.structured_outputs)
    names = clean_names(keys, set())
    sizes = merge_shapes({n: _dims(specs[k].shape, n) for n, k in zip(names, keys, strict=True)}, shapes)
    inputs = tuple(Input(n, specs[k].dtype.name, sizes[n]) for n, k in zip(names, keys, strict=True))

    def call(given: Any) -> list[Any]:
        out = function(**dict(zip(keys, given, strict=True)))
        return [out[k] for k in given_outputs]

    def run(given: list[Any]) -> list[Any]:
        return [t.numpy() for t in call([tf.constant(g) for g in given])]

    def convert() -> Any:
        assert loaded is not None  # its variables live as long as it does
        return convert_function(call, inputs)

    return Original(inputs, clean_names(given_outputs, set(names)), run, convert)


def _dims(shape: Any, name: str) -> tuple[int | None, ...]:
    if shape.rank is None:
        raise Refused("ShapeError", f"even the rank of input '{name}' is unknown", "export it with an input shape")
    return tuple(shape.as_list())


def _open_by_session(path: Path, shapes: dict[str, list[int]]) -> Original:
    import tensorflow as tf

    graph = tf.Graph()
    with graph.as_default():
        session = tf.compat.v1.Session(graph=graph)
        try:
            meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(path))
        except Exception as error:
            traceback.print_exc()
            raise Refused(
                "ModelFileError", f"TensorFlow cannot load '{path.name}': {_line(error)}", "export it again"
            ) from error
        signature = meta.signature_def[_choose(list(meta.signature_def), path.name)]
        keys, given_outputs = sorted(signature.inputs), sorted(signature.outputs)
        feeds = [graph.get_tensor_by_name(signature.inputs[k].name) for k in keys]
        wanted = [graph.get_tensor_by_name(signature.outputs[k].name) for k in given_outputs]
        _check_variables(session, path.name)
        frozen = tf.compat.v1.graph_util.convert_variables_to_constants(
            session, graph.as_graph_def(), sorted({t.op.name for t in wanted})
        )
    names = clean_names(keys, set())
    sizes = merge_shapes({n: _dims(t.shape, n) for n, t in zip(names, feeds, strict=True)}, shapes)
    inputs = tuple(Input(n, t.dtype.name, sizes[n]) for n, t in zip(names, feeds, strict=True))

    def run(given: list[Any]) -> list[Any]:
        return list(session.run(wanted, dict(zip(feeds, given, strict=True))))

    def convert() -> Any:
        by_name = {t.op.name: i for t, i in zip(feeds, inputs, strict=True)}
        for node in frozen.node:
            if node.name in by_name and node.op == "Placeholder":
                shape = tf.TensorShape(by_name[node.name].shape).as_proto()
                node.attr["shape"].shape.CopyFrom(shape)
        return convert_graph(frozen, [t.name for t in feeds], [t.name for t in wanted])

    return Original(inputs, clean_names(given_outputs, set(names)), run, convert)


def _check_variables(session: Any, name: str) -> None:
    import numpy as np
    import tensorflow as tf

    variables = tf.compat.v1.global_variables()
    for variable, value in zip(variables, session.run(variables), strict=True):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise Refused(
                "NonFiniteError", f"weight '{variable.name.split(':')[0]}' of '{name}' has NaN or Inf", "train it again"
            )


# --- names and shapes -----------------------------------------------------------------------------------------------
def clean_names(names: list[str], taken: set[str]) -> tuple[str, ...]:
    """Names without TensorFlow's ':0', made unique among themselves and `taken`."""
    used, out = set(taken), []
    for name in names:
        base = name.split(":")[0] or "tensor"
        unique, count = base, 1
        while unique in used:
            unique, count = f"{base}_{count}", count + 1
        used.add(unique)
        out.append(unique)
    return tuple(out)


def merge_shapes(
    known: dict[str, tuple[int | None, ...]], asked: dict[str, list[int]]
) -> dict[str, tuple[int | None, ...]]:
    """Shapes with the asked sizes filled in; only the batch may stay free. Raises Refused(ShapeError)."""
    for name in asked:
        if name not in known:
            raise Refused("ShapeError", f"the model has no input '{name}'", "its inputs: " + ", ".join(known))
    out = {}
    for name, sizes in known.items():
        want = asked.get(name, [-1] * len(sizes))
        text = ",".join(map(str, want))
        if len(want) != len(sizes):
            raise Refused("ShapeError", f"--shape {name}={text} has {len(want)} sizes", f"'{name}' has {len(sizes)}")
        for axis, (have, new) in enumerate(zip(sizes, want, strict=True)):
            if have is not None and new > 0 and have != new:
                raise Refused(
                    "ShapeError", f"--shape {name}={text} contradicts the model: size {axis} is {have}", "give that"
                )
        merged = tuple(new if have is None and new > 0 else have for have, new in zip(sizes, want, strict=True))
        if any(size is None for size in merged[1:]):
            open_axes = ", ".join(str(i) for i, size in enumerate(merged) if i and size is None)
            example = ",".join(str(s or ("N" if i else -1)) for i, s in enumerate(merged))
            raise Refused(
                "ShapeError",
                f"size {open_axes} of input '{name}' is unknown",
                f"pass --shape {name}={example} with a number for each N",
            )
        out[name] = merged
    return out


# --- TensorFlow to ONNX ---------------------------------------------------------------------------------------------
def convert_function(call: Callable[[Any], list[Any]], inputs: tuple[Input, ...]) -> Any:
    """tf2onnx's ModelProto of a TensorFlow function of positional tensors."""
    import tensorflow as tf
    import tf2onnx

    specs = [tf.TensorSpec(v.shape, v.dtype, name=f"{_INPUT}{i}") for i, v in enumerate(inputs)]

    def traced(*given: Any) -> dict[str, Any]:
        return {f"{_OUTPUT}{i}": tf.identity(t) for i, t in enumerate(call(list(given)))}

    # not tf2onnx's from_function: it takes constants that the function captured (of Normalization, say) for inputs
    function = tf.function(traced, input_signature=specs, autograph=False).get_concrete_function()
    feeds = [t.name for t in function.inputs[: len(inputs)]]
    wanted = [function.structured_outputs[f"{_OUTPUT}{i}"].name for i in range(len(function.structured_outputs))]
    return convert_graph(tf2onnx.tf_loader.from_function(function, feeds, wanted), feeds, wanted)


def convert_graph(frozen: Any, feeds: list[str], wanted: list[str]) -> Any:
    """tf2onnx's ModelProto of a TensorFlow graph without variables, its values called _INPUT/_OUTPUT + position."""
    import tf2onnx

    proto, _ = tf2onnx.convert.from_graph_def(frozen, input_names=feeds, output_names=wanted, opset=OPSET)
    new = {name: f"{_INPUT}{i}" for i, name in enumerate(feeds)}
    rename_values(proto.graph, new | {name: f"{_OUTPUT}{i}" for i, name in enumerate(wanted)})
    return proto


def finish(proto: Any, original: Original) -> Any:
    """The converted model made fit to be read elsewhere: standard operators only, real names, batch named."""
    import onnx

    rewrite_erfc(proto.graph)
    for node in _nodes(proto.graph):
        try:
            onnx.defs.get_schema(node.op_type, OPSET, node.domain)
        except onnx.defs.SchemaError:
            raise Refused(
                "UnsupportedOpError",
                f"TensorFlow operator '{node.op_type}' of node '{node.name}' has no ONNX form",
                "replace the layer that uses it",
            ) from None
    new = {f"{_INPUT}{i}": v.name for i, v in enumerate(original.inputs)}
    new |= {f"{_OUTPUT}{i}": name for i, name in enumerate(original.outputs)}
    rename_values(proto.graph, new)
    _order(proto.graph, original)
    proto.graph.ClearField("value_info")  # with tf2onnx's own names of unknown sizes
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise Refused(
            "UnsupportedOpError", f"tf2onnx wrote a broken graph: {_line(error)}", "convert the model to ONNX yourself"
        ) from error
    return proto


def _order(graph: Any, original: Original) -> None:
    """Inputs and outputs in the original's order, each with its known shape; an input that nothing reads stays one."""
    import numpy as np
    import onnx

    inputs = {v.name: v for v in graph.input}
    outputs = {v.name: v for v in graph.output}
    missing = [n for n in original.outputs if n not in outputs]
    if missing:
        raise Refused("UnsupportedOpError", f"tf2onnx lost output '{missing[0]}'", "convert the model to ONNX yourself")
    del graph.input[:]
    for spec in original.inputs:
        kind = inputs[spec.name].type.tensor_type.elem_type if spec.name in inputs else None
        kind = kind or onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        shape = ["batch" if size is None else size for size in spec.shape]
        graph.input.append(onnx.helper.make_tensor_value_info(spec.name, kind, shape))
    ordered = [onnx.ValueInfoProto.FromString(outputs[n].SerializeToString()) for n in original.outputs]
    del graph.output[:]
    graph.output.extend(ordered)
    for value in graph.output:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value") and any(v.shape and v.shape[0] is None for v in original.inputs):
            dims[0].dim_param = "batch"


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)


def _nodes(graph: Any) -> Iterator[Any]:
    for inner in _graphs(graph):
        yield from inner.node


def rename_values(graph: Any, new: dict[str, str]) -> None:
    """Rename values everywhere, inner graphs included; others that already bear a new name make way."""
    inner = list(_graphs(graph))
    everything = {name for node in _nodes(graph) for name in (*node.input, *node.output)}
    everything |= {v.name for g in inner for v in (*g.input, *g.output, *g.initializer)}
    targets = set(new.values())
    for name in (everything & targets) - set(new):
        free = f"{name}__inner"
        while free in everything or free in targets:
            free += "_"
        new = {**new, name: free}
        everything.add(free)
    for part in inner:
        for node in part.node:
            for names in (node.input, node.output):
                names[:] = [new.get(n, n) for n in names]
        for value in (*part.input, *part.output, *part.initializer, *part.value_info):
            value.name = new.get(value.name, value.name)


def rewrite_erfc(graph: Any) -> None:
    """Erfc(x), which ONNX lacks and exact GELU needs, as 1 - Erf(x)."""
    import numpy as np
    import onnx

    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    for part in _graphs(graph):
        nodes = list(part.node)
        if not any(n.op_type == "Erfc" for n in nodes):
            continue
        del part.node[:]
        for node in nodes:
            if node.op_type != "Erfc":
                part.node.append(node)
                continue
            kind = types.get(node.output[0]) or types.get(node.input[0]) or onnx.TensorProto.FLOAT
            one, erf = f"{node.output[0]}__one", f"{node.output[0]}__erf"
            value = np.ones((), onnx.helper.tensor_dtype_to_np_dtype(kind))
            part.initializer.append(onnx.numpy_helper.from_array(value, one))
            part.node.append(onnx.helper.make_node("Erf", [node.input[0]], [erf], name=f"{node.name}__erf"))
            part.node.append(onnx.helper.make_node("Sub", [one, erf], [node.output[0]], name=node.name))


# --- the conversation -----------------------------------------------------------------------------------------------
def serve(request: dict[str, Any], say: Callable[[dict[str, Any]], None], hear: Callable[[], dict[str, Any]]) -> None:
    """Answer one request."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            "MissingExtraError",
            f"a Keras model needs {', '.join(missing)}, which this Python has not",
            "pip install 'edgekit[keras]'",
        )
    path, work = Path(request["path"]), Path(request["work"])
    say({"stage": "import Keras model (TensorFlow)"})
    versions = _import()
    original = _open(path, request, work)
    for spec in original.inputs:
        if spec.dtype in ("string", "bfloat16", "resource", "variant"):
            raise Refused(
                "UnsupportedOpError", f"input '{spec.name}' is of type {spec.dtype}", "give the model a numeric input"
            )
    say({"signature": [{"name": s.name, "dtype": s.dtype, "shape": s.shape, "high": s.high} for s in original.inputs]})
    batches = hear()["batches"]
    say({"stage": "convert to ONNX"})
    model = _convert(original, path.name, work)
    say({"stage": "run the original"})
    outputs = [_run(original, path.name, work, name) for name in batches]
    say({"done": {"versions": versions, "model": model, "outputs": outputs, "names": list(original.outputs)}})


def _import() -> dict[str, str]:
    import keras
    import tensorflow as tf
    import tf2onnx

    if int(keras.__version__.split(".")[0]) < 3:
        raise Refused("MissingExtraError", f"Keras {keras.__version__} is too old", "pip install 'edgekit[keras]'")
    tf.get_logger().setLevel("ERROR")
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "tf2onnx": tf2onnx.__version__,
    }


def _open(path: Path, request: dict[str, Any], work: Path) -> Original:
    kind, trust, shapes = request["kind"], bool(request["trust"]), dict(request["shapes"])
    if kind == "savedmodel":
        return open_saved_model(path, trust, shapes)
    model = load_keras(path, trust) if kind == "keras" else load_h5(path, trust, work)
    return open_keras(model, path.name, shapes)


def _convert(original: Original, name: str, work: Path) -> str:
    import onnx

    try:
        proto = original.convert()
    except Exception as error:
        traceback.print_exc()
        text = _line(error)
        raise Refused("UnsupportedOpError", f"tf2onnx cannot convert '{name}': {text}", "simplify it") from error
    onnx.save_model(finish(proto, original), str(work / "model.onnx"))
    return "model.onnx"


def _run(original: Original, name: str, work: Path, batch: str) -> str:
    import numpy as np

    with np.load(work / batch) as stored:
        given = [stored[f"t{i}"] for i in range(len(original.inputs))]
    try:
        results = original.run(given)
    except Exception as error:
        traceback.print_exc()
        raise Refused(
            "ShapeError", f"'{name}' does not run on inputs of its own signature: {_line(error)}", "pass --shape"
        ) from error
    np.savez(work / f"out_{batch}", **{f"t{i}": value for i, value in enumerate(results)})
    return f"out_{batch}"


def _line(error: BaseException) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("in user code"):  # TensorFlow's traceback in the text: the cause is its end
        lines = lines[-1:]
    return (lines[0] if lines else type(error).__name__)[:300]


def main() -> int:
    """Serve one request; stdout is kept for answers, whatever TensorFlow prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    def hear() -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)  # nobody waits for the answer any more
        message: dict[str, Any] = json.loads(line)
        return message

    try:
        serve(hear(), say, hear)
    except Refused as error:
        say({"error": {"kind": error.kind, "what": error.what, "remedy": error.remedy}})
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # this folder holds modules called like the libraries that are imported here
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    sys.exit(main())
