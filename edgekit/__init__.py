"""edgekit: take a trained model to a device: compress, convert, verify, measure, ship.

The names below load on first use, so that `edgekit --help` imports neither numpy nor a framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it (`bench` and `report` are packages: their functions are in edgekit.pipeline)
_EXPORTS = {
    "load": "edgekit.pipeline",
    "convert": "edgekit.pipeline",
    "inspect": "edgekit.pipeline",
    "open_dataset": "edgekit.dataset",
    "Preprocessing": "edgekit.preprocessing",
    "load_target": "edgekit.target",
    "EdgekitError": "edgekit.errors",
}
__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
