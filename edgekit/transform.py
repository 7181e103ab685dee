"""From what a file holds to what a model takes, the same numbers on the host and on a device.

Standard library and numpy, pillow only where an image is decoded or resized; Python 3.9, numpy 1.23: this file travels
to devices. A declared preprocessing is a plain dict here, what `Preprocessing.to_json` gives: resize, method, crop,
channel_order, scale, mean, std, layout; a key that is missing or None asks for nothing. What each does, and their
order, stands in `preprocessing.py`. A tensor is described by a dict too: {"name", "dtype", "shape"}.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
How = Mapping[str, Any]
Spec = Mapping[str, Any]
Problem = Literal["shape", "range", "image", "pillow", "option"]

OPTIONS = ("resize", "crop", "scale", "mean", "std", "channel_order", "layout")
"""What can be declared on a command line, under these names."""
USABLE = "give finite float32 numbers; scale and std must not be 0"
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CHANNEL_ORDERS = ("RGB", "BGR")
LAYOUTS = ("NHWC", "NCHW")
_CHANNELS = (1, 3, 4)
_GRAY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")


class TransformError(ValueError):
    """Samples that cannot become what the model takes.

    kind: "shape" (sizes or types do not fit), "range" (a value that its type cannot hold), "image" (a file that is no
    image), "pillow" (it is not installed), "option" (a preprocessing that makes no sense).
    what: the thing and the value. remedy: what to do, with the options of the command line.
    """

    def __init__(self, kind: Problem, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.remedy = remedy


# --- the declared preprocessing --------------------------------------------------------------------
def numeric(how: How) -> bool:
    """True if values change (scale, mean or std), not only their places."""
    return any(how.get(key) is not None for key in ("scale", "mean", "std"))


def geometric(how: How) -> bool:
    """True if something is asked that only images have."""
    return any(how.get(key) is not None for key in ("resize", "crop", "layout")) or how.get("channel_order") == "BGR"


def apply(x: Array | Sequence[Array], how: How) -> Array:
    """x: (n, ...) of any numeric dtype, or a list of n samples of several sizes. Returns float32 (n, ...)."""
    return _layout(values(places(x, how, layout=False), how), how).astype(np.float32, copy=False)


def places(x: Array | Sequence[Array], how: How, layout: bool = True) -> Array:
    """Resize, crop, channel order and, unless told otherwise, layout; the dtype stays."""
    moved = how.get("resize") is not None or how.get("crop") is not None
    stacked = _stack([_spatial(s, how) for s in x] if moved else x)
    if how.get("channel_order") == "BGR":
        axis = channel_axis(stacked.shape[1:])
        if axis is None or stacked.shape[axis] != 3:
            what = f"channel order BGR asked for samples of shape {stacked.shape[1:]}"
            raise TransformError("shape", what, "drop --channel-order")
        stacked = np.flip(stacked, axis)
    return _layout(stacked, how) if layout else stacked


def values(x: Array, how: How) -> Array:
    """Scale, mean and std; float32 (n, ...) of the same shape, or `x` itself when none is asked."""
    if not numeric(how):
        return x
    out = x.astype(np.float32)
    if how.get("scale") is not None:
        out *= np.float32(how["scale"])
    if how.get("mean") is not None:
        out -= _per_channel("mean", how["mean"], out.shape)
    if how.get("std") is not None:
        out /= _per_channel("std", how["std"], out.shape)
    return out


def channel_axis(sample: Sequence[int]) -> int | None:
    """Axis of the channels in a batch (n, *sample), None if the samples are no images. NHWC wins where both fit."""
    if len(sample) != 3:
        return None
    return 3 if sample[-1] in _CHANNELS else 1 if sample[0] in _CHANNELS else None


def _layout(x: Array, how: How) -> Array:
    layout = how.get("layout")
    if layout is None or x.ndim == 3:  # (n, h, w): no channels to move
        return x
    axis = channel_axis(x.shape[1:])
    if axis is None:
        raise TransformError("shape", f"layout {layout} asked for samples of shape {x.shape[1:]}", "drop --layout")
    return np.ascontiguousarray(np.moveaxis(x, axis, 1 if layout == "NCHW" else -1))


def _spatial(sample: Array, how: How) -> Array:
    axis = None if sample.ndim == 2 else channel_axis(sample.shape)
    if sample.ndim != 2 and axis is None:
        what = f"resize or crop asked for samples of shape {sample.shape}, which are no images"
        raise TransformError("shape", what, "drop --resize and --crop")
    hwc = sample[..., None] if axis is None else np.moveaxis(sample, axis - 1, -1)
    if how.get("resize") is not None:
        hwc = _resize(hwc, how["resize"], how.get("method") or "bilinear")
    if how.get("crop") is not None:
        hwc = _crop(hwc, how["crop"])
    return hwc[..., 0] if axis is None else np.moveaxis(hwc, -1, axis - 1)


def _per_channel(name: str, numbers: Sequence[float], shape: Sequence[int]) -> Array:
    """The numbers as float32, shaped to broadcast against the channel axis (last axis for other samples)."""
    each = np.asarray(numbers, np.float32)
    if len(each) == 1:
        return each
    axis = channel_axis(shape[1:]) or len(shape) - 1
    if axis < 1 or shape[axis] != len(each):
        what = f"{name} has {len(each)} numbers, samples have shape {tuple(shape[1:])}"
        raise TransformError("shape", what, "give one number, or one per channel")
    return each.reshape([-1 if a == axis else 1 for a in range(len(shape))])


def _stack(samples: Array | Sequence[Array]) -> Array:
    if isinstance(samples, np.ndarray):
        return samples
    for i, sample in enumerate(samples):
        if sample.shape != samples[0].shape:
            what = f"samples differ in shape: {samples[0].shape} and, {i} further on, {sample.shape}"
            raise TransformError("shape", what, "pass --resize HxW (with the model's size), or --resize N --crop HxW")
    return np.stack(samples)


def _resize(x: Array, size: Any, method: str) -> Array:
    """x: (h, w, c). uint8 stays uint8 (rounded by pillow), anything else becomes float32."""
    h, w = x.shape[:2]
    if isinstance(size, int):
        size = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    if (h, w) == tuple(size):
        return x
    try:
        from PIL import Image
    except ImportError as error:
        raise TransformError("pillow", "resizing needs pillow") from error
    kind = getattr(getattr(Image, "Resampling", Image), method.upper())  # Resampling: since pillow 9.1
    dtype = np.uint8 if x.dtype == np.uint8 else np.float32
    if dtype == np.uint8 and x.shape[2] == 3:
        return np.asarray(Image.fromarray(np.ascontiguousarray(x)).resize((size[1], size[0]), kind))
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(x[..., c], dtype)).resize((size[1], size[0]), kind))
        for c in range(x.shape[2])
    ]
    return np.stack(planes, axis=-1)


def _crop(x: Array, size: Sequence[int]) -> Array:
    h, w = x.shape[:2]
    if size[0] > h or size[1] > w:
        what = f"crop {size[0]}x{size[1]} is larger than a sample of {h}x{w}"
        raise TransformError("shape", what, "resize first, or crop less")
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    return x[top : top + size[0], left : left + size[1]]


def merged(how: How, given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `how` in which every given option wins. Texts as typed: "96x96", "1/255", "0.5,0.4,0.3", "BGR", "NCHW".

    given: OPTIONS -> text (scale: or a number); None where nothing was said.
    """
    out = dict(how)
    for name, text in given.items():
        if text is not None:
            out[name] = _parsed(name, text)
    return out


def _parsed(name: str, text: Any) -> Any:
    if name in ("resize", "crop"):
        size = _size(name, text)
        return [size, size] if name == "crop" and isinstance(size, int) else size
    if name in ("scale", "mean", "std"):
        numbers = [number(name, t) for t in ([text] if name == "scale" else text.split(","))]
        if not all(usable(v, zero=name == "mean") for v in numbers):
            raise TransformError("option", f"--{name} {text}", USABLE)
        return numbers[0] if name == "scale" else numbers
    return one_of(name.replace("_", "-"), text.upper(), CHANNEL_ORDERS if name == "channel_order" else LAYOUTS)


def _size(name: str, text: str) -> list[int] | int:
    try:
        parts = [int(p) for p in text.lower().replace(",", "x").split("x")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts) < 1:
        raise TransformError("option", f"--{name} {text}", "give height x width in pixels, such as 96x96")
    return parts[0] if len(parts) == 1 else parts


def usable(value: float, *, zero: bool) -> bool:
    """Finite as float32, and not 0 unless that is allowed: too small a number becomes 0, too large a one infinity."""
    return abs(value) <= float(np.finfo(np.float32).max) and (zero or float(np.float32(value)) != 0)


def number(name: str, text: Any) -> float:
    """A number or a fraction: 0.0039 or "1/255"."""
    try:
        if isinstance(text, str):
            over, _, under = text.partition("/")
            return float(over) / (float(under) if under else 1.0)
        return float(text)
    except (ValueError, TypeError, ArithmeticError) as error:
        what = f"preprocessing {name} = {text!r}"
        raise TransformError("option", what, "give a number, or a fraction such as 1/255") from error


def one_of(name: str, value: object, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise TransformError("option", f"preprocessing {name} = {value!r}", "one of " + ", ".join(allowed))
    return value


# --- to the model's shape and type -----------------------------------------------------------------
def deliver(x: Array | Sequence[Array], spec: Spec, how: How, alone: bool) -> Array:
    """Raw samples (n, ...) as the model takes them: preprocessed, in its shape and dtype.

    alone: the model has no other input. Where it has, only what may be an image is preprocessed.
    """
    dtype = _dtype(spec)
    floats = np.issubdtype(dtype, np.floating)
    first = x[0]
    image = first.ndim == 2 or channel_axis(first.shape) is not None
    if alone and not floats and numeric(how):
        what = f"model input '{spec['name']}' takes {spec['dtype']}, so scale, mean and std cannot be applied"
        raise TransformError("shape", what, "drop --scale, --mean and --std")
    if floats and (alone or image):
        out = apply(x, how) if numeric(how) else places(x, how)
    elif geometric(how) and (alone or image):
        out = places(x, how)
    else:
        out = _stack(x)
    return _cast(_reshape(out, spec, how), spec["name"], dtype)


def channels(shape: Sequence[Any], layout: str | None) -> int | None:
    """How many channels an image file is decoded to for a model input of this shape; None leaves it to the file."""
    want = shape[1:]
    if len(want) == 2:
        return 1
    if len(want) != 3:
        return None
    order = (want[0], want[2]) if layout == "NCHW" else (want[2], want[0])
    return next((c for c in order if c in (1, 3)), None)


def _reshape(x: Array, spec: Spec, how: How) -> Array:
    have, want = x.shape[1:], tuple(spec["shape"][1:])
    if len(have) == len(want) and all(not isinstance(w, int) or w == h for h, w in zip(have, want)):
        return x
    known = [w for w in want if isinstance(w, int)]
    if len(known) == len(want) and int(np.prod(known)) == int(np.prod(have)):
        squeezed = [h for h in have if h != 1] == [w for w in known if w != 1]
        if len(want) == 1 or len(have) == 1 or squeezed:
            return x.reshape(len(x), *known)
    what = f"samples have shape {_show(have)}, model input '{spec['name']}' takes {_show(want)}"
    raise TransformError("shape", what, _hint(have, want, how))


def _hint(have: Sequence[int], want: Sequence[Any], how: How) -> str:
    """What a user can do about two shapes that do not fit."""
    if len(have) == 3 and len(want) == 3:
        if want[0] == have[2] and want[0] in _CHANNELS:
            sizes = "" if tuple(want[1:]) == tuple(have[:2]) else f" --resize {want[1]}x{want[2]}"
            return f"pass --layout NCHW{sizes}"
        if want[2] == have[0] and want[2] in _CHANNELS:
            sizes = "" if tuple(want[:2]) == tuple(have[1:]) else f" --resize {want[0]}x{want[1]}"
            return f"pass --layout NHWC{sizes}"
        if want[2] == have[2] and want[2] in _CHANNELS:
            return f"pass --resize {want[0]}x{want[1]}"
        if want[0] == have[0] and want[0] in _CHANNELS:
            return f"pass --resize {want[1]}x{want[2]}"
    if len(have) == 1 and len(want) == 1 and isinstance(want[0], int) and have[0] == want[0] + 1:
        return "if one column is the label, name it with --label-column"
    if len(have) in (2, 3) and len(want) == 1 and how.get("resize") is None:
        return f"pass --resize so that {' x '.join(map(str, have))} becomes {want[0]} values"
    return "give data of the model's shape"


def _show(shape: Sequence[Any]) -> str:
    return "(n" + "".join(f", {s}" for s in shape) + ")"


def _dtype(spec: Spec) -> np.dtype[Any]:
    try:
        return np.dtype(spec["dtype"])
    except TypeError as error:
        what = f"model input '{spec['name']}' takes {spec['dtype']}, which no data file holds"
        raise TransformError("shape", what, "give it float32 inputs") from error


def _cast(x: Array, name: str, dtype: np.dtype[Any]) -> Array:
    if x.dtype == dtype:
        return x
    if np.issubdtype(dtype, np.floating):
        with np.errstate(over="ignore"):
            out = x.astype(dtype)
        if dtype.itemsize < x.dtype.itemsize and not np.isfinite(out).all():
            raise TransformError(
                "range", f"a value of the data is too large for {dtype}", "scale the data with --scale"
            )
        return out
    low, high = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    whole = x.dtype.kind in "biu" or bool((x == np.rint(x)).all())
    if not whole or x.min() < low or x.max() > high:
        what = f"model input '{name}' takes {dtype}, the data are {x.dtype} from {x.min():g} to {x.max():g}"
        raise TransformError("shape", what, "give whole numbers in its range")
    return x.astype(dtype)


# --- image files -----------------------------------------------------------------------------------
def decode(path: str, wanted: int | None) -> Array:
    """One image file as uint8 (h, w, 1 or 3) in RGB, upright by its EXIF orientation, transparency dropped.

    wanted: 1 for gray, 3 for RGB; None keeps gray files gray and makes RGB of all others. A 16-bit image keeps its high
    byte.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise TransformError("pillow", "reading images needs pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large photographs and odd metadata are fine; what is not raises
            with Image.open(path) as opened:
                image: Any = ImageOps.exif_transpose(opened)
                gray = wanted == 1 or (wanted is None and image.mode in _GRAY)
                return _pixels(image, gray, opened.format == "PNG")
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError) as error:
        reason = str(error).replace(f" {path!r}", "") or type(error).__name__
        raise TransformError(
            "image", f"cannot decode image '{path}': {reason}", "replace or remove the file"
        ) from error


def _pixels(image: Any, gray: bool, png: bool) -> Array:
    if image.mode.startswith("I;16") or (image.mode == "I" and png):  # pillow's mode for 16-bit PNG has changed
        high = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None]
        return high if gray else np.repeat(high, 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits per pixel (mode {image.mode}); save it with 8 or 16")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("L" if gray else "RGB"))
    return pixels[..., None] if gray else pixels
