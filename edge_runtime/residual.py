"""What a device's top-k updates left out, kept on disk until a later update holds it: error feedback.

Seide et al. 2014 (https://doi.org/10.21437/Interspeech.2014-274) and Stich et al. 2018 (arXiv 1809.07599): what is sent is
top-k of delta + residual, and the residual becomes delta + residual - sent. Three files of one format in one folder:

    kept    what was left out by updates that are committed
    draft   what the training under way would make of it
    next    what the update that is offered makes of it: `kept` from its commit on

So an update that is trained anew begins from the same `kept`, and one that is not committed changes nothing. Dropped where the
model is of another line: another run, base model or shape, that of adapters too, or mask. The file: a line of JSON, then float32 tensors one after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from edge_runtime.errors import WireError
from edge_runtime.manifest import Manifest
from edge_runtime.model import EMBED
from edge_runtime.records import Count, Range, TrainSettings
from edge_runtime.store import atomic_writer, disk_errors, sync_folder
from edge_runtime.wire import from_plain, pack, to_plain

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

MAX_HEADER_BYTES = 4 << 20
COPY_BYTES = 1 << 20


class Residual:
    """The files of one device. Needs no numpy: the agent moves them, the training process reads and writes them."""

    def __init__(self, folder: Path) -> None:
        self.kept, self.draft, self._next = (folder / name for name in ("kept", "draft", "next"))

    def stage(self) -> None:
        """The draft belongs to the update that is about to be offered; without one, that update leaves `kept` as it is."""
        with disk_errors(self._next):
            if self.draft.exists():
                os.replace(self.draft, self._next)
                sync_folder(self._next.parent)
            else:
                self._next.unlink(missing_ok=True)

    def settle(self, committed: bool) -> None:
        """The offered update is in the coordinator's ledger, or never will be. Twice is as once."""
        with disk_errors(self._next):
            if not committed:
                self._next.unlink(missing_ok=True)
            elif self._next.exists():
                os.replace(self._next, self.kept)
                sync_folder(self.kept.parent)

    def drop_draft(self) -> None:
        """A training was given up."""
        self.draft.unlink(missing_ok=True)

    def drop(self) -> None:
        """Begin from nothing."""
        with disk_errors(self.kept):
            for path in (self.kept, self._next, self.draft):
                path.unlink(missing_ok=True)


def feedback_job(
    kept: Path, draft: Path, run: str, round_: int, manifest: Manifest, settings: TrainSettings
) -> dict[str, Any]:
    """What a training process is told of error feedback: its job's "residual". Args: settings: of the round."""
    places = {"kept": str(kept.absolute()), "draft": str(draft.absolute())}
    return {**places, "line": line_of(run, manifest, settings), "round": round_}


def line_of(run: str, manifest: Manifest, settings: TrainSettings) -> str:
    """What the versions of one run from one base model with one mask have in common, and no others: a hash, as hex."""
    shape = [(t.name, t.shape, t.part) for t in (*manifest.tensors, *manifest.adapters)]
    frozen = [t.blob for t in manifest.tensors if t.part == EMBED]
    parts = [run, manifest.family, manifest.config_json, manifest.labels, shape, manifest.tokenizer, frozen]
    mask = [settings.mask_every, settings.mask_seed] if settings.mask_every else []
    return hashlib.sha256(pack([*parts, *mask])).hexdigest()


@dataclass(frozen=True)
class _Header:
    """The first line of a residual's file."""

    line: Annotated[str, Range(64, 64)]
    round: Count  # whose update left this out
    names: Annotated[tuple[Annotated[str, Range(1, 200)], ...], Range(0, 8192)]
    sizes: Annotated[tuple[Annotated[int, Range(0, 1 << 40)], ...], Range(0, 8192)]


class ErrorFeedback:
    """Adds what was left out to the deltas of one training, and writes what that leaves out (`encoding.Feedback`)."""

    def __init__(self, kept: Path, line: str, round_: int, target: IO[bytes], sizes: Mapping[str, int]) -> None:
        self._target = target
        self._places: dict[str, tuple[int, int]] = {}  # where the kept tensors lie: offset, number of values
        self._file: IO[bytes] | None = None
        with contextlib.suppress(OSError, WireError, ValueError, RecursionError):
            self._file = kept.open("rb")
            found = _places(self._file, line, round_)  # an adapter of another rank than before has nothing to add
            self._places = {n: place for n, place in found.items() if sizes.get(n, place[1]) == place[1]}
        self._others = [name for name in self._places if name not in sizes]
        names = (*sizes, *self._others)
        counts = tuple(sizes[n] if n in sizes else self._places[n][1] for n in names)
        target.write(json.dumps(to_plain(_Header(line, round_, names, counts))).encode() + b"\n")

    def before(self, name: str, start: int, count: int) -> Array:
        """What is kept of a tensor's values from `start` on; zeros where nothing is."""
        import numpy as np

        if name not in self._places:
            return np.zeros(count, np.float32)
        assert self._file, "whose places these are"
        self._file.seek(self._places[name][0] + 4 * start)
        return np.frombuffer(self._file.read(4 * count), "<f4")

    def keep(self, left: Array) -> None:
        """What the next section in turn leaves out."""
        self._target.write(left.astype("<f4", copy=False).tobytes())

    def finish(self) -> None:
        """Tensors that this update does not train stay kept as they were."""
        for name in self._others:
            assert self._file, "whose places these are"
            offset, count = self._places[name]
            self._file.seek(offset)
            for number in _pieces(4 * count):
                self._target.write(self._file.read(number))

    def close(self) -> None:
        """Let go of what was kept."""
        if self._file:
            self._file.close()


@contextlib.contextmanager
def error_feedback(
    kept: Path, draft: Path, line: str, round_: int, sizes: Mapping[str, int]
) -> Iterator[ErrorFeedback]:
    """For one training: from `kept`, where it is of this line of models and of an earlier round, to `draft`, whole or not at all."""
    with atomic_writer(draft) as target:
        feedback = ErrorFeedback(kept, line, round_, target, sizes)
        with contextlib.closing(feedback):
            yield feedback
            feedback.finish()


def _places(file: IO[bytes], line: str, round_: int) -> dict[str, tuple[int, int]]:
    """Where a file's tensors lie; nothing if it is of another line or of no earlier round.

    Raises:
        OSError, WireError, ValueError, RecursionError: it is damaged.
    """
    header: _Header = from_plain(_Header, json.loads(file.readline(MAX_HEADER_BYTES)), "residual")
    if header.line != line or header.round >= round_:
        return {}
    offset, found = file.tell(), {}
    for name, count in zip(header.names, header.sizes, strict=True):
        found[name] = (offset, count)
        offset += 4 * count
    if os.fstat(file.fileno()).st_size != offset or not _all_finite(file):
        raise WireError("the residual is damaged")
    return found


def _all_finite(file: IO[bytes]) -> bool:
    import numpy as np

    return all(np.isfinite(np.frombuffer(data, "<f4")).all() for data in iter(lambda: file.read(COPY_BYTES), b""))


def _pieces(num_bytes: int) -> Iterable[int]:
    return (min(COPY_BYTES, num_bytes - start) for start in range(0, num_bytes, COPY_BYTES))
