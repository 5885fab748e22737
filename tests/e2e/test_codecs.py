"""Updates in codecs over the real protocol: chosen within budgets, decoded, summed exactly, refused where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.records import CostRow
from edge_runtime.residual import Residual
from tests.e2e.conftest import Reference
from tests.e2e.fleets import Fleet, running
from tests.e2e.local import FakeDevice, World, constant_update, lie, rows
from tests.e2e.test_crashes import crash_and_restart
from tests.e2e.test_simulation import World as SimWorld
from tests.e2e.test_simulation import like_the_real_one, residuals
from tests.e2e.test_simulation import tensors as simulated_tensors


def of(codec: str, *depths: int) -> tuple[CostRow, ...]:
    return rows(*(depths or (0, 1, 2)), codec=codec)


def finished(world: World) -> bool:
    return bool(world.kinds("run-finished"))


def tensors(world: World) -> dict[str, np.ndarray]:
    """The newest model's values."""
    store = world.server.models.store
    return {t.name: np.fromfile(store.path(t.blob), "<f4") for t in world.server.run.manifest.tensors}


def test_devices_with_different_codecs_make_one_model_the_same_when_every_message_comes_twice(
    tmp_path: Path, model: Path
) -> None:
    worlds = [World(tmp_path / "a" / "f", model, devices=4), World(tmp_path / "b" / "f", model, devices=4, twice=True)]
    before = tensors(worlds[0])
    for world in worlds:
        devices = [
            FakeDevice(world, "device-0", table=of("f32")),
            FakeDevice(world, "device-1", table=of("f16", 0, 1), examples=20),
            FakeDevice(world, "device-2", table=of("int8"), examples=30, packed=True),
            FakeDevice(world, "device-3", table=of("int4"), examples=40),
        ]
        world.step(*devices, times=80)
        assert finished(world), world.events
        assert {e["device"]: e["codec"] for e in world.kinds("committed")} == {
            "device-0": "f32", "device-1": "f16", "device-2": "int8+zlib", "device-3": "int4"
        }  # fmt: skip
    assert worlds[0].tensors() == worlds[1].tensors()
    after = tensors(worlds[0])
    for tensor in worlds[0].server.run.manifest.spec.tensors:
        change = after[tensor.name] - before[tensor.name]
        wanted = 0.0 if tensor.part < 0 else 0.01
        step = wanted / 7 * 40 / 80  # of int4, whose device has at most half of the weight
        assert np.abs(change - wanted).max() <= 1.02 * step, tensor.name


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lie(codec="f32"), "bytes of int8"),
        (lie(codec="int4"), "bytes of int8"),
        (lie(codec="int8+zlib"), "bytes of int8"),  # of the whole size: it saves nothing
        (lie(codec="int8+zlib", num_bytes=0), "bytes of int8"),
        (lie(num_bytes=4000), "bytes of int8"),
    ],
)
def test_an_offer_of_another_codec_or_size_than_planned_is_rejected(
    tamper: object, reason: str, tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model)
    liar = FakeDevice(world, "device-1", table=of("int8"), tamper=tamper)  # type: ignore[arg-type]
    world.step(FakeDevice(world, "device-0", table=of("int8")), liar, times=60)
    assert finished(world)
    assert [a.status for a in liar.acks if reason in a.reason][:1] == ["rejected"]
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("codec", ["f16", "int8", "int4", "topk10"])
def test_an_update_with_absurd_numbers_is_rejected_in_every_codec(
    codec: str, packed: bool, tmp_path: Path, model: Path
) -> None:
    world = World(tmp_path / "f", model)
    liar = FakeDevice(world, "device-1", table=of(codec), update=lambda size: constant_update(size, 9.0), packed=packed)
    world.step(FakeDevice(world, "device-0", table=of(codec)), liar, times=60)
    assert finished(world)
    assert "changed by more than 8" in next(a.reason for a in liar.acks if a.status == "rejected")
    assert world.kinds("round-published")[0]["members"] == ["device-0"]


def test_a_coordinator_that_starts_anew_with_updates_unfolded_makes_the_same_model(tmp_path: Path, model: Path) -> None:
    whole, broken = World(tmp_path / "a" / "f", model), World(tmp_path / "b" / "f", model)
    for world in (whole, broken):
        first = FakeDevice(world, "device-0", table=of("int4"), packed=True)
        second = FakeDevice(world, "device-1", table=of("int8", 0, 1), examples=30, serve=False)
        world.step(first, second, times=30)
        assert len(world.kinds("committed")) == 1
        if world is broken:
            world.start()
        second.serve = True
        for _ in range(8):
            world.now += 11
            world.step(first, second, times=20)
        assert finished(world), world.events
    assert whole.tensors() == broken.tensors()


# real devices


@pytest.mark.slow
def test_an_upload_budget_leads_to_a_smaller_codec_and_not_to_a_shallower_suffix(
    tmp_path: Path, model: Path, reference: Reference
) -> None:
    with running(
        Fleet(tmp_path, model, rounds=1, cache=reference.cache, codec="auto", upload=["20KB", "8KB"])
    ) as fleet:
        fleet.start_all()
        fleet.wait(fleet.finished)
        found = {e["device"]: e for e in fleet.events("coordinator", "committed")}
    assert found["device-0"]["depth"] == 2
    assert found["device-0"]["codec"].startswith("int8")
    assert found["device-0"]["num_bytes"] <= 20_000
    assert found["device-1"]["num_bytes"] <= 8_000
    assert found["device-1"]["depth"] in (1, 2)


@pytest.mark.slow
def test_a_device_with_error_feedback_killed_at_ever_later_write_boundaries_makes_the_same_model_and_so_does_a_simulation(
    tmp_path: Path, model: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, kept = [], []
    for place, killed in (("whole", False), ("broken", True)):
        folder = tmp_path / place
        folder.mkdir()
        with running(Fleet(folder, model, cache=reference.cache, codec="topk10")) as fleet:
            fleet.start("coordinator")
            fleet.start("device-1")
            if killed:
                assert crash_and_restart(fleet, "device-0", first=2, step=23) >= 5
            else:
                fleet.start("device-0")
                fleet.wait(fleet.finished)
            assert {e["codec"].partition("+")[0] for e in fleet.events("coordinator", "committed")} == {"topk10"}
        tensors.append(fleet.tensors())
        kept.append([Residual(folder / name / "residual").kept.read_bytes() for name in fleet.devices])
    assert tensors[0] == tensors[1]
    assert kept[0] == kept[1]
    assert all(kept[0])
    (tmp_path / "simulated").mkdir()
    simulated = like_the_real_one(SimWorld(tmp_path, model), reference, tmp_path / "simulated", monkeypatch, "topk10")
    assert simulated_tensors(simulated) == tensors[0]
    assert list(residuals(simulated).values()) == kept[0]
