"""What the agent tells a training process while it runs: to pause between two steps, to go on, to save itself and end.

Words on standard input, a line each. Not SIGSTOP: a process that is stopped does not see that its agent has died, and may
hold a lock or half a line of output. Not what pauses (`train_job.py`), not who says so (`patient.py`). Imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import IO

PAUSE, GO, LEAVE = "pause", "go", "leave"


class Left(Exception):
    """The training is saved: this process is to end without a result."""


class Orders:
    """The agent's last word.

    Attributes:
        paused: whether to make no further step.
    """

    def __init__(self) -> None:
        self.paused = self._leave = False
        self._said = threading.Condition()

    def listen(self, stream: IO[str]) -> None:
        """Follow what is said; when the stream closes, since the agent has ended or died, this process ends at once."""
        for line in stream:
            with self._said:
                word = line.strip()
                self.paused = word in (PAUSE, LEAVE)
                self._leave = word == LEAVE
                self._said.notify()
        os._exit(0)

    def hold(self, paused: Callable[[], None], save: Callable[[], None] | None) -> float:
        """Stand still while so told; -> the seconds that it took.

        Args:
            paused: called when the standing still begins.
            save: writes the training to a file; None: it cannot be saved, and stands still instead.

        Raises:
            Left: it is saved.
        """
        if not self.paused:
            return 0.0
        since = time.monotonic()
        paused()
        with self._said:
            while self.paused:
                if self._leave and save:
                    with contextlib.suppress(OSError):  # no room on the disk: stand still
                        save()
                        raise Left
                    save = None
                self._said.wait()
        return time.monotonic() - since
