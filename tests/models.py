"""Small models that together hold the shapes that break converters; seeded weights, no files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper, parser

OPSET = 21


def _model(text: str, **weights: np.ndarray) -> ir.Model:
    """An ONNX text graph with its initializers; types and shapes inferred and checked."""
    graph = parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def _normal(*shape: int, seed: int = 0, scale: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def mlp() -> ir.Model:
    return _model(
        """mlp (float[batch,12] x) => (float[batch,5] y) {
          h = Gemm<transB=1>(x, w0, b0)  r = Relu(h)  y = Gemm(r, w1, b1) }""",
        w0=_normal(16, 12), b0=_normal(16, seed=1), w1=_normal(16, 5, seed=2), b1=_normal(5, seed=3),
    )  # fmt: skip


def cnn_nchw() -> ir.Model:
    """Odd sizes, stride, padding, max pool, softmax at the end; batch fixed to 2."""
    return _model(
        """cnn (float[2,3,13,11] x) => (float[2,7] y) {
          c = Conv<kernel_shape=[3,3],pads=[1,1,1,1],strides=[2,2]>(x, w0, b0)  r = Relu(c)
          p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r)
          d = Conv<kernel_shape=[3,3],pads=[0,1,1,0]>(p, w1, b1)  q = Relu(d)
          g = GlobalAveragePool(q)  f = Flatten(g)  z = Gemm(f, w2, b2)  y = Softmax(z) }""",
        w0=_normal(9, 3, 3, 3), b0=_normal(9, seed=1), w1=_normal(6, 9, 3, 3, seed=2), b1=_normal(6, seed=3),
        w2=_normal(6, 7, seed=4, scale=1.0), b2=_normal(7, seed=5),
    )  # fmt: skip


def mobile_nhwc() -> ir.Model:
    """NHWC input, depthwise, ReLU6, residual add, batch norm, dynamic batch: MobileNet as Keras exports it."""
    return _model(
        """mobile (float[batch,10,10,3] x) => (float[batch,4] y) {
          t = Transpose<perm=[0,3,1,2]>(x)
          a = Conv<kernel_shape=[1,1]>(t, w0, b0)  ra = Clip(a, zero, six)
          d = Conv<kernel_shape=[3,3],pads=[1,1,1,1],group=8>(ra, w1)
          n = BatchNormalization(d, gamma, beta, mean, var)  rn = Clip(n, zero, six)
          s = Conv<kernel_shape=[1,1]>(rn, w2, b2)  e = Add(s, a)
          g = ReduceMean<keepdims=0>(e, axes)  y = Gemm(g, w3, b3) }""",
        w0=_normal(8, 3, 1, 1, scale=1.0), b0=_normal(8, seed=1), w1=_normal(8, 1, 3, 3, seed=2),
        gamma=np.abs(_normal(8, seed=3)) + 0.5, beta=_normal(8, seed=4), mean=_normal(8, seed=5),
        var=np.abs(_normal(8, seed=6)) + 0.5, w2=_normal(8, 8, 1, 1, seed=7), b2=_normal(8, seed=8),
        w3=_normal(8, 4, seed=9, scale=1.0), b3=_normal(4, seed=10), axes=np.array([2, 3], np.int64),
        zero=np.float32(0), six=np.float32(6),
    )  # fmt: skip


def two_inputs_two_outputs() -> ir.Model:
    """Concat of two branches with different ranges, one intermediate value that is an output too."""
    return _model(
        """two (float[batch,6] a, float[batch,4] b) => (float[batch,8] h, float[batch,3] y) {
          ga = Gemm(a, w0, b0)  ra = Relu(ga)  gb = Gemm(b, w1, b1)  sb = Sigmoid(gb)
          h = Concat<axis=1>(ra, sb)  y = Gemm(h, w2, b2) }""",
        w0=_normal(6, 5), b0=_normal(5, seed=1), w1=_normal(4, 3, seed=2), b1=_normal(3, seed=3),
        w2=_normal(8, 3, seed=4, scale=1.0), b2=_normal(3, seed=5),
    )  # fmt: skip


def generator() -> ir.Model:
    """Dense, reshape, transposed convolution, tanh: a GAN generator."""
    return _model(
        """gan (float[batch,9] z) => (float[batch,1,8,8] y) {
          d = Gemm(z, w0, b0)  r = Relu(d)  s = Reshape(r, shape)
          c = ConvTranspose<kernel_shape=[4,4],strides=[2,2],pads=[1,1,1,1]>(s, w1, b1)  y = Tanh(c) }""",
        w0=_normal(9, 96), b0=_normal(96, seed=1), w1=_normal(6, 1, 4, 4, seed=2), b1=_normal(1, seed=3),
        shape=np.array([-1, 6, 4, 4], np.int64),
    )  # fmt: skip


def conv1d() -> ir.Model:
    """A 1-D convolution over a time series, average pool, leaky ReLU."""
    return _model(
        """series (float[batch,2,33] x) => (float[batch,3] y) {
          c = Conv<kernel_shape=[5],strides=[2],dilations=[2]>(x, w0, b0)  l = LeakyRelu<alpha=0.1>(c)
          p = AveragePool<kernel_shape=[2],strides=[2]>(l)  f = Flatten(p)  y = Gemm(f, w1, b1) }""",
        w0=_normal(4, 2, 5), b0=_normal(4, seed=1), w1=_normal(24, 3, seed=2), b1=_normal(3, seed=3),
    )  # fmt: skip


def recurrent() -> ir.Model:
    """An LSTM, which stays in float, before a dense layer, which does not."""
    return _model(
        """rnn (float[batch,7,5] x) => (float[batch,3] y) {
          t = Transpose<perm=[1,0,2]>(x)  s, last, cell = LSTM<hidden_size=6>(t, w, r, b)
          h = Squeeze(last, axes)  y = Gemm(h, w1, b1) }""",
        w=_normal(1, 24, 5), r=_normal(1, 24, 6, seed=1), b=_normal(1, 48, seed=2), axes=np.array([0], np.int64),
        w1=_normal(6, 3, seed=3, scale=1.0), b1=_normal(3, seed=4),
    )  # fmt: skip


def attention() -> ir.Model:
    """One attention head with a mask of huge negative constants, which must stay in float."""
    return _model(
        """head (float[batch,6,8] x) => (float[batch,6,8] y) {
          q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  kt = Transpose<perm=[0,2,1]>(k)
          s = MatMul(q, kt)  m = Add(s, mask)  p = Softmax<axis=-1>(m)  o = MatMul(p, v)  y = Add(o, x) }""",
        wq=_normal(8, 8), wk=_normal(8, 8, seed=1), wv=_normal(8, 8, seed=2),
        mask=np.triu(np.full((6, 6), -1e9, np.float32), 1),
    )  # fmt: skip


MODELS: dict[str, Callable[[], ir.Model]] = {
    f.__name__: f for f in (mlp, cnn_nchw, mobile_nhwc, two_inputs_two_outputs, generator, conv1d, recurrent, attention)
}
