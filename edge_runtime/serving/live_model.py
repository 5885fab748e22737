"""The model that answers while `serve` runs: another version is tried beside it, and takes over only if it is well.

A version that fails is marked bad in the device's folder, so that nobody tries it again, and the one before goes on. So is
one that the process has died of three times. Files and folders that are no device's never change. Not HTTP (`http_api.py`),
not what loads and checks (`predict.py`), not which version is wanted (`versions.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import BadVersion, EdgeError, StoreError
from edge_runtime.predict import TRUNCATE, Prediction, Predictor
from edge_runtime.versions import (
    Held,
    Stamp,
    Versions,
    answering,
    forget_try,
    is_state_folder,
    mark_bad,
    mark_checked,
    note_try,
    read_versions,
    stamp,
)

MAX_TRIES = 3  # of which the process dies
RETRY_S = 30.0  # after the disk was full
Emit = Callable[[dict[str, Any]], None]


class LiveModel:
    """Answers from one version at a time; `follow` and `predict` may run in different threads.

    Attributes:
        model_version: number of the version that answers; None for a model of no fleet.
        swaps: how often another version took over.
        loaded_at: Unix time at which the version that answers did.
        pinned: whether a person chose it.
        refused: number of a version on this disk that does not answer -> why.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None,
        emit: Emit,
        *,
        family: str | None = None,
        adapter: Path | None = None,
        long: str = TRUNCATE,
        progress: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the model and try it; of a device's folder the wanted version, or the next that is well.

        Raises:
            EdgeError: as `Predictor`; no version is well.
        """
        self._folder = path if is_state_folder(path) else None
        self._emit, self._clock = emit, clock
        self.model_version: int | None = None
        self.swaps, self.loaded_at, self.pinned = 0, 0.0, False
        self.refused: Mapping[int, str] = {}
        self._failed: dict[bytes, str] = {}  # also those whose mark could not be written
        self._version = b""  # that answers
        self._seen: Stamp = None
        self._retry_at = 0.0
        self._predictor = self._open(
            lambda: Predictor(path, threads, family=family, adapter=adapter, long=long, progress=progress)
        )
        self._took_over(self._predictor)
        if self._folder:
            self._look_around(self._folder)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the version that answers."""
        return self._predictor.labels

    @property
    def max_length(self) -> int:
        """Tokens after which it cuts a text."""
        return self._predictor.max_length

    @property
    def num_truncated(self) -> int:
        """Texts so far of which a rest was not read."""
        return self._predictor.num_truncated

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """As `Predictor.predict`."""
        return self._predictor.predict(texts)

    def follow(self) -> None:
        """Take over the version that is wanted now, if it is another and well. Costs two `stat` where nothing changed."""
        if self._folder is None or self._clock() < self._retry_at:
            return
        found = stamp(self._folder)
        if found is None or found == self._seen:
            return
        self._seen = found
        wanted: Held | None = None
        try:
            wanted = self._wanted(self._folder)
            if wanted.blob != self._version:
                self._try(self._folder)
        except (StoreError, OSError, MemoryError) as error:
            self._try_later(error, wanted)
        except BadVersion as error:
            self._refuse(error)
        except Exception as error:  # whatever it is: the version before goes on
            self._refuse_other(wanted, error)
        self._look_around(self._folder)

    def _open(self, make: Callable[[], Predictor]) -> Predictor:
        while True:
            if self._folder:
                self._wanted(self._folder)
            try:
                predictor = make()
                predictor.check()
                return predictor
            except BadVersion as error:
                if not self._refuse(error):
                    raise

    def _try(self, folder: Path) -> None:
        before, started = self.model_version, self._clock()
        if not self._predictor.refresh():
            return
        self._took_over(self._predictor)
        self.swaps += 1
        load_s = round(self._clock() - started, 3)
        self._emit({"event": "swapped", "model_version": self.model_version, "before": before, "load_s": load_s})

    def _took_over(self, predictor: Predictor) -> None:
        stored = predictor.metadata.get("model_version", "")
        self.model_version = int(stored) if stored.isascii() and stored.isdecimal() else None
        self._version, self.loaded_at = predictor.version, time.time()
        self._failed.pop(self._version, None)
        if self._folder:
            with self._saying():
                mark_checked(self._folder, self._version)

    def _wanted(self, folder: Path) -> Held:
        """The version that is to answer, noted as tried; one that was tried in vain is passed over."""
        while True:
            wanted = answering(folder)
            if wanted.blob == self._version:
                return wanted
            died = 0
            with self._saying():
                died = note_try(folder, wanted.blob)
            if died < MAX_TRIES or _is_the_last(read_versions(folder)):
                return wanted
            reason = f"the process died {died} times while it tried model {wanted.manifest.version}"
            if not self._refuse(BadVersion(reason, version=wanted.manifest.version, manifest=wanted.blob)):
                return wanted

    def _refuse(self, error: BadVersion) -> bool:
        """Mark a version as bad; -> whether the mark is on disk."""
        assert self._folder, "only a device's folder has versions"
        self._failed[error.manifest] = str(error)
        self.refused = {**self.refused, error.version: str(error)}
        event = {"event": "refused", "model_version": error.version, "reason": str(error)}
        self._emit({**event, "answers": self.model_version})
        with self._saying():
            mark_bad(self._folder, error.manifest, str(error))
            return True
        return False

    def _refuse_other(self, wanted: Held | None, error: Exception) -> None:
        reason = str(error) if isinstance(error, EdgeError) else repr(error)
        if wanted is None:  # there is none that could be wanted
            self._emit({"event": "refused", "model_version": None, "reason": reason, "answers": self.model_version})
        else:
            self._refuse(BadVersion(reason, version=wanted.manifest.version, manifest=wanted.blob))

    def _try_later(self, error: Exception, wanted: Held | None) -> None:
        self._retry_at = self._clock() + RETRY_S
        self._emit({"event": "storage-error", "reason": str(error) or repr(error)})
        with self._saying():
            if wanted and self._folder:
                forget_try(self._folder, wanted.blob)
        self._seen = None

    def _look_around(self, folder: Path) -> None:
        """What `/health` tells of the folder."""
        try:
            versions = read_versions(folder)
        except (EdgeError, OSError):
            return  # was told already
        bad = {h.blob: versions.choice.mark(h.blob).bad or self._failed.get(h.blob, "") for h in versions.held}
        self.refused = {
            h.manifest.version: bad[h.blob] for h in versions.held if bad[h.blob] and h.blob != self._version
        }
        self.pinned = bool(self._version) and versions.choice.use == self._version.hex()
        self._failed = {blob: why for blob, why in self._failed.items() if blob in bad}

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        """Go on where something cannot be written, and say so."""
        try:
            yield
        except (EdgeError, OSError) as error:
            self._emit({"event": "storage-error", "reason": str(error)})


def _is_the_last(versions: Versions) -> bool:
    """Whether no other version could answer."""
    return sum(not versions.choice.mark(h.blob).bad for h in versions.held) <= 1
