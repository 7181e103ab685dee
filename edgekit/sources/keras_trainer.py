"""The process in which a student follows its teacher: `python keras_trainer.py`; answers as `keras_builder.py` does.

    -> {task: "train", work, teacher, student, data, held, free, losses, hints, settings}
    <- {stage}, {step: [done, total]}, …, {done: {…, weights: file.npz, outputs: file.npz, rows}}

teacher, student: plans, the last `hints` outputs of which are inner values. data, held: .npy files, one for each input.
free: for each weight of the student whether it is trained. losses: for each output what it is taken for. settings: see
`Settings`.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Adam's (Kingma & Ba 2015), but for a second moment that forgets faster: runs are some thousand steps long
FIRST, SECOND, LEAST = 0.9, 0.99, 1e-12
Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """rate: the step as a share of a tensor's RMS, at its highest; floor: of the RMS; warmup: steps until it is that.

    temperature: softens distributions. hint: the weight of inner values against the outputs. average: of the mean of
    the weights over the last steps. batch: samples a step. seconds: to train for; steps: how many instead, if not 0.
    seed. judged: how often the held samples are looked at.
    ways: how samples may be altered, of "plain", "mixed", "moved", "mirrored", or several joined by "+", the mildest
    first; trial: share of the budget that each gets at first, if there are several; enough: see `chosen`.
    places: axes of height and width of the one input, if it is an image; shift: how far it is moved, as a share of
    its size.
    """

    rate: float
    floor: float
    warmup: int
    temperature: float
    hint: float
    average: float
    batch: int
    seconds: float
    steps: int
    seed: int
    judged: int
    ways: list[str]
    trial: float
    enough: float
    places: list[int]
    shift: float


class Budget:
    """How much of the steps or the time is used."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._start, self.steps = settings, time.monotonic(), 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def share(self) -> float:
        if self._settings.steps:
            return self.steps / self._settings.steps
        return self.seconds / self._settings.seconds


# --- samples --------------------------------------------------------------------------------------------------------
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

    def parts(self, size: int) -> list[Any]:
        import numpy as np

        return [np.arange(at, min(at + size, self.count)) for at in range(0, self.count, size)]


def altered(inputs: list[Any], way: str, settings: Settings, rng: Any) -> list[Any]:
    """The samples in one of the ways, or in several joined by "+"; whatever they are then, the teacher answers them."""
    for part in way.split("+"):
        if part == "mixed":
            inputs = mixed(inputs, rng)
        elif part in ("moved", "mirrored"):
            inputs = [moved(inputs[0], settings.places, settings.shift, rng, mirror=part == "mirrored")]
    return inputs


def mixed(inputs: list[Any], rng: Any) -> list[Any]:
    """Each sample with another one shining through, in any proportion (Zhang et al. 2018, mixup with alpha 1)."""
    import numpy as np

    count = len(inputs[0])
    other, share = rng.permutation(count), rng.random(count).astype(np.float32)
    out = []
    for array in inputs:
        part = share.reshape(-1, *[1] * (array.ndim - 1))
        out.append((array * part + array[other] * (1 - part)).astype(array.dtype))
    return out


def moved(images: Any, places: Sequence[int], shift: float, rng: Any, *, mirror: bool) -> Any:
    """Images moved by up to `shift` of their size, what is missing reflected, and half of them mirrored if asked."""
    import numpy as np

    index: list[Any] = [
        np.arange(size).reshape([-1 if i == a else 1 for i in range(4)]) for a, size in enumerate(images.shape)
    ]
    for axis in places:
        size = images.shape[axis]
        far = max(1, round(size * shift))
        at = np.arange(size) + rng.integers(-far, far + 1, (len(images), 1))
        if mirror and axis == places[1]:
            turned = rng.random((len(images), 1)) < 0.5
            at = np.where(turned, size - 1 - at, at)
        at = np.abs(at)
        at = size - 1 - np.abs(size - 1 - at)
        index[axis] = at.reshape([len(images) if i == 0 else size if i == axis else 1 for i in range(4)])
    return np.ascontiguousarray(images[tuple(index)])


def chosen(losses: dict[str, float], before: float, enough: float) -> str:
    """The last way that gains at least `enough` of what the best gains; losses on held samples after a short trial.

    What alters samples more learns slower at first and overfits later, which a short trial does not see.
    """
    losses = {w: loss if loss == loss else float("inf") for w, loss in losses.items()}  # what diverged is not a number
    best = min(losses.values())
    if best >= before:
        return min(losses, key=lambda w: losses[w])
    return [w for w, loss in losses.items() if before - loss >= enough * (before - best)][-1]


# --- training -------------------------------------------------------------------------------------------------------
class Trainer:
    """Adam whose step for each tensor is a share of the tensor's RMS.

    losses: for each output "values" (mean square over the teacher's variance), "scores" (that of what goes into the
    Softmax, and the Kullback-Leibler divergence of softened distributions; Hinton et al. 2015) or "none". hinted:
    whether both models give inner values behind these outputs.
    """

    def __init__(
        self, teacher: Any, student: Any, variables: list[Any], settings: Settings, losses: list[str], *, hinted: bool
    ) -> None:
        import numpy as np
        import tensorflow as tf

        self.student, self.losses, self.settings, self.hinted = student, losses, settings, hinted
        self.hints: list[Any] = []
        self.variables = [v.value for v in variables]
        self.scales = [max(float(np.sqrt(np.mean(np.square(v.numpy())))), settings.floor) for v in self.variables]
        self.first = [tf.Variable(tf.zeros_like(v)) for v in self.variables]
        self.second = [tf.Variable(tf.zeros_like(v)) for v in self.variables]
        self.mean = [tf.Variable(v) for v in self.variables]
        self.spread = [tf.Variable(1.0) for _ in losses]
        self.count = tf.Variable(0.0)
        self.step = tf.function(self._step, reduce_retracing=True)
        self.loss = tf.function(self._loss, reduce_retracing=True)
        self.teach = tf.function(lambda inputs: _outputs(teacher, inputs), reduce_retracing=True)

    def _loss(self, wanted: list[Any], inputs: list[Any]) -> Any:
        """(loss, share of samples whose largest output is the teacher's) of a batch; inner values count if given."""
        import tensorflow as tf

        heat = self.settings.temperature
        total, same = tf.constant(0.0), tf.constant(1.0)
        outputs = _outputs(self.student, inputs)
        count = len(self.losses)
        for kind, spread, want, got in zip(self.losses, self.spread, wanted[:count], outputs[:count], strict=True):
            if kind == "scores":
                soft = tf.nn.log_softmax(want / heat)
                part = tf.reduce_sum(tf.exp(soft) * (soft - tf.nn.log_softmax(got / heat)), axis=-1)
                total += heat**2 * tf.reduce_mean(part)
                equal = tf.argmax(want, -1) == tf.argmax(got, -1)
                same = tf.minimum(same, tf.reduce_mean(tf.cast(equal, tf.float32)))
            if kind != "none":
                total += tf.reduce_mean(tf.square(want - got)) / spread
        if len(wanted) > count:
            pairs = zip(self.hints, wanted[count:], outputs[count:], strict=True)
            total += self.settings.hint * tf.add_n([h.loss(want, got) for h, want, got in pairs]) / len(self.hints)
        return total, same

    def _step(self, wanted: list[Any], inputs: list[Any], rate: Any) -> None:
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.variables)
            loss, _ = self._loss(wanted, inputs)
        self.count.assign_add(1.0)
        # the mean starts short, so that it never holds on to where training began
        share = 1 - tf.minimum(self.settings.average, self.count / (9 + self.count))
        for i, slope in enumerate(tape.gradient(loss, self.variables)):
            if slope is None:
                continue
            slope = tf.convert_to_tensor(slope)
            self.first[i].assign(FIRST * self.first[i] + (1 - FIRST) * slope)
            self.second[i].assign(SECOND * self.second[i] + (1 - SECOND) * tf.square(slope))
            move = self.first[i] / (1 - FIRST**self.count)
            size = tf.sqrt(self.second[i] / (1 - SECOND**self.count))
            self.variables[i].assign_sub(rate * self.scales[i] * move / (size + LEAST))
            self.mean[i].assign_add(share * (self.variables[i] - self.mean[i]))

    def run(self, data: Samples, held: Samples, say: Say) -> dict[str, Any]:
        """Leaves the best weights in the student. Returns what a record tells."""
        import numpy as np
        import tensorflow as tf

        settings = self.settings
        known = self._answers(data)
        for answers, spread in zip(known, self.spread, strict=True):
            spread.assign(float(max(np.var(answers), LEAST)))
        self.held, self.wanted = held, self._answers(held)
        self.hints = self._hints(data) if self.hinted else []
        before = self.judge()
        self.best, self.kept = before, [v.numpy() for v in self.variables]
        first = [v.numpy() for v in self.variables]
        index = np.arange(min(settings.batch, data.count))
        inputs = _tensors(data, index)
        self.step(self.teach(inputs), inputs, tf.constant(0.0))  # traced, not timed
        self._restart(first)
        say({"stage": "distill"})
        budget, way, start = Budget(settings), settings.ways[0], 0.0
        found: dict[str, tuple[float, list[Any]]] = {}
        if len(settings.ways) > 1:
            for way in settings.ways:
                self._restart(first)
                self._train(data, known, way, budget, (start, start + settings.trial), say, False)
                found[way] = (self._judge_mean()[0], [v.numpy() for v in self.variables])
                start += settings.trial
            way = chosen({w: score for w, (score, _) in found.items()}, before[0], settings.enough)
            self._restart(found[way][1])
        self._train(data, known, way, budget, (start, 1.0), say, True)
        for variable, value in zip(self.variables, self.kept, strict=True):
            variable.assign(value)
        return {
            "seconds": budget.seconds, "steps": budget.steps, "way": way,
            "trials": {w: score for w, (score, _) in found.items()},
            "loss_before": before[0], "loss_after": self.best[0],
            "agreement_before": before[1], "agreement_after": self.best[1],
        }  # fmt: skip

    def _train(
        self, data: Samples, known: list[Any], way: str, budget: Budget, span: tuple[float, float], say: Say, fall: bool
    ) -> None:
        """Steps while the budget's share is in the span; fall: the rate goes to nothing on a cosine."""
        import numpy as np
        import tensorflow as tf

        settings = self.settings
        rng = np.random.default_rng(settings.seed)
        size, order, steps = min(settings.batch, data.count), np.zeros(0, np.int64), 0
        mark = max(budget.share, span[0]) + 1 / settings.judged
        while (share := budget.share) < span[1]:
            if len(order) < size:
                order = rng.permutation(data.count)
            index, order = np.sort(order[:size]), order[size:]
            inputs = [tf.constant(a) for a in altered(data.rows(index), way, settings, rng)]
            fixed = way == "plain" and not self.hints
            wanted = [tf.constant(k[index]) for k in known] if fixed else self.teach(inputs)
            done = (share - span[0]) / (span[1] - span[0])
            rate = settings.rate * min(1.0, (steps + 1) / settings.warmup)
            rate *= 0.5 * (1 + np.cos(np.pi * done)) if fall else 1.0
            self.step(wanted, inputs, tf.constant(rate, tf.float32))
            budget.steps, steps = budget.steps + 1, steps + 1
            if budget.share >= mark:
                mark += 1 / settings.judged
                self._judge_mean()
                say({"step": [min(budget.share, 1.0), 1.0], "loss": self.best[0], "agreement": self.best[1]})
        self._judge_mean()

    def _restart(self, values: list[Any]) -> None:
        import tensorflow as tf

        self.count.assign(0.0)
        for i, value in enumerate(values):
            for variable in (self.variables[i], self.mean[i]):
                variable.assign(value)
            for moment in (self.first[i], self.second[i]):
                moment.assign(tf.zeros_like(moment))

    def _answers(self, data: Samples) -> list[Any]:
        """The teacher's outputs on all samples, without inner values."""
        import numpy as np

        count = len(self.losses)
        parts = [
            [np.asarray(o) for o in self.teach(_tensors(data, i))[:count]] for i in data.parts(self.settings.batch)
        ]
        return [np.concatenate(p) for p in zip(*parts, strict=True)]

    def _hints(self, data: Samples) -> list[Any]:
        """How the student's inner values are the teacher's, before training."""
        import numpy as np

        found: list[Any] = []
        count = len(self.losses)
        for index in data.parts(self.settings.batch):
            inputs = _tensors(data, index)
            pairs = [
                (np.asarray(a), np.asarray(b))
                for a, b in zip(self.teach(inputs)[count:], _outputs(self.student, inputs)[count:], strict=True)
            ]
            found = found or [HINTS.Moments(a, b) for a, b in pairs]
            for moments, (a, b) in zip(found, pairs, strict=True):
                moments.extend(a, b)
        return [moments.hint() for moments in found]

    def judge(self) -> tuple[float, float]:
        """(loss, agreement) on the held samples."""
        import tensorflow as tf

        total = same = 0.0
        for index in self.held.parts(self.settings.batch):
            loss, equal = self.loss([tf.constant(k[index]) for k in self.wanted], _tensors(self.held, index))
            total, same = total + float(loss) * len(index), same + float(equal) * len(index)
        return total / self.held.count, same / self.held.count

    def _judge_mean(self) -> tuple[float, float]:
        """Judge the mean of the last weights, and keep it if it is the best so far."""
        now = [v.numpy() for v in self.variables]
        for variable, value in zip(self.variables, self.mean, strict=True):
            variable.assign(value)
        found = self.judge()
        if found[0] < self.best[0]:
            self.best, self.kept = found, [v.numpy() for v in self.variables]
        for variable, value in zip(self.variables, now, strict=True):
            variable.assign(value)
        return found


def _outputs(model: Any, inputs: list[Any]) -> list[Any]:
    out = model(inputs[0] if len(inputs) == 1 else inputs, training=False)
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _tensors(data: Samples, index: Any) -> list[Any]:
    import tensorflow as tf

    return [tf.constant(a) for a in data.rows(index)]


# --- the task -------------------------------------------------------------------------------------------------------
def train(request: dict[str, Any], say: Say) -> None:
    """Build both, train, and leave the weights and what the student makes of the first held samples."""
    import keras
    import numpy as np
    import tensorflow as tf

    keras.utils.set_random_seed(request["settings"]["seed"])
    tf.config.experimental.enable_op_determinism()
    work, settings = Path(request["work"]), Settings(**request["settings"])
    say({"stage": "build teacher and student in Keras"})
    teacher, student = BUILDER.checked(work / request["teacher"]), BUILDER.checked(work / request["student"])
    data, held = (Samples([np.load(work / f, mmap_mode="r") for f in request[k]]) for k in ("data", "held"))
    pairs = zip(student.variables, request["free"], strict=True)
    trained = [v for v, free in pairs if free and v.trainable]
    hints = request["hints"]
    trainer = Trainer(teacher.logits, student.logits, trained, settings, request["losses"], hinted=hints > 0)
    record = trainer.run(data, held, say)
    np.savez(work / "trained.npz", **{f"w{i}": np.asarray(v) for i, v in enumerate(student.variables)})  # type: ignore[arg-type]
    rows = min(settings.batch, held.count)
    outputs = [np.asarray(o) for o in _outputs(student.model, held.rows(np.arange(rows)))]
    np.savez(work / "outputs.npz", **{f"t{i}": value for i, value in enumerate(outputs)})  # type: ignore[arg-type]
    files = {"weights": "trained.npz", "outputs": "outputs.npz", "rows": rows}
    say({"done": {**record, **files, "versions": request["versions"]}})


def _beside(name: str) -> Any:
    """A module by its place: this folder must not be searched for modules."""
    spec = importlib.util.spec_from_file_location(f"edgekit_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


BUILDER, HINTS = _beside("keras_builder"), _beside("keras_hints")

if __name__ == "__main__":
    BUILDER.alone(__file__)
    sys.exit(BUILDER.main({"train": train}))
