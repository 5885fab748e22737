"""FedSpine with real training: simulated, stopped anywhere, and over MQTT with a coordinator that is killed, always the same bits."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_coordinator.cli import main
from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.fleet import init
from edge_coordinator.sim.simulation import SimOptions
from edge_runtime.predict import evaluate
from edge_runtime.prune_plan import kept_of
from edge_runtime.pruning import pruned_spec
from edge_runtime.store import cache_folder
from tests.e2e.conftest import Reference
from tests.e2e.fleets import LABELS, Fleet, run_for, running, write_data
from tests.e2e.test_adapters import bits, newest
from tests.e2e.test_crashes import crash_and_restart

ROUNDS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of both devices of a `Fleet` in one file, and beside it others to test with."""
    folder = tmp_path_factory.mktemp("data")
    path = folder / "all.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "device"])
        for number in range(2):
            with write_data(folder / f"{number}.csv", number).open(newline="") as one:
                writer.writerows([*row, f"user {number}"] for row in list(csv.reader(one))[1:])
    write_data(folder / "test.csv", 9, count=30)
    (folder / "classes.toml").write_text('[here]\nmemory = "2GB"\n')
    return path


def simulate(folder: Path, model: Path, data: Path, cache: Path, stops: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """A simulated run, stopped after so many events each time and begun again; -> its rounds."""
    if (cache_folder() / "graphs").exists():
        shutil.copytree(cache_folder() / "graphs", cache / "graphs", dirs_exist_ok=True)
    init(folder, name="test", base=str(model), labels=LABELS, max_length=32, method="fedspine", rounds=ROUNDS, goal=2, quorum=2, seed=3)  # fmt: skip
    options = SimOptions(
        data, data.parent / "test.csv", classes="here", class_file=data.parent / "classes.toml", partition="by:device"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EDGE_CACHE", str(cache))
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                run_for(folder, options, stop)
        run_for(folder, options, 1000)
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def simulated(
    model: Path, reference: Reference, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """An undisturbed simulation; -> its folder and its rounds."""
    folder = tmp_path_factory.mktemp("fedspine")
    cache = shutil.copytree(reference.cache, folder / "cache")
    return folder / "fleet", simulate(folder / "fleet", model, data, cache)


@pytest.mark.slow
def test_devices_prune_to_what_was_asked_and_the_smaller_model_is_measured_exported_and_sent(
    simulated: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path
) -> None:
    folder, rows = simulated
    sparsities = [[d["sparsity"] for d in row["devices"]] for row in rows[1:]]
    assert all(a <= b for one, other in itertools.pairwise(sparsities) for a, b in zip(one, other, strict=True))
    assert sparsities[-1] == [0.5, 0.5] and rows[-1]["sparsity"] == 0.5
    assert rows[-1]["mean_loss"] < rows[1]["mean_loss"]
    sent = [[(d["bytes_up"], d["rank"]) for d in row["devices"]] for row in rows[1:]]
    assert all(1 <= rank <= 8 for round_ in sent for _, rank in round_)
    models, manifest = newest(folder)
    out = tmp_path / "out"
    assert main(["models", "--fleet", str(folder), "--export", str(manifest.version), "--out", str(out)]) == 0
    with (data.parent / "test.csv").open(newline="") as file:
        examples = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    assert evaluate(out, examples) == pytest.approx(rows[-1]["accuracy"], abs=1e-5)
    left = pruned_spec(manifest.spec, kept_of(manifest.spec, manifest.kept))
    assert sum(t.size for t in left.tensors) < sum(t.size for t in manifest.spec.tensors)
    state = models.ledger.method_state("first", "fedspine")
    assert [len(tree["seen"]) for tree in state["trees"].values()] == [ROUNDS] * 2


@pytest.mark.slow
def test_a_simulation_that_is_stopped_ends_as_if_undisturbed(
    simulated: tuple[Path, list[dict[str, Any]]], model: Path, data: Path, tmp_path: Path
) -> None:
    folder, rows = simulated
    cache = shutil.copytree(folder.parent / "cache", tmp_path / "cache")
    assert simulate(tmp_path / "fleet", model, data, cache, stops=(2, 3)) == rows
    assert bits(tmp_path / "fleet") == bits(folder)


@pytest.mark.slow
def test_a_fleet_over_mqtt_whose_coordinator_is_killed_at_ever_later_write_boundaries_gives_the_simulated_model(
    simulated: tuple[Path, list[dict[str, Any]]], model: Path, reference: Reference, data: Path, tmp_path: Path
) -> None:
    fleet = Fleet(tmp_path, model, method="fedspine", rounds=ROUNDS, cache=reference.cache)
    with running(fleet):
        for device in fleet.devices:
            fleet.start(device)
        deaths = crash_and_restart(fleet, "coordinator", first=9, step=47)
    assert deaths >= 3
    assert [row.round for row in FleetFolder(fleet.fleet).ledger.models()] == [0, 0, 1, 2, 3]
    assert bits(fleet.fleet) == bits(simulated[0])
    kept = [newest(folder)[1].kept for folder in (fleet.fleet, simulated[0])]
    assert kept[0] == kept[1] != b""
    with (data.parent / "test.csv").open(newline="") as file:
        examples = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    assert evaluate(tmp_path / "device-0", examples) == pytest.approx(simulated[1][-1]["accuracy"], abs=1e-5)
