"""The table of passes.

A pass is a frozen dataclass called with `(model, dataset or None)` that returns a new model and never edits its input;
its fields are its options. Adding a method is one file here and one line in `PASSES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.dataset import Dataset

# name -> "module:class"
PASSES: Mapping[str, str] = {
    "fold": "edgekit.passes.fold:Fold",
    "equalize": "edgekit.passes.equalize:Equalize",
    "smooth": "edgekit.passes.smooth:Smooth",
    "quantize": "edgekit.passes.quantize:QuantizeInt8",
    "quantize_weights": "edgekit.passes.quantize_weights:QuantizeWeights",
    "prune_zeros": "edgekit.passes.prune_zeros:PruneZeros",
}


class Pass(Protocol):
    """A frozen dataclass; calling it makes a better model."""

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model: ...
