"""A runner without a runtime, to try the worker's protocol: one matrix product, and the ways in which runtimes fail.

The folder holds behaviour.json: {"fail": "load" | "run" | "die" | "hang" | "", "shout": bool, "scale": float,
"sleep_s": float, "nan": bool, "output": name, "columns": int}.
"""

import json
import os
import sys
import time

import numpy as np


def version():
    return "numpy " + np.__version__


class Session:
    def __init__(self, folder, threads, batch, profile):
        with open(os.path.join(folder, "behaviour.json"), encoding="utf-8") as file:
            self.behaviour = {"fail": "", "shout": False, "scale": 2.0, "sleep_s": 0.0, "nan": False, **json.load(file)}
        self.options = (threads, batch, profile)
        self.calls = 0
        if self.behaviour["fail"] == "load":
            raise RuntimeError("no such operator\nsecond line")

    def run(self, inputs):
        self.calls += 1
        if self.behaviour["shout"]:
            os.write(1, b"runtime banner on fd 1\n" * 3)
            print("print from python")
        fail = self.behaviour["fail"]
        if fail == "run":
            raise ValueError("bad shape")
        if fail == "die":
            sys.stderr.write("something broke\nfatal: kernel aborted\n")
            sys.stderr.flush()
            os.abort()
        if fail == "hang":
            time.sleep(3600)
        time.sleep(self.behaviour["sleep_s"])
        scale = np.float32(np.nan if self.behaviour["nan"] else self.behaviour["scale"])
        columns = self.behaviour.get("columns")
        return {
            self.behaviour.get("output", name + "_out"): (value * scale)[..., :columns]
            for name, value in inputs.items()
        }

    def bind(self, inputs):
        return lambda: self.run(inputs)

    def layers(self):
        return [{"name": "product", "op": "Mul", "seconds": 0.5, "calls": self.calls}]


def open_session(folder, threads, batch=0, profile=False):
    return Session(folder, threads, batch, profile)
