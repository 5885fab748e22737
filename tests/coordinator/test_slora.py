"""The step between SLoRA's stages: killed anywhere it makes the same adapters, and it holds one matrix at a time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_coordinator.fleet import LEDGER_FILE, init
from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_coordinator.methods import METHODS
from edge_coordinator.methods.best_product import best_product
from edge_coordinator.methods.method import Options
from edge_coordinator.models import Models
from edge_coordinator.start_version import Primer, begin
from edge_models import bert
from edge_runtime.layout import layout
from edge_runtime.manifest import encode_manifest, make_manifest
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.store import BlobStore
from edge_runtime.wire import pack
from tests.coordinator.closing import main as close_round
from tests.coordinator.test_adapters import CONFIG, SPEC

CRASHING = Path(__file__).parents[1] / "e2e" / "crashing.py"


RANK = 8  # the smaller side of the network's matrices


def fleet_with_the_last_round_of_the_first_stage(folder: Path) -> Path:
    """A fleet whose first round, the only one with masks, has its updates and is not closed."""
    path = init(folder, labels=SPEC.labels, max_length=16, rounds=3, goal=2, method="slora")
    text = path.read_text().replace('server_optimizer = "fedavg"', 'server_optimizer = "fedadam"')
    path.write_text(re.sub(r"^lora_rank = \d+", f"lora_rank = {RANK}", text, flags=re.MULTILINE))
    ledger, chance = Ledger(folder / LEDGER_FILE), np.random.default_rng(5)
    ledger.put("realm", "r")
    models = Models(folder, ledger)
    blobs = {t.name: models.store.put(chance.normal(0, 0.1, t.shape).astype("<f4").tobytes()) for t in SPEC.tensors}
    manifest = make_manifest(SPEC, blobs, models.store.put(b"tokenizer"), 9, version=1)
    settings = METHODS["slora"].stage({}, 1, 2, TrainSettings(lora_rank=RANK), Options(rounds=3)).settings
    plan = Plan(CostRow(2, False, 1, 0, 0.0, 0.0, 0), settings, 1)
    with ledger.transaction():
        ledger.add_model(1, models.store.put(encode_manifest(manifest)), "", 0, {}, 0.0)
        ledger.open_round("first", 1, 1, 0.0, 0.0)
        ledger.move_round("first", 1, "joining", "collecting", 0.0, 0.0)
        for number in range(2):
            values = chance.normal(0, 0.01, sum(t.size for t in layout(SPEC, plan))).astype("<f4")
            blob, name = models.updates.put(values.tobytes()), f"d{number}"
            ledger.set_member("first", 1, Member(name, "planned", b"", b"n", pack(plan), ""))
            ledger.contribute("first", 1, Contribution(name, blob, 10, 2, {"last_loss": 1.0}, False), 0.0)
    ledger.close()
    return folder


def what_there_is(folder: Path) -> object:
    """Every version, the states of the server optimizer, and what lies in the store."""
    ledger = Ledger(folder / LEDGER_FILE)
    versions = [(row.version, row.round, row.manifest) for row in ledger.models()]
    states = [ledger.optimizer_states("first", version, "fedadam") for version, _, _ in versions]
    return versions, states, sorted(path.name for path in (folder / "store" / "blobs").glob("*/*"))


@pytest.mark.slow
def test_a_coordinator_killed_at_any_step_from_one_stage_to_the_next_begins_with_the_same_bits(tmp_path: Path) -> None:
    folder = fleet_with_the_last_round_of_the_first_stage(tmp_path / "f")
    undisturbed = Path(shutil.copytree(folder, tmp_path / "undisturbed"))
    close_round(undisturbed, then_open=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
    limits, killed_in = {1: 1, 2: 10}, []  # by the number of versions: before round 1 is published, and after it
    while (last := Ledger(folder / LEDGER_FILE).last_round("first")) and last["round"] == 1:
        phase = len(Ledger(folder / LEDGER_FILE).models())
        limit = limits.setdefault(phase, 1)
        command = [sys.executable, str(CRASHING), str(limit), "tests.coordinator.closing", str(folder), "open"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -9), done.stderr
        killed_in += [phase] * (done.returncode == -9)
        limits[phase] += 85
    assert killed_in.count(1) >= 2 and killed_in.count(2) >= 2, killed_in
    close_round(folder)  # a start after the end, which cleans up
    close_round(undisturbed)
    assert what_there_is(folder) == what_there_is(undisturbed)


def test_the_start_holds_one_matrix_at_a_time(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    spec, store = bert.describe({**CONFIG, **sizes}, SPEC.labels, 16), BlobStore(tmp_path)

    def blobs(seed: int) -> dict[str, bytes]:
        """Tensors of one shape have the same values, so that the disk has little to do."""
        values = {t.shape: np.random.default_rng([seed, *t.shape]).normal(0, 0.1, t.shape) for t in spec.tensors}
        made = {shape: store.put(of.astype("<f4").tobytes()) for shape, of in values.items()}
        return {t.name: made[t.shape] for t in spec.tensors}

    start = make_manifest(spec, blobs(1), store.put(b"tokenizer"), 9, version=1)
    base = make_manifest(spec, blobs(2), start.tokenizer, 9, version=2)
    best_product(np.eye(3), np.eye(3))  # what numpy imports for it
    stage = METHODS["slora"].stage({}, 2, 3, TrainSettings(lora_rank=10), Options(rounds=3))
    tracemalloc.start()
    begin(base, stage, store, Primer(start, best_product))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * (64 * 256 * 8), "18 matrices, the largest of 0.125 MiB in float64"
