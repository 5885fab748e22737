"""What this machine can do now: memory (and the cgroup's limit where it is lower), cores, speed, temperature, battery.

Reads /proc and /sys by itself where psutil ignores cgroups; numpy is imported only by the speed probe. Measures; does
not decide. `root` parameters exist so that a test can lay out a file system of its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from edge_runtime.records import DeviceProfile

NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def profile(*, speed: bool = True) -> DeviceProfile:
    """Measure this machine. The speed probe takes about a second and 40 MB; without it, speeds are 0."""
    import psutil

    memory = psutil.virtual_memory()
    limit, available = cgroup_memory()
    gflops, bandwidth = measure_speed() if speed else (0.0, 0.0)
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return DeviceProfile(
        ram_total_bytes=memory.total,
        ram_available_bytes=memory.available,
        cgroup_limit_bytes=limit,
        cgroup_available_bytes=available,
        cores=usable_cores(),
        gflops=gflops,
        memory_gb_per_s=bandwidth,
        temperature_c=temperature(),
        battery_percent=float(battery.percent) if battery else None,
        plugged_in=battery.power_plugged if battery else None,
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def temperature(root: Path = Path("/")) -> float | None:
    """The hottest thermal zone in degrees Celsius, or None."""
    readings = []
    for file in root.glob("sys/class/thermal/thermal_zone*/temp"):
        try:
            readings.append(int(file.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    plausible = [r for r in readings if -50 < r < 150]
    return max(plausible) if plausible else None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(file: Path, keys: tuple[str, ...]) -> int:
    """File pages that the kernel gives back under pressure."""
    try:
        stat = dict(line.split() for line in file.read_text().splitlines() if len(line.split()) == 2)
    except OSError:
        return 0
    return sum(int(stat.get(key, 0)) for key in keys)


def memory_cgroups(root: Path = Path("/")) -> list[tuple[Path, int]]:
    """The memory cgroups of this process, itself first, then its ancestors, each with its version (1 or 2)."""
    found: list[tuple[Path, int]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, version = mounts / "memory", 1
        elif controllers == "":
            base, version = (mounts / "unified" if (mounts / "unified").is_dir() else mounts), 2
        else:
            continue
        folder = base / path.lstrip("/")
        if ".." in folder.parts or not folder.is_dir():  # in a container the path is the host's, the mount already ours
            folder = base
        while folder == base or base in folder.parents:
            found.append((folder, version))
            folder = folder.parent
    return found


def room(*, skip_own: bool) -> tuple[int, int]:
    """-> (the most that there may be, what is left of it now) for this process, in bytes.

    Without its own cgroup if that is set up for it alone. Reads a few small files, for asking often.
    """
    import psutil

    memory = psutil.virtual_memory()
    limit, left = cgroup_memory(skip=1 if skip_own else 0)
    most = memory.total if limit is None else min(limit, memory.total)
    return most, memory.available if left is None else min(left, memory.available)


def cgroup_memory(root: Path = Path("/"), skip: int = 0) -> tuple[int | None, int | None]:
    """-> (the lowest memory limit of this process's cgroups, what is left below the tightest), in bytes, or None.

    `skip` leaves out that many, the innermost first.
    """
    limits: list[int] = []
    room: list[int] = []
    for folder, version in memory_cgroups(root)[skip:]:
        if version == 1:
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            given_back = _reclaimable(folder / "memory.stat", ("total_inactive_file", "total_active_file"))
        else:
            high = _number(folder / "memory.high")
            limit = min((x for x in (_number(folder / "memory.max"), high) if x is not None), default=None)
            used = _number(folder / "memory.current")
            given_back = _reclaimable(folder / "memory.stat", ("inactive_file", "active_file"))
        if limit is None or limit > NO_LIMIT:
            continue
        limits.append(limit)
        room.append(max(0, limit - max(0, (used or 0) - given_back)))
    return (min(limits), min(room)) if limits else (None, None)


def measure_speed(seconds: float = 0.6) -> tuple[float, float]:
    """-> (GFLOP/s of float32 matrix products of a transformer block's shape, GB/s of a copy).

    The median of repeated runs for at least `seconds` each, after a warm-up, on as many threads as numpy's BLAS uses.
    """
    import numpy as np

    tokens, width, inner = 512, 384, 1536  # one feed-forward product of MiniLM
    left, right = np.full((tokens, width), 0.5, np.float32), np.full((width, inner), 0.5, np.float32)
    out = np.empty((tokens, inner), np.float32)
    product_s = _median_seconds(lambda: np.matmul(left, right, out=out), seconds)
    source, target = (
        np.ones(8 << 20, np.float32),
        np.empty(8 << 20, np.float32),
    )  # 32 MiB each: beyond a small chip's caches
    copy_s = _median_seconds(lambda: np.copyto(target, source), seconds / 2)
    return 2 * tokens * width * inner / product_s / 1e9, 2 * source.nbytes / copy_s / 1e9


def _median_seconds(work: object, seconds: float) -> float:
    assert callable(work)
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def process_memory(pid: int | str = "self") -> dict[str, int]:
    """VmHWM, VmRSS, RssAnon and VmSwap of a process in bytes; empty when it is gone or this is no Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    wanted = ("VmHWM", "VmRSS", "RssAnon", "VmSwap")
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in wanted}


def reset_peak() -> None:
    """Let this process's VmHWM begin anew (Linux); a no-op where that is not possible."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
