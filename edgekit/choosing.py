"""Which artifact of a build is meant where none is named: the one that measured best, else the likeliest."""

from __future__ import annotations

from pathlib import Path

from edgekit import artifact, backends
from edgekit.artifact import Manifest
from edgekit.benching import ship_of
from edgekit.errors import ArtifactError, EdgekitError, MissingExtraError, UsageError
from edgekit.target import load_target

ELSEWHERE = "elsewhere"  # a device, whichever


def target_of(root: Path, target: str | None) -> str:
    """The target that was named, or the only one of the build. Raises ArtifactError, UsageError."""
    made = sorted({path.parent.name for path in artifact.artifacts(root)})
    if target is not None and target not in made:
        told = ", ".join(made) or "nothing"
        raise ArtifactError(
            f"build '{root}' has no target '{target}' (it has {told})", f"run `edgekit convert MODEL -t {target}`"
        )
    if target is None and len(made) != 1:
        raise UsageError(f"build '{root}' has {', '.join(made) or 'no targets'}", "say which with -t")
    return target or made[0]


def choose(root: Path, target: str, host: str = "", candidate: str | None = None) -> tuple[str, str]:
    """(candidate id, why): what was asked for, else the verdict of the newest measurements, else int8 before float.

    host: whose measurements count first, "" for this machine, where the artifact must also run, ELSEWHERE for another.
    Raises ArtifactError where there is no such candidate or none is right, MissingExtraError where its runtime is.
    """
    made = {path.name: artifact.read_manifest(path, verify=False) for path in artifact.artifacts(root, target)}
    if candidate is not None:
        if candidate not in made:
            raise ArtifactError(f"{target} has no candidate '{candidate}'", "it has " + ", ".join(sorted(made)))
        install = None if host else backends.get(made[candidate].backend).missing()
        if install:
            raise MissingExtraError(f"{candidate} needs {made[candidate].backend}", install)
        return candidate, "as asked"
    lacking = {} if host else {n: w for n, m in made.items() if (w := backends.get(m.backend).missing()) is not None}
    best = ship_of(root, target, host)
    if best is not None and best[0] in made and best[0] not in lacking:
        return best
    sound = {n: m for n, m in made.items() if (m.parity or {}).get("ok", True)}
    if not sound:
        raise ArtifactError(f"no artifact of {target} is right", f"run `edgekit bench {root}` for the reasons")
    usable = [n for n in sound if n not in lacking]
    if not usable:
        name = min(lacking)
        raise MissingExtraError(f"{name} needs {made[name].backend}", lacking[name])
    order = _order(target)
    there = f" --host {host}" if host not in ("", ELSEWHERE) else ""
    why = f"not measured yet: `edgekit bench {root}{there}` tells which is best"
    return min(usable, key=lambda n: _rank(made[n], order)), why


def _order(target: str) -> list[str]:
    """The backends as the profile lists them: the likeliest first on such devices; a profile that is gone has none."""
    try:
        named = [spec.backend for spec in load_target(target).candidates]
    except EdgekitError:
        named = []
    return list(dict.fromkeys([*named, *backends.BACKENDS]))


def _rank(manifest: Manifest, order: list[str]) -> tuple[int, bool, int]:
    """int8 before float32 before the rest, pruned before whole, then the order of the backends."""
    precision = {"int8": 0, "float32": 1}.get(manifest.precision, 2)
    return precision, not manifest.variant, order.index(manifest.backend)
