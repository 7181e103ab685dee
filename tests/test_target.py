"""Profiles: lookup, nearest name, refusals, user folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.errors import TargetFileError, UnknownTargetError
from edgekit.target import load_target, target_files

GOOD = 'schema = 1\ndescription = "mine"\ncandidates = [{ backend = "onnxruntime", precision = "int8" }]\n'


def test_every_shipped_profile_loads() -> None:
    for name in target_files():
        target = load_target(name)
        assert target.candidates
        assert target.name == name


def test_unknown_target_offers_the_nearest_name() -> None:
    with pytest.raises(UnknownTargetError, match="did you mean 'openvino'"):
        load_target("openvin")


def test_a_users_folder_wins_over_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "cpu.toml").write_text(GOOD, encoding="utf-8")
    assert load_target("cpu", tmp_path).description == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("description", "descripton"), "perhaps you meant 'description'"),
        (GOOD.replace("onnxruntime", "tensorrt"), "backend = 'tensorrt'"),
        (GOOD.replace("int8", "int7"), "precision = 'int7'"),
        (GOOD.replace("schema = 1", "schema = 9"), "schema 9"),
        ('schema = 1\ndescription = "x"\ncandidates = []\n', "no \\[\\[candidates\\]\\]"),
        ("schema = [", "fix the TOML"),
        (GOOD + 'threads = ["many"]\n', "threads = 'many'"),
        (GOOD + "weight_bits = 6\n", "weight_bits = 6"),
        (GOOD + "threads = 4\n", "threads = 4"),
        (GOOD + "threads = [0]\n", "threads = 0"),
        (GOOD.replace("int8", "float16"), "onnxruntime has no precision 'float16' — it offers float32, int8"),
        ('schema = 1\ndescription = "x"\ncandidates = [1]\n', "candidate 1 is no table"),
        (GOOD.replace('"int8"', "8"), "precision = 8"),
        (GOOD + "weight_bits = 8.0\n", "weight_bits = 8.0"),
        (GOOD + 'arch = "x86_64"\n', "unknown key 'arch'"),
        (GOOD + 'host = "ssh"\n', "unknown key 'host'"),
    ],
)
def test_a_bad_profile_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(TargetFileError, match=message):
        load_target("mine", tmp_path)
