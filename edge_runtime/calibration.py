"""What the probe measured, remembered per machine, model shape, backend and thread count. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from edge_runtime.cost import GRAPH_BACKEND, LAW, Calibration, DataShape
from edge_runtime.engine import Engine, torch_version
from edge_runtime.errors import DoesNotFit, StoreError, TrainingFailed, WireError
from edge_runtime.model import ModelSpec
from edge_runtime.records import TrainSettings
from edge_runtime.source import Source
from edge_runtime.store import read_json, write_json
from edge_runtime.training.process import model_job, run_worker
from edge_runtime.wire import from_plain, to_plain

LENGTH_STEP = 8
PROBE_S = 900.0  # after which a probe has failed
LEAST_LIMIT = 1 << 20
MOST_ROOM = 4 << 30  # budgets above this are one to the probe
LEAST_CORRECTION, MOST_CORRECTION = 1.05, 4.0  # of the promised peak, after a kill
RELAXED = 0.9  # what one training without a kill leaves of a correction at least
LAW_VERSION = 12  # one more when the probe or the law changes, so that older measurements are not used


def calibrate(
    source: Source,
    engine: Engine,
    data: DataShape,
    settings: TrainSettings,
    threads: int,
    cache: Path,
    *,
    budget_bytes: int,
    limit_bytes: int,
) -> Calibration:
    """The remembered calibration, or a fresh one from a probe of a few seconds in its own process.

    Args:
        budget_bytes: of a training; what takes clearly more is not measured.
        limit_bytes: what the probe may take at most.

    Raises:
        DoesNotFit: the probe was killed for memory.
        TrainingFailed, ModelError: it ended without a result, the model cannot be run.
    """
    choices = _choices(source.spec, engine, data, settings, threads, budget_bytes)
    file = _file(cache, source.spec, engine, choices)
    if known := _read(file, engine, settings):
        return known
    limit = max(limit_bytes, LEAST_LIMIT)
    job = {**model_job("probe", source.spec, source.weights), **engine.job(cache), **choices, "limit": limit}
    try:
        result = run_worker(job, threads=threads, limit_bytes=limit, timeout_s=PROBE_S)
    except TrainingFailed as error:
        if not (error.out_of_memory or error.killed):
            raise
        raise DoesNotFit(
            f"not even measuring this model fits into the {limit_bytes / 2**20:.0f} MiB that are available ({error}): "
            "free memory, or choose a smaller model or max_length",
            needed_bytes=limit_bytes + 1,
        ) from None
    fresh: Calibration = from_plain(Calibration, result["calibration"], "calibration")
    if fresh.block_peaks or engine.backend != GRAPH_BACKEND:  # else memory was short: another time there may be more
        write_json(file, result)
    return fresh


@dataclasses.dataclass(frozen=True)
class Remembered:
    """Where a calibration is remembered, for what `correct` and `relax` do to it."""

    file: Path
    engine: Engine
    settings: TrainSettings

    def correct(self, *, promised_bytes: int, limit_bytes: int) -> Calibration | None:
        """After a process was killed at its limit, above its promise: promise more from now on. None if nothing was remembered."""
        return self._scale(max(LEAST_CORRECTION, LEAST_CORRECTION * limit_bytes / max(1, promised_bytes)))

    def relax(self, *, promised_bytes: int, peak_bytes: int) -> Calibration | None:
        """After a training that stayed below a corrected promise: take a little of the correction back. None if there is none.

        A disk that does not take it is no error: what was trained matters more.
        """
        known = _read(self.file, self.engine, self.settings)
        if known is None or known.correction <= 1 or peak_bytes * LEAST_CORRECTION >= promised_bytes:
            return None
        with contextlib.suppress(StoreError, OSError):
            return self._scale(max(RELAXED, LEAST_CORRECTION * peak_bytes / promised_bytes))
        return None

    def _scale(self, factor: float) -> Calibration | None:
        known = _read(self.file, self.engine, self.settings)
        if known is None:
            return None
        scaled = dataclasses.replace(known, correction=max(1.0, min(MOST_CORRECTION, known.correction * factor)))
        write_json(self.file, {"calibration": to_plain(scaled)})
        return scaled


def remembered(
    spec: ModelSpec,
    engine: Engine,
    data: DataShape,
    settings: TrainSettings,
    threads: int,
    cache: Path,
    *,
    budget_bytes: int,
) -> Remembered:
    """The place of what `calibrate` with the same arguments remembers."""
    return Remembered(
        _file(cache, spec, engine, _choices(spec, engine, data, settings, threads, budget_bytes)), engine, settings
    )


def _choices(
    spec: ModelSpec, engine: Engine, data: DataShape, settings: TrainSettings, threads: int, budget_bytes: int
) -> dict[str, object]:
    """What the probe is told besides the model."""
    room = 1 << max(0, budget_bytes - 1).bit_length()  # rounded up, so that few budgets differ
    mean, longest = (_round(n, spec.max_length) for n in (data.mean_length, data.longest))
    return {
        "mean": mean,
        "longest": longest,
        "threads": threads,
        "optimizer": settings.optimizer,
        "rank": settings.lora_rank,
        "targets": list(settings.lora_targets) if settings.lora_rank else [],
        "precision": engine.precision,
        "room": min(room, MOST_ROOM),
    }


def _file(cache: Path, spec: ModelSpec, engine: Engine, choices: Mapping[str, object]) -> Path:
    return cache / "calibration" / f"{_key(spec, engine, choices)}.json"


def _read(file: Path, engine: Engine, settings: TrainSettings) -> Calibration | None:
    """None where there is none, or a damaged one, or another engine's: it is measured again."""
    try:
        found = read_json(file)
        if found is not None:
            calibration: Calibration = from_plain(Calibration, found["calibration"], "calibration")
            return calibration if _is_sound(calibration, engine, settings.lora_rank) else None
    except (StoreError, WireError, KeyError, TypeError):
        pass
    return None


def _is_sound(calibration: Calibration, engine: Engine, rank: int) -> bool:
    c = calibration
    if (c.backend, c.rank, c.precision) != (engine.backend, rank, engine.precision):
        return False
    measured = all(points and min(p.peak_bytes for p in points) > 0 for points in (c.head_peaks, c.block_peaks))
    return c.correction <= MOST_CORRECTION and (measured or c.backend != GRAPH_BACKEND)


def _round(length: float, most: int) -> int:
    """Up to a multiple of LENGTH_STEP, so that a few more texts need no new probe."""
    return min(most, max(LENGTH_STEP, math.ceil(length / LENGTH_STEP) * LENGTH_STEP))


def _key(spec: ModelSpec, engine: Engine, choices: Mapping[str, object]) -> str:
    library = torch_version() if engine.backend == "torch" else importlib.metadata.version("onnxruntime")
    parts = [
        LAW_VERSION,
        spec.family,
        dict(spec.config),
        len(spec.labels),
        engine.backend,
        dict(choices),
        library,
        platform.processor() or platform.machine(),
        os.cpu_count(),
        repr(LAW),
        platform.python_version(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
