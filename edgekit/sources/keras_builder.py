"""The process that builds Keras models from plans and writes them as .keras: `python keras_builder.py`.

One file that needs the standard library, numpy, TensorFlow and Keras, and nothing of edgekit. It is commanded by one
JSON line on stdin and answers in JSON lines on stdout; arrays travel as files in the folder that the request names:

    -> {task: "write", plan, work, batches}   <- {stage}, …, {done: {versions, model, outputs, layers, parameters}}

or, at any point, <- {error: {kind, what, remedy}}, kind being the name of a class in edgekit.errors. A plan is a JSON
file with its arrays in an .npz of the same stem: a0, a1, … constants, w0, w1, … weights in the order of the steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDED = ("tensorflow", "keras")
Say = Callable[[dict[str, Any]], None]
Task = Callable[[dict[str, Any], Say], None]


class Refused(Exception):
    """An expected failure: kind is the name of an edgekit error class."""

    def __init__(self, kind: str, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.kind, self.what, self.remedy = kind, what, remedy


@dataclass(frozen=True)
class Built:
    """model: outputs in the plan's order. logits: with what goes into a Softmax instead of what comes out of it.

    variables: one for each weight of the plan, in its order.
    """

    model: Any
    logits: Any
    variables: list[Any]


# --- from a plan to a model -----------------------------------------------------------------------------------------
def build(path: Path) -> Built:
    """A functional model of the standard layers and functions that the plan names."""
    import keras
    import numpy as np

    plan = json.loads(path.read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = dict(stored)
    tensors: dict[str, Any] = {}
    inputs = []
    for name, dtype, shape in plan["inputs"]:
        given = keras.Input(batch_shape=shape, dtype=dtype, name=name)
        tensors[name] = given
        inputs.append(given)
    variables: list[Any] = []
    for step in plan["steps"]:
        arguments = [_argument(a, tensors, arrays) for a in step["arguments"]]
        if step["layer"]:
            layer = _layer(step)
            out = layer(*arguments)
            count = len(step["weights"])
            if count:
                layer.set_weights([arrays[key] for key in step["weights"]])
                variables += layer.weights[:count]
        else:
            out = getattr(keras.ops, step["function"])(*arguments, **step["keywords"])
            # Keras would number it by what else this process made, which may be the name of a layer
            (out[0] if isinstance(out, (list, tuple)) else out)._keras_history.operation.name = step["name"]
            if step["takes"] is not None:
                out = out[step["takes"]]
        tensors[step["output"]] = out
    outputs = [tensors[name] for name in plan["outputs"]]
    logits = [tensors[tap] if tap else out for tap, out in zip(plan["logits"], outputs, strict=True)]
    model = keras.Model(inputs, outputs[0] if len(outputs) == 1 else outputs, name=plan["name"])
    return Built(model, keras.Model(inputs, logits), variables)


def _layer(step: dict[str, Any]) -> Any:
    import keras

    kind, config = getattr(keras.layers, step["layer"]), dict(step["config"])
    config = {k: tuple(map(_tuple, v)) if isinstance(v, list) else v for k, v in config.items()}
    if step["inner"]:
        wraps = config.pop("wraps")
        return kind(getattr(keras.layers, step["inner"])(**wraps), name=step["name"], **config)
    return kind(name=step["name"], **config)


def _tuple(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _argument(given: Any, tensors: dict[str, Any], arrays: dict[str, Any]) -> Any:
    if isinstance(given, dict):
        return tensors[given["ref"]] if "ref" in given else arrays[given["array"]]
    return [_argument(a, tensors, arrays) for a in given] if isinstance(given, list) else given


def checked(path: Path) -> Built:
    """`build`, whatever goes wrong as one line."""
    try:
        return build(path)
    except Exception as error:
        traceback.print_exc()
        text = next((t.strip() for t in str(error).splitlines() if t.strip()), type(error).__name__)
        raise Refused(
            "UnsupportedOpError", f"Keras cannot build the model: {text[:300]}", "keep the ONNX model"
        ) from error


# --- writing --------------------------------------------------------------------------------------------------------
def write(request: dict[str, Any], say: Say) -> None:
    """Save the model, load it as its user will, and run what was loaded."""
    import keras
    import numpy as np

    work = Path(request["work"])
    say({"stage": "build the Keras model"})
    built = checked(work / request["plan"])
    built.model.save(str(work / "model.keras"))
    say({"stage": "load and run the Keras model"})
    model = keras.saving.load_model(str(work / "model.keras"))
    names = []
    for batch in request["batches"]:
        outputs = _call(model, _loaded(work / batch))
        np.savez(work / f"out_{batch}", **{f"t{i}": value for i, value in enumerate(outputs)})
        names.append(f"out_{batch}")
    layers = [type(layer).__name__ for layer in model.layers]
    parameters = int(sum(np.prod(v.shape) for v in model.trainable_variables))
    done = {"model": "model.keras", "outputs": names, "layers": layers, "parameters": parameters}
    say({"done": {**done, "versions": request["versions"]}})


def _loaded(path: Path) -> list[Any]:
    import numpy as np

    with np.load(path) as stored:
        return [stored[f"t{i}"] for i in range(len(stored.files))]


def _call(model: Any, inputs: list[Any]) -> list[Any]:
    import numpy as np

    out = model(inputs[0] if len(inputs) == 1 else inputs, training=False)
    return [np.asarray(t) for t in (out if isinstance(out, (list, tuple)) else [out])]


# --- the conversation -----------------------------------------------------------------------------------------------
def serve(request: dict[str, Any], tasks: dict[str, Task], say: Say) -> None:
    """Do one task."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            "MissingExtraError",
            f"a Keras model needs {', '.join(missing)}, which this Python has not",
            "pip install 'edgekit[keras]'",
        )
    say({"stage": "start Keras (TensorFlow)"})
    import keras
    import tensorflow as tf

    if int(keras.__version__.split(".")[0]) < 3:
        raise Refused("MissingExtraError", f"Keras {keras.__version__} is too old", "pip install 'edgekit[keras]'")
    tf.get_logger().setLevel("ERROR")
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    tasks[request["task"]]({**request, "versions": versions}, say)


def main(tasks: dict[str, Task]) -> int:
    """Serve one request; stdout is kept for answers, whatever TensorFlow prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        line = sys.stdin.readline()
        if line:  # else nobody waits for an answer any more
            serve(json.loads(line), tasks, say)
    except Refused as error:
        say({"error": {"kind": error.kind, "what": error.what, "remedy": error.remedy}})
    except KeyboardInterrupt:
        return 130
    return 0


def alone(script: str) -> None:
    """Search no modules in the script's folder: it holds some that are called like the libraries that are needed."""
    here = Path(script).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]


if __name__ == "__main__":
    alone(__file__)
    sys.exit(main({"write": write}))
