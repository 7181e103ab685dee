"""The README's commands and its Python example run as they stand; its links and table are true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.target import load_target, target_files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "quantization.md",
    *sorted((ROOT / "examples").glob("*/README.md")),
]
READ_ONLY = ("inspect", "targets", "doctor")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every edgekit command of a page, comments cut off."""
    lines = [line for block in blocks("", page.read_text(encoding="utf-8")) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("edgekit ")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like this checkout but takes what the example writes."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.slow
def test_the_python_example_runs(checkout: Path) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 11
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=checkout, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "onnxruntime-int8 made" in done.stdout
    assert "ship" in done.stdout
    look = [sys.executable, "-m", "edgekit", "inspect", "--quantization", "digits-build"]
    told = subprocess.run(look, cwd=checkout, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "→" in told
    assert "every CPU" in told
    assert (checkout / "digits-report.md").read_text(encoding="utf-8").startswith("# edgekit report")


def looking() -> list[list[str]]:
    return [c for c in commands(ROOT / "README.md") if c[1] in READ_ONLY and "build" not in c]


@pytest.mark.parametrize("command", looking(), ids=" ".join)
def test_commands_that_only_look_run(command: list[str], checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=checkout, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_option_exists(page: Path) -> None:
    from edgekit.cli import main

    for _, verb, *arguments in commands(page):
        command = main.commands[verb]
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        assert {a for a in arguments if a.startswith("-")} <= known


def test_options_named_in_the_text_exist() -> None:
    from edgekit.cli import main

    known = {name for c in main.commands.values() for p in c.params for name in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_table_lists_every_shipped_target() -> None:
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", README, flags=re.MULTILINE)
    shipped = [name for name, path in target_files().items() if load_target(name).path == path]
    assert sorted(listed) == sorted(shipped)
