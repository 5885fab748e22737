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
