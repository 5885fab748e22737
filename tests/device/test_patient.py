"""A real training process that keeps to its conditions: it pauses in the middle, leaves memory, and gives the same bits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edge_models import bert
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training import patient
from edge_runtime.training.patient import LEAVE_AFTER_S, PatientWorker
from edge_runtime.training.process import model_job, plan_job
from tests.networks import bert_spec, write_weights
from tests.worlds import Plug, killed_after_ready

GIB = 1 << 30
STEPS, EPOCHS = 80, 2
SPEC = bert_spec(blocks=1)
MID_EPOCH = STEPS // EPOCHS


@pytest.fixture(autouse=True, scope="module")
def not_last() -> Iterator[None]:
    """On a machine that is busy with other tests, what comes last would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patient, "LAST", 0)
        yield


@pytest.fixture
def machine(tmp_path: Path) -> Plug:
    return Plug(tmp_path / "root")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small network and 160 texts of random words; steps enough to be met in the middle."""
    folder = tmp_path_factory.mktemp("job")
    random = np.random.default_rng(3)
    lengths = random.integers(4, 40, 4 * STEPS // EPOCHS)
    corpus = folder / "corpus"
    corpus.mkdir()
    np.save(corpus / "tokens.npy", random.integers(1, 90, int(lengths.sum())).astype(np.int32))
    np.save(corpus / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(corpus / "labels.npy", random.integers(0, 3, len(lengths)).astype(np.int32))
    row = CostRow(1, False, 4, 0, 0.0, 0.0, 0, backend="onnx")
    settings = TrainSettings(epochs=EPOCHS, batch_size=4, learning_rate=1e-3, optimizer="adamw8bit")
    return {
        **model_job("train", SPEC, write_weights(SPEC, folder / "weights.f32")),
        **plan_job(Plan(row, settings, STEPS)),
        "backend": "onnx",
        "graphs": str(bert.bundled_graphs(SPEC)),
        "cache": str(folder),
        "corpus": str(corpus),
        "threads": 1,
    }


def start(job: dict[str, Any], machine: Plug, update: Path) -> PatientWorker:
    return PatientWorker(
        {**job, "update": str(update)}, machine.gate, folders=(update.parent,), peak_bytes=GIB, limit_bytes=GIB, threads=1, nice=0, clock=machine.clock
    )  # fmt: skip


def until(worker: PatientWorker, what: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Poll until a line is what is asked for."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        line = worker.poll(0.005)
        if line and what(line):
            return line
    raise AssertionError("it never came")


def until_gone(worker: PatientWorker) -> None:
    end = time.monotonic() + 60
    while worker.pid:
        assert time.monotonic() < end
        assert worker.poll(0.005) is None


@pytest.fixture(scope="module")
def undisturbed(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    worker = start(job, Plug(folder / "root"), folder / "update")
    until(worker, lambda line: "result" in line)
    return (folder / "update").read_bytes()


def test_a_training_that_paused_and_one_that_left_memory_give_the_bits_of_one_that_did_neither(
    job: dict[str, Any], machine: Plug, undisturbed: bytes, tmp_path: Path
) -> None:
    worker = start(job, machine, tmp_path / "update")
    first = worker.pid
    try:
        until(worker, lambda line: "step" in line)
        machine.is_plugged(False)
        paused = until(worker, lambda line: "paused" in line)["paused"]
        assert 0 < paused < STEPS and paused % MID_EPOCH, "in the middle of an epoch"
        assert worker.pid == first, "a short pause keeps the process"
        machine.is_plugged(True)
        assert until(worker, lambda line: "resumed" in line)["resumed"] == paused
        until(worker, lambda line: "step" in line)
        machine.has_free(GIB // 2)
        left = until(worker, lambda line: "paused" in line)["paused"]
        assert paused < left < STEPS
        until_gone(worker)
        assert not psutil.pid_exists(first), "memory is what was wanted: the process holds none any more"
        machine.has_free(4 * GIB)
        assert until(worker, lambda line: "resumed" in line)["resumed"] == left
        assert worker.pid not in (0, first)
        report = until(worker, lambda line: "result" in line)["result"]["report"]
    finally:
        worker.close()
    assert (tmp_path / "update").read_bytes() == undisturbed
    assert report["steps"] == STEPS and report["backed_off"] == 0
    assert report["paused_s"] > 0 and report["train_s"] <= report["total_s"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "update"], "what was saved had no name"


def test_a_long_pause_leaves_memory_too(job: dict[str, Any], tmp_path: Path) -> None:
    machine = Plug(tmp_path / "root", look_s=0.0)
    worker = start(job, machine, tmp_path / "update")
    try:
        machine.is_plugged(False)
        machine.jump(2)
        until(worker, lambda line: "paused" in line)
        for _ in range(20):
            worker.poll(0.005)
        assert worker.pid
        machine.jump(LEAVE_AFTER_S)
        until_gone(worker)
    finally:
        worker.close()


PAUSE = """
import json, sys
from pathlib import Path
from edge_runtime.training import patient
from edge_runtime.training.patient import PatientWorker
from tests.worlds import Plug

patient.LAST = 0
folder = Path(sys.argv[1])
plug = Plug(folder / "root")
job = json.loads((folder / "job.json").read_text())
worker = PatientWorker(job, plug.gate, folders=(folder / "state",), peak_bytes=1 << 30, limit_bytes=1 << 30, threads=1, nice=0, clock=plug.clock)
first = worker.pid
if sys.argv[2] == "saved":
    plug.has_free(1 << 29)
else:
    plug.is_plugged(False)
while "paused" not in (worker.poll(0.005) or {}):
    pass
while sys.argv[2] == "saved" and worker.pid:
    worker.poll(0.005)
print(first)
print("ready", flush=True)
import time
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["in memory", "saved"])
def test_an_agent_that_is_killed_while_its_training_is_paused_leaves_nothing_behind(
    how: str, job: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "job.json").write_text(json.dumps({**job, "update": str(tmp_path / "state/update")}))
    pid = int(killed_after_ready(PAUSE, tmp_path, how))
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "it outlives its agent"
        time.sleep(0.02)
    assert list((tmp_path / "state").iterdir()) == []


def test_a_training_with_conditions_comes_last(
    job: dict[str, Any], machine: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "LAST", 19)
    worker = start(job, machine, tmp_path / "update")
    assert psutil.Process(worker.pid).nice() == 19
    worker.close()
