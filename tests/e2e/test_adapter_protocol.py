"""The coordinator of a fleet with adapters against scripted devices: ranks in one round, lies, restarts, another method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_coordinator.cli import main
from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.methods import METHODS
from edge_runtime.errors import UsageError
from edge_runtime.manifest import Manifest
from tests.e2e.local import FakeDevice, World, rows

WIDE, NARROW = rows(0, 1, 2, rank=8), rows(0, 1, 2, rank=4)
ADAPTERS = [name for name, method in METHODS.items() if method.adapters and not method.prime and name != "auto"]


def manifest(world: World) -> Manifest:
    return world.server.run.manifest


def to_the_end(world: World, devices: Sequence[FakeDevice]) -> Manifest:
    """Until the run is finished; -> its last version."""
    for _ in range(300):
        world.step(*devices, times=1)
        if world.kinds("run-finished"):
            break
    assert world.kinds("run-finished"), world.events[-5:]
    return manifest(world)


def array(world: World, name: str, of: Manifest | None = None) -> np.ndarray:  # type: ignore[type-arg]
    of = of or manifest(world)
    (tensor,) = [t for t in (*of.tensors, *of.adapters) if t.name == name]
    return np.fromfile(world.server.models.store.path(tensor.blob), "<f4").reshape(tensor.shape)


def random_update(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).normal(0, 0.01, size // 4).astype("<f4").tobytes()


def two(world: World, second: tuple = WIDE) -> list[FakeDevice]:  # type: ignore[type-arg]
    tables = ((0, WIDE), (1, second))
    return [
        FakeDevice(world, f"device-{i}", table=t, examples=10 + i, update=lambda size, i=i: random_update(i, size))
        for i, t in tables
    ]


def begin_again(world: World, **changes: str) -> None:
    """A restart after somebody has edited fleet.toml."""
    path = world.folder / "fleet.toml"
    text = path.read_text()
    for key, value in changes.items():
        text = re.sub(rf"^{key} = \S+", f"{key} = {value}", text, flags=re.MULTILINE)
    path.write_text(text)
    world.fleet = FleetFolder(world.folder)
    world.start()


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_method_with_adapters_makes_a_version_that_has_them(method: str, tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method=method)
    devices = two(world, NARROW if METHODS[method].keeps_updates else WIDE)
    world.step(*devices, times=60)
    assert world.kinds("run-finished"), world.events
    ranks = [e["rank"] for e in world.kinds("granted")][:2]
    assert ranks == [8, 4 if METHODS[method].keeps_updates else 8]
    assert manifest(world).version == 3
    before = world.server.models.manifest(world.fleet.ledger.models()[1])
    old = {t.name: t.blob for t in (*before.tensors, *before.adapters)}
    changed = {
        t.name.rsplit(".", 1)[1] for t in (*manifest(world).tensors, *manifest(world).adapters) if t.blob != old[t.name]
    }
    assert changed == {"ffa-lora": {"lora_b"}, "flora": {"lora_a"}}.get(method, {"lora_a", "lora_b"}) | {
        "weight",
        "bias",
    }
    assert manifest(world).adapter_scale == 2.0
    assert not np.array_equal(array(world, "classifier.weight"), array(world, "classifier.weight", before))


def test_devices_that_offer_no_adapters_are_left_out(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="lora")
    old = FakeDevice(world, "device-1", table=rows(0, 1, 2))
    world.step(FakeDevice(world, "device-0", table=WIDE), old, times=60)
    assert [a.status for a in old.acks] == ["excluded"]
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 9.0])
def test_an_adapter_with_absurd_numbers_is_rejected(value: float, tmp_path: Path, model: Path) -> None:
    def poisoned(size: int) -> bytes:
        data = np.zeros(size // 4, "<f4")
        data[len(data) // 2] = value
        return data.tobytes()

    world = World(tmp_path / "f", model, method="flora")
    liar = FakeDevice(world, "device-1", table=NARROW, update=poisoned)
    world.step(FakeDevice(world, "device-0", table=WIDE), liar, times=60)
    assert [a.status for a in liar.acks if ".lora_" in a.reason] == ["rejected"]
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


def test_an_update_of_another_rank_than_the_plans_is_rejected(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="hetlora")
    liar = FakeDevice(world, "device-1", table=NARROW, update=lambda size: bytes(2 * size))
    world.step(FakeDevice(world, "device-0", table=WIDE), liar, times=60)
    assert [a.status for a in liar.acks if "the update must be" in a.reason] == ["rejected"]


def test_updates_of_zeros_make_a_version_and_change_no_product(tmp_path: Path, model: Path) -> None:
    for method in ("hetlora", "flexlora", "flora"):
        world = World(tmp_path / method, model, method=method)
        devices = [FakeDevice(world, f"device-{i}", table=t, update=bytes) for i, t in enumerate((WIDE, NARROW))]
        world.step(*devices, times=60)
        assert world.kinds("run-finished"), world.events
        assert not any(array(world, t.name).any() for t in manifest(world).adapters if t.name.endswith("lora_b"))


@pytest.mark.parametrize("method", ["lora", "hetlora", "flexlora", "flora"])
def test_a_coordinator_that_begins_again_while_updates_wait_makes_the_same_model(
    method: str, tmp_path: Path, model: Path
) -> None:
    found = []
    for restart in (False, True):
        world = World(tmp_path / f"{restart}", model, method=method, goal=2, quorum=2)
        first, late = two(world)
        late.serve = not restart
        world.step(first, late, times=60)
        if restart:
            assert len(world.kinds("committed")) == 1
            world.start()
            late.serve = True
            world.step(first, late, times=60)
        assert world.kinds("run-finished"), world.events
        found.append([t.blob for t in (*manifest(world).tensors, *manifest(world).adapters)])
    assert found[0] == found[1]


def test_another_method_begins_with_the_adapters_merged_and_a_round_that_waits_for_devices_fails(
    tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model, method="lora", rounds=3)
    devices = two(world)
    while not world.kinds("round-published"):
        world.step(*devices, times=1)
    trained = manifest(world)
    world.step(times=3)
    assert world.kinds("round-opened")[-1]["round"] == 2
    begin_again(world, method='"caff"')
    plain = [FakeDevice(world, d.name, table=rows(0, 1, 2)) for d in devices]
    world.step(*plain, times=60)
    states = {r["round"]: (r["state"], r["reason"]) for r in world.fleet.ledger.rounds()}
    assert states[2] == ("failed", "fleet.toml names other adapters now than when this round was opened")
    assert states[3][0] == "published"
    assert manifest(world).adapters == ()
    merged = world.server.models.manifest(world.fleet.ledger.models()[-2])
    stem = next(t.name for t in trained.adapters if t.name.endswith("1.attention.self.query.lora_a")).removesuffix(
        ".lora_a"
    )
    product = 2.0 * array(world, stem + ".lora_b", trained) @ array(world, stem + ".lora_a", trained)
    whole = array(world, stem + ".weight", trained) + product
    assert product.any()
    assert np.allclose(array(world, stem + ".weight", merged), whole, atol=1e-7)


def test_an_adapter_is_exported_for_the_base_that_it_belongs_to_and_no_other(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, said in (
        ("lora", ""),
        ("flora", "belong to matrices that this fleet has trained"),
        ("caff", "has no adapters"),
    ):
        world = World(tmp_path / method, model, method=method)
        table = WIDE if method != "caff" else rows(0, 1, 2)
        world.step(*(FakeDevice(world, name, table=table) for name in world.names), times=60)
        out = tmp_path / f"{method}-adapter"
        version = manifest(world).version
        command = ["models", "--fleet", str(world.folder), "--export", str(version), "--adapter-out", str(out)]
        assert main(command) == (2 if said else 0)
        assert said in capsys.readouterr().err
        assert out.exists() == (not said)


def test_targets_that_the_model_does_not_have_end_serve_at_once(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path / "f", model, method="lora")
    with pytest.raises(UsageError, match="'qkv' is no linear layer of this model's blocks: choose from q, k, v"):
        begin_again(world, lora_targets='["qkv"]')
    with pytest.raises(UsageError, match=r"\[train\] lora_rank 900 is above the smaller side of a matrix"):
        begin_again(world, lora_targets="[]", lora_rank="900")
    with pytest.raises(UsageError, match=r"\[run\] rank_budget 1 is below 1 for each of the model's \d+ blocks"):
        begin_again(world, lora_rank="8", rank_budget="1")
