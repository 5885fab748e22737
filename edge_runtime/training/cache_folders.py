"""The folders of prefix caches: private, held by one process at a time, bounded on disk, deletable.

A cache is a folder `<cache>/prefixes/<key>` with two files, whose content `prefix_cache.py` knows. Nothing here reads it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from edge_runtime.errors import StoreError

FOLDER, FEATURES, MARKS = "prefixes", "features.f16", "marks"
MAX_BYTES = 2 << 30  # of all caches of a device
IN_MEMORY = ("tmpfs", "ramfs", "rootfs", "devtmpfs")


def free_share(root: Path) -> int:
    """What all caches below a folder may take: a quarter of the disk's free space and theirs, at most MAX_BYTES."""
    try:
        disk = os.statvfs(root)
    except OSError:
        return 0
    own = sum(f.stat().st_blocks * 512 for f in (root / FOLDER).glob("*/*") if f.is_file())
    return min(MAX_BYTES, (disk.f_bavail * disk.f_frsize + own) // 4)


def evict(root: Path, max_bytes: int, keep: str) -> None:
    """Delete the caches that were not used for longest until all take at most `max_bytes`; never `keep` or one in use."""
    for _, folder in sorted((_last_use(folder), folder) for folder in _caches(root)):
        if used_bytes(root) <= max_bytes:
            return
        if folder.name != keep:
            with suppress(OSError):
                held = lock(folder)
                if held is not None:
                    try:
                        remove(folder)
                    finally:
                        os.close(held)


def delete_all(root: Path) -> None:
    """Delete every cache below the cache folder `root`; a process that has one open loses it when it closes it.

    Raises:
        StoreError: something is left.
    """
    try:
        shutil.rmtree(root / FOLDER)
    except FileNotFoundError:
        if (root / FOLDER).exists():  # what vanished was inside: another process deletes, too
            delete_all(root)
    except OSError as error:
        raise StoreError(f"cannot delete {root / FOLDER} ({error}): it holds what training texts became") from error


def in_memory(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether files at `path`, or at what exists of it, would take memory: tmpfs, zram, or an overlay that writes to one.

    True also where the system does not tell. The file's format is in proc_pid_mountinfo(5).
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        device = path.stat().st_dev
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return True
    for line in lines:
        place, _, system = line.partition(" - ")
        kind, source, options = (*system.split(" "), "", "", "")[:3]
        if place.split(" ")[2:3] != [f"{os.major(device)}:{os.minor(device)}"]:
            continue
        if kind in IN_MEMORY or source.startswith("/dev/zram"):
            return True
        upper = next((Path(o[9:]) for o in options.split(",") if o.startswith("upperdir=")), None)
        if kind == "overlay" and upper and upper.exists() and upper.stat().st_dev != device:
            return in_memory(upper, mounts)
    return False


def private_folder(folder: Path) -> None:
    """Make a folder and the one above for the owner alone."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    for path in (folder.parent, folder):
        os.chmod(path, 0o700)


def open_private(path: Path) -> int:
    """A descriptor of a file that its owner alone can read. An OSError where the file system knows no such thing (FAT)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        if os.fstat(descriptor).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PermissionError(errno.EPERM, "others can read it", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def lock(folder: Path) -> int | None:
    """The cache's marks, held for one process, or None if another has them. Closing the descriptor lets go."""
    import fcntl

    descriptor = open_private(folder / MARKS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder / MARKS)):  # else it was deleted before we had it
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def remove(folder: Path) -> None:
    """Delete a cache whose lock we hold: the marks last, because they are the lock."""
    for name in (FEATURES, MARKS):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _caches(root: Path) -> list[Path]:
    """The folders of all caches."""
    try:
        return [path for path in (root / FOLDER).iterdir() if path.is_dir()]
    except OSError:
        return []


def _last_use(folder: Path) -> float:
    try:
        return (folder / MARKS).stat().st_mtime
    except OSError:
        return 0.0


def used_bytes(root: Path, *, but: str = "") -> int:
    """Bytes that all caches together take when they are full."""
    total = 0
    for folder in _caches(root):
        for name in (FEATURES, MARKS):
            with suppress(OSError):
                total += (folder / name).stat().st_size if folder.name != but else 0
    return total


def free_bytes(descriptor: int) -> int:
    system = os.fstatvfs(descriptor)
    return system.f_bavail * system.f_frsize
