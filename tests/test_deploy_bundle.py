"""Bundles: what is inside, the same bytes each time, and nothing that was altered gets through."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import artifact
from edgekit.deploy import bundle as bundles
from edgekit.deploy import golden
from edgekit.deploy.bundle import Bundle, check_fits, is_bundle, make, name_of, open_bundle
from edgekit.deploy.device import Device
from edgekit.deploy.shipping import check_target
from edgekit.deploy.units import units
from edgekit.deploy.wheels import Described
from edgekit.errors import ArtifactError, BundleError, DeviceError, OutputExistsError
from edgekit.target import load_target
from tests.deploy_build import ARM64, ARMV7, build, stock
from tests.wheel_files import only_from

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
pytest.importorskip("pip", reason="needs pip")
BOTH = ("tflite-int8", "onnxruntime-int8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bundle") / "build")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels, and a cache that is filled once."""
    folder = tmp_path_factory.mktemp("shelf")
    stock(folder / "index")
    return folder


@pytest.fixture(autouse=True)
def _wheels(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_from(monkeypatch, shelf / "index", shelf / "cache")


def arm64(root: Path, candidates: tuple[str, ...] = ("tflite-int8",), **options: Any) -> Bundle:
    return make(root, load_target("linux-arm64"), candidates, options.pop("device", ARM64), **options)


def packed(bundle: Bundle) -> bytes:
    return b"".join(bundle.tar_stream())


# --- what is inside --------------------------------------------------------------------------------
def test_every_file_is_in_the_manifest_by_its_hash(root: Path) -> None:
    made = arm64(root, BOTH, service=True)
    with tarfile.open(fileobj=io.BytesIO(packed(made))) as tar:
        members = tar.getmembers()
        files = {m.name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    assert members[0].name == "manifest.json"
    assert [m.name for m in members[1:]] == sorted(m.name for m in members[1:])
    assert {(m.mtime, m.uid, m.gid, m.uname, m.type) for m in members} == {(0, 0, 0, "", tarfile.REGTYPE)}
    assert [m.name for m in members if m.mode & 0o111] == ["run"]
    manifest = json.loads(files.pop("manifest.json"))
    assert made.digest == hashlib.sha256(made.text).hexdigest()
    told = {n: (f["sha256"], f["size_bytes"]) for n, f in manifest["files"].items()}
    assert told == {n: (hashlib.sha256(data).hexdigest(), len(data)) for n, data in files.items()}
    assert made.size_bytes == sum(map(len, files.values())) + len(made.text)


def test_the_manifest_says_what_a_device_must_know(root: Path) -> None:
    told = arm64(root, BOTH).manifest
    assert (told["schema"], told["kind"], told["name"], told["target"]) == (1, "bundle", "digits_mlp", "linux-arm64")
    assert (told["ship"], sorted(told["candidates"]), told["threads"]) == ("tflite-int8", sorted(BOTH), 4)
    assert {w["name"] for w in told["wheels"]} == {"ai-edge-litert", "numpy", "onnxruntime"}
    needs = told["requires"]
    assert (needs["arch"], needs["bits"], needs["python"], needs["glibc"]) == ("aarch64", 64, "3.11", "2.28")
    assert [t["name"] for t in told["inputs"]] == ["image"]
    assert told["preprocessing"]["scale"] == pytest.approx(1 / 255)
    for name, entry in told["candidates"].items():
        folder = root / "linux-arm64" / name
        assert entry["sha256"] == artifact.read_manifest(folder).sha256
        for file in ("golden", "runner"):
            assert entry[file] in told["files"]
        for path in folder.iterdir():
            assert f"{entry['folder']}/{path.name}" in told["files"]


def test_armv7_takes_what_has_no_wheel_from_its_system(root: Path) -> None:
    made = make(root, load_target("linux-armv7"), ("tflite-int8",), ARMV7)
    assert made.manifest["requires"]["device_packages"] == {"numpy": ">=1.23.2,<2"}
    assert [w["name"] for w in made.manifest["wheels"]] == ["tflite-runtime"]
    assert made.manifest["runtimes"] == {"tflite": "tflite-runtime 2.14.0"}
    assert (made.manifest["requires"]["arch"], made.manifest["requires"]["bits"]) == ("armv7l", 32)


def test_online_leaves_the_wheels_to_the_device(root: Path) -> None:
    made = arm64(root, online=True)
    assert made.manifest["wheels"] == []
    assert [r.split("<=")[0] for r in made.manifest["online"]] == ["ai-edge-litert", "numpy"]
    assert not any(name.startswith("wheels/") for name in made.sources)


def test_the_same_inputs_give_the_same_bytes_in_every_form(root: Path, tmp_path: Path) -> None:
    first, second = arm64(root, BOTH, service=True), arm64(root, BOTH, service=True)
    assert packed(first) == packed(second)
    assert first.write(tmp_path / "b.tar").read_bytes() == packed(first)
    for path in (tmp_path / "b.tar", first.write(tmp_path / "b")):
        again = open_bundle(path)
        assert is_bundle(path)
        assert again.digest == first.digest
        assert packed(again) == packed(first)
    assert (tmp_path / "b" / "run").stat().st_mode & stat.S_IXUSR
    assert arm64(root, BOTH).digest != first.digest


def test_wheels_that_are_there_are_not_sent_again(root: Path) -> None:
    made = arm64(root)
    there = {w["sha256"] for w in made.manifest["wheels"] if w["name"] == "numpy"}
    with tarfile.open(fileobj=io.BytesIO(b"".join(made.tar_stream(there)))) as tar:
        sent = tar.getnames()
    assert sorted(set(made.manifest["files"]) - set(sent)) == [
        w["file"] for w in made.manifest["wheels"] if w["name"] == "numpy"
    ]
    (numpy,) = [w for w in made.manifest["wheels"] if w["name"] == "numpy"]
    stored = made.manifest["files"][numpy["file"]]["size_bytes"]
    assert made.disk_bytes() - made.disk_bytes(there) == numpy["unpacked_bytes"] + stored


# --- programs that travel --------------------------------------------------------------------------
def test_all_programs_for_devices_travel_and_python_3_9_reads_them() -> None:
    here = {path.name for path in bundles.ON_DEVICE.glob("*.py") if path.name != "__init__.py"}
    assert here <= set(bundles.TRAVELLING)
    runners = (Path(artifact.__file__).parent / "backends" / "runners").glob("[!_]*.py")
    for path in (*bundles.TRAVELLING.values(), *runners):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))


def test_the_run_script_is_shell() -> None:
    subprocess.run(["sh", "-n"], input=bundles._RUN.encode(), check=True)


def test_its_self_test_passes_here_and_tells_altered_answers(root: Path, tmp_path: Path) -> None:
    folder = arm64(root, BOTH).write(tmp_path / "b")

    def difference(candidate: str) -> str | None:
        command = [sys.executable, str(folder / "selftest.py"), str(folder), candidate]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        told: str | None = json.loads(done.stdout.splitlines()[-1])["difference"]
        return told

    for candidate in BOTH:
        assert difference(candidate) is None
    path = folder / "golden" / "tflite-int8.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    (output,) = [name for name in arrays if name.startswith("out.")]
    arrays[output] = arrays[output] + 1e-3 * np.abs(arrays[output]).max()
    np.savez(path, **arrays)
    assert "differs" in str(difference("tflite-int8"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    program = tmp_path / "run"
    program.write_text("#!/bin/sh\n", encoding="ascii")
    program.chmod(0o755)
    told = units("digits_mlp", str(program))
    for name, text in told.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    run = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "verify", "--user", "--man=no", *(str(tmp_path / name) for name in told)]
    done = subprocess.run(command, capture_output=True, text=True, env=run, timeout=60, check=False)
    if "Failed to initialize" in done.stderr:
        pytest.skip(f"systemd-analyze does not run here: {done.stderr.strip()}")
    assert done.returncode == 0
    assert "digits_mlp" not in done.stderr


# --- what is refused -------------------------------------------------------------------------------
def test_a_device_with_too_little_memory_is_told_both_numbers(root: Path) -> None:
    small = replace(ARM64, host="pi@den", memory_bytes=8 * 2**20)
    with pytest.raises(DeviceError, match=r"pi@den: tflite-int8 takes \d+ MB of memory .* the device has 8 MB"):
        arm64(root, device=small)


def test_only_what_fits_is_packed_where_something_does(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = golden.make

    def large(root: Path, folder: Path, *rest: Any) -> golden.Golden:
        peak = 2**40 if folder.name == "tflite-int8" else 2**20
        return replace(real(root, folder, *rest), peak_rss_bytes=peak)

    monkeypatch.setattr(golden, "make", large)
    made = arm64(root, BOTH, device=replace(ARM64, memory_bytes=2**30))
    assert list(made.manifest["candidates"]) == ["onnxruntime-int8"]
    assert made.manifest["ship"] == "onnxruntime-int8"
    assert "tflite-int8 takes" in made.notes[0]
    assert {w["name"] for w in made.manifest["wheels"]} == {"onnxruntime", "numpy"}


def test_what_is_not_there_or_wrong_is_not_packed(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there are .*tflite-int8"):
        arm64(root, ("tflite-int4",))
    with pytest.raises(BundleError, match="no name"):
        arm64(root, name="../up")
    copy = tmp_path / "build"
    shutil.copytree(root, copy)
    path = copy / "linux-arm64" / "tflite-int8" / "manifest.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    told["parity"]["reasons"] = ["an operator is 9 LSB off"]
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(BundleError, match="9 LSB off"):
        arm64(copy)
    assert name_of(root) == "digits_mlp"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (replace(ARM64, arch="x86_64"), "is for aarch64, it has x86_64"),
        (replace(ARM64, python="3.13"), "for Python 3.11, it has Python 3.13"),
        (replace(ARM64, glibc="2.24"), "needs glibc 2.28, it has glibc 2.24"),
        (replace(ARM64, glibc=None), "it has another C library"),
        (replace(ARM64, memory_bytes=1000), "MB of memory"),
    ],
)
def test_a_bundle_for_another_device_is_refused(root: Path, device: Described, message: str) -> None:
    made = arm64(root)
    check_fits(made.manifest, ARM64)
    with pytest.raises(BundleError, match=message):
        check_fits(made.manifest, device)


def looked_at(arch: str, machine: str, board: str | None) -> Device:
    return Device(
        host="pi@den",
        arch=arch,
        machine=machine,
        bits=64 if arch == "aarch64" else 32,
        python="3.11",
        implementation="CPython",
        glibc="2.36",
        cores=4,
        memory_bytes=2**30,
        disk_free_bytes=2**33,
        writable=True,
        folder="/home/pi/.local/share/edgekit",
        venv=True,
        skew_s=0.0,
        signers=False,
        facts={"board": board},
    )


def test_a_target_is_for_its_boards_and_processors() -> None:
    five = load_target("raspberry-pi-5")
    for board in ("Raspberry Pi 5 Model B Rev 1.0", "Raspberry Pi Compute Module 5 Rev 1.0", None):
        check_target(five, looked_at("aarch64", "aarch64", board))
    with pytest.raises(DeviceError, match=r"it is a Raspberry Pi 4 Model B Rev 1\.4, raspberry-pi-5 is for") as caught:
        check_target(five, looked_at("aarch64", "aarch64", "Raspberry Pi 4 Model B Rev 1.4"))
    assert "linux-arm64" in caught.value.remedy
    with pytest.raises(DeviceError, match=r"armv7l \(a 32-bit Python on aarch64\)") as caught:
        check_target(five, looked_at("armv7l", "aarch64", "Raspberry Pi 5 Model B Rev 1.0"))
    assert "linux-armv7" in caught.value.remedy
    check_target(load_target("linux-armv7"), looked_at("armv7l", "aarch64", "Raspberry Pi 3 Model B Rev 1.2"))
    check_target(load_target("cpu"), looked_at("aarch64", "aarch64", None))


def test_nothing_else_is_overwritten(root: Path, tmp_path: Path) -> None:
    made = arm64(root)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="no bundle"):
        made.write(tmp_path / "mine")
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(OutputExistsError, match="is a folder"):
        made.write(tmp_path / "x.tar")
    made.write(tmp_path / "b")
    arm64(root, service=True).write(tmp_path / "b")  # a bundle gives way to another
    assert (tmp_path / "b" / "service").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "mine", "x.tar"]


# --- what was altered ------------------------------------------------------------------------------
Change = Callable[[dict[str, bytes]], None]


def _flip(files: dict[str, bytes]) -> None:
    name = "artifacts/tflite-int8/model.tflite"
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])


def _manifest(key: str, value: Any) -> Change:
    def change(files: dict[str, bytes]) -> None:
        told = json.loads(files["manifest.json"])
        told[key] = value
        files["manifest.json"] = json.dumps(told).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip, "'artifacts/tflite-int8/model.tflite' of .* was altered"),
        (lambda files: files.pop("run.py"), "lacks 'run.py'"),
        (lambda files: files.pop("manifest.json"), "has no manifest.json"),
        (lambda files: files.update({"manifest.json": b"{"}), "manifest.json of .* is damaged"),
        (lambda files: files.update({"manifest.json": b"[]"}), "is no bundle"),
        (_manifest("schema", 9), "schema 9"),
        (_manifest("files", {"../run.py": {"sha256": "", "size_bytes": 0}}), r"damaged at 'files\.\.\./run\.py'"),
        (_manifest("files", {"run.py": 1}), r"damaged at 'files\.run\.py'"),
        (_manifest("requires", {}), r"damaged at 'requires\."),
        (_manifest("ship", "float9"), "damaged at 'ship'"),
    ],
)
def test_an_altered_bundle_is_refused_as_tar_and_as_folder(
    root: Path, tmp_path: Path, change: Change, message: str
) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed(arm64(root)))) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    change(files)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for name, data in files.items():
        path = tmp_path / "b" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for path in (tmp_path / "b.tar", tmp_path / "b"):
        with pytest.raises(BundleError, match=message):
            open_bundle(path)


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../evil.py", tarfile.REGTYPE, ""),
        ("/etc/evil", tarfile.REGTYPE, ""),
        ("a/../../evil", tarfile.REGTYPE, ""),
        ("evil", tarfile.SYMTYPE, "/etc/passwd"),
        ("evil", tarfile.LNKTYPE, "run.py"),
        ("run.py", tarfile.REGTYPE, ""),  # a second one
        ("evil", tarfile.CHRTYPE, ""),
        ("evil", tarfile.REGTYPE, ""),
    ],
)
def test_a_tar_holds_named_files_and_nothing_else(
    root: Path, tmp_path: Path, name: str, kind: bytes, link: str
) -> None:
    path = arm64(root).write(tmp_path / "b.tar")
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        tar.addfile(entry, io.BytesIO())
    with pytest.raises(BundleError, match="holds"):
        open_bundle(path)


def test_links_in_a_folder_are_not_followed(root: Path, tmp_path: Path) -> None:
    folder = arm64(root).write(tmp_path / "b")
    outside = tmp_path / "run.py"
    os.replace(folder / "run.py", outside)
    (folder / "run.py").symlink_to(outside)
    with pytest.raises(BundleError, match=r"lacks 'run\.py'"):
        open_bundle(folder)


def test_half_a_tar_and_no_tar(root: Path, tmp_path: Path) -> None:
    data = packed(arm64(root))
    for size in (100, len(data) // 2, len(data) - 20000):
        (tmp_path / "half.tar").write_bytes(data[:size])
        with pytest.raises(BundleError):
            open_bundle(tmp_path / "half.tar")
    (tmp_path / "text.tar").write_text("hello" * 1000, encoding="ascii")
    with pytest.raises(BundleError, match="is no bundle"):
        open_bundle(tmp_path / "text.tar")
    with pytest.raises(BundleError, match="cannot read"):
        open_bundle(tmp_path / "none.tar")
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "none.tar")
