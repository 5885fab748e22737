"""The coordinator while somebody sets the machine's time: a Pi has no clock of its own and learns the time from the net."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_coordinator.server import KNOWN_S, Server
from edge_runtime.wire import Status
from tests.e2e.local import FakeDevice, World, rows

ALL = rows(0, 1, 2)
YEAR_S = 365 * 86_400.0


def set_time(monkeypatch: pytest.MonkeyPatch, offset_s: float) -> None:
    """Set the machine's time; what counts seconds goes on as before."""
    real = time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() / 1e9 + offset_s)


def collecting(folder: Path, model: Path) -> tuple[World, FakeDevice]:
    """A round in which one of two devices has a plan and never reports."""
    world = World(folder, model)
    device = FakeDevice(world, "device-0", table=ALL)
    silent = FakeDevice(world, "device-1", table=ALL, serve=False)
    world.step(device, silent, times=30)
    state = world.server.run.state()
    assert state is not None and state.state == "collecting", world.events
    return world, device


def test_the_coordinator_goes_by_a_clock_that_nobody_sets() -> None:
    assert Server.__init__.__kwdefaults__["clock"] is time.monotonic


@pytest.mark.parametrize("offset_s", [YEAR_S, -YEAR_S])
def test_a_round_ends_at_its_deadline_whatever_the_time_is_set_to(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, offset_s: float
) -> None:
    world, device = collecting(tmp_path / "f", model)
    set_time(monkeypatch, offset_s)
    world.now += 3_590
    world.step(device)
    assert not world.kinds("round-published") and not world.kinds("round-failed")
    world.now += 20
    world.step(device)
    assert world.kinds("round-published")


@pytest.mark.parametrize("offset_s", [YEAR_S, -YEAR_S])
def test_after_a_restart_an_open_phase_gets_its_own_time_whatever_the_time_was(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, offset_s: float
) -> None:
    with monkeypatch.context() as earlier:
        set_time(earlier, offset_s)
        world, device = collecting(tmp_path / "f", model)
    world.now = 5.0  # another boot: the clock that nobody sets begins anew
    world.start()
    (row,) = world.fleet.ledger.rounds()
    assert abs(row["deadline"] - time.time() - 3_600) < 60
    world.now += 3_590
    world.step(device)
    assert not world.kinds("round-published")
    world.now += 20
    world.step(device)
    assert world.kinds("round-published")


def test_people_are_told_the_time_of_day(tmp_path: Path, model: Path) -> None:
    world, _ = collecting(tmp_path / "f", model)
    (row,) = world.fleet.ledger.rounds()
    assert abs(row["opened_at"] - time.time()) < 60
    assert abs(row["deadline"] - time.time() - 3_600) < 60
    assert all(abs(d["last_seen"] - time.time()) < 60 for d in world.fleet.ledger.devices() if d["last_seen"])


def test_no_round_waits_for_a_device_that_was_revoked_while_it_was_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "f", model, goal=1)
    device, revoked = FakeDevice(world, "device-0", table=ALL), FakeDevice(world, "device-1")
    for one in (device, revoked):
        one.send("st", Status("online", "test", 0))
    world.step()
    assert world.server.peers.online() == {"device-0", "device-1"}
    world.fleet.ledger.revoke("device-1")
    monkeypatch.setattr("edge_coordinator.server.KNOWN_S", -KNOWN_S)  # as if it had passed
    revoked.send("st", Status("offline", "test", 0))  # its will, when the broker drops it
    world.step()
    assert world.server.peers.online() == {"device-0"}
