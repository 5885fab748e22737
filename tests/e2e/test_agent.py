"""A real agent with its training processes and a real coordinator, both in this process: what it does when things go wrong.

The disk is full, tokenised data is damaged, the training process is killed again and again, a broker floods it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.ledger import read_join
from edge_runtime.agent import MAX_ATTEMPTS, NICENESS, SHRINK, Agent
from edge_runtime.gate import Gate
from edge_runtime.local import DataOptions
from edge_runtime.records import CostRow, Plan
from edge_runtime.session import Session
from edge_runtime.store import BlobStore, answering_from, is_answered_from
from edge_runtime.topics import Topics
from edge_runtime.training import patient
from edge_runtime.training.patient import LAST
from edge_runtime.transport import LocalBroker, LocalTransport, Message
from edge_runtime.wire import MAX_MANIFEST_BYTES, Grant, Model, encode
from tests.e2e.fleets import write_data
from tests.e2e.local import World, random_hash
from tests.worlds import Plug, fill, small_disk

NAME = "device-0"


@pytest.fixture(scope="module")
def home(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this device's data and a warm cache: tokenised data and calibration."""
    folder = tmp_path_factory.mktemp("home")
    with write_data(folder / "data.csv", 1, count=255).open("a") as file:
        file.write(f"the {'long ' * 40}river,place\n")
    world = World(tmp_path_factory.mktemp("warm") / "f", model, devices=1)
    server = world.server
    session(folder).could_do(server.run.manifest, server.models.store, server.config.train)
    return folder


@pytest.fixture
def own(home: Path, tmp_path: Path) -> Path:
    """The same, for one test to damage."""
    return shutil.copytree(home, tmp_path / "home")


def session(home: Path, upload_bytes: int | None = None) -> Session:
    return Session(
        home / "data.csv", home / "cache", memory="2GB", time_s=None, upload_bytes=upload_bytes, threads=1, options=DataOptions(), say=print
    )  # fmt: skip


class Device:
    """An agent that takes a turn when the test says so."""

    def __init__(self, broker: LocalBroker, folder: Path, home: Path, gate: Gate | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.transport = LocalTransport(broker, NAME, Topics("test").device_filters(NAME))
        self.agent = Agent(
            NAME,
            "test",
            folder,
            session(home),
            self.transport,
            self.events.append,
            families=("edge_models.bert",),
            gate=gate,
        )

    def step(self) -> None:
        """Read everything, then do what is next."""
        while (event := self.transport.next_event(0)) is not None:
            self.agent.handle(event)
        self.agent.tick()

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        """The agent's events of one kind."""
        return [e for e in self.events if e["event"] == kind]


@contextlib.contextmanager
def running(device: Device) -> Iterator[Device]:
    """Connected; at the end it says goodbye and its training process is gone."""
    device.transport.start()
    try:
        yield device
    finally:
        device.agent.run(lambda: False)


def until(what: Callable[[], object], world: World, device: Device) -> None:
    """Let both go on until something is true."""
    end = time.monotonic() + 100
    while not what():
        assert time.monotonic() < end, (world.events, device.events)
        world.step(times=1)
        device.step()
        time.sleep(0.02)


def training_processes() -> list[psutil.Process]:
    """The agent's children."""
    return [p for p in psutil.Process().children() if "edge_runtime.training.worker" in " ".join(p.cmdline())]


def kill_training(number: int, world: World, device: Device) -> None:
    """Wait for the so-many-th training, kill its process, and let the agent see it."""
    until(lambda: len(device.kinds("training")) == number, world, device)
    (process,) = training_processes()
    process.kill()
    until(lambda: len(device.kinds("training-failed")) == number, world, device)


def is_there(world: World) -> bool:
    """Whether the coordinator counts the device as online."""
    return world.server.peers.online() == {NAME}


# the disk


def test_a_disk_that_is_full_when_training_ends_costs_the_round_and_not_the_device(
    tmp_path: Path, model: Path, home: Path
) -> None:
    world = World(tmp_path / "f", model, devices=1, rounds=2)
    with small_disk(tmp_path / "disk", 16 << 20) as disk, running(Device(world.broker, disk, home)) as device:
        until(lambda: device.kinds("training"), world, device)
        end = time.monotonic() + 100
        while not device.agent.outbox.draft.exists():  # the process has ended, the agent has not looked yet
            assert time.monotonic() < end
            time.sleep(0.02)
        filler = fill(disk)
        until(lambda: world.kinds("gave-up"), world, device)
        assert "no space left" in device.kinds("declined")[0]["reason"]
        assert "no space left" in world.kinds("gave-up")[0]["reason"]
        assert BlobStore(disk / "updates").used_bytes() == 0, "what nobody will be offered takes no room"
        filler.unlink()
        until(lambda: len(device.kinds("training")) == 2, world, device)
        assert device.kinds("training")[1]["round"] == 2
        assert is_there(world)
    assert training_processes() == []


def test_tokenised_data_that_is_damaged_costs_the_round_and_is_made_anew_for_the_next(
    tmp_path: Path, model: Path, own: Path
) -> None:
    world = World(tmp_path / "f", model, devices=1, rounds=2)
    (tokens,) = (own / "cache" / "corpora").glob("*/tokens.npy")
    whole = np.load(tokens)
    tokens.write_bytes(tokens.read_bytes()[:200])
    with running(Device(world.broker, tmp_path / "d", own)) as device:
        until(lambda: len(device.kinds("training")) == 2, world, device)
        assert "damaged" in device.kinds("declined")[0]["reason"]
        assert [e["round"] for e in device.kinds("training")] == [1, 2]
        assert np.array_equal(np.load(tokens), whole)
        assert is_there(world)


# the plan


@pytest.mark.parametrize(("codec", "reason"), [("f32", "the upload budget is"), ("int2", "is not known here")])
def test_a_plan_whose_codec_is_over_the_upload_budget_or_unknown_is_given_back(
    codec: str, reason: str, tmp_path: Path, model: Path, home: Path
) -> None:
    world = World(tmp_path / "f", model, devices=2)  # the round waits for the other one
    device = Device(world.broker, tmp_path / "d", home)
    device.agent.session = session(home, upload_bytes=20_000)
    with running(device):
        until(lambda: world.kinds("joined"), world, device)
        row = CostRow(2, False, 4, 1 << 20, 1.0, 1.0, 10, backend="onnx", codec=codec)
        grant = Grant("first", 1, bytes(16), 1, Plan(row, world.server.config.train, 5), 100.0)
        payload = encode(grant, sent_at=0.0, boot=bytes(8), sequence=1)
        device.agent.handle(Message(Topics("test").down(NAME, "grant"), payload))
        assert reason in device.kinds("declined")[0]["reason"]
        assert not device.kinds("training")


# the training process


def test_a_training_process_that_is_killed_is_started_again_as_it_was_then_smaller_then_given_back(
    tmp_path: Path, model: Path, own: Path
) -> None:
    """The calibration is made to say that torch itself weighs nothing and that each piece takes a second, and a batch is large:
    so the plan is for one piece, and smaller ones save enough."""
    for file in (own / "cache" / "calibration").glob("*.json"):
        measured = json.loads(file.read_text())
        measured["calibration"] |= {"runtime_bytes": 0, "rest_fixed_s": 1.0}
        file.write_text(json.dumps(measured))
    world = World(tmp_path / "f", model, devices=1, rounds=2)
    config = tmp_path / "f" / "fleet.toml"
    config.write_text(config.read_text().replace("batch_size = 16", "batch_size = 256"))
    world.fleet = FleetFolder(world.folder)
    world.start()
    with running(Device(world.broker, tmp_path / "d", own)) as device:
        for number in range(1, MAX_ATTEMPTS + 1):
            kill_training(number, world, device)
        until(lambda: world.kinds("gave-up"), world, device)
        first, second, third = device.kinds("training")[:MAX_ATTEMPTS]
        assert (first["attempt"], second["attempt"], third["attempt"]) == (1, 2, 3)
        assert second == {**first, "attempt": 2}
        assert third["peak_bytes_promised"] <= SHRINK * first["peak_bytes_promised"]
        assert (third["depth"], third["steps"]) == (first["depth"], first["steps"])
        assert not any(e["out_of_memory"] for e in device.kinds("training-failed"))
        assert "killed by signal 9" in world.kinds("gave-up")[0]["reason"]
        until(lambda: len(device.kinds("training")) == 4, world, device)
        assert (device.kinds("training")[3]["round"], device.kinds("training")[3]["attempt"]) == (2, 1)


def test_a_training_process_that_is_killed_twice_and_cannot_be_smaller_is_given_back(
    tmp_path: Path, model: Path, home: Path
) -> None:
    world = World(tmp_path / "f", model, devices=1)
    with running(Device(world.broker, tmp_path / "d", home)) as device:
        kill_training(1, world, device)
        kill_training(2, world, device)
        until(lambda: world.kinds("gave-up"), world, device)
        assert [e["attempt"] for e in device.kinds("training")] == [1, 2]
        assert training_processes() == []
        assert is_there(world)


@pytest.mark.parametrize("rounds", [2, 1])
def test_a_training_whose_round_has_failed_is_stopped(tmp_path: Path, model: Path, home: Path, rounds: int) -> None:
    """The model stays, so that only the next round, or the end of the run, tells the device."""
    world = World(tmp_path / "f", model, devices=1, rounds=rounds)
    with running(Device(world.broker, tmp_path / "d", home)) as device:
        until(lambda: device.kinds("training"), world, device)
        world.now += world.fleet.config.run.report_timeout_s + 1
        until(lambda: device.kinds("abandoned") or device.kinds("trained"), world, device)
        assert world.kinds("round-failed")
        assert not device.kinds("trained"), "it would be late"
        assert device.kinds("abandoned")[0]["round"] == 1
        if rounds == 2:
            until(lambda: device.kinds("trained"), world, device)
            assert [e["round"] for e in device.kinds("trained")] == [2]
        assert is_there(world)
    assert training_processes() == []


# the conditions


def test_a_training_comes_last_as_soon_as_somebody_answers_from_the_folder(
    tmp_path: Path, model: Path, home: Path
) -> None:
    world, folder = World(tmp_path / "f", model, devices=1), tmp_path / "d"
    with running(Device(world.broker, folder, home)) as device:
        until(lambda: device.kinds("training"), world, device)
        (process,) = training_processes()
        process.suspend()
        assert process.nice() == max(NICENESS, psutil.Process().nice()) and not is_answered_from(folder)
        with answering_from(folder):
            device.step()
            assert process.nice() == LAST and is_answered_from(folder)
    assert not is_answered_from(folder)


def test_a_device_joins_when_its_conditions_hold_pauses_when_they_end_and_drops_a_round_that_ends_meanwhile(
    tmp_path: Path, model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "LAST", 0)  # on a machine that is busy with other tests it would take minutes
    world, plug = World(tmp_path / "f", model, devices=1, rounds=2), Plug(tmp_path / "root", plugged=False, look_s=1.0)

    def waits() -> bool:
        status = world.server.peers.get(NAME).status
        return bool(status and status.waiting and status.activity == "waiting: on battery, wanted charging")

    with running(Device(world.broker, tmp_path / "d", home, plug.gate)) as device:
        until(lambda: device.kinds("model") and waits(), world, device)
        assert is_there(world) and not world.server.peers.ready(), "no round waits for it"
        assert not world.kinds("joined") and not world.kinds("unable")
        plug.is_plugged(True)
        plug.jump(20)
        until(lambda: device.kinds("training"), world, device)
        plug.is_plugged(False)
        until(lambda: device.kinds("paused"), world, device)
        until(waits, world, device)
        (process,) = training_processes()
        world.now += world.fleet.config.run.report_timeout_s + 1
        until(lambda: device.kinds("abandoned"), world, device)
        assert not process.is_running() and world.kinds("round-failed")
        assert not device.kinds("trained")
        plug.is_plugged(True)
        plug.jump(20)
        until(lambda: len(device.kinds("training")) == 2, world, device)
        plug.is_plugged(False)
        until(lambda: len(device.kinds("paused")) == 2, world, device)
        training_processes()[0].kill()  # as it ends with an agent that is killed; and this one never speaks again
    world.step()
    plug.is_plugged(True)
    with running(Device(world.broker, tmp_path / "d", home, plug.gate)) as device:
        until(lambda: world.kinds("committed"), world, device)
    assert [e["round"] for e in world.kinds("committed")] == [2]
    assert training_processes() == []


# the network


def test_a_manifest_announced_as_absurdly_large_is_not_fetched(tmp_path: Path, home: Path) -> None:
    broker = LocalBroker()
    asked: list[str] = []
    with running(Device(broker, tmp_path / "d", home)) as device:
        coordinator = LocalTransport(broker, "coordinator", Topics("test").coordinator_filters())
        coordinator.start()
        for version, size in ((1, MAX_MANIFEST_BYTES + 1), (2, MAX_MANIFEST_BYTES)):
            model = Model(version, random_hash(), size, False)
            coordinator.publish(
                Topics("test").all("model"), encode(model, sent_at=0.0, boot=bytes(8), sequence=version)
            )
            device.step()
            asked.append(" ".join(e.topic for e in coordinator.inbox if isinstance(e, Message)))
    (refused,) = device.kinds("bad-message")
    assert "manifest_bytes" in refused["reason"]
    assert "/up/need" not in asked[0], "nothing is asked for, no room is made"
    assert "/up/need" in asked[1]


def test_a_flood_of_messages_does_not_keep_an_agent_from_its_turn(tmp_path: Path, model: Path, home: Path) -> None:
    world = World(tmp_path / "f", model, devices=1)
    world.step(times=1)
    device = Device(world.broker, tmp_path / "d", home)
    device.transport.start()
    for _ in range(1000):
        world.broker.deliver(Topics("test").all("round"), b"nonsense", False)

    def asked() -> bool:
        return any(isinstance(e, Message) and e.topic.endswith("/up/need") for e in world.server.transport.inbox)  # type: ignore[attr-defined]

    device.agent.run(lambda: not asked())
    assert len(device.transport.inbox) > 500


def test_a_device_tells_with_its_next_join_what_training_and_sending_took(
    tmp_path: Path, model: Path, home: Path
) -> None:
    world = World(tmp_path / "f", model, devices=1, rounds=2)
    with running(Device(world.broker, tmp_path / "d", home)) as device:
        until(lambda: len(world.kinds("committed")) == 2, world, device)
        first, second = (read_join(world.server.run.ledger.members("first", number)[NAME]) for number in (1, 2))
        assert (first.train_ratio, first.uplink_bytes_per_s) == (0.0, 0.0), "it has not trained yet"
        report = device.kinds("trained")[0]
        assert second.train_ratio == pytest.approx(report["train_s"] / report["promised_s"])
        assert second.uplink_bytes_per_s > 1000
