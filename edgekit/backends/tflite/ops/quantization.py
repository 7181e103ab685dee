"""QuantizeLinear where no operator could take it: QUANTIZE of a float tensor, or from one scale to another."""

from __future__ import annotations

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.values import Node


def _quantize(e: Emitter, n: Node) -> None:
    source, target = n.require(0), n.outputs[0]
    if source.quant is not None and source.quant.same(target.quant) and source.dtype == target.dtype:
        e.rename(target, source, identity(source.rank))
        return
    layout = (e.layouts(source) or [identity(source.rank)])[0]
    e.emit(target, "QUANTIZE", [e.tensor(source, layout)], layout)


LOWERINGS = {"QuantizeLinear": _quantize}
