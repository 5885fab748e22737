"""LoRA adapters as the graphs want them: two for every linear layer of a block, all of one rank.

A layer that the plan leaves out gets zeros: they change nothing, have no gradient, no state and no pages of their own, and
cost the products of a small matrix (`docs/memory.md`). Imports numpy and the adapters.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_runtime.graphs.bundle import part_tensors, relative_names
from edge_runtime.layout import A, B
from edge_runtime.model import ModelSpec
from edge_runtime.training.adapters import LoraAdapters

Array = np.ndarray[Any, np.dtype[Any]]


class GraphAdapters:
    """A plan's adapters by their names in the graphs.

    Attributes:
        adapters: what is wrapped.
        tensors, trained: its own.
    """

    def __init__(self, spec: ModelSpec, adapters: LoraAdapters, ranks: Mapping[int, int]) -> None:
        """`ranks`: of each adapted block by its number."""
        self.adapters = adapters
        self.tensors, self.trained = adapters.tensors, adapters.trained
        self._feeds: dict[int, dict[str, Array]] = {}
        self._names: dict[int, dict[str, str]] = {}
        sizes = [rank * max(t.shape) for part, rank in ranks.items() for t in part_tensors(spec, part) if t.is_adapted]
        zeros = _untouched(max(sizes))
        for part, rank in ranks.items():
            feeds = self._feeds[part] = {"lora_scale": adapters.scale}
            names = self._names[part] = {}
            for relative, tensor in zip(relative_names(spec, part), part_tensors(spec, part), strict=True):
                if not tensor.is_adapted:
                    continue
                stem, full = relative.removesuffix(".weight"), tensor.name.removesuffix(".weight")
                outputs, inputs = tensor.shape
                for which, shape in ((A, (rank, inputs)), (B, (outputs, rank))):
                    given = self.tensors.get(full + which)
                    feeds[stem + which] = zeros[: math.prod(shape)].reshape(shape) if given is None else given
                    if full + which in adapters.trained:
                        names[stem + which] = full + which

    def feeds(self, part: int) -> Mapping[str, Array]:
        """The adapters and the scale of a block, by their names in the graphs."""
        return self._feeds[part]

    def trained_names(self, part: int) -> Mapping[str, str]:
        """What is trained in a block: its name in the graphs -> its full name."""
        return self._names[part]


def _untouched(count: int) -> Array:
    """Zeros that are read only and so never take memory: private pages that nobody writes are one page of the system."""
    return np.frombuffer(mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.float32)
