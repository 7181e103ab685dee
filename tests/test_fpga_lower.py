"""Lowering to an integer network: against onnx's reference evaluator and ONNX Runtime, operator by operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.backends.fpga import interpreter
from edgekit.backends.fpga.lower import lower
from edgekit.backends.fpga.net import IntegerNet, Layer
from edgekit.errors import EdgekitError, ShapeError, UnsupportedOpError
from tests.fpga_graphs import QdqGraph, integers_of, random_model

Array = np.ndarray[Any, Any]


def hwc(array: Array, shape: tuple[int, ...]) -> Array:
    """Integers of a model's value, (n, c, h, w) or (n, c), in the network's order."""
    moved = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    return moved.reshape(len(array), *shape)


def ties(net: IntegerNet, layer: Layer, given: list[Array]) -> Array:
    """Where a sum lies exactly between two integers: there ONNX rounds half to even."""
    target = net.tensors[layer.output]
    if layer.kind == "concat":
        parts = [
            v.astype(np.int64).reshape(len(v), *net.tensors[n].hwc) for v, n in zip(given, layer.inputs, strict=True)
        ]
        sums = np.concatenate(parts, axis=3)
        shift = np.concatenate([np.full(p.shape[3], s) for p, s in zip(parts, layer.shift, strict=True)])
    else:
        sums, shift = interpreter._sums(net, layer, given), np.array(layer.shift)
    right = np.maximum(shift, 1)
    tie = (sums & ((np.int64(1) << right) - 1)) == np.int64(1) << (right - 1)
    return np.asarray(tie & (shift > 0)).reshape(len(given[0]), *target.shape)


def samples(seed: int, shape: tuple[int, ...], count: int = 2) -> Array:
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32) * 1.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_every_layer_equals_the_reference_evaluator_but_for_ties(seed: int) -> None:
    model, quantizers, shape = random_model(seed)
    net = lower(model)
    x = samples(seed, shape)
    found = integers_of(model, list(quantizers.values()), x)
    exact = {name: found[quantizers[name]] for name in quantizers}
    first = exact[net.input.name]
    if net.source_layout == "CHW" or first.shape[1:] != net.input.shape:
        first = hwc(first, net.input.shape)
    values = {net.input.name: first.astype(np.int8)}
    np.testing.assert_allclose(net.quantized(x), values[net.input.name], atol=1)  # half up, half to even
    for layer in net.layers:
        given_ = [values[n] for n in layer.inputs]
        got = interpreter._layer(net, layer, given_).astype(int)
        wanted = hwc(exact[layer.output].astype(int), net.tensors[layer.output].shape)
        apart = np.abs(got - wanted)
        assert apart.max() <= 1, layer.name
        if layer.multiplier == 1:
            assert not apart[~ties(net, layer, given_)].any(), layer.name
        values[layer.output] = wanted.astype(np.int8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_network_is_near_onnx_runtime(seed: int) -> None:
    """End to end: differences of ties pass through the layers after them, so only most must be small."""
    model, _, shape = random_model(seed)
    net = lower(model)
    x = samples(seed + 1, shape)
    proto = M.to_proto(model)
    if net.host_ops:  # the float model's results before the host's operator
        last = proto.graph.node[-1]
        del proto.graph.output[:]
        proto.graph.output.extend([onnx.ValueInfoProto(name=last.input[0])])
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x})
    got = net.real(interpreter.outputs(net, net.quantized(x)))
    step = 2.0 ** -net.tensors[net.output].exponent
    assert np.median(np.abs(got - wanted.reshape(got.shape))) <= 2 * step


def test_random_models_have_every_kind() -> None:
    kinds: set[str] = set()
    hosts: set[str] = set()
    for seed in range(60):
        net = lower(random_model(seed)[0])
        kinds |= {layer.kind for layer in net.layers}
        hosts |= set(net.host_ops)
    assert kinds == {"conv", "depthwise", "dense", "add", "maxpool", "avgpool", "concat"}
    assert hosts == {"Softmax", "Sigmoid"}


# --- refusals ---------------------------------------------------------------------------------------------
def small(op: str, exponent: int = 4, **how: Any) -> Any:
    """x (1, 4, 4) -> conv -> `op` -> flat result."""
    g = QdqGraph((1, 4, 4))
    x = g.rounded("x", 4)
    weights = np.arange(-4, 5, dtype=np.int8).reshape(1, 1, 3, 3)
    y = g.rounded(g.layer("Conv", x, 4, weights, 6, 0, pads=[1, 1, 1, 1]), exponent)
    y = g.rounded(g.op(op, [y], **how), 4)
    return g.model(g.op("Flatten", [y]), (16,))


def test_relu_alone_and_names_survive() -> None:
    net = lower(small("Relu"))
    assert [layer.kind for layer in net.layers] == ["conv", "maxpool"]
    assert net.layers[1].low == 0
    assert net.source == "x"
    assert net.tensors[net.output].bits == 8


@pytest.mark.parametrize("op", ["Tanh", "Elu", "HardSwish", "Sigmoid", "Softmax"])
def test_float_operators_are_refused_by_name(op: str) -> None:
    with pytest.raises(UnsupportedOpError, match=f"{op} '{op.lower()}_[0-9]+_node' cannot") as caught:
        lower(small(op))
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def broken(what: str) -> Any:
    """A model with one thing that no integer network has."""
    dynamic = what == "dynamic shape"
    g = QdqGraph((1, "w", 4) if dynamic else (1, 4, 4), batch="n")  # type: ignore[arg-type]
    zero = {"zero point": (np.int8, 3), "uint8": (np.uint8, 0), "int16": (np.int16, 0)}.get(what, (np.int8, 0))
    x = g.rounded("x", 4, *zero) if what != "float input" else "x"
    weights = np.arange(-4, 5, dtype=np.int8).reshape(1, 1, 3, 3)
    if what == "float weights":
        y = g.op("Conv", [x, g.constant("w", weights.astype(np.float32))])
    elif what == "channel axis":
        y = g.op("Conv", [x, g.stored("w", weights, np.full(3, 6), 2)])
    elif what == "average border":
        y = g.op("AveragePool", [x], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    elif what == "broadcast":
        y = g.op("Add", [x, g.rounded(g.op("GlobalAveragePool", [x]), 4)])
    elif what == "shift":
        y = g.layer("Conv", x, 4, weights, -60, 0, bias=False)
    else:
        y = g.layer("Conv", x, 4, weights, 6, 0)
    if what == "no power of two":
        g.weights[next(n for n in g.weights if n.startswith("weight") and n.endswith("scale"))] = np.float32(0.3)
    last = y if what == "float output" else g.rounded(y, 3)
    if what == "upper layout":
        last = g.op("Transpose", [last], perm=[0, 3, 2, 1])
        last = g.rounded(g.layer("Conv", last, 3, weights[:, :, :1, :1], 6, 0), 3)
    return g.model(g.op("Flatten", [last]), ("k",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("zero point", "zero point 3 of int8"),
        ("uint8", "zero point 0 of uint8 is not 128"),
        ("int16", "integers of type int16"),
        ("float input", "its input 'x' is float"),
        ("float weights", "its weights are float"),
        ("channel axis", "along another axis"),
        ("average border", "over fewer positions"),
        ("broadcast", "not of one shape"),
        ("shift", "shifts sums by -59 bits"),
        ("no power of two", "0.3.* is no power of two"),
        ("float output", "is not quantized"),
        ("upper layout", "another order"),
        ("dynamic shape", "is unknown"),
    ],
)
def test_what_cannot_be_taken_is_refused(what: str, told: str) -> None:
    with pytest.raises(EdgekitError, match=told) as caught:
        lower(broken(what))
    assert isinstance(caught.value, ShapeError if what == "dynamic shape" else UnsupportedOpError)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("exponent", "shift"), [(4, None), (3, 1), (6, -2)])
def test_the_same_grid_twice_is_no_layer_and_another_is(exponent: int, shift: int | None) -> None:
    g = QdqGraph((2, 2))
    x = g.op("Flatten", [g.rounded("x", 4)])
    net = lower(g.model(g.rounded(x, exponent), (4,)))
    assert [layer.shift for layer in net.layers] == ([] if shift is None else [(shift,)])
    assert net.tensors[net.output].exponent == exponent


@pytest.mark.parametrize("count", [2, 3, 5, 7, 8, 9, 49, 121])
def test_averages_are_nearest_but_for_near_ties(count: int) -> None:
    g = QdqGraph((1, 1, count))
    y = g.rounded(g.op("GlobalAveragePool", [g.rounded("x", 0)]), 0)
    net = lower(g.model(g.op("Flatten", [y]), (1,)))
    x = np.random.default_rng(count).integers(-128, 128, (400, 1, 1, count)).astype(np.float32)
    x[0], x[1] = -128, 127
    got = interpreter.outputs(net, net.quantized(x)).ravel()
    # 1/count in 16 bits is off by at most 2^-17, and sums reach 128 · count
    assert np.abs(got - x.mean(axis=(1, 2, 3), dtype=np.float64)).max() <= 0.5 + 128 * count * 2.0**-17


@pytest.mark.parametrize(("exponent", "high"), [(-2, 2), (-3, 1), (3, 48), (4, 96), (5, 127)])
def test_six_is_rounded_half_up(exponent: int, high: int) -> None:
    g = QdqGraph((4,))
    ends = [g.constant(f"end_{v}", np.float32(v)) for v in (0, 6)]
    y = g.layer("Gemm", g.rounded("x", 3), 3, np.eye(4, dtype=np.int8), 3, 1, bias=False)
    net = lower(g.model(g.rounded(g.op("Clip", [y, *ends]), exponent), (4,)))
    assert (net.layers[0].low, net.layers[0].high) == (0, high)


def test_channels_that_are_shifted_away_are_zero() -> None:
    g = QdqGraph((4,))
    weights = np.random.default_rng(0).integers(-128, 128, (3, 4)).astype(np.int8)
    y = g.layer("Gemm", g.rounded("x", 4), 4, weights, np.array([6, 40, 6]), 0, transB=1)
    model = g.model(g.rounded(y, 2), (3,))
    net = lower(model)
    x = samples(3, (4,), 8)
    (wanted,) = integers_of(model, [g.quantizers[y]], x).values()
    got = interpreter.outputs(net, net.quantized(x))
    assert np.abs(got - wanted.astype(int)).max() <= 1
    assert not got[:, 1].any()
    assert net.layers[0].shift == (8, 31, 8)


def test_uint8_around_128_is_int8() -> None:
    g = QdqGraph((4,))
    x = g.rounded("x", 3, np.uint8, 128)
    y = g.rounded(g.layer("Gemm", x, 3, np.eye(4, dtype=np.int8) * 8, 3, 1, bias=False), 3)
    net = lower(g.model(y, (4,)))
    x_real = np.array([[0.5, -1, 3, 20]], np.float32)
    assert net.real(interpreter.outputs(net, net.quantized(x_real))).tolist() == [[0.5, -1, 3, 127 / 8]]


def test_padding_before_a_convolution_is_its_own() -> None:
    g = QdqGraph((1, 3, 3))
    x = g.rounded("x", 4)
    pads = g.constant("pads", np.array([0, 0, 1, 0, 0, 0, 0, 2]))
    y = g.layer("Conv", g.op("Pad", [x, pads]), 4, np.full((1, 1, 2, 2), 8, np.int8), 3, 0, pads=[0, 1, 0, 0])
    net = lower(g.model(g.op("Flatten", [g.rounded(y, 4)]), (15,)))
    assert net.layers[0].pads == (1, 1, 0, 2)
