"""Datasets of arrays, tables and functions: what comes out, against numpy reading the same file whole."""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.dataset import Dataset, Preprocessing, check_labels, open_dataset, overlap, random_dataset, shared_ids
from edgekit.errors import DatasetError, EdgekitError, LabelError, MissingExtraError, NonFiniteError, ShapeError
from edgekit.model import Signature, TensorSpec

RNG = np.random.default_rng(1)
X = RNG.integers(0, 256, (23, 4, 6, 3), dtype=np.uint8)
Y = RNG.integers(0, 5, 23)


def sig(*inputs: tuple[Any, ...], classes: int = 5, dtype: str = "float32") -> Signature:
    """A model of inputs (name, *sample shape) and one output of `classes` scores."""
    return Signature(
        tuple(TensorSpec(name, dtype, ("n", *shape)) for name, *shape in inputs),
        (TensorSpec("scores", "float32", ("n", classes)),),
    )


def whole(data: Dataset, size: int = 7) -> tuple[dict[str, np.ndarray], np.ndarray | None, np.ndarray]:
    parts = list(data.batches(size))
    assert all(len(p.index) == size for p in parts[:-1])
    labels = None if parts[0].labels is None else np.concatenate([p.labels for p in parts if p.labels is not None])
    inputs = {k: np.concatenate([p.inputs[k] for p in parts]) for k in parts[0].inputs}
    return inputs, labels, np.concatenate([p.index for p in parts])


def save(path: Path, compressed: bool = True, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


# --- forms -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["uint8", ">f4", "<f8", ">i2", "bool"])
def test_npz_streams_what_numpy_loads(tmp_path: Path, compressed: bool, order: str, dtype: str) -> None:
    x = np.asarray(X, dtype, order=order)  # type: ignore[call-overload]
    data = open_dataset(save(tmp_path / "d.npz", compressed, x=x, y=Y)).bind(sig(("image", 4, 6, 3)))
    inputs, labels, index = whole(data)
    assert inputs["image"].dtype == np.float32
    np.testing.assert_array_equal(inputs["image"], x.astype(np.float32))
    np.testing.assert_array_equal(labels, Y)
    np.testing.assert_array_equal(index, np.arange(23))
    taken, _, where = whole(data.take(9, seed=3), size=4)
    np.testing.assert_array_equal(taken["image"], x[where].astype(np.float32))


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_with_and_without_labels(tmp_path: Path, order: str) -> None:
    np.save(tmp_path / "x.npy", np.asarray(X, order=order))  # type: ignore[call-overload]
    np.save(tmp_path / "y.npy", Y.reshape(-1, 1))
    (tmp_path / "y.txt").write_text("\n".join(map(str, Y)))
    assert not open_dataset(tmp_path / "x.npy").labelled
    for labels in ("y.npy", "y.txt"):
        data = open_dataset(tmp_path / "x.npy", labels=tmp_path / labels)
        np.testing.assert_array_equal(whole(data)[1], Y)
        np.testing.assert_array_equal(whole(data)[0]["x"], X)


def test_several_inputs_go_by_name(tmp_path: Path) -> None:
    a, b = RNG.random((8, 3)), RNG.random((8, 2, 2))
    data = open_dataset(save(tmp_path / "d.npz", b=b, a=a, label=np.arange(8) % 5))
    inputs, labels, _ = whole(data.bind(sig(("a", 3), ("b", 4))))
    np.testing.assert_array_equal(inputs["a"], a.astype(np.float32))
    np.testing.assert_array_equal(inputs["b"], b.reshape(8, 4).astype(np.float32))
    np.testing.assert_array_equal(labels, np.arange(8) % 5)
    with pytest.raises(DatasetError, match=r"no input 'aa'.*did you mean 'a'"):
        data.bind(sig(("aa", 3), ("b", 4)))


def test_arrays_beside_x_are_passed_over_or_chosen(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=X, y=Y, names=np.array(["a"] * 23), other=X[:, 0], x_test=X[:5], y_test=Y[:5])
    assert list(whole(open_dataset(path))[0]) == ["x"]
    chosen = open_dataset(f"{path}#x_test")
    assert (chosen.samples, chosen.name) == (5, "d.npz#x_test")
    np.testing.assert_array_equal(whole(chosen)[1], Y[:5])
    with pytest.raises(DatasetError, match=r"no array 'z'.*it has: x, y, names"):
        open_dataset(f"{path}#z")
    with pytest.raises(DatasetError, match="23 samples and 5 labels"):
        open_dataset(path, label_column="y_test")


def test_tokens_become_windows(tmp_path: Path) -> None:
    tokens = RNG.integers(0, 50, 103, dtype=np.uint8)
    path = save(tmp_path / "t.npz", train=tokens, val=tokens[:41], vocab=np.array(["a", "b"]))
    model = Signature((TensorSpec("ids", "int32", ("n", 10)),), (TensorSpec("s", "float32", ("n", 10, 50)),))
    with pytest.raises(DatasetError, match="differ in length"):
        open_dataset(path)
    data = open_dataset(f"{path}#train").bind(model)
    inputs, labels, _ = whole(data, size=4)
    assert inputs["ids"].dtype == np.int32
    np.testing.assert_array_equal(inputs["ids"], tokens[:100].reshape(10, 10))
    np.testing.assert_array_equal(labels, tokens[1:101].reshape(10, 10))
    early, late = open_dataset(f"{path}#train").take(3).bind(model), data.take(3)
    np.testing.assert_array_equal(whole(early)[0]["ids"], whole(late)[0]["ids"])
    assert early.samples == 3
    assert open_dataset(f"{path}#val").bind(model).samples == 4
    assert overlap(open_dataset(f"{path}#val").bind(model), data) == 4


def test_csv_and_parquet_give_the_same(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    features = RNG.normal(size=(600, 4))
    names = np.array(["cat", "bee", "ant"])[RNG.integers(0, 3, 600)]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["p", "kind", "q", "r", "s"])
        writer.writerows([f[0], n, *f[1:]] for f, n in zip(features.tolist(), names, strict=True))
    columns = {"p": features[:, 0], "kind": names, "q": features[:, 1], "r": features[:, 2], "s": features[:, 3]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=100)
    expected = np.array([{"ant": 0, "bee": 1, "cat": 2}[n] for n in names])
    opened = [open_dataset(tmp_path / f"t.{s}", label_column="kind") for s in ("csv", "parquet")]
    for data in opened:
        inputs, labels, _ = whole(data.bind(sig(("in", 2, 2), classes=3)))
        np.testing.assert_array_equal(inputs["in"], features.astype(np.float32).reshape(600, 2, 2))
        np.testing.assert_array_equal(labels, expected)
        assert data.classes == ("ant", "bee", "cat")
    assert opened[0].digest == opened[1].digest
    (tmp_path / "names.txt").write_text("cat\nant\nbee\n")
    again = open_dataset(tmp_path / "t.csv", label_column="kind", labels=tmp_path / "names.txt")
    np.testing.assert_array_equal(whole(again)[1], (expected + 1) % 3)


def test_csv_semicolon_bom_and_regression(tmp_path: Path) -> None:
    path = tmp_path / "größe.csv"
    path.write_text("﻿a;b;y\n1;2;0.5\n3;4;1\n\n", encoding="utf-8")
    inputs, labels, _ = whole(open_dataset(path).bind(sig(("in", 2), classes=1)))
    np.testing.assert_array_equal(inputs["in"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(labels, np.float32([0.5, 1]))


MODULE = """
import numpy as np
def samples():
    rng = np.random.default_rng(0)
    for i in range(11):
        yield rng.random(3), i % 4
def dicts():
    return [{"a": np.ones(3) * i, "b": np.zeros(2), "label": i} for i in range(3)]
def arrays():
    return np.arange(12).reshape(4, 3), np.arange(4)
calls = []
def shrinking():
    calls.append(0)
    return ((np.ones(3), 0) for _ in range(5 - len(calls)))
def failing():
    yield np.ones(3), 0
    raise KeyError("gone")
def objects():
    yield "text", 0
def nothing():
    return []
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_samples.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_samples", raising=False)
    return "my_samples"


def test_functions(module: str) -> None:
    data = open_dataset(f"{module}:samples").bind(sig(("in", 3)))
    expected = np.random.default_rng(0).random((11, 3)).astype(np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(whole(data)[0]["in"], expected)
    np.testing.assert_array_equal(whole(data)[1], np.arange(11) % 4)
    inputs, labels, _ = whole(open_dataset(f"{module}:dicts").bind(sig(("b", 2), ("a", 3))))
    np.testing.assert_array_equal(inputs["a"][:, 0], [0, 1, 2])
    np.testing.assert_array_equal(labels, [0, 1, 2])
    assert open_dataset(f"{module}:arrays").samples == 4


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("failing", "KeyError: 'gone'.*my_samples.py:17"),
        ("objects", "type str"),
        ("nothing", "no samples"),
        ("absent", "no function 'absent'"),
    ],
)
def test_functions_that_fail(module: str, name: str, told: str) -> None:
    with pytest.raises(DatasetError, match=told):
        open_dataset(f"{module}:{name}")


def test_a_function_that_changes_is_noticed(module: str) -> None:
    data = open_dataset(f"{module}:shrinking")
    with pytest.raises(DatasetError, match="other samples than before"):
        list(data.batches(2))


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(DatasetError, match="ModuleNotFoundError"):
        open_dataset("no_such_module_here:f")


# --- subsets, ids, digests -------------------------------------------------------------------------
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 99), size=st.integers(1, 25))
def test_take_is_a_seeded_subset_in_order(tmp_path: Path, n: int, m: int, seed: int, size: int) -> None:
    path = tmp_path / "d.npz"
    if not path.exists():
        save(path, x=X, y=Y)
    data = open_dataset(path).take(n, seed).take(m, seed + 1)
    inputs, labels, index = whole(data, size)
    assert data.samples == len(index) == min(n, m, 23)
    assert (np.diff(index) > 0).all()
    np.testing.assert_array_equal(inputs["x"], X[index])
    np.testing.assert_array_equal(labels, Y[index])
    np.testing.assert_array_equal(whole(data, 23)[2], index)
    everything = open_dataset(path).sample_ids()
    assert data.sample_ids() == [everything[i] for i in index]


def test_ids_and_digest_depend_on_values_alone(tmp_path: Path) -> None:
    one = open_dataset(save(tmp_path / "a.npz", x=X, y=Y))
    other = open_dataset(save(tmp_path / "b.npz", False, inputs=np.asarray(X, ">f8", order="F"), labels=Y.astype("i1")))
    table = tmp_path / "c.csv"
    header = ",".join(f"p{i}" for i in range(72)) + ",y"
    np.savetxt(table, np.column_stack([X.reshape(23, -1), Y]), "%d", ",", header=header, comments="")
    assert one.sample_ids() == other.sample_ids() == open_dataset(table).sample_ids()
    assert one.digest == other.digest == open_dataset(table).digest
    assert one.digest == one.bind(sig(("image", 4, 6, 3))).digest
    changed = X.copy()
    changed[5, 0, 0, 0] ^= 1
    third = open_dataset(save(tmp_path / "d.npz", x=changed, y=Y))
    assert overlap(one, third) == 22
    assert (
        len({one.digest, third.digest, one.take(22).digest, one.with_preprocessing(Preprocessing(scale=2)).digest}) == 4
    )
    assert open_dataset(save(tmp_path / "e.npz", x=X, y=Y[::-1])).digest != one.digest
    assert open_dataset(save(tmp_path / "f.npz", x=X)).digest != one.digest


def test_overlap_ignores_preprocessing_and_counts_each_sample_once(tmp_path: Path) -> None:
    a = open_dataset(save(tmp_path / "a.npz", x=X[[0, 1, 1, 2]]), preprocessing=Preprocessing(scale=1 / 255))
    b = open_dataset(save(tmp_path / "b.npz", x=X[[1, 2, 2, 9]]))
    assert overlap(a, b) == overlap(b, a) == 2
    assert shared_ids(a, b) == a.sample_ids()[1:2] + a.sample_ids()[3:]


def test_the_toml_beside_the_data_is_used_and_overridden(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=X)
    (tmp_path / "d.toml").write_text("scale = 2")
    np.testing.assert_array_equal(whole(open_dataset(path))[0]["x"], X.astype(np.float32) * 2)
    np.testing.assert_array_equal(whole(open_dataset(path, preprocessing=Preprocessing()))[0]["x"], X)


def test_random_data_fit_and_repeat() -> None:
    model = Signature((TensorSpec("a", "float32", ("n", 3)), TensorSpec("b", "int64", ("n", 2))), ())
    one, two = whole(random_dataset(model, 9, 4))[0], whole(random_dataset(model, 9, 4), 2)[0]
    assert one["b"].dtype == np.int64
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    assert not np.array_equal(one["a"], whole(random_dataset(model, 9, 5))[0]["a"])


# --- labels ----------------------------------------------------------------------------------------
def test_one_hot_whole_floats_and_columns_become_classes(tmp_path: Path) -> None:
    for i, y in enumerate((np.eye(5)[Y], np.eye(5, dtype=bool)[Y], Y.astype(np.float32), Y.reshape(-1, 1))):
        data = open_dataset(save(tmp_path / f"{i}.npz", x=X, y=y)).bind(sig(("image", 4, 6, 3)))
        labels = whole(data)[1]
        assert labels is not None
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, Y)
        np.testing.assert_array_equal(check_labels(data, 5), np.bincount(Y, minlength=5))


@pytest.mark.parametrize(
    ("y", "told"),
    [
        (np.full(23, 3), "all 23 samples .* are of class 3"),
        (np.where(np.arange(23) == 7, 5, Y), r"label 5 of sample 7 is outside .* \(0 to 4\)"),
        (np.where(np.arange(23) == 7, -1, Y), "label -1 of sample 7"),
        (Y + 0.5, "not classes"),
        (None, "no labels"),
    ],
)
def test_labels_that_mean_nothing(tmp_path: Path, y: np.ndarray | None, told: str) -> None:
    path = save(tmp_path / "d.npz", x=X, **({} if y is None else {"y": y}))
    with pytest.raises(LabelError, match=told):
        check_labels(open_dataset(path).bind(sig(("image", 4, 6, 3))), 5)


def test_labels_that_change_their_kind(tmp_path: Path) -> None:
    x = np.zeros((100, 2))
    soft = np.eye(5)[np.arange(100) % 5]
    soft[80] = 0.2
    with pytest.raises(LabelError, match="sample 80 is not one-hot"):
        check_labels(open_dataset(save(tmp_path / "a.npz", x=x, y=soft)).bind(sig(("in", 2))), 5)
    late = np.arange(100) % 5 * 1.0
    late[90] = 1.5
    with pytest.raises(LabelError, match=r"label 1\.5 of sample 90"):
        check_labels(open_dataset(save(tmp_path / "b.npz", x=x, y=late)).bind(sig(("in", 2))), 5)
    late[90] = np.nan
    with pytest.raises(NonFiniteError, match="label of sample 90"):
        check_labels(open_dataset(save(tmp_path / "c.npz", x=x, y=late)).bind(sig(("in", 2))), 5)


# --- shapes and types ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("have", "want", "hint"),
    [
        ((4, 6, 3), (3, 4, 6), "--layout NCHW"),
        ((4, 6, 3), (3, 8, 8), "--layout NCHW --resize 8x8"),
        ((3, 4, 6), (4, 6, 3), "--layout NHWC"),
        ((4, 6, 3), (8, 12, 3), "--resize 8x12"),
        ((11,), (10,), "--label-column"),
        ((4, 6), (25,), "--resize"),
    ],
)
def test_a_wrong_shape_names_both_and_the_flag(
    tmp_path: Path, have: tuple[int, ...], want: tuple[int, ...], hint: str
) -> None:
    data = open_dataset(save(tmp_path / "d.npz", x=np.zeros((2, *have))))
    with pytest.raises(ShapeError) as told:
        data.bind(sig(("in", *want)))
    for part in (*map(str, have), *map(str, want), "in"):
        assert part in told.value.what
    assert hint in told.value.remedy


@pytest.mark.parametrize(
    ("have", "want"),
    [((4, 7), (28,)), ((4, 7), (4, 7, 1)), ((4, 7, 1), (1, 4, 7)), ((28,), (4, 7, 1)), ((4, 7, 3), (84,)), ((), (1,))],
)
def test_shapes_that_only_need_a_reshape(tmp_path: Path, have: tuple[int, ...], want: tuple[int, ...]) -> None:
    x = RNG.random((5, *have)).astype(np.float32)
    inputs, _, _ = whole(open_dataset(save(tmp_path / "d.npz", x=x)).bind(sig(("in", *want))))
    np.testing.assert_array_equal(inputs["in"], x.reshape(5, *want))


def test_types(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=np.array([[1.0, 300.0]]), half=np.array([[0.5, 1.0]]), big=np.array([[1e300, 0]]))
    ids = sig(("in", 2), dtype="int64")
    assert whole(open_dataset(path).bind(ids))[0]["in"].dtype == np.int64
    for model, key, kind in (
        (ids, "half", ShapeError),
        (sig(("in", 2), dtype="uint8"), "x", ShapeError),
        (sig(("in", 2)), "big", NonFiniteError),
    ):
        with pytest.raises(kind):
            open_dataset(f"{path}#{key}").bind(model)
    with pytest.raises(ShapeError, match="takes int64, so scale"):
        open_dataset(path, preprocessing=Preprocessing(scale=2)).bind(ids)


# --- bad files -------------------------------------------------------------------------------------
def _truncate(path: Path, keep: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def _npy(path: Path, array: Any) -> Path:
    np.save(path, array, allow_pickle=True)
    return path


class _Trap:
    """Leaves a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _zip_of_damaged_npy(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00nonsense")
    return path


BAD: dict[str, Callable[[Path], Any]] = {
    "missing": lambda d: d / "none.npz",
    "unknown form": lambda d: _npy(d / "a.npy", X).rename(d / "a.bin"),
    "empty npz": lambda d: save(d / "a.npz"),
    "labels only": lambda d: save(d / "a.npz", y=Y),
    "no samples": lambda d: save(d / "a.npz", x=X[:0], y=Y[:0]),
    "empty samples": lambda d: save(d / "a.npz", x=np.zeros((3, 0))),
    "lengths differ": lambda d: save(d / "a.npz", x=X, y=Y[:4]),
    "truncated npz": lambda d: _truncate(save(d / "a.npz", x=X, y=Y), 0.5),
    "truncated npy": lambda d: _truncate(_npy(d / "a.npy", X), 0.5),
    "truncated Fortran npy": lambda d: _truncate(_npy(d / "a.npy", np.asfortranarray(X)), 0.5),
    "truncated header": lambda d: _truncate(_npy(d / "a.npy", X), 0.01),
    "no zip": lambda d: _npy(d / "a.npy", X).rename(d / "a.npz"),
    "no npy": lambda d: save(d / "a.npz", x=X).rename(d / "a.npy"),
    "damaged npy in npz": lambda d: _zip_of_damaged_npy(d / "a.npz"),
    "a number": lambda d: _npy(d / "a.npy", np.float32(3)),
    "structured": lambda d: _npy(d / "a.npy", np.zeros(3, [("a", "f4"), ("b", "i4")])),
    "text": lambda d: _npy(d / "a.npy", np.array(["a", "b"])),
    "complex": lambda d: _npy(d / "a.npy", np.zeros(3, complex)),
    "empty folder": lambda d: (d / "f").mkdir() or d / "f",
    "NaN": lambda d: save(d / "a.npz", x=np.array([[1.0], [np.nan]])),
    "empty csv": lambda d: ((d / "a.csv").write_text("") and None) or d / "a.csv",
    **{
        f"csv {text!r}": lambda d, text=text: ((d / "a.csv").write_text(text, "latin-1") and None) or d / "a.csv"
        for text in (
            "a,b\n", "a,b\n1\n", "a,b\n1,x\n", "1.5,2.5\n3,4\n", ",a\n0,1\n", "a,a\n1,2\n", "a,b\n1,\n", "y\n1\n",
            "a,y\n1,\n", "a,y\n1,2\nnan,1\n", "a,y\n1,\xff\n",
        )
    },
    "no parquet": lambda d: ((d / "a.parquet").write_text("nonsense") and None) or d / "a.parquet",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_get_one_line_and_a_remedy(tmp_path: Path, case: str) -> None:
    with pytest.raises(EdgekitError) as told:
        whole(open_dataset(BAD[case](tmp_path)))
    assert told.value.remedy
    assert "\n" not in str(told.value)
    assert told.value.exit_code in (15, 20, 21)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    trap = np.empty(2, object)
    trap[:] = [_Trap(tmp_path / "sprung"), 1]
    assert pickle.dumps(trap)
    for path in (
        save(tmp_path / "a.npz", x=trap),
        _npy(tmp_path / "b.npy", trap),
        save(tmp_path / "c.npz", x=X, y=trap),
    ):
        with pytest.raises(DatasetError, match="pickled"):
            open_dataset(path)
    assert not (tmp_path / "sprung").exists()


def test_nan_names_the_sample(tmp_path: Path) -> None:
    x = np.zeros((50, 3), np.float32)
    x[37, 1] = np.inf
    with pytest.raises(NonFiniteError, match="sample 37"):
        whole(open_dataset(save(tmp_path / "d.npz", x=x)).bind(sig(("in", 3))))


@pytest.mark.parametrize(("package", "file", "extra"), [("PIL", "f", "images"), ("pyarrow", "t.parquet", "tables")])
def test_a_missing_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, file: str, extra: str
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").touch()
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as told:
        whole(open_dataset(tmp_path / file))
    assert told.value.remedy == f"pip install 'edgekit[{extra}]'"


def test_tokens_of_the_zoo_score_what_they_should(zoo: Path) -> None:
    """Its README gives 2.555 bits a character on all validation tokens; 256 windows are within 0.05 of it."""
    ir = pytest.importorskip("onnx_ir")
    from edgekit import model as M

    model = ir.load(zoo / "models" / "gpt_char_tinyshakespeare.onnx")
    session = M.FloatSession(model)
    data = open_dataset(f"{zoo}/data/tinyshakespeare_tokens.npz#val").bind(M.signature(model)).take(256)
    bits = []
    for part in data.batches(64):
        (scores,) = session.run(part.inputs).values()
        assert part.labels is not None
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        bits.append(-np.take_along_axis(logs, part.labels[..., None], -1) / np.log(2))
    assert abs(np.concatenate(bits).mean() - 2.555) < 0.05


# --- memory ----------------------------------------------------------------------------------------
MEMORY = """
import sys
from edgekit.dataset import open_dataset
data = open_dataset(sys.argv[1])
for part in data.batches(32):
    part.inputs["x"].sum()
data.digest
for part in data.take(200).batches(32):
    pass
# Not ru_maxrss: a child inherits the parent's.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux' /proc")
@pytest.mark.parametrize("form", ["deflated", "stored", "npy", "Fortran npy", "Fortran npz", "csv", "parquet"])
def test_memory_does_not_grow_with_the_samples(tmp_path: Path, form: str) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    peak = {n: _peak(_large(tmp_path, form, n)) for n in (500, 10_000)}
    assert peak[10_000] <= 1.1 * peak[500], peak


def _peak(path: Path) -> int:
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _large(folder: Path, form: str, n: int) -> Path:
    """n samples; 10,000 of them are 123 MB as float32 (tables: 8 columns)."""
    rng = np.random.default_rng(0)
    path = folder / f"{n}"
    if form in ("csv", "parquet"):
        x = rng.normal(size=(n, 8))
        if form == "csv":
            np.savetxt(path.with_suffix(".csv"), x, "%.9g", ",", header=",".join("abcdefgh"), comments="")
            return path.with_suffix(".csv")
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({c: x[:, i] for i, c in enumerate("abcdefgh")}), path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    x = rng.integers(0, 4, (n, 32, 32, 3), dtype=np.uint8).astype(np.float32)
    if form.startswith("Fortran"):
        x = np.asfortranarray(x)
    if form.endswith("npy"):
        return _npy(path.with_suffix(".npy"), x)
    return save(path.with_suffix(".npz"), form == "deflated", x=x)


def test_names_of_classes_may_stand_in_a_file_or_beside_the_arrays(tmp_path: Path) -> None:
    x, y = np.zeros((3, 2), np.float32), np.array([0, 1, 1])
    np.savez(tmp_path / "d.npz", x=x, y=y)
    (tmp_path / "names.txt").write_text("café\nhot dog\n", encoding="utf-8")
    named = open_dataset(tmp_path / "d.npz", labels=tmp_path / "names.txt")
    assert named.classes == ("café", "hot dog")
    np.testing.assert_array_equal(next(named.batches(3)).labels, y)
    np.savez(tmp_path / "n.npz", x=x, y=y, classes=np.array(["a", "b"]))
    assert open_dataset(tmp_path / "n.npz").classes == ("a", "b")
    np.savez(tmp_path / "u.npz", x=x)
    with pytest.raises(LabelError, match="no numbers"):
        open_dataset(tmp_path / "u.npz", labels=tmp_path / "names.txt")


def test_windows_of_tokens_keep_the_vocabulary(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.arange(9) % 3, vocab=np.array(["\n", " ", "a"]))
    sig = Signature((TensorSpec("ids", "int64", ("n", 4)),), (TensorSpec("y", "float32", ("n", 4, 3)),))
    assert open_dataset(tmp_path / "t.npz").bind(sig).classes == ("\n", " ", "a")


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    x = np.zeros((3, 2), np.float32)
    for name, y, names in (
        ("classes", np.array([0, 2, 1]), ("0", "1", "2", "3")),
        ("reals", np.array([0.5, 2, 1]), ()),
        ("several", np.zeros((3, 4)), ()),
    ):
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
        model = sig(("x", 2), classes=4)
        assert open_dataset(tmp_path / f"{name}.npz").bind(model).class_names(model) == names
