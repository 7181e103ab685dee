"""What is done to raw samples before the model sees them, as data that can be printed, saved and compared.

Order, always the same: resize, centre crop, channel order, scale, mean and std, layout. With x the raw sample the model
gets `(x * scale - mean) / std`. Geometry and channel order apply to images only: samples of shape (h, w), (h, w, c) or
(c, h, w) with c of 1, 3 or 4. Everything else gets scale, mean and std alone.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from edgekit import transform
from edgekit.errors import DatasetError, EdgekitError, ImageError, MissingExtraError, NonFiniteError, ShapeError

Array = np.ndarray[Any, Any]
Method = Literal["bilinear", "nearest", "bicubic"]
ChannelOrder = Literal["RGB", "BGR"]
Layout = Literal["NHWC", "NCHW"]

FILE_NAME = "preprocessing.toml"
_ERRORS: Mapping[transform.Problem, type[EdgekitError]] = {
    "shape": ShapeError,
    "range": NonFiniteError,
    "image": ImageError,
    "pillow": MissingExtraError,
    "option": DatasetError,
}


@dataclass(frozen=True)
class Preprocessing:
    """A declared preprocessing; the default does nothing.

    resize: (height, width), or one int: the length of the shorter side, ratio kept (torchvision's Resize).
    method: how to resize; pillow's filters, which smooth when they shrink.
    crop: (height, width) of the centre, rounded up and left (Keras' CenterCrop).
    channel_order: what the model takes; data are RGB. None and "RGB" change nothing, "BGR" flips the channels.
    scale: multiplier, not 0, e.g. 1/255.   mean, std: one number, or one per channel (per feature where no image).
    layout: what the model takes. None leaves the samples as they are stored (image files: NHWC).
    """

    resize: tuple[int, int] | int | None = None
    method: Method = "bilinear"
    crop: tuple[int, int] | None = None
    channel_order: ChannelOrder | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        for name, value in (("resize", self.resize), ("crop", self.crop)):
            sizes = value if isinstance(value, tuple) else () if value is None else (value,)
            if (isinstance(value, tuple) and len(value) != 2) or any(s < 1 for s in sizes):
                raise DatasetError(f"preprocessing {name} = {value}", "give height x width in pixels, such as 96x96")
        for name, numbers in (("scale", self.scale), ("mean", self.mean), ("std", self.std)):
            each = numbers if isinstance(numbers, tuple) else () if numbers is None else (numbers,)
            if not all(transform.usable(v, zero=name == "mean") for v in each) or numbers == ():
                told = f"preprocessing {name} = {numbers}"
                raise DatasetError(told, transform.USABLE)

    @property
    def numeric(self) -> bool:
        """True if values change (scale, mean or std), not only their places."""
        return transform.numeric(self.to_json())

    @property
    def geometric(self) -> bool:
        """True if something is asked that only images have."""
        return transform.geometric(self.to_json())

    def apply(self, x: Array | Sequence[Array]) -> Array:
        """x: (n, ...) of any numeric dtype, or a list of n samples of several sizes. Returns float32 (n, ...).

        Raises ShapeError when a step does not fit the samples, MissingExtraError when resizing without pillow.
        """
        with transforming():
            return transform.apply(x, self.to_json())

    def places(self, x: Array | Sequence[Array], *, layout: bool = True) -> Array:
        """Resize, crop, channel order and, unless told otherwise, layout; the dtype stays."""
        with transforming():
            return transform.places(x, self.to_json(), layout)

    def values(self, x: Array) -> Array:
        """Scale, mean and std; float32 (n, ...) of the same shape, or `x` itself when none is asked."""
        with transforming():
            return transform.values(x, self.to_json())

    def merge(
        self,
        *,
        resize: str | None = None,
        crop: str | None = None,
        scale: str | float | None = None,
        mean: str | None = None,
        std: str | None = None,
        channel_order: str | None = None,
        layout: str | None = None,
    ) -> Preprocessing:
        """A copy in which every given flag wins. Texts as typed: "96x96", "1/255", "0.5,0.4,0.3", "BGR", "NCHW"."""
        given = {"resize": resize, "crop": crop, "scale": scale, "mean": mean, "std": std}
        with transforming():
            merged = transform.merged(self.to_json(), {**given, "channel_order": channel_order, "layout": layout})
        return Preprocessing.from_json(merged)

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_json`. Raises DatasetError on an unknown key or a value of the wrong kind."""
        known = [f.name for f in fields(Preprocessing)]
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"perhaps you meant '{near[0]}'" if near else "known keys: " + ", ".join(known)
                raise DatasetError(f"preprocessing has an unknown key '{key}'", hint)
        with transforming():
            given = {k: _from_json(k, v) for k, v in data.items() if v is not None}
        return Preprocessing(**given)

    @staticmethod
    def from_toml(path: Path) -> Preprocessing:
        """Read a TOML whose keys are the fields, such as `resize = [96, 96]`, `scale = "1/255"`."""
        try:
            return Preprocessing.from_json(tomllib.loads(path.read_text(encoding="utf-8-sig")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DatasetError(f"cannot read preprocessing '{path}': {error}", "fix the TOML") from error
        except DatasetError as error:
            raise DatasetError(f"'{path}': {error.what}", error.remedy) from error

    def describe(self) -> str:
        """One line for a person: "resize 96x96 bilinear, scale 0.00392157, BGR"; "none" when nothing is done."""
        words = []
        if self.resize is not None:
            size = f"shorter side {self.resize}" if isinstance(self.resize, int) else _by(self.resize)
            words.append(f"resize {size} {self.method}")
        if self.crop is not None:
            words.append(f"crop {_by(self.crop)}")
        if self.channel_order is not None:
            words.append(self.channel_order)
        if self.scale is not None:
            words.append(f"scale {self.scale:.6g}")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None:
                words.append(f"{name} " + ",".join(f"{v:.6g}" for v in numbers))
        if self.layout is not None:
            words.append(self.layout)
        return ", ".join(words) or "none"


@contextmanager
def transforming() -> Iterator[None]:
    """Turn what `transform` refuses into the error of its cause."""
    try:
        yield
    except transform.TransformError as error:
        remedy = "pip install 'edgekit[images]'" if error.kind == "pillow" else error.remedy
        raise _ERRORS[error.kind](error.what, remedy) from error


def find_file(data: Path) -> Path | None:
    """The preprocessing file that belongs to `data`, if any.

    First found of: DATA/preprocessing.toml (folders), DATA.toml, DATA with its suffix replaced by .toml,
    preprocessing.toml in the same folder.
    """
    tries = [data / FILE_NAME] if data.is_dir() else []
    tries += [data.with_name(data.name + ".toml"), data.with_suffix(".toml"), data.parent / FILE_NAME]
    return next((p for p in tries if p.is_file()), None)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _from_json(key: str, value: Any) -> Any:
    if key in ("resize", "crop"):
        whole = value if isinstance(value, list) else [value]
        if isinstance(value, str) or not all(isinstance(v, int) and not isinstance(v, bool) for v in whole):
            raise DatasetError(f"preprocessing {key} = {value!r}", "give [height, width]")
        return tuple(whole) if isinstance(value, list) else (value, value) if key == "crop" else value
    if key in ("mean", "std"):
        return tuple(transform.number(key, v) for v in (value if isinstance(value, list) else [value]))
    if key == "scale":
        return transform.number(key, value)
    allowed = {"method": Method, "channel_order": ChannelOrder, "layout": Layout}[key]
    return transform.one_of(key, value, get_args(allowed))
