"""Parity: how far a backend is from the integer reference, operator by operator and end to end.

Teacher forcing: every edge QuantizeLinear -> DequantizeLinear is cut, so that each operator reads the reference's own
integers and its result is compared before anything can cascade. One model holds all operators cut loose; one run of it
checks them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.reference import Reference
from edgekit.errors import ConversionMismatchError
from edgekit.model import Tensors

FED = "__fed"  # suffix of the graph inputs that take the reference's tensors
READ = "__read"  # suffix of the graph outputs that are compared with them
WORST = 10  # units that a record lists
TINY_POWER = 1e-30  # stands for a signal of 0, whose logarithm is infinite
WRONG_SHAPE = 2**31  # LSB: what a tensor of another shape is said to be off by


class Unreadable(Exception):
    """Raised by a `run` callable when its runtime cannot take the cut model; the message says why."""


@dataclass(frozen=True)
class Grid:
    """The integers of a quantized tensor: per-tensor scale and zero point, numpy dtype."""

    scale: float
    zero: int
    dtype: str

    def real(self, q: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """float32 value of stored integers, as DequantizeLinear gives it."""
        out: np.ndarray[Any, Any] = (q.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)
        return out

    def stored(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """int64 integers nearest to float values; not saturated, so that a value off the grid's end shows."""
        steps = np.rint(np.nan_to_num(x.astype(np.float64), nan=1e30) / self.scale)
        out: np.ndarray[Any, Any] = np.clip(steps + self.zero, -(2**31), 2**31).astype(np.int64)
        return out


@dataclass(frozen=True)
class Unit:
    """What lies between the DequantizeLinears and one QuantizeLinear.

    name: the node that computes the quantized value ("QuantizeLinear" itself where there is none); op: its operator.
    reads: quantized tensors and float graph inputs it depends on. writes: the quantized tensor. nodes: its operators.
    """

    name: str
    op: str
    reads: tuple[str, ...]
    writes: str
    nodes: int


@dataclass(frozen=True)
class Loose:
    """A teacher-forced model: feeds maps graph inputs, and reads graph outputs, to tensors of the original."""

    model: ir.Model
    units: tuple[Unit, ...]
    feeds: Mapping[str, str]
    reads: Mapping[str, str]
    grids: Mapping[str, Grid]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class UnitParity:
    """One unit against the reference, in LSB of its output."""

    name: str
    op: str
    max_lsb: int
    fraction_equal: float
    values: int


@dataclass(frozen=True)
class ParityRecord:
    """What `check` found. LSB figures are None where nothing could be read; `skipped` says why, as (what, reason).

    per_op_max_lsb, fraction_equal: over all units, each fed the reference's own inputs.
    label_agreement: end to end, argmax along the last axis of the first output; None if that is no classification.
    end_to_end_max_lsb: largest difference of any output in LSB of that output; None if no output is quantized.
    sqnr_db: end to end, of the worst float output, 10·log10(Σ reference² / Σ difference²); None for no error at all.
    elsewhere: label_agreement of the same file on other kernels, by their name.
    """

    samples: int
    units: int
    per_op_max_lsb: int | None
    fraction_equal: float | None
    worst: tuple[UnitParity, ...]
    skipped: tuple[tuple[str, str], ...]
    label_agreement: float | None
    end_to_end_max_lsb: float | None
    end_to_end_max_abs: float
    sqnr_db: float | None
    elsewhere: Mapping[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# --- cutting ---------------------------------------------------------------------------------------
def units(model: ir.Model) -> list[Unit]:
    """Every unit of a QDQ model, in graph order."""
    return [_unit(node) for node in model.graph if node.op_type == "QuantizeLinear"]


def _unit(quantizer: ir.Node) -> Unit:
    """Walks up from a QuantizeLinear to the quantized tensors and graph inputs that it depends on."""
    reads: dict[str, None] = {}
    seen: set[ir.Node] = set()
    stack = [quantizer.inputs[0]]
    while stack:
        value = stack.pop()
        if value is None or M.constant(value) is not None:
            continue
        producer = value.producer()
        if producer is None or producer.op_type == "QuantizeLinear":
            reads.setdefault(value.name or "")
        elif producer not in seen:
            if producer.op_type != "DequantizeLinear" or M.constant(producer.inputs[0]) is None:
                seen.add(producer)
            stack.extend([producer.inputs[0]] if producer.op_type == "DequantizeLinear" else producer.inputs)
    maker = quantizer.inputs[0].producer() if quantizer.inputs[0] is not None else None
    if maker is None or maker.op_type == "DequantizeLinear":
        maker = quantizer
    count = sum(n.op_type != "DequantizeLinear" for n in seen)
    return Unit(maker.name or maker.op_type, maker.op_type, tuple(reads), quantizer.outputs[0].name or "", count)


def teacher_forced(model: ir.Model, *, shapes: Mapping[str, tuple[int, ...]] = {}) -> Loose:
    """`model` (QDQ, unchanged) with every unit cut loose.

    Its inputs and outputs are float32, the real values of the integers, with QuantizeLinear and DequantizeLinear
    inside: an ordinary model to a backend, which may encode the integers as it likes. (OpenVINO 2026.4 runs float
    kernels when a DequantizeLinear reads an int8 graph input, and its int8 kernels in this form.)
    shapes: sizes of the quantized tensors of one run, used where the model does not declare them; axis 0 stays dynamic
    if the model's batch is.
    """
    loose = _with_shapes(model)
    graph = loose.graph
    dynamic = M.batch_of(M.signature(model)) is None
    feeds = {spec.name: spec.name for spec in M.signature(model).inputs}
    reads: dict[str, str] = {}
    grids: dict[str, Grid] = {}
    outputs: list[ir.Value] = []
    skipped = [(v.name or "", "no QuantizeLinear after it") for v in graph.outputs if not _is_quantized(v)]
    for quantizer in [n for n in graph if n.op_type == "QuantizeLinear"]:
        tensor = quantizer.outputs[0]
        grid = _grid(quantizer)
        name = tensor.name or ""
        if grid is None:
            skipped.append((name, "its scale is per channel or not constant"))
            continue
        grids[name] = grid
        tensor.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(grid.dtype)))
        shape = _fed_shape(tensor, shapes.get(name), dynamic)
        users = [(u, i) for u, i in tensor.uses() if u.op_type == "DequantizeLinear"]
        if users:
            fed = ir.val(f"{name}{FED}", dtype=ir.DataType.FLOAT, shape=shape)
            graph.inputs.append(fed)
            feeds[f"{name}{FED}"] = name
            integers = _requantized(graph, quantizer, fed)
            for user, index in users:
                user.replace_input_with(index, integers)
        read = _read(graph, quantizer)
        reads[read.name or ""] = name
        outputs.append(read)
    graph.outputs[:] = outputs
    _drop_dead(graph)
    feeds = {k: v for k, v in feeds.items() if k in {i.name for i in graph.inputs}}
    graph.sort()
    return Loose(loose, tuple(units(model)), feeds, reads, grids, tuple(skipped))


def _with_shapes(model: ir.Model) -> ir.Model:
    """A copy with inferred shapes."""
    try:
        return M.from_proto(onnx.shape_inference.infer_shapes(M.to_proto(model), data_prop=True))
    except (onnx.shape_inference.InferenceError, ValueError):  # over 2 GiB, or an operator without inference
        return M.clone(model)


def _is_quantized(value: ir.Value) -> bool:
    return _output_grid(value) is not None


def _grid(node: ir.Node) -> Grid | None:
    scale = M.constant(node.inputs[1])
    if scale is None or scale.size != 1:
        return None
    zero = M.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None:
        return Grid(float(scale.reshape(())), int(zero.reshape(())), zero.dtype.name)
    code = node.attributes.get_int("output_dtype", 0) or onnx.TensorProto.UINT8
    return Grid(float(scale.reshape(())), 0, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code)).name)


def _fed_shape(tensor: ir.Value, seen: tuple[int, ...] | None, dynamic: bool) -> ir.Shape | None:
    """The declared sizes, completed from a run; the name of a symbolic size is kept."""
    if seen is None:
        return tensor.shape
    if not seen:
        return ir.Shape(seen)
    declared = list(tensor.shape) if tensor.shape is not None and len(tensor.shape) == len(seen) else [None] * len(seen)
    sizes: list[int | str | None] = []
    for size, known in zip(seen, declared, strict=True):
        # any axis as long as the batch may be the batch: time-major recurrent layers have it on axis 1
        open_size = dynamic and (not sizes or size == seen[0])
        name = known.value if isinstance(known, ir.SymbolicDim) else None
        # a declared size that a run contradicts is an exporter's mistake
        sizes.append(known if isinstance(known, int) and known == size else name if open_size else size)
    return ir.Shape(sizes)


def _requantized(graph: ir.Graph, quantizer: ir.Node, fed: ir.Value) -> ir.Value:
    """The integers that the graph input `fed` stands for."""
    tensor = quantizer.outputs[0]
    name = f"{fed.name}_q"
    out = ir.val(name, type=tensor.type, shape=fed.shape)
    node = ir.node(
        "QuantizeLinear",
        [fed, *quantizer.inputs[1:]],
        attributes=dict(quantizer.attributes),
        outputs=[out],
        name=name,
    )
    graph.insert_before(graph[0], node)
    return out


def _read(graph: ir.Graph, quantizer: ir.Node) -> ir.Value:
    """A float value that dequantizes what `quantizer` writes."""
    tensor = quantizer.outputs[0]
    name = f"{tensor.name}{READ}"
    out = ir.val(name, dtype=ir.DataType.FLOAT, shape=tensor.shape)
    graph.append(ir.node("DequantizeLinear", [tensor, *quantizer.inputs[1:]], outputs=[out], name=name))
    return out


def _drop_dead(graph: ir.Graph) -> None:
    """Removes nodes whose results nobody reads, then inputs and weights that nobody reads."""
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    kept = [v for v in graph.inputs if v.uses()]
    graph.inputs[:] = kept
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


# --- comparing -------------------------------------------------------------------------------------
def check(
    model: ir.Model,
    run: Callable[[ir.Model, Tensors], Tensors],
    end_to_end: Callable[[Tensors], Tensors],
    batches: Iterable[Tensors],
    elsewhere: Mapping[str, Callable[[Tensors], Tensors]] = {},
    observe: Callable[[Tensors, Tensors, Tensors], None] | None = None,
) -> ParityRecord:
    """Compare a backend with the reference on every batch; memory is that of one batch.

    model: the QDQ model. run: runs a cut model (the same object every time) on the backend. end_to_end: runs the
    artifact of `model`; elsewhere does so on other kernels that it may meet. observe: is shown each batch's inputs, the
    reference's outputs and the artifact's. Raises what the reference raises (see
    Reference.run); `Unreadable` from `run` skips the units, from one of elsewhere its comparison.
    """
    reference = Reference(model)
    tensors = [n.outputs[0].name or "" for n in model.graph if n.op_type == "QuantizeLinear"]
    forced, whole, others = _Forced(model, run), _Whole(model), {name: _Whole(model) for name in elsewhere}
    samples = 0
    for inputs in batches:
        expected = {**inputs, **reference.run(inputs, tensors)}
        samples += len(next(iter(inputs.values())))
        forced.add(expected, {t: expected[t].shape for t in tensors})
        got = end_to_end(inputs)
        whole.add(expected, got)
        if observe is not None:
            observe(inputs, expected, got)
        for name in list(others):
            try:
                others[name].add(expected, elsewhere[name](inputs))
            except (Unreadable, ConversionMismatchError):  # it says nothing of the artifact here
                del others[name]
    skipped = forced.skipped()
    record = _record(samples, forced.tally, whole, skipped, forced.units())
    return replace(record, elsewhere={name: other.agreement() for name, other in others.items()})


class _Forced:
    """The cut model on a backend, its batch as open as the model's or, where that fails, of the first batch's size.

    A shorter last batch is left out: tensors that hold the batch on another axis than the first have one size.
    """

    def __init__(self, model: ir.Model, run: Callable[[ir.Model, Tensors], Tensors]) -> None:
        self.model, self.run = model, run
        self.tally = _Tally()
        self.tried: list[Loose] = []
        self.rows = 0  # of the first batch
        self.unreadable: str | None = None

    def add(self, expected: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
        rows = len(expected[M.signature(self.model).inputs[0].name])
        if self.unreadable is not None or self.rows not in (0, rows):
            return
        self.rows = rows
        first = not self.tried
        if first:
            self.tried.append(teacher_forced(self.model, shapes=shapes))
        try:
            self._add(expected)
            return
        except Unreadable as error:
            self.unreadable = str(error)
        if first and M.batch_of(M.signature(self.model)) is None:
            self.tried.append(teacher_forced(M.with_batch(self.model, rows), shapes=shapes))
            with suppress(Unreadable):
                self._add(expected)
                self.unreadable = None

    def _add(self, expected: Tensors) -> None:
        loose = self.tried[-1]
        got = self.run(loose.model, _feeds(loose, expected))
        odd = [o for o, t in loose.reads.items() if o in got and got[o].shape != expected[t].shape]
        if odd and len(self.tried) == 1 and M.batch_of(M.signature(self.model)) is None:
            raise Unreadable(f"'{odd[0]}' has another shape with an open batch")
        self.tally.add(loose, expected, got)

    def units(self) -> tuple[Unit, ...]:
        return self.tried[-1].units if self.tried else ()

    def skipped(self) -> tuple[tuple[str, str], ...]:
        told = self.tried[-1].skipped if self.tried else ()
        if self.unreadable is None:
            return (*told, *self.tally.absent.items())
        self.tally = _Tally()
        return (*told, ("every operator", self.unreadable))


def _feeds(loose: Loose, expected: Tensors) -> Tensors:
    grids = loose.grids
    return {k: grids[t].real(expected[t]) if t in grids else expected[t] for k, t in loose.feeds.items()}


class _Tally:
    """Running difference per quantized tensor: largest LSB, equal values, values."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, int, int]] = {}
        self.absent: dict[str, str] = {}

    def add(self, loose: Loose, expected: Tensors, got: Tensors) -> None:
        for output, tensor in loose.reads.items():
            if output not in got:
                self.absent[tensor] = "the runtime gave no such tensor"
                continue
            stored, want = loose.grids[tensor].stored(got[output]), expected[tensor].astype(np.int64)
            gap = np.abs(stored - want) if stored.shape == want.shape else np.full(want.shape, WRONG_SHAPE)
            worst, equal, count = self.rows.get(tensor, (0, 0, 0))
            worst = max(worst, int(gap.max(initial=0)))
            self.rows[tensor] = (worst, equal + int((gap == 0).sum()), count + gap.size)


class _Whole:
    """Running end-to-end difference."""

    def __init__(self, model: ir.Model) -> None:
        self.grids = {v.name or "": _output_grid(v) for v in model.graph.outputs}
        self.first = model.graph.outputs[0].name or ""
        self.same, self.labels, self.max_abs = 0, 0, 0.0
        self.max_lsb: float | None = None
        self.signal: dict[str, float] = {}
        self.noise: dict[str, float] = {}

    def add(self, expected: Tensors, got: Tensors) -> None:
        for name, grid in self.grids.items():
            gap = _largest_gap(name, expected[name], got.get(name))
            self.max_abs = max(self.max_abs, gap)
            if grid is not None:
                self.max_lsb = max(self.max_lsb or 0.0, gap / grid.scale)
            if expected[name].dtype.kind == "f":
                self._add_power(name, expected[name].astype(np.float64), got[name].astype(np.float64))
        want, have = expected[self.first], got[self.first]
        if _classifies(want):
            equal = want.argmax(-1) == have.argmax(-1)
            self.same, self.labels = self.same + int(equal.sum()), self.labels + equal.size

    def _add_power(self, name: str, want: np.ndarray[Any, Any], have: np.ndarray[Any, Any]) -> None:
        known = np.isfinite(want)  # elsewhere both are the same infinity or NaN: _largest_gap
        self.signal[name] = self.signal.get(name, 0.0) + float((want[known] ** 2).sum())
        self.noise[name] = self.noise.get(name, 0.0) + float(((have[known] - want[known]) ** 2).sum())

    def agreement(self) -> float | None:
        """Share of equal labels; None if there are none."""
        return self.same / self.labels if self.labels else None

    def sqnr_db(self) -> float | None:
        """Of the worst output; None for no error. An error where the reference is 0 gets a large negative figure."""
        ratios = [max(self.signal[n], TINY_POWER) / noise for n, noise in self.noise.items() if noise > 0]
        return 10 * float(np.log10(min(ratios))) if ratios else None


def _largest_gap(name: str, want: np.ndarray[Any, Any], have: np.ndarray[Any, Any] | None) -> float:
    """max |want - have|; raises ConversionMismatchError where that has no meaning."""
    problem = ""
    if have is None:
        problem = "is missing"
    elif have.shape != want.shape:
        problem = f"has shape {have.shape}, not {want.shape}"
    else:
        with np.errstate(invalid="ignore"):
            gaps = np.abs(want.astype(np.float64) - have.astype(np.float64))
        gaps[(want == have) | ((want != want) & (have != have))] = 0.0  # the same infinity, or NaN in both
        if np.isfinite(gaps).all():
            return float(gaps.max(initial=0.0))
        problem = "is NaN or Inf where the reference is not"
    raise ConversionMismatchError(f"the artifact's output '{name}' {problem}", "report it; use another backend")


def _classifies(output: np.ndarray[Any, Any]) -> bool:
    """Class scores on the last axis: (n, classes), (n, tokens, classes), or a map; not an image of 1 to 4 channels."""
    return output.dtype.kind == "f" and output.ndim >= 2 and output.shape[-1] >= (2 if output.ndim < 4 else 5)


# an output behind these still lies on the grid of the tensor they read
_KEEPS_GRID = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}


def _output_grid(value: ir.Value) -> Grid | None:
    node = value.producer()
    while node is not None and node.op_type in _KEEPS_GRID:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    quantizer = node.inputs[0].producer()
    return _grid(quantizer) if quantizer is not None and quantizer.op_type == "QuantizeLinear" else None


def _record(
    samples: int, tally: _Tally, whole: _Whole, skipped: tuple[tuple[str, str], ...], all_units: Iterable[Unit]
) -> ParityRecord:
    rows = [
        UnitParity(u.name, u.op, worst, equal / count if count else 1.0, count)
        for u in all_units
        if u.writes in tally.rows
        for worst, equal, count in [tally.rows[u.writes]]
    ]
    values = sum(r.values for r in rows)
    equal = sum(e for _, e, _ in tally.rows.values())
    return ParityRecord(
        samples=samples,
        units=len(rows),
        per_op_max_lsb=max((r.max_lsb for r in rows), default=None),
        fraction_equal=equal / values if values else None,
        worst=tuple(sorted(rows, key=lambda r: (-r.max_lsb, r.fraction_equal))[:WORST]),
        skipped=skipped,
        label_agreement=whole.agreement(),
        end_to_end_max_lsb=whole.max_lsb,
        end_to_end_max_abs=whole.max_abs,
        sqnr_db=whole.sqnr_db(),
    )
