"""The training loop: batches in, steps out, the same for every backend. Knows neither torch nor files.

A backend holds the weights in its own way; the loop decides which examples make a step, in an order that depends on
the plan's seed alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edge_runtime.errors import TrainingFailed
from edge_runtime.records import Plan
from edge_runtime.training.corpus import Batch, Corpus

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.training.prefix_cache import PrefixCache

    Array = np.ndarray[Any, np.dtype[Any]]


class Backend(Protocol):
    """Applies a plan to a model and trains it step by step."""

    name: str

    def step(self, batch: Batch) -> float:
        """One optimizer step on a batch, in the plan's micro-batches; -> mean loss."""

    def correct(self, batch: Batch) -> int:
        """How many examples of a batch the model classifies rightly."""

    def deltas(self) -> Iterator[tuple[str, Array]]:
        """Trained tensor minus its start, float32, in the order of the plan's suffix, one at a time."""


@runtime_checkable
class PrefixBackend(Protocol):
    """A backend that can begin a step behind the frozen prefix."""

    def features(self, batch: Batch) -> Array:
        """The frozen prefix's output (batch, seq, hidden) float32, zero at padding."""

    def step(self, batch: Batch, features: Array) -> float:
        """As `Backend.step`, from the prefix's output."""


@dataclass(frozen=True)
class LoopResult:
    """What the steps came to."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    cpu_s: float  # of all threads


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last batch may be short."""
    return math.ceil(num_examples / batch_size)


def run(
    backend: Backend,
    corpus: Corpus,
    plan: Plan,
    progress: Callable[[int, float], None],
    cache: PrefixCache | None = None,
) -> LoopResult:
    """All epochs of a plan; `progress(step, loss)` after each step.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    settings = plan.settings
    losses: list[float] = []
    start, cpu = time.perf_counter(), time.process_time()
    for epoch in range(settings.epochs):
        batches = corpus.epoch(settings.batch_size, settings.seed + epoch)
        for loss in _losses(backend, corpus, batches) if cache is None else _cached(backend, corpus, batches, cache):
            if not math.isfinite(loss):
                raise TrainingFailed(f"the loss is {loss} after step {len(losses) + 1}: lower the learning rate")
            losses.append(loss)
            progress(len(losses), loss)
    tail = losses[-max(1, len(losses) // 10) :]
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return LoopResult(len(losses), losses[0], sum(tail) / len(tail), seconds, cpu_s)


def _losses(backend: Backend, corpus: Corpus, batches: Sequence[Sequence[int]]) -> Iterator[float]:
    """A step for each batch."""
    for indices in batches:
        yield backend.step(corpus.batch(indices))


def _cached(backend: Backend, corpus: Corpus, batches: Sequence[Sequence[int]], cache: PrefixCache) -> Iterator[float]:
    """A step for each batch from the prefix's output in the cache, which reads ahead; what it lacks is computed and kept.

    A batch that is not held whole is computed whole and rounded as the cache rounds, so that the values do not depend
    on what a crash left in the cache.
    """
    assert isinstance(backend, PrefixBackend), "the planner caches for backends that can use it"
    for held in cache.prefetch(batches):
        batch = corpus.batch(held.indices)
        features: Array = held.hidden
        if held.missing:
            features = backend.features(batch)
            cache.write(held.indices, features, [int(n) for n in batch.mask.sum(axis=1)])
            features = features.astype("float16").astype("float32")
        yield backend.step(batch, features)


def accuracy(backend: Backend, corpus: Corpus, batch_size: int) -> float:
    """Share of a data set that the model classifies rightly."""
    order = sorted(range(len(corpus)), key=lambda i: int(corpus.starts[i + 1] - corpus.starts[i]))
    right = sum(backend.correct(corpus.batch(order[i : i + batch_size])) for i in range(0, len(order), batch_size))
    return right / len(corpus)
