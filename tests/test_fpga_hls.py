"""The HLS project's C simulation against the interpreter, on random networks of every kind of layer."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgekit.backends.fpga import interpreter
from edgekit.backends.fpga.hls import write
from edgekit.errors import MissingExtraError, ShapeError, ToolError
from tests.fpga_dense import dense_net
from tests.fpga_nets import KINDS, integers, random_net

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
SEEDS = range(12)


@compiler
@pytest.mark.parametrize("seed", SEEDS)
def test_c_simulation_equals_the_interpreter(seed: int, tmp_path: Path) -> None:
    net = random_net(seed)
    x = integers(net, 8, seed)
    write.write(net, tmp_path)
    got = write.simulate(tmp_path, net, x)
    np.testing.assert_array_equal(got, interpreter.outputs(net, x))


def exact_integers() -> Path | None:
    """The folder of ap_int.h: of da4ml, or of Vitis HLS."""
    spec = find_spec("da4ml")
    roots = [Path(spec.origin).parent / "codegen/hls/source/ap_types/include"] if spec and spec.origin else []
    roots += [Path(os.environ["XILINX_HLS"]) / "include"] if "XILINX_HLS" in os.environ else []
    return next((root for root in roots if (root / "ap_int.h").is_file()), None)


@compiler
@pytest.mark.skipif(exact_integers() is None, reason="no ap_int.h: neither da4ml nor Vitis HLS is installed")
@pytest.mark.parametrize("seed", range(4))
def test_integers_of_exactly_the_declared_bits_give_the_same(seed: int, tmp_path: Path) -> None:
    net = random_net(seed)
    x = integers(net, 8, seed)
    write.write(net, tmp_path)
    got = write.simulate(tmp_path, net, x, ap_types=exact_integers())
    np.testing.assert_array_equal(got, interpreter.outputs(net, x))


def test_the_seeds_have_every_kind_of_layer() -> None:
    assert {layer.kind for seed in SEEDS for layer in random_net(seed).layers} == set(KINDS)


@compiler
def test_names_of_a_model_cannot_end_a_comment(tmp_path: Path) -> None:
    from dataclasses import replace

    net = dense_net((3, 2), 4, 1)
    net = replace(net, layers=(replace(net.layers[0], name="a\n#error no\\"),))
    write.write(net, tmp_path)
    x = np.array([[1, -2, 3]], np.int8)
    np.testing.assert_array_equal(write.simulate(tmp_path, net, x), interpreter.outputs(net, x))


@compiler
def test_a_compiler_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    net = dense_net((3, 2), 4, 1)
    write.write(net, tmp_path)
    (tmp_path / "network.cpp").write_text("#error broken\n", encoding="utf-8")
    with pytest.raises(ToolError, match=r"g\+\+ failed: .*broken.* — its log is .*simulation\.log"):
        write.simulate(tmp_path, net, np.zeros((1, 3), np.int8))


def test_other_inputs_and_a_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = dense_net((3, 2), 4, 1)
    with pytest.raises(ShapeError, match=r"the network takes integers \(3,\)"):
        write.simulate(tmp_path, net, np.zeros((1, 4), np.int8))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"no C\+\+ compiler"):
        write.simulate(tmp_path, net, np.zeros((1, 3), np.int8))
