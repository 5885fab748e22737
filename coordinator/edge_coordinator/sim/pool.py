"""Trains updates in worker processes, so many at a time, whoever is due first in virtual time first.

A training that is done is on disk with its report, so that a simulation which was killed does not repeat it. What runs a
training is given: the device's own worker process on this machine, or Ray's cluster (`ray_engine.py`). No virtual time, no
messages.
"""

from __future__ import annotations

import heapq
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.errors import TrainingFailed
from edge_runtime.records import TrainReport
from edge_runtime.store import make_folder, read_json, write_json
from edge_runtime.training.process import Worker
from edge_runtime.wire import from_plain

POLL_S = 0.02
MakeJob = Callable[[Path], Mapping[str, Any]]


class Running(Protocol):
    """One training under way, as `edge_runtime.training.process.Worker`."""

    def poll(self, timeout_s: float) -> dict[str, Any] | None:
        """What it has said, {"result": ...} at its end, or None.

        Raises:
            EdgeError: it ended without a result.
        """

    def close(self) -> None:
        """Stop it if it still runs. Idempotent."""


Start = Callable[[Mapping[str, Any]], Running]


def on_this_machine(threads: int) -> Start:
    """A process of its own for each training."""
    return lambda job: Worker(job, limit_bytes=None, threads=threads)


@dataclass(frozen=True)
class Trained:
    """A training's end: where its update lies and its report, or why there is none."""

    update: Path
    report: TrainReport | None
    failure: str = ""


class Pool:
    """The trainings of one round."""

    def __init__(self, folder: Path, workers: int, start: Start, keep_going: Callable[[], bool]) -> None:
        """Args: folder: for updates and reports that are done; `keep_going` turns False when the user wants to stop."""
        self._folder, self._workers, self._start, self._keep_going = folder, workers, start, keep_going
        self._waiting: list[tuple[float, str, MakeJob]] = []
        self._running: dict[str, Running] = {}
        self._done: dict[str, Trained] = {}
        make_folder(folder, mode=0o700)

    def submit(self, due_s: float, name: str, make_job: MakeJob) -> None:
        """Train for `name` some time; `make_job(scratch)` gives the worker's job when it begins."""
        kept = read_json(self._folder / f"{name}.json")
        if self._is_whole(name, kept):
            self._done[name] = self._read(name, kept["report"])
            return
        heapq.heappush(self._waiting, (due_s, name, make_job))
        self._fill()

    def wait(self, name: str) -> Trained:
        """The end of a training that was submitted.

        Raises:
            KeyboardInterrupt: the user wants to stop.
            TrainingFailed: its process was killed, or this machine's memory is too small for it.
        """
        while name not in self._done:
            if not self._keep_going():
                raise KeyboardInterrupt
            self._fill()
            if not self._poll():
                time.sleep(POLL_S)
        return self._done[name]

    def residual(self, name: str) -> Path:
        """Where a training leaves what error feedback keeps of it."""
        return self._folder / f"{name}.residual"

    def end_round(self) -> None:
        """Stop what runs, and forget this round's trainings, on disk too."""
        self.close()
        self._done.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        make_folder(self._folder, mode=0o700)

    def close(self) -> None:
        """Stop what runs; what is done stays on disk."""
        for name, running in self._running.items():
            running.close()
            shutil.rmtree(self._scratch(name), ignore_errors=True)
        self._running.clear()
        self._waiting.clear()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            _, name, make_job = heapq.heappop(self._waiting)
            scratch = self._scratch(name)
            shutil.rmtree(scratch, ignore_errors=True)
            make_folder(scratch, mode=0o700)
            job = {**make_job(scratch), "update": str(self._update(name).absolute())}
            self._running[name] = self._start(job)

    def _poll(self) -> bool:
        """Read from everything that runs; -> whether one has ended."""
        ended = False
        for name, running in list(self._running.items()):
            try:
                while (line := running.poll(0.0)) is not None:
                    if "result" in line:
                        ended = self._end(name, line["result"]["report"])
                        break
            except TrainingFailed as error:
                if error.killed or error.out_of_memory:
                    raise  # of this machine's doing, not of the simulated device's
                ended = self._end(name, {"failure": str(error)})
        return ended

    def _end(self, name: str, report: dict[str, Any]) -> bool:
        del self._running[name]
        shutil.rmtree(self._scratch(name), ignore_errors=True)
        size = 0 if "failure" in report else self._update(name).stat().st_size
        write_json(self._folder / f"{name}.json", {"report": report, "update_bytes": size})
        self._done[name] = self._read(name, report)
        return True

    def _is_whole(self, name: str, kept: Any) -> bool:
        """Whether a training is done and on the disk with its update; else it is done, or done again."""
        if not isinstance(kept, dict) or not kept.keys() >= {"report", "update_bytes"}:
            return False
        update = self._update(name)
        return "failure" in kept["report"] or (update.is_file() and update.stat().st_size == kept["update_bytes"])

    def _read(self, name: str, report: dict[str, Any]) -> Trained:
        update = self._update(name)
        if "failure" in report:
            return Trained(update, None, report["failure"])
        return Trained(update, from_plain(TrainReport, report, "report"))

    def _update(self, name: str) -> Path:
        return self._folder / f"{name}.update"

    def _scratch(self, name: str) -> Path:
        return self._folder / f"{name}.scratch"
