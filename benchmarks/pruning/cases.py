"""What is pruned to what, and what must come out: models, budgets, settings and claims, as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Shares of the multiply-accumulates to keep. The last two models come with --extra.
BUDGETS: dict[str, tuple[float, ...]] = {
    "mobilenet_v2_cifar": (0.8, 0.69, 0.5, 0.3),
    "resnet8": (0.79, 0.69, 0.5),
    "mlp_784": (0.5, 0.3),
    "gpt_char": (0.7,),
    "lstm_mnist_rows": (0.5,),
    "dcgan": (0.5,),
    "vit": (0.7,),
    "mobilenet_v3": (0.7, 0.5),
}
# Single weights to zero: half of all, and 2 of every 4.
PATTERNS = ("0.5", "2:4")
PATTERNED = ("mobilenet_v2_cifar", "resnet8", "mlp_784", "vit")
# Where the float model also teaches what is left, and where the result is quantized as well.
DISTILLED = (
    ("mobilenet_v2_cifar", 0.5),
    ("mobilenet_v2_cifar", 0.3),
    ("resnet8", 0.79),
    ("resnet8", 0.5),
    ("mlp_784", 0.3),
)
QUANTIZED = (("mobilenet_v2_cifar", 0.5), ("resnet8", 0.79), ("mlp_784", 0.3))

Kind = Literal["channels", "weights"]
EDGEKIT, PEER = "edgekit", "onnxsim"
# The given samples without labels; with them, from which edgekit knows that an output has classes; more, without.
PLAIN, LABELLED, MORE = "no training", "no training, labelled", "no training, all samples"
DISTILL, INT8 = "distilled", "int8"
DATA = {PLAIN: "calib.npz", LABELLED: "labelled.npz", MORE: "all.npz", DISTILL: "calib.npz", INT8: "calib.npz"}
# where the other samples are tried too: what the claims are about
OTHER_SAMPLES = (
    ("mobilenet_v2_cifar", 0.5),
    ("mobilenet_v2_cifar", 0.3),
    ("resnet8", 0.79),
    ("mlp_784", 0.3),
    ("vit", 0.7),
)


@dataclass(frozen=True)
class Job:
    """One process: a tool on a model. budget: share of the multiply-accumulates, or a pattern of zeros."""

    model: str
    kind: Kind
    budget: str
    tool: str
    variant: str = PLAIN

    @property
    def share(self) -> float:
        return float(self.budget)

    @property
    def name(self) -> str:
        """Of its result file."""
        words = (self.kind, self.budget.replace(":", "of"), self.tool, self.variant)
        return "--".join(w.replace(", ", "-").replace(" ", "_") for w in words)


def jobs(model: str, distill: bool) -> list[Job]:
    """In the order in which they build on each other."""
    found = []
    for share in BUDGETS.get(model, (0.7, 0.5)):
        budget = f"{share:g}"
        found.append(Job(model, "channels", budget, EDGEKIT))
        found.append(Job(model, "channels", budget, PEER))
        if (model, share) in OTHER_SAMPLES:
            found += [Job(model, "channels", budget, EDGEKIT, variant) for variant in (LABELLED, MORE)]
        if (model, share) in QUANTIZED:
            found.append(Job(model, "channels", budget, EDGEKIT, INT8))
        if distill and (model, share) in DISTILLED:
            found.append(Job(model, "channels", budget, EDGEKIT, DISTILL))
    for pattern in PATTERNS if model in PATTERNED else ():
        found += [Job(model, "weights", pattern, tool) for tool in (EDGEKIT, PEER)]
    return found


@dataclass(frozen=True)
class Claim:
    """At most `most` of what is lost: points of accuracy, or percent of perplexity where the model tells tokens."""

    model: str
    budget: str
    variant: str
    most: float

    @property
    def name(self) -> str:
        how = "distilled" if self.variant == DISTILL else "without training"
        return f"{self.model} at {100 * float(self.budget):g} % of the MACs, {how}"


CLAIMS = (
    Claim("mobilenet_v2_cifar", "0.5", PLAIN, 1.5),
    Claim("mobilenet_v2_cifar", "0.3", PLAIN, 5.0),
    Claim("mobilenet_v2_cifar", "0.5", DISTILL, 1.0),
    Claim("mobilenet_v2_cifar", "0.3", DISTILL, 2.5),
    Claim("resnet8", "0.79", PLAIN, 3.5),
    Claim("resnet8", "0.79", DISTILL, 1.5),
    Claim("resnet8", "0.5", DISTILL, 6.0),
    Claim("mlp_784", "0.3", PLAIN, 1.0),
    Claim("vit", "0.7", PLAIN, 1.5),
    Claim("gpt_char", "0.7", PLAIN, 5.0),
)
INT8_LOSS = 0.5  # points, against the pruned float model
TIMED = ("mobilenet_v2_cifar", "0.5")
SECONDS, BYTES = 120.0, 2e9  # what that may take
