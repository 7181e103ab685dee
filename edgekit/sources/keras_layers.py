"""ONNX operators with weights, pools and products, as Keras layers; images and sequences with channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.sources.keras_plan import Array, Ref, View, Weight, product, refused, view

if TYPE_CHECKING:
    from edgekit.sources.keras_lower import Lowering

Rule = Callable[["Lowering", ir.Node], None]
_LEAST = -3.0e38  # below any float32 that a model computes: fills what a max pool must not see


# --- windows over places --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Window:
    """axes: of the value, those that the window moves along (an axis of size 1 that it covers whole is left out).

    The rest: for each of them. same: Keras's "same" pads as this does; explicit: what must be padded beforehand.
    """

    axes: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    same: bool

    @property
    def explicit(self) -> bool:
        return not self.same and any(p != (0, 0) for p in self.pads)


def _window(node: ir.Node, have: Sequence[int], made: Sequence[int], kernel: Sequence[int]) -> Window:
    """have, made: shapes (batch, channels, places…) of input and output."""
    rank = len(kernel)
    strides = G.integers(node, "strides") or (1,) * rank
    dilations = G.integers(node, "dilations") or (1,) * rank
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode, given = G.text(node, "auto_pad", "NOTSET"), G.integers(node, "pads") or (0,) * (2 * rank)
    pads, same = [], []
    for i in range(rank):
        total = max((made[2 + i] - 1) * strides[i] + spans[i] - have[2 + i], 0)
        before = {"SAME_UPPER": total // 2, "SAME_LOWER": total - total // 2, "VALID": 0}.get(mode, given[i])
        after = total - before if mode.startswith("SAME") else given[rank + i] if mode == "NOTSET" else 0
        needed = max((-(-have[2 + i] // strides[i]) - 1) * strides[i] + spans[i] - have[2 + i], 0)
        if total > before + after:  # ceil_mode counts places that are not there
            after = total - before
        pads.append((before, after))
        same.append(
            (before, after) == (needed // 2, needed - needed // 2) and made[2 + i] == -(-have[2 + i] // strides[i])
        )
    used = [i for i in range(rank) if have[2 + i] != 1 or kernel[i] != 1 or pads[i] != (0, 0)]
    if len(used) > 2:
        raise refused(node.op_type, node.name, "it has three axes of places")
    return Window(
        tuple(2 + i for i in used),
        tuple(kernel[i] for i in used), tuple(strides[i] for i in used), tuple(dilations[i] for i in used),
        tuple(pads[i] for i in used), all(same[i] for i in used) and any(pads[i] != (0, 0) for i in used),
    )  # fmt: skip


def _channels_last(low: Lowering, given: View, window: Window) -> str:
    return low.arranged(given, (0, *window.axes, 1))


def _padded(low: Lowering, ref: str, window: Window, node: ir.Node, fill: float = 0.0) -> str:
    if not window.explicit:
        return ref
    if fill == 0.0:
        pads: Any = [list(p) for p in window.pads]
        kind = f"ZeroPadding{len(window.axes)}D"
        return low.layer(kind, ref, f"{low.name(node)}_pad", padding=pads if len(pads) == 2 else pads[0])
    width = [[0, 0], *(list(p) for p in window.pads), [0, 0]]
    return low.call("pad", Ref(ref), width, mode="constant", constant_values=fill)


def _result(ref: str, window: Window, made: Sequence[int]) -> View:
    """The view of a channels-last tensor as (batch, channels, places…)."""
    dims = (made[0], *(made[a] for a in window.axes), made[1])
    places = {a: 1 + i for i, a in enumerate(window.axes)}
    groups = ((0,), (len(dims) - 1,), *((places[a],) if a in places else () for a in range(2, len(made))))
    return View(ref, dims, groups)


def _conv(low: Lowering, node: ir.Node) -> None:
    kernel, bias, given = low.weight(node, 1), low.weight(node, 2), low.view(node)
    if kernel is None:
        raise refused("Conv", node.name, "it has no weights")
    groups, made = G.integer(node, "group", 1), low.shape(node.outputs[0])
    window = _window(node, given.shape, made, kernel.values.shape[2:])
    rank, channels = len(window.axes), given.shape[1]
    used = [a for a in range(2, kernel.values.ndim) if a in window.axes]
    gone = tuple(a for a in range(2, kernel.values.ndim) if a not in window.axes)
    kernel = kernel.moved(lambda v: v.squeeze(gone).transpose(*range(2, 2 + len(used)), 1, 0))
    if not rank and groups == 1:  # a single place: a dense layer
        low.put(node, _result(_dense_layer(low, node, low.arranged(given, (0, 1)), kernel, bias), window, made))
        return
    if not rank:
        raise refused("Conv", node.name, "it has groups and a single place")
    ref = _padded(low, _channels_last(low, given, window), window, node)
    config: dict[str, Any] = {
        "kernel_size": list(window.kernel),
        "strides": list(window.strides),
        "padding": "same" if window.same else "valid",
        "use_bias": bias is not None,
    }
    if max(window.dilations) > 1:
        config["dilation_rate"] = list(window.dilations)
    biases = [] if bias is None else [bias]
    even = len(set(window.strides)) == 1 and (max(window.strides) == 1 or max(window.dilations) == 1)
    if groups == channels > 1 and even:
        times = made[1] // channels
        moved = kernel.moved(lambda v: v.reshape(*v.shape[:-2], channels, times))
        out = low.named(
            f"DepthwiseConv{rank}D", ref, node, [moved, *biases], depth_multiplier=times,
            **{k: v[0] if k == "strides" else v for k, v in config.items()},
        )  # fmt: skip
    else:
        shared = {"groups": groups} if groups > 1 else {}
        out = low.named(f"Conv{rank}D", ref, node, [kernel, *biases], filters=made[1], **config, **shared)
    low.put(node, _result(out, window, made))


def _conv_transpose(low: Lowering, node: ir.Node) -> None:
    kernel, bias, given = low.weight(node, 1), low.weight(node, 2), low.view(node)
    made = low.shape(node.outputs[0])
    if kernel is None or kernel.values.ndim != 4 or G.integer(node, "group", 1) != 1:
        raise refused("ConvTranspose", node.name, "it has groups or no images")
    if any(d != 1 for d in G.integers(node, "dilations") or ()):
        raise refused("ConvTranspose", node.name, "it is dilated")
    size, strides = kernel.values.shape[2:], G.integers(node, "strides") or (1, 1)
    pads = _transposed_pads(node, given.shape[2:], made[2:], size, strides)
    same = all(
        made[2 + i] == given.shape[2 + i] * strides[i] and pads[i] == max(size[i] - strides[i], 0) // 2
        for i in range(2)
    )
    full = [given.shape[2 + i] * strides[i] + max(size[i] - strides[i], 0) for i in range(2)]
    ends = [full[i] - pads[i] - made[2 + i] for i in range(2)]
    if not same and min(ends) < 0:
        raise refused("ConvTranspose", node.name, "its output padding exceeds its kernel")
    ref = low.named(
        "Conv2DTranspose", low.arranged(given, (0, 2, 3, 1)), node,
        [kernel.moved(lambda v: v.transpose(2, 3, 1, 0)), *([] if bias is None else [bias])],
        filters=made[1], kernel_size=list(size), strides=list(strides), padding="same" if same else "valid",
        use_bias=bias is not None,
    )  # fmt: skip
    if not same and (any(pads) or any(ends)):
        cropping = [[pads[i], ends[i]] for i in range(2)]
        ref = low.layer("Cropping2D", ref, f"{low.name(node)}_crop", cropping=cropping)
    low.put(node, View(ref, (made[0], made[2], made[3], made[1]), ((0,), (3,), (1,), (2,))))


def _transposed_pads(
    node: ir.Node, have: Sequence[int], made: Sequence[int], size: Sequence[int], strides: Sequence[int]
) -> list[int]:
    """What is cut in front of the full result, by axis."""
    extra = G.integers(node, "output_padding") or (0, 0)
    mode, given = G.text(node, "auto_pad", "NOTSET"), G.integers(node, "pads") or (0, 0, 0, 0)
    out = []
    for i in range(2):
        total = strides[i] * (have[i] - 1) + extra[i] + size[i] - made[i]
        if mode == "NOTSET" and G.integers(node, "output_shape") is None:
            out.append(given[i])
        else:
            out.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
    return out


def _pool(kind: str) -> Rule:
    def rule(low: Lowering, node: ir.Node) -> None:
        given, made = low.view(node), low.shape(node.outputs[0])
        kernel = G.integers(node, "kernel_shape") or ()
        window = _window(node, given.shape, made, kernel)
        if len(node.outputs) > 1 and node.outputs[1].uses():
            raise refused(node.op_type, node.name, "its indices are used")
        if any(d != 1 for d in window.dilations):
            raise refused(node.op_type, node.name, "it is dilated")
        if not window.axes:
            low.put(node, given)
            return
        average, counted = kind == "Average", G.integer(node, "count_include_pad", 0)
        if average and any(p != (0, 0) for p in window.pads):
            if counted and G.integer(node, "ceil_mode", 0):
                raise refused(node.op_type, node.name, "ceil_mode")
            if not counted and not window.same:
                raise refused(node.op_type, node.name, "it leaves out of the mean a padding that is not 'same'")
            if counted:
                window = Window(window.axes, window.kernel, window.strides, window.dilations, window.pads, False)
        ref = _padded(low, _channels_last(low, given, window), window, node, 0.0 if average else _LEAST)
        ref = low.named(
            f"{kind}Pooling{len(window.axes)}D", ref, node, [], pool_size=list(window.kernel),
            strides=list(window.strides), padding="same" if window.same else "valid",
        )  # fmt: skip
        low.put(node, _result(ref, window, made))

    return rule


# --- products -------------------------------------------------------------------------------------------------------
def _dense_layer(low: Lowering, node: ir.Node, ref: str, kernel: Weight, bias: Weight | None) -> str:
    """kernel: (features, units)."""
    weights = [kernel] if bias is None else [kernel, bias]
    return low.named("Dense", ref, node, weights, units=kernel.values.shape[1], use_bias=bias is not None)


def _dense(low: Lowering, node: ir.Node, given: View, kernel: Weight, bias: Weight | None) -> View:
    """The last axis of the value times kernel (features, units); the value's other axes stay as they lie."""
    last = given.groups[-1]
    lead = [i for g in given.groups[:-1] for i in g]
    rest = [i for i in range(len(given.dims)) if i not in lead and i not in last]
    lead = sorted([*lead, *(i for i in rest if i == 0)])
    if len(last) != 1:  # joined axes: in the order in which they lie, the kernel's rows with them
        lying = sorted(last)
        sizes = [given.dims[i] for i in last]
        to = [last.index(i) for i in lying]
        kernel = kernel.moved(lambda v: v.reshape(*sizes, -1).transpose(*to, len(sizes)).reshape(v.shape))
        last = tuple(lying)
    dims = [given.dims[i] for i in lead]
    ref = low.ordered(given, [*lead, *last], [*dims, kernel.values.shape[0]])
    out = _dense_layer(low, node, ref, kernel, bias)
    places = {i: n for n, i in enumerate(lead)}
    groups = (*(tuple(places[i] for i in g if i in places) for g in given.groups[:-1]), (len(lead),))
    return View(out, (*dims, kernel.values.shape[1]), groups)


def _gemm(low: Lowering, node: ir.Node) -> None:
    if G.integer(node, "transA", 0):
        raise refused("Gemm", node.name, "its first matrix is transposed")
    given, kernel = low.view(node), low.weight(node, 1)
    if kernel is None:
        raise refused("Gemm", node.name, "it has no weights")
    if G.integer(node, "transB", 0):
        kernel = kernel.moved(np.transpose)
    kernel = kernel.scaled(G.number(node, "alpha", 1.0))
    units = kernel.values.shape[1]
    addend = low.operand(node, 2)
    if isinstance(addend, View):
        raise refused("Gemm", node.name, "what it adds is computed")
    bias = None if addend is None else low.weight(node, 2)
    if bias is not None:
        if bias.values.size not in (1, units):
            raise refused("Gemm", node.name, "it adds another row to each sample")
        bias = bias.scaled(G.number(node, "beta", 1.0))
        # one number for all units is not trained as many: it stays what it is
        bias = (
            bias.moved(np.ravel)
            if bias.values.size == units
            else Weight(np.full(units, bias.values.item(), np.float32))
        )
    low.put(node, _dense(low, node, given, kernel, bias))


def _matmul(low: Lowering, node: ir.Node) -> None:
    left, right = low.operand(node, 0), low.operand(node, 1)
    shape = low.shape(node.outputs[0])
    if isinstance(left, View) and isinstance(right, np.ndarray) and right.ndim == 2 and len(left.groups) > 1:
        kernel = low.weight(node, 1)
        assert kernel is not None
        low.put(node, _dense(low, node, left, kernel, None))
        return
    if not isinstance(left, View) or not isinstance(right, View):
        tensors = [Ref(low.plain(v)) if isinstance(v, View) else v for v in (left, right)]
        low.put(node, view(low.call("matmul", *tensors), shape))
        return
    lead = list(range(len(shape) - 2))
    atoms = [_sizes(v, lead) if len(v.groups) == len(shape) else None for v in (left, right)]
    if atoms[0] is None or atoms[0] != atoms[1]:
        low.put(node, view(low.call("matmul", Ref(low.plain(left)), Ref(low.plain(right))), shape))
        return
    # joined axes in front (samples and heads, say) stay apart
    flat = [s for group in atoms[0] for s in group]
    refs = [
        Ref(low.ordered(v, [i for g in v.groups for i in g], [*flat, *v.shape[-2:]]))
        for v in (left, right)
    ]  # fmt: skip
    at, groups = 0, []
    for group in atoms[0]:
        groups.append(tuple(range(at, at + len(group))))
        at += len(group)
    out = low.call("matmul", *refs)
    low.put(node, View(out, (*flat, *shape[-2:]), (*groups, (at,), (at + 1,))))


def _sizes(given: View, axes: Sequence[int]) -> list[list[int]]:
    return [[given.dims[i] for i in given.groups[a]] for a in axes]


# --- norms ----------------------------------------------------------------------------------------------------------
def _layer_norm(low: Lowering, node: ir.Node) -> None:
    given, scale, shift = low.view(node), low.weight(node, 1), low.weight(node, 2)
    rank = len(given.groups)
    if G.integer(node, "axis", -1) % rank != rank - 1 or scale is None or any(o.uses() for o in node.outputs[1:]):
        raise refused("LayerNormalization", node.name, "it runs over several axes or its mean is used")
    if given.single(rank - 1) is None:
        given = view(low.plain(given), given.shape)
    size = given.shape[-1]
    scale = scale.moved(np.ravel)
    if scale.values.size != size or (shift is not None and shift.values.size != size):
        raise refused("LayerNormalization", node.name, "its scale has more axes than it runs over")
    weights = [scale] if shift is None else [scale, shift.moved(np.ravel)]
    ref = low.named(
        "LayerNormalization", given.ref, node, weights,
        axis=given.groups[-1][0], epsilon=G.number(node, "epsilon", 1e-5), center=shift is not None,
    )  # fmt: skip
    low.put(node, View(ref, given.dims, given.groups))


def _batch_norm(low: Lowering, node: ir.Node) -> None:
    if G.integer(node, "training_mode", 0):
        raise refused("BatchNormalization", node.name, "it is in training mode")
    given = low.view(node)
    if given.single(1) is None:
        given = view(low.plain(given), given.shape)
    weights = [w for i in (1, 2, 3, 4) if (w := low.weight(node, i)) is not None]
    if len(weights) != 4:
        raise refused("BatchNormalization", node.name, "it lacks a statistic")
    ref = low.named(
        "BatchNormalization", given.ref, node, weights, axis=given.groups[1][0], epsilon=G.number(node, "epsilon", 1e-5)
    )
    low.put(node, View(ref, given.dims, given.groups))


RULES: dict[str, Rule] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "MaxPool": _pool("Max"), "AveragePool": _pool("Average"),
    "Gemm": _gemm, "MatMul": _matmul, "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm,
}  # fmt: skip

__all__ = ["RULES", "Array", "product"]
