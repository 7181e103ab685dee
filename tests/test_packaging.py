"""What is shipped: the wheel holds its data, the core stays small, and `--help` loads nothing heavy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE_BUDGET_BYTES = 250_000_000
HEAVY = {
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "tensorflow",
    "keras",
    "PIL",
    "pyarrow",
    "rich",
    "sklearn",
}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree without a network."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that holds the wheel and sees the dependencies of this one.

    They come by a plain path entry: `site.addsitedir` would also process this environment's .pth files, and an editable
    edgekit among them would stand before the wheel.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    own = {str(Path(str(distribution(name).locate_file("")))) for name in ("numpy", "click")}
    (site / "dependencies.pth").write_text("\n".join(sorted(own)) + "\n")
    return python


def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    where = run(installed, "-c", "import edgekit; print(edgekit.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent.parent)


def test_the_installed_wheel_lists_every_target(installed: Path, tmp_path: Path) -> None:
    listed = json.loads(run(installed, "-m", "edgekit", "targets", "--json", cwd=tmp_path))["targets"]
    assert {t["name"] for t in listed} == {p.stem for p in (ROOT / "targets").glob("*.toml")}
    assert all(Path(t["path"]).is_relative_to(installed.parent.parent) for t in listed)


def test_the_installed_wheel_carries_the_demo(installed: Path, tmp_path: Path) -> None:
    script = "from edgekit.demo import digits; [print(digits(n)) for n in {!r}]"
    names = [p.name for p in (ROOT / "examples" / "digits").iterdir() if p.suffix in (".onnx", ".npz", ".toml")]
    assert len(names) >= 5
    for line in run(installed, "-c", script.format(names), cwd=tmp_path).split():
        assert Path(line).is_relative_to(installed.parent.parent)


def test_the_wheel_has_a_licence_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "docs/"))]


def test_the_licence_is_the_declared_one() -> None:
    """Apache-2.0, whole."""
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def names_of(requirements: Iterable[str]) -> set[str]:
    """Distribution names, normalised; those behind an extra are left out."""
    plain = [r for r in requirements if "extra ==" not in r]
    return {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0]).lower() for r in plain}


def closure(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    pending = set(names)
    while pending:
        name = pending.pop()
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # behind a marker that is false here, such as colorama on Windows
            continue
        found.add(name)
        pending |= names_of(requirements) - found
    return found


def test_the_core_fits_its_budget_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = closure(names_of(project["dependencies"]))
    assert {"click", "rich", "numpy", "onnx", "onnx-ir", "onnxruntime", "protobuf"} <= core
    assert "sympy" not in core
    total = 0
    for name in core:
        found = distribution(name)
        total += sum(
            p.stat().st_size for p in map(Path, map(str, map(found.locate_file, found.files or []))) if p.is_file()
        )
    assert total < CORE_BUDGET_BYTES


def test_every_dependency_is_pinned_in_the_tested_set() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = names_of((ROOT / ".ci" / "constraints.txt").read_text().splitlines()) - {""}
    direct = names_of(r for extra in project["optional-dependencies"].values() for r in extra) - {"edgekit"}
    assert direct | closure(direct | names_of(project["dependencies"])) <= pinned
    assert "://" not in (ROOT / ".ci" / "constraints.txt").read_text()


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"], ["targets"]])
def test_light_commands_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom edgekit.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = run(sys.executable, "-c", script, cwd=tmp_path).splitlines()[-1].split()
    assert loaded[0] == "LOADED"
    assert not HEAVY & set(loaded)


def test_a_python_that_is_too_old_is_told_in_one_line(tmp_path: Path) -> None:
    """make with an interpreter that reports 3.10: a real shell script stands in for one that is not installed here."""
    old = tmp_path / "python3.10"
    old.write_text(
        '#!/bin/sh\n[ "$1" = -V ] && { echo Python 3.10.0; exit; }\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 10, 0); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "test", f"PYTHON={old}", f"VENV={tmp_path}/v"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert told == [f"error: {old} is Python 3.10.0 — edgekit needs 3.11, 3.12 or 3.13: make PYTHON=python3.12"]
    assert not (tmp_path / "v").exists()
    done = subprocess.run(
        ["make", "demo", "PYTHON=no-such-python", f"VENV={tmp_path}/v"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "error: no 'no-such-python'" in done.stderr
