"""What the probe measured, remembered per machine, model shape, backend and thread count. Imports no torch."""

from __future__ import annotations

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
from edge_runtime.wire import from_plain

LENGTH_STEP = 8
LAW_VERSION = 4  # one more when the probe or the law changes, so that older measurements are not used


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
    """The remembered calibration, or a fresh one from a probe of about three seconds in its own process."""
    mean, longest = (_round(n, source.spec.max_length) for n in (data.mean_length, data.longest))
    choices = {"mean": mean, "longest": longest, "threads": threads, "optimizer": optimizer}
    choices |= {"rank": engine.rank, "precision": engine.precision}
    file = cache / "calibration" / f"{_key(source.spec, engine, choices)}.json"
    try:
        found = read_json(file)
        if found is not None:
            calibration: Calibration = from_plain(Calibration, found["calibration"], "calibration")
            return calibration
    except (StoreError, WireError, KeyError, TypeError):
        pass  # a damaged file is measured again
    job = {**model_job("probe", source.spec, source.weights), **engine.job(cache), **choices}
    result = run_worker(job, threads=threads, limit_bytes=limit_bytes)
    write_json(file, result)
    fresh: Calibration = from_plain(Calibration, result["calibration"], "calibration")
    return fresh


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
