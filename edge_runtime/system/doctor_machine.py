"""What `edge-runtime doctor` checks of the machine: Python and its packages, disk, clock, swap, memory limits, heat.

A check is pure over a root folder, laid out as / is, and over what a probe said; the probes stand at the end. Not here: what
a device may use (`hardware.py`), the order of the checks (`doctor.py`). Imports those two.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

from edge_runtime.hardware import temperature
from edge_runtime.system.doctor import OK, UNKNOWN, WARNING, WRONG, Finding

MIB = 1 << 20
LEAST_BYTES, ENOUGH_BYTES = 256 * MIB, 1024 * MIB  # MiniLM-L6's state has 88 MiB, a new version and an update 41 each
HOT_C = 80.0  # a Pi slows down from here on
MOST_ERROR_US = 16_000_000  # the kernel's word for a clock that nobody keeps: what timedatectl goes by
OLDEST_S = 1_735_689_600.0  # 2025-01-01: no clock that is right is before this
LITTLE_SHARE = 0.5  # of swap in use
MEMORY_TYPES = ("tmpfs", "ramfs", "rootfs")
FAT_TYPES = ("vfat", "exfat", "msdos", "ntfs", "ntfs3", "fuseblk")
CMDLINES = ("boot/firmware/cmdline.txt", "boot/cmdline.txt")  # since Bookworm, before it
# y = x x, float32 (64, 64), as an ONNX file: opset 17, file format 8; made with onnx.helper
PRODUCT = (
    "08083a400a110a01780a017812017922064d61744d756c1201675a130a0178120e0a0c080112080a0208400a02084062130a0179120e0a0c"
    "080112080a0208400a02084042040a001011"
)
ONES = "import numpy as n; x = n.ones((64, 64), 'f4'); x @ x"
PACKAGES = {  # of the base install -> what it must be able to do
    "numpy": ONES,
    "onnxruntime": f"{ONES}; import onnxruntime as o; o.InferenceSession(bytes.fromhex('{PRODUCT}')).run(None, {{'x': x}})",
    "tokenizers": "import tokenizers",
    "psutil": "import psutil; psutil.virtual_memory()",
    "msgpack": "import msgpack; msgpack.packb({})",
    "paho-mqtt": "import paho.mqtt.client",
}
OPTIONAL = {"torch": "import torch; x = torch.ones(64, 64); x @ x"}
RUN_ON_PI4 = {  # tried under QEMU as a Cortex-A72: docs/arm.md
    "onnxruntime": ": pip install --upgrade onnxruntime",
    "torch": ", on a Raspberry Pi 4 torch==2.9.1",
}
THROTTLED = {  # bits of `vcgencmd get_throttled`; each 16 higher: so it was since the boot
    0: "too low a voltage",
    1: "a capped frequency",
    2: "throttling",
    3: "the soft temperature limit",
}


def interpreter(version: tuple[int, int], machine: str, libc: str) -> Finding:
    """Python's version and build; one of 32 bits does not come here (`start.py`). Args: libc: as platform.libc_ver names it."""
    found = f"{version[0]}.{version[1]}, {machine}, {libc or 'no glibc'}"
    check = "Python"
    if libc != "glibc":
        return Finding(check, WARNING, found, "onnxruntime's wheels need glibc: use Debian, Ubuntu or Raspberry Pi OS")
    if not (3, 10) <= version <= (3, 13):
        return Finding(check, WARNING, found, "edge-runtime is tested with Python 3.10 to 3.13: use one of these")
    return Finding(check, OK, found)


def packages(versions: Mapping[str, str], attempt: Callable[[str], tuple[int, str]]) -> Iterator[Finding]:
    """Whether what the base install brings is here and works, torch too where it is installed.

    Args:
        versions: by package, of those that are installed.
        attempt: runs a line of Python in a process of its own; -> (exit status, its last words).
    """
    sound = []
    for name, code in {**PACKAGES, **OPTIONAL}.items():
        if name not in versions:
            if name in PACKAGES:
                advice = f"install it into this environment: pip install {name}"
                yield Finding(name, WRONG, "is not installed", advice)
            continue
        status, words = attempt(code)
        shown = f"{name} {versions[name]}"
        if status == 0:
            sound.append(shown)
        elif status == -signal.SIGILL:
            advice = f"this wheel has instructions that the processor lacks: install another version of {name}"
            yield Finding(name, WRONG, f"{shown} dies with SIGILL", advice + RUN_ON_PI4.get(name, ""))
        else:
            advice = f"it may be another machine's wheel: pip install --force-reinstall --no-cache-dir {name}"
            yield Finding(name, WRONG, f"{shown} does not work: {words[:200] or f'ended with {status}'}", advice)
    if sound:
        yield Finding("packages", OK, ", ".join(sound))


def state_folder(root: Path, state: Path, *, writable: bool | None) -> Finding:
    """Whether what is written to the state folder stays there.

    Args:
        writable: by this user, the folder or where it will be; None: it is another user's, as the service's is.
    """
    check = "state folder"
    place, kind, options = _mount_of(root, state)
    found = f"{state}, {kind} on {place}" if kind else str(state)
    if "ro" in options:
        advice = "mount it writable; an SD card that fails turns read-only by itself: look at dmesg, replace it"
        return Finding(check, WRONG, f"{found}, read-only", advice)
    if kind in MEMORY_TYPES:
        return Finding(check, WRONG, f"{found}, in memory", "all is lost at a reboot: name a folder on a disk, --state")
    if writable is None:
        return Finding(check, UNKNOWN, f"{found}, another user's", "run this with sudo")
    if not writable:
        return Finding(check, WRONG, f"{found}, not writable by this user", "name another folder, --state")
    if kind == "overlay":
        advice = (
            "an overlay's changes end with the container, or the boot where the root is read-only: put it on a volume"
        )
        return Finding(check, WARNING, found, advice)
    if kind in FAT_TYPES:
        return Finding(check, WARNING, found, "this file system keeps no permissions: use ext4 for private data")
    return Finding(check, OK if kind else UNKNOWN, found)


def _mount_of(root: Path, path: Path) -> tuple[str, str, list[str]]:
    """-> (mount point, type, options) of the file system that holds `path`; empty where /proc does not say."""
    best: tuple[str, str, list[str]] = ("", "", [])
    for line in _lines(root / "proc/self/mounts"):
        fields = line.split()
        if len(fields) >= 4:
            place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
            if Path(place) in (path, *path.parents) and len(place) >= len(best[0]):  # a later one covers the earlier
                best = (place, fields[2], fields[3].split(","))
    return best


def disk_room(free: int | None, folder: Path) -> Finding:
    """Whether a model, its next version and an update have room."""
    check = "disk room"
    if free is None:
        return Finding(check, UNKNOWN, f"{folder} cannot be asked")
    found = f"{free // MIB} MiB free in {folder}"
    advice = "free some, for example with apt-get clean and journalctl --vacuum-size=50M, or use another disk"
    if free < ENOUGH_BYTES:
        return Finding(check, WRONG if free < LEAST_BYTES else WARNING, found, advice)
    return Finding(check, OK, found)


def clock(root: Path, now_s: float, error_us: int | None, *, tls: bool) -> Finding:
    """Whether somebody keeps the clock. Args: error_us: the kernel's maximal error; None: it does not say."""
    check = "clock"
    found = datetime.fromtimestamp(now_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    advice = "sudo timedatectl set-ntp true; where that is not to be had, install systemd-timesyncd or chrony"
    if now_s < OLDEST_S:
        more = ": no certificate is valid yet" if tls else ""
        return Finding(check, WRONG, f"{found}, which is long past{more}", advice)
    if (root / "run/systemd/timesync/synchronized").exists() or (error_us is not None and error_us < MOST_ERROR_US):
        return Finding(check, OK, f"{found}, synchronised")
    if error_us is None:
        return Finding(check, UNKNOWN, f"{found}; nothing tells whether it is synchronised")
    return Finding(check, WARNING, f"{found}, not synchronised", advice)


def swap(root: Path) -> Finding:
    """What swap there is. Budgets never count it, so it helps no training, and on an SD card it wears and slows."""
    check = "swap"
    rows = [line.split() for line in _lines(root / "proc/swaps")[1:]]
    rows = [row for row in rows if len(row) >= 4 and row[2].isdecimal() and row[3].isdecimal()]
    if not rows:
        known = (root / "proc/swaps").exists()
        return Finding(check, OK if known else UNKNOWN, "none" if known else "/proc/swaps is not here")
    found = ", ".join(f"{row[0]} {int(row[2]) >> 10} MiB, {int(row[3]) >> 10} used" for row in rows)
    if sum(int(row[3]) for row in rows) > LITTLE_SHARE * sum(int(row[2]) for row in rows):
        advice = "the machine is short of memory without any training: end what is not needed, lower --memory"
        return Finding(check, WARNING, found, advice)
    if all("zram" in row[0] for row in rows):
        return Finding(check, OK, f"{found} (memory that is compressed: no budget counts it)")
    slow = any(row[1] == "file" or "mmcblk" in row[0] for row in rows)
    advice = (
        "swap on an SD card is slow and wears it: sudo systemctl disable --now dphys-swapfile, or swapoff; prefer zram"
    )
    return Finding(check, WARNING if slow else OK, found, advice if slow else "")


def memory_limits(root: Path) -> Finding:
    """Whether cgroups can limit memory here. Raspberry Pi OS boots with cgroup_disable=memory."""
    check = "memory cgroup"
    unified = root / "sys/fs/cgroup/cgroup.controllers"
    listed = [line.split() for line in _lines(root / "proc/cgroups")]
    enabled = {fields[0]: fields[-1] for fields in listed if len(fields) == 4}
    if (root / "sys/fs/cgroup/memory").is_dir() or "memory" in " ".join(_lines(unified)).split():
        return Finding(check, OK, "limits of memory work")
    if enabled.get("memory") == "1" or (not unified.exists() and "memory" not in enabled):
        return Finding(check, UNKNOWN, "not to be seen from here, as in a container")
    found = "switched off: neither the service's MemoryMax nor a limit of training's own works"
    name = next((name for name in CMDLINES if (root / name).exists()), "")
    words = " ".join(_lines(root / name)).split() if name else []
    if "cgroup_disable=memory" in words:
        return Finding(check, WARNING, found, f"take cgroup_disable=memory out of /{name} and reboot")
    if "cgroup_enable=memory" in " ".join(_lines(root / "proc/cmdline")).split():
        advice = "the kernel does not heed cgroup_enable=memory, as Raspberry Pi's 6.12.34 and other distributions' kernels: update it"
        return Finding(check, WARNING, found, advice)  # raspberrypi/linux issue 6980 and pull request 7442
    if "cgroup_enable=memory" in words:
        return Finding(check, WARNING, found, f"/{name} has cgroup_enable=memory already: reboot")
    where = f"the one line of /{name}" if name else "the kernel's command line"
    return Finding(check, WARNING, found, f"add cgroup_enable=memory to {where} and reboot")


def throttling(root: Path, vcgencmd: str | None) -> Finding:
    """Whether heat or a weak supply slows the machine down. Args: vcgencmd: what its get_throttled printed, if it is here."""
    check = "heat and power"
    said = vcgencmd or "".join(_lines(root / "sys/devices/platform/soc/soc:firmware/get_throttled"))
    degrees = temperature(root)
    found = f"{degrees:.0f} C" if degrees is not None else "no thermal sensor"
    cool = "give it a heat sink or a fan, and more air; the board's own power supply where the voltage is too low"
    if bits := re.fullmatch(r"\s*(?:throttled=)?(?:0x)?([0-9a-fA-F]+)\s*", said):
        value = int(bits[1], 16)
        now = [what for bit, what in THROTTLED.items() if value >> bit & 1]
        before = [what for bit, what in THROTTLED.items() if value >> bit + 16 & 1]
        if now:
            return Finding(check, WRONG, f"{found}, now {' and '.join(now)}", cool)
        if before:
            return Finding(check, WARNING, f"{found}, since the boot there was {' and '.join(before)}", cool)
        return Finding(check, OK, f"{found}, never throttled since the boot")
    if slowed := _slowed(root):
        return Finding(check, WRONG, f"{found}, slowed down now by {', '.join(slowed)}", cool)
    if degrees is None:
        return Finding(check, UNKNOWN, found)
    hot = degrees >= HOT_C
    return Finding(check, WARNING if hot else OK, f"{found}, not slowed down", cool if hot else "")


def _slowed(root: Path) -> list[str]:
    """Cooling by slowing a processor down that is under way; fans are no harm."""
    found = []
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        kind, state = "".join(_lines(device / "type")), "".join(_lines(device / "cur_state"))
        if re.search(r"cpu|gpu|processor", kind, re.IGNORECASE) and state.isdecimal() and int(state) > 0:
            found.append(kind)
    return found


def _lines(file: Path) -> list[str]:
    """A small text's lines; none where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


# probes


def installed() -> dict[str, str]:
    """Versions of the packages that are looked at, where they are installed."""
    found = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def try_package(code: str) -> tuple[int, str]:
    """Run a line of Python in a process of its own, which a wrong wheel may kill; -> (exit status, its last words)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, "it did not end within two minutes"
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def free_bytes(folder: Path) -> int | None:
    """What a user who is not root may still write there."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def clock_error_us() -> int | None:
    """The most that the clock may be off, as the kernel says: adjtimex(2), which changes nothing with modes = 0."""
    timex = ctypes.create_string_buffer(512)  # more than any struct timex
    try:
        if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
            return None
    except (AttributeError, OSError):
        return None
    return int(struct.unpack_from("Illl", timex)[3])  # modes, offset, freq, maxerror


def ask_vcgencmd() -> str | None:
    """What `vcgencmd get_throttled` prints on a Raspberry Pi; None elsewhere, and for users who may not ask."""
    try:
        done = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S607 - in /usr/bin or not
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
