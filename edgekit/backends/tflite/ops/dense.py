"""Gemm and MatMul: FULLY_CONNECTED for constant matrices, BATCH_MATMUL for computed ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Array, Quant, Tensor
from edgekit.backends.tflite.values import Node, Refused, Value


def _gemm(e: Emitter, n: Node) -> None:
    x, weight = n.require(0), n.require(1)
    alpha, beta = n.float("alpha", 1.0), n.float("beta", 1.0)
    bias = n.input(2)
    if n.int("transA", 0):
        x = _transposed(e, x, (1, 0))
    simple = weight.data is not None and (bias is None or (bias.data is not None and _per_output(bias, n.outputs[0])))
    if not simple:
        return _computed_gemm(e, n, x, alpha, beta)
    assert weight.data is not None
    data = weight.data if n.int("transB", 0) else weight.data.T
    axis = 0 if n.int("transB", 0) else 1
    quant = weight.quant
    if quant is not None:
        if alpha != 1.0 or beta != 1.0:
            raise Refused("quantized weights with alpha or beta", "fold alpha and beta into the weights")
        quant = quant.on(0) if quant.per_tensor or quant.axis == axis else _refuse_axis()
    elif alpha != 1.0:
        data = data * np.float32(alpha)
    constant = None
    if bias is not None and bias.data is not None:
        values = bias.data if bias.quant is not None or beta == 1.0 else bias.data * np.float32(beta)
        constant = np.broadcast_to(values.reshape(-1), (data.shape[0],))
    dense(e, n, x, data, quant, constant, None if bias is None else bias.quant)


def _refuse_axis() -> Quant:
    raise Refused("its weights are quantized along their inputs", "quantize per output channel")


def _per_output(bias: Value, output: Value) -> bool:
    return bias.rank == 0 or (all(size == 1 for size in bias.shape[:-1]) and bias.shape[-1] in (1, output.shape[-1]))


def dense(
    e: Emitter, n: Node, x: Value, weight: Array, quant: Quant | None, bias: Array | None, bias_quant: Quant | None
) -> None:
    """FULLY_CONNECTED of x (..., inputs) by `weight` (outputs, inputs)."""
    shuffled = e.shuffled(x)
    if shuffled is None:
        tensor = e.tensor(x)
    else:
        tensor, order = shuffled
        weight = weight[:, order]
    out = n.outputs[0]
    kernel = e.constant(np.ascontiguousarray(weight), n.require(1).name, quant)
    inputs = [tensor, kernel, bias_tensor(e, n, tensor, kernel, len(weight), bias, bias_quant)]
    if out.rank > 2 and tensor.kind == "qint16":
        return _flat(e, n, inputs, len(weight))
    e.emit(out, "FULLY_CONNECTED", inputs, identity(out.rank),
           fusedActivationFunction=n.activation, keepNumDims=out.rank != 2, weightsFormat="DEFAULT")  # fmt: skip


def _flat(e: Emitter, n: Node, inputs: list[Tensor], outputs: int) -> None:
    """With all rows on one axis: tflite-runtime 2.14's int16 kernel computes as many rows as the first axis has."""
    x, out = inputs[0], n.outputs[0]
    grown = {0} if x.dynamic else set()
    rows = e.reshape(x, (int(np.prod(x.shape[:-1])), x.shape[-1]), grown)
    y = e.op("FULLY_CONNECTED", [rows, *inputs[1:]], (rows.shape[0], outputs), quant=out.quant, dynamic=grown,
             fusedActivationFunction=n.activation, keepNumDims=False, weightsFormat="DEFAULT")  # fmt: skip
    e.define(out, e.reshape(y, out.shape, out.dynamic, out.name))


def bias_tensor(
    e: Emitter, n: Node, x: Tensor, kernel: Tensor, outputs: int, bias: Array | None, bias_quant: Quant | None
) -> Tensor:
    """The bias, zeros where there is none. An integer operator's must have scale s_in · s_w, as LiteRT assumes."""
    name = f"{n.name}/bias"
    if x.quant is None:
        data = np.zeros(outputs, np.float32) if bias is None else np.asarray(bias, np.float32)
        return e.constant(np.ascontiguousarray(data), name)
    if kernel.quant is None:
        raise Refused("its input is quantized and its weights are not", "quantize anew with edgekit")
    if kernel.quant.zeros.any():
        raise Refused("its weights have a zero point", "LiteRT takes symmetric weights: quantize anew with edgekit")
    scales = (x.quant.scales * kernel.quant.scales).astype(np.float32)
    wide = np.int64 if x.dtype == np.int16 else np.int32
    if bias is None:
        bias = np.zeros(outputs, wide)
    elif bias_quant is None:
        bias = np.rint(bias / scales.astype(np.float64)).astype(wide)
    elif not np.allclose(bias_quant.scales, scales, rtol=1e-5, atol=0):
        raise Refused("its bias has another scale than input times weights", "quantize anew with edgekit")
    shared = Quant(scales, np.zeros(len(scales), np.int64), 0)
    return e.constant(np.ascontiguousarray(bias.astype(wide)), name, shared)


def _computed_gemm(e: Emitter, n: Node, x: Value, alpha: float, beta: float) -> None:
    """A Gemm whose matrix or addend is computed: product, factors and sum one by one."""
    out = n.outputs[0]
    if out.quant is not None:
        raise Refused("its weights or its bias are computed", "quantize anew with edgekit")
    w = n.require(1)
    y = e.op("BATCH_MATMUL", [e.tensor(x), e.tensor(w)], out.shape, dynamic=out.dynamic, adjY=bool(n.int("transB", 0)))
    if alpha != 1.0:
        y = e.op("MUL", [y, e.constant(np.float32(alpha))], out.shape, dynamic=out.dynamic)
    addend = n.input(2)
    if addend is not None:
        c = e.tensor(addend)
        if beta != 1.0:
            c = e.op("MUL", [c, e.constant(np.float32(beta))], addend.shape, dynamic=addend.dynamic)
        y = e.op("ADD", [y, c], out.shape, dynamic=out.dynamic)
    e.define(out, e.activate(y, n.activation))


def _matmul(e: Emitter, n: Node) -> None:
    x, weight, out = n.require(0), n.require(1), n.outputs[0]
    if weight.data is not None and weight.rank == 2 and x.rank >= 2:
        quant = weight.quant
        if quant is not None:
            quant = quant.on(0) if quant.per_tensor or quant.axis == 1 else _refuse_axis()
        return dense(e, n, x, weight.data.T, quant, None, None)
    left = e.tensor(x)
    swapped = (*range(weight.rank - 2), weight.rank - 1, weight.rank - 2)
    have = e.layouts(weight)
    turned = weight.rank >= 2 and bool(have) and identity(weight.rank) not in have and swapped in have
    right = e.tensor(weight, swapped if turned else None)
    if x.rank == 1:
        left = e.reshape(left, (1, *x.shape))
    if weight.rank == 1:
        right = e.reshape(right, (*weight.shape, 1), weight.dynamic)
    if x.rank > 1 and weight.rank > 1:
        e.emit(out, "BATCH_MATMUL", [left, right], adjY=turned)
        return
    whole = _product_shape(left, right)
    dynamic = {a for a in range(len(whole)) if _grows(left, right, len(whole), a)}
    y = e.op("BATCH_MATMUL", [left, right], whole, quant=out.quant, dynamic=dynamic, dtype=out.dtype)
    e.define(out, e.reshape(y, out.shape, out.dynamic, out.name))


def _product_shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    return (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])


def _grows(a: Tensor, b: Tensor, rank: int, axis: int) -> bool:
    if axis == rank - 2:
        return len(a.shape) - 2 in a.dynamic
    if axis == rank - 1:
        return len(b.shape) - 1 in b.dynamic
    return any(axis - (rank - len(t.shape)) in t.dynamic for t in (a, b))


def _transposed(e: Emitter, x: Value, perm: tuple[int, ...]) -> Value:
    dynamic = frozenset(j for j, a in enumerate(perm) if a in x.dynamic)
    out = replace(x, name=f"{x.name}_transposed", shape=tuple(x.shape[a] for a in perm), dynamic=dynamic)
    if x.data is not None:
        out.data = np.transpose(x.data, perm)
    else:
        e.rename(out, x, perm)
    return out


LOWERINGS = {"Gemm": _gemm, "MatMul": _matmul}
