"""The systems of the devices are made whole or not at all. No network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.device import prepare

DEB822 = """# a comment
Types: deb deb-src
URIs: {address}
Suites: bookworm bookworm-updates
Components: main contrib

Types: deb
URIs: {address}-security
Suites: bookworm-security
Components: main
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An /etc/apt of the test's own, and a keyring."""
    folder = tmp_path / "apt"
    (folder / "sources.list.d").mkdir(parents=True)
    (tmp_path / "keyring.gpg").touch()
    monkeypatch.setattr(prepare, "_APT", folder)
    monkeypatch.setattr(prepare, "_KEYRING", tmp_path / "keyring.gpg")
    monkeypatch.delenv(prepare.MIRROR_VARIABLE, raising=False)
    return folder


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders in which systems are made, without a download: each has one file."""
    made: list[Path] = []

    def system(work: Path, _: prepare.System) -> None:
        (work / "root/file").write_text("whole")
        made.append(work)

    monkeypatch.setattr(prepare, "_system", system)
    monkeypatch.setattr(prepare, "_compile", lambda *_: None)
    return made


def test_the_mirror_is_the_one_of_the_machine(apt: Path) -> None:
    (apt / "sources.list.d/other.list").write_text("deb http://else.example/debian/packages stable/ main\n")
    (apt / "sources.list.d/debian.sources").write_text(DEB822.format(address="http://mirror.example/debian"))
    assert prepare._mirror()[0] == "http://mirror.example/debian"


def test_the_mirror_in_the_old_form(apt: Path) -> None:
    (apt / "sources.list").write_text(
        "# deb http://off.example/debian trixie main\n"
        "deb http://secure.example/debian-security trixie-security main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://old.example/debian trixie main # here\n"
    )
    assert prepare._mirror()[0] == "http://old.example/debian"


def test_a_mirror_that_is_named_wins(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(prepare.MIRROR_VARIABLE, "http://named.example/debian")
    assert prepare._mirror()[0] == "http://named.example/debian"


def test_without_a_mirror_it_says_what_helps(apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://ports.example/ubuntu noble main\n")
    with pytest.raises(prepare.Failed, match=prepare.MIRROR_VARIABLE):
        prepare._mirror()


def test_a_system_is_made_once(tmp_path: Path, unpacked: list[Path]) -> None:
    folder = tmp_path / "devices"
    assert prepare.prepare(folder, "amd64") == prepare.prepare(folder, "amd64") == prepare.place(folder, "amd64")
    assert (prepare.place(folder, "amd64") / "file").read_text() == "whole"
    assert len(unpacked) == 1


def test_what_a_killed_run_left_and_older_systems_go(tmp_path: Path, unpacked: list[Path]) -> None:
    (tmp_path / ".making-amd64-x/root").mkdir(parents=True)
    (tmp_path / "amd64-0123456789ab").mkdir()
    (tmp_path / "amd64-bullseye-0123456789ab").mkdir()  # of another system
    prepare.prepare(tmp_path, "amd64")
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {prepare.place(tmp_path, "amd64").name, "amd64-bullseye-0123456789ab"}


def test_a_system_in_use_stays(tmp_path: Path, unpacked: list[Path]) -> None:
    old = tmp_path / "amd64-0123456789ab"
    old.mkdir()
    held = prepare.hold(old)
    prepare.prepare(tmp_path, "amd64")
    assert old.is_dir()
    os.close(held)
    prepare._remove_unused(old)
    assert not old.exists()


def test_what_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: object) -> list[Path]:
        raise prepare.Failed("no network")

    monkeypatch.setattr(prepare, "_download", download)
    assert prepare.main([str(tmp_path), "amd64"]) == 1
    assert capsys.readouterr().err == "device system not prepared: amd64: no network\n"
    assert [path.name for path in tmp_path.iterdir()] == [".lock-amd64"]


def test_an_unknown_system_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([str(tmp_path), "mips"]) == 2
    assert "no system 'mips'" in capsys.readouterr().err
