"""Runs a bundle's golden inputs on this machine and compares the answers: python selftest.py BUNDLE CANDIDATE.

Standard library, numpy and the runtime only, Python 3.9; started with the Python of the bundle's environment, by the
agent that installs it. Remote measurements compare the same way (`difference`). Prints {"difference": null} or how the
answers differ.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

import numpy as np


def self_test(folder: str, candidate: str) -> str | None:
    """In the environment's Python: the artifact's answers to the golden inputs against those that came along."""
    with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
        entry = json.load(file)["candidates"][candidate]
    spec = importlib.util.spec_from_file_location("edgekit_runner", os.path.join(folder, entry["runner"]))
    if spec is None or spec.loader is None:
        return f"no runner {entry['runner']}"
    runner = importlib.util.module_from_spec(spec)
    sys.modules["edgekit_runner"] = runner
    spec.loader.exec_module(runner)
    with np.load(os.path.join(folder, entry["golden"]), allow_pickle=False) as stored:
        golden = {name: stored[name] for name in stored.files}
    inputs = {name[3:]: value for name, value in golden.items() if name.startswith("in.")}
    wanted = {name[4:]: value for name, value in golden.items() if name.startswith("out.")}
    batch = len(next(iter(inputs.values())))
    got = runner.open_session(os.path.join(folder, entry["folder"]), 1, batch, False).run(inputs)
    return difference(wanted, got, entry["tolerance"])


def difference(wanted: dict[str, Any], got: dict[str, Any], tolerance: dict[str, Any]) -> str | None:
    """How the outputs differ beyond the tolerance, or None.

    tolerance: {"kind": "exact"}; "relative" with "value", of the largest magnitude of each output; "lsb" with "value"
    and the "scale" of each output.
    """
    for name, want in wanted.items():
        if name not in got:
            return f"output '{name}' is missing"
        have = np.asarray(got[name])
        if have.shape != want.shape:
            return f"output '{name}' has shape {list(have.shape)}, not {list(want.shape)}"
        if tolerance["kind"] == "exact" or want.dtype.kind not in "f":
            unequal = ~((have == want) | ((have != have) & (want != want)))
            if unequal.any():
                return f"output '{name}' differs in {int(unequal.sum())} of {want.size} values"
            continue
        apart = float(np.max(np.abs(have.astype(np.float64) - want))) if want.size else 0.0
        if tolerance["kind"] == "lsb":
            bound = float(tolerance["value"]) * float(tolerance["scale"][name])
        else:
            bound = float(tolerance["value"]) * max(float(np.max(np.abs(want), initial=0.0)), 1e-30)
        if not apart <= bound * (1 + 1e-6):
            return f"output '{name}' differs by {apart:.3g}, more than {bound:.3g}"
    return None


if __name__ == "__main__":
    print(json.dumps({"difference": self_test(os.path.abspath(sys.argv[1]), sys.argv[2])}))
    sys.stdout.flush()
    os._exit(0)  # runtimes' thread pools sometimes hang while the interpreter is torn down
