"""Published networks that packages ship inside their wheels, with data made for them here, for measuring on.

    EDGEKIT_ZOO=path/to/zoo python benchmarks/peers/fetch_models.py OUT_DIR [--only NAME ...]

`pip download` brings the wheels; nothing of them is installed, run or copied into this project.

- ocr_cls, ocr_rec, ocr_det: PP-OCR (MobileNetV3 and LCNet) from rapidocr_onnxruntime; the data are lines of
  tinyshakespeare set in this machine's fonts. Needs pillow.
- magika: what kind of file, from its bytes, from magika; the data are files of this machine's Python environment.

Writes OUT_DIR/NAME/{model.onnx, calib.npz, test.npz, about.json}, as train_models.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

SEED = 0
RAPIDOCR, MAGIKA = "rapidocr_onnxruntime==1.4.4", "magika==1.0.3"
LINE_HEIGHT, CLS_WIDTH, REC_WIDTH, PAGE = 48, 192, 320, 320  # pixels, as the package's own settings have them
EDGE, PADDING = 1024, 256  # magika: bytes from a file's start and from its end, and what fills up short ones
BLOCK = 4096  # of which blanks are stripped before
EXTENSIONS = {
    ".py": "python",
    ".pyc": "pythonbytecode",
    ".c": "c",
    ".cpp": "cpp",
    ".json": "json",
    ".html": "html",
    ".md": "markdown",
    ".xml": "xml",
    ".css": "css",
    ".js": "javascript",
    ".toml": "toml",
    ".sh": "shell",
    ".png": "png",
    ".zip": "zip",
    ".gz": "gzip",
}
MOST_OF_A_KIND = 120  # files


@dataclass(frozen=True)
class Made:
    """A network and its samples, calibration first. y: labels, or None."""

    model: onnx.ModelProto
    task: str
    trained_on: str
    x: Tensors
    y: Array | None
    calibration: int


def wheel(requirement: str, folder: Path) -> Path:
    """The unpacked wheel of a package, downloaded with pip."""
    target = folder / requirement.split("==")[0]
    if not target.is_dir():
        with tempfile.TemporaryDirectory() as download:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", download]
            subprocess.run([*pip, requirement], check=True)
            with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as file:
                file.extractall(target)
    return target


def shaped(path: Path, sizes: Sequence[int]) -> onnx.ModelProto:
    """The network with an open batch and its other input sizes set; what its nodes say of inner shapes is dropped."""
    proto = onnx.load(path)
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_param = "batch"
    for dim, size in zip(list(dims)[1:], sizes, strict=True):
        dim.dim_value = size
    del proto.graph.value_info[:]
    return proto


# --- text -----------------------------------------------------------------------------------------------------------
class Typesetter:
    """Lines of text on plain or photographic grounds, in the fonts that this machine has."""

    def __init__(self, zoo: Path, rng: np.random.Generator) -> None:
        with np.load(zoo / "data/tinyshakespeare_tokens.npz") as file:
            text = "".join(file["vocab"][file["val"]])
        self.lines = [line for line in text.split("\n") if 8 <= len(line) <= 60]
        with np.load(zoo / "data/imagenet_photos_96.npz") as file:
            self.photos = file["x"]
        self.fonts = sorted(Path("/usr/share/fonts").rglob("*.ttf"))
        self.rng = rng

    def text(self, longest: int) -> str:
        line = self.lines[int(self.rng.integers(len(self.lines)))]
        return line[:longest].rsplit(" ", 1)[0] if len(line) > longest else line

    def font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if not self.fonts:
            return ImageFont.load_default(size)
        return ImageFont.truetype(str(self.fonts[int(self.rng.integers(len(self.fonts)))]), size)

    def ground(self, width: int, height: int) -> tuple[Image.Image, tuple[int, ...]]:
        """(a background, an ink that stands out from it)."""
        dark = bool(self.rng.random() < 0.3)
        base = self.rng.integers(0, 90, 3) if dark else self.rng.integers(165, 256, 3)
        image = np.broadcast_to(base, (height, width, 3)).astype(np.float64)
        if self.rng.random() < 0.4:
            photo = Image.fromarray(self.photos[int(self.rng.integers(len(self.photos)))]).resize((width, height))
            image = 0.8 * image + 0.2 * np.asarray(photo)
        ink = self.rng.integers(180, 256, 3) if dark else self.rng.integers(0, 80, 3)
        return Image.fromarray(image.astype(np.uint8)), tuple(int(v) for v in ink)

    def line(self, width: int, longest: int) -> Array:
        """One line, as high as the networks want it, cut close; uint8 (48, at most width, 3) RGB."""
        text, font = self.text(longest), self.font(int(self.rng.integers(18, 34)))
        left, top, right, bottom = font.getbbox(text)
        edge = [int(v) for v in self.rng.integers(2, 8, 4)]
        size = int(right - left) + edge[0] + edge[1], int(bottom - top) + edge[2] + edge[3]
        image, ink = self.ground(*size)
        ImageDraw.Draw(image).text((edge[0] - left, edge[2] - top), text, ink, font)
        wide = min(width, max(1, round(LINE_HEIGHT * size[0] / size[1])))
        out = np.asarray(image.resize((wide, LINE_HEIGHT), Image.Resampling.BILINEAR)).astype(np.float64)
        return np.clip(out + self.rng.normal(0, 4, out.shape), 0, 255).astype(np.uint8)

    def page(self) -> Array:
        """Some lines at random places; uint8 (320, 320, 3) RGB."""
        image, ink = self.ground(PAGE, PAGE)
        draw, y = ImageDraw.Draw(image), int(self.rng.integers(4, 40))
        while y < PAGE - 30:
            size = int(self.rng.integers(12, 30))
            draw.text((int(self.rng.integers(2, 80)), y), self.text(24), ink, self.font(size))
            y += int(size * self.rng.uniform(1.3, 3))
        return np.asarray(image)


def ready(image: Array, width: int) -> Array:
    """BGR in [-1, 1], channels first, filled up with zeros on the right; float32."""
    out = np.zeros((3, image.shape[0], width), np.float32)
    out[:, :, : image.shape[1]] = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    return out


def ocr_cls(zoo: Path, work: Path) -> Made:
    """Upright (0) or upside down (1)."""
    path = next(wheel(RAPIDOCR, work).rglob("*cls_infer.onnx"))
    rng = np.random.default_rng(SEED)
    setter, count = Typesetter(zoo, rng), 512 + 1500
    y = rng.integers(0, 2, count)
    lines = [setter.line(CLS_WIDTH, 24) for _ in range(count)]
    x = np.stack([ready(a[::-1, ::-1] if turned else a, CLS_WIDTH) for a, turned in zip(lines, y, strict=True)])
    model = shaped(path, (3, LINE_HEIGHT, CLS_WIDTH))
    return Made(model, "classification", "text lines, by its makers", {model.graph.input[0].name: x}, y, 512)


def ocr_rec(zoo: Path, work: Path) -> Made:
    """What is written: 40 steps of 6625 characters."""
    path = next(wheel(RAPIDOCR, work).rglob("*rec_infer.onnx"))
    setter, count = Typesetter(zoo, np.random.default_rng(SEED)), 256 + 200
    x = np.stack([ready(setter.line(REC_WIDTH, 26), REC_WIDTH) for _ in range(count)])
    model = shaped(path, (3, LINE_HEIGHT, REC_WIDTH))
    return Made(model, "tokens", "text lines, by its makers", {model.graph.input[0].name: x}, None, 256)


def ocr_det(zoo: Path, work: Path) -> Made:
    """Where text is: one number in [0, 1] for each pixel."""
    path = next(wheel(RAPIDOCR, work).rglob("*det_infer.onnx"))
    setter, count = Typesetter(zoo, np.random.default_rng(SEED)), 128 + 100
    x = np.stack([ready(setter.page(), PAGE) for _ in range(count)])
    model = shaped(path, (3, PAGE, PAGE))
    return Made(model, "regression", "photographs of text, by its makers", {model.graph.input[0].name: x}, None, 128)


# --- files ----------------------------------------------------------------------------------------------------------
def features(data: bytes) -> Array:
    """int32 (2048,): the first and the last 1024 bytes, without blanks at the file's ends."""
    start, end = data[:BLOCK].lstrip()[:EDGE], data[-BLOCK:].rstrip()[-EDGE:]
    out = np.full(2 * EDGE, PADDING, np.int32)
    out[: len(start)] = list(start)
    if end:
        out[-len(end) :] = list(end)
    return out


def magika(zoo: Path, work: Path) -> Made:
    """Which of 214 kinds of file."""
    home = next(wheel(MAGIKA, work).rglob("model.onnx")).parent
    kinds = json.loads((home / "config.min.json").read_text(encoding="utf-8"))["target_labels_space"]
    roots = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib", "include")] + [Path("/usr/share")]
    rng = np.random.default_rng(SEED)
    found = sorted({p for root in roots for p in root.rglob("*") if p.suffix in EXTENSIONS and p.is_file()})
    taken: Counter[str] = Counter()
    seen, x, y = set(), [], []
    for place in rng.permutation(len(found)):
        path = found[place]
        if taken[path.suffix] >= MOST_OF_A_KIND or not 100 <= path.stat().st_size < 1 << 22:
            continue
        data = path.read_bytes()
        if data in seen:
            continue
        seen.add(data)
        taken[path.suffix] += 1
        x.append(features(data))
        y.append(kinds.index(EXTENSIONS[path.suffix]))
    order = rng.permutation(len(x))
    model = shaped(home / "model.onnx", (2 * EDGE,))
    inputs = {model.graph.input[0].name: np.stack(x)[order]}
    return Made(model, "classification", "files of 214 kinds, by its makers", inputs, np.array(y)[order], 512)


MAKERS: dict[str, Callable[[Path, Path], Made]] = {
    "ocr_cls": ocr_cls,
    "ocr_rec": ocr_rec,
    "ocr_det": ocr_det,
    "magika": magika,
}


def outputs(model: onnx.ModelProto, x: Tensors) -> Array:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    count = len(next(iter(x.values())))
    return np.concatenate([session.run(None, {k: v[i : i + 20] for k, v in x.items()})[0] for i in range(0, count, 20)])


def write(home: Path, made: Made) -> float | None:
    """All files of one model; returns its accuracy on the test samples where these have labels."""
    home.mkdir(parents=True, exist_ok=True)
    onnx.save(made.model, home / "model.onnx")
    whole = made.x if made.y is None else {**made.x, "y": made.y}
    np.savez_compressed(home / "calib.npz", **{k: v[: made.calibration] for k, v in whole.items()})
    np.savez_compressed(home / "test.npz", **{k: v[made.calibration :] for k, v in whole.items()})
    score = metric = None
    if made.y is not None:
        said = outputs(made.model, {k: v[made.calibration :] for k, v in made.x.items()})
        score = float((said.argmax(-1) == made.y[made.calibration :]).mean())
        metric = "accuracy"
    about = {"task": made.task, "trained_on": made.trained_on, "float_score": score, "metric": metric}
    (home / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS))
    chosen = parser.parse_args()
    if not os.environ.get("EDGEKIT_ZOO"):
        sys.exit("not run: set EDGEKIT_ZOO to the folder with models/ and data/")
    with tempfile.TemporaryDirectory() as work:
        for name in chosen.only:
            made = MAKERS[name](Path(os.environ["EDGEKIT_ZOO"]), Path(work))
            score = write(chosen.out / name, made)
            told = "no labels" if score is None else f"accuracy {score:.4f}"
            print(f"{name}: {told}, {len(next(iter(made.x.values())))} samples", flush=True)


if __name__ == "__main__":
    main()
