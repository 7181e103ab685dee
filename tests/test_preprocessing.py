"""Preprocessing against formulas written out here and pillow used directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import DatasetError, ShapeError
from edgekit.preprocessing import Preprocessing, find_file

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 10, 14, 3), dtype=np.uint8)


def test_nothing_asked_is_a_float_copy() -> None:
    out = Preprocessing().apply(IMAGES)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, IMAGES)


def test_scale_mean_std_follow_the_torchvision_formula() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = Preprocessing(scale=1 / 255, mean=mean, std=std, layout="NCHW").apply(IMAGES)
    expected = ((IMAGES.astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert out.dtype == np.float32
    assert out.flags["C_CONTIGUOUS"]
    # float32 has 24 bits; three operations on values up to 3 lose at most a few units in the last place
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_channel_first_data_keep_their_layout_and_channel_axis() -> None:
    first = IMAGES.transpose(0, 3, 1, 2)
    how = Preprocessing(mean=(1, 2, 3), channel_order="BGR")
    expected = IMAGES[..., ::-1].astype(np.float32) - np.float32([1, 2, 3])
    np.testing.assert_array_equal(how.apply(first), expected.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(Preprocessing(layout="NHWC").apply(first), IMAGES)


@pytest.mark.parametrize("method", ["bilinear", "nearest", "bicubic"])
def test_resize_is_pillows(method: str) -> None:
    out = Preprocessing(resize=(5, 8), method=method).apply(IMAGES)  # type: ignore[arg-type]
    kind = {"bilinear": Image.BILINEAR, "nearest": Image.NEAREST, "bicubic": Image.BICUBIC}[method]
    expected = np.stack([np.asarray(Image.fromarray(i).resize((8, 5), kind)) for i in IMAGES])
    np.testing.assert_array_equal(out, expected)


def test_resize_of_floats_works_per_channel_and_does_not_round() -> None:
    x = RNG.random((2, 6, 6, 4)).astype(np.float32)
    out = Preprocessing(resize=(3, 3)).apply(x)
    expected = np.asarray(Image.fromarray(x[1, ..., 2]).resize((3, 3), Image.BILINEAR))
    assert out.shape == (2, 3, 3, 4)
    np.testing.assert_array_equal(out[1, ..., 2], expected)


def test_shorter_side_then_centre_crop_of_images_of_several_sizes() -> None:
    images = [np.full((20, 40, 3), 7, np.uint8), np.full((50, 25, 3), 9, np.uint8)]
    out = Preprocessing(resize=10, crop=(8, 8)).apply(images)
    assert out.shape == (2, 8, 8, 3)
    assert out[0].max() == out[0].min() == 7


def test_crop_takes_the_centre() -> None:
    x = np.arange(7 * 8, dtype=np.uint8).reshape(1, 7, 8)
    np.testing.assert_array_equal(Preprocessing(crop=(3, 4)).apply(x), x[:, 2:5, 2:6])


def test_the_order_is_crop_then_bgr_then_mean() -> None:
    out = Preprocessing(crop=(2, 2), channel_order="BGR", mean=(10, 0, 0)).apply(IMAGES)
    np.testing.assert_array_equal(out[..., 0], IMAGES[:, 4:6, 6:8, 2].astype(np.float32) - 10)


def test_values_that_are_no_image_get_scale_only() -> None:
    x = np.array([[1, 2, 3, 4, 5]], np.int32)
    np.testing.assert_array_equal(Preprocessing(scale=2, mean=(1,)).apply(x), [[1, 3, 5, 7, 9]])
    np.testing.assert_array_equal(Preprocessing(std=(1, 2, 3, 4, 5)).apply(x), np.ones((1, 5)))


@pytest.mark.parametrize(
    ("how", "x"),
    [
        (Preprocessing(resize=(2, 2)), np.zeros((1, 5))),
        (Preprocessing(channel_order="BGR"), np.zeros((1, 5))),
        (Preprocessing(channel_order="BGR"), np.zeros((1, 4, 4, 1))),
        (Preprocessing(layout="NCHW"), np.zeros((1, 5))),
        (Preprocessing(crop=(9, 9)), np.zeros((1, 4, 4, 3))),
        (Preprocessing(mean=(1, 2, 3)), np.zeros((1, 4, 4, 1))),
        (Preprocessing(), [np.zeros((2, 2, 3)), np.zeros((2, 3, 3))]),
    ],
)
def test_what_does_not_fit_says_so(how: Preprocessing, x: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="—"):
        how.apply(x)


numbers = st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-3)
sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


@given(
    st.builds(
        Preprocessing,
        resize=st.none() | st.integers(1, 99) | sizes,
        method=st.sampled_from(["bilinear", "nearest", "bicubic"]),
        crop=st.none() | sizes,
        channel_order=st.sampled_from([None, "RGB", "BGR"]),
        scale=st.none() | numbers,
        mean=st.none() | st.tuples(numbers, numbers, numbers),
        std=st.none() | st.tuples(numbers),
        layout=st.sampled_from([None, "NHWC", "NCHW"]),
    )
)
def test_json_round_trip(how: Preprocessing) -> None:
    assert Preprocessing.from_json(how.to_json()) == how
    assert "\n" not in how.describe()


def test_toml_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('resize = [96, 64]\nscale = "1/255"\nmean = [0.5, 0.4, 0.3]\nchannel_order = "BGR"\n')
    how = Preprocessing.from_toml(file)
    assert how == Preprocessing(resize=(96, 64), scale=1 / 255, mean=(0.5, 0.4, 0.3), channel_order="BGR")
    merged = how.merge(scale="1/127.5", mean="1", layout="nchw", crop="32", channel_order="rgb")
    assert merged == Preprocessing((96, 64), "bilinear", (32, 32), "RGB", 1 / 127.5, (1.0,), None, "NCHW")
    assert how.merge() == how
    assert how.merge(resize="224") == Preprocessing(224, scale=1 / 255, mean=(0.5, 0.4, 0.3), channel_order="BGR")


@pytest.mark.parametrize(
    "text",
    [
        "scal = 1",
        'layout = "CHWN"',
        "std = [0.0]",
        "resize = [1, 2, 3]",
        "mean = []",
        "= 3",
        'scale = "x"',
        "scale = 0",
        f"scale = 1{'0' * 400}",
    ],
)
def test_a_bad_file_is_one_line_with_a_remedy(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.toml"
    file.write_text(text)
    with pytest.raises(DatasetError) as told:
        Preprocessing.from_toml(file)
    assert "p.toml" in told.value.what
    assert told.value.remedy
    assert "\n" not in told.value.remedy


@pytest.mark.parametrize(
    "flags",
    [
        {"resize": "ax9"},
        {"mean": "1,,2"},
        {"scale": "1/0"},
        {"std": "0"},
        {"scale": "nan"},
        {"scale": "0"},
        {"scale": "1/1e400"},
        {"scale": "1e-60"},
        {"scale": "1e39"},
        {"std": "1,1e-60,1"},
        {"mean": "inf"},
    ],
)
def test_bad_flags(flags: dict[str, str]) -> None:
    with pytest.raises(DatasetError):
        Preprocessing().merge(**flags)


def test_the_file_beside_the_data_is_found(tmp_path: Path) -> None:
    data = tmp_path / "calib.npz"
    assert find_file(data) is None
    for name in ("preprocessing.toml", "calib.toml", "calib.npz.toml"):  # nearer names win
        (tmp_path / name).touch()
        assert find_file(data) == tmp_path / name
