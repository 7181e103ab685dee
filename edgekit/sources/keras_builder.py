"""The process that builds Keras models from plans: `python keras_builder.py`; writes one as .keras, or trains one.

One file that needs the standard library, numpy, TensorFlow and Keras, and nothing of edgekit. It is commanded by one
JSON line on stdin and answers in JSON lines on stdout; arrays travel as files in the folder that the request names:

    -> {task: "write", plan, work, batches}                            <- {stage}, …, {done: {versions, model, outputs}}
    -> {task: "train", teacher, student, work, settings, …}            <- {stage}, {step: [done, total]}, …, {done: …}

or, at any point, <- {error: {kind, what, remedy}}, kind being the name of a class in edgekit.errors. A plan is a JSON
file with its arrays in an .npz of the same stem: a0, a1, … constants, w0, w1, … weights in the order of the steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDED = ("tensorflow", "keras")
Say = Callable[[dict[str, Any]], None]


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


def _checked(path: Path) -> Built:
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
    built = _checked(work / request["plan"])
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


# --- training -------------------------------------------------------------------------------------------------------
# (the teacher's outputs on samples, the student's weights moved towards them)
@dataclass(frozen=True)
class Samples:
    """Inputs batch first, in files that are read as needed."""

    inputs: list[Any]

    @property
    def count(self) -> int:
        return len(self.inputs[0])

    def rows(self, index: Any) -> list[Any]:
        import numpy as np

        return [np.ascontiguousarray(a[index]) for a in self.inputs]


def train(request: dict[str, Any], say: Say) -> None:
    """Move the student's weights towards the teacher's outputs; what is best on the held samples is kept."""
    import numpy as np

    work, settings = Path(request["work"]), request["settings"]
    say({"stage": "build teacher and student in Keras"})
    teacher, student = _checked(work / request["teacher"]), _checked(work / request["student"])
    data, held = (Samples([np.load(work / f, mmap_mode="r") for f in request[k]]) for k in ("data", "held"))
    trained = [v for v, free in zip(student.variables, request["free"], strict=True) if free and v.trainable]
    trainer = Trainer(teacher.logits, student.logits, trained, settings, request["losses"])
    record = trainer.run(data, held, say)
    np.savez(work / "trained.npz", **{f"w{i}": np.asarray(v) for i, v in enumerate(student.variables)})  # type: ignore[arg-type]
    rows = min(settings["batch"], held.count)
    outputs = _call(student.model, held.rows(np.arange(rows)))
    np.savez(work / "outputs.npz", **{f"t{i}": value for i, value in enumerate(outputs)})
    done = {"weights": "trained.npz", "outputs": "outputs.npz", "rows": rows, "versions": request["versions"]}
    say({"done": {**record, **done}})


class Trainer:
    """Adam whose step for each tensor is a share of the tensor's RMS, on a cosine from `rate` to nothing.

    losses: for each output "classes" (Kullback-Leibler divergence of softened distributions; Hinton et al. 2015),
    "values" (mean square over the teacher's variance) or "both".
    """

    def __init__(
        self, teacher: Any, student: Any, variables: list[Any], settings: dict[str, Any], losses: list[str]
    ) -> None:
        import numpy as np
        import tensorflow as tf

        self.teacher, self.student, self.losses, self.settings = teacher, student, losses, settings
        self.variables = [v.value for v in variables]
        self.scales = [max(float(np.sqrt(np.mean(np.square(v.numpy())))), settings["floor"]) for v in self.variables]
        self.first = [tf.Variable(tf.zeros_like(v)) for v in self.variables]
        self.second = [tf.Variable(tf.zeros_like(v)) for v in self.variables]
        self.mean = [tf.Variable(v) for v in self.variables]  # of the weights, over the last steps
        self.spread = [tf.Variable(1.0) for _ in losses]
        self.step = tf.function(self._step, reduce_retracing=True)
        self.loss = tf.function(self._compare, reduce_retracing=True)

    def outputs(self, model: Any, inputs: list[Any]) -> list[Any]:
        out = model(inputs[0] if len(inputs) == 1 else inputs, training=False)
        return list(out) if isinstance(out, (list, tuple)) else [out]

    def _compare(self, wanted: list[Any], inputs: list[Any]) -> Any:
        """(loss, share of samples whose largest output is the teacher's) of a batch."""
        import tensorflow as tf

        total, same = tf.constant(0.0), tf.constant(1.0)
        for kind, spread, want, got in zip(
            self.losses, self.spread, wanted, self.outputs(self.student, inputs), strict=True
        ):
            if kind != "values":
                heat = self.settings["temperature"]
                soft = tf.nn.log_softmax(want / heat)
                part = tf.reduce_sum(tf.exp(soft) * (soft - tf.nn.log_softmax(got / heat)), axis=-1)
                total += heat**2 * tf.reduce_mean(part)
                equal = tf.argmax(want, -1) == tf.argmax(got, -1)
                same = tf.reduce_mean(tf.cast(equal, tf.float32))
            if kind != "classes":
                total += tf.reduce_mean(tf.square(want - got)) / spread
        return total, same

    def _step(self, wanted: list[Any], inputs: list[Any], rate: Any, count: Any) -> Any:
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.variables)
            loss, _ = self._compare(wanted, inputs)
        keep, square = 0.9, 0.99
        grown = 1 - tf.minimum(self.settings["average"], (1 + count) / (10 + count))
        for i, slope in enumerate(tape.gradient(loss, self.variables)):
            if slope is None:
                continue
            self.first[i].assign(keep * self.first[i] + (1 - keep) * slope)
            self.second[i].assign(square * self.second[i] + (1 - square) * tf.square(slope))
            move = self.first[i] / (1 - keep ** (count + 1))
            size = tf.sqrt(self.second[i] / (1 - square ** (count + 1)))
            self.variables[i].assign_sub(rate * self.scales[i] * move / (size + 1e-12))
            self.mean[i].assign_add(grown * (self.variables[i] - self.mean[i]))
        return loss

    def run(self, data: Samples, held: Samples, say: Say) -> dict[str, Any]:
        import numpy as np
        import tensorflow as tf

        settings = self.settings
        rng = np.random.default_rng(settings["seed"])
        start = time.monotonic()
        known = self._answers(data)
        for i, spread in enumerate(self.spread):
            spread.assign(float(max(np.var(known[i]), 1e-12)))
        held_known = self._answers(held)
        before = best = self._judge(held, held_known)
        kept = [v.numpy() for v in self.variables]
        size = min(settings["batch"], data.count)
        steps, marks = 0, 1
        say({"stage": "distill"})
        order: list[int] = []
        while (done := self._done(steps, start)) < 1:
            if len(order) < size:
                order = rng.permutation(data.count).tolist()
            index = np.sort([order.pop() for _ in range(size)])
            inputs, wanted = self._batch(data, known, index, rng)
            rate = settings["rate"] * min(1.0, (steps + 1) / settings["warmup"]) * 0.5 * (1 + np.cos(np.pi * done))
            self.step(wanted, inputs, tf.constant(rate, tf.float32), tf.constant(float(steps)))
            steps += 1
            if self._done(steps, start) >= marks / settings["judged"]:
                marks += 1
                best, kept = self._better(held, held_known, best, kept)
                say({"step": [min(self._done(steps, start), 1.0), 1.0], "loss": best[0], "agreement": best[1]})
        best, kept = self._better(held, held_known, best, kept)
        for variable, value in zip(self.variables, kept, strict=True):
            variable.assign(value)
        return {
            "seconds": time.monotonic() - start, "cpu": time.process_time(),
            "steps": steps,
            "loss_before": before[0],
            "loss_after": best[0],
            "agreement_before": before[1],
            "agreement_after": best[1],
        }

    def _done(self, steps: int, start: float) -> float:
        """Share of the budget that is used: of steps if they are given, else of time."""
        if self.settings["steps"]:
            return float(steps / self.settings["steps"])
        return (time.monotonic() - start) / float(self.settings["seconds"])

    def _batch(self, data: Samples, known: list[Any], index: Any, rng: Any) -> tuple[list[Any], list[Any]]:
        import tensorflow as tf

        inputs = data.rows(index)
        mix = self.settings["mix"]
        if mix and all(a.dtype.kind == "f" for a in inputs):
            import numpy as np

            other, share = rng.permutation(len(index)), rng.beta(mix, mix, len(index)).astype(np.float32)
            inputs = [a * (s := share.reshape(-1, *[1] * (a.ndim - 1))) + a[other] * (1 - s) for a in inputs]
            inputs = self._moved(inputs, rng)
            tensors = [tf.constant(a) for a in inputs]
            return tensors, self.outputs(self.teacher, tensors)
        if self.settings["moves"]:
            tensors = [tf.constant(a) for a in self._moved(inputs, rng)]
            return tensors, self.outputs(self.teacher, tensors)
        return [tf.constant(a) for a in inputs], [tf.constant(k[index]) for k in known]

    def _moved(self, inputs: list[Any], rng: Any) -> list[Any]:
        import numpy as np

        if not self.settings["moves"]:
            return inputs
        out = []
        for a in inputs:
            if a.ndim != 4:
                out.append(a)
                continue
            p = self.settings["moves"]
            b = np.empty_like(a)
            padded = np.pad(a, ((0, 0), (p, p), (p, p), (0, 0)), mode="reflect")
            for i in range(len(a)):
                y, x = rng.integers(0, 2 * p + 1, 2)
                c = padded[i, y : y + a.shape[1], x : x + a.shape[2]]
                b[i] = c[:, ::-1] if self.settings.get("flip") and rng.random() < 0.5 else c
            out.append(b)
        return out

    def _answers(self, data: Samples) -> list[Any]:
        """The teacher's outputs on all samples."""
        import numpy as np

        size, parts = self.settings["batch"], []
        for at in range(0, data.count, size):
            index = np.arange(at, min(at + size, data.count))
            parts.append([np.asarray(o) for o in self.outputs(self.teacher, data.rows(index))])
        return [np.concatenate(p) for p in zip(*parts, strict=True)]

    def _judge(self, held: Samples, known: list[Any]) -> tuple[float, float]:
        import numpy as np
        import tensorflow as tf

        size, total, same = self.settings["batch"], 0.0, 0.0
        for at in range(0, held.count, size):
            index = np.arange(at, min(at + size, held.count))
            inputs = [tf.constant(a) for a in held.rows(index)]
            loss, equal = self.loss([tf.constant(k[index]) for k in known], inputs)
            total, same = total + float(loss) * len(index), same + float(equal) * len(index)
        return total / held.count, same / held.count

    def _better(
        self, held: Samples, known: list[Any], best: tuple[float, float], kept: list[Any]
    ) -> tuple[tuple[float, float], list[Any]]:
        """The best so far, or the mean of the last weights if that is nearer to the teacher on held samples."""
        now = [v.numpy() for v in self.variables]
        for variable, value in zip(self.variables, self.mean, strict=True):
            variable.assign(value)
        found = self._judge(held, known)
        if found[0] < best[0]:
            best, kept = found, [v.numpy() for v in self.variables]
        for variable, value in zip(self.variables, now, strict=True):
            variable.assign(value)
        return best, kept


# --- the conversation -----------------------------------------------------------------------------------------------
def serve(request: dict[str, Any], say: Say) -> None:
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
    {"write": write, "train": train}[request["task"]]({**request, "versions": versions}, say)


def main() -> int:
    """Serve one request; stdout is kept for answers, whatever TensorFlow prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        serve(json.loads(sys.stdin.readline() or "null"), say)
    except Refused as error:
        say({"error": {"kind": error.kind, "what": error.what, "remedy": error.remedy}})
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # this folder holds modules called like the libraries that are imported here
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    sys.exit(main())
