"""What the conditions for training look at: other programs' use of the processors, power, heat, time, load, free memory.

Reads a few small files of /proc and /sys under a root that a test can lay out; what training itself takes is left out
of each. Decides nothing (`conditions.py`). Keeps samples of some seconds.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.conditions import Readings
from edge_runtime.hardware import cgroup_memory, temperature

WINDOW_S = 10.0  # of which the use of the processors is told
LEAST_S = 0.5  # between two looks, for it to be told at all
LOAD_S = 60.0  # the kernel's load average forgets with e^(-t / LOAD_S)


@dataclass(frozen=True)
class Own:
    """Our training, which no condition counts.

    Attributes:
        pid: of its process; 0 where there is none now.
        peak_bytes: what it will hold.
    """

    pid: int = 0
    peak_bytes: int = 0


class Sensors:
    """One device's readings."""

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._clock = root, clock
        self._looks: deque[tuple[float, int, int]] = deque()  # (seconds, ticks of all processors, of them others')
        self._own_load, self._load_at = 0.0, clock()
        self._busy_share(0)

    def read(self, own: Own = Own()) -> Readings:
        """What the machine says now."""
        now = time.localtime()
        return Readings(
            busy_share=self._busy_share(own.pid),
            charging=charging(self._root),
            temperature_c=temperature(self._root),
            minute=60 * now.tm_hour + now.tm_min,
            load=self._load(own.pid),
            free_bytes=self._free_bytes(own),
        )

    def settled(self) -> Readings:
        """What the machine says, the use of its processors too; takes `LEAST_S`."""
        time.sleep(LEAST_S)
        return self.read()

    def lacks(self, name: str) -> str:
        """Why this machine can never say what a condition looks at; empty where it can."""
        files = {"idle": "stat", "load": "loadavg", "free-memory": "meminfo"}
        if name == "temperature" and temperature(self._root) is None:
            return "this device has no thermal sensor"
        if name in files and not (self._root / "proc" / files[name]).exists():
            return f"this system has no /proc/{files[name]}"
        return ""

    def _busy_share(self, pid: int) -> float | None:
        """Others' share of all processors' time. Ours: this process, the children that have ended, and the training."""
        fields = _words(self._root / "proc/stat")[1:9]  # user nice system idle iowait irq softirq steal
        if len(fields) < 8:
            return None
        ticks = [int(n) for n in fields]
        total, idle = sum(ticks[:7]), ticks[3] + ticks[4]
        ours = sum(_ticks(self._root / "proc/self/stat", 4)) + sum(_ticks(self._root / f"proc/{pid}/stat", 2))
        now = self._clock()
        self._looks.append((now, total, total - idle - ours))
        while len(self._looks) > 2 and self._looks[1][0] <= now - WINDOW_S:
            self._looks.popleft()
        since, total_before, others_before = self._looks[0]
        if now - since < LEAST_S or total <= total_before:
            return None
        return min(1.0, max(0.0, (total - idle - ours - others_before) / (total - total_before)))

    def _load(self, pid: int) -> float | None:
        """The load average of the last minute, less what the training's threads add to it."""
        now = self._clock()
        keep = math.exp(-(now - self._load_at) / LOAD_S)
        self._load_at = now
        self._own_load = keep * self._own_load + (1 - keep) * (self._running(pid) if pid else 0)
        words = _words(self._root / "proc/loadavg")
        return max(0.0, float(words[0]) - self._own_load) if words else None

    def _running(self, pid: int) -> int:
        """Threads of a process that run or want to."""
        states = (_after_name(file)[:1] for file in self._root.glob(f"proc/{pid}/task/*/stat"))
        return sum(state in (["R"], ["D"]) for state in states)

    def _free_bytes(self, own: Own) -> int | None:
        """What would be left to others with the training in memory, within the cgroup's limit too."""
        lines = [line.split() for line in _text(self._root / "proc/meminfo").splitlines()]
        found = {line[0]: int(line[1]) * 1024 for line in lines if len(line) > 1 and line[1].isdecimal()}
        if "MemAvailable:" not in found:
            return None
        _, in_cgroup = cgroup_memory(self._root)
        free = found["MemAvailable:"] if in_cgroup is None else min(found["MemAvailable:"], in_cgroup)
        return free + self._held_bytes(own.pid) - own.peak_bytes

    def _held_bytes(self, pid: int) -> int:
        lines = _text(self._root / f"proc/{pid}/status").splitlines() if pid else []
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def charging(root: Path) -> bool | None:
    """Whether the device runs from the mains; so does one without a battery. None: its battery does not say."""
    supplies = {folder: _text(folder / "type") for folder in sorted(root.glob("sys/class/power_supply/*"))}
    batteries = [
        f for f, kind in supplies.items() if kind == "Battery" and _text(f / "scope") != "Device"
    ]  # no mouse's
    batteries = [f for f in batteries if _text(f / "present") != "0"]
    if not batteries:
        return True
    plugs = [_text(folder / "online") for folder, kind in supplies.items() if kind not in ("Battery", "UPS")]
    if any(online not in ("", "0") for online in plugs):
        return True
    states = {_text(folder / "status") for folder in batteries}
    if states & {"Charging", "Full", "Not charging"}:
        return True
    return False if plugs or "Discharging" in states else None


def _text(file: Path) -> str:
    """A small file's text; empty where it cannot be read."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _words(file: Path) -> list[str]:
    lines = _text(file).splitlines()
    return lines[0].split() if lines else []


def _after_name(file: Path) -> list[str]:
    """The words of a process's stat behind its name, which may have any characters; the first is its state."""
    return _text(file).rpartition(")")[2].split()


def _ticks(file: Path, count: int) -> list[int]:
    """utime, stime, and of the children that have ended cutime, cstime: the first `count` of them."""
    return [int(n) for n in _after_name(file)[11 : 11 + count]]
