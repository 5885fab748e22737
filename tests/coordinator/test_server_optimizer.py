"""Server optimizers: the published formulas, and a state that a crash at any step leaves as it should be."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.aggregate import Update, apply, fold, mean_changes
from edge_coordinator.fleet import LEDGER_FILE, init
from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_coordinator.models import Models
from edge_coordinator.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer, ServerSettings
from edge_runtime.errors import StoreError
from edge_runtime.manifest import encode_manifest, make_manifest
from edge_runtime.model import TensorSpec
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.store import BlobStore
from edge_runtime.wire import pack
from tests.coordinator.closing import main as close_round
from tests.samples import small_spec

SPEC = small_spec(3, 5)
CRASHING = Path(__file__).parents[1] / "e2e" / "crashing.py"
Array = np.ndarray[Any, np.dtype[Any]]


def reference(s: ServerSettings, deltas: list[float]) -> tuple[float, list[float]]:
    """One weight over several rounds, number by number, from the papers' formulas; -> (its last change, its state)."""
    m, v, change = 0.0, s.tau**2, 0.0
    for delta in deltas:
        if s.name == "fedavgm":
            m = s.momentum * m + delta
            change = s.learning_rate * m
            continue
        m = s.momentum * m + (1 - s.momentum) * delta
        if s.name == "fedadam":
            v = s.beta2 * v + (1 - s.beta2) * delta**2
        else:
            sign = (v > delta**2) - (v < delta**2)
            v = v - (1 - s.beta2) * delta**2 * sign
        change = s.learning_rate * m / (math.sqrt(v) + s.tau)
    return change, [m] if s.name == "fedavgm" else [m, v]


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_several_rounds_are_those_of_the_published_formulas(name: str, tmp_path: Path) -> None:
    settings = ServerSettings(name, 0.5, momentum=0.8, beta2=0.9, tau=0.01)
    chance, store = np.random.default_rng(1), BlobStore(tmp_path)
    rounds = [chance.normal(0, 10.0**-size, 50) for size in (1, 2, 3, 1, 8)]
    states: Mapping[str, bytes] = {}
    for deltas in rounds:
        optimizer = ServerOptimizer(settings, states, store)
        change = optimizer.step("w", deltas)
        states = optimizer.states
    kept = np.fromfile(store.path(states["w"]), "<f4").reshape(-1, 50)
    for i in range(50):
        wanted, state = reference(settings, [float(deltas[i]) for deltas in rounds])
        assert change[i] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
        assert kept[:, i].tolist() == pytest.approx(state, rel=1e-5, abs=1e-9)


def test_fedavg_at_rate_one_is_the_mean_to_the_last_bit_and_has_no_state(tmp_path: Path) -> None:
    mean = np.random.default_rng(2).normal(0, 1e-3, 1000)
    optimizer = ServerOptimizer(ServerSettings(), {}, BlobStore(tmp_path))
    assert optimizer.step("w", mean).tobytes() == mean.tobytes()
    assert optimizer.states == {}
    half = ServerOptimizer(ServerSettings(learning_rate=0.5), {}, BlobStore(tmp_path))
    assert (half.step("w", mean) == mean / 2).all()


def test_momentum_adds_up_where_the_mean_has_a_direction(tmp_path: Path) -> None:
    store, states, moved = BlobStore(tmp_path), {}, []
    for _ in range(60):
        optimizer = ServerOptimizer(ServerSettings("fedavgm"), states, store)
        moved.append(float(optimizer.step("w", np.full(3, 1e-3))[0]))
        states = optimizer.states
    assert moved == sorted(moved)
    assert moved[-1] == pytest.approx(1e-3 / (1 - 0.9), rel=0.01)


def test_a_tensor_that_takes_no_step_keeps_its_state(tmp_path: Path) -> None:
    store, settings = BlobStore(tmp_path), ServerSettings("fedyogi")
    first = ServerOptimizer(settings, {}, store)
    for name in ("a", "b"):
        first.step(name, np.array([1e-3, -2e-3]))
    second = ServerOptimizer(settings, first.states, store)
    second.step("b", np.array([1e-3, 1e-3]))
    assert second.states["a"] == first.states["a"]
    assert second.states["b"] != first.states["b"]
    again = ServerOptimizer(settings, first.states, store)
    again.step("b", np.array([1e-3, 1e-3]))
    assert again.states == second.states, "after a crash it may be done once more"


def test_a_lost_or_damaged_state_is_an_error_and_one_of_another_size_begins_anew(tmp_path: Path) -> None:
    store, settings = BlobStore(tmp_path), ServerSettings("fedadam")
    optimizer = ServerOptimizer(settings, {}, store)
    fresh = optimizer.step("w", np.full(4, 1e-3))
    grown = ServerOptimizer(settings, optimizer.states, store).step("w", np.full(6, 1e-3))
    assert set(grown) == set(fresh), "an adapter of another rank"
    path = store.path(optimizer.states["w"])
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(StoreError, match="damaged"):
        ServerOptimizer(settings, optimizer.states, store).step("w", np.full(4, 1e-3))
    path.unlink()
    with pytest.raises(StoreError, match="the state of the server optimizer is lost"):
        ServerOptimizer(settings, optimizer.states, store).step("w", np.full(4, 1e-3))


def test_tensors_without_elements_and_scalars_pass_through(tmp_path: Path) -> None:
    states: Mapping[str, bytes] = {}
    for _ in range(2):
        for name in SERVER_OPTIMIZERS:
            optimizer = ServerOptimizer(ServerSettings(name), states, BlobStore(tmp_path))
            assert [optimizer.step(f"{name}{n}", np.full(n, 0.1)).size for n in (0, 1)] == [0, 1]
            states = optimizer.states


def test_one_tensor_and_its_state_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """Ten tensors of 1 MiB: 2 MiB each as sum, delta, m, v and the temporaries of a step."""
    tensors = tuple(TensorSpec(f"t{i}", (1 << 18,), 1) for i in range(10))
    spec, store = replace(SPEC, num_blocks=1, tensors=tensors), BlobStore(tmp_path / "store")
    (tmp_path / "update").write_bytes(np.full(10 << 18, 0.01, "<f4").tobytes())
    base = {t.name: tmp_path / "base" for t in tensors}
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    partial = fold(tensors, None, [Update("d", tmp_path / "update", 5, tensors)], tmp_path / "sum")
    optimizer = ServerOptimizer(ServerSettings("fedyogi"), {}, store)
    apply(mean_changes(spec.tensors, partial), base, store, optimizer.step)
    optimizer = ServerOptimizer(ServerSettings("fedyogi"), optimizer.states, store)
    tracemalloc.start()
    apply(mean_changes(spec.tensors, partial), base, store, optimizer.step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 << 20


# with the ledger


def fleet_with_two_closed_and_one_open_round(folder: Path, optimizer: str) -> Path:
    """A fleet whose third round has its updates and is not closed; the second trained less than the first."""
    path = init(folder, labels=SPEC.labels, max_length=64, rounds=3, goal=2)
    path.write_text(path.read_text().replace('server_optimizer = "fedavg"', f'server_optimizer = "{optimizer}"'))
    ledger, chance = Ledger(folder / LEDGER_FILE), np.random.default_rng(5)
    ledger.put("realm", "r")
    models = Models(folder, ledger)
    blobs = {t.name: models.store.put(chance.normal(0, 0.1, t.size).astype("<f4").tobytes()) for t in SPEC.tensors}
    manifest = make_manifest(SPEC, blobs, models.store.put(b"tokenizer"), 9, version=1)
    with ledger.transaction():
        ledger.add_model(1, models.store.put(encode_manifest(manifest)), "", 0, {}, 0.0)
    for number, depths in ((1, (2, 1)), (2, (1, 0)), (3, (3, 1))):
        with ledger.transaction():
            ledger.open_round("first", number, number, 0.0, 0.0)
            ledger.move_round("first", number, "joining", "collecting", 0.0, 0.0)
            for device, depth in enumerate(depths):
                values = chance.normal(0, 0.01, sum(t.size for t in SPEC.suffix(depth))).astype("<f4")
                blob, name = models.updates.put(values.tobytes()), f"d{device}"
                plan = pack(Plan(CostRow(depth, False, 1, 0, 0.0, 0.0, 0), TrainSettings(), 1))
                ledger.set_member("first", number, Member(name, "planned", b"", b"n", plan, ""))
                ledger.contribute("first", number, Contribution(name, blob, 10 + device, depth, {"last_loss": 1.0}, False), 0.0)  # fmt: skip
        if number < 3:
            close_round(folder)
    ledger.close()
    return folder


def states_of(folder: Path, version: int) -> dict[str, bytes]:
    return Ledger(folder / LEDGER_FILE).optimizer_states("first", version, "fedadam")


def newest(folder: Path) -> list[str]:
    found = Models(folder, Ledger(folder / LEDGER_FILE)).newest()
    assert found
    return [t.blob.hex() for t in found[0].tensors]


def test_a_coordinator_killed_at_any_step_of_a_rounds_end_gives_the_same_model_and_states(tmp_path: Path) -> None:
    folder = fleet_with_two_closed_and_one_open_round(tmp_path / "f", "fedadam")
    undisturbed = Path(shutil.copytree(folder, tmp_path / "undisturbed"))
    close_round(undisturbed)
    wanted, limit, deaths = (newest(undisturbed), states_of(undisturbed, 4)), 1, 0
    assert len(wanted[1]) == sum(t.part >= 0 for t in SPEC.tensors)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
    while Ledger(folder / LEDGER_FILE).last_round("first")["state"] != "published":  # type: ignore[index]
        command = [sys.executable, str(CRASHING), str(limit), "tests.coordinator.closing", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -9), done.stderr
        deaths += done.returncode == -9
        limit += 9
    assert deaths >= 5
    close_round(folder)  # a start after the end, which cleans up
    assert (newest(folder), states_of(folder, 4)) == wanted
    kept = {path.name for path in (folder / "optimizer" / "blobs").glob("*/*")}
    assert kept == {b.hex() for version in (3, 4) for b in states_of(folder, version).values()}


def test_states_are_of_what_was_trained_and_go_on_over_rounds_that_did_not_train_it(tmp_path: Path) -> None:
    folder = fleet_with_two_closed_and_one_open_round(tmp_path / "f", "fedadam")
    first, second = states_of(folder, 2), states_of(folder, 3)
    assert set(first) == set(second) == {t.name for t in SPEC.suffix(2)}
    assert {name for name in first if first[name] == second[name]} == {"block.1.w", "block.1.b"}


def test_another_optimizer_or_run_begins_without_states_and_a_rewind_goes_back_to_the_older_ones(
    tmp_path: Path,
) -> None:
    folder = fleet_with_two_closed_and_one_open_round(tmp_path / "f", "fedadam")
    ledger = Ledger(folder / LEDGER_FILE)
    assert ledger.optimizer_states("first", 3, "fedyogi") == ledger.optimizer_states("other", 3, "fedadam") == {}
    before = states_of(folder, 2)
    with ledger.transaction():
        ledger.rewind("first", 1)
    assert states_of(folder, 3) == {}
    assert states_of(folder, 2) == before
    Models(folder, ledger).clean()
    assert {path.name for path in (folder / "optimizer" / "blobs").glob("*/*")} == {b.hex() for b in before.values()}
