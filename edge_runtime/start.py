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
    """Load a command line and run its `main`; Ctrl-C before that has its own way of ending is no traceback."""
    try:
        return int(importlib.import_module(module).main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
