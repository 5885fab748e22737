"""Runs a simulation's trainings on a Ray cluster: what a training reads travels as bytes, and so does what it writes.

Everything but the trainings stays in the simulation's process, so the results are those of one machine, bit for bit, where the
nodes have its kind of processor. RAY_ADDRESS names the cluster; without it Ray starts on this machine alone. Each node needs
this package. Ray pickles between its own processes: use a cluster that you trust, nothing of a real device passes here.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_runtime import errors
from edge_runtime.errors import EdgeError, TrainingFailed
from edge_runtime.optional import require
from edge_runtime.store import atomic_writer, cache_folder, file_sha256
from edge_runtime.training.process import run_worker

KEEP_S = 3600.0  # a node keeps a tensor this long after its last use
TABLES, FILES = ("weights", "adapters"), ("graphs",)  # of a job: where its model's files are named
CORPUS = ("tokens.npy", "starts.npy", "labels.npy", "corpus.json")
Job = Mapping[str, Any]


def relocated(job: Job, place: Callable[[str], str]) -> dict[str, Any]:
    """The job with another place for every file of the model."""
    tables = {
        key: {name: (place(path), *rest) for name, (path, *rest) in job[key].items()} for key in TABLES if key in job
    }
    return {**job, **tables, **{key: place(job[key]) for key in FILES if job.get(key)}}


def paths_of(job: Job) -> set[str]:
    """Every file of the model that a job names."""
    found: set[str] = set()

    def note(path: str) -> str:
        found.add(path)
        return path

    relocated(job, note)
    return found


class RayEngine:
    """A connection to a cluster. Attributes: workers: trainings that it can run at a time."""

    def __init__(self, threads: int) -> None:
        """Args: threads: processor cores of one training.

        Raises:
            MissingExtra: Ray is not installed.
        """
        self._ray = ray = require("ray", extra="ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        told_to_stop = signal.getsignal(signal.SIGTERM)
        ray.init(ignore_reinit_error=True, logging_level=logging.ERROR, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, told_to_stop)  # Ray has its own, which loses the round
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        self._threads = threads
        self._task = ray.remote(run_job).options(num_cpus=threads)
        self._blobs: dict[str, tuple[str, Any]] = {}  # path -> (its hash, its bytes in Ray's store)

    def start(self, job: Job) -> RayTraining:
        """Send a job off."""
        paths = paths_of(job)
        self._blobs = {path: self._blobs.get(path) or self._put(path) for path in paths}
        corpus = Path(job["corpus"])
        inputs = {name: (corpus / name).read_bytes() for name in CORPUS}
        kept = Path(job["residual"]["kept"]) if "residual" in job else None
        if kept and kept.exists():
            inputs["kept"] = kept.read_bytes()
        moved = relocated(job, lambda path: self._blobs[path][0])
        return RayTraining(self._ray, self._task.remote(moved, list(self._blobs.values()), inputs, self._threads), job)

    def _put(self, path: str) -> tuple[str, Any]:
        return file_sha256(Path(path)).hex(), self._ray.put(Path(path).read_bytes())


class RayTraining:
    """One training on the cluster."""

    def __init__(self, ray: Any, result: Any, job: Job) -> None:
        self._ray, self._result, self._job = ray, result, job

    def poll(self, timeout_s: float) -> dict[str, Any] | None:
        """The end, once it is there; its files are on this disk then."""
        if not self._ray.wait([self._result], timeout=timeout_s)[0]:
            return None
        try:
            found: dict[str, Any] = self._ray.get(self._result)
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise TrainingFailed(f"Ray lost the training: {reason}", killed=True) from None
        if "error" in found:
            raise _error(found)
        _write(Path(self._job["update"]), found["update"])
        if found["draft"] is not None:
            _write(Path(self._job["residual"]["draft"]), found["draft"])
        return {"result": found["result"]}

    def close(self) -> None:
        """Stop it if it still runs."""
        self._ray.cancel(self._result)


def run_job(job: Job, blobs: list[tuple[str, Any]], inputs: Mapping[str, bytes], threads: int) -> dict[str, Any]:
    """On a node: fetch what it lacks, train in a worker process as everywhere; -> what came of it."""
    with tempfile.TemporaryDirectory(prefix="edge-ray-") as name:
        scratch, store = Path(name), cache_folder() / "ray"
        _fetch(store, blobs)
        for file in CORPUS:
            _write(scratch / "corpus" / file, inputs[file])
        update, draft = scratch / "update", scratch / "draft"
        here: dict[str, Any] = {
            "corpus": str(scratch / "corpus"),
            "update": str(update),
            "cache": str(scratch / "cache"),
        }
        if "residual" in job:
            if "kept" in inputs:
                _write(scratch / "kept", inputs["kept"])
            here["residual"] = {**job["residual"], "kept": str(scratch / "kept"), "draft": str(draft)}
        try:
            result = run_worker({**relocated(job, lambda blob: str(store / blob)), **here}, threads=threads)
        except EdgeError as error:
            flags = {key: getattr(error, key, False) for key in ("killed", "out_of_memory")}
            return {"error": str(error), "kind": type(error).__name__, **flags}
        return {
            "result": result,
            "update": update.read_bytes(),
            "draft": draft.read_bytes() if draft.exists() else None,
        }


def _fetch(store: Path, blobs: list[tuple[str, Any]]) -> None:
    """Bring the model's files to this node, and forget those that nobody has used for long."""
    import ray

    for blob, ref in blobs:
        path = store / blob
        if not path.exists():
            _write(path, ray.get(ref))
        os.utime(path)
    for path in store.iterdir():
        try:
            if time.time() - path.stat().st_mtime > KEEP_S:
                path.unlink()
        except FileNotFoundError:  # another training of this node was first
            continue


def _write(path: Path, data: bytes) -> None:
    with atomic_writer(path) as file:
        file.write(data)


def _error(found: Mapping[str, Any]) -> EdgeError:
    kind = getattr(errors, found["kind"], TrainingFailed)
    if kind is TrainingFailed:
        return TrainingFailed(found["error"], killed=found["killed"], out_of_memory=found["out_of_memory"])
    made: EdgeError = kind(found["error"])
    return made
