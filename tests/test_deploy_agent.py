"""The device's agent, run as ssh runs it, on bundles made by hand: what it installs, refuses, and leaves alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.deploy.ssh import _sources, bootstrap

ON_DEVICE = Path(__file__).parent.parent / "edgekit" / "deploy" / "on_device"
RUNNER = """
import numpy as np
def version(): return "1.0"
class Session:
    def __init__(self, folder):
        with open(folder + "/factor.txt") as file: self.factor = float(file.read())
    def run(self, inputs): return {"y": inputs["x"] * np.float32(self.factor)}
def open_session(folder, threads, batch=0, profile=False): return Session(folder)
"""


@pytest.fixture(scope="session")
def numpy_wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The numpy of this Python as a wheel: what a device gets."""
    site = Path(np.__file__).parent.parent
    path = tmp_path_factory.mktemp("wheel") / "numpy.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for folder in ("numpy", "numpy.libs"):
            for file in sorted((site / folder).rglob("*")) if (site / folder).is_dir() else ():
                relative = file.relative_to(site).as_posix()
                if file.is_file() and "/tests/" not in relative and not relative.endswith((".pyc", ".pyi", ".a")):
                    archive.write(file, relative)
    return path.read_bytes()


class Made:
    """A bundle by hand: `factor` is the whole model."""

    def __init__(self, wheel: bytes, factor: float = 2.0, claims: float | None = None, **requires: Any) -> None:
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        golden = io.BytesIO()
        np.savez(golden, **{"in.x": x, "out.y": x * np.float32(factor if claims is None else claims)})
        self.files = {
            "artifacts/a/factor.txt": str(factor).encode(),
            "golden/a.npz": golden.getvalue(),
            "runners/r.py": RUNNER.encode(),
            "selftest.py": (ON_DEVICE / "selftest.py").read_bytes(),
            "wheels/numpy-1-py3-none-any.whl": wheel,
        }
        self.manifest = {
            "schema": 1, "kind": "bundle", "name": "m", "target": "t", "ship": "a", "edgekit": "0",
            "candidates": {"a": {"folder": "artifacts/a", "runner": "runners/r.py", "golden": "golden/a.npz",
                                 "tolerance": {"kind": "exact"}}},
            "requires": requires,
            "wheels": [{"file": "wheels/numpy-1-py3-none-any.whl", "name": "numpy", "version": "1",
                        "sha256": hashlib.sha256(wheel).hexdigest()}],
        }  # fmt: skip
        self.signature: bytes | None = None
        self.note()

    def note(self) -> None:
        self.manifest["files"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
            for name, data in self.files.items()
        }
        self.text = json.dumps(self.manifest).encode()
        self.digest = hashlib.sha256(self.text).hexdigest()

    def tar(self, leave_out: tuple[str, ...] = (), instead: dict[str, bytes] | None = None) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            parts = {"manifest.json": self.text}
            if self.signature is not None:
                parts["manifest.json.sig"] = self.signature
            for name, data in {**parts, **self.files, **(instead or {})}.items():
                if name in leave_out:
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return out.getvalue()


class Agent:
    """A device's home folder, and calls as ssh makes them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.base = home / ".local" / "share" / "edgekit"
        self.environment = {"HOME": str(home), "PATH": os.environ["PATH"]}

    def start(self, request: dict[str, Any], payload: bytes) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", bootstrap()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=self.environment,
        )  # fmt: skip
        assert process.stdin is not None
        try:
            process.stdin.write(b"".join(_sources()) + json.dumps(request).encode() + b"\n" + payload)
            process.stdin.flush()
        except BrokenPipeError:  # it has heard enough
            pass
        return process

    def call(self, cmd: str, payload: bytes = b"", **fields: Any) -> dict[str, Any]:
        process = self.start({"cmd": cmd, **fields}, payload)
        try:
            out, err = process.communicate(timeout=120)
        except ValueError:  # closed by the other side
            out, err = process.stdout.read(), process.stderr.read()  # type: ignore[union-attr]
        lines = [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]
        assert lines, err.decode()
        assert "ok" in lines[-1], err.decode()
        return lines[-1]

    def install(self, made: Made, **fields: Any) -> dict[str, Any]:
        payload = fields.pop("payload", None)
        return self.call("install", made.tar() if payload is None else payload, slot="m", digest=made.digest, **fields)

    @property
    def current(self) -> str | None:
        link = self.base / "slots" / "m" / "current"
        return os.readlink(link) if link.is_symlink() else None

    def left_overs(self) -> list[Path]:
        return [p for p in self.base.rglob(".incoming-*")] if self.base.is_dir() else []


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    home = tmp_path / "home ü"
    home.mkdir()
    return Agent(home)


def test_looks_at_a_device_and_changes_nothing(agent: Agent) -> None:
    reply = agent.call("probe", packages=["numpy", "no_such_thing"], slot="m")
    device = reply["device"]
    assert device["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert device["bits"] == 64
    assert device["packages"]["no_such_thing"] is None
    assert reply["writable"]
    assert reply["slots"] == {}
    assert abs(reply["now"] - time.time()) < 60
    assert list(agent.home.iterdir()) == []


def test_installs_tests_and_knows_it_again(agent: Agent, numpy_wheel: bytes) -> None:
    made = Made(numpy_wheel)
    reply = agent.install(made)
    assert reply["ok"], reply
    assert agent.current == made.digest
    assert agent.call("probe", slot="m")["intact"] == made.digest
    assert hashlib.sha256(numpy_wheel).hexdigest() in agent.call("probe")["store"]
    assert agent.left_overs() == []
    python = Path(reply["environment"]) / "bin" / "python"
    ran = subprocess.run(
        [python, "-c", "import numpy; print(numpy.__file__)"], capture_output=True, text=True, check=True
    )
    assert str(agent.base / "store") in ran.stdout
    # again, without the wheel that is there
    second = Made(numpy_wheel, factor=3.0)
    assert agent.install(second, payload=second.tar(leave_out=("wheels/numpy-1-py3-none-any.whl",)))["ok"]
    assert agent.current == second.digest


@pytest.mark.parametrize("harm", ["file", "manifest", "unnamed", "outside", "link", "early", "missing", "nothing"])
def test_refuses_what_is_not_the_bundle(agent: Agent, numpy_wheel: bytes, harm: str) -> None:
    good, bad = Made(numpy_wheel), Made(numpy_wheel, factor=5.0)
    assert agent.install(good)["ok"]
    tar = bad.tar()
    if harm == "file":
        tar = bad.tar(instead={"artifacts/a/factor.txt": b"5.1"})
    elif harm == "manifest":
        tar = bad.tar(instead={"manifest.json": bad.text.replace(b'"ship": "a"', b'"ship": "b"')})
    elif harm == "unnamed":
        tar = bad.tar(instead={"sitecustomize.py": b"1/0"})
    elif harm == "outside":
        bad.files["../../escape.txt"] = b"x"
        bad.note()
        tar = bad.tar()
    elif harm == "link":
        out = io.BytesIO(tar[: -2 * tarfile.BLOCKSIZE])
        with tarfile.open(fileobj=out, mode="w") as archive:
            info = tarfile.TarInfo("manifest.json")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
        tar = out.getvalue()
    elif harm == "early":
        tar = tar[: len(tar) // 2]
    elif harm == "missing":
        tar = bad.tar(leave_out=("golden/a.npz",))
    else:
        tar = b""
    reply = agent.install(bad, payload=tar)
    assert not reply["ok"]
    assert reply["kind"] in ("bundle", "connection"), reply
    assert agent.current == good.digest
    assert agent.call("probe", slot="m")["intact"] == good.digest
    assert agent.left_overs() == []
    assert not list(agent.home.rglob("escape.txt"))


def test_a_device_on_which_it_answers_differently_keeps_the_version_before(agent: Agent, numpy_wheel: bytes) -> None:
    good, wrong = Made(numpy_wheel), Made(numpy_wheel, factor=2.0, claims=2.1)
    assert agent.install(good)["ok"]
    reply = agent.install(wrong)
    assert reply["kind"] == "selftest"
    assert "differs" in reply["error"]
    assert agent.current == good.digest
    assert not (agent.base / "slots" / "m" / wrong.digest).exists()


def test_what_is_to_be_measured_is_tested_by_who_measures(agent: Agent, numpy_wheel: bytes) -> None:
    wrong = Made(numpy_wheel, factor=2.0, claims=2.1)
    reply = agent.install(wrong, test=False)
    assert (reply["ok"], reply["tested"]) == (True, False)
    folder = Path(reply["folder"])
    words = [Path(reply["environment"]) / "bin" / "python", folder / "selftest.py", folder, "a"]
    ran = subprocess.run(words, capture_output=True, check=True)
    assert "differs" in json.loads(ran.stdout)["difference"]


def test_a_failed_first_deploy_leaves_nothing(agent: Agent, numpy_wheel: bytes) -> None:
    assert agent.install(Made(numpy_wheel, claims=3.0))["kind"] == "selftest"
    assert list(agent.home.iterdir()) == []


@pytest.mark.parametrize(
    ("requires", "told"),
    [
        ({"arch": "aarch64x"}, "this bundle is for aarch64x"),
        ({"python": "3.4"}, "Python 3.4"),
        ({"glibc": "99.0"}, "glibc 99.0"),
        ({"device_packages": {"no_such_thing": ">=1"}}, "no no_such_thing"),
        ({"device_packages": {"sqlite3": ">=0.1,<0.2"}}, "sqlite3"),
    ],
)
def test_a_bundle_for_another_device_is_refused(
    agent: Agent, numpy_wheel: bytes, requires: dict[str, Any], told: str
) -> None:
    reply = agent.install(Made(numpy_wheel, **requires))
    assert reply["kind"] == "device"
    assert told in reply["error"]
    assert not agent.base.exists()


def test_goes_back_and_forth_and_keeps_as_many_as_asked(agent: Agent, numpy_wheel: bytes) -> None:
    made = [Made(numpy_wheel, factor=float(f)) for f in range(1, 5)]
    for each in made:
        assert agent.install(each, keep=2)["ok"]
    assert agent.call("probe", slot="m")["slots"]["m"]["versions"] == [m.digest for m in made[1:]]
    assert agent.call("rollback", slot="m")["digest"] == made[2].digest
    assert agent.current == made[2].digest
    assert agent.call("rollback", slot="m")["digest"] == made[3].digest  # the one that was in use last
    assert agent.call("rollback", slot="nothing")["kind"] == "missing"
    assert agent.call("install", slot="m", digest=made[1].digest, empty=True, keep=2)["ok"]
    assert agent.current == made[1].digest
    assert agent.call("remove", slot="m")["ok"]
    assert not list((agent.base / "store").iterdir())
    assert not list((agent.base / "environments").iterdir())


def test_there_is_nothing_before_the_first(agent: Agent, numpy_wheel: bytes) -> None:
    assert agent.install(Made(numpy_wheel))["ok"]
    reply = agent.call("rollback", slot="m")
    assert reply["kind"] == "missing"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP, None])
def test_a_connection_that_breaks_leaves_the_version_before(
    agent: Agent, numpy_wheel: bytes, how: signal.Signals | None
) -> None:
    good, next_one = Made(numpy_wheel), Made(numpy_wheel, factor=7.0)
    assert agent.install(good)["ok"]
    tar = next_one.tar()
    process = agent.start({"cmd": "install", "slot": "m", "digest": next_one.digest}, tar[: len(tar) - 20_000])
    incoming = agent.base / "slots" / "m"
    deadline = time.monotonic() + 60
    while not list(incoming.glob(".incoming-*/selftest.py")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(incoming.glob(".incoming-*")), "the upload had begun"
    if how is not None:
        process.send_signal(how)
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(timeout=60)
    assert agent.current == good.digest
    if how is not signal.SIGKILL:
        assert agent.left_overs() == []
    assert agent.install(next_one)["ok"]
    assert agent.current == next_one.digest
    assert agent.left_overs() == []


def test_one_deploy_at_a_time(agent: Agent, numpy_wheel: bytes) -> None:
    made = Made(numpy_wheel)
    tar = made.tar()
    first = agent.start({"cmd": "install", "slot": "m", "digest": made.digest}, tar[:4096])
    deadline = time.monotonic() + 60
    while not list(agent.base.glob("slots/m/.incoming-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    reply = agent.install(made)
    assert reply["kind"] == "busy"
    out, _ = first.communicate(tar[4096:], timeout=120)
    assert json.loads(out.splitlines()[-1])["ok"]
    assert agent.current == made.digest


def test_a_full_disk_is_told_and_leaves_the_version_before(agent: Agent, numpy_wheel: bytes) -> None:
    good, large = Made(numpy_wheel), Made(numpy_wheel, factor=9.0)
    assert agent.install(good)["ok"]
    large.files["artifacts/a/model.bin"] = os.urandom(6_000_000)
    large.note()
    limited = ["import resource", "resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))", bootstrap()]
    payload = b"".join(_sources()) + json.dumps({"cmd": "install", "slot": "m", "digest": large.digest}).encode()
    done = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(limited)],
        input=payload + b"\n" + large.tar(leave_out=("wheels/numpy-1-py3-none-any.whl",)),
        capture_output=True, env=agent.environment, check=False, timeout=120,
    )  # fmt: skip
    reply = json.loads(done.stdout.splitlines()[-1])
    assert reply["kind"] == "disk", reply
    assert agent.current == good.digest
    assert agent.left_overs() == []


def test_a_folder_that_cannot_be_written_is_told(agent: Agent, numpy_wheel: bytes) -> None:
    blocked = agent.home / "blocked"
    blocked.write_text("a file")
    reply = agent.install(Made(numpy_wheel), folder=str(blocked / "deep"))
    assert not reply["ok"]
    assert blocked.read_text() == "a file"


def test_an_altered_installation_is_noticed_and_mended(agent: Agent, numpy_wheel: bytes) -> None:
    first, second = Made(numpy_wheel), Made(numpy_wheel, factor=3.0)
    assert agent.install(first)["ok"]
    assert agent.install(second)["ok"]
    (agent.base / "slots" / "m" / second.digest / "artifacts" / "a" / "factor.txt").write_text("4.0")
    assert agent.call("probe", slot="m")["intact"] is None
    assert agent.call("install", slot="m", digest=second.digest, empty=True)["kind"] == "bundle"
    assert agent.install(second)["ok"]
    assert agent.call("probe", slot="m")["intact"] == second.digest
    (agent.base / "slots" / "m" / first.digest / "artifacts" / "a" / "factor.txt").write_text("4.0")
    assert agent.call("rollback", slot="m")["kind"] == "bundle"
    assert agent.current == second.digest


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen (openssh-client)")
def test_a_device_that_names_signers_takes_their_bundles_only(agent: Agent, numpy_wheel: bytes, tmp_path: Path) -> None:
    for name in ("friend", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    allowed = agent.home / ".config" / "edgekit" / "allowed_signers"
    allowed.parent.mkdir(parents=True)
    allowed.write_text("friend@home " + (tmp_path / "friend.pub").read_text())
    made = Made(numpy_wheel)

    def signed(key: str, text: bytes) -> bytes:
        return subprocess.run(
            ["ssh-keygen", "-q", "-Y", "sign", "-f", tmp_path / key, "-n", "edgekit"], input=text,
            capture_output=True, check=True,
        ).stdout  # fmt: skip

    assert agent.install(made)["kind"] == "signature"
    made.signature = signed("stranger", made.text)
    assert agent.install(made)["kind"] == "signature"
    made.signature = signed("friend", made.text + b" ")
    assert agent.install(made)["kind"] == "signature"
    assert not agent.base.exists()
    made.signature = signed("friend", made.text)
    assert agent.install(made)["ok"]
