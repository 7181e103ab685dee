"""What pruning gains in time: networks of keras.applications, cut to shares of their MACs, in turns with the whole.

    EDGEKIT_KERAS_PYTHON=PYTHON python benchmarks/pruning/speed.py [--networks A,B] [--seconds 3] [--out SPEED.md]

Their weights are random, and so are the samples: a model's time depends on its shapes, not on its weights, so they are
cut without repair. Which channels go is decided as for any model, by damage per multiply-accumulate; a trained network
gets other widths. Models are kept below --work. Exit 1 if a claim fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import click
import onnx_ir as ir
from turns import RUNTIMES, machine_words, quantized, rounds

from edgekit import backends, pipeline
from edgekit import model as M
from edgekit.bench.statistics import Ratio, ratio_of_medians
from edgekit.dataset import random_dataset
from edgekit.inspection import inspect
from edgekit.passes.fold import Fold
from edgekit.passes.prune_channels import PruneChannels
from edgekit.passes.surgery import cut

HERE = Path(__file__).parent
NETWORKS = ("MobileNetV2", "EfficientNetB0")
SIZE, SEED, SAMPLES = 96, 0, 64
FASTER = {0.5: 1.4, 0.3: 1.9}  # share of the multiply-accumulates -> times faster, at least
LEAST = 1.0  # never slower than the whole


def made(network: str, work: Path) -> dict[str, ir.Model]:
    """ "whole", a share such as "0.5", and "0.5, any count": the same without rounding to what kernels like."""
    names = ["whole", *(f"{share:g}" for share in FASTER), f"{max(FASTER):g}, any count"]
    files = {name: work / f"{network}-{name.replace(', ', '-').replace(' ', '-')}.onnx" for name in names}
    if not all(file.is_file() for file in files.values()):
        for name, model in pruned(network, work).items():
            M.save(model, files[name])
    return {name: ir.load(file) for name, file in files.items()}


def pruned(network: str, work: Path) -> dict[str, ir.Model]:
    source = work / f"{network}.keras"
    if not source.is_file():
        python = os.environ.get("EDGEKIT_KERAS_PYTHON", sys.executable)
        subprocess.run([python, str(HERE / "speed_keras.py"), str(work), str(SIZE), network], check=True)
    model = Fold()(pipeline.load(source).model, None)
    step = PruneChannels(seed=SEED)
    sig = M.signature(model)
    found = step.measured(model, random_dataset(sig, SAMPLES, SEED), random_dataset(sig, SAMPLES, SEED + 1))
    anyhow = [replace(c, widths=tuple(range(len(c.family.units), 0, -1))) for c in found.choices]
    out = {"whole": model}
    for name, source_of, share in (
        *((f"{share:g}", found, share) for share in FASTER),
        (f"{max(FASTER):g}, any count", replace(found, choices=anyhow), max(FASTER)),
    ):
        plan = replace(step, budget=share).decide(source_of)
        out[name] = cut(found.model, found.coupling, plan.kept(found.coupling))
    return out


def told(name: str, ratio: Ratio) -> str:
    """A claim's verdict: by the middle; "?" where the interval reaches the bound."""
    if "any count" in name:
        return ""
    bound = FASTER[float(name)]
    verdict = "holds" if ratio.value >= bound else "**fails**"
    return f"{verdict}{'?' if ratio.low < bound <= ratio.high else ''} (≥ {bound:g})"


@click.command()
@click.option("--networks", default=",".join(NETWORKS), show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Of each model in each runtime.")
@click.option("--work", default=HERE / ".work" / "speed", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Also write the page here.")
def main(networks: str, seconds: float, work: Path, out: Path | None) -> None:
    work.mkdir(parents=True, exist_ok=True)
    lines = [
        "# What pruning gains in time", "",
        "`python benchmarks/pruning/speed.py` writes this.", "",
        f"{date.today().isoformat()}, {machine_words()}, one thread, {SIZE}x{SIZE}; random weights, cut without",
        "repair, since time depends on shapes only.", "",
        "How many times faster than the whole float32 model in the same runtime, in turns, intervals of 95 %; int8",
        "also than the whole int8 model. **any count**: the same budget, channel counts not rounded to multiples.", "",
        "| network | runtime | precision | budget | MACs % | parameters % | times faster | than int8 | claim |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    failed, raw = 0, {}
    for network in networks.split(","):
        models = made(network, work)
        cost = {name: inspect(model, backends_too=False) for name, model in models.items()}
        int8 = {name: quantized(model, SEED) for name, model in models.items() if "any count" not in name}
        for runtime in RUNTIMES:
            if backends.get(runtime).missing():
                continue
            cases = {name: ("float32", model) for name, model in models.items()}
            cases |= {f"{name} int8": ("int8", model) for name, model in int8.items()}
            found = rounds(cases, runtime, seconds, SEED)
            for name in cases:
                plain = name.removesuffix(" int8")
                if name == "whole":
                    continue
                ratio = ratio_of_medians(found["whole"], found[name], SEED)
                raw[f"{network} {runtime} {name}"] = [ratio.value, ratio.low, ratio.high]
                shares = [100 * cost[plain][k] / cost["whole"][k] for k in ("macs", "parameters")]
                claim, beside = "", ""
                if name != plain:
                    against = ratio_of_medians(found["whole int8"], found[name], SEED)
                    beside = f"{against.value:.2f}" if plain != "whole" else "1"
                else:
                    claim = told(name, ratio)
                    failed += "fails" in claim or ("any" not in name and ratio.value < LEAST)
                precision = "float32" if name == plain else "int8"
                figures = [
                    f"{shares[0]:.1f}",
                    f"{shares[1]:.1f}",
                    f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                ]
                lines.append(
                    f"| {network} | {runtime} | {precision} | {plain} | {' | '.join(figures)} | {beside} | {claim} |"
                )
                print(lines[-1], flush=True)
    (work / "ratios.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    end = ["", f"{failed} claims fail." if failed else "All claims hold."]
    print("\n".join(end))
    if out is not None:
        out.write_text("\n".join([*lines, *end, ""]), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
