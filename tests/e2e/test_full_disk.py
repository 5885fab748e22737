"""A disk that is full in the middle of a transfer, on either side: nothing is lost, and it goes on when there is room."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Reference
from tests.e2e.fleets import Fleet, running


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own with that much room. Skips where we may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Use the room up, but for so much."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:  # closing writes what is left in the buffer
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    with ballast.open("r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - leave_bytes))
    return ballast


@pytest.mark.slow
def test_a_devices_disk_is_full_while_it_fetches_the_model(tmp_path: Path, model: Path, reference: Reference) -> None:
    fleet = Fleet(tmp_path, model, rounds=1)
    with small_disk(tmp_path / "device-0", "32M") as disk, running(fleet):
        ballast = fill(disk, 1 << 20)
        fleet.start_all()
        fleet.wait(lambda: fleet.events("device-0", "storage-error"))
        assert fleet.alive("device-0")
        ballast.unlink()
        fleet.wait(fleet.finished)
        assert len(fleet.counted()) == 2


@pytest.mark.slow
def test_the_coordinators_disk_is_full_while_it_takes_an_update(
    tmp_path: Path, model: Path, reference: Reference
) -> None:
    with small_disk(tmp_path / "fleet", "32M") as disk:
        fleet = Fleet(tmp_path, model, rounds=1, cache=reference.cache)
        with running(fleet):
            fleet.start_all()
            fleet.wait(lambda: fleet.events("device-0", "training"))
            ballast = fill(disk, 20_000)
            fleet.wait(lambda: fleet.events("coordinator", "storage-error"))
            assert fleet.alive("coordinator")
            ballast.unlink()
            fleet.wait(fleet.finished)
            assert len(fleet.counted()) == 2
