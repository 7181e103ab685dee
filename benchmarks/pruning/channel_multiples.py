"""Which numbers of channels kernels like: the time of stacks of convolutions, by channel count.

    python benchmarks/pruning/channel_multiples.py [--seconds 0.3] [--out channel_multiples.md]

Each stack is equal convolutions of n channels with ReLU between a 1x1 convolution from 3 channels and a global average,
at 14x14. All counts of one kind, precision and runtime take turns. The conclusion is what `channel_multiple` in a
target's profile is for: counts that pruning should leave, since with others a model is slower than with more channels.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir as ir
from turns import RUNTIMES, machine_words, quantized, rounds

from edgekit import backends
from edgekit.inspection import inspect

COUNTS = (48, *range(56, 73), 80)
MULTIPLES = (16, 8, 4, 2, 1)
SIZE = 14  # of the middle of a network at 224, and near the start of one at 96
KINDS = {"1x1": (1, False, 6), "3x3": (3, False, 2), "depthwise 3x3": (3, True, 6)}  # kernel, depthwise, layers
FREE = 1.05  # times as slow: what counts as no slower; such short runs scatter by about as much
SEED = 0


def stack(kind: str, channels: int) -> ir.Model:
    """NCHW, batch 1, weights from a normal distribution scaled so that nothing grows or vanishes."""
    kernel, depthwise, layers = KINDS[kind]
    rng = np.random.default_rng(SEED)
    helper = onnx.helper
    nodes, constants = [], []

    def conv(name: str, source: str, inputs: int, size: int, groups: int) -> str:
        weight = rng.standard_normal((channels, inputs, size, size)) * np.sqrt(2 / (inputs * size * size))
        bias = np.zeros(channels, np.float32)
        constants.append(onnx.numpy_helper.from_array(weight.astype(np.float32), f"{name}/weight"))
        constants.append(onnx.numpy_helper.from_array(bias, f"{name}/bias"))
        pads = [size // 2] * 4
        nodes.append(
            helper.make_node(
                "Conv", [source, f"{name}/weight", f"{name}/bias"], [f"{name}/sum"], name, group=groups, pads=pads,
                kernel_shape=[size, size],
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"{name}/sum"], [name], f"{name}/relu"))
        return name

    at = conv("first", "x", 3, 1, 1)
    for index in range(layers):
        at = conv(f"layer{index}", at, 1 if depthwise else channels, kernel, channels if depthwise else 1)
    nodes.append(helper.make_node("GlobalAveragePool", [at], ["y"], "pool"))
    values = [("x", [1, 3, SIZE, SIZE]), ("y", [1, channels, 1, 1])]
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values]
    graph = helper.make_graph(nodes, "stack", infos[:1], infos[1:], constants)
    opset = [helper.make_opsetid("", 21)]
    return ir.from_proto(
        onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opset, ir_version=10))
    )


def times_of(kind: str, precision: str, runtime: str, seconds: float) -> tuple[dict[int, float], dict[int, float]]:
    """Channel count -> (microseconds, the same per million multiply-accumulates); medians."""
    floats = {n: stack(kind, n) for n in COUNTS}
    models = {str(n): (precision, m if precision == "float32" else quantized(m, SEED)) for n, m in floats.items()}
    found = rounds(models, runtime, seconds, SEED)
    macs = {n: inspect(m, backends_too=False)["macs"] for n, m in floats.items()}
    times = {n: float(np.median(np.concatenate(found[str(n)]))) / 1e3 for n in COUNTS}
    return times, {n: 1e6 * times[n] / macs[n] for n in COUNTS}


def multiple_of(count: int) -> int:
    return next(m for m in MULTIPLES if count % m == 0)


def by_multiple(ratios: dict[int, float]) -> dict[int, float]:
    """Largest multiple that a count is of -> median ratio."""
    return {m: float(np.median([r for n, r in ratios.items() if multiple_of(n) == m])) for m in MULTIPLES}


def over_rounded_up(times: dict[int, float]) -> dict[int, float]:
    """Time of each count over that of the next multiple of 16, which has more channels: over 1 is absurd."""
    return {n: times[n] / times[-(-n // MULTIPLES[0]) * MULTIPLES[0]] for n in times}


def over_smooth(times: dict[int, float]) -> dict[int, float]:
    """Time of each count over the parabola through multiples of 16: fixed costs, by channel, by pair of channels."""
    anchors = [n for n in times if n % MULTIPLES[0] == 0]
    curve = np.polyfit(anchors, [times[n] for n in anchors], 2)
    return {n: times[n] / float(np.polyval(curve, n)) for n in times}


def least_free(relative: dict[int, float]) -> int:
    """The smallest multiple that, like all larger ones, is no slower than rounding up."""
    best = MULTIPLES[0]
    for multiple in MULTIPLES:
        if relative[multiple] > FREE:
            break
        best = multiple
    return best


def page(rows: list[tuple[str, dict[int, float], dict[int, float]]]) -> list[str]:
    """rows: (runtime | precision | layers, microseconds by count, the same per million multiply-accumulates)."""
    head = f"| runtime | precision | layers | {' | '.join(str(m) if m > 1 else 'odd' for m in MULTIPLES)} |"
    rule = "|---|---|---|" + "--:|" * len(MULTIPLES)
    lines = [
        "By the largest multiple that a count is of (56 to 72), the time over that of the next multiple of 16, median.",
        "",
    ]
    lines += [f"{head} no slower |", f"{rule}--:|"]
    for name, times, _ in rows:
        found = by_multiple(over_rounded_up(times))
        lines.append(f"| {name} | {' | '.join(f'{found[m]:.2f}' for m in MULTIPLES)} | {least_free(found)} |")
    lines += [
        "",
        "The same over what the count would take if no count were special: the parabola through",
        "48, 64 and 80.",
        "",
        head,
        rule,
    ]
    for name, times, _ in rows:
        found = by_multiple(over_smooth(times))
        lines.append(f"| {name} | {' | '.join(f'{found[m]:.2f}' for m in MULTIPLES)} |")
    lines += ["", "Microseconds per million multiply-accumulates, by count.", ""]
    lines += [
        f"| runtime | precision | layers | {' | '.join(map(str, COUNTS))} |",
        "|---|---|---|" + "--:|" * len(COUNTS),
    ]
    lines += [f"| {name} | {' | '.join(f'{per_mac[n]:.0f}' for n in COUNTS)} |" for name, _, per_mac in rows]
    return lines


def conclusion(rows: list[tuple[str, dict[int, float], dict[int, float]]]) -> str:
    wanted: dict[str, int] = {}
    for name, times, _ in rows:
        runtime, precision, _ = name.split(" | ")
        key = f"{runtime} {precision}"
        wanted[key] = max(wanted.get(key, 1), least_free(by_multiple(over_rounded_up(times))))
    told = ", ".join(f"{name} {multiple}" for name, multiple in wanted.items())
    return f"No layer slower than with more channels (by over {100 * (FREE - 1):.0f} %) at multiples of: {told}."


@click.command()
@click.option("--seconds", default=0.3, show_default=True, help="Of each model.")
@click.option("--kinds", default=";".join(KINDS), show_default=True, help="Separated by semicolons.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the page here.")
def main(seconds: float, kinds: str, out: Path | None) -> None:
    rows = []
    for runtime in RUNTIMES:
        if backends.get(runtime).missing():
            continue
        for precision in ("float32", "int8"):
            for kind in kinds.split(";"):
                rows.append((f"{runtime} | {precision} | {kind}", *times_of(kind, precision, runtime, seconds)))
                print(
                    rows[-1][0],
                    {m: round(r, 2) for m, r in by_multiple(over_rounded_up(rows[-1][1])).items()},
                    flush=True,
                )
    head = [
        "# Which numbers of channels kernels like",
        "",
        "`python benchmarks/pruning/channel_multiples.py` writes this.",
    ]
    head += ["", f"{date.today().isoformat()}, {machine_words()}, one thread.", "", conclusion(rows), ""]
    print(conclusion(rows))
    if out is not None:
        out.write_text("\n".join([*head, *page(rows), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
