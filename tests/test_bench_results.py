"""results.jsonl: whole lines or none, torn tails, damage, schemas, writers at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.bench import results
from edgekit.bench.results import Measurement, append, latest, read
from edgekit.errors import ArtifactError, DiskError

ONE = Measurement(
    run="r1", taken="2026-01-01T00:00:00+00:00", metric="latency", target="cpu", backend="onnxruntime",
    precision="int8", path="build/cpu/onnxruntime-int8", sha256="ab", size_bytes=10, threads=1, batch=1,
    samples=((1, 2, 3), (4,)), figures={"load_s": 0.5}, reasons=("p99",), machine={"facts": {"cpu": "ü"}},
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    append(path, [ONE, ONE])
    append(path, [])
    append(path, [ONE])
    assert read(path) == [ONE] * 3
    assert all(json.loads(line)["schema"] == 4 for line in path.read_text().splitlines())


def test_no_file_is_no_measurements(tmp_path: Path) -> None:
    assert read(tmp_path / "results.jsonl") == []


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_a_torn_last_line_is_passed_over_and_then_replaced(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [ONE, ONE])
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if cut > 1 else data[:-2])
    warned: list[str] = []
    assert read(path, warned.append) == [ONE]
    assert len(warned) == 1
    append(path, [ONE])
    assert read(path, warned.append) == [ONE, ONE]
    assert len(warned) == 1


def test_a_line_longer_than_a_block_is_not_taken_for_torn(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    long = Measurement(**{**ONE.__dict__, "samples": (tuple(range(40_000)),)})
    append(path, [ONE, long])
    append(path, [ONE])
    assert read(path) == [ONE, long, ONE]
    path.write_bytes(path.read_bytes()[: -len(json.dumps(ONE.to_json())) // 2])
    append(path, [ONE])
    assert read(path) == [ONE, long, ONE]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [ONE])
    path.write_bytes(b'{"schema": 1, tor\n' + path.read_bytes())
    with pytest.raises(ArtifactError, match=r"line 1 of .* is damaged"):
        read(path)


@pytest.mark.parametrize("line", ['{"schema": 5}', "[]", "3", "{}", '{"schema": 1}', '{"schema": 1, "samples": 3}'])
def test_an_unknown_schema_or_shape_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ArtifactError, match="line 1"):
        read(path)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [ONE])
    before = path.read_bytes()
    real = os.write
    calls = []

    def half(descriptor: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(descriptor, bytes(data[:40]))

    monkeypatch.setattr(results.os, "write", half)
    with pytest.raises(DiskError, match="No space left"):
        append(path, [ONE])
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        append(tmp_path / "file" / "results.jsonl", [ONE])


def test_nan_is_refused_rather_than_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        append(tmp_path / "r.jsonl", [Measurement(**{**ONE.__dict__, "figures": {"x": float("nan")}})])
    assert not (tmp_path / "r.jsonl").exists()


def _write_many(path: Path) -> None:
    for _ in range(20):
        append(path, [ONE])


def test_writers_at_the_same_time_do_not_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path,)) for _ in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    assert read(path) == [ONE] * 60


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_files_from_before_hosts_were_told_apart_are_of_this_machine(tmp_path: Path, schema: int) -> None:
    line = {**ONE.to_json(), "schema": schema}
    for name in {1: ("host", "variant", "pruning", "label"), 2: ("host", "variant", "pruning"), 3: ("host",)}[schema]:
        del line[name]
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line) + "\n")
    append(path, [replace(ONE, host="pi@one")])
    assert read(path) == [ONE, replace(ONE, host="pi@one")]


def test_the_latest_run_of_each_target_on_each_host() -> None:
    here, there = replace(ONE, run="r0"), replace(ONE, run="r1", host="pi@one")
    again, other = replace(ONE, run="r2"), replace(ONE, run="r0", target="openvino", host="pi@one")
    assert latest([here, there, other, again, again]) == [there, other, again, again]


def test_the_latest_run_of_each_target(tmp_path: Path) -> None:
    old = Measurement(**{**ONE.__dict__, "run": "r0"})
    other = Measurement(**{**old.__dict__, "target": "openvino"})
    assert latest([old, other, ONE, ONE]) == [other, ONE, ONE]
