"""What turns files into a model's inputs on host and device: against pillow and numpy used directly."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import edgekit
from edgekit import transform
from edgekit.preprocessing import Preprocessing
from edgekit.transform import TransformError

HOME = Path(edgekit.__file__).parent
TRAVELLING = [
    HOME / "transform.py",
    HOME / "bench/worker.py",
    HOME / "bench/machine.py",
    *sorted((HOME / "deploy/on_device").glob("*.py")),
    *sorted((HOME / "backends/runners").glob("*.py")),
]
RNG = np.random.default_rng(3)
PHOTO = RNG.integers(0, 256, (17, 23, 3), dtype=np.uint8)


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda p: p.name)
def test_what_travels_is_python_3_9_and_imports_no_edgekit(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    on_host = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "__package__"]
    excused = {id(inner) for block in on_host for part in block.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            assert not node.keywords, "zip(strict=) is Python 3.10"
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert id(node) in excused or not any(name.split(".")[0] == "edgekit" for name in names)


def reference(x: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """The declared steps on one RGB image, each in a line, with pillow and float64."""
    image = Image.fromarray(x)
    if how.get("resize"):
        image = image.resize((how["resize"][1], how["resize"][0]), Image.Resampling[how["method"].upper()])
    out = np.asarray(image)
    if how.get("crop"):
        top, left = (out.shape[0] - how["crop"][0]) // 2, (out.shape[1] - how["crop"][1]) // 2
        out = out[top : top + how["crop"][0], left : left + how["crop"][1]]
    if how.get("channel_order") == "BGR":
        out = out[..., ::-1]
    out = (out.astype(np.float64) * how.get("scale", 1) - how.get("mean", 0)) / how.get("std", 1)
    return out.transpose(2, 0, 1) if how.get("layout") == "NCHW" else out


HOWS = st.fixed_dictionaries(
    {"method": st.sampled_from(["bilinear", "nearest", "bicubic"])},
    optional={
        "resize": st.tuples(st.integers(6, 30), st.integers(6, 30)).map(list),
        "crop": st.tuples(st.integers(1, 6), st.integers(1, 6)).map(list),
        "channel_order": st.sampled_from(["RGB", "BGR"]),
        "scale": st.sampled_from([1 / 255, 2.0, -0.5]),
        "mean": st.sampled_from([[0.5], [0.485, 0.456, 0.406]]),
        "std": st.sampled_from([[0.25], [0.229, 0.224, 0.225]]),
        "layout": st.sampled_from(["NHWC", "NCHW"]),
    },
)


@settings(max_examples=60, deadline=None)
@given(HOWS)
def test_every_combination_of_steps_is_pillows_and_numpys(how: dict[str, Any]) -> None:
    got = transform.apply(PHOTO[None], how)
    expected = reference(PHOTO, how)
    assert got.dtype == np.float32
    assert got.shape == (1, *expected.shape)
    # three float32 roundings, of values up to 510 before a division by at least 0.2
    np.testing.assert_allclose(got[0], expected, rtol=1e-6, atol=510 * 2**-24 / 0.2 * 3)


@settings(max_examples=20, deadline=None)
@given(HOWS)
def test_the_dict_and_the_dataclass_are_one(how: dict[str, Any]) -> None:
    same = Preprocessing.from_json(how)
    np.testing.assert_array_equal(transform.apply(PHOTO[None], how), same.apply(PHOTO[None]))
    assert transform.numeric(how) == same.numeric == any(k in how for k in ("scale", "mean", "std"))


def test_it_runs_where_there_is_no_edgekit(tmp_path: Path) -> None:
    """The same bits from a copy in another folder, with an edgekit in the way that must not be imported."""
    shutil.copy(HOME / "transform.py", tmp_path)
    (tmp_path / "edgekit.py").write_text("raise RuntimeError('imported on a device')")
    Image.fromarray(PHOTO).save(tmp_path / "p.png")
    how = {"resize": [8, 9], "scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "layout": "NCHW"}
    code = (
        "import sys, numpy as np, transform\n"
        "x = transform.decode('p.png', 3)\n"
        "spec = {'name': 'x', 'dtype': 'float32', 'shape': ['n', 3, 8, 9]}\n"
        f"np.save('y.npy', transform.deliver(x[None], spec, {how!r}, True))\n"
        "assert 'edgekit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), Preprocessing.from_json(how).apply(PHOTO[None]))


def test_pillow_is_imported_only_for_images() -> None:
    code = (
        "import sys, numpy as np\nfrom edgekit import transform\n"
        "transform.apply(np.zeros((1, 4, 4, 3), np.uint8), {'crop': [2, 2], 'scale': 2.0})\n"
        "assert not any(name.split('.')[0] == 'PIL' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def spec(*shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": "in", "dtype": dtype, "shape": ["n", *shape]}


@pytest.mark.parametrize(
    ("have", "want", "remedy"),
    [
        ((8, 9, 3), (3, 8, 9), "pass --layout NCHW"),
        ((8, 9, 3), (3, 4, 4), "pass --layout NCHW --resize 4x4"),
        ((3, 8, 9), (8, 9, 3), "pass --layout NHWC"),
        ((8, 9, 3), (4, 6, 3), "pass --resize 4x6"),
        ((3, 8, 9), (3, 4, 4), "pass --resize 4x4"),
        ((5,), (4,), "if one column is the label, name it with --label-column"),
        ((8, 9), (10,), "pass --resize so that 8 x 9 becomes 10 values"),
        ((2, 2), (3, 3), "give data of the model's shape"),
    ],
)
def test_sizes_that_do_not_fit_name_the_remedy(have: tuple[int, ...], want: tuple[int, ...], remedy: str) -> None:
    with pytest.raises(TransformError) as caught:
        transform.deliver(np.zeros((1, *have), np.float32), spec(*want), {}, True)
    assert caught.value.kind == "shape"
    assert caught.value.remedy == remedy
    assert all(str(s) in caught.value.what for s in (*have, *want))


def test_delivered_are_the_models_shape_and_type() -> None:
    x = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    flat = transform.deliver(x, spec(6), {"scale": 0.5}, True)
    np.testing.assert_array_equal(flat, np.arange(12, dtype=np.float32).reshape(2, 6) / 2)
    whole = transform.deliver(x.astype(np.float64), spec(3, 2, dtype="int8"), {}, True)
    assert whole.dtype == np.int8
    np.testing.assert_array_equal(whole, x)
    # beside another input only what may be an image is preprocessed
    np.testing.assert_array_equal(transform.deliver(x[:, 0], spec(2), {"scale": 0.5}, False), x[:, 0])
    for bad in (x + 0.5, x.astype(np.int32) + 1000):
        with pytest.raises(TransformError, match="takes int8"):
            transform.deliver(bad, spec(3, 2, dtype="int8"), {}, True)
    with pytest.raises(TransformError, match="too large for float16"):
        transform.deliver(np.full((1, 2), 1e6), spec(2, dtype="float16"), {}, True)


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        (["n", 28, 28], None, 1),
        (["n", 8, 8, 3], None, 3),
        (["n", 8, 8, 1], None, 1),
        (["n", 3, 8, 8], "NCHW", 3),
        (["n", 3, 8, 8], None, 3),
        (["n", 784], None, None),
        (["n", "h", "w", 4], None, None),
    ],
)
def test_images_are_decoded_to_the_channels_of_the_model(shape: list[Any], layout: str | None, expected: Any) -> None:
    assert transform.channels(shape, layout) == expected


def test_options_win_over_what_is_declared() -> None:
    declared = {"resize": [4, 4], "scale": 2.0, "mean": None}
    given = {"resize": "8X6", "crop": "5", "mean": "1/2,0.25,-1", "channel_order": "bgr", "layout": None}
    merged = transform.merged(declared, given)
    assert merged == {**declared, "resize": [8, 6], "crop": [5, 5], "mean": [0.5, 0.25, -1.0], "channel_order": "BGR"}
    assert declared["resize"] == [4, 4]
    for wrong in (
        {"resize": "8x"},
        {"resize": "0x5"},
        {"scale": "1/0"},
        {"scale": "0"},
        {"scale": "1,2"},
        {"std": "1,0"},
        {"std": "a"},
        {"layout": "HWC"},
    ):
        with pytest.raises(TransformError) as caught:
            transform.merged(declared, wrong)
        assert caught.value.kind == "option"
