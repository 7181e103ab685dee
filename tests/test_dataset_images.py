"""Folders of images: decoding against pillow, classes by folder name, and all that lies about in real folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.dataset import Preprocessing, check_labels, open_dataset, overlap
from edgekit.errors import DatasetError, ImageError, LabelError, ShapeError
from edgekit.model import Signature, TensorSpec

RNG = np.random.default_rng(2)
PIXELS = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)


def model(*shape: int, classes: int = 3) -> Signature:
    return Signature(
        (TensorSpec("image", "float32", ("n", *shape)),), (TensorSpec("scores", "float32", ("n", classes)),)
    )


def write(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, two images each, among what an operating system leaves behind."""
    root = tmp_path / "Bilder äöü"
    for i, name in enumerate(["zebra", "ant", "鳥"] * 2):
        write(root / name / f"{i}.png", PIXELS[i])
    (root / "ant" / ".hidden.png").write_text("no image")
    (root / "ant" / "Thumbs.db").write_text("no image")
    (root / ".git").mkdir()
    write(root / ".git" / "x.png", PIXELS[0])
    (root / "notes.txt").write_text("notes")
    return root


def test_class_folders_sorted_by_name(folder: Path) -> None:
    data = open_dataset(folder).bind(model(5, 7, 3))
    (part,) = data.batches(10)
    assert data.classes == ("ant", "zebra", "鳥")
    np.testing.assert_array_equal(part.labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(part.inputs["image"], PIXELS[[1, 4, 0, 3, 2, 5]])
    np.testing.assert_array_equal(check_labels(data, 3), [2, 2, 2])
    with pytest.raises(LabelError, match="3 classes, the model 10"):
        check_labels(data, 10)


def test_class_names_from_a_file_give_the_order(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("鳥\nzebra\nmissing\nant\n", encoding="utf-8")
    data = open_dataset(folder, labels=names)
    (part,) = data.batches(10)
    np.testing.assert_array_equal(part.labels, [0, 0, 1, 1, 3, 3])
    names.write_text("zebra\nant\n")
    with pytest.raises(DatasetError, match="class '鳥'"):
        open_dataset(folder, labels=names)


def test_the_same_pixels_in_npz_have_the_same_ids(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=PIXELS[[1, 4, 0, 3, 2, 5]], y=[0, 0, 1, 1, 2, 2])
    images, arrays = open_dataset(folder), open_dataset(tmp_path / "d.npz")
    assert images.sample_ids() == arrays.sample_ids()
    assert images.digest == arrays.digest
    resized = open_dataset(folder, preprocessing=Preprocessing(resize=(8, 8), scale=2)).bind(model(8, 8, 3))
    assert overlap(resized, arrays) == 6
    assert images.digest == open_dataset(folder).bind(model(5, 7, 1)).digest  # gray for the model, not for the id


def test_a_flat_folder_is_unlabelled_until_labels_come(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "flat" / f"{i}.bmp", PIXELS[i])
    assert not open_dataset(tmp_path / "flat").labelled
    (tmp_path / "y.txt").write_text("2\n0\n1\n")
    (part,) = open_dataset(tmp_path / "flat", labels=tmp_path / "y.txt").batches(9)
    np.testing.assert_array_equal(part.labels, [2, 0, 1])


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write(tmp_path / "f" / "a.png", PIXELS[0])
    write(tmp_path / "f" / "b.png", PIXELS[1][:4])
    with pytest.raises(ShapeError, match="--resize"):
        list(open_dataset(tmp_path / "f").batches(2))
    with pytest.raises(ShapeError, match="--resize 5x7"):
        list(open_dataset(tmp_path / "f").bind(model(5, 7, 3)).batches(1))
    data = open_dataset(tmp_path / "f", preprocessing=Preprocessing(resize=(6, 6), layout="NCHW")).bind(model(3, 6, 6))
    (part,) = data.batches(2)
    expected = np.asarray(Image.fromarray(PIXELS[1][:4]).resize((6, 6), Image.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(part.inputs["image"][1], expected)
    assert len(set(data.sample_ids())) == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_gray_or_rgb(tmp_path: Path, mode: str, channels: int) -> None:
    source = Image.fromarray(PIXELS[0]).convert(mode)
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    source.save(tmp_path / f"a.{suffix}")
    (part,) = open_dataset(tmp_path).bind(model(5, 7, channels)).batches(1)
    expected = np.asarray(source.convert("L" if channels == 1 else "RGB")).reshape(5, 7, channels)
    np.testing.assert_array_equal(part.inputs["image"][0], expected)


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    deep = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
    write(tmp_path / "png" / "a.png", deep)
    write(tmp_path / "tif" / "a.tif", deep)
    for name in ("png", "tif"):
        (part,) = open_dataset(tmp_path / name).bind(model(5, 7)).batches(1)
        np.testing.assert_array_equal(part.inputs["image"][0], deep >> 8)
        (part,) = open_dataset(tmp_path / name).bind(model(5, 7, 3)).batches(1)
        np.testing.assert_array_equal(part.inputs["image"][0, ..., 2], deep >> 8)


def test_a_gray_folder_feeds_a_flat_model(tmp_path: Path) -> None:
    write(tmp_path / "a.png", PIXELS[0, ..., 0])
    (part,) = open_dataset(tmp_path).bind(model(35)).batches(1)
    np.testing.assert_array_equal(part.inputs["image"][0], PIXELS[0, ..., 0].ravel())


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    write(tmp_path / "a.png", PIXELS[0], exif=exif)
    (part,) = open_dataset(tmp_path).batches(1)
    np.testing.assert_array_equal(part.inputs["x"][0], np.rot90(PIXELS[0], -1))


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "32 bits"])
def test_an_unreadable_image_is_named(folder: Path, damage: str) -> None:
    path = folder / "ant" / "zz.png"
    if damage == "32 bits":
        path = write(path.with_suffix(".tif"), np.zeros((5, 7), np.float32))
    elif damage == "truncated":
        write(path, RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:3000])
    else:
        path.write_text("text" if damage == "text" else "")
    with pytest.raises(ImageError) as told:
        list(open_dataset(folder, preprocessing=Preprocessing(resize=(4, 4))).batches(4))
    assert path.name in told.value.what
    assert "\n" not in str(told.value)
    assert told.value.remedy


def test_links_in_a_circle_end(folder: Path) -> None:
    os.symlink(folder, folder / "ant" / "loop")
    os.symlink(folder / "ant", folder / "ant" / "self")
    assert open_dataset(folder).samples >= 6


def test_a_broken_link_is_passed_over(folder: Path) -> None:
    os.symlink(folder / "nowhere.png", folder / "ant" / "broken.png")
    assert open_dataset(folder).samples == 6


def test_folders_that_are_ambiguous_or_empty(folder: Path, tmp_path: Path) -> None:
    write(folder / "loose.png", PIXELS[0])
    with pytest.raises(DatasetError, match="both in it and in folders"):
        open_dataset(folder)
    (tmp_path / "e" / "a").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no images"):
        open_dataset(tmp_path / "e")


def test_one_class_is_no_test_of_accuracy(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / "f" / "only" / f"{i}.png", PIXELS[i])
        (tmp_path / "f" / "other").mkdir(exist_ok=True)
    with pytest.raises(LabelError, match="are of class 0"):
        check_labels(open_dataset(tmp_path / "f"), 2)


def test_the_zoo_folder_agrees_with_its_arrays(zoo: Path) -> None:
    folder = open_dataset(zoo / "data" / "cifar10_folder_test50")
    arrays = open_dataset(zoo / "data" / "cifar10_test.npz")
    there = dict(zip(arrays.sample_ids(), np.concatenate([y for _, y in arrays.labels()]), strict=True))
    labels = np.concatenate([y for _, y in folder.labels()])
    shared = [(there[i], y) for i, y in zip(folder.sample_ids(), labels, strict=True) if i in there]
    assert len(shared) == overlap(folder, arrays) > 50
    assert all(a == b for a, b in shared)
    assert overlap(arrays, open_dataset(zoo / "data" / "cifar10_calib.npz")) == 0
