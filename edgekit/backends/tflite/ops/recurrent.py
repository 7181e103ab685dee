"""LSTM, GRU and RNN, unrolled over their fixed number of steps.

LiteRT's own UNIDIRECTIONAL_SEQUENCE_LSTM keeps its state from one inference to the next, where ONNX starts from zero.
The product of all steps' inputs is one FULLY_CONNECTED; each step adds the product of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edgekit.backends.tflite.emitter import Emitter
from edgekit.backends.tflite.graph import Array, Layout, Tensor
from edgekit.backends.tflite.values import Node, Refused, Value

_CODES = {"Sigmoid": "LOGISTIC", "Tanh": "TANH", "Relu": "RELU"}
_DEFAULT = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_HARD = (0.2, 0.5)  # slope and offset of ONNX's HardSigmoid
_MOST_STEPS = 512  # about 10 operators each: a longer sequence makes a file that takes seconds to load


@dataclass(frozen=True)
class _Activation:
    """An activation by ONNX's name; slope and offset of a HardSigmoid."""

    name: str
    slope: float = _HARD[0]
    offset: float = _HARD[1]


@dataclass(frozen=True)
class _Cell:
    """One direction. w: (gates · hidden, inputs); r: (gates · hidden, hidden); biases: as long as their rows.

    peepholes: (3 · hidden,) of an LSTM, as input, output, forget. clip: bound of what goes into an activation.
    """

    e: Emitter
    hidden: int
    w: Array
    r: Array
    wb: Array
    rb: Array
    activations: list[_Activation]
    reset_after: bool
    peepholes: Array | None = None
    clip: float = 0.0

    def dense(self, x: Tensor, weight: Array, bias: Array, *, wide: bool = False) -> Tensor:
        kernel = self.e.constant(np.ascontiguousarray(weight, np.float32))
        addend = self.row(bias)
        shape = (*x.shape[:-1], len(weight))
        return self.e.op(
            "FULLY_CONNECTED", [x, kernel, addend], shape, dynamic=x.dynamic, fusedActivationFunction="NONE",
            keepNumDims=wide, weightsFormat="DEFAULT",
        )  # fmt: skip

    def row(self, values: Array) -> Tensor:
        return self.e.constant(np.ascontiguousarray(values, np.float32))

    def two(self, code: str, a: Tensor, b: Tensor, activation: str = "NONE") -> Tensor:
        return self.e.op(code, [a, b], a.shape, dynamic=a.dynamic, fusedActivationFunction=activation)

    def one(self, activation: _Activation, x: Tensor) -> Tensor:
        if self.clip:
            for code, bound in (("MINIMUM", self.clip), ("MAXIMUM", -self.clip)):
                x = self.e.op(code, [x, self.e.constant(np.float32(bound))], x.shape, dynamic=x.dynamic)
        if activation.name in _CODES:
            return self.e.op(_CODES[activation.name], [x], x.shape, dynamic=x.dynamic)
        scaled = self.two("MUL", x, self.e.constant(np.float32(6 * activation.slope)))
        six = self.two("ADD", scaled, self.e.constant(np.float32(6 * activation.offset)), "RELU6")
        return self.two("MUL", six, self.e.constant(np.float32(1 / 6)))

    def parts(self, x: Tensor) -> list[Tensor]:
        """Each gate of (batch, gates · hidden)."""
        count = x.shape[1] // self.hidden
        made = [Tensor(f"{x.name}/gate{i}", x.dtype, (x.shape[0], self.hidden), x.dynamic) for i in range(count)]
        self.e.write("SPLIT", [self.e.constant(np.array(1, np.int32)), x], made, numSplits=count)
        return made

    def rows(self, values: Array, first: int, count: int = 1) -> Array:
        """Gates `first` to `first + count` of what has a row per gate and hidden unit."""
        return values[first * self.hidden : (first + count) * self.hidden]

    def recurrent(self, x: Tensor, h: Tensor | None, first: int, count: int) -> Tensor:
        """x + R·h + Rb of some gates; h of None is zero."""
        if h is not None:
            return self.two("ADD", x, self.dense(h, self.rows(self.r, first, count), self.rows(self.rb, first, count)))
        bias = self.rows(self.rb, first, count)
        return self.two("ADD", x, self.row(bias)) if bias.any() else x

    def peeped(self, gate: Tensor, memory: Tensor | None, index: int) -> Tensor:
        """A gate's sum with what it sees of the memory."""
        if self.peepholes is None or memory is None:
            return gate
        return self.two("ADD", gate, self.two("MUL", memory, self.row(self.rows(self.peepholes, index))))


_State = tuple[Tensor, Tensor | None]
_Inputs = tuple[Tensor, ...]  # W·x + Wb of one step, by groups of gates


def _lstm(c: _Cell, x: _Inputs, h: Tensor | None, memory: Tensor | None) -> _State:
    """ONNX's gates come as input, output, forget, cell."""
    let_in, let_out, keep, fresh = c.parts(c.recurrent(x[0], h, 0, 4))
    gate, squash, out = c.activations
    kept = c.two("MUL", c.one(gate, c.peeped(let_in, memory, 0)), c.one(squash, fresh))
    if memory is not None:
        kept = c.two("ADD", c.two("MUL", c.one(gate, c.peeped(keep, memory, 2)), memory), kept)
    let_out = c.one(gate, c.peeped(let_out, kept, 1))
    clipped = replace(c, clip=0.0)  # ONNX clips what goes into the gates, not the memory on its way out
    return c.two("MUL", let_out, clipped.one(out, kept)), kept


def _gru(c: _Cell, x: _Inputs, h: Tensor | None, memory: Tensor | None) -> _State:
    """ONNX's gates come as update, reset, hidden; the state is new + update · (old − new)."""
    gate, squash = c.activations
    opened = c.one(gate, c.recurrent(x[0], h, 0, 2))
    update, reset = c.parts(opened)
    sums = x[1]
    if c.reset_after and (h is not None or c.rows(c.rb, 2).any()):
        bias = c.row(c.rows(c.rb, 2))
        inner = bias if h is None else c.dense(h, c.rows(c.r, 2), c.rows(c.rb, 2))
        sums = c.two("ADD", sums, c.two("MUL", reset, inner))
    elif not c.reset_after:
        sums = c.recurrent(sums, None if h is None else c.two("MUL", reset, h), 2, 1)
    fresh = c.one(squash, sums)
    if h is None:
        return c.two("SUB", fresh, c.two("MUL", update, fresh)), None
    return c.two("ADD", fresh, c.two("MUL", update, c.two("SUB", h, fresh))), None


def _rnn(c: _Cell, x: _Inputs, h: Tensor | None, memory: Tensor | None) -> _State:
    return c.one(c.activations[0], c.recurrent(x[0], h, 0, 1)), None


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}
# gates of which the inputs' products are needed together
_GROUPS = {"LSTM": (4,), "GRU": (2, 1), "RNN": (1,)}


def _recurrent(e: Emitter, n: Node) -> None:
    _check(n)
    x, batch_first = n.require(0), bool(n.int("layout", 0))
    time = 1 if batch_first else 0
    steps = x.shape[time]
    if time in x.dynamic:
        raise Refused("its number of steps is open", "fix it: --shape INPUT=...")
    if steps > _MOST_STEPS:
        raise Refused(f"it runs {steps} steps; up to {_MOST_STEPS} are unrolled", "shorten the sequence")
    tensor = e.tensor(x, (0, 1, 2) if batch_first else (1, 0, 2))
    directions = {"bidirectional": (False, True), "reverse": (True,)}.get(n.str("direction", "forward"), (False,))
    lines, lasts, memories = [], [], []
    for index, backwards in enumerate(directions):
        cell = _cell(e, n, index, len(directions))
        h, memory = (_initial(e, n, i, index, batch_first) for i in (5, 6))
        line, memory = _run(cell, n.op, tensor, steps, backwards, h, memory)
        lines.append(line)
        lasts.append(line[0] if backwards else line[-1])
        memories.append(memory)
    _outputs(e, n, lines, lasts, memories, batch_first)


def _check(n: Node) -> None:
    lengths, x = n.input(4), n.require(0)
    steps = x.shape[1 if n.int("layout", 0) else 0]
    if lengths is not None and (lengths.data is None or (lengths.data != steps).any()):
        raise Refused("sequences of several lengths", "leave sequence_lens out")
    peepholes = n.input(7)
    if peepholes is not None and peepholes.data is None:
        raise Refused("its peepholes are computed", "make them constant")
    if n.int("input_forget", 0):
        raise Refused("coupled input and forget gates", "train without input_forget")


def _cell(e: Emitter, n: Node, index: int, directions: int) -> _Cell:
    w, r, b, p = n.const(1), n.const(2), n.const(3), n.const(7) if n.op == "LSTM" else None
    if w is None or r is None:
        raise Refused("it has no weights")
    hidden, rows = r.shape[2], w.shape[1]
    bias = np.zeros(2 * rows, np.float32) if b is None else b[index]
    return _Cell(
        e, hidden, w[index], r[index], bias[:rows], bias[rows:], _activations(n, directions)[index],
        bool(n.int("linear_before_reset", 0)), p[index] if p is not None and p[index].any() else None,
        n.float("clip", 0.0),
    )  # fmt: skip


def _activations(n: Node, directions: int) -> list[list[_Activation]]:
    """Per direction. Alphas and betas are given to those that have any, in order."""
    default = _DEFAULT[n.op]
    attributes = {} if n.attributes is None else n.attributes.attributes
    names = list(a.as_strings()) if (a := attributes.get("activations")) else []
    names = names or default * directions
    numbers = [list(a.as_floats()) if (a := attributes.get(k)) else [] for k in ("activation_alpha", "activation_beta")]
    made = []
    for name in names:
        known = next((k for k in (*_CODES, "HardSigmoid") if k.lower() == name.lower()), None)
        if known is None:
            raise Refused(f"activation {name}", "use Sigmoid, HardSigmoid, Tanh or Relu")
        if known == "HardSigmoid":
            made.append(_Activation(known, *(v.pop(0) if v else d for v, d in zip(numbers, _HARD, strict=True))))
        else:
            made.append(_Activation(known))
    size = len(default)
    return [made[i * size : (i + 1) * size] for i in range(directions)]


def _initial(e: Emitter, n: Node, index: int, direction: int, batch_first: bool) -> Tensor | None:
    """The state to begin with, (batch, hidden); None for zeros."""
    value = n.input(index)
    if value is None or (value.data is not None and not value.data.any()):
        return None
    layout: Layout = (0, 1, 2) if batch_first else (1, 0, 2)
    if value.data is not None:
        rows = value.data[:, direction] if batch_first else value.data[direction]
        return e.constant(np.ascontiguousarray(rows, np.float32))
    tensor = e.tensor(value, layout)
    begin = e.constant(np.array([0, direction, 0], np.int32))
    size = e.constant(np.array([-1, 1, -1], np.int32))
    shape = (tensor.shape[0], 1, tensor.shape[2])
    cut = e.op("SLICE", [tensor, begin, size], shape, dynamic=tensor.dynamic) if tensor.shape[1] > 1 else tensor
    return e.reshape(cut, (shape[0], shape[2]), tensor.dynamic & {0})


def _run(
    c: _Cell, op: str, x: Tensor, steps: int, backwards: bool, h: Tensor | None, memory: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """The state after each step, by its place in time."""
    line: list[Tensor | None] = [None] * steps
    groups, first = [], 0
    for count in _GROUPS[op]:
        product = c.dense(x, c.rows(c.w, first, count), c.rows(c.wb, first, count), wide=True)
        groups.append(_unpacked(c.e, product, steps))
        first += count
    rows = list(zip(*groups, strict=True))
    for t in reversed(range(steps)) if backwards else range(steps):
        h, memory = _STEPS[op](c, rows[t], h, memory)
        line[t] = h
    return [t for t in line if t is not None], memory


def _unpacked(e: Emitter, x: Tensor, steps: int) -> list[Tensor]:
    """(batch, width) of each step of (batch, steps, width)."""
    batch, _, width = x.shape
    if steps == 1:
        return [e.reshape(x, (batch, width), x.dynamic & {0})]
    made = [Tensor(f"{x.name}/step{t}", x.dtype, (batch, width), x.dynamic & {0}) for t in range(steps)]
    e.write("UNPACK", [x], made, num=steps, axis=1)
    return made


def _outputs(
    e: Emitter,
    n: Node,
    lines: list[list[Tensor]],
    lasts: list[Tensor],
    memories: list[Tensor | None],
    batch_first: bool,
) -> None:
    whole = _named(n, 0)
    if whole is not None:
        parts = [_stacked(e, line) for line in lines]
        joined = parts[0] if len(parts) == 1 else _joined(e, parts)
        # (batch, steps, directions, hidden)
        e.define(whole, joined, (0, 1, 2, 3) if batch_first else (2, 0, 1, 3))
    for index, tensors in ((1, lasts), (2, memories)):
        value = _named(n, index)
        if value is not None:
            known = [t for t in tensors if t is not None]
            shape = (known[0].shape[0], 1, known[0].shape[1])
            rows = [e.reshape(t, shape, t.dynamic & {0}) for t in known]
            e.define(value, _joined(e, rows, 1) if len(rows) > 1 else rows[0], (0, 1, 2) if batch_first else (1, 0, 2))


def _named(n: Node, index: int) -> Value | None:
    return n.outputs[index] if len(n.outputs) > index and n.outputs[index].name else None


def _stacked(e: Emitter, line: list[Tensor]) -> Tensor:
    """(batch, steps, 1, hidden)"""
    batch, hidden = line[0].shape
    packed = line[0]
    if len(line) > 1:
        shape = (batch, len(line), hidden)
        packed = e.op("PACK", line, shape, dynamic=packed.dynamic, valuesCount=len(line), axis=1)
    return e.reshape(packed, (batch, len(line), 1, hidden), packed.dynamic)


def _joined(e: Emitter, parts: list[Tensor], axis: int = 2) -> Tensor:
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    return e.op(
        "CONCATENATION", parts, shape, dynamic=parts[0].dynamic, axis=axis, fusedActivationFunction="NONE"
    )  # fmt: skip


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent)
