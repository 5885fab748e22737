"""The training loop: batches in, steps out, the same for every backend. Knows neither torch nor files.

A backend holds the weights in its own way; the loop decides which examples make a step, in an order that depends on
the plan's seed alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edge_runtime.errors import TrainingFailed
from edge_runtime.records import Plan
from edge_runtime.training.corpus import Batch, Corpus

if TYPE_CHECKING:
    import numpy as np


class Backend(Protocol):
    """Applies a plan to a model and trains it step by step."""

    name: str

    def step(self, batch: Batch) -> float:
        """One optimizer step on a batch, in the plan's micro-batches; -> mean loss."""

    def correct(self, batch: Batch) -> int:
        """How many examples of a batch the model classifies rightly."""

    def deltas(self) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[Any]]]]:
        """Trained tensor minus its start, float32, in the order of the plan's suffix, one at a time."""


@dataclass(frozen=True)
class LoopResult:
    """What the steps came to."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last batch may be short."""
    return math.ceil(num_examples / batch_size)


def run(backend: Backend, corpus: Corpus, plan: Plan, progress: Callable[[int, float], None]) -> LoopResult:
    """All epochs of a plan; `progress(step, loss)` after each step.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    settings = plan.settings
    losses: list[float] = []
    start = time.perf_counter()
    for epoch in range(settings.epochs):
        for indices in corpus.epoch(settings.batch_size, settings.seed + epoch):
            loss = backend.step(corpus.batch(indices))
            if not math.isfinite(loss):
                raise TrainingFailed(f"the loss is {loss} after step {len(losses) + 1}: lower the learning rate")
            losses.append(loss)
            progress(len(losses), loss)
    tail = losses[-max(1, len(losses) // 10) :]
    return LoopResult(len(losses), losses[0], sum(tail) / len(tail), time.perf_counter() - start)


def accuracy(backend: Backend, corpus: Corpus, batch_size: int) -> float:
    """Share of a data set that the model classifies rightly."""
    order = sorted(range(len(corpus)), key=lambda i: int(corpus.starts[i + 1] - corpus.starts[i]))
    right = sum(backend.correct(corpus.batch(order[i : i + batch_size])) for i in range(0, len(order), batch_size))
    return right / len(corpus)
