"""Measures on a device: all candidates of a target are installed there in one bundle, and workers run through ssh."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgekit.bench import machine
from edgekit.bench.client import THREAD_VARIABLES, Worker
from edgekit.bench.entry import Entry
from edgekit.bench.host import Golden
from edgekit.deploy import bundle as bundles
from edgekit.deploy import device as devices
from edgekit.deploy import shipping
from edgekit.deploy.bundle import Bundle
from edgekit.deploy.bundle_file import content
from edgekit.deploy.on_device import selftest
from edgekit.deploy.ssh import Host
from edgekit.errors import ArtifactError
from edgekit.model import Tensors
from edgekit.report.progress import Progress
from edgekit.target import Target

_SSH_FAILED = 255  # ssh's own exit code for a connection that ended; all others are the remote command's
_BY_SIGNAL = 128  # what a shell adds to the number of the signal that ended a command


def site(name: str, config: Path | None, build: Path) -> DeviceSite:
    """The device that ssh calls `name`, for what `build` holds."""
    return DeviceSite(Host(name, config=config), build)


class DeviceSite:
    """One device; a context manager (bench.host.Site)."""

    def __init__(self, host: Host, build: Path) -> None:
        self._host, self._build = host, build
        self._arch: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.close()

    def is_for(self, target: Target) -> bool:
        """By the architecture; a profile that names none is for machines like the one that makes its artifacts."""
        if self._arch is None:
            self._arch = devices.probe(self._host).arch
        return self._arch == (machine.architecture() if target.device is None else target.device.arch)

    def prepared(self, target: Target, entries: Sequence[Entry], progress: Progress) -> DeviceHost:
        """Install the target's candidates, without what its manifest calls wrong."""
        usable = tuple(entry.id for entry in entries if not entry.problems)
        if not usable:
            raise ArtifactError(
                f"no artifact of {target.name} is right", f"run `edgekit bench {self._build}` for the reasons"
            )
        name = f"bench-{bundles.name_of(self._build)}-{target.name}"
        device = devices.probe(self._host, name, bundles.PACKAGES)
        shipping.check_target(target, device)
        devices.check(device)
        made = bundles.make(self._build, target, usable, device, name=name, progress=progress)
        told = shipping.install(self._host, device, made, name, 0, progress, test=False)
        return DeviceHost(self._host, device.facts, told["folder"], told["environment"], made)


class DeviceHost:
    """A device with a bundle of candidates installed (bench.host.BenchHost).

    facts: of its machine. folder: of the bundle there. environment: the bundle's, there.
    """

    def __init__(
        self,
        host: Host,
        facts: Mapping[str, Any],
        folder: str,
        environment: str,
        made: Bundle,
    ) -> None:
        self._host, self._facts = host, dict(facts)
        self._folder, self._python, self._made = folder, f"{environment}/bin/python", made
        self._candidates: Mapping[str, Any] = made.manifest["candidates"]

    @property
    def name(self) -> str:
        return self._host.name

    def facts(self) -> dict[str, Any]:
        return dict(self._facts)

    def state(self) -> dict[str, Any]:
        return dict(self._host.call({"cmd": "state"})["state"])

    def golden(self, entry: Entry) -> Golden | None:
        """What the bundle's self-test compares: in the worker that judges, it costs no start of a runtime."""
        name, tolerance = self._candidates[entry.id]["golden"], self._candidates[entry.id]["tolerance"]
        with np.load(io.BytesIO(content(self._made.sources[name])), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        wanted = {key[4:]: value for key, value in arrays.items() if key.startswith("out.")}

        def difference(outputs: Tensors) -> str | None:
            found = selftest.difference(wanted, outputs, tolerance)
            return None if found is None else f"answers otherwise on {self.name} than here: {found}"

        return Golden({key[3:]: value for key, value in arrays.items() if key.startswith("in.")}, difference)

    def worker(self, entry: Entry, threads: int, batch: int, profile: bool = False) -> Worker:
        label = f"{entry.target}/{entry.id} on {self.name}"
        found = self._candidates[entry.id]
        return worker_there(self._host, self._folder, self._python, found, label, threads, batch, profile)


def worker_there(
    host: Host,
    folder: str,
    python: str,
    candidate: Mapping[str, Any],
    label: str,
    threads: int,
    batch: int,
    profile: bool = False,
) -> Worker:
    """A worker, not started yet, for a candidate (as a bundle's manifest has it) of the bundle installed in `folder`.

    python: of the bundle's environment, there. label: what errors call it. batch: 0 keeps the model's own.
    """
    command = [python, f"{folder}/worker.py", "--runner", f"{folder}/{candidate['runner']}"]
    command += ["--folder", f"{folder}/{candidate['folder']}", "--threads", str(threads), "--batch", str(batch)]
    remote = _shell(["env", *(f"{v}={threads}" for v in THREAD_VARIABLES), *command, *(["--profile"] * profile)])

    def ended(status: int | None, said: str) -> str | None:
        """A broken connection shows in the status of ssh, a worker that a signal ended in what the shell there adds."""
        if status == _SSH_FAILED:
            return f"the connection to {host.name} was lost" + (f" ({said})" if said else "")
        if status is not None and status > _BY_SIGNAL:
            return f"the worker died with signal {status - _BY_SIGNAL}" + (f": {said}" if said else "")
        return None

    return Worker(host.command(remote), label, ended=ended)


def _shell(words: Sequence[str]) -> str:
    """A command for any login shell. A shell stays its parent, as ssh tells a command that a signal ended no better
    than a connection that broke; what that shell itself remarks on it would hide the command's last words."""
    # the redirection in a subshell: dash makes a command's own ones in itself, and remarks there
    script = f"exec 3>&2 2>/dev/null; (exec 2>&3 3>&-; exec {shlex.join(words)}); exit $?"
    return f"exec sh -c {shlex.quote(script)}"
