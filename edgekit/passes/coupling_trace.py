"""Walks a model and couples its channels, by a rule per operator; one without a rule freezes what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.passes import coupling_layers as L
from edgekit.passes import coupling_moves as M
from edgekit.passes import fold_graph as G
from edgekit.passes.coupling import Array, Coupling, Number, Pattern, Role, Site, Work, macs, sizes

# element by element, one operand; whatever they make of 0
UNARY = (
    "Abs Acos Asin Atan Cast Ceil Celu Clip Cos Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsNaN "
    "LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tan Tanh "
    "ThresholdedRelu"
)
BROADCAST = "Add Sub Mul Div Max Min Mean Sum Pow PRelu Where Equal Greater Less And Or"
POOLS = "MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool GlobalLpPool"
REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp"


def trace(model: ir.Model) -> Coupling:
    """The channel dependencies of a prepared model with known sizes.

    Where a Reshape splits channels in several axes, one of them keeps labels (heads, or the channels of a group): the
    one that leaves most weights free to go, tried out pattern by pattern.
    """
    chosen: dict[Pattern, int] = {}
    found = Tracer(model, chosen).run()
    for pattern in list(found.splits):
        options = [axis for axis, size in enumerate(pattern[1]) if size > 1]
        best = found
        for axis in options:
            if axis != found.splits.get(pattern, axis):  # an earlier choice may have left nothing to split
                other = Tracer(model, {**chosen, pattern: axis}).run()
                if _free(other) > _free(best):
                    best = other
        if pattern in best.splits:
            chosen[pattern] = best.splits[pattern]
        found = best
    return found


def _free(found: Coupling) -> tuple[int, int]:
    """How many positions of weights may go, of all sites, and in how many units."""
    free = [f.units for f in found.families() if not f.frozen]
    may = np.zeros(found.count, bool)
    may[np.concatenate(free or [np.array([], np.int64)])] = True
    return sum(int(may[found.roots(s.labels)].sum()) for s in found.sites if s.role != "along"), int(may.sum())


class Tracer:
    """One walk over the graph."""

    def __init__(self, model: ir.Model, choices: dict[Pattern, int]) -> None:
        self.model = model
        self.choices = choices
        self.found = Coupling()

    def run(self) -> Coupling:
        found = self.found
        for node in self.model.graph:
            self._captured(node)
            rule = RULES.get(node.op_type) if G.is_op(node, node.op_type) else None
            if rule is None or not rule(self, node):
                self.work(node, macs(node))
                for value in node.inputs:
                    found.freeze_value(value, f"{node.op_type} node '{node.name}' is not understood")
                for value in node.outputs:
                    found.on.pop(value.name or "", None)
        for value in self.model.graph.outputs:
            found.freeze_value(value, f"output '{value.name}' of the model")
        self._shared()
        return found

    def _captured(self, node: ir.Node) -> None:
        """What graphs inside a node read stays."""
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr) and attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
                read = [v for g in graphs for n in ir.traversal.RecursiveGraphIterator(g) for v in n.inputs]
                for value in (*read, *(v for g in graphs for v in g.outputs)):
                    self.found.freeze_value(value, f"control flow: {node.op_type} node '{node.name}'")

    def _shared(self) -> None:
        """Weights that several nodes share stay shared: their sites get the same labels, or none may go."""
        found = self.found
        by_constant: dict[int, list[tuple[ir.Node, int]]] = {}
        for node in self.model.graph:
            for position, value in enumerate(node.inputs):
                array = G.array(value)
                if value is not None and array is not None and array.ndim > 1 and len(tuple(value.uses())) > 1:
                    by_constant.setdefault(id(value), []).append((node, position))
        for uses in by_constant.values():
            names = {(node.name or "", position) for node, position in uses}
            sites = [s for s in found.sites if (s.node, s.position) in names]
            for axis in {s.axis for s in sites}:
                here = [s for s in sites if s.axis == axis]
                if len(here) == len(names) and len({len(s.labels) for s in here}) == 1:
                    for other in here[1:]:
                        found.join(here[0].labels, other.labels)
                else:
                    for site in here:
                        found.freeze(site.labels, f"weights of '{site.node}' are shared with another node")

    # --- helpers for rules -------------------------------------------------------------------------
    def site(self, node: ir.Node, position: int, axis: int, labels: Array, role: Role) -> None:
        self.found.sites.append(Site(node.name or "", position, axis, labels, role))

    def number(self, node: ir.Node, where: str | int, index: int, labels: Array) -> None:
        self.found.numbers.append(Number(node.name or "", where, index, labels))

    def work(self, node: ir.Node, macs: float, *factors: Array | None) -> None:
        self.found.works.append(Work(node.name or "", macs, tuple(f for f in factors if f is not None)))

    def pass_axes(self, node: ir.Node, axes: dict[int, Array]) -> bool:
        """The first output gets these labels; the axes that it does not have in that size freeze."""
        shape = sizes(node.outputs[0])
        for axis, labels in axes.items():
            if shape is not None and axis < len(shape) and shape[axis] in (None, len(labels)):
                self.found.put(node.outputs[0], axis, labels)
            else:
                does = "has a result of unknown sizes" if shape is None else "changes the size of that axis"
                self.found.freeze(labels, f"{node.op_type} node '{node.name}' {does}")
        return True

    def reads(self, value: ir.Value | None, axis: int, size: int) -> Array | None:
        """Labels along this axis, which weights read; those along other axes are left to the caller."""
        labels = self.found.axes(value).get(axis)
        if labels is not None and len(labels) != size:
            self.found.freeze(labels, "read by weights of another size")
            return None
        return labels

    def together(self, a: Array, b: Array, node: ir.Node) -> None:
        if len(a) == len(b):
            self.found.join(a, b)
        else:  # one of them lies on an axis that holds the batch too
            for labels in (a, b):
                self.found.freeze(labels, f"{node.op_type} node '{node.name}' meets another size")

    def only(self, node: ir.Node, value: ir.Value | None, kept: Sequence[int]) -> None:
        """Freeze the labels on other axes."""
        for axis, labels in self.found.axes(value).items():
            if axis not in kept:
                self.found.freeze(labels, f"{node.op_type} node '{node.name}' works along that axis")


RULES: dict[str, Callable[[Tracer, ir.Node], bool]] = {
    "Conv": L.conv,
    "ConvTranspose": L.conv_transpose,
    "Gemm": L.gemm,
    "MatMul": L.matmul,
    **dict.fromkeys(L.GATES, L.recurrent),
    **dict.fromkeys(UNARY.split(), L.unary),
    **dict.fromkeys(BROADCAST.split(), L.broadcast),
    **dict.fromkeys(POOLS.split(), L.pool),
    **dict.fromkeys(REDUCTIONS.split(), L.reduce),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), L.channelwise),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"), L.along_axis),
    "Transpose": M.transpose,
    "Concat": M.concat,
    "Split": M.split,
    "Slice": M.cut,
    "Gather": M.gather,
    "DepthToSpace": M.depth_to_space,
    "SpaceToDepth": M.space_to_depth,
    "Pad": M.pad,
    "Resize": M.resize,
    "Expand": M.expand,
    **dict.fromkeys(("Reshape", "Flatten"), M.reshape),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), M.squeeze),
    "Shape": M.shape,
}
