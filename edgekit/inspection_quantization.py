"""What `edgekit inspect --quantization` tells of a build: how each int8 artifact was quantized and what that cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgekit import artifact
from edgekit.errors import UsageError

QUANTIZATION_SCHEMA = 1  # 1: first


def inspect(path: Path) -> dict[str, Any]:
    """path: a build, or one artifact in it. Raises UsageError where nothing was quantized.

    Artifacts of one plan are told of once. "layers": see `passes.blame.Blame`, the most damaging first. "arithmetic":
    per artifact and class of CPU, see `arithmetic.Distances.classes`.
    """
    folders = [path] if (path / artifact.MANIFEST).is_file() else artifact.artifacts(path)
    plans: dict[str, dict[str, Any]] = {}
    for folder in folders:
        manifest = artifact.read_manifest(folder, verify=False)
        if "method" not in (manifest.quantization or {}):
            continue  # float, or weights alone
        assert manifest.quantization is not None
        row = plans.setdefault(artifact.digest_json(manifest.quantization), _told(manifest.quantization))
        name = f"{manifest.target}/{manifest.id}"
        row["artifacts"].append(name)
        row["arithmetic"] += [{"artifact": name, **r} for r in (manifest.parity or {}).get("arithmetic", ())]
        if (manifest.parity or {}).get("saturates") and manifest.quantization["weight_bits"] == 8:
            row["warnings"].append(f"{name}: 8-bit weights saturate in this CPU's u8×s8 kernels")
    if not plans:
        raise UsageError(
            f"nothing in '{path}' was quantized with calibration", "give a build that has an int8 artifact"
        )
    return {"schema": QUANTIZATION_SCHEMA, "plans": list(plans.values())}


def _told(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "artifacts": [],
        "method": plan["method"],
        "weight_bits": plan["weight_bits"],
        "activation_bits": plan["activation_bits"],
        "samples": plan["samples"],
        "tried": plan["scores"],
        "layers": plan.get("blame", []),
        "float_nodes": plan["float_nodes"],
        "arithmetic": [],
        "warnings": [],
    }


def worst(layers: Iterable[Mapping[str, Any]], most: int = 3, least: float = 0.1) -> str:
    """The layers with the most damage in a sentence; empty if none stands out."""
    told = [
        f"{row['op']} '{row['node']}' {min(1.0, max(row['alone'], row['without'])):.0%}"
        + (f" ({row['cause']})" if row["cause"] else "")
        for row in layers
        if max(row["alone"], row["without"]) >= least
    ]
    return f"int8 error of one layer alone, as a share of the whole model's: {'; '.join(told[:most])}" if told else ""
