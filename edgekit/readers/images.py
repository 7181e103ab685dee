"""A folder of images as data: class folders (labelled) or images alone (unlabelled), decoded one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit import transform
from edgekit.errors import DatasetError
from edgekit.preprocessing import transforming
from edgekit.readers import Array, Chunk, groups


@dataclass(frozen=True)
class ImageReader:
    """Images as uint8 (h, w, c) in RGB, upright by their EXIF orientation, transparency dropped.

    channels: 1 for gray, 3 for RGB; None keeps gray files gray and makes RGB of all others.
    A 16-bit image keeps its high byte.
    """

    files: tuple[Path, ...]
    targets: Array | None  # int64 (n,)
    classes: tuple[str, ...]
    channels: int | None = None

    @property
    def samples(self) -> int:
        return len(self.files)

    @property
    def labelled(self) -> bool:
        return self.targets is not None

    @property
    def keys(self) -> tuple[str, ...]:
        return ("x",)

    @property
    def named(self) -> tuple[str, ...]:
        return self.keys

    def chunks(self, size: int, wanted: Array | None, keys: tuple[str, ...]) -> Iterator[Chunk]:
        for index in groups(self.samples, wanted, size):
            labels = None if self.targets is None else self.targets[index]
            inputs: dict[str, Array | list[Array]] = {}
            for key in keys:
                images = [decode(self.files[i], self.channels) for i in index.tolist()]
                same = all(i.shape == images[0].shape for i in images)
                inputs[key] = np.stack(images) if same else images
            yield Chunk(inputs, labels, index)


def open_images(folder: Path, names: tuple[str, ...] | None = None) -> ImageReader:
    """The reader of a folder.

    names: class names in label order; without them the class folders are sorted by name (as Keras and torchvision do).
    Hidden files and files that are no images are passed over. Raises DatasetError when nothing is left, when images lie
    beside class folders, or when the folders are not those in `names`.
    """
    try:
        entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"cannot read folder '{folder}': {error.strerror}", "check its permissions") from error
    loose = [e for e in entries if _is_image(e)]
    found = {e.name: tuple(_walk(e)) for e in entries if e.is_dir()}
    if loose and any(found.values()):
        raise DatasetError(
            f"folder '{folder}' has images both in it and in folders of it",
            "keep either images alone (unlabelled) or one folder per class",
        )
    if not loose and not any(found.values()):
        kinds = " ".join(sorted(s[1:] for s in transform.IMAGE_SUFFIXES))
        raise DatasetError(f"folder '{folder}' has no images", f"put in one folder per class, with files of {kinds}")
    if loose:
        return ImageReader(tuple(loose), None, ())
    classes = tuple(sorted(found)) if names is None else names
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DatasetError(
            f"folder '{folder}' has a class '{unknown[0]}' that the list of labels lacks", "add it to the list"
        )
    files = [(f, i) for i, name in enumerate(classes) for f in found.get(name, ())]
    return ImageReader(tuple(f for f, _ in files), np.array([i for _, i in files], np.int64), classes)


def decode(path: Path, channels: int | None) -> Array:
    """One image as uint8 (h, w, 1 or 3). Raises ImageError naming the file."""
    with transforming():
        return transform.decode(str(path), channels)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in transform.IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _walk(folder: Path) -> Iterator[Path]:
    """Images under a folder, sorted; a folder reached a second time through a link is not entered."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (p for f in sorted(files) if _is_image(p := Path(root, f)))
