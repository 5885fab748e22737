"""The training loop: batches in, steps out, the same for every backend. Knows neither torch nor files.

A backend holds the weights in its own way; the loop decides which examples make a step, in an order that depends on
the plan's seed alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edge_runtime.errors import TrainingFailed
from edge_runtime.records import Plan
from edge_runtime.training.corpus import Batch, Corpus

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.training.optimizers import Optimizer
    from edge_runtime.training.prefix_cache import PrefixCache

    Array = np.ndarray[Any, np.dtype[Any]]


class Backend(Protocol):
    """Applies a plan to a model and trains it step by step."""

    name: str
    optimizer: Optimizer

    def step(self, batch: Batch) -> float:
        """One optimizer step on a batch, in the plan's micro-batches; -> mean loss."""

    def correct(self, batch: Batch) -> Array:
        """Which examples of a batch the model classifies rightly: (batch,) bool."""

    def deltas(self) -> Iterator[tuple[str, Array]]:
        """Trained tensor minus its start, float32 and flat, in the order of the plan's suffix, a piece at a time."""

    def values(self) -> dict[str, Array]:
        """What is trained as it is now, by its name in the plan's layout; of masked entries their matrices."""

    def arrays(self) -> Iterator[Array]:
        """Everything that steps change, in a fixed order: trained values and the optimizer's states, to be written to."""


@runtime_checkable
class PrefixBackend(Protocol):
    """A backend that can begin a step behind the frozen prefix."""

    def features(self, batch: Batch) -> Array:
        """The frozen prefix's output (batch, seq, hidden) float32, zero at padding."""

    def step(self, batch: Batch, features: Array) -> float:
        """As `Backend.step`, from the prefix's output."""


@dataclass
class Progress:
    """How far a training has come, and what it took."""

    losses: list[float] = field(default_factory=list)  # of each step
    seconds: float = 0.0  # of the steps
    cpu_s: float = 0.0  # of all threads
    start_s: float = 0.0  # from the start of the process to the end of the first step
    peak_bytes: int = 0  # of earlier images of the process (`backoff.py`)
    backed_off: int = 0
    paused_s: float = 0.0  # for its conditions, which no other number counts

    @property
    def last_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last batch may be short."""
    return math.ceil(num_examples / batch_size)


def run(
    backend: Backend,
    corpus: Corpus,
    plan: Plan,
    done: Progress,
    progress: Callable[[int, float], None],
    cache: PrefixCache | None = None,
    rounded: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """The steps of a plan that are not done yet; `progress(step, loss)` after each. -> whether it came to the end.

    With `cache` the prefix's output is computed once for each example; `rounded`: it is rounded as the cache rounds, though
    there is none, so that a model's bits do not depend on what a disk has room for. `stop()` is asked after each step but
    the last.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    settings = plan.settings
    losses, per_epoch = done.losses, steps_per_epoch(len(corpus), settings.batch_size)
    start, cpu = time.perf_counter() - done.seconds, time.process_time() - done.cpu_s
    for epoch in range(len(losses) // per_epoch, settings.epochs):
        batches = corpus.epoch(settings.batch_size, settings.seed + epoch)[len(losses) - epoch * per_epoch :]
        for loss in (
            _cached(backend, corpus, batches, cache)
            if cache
            else _rounded(backend, corpus, batches)
            if rounded
            else _losses(backend, corpus, batches)
        ):
            if not math.isfinite(loss):
                raise TrainingFailed(f"the loss is {loss} after step {len(losses) + 1}: lower the learning rate")
            losses.append(loss)
            done.seconds, done.cpu_s = time.perf_counter() - start, time.process_time() - cpu
            progress(len(losses), loss)
            if len(losses) < per_epoch * settings.epochs and stop():
                return False
    return True


def _losses(backend: Backend, corpus: Corpus, batches: Sequence[Sequence[int]]) -> Iterator[float]:
    """A step for each batch."""
    for indices in batches:
        yield backend.step(corpus.batch(indices))


def _rounded(backend: Backend, corpus: Corpus, batches: Sequence[Sequence[int]]) -> Iterator[float]:
    """A step for each batch from the prefix's output as a cache would give it."""
    assert isinstance(backend, PrefixBackend), "the planner caches for backends that can use it"
    for indices in batches:
        batch = corpus.batch(indices)
        yield backend.step(batch, backend.features(batch).astype("float16").astype("float32"))


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
    return sum(right for _, right in classified(backend, corpus, batch_size)) / len(corpus)


def classified(backend: Backend, corpus: Corpus, batch_size: int) -> Iterator[tuple[int, bool]]:
    """Each example's label, and whether the model classifies it rightly; texts of like length together."""
    order = sorted(range(len(corpus)), key=lambda i: int(corpus.starts[i + 1] - corpus.starts[i]))
    for i in range(0, len(order), batch_size):
        batch = corpus.batch(order[i : i + batch_size])
        yield from zip(batch.labels.tolist(), backend.correct(batch).tolist(), strict=True)
