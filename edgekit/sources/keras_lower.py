"""From a folded float ONNX model to the steps that build the same model in Keras; needs no TensorFlow."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ShapeError, UnsupportedOpError
from edgekit.passes import fold_graph as G
from edgekit.sources import keras_layers, keras_moves, keras_pointwise, keras_recurrent
from edgekit.sources.keras_plan import FREE, Array, Builder, Step, View, Weight, refused, view, weight

RULES = keras_pointwise.RULES | keras_moves.RULES | keras_layers.RULES | keras_recurrent.RULES
# what exporters put behind a layer's own name in the names of its nodes and constants
_INNER = re.compile(
    r"(convolution|conv_transpose|depthwise|separable_conv2d|BiasAdd|MatMul|Tensordot|Cast|Reshape|Squeeze|ExpandDims|"
    r"ReadVariableOp|GatherV2|SelectV2|Mean|Max|AvgPool|MaxPool|Relu6?|LeakyRelu|Elu|Selu|Gelu|Erf|Sigmoid|Tanh|"
    r"Softmax|Softplus|Add(V2)?|Sub|Mul|mul|add|sub|concat|Pad|weight|bias|scale|merged_input|rows|dense|batchnorm|"
    r"transpose|strided_slice|Conv|Gemm|Relu|Clip|Transpose|Concat|GlobalAveragePool|LayerNormalization|Flatten|"
    r"BatchNormalization|kernel|gamma|beta)(_\d+)*(__\d+)?(:\d+)?"
)
_COUNTED = re.compile(r"_\d+$")


# layers that may hold the activation that follows
_ACTIVATED = frozenset({"Dense", "Conv1D", "Conv2D", "Conv2DTranspose", "DepthwiseConv1D", "DepthwiseConv2D"})


@dataclass(frozen=True)
class Plan:
    """inputs: (name, dtype, sizes; None is the free batch). outputs: tensors, in the graph's order, with the values'
    names. steps: in order. logits: per output the tensor that goes into its Softmax, or None.
    """

    name: str
    inputs: tuple[tuple[str, str, tuple[int | None, ...]], ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...]
    logits: tuple[str | None, ...]

    @property
    def weights(self) -> list[Weight]:
        """In the order in which the process that builds the model is given them."""
        return [w for step in self.steps for w in step.weights]

    @property
    def constants(self) -> int:
        """Floating point numbers in arrays that are no weights of layers."""
        arrays = [a for step in self.steps for a in step.arguments if isinstance(a, np.ndarray)]
        return sum(a.size for a in arrays if a.dtype.kind == "f")


class Lowering(Builder):
    """The state of a translation. values: what is computed so far, by the graph's name."""

    def __init__(self, model: ir.Model, *, fuse: bool, like: ir.Model | None) -> None:
        super().__init__()
        self.model = M.with_batch(model, FREE)
        self.values: dict[str, View] = {}
        self.fuse = fuse
        self._scopes = _scopes(self.model) | ({} if like is None else _scopes(like))

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Sizes with FREE for the batch. Raises ShapeError where one is unknown."""
        dims = G.dims(value)
        if value is None or dims is None or not all(isinstance(d, int) for d in dims):
            raise ShapeError(
                f"the sizes of '{'' if value is None else value.name}' depend on the data", "fix them with --shape"
            )
        return tuple(int(d) for d in dims)

    def operand(self, node: ir.Node, index: int) -> View | Array | None:
        """A computed value, a constant, or None for an input that is not there."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        if value.name in self.values:
            return self.values[value.name or ""]
        found = G.array(value)
        if found is None:
            raise refused(node.op_type, node.name, f"input {index} is not computed by the graph")
        return found

    def view(self, node: ir.Node, index: int = 0) -> View:
        found = self.operand(node, index)
        if not isinstance(found, View):
            raise refused(node.op_type, node.name, f"input {index} is constant")
        return found

    def constant(self, node: ir.Node, index: int) -> Array | None:
        """The constant, None if there is no such input. Raises UnsupportedOpError if it is computed."""
        found = self.operand(node, index)
        if isinstance(found, View):
            raise refused(node.op_type, node.name, f"input {index} is computed")
        return found

    def weight(self, node: ir.Node, index: int) -> Weight | None:
        """The constant as a weight of a layer, None if there is no such input."""
        found = self.constant(node, index)
        value = node.inputs[index] if found is not None else None
        return None if found is None or value is None else weight(value.name or "", found)

    def put(self, node: ir.Node, result: View, index: int = 0) -> None:
        self.values[node.outputs[index].name or ""] = result

    def name(self, node: ir.Node) -> str:
        return self._scopes.get(node.name or "", node.op_type.lower())

    def named(self, kind: str, inputs: str | list[str], node: ir.Node, weights: list[Weight], **config: Any) -> str:
        """A layer that is called like its node."""
        return self.layer(kind, inputs, self.name(node), weights=weights, **config)

    def activation(self, node: ir.Node, given: View, function: str) -> View:
        """An activation function; part of the layer before it if both bear one name, as Keras exports them."""
        step = self.producer(given.ref)
        value = node.inputs[0]
        alone = value is not None and len(tuple(value.uses())) == 1 and not value.is_graph_output()
        if (
            self.fuse
            and alone
            and step is not None
            and step.layer in _ACTIVATED
            and self.readers(given.ref) == 0
            and step.name == self.name(node)
            and "activation" not in step.config
        ):
            step.config["activation"] = function
            return given
        return View(self.named("Activation", given.ref, node, [], activation=function), given.dims, given.groups)


def lower(model: ir.Model, *, fuse: bool = True, like: ir.Model | None = None) -> Plan:
    """model: float, folded; a symbolic batch becomes Keras's None. fuse: join activations to the layer of their name.

    like: what the model was made from, with layers' names in its weights; nodes of the same name are called as there.

    Raises UnsupportedOpError naming the operator, ShapeError where a size is unknown.
    """
    low = Lowering(model, fuse=fuse, like=like)
    sig = M.signature(model)
    check_ops(model)
    for spec, value in zip(sig.inputs, _inputs(low.model), strict=True):
        if spec.dtype not in ("float32", "int32", "int64", "bool", "uint8"):
            raise UnsupportedOpError(f"input '{spec.name}' is {spec.dtype}", "give a float32 model")
        low.values[spec.name] = view(spec.name, low.shape(value))
    for node in low.model.graph:
        RULES[node.op_type](low, node)
    outputs, logits = [], []
    for value in low.model.graph.outputs:
        if value.name not in low.values:
            raise UnsupportedOpError(f"output '{value.name}' is constant", "leave it out")
        outputs.append(low.plain(low.values[value.name or ""]))
        producer = value.producer()
        softmax = G.is_op(producer, "Softmax") and producer is not None and producer.inputs[0] is not None
        logits.append(low.plain(low.values[producer.inputs[0].name or ""]) if softmax else None)  # type: ignore[union-attr]
    names = tuple(s.name for s in sig.outputs)
    ends = [_as_output(low, ref, name) for ref, name in zip(outputs, names, strict=True)]
    inputs = tuple((s.name, s.dtype, tuple(d if isinstance(d, int) else None for d in s.shape)) for s in sig.inputs)
    steps = low.finished([*ends, *(ref for ref in logits if ref is not None)], [s.name for s in sig.inputs])
    title = re.sub(r"\W+", "_", model.graph.name or "model")
    return Plan(title, inputs, tuple(steps), tuple(ends), names, tuple(logits))


def check_ops(model: ir.Model) -> None:
    """Raise UnsupportedOpError for the first operator that has no rule."""
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in RULES:
            raise refused(f"{node.domain}.{node.op_type}" if node.domain else node.op_type, node.name)


def _inputs(model: ir.Model) -> list[ir.Value]:
    given = set(model.graph.initializers)
    return [v for v in model.graph.inputs if v.name not in given]


def _as_output(low: Lowering, ref: str, name: str) -> str:
    """Keras calls an output like the layer that makes it: let that be the graph's name, where Keras can bear it."""
    step = low.producer(ref)
    if step is None or not step.layer:  # a model's own input, or a function, which has no name
        return low.layer("Identity", ref, name)
    if re.sub(r"[^A-Za-z0-9_.\-]+", "_", name) == name and all(s.name != name for s in low.steps):
        step.name = name
    return ref


# --- names ----------------------------------------------------------------------------------------------------------
def _scopes(model: ir.Model) -> dict[str, str]:
    """Node name -> name of the layer that it belongs to, as far as exporters leave it in node and weight names."""
    paths: dict[str, list[str]] = {}
    for node in model.graph:
        weights = [v.name or "" for v in node.inputs[1:] if v is not None and G.array(v) is not None]
        own = [node.name or "", *weights[:1]] if node.op_type in _WEIGHTED else [node.name or ""]
        found = next((p for p in map(_path, own) if len(p) > 1 and p[0] != node.name), None)
        if found is not None:
            paths[node.name or ""] = found
    heads = Counter(p[0] for p in paths.values())
    common = {h for h, n in heads.items() if n > len(paths) / 2}
    counted = all(_COUNTED.search(h) for h in common)  # Keras counts scopes anew when it exports: "stem" is "stem_1"
    out = {}
    for name, path in paths.items():
        parts = path[1:] if path[0] in common else path
        while len(parts) > 1 and _INNER.fullmatch(parts[-1]):
            parts = parts[:-1]
        out[name] = "_".join(_COUNTED.sub("", p) if common and counted else p for p in parts)
    return out


_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LayerNormalization", "Gather"})


def _path(name: str) -> list[str]:
    return [p for p in name.split("/") if p]
