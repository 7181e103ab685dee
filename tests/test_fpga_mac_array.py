"""The generated engine equals the interpreter bit for bit in every simulator, and its model cycle by cycle."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgekit.backends.fpga import interpreter, simulate, simulators
from edgekit.backends.fpga.mac_array import cycles, fit
from edgekit.backends.fpga.mac_array.buffers import placed
from edgekit.backends.fpga.mac_array.config import Config
from edgekit.backends.fpga.mac_array.program import Program, compiled
from edgekit.backends.fpga.mac_array.write import write
from edgekit.backends.fpga.net import IntegerNet, Layer, Tensor, windows
from edgekit.errors import (
    ArtifactError,
    ConversionMismatchError,
    DeviceError,
    MissingExtraError,
    ShapeError,
    UnsupportedOpError,
    UsageError,
    WorkerError,
)
from tests.fpga_nets import Builder, integers, random_net

ICARUS = pytest.mark.skipif(not simulate.available("icarus"), reason="Icarus Verilog is not installed")
VERILATOR = pytest.mark.skipif(not simulate.available("verilator"), reason="Verilator is not installed")
CXXRTL = pytest.mark.skipif(not simulate.available("cxxrtl"), reason="yosys with CXXRTL's headers is not installed")
TOOLS = [
    pytest.param("icarus", marks=ICARUS),
    pytest.param("verilator", marks=VERILATOR),
    # yosys from WebAssembly takes minutes at its first start
    pytest.param("cxxrtl", marks=[CXXRTL, pytest.mark.slow]),
]


# --- networks ------------------------------------------------------------------------------------------------
def window_net(seed: int, bits: int | None = 8) -> IntegerNet:
    """Every kind of layer once or more, with strides, padding and channels that do not fill the lanes."""
    b = Builder(seed, (9, 7, 3), bits)
    for kind in ("conv", "maxpool", "depthwise", "add", "avgpool", "conv", "dense", "dense"):
        b.add_layer(kind)
    return b.net()


def concat_net() -> IntegerNet:
    """Two maps of 4 and 6 channels one after the other, the second requantized by a shift to the left."""
    b = Builder(3, (4, 3, 4), 8)
    weights = b.rng.integers(-128, 128, (6, 1, 1, 4)).astype(np.int8)
    b.put(_conv("c", "x", "c", weights, shift=9), (4, 3, 6), 0)
    b.put(Layer("concat", "join", ("x", "c"), "joined", -128, 127, (1, -1)), (4, 3, 10), 0)
    b.add_layer("dense")
    return b.net()


def _conv(name: str, source: str, target: str, weights: np.ndarray, shift: int, **how: tuple[int, ...]) -> Layer:
    bias = np.arange(len(weights), dtype=np.int64) * 100 - 200
    return Layer(
        "conv",
        name,
        (source,),
        target,
        0,
        1,
        (shift,),
        weights=weights,
        weight_bits=8,
        weight_exponents=(0,),
        bias=bias,
        kernel=weights.shape[1:3],
        **how,  # type: ignore[arg-type]
    )


def resnet8() -> IntegerNet:
    """Shapes of MLPerf Tiny's image classification; the weights' values do not matter to cycles."""
    tensors = {"x": Tensor("x", (32, 32, 3), 8, 0)}
    layers: list[Layer] = []

    def conv(source: str, cout: int, size: int, stride: int) -> str:
        name = f"c{len(layers)}"
        weights = np.zeros((cout, size, size, tensors[source].hwc[2]), np.int8)
        over = max(0, (tensors[source].hwc[0] // stride - 1) * stride + size - tensors[source].hwc[0])
        pads = (over // 2, over // 2, over - over // 2, over - over // 2)
        layer = replace(_conv(name, source, name, weights, 8, strides=(stride, stride), pads=pads), high=127)
        tensors[name] = Tensor(name, (*windows(layer, tensors[source]), cout), 8, 0)
        layers.append(layer)
        return name

    def add(a: str, b: str) -> str:
        name = f"a{len(layers)}"
        tensors[name] = replace(tensors[a], name=name)
        layers.append(Layer("add", name, (a, b), name, 0, 127, (1,), input_shifts=(0, 1)))
        return name

    last = conv("x", 16, 3, 1)
    last = add(last, conv(conv(last, 16, 3, 1), 16, 3, 1))
    for width in (32, 64):
        last = add(conv(last, width, 1, 2), conv(conv(last, width, 3, 2), width, 3, 1))
    tensors["pooled"] = Tensor("pooled", (1, 1, 64), 8, 0)
    layers.append(Layer("avgpool", "pool", (last,), "pooled", -128, 127, (6,), kernel=(8, 8), strides=(8, 8)))
    tensors["y"] = Tensor("y", (10,), 8, 0)
    layers.append(_dense("y", "pooled", 64, 10))
    return IntegerNet(tensors["x"], tensors, tuple(layers), "y")


def mlp(*sizes: int) -> IntegerNet:
    tensors = {"x": Tensor("x", (sizes[0],), 8, 0)}
    layers = []
    last = "x"
    for index, (cin, cout) in enumerate(pairwise(sizes)):
        name = f"d{index}"
        tensors[name] = Tensor(name, (cout,), 8, 0)
        layers.append(_dense(name, last, cin, cout))
        last = name
    return IntegerNet(tensors["x"], tensors, tuple(layers), last)


def _dense(name: str, source: str, cin: int, cout: int) -> Layer:
    rng = np.random.default_rng(cin)
    return Layer(
        "dense",
        name,
        (source,),
        name,
        -128,
        127,
        (12,),
        weights=rng.integers(-128, 128, (cout, cin)).astype(np.int8),
        weight_bits=8,
        weight_exponents=(0,),
        bias=rng.integers(-9999, 9999, cout),
    )


def fitting(net: IntegerNet, *configs: Config) -> Program:
    """The first array that has a form for the network."""
    for config in configs:
        try:
            return compiled(net, config)
        except UnsupportedOpError:
            continue
    raise AssertionError("no array fits")


def check(program: Program, folder: Path, tool: simulate.Tool, samples: int = 3, stalls: int | None = None) -> None:
    """Outputs equal the interpreter's; without gaps every step takes exactly the modelled cycles."""
    write(program, folder)
    x = integers(program.net, samples, 5)
    result = simulate.simulate(folder, x, tool, stalls, cache=folder / "cache")
    np.testing.assert_array_equal(result.outputs, interpreter.outputs(program.net, x))
    steps = [cycles.step_cycles(program, step) for step in program.steps]
    np.testing.assert_array_equal(result.step_cycles[:, 1:-1], np.tile(steps, (samples, 1)))
    modelled = cycles.inference_cycles(program)
    if stalls is None:
        assert set(result.cycles) == {modelled}
        assert set(result.step_cycles.sum(axis=1)) == {modelled}
    else:
        assert min(result.cycles) > modelled


# --- bit for bit ---------------------------------------------------------------------------------------------
@ICARUS
@pytest.mark.parametrize("config", [Config(8, 4), Config(4, 2), Config(3, 1), Config(16, 8), Config(12, 4)], ids=str)
def test_layers_of_every_kind_on_arrays_of_every_shape(config: Config, tmp_path: Path) -> None:
    check(compiled(window_net(config.lanes), config), tmp_path, "icarus")


@ICARUS
@pytest.mark.parametrize("seed", range(6))
def test_random_networks_of_random_widths(seed: int, tmp_path: Path) -> None:
    net = random_net(seed)
    check(fitting(net, Config(8, 4), Config(6, 2), Config(5, 1)), tmp_path, "icarus", stalls=seed + 1)


@ICARUS
@pytest.mark.parametrize("q", [2, 4])
def test_concat(q: int, tmp_path: Path) -> None:
    check(compiled(concat_net(), Config(8, q)), tmp_path, "icarus")


@pytest.mark.parametrize("tool", TOOLS)
def test_the_same_in_every_simulator_with_and_without_gaps(tool: simulate.Tool, tmp_path: Path) -> None:
    program = compiled(window_net(1), Config(8, 4))
    check(program, tmp_path, tool)
    check(program, tmp_path, tool, samples=20, stalls=7)


@ICARUS
@VERILATOR
def test_two_simulators_take_the_same_cycles_with_gaps(tmp_path: Path) -> None:
    program = compiled(concat_net(), Config(4, 4))
    write(program, tmp_path)
    results = simulate.simulate_in(tmp_path, integers(program.net, 4, 2), ("verilator", "icarus"), stalls=99)
    assert len(set(results["icarus"].cycles)) > 1


@VERILATOR
def test_a_dense_network_on_many_samples(tmp_path: Path) -> None:
    check(compiled(mlp(64, 32, 16, 10), Config(16, 4)), tmp_path, "verilator", samples=500)


@ICARUS
def test_an_addition_whose_shift_is_wider_than_a_weight(tmp_path: Path) -> None:
    tensor = Tensor("x", (2, 3, 5), 4, 0)
    layer = Layer("add", "sum", ("x", "x"), "y", -128, 127, (4,), input_shifts=(8, 1))
    net = IntegerNet(tensor, {"x": tensor, "y": Tensor("y", (2, 3, 5), 8, 0)}, (layer,), "y")
    check(compiled(net, Config(4, 4)), tmp_path, "icarus")


@ICARUS
def test_sums_narrower_than_the_widest_map(tmp_path: Path) -> None:
    tensors = {"x": Tensor("x", (2, 3, 5), 3, 0), "y": Tensor("y", (2, 3, 5), 8, 0)}
    layer = Layer("maxpool", "pool", ("x",), "y", -128, 127, (0,))
    check(compiled(IntegerNet(tensors["x"], tensors, (layer,), "y"), Config(4, 4)), tmp_path, "icarus")


# --- the model of cycles and memories --------------------------------------------------------------------------
def test_dense_layers_use_their_lanes() -> None:
    program = compiled(mlp(784, 256, 128, 10), Config(16, 4))
    spent = sum(cycles.step_cycles(program, step) for step in program.steps)
    assert sum(step.macs for step in program.steps) == 784 * 256 + 256 * 128 + 128 * 10
    assert sum(step.macs for step in program.steps) / (64 * spent) > 0.85


def test_resnet8_uses_its_lanes() -> None:
    program = compiled(resnet8(), Config(16, 4))
    assert sum(step.macs for step in program.steps) == 12_501_632  # MLPerf Tiny's network
    assert cycles.utilisation(program) > 0.60


@pytest.mark.parametrize("seed", range(20))
def test_maps_that_are_needed_together_share_no_word(seed: int) -> None:
    net = random_net(seed, layers=9)
    places = placed(net, Config(8, 2))
    assert places.size <= 4 * sum(h * w * c for h, w, c in (t.hwc for t in net.tensors.values()))
    made = {net.input.name: -1, **{layer.output: i for i, layer in enumerate(net.layers)}}
    for index, layer in enumerate(net.layers):
        later = {name for other in net.layers[index:] for name in other.inputs} | {net.output}
        alive = {name for name in later if made[name] < index} | {layer.output}
        covered: set[int] = set()
        for name in alive:
            height, width, channels = net.tensors[name].hwc
            words = range(places.base[name], places.base[name] + height * width * places.pitch[name])
            assert places.pitch[name] * 2 >= channels
            assert covered.isdisjoint(words)
            assert words.stop <= places.size
            covered.update(words)


def test_a_residual_network_reuses_memory() -> None:
    # at most three maps of 32 x 32 x 16 at once: two operands of the first addition, and its result
    assert placed(resnet8(), Config(16, 4)).size == 3 * 32 * 32 * 16 // 4


# --- the choice for a part -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    name: str
    dsp: int
    block_rams: int


def test_the_choice_fits_and_a_larger_part_is_faster() -> None:
    net = mlp(256, 128, 10)
    chosen = [fit.choose(net, Part("any", dsp, 208)) for dsp in (4, 28, 72, 156)]
    for program, dsp in zip(chosen, (4, 28, 72, 156), strict=True):
        assert fit.multipliers(program) <= dsp
        assert sum(fit.block_rams(program).values()) <= 208
    taken = [cycles.inference_cycles(program) for program in chosen]
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] < taken[0] / 10


def test_a_network_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(DeviceError, match=r"about \d+ block RAMs .*weights \d+.* small-part has 20"):
        fit.choose(mlp(784, 256, 128, 10), Part("small-part", 28, 20))


def test_blocks_of_a_memory() -> None:
    assert fit.blocks(512, 36) == 1
    assert fit.blocks(512, 37) == 2
    assert fit.blocks(16384, 1) == 1
    assert fit.blocks(12288, 32) == 24


# --- refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("p", "q"), [(8, 3), (6, 4), (2, 4), (4, 0)])
def test_impossible_arrays(p: int, q: int) -> None:
    with pytest.raises(UsageError, match=f"{p} x {q} lanes"):
        Config(p, q)


def test_a_concat_that_splits_words_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match=r"'x' has 4 channels, memory words hold 8"):
        compiled(concat_net(), Config(8, 8))


def test_a_folder_without_a_design(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no FPGA design"):
        simulate.simulate(tmp_path, np.zeros((1, 3), np.int8), "icarus")


def test_other_inputs_than_the_design_takes(tmp_path: Path) -> None:
    write(compiled(mlp(8, 4), Config(4, 4)), tmp_path)
    with pytest.raises(ShapeError, match=r"integers \(n, \[8\]\)"):
        simulate.simulate(tmp_path, np.zeros((1, 3), np.int8), "icarus")


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(compiled(mlp(8, 4), Config(4, 4)), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not simulate.available("icarus")
    with pytest.raises(MissingExtraError, match="'iverilog' is not installed — apt install iverilog"):
        simulate.simulate(tmp_path, np.zeros((1, 8), np.int8), "icarus")


# --- what a wrong design gets --------------------------------------------------------------------------------
@ICARUS
def test_a_changed_weight_shows(tmp_path: Path) -> None:
    program = compiled(mlp(8, 4), Config(4, 4))
    write(program, tmp_path)
    x = integers(program.net, 8, 0)
    lines = (tmp_path / "weights.hex").read_text().splitlines()
    (tmp_path / "weights.hex").write_text("\n".join(["0" * len(lines[0]), *lines[1:]]) + "\n")
    outputs = simulate.simulate(tmp_path, x, "icarus", cache=tmp_path / "cache").outputs
    assert not np.array_equal(outputs, interpreter.outputs(program.net, x))


@ICARUS
def test_an_inference_that_ends_early_is_noticed(tmp_path: Path) -> None:
    write(compiled(mlp(32, 4), Config(4, 4)), tmp_path)
    about = json.loads((tmp_path / "design.json").read_text())
    (tmp_path / "design.json").write_text(json.dumps({**about, "input_words": 4, "input_shape": [16]}))
    with pytest.raises(WorkerError, match="expects the last word of an inference elsewhere than after 4"):
        simulate.simulate(tmp_path, np.zeros((3, 16), np.int8), "icarus", cache=tmp_path / "cache")


@pytest.mark.parametrize("tool", TOOLS[:2])
def test_a_word_that_does_not_wait_is_noticed(tool: simulate.Tool, tmp_path: Path) -> None:
    program = compiled(mlp(8, 16), Config(4, 4))
    write(program, tmp_path)
    engine = tmp_path / "mac_array_engine.v"
    waits = "send_room = !out_valid || out_ready;"
    assert waits in engine.read_text()
    engine.write_text(engine.read_text().replace(waits, "send_room = 1'b1;"))
    with pytest.raises(WorkerError, match="changed while it waited"):
        simulate.simulate(tmp_path, integers(program.net, 5, 0), tool, stalls=3, cache=tmp_path / "cache")


@ICARUS
def test_simulators_that_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled(mlp(8, 4), Config(4, 4))
    write(program, tmp_path)
    real = simulators.SIMULATORS["icarus"]

    def wrong(*arguments: object) -> np.ndarray:
        words = real.run(*arguments)  # type: ignore[arg-type]
        words[0, 0] ^= 1
        return words

    monkeypatch.setitem(simulators.SIMULATORS, "verilator", replace(real, run=wrong))
    with pytest.raises(ConversionMismatchError, match="icarus and verilator disagree in the outputs"):
        simulate.simulate_in(tmp_path, integers(program.net, 2, 0), ("icarus", "verilator"))


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("q", [1, 4, 16])
def test_words_on_the_streams(bits: int, q: int) -> None:
    x = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), (3, 2, 4, 5)).astype(np.int8)
    pixel = 8 if q == 1 else -(-5 // q)
    about = {
        "activation_bits": bits,
        "q": q,
        "output_shape": [2, 4, 5],
        "input_pixel_words": pixel,
        "output_pixel_words": pixel,
    }
    words = simulate.packed(x, about)
    assert words.shape == (3 * 2 * 4 * pixel, -(-bits * q // 32))
    assert int(words[0, 0]) & ((1 << bits) - 1) == int(x[0, 0, 0, 0]) & ((1 << bits) - 1)
    np.testing.assert_array_equal(simulate.unpacked(words, 3, about), x)
