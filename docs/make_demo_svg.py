"""Writes docs/demo.svg, the picture in the README, from a real run of the demo on this machine.

.venv/bin/python docs/make_demo_svg.py [mlp|cnn]
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from edgekit.demo import run_demo
from edgekit.report.terminal import render_terminal

OUT = Path(__file__).parent / "demo.svg"
WIDTH = 128


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "mlp"
    with tempfile.TemporaryDirectory() as build:
        document = run_demo(model, Path(build) / "edgekit-demo", quick=False)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), markup=False, highlight=False)
    console.print(f"$ edgekit demo --model {model} --full", style="bold cyan")
    render_terminal(document, console)
    svg = console.export_svg(title="edgekit demo")
    # The template names a web font; the picture must not fetch anything, so the reader's own monospace is used.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    OUT.write_text(svg, encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
