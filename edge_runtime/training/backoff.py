"""When memory gets short while an automatic budget trains: the same training goes on in smaller pieces, nothing lost.

The worker process writes what it has trained to a file without a name, then executes itself anew with a smaller plan of
the same depth: only that gives all memory back. The process keeps its number, its pipes and its cgroup, so who started it
need not know. Linux only by its readings; elsewhere memory is never short. A training that is paused for long is kept in the
same form, in a file that its agent holds open (`patient.py`), and goes on as the same plan.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from edge_runtime.budget import reserve_bytes
from edge_runtime.errors import TrainingFailed
from edge_runtime.hardware import process_memory, room
from edge_runtime.records import CostRow
from edge_runtime.training.cache_folders import in_memory
from edge_runtime.training.loop import Backend, Progress

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class Pressure:
    """Whether memory is short, and which of the smaller candidates would do.

    Attributes:
        smaller: what to go on as, once memory is short.
    """

    def __init__(self, smaller: Sequence[CostRow], *, own_cgroup: bool) -> None:
        """`smaller`: candidates by descending peak; `own_cgroup`: this process has a cgroup with its own budget as limit."""
        self._rows, self._own_cgroup = smaller, own_cgroup
        self.smaller: CostRow | None = None

    def give_up(self) -> None:
        """Memory is not short any more, whatever happens."""
        self._rows = ()

    def is_short(self) -> bool:
        """False too where nothing smaller is left."""
        if not self._rows:
            return False
        limit, left = room(skip_own=self._own_cgroup)
        held, reserve = process_memory(), reserve_bytes(limit)
        left -= held.get("VmHWM", 0) - held.get("VmRSS", 0)  # which the next step takes again
        if left >= reserve // 2:
            return False
        target = held.get("VmHWM", 0) - (reserve - left)
        self.smaller = next((row for row in self._rows if row.peak_bytes <= target), self._rows[-1])
        return True


def on_disk(*folders: Path) -> Path:
    """The first of some folders that does not lie in memory, which a saved state would fill.

    Raises:
        OSError: none.
    """
    for folder in folders:
        if folder.is_dir() and not in_memory(folder):
            return folder
    raise OSError("every folder lies in memory")


def begin_again(job: Mapping[str, Any], progress: Progress, arrays: Iterable[Array], folder: Path) -> NoReturn:
    """Execute this worker anew with a job, its progress and its arrays, kept in a file in `folder` that has no name."""
    with tempfile.TemporaryFile(dir=folder) as file:
        _write(file, {"job": job, "progress": vars(progress)}, arrays)
        os.set_inheritable(file.fileno(), True)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "edge_runtime.training.worker", str(file.fileno())])  # noqa: S606 - no shell


def put_aside(job: Mapping[str, Any], progress: Progress, arrays: Iterable[Array], descriptor: int) -> None:
    """Keep a job, its progress and its arrays in a file that is open already, for another process to go on from.

    Raises:
        OSError: there is no room for them; the file is empty then.
    """
    with os.fdopen(os.dup(descriptor), "r+b") as file:
        file.seek(0)
        file.truncate()
        try:
            _write(file, {"job": job, "progress": vars(progress), "left_at": time.monotonic()}, arrays)
        except OSError:
            os.truncate(descriptor, 0)
            raise


def _write(file: IO[bytes], header: Mapping[str, Any], arrays: Iterable[Array]) -> None:
    file.write(json.dumps(header).encode() + b"\n")
    for array in arrays:
        file.write(array.data)
    file.flush()
    file.seek(0)


class Saved:
    """What `begin_again` or `put_aside` passed on, in the new image of the process or the new process.

    Attributes:
        is_smaller: it goes on as a smaller plan than before.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb")
        header = json.loads(self._file.readline())
        self.job: dict[str, Any] = header["job"]
        self._progress = Progress(**header["progress"])
        self._left_at = header.get("left_at")
        self.is_smaller = self._left_at is None

    def restore(self, backend: Backend) -> Progress:
        """Set everything that steps change as it was; -> how far they came."""
        with self._file:
            for array in backend.arrays():
                if self._file.readinto(array.reshape(-1).view("uint8").data) != array.nbytes:
                    raise TrainingFailed("the state of a training that was to go on is not whole")
        backend.optimizer.steps = len(self._progress.losses)
        if self._left_at is None:
            self._progress.backed_off += 1
        else:
            self._progress.paused_s += time.monotonic() - self._left_at
        return self._progress
