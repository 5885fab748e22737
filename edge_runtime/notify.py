"""Tells systemd that this process is ready, alive, or stopping: sd_notify(3), datagrams to the socket that it names.

Nothing happens where no service manager asked for it: `system/service.py` writes the unit that does. Not here: the unit. Imports
the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

BEATS = 4  # in one interval of the watchdog, so that a late one does not end us
_beaten_at = float("-inf")


def notify(state: str) -> bool:
    """Send one or more `NAME=value` lines, as READY=1; -> whether there is somebody who took them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as carrier,
    ):
        carrier.setblocking(False)  # a manager that is busy must not hold us up
        carrier.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        return True
    return False


def alive() -> None:
    """Tell the watchdog that this process goes on; to be called often, sends a few times in an interval.

    Wherever the agent's one thread waits for long: in its loop, and for a worker process.
    """
    global _beaten_at
    interval_s = _watchdog_s()
    now = time.monotonic()
    if interval_s and now - _beaten_at >= interval_s / BEATS and notify("WATCHDOG=1"):
        _beaten_at = now


def _watchdog_s() -> float:
    """The watchdog's interval, 0 where there is none, or where it watches another process than this."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdecimal() else 0.0
