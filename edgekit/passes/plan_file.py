"""plan.toml: a quantization plan that people read, change and hand on; the integers beside it, in plan.npz.

A plan without changes is applied as it is, without data. Changes are patterns on names (`*`, `?`), in two tables:

    [override.layers]
    "block4/*" = "float"
    "block5/*" = "w4a6"         # of an FPGA: bits of weights and activations; a model input has the latter

    [override.tensors]
    "logits" = { low = -8.0, high = 12.0 }
    "*/relu" = { method = "percentile" }
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import math
import re
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ArtifactError, UsageError
from edgekit.passes.plan import PLAN_SCHEMA, Activation, QuantizationPlan, Weight, integer_range

FILE_SCHEMA = 1  # 1: first
_WHOLE = "plan_schema"  # the key that a file of overrides only does not have
_SHARED = frozenset({"schema", "model_sha256", "override"})
_KEYS = _SHARED | {_WHOLE, "integers", "integers_sha256", "method", "weight_bits", "activation_bits", "samples"}
_KEYS |= {"scheme", "seed", "tried", "layer", "tensor", "factors", "groups", "layer_bits"}
_HEAD = """\
# How edgekit quantized this model. `edgekit convert MODEL --plan FILE` does it again, without data, to the last bit.
# To change something, say so in [override.layers] ("name or pattern" = "float") or [override.tensors]
# ("name or pattern" = { low = -1.0, high = 1.0 } or { method = "percentile" }), and pass --data as well.
"""
METHODS = ("minmax", "wide", "wider", "average", "percentile", "mse", "kl", "half", "quarter", "eighth")


@dataclass(frozen=True)
class Overrides:
    """Changes, by pattern: layers that stay float, tensors with a range or an estimator of their own."""

    layers: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers or self.tensors)


@dataclass(frozen=True)
class PlanFile:
    """plan: None in a file that holds overrides only. model_sha256: of the cleaned-up float model it is for."""

    plan: QuantizationPlan | None
    model_sha256: str | None
    overrides: Overrides


# --- writing ------------------------------------------------------------------------------------------
def write(path: Path, plan: QuantizationPlan, model_sha256: str, ops: Mapping[str, str]) -> None:
    """path: the .toml; integers go beside it. ops: node -> operator, for the reader."""
    integers = {n: np.frombuffer(w.integers, np.int8) for n, w in plan.weights.items() if w.integers}
    beside = path.with_suffix(".npz")
    lines = [_HEAD, f"schema = {FILE_SCHEMA}", f"plan_schema = {plan.schema}", f"model_sha256 = {_text(model_sha256)}"]
    if integers:
        buffer = io.BytesIO()
        names = sorted(integers)
        np.savez_compressed(buffer, *(integers[n] for n in names))
        _replace(beside, buffer.getvalue())
        lines += [f"integers = {_text(beside.name)}", f"integers_sha256 = {_text(_digest(buffer.getvalue()))}"]
    else:
        beside.unlink(missing_ok=True)
    for key in ("scheme", "method", "weight_bits", "activation_bits", "samples", "seed"):
        lines.append(f"{key} = {_value(getattr(plan, key))}")
    lines.append("\n[override.layers]\n\n[override.tensors]\n")
    for name, score in plan.scores.items():
        lines.append(f"[tried.{_text(name)}]\n" + "\n".join(f"{k} = {_value(v)}" for k, v in score.items()) + "\n")
    for name in (*plan.quantized, *plan.float_nodes):
        lines += [*_layer(plan, name, ops.get(name, "")), ""]
    for name, a in plan.activations.items():
        lines += ["[[tensor]]", f"name = {_text(name)}"]
        lines += [f"{k} = {_value(getattr(a, k))}" for k in ("scale", "zero_point", "low", "high", "method", "bits")]
        lines.append("")
    lines += ["[factors]\n# channels of these tensors were multiplied, and their readers' weights divided"]
    lines += [f"{_text(name)} = {_value(values)}" for name, values in plan.factors.items()]
    if plan.layer_bits:
        lines.append("\n[layer_bits]\n# bits of weights and activations, where they were asked for")
        lines += [f"{_text(name)} = {_value(pair)}" for name, pair in plan.layer_bits.items()]
    lines.append(f"\n[groups]\n# tensors of one scale and zero point\nmembers = {_value(plan.groups)}")
    _replace(path, ("\n".join(lines) + "\n").encode("utf-8"))


def _layer(plan: QuantizationPlan, name: str, op: str) -> list[str]:
    lines = ["[[layer]]", f"name = {_text(name)}", f"op = {_text(op)}"]
    if name in plan.float_nodes:
        return [*lines, 'precision = "float"', f"why = {_text(plan.float_nodes[name])}"]
    lines.append('precision = "fixed"' if plan.scheme == "fpga" else f'precision = "int{plan.activation_bits}"')
    if name in plan.fused:
        lines.append(f"fused = {_text(plan.fused[name])}")
    weight = plan.weights.get(name)
    if weight is not None:
        rounding = "reconstructed" if weight.integers else "nearest"
        lines += [f"weight = {_text(weight.value)}", f"weight_axis = {weight.axis}", f"weight_bits = {weight.bits}"]
        lines += [f"weight_rounding = {_text(rounding)}", f"weight_scales = {_value(weight.scales)}"]
    if name in plan.bias_shifts:
        lines.append(f"bias_shifts = {_value(plan.bias_shifts[name])}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return repr(float(value)) if isinstance(value, float) else str(int(value))


def _text(value: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for the one character that JSON leaves alone."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _replace(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}.new")
    staged.write_bytes(content)
    staged.replace(path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- reading ------------------------------------------------------------------------------------------
def read(path: Path) -> PlanFile:
    """Raises ArtifactError for a damaged plan, UsageError for overrides that make no sense."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"no plan at '{path}'", "check the path; `edgekit convert` writes one into the build"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArtifactError(f"cannot read the plan '{path}': {error}", "fix the TOML, or convert again") from error
    unknown = sorted(set(data) - (_KEYS if _WHOLE in data else _SHARED))
    if unknown:
        raise UsageError(
            f"the plan '{path}' has an unknown key '{unknown[0]}'", "known: override.layers, override.tensors"
        )
    if data.get("schema", FILE_SCHEMA) != FILE_SCHEMA or data.get(_WHOLE, PLAN_SCHEMA) != PLAN_SCHEMA:
        found = f"{data.get('schema')}/{data.get(_WHOLE)}"
        raise ArtifactError(
            f"the plan '{path}' has schema {found}", f"this edgekit reads {FILE_SCHEMA}/{PLAN_SCHEMA}: convert again"
        )
    overrides = _overrides(path, data.get("override", {}))
    if _WHOLE not in data:
        return PlanFile(None, data.get("model_sha256"), overrides)
    try:
        return PlanFile(_plan(path, data), data["model_sha256"], overrides)
    except (KeyError, TypeError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArtifactError(f"the plan '{path}' is damaged ({told})", "convert again") from error


def _plan(path: Path, data: Mapping[str, Any]) -> QuantizationPlan:
    stored = _integers(path, data)
    layers = {row["name"]: row for row in data.get("layer", ())}
    rounded = sorted(n for n, row in layers.items() if row.get("weight_rounding") == "reconstructed")
    integers = dict(zip(rounded, stored, strict=True))
    weights = {}
    for name, row in layers.items():
        if "weight" in row:
            scales = tuple(row["weight_scales"])
            own = integers.get(name, b"")
            full = data["scheme"] == "fpga"
            weights[name] = Weight(row["weight"], row["weight_axis"], row["weight_bits"], scales, own, full)
    floats = {n: row for n, row in layers.items() if row["precision"] == "float"}
    for name in floats:
        if name in weights:
            raise UsageError(
                f"'{path}': layer '{name}' is float but has a weight in int8", "say so in [override.layers] instead"
            )
    tensors = {row["name"]: {k: v for k, v in row.items() if k != "name"} for row in data.get("tensor", ())}
    activations = {n: Activation(**row) for n, row in tensors.items()}
    _check_numbers(activations, weights, data["scheme"])
    return QuantizationPlan(
        weight_bits=data["weight_bits"],
        activation_bits=data["activation_bits"],
        method=data["method"],
        quantized=tuple(n for n in layers if n not in floats),
        fused={n: row["fused"] for n, row in layers.items() if "fused" in row},
        float_nodes={n: row.get("why", "kept float by the plan") for n, row in floats.items()},
        activations=activations,
        weights=weights,
        groups=tuple(tuple(g) for g in data.get("groups", {}).get("members", ())),
        factors={n: tuple(v) for n, v in data.get("factors", {}).items()},
        bias_shifts={n: tuple(row["bias_shifts"]) for n, row in layers.items() if "bias_shifts" in row},
        scores=data.get("tried", {}),
        samples=data["samples"],
        seed=data["seed"],
        scheme=data["scheme"],
        layer_bits={n: (int(w), int(a)) for n, (w, a) in data.get("layer_bits", {}).items()},
    )


def _check_numbers(activations: Mapping[str, Activation], weights: Mapping[str, Weight], scheme: str) -> None:
    """Raises ValueError for what no integer of the scheme can have."""
    fpga = scheme == "fpga"
    if not fpga and scheme != "litert":
        raise ValueError(f"no scheme '{scheme}'")
    scales = [*(a.scale for a in activations.values()), *(s for w in weights.values() for s in w.scales)]
    if fpga and not all(math.frexp(s)[0] == 0.5 for s in scales):
        raise ValueError("a scale of an FPGA is no power of two")
    if fpga and any(a.zero_point for a in activations.values()):
        raise ValueError("a zero point of an FPGA is not 0")
    for name, a in activations.items():
        low, high = integer_range(a.bits)
        if a.bits not in (range(2, 9) if fpga else (8, 16)) or not (
            0 < a.scale < np.inf and low <= a.zero_point <= high
        ):
            raise ValueError(f"tensor '{name}' has {a.bits} bits, scale {a.scale}, zero point {a.zero_point}")
    for name, w in weights.items():
        if not 2 <= w.bits <= 8 or not all(0 < scale < np.inf for scale in w.scales):
            raise ValueError(f"layer '{name}' has weights of {w.bits} bits, or a scale that is not a positive number")


def _integers(path: Path, data: Mapping[str, Any]) -> list[bytes]:
    if "integers" not in data:
        return []
    beside = path.with_name(data["integers"])
    if not beside.is_file():
        raise ArtifactError(
            f"the plan's integers '{beside}' are missing", "copy them beside the plan, or convert again"
        )
    content = beside.read_bytes()
    if _digest(content) != data["integers_sha256"]:
        raise ArtifactError(f"'{beside}' is not what the plan was written with", "copy the two files together")
    with np.load(io.BytesIO(content)) as arrays:
        return [arrays[f"arr_{i}"].astype(np.int8).tobytes() for i in range(len(arrays.files))]


def _overrides(path: Path, data: Any) -> Overrides:
    tables = data if isinstance(data, dict) else {"?": data}
    wrong = sorted(k for k, v in tables.items() if k not in ("layers", "tensors") or not isinstance(v, dict))
    if wrong:
        raise UsageError(f"'{path}': unknown table [override.{wrong[0]}]", "known: override.layers, override.tensors")
    for pattern, precision in data.get("layers", {}).items():
        if precision not in ("float", "int8") and widths(precision) is None:
            told = 'give "float" or "int8", or for an FPGA bits of weights and activations as "w4a6"'
            raise UsageError(f"'{path}': layer '{pattern}' = {precision!r}", told)
    for pattern, change in data.get("tensors", {}).items():
        keys = set(change) if isinstance(change, dict) else set()
        fine = keys == {"method"} and change["method"] in METHODS
        if keys == {"low", "high"}:
            ends = (change["low"], change["high"])
            fine = all(isinstance(v, int | float) and np.isfinite(v) for v in ends) and ends[0] < ends[1]
        if not fine:
            told = "give { low = .., high = .. } with low < high, or { method = one of " + ", ".join(METHODS) + " }"
            raise UsageError(f"'{path}': tensor '{pattern}' = {change!r}", told)
    return Overrides(data.get("layers", {}), data.get("tensors", {}))


def widths(precision: object) -> tuple[int, int] | None:
    """(weight bits, activation bits) of "w4a6", None for anything else."""
    found = re.fullmatch(r"w([2-8])a([2-8])", precision) if isinstance(precision, str) else None
    return (int(found[1]), int(found[2])) if found else None


# --- matching -----------------------------------------------------------------------------------------
def match(patterns: Mapping[str, Any], names: Iterable[str], what: str) -> dict[str, Any]:
    """name -> its override. Raises UsageError for a pattern without a match, and where two say different things."""
    names = list(names)
    out: dict[str, tuple[str, Any]] = {}
    for pattern, change in patterns.items():
        found = [n for n in names if n == pattern] or fnmatch.filter(names, pattern)
        if not found:
            raise UsageError(
                f"the plan's pattern '{pattern}' matches no {what}", "`edgekit inspect --layers` lists the names"
            )
        for name in found:
            if name in out and out[name][1] != change:
                raise UsageError(
                    f"the plan's patterns '{out[name][0]}' and '{pattern}' contradict each other for {what} '{name}'",
                    "change one of them",
                )
            out[name] = (pattern, change)
    return {name: change for name, (_, change) in out.items()}
