"""A training that keeps to its conditions: it pauses between two steps, leaves memory if it has to, and comes back.

    runs -> pauses, in memory -> goes on
                \\-> saved to a file without a name, the process gone -> a new process goes on from there

A pause costs nothing but the memory that is held. It is left at once where memory is what the conditions want, else after
`LEAVE_AFTER_S`. The file has no name and is held open here: when the agent dies or the power is cut, it is gone, and the
round is trained anew or dropped like any other. Not whether conditions hold (`gate.py`), not the process (`process.py`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from edge_runtime.errors import EdgeError
from edge_runtime.gate import Gate
from edge_runtime.sensors import Own
from edge_runtime.training.orders import GO, LEAVE, PAUSE
from edge_runtime.training.process import Worker

LEAVE_AFTER_S = 300.0
LAST = 19  # niceness of a training with conditions, or beside `serve` (docs/decisions/0014-nice-19-beside-serve.md)


class PatientWorker:
    """A training process that waits for its conditions; as `Worker` to who polls it, with two more kinds of lines:
    {"paused": step} and {"resumed": step}."""

    def __init__(
        self, job: Mapping[str, Any], gate: Gate, *, folders: tuple[Path, ...], peak_bytes: int, limit_bytes: int, threads: int,
        nice: int, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """
        Args:
            folders: where the saved training may lie: the first that is a disk; there is none: it stays in memory.
            peak_bytes: what it is promised to hold.
            nice: its niceness where the gate has no conditions; with some it comes last.
        """
        self._gate, self._clock = gate, clock
        self._peak_bytes, self._options = (
            peak_bytes,
            {"limit_bytes": limit_bytes, "threads": threads, "nice": LAST if gate.has_conditions else nice},
        )
        self._file = _nameless(folders) if gate.has_conditions else None
        self._said, self._paused_at = GO, 0.0
        self._worker: Worker | None = self._start(job)
        self.enforced_by = self._worker.enforced_by

    @property
    def pid(self) -> int:
        """Of the process; 0 while there is none."""
        return self._worker.pid if self._worker else 0

    def poll(self, timeout_s: float) -> dict[str, Any] | None:
        """As `Worker.poll`. Looks at the conditions too."""
        self._follow()
        if self._worker is None:
            time.sleep(timeout_s)
            return None
        try:
            line = self._worker.poll(timeout_s)
        except EdgeError:
            self.close()
            raise
        if line and "left" in line:
            self._worker.close()
            self._worker, self._said = None, LEAVE
            return None
        if line and "smaller" in line:  # a new image of the process, which may have missed what was said to the old one
            self._peak_bytes = int(line["smaller"]["peak_bytes"])
            self._worker.tell(self._said)
        if line and "result" in line:
            self.close()
        return line

    def come_last(self) -> None:
        """Have the lowest priority from now on, as somebody waits for answers."""
        if self._options["nice"] != LAST:
            self._options["nice"] = LAST
            if self._worker:
                self._worker.lower(LAST)

    def close(self) -> None:
        """As `Worker.close`."""
        if self._worker:
            self._worker.close()
        if self._file:
            self._file.close()

    def _follow(self) -> None:
        may_go_on = self._gate.look(Own(self.pid, self._peak_bytes))
        now = self._clock()
        if may_go_on and self._said != GO:
            self._said = GO
            if self._worker:
                self._worker.tell(GO)
            else:
                self._worker = self._start({"job": "train", "backend": self._backend, "resume": True})
        elif not may_go_on and self._worker:
            leave = self._gate.wants_memory or (self._said != GO and now - self._paused_at >= LEAVE_AFTER_S)
            if self._said == GO:
                self._paused_at = now
            word = LEAVE if self._file and (leave or self._said == LEAVE) else PAUSE
            if word != self._said:
                self._said = word
                self._worker.tell(word)

    def _start(self, job: Mapping[str, Any]) -> Worker:
        self._backend = job.get("backend", "")
        return Worker(job, pause_file=self._file, **self._options)


def _nameless(folders: tuple[Path, ...]) -> IO[bytes] | None:
    from edge_runtime.training.backoff import on_disk

    try:
        return tempfile.TemporaryFile(dir=on_disk(*folders))
    except OSError:
        return None
