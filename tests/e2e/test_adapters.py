"""Adapters of different ranks in one fleet: over MQTT, after kills, and in the simulator, always the same bits."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.cli import main
from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.fleet import init
from edge_coordinator.models import Models
from edge_coordinator.sim.simulation import SimOptions, Simulation
from edge_runtime.manifest import Manifest
from edge_runtime.merging import open_with_adapter
from edge_runtime.predict import evaluate
from edge_runtime.source import find_checkpoint, open_source
from edge_runtime.store import cache_folder
from edge_runtime.weights import read_safetensors
from tests.e2e.conftest import Reference
from tests.e2e.fleets import LABELS, Fleet, running, write_data
from tests.e2e.test_crashes import crash_and_restart

CLASSES = (
    '[wide]\nmemory = "2GB"\n[narrow]\nmemory = "2GB"\nupload = "20kB"\n'  # rank 8 takes 29,068 bytes, rank 4 14,732
)


def newest(folder: Path) -> tuple[Models, Manifest]:
    models = Models(folder, FleetFolder(folder).ledger)
    found = models.newest()
    assert found
    return models, found[0]


def bits(folder: Path) -> list[str]:
    """The newest model and its adapters, bit for bit."""
    _, manifest = newest(folder)
    return [t.blob.hex() for t in (*manifest.tensors, *manifest.adapters)]


def fleet_of(folder: Path, model: Path, uploads: list[str], reference: Reference) -> Fleet:
    return Fleet(folder, model, method="hetlora", cache=reference.cache, upload=uploads)


@pytest.fixture(scope="module")
def simulated(model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A simulated run of two devices; -> its folder, and the upload budget of each device."""
    folder = tmp_path_factory.mktemp("simulated")
    data, classes = folder / "all.csv", folder / "classes.toml"
    classes.write_text(CLASSES)
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "device"])
        for number in range(2):
            with write_data(folder / f"{number}.csv", number).open(newline="") as one:
                writer.writerows([*row, f"user {number}"] for row in list(csv.reader(one))[1:])
    with pytest.MonkeyPatch.context() as patched:
        cache = shutil.copytree(reference.cache, folder / "cache")
        if (cache_folder() / "graphs").exists():
            shutil.copytree(cache_folder() / "graphs", cache / "graphs", dirs_exist_ok=True)
        patched.setenv("EDGE_CACHE", str(cache))
        path = init(folder / "fleet", name="test", base=str(model), labels=LABELS, max_length=32, method="hetlora", rounds=2, quorum=2, seed=3)  # fmt: skip
        options = SimOptions(data, classes="wide:1,narrow:1", class_file=classes, partition="by:device")
        simulation = Simulation(path.parent, options, progress=print, say=print, keep_going=lambda: True)
        simulation.run()
        kinds = [device.kind.name for device in simulation.virtual.devices.values()]
    assert sorted(kinds) == ["narrow", "wide"]
    return path.parent, ["20kB" if kind == "narrow" else "" for kind in kinds]


def test_suffixes_of_different_depths_are_averaged_and_what_is_measured_is_what_is_exported(
    model: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shallow device computes block 0 with what the deep one has trained there."""
    cache = shutil.copytree(reference.cache, tmp_path / "cache")
    if (cache_folder() / "graphs").exists():
        shutil.copytree(cache_folder() / "graphs", cache / "graphs", dirs_exist_ok=True)
    monkeypatch.setenv("EDGE_CACHE", str(cache))
    data, test, classes = (tmp_path / name for name in ("data.csv", "test.csv", "classes.toml"))
    write_data(data, 0, count=60)
    write_data(test, 9, count=30)
    classes.write_text(CLASSES.replace("20kB", "8kB"))  # one block of rank 8 in float16
    path = init(tmp_path / "fleet", name="test", base=str(model), labels=LABELS, max_length=32, method="lora-suffix", rounds=2, quorum=2, seed=3)  # fmt: skip
    path.write_text(path.read_text().replace('codec = "f32"', 'codec = "f16"').replace("adapter_learning_rate = 0.002", "adapter_learning_rate = 0.02"))  # fmt: skip
    options = SimOptions(data, test, 2, "wide:1,narrow:1", classes)
    seen: list[dict[str, Any]] = []
    Simulation(path.parent, options, progress=seen.append, say=print, keep_going=lambda: True).run()
    rows = [row for row in seen if "state" in row]
    assert [sorted((d["depth"], d["rank"]) for d in row["devices"]) for row in rows[1:]] == [[(1, 8), (2, 8)]] * 2
    out = tmp_path / "out"
    assert main(["models", "--fleet", str(path.parent), "--export", "4", "--out", str(out)]) == 0
    with test.open(newline="") as file:
        examples = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    assert evaluate(out, examples) == pytest.approx(rows[-1]["accuracy"], abs=1e-5)
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]


@pytest.fixture(scope="module")
def fleet(
    simulated: tuple[Path, list[str]], model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Fleet:
    """The same over MQTT, in processes."""
    made = fleet_of(tmp_path_factory.mktemp("fleet"), model, simulated[1], reference)
    with running(made):
        made.start_all()
        made.wait(made.finished)
    return made


@pytest.mark.slow
def test_two_ranks_make_one_model_and_only_adapters_travel(fleet: Fleet) -> None:
    granted = {(e["device"], e["depth"], e["rank"]) for e in fleet.events("coordinator", "granted")}
    assert sorted(rank for _, _, rank in granted) == [4, 8]
    sizes = {e["num_bytes"] for e in fleet.events("coordinator", "committed")}
    assert sizes == {14_732, 29_068}, "A and B of six matrices in two blocks, and the head"
    models, manifest = newest(fleet.fleet)
    assert manifest.version == 4, "the base, fresh adapters, two rounds"
    first = models.manifest(models.ledger.models()[0])
    assert [t.blob for t in manifest.tensors if t.part < 2] == [t.blob for t in first.tensors if t.part < 2]
    assert all(np.fromfile(models.store.path(t.blob), "<f4").any() for t in manifest.adapters)
    losses = [e["mean_loss"] for e in fleet.events("coordinator", "round-published")]
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_a_simulated_run_with_adapters_gives_the_model_of_the_real_one(
    fleet: Fleet, simulated: tuple[Path, list[str]]
) -> None:
    assert bits(fleet.fleet) == bits(simulated[0])


@pytest.mark.slow
def test_coordinator_and_device_export_the_same_model_merged_or_as_an_adapter(
    fleet: Fleet, model: Path, tmp_path: Path
) -> None:
    where = ["--out", str(tmp_path / "out"), "--adapter-out", str(tmp_path / "adapter")]
    assert main(["models", "--fleet", str(fleet.fleet), "--export", "4", *where]) == 0
    exported = read_safetensors(tmp_path / "out" / "model.safetensors")
    held = find_checkpoint(str(fleet.folder / "device-0"), progress=print)
    source = open_source(held, None, tmp_path)
    models, manifest = newest(fleet.fleet)
    adapters = {t.name: np.fromfile(models.store.path(t.blob), "<f4").reshape(t.shape) for t in manifest.adapters}
    changed = 0
    for tensor in manifest.tensors:
        whole = np.fromfile(models.store.path(tensor.blob), "<f4").astype(np.float64).reshape(tensor.shape)
        stem = tensor.name.removesuffix(".weight")
        if stem + ".lora_a" in adapters:
            whole = whole + 2.0 * adapters[stem + ".lora_b"].astype(np.float64) @ adapters[stem + ".lora_a"]
            changed += 1
        assert np.array_equal(exported[tensor.name].array(), whole.astype("<f4"))
        assert np.array_equal(source.weights[tensor.name].array(), whole.astype("<f4"))
    assert changed == 12
    with open_with_adapter(str(model), tmp_path / "adapter", "edge_models.bert", print) as whole_source:
        for name, tensor in exported.items():
            assert np.array_equal(whole_source.weights[name].array(), tensor.array())


@pytest.mark.slow
def test_a_coordinator_killed_at_ever_later_write_boundaries_makes_the_same_adapters(
    fleet: Fleet, model: Path, reference: Reference, simulated: tuple[Path, list[str]], tmp_path: Path
) -> None:
    with running(fleet_of(tmp_path, model, simulated[1], reference)) as other:
        for device in other.devices:
            other.start(device)
        deaths = crash_and_restart(other, "coordinator", first=3, step=37)
    assert deaths >= 4
    assert other.counted() == fleet.counted()
    assert bits(other.fleet) == bits(fleet.fleet)
