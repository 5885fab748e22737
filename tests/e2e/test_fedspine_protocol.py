"""FedSpine on the coordinator against scripted devices: what they keep, lies about it, restarts, another method, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.cli import main
from edge_coordinator.methods import METHODS
from edge_runtime.errors import UsageError
from edge_runtime.importance import Scores, choose
from edge_runtime.model import ModelSpec
from edge_runtime.prune_plan import kept_of
from edge_runtime.pruning import Kept, pruned_spec
from edge_runtime.wire import Offer
from tests.e2e.local import FakeDevice, World, rows
from tests.e2e.test_adapter_protocol import array, begin_again, manifest, random_update, to_the_end

TABLE = (*rows(0, 1, 2), *rows(1, 2, rank=8), *rows(1, 2, rank=4), *rows(1, 2, rank=2))
PRUNING = [name for name, method in METHODS.items() if method.prunes]


def keeper(seed: int) -> Callable[[ModelSpec, Kept, float], Kept]:
    """A device's own taste."""

    def keep(spec: ModelSpec, begun: Kept, sparsity: float) -> Kept:
        scores, random = Scores(spec), np.random.default_rng(seed)
        for values in (*scores.heads, *scores.channels):
            values[...] = random.random(values.shape)
        return choose(spec, begun, scores, sparsity)

    return keep


def device(world: World, number: int, **how: Any) -> FakeDevice:
    """One whose updates and taste are random and its own."""

    def update(size: int) -> bytes:
        return random_update(100 * len({grant.round for grant in one.grants}) + number, size)

    usual = {"table": TABLE, "examples": 10 + 20 * number, "update": update, "keep": keeper(number)}
    one = FakeDevice(world, f"device-{number}", **{**usual, **how})
    return one


@pytest.mark.parametrize("method", PRUNING)
def test_the_fleets_model_reaches_the_sparsity_and_is_exported_as_a_smaller_one(
    method: str, tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model, method=method, rounds=3)
    begin_again(world, prune_rounds="2")
    devices = [device(world, i) for i in (0, 1)]
    last = to_the_end(world, devices)
    spec, found = last.spec, [e["sparsity"] for e in world.kinds("round-published")]
    assert found[0] <= found[1] == found[2] == pytest.approx(0.5)
    for one in devices:
        kept = [kept_of(spec, grant.plan.pruning.kept) for grant in one.grants if grant.plan.pruning]
        assert kept[0] == Kept.full(spec) and kept[1].within(kept[0]) and kept[2].within(kept[1])
        assert kept[2].sparsity(spec) == pytest.approx(0.5)
        assert [grant.plan.adapters for grant in one.grants] == ["ab"] * 3
    out = tmp_path / "out"
    command = ["models", "--fleet", str(world.folder), "--export", str(last.version)]
    assert main([*command, "--out", str(out)]) == 0
    from edge_models import bert

    config, weights = bert.open_folder(out)
    small = pruned_spec(spec, kept_of(spec, last.kept))
    assert bert.describe(config, spec.labels, spec.max_length).tensors == small.tensors
    smaller = sum(t.num_bytes for t in small.tensors)
    assert smaller < (out / "model.safetensors").stat().st_size < smaller + (8 << 10)
    assert set(weights) == {t.name for t in small.tensors}
    assert main([*command, "--adapter-out", str(tmp_path / "adapter")]) == 2


def lie_about(kept: Callable[[ModelSpec, Kept], bytes]) -> dict[str, Any]:
    """A device whose update has the planned size, and whose offer says that it has kept something else."""
    spec: list[ModelSpec] = []

    def keep(of: ModelSpec, begun: Kept, sparsity: float) -> Kept:
        spec[:] = [of]
        return keeper(1)(of, begun, sparsity)

    def tamper(offer: Offer) -> Offer:
        return replace(offer, kept=kept(spec[0], kept_of(spec[0], offer.kept)))

    return {"keep": keep, "tamper": tamper}


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        (lambda spec, kept: b"", "does not say what it has kept"),
        (lambda spec, kept: Kept.full(spec).encode(), "heads and"),
        (lambda spec, kept: bytes(len(kept.encode())), "keeps no heads"),
        (lambda spec, kept: kept.encode()[:-1], "bytes say what a pruned model keeps"),
        (lambda spec, kept: kept.encode() + b"\0", "bytes say what a pruned model keeps"),
        (lambda spec, kept: b"\xff" * 12_000, "beyond its"),
        (lambda spec, kept: choose(spec, kept, Scores(spec), 0.7).encode(), "heads and"),
    ],
)
def test_a_lie_about_what_is_kept_is_rejected(kept: Any, why: str, tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="prune-oneshot")
    liar = device(world, 1, **lie_about(kept))
    to_the_end(world, [device(world, 0), liar])
    assert [why in a.reason for a in liar.acks if a.status == "rejected"] == [True], liar.acks
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


def test_what_was_gone_does_not_come_back_and_plans_without_pruning_keep_all(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="prune-oneshot", rounds=2)
    first, second = device(world, 0), device(world, 1)
    while not world.kinds("round-published"):
        world.step(first, second, times=1)
    second.keep = lambda spec, begun, sparsity: keeper(7)(spec, Kept.full(spec), sparsity)
    to_the_end(world, [first, second])
    assert [a.reason for a in second.acks if a.status == "rejected"] == ["the update keeps what its plan did not have"]
    plain = World(tmp_path / "plain", model, method="lora")
    boaster = device(plain, 1, tamper=lambda offer: replace(offer, kept=b"\xff"))
    to_the_end(plain, [device(plain, 0), boaster])
    assert [a.reason for a in boaster.acks if a.status == "rejected"] == ["the plan prunes nothing"]


def test_a_restart_after_every_event_makes_the_same_versions_and_leaves_the_same_trees(
    tmp_path: Path, model: Path
) -> None:
    found = []
    for restart in (False, True):
        world = World(tmp_path / f"{restart}", model, method="fedspine", rounds=4)
        begin_again(world, codec='"int8"', server_optimizer='"fedadam"')
        table = tuple(replace(row, codec="int8") for row in TABLE)
        devices = [device(world, i, table=table) for i in (0, 1)]
        starts, seen = 0, 0
        for _ in range(400):
            if world.kinds("run-finished"):
                break
            world.step(*devices, times=1)
            news = {e["event"] for e in world.events[seen:]} - {"status", "granted"}
            seen = len(world.events)
            if restart and news:
                world.start()
                starts += 1
        assert world.kinds("run-finished") and (not restart or starts > 9), [
            e for e in world.events if e["event"] != "status"
        ][-6:]
        versions = [(row.round, row.manifest) for row in world.fleet.ledger.models()]
        found.append((versions, world.fleet.ledger.method_state("first", "fedspine")))
    assert found[0] == found[1]
    state = found[0][1]
    assert {len(tree["seen"]) for tree in state["trees"].values()} == {4}
    assert {len(tree["regions"]) for tree in state["trees"].values()} == {5}


def test_a_newcomer_begins_with_what_the_fleet_keeps(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="prune-oneshot", rounds=2)
    first = device(world, 0)
    late = device(world, 1, table=rows(0, 1))
    while not world.kinds("round-published"):
        world.step(first, late, times=1)
    late.table = TABLE
    last = manifest(world)
    to_the_end(world, [first, late])
    assert [g.round for g in late.grants] == [2] and late.grants[0].plan.pruning
    assert late.grants[0].plan.pruning.kept == last.kept != b""


def test_another_method_makes_the_model_whole_again(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="prune-oneshot", rounds=2)
    devices = [device(world, i) for i in (0, 1)]
    while not world.kinds("round-published"):
        world.step(*devices, times=1)
    pruned = manifest(world)
    assert pruned.kept
    begin_again(world, method='"lora"')
    to_the_end(world, [device(world, i) for i in (0, 1)])
    assert manifest(world).kept == b"" and len(manifest(world).adapters) == len(pruned.adapters)
    name = pruned.adapters[0].name
    assert array(world, name).shape == array(world, name, pruned).shape


def test_settings_that_pruning_cannot_have_are_told_so(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="fedspine")
    for changes, why in (
        ({"lora_targets": '["q"]'}, "lora_targets must be empty"),
        ({"lora_targets": "[]", "proximal_mu": "0.1"}, "proximal_mu 0"),
        ({"proximal_mu": "0.0", "sparsity": "0.96"}, "sparsity must be above 0 and at most 0.95"),
        ({"sparsity": "0.5", "prune_rounds": "2"}, "prune_rounds must be 0 to rounds"),
        ({"prune_rounds": "0", "codec": '"topk10"'}, "codec must be one of"),
    ):
        with pytest.raises(UsageError, match=why):
            begin_again(world, **changes)
