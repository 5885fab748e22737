"""The model versions that a device keeps whole, and which of them answers: one small file beside the newest's manifest.

Kept are the newest, the one before it to go back to, the one that a person pinned, and the one that `serve` checked last.
The newest is what a fleet trains; the one that answers is the pinned one, else the newest, and never one that is marked
bad while there is another. Whole is what the disk says: a version of which a blob is gone is not held, whatever the file
says. So blobs may be deleted before or after the file is written, and any moment is a good one for a power cut.

Not how versions come here (`keeper.py`), not what runs them (`predict.py`). Writers take a lock, readers none. No numpy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edge_runtime.errors import EdgeError, ModelError, StoreError, UsageError, WireError
from edge_runtime.manifest import Manifest, decode_manifest
from edge_runtime.records import Count, Range, Reason
from edge_runtime.source import MANIFEST_FILE, STORE_FOLDER
from edge_runtime.store import BlobStore, atomic_writer, disk_errors, read_json, write_json
from edge_runtime.wire import from_plain

VERSIONS_FILE = "versions.json"
LOCK_FILE = ".versions.lock"
LOCK_S = 10.0  # a change takes a few writes to a slow card
MAX_OLDER = 16
MAX_REASON = 500
Hex = Annotated[str, Range(64, 64)]
Stamp = tuple[int, ...] | None


@dataclass(frozen=True)
class Mark:
    """What is known of a version's use on this device."""

    manifest: Hex
    bad: Reason = ""  # why it must not answer; empty: it may
    tries: Count = 0  # how often a process began to try it and did not live to say how it went


@dataclass(frozen=True)
class Choice:
    """The file. Versions are named by the hashes of their manifests, as hex."""

    older: Annotated[tuple[Hex, ...], Range(0, MAX_OLDER)] = ()  # kept beside the newest, newest first
    use: Annotated[str, Range(0, 64)] = ""  # pinned; empty: the newest
    checked: Annotated[str, Range(0, 64)] = ""  # the last one that was checked and answered
    marks: Annotated[tuple[Mark, ...], Range(0, MAX_OLDER)] = ()

    def mark(self, blob: bytes) -> Mark:
        """Of one version."""
        return next((mark for mark in self.marks if mark.manifest == blob.hex()), Mark(blob.hex()))


@dataclass(frozen=True)
class Held:
    """A version that is whole on this disk."""

    manifest: Manifest
    blob: bytes  # hash of the manifest


@dataclass(frozen=True)
class Versions:
    """All that a state folder holds, newest first, and the choice between them. Decides, reads nothing."""

    held: tuple[Held, ...]
    choice: Choice

    @property
    def answering(self) -> Held | None:
        """The pinned one, else the newest; the next one where it is bad; None where all are."""
        pinned = [h for h in self.held if h.blob.hex() == self.choice.use]
        return next((h for h in [*pinned, *self.held] if not self.choice.mark(h.blob).bad), None)

    @property
    def before(self) -> Held | None:
        """What a rollback goes to: the next older one that is not bad."""
        now = self.answering
        start = self.held.index(now) + 1 if now else 0
        return next((h for h in self.held[start:] if not self.choice.mark(h.blob).bad), None)

    def find(self, number: int) -> Held:
        """The version of this number, the newer one where a fleet counted anew.

        Raises:
            UsageError: it is not held.
        """
        for held in self.held:
            if held.manifest.version == number:
                return held
        there = ", ".join(str(h.manifest.version) for h in self.held) or "none"
        raise UsageError(f"model {number} is not whole on this device; there are: {there}")

    def worth_keeping(self, older: Sequence[Held]) -> list[Held]:
        """Of versions before the newest: the one to go back to, the pinned one, the one that was checked last."""
        back = next((h for h in older if not self.choice.mark(h.blob).bad), None)
        return [h for h in older if h is back or h.blob.hex() in (self.choice.use, self.choice.checked)]

    def own_bytes(self, held: Held) -> int:
        """What deleting one version would free: its blobs that no other version has."""
        others = {blob for other in self.held if other is not held for blob in other.manifest.blobs()}
        return sum(size for blob, size in held.manifest.blobs().items() if blob not in others)


# reading


def is_state_folder(folder: Path) -> bool:
    """Whether a folder is an agent's that holds a version."""
    return (folder / MANIFEST_FILE).exists()


def stamp(folder: Path) -> Stamp:
    """Changes with what a state folder holds or chooses; None where it is no state folder. Costs two `stat`."""
    found: list[int] = []
    for name in (MANIFEST_FILE, VERSIONS_FILE):
        try:
            status = (folder / name).stat()
        except OSError:
            if name == MANIFEST_FILE:
                return None
            continue
        found += [status.st_mtime_ns, status.st_ino, status.st_size]
    return tuple(found)


def read_versions(folder: Path) -> Versions:
    """What is whole in a state folder, and what was chosen.

    Raises:
        StoreError: the file that says so is damaged.
    """
    choice = _read_choice(folder)
    store = BlobStore(folder / STORE_FOLDER)
    found: dict[bytes, Held] = {}
    for data in [_bytes(folder / MANIFEST_FILE), *(_bytes(store.path(bytes.fromhex(name))) for name in choice.older)]:
        blob = hashlib.sha256(data).digest()
        if blob not in found and (manifest := _whole(store, data)):
            found[blob] = Held(manifest, blob)
    return Versions(tuple(found.values()), choice)


def answering(folder: Path) -> Held:
    """The version of a state folder that answers.

    Raises:
        ModelError: every version is marked bad.
        WireError: there is none but one that cannot be read.
        StoreError: as `read_versions`.
    """
    versions = read_versions(folder)
    if found := versions.answering:
        return found
    if versions.held:
        reasons = "; ".join(f"{h.manifest.version}: {versions.choice.mark(h.blob).bad}" for h in versions.held)
        raise ModelError(
            f"every model of {folder} is marked bad ({reasons}): `edge-runtime models use` tries one again"
        )
    data = _bytes(folder / MANIFEST_FILE)
    return Held(decode_manifest(data), hashlib.sha256(data).digest())  # whoever opens it says what it lacks


def _read_choice(folder: Path) -> Choice:
    path = folder / VERSIONS_FILE
    try:
        raw = read_json(path)
        choice: Choice = from_plain(Choice, raw, VERSIONS_FILE) if raw is not None else Choice()
        for name in (*choice.older, choice.use, choice.checked):
            bytes.fromhex(name)
    except (WireError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}): remove it to start afresh, with the newest model") from None
    return choice


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _whole(store: BlobStore, data: bytes) -> Manifest | None:
    """The manifest, if it can be read and every blob of it is here in its size."""
    try:
        manifest = decode_manifest(data)
        return manifest if all(store.size(blob) == size for blob, size in manifest.blobs().items()) else None
    except (EdgeError, OSError):
        return None


# choosing


def use(folder: Path, number: int | None) -> Held:
    """Pin a version, or with None follow the newest again; a mark on it is forgotten. -> the one that answers now.

    Raises:
        UsageError: it is not held.
        ModelError: every version is marked bad.
        StoreError: the disk is full, or another process does not let go.
    """
    with _changing(folder):
        versions = read_versions(folder)
        chosen = versions.find(number) if number is not None else None
        named = chosen.blob.hex() if chosen else ""
        marks = tuple(mark for mark in versions.choice.marks if mark.manifest != named)
        _write(folder, versions.choice, use=named, marks=marks)
    return answering(folder)


def rollback(folder: Path) -> tuple[Held | None, Held]:
    """Pin the version before the one that answers; -> (what answered, what answers now).

    Raises:
        UsageError: there is none.
        StoreError: as `use`.
    """
    with _changing(folder):
        versions = read_versions(folder)
        now, before = versions.answering, versions.before
        if before is None:
            which = f"before model {now.manifest.version}" if now else "that is not marked bad"
            raise UsageError(f"this device holds no version {which} to go back to")
        _write(folder, versions.choice, use=before.blob.hex())
    return now, before


def note_try(folder: Path, blob: bytes) -> int:
    """Before a version is tried, in case that the process dies of it; -> how often that has happened."""
    with _changing(folder):
        choice = _read_choice(folder)
        mark = choice.mark(blob)
        _remark(folder, choice, dataclasses.replace(mark, tries=mark.tries + 1))
    return mark.tries


def forget_try(folder: Path, blob: bytes) -> None:
    """A try ended for a reason that says nothing of the version."""
    with _changing(folder):
        choice = _read_choice(folder)
        _remark(folder, choice, dataclasses.replace(choice.mark(blob), tries=0))


def mark_checked(folder: Path, blob: bytes) -> None:
    """A version was tried and answers."""
    choice = _read_choice(folder)
    if choice.checked == blob.hex() and choice.mark(blob) == Mark(blob.hex()):
        return
    with _changing(folder):
        _remark(folder, dataclasses.replace(_read_choice(folder), checked=blob.hex()), Mark(blob.hex()))


def mark_bad(folder: Path, blob: bytes, reason: str) -> None:
    """A version must not answer: whoever follows the folder goes on with, or back to, another."""
    with _changing(folder):
        choice = _read_choice(folder)
        checked = "" if choice.checked == blob.hex() else choice.checked
        choice = dataclasses.replace(choice, checked=checked)
        _remark(folder, choice, Mark(blob.hex(), reason[:MAX_REASON] or "no reason is known"))


# for the keeper


def take_over(folder: Path, store: BlobStore, manifest: Manifest, data: bytes) -> None:
    """A version has become whole: it is the newest now, and what is not worth keeping any more is deleted.

    Raises:
        StoreError, OSError: the disk is full. What was the newest still is.
    """
    newest = Held(manifest, hashlib.sha256(data).digest())
    with _changing(folder):
        versions = read_versions(folder)
        older = [h for h in versions.held if h.blob != newest.blob][:MAX_OLDER]
        marks = tuple(m for m in versions.choice.marks if any(m.manifest == h.blob.hex() for h in older))
        _write(folder, versions.choice, older=tuple(h.blob.hex() for h in older), marks=marks)
        with atomic_writer(folder / MANIFEST_FILE) as file:
            file.write(data)
        _delete_others(store, [newest, *versions.worth_keeping(older)])


def make_room(folder: Path, store: BlobStore, incoming: Iterable[bytes]) -> list[int]:
    """Delete the versions that are neither the newest nor the one that answers; -> their numbers.

    Writes nothing, so that it works on a full disk.

    Args:
        incoming: blobs of a version that is on its way; what came of it stays.
    """
    with _changing(folder):
        versions = read_versions(folder)
        needed = [h for i, h in enumerate(versions.held) if i == 0 or h == versions.answering]
        dropped = [h.manifest.version for h in versions.held if h not in needed]
        if dropped:
            _delete_others(store, needed, incoming)
    return dropped


def forget_choice(folder: Path) -> None:
    """Remove a damaged file: the newest answers, and older versions are not known any more."""
    with _changing(folder):
        (folder / VERSIONS_FILE).unlink(missing_ok=True)


def _delete_others(store: BlobStore, kept: Iterable[Held], incoming: Iterable[bytes] = ()) -> None:
    store.keep_only([*incoming, *(blob for held in kept for blob in (held.blob, *held.manifest.blobs()))])


# writing


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """One process at a time reads, decides and writes.

    Raises:
        UsageError: it is no agent's folder.
        StoreError: another process holds it, or it cannot be written.
    """
    import fcntl

    if not (folder / STORE_FOLDER).is_dir():
        raise UsageError(f"{folder} is not the --state folder of a device")
    end = time.monotonic() + LOCK_S
    with disk_errors(folder), (folder / LOCK_FILE).open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StoreError(f"another process holds {folder / LOCK_FILE} for {LOCK_S:.0f} s: end it") from None
                time.sleep(0.02)
        yield


def _write(folder: Path, choice: Choice, **changes: Any) -> None:
    changed = dataclasses.replace(choice, **changes)
    if changed != choice:
        write_json(folder / VERSIONS_FILE, dataclasses.asdict(changed))


def _remark(folder: Path, choice: Choice, mark: Mark) -> None:
    """Write the file with one mark in place of that version's; the marks of the newest versions where they are too many."""
    others = [m for m in choice.marks if m.manifest != mark.manifest]
    marks = (*others[1 - MAX_OLDER :], mark) if mark != Mark(mark.manifest) else tuple(others)
    write_json(folder / VERSIONS_FILE, dataclasses.asdict(dataclasses.replace(choice, marks=marks)))
