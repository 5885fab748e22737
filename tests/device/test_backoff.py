"""Going on in smaller pieces: when memory is short, what is chosen then, and that a training's state comes back whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.budget import RESERVE_BYTES, reserve_bytes
from edge_runtime.errors import TrainingFailed
from edge_runtime.records import CostRow, TrainSettings
from edge_runtime.training import backoff, process
from edge_runtime.training.backoff import Pressure, Saved, begin_again, on_disk
from edge_runtime.training.loop import Progress
from edge_runtime.training.optimizers import Optimizer

MIB = 1 << 20
LIMIT = 512 * MIB
Array = np.ndarray[Any, np.dtype[Any]]


def rows(*peaks_mib: int) -> list[CostRow]:
    return [CostRow(2, False, 1, peak * MIB, 1.0, 1.0, 1) for peak in peaks_mib]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the process finds: room left, its memory now and at its peak."""
    found = {"left": 100 * MIB, "VmRSS": 200 * MIB, "VmHWM": 200 * MIB}
    monkeypatch.setattr(backoff, "room", lambda skip_own: (LIMIT, found["left"]))
    monkeypatch.setattr(backoff, "process_memory", lambda: found)
    return found


def test_memory_is_short_below_half_of_the_reserve(memory: dict[str, int]) -> None:
    pressure = Pressure(rows(150, 120), own_cgroup=True)
    memory["left"] = reserve_bytes(LIMIT) // 2
    assert not pressure.is_short()
    memory["left"] -= 1
    assert pressure.is_short()
    pressure.give_up()
    assert not pressure.is_short()


def test_what_the_next_step_takes_again_is_not_left(memory: dict[str, int]) -> None:
    pressure = Pressure(rows(150, 120), own_cgroup=True)
    memory |= {"left": 60 * MIB, "VmRSS": 140 * MIB}  # torch gives its tensors back between steps
    assert pressure.is_short()
    memory["VmRSS"] = 200 * MIB
    assert not pressure.is_short()


def test_the_largest_that_restores_the_reserve_is_taken_or_the_smallest(memory: dict[str, int]) -> None:
    pressure = Pressure(rows(195, 190, 150, 120), own_cgroup=True)
    memory["left"] = 4 * MIB
    assert pressure.is_short() and pressure.smaller
    assert (
        pressure.smaller.peak_bytes
        == 150 * MIB
        == max(
            row.peak_bytes
            for row in rows(195, 190, 150, 120)
            if row.peak_bytes <= 200 * MIB - (RESERVE_BYTES - 4 * MIB)
        )
    )
    memory["left"] = -200 * MIB
    assert pressure.is_short() and pressure.smaller.peak_bytes == 120 * MIB


def test_without_anything_smaller_it_goes_on(memory: dict[str, int]) -> None:
    memory["left"] = 0
    assert not Pressure([], own_cgroup=False).is_short()


class Backend:
    """Two trained tensors and their optimizer."""

    name = "onnx"

    def __init__(self, optimizer: str) -> None:
        self.weights = {"w": np.zeros((80, 60), np.float32), "b": np.zeros(3, np.float32)}
        self.optimizer = Optimizer(TrainSettings(optimizer=optimizer), ())

    def step(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.optimizer.begin_step()
        for name, weight in self.weights.items():
            self.optimizer.update(name, weight, random.standard_normal(weight.shape).astype(np.float32))

    def arrays(self) -> Iterator[Array]:
        for name, weight in self.weights.items():
            yield weight
            yield from self.optimizer.states(name, weight.size)


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have been executed, with a copy of the file's descriptor."""
    called: dict[str, Any] = {}

    class Executed(Exception):
        pass

    def execv(program: str, arguments: list[str]) -> None:
        called["descriptor"] = os.dup(int(arguments[-1]))
        called["arguments"] = arguments
        raise Executed

    monkeypatch.setattr(backoff.os, "execv", execv)
    called["error"] = Executed
    return called


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "momentum", "sgd"])
def test_going_on_from_what_was_passed_gives_the_bits_of_never_having_stopped(
    optimizer: str, passed_on: dict[str, Any], tmp_path: Path
) -> None:
    before = Backend(optimizer)
    for seed in range(5):
        before.step(seed)
    progress = Progress([0.5] * 5, 2.0, 1.5, 0.1, 77, backed_off=1)
    with pytest.raises(passed_on["error"]):
        begin_again({"job": "train", "depth": 2}, progress, before.arrays(), tmp_path)
    assert list(tmp_path.iterdir()) == [], "the file has no name: nobody has to delete it"
    saved = Saved(passed_on["descriptor"])
    assert saved.job == {"job": "train", "depth": 2}
    after = Backend(optimizer)
    assert saved.restore(after) == dataclasses.replace(progress, backed_off=2)  # type: ignore[arg-type]
    for seed in range(5, 10):
        before.step(seed)
        after.step(seed)
    for name, weight in before.weights.items():
        assert np.array_equal(weight, after.weights[name])


def test_a_state_that_is_not_whole_is_refused(passed_on: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(passed_on["error"]):
        begin_again({}, Progress([0.5]), [np.zeros(3, np.float32)], tmp_path)
    with pytest.raises(TrainingFailed, match="not whole"):
        Saved(passed_on["descriptor"]).restore(Backend("sgd"))  # type: ignore[arg-type]


def test_a_state_is_never_kept_in_a_file_system_that_is_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    assert on_disk(first, second) == second, "the first is not there"
    first.mkdir()
    assert on_disk(first, second) == first
    monkeypatch.setattr(backoff, "in_memory", lambda path: path == first)
    assert on_disk(first, second) == second
    monkeypatch.setattr(backoff, "in_memory", lambda path: True)
    with pytest.raises(OSError, match="in memory"):
        on_disk(first, second)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"memory.oom_control": "oom_kill_disable 0\noom_kill 1\n", "memory.failcnt": "9"}, (True, True)),
        ({"memory.oom_control": "oom_kill_disable 0\noom_kill 1\n", "memory.failcnt": "0"}, (True, False)),
        ({"memory.oom_control": "oom_kill_disable 0\noom_kill 0\n", "memory.failcnt": "9"}, (False, False)),
        ({"memory.events": "low 0\nmax 7\noom 1\noom_kill 1\n"}, (True, True)),
        ({"memory.events": "low 0\nmax 0\noom 0\noom_kill 1\n"}, (True, False)),
        ({}, (False, False)),
    ],
)
def test_a_kill_at_the_own_limit_is_told_from_one_of_the_container_around(
    files: dict[str, str], found: tuple[bool, bool], tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert process._killed_for_memory(tmp_path) == found


def test_cgroups_that_a_killed_agent_left_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = max(int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()) + 100_000
    for owner in (dead, os.getpid()):
        (tmp_path / f"{process.CGROUP}-{owner}-12").mkdir()
    (tmp_path / "something-else-1").mkdir()
    process._remove_left_over(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{process.CGROUP}-{os.getpid()}-12", "something-else-1"]
