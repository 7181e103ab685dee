"""Signatures of bundles with ssh keys, by the system's ssh-keygen (OpenSSH 8.1): SSHSIG, namespace "edgekit"."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from edgekit.errors import SignatureError

NAMESPACE = "edgekit"
_KEY_TYPES = (b"ssh-", b"ecdsa-", b"sk-")  # what a public key's file begins with
_TIMEOUT_S = 120.0  # a key on a token waits for a touch


def sign(text: bytes, key: Path) -> bytes:
    """The signature of `text` by the private key in the file `key`, or by the agent's where it is a public key.

    Raises SignatureError. A passphrase is asked for by ssh-keygen itself, on the terminal.
    """
    if not key.is_file():
        raise SignatureError(f"no key '{key}'", "give the file of an ssh key, such as ~/.ssh/id_ed25519")
    done = _run(["-Y", "sign", "-n", NAMESPACE, "-f", str(key)], text)
    if done.returncode or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise SignatureError(*_why_not_signed(key, _said(done)))
    return done.stdout


def verify(text: bytes, signature: bytes | None, signers: Path) -> str:
    """The name of whose key signed `text`. Raises SignatureError.

    signers: an allowed_signers file, or a public key, which then is the only one and is called as its file.
    """
    if not signers.is_file():
        raise SignatureError(f"no file '{signers}'", "give a public key, or an allowed_signers file: NAME KEY a line")
    if signature is None:
        raise SignatureError("the bundle is not signed", "make it with --sign KEY")
    with tempfile.TemporaryDirectory(prefix="edgekit-sign-") as folder:
        file = Path(folder) / "signature"
        file.write_bytes(signature)
        known = _allowed(signers, Path(folder))
        found = _run(["-Y", "find-principals", "-s", str(file), "-f", str(known)], b"")
        names = found.stdout.decode(errors="replace").split("\n")[0].split(",")
        if found.returncode or not names[0]:
            raise SignatureError(*_why_not_known(signers, _said(found)))
        command = ["-Y", "verify", "-f", str(known), "-I", names[0], "-n", NAMESPACE, "-s", str(file)]
        done = _run(command, text)
    if done.returncode:
        raise SignatureError(
            f"the bundle's signature is not that of '{names[0]}' over this bundle: {_said(done)}",
            "it was altered, or signed for something else: take it from where it was made",
        )
    return names[0]


def _allowed(signers: Path, folder: Path) -> Path:
    """The file as ssh-keygen wants it: a public key gets a name."""
    given = signers.read_bytes()
    if not given.startswith(_KEY_TYPES):
        return signers
    known = folder / "signers"
    known.write_bytes(signers.stem.replace(" ", "_").encode() + b" " + given)
    return known


def _run(words: list[str], text: bytes) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise SignatureError("there is no ssh-keygen to sign or verify with", "install OpenSSH's client, 8.1 or later")
    try:
        return subprocess.run([program, *words], input=text, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SignatureError(f"ssh-keygen did not answer within {_TIMEOUT_S:.0f} s", "unlock the key first") from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Signing ")] or [f"status {done.returncode}"]
    return lines[-1].rstrip(".")


def _why_not_signed(key: Path, said: str) -> tuple[str, str]:
    if "incorrect passphrase" in said:
        return (
            f"the passphrase of '{key}' is not right",
            "try again, or add the key to ssh-agent and give its .pub file",
        )
    if key.suffix != ".pub" and key.stat().st_mode & 0o077 and ("No private key" in said or "bad permissions" in said):
        return f"others can read '{key}', ssh-keygen will not use it", f"chmod 600 {key}"
    if "agent" in said:
        return f"ssh-agent does not hold the key of '{key}': {said}", f"ssh-add {str(key).removesuffix('.pub')}"
    if "unknown option" in said or "Unsupported operation" in said:
        return "this ssh-keygen cannot sign", "install OpenSSH 8.1 or later"
    return f"cannot sign with '{key}': {said}", "give the file of an ssh private key, or the .pub of one in ssh-agent"


def _why_not_known(signers: Path, said: str) -> tuple[str, str]:
    if "no principal" in said.lower():
        return f"the bundle's signer is not in '{signers}'", "add a line of NAME KEY, if you trust it"
    return f"the bundle's signature cannot be checked with '{signers}': {said}", "each line of it is NAME KEY"
