"""What is remembered of a probe: only what belongs to the engine that asks, and what a kill has taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import calibration
from edge_runtime.calibration import calibrate, remembered
from edge_runtime.cost import Calibration, DataShape, Point
from edge_runtime.engine import Engine
from edge_runtime.errors import DoesNotFit, ModelError, StoreError, TrainingFailed
from edge_runtime.records import TrainSettings
from edge_runtime.source import Source
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import to_plain
from tests.samples import small_spec

MIB = 1 << 20
SPEC = small_spec(2, 128)
SOURCE = Source(SPEC, {t.name: MappedTensor("weights", 0, t.shape) for t in SPEC.tensors}, Path("tokenizer.json"), {})
ENGINE = Engine("onnx", None, "float32", True)
DATA = DataShape(100, 32, 16.0)
POINTS = (Point(32, 90 * MIB), Point(128, 95 * MIB))
MEASURED = Calibration("onnx", 0, 1e-4, 1e-5, 3e-4, 3e-5, 1e-9, head_peaks=POINTS, block_peaks=POINTS, probed_depth=2)


class Probe:
    """In place of the worker."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.limits = error, list[int]()

    def __call__(self, job: Any, *, threads: int, limit_bytes: int, timeout_s: float) -> dict[str, Any]:
        self.limits.append(limit_bytes)
        if self.error:
            raise self.error
        return {"calibration": to_plain(MEASURED)}


def ask(cache: Path, *, budget: int = 200 * MIB, limit: int = 300 * MIB, engine: Engine = ENGINE) -> Calibration:
    return calibrate(SOURCE, engine, DATA, TrainSettings(), 1, cache, budget_bytes=budget, limit_bytes=limit)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    made = Probe()
    monkeypatch.setattr(calibration, "run_worker", made)
    return made


def test_a_probe_is_limited_and_made_once_for_budgets_of_one_size(probe: Probe, tmp_path: Path) -> None:
    assert ask(tmp_path) == ask(tmp_path, budget=250 * MIB) == MEASURED
    assert probe.limits == [300 * MIB]
    ask(tmp_path, budget=257 * MIB)
    assert len(probe.limits) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 8},
        {"backend": "torch"},
        {"precision": "int8"},
        {"correction": 16.0},
        {"head_peaks": []},
        {"block_peaks": [{"tokens": 32, "peak_bytes": 0}]},
        {"train_fixed_s": "x"},
    ],
)
def test_what_is_remembered_for_another_engine_or_makes_no_sense_is_measured_again(
    wrong: dict[str, Any], probe: Probe, tmp_path: Path
) -> None:
    ask(tmp_path)
    (file,) = (tmp_path / "calibration").iterdir()
    file.write_text(json.dumps({"calibration": to_plain(MEASURED) | wrong}))
    assert ask(tmp_path) == MEASURED
    assert len(probe.limits) == 2


@pytest.mark.parametrize("how", [{"out_of_memory": True}, {"killed": True}])
def test_a_probe_that_is_killed_says_that_nothing_fits(how: dict[str, bool], probe: Probe, tmp_path: Path) -> None:
    probe.error = TrainingFailed("killed", **how)
    with pytest.raises(DoesNotFit, match="not even measuring this model fits into the 300 MiB"):
        ask(tmp_path)


@pytest.mark.parametrize("error", [ModelError("graphs"), TrainingFailed("another")])
def test_another_failure_of_the_probe_is_told_as_it_is(error: Exception, probe: Probe, tmp_path: Path) -> None:
    probe.error = error
    with pytest.raises(type(error), match=str(error)):
        ask(tmp_path)


def test_after_a_kill_at_the_limit_more_is_promised_each_time_but_not_without_end(probe: Probe, tmp_path: Path) -> None:
    place = remembered(SPEC, ENGINE, DATA, TrainSettings(), 1, tmp_path, budget_bytes=200 * MIB)

    def killed() -> Calibration | None:
        return place.correct(promised_bytes=100 * MIB, limit_bytes=120 * MIB)

    assert killed() is None, "nothing is remembered yet"
    ask(tmp_path)
    found = [calibrated.correction for calibrated in (killed() for _ in range(12)) if calibrated]
    assert found[0] == pytest.approx(1.05 * 1.2) and found == sorted(found) and found[-1] == 4.0
    assert ask(tmp_path).correction == 4.0


def test_a_correction_that_was_too_much_is_taken_back_bit_by_bit_and_no_further(probe: Probe, tmp_path: Path) -> None:
    ask(tmp_path)
    place = remembered(SPEC, ENGINE, DATA, TrainSettings(), 1, tmp_path, budget_bytes=200 * MIB)
    assert place.relax(promised_bytes=200 * MIB, peak_bytes=100 * MIB) is None, "there is no correction"
    place.correct(promised_bytes=100 * MIB, limit_bytes=160 * MIB)
    promised, needed = 168 * MIB, 120 * MIB  # of which 100 without the correction

    def trained() -> float:
        nonlocal promised
        found = place.relax(promised_bytes=promised, peak_bytes=needed)
        correction = (found or ask(tmp_path)).correction
        promised = int(100 * MIB * correction)
        return correction

    found = [trained() for _ in range(8)]
    assert found[0] == pytest.approx(0.9 * 1.68)
    assert found[-1] == found[-2] == pytest.approx(1.05 * 1.2, rel=1e-3), "what it needed, and a little"


def test_a_disk_that_does_not_take_a_smaller_correction_costs_nothing_else(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path)
    place = remembered(SPEC, ENGINE, DATA, TrainSettings(), 1, tmp_path, budget_bytes=200 * MIB)
    place.correct(promised_bytes=100 * MIB, limit_bytes=160 * MIB)

    def full(path: Path, value: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(calibration, "write_json", full)
    assert place.relax(promised_bytes=168 * MIB, peak_bytes=100 * MIB) is None
