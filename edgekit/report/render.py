"""Turns a bench document into the form that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError

_BY_SUFFIX = {".md": "md", ".markdown": "md", ".json": "json", ".txt": "text"}


def kind_of(out: Path | str | None) -> str:
    """The form that a file's name asks for; text for the terminal."""
    if out is None:
        return "text"
    if Path(out).is_dir():
        raise UsageError(f"'{out}' is a folder", "name a file in it that ends in .md, .json or .txt")
    suffix = Path(out).suffix.lower()
    if suffix not in _BY_SUFFIX:
        raise UsageError(f"cannot tell the format of '{out}'", "name it .md, .json or .txt, or pass --format")
    return _BY_SUFFIX[suffix]


def render(document: dict[str, Any], kind: str) -> str:
    """kind: "text", "md" or "json"."""
    if kind == "json":
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    if kind == "md":
        from edgekit.report.markdown import render_markdown

        return render_markdown(document)
    from edgekit.report.terminal import render_text

    return render_text(document)
