"""Image inputs change their axis order, NCHW or NHWC, and keep name and meaning; results stay the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Order = Literal["NHWC", "NCHW"]
# new axis j of the input is its old axis _TURN[order][j]
_TURN: dict[Order, tuple[int, int, int, int]] = {"NHWC": (0, 2, 3, 1), "NCHW": (0, 3, 1, 2)}
_OTHER: dict[Order, Order] = {"NHWC": "NCHW", "NCHW": "NHWC"}
_SPATIAL = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization"})
_POINTWISE = frozenset({"Mul", "Add", "Sub", "Div", "Cast", "Pad", "Identity", "Clip", "Relu", "Neg"})


@dataclass(frozen=True)
class InputLayout:
    """The pass: every input of four axes takes `order`. Raises UsageError where the present order cannot be told."""

    order: Order

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """A copy; `data` is not looked at."""
        out = M.clone(model)
        for value in list(out.graph.inputs):
            if value.shape is not None and len(value.shape) == 4 and not value.is_initializer():
                present = order_of(value)
                if present is None:
                    raise UsageError(
                        f"--input-layout: cannot tell whether input '{value.name}' is NHWC or NCHW",
                        "leave --input-layout out",
                    )
                if present != self.order:
                    _turn(out.graph, value, self.order)
        return out


def order_of(value: ir.Value) -> Order | None:
    """What the operators behind a four-axis input take it for; None where nothing tells, or they disagree."""
    found: set[Order] = set()
    stack, seen = [value], {value}
    while stack:
        for node, _ in stack.pop().uses():
            if node.op_type in _SPATIAL:
                found.add("NCHW")
            elif node.op_type == "Transpose":
                perm = tuple(node.attributes.get_ints("perm") or ())
                if perm == _TURN["NCHW"]:
                    found.add("NHWC")
                elif perm == _TURN["NHWC"]:
                    found.add("NCHW")
            elif node.op_type in _POINTWISE and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                stack.append(node.outputs[0])
    return found.pop() if len(found) == 1 else None


def _turn(graph: ir.Graph, value: ir.Value, order: Order) -> None:
    """The input gets the new order; what reads it reads a Transpose back to the old one."""
    assert value.shape is not None
    sizes = [d if isinstance(d, int) else d.value for d in value.shape]
    back = ir.val(f"{value.name}_as_{_OTHER[order]}", dtype=value.dtype, shape=ir.Shape(sizes))
    users = list(value.uses())
    perm = _TURN[_OTHER[order]]
    node = ir.node("Transpose", [value], {"perm": list(perm)}, outputs=[back], name=f"{value.name}_as_{_OTHER[order]}")
    graph.insert_before(graph[0], node)
    for user, index in users:
        user.replace_input_with(index, back)
    value.shape = ir.Shape([sizes[a] for a in _TURN[order]])
