"""The training process as others on the machine see it: its priority."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from edge_runtime.training.process import Worker


def test_a_training_that_runs_comes_last_with_all_its_threads() -> None:
    worker = Worker({"job": "corpus"}, limit_bytes=None, threads=1)
    try:
        tasks = Path(f"/proc/{worker.pid}/task")
        end = time.monotonic() + 20
        while len(list(tasks.glob("*"))) < 2:  # the one that listens, at least
            assert time.monotonic() < end
        worker.lower(19)
        assert {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in tasks.glob("*")} == {19}
    finally:
        worker.close()


def test_training_comes_after_what_else_the_device_does() -> None:
    worker = Worker({"job": "corpus"}, limit_bytes=None, threads=1, nice=7)
    try:
        expected = max(7, os.getpriority(os.PRIO_PROCESS, 0))
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == expected
        assert tuple(psutil.Process(worker.pid).ionice()) == (psutil.IOPRIO_CLASS_BE, 7), (
            "last at the disk, and not idle"
        )
        group = Path(f"/proc/{worker.pid}/autogroup")
        if not group.exists():
            pytest.skip("this kernel does not weigh sessions as groups")
        assert group.read_text().split()[1:] == ["nice", str(expected)]
    finally:
        worker.close()
