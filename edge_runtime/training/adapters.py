"""LoRA adapters of a model's trained blocks (Hu et al. 2021, https://arxiv.org/abs/2106.09685), as numpy arrays.

A linear layer with an adapter computes W x + scale * B A x, A (rank, in) drawn at random and B (out, rank) zero where they do
not begin from given ones. Which layers have one, and of which rank, says `layout.py`. Not the training (the backends).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from edge_runtime.errors import ModelError
from edge_runtime.layout import A, B, adapted, layout, ranks_of, scale
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.records import Plan
from edge_runtime.training.pages import page_copy, page_zeros
from edge_runtime.weights import MappedTensor

Array = np.ndarray[Any, np.dtype[Any]]
PIECE = 1 << 18  # values of a delta in memory


class LoraAdapters:
    """The adapters of a plan's blocks.

    Attributes:
        tensors: A and B of every adapted matrix by name (`layout.py`), float32.
        trained: the names of those that are trained, in the update's order: all, or every B (FFA-LoRA, Sun et al. 2024,
            arXiv 2403.12313).
        scale: what B A is multiplied by, a float32 scalar array.
    """

    def __init__(self, spec: ModelSpec, plan: Plan, start: Mapping[str, MappedTensor] | None = None) -> None:
        """Begin from `start`, A and B of at least the plan's ranks by name: the first rows of A, the first columns of B.

        Raises:
            ModelError: one of `start` has another shape.
            UsageError: a target is no linear layer of the model.
        """
        self._start, self._seed = start or {}, plan.settings.seed
        self.scale = np.array(scale(plan.settings), np.float32)
        self.tensors: dict[str, Array] = {}
        for tensor, rank in adapted(spec, ranks_of(spec, plan), plan.settings.lora_targets):
            (outputs, inputs), stem = tensor.shape, tensor.name.removesuffix(".weight")
            self.tensors[stem + A] = page_copy(self.start_of(stem + A, (rank, inputs)))
            self.tensors[stem + B] = page_copy(self.start_of(stem + B, (outputs, rank)))
        self.trained = tuple(name for name in self.tensors if plan.adapters != "b" or name.endswith(B))

    def start_of(self, name: str, shape: tuple[int, ...]) -> Array:
        """What A or B began from, which is not kept: mapped, or drawn again."""
        return start_of(self._start, self._seed, name, shape)

    def changes(self, name: str) -> Iterator[Array]:
        """A or B minus its start, flat."""
        yield (self.tensors[name] - self.start_of(name, self.tensors[name].shape)).reshape(-1)

    def dense(self, tensor: TensorSpec) -> Iterator[Array]:
        """What the adapters add to a tensor, flat, some rows at a time; zeros for one that has none."""
        stem = tensor.name.removesuffix(".weight")
        if stem + A not in self.tensors:
            yield np.zeros(tensor.size, np.float32)
            return
        rows = max(1, PIECE // tensor.shape[1])
        for first in range(0, tensor.shape[0], rows):
            product: Array = self.tensors[stem + B][first : first + rows] @ self.tensors[stem + A]
            yield (product * self.scale).reshape(-1)


Changes = Callable[[str], Iterator[Array]]  # a trained tensor minus its start, flat, a piece at a time


def deltas(spec: ModelSpec, plan: Plan, changes: Changes, adapters: LoraAdapters | None) -> Iterator[tuple[str, Array]]:
    """An update's values in the order of the plan's layout; where it is dense, adapters as what they add to the weights."""
    for tensor in layout(spec, plan):
        dense = adapters is not None and not plan.adapters and tensor.part < spec.num_blocks
        for piece in adapters.dense(tensor) if adapters and dense else changes(tensor.name):
            yield tensor.name, piece


def pull_back(gradient: Array, changes: Iterable[Array], mu: float) -> None:
    """Add mu * (w - w at the start) to a gradient: FedProx's proximal term (Li et al. 2018, arXiv 1812.06127, eq. 2)."""
    flat, first = gradient.reshape(-1), 0
    for piece in changes:
        flat[first : first + piece.size] += mu * piece
        first += piece.size


def start_of(start: Mapping[str, MappedTensor], seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """What A or B begins from: a given one, cut to this shape, else A drawn from the seed and B zero."""
    given = start.get(name)
    if given is not None:
        return cut(given, name, shape)
    return random_a(seed, name, *shape) if name.endswith(A) else page_zeros(shape)


def random_a(seed: int, name: str, rank: int, inputs: int) -> Array:
    """A (rank, inputs) as torch initialises a linear layer; of a lower rank it is the first rows of the same.

    The same bits with every numpy: only raw bits of PCG64 are used, since a coordinator may have to draw what a device drew.
    """
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(rank * inputs)
    bound = 1 / math.sqrt(inputs)
    drawn = -bound + (bound - -bound) * (
        (bits >> np.uint64(11)) * 2.0**-53
    )  # as Generator.uniform, whose stream may change
    found: Array = drawn.astype(np.float32).reshape(rank, inputs)
    return found


def cut(given: MappedTensor, name: str, shape: tuple[int, ...]) -> Array:
    """The first rows and columns of a given A or B, float32.

    Raises:
        ModelError: it has not so many, or another width.
    """
    rank_at = 0 if name.endswith(A) else 1
    sound = len(given.shape) == 2 and given.shape[1 - rank_at] == shape[1 - rank_at]
    if not sound or given.shape[rank_at] < shape[rank_at]:
        raise ModelError(f"the adapter to begin from has {name!r} of {given.shape}, wanted {shape} or a higher rank")
    found: Array = given.array()[: shape[0], : shape[1]]
    return found
