"""An update on its way out: durable until the coordinator has it in its ledger, offered again more and more rarely.

`pending.json` is written after the update's bytes and before the first offer, and removed when an answer ends it. So a
device that loses power either has the whole update to offer, or trains again. One update at a time.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from edge_runtime.errors import EdgeError, StoreError, WireError
from edge_runtime.records import MAX_KEPT_BYTES, Bytes, Count, Name, Range, Seconds, TrainReport
from edge_runtime.residual import Residual
from edge_runtime.store import BlobStore, disk_errors, read_json, write_json
from edge_runtime.transfer import Sender
from edge_runtime.wire import Grant, Offer, from_plain, to_plain

PAUSE_S = (10.0, 120.0)  # between offers: first and longest
PENDING_FILE = "pending.json"


@dataclass(frozen=True)
class Pending:
    """An update that is on disk and not yet committed; bytes as hex, since it is kept as JSON."""

    run: Name
    round: Count
    nonce: Annotated[str, Range(32, 32)]
    blob: Annotated[str, Range(64, 64)]
    num_bytes: Bytes
    num_examples: Annotated[int, Range(1, 1 << 20)]
    train_s: Seconds
    peak_bytes: Bytes
    first_loss: float
    last_loss: float
    codec: Name = "f32"
    kept: Annotated[str, Range(0, 2 * MAX_KEPT_BYTES)] = ""

    def offer(self) -> Offer:
        """The message that offers it."""
        return Offer(
            run=self.run,
            round=self.round,
            nonce=bytes.fromhex(self.nonce),
            blob=bytes.fromhex(self.blob),
            num_bytes=self.num_bytes,
            codec=self.codec,
            num_examples=self.num_examples,
            train_s=self.train_s,
            peak_bytes=self.peak_bytes,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            kept=bytes.fromhex(self.kept),
        )


class Outbox:
    """The one update of a device.

    Attributes:
        pending: what waits to be committed, or None.
        sender: answers the coordinator's requests for its bytes.
        residual: what earlier updates left out, and what this one does.
        damaged: why a stored update could not be read at the start; empty if all was well.
    """

    def __init__(self, folder: Path, jitter: random.Random) -> None:
        self._file = folder / PENDING_FILE
        self._jitter = jitter
        self._next_at, self._pause_s = 0.0, PAUSE_S[0]
        self._updates = BlobStore(folder / "updates")
        self.sender = Sender(self._updates)
        self.draft = folder / "updates" / "partial" / "update.tmp"  # where a training process writes
        self.residual = Residual(folder / "residual")
        self.damaged = ""
        self.pending = self._load()

    def put(self, grant: Grant, report: TrainReport) -> None:
        """Take the draft over: name it by its hash, note it as pending.

        Raises:
            StoreError, OSError, WireError: the disk is full, or no coordinator would take such an offer. Nothing of it
                stays on disk then.
        """
        try:
            num_bytes = self.draft.stat().st_size
            blob = self._updates.adopt(self.draft)
            self.residual.stage()
            pending = Pending(
                grant.run,
                grant.round,
                grant.nonce.hex(),
                blob.hex(),
                num_bytes,
                report.num_examples,
                report.train_s,
                report.peak_bytes,
                report.first_loss,
                report.last_loss,
                report.codec,
                report.kept,
            )
            from_plain(Offer, to_plain(pending.offer()), "offer")  # one that nobody can read is never answered
            write_json(self._file, dataclasses.asdict(pending))
        except (EdgeError, OSError):
            self._updates.keep_only([])  # a full disk has no room for what nobody will be offered
            self.residual.settle(committed=False)
            raise
        self.pending = pending
        self.hurry()

    def due(self, now: float) -> Offer | None:
        """The offer, if it is time for it."""
        if self.pending is None or now < self._next_at:
            return None
        self._next_at = now + self._pause_s * self._jitter.uniform(0.8, 1.2)
        self._pause_s = min(2 * self._pause_s, PAUSE_S[1])
        return self.pending.offer()

    def hurry(self) -> None:
        """Offer at once: there is a new update, or a new connection."""
        self._next_at, self._pause_s = 0.0, PAUSE_S[0]
        self.sender.clear()

    def settle(self, status: str) -> None:
        """The coordinator's last word on the update: only one that is committed moves the residual on.

        After "rejected" the residual goes too: it may be what made the update one that nobody takes.
        """
        if status == "rejected":
            self.residual.drop()
        self.residual.settle(status == "committed")
        self.clear()

    def clear(self) -> None:
        """There is no update any more."""
        with disk_errors(self._file):
            self._file.unlink(missing_ok=True)
        self._updates.keep_only([])
        self.sender.clear()
        self.pending = None

    def drop_draft(self) -> None:
        """A training was given up, or another begins."""
        self.draft.unlink(missing_ok=True)
        self.residual.drop_draft()

    def _load(self) -> Pending | None:
        try:
            raw = read_json(self._file)
            pending: Pending | None = from_plain(Pending, raw, "pending") if raw else None
            blob = pending.offer().blob if pending else b""
        except (StoreError, WireError, ValueError) as error:  # ValueError: what should be hex is not
            self.damaged, pending, blob = f"the stored update is not usable: {error}", None, b""
        if pending and self._updates.has(blob) and self._updates.size(blob) == pending.num_bytes:
            self._updates.keep_only([blob])
            return pending
        self.residual.settle(committed=False)
        self.drop_draft()
        self.clear()
        return None
