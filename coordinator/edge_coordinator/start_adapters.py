"""The adapters that a run begins with: which matrices have one, how large, and their first values. Pure, but for numpy.

A is drawn at random from the run's seed, the same bits on every machine; B is zero, so the model is the one without adapters.
Not the training (the device's), not where they are kept (`models.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge_runtime.layout import layout
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.records import CostRow, Plan, TrainSettings

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def adapter_tensors(spec: ModelSpec, settings: TrainSettings) -> Sequence[TensorSpec]:
    """A and B of every matrix that the run adapts, at its rank, in the model's order.

    Raises:
        UsageError: a target is no linear layer of the model.
    """
    row = CostRow(spec.num_blocks, False, 1, 0, 0.0, 0.0, 0, rank=settings.lora_rank)
    return [t for t in layout(spec, Plan(row, settings, 0, adapters="ab")) if t.part < spec.num_blocks]


def fresh_a(seed: int, number: int, name: str, shape: tuple[int, ...]) -> Array:
    """A (rank, inputs) after round `number`, float64 values of float32, as torch draws a linear layer's: U(-1, 1) / sqrt(inputs)."""
    import numpy as np

    digest = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
    random = np.random.default_rng(np.frombuffer(digest, "<u4"))
    bound = 1 / math.sqrt(shape[1])
    drawn: Array = random.uniform(-bound, bound, shape).astype(np.float32).astype(np.float64)
    return drawn
