"""Where `edge-runtime` starts: loads the command line, and is the first to hear Ctrl-C, while modules are still loading.

Not here: anything else, so that there is hardly a moment before it. Imports `sys` and `importlib`; the rest inside.
"""

from __future__ import annotations

import importlib
import sys

INTERRUPTED = 130  # as in `console`, which may not be loaded yet


def main() -> int:
    """Entry point; -> the exit code."""
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
