"""QuantizeWeights: int8 or int4 weights behind a DequantizeLinear; activations and biases stay float.

Matrix products get a scale per group of inputs at 4 bits and per output channel at 8, and where there are calibration
data they are rounded so that the layer's output moves least (Frantar et al. 2023, GPTQ; see `rounding`): the Gram
matrix of what each layer reads is summed up while the data stream by. Kernels of convolutions, recurrent weights and
tables that rows are gathered from get 8 bits per channel; kernels are fitted to data only where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import UnsupportedOpError
from edgekit.passes import fold_graph as G
from edgekit.passes import regression
from edgekit.passes.apply_plan import prepared
from edgekit.passes.blas import single_threaded
from edgekit.passes.calibrate import fetched, held_back
from edgekit.passes.draft import check_weights
from edgekit.passes.rounding import damped, error, round_weights
from edgekit.passes.weight_grid import Grid, search

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]
Kind = Literal["product", "kernel", "table"]

# operator -> (inputs that hold weights, axis of the output channels); all in 8 bits, a scale per channel
_KERNELS = {"Conv": ((1,), 0), "ConvTranspose": ((1,), 1), "LSTM": ((1, 2), 1), "GRU": ((1, 2), 1), "RNN": ((1, 2), 1)}
_PAYS = 0.75  # of the symmetric grid's squared error: zero points cost kernels 10 % (benchmarks/weight_only.py)
_ROWS, _ROWS_PER_INPUT = 4096, 8  # rows that a Gram matrix is summed over: at least, and per input
_GRAM_BYTES = 2**30  # of Gram matrices kept at once; more take another reading of the data


@dataclass(frozen=True)
class QuantizeWeights:
    """Weights of `bits` bits: 8; 7 for a CPU whose u8 x s8 kernels saturate; or 4 in groups of `group_size` inputs.

    symmetric: whether 4-bit groups do without a zero point; "auto" decides each layer by the error.
    rounding: "nearest"; "reconstruct" by the Gram matrix of the layer's inputs, if there are data, of products and
    convolutions; "auto": that at 4 bits, of products. keep_float: names of nodes to leave alone. least: elements that a
    weight must have.
    """

    bits: Literal[4, 7, 8] = 8
    group_size: Literal[16, 32, 64, 128] = 32
    symmetric: Literal["auto", "on", "off"] = "auto"
    rounding: Literal["auto", "nearest", "reconstruct"] = "auto"
    keep_float: tuple[str, ...] = ()
    least: int = 1024  # below this the scales and the extra operator cost more than is saved
    batch_size: int = 32
    seed: int = 0

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """The model with quantized weights; `model` is not edited. See `quantized` for errors."""
        return self.quantized(model, data)[0]

    @single_threaded
    def quantized(self, model: ir.Model, data: Dataset | None) -> tuple[ir.Model, dict[str, dict[str, Any]]]:
        """(the model, what was done to each weight: bits, group, zero points, rounding, error, operators).

        "error" is relative, of the layer's output where that was looked at, else of the weights. Raises
        UnsupportedOpError (quantized already, a name that no node has), NonFiniteError.
        """
        model = prepared(model)
        check_weights(model)
        names = {node.name for node in model.graph}
        for name in self.keep_float:
            if name not in names:
                raise UnsupportedOpError(f"no node '{name}' to keep in float", "`edgekit inspect` lists the names")
        weights = _found(model, self)
        told: dict[str, dict[str, Any]] = {}
        for weight, grams in self._with_grams(model, data, weights):
            grid, q, done = self._solve(weight, grams)
            _Writer(model).write(weight, grid, q)
            told[weight.name] = {**done, "nodes": [node.name for node, _ in weight.readers]}
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del model.graph.initializers[name]
        for node in [n for n in model.graph if G.is_op(n, "Constant")]:
            if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                model.graph.remove(node, safe=True)
        return model, told

    def _with_grams(
        self, model: ir.Model, data: Dataset | None, weights: Sequence[_Weight]
    ) -> Iterator[tuple[_Weight, tuple[Array, Array] | None]]:
        """Each weight with the Gram matrices of what its layers read, of the samples to fit and of those that judge."""
        wanted = self.rounding == "reconstruct" or (self.rounding == "auto" and self.bits == 4)
        if data is None or not wanted:
            yield from ((w, None) for w in weights)
            return
        data = data.bind(M.signature(model))
        source = M.clone(model)  # the float model, which stays as it is while weights are written
        kernels = self.rounding == "reconstruct"
        waiting = [w for w in weights if w.kind == "product" or (kernels and w.convolves())]
        fitted = {id(w) for w in waiting}
        yield from ((w, None) for w in weights if id(w) not in fitted)
        while waiting:
            room = _GRAM_BYTES
            now: list[_Weight] = []
            while waiting and (not now or room > 0):
                now.append(waiting.pop(0))
                room -= 2 * 8 * now[-1].groups() * len(now[-1].matrix) ** 2
            grams = _grams(source, data, now, self.batch_size, self.seed)
            for weight in now:
                fit, judge = (sum(grams[weight.rows_of(node)][i] for node, _ in weight.readers) for i in (0, 1))
                yield weight, (fit, judge if np.any(judge) else fit)  # type: ignore[misc]

    def _solve(self, weight: _Weight, grams: tuple[Array, Array] | None) -> tuple[Grid, Array, dict[str, Any]]:
        """The weight's grid, its integers (inputs, outputs), and what is told of it."""
        matrix = weight.matrix.astype(np.float64)
        fit, judge = (None, None) if grams is None else (damped(grams[0]), damped(grams[1]))
        grid = self._grid(matrix, weight.kind, fit)
        q, way = grid.nearest(matrix), "nearest"
        if grams is not None:
            zeros, groups = grid.zeros(len(matrix)), len(grams[0])
            bounds = _split(grid.low - zeros, groups), _split(grid.high - zeros, groups)
            scales = _split(grid.scales(len(matrix)), groups)
            fitted = _joined(round_weights(_split(matrix, groups), grams[0], scales, bounds)) + zeros
            if _error(grid.real(fitted), matrix, judge) < _error(grid.real(q), matrix, judge):
                q, way = fitted, "reconstruct"
        whole = _error(np.zeros_like(matrix), matrix, judge)
        return (
            grid,
            q,
            {
                "bits": 4 if grid.low == -8 else self._bits(weight.kind),
                "group": grid.block,
                "zero_points": grid.zero is not None,
                "rounding": way,
                "error": math.sqrt(_error(grid.real(q), matrix, judge) / whole) if whole else 0.0,
            },
        )

    def _bits(self, kind: Kind) -> int:
        return 8 if self.bits == 4 and kind != "product" else self.bits

    def _grid(self, matrix: Array, kind: Kind, gram: Array | None) -> Grid:
        importance = None if gram is None else np.diagonal(gram, axis1=1, axis2=2).mean(axis=0)
        bits = self._bits(kind)
        if bits != 4:
            return search(matrix, importance, bits, len(matrix), asymmetric=False)
        block = min(self.group_size, len(matrix))
        grids = [search(matrix, importance, 4, block, asymmetric=a) for a in (False, True)]
        if self.symmetric != "auto":
            return grids[self.symmetric == "off"]
        plain, other = (_error(grid.real(grid.nearest(matrix)), matrix, gram) for grid in grids)
        return grids[other < _PAYS * plain]


def _error(real: Array, matrix: Array, gram: Array | None) -> float:
    """Squared error at the layer's output; without Gram matrices, one a group, of the weights."""
    if gram is not None:
        return float(error(_split(real, len(gram)), _split(matrix, len(gram)), gram, np.ones(1)).sum())
    return float(((real - matrix) ** 2).sum())


def _split(matrix: Array, groups: int) -> Array:
    """(inputs, outputs) as (groups, inputs, outputs of a group)."""
    return np.ascontiguousarray(matrix.reshape(len(matrix), groups, -1).swapaxes(0, 1))


def _joined(parts: Array) -> Array:
    """The reverse of `_split`."""
    return parts.swapaxes(0, 1).reshape(parts.shape[1], -1)


@dataclass
class _Weight:
    """A stored array with all the nodes that read it in the same way.

    matrix: float32 (inputs, outputs), a scale belongs to (a group of) a column. shape, axis: of the array as the nodes
    will read it, and where its output channels are. readers: (node, input).
    """

    name: str
    kind: Kind
    matrix: Array
    shape: tuple[int, ...]
    axis: int
    readers: list[tuple[ir.Node, int]] = field(default_factory=list)

    def convolves(self) -> bool:
        """Whether convolutions read it, and all in as many groups."""
        groups = {G.integer(node, "group", 1) for node, _ in self.readers if G.is_op(node, "Conv")}
        return len(groups) == 1 and all(G.is_op(node, "Conv") for node, _ in self.readers)

    def rows_of(self, node: ir.Node) -> tuple[str, str]:
        """What the rows hang on that a reader multiplies: the value, and for a kernel also where it is laid."""
        value = node.inputs[0]
        return (value.name or "" if value is not None else "", node.name or "" if self.kind == "kernel" else "")

    def groups(self) -> int:
        return G.integer(self.readers[0][0], "group", 1) if self.convolves() else 1

    def stored(self, rows: Array) -> Array:
        """An array like `matrix` in the nodes' own layout."""
        rest = [s for a, s in enumerate(self.shape) if a != self.axis]
        return np.ascontiguousarray(np.moveaxis(rows.reshape(*rest, -1), -1, self.axis))


def _found(model: ir.Model, step: QuantizeWeights) -> list[_Weight]:
    """Every weight to quantize, in graph order; one that is read in two ways appears twice."""
    found: dict[tuple[Any, ...], _Weight] = {}
    for node in model.graph:
        if node.name in step.keep_float:
            continue
        for position, kind, axis, factor in _weighted(node):
            value = node.inputs[position] if position < len(node.inputs) else None
            array = G.array(value)
            if value is None or array is None or array.dtype != np.float32 or array.size < step.least:
                continue
            if kind == "product":
                turned = node.op_type == "Gemm" and G.integer(node, "transB", 0) == 1
                key: tuple[Any, ...] = (value.name, kind, turned, factor)
                array = (array.T if turned else array) * np.float32(factor)
            else:
                key = (value.name, kind, axis)
            if key not in found:
                matrix = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
                found[key] = _Weight(value.name or "", kind, matrix, array.shape, axis)
            found[key].readers.append((node, position))
    return list(found.values())


def _weighted(node: ir.Node) -> Iterator[tuple[int, Kind, int, float]]:
    """(input, kind, axis of the output channels, factor) of each input of a node that may hold weights."""
    if not G.is_op(node, "MatMul", "Gemm", "Gather", *_KERNELS):
        return
    if node.op_type in ("MatMul", "Gemm"):
        array = G.array(node.inputs[1])
        if array is not None and array.ndim == 2 and not G.integer(node, "transA", 0):
            yield 1, "product", 1, G.number(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0
    elif node.op_type == "Gather":
        array = G.array(node.inputs[0])
        if array is not None and array.ndim == 2 and G.integer(node, "axis", 0) in (0, -2):
            yield 0, "table", 1, 1.0
    else:
        positions, axis = _KERNELS[node.op_type]
        yield from ((position, "kernel", axis, 1.0) for position in positions)


def product_share(model: ir.Model) -> float:
    """Of the weights of products, recurrent layers and convolutions, float or quantized: the share of the first two."""
    sizes = {True: 0, False: 0}
    for node in model.graph:
        if not G.is_op(node, "MatMul", "Gemm", *_KERNELS):
            continue
        for position in (1,) if node.op_type not in _KERNELS else _KERNELS[node.op_type][0]:
            value = node.inputs[position]
            real = value.producer() if value is not None else None
            array = G.array(real.inputs[0] if G.is_op(real, "DequantizeLinear") and real is not None else value)
            sizes["Conv" not in node.op_type] += 0 if array is None else int(array.size)
    return sizes[True] / max(1, sum(sizes.values()))


def _grams(
    model: ir.Model, data: Dataset, weights: Sequence[_Weight], batch_size: int, seed: int
) -> dict[tuple[str, str], tuple[Array, Array]]:
    """Mean of xᵀx over the rows of each `rows_of`, (groups, K, K) float64: of samples to fit, of those held back.

    model: float, whose values the nodes of the weights read.
    """
    held, rng = held_back(data.samples, seed), np.random.default_rng(seed)
    layers: dict[tuple[str, str], regression.Layer | None] = {}
    sums: dict[tuple[str, str], tuple[Array, Array]] = {}
    for weight in weights:
        size = (weight.groups(), len(weight.matrix), len(weight.matrix))
        for node, _ in weight.readers:
            key = weight.rows_of(node)
            kernel = weight.kind == "kernel"
            layers[key] = regression.layer(node, weight.stored(weight.matrix), None) if kernel else None
            sums[key] = (np.zeros(size), np.zeros(size))
    rows = {key: [0, 0] for key in sums}
    for value, array, fold in fetched(model, data, sorted({value for value, _ in sums}), batch_size, held):
        part = 1 if fold == 0 else 0
        for key in (key for key in sums if key[0] == value):
            size, layer = sums[key][0].shape[-1], layers[key]
            most = max(_ROWS, _ROWS_PER_INPUT * size) * len(array) / data.samples
            x = _rows(array, size, most, rng) if layer is None else _patches(array, layer, most, rng)
            sums[key][part][...] += x.swapaxes(1, 2) @ x
            rows[key][part] += x.shape[1]
    return {k: (fit / max(rows[k][0], 1), judge / max(rows[k][1], 1)) for k, (fit, judge) in sums.items()}


def _rows(array: Array, size: int, most: float, rng: np.random.Generator) -> Array:
    """About `most` rows of what a product reads, float32 (1, rows, size)."""
    flat = array.reshape(-1, size).astype(np.float32, copy=False)
    share = most / len(flat)
    if share < 1:
        flat = flat[np.sort(rng.choice(len(flat), math.ceil(share * len(flat)), replace=False))]
    return flat[None]


def _patches(array: Array, layer: regression.Layer, most: float, rng: np.random.Generator) -> Array:
    """About `most` patches that a kernel is laid on, float32 (groups, patches, size)."""
    chosen = regression.choose_input(layer, array, math.ceil(most), rng)
    return regression.inputs(layer, array, chosen)


class _Writer:
    """Inserts the nodes of one weight."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.taken = {v.name for n in self.graph for v in n.outputs} | set(self.graph.initializers)
        self.taken |= {v.name for v in self.graph.inputs} | {n.name for n in self.graph}

    def write(self, weight: _Weight, grid: Grid, q: Array) -> None:
        kind = ml_dtypes.int4 if grid.low == -8 else np.int8
        grouped = len(grid.scale) > 1
        stored = [self._constant(f"{weight.name}_quantized", weight.stored(q.astype(np.int8)).astype(kind))]
        stored.append(self._constant(f"{weight.name}_scale", grid.scale if grouped else grid.scale[0]))
        if grid.zero is not None:
            zero = grid.zero.astype(kind)
            stored.append(self._constant(f"{weight.name}_zero_point", zero if grouped else zero[0]))
        how = {"axis": 0, "block_size": grid.block} if grouped else {"axis": weight.axis}
        if weight.kind == "table":
            for node, _ in weight.readers:
                self._gathered(node, stored)
            return
        shape = ir.Shape(weight.shape)
        real = self._dequantized(f"{weight.name}_dequantized", stored, how, shape)
        first = next(node for node in self.graph if any(node is reader for reader, _ in weight.readers))
        self.graph.insert_before(first, real)
        for node, position in weight.readers:
            node.replace_input_with(position, real.outputs[0])
            if weight.kind == "product" and node.op_type == "Gemm":
                node.attributes.pop("alpha", None)
                node.attributes.pop("transB", None)

    def _gathered(self, node: ir.Node, stored: list[ir.Value]) -> None:
        """Rows are gathered as integers, and only those dequantized."""
        value = node.outputs[0]
        name = value.name or ""
        node.replace_input_with(0, stored[0])
        real = self._dequantized(self._fresh(f"{name}_real"), [value, *stored[1:]], {"axis": -1}, value.shape)
        self.graph.insert_after(node, real)
        for reader, position in list(value.uses()):
            if reader is not real:
                reader.replace_input_with(position, real.outputs[0])
        for position, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[position] = real.outputs[0]
        value.name = self._fresh(f"{name}_quantized")
        value.type = ir.TensorType(ir.DataType.INT8)
        real.outputs[0].name = name

    def _dequantized(self, name: str, stored: list[ir.Value], how: dict[str, int], shape: ir.Shape | None) -> ir.Node:
        name = self._fresh(name)
        output = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        return ir.node("DequantizeLinear", stored, dict(how), outputs=[output], name=name)

    def _constant(self, name: str, array: Array) -> ir.Value:
        return G.new_constant(self.graph, self._fresh(name), array)

    def _fresh(self, name: str) -> str:
        new, count = name, 1
        while new in self.taken:
            count += 1
            new = f"{name}_{count}"
        self.taken.add(new)
        return new
