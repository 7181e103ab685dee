"""How many calibration samples are enough: SQNR of the logits and agreement with float, by number of samples.

    EDGEKIT_ZOO=path/to/zoo python benchmarks/calibration_samples.py

Three draws of each number, mobilenet_v2_cifar, weights of 8 bits, 500 test samples. 1 sample: 17 to 22 dB; 4: 24 to 28;
16: 28.5 to 30.7; 64: 32.7 to 33.3; 256: 33.3 to 33.9. From 64 on the draw matters less than the method.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from edgekit import model as M
from edgekit import pipeline
from edgekit.dataset import open_dataset
from edgekit.passes.apply_plan import apply_plan
from edgekit.passes.fold import Fold
from edgekit.passes.judge import judged
from edgekit.passes.quantize import QuantizeInt8
from edgekit.preprocessing import Preprocessing

COUNTS = (1, 4, 16, 64, 256)
SIGNED = Preprocessing(scale=1 / 127.5, mean=(1.0,), std=(1.0,))


def main() -> None:
    zoo = Path(os.environ["EDGEKIT_ZOO"])
    model = Fold()(pipeline.load(zoo / "models" / "mobilenet_v2_cifar.onnx").model, None)
    sig = M.signature(model)
    pool = open_dataset(zoo / "data" / "cifar10_calib.npz", preprocessing=SIGNED).bind(sig)
    test = open_dataset(zoo / "data" / "cifar10_test.npz", preprocessing=SIGNED).bind(sig).take(500)
    (name,) = judged(model)
    exact = M.FloatSession(model, fetch=[name])
    inputs = [batch.inputs for batch in test.batches(50)]
    wanted = np.concatenate([exact.run(i)[name] for i in inputs]).astype(np.float64)
    step = QuantizeInt8(calibration="output", rounding="nearest", smooth="off")
    for count in COUNTS:
        for seed in range(3):
            written = apply_plan(model, step.plan(model, pool.take(count, seed)))
            session = M.FloatSession(written, fetch=[name], optimize=False)
            got = np.concatenate([session.run(i)[name] for i in inputs])
            sqnr = 10 * np.log10((wanted**2).sum() / ((wanted - got) ** 2).sum())
            same = (wanted.argmax(-1) == got.argmax(-1)).mean()
            print(f"{count:4d} samples, draw {seed}: {sqnr:5.1f} dB, {same:.1%} of the labels", flush=True)


if __name__ == "__main__":
    main()
