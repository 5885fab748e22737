"""Runs one of our programs and kills it with SIGKILL at its N-th write boundary: python crashing.py N MODULE [ARGUMENTS].

A boundary stands before and after every fsync, rename, deletion, ledger transaction and control message sent. N = 0 only
counts. So that a test needs no hook in the product, the functions are wrapped here.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMIT = int(sys.argv[1])
seen = 0


def boundary() -> None:
    """Count one, and die if it is the one."""
    global seen
    seen += 1
    if seen == LIMIT:
        os.kill(os.getpid(), signal.SIGKILL)


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a boundary before and after it."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        boundary()
        result = function(*args, **kwargs)
        boundary()
        return result

    return wrapped


def main() -> None:
    """Wrap, then become the program."""
    from edge_coordinator.ledger import Ledger
    from edge_runtime.transport import MqttTransport

    os.fsync = around(os.fsync)
    os.replace = around(os.replace)
    Path.unlink = around(Path.unlink)  # type: ignore[method-assign]
    transaction, publish = Ledger.transaction, MqttTransport.publish

    @contextlib.contextmanager
    def counted(self: Ledger) -> Iterator[None]:
        boundary()
        with transaction(self):
            yield
            boundary()  # everything is written, nothing is committed
        boundary()

    def published(self: MqttTransport, topic: str, payload: bytes, *, retain: bool = False) -> None:
        control = not topic.endswith(("/c", "/st"))
        if control:
            boundary()
        publish(self, topic, payload, retain=retain)
        if control:
            boundary()

    Ledger.transaction = counted  # type: ignore[method-assign, assignment]
    MqttTransport.publish = published  # type: ignore[method-assign]
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
