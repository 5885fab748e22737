"""Blob transfer, both directions: the receiver asks for ranges within its credit, the sender answers with chunks.

Chunks of one blob are taken in order, so the length of the partial file is the whole state: a transfer resumes after a
crash of either side from what is on disk. A lost chunk shows as a gap or as silence and is asked for again. The clock
is passed in; no topics, no sockets. In memory: the ranges in flight, never their bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edge_runtime.store import BlobStore
from edge_runtime.wire import MAX_CHUNK_BYTES, BlobRange, Need, encode_chunk

CREDIT_BYTES = 4 << 20
CREDIT_CHUNKS = 16
MAX_PENDING_RANGES = 64
FIRST_CHUNK_BYTES = 64 << 10  # until a blob has shown that the link carries it


def chunk_bytes_at(offset: int) -> int:
    """Size of the chunk that begins at `offset`: 64 KiB for a blob's first MiB, then 256 KiB."""
    return FIRST_CHUNK_BYTES if offset < 1 << 20 else MAX_CHUNK_BYTES


@dataclass
class _Incoming:
    size: int
    asked_to: int  # bytes up to here are here or asked for
    last_progress: float
    gap_at: int = -1  # where the last gap was seen: the chunks behind a lost one ask for it once, not each


class Receiver:
    """Fetches a set of blobs into a store. One per peer."""

    def __init__(self, store: BlobStore, *, timeout_s: float = 10.0) -> None:
        self.store = store
        self.timeout_s = timeout_s
        self.received_bytes = 0
        self._incoming: dict[bytes, _Incoming] = {}

    @property
    def idle(self) -> bool:
        """Nothing is being fetched."""
        return not self._incoming

    @property
    def missing_bytes(self) -> int:
        """What is still to come."""
        return sum(i.size - self.store.partial_bytes(b) for b, i in self._incoming.items())

    def want(self, blob: bytes, size: int, now: float) -> None:
        """Add a blob to fetch; one that is here already is ignored, a partial goes on where it stopped."""
        if self.store.has(blob) or blob in self._incoming:
            return
        here = self.store.partial_bytes(blob)
        if here > size:
            self.store.drop_partial(blob)
            here = 0
        if here == size:  # complete, but the process ended before it was checked; an empty blob begins here too
            self.store.append_partial(blob, here, b"")
            if self.store.finish_partial(blob):
                return
            here = 0
        self._incoming[blob] = _Incoming(size, here, now)

    def cancel(self, blob: bytes) -> None:
        """Stop fetching a blob and forget what came of it."""
        self._incoming.pop(blob, None)
        self.store.drop_partial(blob)

    def forget_all(self) -> None:
        """Stop fetching; partials stay on disk for the next time."""
        self._incoming.clear()

    def restart(self, now: float) -> None:
        """After a reconnect: nothing that was asked for is on its way any more."""
        for blob, incoming in self._incoming.items():
            incoming.asked_to = self.store.partial_bytes(blob)
            incoming.last_progress, incoming.gap_at = now, -1

    def accept(self, blob: bytes, offset: int, data: bytes, now: float) -> bool | None:
        """Take a chunk. True: the blob is complete and verified; False: its hash was wrong, it starts again; else None.

        Chunks that were not asked for, duplicates and bytes beyond the blob's size are dropped.
        """
        incoming = self._incoming.get(blob)
        if incoming is None or offset + len(data) > incoming.size:
            return None
        here = self.store.partial_bytes(blob)
        if offset > here:  # a gap: ask again from where we are, once until progress
            if incoming.gap_at != here:
                incoming.asked_to, incoming.gap_at = min(incoming.asked_to, here), here
            return None
        if not self.store.append_partial(blob, offset, data):
            return None
        self.received_bytes += len(data)
        incoming.last_progress = now
        incoming.asked_to = max(incoming.asked_to, offset + len(data))
        if offset + len(data) < incoming.size:
            return None
        if self.store.finish_partial(blob):
            del self._incoming[blob]
            return True
        incoming.asked_to, incoming.gap_at = 0, -1
        return False

    def requests(self, now: float) -> Need | None:
        """The ranges to ask for now, if credit allows any."""
        in_flight_bytes = in_flight_chunks = 0
        for blob, incoming in self._incoming.items():
            here = self.store.partial_bytes(blob)
            if incoming.asked_to > here and now - incoming.last_progress > self.timeout_s:
                incoming.asked_to, incoming.gap_at = here, -1
                incoming.last_progress = now
            in_flight_bytes += incoming.asked_to - here
            in_flight_chunks += len(list(split(here, incoming.asked_to)))
        ranges: list[BlobRange] = []
        for blob, incoming in self._incoming.items():
            if len(ranges) == 16 or in_flight_chunks >= CREDIT_CHUNKS or in_flight_bytes >= CREDIT_BYTES:
                break
            if incoming.asked_to >= incoming.size:
                continue
            if incoming.asked_to == self.store.partial_bytes(blob):
                incoming.last_progress = now
            end = incoming.asked_to
            for _, stop in split(incoming.asked_to, incoming.size):
                if in_flight_chunks >= CREDIT_CHUNKS or in_flight_bytes >= CREDIT_BYTES:
                    break
                in_flight_chunks += 1
                in_flight_bytes += stop - end
                end = stop
            ranges.append(BlobRange(blob, incoming.asked_to, end))
            incoming.asked_to = end
        return Need(tuple(ranges)) if ranges else None


def split(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The chunk boundaries within a range."""
    while start < end:
        stop = min(end, start + chunk_bytes_at(start))
        yield start, stop
        start = stop


class Sender:
    """Answers one peer's requests from a store, one chunk at a time, so that many peers share the link fairly."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self.sent_bytes = 0
        self._pending: deque[BlobRange] = deque()

    @property
    def idle(self) -> bool:
        """Nothing is asked for."""
        return not self._pending

    def ask(self, ranges: Iterable[BlobRange]) -> list[bytes]:
        """Queue what the peer needs; -> the blobs that are not here. What is over the bound is dropped: it will ask again."""
        absent = []
        for wanted in ranges:
            if not 0 < wanted.end - wanted.start <= CREDIT_BYTES or wanted in self._pending:
                continue
            if not self.store.has(wanted.blob) or wanted.end > self.store.size(wanted.blob):  # gone, or cut short
                absent.append(wanted.blob)
                continue
            apart = [
                p for p in self._pending if p.blob != wanted.blob or p.end <= wanted.start or p.start >= wanted.end
            ]
            self._pending = deque(apart)  # what is asked for again replaces what is left of the first time
            if len(self._pending) < MAX_PENDING_RANGES:
                self._pending.append(wanted)
        return absent

    def clear(self) -> None:
        """Forget what was asked for: the peer has reconnected and will ask again."""
        self._pending.clear()

    def next_chunk(self) -> bytes | None:
        """The next chunk's bytes, or None when nothing is pending."""
        while self._pending:
            wanted = self._pending.popleft()
            start, stop = next(split(wanted.start, wanted.end))
            try:
                with self.store.path(wanted.blob).open("rb") as file:
                    file.seek(start)
                    data = file.read(stop - start)
            except FileNotFoundError:  # superseded and removed meanwhile: the peer will be told when it asks again
                continue
            if len(data) < stop - start:  # cut short meanwhile
                continue
            if stop < wanted.end:
                self._pending.appendleft(BlobRange(wanted.blob, stop, wanted.end))
            self.sent_bytes += len(data)
            return encode_chunk(wanted.blob, start, data)
        return None
