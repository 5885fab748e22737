"""Budgets as people write them ("450MB", "60%", "auto") and as the planner wants them: bytes. Pure."""

from __future__ import annotations

import re
from dataclasses import replace

from edge_runtime.errors import UsageError
from edge_runtime.records import DeviceProfile

AGENT_RESERVE_BYTES = 48 << 20  # for the agent beside its training process; a test holds the agent to it
RESERVE_BYTES, RESERVE_SHARE = (
    16 << 20,
    0.03,
)  # what an automatic budget leaves free, of the memory there may be at most
STEP_BYTES = 8 << 20  # automatic budgets are rounded down to this, so that small fluctuations do not change the plan
MAX_BYTES, MAX_SECONDS = 1 << 50, 1e9  # as on the wire
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
}
UNIT_NAMES = "B, KB, MB, GB (of 1000), KiB, MiB, GiB or K, M, G (of 1024)"
LEAST_BYTES = 1 << 20  # a number without a unit below this was meant as megabytes
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*\Z", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """ "450MB" -> 450_000_000, "450MiB" -> 471_859_200, "450000000" -> 450_000_000.

    Raises:
        UsageError: it is no size, or a small number without a unit.
    """
    match = SIZE.match(text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(
            f"{text!r} is not a size: write for example 450MB, 1.5GiB or a number of bytes; units are {UNIT_NAMES}"
        )
    size = float(match[1]) * unit
    if not match[2] and 0 < size < LEAST_BYTES:
        raise UsageError(f"{text.strip()[:40]} without a unit is bytes; did you mean {text.strip()[:40]}MB?")
    if size > MAX_BYTES:
        raise UsageError(f"{text[:40]!r} is more than any device has")
    return int(size)


def parse_seconds(text: str) -> float:
    """ "90", "90s", "15m" or "2h" -> seconds.

    Raises:
        UsageError: it is no duration.
    """
    match = re.match(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*\Z", text)
    if match is None:
        raise UsageError(f"{text!r} is not a duration: write for example 90s, 15m or 2h; units are s, m and h")
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if seconds > MAX_SECONDS:
        raise UsageError(f"{text[:40]!r} is longer than anybody waits")
    return seconds


def memory_budget(text: str, profile: DeviceProfile) -> int:
    """What the training process may hold at its peak.

    "auto" is what is available now less a reserve, and below the limit less the agent; "N%" is a share of what is available;
    a size is taken as it is, but never more than is available.

    Raises:
        UsageError: it is none of them.
    """
    available = profile.memory_available_bytes
    if text == "auto":
        room = min(profile.memory_limit_bytes - AGENT_RESERVE_BYTES, available) - reserve_bytes(
            profile.memory_limit_bytes
        )
        return max(0, room // STEP_BYTES * STEP_BYTES)
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise UsageError(f"{text!r} must be above 0% and at most 100%")
        return int(available * share) // STEP_BYTES * STEP_BYTES
    size = parse_bytes(text)
    if size == 0:
        raise UsageError("no memory is no budget: write for example 300MB, or auto")
    return min(size, available)


def keeping_free(profile: DeviceProfile, num_bytes: int) -> DeviceProfile:
    """A machine of whose available memory so much is not for training."""
    in_cgroup = profile.cgroup_available_bytes
    return replace(
        profile,
        ram_available_bytes=max(0, profile.ram_available_bytes - num_bytes),
        cgroup_available_bytes=None if in_cgroup is None else max(0, in_cgroup - num_bytes),
    )


def reserve_bytes(limit_bytes: int) -> int:
    """What stays free under an automatic budget, for pages of files and for what else the device does."""
    return max(RESERVE_BYTES, int(RESERVE_SHARE * limit_bytes))
