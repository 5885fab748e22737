"""Any process may be killed at any time: the run finishes, each update counts once, and the model is the same bits."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from edge_coordinator.mosquitto import find_mosquitto
from tests.e2e.conftest import Reference
from tests.e2e.fleets import Fleet, running

BROKERS = [
    "amqtt",
    pytest.param("mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")),
]


def crash_and_restart(fleet: Fleet, name: str, first: int, step: int) -> int:
    """Let one process die at its first boundary, the next life at a later one, and so on; -> how often it died."""
    deaths, limit = 0, first
    end = time.monotonic() + 400
    while not fleet.finished():
        assert time.monotonic() < end, fleet.last_words()
        if not fleet.alive(name):
            deaths += name in fleet.processes
            limit += step * (name in fleet.processes)
            fleet.start(name, crash_at=limit)
        time.sleep(0.02)
    return deaths


def same_as(fleet: Fleet, reference: Reference) -> None:
    assert fleet.counted() == reference.counted
    assert fleet.tensors() == reference.tensors


@pytest.mark.slow
@pytest.mark.parametrize("broker", BROKERS)
def test_two_undisturbed_runs_give_the_same_bits_over_either_broker(
    broker: str, tmp_path: Path, model: Path, reference: Reference
) -> None:
    with running(Fleet(tmp_path, model, broker=broker, cache=reference.cache)) as fleet:
        fleet.start_all()
        fleet.wait(fleet.finished)
    same_as(fleet, reference)
    assert len(reference.counted) == 4


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["embedded", *BROKERS[1:]])
def test_a_coordinator_killed_at_ever_later_write_boundaries(
    broker: str, tmp_path: Path, model: Path, reference: Reference
) -> None:
    with running(Fleet(tmp_path, model, broker=broker, cache=reference.cache)) as fleet:
        if broker != "embedded":
            fleet.start("broker")
        for device in fleet.devices:
            fleet.start(device)
        deaths = crash_and_restart(fleet, "coordinator", first=3, step=5)
    assert deaths >= 8
    same_as(fleet, reference)


@pytest.mark.slow
def test_a_device_killed_at_ever_later_write_boundaries(tmp_path: Path, model: Path, reference: Reference) -> None:
    with running(Fleet(tmp_path, model, cache=reference.cache)) as fleet:
        fleet.start("coordinator")
        fleet.start("device-1")
        deaths = crash_and_restart(fleet, "device-0", first=2, step=23)
    assert deaths >= 5
    same_as(fleet, reference)


@pytest.mark.slow
@pytest.mark.parametrize("broker", BROKERS)
def test_a_broker_killed_while_joining_training_and_sending(
    broker: str, tmp_path: Path, model: Path, reference: Reference
) -> None:
    with running(Fleet(tmp_path, model, broker=broker, cache=reference.cache)) as fleet:
        fleet.start_all()
        moments = [
            lambda: fleet.events("device-0", "fetching"),
            lambda: fleet.events("coordinator", "joined"),
            lambda: fleet.events("device-0", "training"),
            lambda: fleet.events("device-1", "trained"),
            lambda: fleet.events("coordinator", "round-published"),
        ]
        for moment in moments:
            fleet.wait(moment)
            fleet.kill("broker")
            time.sleep(0.3)
            fleet.start("broker")
        fleet.wait(fleet.finished)
    same_as(fleet, reference)


@pytest.mark.slow
def test_everything_killed_at_once_in_the_middle_of_training(tmp_path: Path, model: Path, reference: Reference) -> None:
    with running(Fleet(tmp_path, model, cache=reference.cache)) as fleet:
        fleet.start_all()
        fleet.wait(lambda: fleet.events("device-0", "training"))
        for name in ["coordinator", *fleet.devices]:
            fleet.kill(name)
        fleet.start_all()
        fleet.wait(fleet.finished)
    same_as(fleet, reference)


@pytest.mark.slow
def test_a_training_child_killed_alone_is_started_again_with_the_same_plan(
    tmp_path: Path, model: Path, reference: Reference
) -> None:
    with running(Fleet(tmp_path, model, cache=reference.cache)) as fleet:
        fleet.start_all()
        fleet.wait(lambda: fleet.events("device-0", "training"))
        children = psutil.Process(fleet.processes["device-0"].pid).children()
        assert children
        children[0].kill()
        fleet.wait(fleet.finished)
        (failure,) = fleet.events("device-0", "training-failed")
    assert not failure["out_of_memory"]
    same_as(fleet, reference)
