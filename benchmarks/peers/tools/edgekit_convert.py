"""`edgekit convert -t cpu` on a prepared model: python edgekit_convert.py FOLDER OUT VARIANT.

VARIANT "8-bit weights": what a CPU that does not saturate gets by default, to set beside the peers' portable figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

INT8 = {"onnxruntime": "model.onnx", "openvino": "model.xml", "tflite": "model.tflite"}


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    command = [sys.executable, "-m", "edgekit", "convert", str(folder / "model.onnx"), "-t", "cpu", "--json"]
    command += ["--data", str(folder / "calib.npz"), "--samples", "1000000", "-o", str(out / "build")]
    command += ["--weight-bits", "8"] if sys.argv[3] == "8-bit weights" else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    (out / "convert.json").write_text(done.stdout, encoding="utf-8")
    rows = {row["candidate"]: row for row in json.loads(done.stdout)["artifacts"]}
    files, missing = [], {}
    for backend, file in INT8.items():
        path = Path("build") / "cpu" / f"{backend}-int8" / file
        row = rows.get(f"{backend}-int8", {})
        if (out / path).is_file():
            files.append(str(path))
        else:
            missing[file] = row.get("why") or row.get("status", "it is not made")
    versions = {name: version(name) for name in ("edgekit", "onnxruntime", "openvino", "ai-edge-litert", "numpy")}
    print(json.dumps({"versions": versions, "files": files, "missing": missing}))


main()
