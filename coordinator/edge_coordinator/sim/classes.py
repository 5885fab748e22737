"""Device classes: what a virtual device has of memory, compute and network, and how often it is there. Pure but for one file.

Where the built-in figures are from stands in `docs/simulation.md`; a TOML file brings one's own. Imports the runtime's
budget parser and errors.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.budget import parse_bytes, parse_seconds
from edge_runtime.errors import UsageError
from edge_runtime.records import Budget
from edge_runtime.topics import check_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GIB = 1 << 30
Made = TypeVar("Made")
# LEGEND (arXiv 2412.20004): 1 to 3 MB/s up, 15 MB/s down.
UPLINK, DOWNLINK = (1e6, 3e6), 15e6
AGX_GFLOPS = 2 * 512 * 1.377  # float32: multiply and add in each of 512 CUDA cores, at NVIDIA's 1377 MHz


@dataclass(frozen=True)
class DeviceClass:
    """One kind of device.

    Attributes:
        memory_bytes: what training may hold at its peak, the device's own budget.
        gflops: float32 GFLOP/s at which it trains a block; None trains as fast as this machine.
        uplink_bytes_per_s: lowest and highest; each device has its own between them.
        availability: the share of rounds in which a device is online.
        time_s, upload_bytes: further budgets, as of `edge-runtime join`; None is no limit.
    """

    name: str
    memory_bytes: int
    gflops: float | None
    uplink_bytes_per_s: tuple[float, float] = UPLINK
    downlink_bytes_per_s: float = DOWNLINK
    availability: float = 1.0
    time_s: float | None = None
    upload_bytes: int | None = None

    @property
    def strength(self) -> tuple[float, int]:
        """What orders classes from weak to strong: speed, then memory."""
        return self.gflops if self.gflops is not None else math.inf, self.memory_bytes


@dataclass(frozen=True)
class OwnBudget:
    """What one device has instead of its class's budgets; None is the class's."""

    memory_bytes: int | None = None
    time_s: float | None = None
    upload_bytes: int | None = None

    def instead_of(self, kind: DeviceClass) -> Budget:
        """The device's budgets."""
        time_s = kind.time_s if self.time_s is None else self.time_s
        upload_bytes = kind.upload_bytes if self.upload_bytes is None else self.upload_bytes
        return Budget(self.memory_bytes or kind.memory_bytes, time_s, upload_bytes)


def _built_in(name: str, ram_bytes: int, gflops: float) -> DeviceClass:
    """Half of the RAM for training: a setting of ours, as a person might set `--memory 50%`, and no measurement."""
    return DeviceClass(name, ram_bytes // 2, gflops)


# Raspberry Pi: HPL in float64 times two, since a vector unit holds twice as many float32 (sources: docs/simulation.md).
# Jetson: AGX by its cores and clock, the others by LEGEND's step times 2.6 : 1.4 : 1.
BUILT_IN: Mapping[str, DeviceClass] = {
    c.name: c
    for c in (
        _built_in("pi-zero-2w", GIB // 2, 2 * 5.1),
        _built_in("pi-3", GIB, 2 * 5.1 * 1.2),  # the same four Cortex-A53 cores, at 1.2 GHz instead of 1.0
        _built_in("pi-4", 4 * GIB, 2 * 11.889),
        _built_in("pi-5", 8 * GIB, 2 * 30.249),
        _built_in("jetson-tx2", 8 * GIB, AGX_GFLOPS / 2.6),
        _built_in("jetson-nx", 8 * GIB, AGX_GFLOPS / 1.4),
        _built_in("jetson-agx", 32 * GIB, AGX_GFLOPS),
    )
}
DEVICE = re.compile(r"device-\d+")  # a section of this name is no class but one device's own budgets
BUDGET_KEYS = ("memory", "time", "upload")
KEYS = ("memory", "gflops", "uplink", "downlink", "availability", "time", "upload")
RANGES = {"gflops": (1e-3, 1e9), "uplink": (1.0, 1e12), "downlink": (1.0, 1e12), "availability": (1e-3, 1.0)}


def read_classes(path: Path | None) -> dict[str, DeviceClass]:
    """The built-in classes and those of a TOML file, which may name a built-in one to replace it.

    Raises:
        UsageError: the file cannot be read, or a value is wrong; names class and key.
    """
    found = dict(BUILT_IN)
    for name, values in _sections(path).items():
        if not DEVICE.fullmatch(name):
            check_id("device class", name)
            found[name] = _read(path, name, values, _one_class)
    return found


def read_budgets(path: Path | None) -> dict[str, OwnBudget]:
    """The devices that have budgets of their own in a class file, by name. Raises: UsageError: as `read_classes`."""
    sections = _sections(path).items()
    return {name: _read(path, name, values, _own_budget) for name, values in sections if DEVICE.fullmatch(name)}


def _sections(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from None
    for name, values in raw.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {name} must be a section: [{name}]")
    return raw


def _read(
    path: Path | None, name: str, values: Mapping[str, Any], make: Callable[[str, Mapping[str, Any]], Made]
) -> Made:
    try:
        return make(name, values)
    except UsageError as error:
        raise UsageError(f"{path}: [{name}] {error}") from None


def _own_budget(name: str, values: Mapping[str, Any]) -> OwnBudget:
    for key in values:
        if key not in BUDGET_KEYS:
            raise UsageError(f"has no {key!r}; a device has {', '.join(BUDGET_KEYS)}")
    return OwnBudget(
        _memory(values) if "memory" in values else None,
        parse_seconds(str(values["time"])) if "time" in values else None,
        parse_bytes(str(values["upload"])) if "upload" in values else None,
    )


def _one_class(name: str, values: Mapping[str, Any]) -> DeviceClass:
    for key in values:
        if key not in KEYS:
            raise UsageError(f"has no {key!r}; it has {', '.join(KEYS)}")
    if "memory" not in values:
        raise UsageError('needs memory, for example memory = "450MB"')
    uplink = values.get("uplink", list(UPLINK))
    low, high = uplink if isinstance(uplink, list) and len(uplink) == 2 else (uplink, uplink)
    links = (_per_second("uplink", low), _per_second("uplink", high))
    if links[0] > links[1]:
        raise UsageError(f"uplink {uplink!r} must be [lowest, highest]")
    availability = _number("availability", values.get("availability", 1.0))
    return DeviceClass(
        name,
        _memory(values),
        _number("gflops", values["gflops"]) if "gflops" in values else None,
        links,
        _per_second("downlink", values.get("downlink", DOWNLINK)),
        availability,
        parse_seconds(str(values["time"])) if "time" in values else None,
        parse_bytes(str(values["upload"])) if "upload" in values else None,
    )


def _memory(values: Mapping[str, Any]) -> int:
    size = parse_bytes(str(values["memory"]))
    if not size:
        raise UsageError("memory must be above 0: a device without any trains nothing")
    return size


def _per_second(key: str, value: object) -> float:
    """Bytes a second, as a number or a size."""
    return _number(key, float(parse_bytes(value)) if isinstance(value, str) else value)


def _number(key: str, value: object) -> float:
    low, high = RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UsageError(f"{key} must be a number from {low:g} to {high:g}, it is {str(value)[:40]!r}")
    return float(value)


def parse_shares(text: str, known: Mapping[str, DeviceClass]) -> list[tuple[DeviceClass, float]]:
    """ "pi-4:2,pi-5:1" -> these classes and their shares; a class without a number has share 1.

    Raises:
        UsageError: an unknown class, one named twice, or a share that is no number above 0.
    """
    found: dict[str, tuple[DeviceClass, float]] = {}
    for item in text.split(","):
        name, colon, share = item.strip().partition(":")
        if name not in known:
            raise UsageError(f"there is no device class {name!r}; there are {', '.join(known)}")
        if name in found:
            raise UsageError(f"the device class {name} is named twice")
        try:
            number = float(share) if colon else 1.0
        except ValueError:
            number = 0.0
        if not 0 < number < 1e9:
            raise UsageError(f"the share of {name} must be a number above 0, it is {share!r}")
        found[name] = (known[name], number)
    return list(found.values())


def deal(shares: Sequence[tuple[DeviceClass, float]], num_devices: int, order: Sequence[int]) -> list[DeviceClass]:
    """A class for each device: so many of each as its share says, given out in `order` (a permutation of the devices)."""
    total = math.fsum(share for _, share in shares)
    exact = [num_devices * share / total for _, share in shares]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: num_devices - sum(counts)]:
        counts[i] += 1
    flat = [kind for (kind, _), count in zip(shares, counts, strict=True) for _ in range(count)]
    found = [flat[0]] * num_devices
    for device, kind in zip(order, flat, strict=True):
        found[device] = kind
    return found
