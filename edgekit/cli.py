"""The command line: each command parses, calls one function of the pipeline, and prints.

Nothing heavier than click is imported here; `edgekit --help` stays fast.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit import __version__
from edgekit.errors import EdgekitError, RegressionError

if TYPE_CHECKING:
    from edgekit.preprocessing import Preprocessing
    from edgekit.target import CandidateSpec

INTERRUPTED = 130
BUG = 3


class _Group(click.Group):
    """Turns expected failures into one line and their exit code, and bugs into a log to paste."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgekitError as error:
            _fail(str(error), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _fail("interrupted — what was finished is kept; run the same command again to go on", INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except MemoryError:
            _fail("out of memory — use fewer samples or a smaller model", BUG)
        except Exception as error:
            _fail(f"bug in edgekit: {type(error).__name__}: {_one_line(error)} — please report it with {_log()}", BUG)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _log() -> str:
    """Write the traceback to a file and return its path."""
    import platform
    import tempfile
    import traceback

    fd, path = tempfile.mkstemp(prefix="edgekit-", suffix=".log")
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(f"edgekit {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
        file.write("command: " + " ".join(sys.argv) + "\n\n" + traceback.format_exc())
    return path


def _emit(document: Any) -> None:
    click.echo(json.dumps(document, indent=1, allow_nan=False))


def _shapes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """`input=1,96,96,3`, once per input; `?` or -1 leaves a size open."""
    out = {}
    for value in values:
        name, equals, sizes = value.rpartition("=")
        try:
            out[name] = tuple(-1 if s.strip() in ("?", "-1", "batch") else int(s) for s in sizes.split(","))
        except ValueError:
            equals = ""
        if not equals or not name or any(size < 1 and size != -1 for size in out[name]):
            raise click.BadParameter(f"'{value}': give NAME=SIZE,SIZE,..., for example input=1,96,96,3, sizes from 1")
    return out


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """`60`, `60s` or `2m`."""
    if value is None:
        return None
    unit = {"s": 1, "m": 60}.get(value[-1:], 0)
    try:
        seconds = float(value[:-1] if unit else value) * (unit or 1)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise click.BadParameter(f"'{value}': give seconds or minutes, for example 60s or 2m")
    return seconds


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_preprocessing_options = _options(
    click.option("--preprocessing", type=click.Path(path_type=Path), help="TOML with the options below."),
    click.option("--resize", metavar="HxW", help="Resize images to this size."),
    click.option("--crop", metavar="HxW", help="Crop the centre of images."),
    click.option("--scale", metavar="X", help="Multiply by X, for example 1/255."),
    click.option("--mean", metavar="M,..", help="Subtract, per channel, after scaling."),
    click.option("--std", metavar="S,..", help="Divide by, per channel, after scaling."),
    click.option("--channel-order", type=click.Choice(["RGB", "BGR"]), help="What the model wants."),
    click.option("--layout", type=click.Choice(["NHWC", "NCHW"]), help="What the model wants."),
)
_data_options = _options(
    click.option("--label-column", metavar="NAME", help="Label column of a .csv or .parquet file."),
    click.option("--labels", type=click.Path(path_type=Path), help="File with the labels, or the classes' names."),
    _preprocessing_options,
)
_model_options = _options(
    click.option(
        "--shape", "shapes", multiple=True, callback=_shapes, metavar="NAME=1,96,96,3", help="Size of an input."
    ),
    click.option("--trust", is_flag=True, help="Allow code inside a Keras file (Lambda layers) to run."),
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_targets_option = click.option(
    "--targets", "targets_dir", type=click.Path(path_type=Path), help="Folder of own profiles."
)
_PREPROCESSING_FLAGS = ("resize", "crop", "scale", "mean", "std", "channel_order", "layout")


def _data_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Take the data options out of a command's arguments and turn them into what open_dataset wants."""
    flags = {k: given.pop(k) for k in _PREPROCESSING_FLAGS}
    given["preprocessing"] = _preprocessing(given.pop("preprocessing"), flags, given["data"])
    return given


def _preprocessing(path: Path | None, flags: dict[str, Any], data: str | None) -> Preprocessing | None:
    """The file named, or the one beside the data, with the flags on top; None where nothing was said."""
    chosen = {k: v for k, v in flags.items() if v is not None}
    if path is None and not chosen:
        return None
    from edgekit.dataset import declared_preprocessing
    from edgekit.preprocessing import Preprocessing

    if path is not None:
        return Preprocessing.from_toml(path).merge(**chosen)
    return (declared_preprocessing(data) if data is not None else Preprocessing()).merge(**chosen)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgekit")
def main() -> None:
    """Take a trained Keras or ONNX model to a device: compress, convert, verify, measure, ship."""


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-t", "--target", "targets", multiple=True, default=("cpu",), show_default=True, help="Device profile.")
@click.option("--data", help="Calibration data: .npz, .npy, image folder, .csv, .parquet or module:function.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("build"), show_default=True)
@click.option("--precision", "precisions", multiple=True, help="Only these (float32 is kept as the baseline).")
@click.option("--samples", type=click.IntRange(1), default=256, show_default=True, help="Calibration samples.")
@click.option(
    "--quantize",
    "calibration",
    type=click.Choice(["auto", "output", "minmax", "average", "percentile", "mse", "kl"]),
    default="auto",
    show_default=True,
    help="auto tries methods and keeps what loses least; or one way to choose ranges.",
)
@click.option("--search-time", callback=_seconds, metavar="60s", help="Try nothing further after this time.")
@click.option(
    "--max-accuracy-drop",
    type=click.FloatRange(0, 1),
    metavar="X",
    help="Leave layers in float until int8 loses at most X (0.005: half a point).",
)
@click.option("--plan", type=click.Path(path_type=Path), metavar="plan.toml", help="Quantize as this file says.")
@click.option(
    "--prune",
    metavar="SHARE",
    help="Remove channels until this share of the multiply-accumulates is left (0.5); or parameters=0.5, auto (as much "
    "as --max-accuracy-drop allows), zeros (channels that are zero already), a pruning.toml; or weights=0.5, 2:4: "
    "zeros among the weights.",
)
@click.option("--prune-latency", metavar="2x", help="Remove channels until the first target is so much faster.")
@click.option(
    "--distill",
    callback=_seconds,
    metavar="5m",
    help="After pruning, the model as it came teaches the smaller one for so long; no labels. Needs edgekit[keras].",
)
@click.option("--emit-keras", is_flag=True, help="Write the pruned model as pruned.keras too, to train it further.")
@click.option("--weight-bits", type=click.Choice(["auto", "7", "8"]), default="auto", show_default=True)
@click.option(
    "--io",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="int8: a .tflite whose inputs and outputs are integers.",
)
@click.option(
    "--input-layout",
    type=click.Choice(["keep", "NHWC", "NCHW"]),
    default="keep",
    show_default=True,
    help="Axis order of image inputs.",
)
@click.option("--keep-float", multiple=True, metavar="NODE", help="Leave this node in float.")
@click.option("--random-calibration", is_flag=True, help="Calibrate on random inputs; every report says so.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@_model_options
@_data_options
@_targets_option
@_json_option
def convert(as_json: bool, **given: Any) -> None:
    """Convert MODEL for one or more targets and prove every artifact against the original."""
    from edgekit import pipeline
    from edgekit.report.progress import progress_bar

    with progress_bar(enabled=True) as progress:
        result = pipeline.convert(given.pop("model"), progress=progress, **_data_arguments(given))
    if as_json:
        return _emit(result)
    from edgekit.report.terminal import print_convert

    print_convert(result)


@main.command()
@click.argument("build", type=click.Path(path_type=Path))
@click.option("-t", "--target", "targets", multiple=True, help="Only these targets of the build.")
@click.option(
    "--with",
    "beside",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.tflite",
    help="Measure this file in the same run, for comparison.",
)
@click.option("--data", help="Test data, with labels if you have them.")
@click.option("--samples", type=click.IntRange(1), help="Use at most this many samples (a seeded choice).")
@click.option("--quick", is_flag=True, help="Fewer runs; every number is marked so.")
@click.option("--threads", "threads", multiple=True, metavar="N|all", help="Thread counts instead of the profile's.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples per timed inference.")
@click.option("--profile", is_flag=True, help="Time per layer, where the runtime gives it.")
@click.option("--max-accuracy-drop", type=click.FloatRange(0, 1), default=0.01, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--host", "hosts", multiple=True, metavar="USER@NAME", help="Measure on this device; several: at the same time."
)
@click.option("--ssh-config", type=click.Path(path_type=Path), help="An ssh configuration instead of your own.")
@_data_options
@_targets_option
@_json_option
def bench(as_json: bool, **given: Any) -> None:
    """Measure every candidate of BUILD side by side and say which one to ship; or measure a .tflite file."""
    from edgekit import pipeline
    from edgekit.report.progress import progress_bar

    with progress_bar(enabled=True) as progress:
        document = pipeline.bench(given.pop("build"), progress=progress, **_data_arguments(given))
    if as_json:
        _emit(document)
    else:
        from edgekit.report.terminal import print_document

        print_document(document)
    if document.get("failed"):
        sys.exit(document["failed"][0]["exit_code"])


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="NAME=FILE...")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .tflite to write."
)
@_json_option
def join(files: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Make one .tflite of several, each (a .tflite or an artifact folder) under a signature NAME."""
    from edgekit.errors import UsageError
    from edgekit.join import join as joined

    named: dict[str, Path] = {}
    for text in files:
        name, separator, path = text.partition("=")
        if not separator or not name or not path or name in named:
            raise UsageError(f"'{text}' is no new NAME=FILE", "give each file a name of its own: encode=a.tflite")
        named[name] = Path(path)
    document = joined(named, out)
    if as_json:
        return _emit(document)
    click.echo(
        f"{out}: {', '.join(document['signatures'])}; {document['size_bytes']:,} bytes, "
        f"{document['apart_bytes']:,} apart; each gives the same bits as its file"
    )


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--data", help="Test data, with labels if you have them.")
@click.option("--samples", type=click.IntRange(1), help="Use at most this many samples (a seeded choice).")
@click.option("--max-accuracy-drop", type=click.FloatRange(0, 1), help="Fail if B loses more than this.")
@click.option(
    "--max-slowdown",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="Fail if B takes more than R × A's time.",
)
@click.option("--quick", is_flag=True, help="Fewer runs; every number is marked so.")
@click.option("--threads", "threads", multiple=True, default=("1",), show_default=True, metavar="N|all")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@_data_options
@_json_option
def compare(as_json: bool, **given: Any) -> None:
    """Compare B with A, each a .tflite or an artifact folder; exit code 1 where B exceeds a limit."""
    from edgekit import pipeline
    from edgekit.report.progress import progress_bar

    with progress_bar(enabled=True) as progress:
        document = pipeline.compare(given.pop("a"), given.pop("b"), progress=progress, **_data_arguments(given))
    if as_json:
        _emit(document)
    else:
        from edgekit.report.terminal import print_comparison

        print_comparison(document)
    if document["regressions"]:
        raise RegressionError("; ".join(document["regressions"]), "keep A, or raise the limit")


@main.command()
@click.argument("build", type=click.Path(path_type=Path))
@click.option("-t", "--target", help="Which target of the build.")
@click.option("--input", "files", multiple=True, metavar="FILE", help="An image, .csv, .npz, .npy or .txt.")
@click.option("--stdin", is_flag=True, help="Answer line by line: paths, rows of numbers, or text; stays loaded.")
@click.option("--candidate", metavar="ID", help="This artifact instead of the best measured.")
@click.option("--host", metavar="user@name", help="Run what is deployed on this device.")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="An ssh configuration instead of yours.")
@click.option("--name", help="What it is called on the device, if not as the model.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to show.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the runtime, here.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE.npz", help="Save the outputs.")
@click.option("--labels", type=click.Path(path_type=Path), help="Names of the classes, one a line, or a .json list.")
@_preprocessing_options
@_json_option
def run(build: Path, stdin: bool, host: str | None, ssh_config: Path | None, **given: Any) -> None:
    """Answer inputs with an artifact of BUILD (or a bundle, or a .tflite), here or on a device."""
    from edgekit import running

    given["preprocessing"], given["declared"] = {k: given.pop(k) for k in _PREPROCESSING_FLAGS}, given["preprocessing"]
    with running.reached(host, ssh_config) as device:
        running.answers(
            build,
            stream=sys.stdin.buffer if stdin else None,
            say=lambda text: click.echo(text.encode("utf-8", "backslashreplace")),
            remark=lambda text: click.secho(text, dim=True, err=True),
            host=device,
            **given,
        )


@main.command()
@click.argument("build", type=click.Path(path_type=Path), required=False)
@click.option("-t", "--target", help="Which target of the build (not needed if it has one).")
@click.option(
    "--host", "hosts", multiple=True, metavar="USER@NAME", help="The device, as ssh calls it; several go too."
)
@click.option("--candidate", metavar="ID", help="This one, such as tflite-int8, instead of the best that was measured.")
@click.option("--name", help="What it is called on the device. Default: the model's file name.")
@click.option("--keep", type=click.IntRange(0), default=2, show_default=True, help="Versions to keep for --rollback.")
@click.option("--rollback", is_flag=True, help="Put the version before this one in use again.")
@click.option("--remove", is_flag=True, help="Take it off the device.")
@click.option("--list", "listing", is_flag=True, help="Show what the device is and what is installed there.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="FILE.tar",
    help="Only write the bundle: a .tar, or a folder. BUILD may also be one that was written before.",
)
@click.option(
    "--bundle-wheels/--online",
    "wheels",
    default=True,
    show_default=True,
    help="Bring the runtime's wheels along, or let the device fetch them with pip.",
)
@click.option("--service", is_flag=True, help="Bring a systemd user unit along.")
@click.option("--sign", type=click.Path(path_type=Path), metavar="KEY", help="Sign the bundle with this ssh key.")
@click.option("--verify", type=click.Path(path_type=Path), metavar="KEY.pub", help="Only a bundle signed by this key.")
@click.option("--data", help="Samples for the self-test on the device; without, seeded ones.")
@click.option("--device-python", metavar="3.11", help="With --bundle and no device to ask: the Python there.")
@click.option("--folder", metavar="DIR", help="Where to put it on the device, instead of ~/.local/share/edgekit.")
@click.option("--python", default="python3", show_default=True, help="The device's Python.")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="Instead of ~/.ssh/config.")
@click.option("--ignore-clock", is_flag=True, help="Deploy though the device's clock is wrong.")
@_targets_option
@_json_option
def deploy(as_json: bool, **given: Any) -> None:
    """Install an artifact of BUILD on a device, test it there and put it in use."""
    from edgekit.deploy import shipping
    from edgekit.report.progress import progress_bar

    with progress_bar(enabled=True) as progress:
        document = shipping.command(progress=progress, **given)
    if as_json:
        _emit(document)
    else:
        from edgekit.report.devices import print_deployed

        print_deployed(document)
    failed = [row["exit_code"] for row in document["hosts"] if row["status"] == "failed"]
    if failed:
        sys.exit(failed[0])


@main.command()
@click.argument("build", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write here instead of to the terminal.")
@click.option(
    "--format", "kind", type=click.Choice(["text", "md", "json"]), help="Default: by the file's name, else text."
)
def report(build: Path, out: Path | None, kind: str | None) -> None:
    """Show what was measured in BUILD."""
    from edgekit import pipeline

    text = pipeline.report(build, out=out, kind=kind)
    click.echo(str(out) if out else text, nl=bool(out))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="One line per layer.")
@click.option("--quantization", is_flag=True, help="MODEL is a build: which layers its int8 error comes from, and why.")
@click.option("--pruning", is_flag=True, help="Which channels could go, and what that would cost (needs --data).")
@click.option("--data", help="With --pruning: samples, labelled or not.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="pruning.toml", help="With --pruning: write a plan."
)
@_model_options
@_data_options
@_json_option
def inspect(model: Path, layers: bool, quantization: bool, pruning: bool, as_json: bool, **given: Any) -> None:
    """Signature, operators, parameters, MACs, memory of MODEL, and which backends can take it."""
    from edgekit import pipeline

    given = _data_arguments(given)
    shapes, trust = given.pop("shapes"), given.pop("trust")
    if pruning:
        return _inspect_pruning(model, shapes, trust, as_json, given)

    if quantization:
        from edgekit.inspection_quantization import inspect as examine
        from edgekit.report.terminal import print_quantization

        told = examine(model)
        return _emit(told) if as_json else print_quantization(told, layers=layers)
    document = pipeline.inspect(model, shapes=shapes, trust=trust)
    if as_json:
        return _emit(document)
    from edgekit.report.terminal import print_inspection

    print_inspection(document, layers=layers)


def _inspect_pruning(
    model: Path, shapes: dict[str, tuple[int, ...]], trust: bool, as_json: bool, given: dict[str, Any]
) -> None:
    from edgekit.arguments import open_data
    from edgekit.inspection_pruning import inspect as examine
    from edgekit.report.progress import progress_bar
    from edgekit.report.terminal import print_pruning

    data = open_data(given["data"], given["preprocessing"], given["label_column"], given["labels"])
    with progress_bar(enabled=True) as progress:
        told = examine(model, data, shapes=shapes, trust=trust, out=given["out"], progress=progress)
    return _emit(told) if as_json else print_pruning(told)


@main.command()
@_targets_option
@_json_option
def targets(targets_dir: Path | None, as_json: bool) -> None:
    """List the device profiles."""
    from edgekit.target import read_target, target_files

    known = [read_target(path) for _, path in sorted(target_files(targets_dir).items())]
    if as_json:
        rows = [
            {
                "name": t.name,
                "description": t.description,
                "candidates": [c.id for c in t.candidates],
                "path": str(t.path),
            }
            for t in known
        ]
        return _emit({"schema": 1, "targets": rows})
    width = max(len(t.name) for t in known)
    for t in known:
        names = [c.id + _made_when(c) for c in t.candidates]
        click.echo(f"{t.name:<{width}} {t.description}\n{'':<{width}} " + ", ".join(names))


def _made_when(candidate: CandidateSpec) -> str:
    """What a candidate that is not always made waits for."""
    if candidate.on_request:
        return f" (with --precision {candidate.precision})"
    return " (of transformers and recurrent models)" if candidate.for_models == "products" else ""


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """What is installed, what this CPU can do, what is missing and how to get it."""
    from edgekit.doctor import examine

    document = examine()
    if as_json:
        return _emit(document)
    from edgekit.report.terminal import print_doctor

    print_doctor(document)


@main.command()
@click.option("--model", type=click.Choice(["mlp", "cnn"]), default="mlp", show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("edgekit-demo"), show_default=True)
@click.option("--quick/--full", default=True, show_default=True, help="Fewer runs, or the full protocol.")
@_json_option
def demo(model: str, out: Path, quick: bool, as_json: bool) -> None:
    """Convert, verify and measure a small real model that ships with edgekit."""
    from edgekit.demo import run_demo
    from edgekit.report.progress import progress_bar

    with progress_bar(enabled=True) as progress:
        document = run_demo(model, out, quick=quick, progress=progress)
    if as_json:
        return _emit(document)
    from edgekit.report.terminal import print_document

    print_document(document)
