"""The training process: one job in as JSON on standard input, JSON lines out. Its exit returns all its memory.

Started by `process.py` as `python -m edge_runtime.training.worker`; ends when its standard input closes, so that it never
outlives an agent that was killed. What else comes there: `orders.py`. Jobs: `corpus` (tokenise), `probe` (calibrate), `train`, `evaluate`, `derive` (training graphs).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cost import GRAPH_BACKEND
from edge_runtime.data import Example, Examples, read_examples
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.records import CostRow, Plan
from edge_runtime.split import train_test
from edge_runtime.store import atomic_writer
from edge_runtime.training.corpus import Corpus, build_corpus
from edge_runtime.training.jobs import Job, emit, frozen_of, graphs_of, make_backend, spec_of, weights_of
from edge_runtime.training.orders import Left, Orders
from edge_runtime.wire import to_plain

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.training.backoff import Saved

    Array = np.ndarray[Any, np.dtype[Any]]

STARTED = time.monotonic()
ORDERS = Orders()


def corpus(job: Job) -> dict[str, Any]:
    """Read and tokenise a data file, and one for testing; -> where they lie and what rows were skipped."""

    def read(path: str, labels: Sequence[str] | None) -> Examples:
        columns = {key: job[key] for key in ("text_column", "label_column", "encoding", "bad_rows")}
        return read_examples(path, labels=labels, **columns)

    examples = read(job["data"], job["labels"])
    labels = job["labels"] or examples.labels
    rows: Sequence[Example] = examples.rows
    held_out: Sequence[Example] = ()
    if job["test"]:
        held_out = read(job["test"], labels).rows
    elif job["holdout"] > 0:
        rows, held_out = train_test(rows, job["holdout"], job["seed"])
    tokenizer, cache = Path(job["tokenizer"]).read_bytes(), Path(job["cache"])
    return {
        "folder": str(build_corpus(rows, tokenizer, labels, job["max_length"], cache)),
        "test_folder": str(build_corpus(held_out, tokenizer, labels, job["max_length"], cache)) if held_out else None,
        "labels": list(labels),
        "skipped": examples.num_skipped,
        "first_skipped": [f"line {bad.line}: {bad.reason}" for bad in examples.skipped],
    }


def train(job: Job, saved: Saved | None = None) -> dict[str, Any]:
    """Train as the job's plan says, or go on with what was saved."""
    from edge_runtime.training.train_job import Training

    return {"report": to_plain(Training(job, ORDERS, STARTED, saved).run())}


def probe(job: Job) -> dict[str, Any]:
    """Measure what the planner's formulas cannot know of this machine."""
    from edge_runtime.training.probe import Probed, measure_graphs, measure_torch

    choices = {
        key: job[key]
        for key in ("mean", "longest", "threads", "optimizer", "rank", "targets", "precision", "room", "limit")
    }
    probed = Probed(spec_of(job), weights_of(job), **choices)
    if job["backend"] == GRAPH_BACKEND:
        found = measure_graphs(probed, graphs_of(job, probed.spec), Path(job["cache"]))
    else:
        found = measure_torch(probed)
    return {"calibration": to_plain(found)}


def evaluate(job: Job) -> dict[str, Any]:
    """Classify a tokenised data set with what is left of a model; -> for each label how many are right, and how many there are."""
    from edge_runtime.records import TrainSettings
    from edge_runtime.training.loop import classified
    from edge_runtime.version_weights import left

    whole, size = spec_of(job), job["batch_size"]
    plan = Plan(CostRow(0, False, size, 0, 0.0, 0.0, 0, backend=job["backend"]), TrainSettings(batch_size=size), 0)
    weights = frozen_of(job, whole, plan)
    spec, weights = left(whole, weights, bytes.fromhex(job.get("kept", "")), Path(job["cache"]))
    backend = make_backend(job, plan, spec, weights, {})
    right, total = [0] * len(spec.labels), [0] * len(spec.labels)
    for label, is_right in classified(backend, Corpus(Path(job["corpus"])), size):
        total[label] += 1
        right[label] += is_right
    return {"right": right, "total": total}


def derive(job: Job) -> dict[str, Any]:
    """Derive a model's training graphs and write them to a file."""
    from edge_runtime.graphs.bundle import encode_graphs
    from edge_runtime.graphs.derive import derive

    graphs = encode_graphs(derive(spec_of(job), weights_of(job)))
    with atomic_writer(Path(job["graphs"])) as file:
        file.write(graphs)
    return {}


JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "corpus": corpus,
    "train": train,
    "probe": probe,
    "evaluate": evaluate,
    "derive": derive,
}


def read_job() -> tuple[Job, Saved | None]:
    """-> (the job that standard input names, or that a training was saved with; that training)."""
    from edge_runtime.training.backoff import Saved

    if len(sys.argv) > 1:  # it goes on in smaller pieces
        saved = Saved(int(sys.argv[1]))
        return saved.job, saved
    job = json.loads(sys.stdin.readline())
    if not job.get("resume"):
        return job, None
    saved = Saved(os.dup(job["pause_file"]))  # it was paused, and its process gone meanwhile
    return {**saved.job, "cgroup": job["cgroup"], "pause_file": job["pause_file"]}, saved


def main() -> int:
    """Run the one job that standard input names."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")  # if memory runs out, this process goes and not the device
    job, saved = read_job()
    if job.get("cgroup"):
        Path(job["cgroup"]).write_text(str(os.getpid()))
    threading.Thread(target=ORDERS.listen, args=(sys.stdin,), daemon=True).start()
    try:
        if job["job"] not in JOBS:
            raise UsageError(f"no such job: {job['job']!r}")
        emit(result=train(job, saved) if saved else JOBS[job["job"]](job))
    except Left:
        emit(left=True)
    except EdgeError as error:
        emit(error=str(error), kind=type(error).__name__)
        return error.exit_code
    except MemoryError:
        emit(error="out of memory", kind="MemoryError")
        return 1
    except RuntimeError as error:  # torch says so when its allocator gets nothing
        if "allocate" not in str(error):
            raise
        emit(error=str(error).splitlines()[0][:200], kind="MemoryError")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
