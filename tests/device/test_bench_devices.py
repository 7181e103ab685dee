"""`edgekit bench --host` with real models through ssh: what a device measures, and what an emulated one may say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgekit import benching, errors
from edgekit.bench import results
from edgekit.cli import main
from edgekit.report import summary
from edgekit.report.markdown import render_markdown
from edgekit.report.terminal import render_text
from tests.device.devices import Device, RealPi
from tests.device.test_deploy import DIGITS, native
from tests.device.test_deploy import build as build

pytestmark = pytest.mark.usefixtures("fetched_wheels")
TEST = str(DIGITS / "digits_test.npz")


@pytest.fixture(autouse=True)
def _fresh(build: Path) -> None:
    """Nothing was measured yet."""
    (build / results.RESULTS_FILE).unlink(missing_ok=True)


def bench(build: Path, target: str, *devices: Device | RealPi, **given: Any) -> dict[str, Any]:
    names = [device.alias for device in devices]
    return benching.bench(build, [target], hosts=names, ssh_config=devices[0].config, quick=True, data=TEST, **given)


def qualities(document: dict[str, Any]) -> dict[str, Any]:
    return {summary.candidate(row): row["quality"] for row in document["artifacts"]}


@native
def test_a_device_is_measured_as_this_machine_is(build: Path, amd64_device: Device) -> None:
    there = bench(build, "tflite", amd64_device, threads=(1,))
    here = benching.bench(build, ["tflite"], quick=True, threads=(1,), data=TEST)
    for row in there["artifacts"]:
        assert row["valid"], row["reasons"]
        assert row["host"] == amd64_device.alias
        assert row["latency_s"]["p50"] > 0
        assert row["load_s"] > 0
        assert row["peak_rss_bytes"] > 1 << 20
    assert qualities(there) == qualities(here)
    ship = there["verdict"][f"tflite on {amd64_device.alias}"]["ship"]
    assert benching.ship_of(build, "tflite", amd64_device.alias) == (ship, f"the best measured on {amd64_device.alias}")
    shown = benching.report(build)
    assert f"tflite on {amd64_device.alias}: Ship" in shown
    assert "this machine" in shown


@native
def test_what_was_altered_there_is_sent_again(build: Path, amd64_device: Device) -> None:
    bench(build, "tflite", amd64_device, threads=(1,))
    runner = amd64_device.home / ".local/share/edgekit/slots/bench-digits_cnn-tflite/current/runners/tflite.py"
    sound = runner.read_bytes()
    runner.write_bytes(sound + b"\n\ndef open_session(*given):\n    raise RuntimeError('altered')\n")
    told = bench(build, "tflite", amd64_device, threads=(1,))
    assert all(row["valid"] for row in told["artifacts"])
    assert runner.read_bytes() == sound


@native
def test_one_that_cannot_be_reached_does_not_stop_the_other(
    build: Path, amd64_device: Device, make_device: Callable[..., Device]
) -> None:
    other = make_device("amd64")
    config = amd64_device.config.parent / "both"
    config.write_text(amd64_device.config.read_text() + "\n" + other.config.read_text().replace(other.alias, "other"))
    other.stop()
    words = ["bench", str(build), "-t", "tflite", "--ssh-config", str(config), "--quick", "--threads", "1", "--json"]
    done = CliRunner().invoke(main, [*words, "--host", amd64_device.alias, "--host", "other"])
    assert done.exit_code == errors.HostError.exit_code, done.stderr
    told = json.loads(done.stdout)
    assert {row["host"] for row in told["artifacts"]} == {amd64_device.alias}
    assert [row["host"] for row in told["failed"]] == ["other"]


def test_an_emulated_pi_gives_answers_and_no_times(build: Path, arm64_device: Device | RealPi) -> None:
    told = bench(build, "linux-arm64", arm64_device, profile=True)
    here = benching.bench(build, ["linux-arm64"], quick=True, data=TEST)
    assert all(row["valid"] for row in told["artifacts"]), [row["reasons"] for row in told["artifacts"]]
    there, own = qualities(told), qualities(here)
    for name in there:
        if name.endswith("int8"):  # the same integers: every figure is the same
            assert there[name]["accuracy"] == own[name]["accuracy"]
            assert there[name]["confusion_matrix"] == own[name]["confusion_matrix"]
    if isinstance(arm64_device, RealPi):
        assert all(row["latency_s"]["p50"] > 0 for row in told["artifacts"])
        return
    assert told["machine"]["emulated"].startswith("qemu")
    _no_times(told)


def test_a_32_bit_device_is_measured_with_its_own_runtime(build: Path, armhf_device: Device) -> None:
    told = bench(build, "linux-armv7", armhf_device)
    assert {row["precision"] for row in told["artifacts"]} == {"float32", "int8"}
    assert all(row["valid"] for row in told["artifacts"]), [row["reasons"] for row in told["artifacts"]]
    assert all(row["quality"]["accuracy"] > 0.9 for row in told["artifacts"])
    _no_times(told)


def _no_times(told: dict[str, Any]) -> None:
    """Neither in the document nor in what a person reads."""
    for row in told["artifacts"]:
        assert {k: v for k, v in row["latency_s"].items() if v is not None} == {"samples": 0}
        times = ("load_s", "import_s", "first_inference_s", "layers")
        assert [row[key] for key in times] == [None] * len(times)
        assert any("no latency" in reason for reason in row["reasons"])
    for line in summary.lines(told, told["artifacts"][0]["target"]):
        assert (line.p50, line.ratio, line.load, line.ships) == (summary.NONE, summary.NONE, summary.NONE, False)
    for text in (render_text(told), render_markdown(told)):
        assert "no latency" in text
        assert "Ship" not in text
