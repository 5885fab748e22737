"""Where `edge-coordinator` starts: as `edge_runtime/start.py`, which this imports, with the coordinator's command line."""

from __future__ import annotations

from edge_runtime.start import start


def main() -> int:
    """Entry point; -> the exit code."""
    return start("edge_coordinator.cli")
