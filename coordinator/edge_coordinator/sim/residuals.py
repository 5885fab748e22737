"""What each virtual device's top-k updates left out: error feedback, as `edge_runtime.residual` keeps it on a device.

A file for each device. What a training would make of it lies with the training's results and takes its place once the
round is in the simulation's results: so a round that is simulated again, after a kill, begins from what it began with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_runtime.manifest import Manifest
from edge_runtime.residual import feedback_job
from edge_runtime.store import disk_errors, make_folder, sync_folder
from edge_runtime.wire import Grant


class Residuals:
    """The files in one folder, by device."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def job(self, device: str, draft: Path, grant: Grant, manifest: Manifest) -> dict[str, Any]:
        """What a training is told of error feedback."""
        return feedback_job(self._folder / device, draft, grant.run, grant.round, manifest, grant.plan.settings)

    def settle(self, rows: Iterable[Mapping[str, Any]], draft_of: Callable[[str], Path]) -> None:
        """A round is in the results, whose rows tell what became of each device's update. Twice is as once.

        As a device does it: only a committed update moves its residual on, and a rejected one drops it.
        """
        moved = False
        for row in rows:
            kept, draft = self._folder / row["device"], draft_of(row["device"])
            with disk_errors(kept):
                if row["status"] == "rejected":
                    kept.unlink(missing_ok=True)
                elif row["status"] == "committed" and draft.exists():
                    make_folder(self._folder, mode=0o700)
                    os.replace(draft, kept)
                    moved = True
        if moved:
            sync_folder(self._folder)
