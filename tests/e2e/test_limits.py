"""Memory limits that the kernel keeps: what is promised fits, what does not fit is said before, and a child that dies is only a child.

Skips where this machine lets us make no memory cgroup (no root and no delegation, or a kernel without the controller).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_coordinator.fleet import Fleet as FleetFolder
from edge_models import hub
from tests.e2e.conftest import Reference
from tests.e2e.fleets import Fleet, running
from tools.limits import MemoryLimit

MIB = 1 << 20
SENTENCES = [
    "Where is the river ?",
    "How many moons are there and who counted them in the end ?",
    "Name a colour of the old house .",
]


def can_limit() -> bool:
    limit = MemoryLimit("probe", 64 * MIB)
    try:
        return limit.enforced
    finally:
        limit.remove()


needs_cgroup = pytest.mark.skipif(not can_limit(), reason="this machine allows us no memory cgroup")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((f"{SENTENCES[i % 3]} {'and so on ' * (i % 21)}", "abc"[i % 3]) for i in range(192))
    return path


def run(limit_bytes: int | None, *arguments: str, name: str = "train") -> subprocess.CompletedProcess[str]:
    """A command of edge-runtime, within a limit for it and all its children."""
    return run_python(limit_bytes, "-m", "edge_runtime.cli", *arguments, name=name)


def run_python(limit_bytes: int | None, *arguments: str, name: str = "train") -> subprocess.CompletedProcess[str]:
    """A Python program, within a limit for it and all its children."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
    limit = MemoryLimit(name, limit_bytes) if limit_bytes else None
    try:
        return subprocess.run(
            limit.command(command) if limit else command, capture_output=True, text=True, env=environment, check=False
        )
    finally:
        if limit:
            limit.remove()


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def least_bytes(data: Path, depth: int) -> int:
    """What the planner says a depth needs with the smallest pieces."""
    table = json.loads(
        run(None, "plan", "minilm-l3", "--data", str(data), "--memory", "1B", "--threads", "1", "--json").stdout
    )
    return min(row["peak_bytes"] for row in table["rows"] if row["depth"] == depth)


@needs_cgroup
@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_training_real_weights_keeps_its_promise_within_a_cgroup_of_just_that_size(
    depth: int, data: Path, tmp_path: Path
) -> None:
    budget = least_bytes(data, depth) + MIB
    done = run(budget + 96 * MIB, "train", "minilm-l3", "--data", str(data), "--memory", str(budget), "--depth", str(depth), "--threads", "1",
               "--out", str(tmp_path / "m"), "--json")  # fmt: skip
    report = result(done)
    assert report["depth"] == depth
    assert report["peak_bytes"] <= report["promised_peak_bytes"] <= budget
    assert report["enforced_by"] == "cgroup"


@needs_cgroup
@pytest.mark.slow
def test_auto_within_a_cgroup_counts_the_limit_and_not_the_machines_memory(data: Path, tmp_path: Path) -> None:
    limit = least_bytes(data, 1) + 112 * MIB
    report = result(
        run(limit, "train", "minilm-l3", "--data", str(data), "--threads", "1", "--out", str(tmp_path / "m"), "--json")
    )
    assert report["limit_bytes"] < limit and report["peak_bytes"] <= limit


TRAIN_WHILE_MEMORY_GOES = """
import dataclasses, json, sys, threading, time
from edge_runtime import Device, TrainSettings, plan, train
from edge_runtime.cost import cost, trained
from edge_runtime.engine import EngineOptions
from edge_runtime.hardware import room
from edge_runtime.planner import make_plan

data, out, backend, optimizer, take = sys.argv[1:]
device = Device.measure(1, speed=False)
settings = TrainSettings(epochs=5, batch_size=16, optimizer=optimizer)  # it must outlast the filling, also on a busy machine
planned = plan("minilm-l3", data, settings=settings, device=device, engine=EngineOptions(backend), max_length=64)
shape = planned.prepared.data
spec = planned.source.spec
whole = cost(spec, shape, settings, planned.calibration, trained(spec, 2, settings), False, 16)  # not in pieces
planned = dataclasses.replace(planned, chosen=make_plan(whole, shape, settings))
begun = threading.Event()

def fill(num_bytes, more=24, piece=8 << 20):
    begun.wait()
    taken = [bytearray(num_bytes - more * piece)]  # zeros are written: it is resident
    for _ in range(more):
        taken.append(bytearray(piece))
        time.sleep(0.05)
    time.sleep(600)

def progress(step, steps, loss):
    begun.set()

least = [1 << 60]

def watch():
    while True:
        least[0] = min(least[0], room(skip_own=False)[1])
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
if int(take):
    threading.Thread(target=fill, args=(int(take),), daemon=True).start()
report = train(planned, out, device=device, progress=progress).report
print(json.dumps(dataclasses.asdict(report) | {"least": least[0]}))
"""


@needs_cgroup
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "optimizer"), [("onnx", "adamw8bit"), ("torch", "adamw")])
def test_training_goes_on_in_smaller_pieces_when_memory_gets_short(
    backend: str, optimizer: str, data: Path, tmp_path: Path
) -> None:
    def train(name: str, take: int) -> dict[str, Any]:
        arguments = (str(data), str(tmp_path / name), backend, optimizer, str(take))
        return result(run_python(2560 * MIB, "-c", TRAIN_WHILE_MEMORY_GOES, *arguments))

    left = train("enough", 0)
    taken = train("short", left["least"] - 8 * MIB)
    assert left["backed_off"] == 0 and taken["backed_off"] >= 1
    assert taken["steps"] == left["steps"] == 60
    assert (taken["checkpointing"], -taken["micro_batch"]) > (left["checkpointing"], -left["micro_batch"])
    assert taken["first_loss"] == left["first_loss"]
    assert taken["last_loss"] == pytest.approx(left["last_loss"], rel=0.02), "no step is lost, none is done twice"
    assert taken["promised_peak_bytes"] == left["promised_peak_bytes"]


@pytest.mark.slow
def test_a_budget_that_nothing_fits_is_refused_with_the_bytes_needed(data: Path, tmp_path: Path) -> None:
    done = run(None, "train", "minilm-l3", "--data", str(data), "--memory", "60MB", "--out", str(tmp_path / "m"))
    assert done.returncode == 5
    assert "not even the head" in done.stderr and "MiB" in done.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_texts_to_test_on_that_are_longer_than_those_to_train_on_are_within_the_promise(tmp_path: Path) -> None:
    short, long = tmp_path / "short.csv", tmp_path / "long.csv"
    short.write_text("text,label\n" + "".join(f"{SENTENCES[i % 3]},{'abc'[i % 3]}\n" for i in range(32)))
    long.write_text("text,label\n" + "".join(f"{'and so on ' * 200},{'abc'[i % 3]}\n" for i in range(16)))
    arguments = ("--data", str(short), "--test", str(long), "--max-length", "512", "--depth", "1", "--threads", "1")
    report = result(run(None, "train", "minilm-l3", *arguments, "--out", str(tmp_path / "m"), "--json"))
    assert report["accuracy"] is not None
    assert report["peak_bytes"] <= report["promised_peak_bytes"] * 1.03


@pytest.mark.slow
def test_a_model_is_the_same_whether_the_disk_takes_the_prefix_cache_or_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = hub.resolve("minilm-l3", print), {}
    for name in ("kept", "refused"):
        cache = tmp_path / f"cache-{name}"
        cache.mkdir()
        if name == "refused":
            (cache / "prefixes").write_text("a file where the folder would be")
            shutil.copytree(
                tmp_path / "cache-kept" / "calibration", cache / "calibration"
            )  # so that the plan is the same
        monkeypatch.setenv("EDGE_CACHE", str(cache))
        arguments = ("--data", str(data), "--depth", "1", "--epochs", "2", "--threads", "1", "--json")
        report = result(run(None, "train", str(model), *arguments, "--out", str(tmp_path / name)))
        found[report["cached"]] = (tmp_path / name / "model.safetensors").read_bytes()
    assert found[True] == found[False]


@pytest.mark.slow
def test_a_training_that_is_asked_to_end_leaves_nothing_and_what_a_kill_left_goes_with_the_next(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    command = [sys.executable, "-m", "edge_runtime.cli", "train", "minilm-l3", "--data", str(data), "--out", str(out)]

    def stop(number: signal.Signals) -> int:
        process = subprocess.Popen([*command, "--epochs", "50", "--threads", "1"], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(out.glob(".training.*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(out.glob(".training.*")), "it trains"
        process.send_signal(number)
        return process.wait(30)

    assert stop(signal.SIGTERM) == 130
    assert not out.exists()
    assert stop(signal.SIGKILL) == -signal.SIGKILL
    assert list(out.glob(".training.*"))
    result(run(None, "train", "minilm-l3", "--data", str(data), "--out", str(out), "--depth", "0", "--json"))
    assert not list(out.glob(".training.*")) and (out / "model.safetensors").exists()


@pytest.mark.slow
def test_a_device_whose_child_is_killed_for_memory_lives_on_and_gives_the_plan_back(
    tmp_path: Path, model: Path, reference: Reference
) -> None:
    """The calibration that the device made in a first fleet is made to lie, so that the plan promises far too little."""
    (tmp_path / "first").mkdir()
    limits = ["2GB", "20MB"]
    with running(
        Fleet(tmp_path / "first", model, rounds=1, cache=reference.cache, goal=2, quorum=1, memory=limits)
    ) as first:
        first.start_all()
        first.wait(first.finished)
    own = first.folder / "device-1" / "cache"
    for file in (own / "calibration").glob("*.json"):
        measured = json.loads(file.read_text())
        for peaks in ("head_peaks", "block_peaks"):
            measured["calibration"][peaks] = [{**p, "peak_bytes": 6 * MIB} for p in measured["calibration"][peaks]]
        file.write_text(json.dumps(measured))
    fleet = Fleet(tmp_path, model, rounds=1, cache=own, goal=2, quorum=1, memory=limits)
    with running(fleet):
        fleet.start_all()
        fleet.wait(fleet.finished)
        failures = fleet.events("device-1", "training-failed")
        assert failures and failures[0]["out_of_memory"]
        kept = (fleet.folder / "device-1" / "cache" / "calibration").glob("*.json")
        corrected = [json.loads(file.read_text())["calibration"]["correction"] for file in kept]
        assert max(corrected) >= 1.05, "from now on it promises more"
        assert fleet.events("device-1", "declined") and fleet.alive("device-1")
    assert [device for _, device, _ in fleet.counted()] == ["device-0"]


@pytest.mark.slow
def test_a_device_that_fits_nothing_declines_says_the_bytes_and_still_gets_the_model(
    tmp_path: Path, model: Path, reference: Reference
) -> None:
    fleet = Fleet(tmp_path, model, rounds=1, cache=reference.cache, goal=2, quorum=1, memory=["2GB", "60MB"])
    with running(fleet):
        fleet.start_all()
        fleet.wait(fleet.finished)
        assert fleet.events("device-1", "nothing-fits")[0]["needs_bytes"] > 60_000_000
        assert fleet.alive("device-1")
    assert FleetFolder(fleet.fleet).ledger.devices()[1]["model_version"] == 2


@pytest.mark.slow
def test_the_idle_agent_stays_below_its_reserve(tmp_path: Path, model: Path, reference: Reference) -> None:
    from edge_runtime.budget import AGENT_RESERVE_BYTES
    from edge_runtime.hardware import process_memory

    with running(Fleet(tmp_path, model, rounds=1, cache=reference.cache)) as fleet:
        fleet.start_all()
        fleet.wait(fleet.finished)
        held = process_memory(fleet.processes["device-0"].pid)
    assert held["VmHWM"] <= AGENT_RESERVE_BYTES


PLAN_WITHIN = """
import dataclasses, json, sys
from edge_runtime import Device, plan
device = Device.measure(1, speed=False)
available = int(sys.argv[2])
left = dataclasses.replace(device.profile, ram_total_bytes=available + (64 << 20), ram_available_bytes=available,
                           cgroup_limit_bytes=None, cgroup_available_bytes=None)
planned = plan("minilm-l3", sys.argv[1], memory="1GB", device=dataclasses.replace(device, profile=left))
print(json.dumps([[row.depth for row in planned.rows], planned.chosen and planned.chosen.chosen.depth]))
"""


@pytest.mark.slow
def test_where_no_block_can_even_be_measured_the_head_is_planned_and_that_is_not_remembered(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    least = least_bytes(data, 0) + 10 * MIB  # between what the head and what a block takes
    shutil.rmtree(tmp_path / "calibration")
    found = result(run_python(None, "-c", PLAN_WITHIN, str(data), str(least)))
    assert found == [[0], 0]
    assert not (tmp_path / "calibration").exists()
    found = result(run_python(None, "-c", PLAN_WITHIN, str(data), str(1 << 33)))
    assert max(found[0]) == found[1] == 3
