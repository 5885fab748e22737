"""Where `edge-runtime` starts: loads the command line, and is the first to hear Ctrl-C, while modules are still loading.

A Python of 32 bits is turned away here, before what it lacks ends in a traceback. Not here: anything else, so that there is
hardly a moment before it. Imports `sys` and `importlib`; the rest inside.
"""

from __future__ import annotations

import importlib
import sys

INTERRUPTED = 130  # as in `console`, which may not be loaded yet
NARROW = (  # setup.py says it too, when it is installed from a checkout
    "edge-runtime needs a 64-bit system: this Python has 32 bits, for which onnxruntime has no wheels. "
    "A Raspberry Pi 3, 4, 5 or Zero 2 runs the 64-bit Raspberry Pi OS"
)


def main() -> int:
    """Entry point; -> the exit code."""
    if sys.maxsize < 1 << 32:
        print(f"error: {NARROW}", file=sys.stderr)
        return 1
    return start("edge_runtime.cli")


def start(module: str) -> int:
    """Load a command line and run its `main`; Ctrl-C while modules load, at the start or later, is no traceback."""
    interrupted = False
    try:
        import signal

        def interrupt(number: int, frame: object) -> None:
            nonlocal interrupted
            interrupted = True
            raise KeyboardInterrupt

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where somebody wants it ignored
            signal.signal(signal.SIGINT, interrupt)
        return int(importlib.import_module(module).main())
    except KeyboardInterrupt:
        pass
    except ImportError:  # numpy and onnxruntime make one of a KeyboardInterrupt that comes while they load
        if not interrupted:
            raise
    print("stopped", file=sys.stderr)
    return INTERRUPTED
