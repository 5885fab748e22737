"""Calibration: a few short steps in a fresh process tell what the cost law cannot know of this machine and model.

A few seconds. Runs inside the worker process; the result is remembered by `calibration.py`. Imports a backend only
where it is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_runtime.cost import (
    GRAPH_BACKEND,
    Calibration,
    Point,
    Trained,
    block_shares,
    graph_law_bytes,
    law_bytes,
    trained,
)
from edge_runtime.errors import ModelError, TrainingFailed
from edge_runtime.hardware import process_memory, profile, reset_peak
from edge_runtime.model import ModelSpec
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.training.optimizers import Optimizer
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    from edge_runtime.graphs.bundle import GraphSet

SIZES = (1, 4, 16)  # examples of the micro-batches that are measured, as far as memory goes
FEW = 2  # examples of torch's, whose peak is measured
PATIENCE_S = 30.0  # no larger micro-batch is measured if its two steps would take longer
ENOUGH_S = 0.15  # of measuring the same again
MASK_EVERY = 10  # of the matrix whose masked entries are timed
UPDATED = 1 << 20  # values of the tensor that times the optimizer


@dataclass(frozen=True)
class Probed:
    """What is to be measured: a model, its data's lengths in tokens, and the choices that change the costs."""

    spec: ModelSpec
    weights: Mapping[str, MappedTensor]
    mean: int
    longest: int
    threads: int
    optimizer: str = "adamw"
    rank: int = 0
    targets: Sequence[str] = ()
    precision: str = "float32"
    room: int | None = None  # bytes that no plan may pass: what would take more need not be measured
    limit: int = 1 << 60  # bytes at which this process is ended

    def settings(self, batch_size: int) -> TrainSettings:
        """For steps whose memory is measured: the optimizer without states."""
        return TrainSettings(
            batch_size=batch_size, optimizer="sgd", lora_rank=self.rank, lora_targets=tuple(self.targets)
        )

    def batch(self, size: int, length: int) -> Batch:
        """Random tokens, no padding."""
        random = np.random.default_rng(0)
        length = max(4, min(length, self.spec.max_length))
        ids = random.integers(0, self.spec.tensors[0].shape[0], (size, length))
        return Batch(ids, np.ones_like(ids), random.integers(0, len(self.spec.labels), size))

    def trained(self, depth: int) -> Trained:
        """What its steps train."""
        return trained(self.spec, depth, self.settings(1))

    def plan(self, backend: str, depth: int, size: int) -> Plan:
        """A step of one micro-batch."""
        rank = self.rank if depth else 0
        row = CostRow(depth, False, size, 0, 0.0, 0.0, 0, backend=backend, rank=rank, precision=self.precision)
        return Plan(row, self.settings(size), 3)


def measure_torch(probed: Probed) -> Calibration:
    """Train the last block. Memory first, at a known configuration: what the law does not explain is the runtime."""
    from edge_runtime.training.torch_backend import TorchBackend

    spec, length = probed.spec, max(4, min(probed.mean, probed.spec.max_length))
    backend = TorchBackend(spec, probed.weights, probed.plan("torch", 1, max(SIZES)), probed.threads)
    few = probed.batch(FEW, length)
    for _ in range(3):
        backend.step(few)
    backend.touch()
    peak = process_memory()["VmHWM"]
    saved = -(-backend.saved_bytes(few) // few.ids.size) if probed.rank else 0
    runtime = max(0, peak - law_bytes(spec, probed.trained(1), False, FEW * length, 1, "sgd", saved))
    head = TorchBackend(spec, probed.weights, probed.plan("torch", 0, max(SIZES)), probed.threads)
    found = seconds(head, backend, probed, 1, SIZES)
    return Calibration("torch", runtime, **found, rank=probed.rank, saved_per_token_bytes=saved)


def measure_graphs(probed: Probed, graphs: GraphSet, scratch: Path) -> Calibration:
    """Train the head, then the last two blocks: peaks at up to three sizes of the micro-batch, and the seconds of a block.

    Where memory is not enough for two blocks, one is trained, or none: then nothing but the head can be promised.
    """
    from edge_runtime.training.graph_backend import GraphBackend

    spec, longest = probed.spec, max(4, min(probed.longest, probed.spec.max_length))
    room = min(hardware_room(), probed.room or 1 << 60)

    def backend_of(depth: int) -> GraphBackend:
        plan = probed.plan(GRAPH_BACKEND, depth, max(SIZES))
        return GraphBackend(spec, probed.weights, plan, graphs, probed.threads, scratch)

    def peaks(backend: GraphBackend, depth: int) -> tuple[Point, ...]:
        points: list[Point] = []
        base = process_memory()["VmRSS"]
        last, growth, taken_s = 1, 0, 0.0
        for size in SIZES:
            tokens = size * longest
            if points and (base + growth * size // last > room or taken_s * size / last > PATIENCE_S):
                break
            reset_peak()
            begun = time.perf_counter()
            for _ in range(2):
                backend.step(probed.batch(size, longest))
            last, growth, taken_s = size, process_memory()["VmHWM"] - base, time.perf_counter() - begun
            held = graph_law_bytes(spec, probed.trained(depth), False, tokens, tokens, "sgd")
            points.append(Point(tokens, max(0, process_memory()["VmHWM"] - held)))
        return tuple(points)

    # Each in a process of its own, so that no memory of the one is counted for the other.
    head = in_child(lambda: peaks(backend_of(0), 0))
    depth = deepest(probed, head[0], longest)
    block = in_child(lambda: peaks(backend_of(depth), depth)) if depth else ()
    alone = backend_of(0)
    blocks = backend_of(depth) if depth else alone
    return Calibration(
        GRAPH_BACKEND,
        0,
        **seconds(alone, blocks, probed, depth, SIZES[: len(block or head)]),
        rank=probed.rank,
        precision=probed.precision,
        head_peaks=head,
        block_peaks=block,
        probed_depth=depth,
        saved_per_token_bytes=blocks.saved_bytes(probed.batch(1, longest)) // longest if depth else 0,
    )


def deepest(probed: Probed, head: Point, longest: int) -> int:
    """How many blocks, at most two, can be trained here by what the law says and training the head alone took."""
    limit = min(hardware_room(), probed.limit)
    for depth in (2, 1):
        if depth > probed.spec.num_blocks:
            continue
        held = graph_law_bytes(probed.spec, probed.trained(depth), False, longest, longest, "sgd")
        if head.peak_bytes + held <= limit:
            return depth
    return 0


class Timed(Protocol):
    """A backend whose seconds can be measured."""

    def step(self, batch: Batch) -> float:
        """A whole step."""

    def block(self, batch: Batch, pieces: int) -> Callable[[], object]:
        """A block forward, so many times in one step."""


def seconds(head: Timed, blocks: Timed, probed: Probed, depth: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The seconds of a calibration, from whole steps of `head`, which trains that alone, and of `blocks`, which trains `depth` of them.

    So the parts add up to what was measured for both, and to a line between them; a block forward is timed by itself.
    """
    spec, points = probed.spec, dict[str, list[tuple[int, float]]](forward=[], train=[], rest=[])
    once: list[float] = []
    update, work = update_s("sgd"), [share.work for share in block_shares(spec)]
    for size in sizes:
        batch = probed.batch(size, probed.mean)
        head_s = median_s(partial(head.step, batch)) - update * probed.trained(0).total
        forward_s = min(median_s(head.block(batch, 1)) / work[0], head_s / sum(work))
        again_s = min(max(0.0, median_s(head.block(batch, 2)) / work[0] - forward_s), forward_s)
        once.append(forward_s - again_s)
        rest_s = head_s - sum(work) * forward_s
        train_s = forward_s
        if depth:
            whole_s = median_s(partial(blocks.step, batch)) - update * probed.trained(depth).total
            train_s += max(0.0, whole_s - head_s) / sum(work[-depth:])
        for what, taken in (("forward", again_s), ("train", train_s), ("rest", rest_s)):
            points[what].append((batch.ids.size, max(0.0, taken)))
    entry_s, copy_s = masking_s(probed)
    lines = {"update_per_parameter_s": update_s(probed.optimizer), "entry_s": entry_s, "copy_s": copy_s}
    lines["forward_step_s"] = sorted(once)[len(once) // 2]
    for what, measured in points.items():
        lines[f"{what}_fixed_s"], lines[f"{what}_per_token_s"] = line(measured)
    return lines


def in_child(measure: Callable[[], tuple[Point, ...]]) -> tuple[Point, ...]:
    """What `measure` finds in a forked process, where no onnxruntime session exists yet.

    Raises:
        ModelError: the graphs cannot be run.
        TrainingFailed: the process was ended, for example because there was not enough memory.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        end_with_parent()
        try:
            found = json.dumps([[p.tokens, p.peak_bytes] for p in measure()])
        except ModelError as error:
            found = json.dumps({"error": str(error)[:2000]})
        except BaseException:
            os._exit(1)
        os.write(write, found.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        told = answer.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise TrainingFailed("the probe's process ended without a result: there may not be enough memory", killed=True)
    points = json.loads(told)
    if isinstance(points, dict):
        raise ModelError(points["error"])
    return tuple(Point(tokens, peak) for tokens, peak in points)


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that forked it ends (Linux); elsewhere it ends with its measurement."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def hardware_room() -> int:
    """Bytes that this process may reach without starving the machine."""
    return profile(speed=False).memory_available_bytes + process_memory()["VmRSS"]


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The line with the least squares of relative errors -> (its value at 0, its slope), neither below 0."""
    x, y = (np.array(values, float) for values in zip(*points, strict=True))
    weight = 1 / np.maximum(y, 1e-9)
    slope_alone = float((weight * weight * x * y).sum() / (weight * weight * x * x).sum())
    if len(points) < 2:
        return 0.0, slope_alone
    fixed, slope = np.linalg.lstsq(np.stack([weight, x * weight], 1), y * weight, rcond=None)[0].tolist()
    if fixed < 0:
        return 0.0, slope_alone
    return (fixed, slope) if slope > 0 else (float(y.mean()), 0.0)


def update_s(optimizer: str) -> float:
    """Seconds of an optimizer step for each trained value."""
    update = Optimizer(TrainSettings(optimizer=optimizer), ())
    weight, gradient = np.zeros((1024, UPDATED >> 10), np.float32), np.ones((1024, UPDATED >> 10), np.float32)

    def once() -> None:
        update.begin_step()
        update.update("probe", weight, gradient)

    return median_s(once) / UPDATED


def masking_s(probed: Probed) -> tuple[float, float]:
    """-> (seconds to put a masked entry into its matrix or take it out, to copy a value), by the last block's largest matrix."""
    from edge_runtime.training.masked import MaskedMatrix

    matrices = [t for t in probed.spec.tensors if t.part == probed.spec.num_blocks - 1 and t.is_adapted]
    if not matrices:
        return 0.0, 0.0
    tensor = max(matrices, key=lambda t: t.size)
    matrix = MaskedMatrix(tensor, probed.weights[tensor.name], TrainSettings(mask_every=MASK_EVERY))
    dense, values = np.zeros(tensor.shape, np.float32), np.zeros(matrix.shape, np.float32)

    def put_and_take() -> None:
        matrix.scatter(values, dense)
        for _ in matrix.gather(dense):
            pass

    return median_s(put_and_take) / (2 * values.size), median_s(partial(matrix.write_base, dense)) / tensor.size


def median_s(work: Callable[[], object]) -> float:
    """Median wall seconds of a call, after one to warm up: of as many as go into ENOUGH_S, of two at least."""
    times: list[float] = []
    work()
    end = time.perf_counter() + ENOUGH_S
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
