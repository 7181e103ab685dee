"""Signatures of bundles, by real keys and the real ssh-keygen; what is wrong with one is said in a line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.deploy import sign
from edgekit.errors import SignatureError

if shutil.which("ssh-keygen") is None:
    pytest.skip("needs ssh-keygen", allow_module_level=True)
TEXT = b'{"schema": 1}\n'


def new_key(folder: Path, name: str, passphrase: str = "") -> Path:
    path = folder / name
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", name, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path, "ada")


@pytest.fixture
def signers(tmp_path: Path, key: Path) -> Path:
    path = tmp_path / "allowed_signers"
    path.write_text(f"ada@example {key.with_suffix('.pub').read_text()}", encoding="ascii")
    return path


def test_a_signature_is_verified_and_names_its_signer(key: Path, signers: Path) -> None:
    assert sign.verify(TEXT, sign.sign(TEXT, key), signers) == "ada@example"


def test_a_public_key_stands_for_its_owner_alone(key: Path, tmp_path: Path) -> None:
    signature = sign.sign(TEXT, key)
    assert sign.verify(TEXT, signature, key.with_suffix(".pub")) == "ada"
    with pytest.raises(SignatureError, match=r"signer is not in .*/eve\.pub"):
        sign.verify(TEXT, signature, new_key(tmp_path, "eve").with_suffix(".pub"))
    with pytest.raises(SignatureError, match="not that of 'ada'"):
        sign.verify(TEXT + b" ", signature, key.with_suffix(".pub"))


def test_openssh_itself_agrees(key: Path, signers: Path, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(sign.sign(TEXT, key))
    command = ["ssh-keygen", "-Y", "verify", "-f", str(signers), "-I", "ada@example", "-n", "edgekit", "-s"]
    assert subprocess.run([*command, str(tmp_path / "s")], input=TEXT, capture_output=True, check=False).returncode == 0


def test_what_was_altered_is_refused(key: Path, signers: Path) -> None:
    with pytest.raises(SignatureError, match="not that of 'ada@example'"):
        sign.verify(TEXT + b" ", sign.sign(TEXT, key), signers)


def test_a_stranger_is_refused(signers: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="signer is not in"):
        sign.verify(TEXT, sign.sign(TEXT, new_key(tmp_path, "eve")), signers)


def test_a_signature_for_something_else_is_refused(key: Path, signers: Path) -> None:
    command = ["ssh-keygen", "-Y", "sign", "-n", "git", "-f", str(key)]
    other = subprocess.run(command, input=TEXT, capture_output=True, check=True).stdout
    with pytest.raises(SignatureError, match="not that of"):
        sign.verify(TEXT, other, signers)


@pytest.mark.parametrize("signature", [b"", b"-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"])
def test_a_damaged_signature_is_refused(signature: bytes, signers: Path) -> None:
    with pytest.raises(SignatureError):
        sign.verify(TEXT, signature, signers)


def test_no_signature_and_no_files(key: Path, signers: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="not signed"):
        sign.verify(TEXT, None, signers)
    with pytest.raises(SignatureError, match="no file"):
        sign.verify(TEXT, b"", tmp_path / "none")
    with pytest.raises(SignatureError, match="no key"):
        sign.sign(TEXT, tmp_path / "none")


def test_a_file_that_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n", encoding="ascii")
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(SignatureError, match="cannot sign with") as caught:
        sign.sign(TEXT, tmp_path / "text")
    assert "private key" in caught.value.remedy


def test_a_key_that_others_can_read(key: Path) -> None:
    key.chmod(0o644)
    with pytest.raises(SignatureError, match="others can read") as caught:
        sign.sign(TEXT, key)
    assert caught.value.remedy == f"chmod 600 {key}"


def test_a_passphrase_that_is_not_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = tmp_path / "ask"
    ask.write_text("#!/bin/sh\necho wrong\n", encoding="ascii")
    ask.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(ask))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    monkeypatch.setenv("DISPLAY", ":none")
    with pytest.raises(SignatureError, match=r"passphrase of .* is not right"):
        sign.sign(TEXT, new_key(tmp_path, "locked", "secret"))


def test_no_ssh_keygen(key: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SignatureError, match="no ssh-keygen") as caught:
        sign.sign(TEXT, key)
    assert "OpenSSH" in caught.value.remedy


@pytest.fixture
def agent(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if shutil.which("ssh-agent") is None:
        pytest.skip("needs ssh-agent")
    socket = tmp_path_factory.mktemp("agent") / "s"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it listens
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.usefixtures("agent")
def test_a_key_in_the_agent_signs_by_its_public_half(key: Path, signers: Path) -> None:
    subprocess.run(["ssh-add", "-q", str(key)], check=True, stdin=subprocess.DEVNULL)
    public = key.with_suffix(".pub")
    os.rename(key, key.with_name("away"))
    assert sign.verify(TEXT, sign.sign(TEXT, public), signers) == "ada@example"
    subprocess.run(["ssh-add", "-q", "-D"], check=True, capture_output=True)
    with pytest.raises(SignatureError, match="ssh-agent does not hold") as caught:
        sign.sign(TEXT, public)
    assert caught.value.remedy == f"ssh-add {key}"
