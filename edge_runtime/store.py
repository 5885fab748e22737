"""Durable files: atomic replacement, small JSON state, and blobs named by their SHA-256.

A blob is complete or absent: it is written beside its place, hashed, synced and renamed. A partial transfer is a file
whose length is its state. Nothing here is bigger in memory than one read buffer (1 MiB). Imports only the errors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from edge_runtime.errors import StoreError, UsageError

BUFFER_BYTES = 1 << 20
STALE_S = 3600.0  # no write of one file takes longer
SERVING_FILE = ".serving"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's disk errors into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(f"no space left to write {path}: free some, nothing that was stored is lost") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise StoreError(f"cannot write {path}: {error.strerror}") from error
        raise


def cache_folder() -> Path:
    """Where fetched models, tokenised data and calibrations are kept: $EDGE_CACHE or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EDGE_CACHE") or Path(base) / "edge-runtime")


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make a folder and those above it.

    Raises:
        StoreError: it cannot be made, whatever the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror}") from error


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder below `parent` for this process alone, gone at the end; those that killed processes left there go first.

    Whoever lives is known by its number, and by a lock where it lives in another container.

    Raises:
        StoreError: the disk is full or cannot be written.
    """
    with disk_errors(parent):
        make_folder(parent)
        for left_over in parent.glob(f"{glob.escape(prefix)}*"):
            _remove_if_left(left_over, left_over.name.removeprefix(prefix).split(".")[0])
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{prefix}{os.getpid()}."))
        held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path, owner: str) -> None:
    if not owner.isdecimal() or Path("/proc", owner).exists():
        return
    with contextlib.suppress(OSError):  # it is held, or another process removes it
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)


@contextlib.contextmanager
def gone_if_empty(folder: Path) -> Iterator[None]:
    """A folder that was not there before and is empty afterwards goes again: nothing came of it."""
    is_new = not folder.exists()
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only an empty folder can be


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_writer(path: Path, *, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Write a file that appears whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    with disk_errors(path):
        make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a small JSON state file atomically."""
    with atomic_writer(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(path: Path, default: Any = None) -> Any:
    """The value of a JSON state file, or `default` where there is none.

    Raises:
        StoreError: the file is there and is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError, OSError) as error:
        raise StoreError(f"{path} is damaged ({error}): remove it to start afresh") from None


def file_sha256(path: Path) -> bytes:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BUFFER_BYTES):
            digest.update(block)
    return digest.digest()


class BlobStore:
    """Content-addressed files below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk_errors(folder):
            for name in ("blobs", "partial"):
                (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            for draft in (folder / "blobs").glob("*/.*"):  # of a process that was killed, or of one that is writing now
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - draft.stat().st_mtime > STALE_S:
                        draft.unlink()

    def path(self, blob: bytes) -> Path:
        """Where the blob lies or would lie."""
        name = blob.hex()
        return self.folder / "blobs" / name[:2] / name

    def has(self, blob: bytes) -> bool:
        """Whether the whole blob is here."""
        return self.path(blob).exists()

    def size(self, blob: bytes) -> int:
        """Bytes of a blob that is here."""
        return self.path(blob).stat().st_size

    def put(self, data: bytes) -> bytes:
        """Store bytes; -> their SHA-256."""
        blob = hashlib.sha256(data).digest()
        if not self.has(blob):
            with atomic_writer(self._place(blob)) as file:
                file.write(data)
        return blob

    def adopt(self, source: Path) -> bytes:
        """Move a finished file on the same file system into the store; -> its SHA-256. Synced before it is named."""
        blob = file_sha256(source)
        target = self._place(blob)
        with disk_errors(target):
            with source.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(source, 0o600)
            os.replace(source, target)
            sync_folder(target.parent)
        return blob

    def _place(self, blob: bytes) -> Path:
        """Where the blob will lie, in a folder that survives a power cut."""
        target = self.path(blob)
        with disk_errors(target):
            if not target.parent.exists():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                sync_folder(target.parent.parent)
        return target

    def delete(self, blob: bytes) -> None:
        """Remove a blob and any partial of it; absent is fine."""
        self.path(blob).unlink(missing_ok=True)
        self._partial(blob).unlink(missing_ok=True)

    def keep_only(self, wanted: Iterable[bytes]) -> int:
        """Delete every blob and partial that is not wanted; -> bytes freed."""
        names = {blob.hex() for blob in wanted}
        freed = 0
        for path in [*(self.folder / "blobs").glob("*/*"), *(self.folder / "partial").glob("*")]:
            if path.name not in names:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def used_bytes(self) -> int:
        """Bytes of all blobs and partials."""
        return sum(
            p.stat().st_size for p in [*(self.folder / "blobs").glob("*/*"), *(self.folder / "partial").glob("*")]
        )

    # A partial transfer: the file's length is how far it has come.

    def _partial(self, blob: bytes) -> Path:
        return self.folder / "partial" / blob.hex()

    def partial_bytes(self, blob: bytes) -> int:
        """How many leading bytes of an unfinished blob are here."""
        try:
            return self._partial(blob).stat().st_size
        except FileNotFoundError:
            return 0

    def append_partial(self, blob: bytes, offset: int, data: bytes) -> bool:
        """Add bytes at the end of a partial; False if `offset` is not its end (a duplicate or a gap)."""
        if offset != self.partial_bytes(blob):
            return False
        path = self._partial(blob)
        with disk_errors(path), path.open("ab", buffering=0) as file:  # a buffer would be written again by truncate()
            left = memoryview(data)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(offset)  # a write cut short by a full disk must not pass for progress
                raise
        return True

    def finish_partial(self, blob: bytes) -> bool:
        """Check a partial's hash and make it a blob; False (and it is discarded) if the hash is another."""
        path = self._partial(blob)
        if file_sha256(path) != blob:
            path.unlink()
            return False
        self.adopt(path)
        return True

    def drop_partial(self, blob: bytes) -> None:
        """Forget an unfinished transfer."""
        self._partial(blob).unlink(missing_ok=True)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder now, as the kernel lists it; where it does not, nobody does. Takes no lock itself."""
    try:
        inode = (folder / ".lock").stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any("FLOCK" in line and f":{inode} " in line for line in lines)


@contextlib.contextmanager
def answering_from(folder: Path) -> Iterator[None]:
    """Be known to a folder's agent as one that answers from it; several may be. Nobody knows where no file can be made."""
    import fcntl

    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            file = held.enter_context((folder / SERVING_FILE).open("a"))
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_answered_from(folder: Path) -> bool:
    """Whether a process that lives answers from a folder. Costs microseconds."""
    import fcntl

    try:
        with (folder / SERVING_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody ever has
        return False
    return False


@contextlib.contextmanager
def lock_folder(folder: Path, who: str) -> Iterator[None]:
    """Hold a folder for one process.

    Raises:
        UsageError: another process holds it.
    """
    import fcntl

    with disk_errors(folder):
        make_folder(folder, mode=0o700)
        file = (folder / ".lock").open("a")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{who} is running in {folder} already: stop it, or use another folder") from None
        yield
    finally:
        file.close()
