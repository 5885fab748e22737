"""Calibration: one short training in a fresh process tells what the cost law cannot know of this machine.

About two seconds. Runs inside the worker process; the result is remembered by `calibration.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from edge_runtime.cost import Calibration, law_bytes
from edge_runtime.hardware import process_memory
from edge_runtime.model import ModelSpec
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.training.torch_backend import TorchBackend
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import to_plain

FEW, MANY = 2, 16  # examples of a small and a large micro-batch


def measure(spec: ModelSpec, weights: Mapping[str, MappedTensor], length: int, threads: int) -> dict[str, Any]:
    """Train the last block on random tokens of `length`; -> a Calibration as plain values.

    Memory first, at a known configuration: what the law does not explain is the runtime. Then the seconds of a block.
    """
    length = max(4, min(length, spec.max_length))
    settings = TrainSettings(batch_size=FEW)
    backend = TorchBackend(spec, weights, Plan(CostRow(1, False, FEW, 0, 0.0, 0.0, 0), settings, 3), threads)
    random = np.random.default_rng(0)

    def batch(size: int) -> Batch:
        vocabulary = spec.tensors[0].shape[0]
        ids = random.integers(0, vocabulary, (size, length))
        return Batch(ids, np.ones_like(ids), random.integers(0, len(spec.labels), size))

    for _ in range(3):
        backend.step(batch(FEW))
    backend.touch()
    peak = process_memory()["VmHWM"]
    runtime = max(0, peak - law_bytes(spec, 1, False, FEW * length, 1, settings.optimizer))
    few, many = batch(FEW), batch(MANY)
    forward = [median_s(partial(backend.block_forward, b)) for b in (few, many)]
    train = [median_s(partial(backend.block_train, b)) for b in (few, many)]
    update = median_s(backend.block_update)
    span = (MANY - FEW) * length
    per_forward, per_train = ((pair[1] - pair[0]) / span for pair in (forward, train))
    calibration = Calibration(
        backend=backend.name,
        runtime_bytes=runtime,
        forward_fixed_s=max(0.0, forward[0] - per_forward * FEW * length),
        forward_per_token_s=max(0.0, per_forward),
        train_fixed_s=max(0.0, train[0] - per_train * FEW * length),
        train_per_token_s=max(0.0, per_train),
        update_per_parameter_s=update / sum(t.size for t in spec.suffix(1)),
    )
    return {"calibration": to_plain(calibration)}


def median_s(work: Callable[[], object], repeats: int = 7) -> float:
    """Median wall seconds of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
