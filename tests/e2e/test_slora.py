"""SLoRA on the coordinator, against scripted devices: both stages and the step between them, lies, restarts, other settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.cli import main
from edge_coordinator.methods.best_product import best_product
from edge_coordinator.start_adapters import fresh_a
from edge_runtime.layout import MASKED, A, B, layout
from edge_runtime.manifest import Manifest
from edge_runtime.masks import indices
from edge_runtime.records import TrainSettings
from edge_runtime.weights import read_safetensors
from tests.e2e.local import FakeDevice, World, rows
from tests.e2e.test_adapter_protocol import array, begin_again, manifest, random_update, to_the_end

Array = np.ndarray[Any, np.dtype[Any]]
RANK = 10
TABLE = (*rows(0, 1, 2), *rows(1, 2, rank=RANK), *rows(1, 2, rank=4), *rows(1, 2, rank=8))
QUERY = "encoder.layer.1.attention.self.query"


def device(world: World, number: int, **how: Any) -> FakeDevice:
    """One whose updates are random and its own in every round."""

    def update(size: int) -> bytes:
        return random_update(100 * len({grant.round for grant in one.grants}) + number, size)

    usual = {"table": TABLE, "examples": 10 + 20 * number, "update": update}
    one = FakeDevice(world, f"device-{number}", **{**usual, **how})
    return one


def a_world(folder: Path, model: Path, *, rounds: int, method: str = "slora", **changes: str) -> World:
    world = World(folder, model, method=method, rounds=rounds)
    if changes:
        begin_again(world, **changes)
    return world


def until(world: World, devices: Sequence[FakeDevice], opened: int) -> Manifest:
    """Let a round open; -> the model that it begins with."""
    while not any(e["round"] >= opened for e in world.kinds("round-opened")):
        world.step(*devices, times=1)
    return manifest(world)


def version(world: World, number: int) -> Manifest:
    (row,) = [row for row in world.fleet.ledger.models() if row.version == number]
    return world.server.models.manifest(row)


def matrices(of: Manifest) -> list[str]:
    return [t.name for t in of.tensors if 0 <= t.part < of.num_blocks and len(t.shape) == 2]


def blobs(of: Manifest) -> dict[str, bytes]:
    return {t.name: t.blob for t in (*of.tensors, *of.adapters)}


def whole(world: World, name: str, of: Manifest) -> Array:
    """A matrix with what its adapter adds, float64."""
    stem, found = name.removesuffix(".weight"), array(world, name, of).astype(np.float64)
    if stem + A in blobs(of):
        found = found + of.adapter_scale * array(world, stem + B, of).astype(np.float64) @ array(world, stem + A, of)
    return found


def best(change: Array, rank: int) -> Array:
    """Its best product of a rank."""
    left, values, right = np.linalg.svd(change)
    found: Array = left[:, :rank] * values[:rank] @ right[:rank]
    return found


def deltas(world: World, one: FakeDevice, number: int) -> dict[str, Array]:
    """What a scripted device sent in a round, by tensor."""
    plan = one.grants[number].plan
    tensors = layout(manifest(world).spec, plan)
    values = np.frombuffer(
        random_update(100 * (number + 1) + int(one.name[-1]), sum(t.num_bytes for t in tensors)), "<f4"
    )
    ends = np.cumsum([t.size for t in tensors])
    return {t.name: values[end - t.size : end].astype(np.float64) for t, end in zip(tensors, ends, strict=True)}


def test_masked_entries_become_the_adapters_that_lora_begins_with(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=2, seed="7")
    devices = [device(world, i) for i in (0, 1)]
    start = manifest(world)
    last = to_the_end(world, devices)
    assert [(r.round, len(version(world, r.version).adapters) > 0) for r in world.fleet.ledger.models()] == [
        (0, False),
        (1, False),
        (1, True),
        (2, True),
    ]
    sparse, begun = version(world, 2), version(world, 3)
    shares = {one: one.examples / sum(d.examples for d in devices) for one in devices}
    for name in matrices(start):
        wanted = array(world, name, start).astype(np.float64).reshape(-1)
        places = indices(7, name, wanted.size, 10)
        for one, share in shares.items():
            wanted[places] += share * deltas(world, one, 0)[name.removesuffix(".weight") + MASKED]
        found = array(world, name, sparse).reshape(-1)
        assert np.abs(found - wanted).max() < 1e-7
        others = np.setdiff1d(np.arange(wanted.size), places)
        assert (found[others] == array(world, name, start).reshape(-1)[others]).all()
        change = array(world, name, sparse).astype(np.float64) - array(world, name, start)
        stem = name.removesuffix(".weight")
        product = array(world, stem + B, begun).astype(np.float64) @ array(world, stem + A, begun)
        assert np.abs(product - best(change, RANK)).max() < 1e-6 * np.abs(change).max()
        assert np.allclose(array(world, stem + A, begun) @ array(world, stem + A, begun).T, np.eye(RANK), atol=1e-6)
    for name in ("classifier.weight", "classifier.bias"):
        mean = sum(share * deltas(world, one, 0)[name].reshape(-1) for one, share in shares.items())
        assert (
            np.abs(array(world, name, sparse).reshape(-1) - array(world, name, start).reshape(-1) - mean).max() < 1e-7
        )
        assert blobs(begun)[name] == blobs(sparse)[name]
    head = {"classifier.weight", "classifier.bias"}
    for later in (begun, last):
        assert {n: b for n, b in blobs(later).items() if n in blobs(start) and n not in head} == {
            n: b for n, b in blobs(start).items() if n not in head
        }, "the base is the one that the run began with, bit for bit"
        assert later.adapter_scale == 1.0
    stem = matrices(start)[0].removesuffix(".weight")
    for end in (A, B):
        mean = sum(share * deltas(world, one, 1)[stem + end] for one, share in shares.items())
        after = array(world, stem + end, version(world, 4)).reshape(-1)
        assert np.abs(after - array(world, stem + end, begun).reshape(-1) - mean).max() < 1e-6


def test_devices_are_told_the_settings_of_the_rounds_stage(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=3, seed="7", lora_alpha="3.0")
    devices = [device(world, i) for i in (0, 1)]
    to_the_end(world, devices)
    told = [(p.settings.mask_every, p.settings.mask_seed, p.settings.lora_rank, p.adapters, p.chosen.depth, p.chosen.rank)
            for p in (g.plan for g in devices[0].grants)]  # fmt: skip
    assert told == [(10, 7, 0, "", 2, 0), (0, 0, RANK, "ab", 2, RANK), (0, 0, RANK, "ab", 2, RANK)]
    assert {g.plan.settings.lora_alpha for g in devices[0].grants[1:]} == {float(RANK)}
    begun = world.kinds("adapters-begun")
    assert [(e["model_version"], e["primed"]) for e in begun] == [(3, True)]


def test_a_full_first_stage_trains_every_entry_of_the_matrices_and_no_vector(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=1, sparse_density="1.0")
    devices = [device(world, i) for i in (0, 1)]
    start = blobs(manifest(world))
    last = to_the_end(world, devices)
    changed = {name for name, blob in blobs(last).items() if blob != start[name]}
    assert changed == {*matrices(last), "classifier.weight", "classifier.bias"}
    assert last.adapters == (), "where all rounds are sparse there is no second stage"
    shares = [one.examples / 40 for one in devices]
    mean = sum(s * deltas(world, one, 0)[QUERY + MASKED] for s, one in zip(shares, devices, strict=True))
    found = array(world, QUERY + ".weight", last) - array(world, QUERY + ".weight", version(world, 1)).astype(
        np.float64
    )
    assert np.abs(found.reshape(-1) - mean).max() < 1e-7


def test_only_devices_that_can_train_all_blocks_take_part(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=2)
    shallow = device(world, 1, table=(*rows(0, 1), *rows(1, rank=RANK)))
    to_the_end(world, [device(world, 0), shallow])
    assert [a.status for a in shallow.acks] == ["excluded", "excluded"]
    assert [e["members"] for e in world.kinds("round-published")] == [["device-0"]] * 2


def test_targets_have_masks_and_adapters_and_no_other_matrix_changes(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=2, lora_targets='["q","up"]')
    devices = [device(world, i) for i in (0, 1)]
    start = blobs(manifest(world))
    last = to_the_end(world, devices)
    sparse = version(world, 2)
    changed = {name for name, blob in blobs(sparse).items() if blob != start[name]}
    assert changed == {n for n in matrices(sparse) if "query" in n or "intermediate" in n} | {
        "classifier.weight",
        "classifier.bias",
    }
    assert {t.name.rsplit(".", 1)[0] + ".weight" for t in last.adapters} == changed & set(matrices(sparse))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 9.0])
def test_a_masked_entry_with_an_absurd_change_is_rejected(value: float, tmp_path: Path, model: Path) -> None:
    def poisoned(size: int) -> bytes:
        data = np.zeros(size // 4, "<f4")
        data[len(data) // 2] = value
        return data.tobytes()

    world = a_world(tmp_path / "f", model, rounds=1)
    liar = device(world, 1, update=poisoned)
    to_the_end(world, [device(world, 0), liar])
    assert [a.status for a in liar.acks if MASKED in a.reason] == ["rejected"]
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


@pytest.mark.parametrize("change", [-4, 4, 1 << 20])
def test_a_masked_update_of_another_size_is_rejected(change: int, tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=1)
    liar = device(world, 1, update=lambda size: bytes(size + change))
    to_the_end(world, [device(world, 0), liar])
    assert [a.status for a in liar.acks if "the update must be" in a.reason] == ["rejected"]


def test_a_restart_after_every_event_of_both_stages_makes_the_same_versions(tmp_path: Path, model: Path) -> None:
    found = []
    for restart in (False, True):
        world = a_world(tmp_path / f"{restart}", model, rounds=3, codec='"int8"', server_optimizer='"fedadam"')
        table = tuple(replace(row, codec="int8") for row in TABLE)
        devices = [device(world, i, table=table) for i in (0, 1)]
        starts, seen = 0, 0
        while not world.kinds("run-finished"):
            world.step(*devices, times=1)
            news = {e["event"] for e in world.events[seen:]} - {"status", "granted"}
            seen = len(world.events)
            if restart and news:
                world.start()
                starts += 1
        assert not restart or starts > 7
        versions = world.fleet.ledger.models()
        assert [r.round for r in versions] == [0, 1, 1, 2, 3]
        newest = [row.version for row in versions[-3:]]
        states = {v: world.fleet.ledger.optimizer_states("first", v, "fedadam") for v in newest}
        found.append(([row.manifest for row in versions], states))
    assert found[0] == found[1]


def test_the_heads_state_of_the_server_optimizer_goes_on_and_the_matrices_are_done(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=2, server_optimizer='"fedavgm"', server_momentum="0.5")
    devices = [device(world, i) for i in (0, 1)]
    until(world, devices, 2)
    ledger, head = world.fleet.ledger, {"classifier.weight", "classifier.bias"}
    before, begun = (ledger.optimizer_states("first", v, "fedavgm") for v in (2, 3))
    assert set(before) == {*matrices(manifest(world)), *head}
    assert begun == {name: state for name, state in before.items() if name in head}
    last = to_the_end(world, devices)
    shares = [one.examples / 40 for one in devices]
    first, second = (
        sum(s * deltas(world, one, n)["classifier.bias"] for s, one in zip(shares, devices, strict=True))
        for n in (0, 1)
    )
    moved = array(world, "classifier.bias", last).astype(np.float64) - array(
        world, "classifier.bias", version(world, 3)
    )
    assert np.abs(moved - (0.5 * first + second)).max() < 1e-6


def test_a_first_stage_in_which_every_round_failed_is_followed_by_lora_from_the_start(
    tmp_path: Path, model: Path
) -> None:
    world = a_world(tmp_path / "f", model, rounds=2)
    until(world, [], 1)
    nobody = [device(world, i, table=()) for i in (0, 1)]
    for one in nobody:
        one.reason = "no"
    for _ in range(30):
        world.step(*nobody, times=1)
        world.now += 100.0
        if world.kinds("round-failed"):
            break
    begun = until(world, [], 2)
    assert [r["state"] for r in world.fleet.ledger.rounds()] == ["failed", "joining"]
    assert begun.version == 2 and world.kinds("adapters-begun")[0]["primed"] is False
    for tensor in begun.adapters:
        values = array(world, tensor.name, begun)
        wanted = fresh_a(0, 0, tensor.name, tensor.shape) if tensor.name.endswith(A) else np.zeros(tensor.shape)
        assert (values == wanted).all()


def test_versions_of_both_stages_are_exported_whole_and_the_adapters_alone(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=3)
    last = to_the_end(world, [device(world, i) for i in (0, 1)])
    for number in (3, last.version):
        of, out = version(world, number), tmp_path / f"out-{number}"
        assert main(["models", "--fleet", str(world.folder), "--export", str(number), "--out", str(out)]) == 0
        weights = read_safetensors(out / "model.safetensors")
        for name in matrices(of):
            assert np.abs(weights[name].array() - whole(world, name, of)).max() < 1e-6
        adapter = ["--adapter-out", str(tmp_path / f"adapter-{number}")]
        assert main(["models", "--fleet", str(world.folder), "--export", str(number), *adapter]) == 0
    sparse = a_world(tmp_path / "sparse", model, rounds=1)
    of, out = to_the_end(sparse, [device(sparse, i) for i in (0, 1)]), tmp_path / "out-sparse"
    assert main(["models", "--fleet", str(sparse.folder), "--export", "2", "--out", str(out)]) == 0
    weights = read_safetensors(out / "model.safetensors")
    assert all((weights[name].array() == array(sparse, name, of)).all() for name in matrices(of))


def test_under_legend_each_block_begins_with_its_rank_and_what_nobody_trains_stays_primed(
    tmp_path: Path, model: Path
) -> None:
    world = a_world(tmp_path / "f", model, rounds=3, method="slora-legend", lora_rank="4", suffix_depths='"deepest"')
    shallow = (*rows(0, 1), *rows(1, rank=4))
    devices = [device(world, 0, table=shallow), device(world, 1, table=(*rows(0, 1, 2), *rows(1, 2, rank=4)))]
    while not world.kinds("round-published"):
        world.step(*devices, times=1)
    assert [one.grants[0].plan.chosen.depth for one in devices] == [1, 2]
    devices[1].table = shallow
    begun = until(world, devices, 2)
    start, sparse = version(world, 1), version(world, 2)
    for name in matrices(start):
        stem, rank = name.removesuffix(".weight"), 4 if ".layer.1." in name else 3
        change = array(world, name, sparse).astype(np.float64) - array(world, name, start)
        product = array(world, stem + B, begun).astype(np.float64) @ array(world, stem + A, begun)
        assert array(world, stem + A, begun).shape[0] == rank and change.any()
        assert np.abs(product - best(change, rank)).max() < 1e-6 * np.abs(change).max()
    last = to_the_end(world, devices)
    changed = {name for name, blob in blobs(last).items() if blob != blobs(begun)[name]}
    assert changed == {t.name for t in begun.adapters if t.part == 1} | {"classifier.weight", "classifier.bias"}
    assert [g.plan.ranks for g in devices[1].grants] == [(), (4,), (4,)]
    assert last.adapter_scale == 1.0


# other settings, methods and runs


def test_a_second_run_begins_from_its_own_start_however_long_the_first_stage_is(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=1, method="lora")
    devices = [device(world, i) for i in (0, 1)]
    trained = to_the_end(world, devices)
    was = {name: whole(world, name, trained) for name in matrices(trained)}
    path = world.folder / "fleet.toml"
    text = path.read_text().replace('name = "first"', 'name = "second"').replace("rounds = 1", "rounds = 6")
    path.write_text(
        text.replace('method = "lora"', 'method = "slora"').replace("sparse_rounds = 0", "sparse_rounds = 5")
    )
    begin_again(world)
    world.events.clear()
    last = to_the_end(world, devices)
    start = version(world, 4)
    assert start.adapters == () and world.fleet.ledger.run_start() == 4
    for name in matrices(start):
        assert np.abs(array(world, name, start) - was[name]).max() < 1e-7
        assert blobs(last)[name] == blobs(start)[name]
    sparse, begun = version(world, last.version - 2), version(world, last.version - 1)
    change = array(world, QUERY + ".weight", sparse).astype(np.float64) - array(world, QUERY + ".weight", start)
    assert (
        np.abs(
            whole(world, QUERY + ".weight", begun) - array(world, QUERY + ".weight", start) - best(change, RANK)
        ).max()
        < 1e-6
    )
    kept = {row.version for row in world.fleet.ledger.models() if row in world.server.models._kept()}
    assert kept == {1, 4, last.version, last.version - 1, last.version - 2}


def test_more_sparse_rounds_in_the_second_stage_go_back_to_the_first_and_towards_the_same_start(
    tmp_path: Path, model: Path
) -> None:
    world = a_world(tmp_path / "f", model, rounds=4, sparse_rounds="1")
    devices = [device(world, i) for i in (0, 1)]
    start = manifest(world)
    until(world, devices, 3)
    tuned = manifest(world)
    begin_again(world, sparse_rounds="4")
    world.step(*devices, times=30)
    assert world.fleet.ledger.rounds()[2]["reason"].startswith("fleet.toml names other adapters now")
    merged = next(v for v in (version(world, r.version) for r in world.fleet.ledger.models()[-2:]) if not v.adapters)
    assert np.abs(array(world, QUERY + ".weight", merged) - whole(world, QUERY + ".weight", tuned)).max() < 1e-7
    begin_again(world, rounds="5")
    last = until(world, devices, 5)
    assert {n: blobs(last)[n] for n in matrices(start)} == {n: blobs(start)[n] for n in matrices(start)}
    assert last.adapters and world.kinds("adapters-begun")[-1]["primed"]


def test_more_rounds_later_do_not_move_the_end_of_the_first_stage(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=3)
    devices = [device(world, i) for i in (0, 1)]
    to_the_end(world, devices)
    begin_again(world, rounds="12")
    assert world.server.run.stage(4).adapters == "ab"


def test_lora_becomes_slora_and_slora_lora_without_losing_what_was_trained(tmp_path: Path, model: Path) -> None:
    for first, then in (("lora", "slora"), ("slora", "lora")):
        world = a_world(tmp_path / first, model, rounds=4, method=first, sparse_rounds="1")
        devices = [device(world, i) for i in (0, 1)]
        until(world, devices, 3)
        trained = manifest(world)
        begin_again(world, method=f'"{then}"')
        begun = until(world, devices, 4)
        assert begun.version == trained.version + 1
        for name in matrices(trained):
            assert np.abs(whole(world, name, begun) - whole(world, name, trained)).max() < 1e-6, then
        to_the_end(world, devices)


def test_a_plan_of_the_first_stage_counts_as_it_was_made_whatever_the_settings_are_by_then(
    tmp_path: Path, model: Path
) -> None:
    found = []
    for change in ({}, {"sparse_density": "0.5", "seed": "9"}, {"method": '"caff"'}):
        world = a_world(tmp_path / str(len(found)), model, rounds=1)
        first, late = (device(world, i, serve=i == 0) for i in (0, 1))
        world.step(first, late, times=30)
        assert len(world.kinds("committed")) == 1
        begin_again(world, **change)
        late.serve = True
        found.append(blobs(to_the_end(world, [first, late])))
    assert found[0] == found[1] == found[2]


def test_where_another_run_came_between_nothing_of_it_is_cut_to_a_rank(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=2)
    devices = [device(world, i) for i in (0, 1)]
    path, text = world.folder / "fleet.toml", (world.folder / "fleet.toml").read_text()
    while not world.kinds("round-published"):
        world.step(*devices, times=1)
    path.write_text(
        text.replace('name = "first"', 'name = "other"')
        .replace("rounds = 2", "rounds = 1")
        .replace('"slora"', '"caff"')
    )
    begin_again(world)
    between = to_the_end(world, devices)
    path.write_text(text)
    begin_again(world)
    begun = until(world, devices, 2)
    assert world.kinds("adapters-begun")[-1]["primed"] is False
    assert {n: b for n, b in blobs(begun).items() if n in blobs(between)} == blobs(between)


def test_caff_with_a_mask_averages_masked_entries_of_each_suffix(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=1, method="caff", mask_every="4", mask_seed="3")
    deep, shallow = device(world, 0), device(world, 1, table=rows(0, 1))
    last = to_the_end(world, [deep, shallow])
    start = version(world, 1)
    for name in matrices(start):
        wanted, key = array(world, name, start).astype(np.float64).reshape(-1), name.removesuffix(".weight") + MASKED
        sent = [(one.examples, deltas(world, one, 0)) for one in (deep, shallow)]
        trained = [(n, d[key]) for n, d in sent if key in d]
        assert len(trained) == (2 if ".layer.1." in name else 1)
        mean = sum(n * d for n, d in trained) / sum(n for n, _ in trained)
        wanted[indices(3, name, wanted.size, 4)] += mean
        assert np.abs(array(world, name, last).reshape(-1) - wanted).max() < 1e-7


# the start, as arithmetic


def test_a_start_of_more_ranks_than_there_are_directions_keeps_random_rows_beside_zero_columns() -> None:
    chance = np.random.default_rng(3)
    fresh = fresh_a(1, 0, "x", (6, 12))
    for rank in range(5):
        change = chance.normal(size=(4, rank)) @ chance.normal(size=(rank, 12))
        a, b = best_product(change, fresh)
        assert np.abs(b @ a - change).max() < 1e-12
        assert (a[rank:] == fresh[rank:]).all() and not b[:, rank:].any()
        assert np.linalg.norm(a, axis=1).min() > 0.1
        assert np.abs(b[:, :rank]).max(axis=0, initial=1.0).all()


def test_a_start_is_the_best_product_of_its_rank_and_balanced_as_the_paper_has_it() -> None:
    change = np.random.default_rng(4).normal(size=(20, 9))
    a, b = best_product(change, fresh_a(1, 0, "x", (3, 9)))
    values = np.linalg.svd(change, compute_uv=False)
    assert np.isclose(np.linalg.norm(change - b @ a), np.linalg.norm(values[3:]))
    assert np.allclose(a @ a.T, np.eye(3)) and np.allclose(b.T @ b, np.diag(values[:3] ** 2))


def test_the_settings_of_a_run_have_neither_masks_nor_another_scale(tmp_path: Path, model: Path) -> None:
    world = a_world(tmp_path / "f", model, rounds=3)
    assert world.fleet.config.train == TrainSettings(lora_rank=RANK)
