"""The ONNX graph as the lowering sees it: values with shape and quantization, and nodes between them."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.tflite.graph import Array, Quant


class Refused(Exception):
    """Raised by a lowering: this node cannot be written exactly. reason: why; remedy: what the user can do."""

    def __init__(self, reason: str, remedy: str = "leave the tflite backend out for this model") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(eq=False)
class Value:
    """A tensor of the ONNX graph, in ONNX's own axis order.

    shape: at batch 1. dynamic: axes that grow with the batch. data: of a constant, stored integers if `quant` is set.
    sizes: an integer vector or scalar that depends on the batch only, with -1 where it does; None for all others.
    quant: of a quantized tensor, whose dtype is then the stored one; its axis is ONNX's.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    dynamic: frozenset[int] = frozenset()
    data: Array | None = None
    sizes: Array | None = None
    quant: Quant | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def real(self) -> Array | None:
        """The numbers that a constant stands for, float32 if it is quantized."""
        if self.data is None or self.quant is None:
            return self.data
        shape = [1] * self.data.ndim
        if not self.quant.per_tensor:
            shape[self.quant.axis] = -1
        scales, zeros = self.quant.scales.reshape(shape), self.quant.zeros.reshape(shape)
        return (self.data.astype(np.float32) - zeros.astype(np.float32)) * scales


@dataclass(eq=False)
class Node:
    """An operator of the ONNX graph. activation: RELU, RELU6 or RELU_N1_TO_1 that follows and is part of it."""

    op: str
    name: str
    inputs: list[Value | None]
    outputs: list[Value]
    attributes: ir.Node | None = None
    activation: str = "NONE"
    extra: dict[str, Any] = field(default_factory=dict)

    def input(self, index: builtins.int) -> Value | None:
        """The input at `index`; None where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def require(self, index: builtins.int) -> Value:
        value = self.input(index)
        if value is None:
            raise Refused(f"it has no input {index}")
        return value

    def const(self, index: builtins.int) -> Array | None:
        """The real numbers of a constant input; None where it is absent. Refused if it is computed."""
        value = self.input(index)
        if value is None:
            return None
        if value.data is None:
            raise Refused(f"its input {index} ('{value.name}') is not constant", "fix it in the model")
        return value.real

    def int(self, name: builtins.str, default: builtins.int) -> builtins.int:
        if name in self.extra:
            return int(self.extra[name])
        return default if self.attributes is None else int(self.attributes.attributes.get_int(name, default) or 0)

    def ints(self, name: builtins.str, default: tuple[builtins.int, ...] = ()) -> tuple[builtins.int, ...]:
        if name in self.extra:
            return tuple(self.extra[name])
        found = None if self.attributes is None else self.attributes.attributes.get_ints(name, None)
        return default if found is None else tuple(int(i) for i in found)

    def float(self, name: builtins.str, default: builtins.float) -> builtins.float:
        if name in self.extra:
            return float(self.extra[name])
        found = None if self.attributes is None else self.attributes.attributes.get_float(name, None)
        return default if found is None else float(found)

    def str(self, name: builtins.str, default: builtins.str) -> builtins.str:
        if name in self.extra:
            return str(self.extra[name])
        found = None if self.attributes is None else self.attributes.attributes.get_string(name, None)
        return default if found is None else str(found)
