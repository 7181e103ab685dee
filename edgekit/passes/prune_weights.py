"""Single weights to zero, unstructured or N of every M, with what is left fitted anew: size, and never speed by itself.

SparseGPT (Frantar & Alistarh 2023): features of a layer are taken in order; of each block those weights go that are
missed least, w² / [H⁻¹]ᵢᵢ with H = x̂ᵀx̂ of the pruned layers before (optimal brain surgeon), and the later features
take over what the block lost. Then least squares on the weights that stay, by conjugate gradients per output. One walk
in lockstep with the float model, which each layer is asked to reproduce.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import UnsupportedOpError
from edgekit.passes import fold_graph as G
from edgekit.passes import regression as L
from edgekit.passes.blas import single_threaded
from edgekit.passes.lockstep import Meeting, walk
from edgekit.passes.prune_channels import prepared_for_pruning
from edgekit.passes.prune_grams import layer_of
from edgekit.passes.reconstruct import affordable
from edgekit.report.progress import Progress, silent

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]
DAMPING = 1e-2  # of H's mean diagonal, as SparseGPT
BLOCK = 64  # features whose weights are compared with each other, where there is no N:M
ROUNDS = 30  # of conjugate gradients
ROWS = 32768
# Layers with fewer weights stay whole: depthwise filters and first layers hold little and are missed much.
LEAST_WEIGHTS, LEAST_FEATURES = 256, 16


@dataclass(frozen=True)
class Pattern:
    """keep of every `of` consecutive inputs of an output; of = 0: the share `keep` of all weights of a layer."""

    keep: float
    of: int = 0

    def __str__(self) -> str:
        return f"{self.keep:g}:{self.of}" if self.of else f"{1 - self.keep:.0%} zeros"

    @property
    def share(self) -> float:
        return self.keep / self.of if self.of else self.keep


@dataclass(frozen=True)
class PruneWeights:
    """The pass `prune_weights`: the same graph, zeros in its weights.

    N:M groups are of consecutive inputs: of a Conv of channels, tap by tap.
    """

    pattern: Pattern
    keep: tuple[str, ...] = ()  # nodes that stay whole
    seed: int = 0

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        if data is None:
            raise UnsupportedOpError("pruning fits layers to data", "pass a few hundred samples")
        return self.apply(model, data)[0]

    @single_threaded
    def apply(
        self, model: ir.Model, data: Dataset, progress: Progress = silent
    ) -> tuple[ir.Model, dict[str, dict[str, float]]]:
        """(the model, per node {"zeros": share, "error": relative squared error of its output}). data: bound."""
        model = prepared_for_pruning(model)
        sparse = M.clone(model)
        rng = np.random.default_rng(self.seed)
        told: dict[str, dict[str, float]] = {}
        batches = affordable(model, data, frozenset())
        count = len(list(model.graph))
        for done, meeting in enumerate(walk(model, sparse, batches)):
            progress("prune weights", done, count)
            if meeting.node.name in self.keep:
                continue
            found = self._layer(meeting, rng)
            if found is not None:
                told[meeting.node.name or ""] = found
        if not told:
            raise UnsupportedOpError(
                f"no layer of this model can have {self.pattern}", "leave --prune out, or prune channels"
            )
        return sparse, told

    def _layer(self, meeting: Meeting, rng: np.random.Generator) -> dict[str, float] | None:
        layer = layer_of(meeting.twin)
        if layer is None or meeting.twin.inputs[0] is None:
            return None
        groups, features, outputs = layer.weight.shape
        if groups > 1 or features * outputs < LEAST_WEIGHTS or features < LEAST_FEATURES:
            return None
        order = _channels_last(layer)
        if self.pattern.of and len(order) % self.pattern.of:
            return None
        x, y = _rows(meeting, layer, rng)
        x = x[:, order]
        mean_x, mean_y = (x.mean(axis=0), y.mean(axis=0)) if layer.bias is not None else (0.0, 0.0)
        x, y = (x - mean_x).astype(np.float64), (y - mean_y).astype(np.float64)
        gram, slope = x.T @ x / len(x), x.T @ y / len(x)
        damped = gram + DAMPING * float(np.trace(gram) / features + 1e-12) * np.eye(features)
        dense = layer.weight[0][order]
        # towards the old weights where the data say nothing
        wish = dense + np.linalg.solve(damped, slope - gram @ dense)
        mask = masked(wish, np.linalg.inv(damped), self.pattern)
        weight = fitted(damped, slope + (damped - gram) @ dense, mask, wish * mask)
        back = np.empty_like(weight)
        back[order] = weight
        G.set_constant(meeting.twin, 1, f"{layer.node.name}/weight", layer.restored(back[None]).astype(np.float32))
        if layer.bias is not None:
            old = G.array(meeting.twin.inputs[2])
            assert old is not None
            shift = (mean_y - mean_x @ weight).astype(np.float32)
            G.set_constant(
                meeting.twin,
                2,
                f"{layer.node.name}/bias",
                shift.reshape(old.shape if old.size == outputs else (outputs,)),
            )
        error = float(np.square(y - x @ weight).sum() / max(np.square(y).sum(), 1e-30))
        return {"zeros": float((weight == 0).mean()), "error": error}


def _channels_last(layer: L.Layer) -> Array:
    """Features in the order in which kernels multiply them: tap by tap, all channels of a tap together."""
    features = layer.weight.shape[1]
    if layer.node.op_type != "Conv":
        return np.arange(features)
    taps = int(np.prod(layer.shape[2:], dtype=np.int64))
    return np.arange(features).reshape(-1, taps).T.reshape(-1)


def _rows(meeting: Meeting, layer: L.Layer, rng: np.random.Generator) -> tuple[Array, Array]:
    given = meeting.written[meeting.twin.inputs[0].name or ""]  # type: ignore[union-attr]
    wanted = meeting.exact[meeting.node.outputs[0].name or ""]
    samples = sum(len(x) for x in given)
    xs, ys = [], []
    for x, y in zip(given, wanted, strict=True):
        chosen = L.choose(layer.node, y, max(1, ROWS * len(x) // samples), rng)
        xs.append(L.inputs(layer, x, chosen)[0])
        ys.append(L.outputs(layer, y, chosen)[0])
    return np.concatenate(xs), np.concatenate(ys)


def masked(weight: Array, inverse: Array, pattern: Pattern) -> Array:
    """bool (features, outputs): which weights stay. inverse: H⁻¹ (features, features)."""
    left, features = weight.copy(), len(weight)
    keep = np.ones(weight.shape, bool)
    # row i of the upper Cholesky factor of H⁻¹ is H⁻¹ of the features from i on, which is all that later updates need
    factor = np.linalg.cholesky(inverse).T
    size = pattern.of or BLOCK
    for start in range(0, features, size):
        at = slice(start, min(start + size, features))
        diagonal = np.diag(factor)[at, None]
        score = (left[at] / diagonal) ** 2
        keep[at] = _chosen(score, pattern)
        for i in range(at.start, at.stop):
            error = np.where(keep[i], 0.0, left[i]) / factor[i, i]
            left[i:] -= factor[i, i:, None] * error[None, :]
    return keep


def _chosen(score: Array, pattern: Pattern) -> Array:
    """The largest scores: N of M in each column, or the share of the whole block."""
    if pattern.of:
        gone = np.argsort(score, axis=0, kind="stable")[: pattern.of - int(pattern.keep)]
        keep = np.ones(score.shape, bool)
        np.put_along_axis(keep, gone, False, axis=0)
        return keep
    count = round(score.size * (1 - pattern.keep))
    if not count:
        return np.ones(score.shape, bool)
    return np.asarray(score > np.partition(score, count - 1, axis=None)[count - 1])


def fitted(gram: Array, slope: Array, mask: Array, start: Array) -> Array:
    """Least squares of each output on the weights that its mask leaves: conjugate gradients, (features, outputs)."""
    weight = start * mask
    rest = (slope - gram @ weight) * mask
    step = rest / np.diag(gram)[:, None]
    power = (rest * step).sum(axis=0)
    for _ in range(ROUNDS):
        moved = (gram @ step) * mask
        length = power / np.maximum((step * moved).sum(axis=0), 1e-30)
        weight += length * step
        rest -= length * moved
        solved = rest / np.diag(gram)[:, None]
        now = (rest * solved).sum(axis=0)
        step = solved + step * (now / np.maximum(power, 1e-30))
        power = now
    return weight * mask


def compressed(models: Sequence[ir.Model]) -> list[int]:
    """Bytes of each model's file, deflated: what zeros save on disk and on the wire."""
    return [len(zlib.compress(M.to_bytes(model), 6)) for model in models]


def sparsity(told: Mapping[str, Mapping[str, float]], model: ir.Model) -> float:
    """The share of zeros in all weights of the layers that were pruned."""
    nodes = {n.name: n for n in model.graph}
    arrays = [a for name in told if (a := G.array(nodes[name].inputs[1])) is not None]
    return float(sum((a == 0).sum() for a in arrays) / max(1, sum(a.size for a in arrays)))
