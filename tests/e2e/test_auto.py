"""auto against scripted devices and in real fleets: every kind in one round, lies, restarts, other methods; the same bits simulated."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.fleet import init
from edge_coordinator.sim.simulation import SimOptions, Simulation
from edge_runtime.layout import MASKED, layout
from edge_runtime.records import CostRow
from edge_runtime.store import cache_folder
from tests.e2e.conftest import Reference
from tests.e2e.fleets import LABELS, Fleet, running, write_data
from tests.e2e.local import FakeDevice, World
from tests.e2e.test_adapter_protocol import array, begin_again, manifest, random_update, to_the_end
from tests.e2e.test_adapters import bits, newest

QUERY = "encoder.layer.1.attention.self.query.weight"


def rows(kind: str, *depths: int) -> tuple[CostRow, ...]:
    """A cost table of one kind, and the head."""
    rank, every = 8 * (kind == "adapters"), 10 * (kind == "entries")
    deep = tuple(CostRow(d, False, 4, 1 << 20, 0.1, 1.0, 1000 * d, rank=rank, mask_every=every) for d in depths)
    return (CostRow(0, False, 4, 1 << 20, 0.1, 1.0, 10), *deep)


def device(world: World, number: int, kind: str, *depths: int, **how: Any) -> FakeDevice:
    """One that can train one kind, and sends random updates of its own in every round."""

    def update(size: int) -> bytes:
        return random_update(100 * len({grant.round for grant in one.grants}) + number, size)

    usual: dict[str, Any] = {"table": rows(kind, *depths), "examples": 10 + 20 * number, "update": update}
    one = FakeDevice(world, f"device-{number}", **{**usual, **how})
    return one


def three(world: World) -> list[FakeDevice]:
    return [device(world, 0, "blocks", 1), device(world, 1, "entries", 1, 2), device(world, 2, "adapters", 1, 2)]


def test_every_kind_is_granted_in_one_round_and_no_version_has_adapters(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, devices=3, method="auto", rounds=2)
    devices = three(world)
    last = to_the_end(world, devices)
    plans = [one.grants[0].plan for one in devices]
    assert [(p.chosen.depth, p.settings.lora_rank, p.settings.mask_every, p.adapters) for p in plans] == [
        (1, 0, 0, ""), (2, 0, 10, ""), (2, 8, 0, "fresh")]  # fmt: skip
    assert [p.settings.learning_rate for p in plans] == pytest.approx([2e-4, 1e-3, 2e-4])
    assert plans[2].settings.adapter_learning_rate == pytest.approx(1e-3)
    masks = [one.plan.settings.mask_seed for one in devices[1].grants]
    assert len(masks) == 2 and masks[0] != masks[1], "other entries in each round"
    versions = [world.server.models.manifest(row) for row in world.fleet.ledger.models()]
    assert [v.version for v in versions] == [1, 2, 3] and not any(v.adapters for v in versions)
    before = {t.name: t.blob for t in versions[0].tensors}
    changed = {t.name for t in last.tensors if t.blob != before[t.name]}
    assert changed == {t.name for t in last.spec.suffix(1)} | {
        t.name for t in last.tensors if t.part == 0 and len(t.shape) == 2
    }


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_kind_whose_update_has_the_size_of_another_or_absurd_numbers_is_rejected(
    number: int, tmp_path: Path, model: Path
) -> None:
    def poisoned(size: int) -> bytes:
        data = np.zeros(size // 4, "<f4")
        data[3] = np.nan
        return data.tobytes()

    for name, update in (("size", lambda size: bytes(size + 4)), ("nan", poisoned)):
        world = World(tmp_path / name, model, devices=3, method="auto")
        devices = three(world)
        devices[number].update = update
        to_the_end(world, devices)
        assert [a.status for a in devices[number].acks][-1] == "rejected"
        assert len(world.kinds("round-published")[0]["members"]) == 2


def test_a_restart_after_every_event_makes_the_same_versions(tmp_path: Path, model: Path) -> None:
    found = []
    for restart in (False, True):
        world = World(tmp_path / f"{restart}", model, devices=3, method="auto", rounds=2)
        begin_again(world, server_optimizer='"fedadam"')
        devices, seen, starts = three(world), 0, 0
        while not world.kinds("run-finished"):
            world.step(*devices, times=1)
            news = {e["event"] for e in world.events[seen:]} - {"status", "granted"}
            seen = len(world.events)
            if restart and news:
                world.start()
                starts += 1
        assert not restart or starts > 5
        versions = world.fleet.ledger.models()
        states = [world.fleet.ledger.optimizer_states("first", row.version, "fedadam") for row in versions[1:]]
        found.append(([row.manifest for row in versions], states))
    assert found[0] == found[1]


def test_auto_after_lora_begins_with_its_adapters_merged_and_lora_after_auto_anew(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="lora", rounds=3)
    lora = [device(world, i, "adapters", 1, 2) for i in (0, 1)]
    while not world.kinds("round-published"):
        world.step(*lora, times=1)
    trained = manifest(world)
    begin_again(world, method='"auto"')
    devices = [device(world, 0, "entries", 1, 2), device(world, 1, "adapters", 1, 2)]
    while len(world.kinds("round-published")) < 2:
        world.step(*devices, times=1)
    assert manifest(world).adapters == ()
    begun = world.server.models.manifest(world.fleet.ledger.models()[-2])
    stem = QUERY.removesuffix(".weight")
    whole = array(world, QUERY, trained) + 2.0 * array(world, stem + ".lora_b", trained) @ array(
        world, stem + ".lora_a", trained
    )
    assert np.allclose(array(world, QUERY, begun), whole, atol=1e-7)
    assert any(t.name.endswith(MASKED) for t in layout(begun.spec, devices[0].grants[-1].plan))


# in real fleets

CHANGES = {"lora_rank = 0": "lora_rank = 2", "sparse_density = 0.1": "sparse_density = 0.5"}
WIDE = "40kB"  # all of one block takes more than half of the entries of both
NARROW = "20kB"  # adapters of rank 2 in both blocks take 7,564 bytes; half of their entries 33,164, of one block 16,780


def edit(folder: Path) -> None:
    text = (folder / "fleet.toml").read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "fleet.toml").write_text(text)


@pytest.mark.slow
def test_a_simulation_that_is_stopped_and_a_fleet_whose_coordinator_is_killed_give_the_same_bits(
    model: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(reference.cache, tmp_path / "cache")
    if (cache_folder() / "graphs").exists():
        shutil.copytree(cache_folder() / "graphs", cache / "graphs", dirs_exist_ok=True)
    data, classes, folder = tmp_path / "all.csv", tmp_path / "classes.toml", tmp_path / "sim"
    classes.write_text(f'[wide]\nmemory = "2GB"\nupload = "{WIDE}"\n[narrow]\nmemory = "2GB"\nupload = "{NARROW}"\n')
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "device"])
        for number in range(2):
            with write_data(tmp_path / f"{number}.csv", number).open(newline="") as one:
                writer.writerows([*row, f"user {number}"] for row in list(csv.reader(one))[1:])
    init(folder, name="test", base=str(model), labels=LABELS, max_length=32, method="auto", rounds=2, goal=2, quorum=2, seed=3)  # fmt: skip
    edit(folder)
    options = SimOptions(data, classes="wide:1,narrow:1", class_file=classes, partition="by:device")
    with monkeypatch.context() as patched:
        patched.setenv("EDGE_CACHE", str(cache))
        seen: list[dict[str, Any]] = []

        def simulated(most: int) -> Simulation:
            return Simulation(folder, options, progress=seen.append, say=print, keep_going=lambda: len(seen) < most)

        with pytest.raises(KeyboardInterrupt):
            simulated(3).run()
        simulated(1000).run()
    done = [row for row in seen if row.get("state") == "published"]
    trained = [{d["class"]: (d["depth"], d["rank"], d["mask_every"]) for d in row["devices"]} for row in done]
    assert trained == [{"wide": (2, 0, 2), "narrow": (2, 2, 0)}] * 2
    _, last = newest(folder)
    assert last.version == 3 and not last.adapters
    upload = [NARROW if d["class"] == "narrow" else WIDE for d in done[0]["devices"]]
    fleet = Fleet(tmp_path, model, method="auto", cache=reference.cache, upload=upload)
    edit(fleet.fleet)
    with running(fleet):
        fleet.start_all()
        fleet.wait(lambda: fleet.events("coordinator", "committed"), 240)
        fleet.kill("coordinator")
        fleet.start("coordinator")
        fleet.wait(lambda: fleet.events("coordinator", "round-published"), 240)
        fleet.kill("device-0")
        fleet.start("device-0")
        fleet.wait(fleet.finished, 240)
    assert bits(fleet.fleet) == bits(folder)
