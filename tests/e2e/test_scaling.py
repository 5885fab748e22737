"""What one device costs the coordinator does not depend on how many there are. Trainings are made up; all else is real."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.fleet import init
from edge_coordinator.sim import simulation as module
from edge_coordinator.sim.making import SimOptions
from edge_coordinator.sim.simulation import Simulation
from edge_runtime.records import TrainReport
from tests.e2e.fleets import LABELS, write_data

STEPS = 100  # of SQLite's machine, between two calls of its progress handler


class Instant:
    """Instead of a worker process: an update of zeros at once."""

    def __init__(self, job: Mapping[str, Any], **_: object) -> None:
        self._job = job

    def poll(self, timeout_s: float) -> dict[str, Any]:
        """As a worker's last line."""
        row, numbers = self._job["plan"]["chosen"], dict.fromkeys((f.name for f in dataclasses.fields(TrainReport)), 1)
        Path(self._job["update"]).write_bytes(bytes(row["upload_bytes"]))
        report = {**numbers, **{key: row[key] for key in ("depth", "checkpointing", "micro_batch", "backend")}}
        held = len(np.load(Path(self._job["corpus"]) / "labels.npy"))
        report |= {
            "num_examples": held,
            "precision": "float32",
            "cached": False,
            "codec": "f32",
            "accuracy": None,
            "kept": "",
        }
        return {"result": {"report": {**report, "rank": 0}}}

    def close(self) -> None:
        """Nothing runs."""


def simulated(folder: Path, model: Path, data: Path, devices: int) -> Simulation:
    """A simulation of one round that all devices take part in, not begun."""
    init(folder, name="test", base=str(model), labels=LABELS, max_length=32, rounds=1, goal=devices, quorum=devices)
    (folder / "classes.toml").write_text('[here]\nmemory = "2GB"\n')
    options = SimOptions(data, None, devices, "here", folder / "classes.toml")
    return Simulation(folder, options, progress=lambda row: None, say=print, keep_going=lambda: True)


def work_of(simulation: Simulation) -> tuple[int, int]:
    """Run it; -> (Python's calls, steps of SQLite's machine), for each device."""
    calls = steps = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def stepped() -> int:
        nonlocal steps
        steps += STEPS
        return 0

    simulation.fleet.ledger._db.set_progress_handler(stepped, STEPS)
    sys.setprofile(called)
    try:
        simulation.run()
    finally:
        sys.setprofile(None)
    committed = simulation.results.last and simulation.results.last["committed"]
    assert committed == len(simulation.virtual.devices)
    return calls // committed, steps // committed


def test_the_work_for_one_device_is_the_same_among_many(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_start", lambda options: (Instant, 4))
    data = write_data(tmp_path / "data.csv", 0, count=48)
    few, many = (work_of(simulated(tmp_path / str(n), model, data, n)) for n in (12, 48))
    assert many[0] < 1.1 * few[0]
    assert many[1] < 1.3 * few[1]
