"""The conditions under which a device may train, as people write them, and whether they hold. Pure: no files, no clock.

    --when "idle, charging, temperature<70, time=22:00-06:00, load<1.5, free-memory>200MB"

Not here: what reads the machine (`sensors.py`) and who waits (`gate.py`). Imports the errors and the budgets' sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_runtime.budget import parse_bytes
from edge_runtime.errors import UsageError

IDLE_SHARE = 0.1  # of all processors' time: what others may take while the device counts as idle
HOLD_S = 10.0  # for so long all conditions must hold again before training goes on, so that it does not flap
EXAMPLES = "idle, charging, temperature<70, time=22:00-06:00, load<1.5, free-memory>200MB"
FORM = re.compile(r"\s*([a-z-]+)\s*(?:([<>=])\s*(\S+))?\s*\Z")
SIGNS = {"idle": "", "charging": "", "temperature": "<", "time": "=", "load": "<", "free-memory": ">"}
WINDOW = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
MIB, DAY = 1 << 20, 24 * 60


@dataclass(frozen=True)
class Condition:
    """One of `SIGNS`.

    Attributes:
        limit: degrees Celsius, load, bytes, or the minute of the day at which the window opens.
        end: the minute at which it closes; before `limit` it is the next day's.
    """

    name: str
    limit: float = 0.0
    end: int = 0


@dataclass(frozen=True)
class Readings:
    """What the machine says now, its own training left out. `None`: it cannot be read."""

    busy_share: float | None  # of all processors' time, by others, over the last seconds
    charging: bool | None
    temperature_c: float | None
    minute: int  # of the day, local time
    load: float | None  # average of the last minute
    free_bytes: int | None  # that would be left with the training in memory


@dataclass(frozen=True)
class Unmet:
    """A condition that does not hold, and what was read and wanted."""

    name: str
    words: str


@dataclass(frozen=True)
class Stand:
    """Whether training may go on.

    Attributes:
        unmet: what does not hold; empty while closed: all holds again, since `met_since_s`.
    """

    is_open: bool
    unmet: tuple[Unmet, ...] = ()
    met_since_s: float = 0.0


def parse_conditions(text: str) -> tuple[Condition, ...]:
    """Conditions between commas; an empty text has none.

    Raises:
        UsageError: one is unknown, there twice, or its value is none.
    """
    found: dict[str, Condition] = {}
    for part in text.split(",") if text.strip() else ():
        condition = _parse_one(part)
        if condition.name in found:
            raise UsageError(f"the condition {condition.name} is there twice: give it once")
        found[condition.name] = condition
    return tuple(found.values())


def _parse_one(part: str) -> Condition:
    match = FORM.match(part)
    if match is None or match[1] not in SIGNS:
        raise UsageError(f"{part.strip()[:60]!r} is no condition: write for example {EXAMPLES}")
    name, sign, value = match[1], match[2] or "", match[3] or ""
    if sign != SIGNS[name]:
        example = next(word for word in EXAMPLES.split(", ") if word.startswith(name))
        raise UsageError(f"the condition {name} is written {example}, it is {part.strip()[:60]!r}")
    if name == "time":
        return _window(value)
    if name == "free-memory":
        return Condition(name, _positive(name, parse_bytes(value)))
    return Condition(name, _positive(name, _number(name, value))) if sign else Condition(name)


def _number(name: str, value: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value):
        raise UsageError(f"the condition {name} wants a number, it is {value[:40]!r}")
    return float(value)


def _positive(name: str, value: float) -> float:
    if not value:
        raise UsageError(f"the condition {name} can never hold with 0: give a number above it")
    return value


def _window(value: str) -> Condition:
    match = WINDOW.fullmatch(value)
    hours = [int(n) for n in match.groups()] if match else [24, 0, 24, 0]
    start, end = 60 * hours[0] + hours[1], 60 * hours[2] + hours[3]
    if match is None or max(hours[1], hours[3]) > 59 or start >= DAY or end > DAY:
        raise UsageError(f"the condition time wants hours and minutes as 22:00-06:00, it is {value[:40]!r}")
    if start == end % DAY:
        raise UsageError(f"the condition time={value} opens and closes at once: leave it out for the whole day")
    return Condition("time", start, end % DAY)


def shown(condition: Condition) -> str:
    """A condition as it is written."""
    sign = SIGNS[condition.name]
    if condition.name == "time":
        return f"time={_clock(int(condition.limit))}-{_clock(condition.end)}"
    if condition.name == "free-memory":
        return f"free-memory>{condition.limit / MIB:.0f}MiB"
    return condition.name + (f"{sign}{condition.limit:g}" if sign else "")


def kept_free_bytes(conditions: tuple[Condition, ...]) -> int:
    """What a budget must leave, so that training does not break its own condition."""
    return sum(int(c.limit) for c in conditions if c.name == "free-memory")


def unmet(conditions: tuple[Condition, ...], readings: Readings) -> tuple[Unmet, ...]:
    """Those that do not hold, in their order. What cannot be read does not hold."""
    return tuple(Unmet(c.name, words) for c in conditions if (words := _why_not(c, readings)))


def _why_not(condition: Condition, now: Readings) -> str:
    """What was read and what was wanted; empty where it holds."""
    name, limit = condition.name, condition.limit
    if name == "time":
        start, end = int(limit), condition.end
        inside = start <= now.minute < end if start < end else now.minute >= start or now.minute < end
        return "" if inside else f"time {_clock(now.minute)}, wanted {_clock(start)} to {_clock(end)}"
    read = reading(name, now)
    if read is None:
        return f"{name}: cannot be read now"
    if name == "idle":
        return "" if read < IDLE_SHARE else f"others use {read:.0%} of the processors, wanted below {IDLE_SHARE:.0%}"
    if name == "charging":
        return "" if read else "on battery, wanted charging"
    if name == "temperature":
        return "" if read < limit else f"temperature {read:.1f}, wanted below {limit:g}"
    if name == "load":
        return "" if read < limit else f"load {read:.2f}, wanted below {limit:g}"
    return "" if read > limit else f"free memory {read / MIB:.0f} MiB, wanted above {limit / MIB:.0f} MiB"


def reading(name: str, now: Readings) -> float | None:
    """The number that a condition looks at."""
    values = {"idle": now.busy_share, "charging": now.charging, "temperature": now.temperature_c}
    return {**values, "time": now.minute, "load": now.load, "free-memory": now.free_bytes}[name]


def readings_in_words(now: Readings) -> str:
    """What all conditions read, as a person may want to set them."""
    parts = [
        "" if now.busy_share is None else f"others use {now.busy_share:.0%} of the processors",
        {True: "charging", False: "on battery", None: ""}[now.charging],
        "no thermal sensor" if now.temperature_c is None else f"temperature {now.temperature_c:.1f}",
        f"time {_clock(now.minute)}",
        "" if now.load is None else f"load {now.load:.2f}",
        "" if now.free_bytes is None else f"free memory {now.free_bytes / MIB:.0f} MiB",
    ]
    return ", ".join(part for part in parts if part)


def after(stand: Stand, found: tuple[Unmet, ...], now_s: float) -> Stand:
    """The stand after one more look: closed as soon as something does not hold, open when all has held for `HOLD_S`."""
    if found:
        return Stand(is_open=False, unmet=found)
    if stand.is_open:
        return stand
    since = now_s if stand.unmet else stand.met_since_s
    return Stand(is_open=now_s - since >= HOLD_S, met_since_s=since)


def words(stand: Stand) -> str:
    """What is waited for; empty where nothing is."""
    if stand.is_open:
        return ""
    return "; ".join(u.words for u in stand.unmet) or f"all conditions hold again, for {HOLD_S:.0f} s before going on"


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"
