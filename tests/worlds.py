"""Worlds that tests need made: a small disk that fills up, and child processes that are killed in the middle of things."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.conditions import parse_conditions
from edge_runtime.gate import Gate
from edge_runtime.sensors import Sensors


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of `num_bytes` in memory at `folder`; the test skips where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},nr_inodes=500", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a small file system needs root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Plug:
    """A machine with a battery, free memory and a clock of its own: what the gate of a training looks at.

    Attributes:
        gate: its conditions are charging, and more than 1 GiB free.
    """

    def __init__(self, root: Path, *, plugged: bool = True, look_s: float = 0.1) -> None:
        """Args: look_s: each look at the clock takes so long."""
        self._root, self._now, self._look_s = root, 0.0, look_s
        for name, kind in (("AC", "Mains"), ("BAT0", "Battery")):
            (root / "sys/class/power_supply" / name).mkdir(parents=True)
            (root / "sys/class/power_supply" / name / "type").write_text(kind)
        (root / "sys/class/power_supply/BAT0/status").write_text("Discharging")
        (root / "proc").mkdir()
        self.is_plugged(plugged)
        self.has_free(4 << 30)
        self.gate = Gate(parse_conditions("charging, free-memory>1GiB"), Sensors(root, self.clock), self.clock)

    def clock(self) -> float:
        """Seconds since some time."""
        self._now += self._look_s
        return self._now

    def jump(self, seconds: float) -> None:
        """Time passes."""
        self._now += seconds

    def is_plugged(self, plugged: bool) -> None:
        """Put the plug in, or pull it."""
        (self._root / "sys/class/power_supply/AC/online").write_text(str(int(plugged)))

    def has_free(self, num_bytes: int) -> None:
        """Others take memory, or give it back."""
        (self._root / "proc/meminfo").write_text(f"MemAvailable: {num_bytes >> 10} kB\n")


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all space that is left on a small disk, but for `leave` bytes; -> the file to delete to give it back."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    if leave:
        os.truncate(path, max(0, path.stat().st_size - leave))
    return path


def killed_after_ready(code: str, *arguments: object) -> str:
    """Run Python code in a child until it prints "ready", kill it with SIGKILL there; -> what it printed before."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert child.stdout is not None
    printed = []
    with child.stdout:
        for line in child.stdout:
            if line.strip() == "ready":
                break
            printed.append(line)
        else:
            raise AssertionError(f"the child ended by itself: {printed}")
        os.kill(child.pid, signal.SIGKILL)
        child.wait(20)
    return "".join(printed)
