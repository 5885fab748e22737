"""LoRA adapters of a model's trained blocks (Hu et al. 2021, https://arxiv.org/abs/2106.09685), as numpy arrays.

Every matrix of a block gets A (rank, in), drawn at random, and B (out, rank), zero at first; the layer computes
W x + scale * B A x with scale = LORA_ALPHA / rank. Not the training (`graph_backend.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edge_runtime.graphs.bundle import part_tensors, relative_names
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.records import TrainSettings

Array = np.ndarray[Any, np.dtype[Any]]
LORA_ALPHA = 16.0
A, B = ".lora_a", ".lora_b"
PIECE = 1 << 18  # values of a delta in memory


class LoraAdapters:
    """The adapters of some blocks.

    Attributes:
        tensors: A and B of every matrix by full name, float32.
        scale: what B A is multiplied by, a float32 scalar array.
    """

    def __init__(self, spec: ModelSpec, blocks: Iterable[int], rank: int, settings: TrainSettings) -> None:
        random = np.random.default_rng(settings.seed)
        self.tensors: dict[str, Array] = {}
        self.scale = np.array(LORA_ALPHA / rank, np.float32)
        self._names: dict[int, dict[str, str]] = {}
        for part in blocks:
            self._names[part] = {}
            for relative, tensor in zip(relative_names(spec, part), part_tensors(spec, part), strict=True):
                if tensor.is_adapted:
                    outputs, inputs = tensor.shape
                    bound = 1 / math.sqrt(inputs)  # as torch initialises a linear layer
                    stem, full = relative.removesuffix(".weight"), tensor.name.removesuffix(".weight")
                    self.tensors[full + A] = random.uniform(-bound, bound, (rank, inputs)).astype(np.float32)
                    self.tensors[full + B] = np.zeros((outputs, rank), np.float32)
                    self._names[part] |= {stem + A: full + A, stem + B: full + B}

    def names(self, part: int) -> dict[str, str]:
        """Full names of a block's adapters by their names in the graphs."""
        return self._names[part]

    def delta(self, tensor: TensorSpec) -> Iterator[Array]:
        """What the adapters add to a tensor, flat, some rows at a time; zeros for one that has none."""
        stem = tensor.name.removesuffix(".weight")
        if stem + A not in self.tensors:
            yield np.zeros(tensor.size, np.float32)
            return
        rows = max(1, PIECE // tensor.shape[1])
        for start in range(0, tensor.shape[0], rows):
            product: Array = self.tensors[stem + B][start : start + rows] @ self.tensors[stem + A]
            yield (product * self.scale).reshape(-1)
