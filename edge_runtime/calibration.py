"""What the probe measured, remembered per machine, model shape, backend and thread count. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from edge_runtime.cost import LAW, Calibration, DataShape
from edge_runtime.engine import Engine, torch_version
from edge_runtime.errors import StoreError, WireError
from edge_runtime.model import ModelSpec
from edge_runtime.source import Source
from edge_runtime.store import read_json, write_json
from edge_runtime.training.process import model_job, run_worker
from edge_runtime.wire import from_plain, to_plain

LENGTH_STEP = 8
LEAST_CORRECTION, MOST_CORRECTION = 1.05, 4.0  # of the promised peak, after a kill
LAW_VERSION = 6  # one more when the probe or the law changes, so that older measurements are not used


def calibrate(
    source: Source,
    engine: Engine,
    data: DataShape,
    optimizer: str,
    threads: int,
    cache: Path,
    *,
    limit_bytes: int | None = None,
) -> Calibration:
    """The remembered calibration, or a fresh one from a probe of a few seconds in its own process."""
    choices = _choices(source.spec, engine, data, optimizer, threads)
    file = _file(cache, source.spec, engine, choices)
    if known := _read(file):
        return known
    job = {**model_job("probe", source.spec, source.weights), **engine.job(cache), **choices}
    result = run_worker(job, threads=threads, limit_bytes=limit_bytes)
    write_json(file, result)
    fresh: Calibration = from_plain(Calibration, result["calibration"], "calibration")
    return fresh


def correct(
    spec: ModelSpec,
    engine: Engine,
    data: DataShape,
    optimizer: str,
    threads: int,
    cache: Path,
    *,
    promised_bytes: int,
    limit_bytes: int,
) -> Calibration | None:
    """After a process was killed at its limit, above its promise: from now on promise more. None if nothing was remembered."""
    file = _file(cache, spec, engine, _choices(spec, engine, data, optimizer, threads))
    known = _read(file)
    if known is None:
        return None
    more = max(LEAST_CORRECTION, LEAST_CORRECTION * limit_bytes / max(1, promised_bytes))
    corrected = dataclasses.replace(known, correction=min(MOST_CORRECTION, known.correction * more))
    write_json(file, {"calibration": to_plain(corrected)})
    return corrected


def _choices(spec: ModelSpec, engine: Engine, data: DataShape, optimizer: str, threads: int) -> dict[str, object]:
    """What the probe is told besides the model."""
    mean, longest = (_round(n, spec.max_length) for n in (data.mean_length, data.longest))
    choices: dict[str, object] = {"mean": mean, "longest": longest, "threads": threads, "optimizer": optimizer}
    return {**choices, "rank": engine.rank, "precision": engine.precision}


def _file(cache: Path, spec: ModelSpec, engine: Engine, choices: Mapping[str, object]) -> Path:
    return cache / "calibration" / f"{_key(spec, engine, choices)}.json"


def _read(file: Path) -> Calibration | None:
    """None where there is none, or a damaged one: it is measured again."""
    try:
        found = read_json(file)
        if found is not None:
            calibration: Calibration = from_plain(Calibration, found["calibration"], "calibration")
            return calibration
    except (StoreError, WireError, KeyError, TypeError):
        pass
    return None


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
