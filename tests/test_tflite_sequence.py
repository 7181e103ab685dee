"""Recurrent layers, loops, Einsum, Attention and RotaryEmbedding, against ONNX Runtime or ONNX's own definition."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgekit.backends.tflite.unroll import unroll
from tests.tflite_single import (
    BOUND,
    Array,
    build,
    difference,
    litert,
    lowered,
    normal,
    onnxruntime,
    operators,
    reference,
)

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}
STEPS, BATCH, WIDTH, HIDDEN = 4, 3, 3, 5
DEEP = 5e-5  # Relu in a recurrence: values grow and cancel


# --- recurrent layers ------------------------------------------------------------------------------------------
def recurrent(op: str, case: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    directions = 2 if case["direction"] == "bidirectional" else 1
    rows, batch_first = GATES[op] * HIDDEN, case.get("layout", 0)
    weights: dict[str, Any] = {"w": normal(1, directions, rows, WIDTH), "r": normal(2, directions, rows, HIDDEN)}
    if case.get("bias"):
        weights["b"] = normal(3, directions, 2 * rows)
    if case.get("lengths"):
        weights["l"] = np.full(BATCH, STEPS, np.int32)
    if case.get("peepholes"):
        weights["p"] = normal(4, directions, 3 * HIDDEN)
    open_batch = None if case["free"] else BATCH
    shape = (BATCH, STEPS, WIDTH) if batch_first else (STEPS, BATCH, WIDTH)
    inputs: dict[str, Any] = {"x": (np.float32, [open_batch if s == BATCH and i == (not batch_first) else s
                                                 for i, s in enumerate(shape)])}  # fmt: skip
    feeds = {"x": normal(5, *shape)}
    state = (BATCH, directions, HIDDEN) if batch_first else (directions, BATCH, HIDDEN)
    for name, given in (("h", case.get("state")), ("c", case.get("state") if op == "LSTM" else None)):
        if given == "input":
            place = 0 if batch_first else 1
            inputs[name] = (np.float32, [open_batch if i == place else s for i, s in enumerate(state)])
            feeds[name] = normal(6, *state)
        elif given == "constant":
            weights[name] = normal(7, *state)
    known = {*weights, *inputs}
    names = [n if n in known else "" for n in ("x", "w", "r", "b", "l", "h", "c", "p")][: 8 if op == "LSTM" else 6]
    outputs = ["y", "yh", *(["yc"] if op == "LSTM" else [])]
    node = helper.make_node(op, names, outputs, hidden_size=HIDDEN, direction=case["direction"], **case["attributes"])
    return build([node], inputs, outputs, weights, opset=22), feeds


def cases() -> list[tuple[str, dict[str, Any]]]:
    rng, out = random.Random(0), []
    for op, direction, free, state in itertools.product(
        GATES, ("forward", "reverse", "bidirectional"), (False, True), (None, "input", "constant")
    ):
        case: dict[str, Any] = {"direction": direction, "free": free, "state": state, "bias": rng.random() < 0.7}
        if free and state == "constant":
            continue
        case["lengths"] = not free and rng.random() < 0.3
        case["peepholes"] = op == "LSTM" and rng.random() < 0.4
        attributes: dict[str, Any] = {}
        if op == "GRU":
            attributes["linear_before_reset"] = rng.choice((0, 1))
        if rng.random() < 0.3:
            attributes["clip"] = rng.choice((0.4, 1.0))
        if rng.random() < 0.4:
            count = ACTIVATIONS[op] * (2 if direction == "bidirectional" else 1)
            chosen = [rng.choice(("Sigmoid", "Tanh", "Relu", "HardSigmoid")) for _ in range(count)]
            attributes["activations"] = chosen
            if "HardSigmoid" in chosen and rng.random() < 0.7:
                attributes["activation_alpha"] = [0.3] * chosen.count("HardSigmoid")
                attributes["activation_beta"] = [0.4] * chosen.count("HardSigmoid")
        out.append((op, {**case, "attributes": attributes}))
    return out


@pytest.mark.parametrize(("op", "case"), cases(), ids=str)
def test_recurrent_layers_as_onnx_runtime(op: str, case: dict[str, Any]) -> None:
    model, feeds = recurrent(op, case)
    bound = DEEP if "Relu" in case["attributes"].get("activations", ()) else BOUND
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= bound


def test_an_open_batch_needs_no_slice_per_step() -> None:
    """XNNPACK takes no slice of an open batch."""
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2])]
    nodes.append(helper.make_node("GRU", ["t", "w", "r"], ["", "y"], hidden_size=5, linear_before_reset=1))
    weights = {"w": normal(0, 1, 15, 3), "r": normal(1, 1, 15, 5)}
    model = build(nodes, {"x": (np.float32, ("n", 4, 3))}, ["y"], weights)
    assert "SLICE" not in operators(model)


@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("state", [None, "input"])
def test_batch_first_is_the_same_with_axes_renamed(op: str, state: str | None) -> None:
    """ONNX Runtime has no layout 1: compared with layout 0 on transposed inputs."""
    case: dict[str, Any] = {"direction": "forward", "free": True, "state": state, "bias": True}
    plain, feeds = recurrent(op, {**case, "attributes": {}})
    turned, _ = recurrent(op, {**case, "layout": 1, "attributes": {"layout": 1}})
    wanted = onnxruntime(plain, feeds)
    got = litert(turned, {name: np.ascontiguousarray(a.swapaxes(0, 1)) for name, a in feeds.items()})
    wanted = {name: a.swapaxes(0, 1) if a.ndim == 3 else a.transpose(2, 0, 1, 3) for name, a in wanted.items()}
    assert difference(got, wanted) <= BOUND


def test_a_second_inference_starts_from_zero_again() -> None:
    from ai_edge_litert.interpreter import Interpreter

    from edgekit.backends.tflite.writer import write

    model, feeds = recurrent("LSTM", {"direction": "forward", "free": False, "attributes": {}})
    interpreter = Interpreter(model_content=bytes(write([lowered(model).graph], "test")), num_threads=1)
    interpreter.allocate_tensors()
    results = []
    for _ in range(2):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], feeds["x"])
        interpreter.invoke()
        results.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())
    assert np.array_equal(*results)


def test_what_recurrent_layers_refuse() -> None:
    for change, told in (
        ({"input_forget": 1}, "coupled"),
        ({"activations": ["Sigmoid", "Softsign", "Tanh"]}, "Softsign"),
    ):
        model, _ = recurrent("LSTM", {"direction": "forward", "free": False, "attributes": change})
        assert told in str(lowered(model).refusals[0])
    model, _ = recurrent("GRU", {"direction": "forward", "free": False, "lengths": True, "attributes": {}})
    lengths = next(w for w in model.graph.initializer if w.name == "l")
    lengths.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 4, 4], np.int32), "l"))
    assert "lengths" in str(lowered(model).refusals[0])


# --- loops -----------------------------------------------------------------------------------------------------
def loop(trips: int | None, condition: str, scan: bool, batch: Any = 2) -> onnx.ModelProto:
    """h <- tanh(h·W + x[step]), with a counter that may end it."""
    float32, int64, boolean = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gather", ["x", "count"], ["row"], axis=1),
        helper.make_node("MatMul", ["h", "w"], ["hw"]),
        helper.make_node("Add", ["hw", "row"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["h2"]),
        helper.make_node("Add", ["count", "one"], ["count2"]),
        helper.make_node("Less", ["count2", "end"], ["go2"]),
        helper.make_node("ReduceMax", ["h2"], ["most"], keepdims=0),
        helper.make_node("Less", ["most", "huge"], ["go3"]),
        helper.make_node("Identity", [{"count": "go2", "data": "go3", "always": "go"}[condition]], ["next"]),
        helper.make_node("Identity", ["h2"], ["seen"]),
    ]
    body = helper.make_graph(
        nodes, "body",
        [info("i", int64, []), info("go", boolean, []), info("h", float32, None), info("count", int64, [])],
        [info("next", boolean, []), info("h2", float32, None), info("count2", int64, []),
         *([info("seen", float32, None)] if scan else [])],
        [onnx.numpy_helper.from_array(np.array(1), "one"), onnx.numpy_helper.from_array(np.array(3), "end"),
         onnx.numpy_helper.from_array(np.float32(9), "huge")],
    )  # fmt: skip
    weights: dict[str, Any] = {"w": normal(1, 4, 4), "zero": np.array(0), "start": np.array(True)}
    if trips is not None:
        weights["trips"] = np.array(trips)
    names = ["trips" if trips is not None else "", "start", "h0", "zero"]
    node = helper.make_node("Loop", names, ["y", "n", *(["all"] if scan else [])], body=body, name="loop")
    outputs = ["y", *(["all"] if scan else [])]
    return build([node], {"x": (np.float32, [batch, 5, 4]), "h0": (np.float32, [batch, 4])}, outputs, weights, opset=22)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("trips", "condition"), [(4, "always"), (5, "count"), (2, "count"), (None, "count")])
def test_loops_are_written_out(trips: int | None, condition: str, scan: bool) -> None:
    model = loop(trips, condition, scan)
    feeds = {"x": normal(2, 2, 5, 4), "h0": normal(3, 2, 4)}
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


def test_a_loop_with_a_free_batch() -> None:
    model = loop(4, "always", scan=False, batch="batch")
    feeds = {"x": normal(2, 3, 5, 4), "h0": normal(3, 3, 4)}
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


def test_a_loop_whose_end_depends_on_the_data_stays_and_is_refused() -> None:
    model = loop(4, "data", scan=False)
    assert any(n.op_type == "Loop" for n in unroll(onnx_ir_of(model)).graph)
    assert any(r.op == "Loop" for r in lowered(model).refusals)


def onnx_ir_of(model: onnx.ModelProto) -> Any:
    import onnx_ir as ir

    return ir.from_proto(model)


# --- axes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize("seed", range(12))
def test_a_transpose_of_many_axes_is_one_of_few(seed: int, batch: Any) -> None:
    """Runtimes before LiteRT 2 take six axes; axes that stay neighbours are one."""
    rng = random.Random(seed)
    sizes, perm = [2, *rng.choices((1, 1, 2, 3), k=6)], rng.sample(range(7), 7)
    node = helper.make_node("Transpose", ["x"], ["y"], perm=perm)
    model = build([node], {"x": (np.float32, [batch, *sizes[1:]])}, ["y"], {})
    x = normal(seed, *sizes)
    assert np.array_equal(litert(model, {"x": x})["y"], x.transpose(perm))
    moves = [o for o in lowered(model).graph.operators if o.code == "TRANSPOSE"]
    assert all(len(o.outputs[0].shape) <= len([s for s in sizes if s > 1]) for o in moves)


# --- Einsum ----------------------------------------------------------------------------------------------------
LETTERS = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 3, "h": 2, "i": 3, "j": 4, "k": 5, "m": 6, "n": 2, "s": 3, "t": 4}
EQUATIONS = [
    "ij,jk->ik", "bij,bjk->bik", "bij,bkj->bik", "bhid,bhjd->bhij", "bihd,bjhd->bhij", "bhij,bjhd->bihd",
    "abc,cde->abde", "abc,hkc->abhk", "abc,cd", "ij->ji", "ij->", "ij->i", "bij,bij->b", "bij,bij->bij", "i,j->ij",
    "ij,j->i", "...ij,...jk->...ik", "...ij,jk->...ik", "bij,jk,kd->bid", "abch,cd->habd", "bij,jbk->kbi",
    "bijc,bjcd->bijd", "abcd,bd->ac", "abnc,ncd->abnd", "bh,bh,bh->b", "ijk,jim->km", "aecd,abcd->acbe",
    "acbe,aecd->abcd", "ab,c->", "a,b->ba", "btnh,bsnh->bnts", "abcdh,abchk->abcdk",
]  # fmt: skip


@pytest.mark.parametrize("constant", [None, 0, 1])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation: str, constant: int | None) -> None:
    parts = equation.split("->")[0].split(",")
    shapes = [(*((2, 3) if "..." in p else ()), *(LETTERS[c] for c in p.replace("...", ""))) for p in parts]
    if constant is not None and (len(parts) == 1 or constant >= len(parts)):
        pytest.skip("no such operand, or no other")
    names = [f"x{i}" for i in range(len(parts))]
    arrays = {name: normal(i, *shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    weights = {} if constant is None else {names[constant]: arrays.pop(names[constant])}
    inputs = {name: (np.float32, list(a.shape)) for name, a in arrays.items()}
    model = build([helper.make_node("Einsum", names, ["y"], equation=equation)], inputs, ["y"], weights)
    assert difference(litert(model, arrays), onnxruntime(model, arrays)) <= BOUND


@pytest.mark.parametrize("equation", ["bij,bjk->bik", "bihd,bjhd->bhij", "bhij,bjhd->bihd", "bij,bij->bij", "bij->bj"])
def test_einsum_with_a_free_batch(equation: str) -> None:
    parts = equation.split("->")[0].split(",")
    arrays = {f"x{i}": normal(i, *(LETTERS[c] for c in p)) for i, p in enumerate(parts)}
    inputs = {name: (np.float32, ["batch", *a.shape[1:]]) for name, a in arrays.items()}
    model = build([helper.make_node("Einsum", list(arrays), ["y"], equation=equation)], inputs, ["y"], {})
    assert difference(litert(model, arrays), onnxruntime(model, arrays)) <= BOUND


def test_einsum_by_a_constant_is_a_dense_layer() -> None:
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="abc,cde->abde")
    model = build([node], {"x": (np.float32, ["batch", 3, 4])}, ["y"], {"w": normal(0, 4, 2, 5)})
    assert [c for c in operators(model) if c != "RESHAPE"] == ["FULLY_CONNECTED"]


def test_a_diagonal_is_refused() -> None:
    model = build([helper.make_node("Einsum", ["x"], ["y"], equation="ii->i")], {"x": (np.float32, [3, 3])}, ["y"], {})
    assert "diagonal" in str(lowered(model).refusals[0])


# --- Attention -------------------------------------------------------------------------------------------------
ATTENTION: list[dict[str, Any]] = [
    {},
    {"is_causal": 1},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"mask": (4, 6)},
    {"mask": (2, 2, 4, 6), "is_causal": 1},
    {"mask": (4, 6), "boolean": True},
    {"mask": (1, 1, 4, 6), "boolean": True, "is_causal": 1},
    {"past": 3},
    {"past": 3, "is_causal": 1},
    {"shared": True},
    {"shared": True, "is_causal": 1, "mask": (4, 6)},
    {"rank": 3},
    {"rank": 3, "shared": True, "is_causal": 1},
]


@pytest.mark.parametrize("constant_mask", [False, True])
@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_as_defined(case: dict[str, Any], batch: Any, constant_mask: bool) -> None:
    heads, groups, size, width, past = 4, 2 if case.get("shared") else 4, 5, 3, case.get("past", 0)
    now = 6 - past
    if case.get("rank") == 3:
        arrays = {"q": normal(0, 2, 4, heads * size), "k": normal(1, 2, now, groups * size)}
        arrays["v"] = normal(2, 2, now, groups * width)
    else:
        arrays = {"q": normal(0, 2, heads, 4, size), "k": normal(1, 2, groups, now, size)}
        arrays["v"] = normal(2, 2, groups, now, width)
    outputs, weights = ["y"], {}
    if past:
        arrays |= {"pk": normal(3, 2, groups, past, size), "pv": normal(4, 2, groups, past, width)}
        outputs += ["nk", "nv"]
    inputs = {name: (np.float32, [batch, *a.shape[1:]]) for name, a in arrays.items()}
    if "mask" in case:
        shape = case["mask"] if len(case["mask"]) < 4 or case["mask"][1] == 1 else (1, heads, 4, 6)
        mask: Array = normal(5, *shape)
        if case.get("boolean"):
            mask = mask > 0.3
            mask[..., 1, :] = False  # this query may look at nothing
        if constant_mask:
            weights["m"] = mask
        else:
            arrays["m"], inputs["m"] = mask, (mask.dtype, list(mask.shape))
    names = [n if n in {*arrays, *weights} else "" for n in ("q", "k", "v", "m", "pk", "pv")]
    attributes: dict[str, Any] = {k: case[k] for k in ("is_causal", "scale", "softcap") if k in case}
    if case.get("rank") == 3:
        attributes |= {"q_num_heads": heads, "kv_num_heads": groups}
    model = build([helper.make_node("Attention", names, outputs, **attributes)], inputs, outputs, weights)
    assert difference(litert(model, arrays), reference(model, arrays)) <= BOUND


@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("rank", "turned"), [(4, 8), (4, 4), (3, 8), (3, 4)])
def test_rotary_embedding_as_defined(rank: int, turned: int, interleaved: int, positions: bool, batch: Any) -> None:
    heads, steps, size = 3, 5, 8
    shape = (2, heads, steps, size) if rank == 4 else (2, steps, heads * size)
    arrays: dict[str, Array] = {"x": normal(0, *shape)}
    inputs: dict[str, Any] = {"x": (np.float32, [batch, *shape[1:]])}
    angles = np.random.default_rng(1).uniform(0, 6, (10, turned // 2) if positions else (2, steps, turned // 2))
    weights = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if positions:
        arrays["p"] = np.random.default_rng(2).integers(0, 10, (2, steps))
        inputs["p"] = (np.int64, [batch, steps])
    else:
        weights = {}
        arrays |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        inputs |= {n: (np.float32, [batch, steps, turned // 2]) for n in ("cos", "sin")}
    attributes: dict[str, Any] = {"interleaved": interleaved, "rotary_embedding_dim": turned if turned < size else 0}
    attributes |= {"num_heads": heads} if rank == 3 else {}
    names = ["x", "cos", "sin", *(["p"] if positions else [])]
    model = build([helper.make_node("RotaryEmbedding", names, ["y"], **attributes)], inputs, ["y"], weights)
    assert difference(litert(model, arrays), reference(model, arrays)) <= BOUND
