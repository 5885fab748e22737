"""What the probe measured, remembered per machine, model shape, backend and thread count. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from edge_runtime.cost import LAW, Calibration
from edge_runtime.errors import MissingExtra, StoreError, WireError
from edge_runtime.model import ModelSpec
from edge_runtime.source import Source
from edge_runtime.store import read_json, write_json
from edge_runtime.training.process import run_worker
from edge_runtime.wire import from_plain

LENGTH_STEP = 8
LAW_VERSION = 2  # one more when the probe or the law changes, so that older measurements are not used


def worker_job(job: str, source: Source) -> dict[str, object]:
    """The fields of a worker job that describe a model."""
    spec = source.spec
    return {
        "job": job,
        "family": spec.family,
        "config": dict(spec.config),
        "labels": list(spec.labels),
        "max_length": spec.max_length,
        "weights": {
            t.name: (w.path, w.offset, w.shape, w.dtype) for t in spec.tensors for w in (source.weights[t.name],)
        },
    }


def torch_version() -> str:
    """The installed torch, without importing it.

    Raises:
        MissingExtra: there is none.
    """
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra("training needs torch, which is not installed: pip install 'edge-runtime[train]'") from None


def calibrate(
    source: Source, mean_length: float, threads: int, cache: Path, *, limit_bytes: int | None = None
) -> Calibration:
    """The remembered calibration, or a fresh one from a probe of about three seconds in its own process."""
    length = max(LENGTH_STEP, round(mean_length / LENGTH_STEP) * LENGTH_STEP)
    file = cache / "calibration" / f"{_key(source.spec, length, threads)}.json"
    try:
        found = read_json(file)
        if found is not None:
            calibration: Calibration = from_plain(Calibration, found["calibration"], "calibration")
            return calibration
    except (StoreError, WireError, KeyError, TypeError):
        pass  # a damaged file is measured again
    result = run_worker(
        {**worker_job("probe", source), "length": length, "threads": threads}, threads=threads, limit_bytes=limit_bytes
    )
    write_json(file, result)
    fresh: Calibration = from_plain(Calibration, result["calibration"], "calibration")
    return fresh


def _key(spec: ModelSpec, length: int, threads: int) -> str:
    boot_cpu = platform.processor() or platform.machine()
    parts = [
        LAW_VERSION,
        spec.family,
        dict(spec.config),
        len(spec.labels),
        length,
        threads,
        torch_version(),
        boot_cpu,
        os.cpu_count(),
        repr(LAW),
        platform.python_version(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
