"""Writes a project for Vitis HLS from an integer network, and runs its C simulation with a C++ compiler.

hls4ml takes no quantized ONNX and needs TensorFlow; the layers here are few, and with them the project is exact. What
Vitis HLS makes of it is not known before it has run: there are no figures of resources or time here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.backends.fpga.net import IntegerNet, Layer, Tensor
from edgekit.errors import MissingExtraError, ShapeError, ToolError

Array = np.ndarray[Any, Any]

TOP = "edgekit_network"
DEFAULT_DEVICE = "xc7a35ticsg324-1L"  # of the Arty A7-35T
DEFAULT_CLOCK_NS = 10.0
_BUILD_SECONDS = 600.0
_RUN_SECONDS = 3600.0
_VALUES_A_LINE = 32


def write(
    net: IntegerNet, folder: Path, device: str = DEFAULT_DEVICE, clock_ns: float = DEFAULT_CLOCK_NS
) -> tuple[Path, ...]:
    """layers.h, parameters.h (weights), network.cpp (the function to synthesize), simulation.cpp, run_hls.tcl."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = resources.files(__package__).joinpath("layers.h").read_text(encoding="utf-8")
    texts = {
        "layers.h": layers,
        "parameters.h": _parameters(net),
        "network.cpp": _network(net),
        "simulation.cpp": _SIMULATION.format(top=TOP, inputs=net.input.size, outputs=_target(net).size, **_types(net)),
        "run_hls.tcl": _SCRIPT.format(top=TOP, device=device, clock=clock_ns),
    }
    for name, text in texts.items():
        staged = folder / f".{name}.new"
        staged.write_text(text, encoding="utf-8")
        staged.replace(folder / name)
    return tuple(folder / name for name in texts)


def simulate(
    folder: Path, net: IntegerNet, x: Array, seconds: float = _RUN_SECONDS, ap_types: Path | None = None
) -> Array:
    """C simulation: integers (n, *input shape) -> int8 (n, *output shape). Leaves its log and its files in `folder`.

    ap_types: folder of ap_int.h (in Vitis HLS, include/; in da4ml, codegen/hls/source/ap_types/include): integers of
    exactly the declared bits, as they are synthesized; without, plain ones.
    Raises MissingExtraError without a C++ compiler, ToolError for a compiler or a simulation that fails.
    """
    if tuple(x.shape[1:]) != net.input.shape or not np.issubdtype(x.dtype, np.integer):
        raise ShapeError(f"input of shape {x.shape}, {x.dtype}; the network takes integers {net.input.shape}", "")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise MissingExtraError("no C++ compiler is installed", "apt install g++")
    widths = ["-DEDGEKIT_PLAIN"] if ap_types is None else ["-I", str(ap_types.resolve())]
    build = [compiler, "-std=c++14", "-O2", "-w", *widths]
    _call([*build, "-o", "simulation", "simulation.cpp", "network.cpp"], folder, _BUILD_SECONDS)
    np.savetxt(folder / "input.txt", x.reshape(len(x), -1), fmt="%d")
    _call([str((folder / "simulation").resolve())], folder, seconds)
    got = np.loadtxt(folder / "output.txt", dtype=np.int64, ndmin=2)
    return np.asarray(got.astype(np.int8).reshape(len(x), *_target(net).shape))


def _call(command: list[str], folder: Path, seconds: float) -> None:
    log = folder / "simulation.log"
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"the C simulation took longer than {seconds:.0f} s", "give it fewer samples") from error
    log.write_text(ran.stdout + ran.stderr, encoding="utf-8")
    if ran.returncode:
        told = next((line for line in ran.stderr.splitlines() if "error" in line), f"code {ran.returncode}")
        raise ToolError(f"{Path(command[0]).name} failed: {told[:300]}", f"its log is {log}")


# --- C++ -----------------------------------------------------------------------------------------------------
def _target(net: IntegerNet) -> Tensor:
    return net.tensors[net.output]


def _types(net: IntegerNet) -> dict[str, int]:
    return {"input_bits": net.input.bits, "output_bits": _target(net).bits}


def _parameters(net: IntegerNet) -> str:
    lines = [
        "// Weights, biases and shifts of each layer.",
        "#ifndef EDGEKIT_PARAMETERS_H",
        "#define EDGEKIT_PARAMETERS_H",
    ]
    lines.append('#include "layers.h"')
    for index, layer in enumerate(net.layers):
        if layer.weights is not None and layer.bias is not None:
            lines.append(f"\n// {_comment(layer.name)}")
            lines += _array(f"weights_{index}", layer.weight_bits, layer.weights.reshape(-1))
            lines += _array(f"bias_{index}", 33, layer.bias)
            lines += _array(f"shift_{index}", 7, np.array(layer.shift))
    return "\n".join([*lines, "\n#endif", ""])


def _array(name: str, bits: int, values: Array) -> Iterable[str]:
    yield f"static const integer<{bits}> {name}[{len(values)}] = {{"
    for at in range(0, len(values), _VALUES_A_LINE):
        yield "    " + ", ".join(str(int(v)) for v in values[at : at + _VALUES_A_LINE]) + ","
    yield "};"


def _comment(name: str) -> str:
    """A name from a model, harmless in a comment."""
    return "".join(c if c.isalnum() or c in "_-./: " else "_" for c in name)


def _network(net: IntegerNet) -> str:
    places = {net.input.name: "input"}
    lines = ['#include "parameters.h"', ""]
    types = _types(net)
    lines.append(
        f"void {TOP}(const integer<{types['input_bits']}> input[{net.input.size}], "
        f"integer<{types['output_bits']}> output[{_target(net).size}]) {{"
    )
    for index, layer in enumerate(net.layers):
        tensor = net.tensors[layer.output]
        places[layer.output] = "output" if layer.output == net.output else f"map_{index}"
        if layer.output != net.output:
            lines.append(f"    static integer<{tensor.bits}> map_{index}[{tensor.size}];  // {_comment(layer.name)}")
        lines += [f"    {call}" for call in _calls(net, index, layer, places)]
    return "\n".join([*lines, "}", ""])


def _calls(net: IntegerNet, index: int, layer: Layer, places: dict[str, str]) -> Iterable[str]:
    (height, width, channels), target = net.tensors[layer.inputs[0]].hwc, net.tensors[layer.output]
    rows, columns, outputs = target.hwc
    given = [places[name] for name in layer.inputs]
    result = places[layer.output]
    limits = f"{layer.low}, {layer.high}"
    window = [*layer.kernel, *layer.strides, layer.pads[0], layer.pads[1]]
    shared = str(len(layer.shift) == 1).lower()
    parameters = f"{given[0]}, {result}, weights_{index}, bias_{index}, shift_{index}, {limits}"
    match layer.kind:
        case "conv":
            sizes = [height, width, channels, rows, columns, outputs, *window, shared]
            yield f"convolution<{_joined(sizes)}>({parameters});"
        case "dense":  # reads its input flat: one position
            sizes = [1, 1, net.tensors[layer.inputs[0]].size, 1, 1, outputs, 1, 1, 1, 1, 0, 0, shared]
            yield f"convolution<{_joined(sizes)}>({parameters});"
        case "depthwise":
            sizes = [height, width, channels, rows, columns, *window, shared]
            yield f"depthwise<{_joined(sizes)}>({parameters});"
        case "maxpool" | "avgpool":
            sizes = [height, width, channels, rows, columns, *window, str(layer.kind == "maxpool").lower()]
            yield f"pool<{_joined(sizes)}>({given[0]}, {result}, {layer.multiplier}, {layer.shift[0]}, {limits});"
        case "add":
            left, right = layer.input_shifts
            shifts = f"{left}, {right}, {layer.shift[0]}"
            yield f"addition<{target.size}>({given[0]}, {given[1]}, {result}, {shifts}, {limits});"
        case "concat":
            at = 0
            for name, place, shift in zip(layer.inputs, given, layer.shift, strict=True):
                own = net.tensors[name].hwc[2]
                yield f"placed<{_joined([rows * columns, own, outputs, at])}>({place}, {result}, {shift}, {limits});"
                at += own


def _joined(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


_SIMULATION = """// Reads inferences from input.txt, a line of integers each; writes results to output.txt.
#include <cstdio>
#include <fstream>
#include "layers.h"

void {top}(const integer<{input_bits}> input[{inputs}], integer<{output_bits}> output[{outputs}]);

int main() {{
    std::ifstream in("input.txt");
    std::ofstream out("output.txt");
    static integer<{input_bits}> input[{inputs}];
    static integer<{output_bits}> output[{outputs}];
    if (!in || !out) return 1;
    int value, index = 0;
    while (in >> value) {{
        input[index++] = value;
        if (index < {inputs}) continue;
        {top}(input, output);
        for (int i = 0; i < {outputs}; i++) out << (i ? " " : "") << int(output[i]);
        out << "\\n";
        index = 0;
    }}
    return index != 0;
}}
"""

_SCRIPT = """# vitis_hls -f run_hls.tcl
open_project -reset project
set_top {top}
add_files network.cpp
add_files -tb simulation.cpp
add_files -tb input.txt
open_solution -reset solution
set_part {{{device}}}
create_clock -period {clock}
csim_design
csynth_design
exit
"""
