"""Closes the round that stands in a fleet's folder: python -m tests.coordinator.closing FOLDER [open]. For tests that kill it.

With `open` it opens the round after it too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_coordinator.config import load_config
from edge_coordinator.ledger import Ledger
from edge_coordinator.models import Models
from edge_coordinator.run import Run


def main(folder: Path, then_open: bool = False) -> None:
    """Until the round is published, or the next one open."""
    ledger = Ledger(folder / "ledger.db")
    run = Run(load_config(folder), ledger, Models(folder, ledger), print, now=0.0)
    state = run.state()
    if state and state.state in ("collecting", "closing"):
        assert run.advance(0.0, 0) == "published"
    state = run.state()
    if then_open and state and state.state == "published":
        assert run.advance(0.0, 0) == "opened"


if __name__ == "__main__":
    main(Path(sys.argv[1]), "open" in sys.argv[2:])
