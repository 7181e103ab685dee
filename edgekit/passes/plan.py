"""The quantization plan: every decision of `QuantizeInt8` as plain data to be printed, saved, compared and reused."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from edgekit.errors import ArtifactError
from edgekit.scheme import Scheme, fixed_output

# 1: first version; 2: activations have a number of bits; 3: weights may have integers of their own;
# 4: the scheme, and whether weights use the full range
PLAN_SCHEMA = 4

Method = Literal[
    "minmax",
    "wide",
    "wider",
    "average",
    "percentile",
    "mse",
    "kl",
    "half",
    "quarter",
    "eighth",
    "given",
    "fixed",
    "constant",
]
Fate = Literal["removed", "kept"]
Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]

# Smallest scale handed out: the product with a weight scale must stay a normal float32 (2**-126).
MIN_SCALE = 2.0**-80


@dataclass(frozen=True)
class Activation:
    """How one float32 tensor becomes an integer of `bits`: q = clip(round(x / scale) + zero_point), saturating.

    scale: a float32 value > 0. low, high: the range that was asked for, in the tensor's own unit; holds 0.
    """

    scale: float
    zero_point: int
    low: float
    high: float
    method: Method
    bits: Bits = 8

    @property
    def limits(self) -> tuple[float, float]:
        """The real values of the lowest and the highest integer."""
        low, high = integer_range(self.bits)
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale


@dataclass(frozen=True)
class Weight:
    """How the constant weight of one node becomes int8, symmetric around zero.

    value: name of the float32 initializer. axis: its output channel axis; `scales` has one float32 value per channel.
    bits: 7 keeps the integers in [-63, 63], 8 in [-127, 127]; full: in [-64, 63], [-128, 127]. integers: the int8
    values themselves in C order, where they are not simply the nearest.
    """

    value: str
    axis: int
    bits: int
    scales: tuple[float, ...]
    integers: bytes = b""
    full: bool = False

    @property
    def lowest(self) -> int:
        return -self.limit - self.full

    @property
    def limit(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class QuantizationPlan:
    """What `apply_plan` needs besides the model.

    method: the calibration chosen for the whole model. scores: what each tried one reached on held-back samples
        ({"minmax": {"sqnr_db": 31.2, "agreement": 0.99}, ...}).
    quantized: names of the nodes that compute on integers, in graph order.
    fused: Relu and Clip nodes without a quantization between them and the node before: "removed" when saturation of the
        quantized range does the same, "kept" otherwise.
    float_nodes: node -> why it stays float.
    activations: value -> parameters, constant operands included. weights: node -> parameters of its weight.
    groups: sets of values that share scale and zero point.
    factors: value -> what its channels are multiplied with, and its readers' weights divided by, before all else.
    bias_shifts: node -> what is added to its bias, one float per output channel, to undo the mean error of its weights.
    scheme: "litert" or "fpga", where weight_bits and activation_bits are those of layers without widths of their own.
    layer_bits: node or model input -> (weight bits, activation bits) that were asked for.
    """

    weight_bits: int
    method: str
    quantized: tuple[str, ...]
    fused: dict[str, Fate]
    float_nodes: dict[str, str]
    activations: dict[str, Activation]
    weights: dict[str, Weight]
    activation_bits: Bits = 8
    groups: tuple[tuple[str, ...], ...] = ()
    factors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    bias_shifts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: int = 0
    seed: int = 0
    scheme: Scheme = "litert"
    layer_bits: dict[str, tuple[int, int]] = field(default_factory=dict)
    schema: int = PLAN_SCHEMA

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal plan (floats are written so that they round-trip exactly)."""
        return json.dumps(asdict(self), indent=1, allow_nan=False, default=_packed)

    def record(self) -> dict[str, Any]:
        """JSON-ready, for a manifest: of integers that are not the nearest only their number is told."""
        record = asdict(self)
        for weight in record["weights"].values():
            weight["integers"] = len(weight["integers"])
        return record

    @staticmethod
    def from_json(text: str) -> QuantizationPlan:
        """Raises ArtifactError for damaged text or an unknown schema."""
        try:
            data = json.loads(text)
            schema = data.pop("schema")
            if schema != PLAN_SCHEMA:
                raise ArtifactError(
                    f"the quantization plan has schema {schema!r}",
                    f"this edgekit reads schema {PLAN_SCHEMA}: convert again",
                )
            data["activations"] = {k: Activation(**v) for k, v in data["activations"].items()}
            data["weights"] = {k: _weight(v) for k, v in data["weights"].items()}
            for key in ("bias_shifts", "factors", "layer_bits"):
                data[key] = {k: tuple(v) for k, v in data[key].items()}
            data["quantized"] = tuple(data["quantized"])
            data["groups"] = tuple(tuple(g) for g in data["groups"])
            return QuantizationPlan(**data)
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise ArtifactError(f"the quantization plan is damaged ({error})", "convert again") from error

    def diff(self, other: QuantizationPlan) -> list[str]:
        """One line per decision that differs, `name: this -> other`; empty if the plans are equal."""
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        return [
            f"{key}: {mine.get(key, 'absent')} -> {theirs.get(key, 'absent')}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key, "absent") != theirs.get(key, "absent")
        ]

    def describe(self) -> list[str]:
        """Lines for a person: what is quantized, how, and what stays float and why."""
        kind = f"fixed{self.activation_bits}" if self.scheme == "fpga" else f"int{self.activation_bits}"
        lines = [
            f"{len(self.quantized)} nodes in {kind}, {len(self.float_nodes)} in float; "
            f"weights {self.weight_bits} bits, calibration {self.method} on {self.samples} samples"
        ]
        for name, score in sorted(self.scores.items()):
            lines.append(f"  tried {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in sorted(score.items())))
        for name, a in self.activations.items():
            lines.append(f"  {name}: [{a.low:.6g}, {a.high:.6g}] scale {a.scale:.6g} zero {a.zero_point} ({a.method})")
        for node, w in self.weights.items():
            lines.append(f"  {node} weights: {w.bits} bits, scales {min(w.scales):.4g} to {max(w.scales):.4g}")
        lines += [f"  float: {node} ({reason})" for node, reason in self.float_nodes.items()]
        return lines


def _packed(value: Any) -> str:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} has no place in a plan")
    return base64.b64encode(zlib.compress(value)).decode("ascii")


def _weight(data: Mapping[str, Any]) -> Weight:
    integers = zlib.decompress(base64.b64decode(data["integers"])) if data["integers"] else b""
    return Weight(**{**data, "scales": tuple(data["scales"]), "integers": integers})


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def integer_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest integer."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def activation(low: float, high: float, method: Method, bits: Bits = 8) -> Activation:
    """Parameters for [low, high], widened to hold 0: asymmetric in 8 bits, symmetric in 16.

    A tensor that is always 0 gets [0, 1].
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        high = 1.0
    lowest, highest = integer_range(bits)
    if bits == 16:
        return Activation(float(np.float32(max(-low, high, MIN_SCALE * highest) / highest)), 0, low, high, method, 16)
    scale = np.float32(max((high - low) / (highest - lowest), MIN_SCALE))
    zero_point = int(np.clip(np.rint(lowest - low / float(scale)), lowest, highest))
    return Activation(float(scale), zero_point, low, high, method)


def fixed(op: str, bits: Bits) -> Activation | None:
    """What an operator writes whatever data say: Softmax and Sigmoid [0, 1), Tanh [-1, 1)."""
    if op not in fixed_output(bits):
        return None
    scale, zero = fixed_output(bits)[op]
    low, high = integer_range(bits)
    return Activation(scale, zero, (low - zero) * scale, (high - zero) * scale, "fixed", bits)
