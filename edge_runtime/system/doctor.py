"""`edge-runtime doctor`: looks for what commonly goes wrong on a device and says what to do. Changes nothing.

A check takes values, a root folder or a probe, and returns a `Finding`: `doctor_machine.py` has those of the machine,
`doctor_fleet.py` those of the way to the fleet. Here is which are made, in which order, and how they are shown.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.conditions import parse_conditions, readings_in_words, shown, unmet
from edge_runtime.console import print_json
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.sensors import Sensors

if TYPE_CHECKING:
    from edge_runtime.credentials import Credentials

OK, WARNING, WRONG, UNKNOWN = "ok", "warning", "wrong", "unknown"
ROOT = Path("/")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        verdict: ok, warning (it works, but), wrong, or unknown (cannot be told on this machine, which is no fault).
        advice: what to do; empty where there is nothing to do.
    """

    check: str
    verdict: str
    found: str
    advice: str = ""


def examine(config: Path | None, state: Path | None) -> list[Finding]:
    """Every check on this machine; takes some seconds, more with torch or a broker that does not answer.

    Args:
        config: the device's file; without it nothing of the fleet is looked at.
        state: the device's state folder; None: the file's, else the service's where there is one, else ./edge-DEVICE, without `config` this folder.
    """
    from edge_runtime.credentials import read_credentials
    from edge_runtime.system import doctor_fleet as fleet

    who, unreadable = None, ""
    try:
        who = read_credentials(config) if config else None
    except UsageError as error:
        unreadable = str(error)
    folder = _state(who, state)
    findings = [
        *_machine(folder, tls=bool(who and who.ca_file)),
        conditions(who.settings.when if who else "", Sensors(ROOT)),
    ]
    if config is None:
        return [*findings, Finding("fleet", UNKNOWN, "not looked at: --config names no device's file")]
    if who is None:
        return [
            *findings,
            Finding(
                "credentials",
                WRONG,
                unreadable,
                "correct the file or copy it from the coordinator anew; where it cannot be read, run this as its owner, with sudo",
            ),
        ]
    return [*findings, fleet.credentials(config), *fleet.examine(who, folder)]


def conditions(when: str, sensors: Sensors) -> Finding:
    """Whether training may begin now, and what its conditions read. Args: when: of the device's file; empty: none."""
    check = "conditions"
    try:
        wanted = parse_conditions(when)
    except UsageError as error:
        return Finding(check, WRONG, str(error), "correct `when` in the [device] section of the device's file")
    if missing := [f"{shown(c)}: {why}" for c in wanted if (why := sensors.lacks(c.name))]:
        return Finding(
            check, WRONG, "; ".join(missing), "this device can never tell: leave that condition out of `when`"
        )
    now = sensors.settled()
    if not wanted:
        return Finding(check, OK, f"none: training begins at any time ({readings_in_words(now)})")
    if found := unmet(wanted, now):
        return Finding(
            check, WARNING, f"waiting: {'; '.join(u.words for u in found)}", "training waits until they hold"
        )
    return Finding(check, OK, f"hold now: {', '.join(map(shown, wanted))}")


def _state(who: Credentials | None, state: Path | None) -> Path:
    """Where the device keeps its state."""
    from edge_runtime.system.service import unit_path
    from edge_runtime.system.service_units import STATE

    named = state or (who.settings.state if who else "")
    if not named and unit_path(root=ROOT).exists():
        return STATE
    return Path(named or (f"edge-{who.device}" if who else "")).absolute()


def _machine(state: Path, *, tls: bool) -> Iterator[Finding]:
    """The checks of `doctor_machine.py` with what this machine says."""
    from edge_runtime.system import doctor_machine as machine

    libc = platform.libc_ver()[0]
    yield machine.interpreter(sys.version_info[:2], platform.machine(), libc)
    yield from machine.packages(machine.installed(), machine.try_package)
    there = next(folder for folder in (state, *state.parents) if folder.exists())
    ours = there != state or there.stat().st_uid == os.geteuid()
    writable = os.access(there, os.W_OK | os.X_OK)
    yield machine.state_folder(ROOT, state, writable=writable or (False if ours else None))
    yield machine.disk_room(machine.free_bytes(there), there)
    yield machine.clock(ROOT, time.time(), machine.clock_error_us(), tls=tls)
    yield machine.swap(ROOT)
    yield machine.memory_limits(ROOT)
    yield machine.throttling(ROOT, machine.ask_vcgencmd())


def show(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print a table and what to do, or one JSON object; -> the exit code: 1 where something is wrong."""
    wrong = [finding for finding in findings if finding.verdict == WRONG]
    if as_json:
        print_json({"ok": not wrong, "checks": [dataclasses.asdict(finding) for finding in findings]})
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            print(f"{finding.check:{width}}  {finding.verdict:8} {finding.found}")
        for finding in findings:
            if finding.advice:
                print(f"\n{finding.check}: {finding.advice}")
    return EdgeError.exit_code if wrong else 0
