"""The training process as others on the machine see it: its priority."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_runtime.training.process import Worker


def test_training_comes_after_what_else_the_device_does() -> None:
    worker = Worker({"job": "corpus"}, limit_bytes=None, threads=1, nice=7)
    try:
        expected = max(7, os.getpriority(os.PRIO_PROCESS, 0))
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == expected
        group = Path(f"/proc/{worker.pid}/autogroup")
        if not group.exists():
            pytest.skip("this kernel does not weigh sessions as groups")
        assert group.read_text().split()[1:] == ["nice", str(expected)]
    finally:
        worker.close()
