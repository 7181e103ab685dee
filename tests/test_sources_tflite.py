"""Reading .tflite files: against LiteRT's own account of them, by hand, and with every kind of damage."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.cli import main
from edgekit.errors import ModelFileError
from edgekit.inspection_precision import numbers
from edgekit.inspection_tflite import inspect, own_kernels
from edgekit.sources import tflite
from tests.tflite_files import Op, Values, dense, int8_dense, pack

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
pytest.importorskip("flatbuffers", reason="needs flatbuffers")

RNG = np.random.default_rng(0)
# LiteRT runs these itself at no cost, or XNNPACK takes them along: no difference shows in its account.
FREE = {"RESHAPE", "QUANTIZE", "DEQUANTIZE", "SHAPE", "EXPAND_DIMS", "SQUEEZE"}


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def save(data: bytes, name: str = "model.tflite") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return save


def interpreter(path: Path, *, ready: bool = True) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    found = Interpreter(model_path=str(path), num_threads=1)
    if ready:
        found.allocate_tensors()
    return found


def published(zoo: Path) -> list[Path]:
    return sorted((zoo / "models" / "mlperf_tiny").glob("*.tflite"))


# --- what is read -------------------------------------------------------------------------------------


def agrees_with_litert(path: Path) -> None:
    """Tensors, constants, operators and signatures as the runtime tells them."""
    runtime, model = interpreter(path, ready=False), tflite.read(path)  # made ready, a kernel rewrites its scales
    graph = tflite.main(model)
    details = {d["index"]: d for d in runtime.get_tensor_details()}
    for index, tensor in enumerate(graph.tensors):
        told = details[index]
        assert (tensor.name, list(tensor.shape)) == (told["name"], list(told["shape"]))
        assert tensor.dtype == np.dtype(told["dtype"]).name
        scales = told["quantization_parameters"]["scales"]
        own = tensor.quantization
        np.testing.assert_array_equal(np.float32(own.scales if own else ()), scales)
        if own:
            np.testing.assert_array_equal(own.zero_points, told["quantization_parameters"]["zero_points"])
        if tensor.constant:
            np.testing.assert_array_equal(model.array(tensor), runtime.get_tensor(index))
    operators = [o for o in runtime._get_ops_details() if o["op_name"] != "DELEGATE"]
    assert [o.name for o in graph.operators] == [o["op_name"] for o in operators]
    for own_operator, told in zip(graph.operators, operators, strict=True):
        assert [i for i in own_operator.inputs if i >= 0] == [i for i in told["inputs"] if i >= 0]
        assert list(own_operator.outputs) == list(told["outputs"])
    signatures = {s.key: {"inputs": sorted(s.inputs), "outputs": sorted(s.outputs)} for s in model.signatures}
    told = {k: {side: sorted(v[side]) for side in v} for k, v in runtime.get_signature_list().items()}
    assert signatures == told


def test_a_float_file_is_read_as_litert_reads_it(write: Any) -> None:
    agrees_with_litert(write(dense(floats(3, 8), floats(3))))


def test_an_int8_file_is_read_as_litert_reads_it(write: Any) -> None:
    agrees_with_litert(write(int8_dense(floats(3, 8), floats(3), 0.02, 0.1, "FLOAT32")))


def test_published_files_are_read_as_litert_reads_them(zoo: Path) -> None:
    for path in published(zoo):
        agrees_with_litert(path)


def test_names_versions_options_and_texts(write: Any) -> None:
    tensors = [
        Values("x", (1, 4, 4, 1), signature=(-1, 4, 4, 1)),
        Values("w", (2, 3, 3, 1), data=floats(2, 3, 3, 1)),
        Values("y", (1, 2, 2, 2), signature=(-1, 2, 2, 2)),
        Values("z", (1, 2, 2, 2)),
    ]
    options = {"padding": 1, "strideW": 1, "strideH": 1, "fusedActivationFunction": 3}
    operators = [
        Op("CONV_2D", ["x", "w", ""], ["y"], 2, "Conv2DOptions", options),
        Op("MyOwn", ["y"], ["z"], 7),
    ]
    path = write(
        pack(tensors, operators, ["x"], ["z"], description="a test", metadata={"min_runtime_version": b"2.3.0\0\0"})
    )
    model = tflite.read(path)
    conv, own = model.subgraphs[0].operators
    assert (conv.name, conv.version, conv.inputs, conv.outputs, conv.custom) == ("CONV_2D", 2, (0, 1, -1), (2,), False)
    assert (conv.options["padding"], conv.options["fusedActivationFunction"]) == ("VALID", "RELU6")
    assert (own.name, own.version, own.custom) == ("MyOwn", 7, True)
    assert (model.description, model.min_runtime, model.signatures) == ("a test", "2.3.0", ())
    assert model.metadata == {"min_runtime_version": 7}
    assert model.size_bytes == path.stat().st_size
    sig = tflite.signature(model)
    assert [(s.name, s.dtype, s.shape) for s in (*sig.inputs, *sig.outputs)] == [
        ("x", "float32", ("batch", 4, 4, 1)),
        ("z", "float32", (1, 2, 2, 2)),
    ]


def test_integers_that_mean_numbers_are_handed_over_as_floats(write: Any) -> None:
    model = tflite.read(write(int8_dense(floats(3, 8), floats(3), 0.02, 0.1)))
    assert [s.dtype for s in tflite.signature(model).inputs] == ["float32"]
    assert [s.dtype for s in tflite.signature(model, stored=True).inputs] == ["int8"]


def test_int4_is_unpacked(write: Any) -> None:
    values = np.array([-8, 7, 0, -1, 3], np.int8)
    packed = np.array([(-8 & 15) | (7 << 4), 0 | ((-1 & 15) << 4), 3], np.uint8)
    tensors = [Values("x", (1, 5)), Values("w", (5,), "INT4", packed.tobytes(), (0.5,)), Values("y", (1, 5))]
    model = tflite.read(write(pack(tensors, [Op("ADD", ["x", "w"], ["y"], 1, "AddOptions")], ["x"], ["y"])))
    weight = model.subgraphs[0].tensors[1]
    assert (weight.size_bytes, weight.elements, weight.kind) == (3, 5, "qint4")
    np.testing.assert_array_equal(model.array(weight), values)


def test_weights_behind_the_flatbuffer_are_found(write: Any) -> None:
    """Files over 2 GB keep their weights there: place and size instead of bytes."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    weights = floats(3, 8)
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(dense(weights, floats(3)), 0))
    at = model.subgraphs[0].tensors[1].buffer
    model.buffers[at].data = None
    model.buffers[at].offset, model.buffers[at].size = 1 << 20, weights.nbytes
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    whole = bytes(builder.Output()).ljust(1 << 20, b"\0") + weights.tobytes()
    found = tflite.read(write(whole))
    np.testing.assert_array_equal(found.array(found.subgraphs[0].tensors[1]), weights)
    with pytest.raises(ModelFileError, match="ends inside its weights"):
        tflite.read(write(whole[:-4]))


def test_weights_are_not_read(write: Any) -> None:
    path = write(dense(np.zeros((1000, 16000), np.float32), np.zeros(1000)))
    assert path.stat().st_size > 64e6
    tracemalloc.start()
    try:
        model = tflite.read(path)
        assert inspect(model)["parameters"] == 1000 * 16000 + 1000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8e6
    assert not model.array(model.subgraphs[0].tensors[1]).flags.writeable


# --- damage -------------------------------------------------------------------------------------------


def test_what_is_no_tflite_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model"):
        tflite.read(tmp_path / "nowhere.tflite")
    (tmp_path / "folder.tflite").mkdir()
    with pytest.raises(ModelFileError, match="folder"):
        tflite.read(tmp_path / "folder.tflite")
    for name, content, word in (
        ("empty", b"", "is empty"),
        ("short", b"TFL", "holds 3 bytes"),
        ("text", b"a text that is no model at all", "no TFLite model"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("header", b"\x1c\0\0\0TFL3", "damaged"),
    ):
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=word) as caught:
            tflite.read(path)
        assert "\n" not in str(caught.value)


def survives(path: Path, data: bytes) -> None:
    """Read whole or refused, in bounded time, and what was read can be described."""
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        model = tflite.read(path)
    except ModelFileError:
        return
    finally:
        assert time.perf_counter() - start < 5
    json.dumps(inspect(model))


FILES = [dense(floats(3, 8), floats(3)), int8_dense(floats(3, 8), floats(3), 0.02, 0.1, "FLOAT32")]


@pytest.mark.parametrize("data", FILES)
def test_a_truncated_file_is_refused_or_whole(data: bytes, tmp_path: Path) -> None:
    for end in range(0, len(data), 7):
        survives(tmp_path / "t.tflite", data[:end])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_readable(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, len(content) - 4))
        number = data.draw(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 2**31, 2**32 - 1])))
        content[at : at + 4] = struct.pack("<I", number)
    survives(tmp_path / "d.tflite", bytes(content))


def test_inconsistent_tensors_are_refused(write: Any) -> None:
    add = [Op("ADD", ["x", "w"], ["y"], 1, "AddOptions")]
    ends = [Values("x", (1, 4)), Values("y", (1, 4))]
    for weight, words in (
        (Values("w", (4,), data=floats(3)), "has 12 bytes, not 16"),
        (Values("w", (-4,), data=floats(4)), "has shape"),
        (Values("w", (4,), "INT8", np.zeros(4, np.int8), (0.1, 0.1, 0.1)), "3 scales on axis 0"),
    ):
        with pytest.raises(ModelFileError, match=words):
            tflite.read(write(pack([*ends, weight], add, ["x"], ["y"])))


def test_without_the_schema_the_extra_is_named(write: Any) -> None:
    path = write(FILES[0])
    code = (
        "import sys; sys.modules['ai_edge_litert'] = None\n"
        "from pathlib import Path; from edgekit.sources import tflite\n"
        f"tflite.read(Path({str(path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "MissingExtraError" in done.stderr
    assert "pip install 'edgekit[tflite]'" in done.stderr


# --- what is counted ----------------------------------------------------------------------------------


def test_dense_by_hand(write: Any) -> None:
    found = inspect(tflite.read(write(dense(floats(3, 8), floats(3)))))
    assert found["macs"] == 24
    assert (found["parameters"], found["weight_bytes"]) == (27, 4 * 27)
    assert found["activation_peak_bytes"] == 4 * (8 + 3)
    assert found["ops"] == {"FULLY_CONNECTED": 1, "SOFTMAX": 1}
    assert found["versions"] == {"FULLY_CONNECTED": [1], "SOFTMAX": [1]}
    assert found["signature"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 8]}]
    assert (found["precision"]["words"], found["kernels"], found["reasons"]) == ("float32", {}, [])


@pytest.mark.parametrize(
    ("op", "shapes", "out", "table", "options", "macs"),
    [
        ("CONV_2D", [(1, 8, 8, 4), (6, 3, 3, 4)], (1, 8, 8, 6), "", {}, 8 * 8 * 6 * 9 * 4),
        ("CONV_2D", [(1, 8, 8, 4), (6, 3, 3, 2)], (1, 8, 8, 6), "", {}, 8 * 8 * 6 * 9 * 2),  # two groups
        ("DEPTHWISE_CONV_2D", [(1, 8, 8, 4), (1, 5, 3, 4)], (1, 4, 4, 4), "", {}, 4 * 4 * 4 * 15),
        ("TRANSPOSE_CONV", [(4,), (6, 3, 3, 4), (1, 8, 8, 4)], (1, 16, 16, 6), "", {}, 8 * 8 * 4 * 9 * 6),
        ("CONV_3D", [(1, 4, 8, 8, 2), (3, 3, 3, 2, 5)], (1, 4, 8, 8, 5), "", {}, 4 * 8 * 8 * 5 * 27 * 2),
        ("CONV_3D_TRANSPOSE", [(5,), (3, 3, 3, 5, 2), (1, 4, 8, 8, 2)], (1, 8, 8, 8, 5), "", {}, 4 * 64 * 2 * 27 * 5),
        ("BATCH_MATMUL", [(2, 3, 4), (2, 4, 5)], (2, 3, 5), "BatchMatMulOptions", {}, 2 * 3 * 5 * 4),
        ("BATCH_MATMUL", [(2, 4, 3), (2, 4, 5)], (2, 3, 5), "BatchMatMulOptions", {"adjX": True}, 2 * 3 * 5 * 4),
        ("FULLY_CONNECTED", [(2, 7, 8), (3, 8)], (2, 7, 3), "", {}, 2 * 7 * 3 * 8),
        ("ADD", [(2, 3), (2, 3)], (2, 3), "", {}, 0),
    ],
)
def test_macs_by_hand(
    write: Any, op: str, shapes: list[tuple[int, ...]], out: tuple[int, ...], table: str, options: Any, macs: int
) -> None:
    tensors = [Values(f"i{k}", shape) for k, shape in enumerate(shapes)]
    operator = Op(op, [t.name for t in tensors], ["y"], 1, table, options)
    data = pack([*tensors, Values("y", out)], [operator], [t.name for t in tensors], ["y"])
    assert inspect(tflite.read(write(data)))["macs"] == macs


def test_an_operator_whose_macs_are_unknown_says_so(write: Any) -> None:
    data = pack([Values("x", (1, 4)), Values("y", (1, 4))], [Op("SVDF", ["x"], ["y"])], ["x"], ["y"])
    found = inspect(tflite.read(write(data)))
    assert found["macs"] is None
    assert "SVDF" in found["reasons"][0]


# Millions of MACs as published for MLPerf Tiny (Banbury et al. 2021); the figure is rounded, hence 2 %.
def test_published_macs(zoo: Path) -> None:
    for path in published(zoo):
        assert math.isclose(inspect(tflite.read(path))["macs"], 12.5e6, rel_tol=0.02)


def test_the_oldest_runtime_is_that_of_the_newest_operator(write: Any) -> None:
    """GELU came with TensorFlow 2.9, the second RELU with 2.1, ABS with a 1.x; tensorflow/lite/tools/versioning."""
    x, y, z = Values("x", (1, 4)), Values("y", (1, 4)), Values("z", (1, 4))
    for operators, oldest in (
        ([Op("RELU", ["x"], ["y"]), Op("GELU", ["y"], ["z"])], "2.9"),
        ([Op("RELU", ["x"], ["y"]), Op("RELU", ["y"], ["z"], 2)], "2.1"),
        ([Op("RELU", ["x"], ["y"]), Op("ABS", ["y"], ["z"])], "1.15"),
        ([Op("RELU", ["x"], ["y"]), Op("ABS", ["y"], ["z"], 99)], None),
    ):
        found = inspect(tflite.read(write(pack([x, y, z], operators, ["x"], ["z"]))))
        assert found["min_runtime"] == oldest
        assert bool(found["reasons"]) is (oldest is None)


def test_custom_operators_are_refused_by_name(write: Any) -> None:
    data = pack([Values("x", (1, 4)), Values("y", (1, 4))], [Op("FlexErf", ["x"], ["y"])], ["x"], ["y"])
    told = inspect(tflite.read(write(data)))["backends"]["tflite"]
    assert told["takes"] is False
    assert "FlexErf" in told["refuses"][0]
    with pytest.raises(RuntimeError, match="FlexErf"):
        interpreter(write(data))


# --- in which numbers ---------------------------------------------------------------------------------


def quantized(name: str, shape: tuple[int, ...], dtype: str = "INT8") -> Values:
    return Values(name, shape, dtype, scales=(0.1,), zeros=(0,))


def half(weights: Values, made: str) -> list[Op]:
    return [Op("DEQUANTIZE", [weights.name], [made])]


def test_precision_of_each_kind_in_words(write: Any) -> None:
    x, y = Values("x", (1, 8)), Values("y", (1, 3))
    w8 = Values("w", (3, 8), "INT8", np.ones((3, 8), np.int8), (0.1, 0.2, 0.3))
    w16 = Values("w", (3, 8), "FLOAT16", np.ones((3, 8), np.float16))
    table = "FullyConnectedOptions"
    told = {}
    for name, tensors, operators in (
        ("dynamic", [x, w8, y], [Op("FULLY_CONNECTED", ["x", "w", ""], ["y"], 3, table)]),
        (
            "float16",
            [x, w16, Values("wf", (3, 8)), y],
            [*half(w16, "wf"), Op("FULLY_CONNECTED", ["x", "wf", ""], ["y"], 1, table)],
        ),
        (
            "weights",
            [x, w8, Values("wf", (3, 8)), y],
            [*half(w8, "wf"), Op("FULLY_CONNECTED", ["x", "wf", ""], ["y"], 1, table)],
        ),
        (
            "int16",
            [quantized("x", (1, 8), "INT16"), w8, quantized("y", (1, 3), "INT16")],
            [Op("FULLY_CONNECTED", ["x", "w", ""], ["y"], 7, table)],
        ),
        (
            "mixed",
            [quantized("x", (1, 8)), w8, quantized("q", (1, 3)), Values("f", (1, 3)), y],
            [
                Op("FULLY_CONNECTED", ["x", "w", ""], ["q"], 4, table),
                Op("DEQUANTIZE", ["q"], ["f"], 2),
                Op("SOFTMAX", ["f"], ["y"], 1, "SoftmaxOptions"),
            ],
        ),
    ):
        told[name] = numbers(tflite.read(write(pack(tensors, operators, ["x"], ["y"]))))
    told["full"] = numbers(tflite.read(write(int8_dense(floats(3, 8), floats(3), 0.02, 0.1))))
    told["float ends"] = numbers(tflite.read(write(int8_dense(floats(3, 8), floats(3), 0.02, 0.1, "FLOAT32"))))
    assert {k: v.id for k, v in told.items()} == {
        "dynamic": "int8-dynamic", "float16": "float16", "weights": "int8-weights", "int16": "int8x16",
        "mixed": "int8", "full": "int8", "float ends": "int8",
    }  # fmt: skip
    assert told["dynamic"].words.startswith("dynamic range: int8 weights")
    assert told["float16"].words.startswith("float16 weights, float32 arithmetic")
    assert told["weights"].words.startswith("int8 weights, dequantized")
    assert told["int16"].words == "full int16 activations and int8 weights, int16 inputs and outputs"
    assert told["mixed"].words == "mixed: 1 of 2 operators in int8; float: SOFTMAX; int8 inputs, float32 outputs"
    assert told["full"].words == "full int8, int8 inputs and outputs"
    assert told["float ends"].words == "full int8, float32 inputs and outputs"
    assert told["full"].layout == "weights per channel"
    assert told["float16"].layout == ""


def test_published_precision(zoo: Path) -> None:
    told = {p.stem: numbers(tflite.read(p)).words for p in published(zoo)}
    assert told == {"resnet8_float": "float32", "resnet8_int8": "full int8, int8 inputs and outputs"}


def left_to_litert(path: Path) -> Counter[str]:
    """Operators that the runtime did not hand to XNNPACK: those no delegate's outputs depend on within its inputs."""
    runtime, graph = interpreter(path), tflite.main(tflite.read(path))
    makers = {o: operator for operator in graph.operators for o in operator.outputs}
    taken: set[int] = set()
    for node in runtime._get_ops_details():
        if node["op_name"] == "DELEGATE":
            stop, todo = set(node["inputs"]), list(node["outputs"])
            while todo:
                maker = makers.get(tensor := todo.pop())
                if maker is not None and tensor not in stop and id(maker) not in taken:
                    taken.add(id(maker))
                    todo += maker.inputs
    return Counter(o.name for o in graph.operators if id(o) not in taken and o.name not in FREE)


def test_what_xnnpack_leaves_is_what_the_runtime_keeps(zoo: Path, write: Any) -> None:
    for path in (*published(zoo), write(FILES[0], "a.tflite"), write(FILES[1], "b.tflite")):
        assert own_kernels(tflite.read(path)) == left_to_litert(path), path


def test_what_xnnpack_takes_of_the_older_quantization(write: Any) -> None:
    kernel = RNG.integers(0, 255, (6, 3, 3, 4)).astype(np.uint8)
    made = {"y": (8, 8, 6), "z": (8, 8, 6), "p": (4, 4, 6), "a": (4, 4, 6), "s": (4, 4, 6)}
    tensors = [
        Values("x", (1, 8, 8, 4), "UINT8", scales=(0.1,), zeros=(128,)),
        Values("w", kernel.shape, "UINT8", kernel, (0.02,), (120,)),
        Values("b", (6,), "INT32", np.zeros(6, np.int32), (0.002,)),
        *(Values(n, (1, *shape), "UINT8", scales=(0.1,), zeros=(128,)) for n, shape in made.items() if n != "s"),
        Values("s", (1, 4, 4, 6), "UINT8", scales=(1 / 256,), zeros=(0,)),
    ]
    conv = {"strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1}
    window = {"strideW": 2, "strideH": 2, "filterWidth": 2, "filterHeight": 2, "padding": 1}
    alone = {"strideW": 1, "strideH": 1, "filterWidth": 1, "filterHeight": 1, "padding": 1}
    operators = [
        Op("CONV_2D", ["x", "w", "b"], ["y"], 1, "Conv2DOptions", conv),
        Op("ADD", ["y", "y"], ["z"], 1, "AddOptions"),
        Op("MAX_POOL_2D", ["z"], ["p"], 1, "Pool2DOptions", window),
        Op("AVERAGE_POOL_2D", ["p"], ["a"], 1, "Pool2DOptions", alone),
        Op("SOFTMAX", ["a"], ["s"], 1, "SoftmaxOptions", {"beta": 1.0}),
    ]
    path = write(pack(tensors, operators, ["x"], ["s"]))
    assert own_kernels(tflite.read(path)) == left_to_litert(path) == {"AVERAGE_POOL_2D": 1, "SOFTMAX": 1}
    assert numbers(tflite.read(path)).words == "full uint8 (the older quantization), uint8 inputs and outputs"


def test_forms_that_xnnpack_leaves(write: Any) -> None:
    """int8 weights of a float depthwise convolution, and a slice to the end; with sizes it takes the slice."""
    kernel = RNG.integers(-127, 127, (1, 3, 3, 4)).astype(np.int8)
    start = Values("start", (4,), "INT32", np.array([0, 1, 1, 0], np.int32))
    options = {"strideW": 1, "strideH": 1, "depthMultiplier": 1, "dilationWFactor": 1, "dilationHFactor": 1}
    for rows, left in ((-1, {"DEPTHWISE_CONV_2D": 1, "SLICE": 1}), (7, {"DEPTHWISE_CONV_2D": 1})):
        tensors = [
            Values("x", (1, 8, 8, 4)),
            Values("w", kernel.shape, "INT8", kernel, (0.1, 0.2, 0.3, 0.4), axis=3),
            Values("b", (4,), data=floats(4)),
            Values("y", (1, 8, 8, 4)),
            start,
            Values("sizes", (4,), "INT32", np.array([1, rows, 7, 4], np.int32)),
            Values("z", (1, 7, 7, 4)),
        ]
        operators = [
            Op("DEPTHWISE_CONV_2D", ["x", "w", "b"], ["y"], 6, "DepthwiseConv2DOptions", options),
            Op("SLICE", ["y", "start", "sizes"], ["z"], 1, "SliceOptions"),
        ]
        path = write(pack(tensors, operators, ["x"], ["z"]))
        assert own_kernels(tflite.read(path)) == left_to_litert(path) == left


@pytest.mark.parametrize("precision", ["float32", "float16", "int8-dynamic", "int8-weights"])
@pytest.mark.parametrize("name", ["digits_mlp.onnx", "digits_cnn.onnx"])
def test_what_xnnpack_leaves_of_our_own_files(name: str, precision: str, tmp_path: Path) -> None:
    import onnx_ir as ir

    from edgekit.backends import get
    from edgekit.demo import digits
    from edgekit.passes.fold import Fold

    get("tflite").lower(Fold()(ir.load(digits(name)), None), precision, tmp_path)
    model = tflite.read(tmp_path / "model.tflite")
    assert own_kernels(model) == left_to_litert(model.path)
    assert numbers(model).id == precision
    stem = 14 * 14 * 16 * 9
    blocks = 7 * 7 * (16 * 9 + 16 * 32 + 32 * 9 + 32 * 64 + 64 * 9 + 64 * 64)
    by_hand = {"digits_mlp.onnx": 784 * 256 + 256 * 128 + 128 * 10, "digits_cnn.onnx": stem + blocks + 64 * 10}
    assert inspect(model)["macs"] == by_hand[name]


# --- the command line ---------------------------------------------------------------------------------


def test_inspect_prints_a_file(write: Any) -> None:
    path = write(int8_dense(floats(3, 8), floats(3), 0.02, 0.1))
    done = CliRunner().invoke(main, ["inspect", str(path), "--layers"])
    assert done.exit_code == 0, done.output
    for words in ("int8 (1, 8), scale 0.02, zero point 0", "full int8", "FULLY_CONNECTED v4", "takes every operator"):
        assert words in done.output
    done = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert json.loads(done.output)["precision"]["id"] == "int8"


def test_inspect_refuses_a_damaged_file(write: Any) -> None:
    done = CliRunner().invoke(main, ["inspect", str(write(FILES[0][:200]))])
    assert done.exit_code == 10
    assert done.output.startswith("error: ")
    assert "damaged" in done.output


def test_convert_says_what_can_be_done_with_a_file(write: Any) -> None:
    done = CliRunner().invoke(main, ["convert", str(write(FILES[0])), "--random-calibration"])
    assert done.exit_code == 10
    for word in ("converted already", "inspect", "bench", "compare"):
        assert word in done.output
