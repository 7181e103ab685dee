"""What users may give in several forms: names, data, thread counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.dataset import Dataset
    from edgekit.preprocessing import Preprocessing


def names(given: Sequence[str] | str) -> list[str]:
    """One name or several."""
    return [given] if isinstance(given, str) else list(given)


def open_data(
    data: str | Path | Dataset | None,
    preprocessing: Preprocessing | None,
    label_column: str | None,
    labels: Path | None,
) -> Dataset | None:
    """Data as a user names them, or a data set that is open already."""
    if data is None:
        return None
    from edgekit.dataset import Dataset, open_dataset

    if isinstance(data, Dataset):
        return data
    return open_dataset(data, preprocessing=preprocessing, label_column=label_column, labels=labels)


def thread_counts(given: Sequence[str | int], *, here: bool = True) -> tuple[int | Any, ...]:
    """Counts as asked for; `here` none above what this machine has: more threads than cores measure the scheduler."""
    import os

    out: list[int | str] = []
    most = (os.cpu_count() or 1) if here else None
    upto = "from 1" if most is None else f"from 1 to {most} (the cores here)"
    for value in given:
        if value == "all":
            out.append("all")
        elif str(value).isdecimal() and int(value) >= 1 and (most is None or int(value) <= most):
            out.append(int(value))
        else:
            raise UsageError(f"--threads {value}", f'give a number {upto} or "all"')
    return tuple(out)


def recorded(data: Any, told: Preprocessing | None) -> Preprocessing | None:
    """The preprocessing that convert or a file's metadata recorded, unless the data come with their own declaration."""
    from edgekit.preprocessing import find_file

    if told is None or not isinstance(data, str | Path):
        return None
    return None if find_file(Path(str(data).partition("#")[0])) is not None else told
