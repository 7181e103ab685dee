"""Unrolled designs against the interpreter: the trace, the Verilog in two simulators, stalls, a serial line."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from edgekit.backends.fpga import implement, interpreter, simulate, simulators
from edgekit.backends.fpga.simulators import Tool
from edgekit.backends.fpga.unrolled import trace, write
from edgekit.errors import UnsupportedOpError
from edgekit.part import Board, Part
from tests.fpga_dense import dense_net, samples
from tests.fpga_nets import random_net

pytest.importorskip("da4ml", reason="da4ml of the extra 'fpga'")


def simulator(name: Tool) -> Tool:
    if not simulate.available(name):
        pytest.skip(f"{name} is not installed")
    return name


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("seed", range(4))
def test_trace_computes_the_networks_integers(bits: int, seed: int) -> None:
    net = dense_net((5, 7, 4, 3), bits, seed, zeros=seed / 4)
    x = samples(net, 200, seed)
    got = trace.unroll(net).whole.predict(x.astype(np.float64))
    np.testing.assert_array_equal(got, interpreter.outputs(net, x))


def test_random_networks_have_live_outputs() -> None:
    """The comparison would say nothing of constants."""
    values = [
        interpreter.outputs(dense_net((5, 7, 4, 3), 5, s), samples(dense_net((5, 7, 4, 3), 5, s), 200, s))
        for s in range(4)
    ]
    assert sum(len(np.unique(v)) > 4 for v in values) >= 3


@pytest.mark.parametrize(
    ("tool", "bits", "seed"), [("icarus", 4, 1), ("icarus", 8, 2), ("verilator", 5, 3), ("cxxrtl", 5, 3)]
)
def test_design_equals_the_interpreter(tool: Tool, bits: int, seed: int, tmp_path: Path) -> None:
    net = dense_net((6, 5, 3), bits, seed, zeros=0.3)
    unrolled = trace.unroll(net)
    write.write(unrolled, tmp_path)
    x = samples(net, 60, seed)
    expected = interpreter.outputs(net, x)
    free = simulate.simulate(tmp_path, x, simulator(tool), cache=tmp_path / "cache")
    np.testing.assert_array_equal(free.outputs, expected)
    # a beat is offered every clock and all stages move together: had one not been taken, those inside were late
    np.testing.assert_array_equal(free.cycles, write.cycles(unrolled))
    stalled = simulate.simulate(tmp_path, x, tool, stalls=7, cache=tmp_path / "cache")
    np.testing.assert_array_equal(stalled.outputs, expected)
    assert stalled.cycles.max() > free.cycles.max()


def test_a_wire_for_every_stage_and_what_design_json_says(tmp_path: Path) -> None:
    net = dense_net((6, 5, 3), 6, 3)
    unrolled = trace.unroll(net, adders_a_stage=1)
    write.write(unrolled, tmp_path)
    about = json.loads((tmp_path / "design.json").read_text(encoding="utf-8"))
    assert about["stages"] == len(unrolled.stages) > len(trace.unroll(net, adders_a_stage=4).stages)
    assert about["interval"] == 1
    assert about["adder_bits"] > 0
    assert about["register_bits"] >= net.input.size * net.input.bits


def test_other_layers_are_refused_by_name() -> None:
    for seed in range(20):
        net = random_net(seed)
        if net.layers[0].kind != "dense":
            with pytest.raises(UnsupportedOpError, match=rf"{net.layers[0].kind} '.*' cannot be unrolled.*mac-array"):
                trace.check(net)
            return
    raise AssertionError("no random network begins with another layer")


def test_serial_port_carries_inferences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes over a line of 5 cycles a bit, there and back, around the module that a board gets."""
    tool = simulator("icarus")
    monkeypatch.setattr(simulators, "STUCK_CYCLES", 20_000)
    net = dense_net((3, 4, 2), 6, 5)
    write.write(trace.unroll(net), tmp_path)
    about = json.loads((tmp_path / "design.json").read_text(encoding="utf-8"))
    board = Board("test", "A1", 5_000_000, "A2", "A3", 1_000_000, "LVCMOS33")
    part = Part("test", "ecp5", "25k", "CABGA381", "6", 1, 1, 1, 1, 18, board)
    for name in implement.PIN_FILES:
        text = resources.files("edgekit.backends.fpga").joinpath("pins", name).read_text("utf-8")
        (tmp_path / name).write_text(f"`define DESIGN {about['top']}\n" + text, encoding="utf-8")
    parameters = implement.pin_parameters(about, part)
    link = (Path(__file__).parent / "data" / "serial_link.v").read_text("utf-8")
    settings = ", ".join(f".{k}({v})" for k, v in parameters.items())
    (tmp_path / "serial_link.v").write_text(
        link.replace("SETTINGS", settings).replace("OUT_BYTES_HERE", str(parameters["OUT_BYTES"])), encoding="utf-8"
    )
    link_about = {
        **about,
        "top": "serial_link",
        "verilog": [*about["verilog"], *implement.PIN_FILES, "serial_link.v"],
        "activation_bits": 8,
        "word_bits": 8,
        "q": 1,
        "input_pixel_words": parameters["IN_BYTES"],
        "input_words": parameters["IN_BYTES"],
        "output_pixel_words": parameters["OUT_BYTES"],
        "output_words": parameters["OUT_BYTES"],
        "input_shape": [parameters["IN_BYTES"]],
        "output_shape": [parameters["OUT_BYTES"]],
    }
    (tmp_path / "design.json").write_text(json.dumps(link_about), encoding="utf-8")
    x = samples(net, 12, 5)
    words = simulate.packed(x, about).view(np.uint8)[:, : parameters["IN_BYTES"]].view(np.int8)
    got = simulate.simulate(tmp_path, words, tool, cache=tmp_path / "cache").outputs
    expected = interpreter.outputs(net, x)
    bits = about["activation_bits"]
    raw = np.unpackbits(got.view(np.uint8), axis=1, bitorder="little")[:, : expected.shape[1] * bits]
    values = (raw.reshape(len(x), -1, bits).astype(np.int64) << np.arange(bits)).sum(axis=2)
    np.testing.assert_array_equal(np.where(values >> (bits - 1), values - (1 << bits), values), expected)


def test_da4ml_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from edgekit.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "da4ml", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[fpga\]'"):
        trace.unroll(dense_net((3, 2), 4, 1))
