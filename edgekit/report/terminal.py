"""What commands print for a person, as rich tables."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgekit.report import comparison, summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPED_WIDTH = 140  # the whole table, when no terminal limits it
# Left out one after another in a terminal that is too narrow for the whole table.
_DISPENSABLE = ("load", "rss", "sqnr", "parity", "size", "delta", "agreement", "threads", "quality")
_UNLIMITED = 1000


def console() -> Console:
    """Standard output. Text is printed as it is: names of files and nodes may look like markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def print_document(document: summary.Document) -> None:
    render_terminal(document, console())


def render_text(document: summary.Document) -> str:
    """What the terminal shows, without colours; as wide as the terminal, or whole where there is none."""
    from rich.console import Console

    out = io.StringIO()
    render_terminal(document, Console(file=out, width=console().width, markup=False, highlight=False, emoji=False))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def render_terminal(document: summary.Document, out: Console) -> None:
    """Print a bench document: per target the verdict, the table and remarks; then warnings and the machine.

    Raises ArtifactError for a document of another schema.
    """
    summary.check(document)
    for target in summary.targets(document):
        for title, verdict in summary.verdicts(document, target):
            out.print(f"{title}: {verdict}.", style="bold")
        out.print(_bench_table(document, target, out))
        _list(out, summary.gains(document, target), "")
        _list(out, summary.remarks(document, target), "dim")
    _list(out, (f"warning: {w}" for w in summary.warnings(document)), "yellow")
    _list(out, summary.failed(document), "bold red")
    _measured_on(document, out)


def _measured_on(document: Mapping[str, Any], out: Console) -> None:
    machines = summary.measured_on(document)
    for line in machines[:-1]:
        out.print(f"measured on {line}", style="dim")
    out.print(f"measured on {machines[-1]}; test data: {summary.dataset(document)}", style="dim")


def _bench_table(document: summary.Document, target: str, out: Console) -> Table:
    """The widest table that fits."""
    headings = summary.headings(document, target)
    lines = summary.lines(document, target)
    for name in (*_DISPENSABLE, None):
        table = _table()
        for column, title in headings.items():
            table.add_column(title, justify="left" if column in ("candidate", "host") else "right", no_wrap=True)
        for line in lines:
            cells = [getattr(line, column) for column in headings]
            cells[0] = ("→ " if line.ships else "  ") + cells[0]
            table.add_row(*cells, style="bold green" if line.ships else None)
        if name is None or table.__rich_measure__(out, out.options.update(max_width=_UNLIMITED)).maximum <= out.width:
            break
        del headings[name]
    return table


def print_convert(result: Mapping[str, Any], out: Console | None = None) -> None:
    """What `convert` made: one line per candidate, then warnings and what to do next."""
    out = out or console()
    table = _table()
    for title in ("target", "candidate", "size", "parity", "", "path"):
        table.add_column(
            title, justify="right" if title == "size" else "left", no_wrap=title != "path", overflow="fold"
        )
    for row in result["artifacts"]:
        made = row["status"] != "not run"
        table.add_row(
            row["target"],
            row["candidate"],
            summary.size(row.get("size_bytes")),
            summary.parity(row.get("parity")),
            row["status"],
            row["path"] if made else row["why"],
            style=None if made else "dim",
        )
    out.print(table)
    whose: dict[str, list[str]] = {}
    for row in result["artifacts"]:
        failed = [f"NOT to be shipped: {r}" for r in (row.get("parity") or {}).get("reasons") or ()]
        for text in (*failed, *row.get("notes", ())):
            whose.setdefault(text, []).append(f"{row['target']}/{row['candidate']}")
    _list(out, (f"{', '.join(names)}: {text}" for text, names in whose.items()), "yellow")
    if "keras" in result:
        out.print(f"{result['keras']['path']}: standard Keras layers, to train further", soft_wrap=True)
    _list(out, (f"warning: {w}" for w in result.get("warnings", ())), "yellow")
    out.print(f"{result['build']}", soft_wrap=True)


def print_comparison(document: Mapping[str, Any], out: Console | None = None) -> None:
    """What `compare` found: the two side by side, then the differences."""
    out = out or console()
    table = _table()
    for column in ("", "A", "B", "B against A"):
        table.add_column(column, overflow="fold", justify="left" if not column else "right")
    for cells in comparison.lines(document):
        table.add_row(*cells)
    out.print(table)
    _list(out, comparison.remarks(document), "dim")
    _list(out, (f"warning: {w}" for w in summary.warnings(document)), "yellow")
    _list(out, (f"regression: {text}" for text in document["regressions"]), "bold red")
    _measured_on(document, out)


def print_inspection(document: Mapping[str, Any], *, layers: bool = False, out: Console | None = None) -> None:
    """What `inspect` found."""
    out = out or console()
    table = _table(header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for kind in ("inputs", "outputs"):
        for spec in document["signature"][kind]:
            sizes = ", ".join(str(s) for s in spec["shape"])
            table.add_row(kind[:-1], f"{spec['name']}: {spec['dtype']} ({sizes}){_scale(spec.get('quantization'))}")
    if document["opset"] is not None:
        table.add_row("opset", str(document["opset"]))
    versions = document.get("versions") or {}
    ops = ", ".join(_operator(op, count, versions.get(op)) for op, count in document["ops"].items())
    table.add_row("operators", f"{document['nodes']} nodes: {ops}")
    for title, text in _file_facts(document):
        table.add_row(title, text)
    table.add_row("parameters", f"{document['parameters']:,} ({summary.size(document['weight_bytes'])} with constants)")
    table.add_row("MACs", _count(document["macs"]) + " per sample")
    peak = summary.size(document["activation_peak_bytes"])
    where = f" at {_short(document['activation_peak_at'])}" if document["activation_peak_at"] else ""
    table.add_row("activations", f"{peak} at once for one sample{where}")
    for name, found in document["backends"].items():
        table.add_row(name, _takes(found))
    out.print(table)
    _list(out, (*document.get("notes", ()), *document["reasons"]), "yellow")
    if layers:
        out.print(_layer_table(document["layers"]))


def print_quantization(document: Mapping[str, Any], *, layers: bool = False, out: Console | None = None) -> None:
    """What `inspect --quantization` found; layers: all of them instead of the worst."""
    out = out or console()
    for plan in document["plans"]:
        out.print(f"{', '.join(plan['artifacts'])}: {plan['method']}; {plan['samples']} samples", style="bold")
        tried = _table()
        for title in ("tried", "SQNR dB", "agrees", "accuracy lost"):
            tried.add_column(title, justify="left" if title == "tried" else "right")
        for name, score in plan["tried"].items():
            agrees, drop = score.get("agreement"), score.get("accuracy_drop")
            cells = [f"{score['sqnr_db']:.1f}", _share(agrees), _share(drop)]
            tried.add_row(("→ " if name == plan["method"] else "  ") + name, *cells)
        out.print(tried)
        table = _table()
        for title in ("layer", "alone", "without", "cause"):
            table.add_column(title, justify="right" if title in ("alone", "without") else "left", overflow="fold")
        for row in plan["layers"] if layers else plan["layers"][:10]:
            name = f"{row['op']} {_short(row['node'])}"
            table.add_row(name, f"{row['alone']:.1%}", f"{row['without']:+.1%}", row["cause"])
        out.print(table)
        out.print(_arithmetic_table(plan["arithmetic"]))
        _list(out, plan["warnings"], "yellow")
    out.print(
        "Shares of the whole int8 error at the outputs: of a layer alone, and what vanishes when only it stays float.",
        style="dim",
    )


def print_pruning(document: Mapping[str, Any], out: Console | None = None) -> None:
    """What `inspect --pruning` found: accuracy against multiply-accumulates, and each family's sensitivity."""
    out = out or console()
    labelled = any(row["accuracy_drop"] is not None for row in document["curve"])
    curve = _table()
    titles = ("MACs kept", "parameters", "agrees", "SQNR dB", "accuracy lost" if labelled else "expected to lose")
    for title in titles:
        curve.add_column(title, justify="right")
    for row in document["curve"]:
        expected, drop = row["expected_points_lost"], row["accuracy_drop"]
        lost = _share(drop) if labelled else summary.NONE if expected is None else f"{expected:.1f} points"
        shares = (f"{row['macs_kept']:.0%}", f"{row['parameters_kept']:.0%}")
        curve.add_row(*shares, _share(row["agreement"]), f"{row['sqnr_db']:.1f}", lost)
    out.print(f"pruned, repaired and judged on {document['samples']['judge']} unseen samples", style="bold")
    out.print(curve)
    table = _table()
    for title in ("channels of", "units", "damage when so many go (one family at a time)", "kept at 50 % of the MACs"):
        table.add_column(title, justify="right" if title == "units" else "left", overflow="fold")
    for row in document["families"]:
        if row["frozen"]:
            table.add_row(_short(row["name"]), str(row["units"]), row["frozen"], summary.NONE, style="dim")
            continue
        damage = ", ".join(f"{count}: {value:.2g}" for count, value in row["damage"])
        table.add_row(_short(row["name"]), str(row["units"]), damage, str(row["kept"].get("0.5", summary.NONE)))
    out.print(table)
    out.print(
        "damage: KL divergence of the classes from the float model's, or error over power of the outputs.", style="dim"
    )
    if document["plan"]:
        out.print(f"{document['plan']}: the plan at 50 %; edit `keep` and pass it to `convert --prune`")


def _arithmetic_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """How near to float each artifact is on each class of CPU."""
    table = _table()
    for title in ("artifact", "on", "agrees", "accuracy lost", "SQNR dB", ""):
        table.add_column(title, justify="left" if title in ("artifact", "on", "") else "right", overflow="fold")
    for row in rows:
        sqnr = row["sqnr_db"]
        cells = [_share(row["label_agreement"]), _share(row["accuracy_drop"])]
        table.add_row(row["artifact"], row["cpu"], *cells, summary.NONE if sqnr is None else f"{sqnr:.1f}", row["how"])
    return table


def _share(value: float | None) -> str:
    return summary.NONE if value is None else f"{value:.1%}"


def _scale(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return ""
    return f", scale {quantization['scale']:.6g}, zero point {quantization['zero_point']}"


def _operator(name: str, count: int, versions: Sequence[int] | None) -> str:
    """'ADD v2 ×3'; version 1 goes without saying."""
    told = "/".join(map(str, versions or [1]))
    return name + (f" v{told}" if told != "1" else "") + (f" ×{count}" if count > 1 else "")


def _file_facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What only a runtime's own file has."""
    if "precision" not in document:
        return []
    precision, kernels = document["precision"], document["kernels"]
    rows = [("precision", precision["words"] + (f"; {precision['layout']}" if precision["layout"] else ""))]
    own = ", ".join(_operator(name, count, None) for name, count in kernels.items())
    rows.append(("XNNPACK", f"leaves to slower kernels: {own}" if own else "takes every operator"))
    needs = f", runs in TFLite {document['min_runtime']} and later" if document["min_runtime"] else ""
    told = f', "{document["description"]}"' if document["description"] else ""
    return [*rows, ("file", f"{summary.size(document['size_bytes'])}{told}{needs}")]


def _takes(found: Mapping[str, Any]) -> str:
    if found["missing"]:
        return f"not installed: {found['missing']}"
    return "takes it" if found["takes"] else "refuses it: " + "; ".join(found["refuses"])


def _short(name: str) -> str:
    """The first of the names that TFLite's converter joins for a fused layer."""
    return name.partition(";")[0]


def _layer_table(layers: Iterable[Mapping[str, Any]]) -> Table:
    table = _table()
    for title in ("layer", "operator", "output", "parameters", "MACs"):
        left = title in ("layer", "operator")
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for row in layers:
        shape = summary.NONE if row["shape"] is None else "×".join(map(str, row["shape"])) or "scalar"
        macs = _count(row["macs"]) if row["macs"] != 0 else ""
        table.add_row(
            _short(row["name"]), row["op"], shape, f"{row['parameters']:,}" if row["parameters"] else "", macs
        )
    return table


def _count(value: int | None) -> str:
    return summary.NONE if value is None else f"{value:,}"


def print_doctor(document: Mapping[str, Any], out: Console | None = None) -> None:
    """What `doctor` found; the last lines are the commands that install what is missing."""
    out = out or console()
    table = _table()
    for title in ("part", "", "version", "what for"):
        table.add_column(title, overflow="fold", no_wrap=title != "what for")
    for row in document["packages"]:
        table.add_row(row["name"], "ok" if row["ok"] else "missing", row["version"] or "", row["purpose"])
    out.print(table)
    facts = _table(header=False)
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column(overflow="fold")
    for row in document["checks"]:
        facts.add_row(row["name"], row["found"] if isinstance(row["found"], str) else json.dumps(row["found"]))
    out.print(facts)
    _list(out, (f"{advice['why']}: {advice['command']}" for advice in document["advice"]), "yellow")
    if not document["advice"]:
        out.print("nothing is missing", style="green")


def _table(*, header: bool = True) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD if header else None, show_header=header, pad_edge=False, padding=(0, 1, 0, 0))


def _list(out: Console, items: Iterable[str], style: str) -> None:
    for item in items:
        out.print(item, style=style, soft_wrap=True)
