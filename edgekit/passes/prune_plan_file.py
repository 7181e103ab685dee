"""pruning.toml: a pruning plan that people read, change and hand on.

Each family lists its channels in the order in which they go; `keep` says how many stay. `--prune pruning.toml` does
what the file says, so a changed `keep` is all that an edit needs.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from edgekit.errors import ArtifactError
from edgekit.passes.prune_plan import FamilyPlan, PruningPlan

FILE_SCHEMA = 1  # 1: first
FILE = "pruning.toml"
_HEAD = """\
# How edgekit pruned this model. `edgekit convert MODEL --prune FILE --data DATA` does it again.
# keep: how many of the family's units stay, which you may change; order: the units, the first to go first;
# damage: [how many go, what the model's output suffers (KL divergence, or error over power)], measured one family
# at a time.
"""
_PLAN = ("measure", "budget", "macs", "parameters", "importance")


def write(path: Path, plan: PruningPlan, model_sha256: str) -> None:
    lines = [_HEAD, f"schema = {FILE_SCHEMA}", f"model_sha256 = {json.dumps(model_sha256)}"]
    lines += [f"{key} = {json.dumps(getattr(plan, key))}" for key in _PLAN]
    for family in plan.families:
        lines += ["", "[[family]]", f"name = {_text(family.name)}", f"units = {family.units}", f"keep = {family.keep}"]
        if family.frozen:
            lines.append(f"frozen = {_text(family.frozen)}")
        else:
            lines += [f"damage = {json.dumps([list(d) for d in family.damage])}", f"order = {list(family.order)}"]
    staged = path.with_name(f".{path.name}.new")
    staged.write_text("\n".join(lines) + "\n", encoding="utf-8")
    staged.replace(path)


def _text(value: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for the one character that JSON leaves alone."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def read(path: Path) -> tuple[PruningPlan, str]:
    """(plan, digest of the model it is for). Raises ArtifactError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"no pruning plan at '{path}'", "check the path; `edgekit convert --prune` writes one"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArtifactError(
            f"cannot read the pruning plan '{path}': {error}", "fix the TOML, or prune again"
        ) from error
    if data.get("schema") != FILE_SCHEMA:
        found = data.get("schema")
        raise ArtifactError(f"the pruning plan '{path}' has schema {found!r}", f"this edgekit reads {FILE_SCHEMA}")
    try:
        families = tuple(_family(row) for row in data.get("family", ()))
        return PruningPlan(**{key: data[key] for key in _PLAN}, families=families), str(data["model_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArtifactError(f"the pruning plan '{path}' is damaged ({told})", "prune again") from error


def _family(row: dict[str, Any]) -> FamilyPlan:
    units, frozen = int(row["units"]), str(row.get("frozen", ""))
    order = tuple(int(i) for i in row.get("order", range(units)))
    if sorted(order) != list(range(units)):
        raise ValueError(f"family '{row['name']}': order must hold each of its {units} units once")
    damage = tuple((int(n), float(d)) for n, d in row.get("damage", ()))
    return FamilyPlan(str(row["name"]), units, int(row["keep"]), order, damage, frozen)
