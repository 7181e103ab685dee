"""Real data from the folder of EDGEKIT_ZOO: to train on, to calibrate with (some of those), others to test on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

CALIBRATION, TEST = 512, 2000  # samples; calibration is drawn from what was trained on
CIFAR_TEST = 1500  # of the 2000 test images; the others are trained on, without their labels
HIDDEN, WINDOW = 65, 64  # as in architectures.py
SPACE, NEWLINE = " ", "\n"


@dataclass(frozen=True)
class Data:
    """inputs: arrays by the model's input names, samples along axis 0. y: what the model should say, or None."""

    train: Tensors
    train_y: Array
    calibration: Tensors
    calibration_y: Array
    test: Tensors
    test_y: Array


def _arrays(zoo: Path, name: str) -> dict[str, Array]:
    with np.load(zoo / "data" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


# --- images ---------------------------------------------------------------------------------------------------------
def cifar_pool(zoo: Path, count: int, rng: np.random.Generator) -> tuple[Array, Data]:
    """(pool, data): `count` images to distil on, float32 (n, 32, 32, 3) in [-1, 1], made of 1500 images of CIFAR-10
    and 200 photographs by crops, flips, light, and mixing of two; and the images that no pool is made of.

    The labels of `data.train` are unused: a teacher gives the pool's.
    """
    first, second = _arrays(zoo, "cifar10_calib"), _arrays(zoo, "cifar10_test")
    held = len(second["x"]) - CIFAR_TEST
    images = np.concatenate([first["x"], second["x"][:held]])
    photos = _arrays(zoo, "imagenet_photos_96")["x"]
    pool = np.empty((count, 32, 32, 3), np.float32)
    for at in range(0, count, 500):
        size = min(500, count - at)
        x = _cropped(images, size, rng)
        x = np.where(rng.random((size, 1, 1, 1)) < 0.25, _photo_crops(photos, size, rng), x)
        light = rng.uniform(0.7, 1.3, (size, 1, 1, 1)), rng.uniform(-0.2, 0.2, (size, 1, 1, 3))
        x = np.clip(x * light[0] + light[1], -1, 1)
        share = np.where(rng.random(size) < 0.5, rng.uniform(0.5, 1, size), 1.0)[:, None, None, None]
        pool[at : at + size] = share * x + (1 - share) * x[rng.permutation(size)]
    chosen = rng.permutation(len(first["x"]))[:CALIBRATION]
    calibration, test = first["x"][chosen] / 127.5 - 1, second["x"][held:] / 127.5 - 1
    return pool, Data(
        {},
        np.empty(0),
        {"image": calibration.astype(np.float32)},
        first["y"][chosen],
        {"image": test.astype(np.float32)},
        second["y"][held:],
    )


def _cropped(images: Array, size: int, rng: np.random.Generator) -> Array:
    """Random images, moved by up to 4 pixels, half of them mirrored; in [-1, 1]."""
    x = images[rng.integers(0, len(images), size)]
    x = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    top, left = rng.integers(0, 9, size), rng.integers(0, 9, size)
    x = np.stack([x[i, top[i] : top[i] + 32, left[i] : left[i] + 32] for i in range(size)])
    flipped = np.where(rng.random((size, 1, 1, 1)) < 0.5, x[:, :, ::-1], x)
    return flipped.astype(np.float32) / 127.5 - 1


def _photo_crops(photos: Array, size: int, rng: np.random.Generator) -> Array:
    """Random squares of 32, 64 or 96 pixels, averaged to 32; in [-1, 1]."""
    out = np.empty((size, 32, 32, 3), np.float32)
    for i in range(size):
        factor = int(rng.integers(1, 4))
        top, left = rng.integers(0, 97 - 32 * factor, 2)
        patch = photos[rng.integers(len(photos)), top : top + 32 * factor, left : left + 32 * factor]
        out[i] = patch.reshape(32, factor, 32, factor, 3).mean((1, 3))
    return out / 127.5 - 1


def mnist(zoo: Path, count: int, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Data:
    """1000 digits turned, slanted, scaled and moved into `count` to train on; 2000 others to test on. In [0, 1]."""
    first, second = _arrays(zoo, "mnist_calib"), _arrays(zoo, "mnist_test")
    index = rng.integers(0, len(first["x"]), count)
    chosen = rng.permutation(len(first["x"]))[:CALIBRATION]

    def ready(x: Array) -> Tensors:
        return {name: (x / 255).astype(np.float32).reshape(len(x), *shape)}

    return Data(
        ready(_warped(first["x"][index], rng)),
        first["y"][index],
        ready(first["x"][chosen]),
        first["y"][chosen],
        ready(second["x"][:TEST]),
        second["y"][:TEST],
    )


def _warped(x: Array, rng: np.random.Generator) -> Array:
    """Each image through a random affine map about its centre, bilinear; uint8 (n, 28, 28) -> float32, same range."""
    count = len(x)
    angle, shear = rng.uniform(-0.25, 0.25, count), rng.uniform(-0.25, 0.25, count)
    zoom, move = rng.uniform(0.85, 1.15, (count, 2)), rng.uniform(-2, 2, (count, 2))
    grid = np.stack(np.meshgrid(np.arange(28) - 13.5, np.arange(28) - 13.5, indexing="ij"), -1)
    turn = np.array([[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    place = np.einsum("nij,hwj->nhwi", turn * zoom[:, :, None], grid) + move[:, None, None] + 13.5 + 1  # 1 of padding
    place = np.clip(place, 0, 28.999)
    low = place.astype(np.int64)
    part = place - low
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1))).astype(np.float32)
    n = np.arange(count)[:, None, None]
    out = np.zeros((count, 28, 28), np.float32)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - part[..., 0]) * np.abs(1 - dx - part[..., 1])
            out += (weight * padded[n, low[..., 0] + dy, low[..., 1] + dx]).astype(np.float32)
    return out


# --- text -----------------------------------------------------------------------------------------------------------
def next_character(zoo: Path, count: int, rng: np.random.Generator) -> Data:
    """ids: int32 (n, 64). y: the character that follows."""
    text = _arrays(zoo, "tinyshakespeare_tokens")

    def windows(tokens: Array, n: int) -> tuple[Tensors, Array]:
        at = rng.integers(0, len(tokens) - WINDOW, n)
        x = tokens[at[:, None] + np.arange(WINDOW + 1)]
        return {"ids": x[:, :-1].astype(np.int32)}, x[:, -1].astype(np.int64)

    return _split(windows, text["train"], text["val"], count)


def hidden_character(zoo: Path, count: int, rng: np.random.Generator) -> Data:
    """ids: int32 (n, 64), the middle one replaced by HIDDEN. y: what stood there."""
    text = _arrays(zoo, "tinyshakespeare_tokens")

    def windows(tokens: Array, n: int) -> tuple[Tensors, Array]:
        at = rng.integers(0, len(tokens) - WINDOW, n)
        x = tokens[at[:, None] + np.arange(WINDOW)].astype(np.int32)
        y = x[:, WINDOW // 2].astype(np.int64)
        x[:, WINDOW // 2] = HIDDEN
        return {"ids": x}, y

    return _split(windows, text["train"], text["val"], count)


def word_ends(zoo: Path, count: int, rng: np.random.Generator) -> Data:
    """Letters alone, in lower case, run together. ids, mask: int32 (n, 64), mask 0 behind a text's end.

    y: int64 (n, 64), what followed each letter: 0 a letter, 1 a space, 2 punctuation, 3 a line's end.
    """
    text = _arrays(zoo, "tinyshakespeare_tokens")
    names = [str(c) for c in text["vocab"]]
    small = np.array([names.index(c.lower()) if c.isalpha() else -1 for c in names])
    kind = np.array([0 if c.isalpha() else 3 if c == NEWLINE else 1 if c == SPACE else 2 for c in names])

    def windows(tokens: Array, n: int) -> tuple[Tensors, Array]:
        letters = np.flatnonzero(small[tokens] >= 0)[:-1]
        at = rng.integers(0, len(letters) - WINDOW, n)
        place = letters[at[:, None] + np.arange(WINDOW)]
        mask = np.arange(WINDOW) < rng.integers(WINDOW // 4, 2 * WINDOW, n)[:, None]
        ids = np.where(mask, small[tokens[place]], HIDDEN)
        y = np.where(mask, kind[tokens[place + 1]], 0)
        return {"ids": ids.astype(np.int32), "mask": mask.astype(np.int32)}, y.astype(np.int64)

    return _split(windows, text["train"], text["val"], count)


def _split(windows: Any, train: Array, val: Array, count: int) -> Data:
    """Test windows come from text that no training window touches."""
    return Data(*windows(train, count), *windows(train, CALIBRATION), *windows(val, TEST))
