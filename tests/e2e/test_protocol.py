"""The coordinator against devices that repeat themselves, lie, send nonsense, cannot take part or vanish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_coordinator.cli import main
from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.models import Models
from edge_coordinator.server import MAX_NEWS
from edge_runtime.errors import ModelError, StoreError, UsageError
from edge_runtime.topics import Topics
from edge_runtime.transport import Message
from edge_runtime.wire import BlobRange, Need, Status, encode, encode_chunk
from tests.e2e.local import FakeDevice, World, constant_update, lie, random_hash, rows

ALL = rows(0, 1, 2)


def finished(world: World) -> bool:
    return bool(world.kinds("run-finished"))


def run_two(world: World, second: FakeDevice | None = None) -> None:
    devices = [
        FakeDevice(world, "device-0", table=ALL),
        second or FakeDevice(world, "device-1", table=rows(0, 1), examples=30),
    ]
    world.step(*devices, times=60)


def test_every_message_twice_gives_the_same_model_as_once(tmp_path: Path, model: Path) -> None:
    once, twice = World(tmp_path / "a" / "f", model), World(tmp_path / "b" / "f", model, twice=True)
    for world in (once, twice):
        run_two(world)
        assert finished(world), world.events
    assert len(twice.kinds("committed")) == 2
    assert once.tensors() == twice.tensors()


def test_the_mean_is_weighted_by_examples_for_each_layer_by_itself(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    before = {
        t.name: np.fromfile(world.server.models.store.path(t.blob), "<f4") for t in world.server.run.manifest.tensors
    }
    second = FakeDevice(
        world, "device-1", table=rows(0, 1), examples=30, update=lambda size: constant_update(size, 0.05)
    )
    run_two(world, second)
    after = {
        t.name: np.fromfile(world.server.models.store.path(t.blob), "<f4") for t in world.server.run.manifest.tensors
    }
    for tensor in world.server.run.manifest.spec.tensors:
        change = after[tensor.name] - before[tensor.name]
        expected = {-1: 0.0, 0: 0.01, 1: (10 * 0.01 + 30 * 0.05) / 40, 2: (10 * 0.01 + 30 * 0.05) / 40}[tensor.part]
        assert np.allclose(change, expected, atol=1e-6), tensor.name


@pytest.mark.parametrize(
    ("name", "tamper", "reason"),
    [
        ("size", lie(num_bytes=400), "must be"),
        ("absurd size", lie(num_bytes=1 << 49), "must be"),
        ("lease", lie(nonce=bytes(16)), "lease"),
        ("examples", lie(num_examples=1 << 19), "joined with"),
        ("codec", lie(codec="zip"), "must be"),
    ],
)
def test_an_offer_that_lies_is_rejected_and_the_round_goes_on(
    name: str, tamper: object, reason: str, tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model)
    liar = FakeDevice(world, "device-1", table=ALL, tamper=tamper)  # type: ignore[arg-type]
    run_two(world, liar)
    if name == "lease":  # whoever has no lease cannot end the lease of another: the round waits for the real one
        assert not finished(world)
        world.now += 10_000
        world.step(times=5)
    assert finished(world)
    assert [a.status for a in liar.acks if reason in a.reason][:1] == ["rejected"]
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 9.0])
def test_an_update_with_absurd_numbers_is_rejected(value: float, tmp_path: Path, model: Path) -> None:
    def poisoned(size: int) -> bytes:
        data = np.zeros(size // 4, "<f4")
        data[len(data) // 2] = value
        return data.tobytes()

    world = World(tmp_path / "f", model)
    liar = FakeDevice(world, "device-1", table=ALL, update=poisoned)
    run_two(world, liar)
    assert finished(world)
    assert "rejected" in [a.status for a in liar.acks]
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


def test_bytes_that_do_not_have_the_offered_hash_are_rejected_after_three_tries(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    honest = FakeDevice(world, "device-0", table=ALL)
    liar = FakeDevice(world, "device-1", table=ALL, tamper=lie(blob=random_hash()), serve=False)
    for _ in range(60):
        world.step(honest, liar, times=1)
        receiver = world.server.peers.get("device-1").receiver
        for blob, incoming in list(receiver._incoming.items()):
            for start in range(0, incoming.size, 65536):
                chunk = encode_chunk(blob, start, bytes(min(65536, incoming.size - start)))
                liar.transport.publish(liar.topics.up("device-1", "c"), chunk)
    assert finished(world)
    assert "hash" in next(a.reason for a in liar.acks if a.status == "rejected")
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


def test_chunks_that_nobody_asked_for_leave_nothing_on_disk(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    device = FakeDevice(world, "device-0", table=ALL, serve=False)
    for offset in (0, 4096, 1 << 40):
        device.transport.publish(device.topics.up("device-0", "c"), encode_chunk(random_hash(), offset, bytes(4096)))
    world.step(device)
    assert world.server.models.updates.used_bytes() == 0


def test_nonsense_on_every_topic_changes_nothing_and_is_logged_once_a_kind(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    vandal = FakeDevice(world, "device-0", table=ALL)
    for kind in ("st", "join", "offer", "need", "c", "grant", "ack", "x"):
        for payload in (b"", b"\x00", b"\xff" * 100, bytes(20_000), b"\x81\xa1v\x01", b"\xdf\xff\xff\xff\xff"):
            vandal.transport.publish(vandal.topics.up("device-0", kind), payload)
    world.step(times=3)
    assert len(world.kinds("bad-message")) <= 8
    run_two(world)
    assert finished(world)


def test_messages_of_a_device_that_is_not_enrolled_or_is_revoked_are_ignored(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    stranger = FakeDevice(world, "stranger", table=ALL)
    world.step(stranger)
    assert not world.kinds("joined") and not world.kinds("status")


def test_a_device_cannot_fetch_another_devices_update(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, goal=2)
    first, spy = FakeDevice(world, "device-0", table=ALL), FakeDevice(world, "device-1", table=ALL, serve=False)
    world.step(first, spy, times=30)
    (blob,) = [c.blob for c in world.fleet.ledger.contributions("first", 1).values()]
    assert world.server.models.updates.has(blob)
    spy.send("need", Need((BlobRange(blob, 0, 100),)))
    while (event := world.server.transport.next_event(0)) is not None:
        world.server.handle(event)
    world.server.tick()
    got = [e for e in spy.transport.inbox if isinstance(e, Message) and e.topic.endswith("/dn/c")]
    assert not got


def test_a_device_for_which_nothing_fits_says_what_it_needs_and_stays(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, rounds=2)
    small = FakeDevice(world, "device-1", table=rows(0, 1, peak=1 << 40), reason="not even the head fits")
    run_two(world, small)
    assert finished(world)
    unable = world.kinds("unable")
    assert [e["round"] for e in unable] == [1, 2] and unable[0]["needs_bytes"] == 123 << 20
    assert {a.status for a in small.acks} == {"declined"}


@pytest.mark.parametrize(
    ("method", "depths"),
    [("caff", {"device-0": 2, "device-1": 1}), ("straggler", {"device-0": 1, "device-1": 1}), ("head", {"device-0": 0, "device-1": 0}), ("full", {"device-0": 2}), ("exclusive", {"device-0": 2})],
)  # fmt: skip
def test_each_method_grants_its_depths(method: str, depths: dict[str, int], tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method=method)
    run_two(world)
    assert finished(world)
    assert {e["device"]: e["depth"] for e in world.kinds("granted")} == depths
    assert world.kinds("round-published")[0]["members"] == sorted(depths)


def test_a_device_that_vanishes_after_its_grant_costs_only_the_deadline(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    gone = FakeDevice(world, "device-1", table=ALL, serve=False)
    world.step(FakeDevice(world, "device-0", table=ALL), gone, times=40)
    assert not finished(world)
    world.now += world.fleet.config.run.report_timeout_s + 1
    world.step(times=3)
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


def test_below_the_quorum_at_the_deadline_the_round_fails_and_the_model_stays(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, quorum=2)
    before = world.tensors()
    world.step(
        FakeDevice(world, "device-0", table=ALL), FakeDevice(world, "device-1", table=ALL, serve=False), times=40
    )
    world.now += world.fleet.config.run.report_timeout_s + 1
    world.step(times=3)
    assert world.kinds("round-failed") and world.tensors() == before


def test_a_late_update_is_told_so(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    late = FakeDevice(world, "device-1", table=ALL, serve=False)
    world.step(FakeDevice(world, "device-0", table=ALL), late, times=40)
    world.now += world.fleet.config.run.report_timeout_s + 1
    world.step(times=3)
    late.offer(late.grants[0])
    world.step(late)
    assert late.acks[-1].status == "late"


def test_updates_are_folded_early_without_changing_a_bit_of_the_result(tmp_path: Path, model: Path) -> None:
    def run(folder: Path, fold_at: int, monkeypatch: pytest.MonkeyPatch) -> World:
        monkeypatch.setattr("edge_coordinator.server.FOLD_AT", fold_at)
        world = World(folder / "f", model, devices=5)
        devices = [
            FakeDevice(world, n, table=rows(0, 1, 2)[: i % 3 + 1], examples=7 * i + 1, update=_noise(i))
            for i, n in enumerate(world.names)
        ]
        world.step(*devices, times=80)
        assert finished(world), world.events
        return world

    with pytest.MonkeyPatch.context() as patch:
        eager, lazy = run(tmp_path / "a", 2, patch), run(tmp_path / "b", 100, patch)
    assert eager.tensors() == lazy.tensors()
    assert eager.server.models.updates.used_bytes() == 0


def _noise(seed: int) -> object:
    def make(size: int) -> bytes:
        return np.random.default_rng(seed).normal(0, 0.01, size // 4).astype("<f4").tobytes()

    return make


def test_a_restarted_coordinator_takes_up_the_round_and_grants_the_same_plan(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    first, second = FakeDevice(world, "device-0", table=ALL), FakeDevice(world, "device-1", table=ALL, serve=False)
    world.step(first, second, times=30)
    world.start()
    second.serve = True
    second.join("first", 1)
    world.step(first, second, times=40)
    assert finished(world)
    assert len({g.nonce for g in second.grants}) == 1
    assert world.server.run.epoch == 2


def test_a_finished_run_keeps_serving_its_model_to_newcomers(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    run_two(world)
    newest = Models(world.folder, world.fleet.ledger).newest()
    assert newest and newest[0].version == 2
    newcomer = FakeDevice(world, "device-1")
    newcomer.send("need", Need((BlobRange(newest[1], 0, 100),)))
    world.step(times=2)
    assert [e for e in newcomer.transport.inbox if isinstance(e, Message) and e.topic.endswith("/dn/c")]


def test_an_update_whose_bytes_arrive_after_the_round_ended_is_late_and_never_committed(
    tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model)
    slow = FakeDevice(world, "device-1", table=ALL, serve=False)
    world.step(FakeDevice(world, "device-0", table=ALL), slow, times=40)
    world.now += world.fleet.config.run.report_timeout_s + 1
    world.step(times=3)
    slow.serve = True
    world.step(slow, times=20)
    assert {a.status for a in slow.acks} == {"late"}
    assert list(world.fleet.ledger.contributions("first", 1)) == ["device-0"]
    assert world.server.models.updates.used_bytes() == 0


def test_a_revoked_device_does_not_hold_its_round(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    gone = FakeDevice(world, "device-1", table=ALL, serve=False)
    world.step(FakeDevice(world, "device-0", table=ALL), gone, times=40)
    assert not finished(world)
    world.fleet.ledger.revoke("device-1")
    world.step(times=3)
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


def test_a_device_that_changes_its_mind_for_ever_fills_no_log(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, devices=3)
    wavering = FakeDevice(world, "device-1", table=ALL)
    world.step(wavering)
    for i in range(200):
        wavering.table = ALL if i % 2 else ()
        wavering.join("first", 1)
        wavering.send("st", Status("online", "test", 1, activity=f"step {i}"))
    world.step(times=3)
    assert len(world.kinds("joined")) + len(world.kinds("unable")) <= 4
    assert len(world.kinds("status")) <= 4


def test_a_device_whose_state_changes_for_ever_fills_neither_log_nor_ledger_and_its_last_word_is_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "f", model, devices=3)
    flapping, written = FakeDevice(world, "device-1"), 0
    seen = world.fleet.ledger.seen

    def counted(*values: object) -> None:
        nonlocal written
        written += 1
        seen(*values)  # type: ignore[arg-type]

    monkeypatch.setattr(world.fleet.ledger, "seen", counted)
    for i in range(200):
        flapping.send("st", Status("online" if i % 2 else "leaving", "test", i))
        world.step(times=1)
    assert len(world.kinds("status")) <= 4 + MAX_NEWS and written <= 4 + MAX_NEWS
    monkeypatch.setattr("edge_coordinator.server.STATUS_EVENT_S", 0.0)
    world.step(times=1)
    assert world.kinds("status")[-1]["model_version"] == 199
    assert world.fleet.ledger.devices()[1]["model_version"] == 199


def test_a_status_that_a_full_disk_did_not_take_is_noted_later(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "f", model)

    def full(*_: object) -> None:
        raise StoreError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(world.fleet.ledger, "seen", full)
        FakeDevice(world, "device-1")
        world.step(times=20)
        assert 1 <= len(world.kinds("storage-error")) <= 2, "not at every turn"
    world.server.peers.get("device-1").told_at = 0.0
    world.step(times=1)
    assert world.fleet.ledger.devices()[1]["state"] == "online"


# a store that is damaged


def damage(path: Path, how: str) -> None:
    """A file of the store is gone or cut short."""
    if how == "is missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("how", ["is missing", "has"])
def test_a_tensor_that_is_missing_or_cut_short_is_said_at_the_start_and_on_export(
    how: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path / "f", model)
    run_two(world)
    manifest = world.server.run.manifest
    head, store = manifest.tensors[-1].blob, world.server.models.store
    damage(store.path(head), how)
    with pytest.raises(StoreError, match=f"model 2 is not whole: .*{head.hex()} {how}.*backup"):
        world.start()
    fleet, out = ["models", "--fleet", str(world.folder), "--export"], tmp_path / "out"
    assert main([*fleet, "2", "--out", str(out)]) == 10
    assert head.hex() in capsys.readouterr().err
    assert not out.exists(), "no folder is left where nothing was written"
    assert main([*fleet, "1", "--out", str(out)]) == 0, "an older version is whole"


@pytest.mark.parametrize("how", ["is missing", "cannot be read"])
def test_a_manifest_that_is_missing_or_damaged_is_not_called_one_that_is_no_longer_kept(
    how: str, tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model)
    run_two(world)
    damage(world.server.models.store.path(world.server.run.manifest_blob), how)
    with pytest.raises(StoreError, match=f"model 2 is not whole: its manifest .* {how}"):
        world.start()
    with pytest.raises(StoreError, match="model 2 is not whole: its manifest"):
        world.server.models.export_folder(2, tmp_path / "out")


def test_a_version_whose_tensors_are_no_longer_kept_is_said_to_be_so(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, rounds=5)
    world.step(*(FakeDevice(world, name, table=rows(0)) for name in world.names), times=200)
    assert finished(world)
    with pytest.raises(ModelError, match="of model 2 are no longer kept"):
        world.server.models.export_folder(2, tmp_path / "out")


def test_a_run_with_another_name_says_that_it_sets_the_open_round_aside(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    world.step(FakeDevice(world, "device-0", table=ALL), times=10)
    path = world.folder / "fleet.toml"
    path.write_text(path.read_text().replace('name = "first"', 'name = "second"'))
    world.fleet = FleetFolder(world.folder)
    world.start()
    assert "second" in world.kinds("round-failed")[0]["reason"]
    assert world.fleet.ledger.last_round("first")["state"] == "failed"  # type: ignore[index]


def test_the_fleets_name_cannot_change_under_its_devices(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    path = world.folder / "fleet.toml"
    path.write_text(path.read_text().replace('name = "test"', 'name = "other"'))
    with pytest.raises(UsageError, match="put it back"):
        FleetFolder(world.folder)


def test_a_flood_of_one_device_does_not_keep_the_coordinator_from_its_turn(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    flooding = FakeDevice(world, "device-0", table=ALL)
    for step in range(1000):
        flooding.send("st", Status("online", "test", 1, step=step))
    world.server.serve(lambda: not world.kinds("round-opened"))
    assert len(world.server.transport.inbox) > 500, "a turn came after a bounded part of it"  # type: ignore[attr-defined]


# serve --until-finished


def serve_until_finished(world: World, *moves: Callable[[], object], turns: int = 200) -> int:
    """Serve, with a move of the devices after each turn; -> the turns it took to end by itself."""
    taken = 0

    def keep_going() -> bool:
        nonlocal taken
        if 0 < taken <= len(moves):
            moves[taken - 1]()
        taken += 1
        return taken <= turns

    world.server.serve(keep_going, until_finished=True)
    return taken


def fetched(device: FakeDevice) -> bool:
    """Whether chunks of a model have come."""
    return any(isinstance(e, Message) and e.topic.endswith("/dn/c") for e in device.transport.inbox)


def test_until_finished_ends_when_every_device_that_is_there_has_fetched_the_final_model(
    tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model, devices=3, goal=2)
    first, second = FakeDevice(world, "device-0", table=ALL), FakeDevice(world, "device-1", table=ALL)
    gone = FakeDevice(world, "device-2")
    gone.send("st", Status("offline", "test", 1))
    assert serve_until_finished(world, turns=10) > 10, "the run is not finished"
    world.start()
    world.step(first, second, times=60)
    assert finished(world), world.events
    blob = world.server.run.manifest_blob
    moves: list[Callable[[], object]] = [
        lambda: first.send("st", Status("online", "test", 2)),
        lambda: second.send("need", Need((BlobRange(blob, 0, 100),))),
        lambda: None,
        lambda: None,
        lambda: second.send("st", Status("online", "test", 2)),
    ]
    assert len(moves) < serve_until_finished(world, *moves) < 20
    assert fetched(second)


def test_until_finished_hands_over_too_after_a_restart_of_the_coordinator(tmp_path: Path, model: Path) -> None:
    """Killed between its last round and the hand-over, it has not heard from anybody yet."""
    world = World(tmp_path / "f", model)
    run_two(world)
    assert finished(world)
    world.start()
    assert serve_until_finished(world, turns=10) > 10
    world.start()
    moves = [
        lambda: FakeDevice(world, "device-0").send("st", Status("online", "test", 2)),
        lambda: FakeDevice(world, "device-1").send("st", Status("leaving", "test", 1)),
    ]
    assert serve_until_finished(world, *moves) < 20


def test_until_finished_does_not_wait_for_ever_for_a_device_that_never_fetches(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "f", model)
    run_two(world)
    assert serve_until_finished(world, turns=10) > 10
    monkeypatch.setattr("edge_coordinator.server.HAND_OVER_S", 0.0)
    assert serve_until_finished(world, turns=10) < 10


def test_until_finished_does_not_wait_for_a_revoked_device(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model)
    run_two(world)
    world.fleet.ledger.revoke("device-1")
    first = world.broker.clients["device-0"]
    status = encode(Status("online", "test", 2), sent_at=0.0, boot=bytes(8), sequence=1000)
    moves = [lambda: first.publish(Topics("test").up("device-0", "st"), status)]
    assert serve_until_finished(world, *moves) < 20
