"""The machine that measures: this one, or another that runs the same worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from edgekit.bench import machine
from edgekit.bench.client import Worker, local_command, thread_environment
from edgekit.bench.entry import Entry
from edgekit.model import Tensors

if TYPE_CHECKING:
    from edgekit.report.progress import Progress
    from edgekit.target import Target


@dataclass(frozen=True)
class Golden:
    """inputs: (n, ...) by name. difference(outputs of them, by name): how they are not what they must be, or None."""

    inputs: Tensors
    difference: Callable[[Tensors], str | None]


class BenchHost(Protocol):
    """Where artifacts run. What cannot be reached any more raises HostError and its kin."""

    @property
    def name(self) -> str:
        """As ssh calls it; "" for this machine."""
        ...

    def facts(self) -> dict[str, Any]:
        """`bench.machine.facts` of that machine."""
        ...

    def state(self) -> dict[str, Any]:
        """`bench.machine.state` of that machine, now."""
        ...

    def golden(self, entry: Entry) -> Golden | None:
        """Inputs that an artifact must answer there as it did where it was made; None where that is here."""
        ...

    def worker(self, entry: Entry, threads: int, batch: int, profile: bool = False) -> Worker:
        """A worker for `entry` there, not started yet. batch: 0 keeps the model's own."""
        ...


class Site(Protocol):
    """A machine that targets are brought to. A context manager: at its end the connection is closed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def is_for(self, target: Target) -> bool:
        """Whether the target is for machines of this kind."""
        ...

    def prepared(self, target: Target, entries: Sequence[Entry], progress: Progress) -> BenchHost:
        """Bring the artifacts there. Raises DeviceError and its kin where the machine is not one of the target's."""
        ...


class LocalHost:
    """This machine. What was verified here needs no second check."""

    name = ""

    def facts(self) -> dict[str, Any]:
        return machine.facts()

    def state(self) -> dict[str, Any]:
        return machine.state()

    def golden(self, entry: Entry) -> Golden | None:
        return None

    def worker(self, entry: Entry, threads: int, batch: int, profile: bool = False) -> Worker:
        command = local_command(entry.runner, entry.path, threads, batch, profile)
        environment = {**thread_environment(threads), **entry.environment}
        return Worker(command, f"{entry.target}/{entry.id}", env=environment)


THIS_MACHINE = LocalHost()
