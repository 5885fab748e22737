"""Sparse training: of each matrix only the masked entries are trained (SLoRA's first stage, Babakniya et al., arXiv 2308.06522).

Weights, gradients and optimizer states are kept for masked entries alone; places are a byte for each (two where more than
256 entries share one), drawn once from the seed. Dense stands at most one block: `GraphMasks` makes its matrices in memory that
the next block takes over. Which entries says `masks.py`, which matrices `layout.py`. Imports numpy, never torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from edge_runtime.graphs.bundle import part_tensors, relative_names
from edge_runtime.layout import adapted, masked_name
from edge_runtime.masks import offsets
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.records import Plan, TrainSettings
from edge_runtime.training.pages import Pool, page_zeros
from edge_runtime.weights import MappedTensor

Array = np.ndarray[Any, np.dtype[Any]]
PIECE = 1 << 15  # masked entries worked on at once
SPAN = 1 << 18  # values of a matrix that are read at once


class MaskedMatrix:
    """The places of a matrix's masked entries, and what they began from.

    Attributes:
        tensor: the matrix.
        shape: of the masked entries' arrays: (1, entries), two dimensions as the matrix has, so that an optimizer treats them as it.
    """

    def __init__(self, tensor: TensorSpec, base: MappedTensor, settings: TrainSettings) -> None:
        """Memory: a byte for each masked entry, or two."""
        self.tensor, self._base, self._every = tensor, base, settings.mask_every
        self._offsets = offsets(settings.mask_seed, tensor.name, tensor.size, settings.mask_every)
        self.shape = (1, self._offsets.size)

    def gather(self, dense: Array) -> Iterator[Array]:
        """The masked entries of an array of the matrix's size, flat, a piece at a time."""
        flat = dense.reshape(-1)
        for first in range(0, self._offsets.size, PIECE):
            if self._every == 1:
                yield flat[first : first + PIECE]
            else:
                yield flat[first * self._every :][self._places(first, PIECE)]

    def scatter(self, values: Array, dense: Array) -> None:
        """Set the masked entries of a contiguous array of the matrix's size."""
        flat, values = dense.reshape(-1), values.reshape(-1)
        if self._every == 1:
            flat[:] = values
            return
        for first in range(0, self._offsets.size, PIECE):
            flat[first * self._every :][self._places(first, PIECE)] = values[first : first + PIECE]

    def start(self) -> Iterator[Array]:
        """The masked entries as they were before training, flat, a piece at a time."""
        count = min(PIECE, max(1, SPAN // self._every))
        for number, piece in enumerate(self._base.pieces(count * self._every)):
            yield piece if self._every == 1 else piece[self._places(number * count, count)]

    def changes(self, values: Array) -> Iterator[Array]:
        """The masked entries minus their start, flat, a piece at a time."""
        flat, first = values.reshape(-1), 0
        for piece in self.start():
            yield flat[first : first + piece.size] - piece
            first += piece.size

    def write_base(self, dense: Array) -> None:
        """Fill a contiguous array with the matrix as it was before training."""
        filled(dense, self._base.pieces(SPAN))

    def _places(self, first: int, count: int) -> Array:
        """Places of at most `count` entries from number `first` on, counted from that one's run, int64."""
        places = self._offsets[first : first + count].astype(np.int64)
        places += np.arange(0, places.size * self._every, self._every)
        return places


def masked_matrices(spec: ModelSpec, weights: Mapping[str, MappedTensor], plan: Plan) -> dict[str, MaskedMatrix]:
    """What a plan trains sparsely, by its name in the update, in the update's order; nothing where the plan has no mask."""
    settings, depth = plan.settings, plan.chosen.depth
    if not settings.mask_every:
        return {}
    blocks = dict.fromkeys(range(spec.num_blocks - depth, spec.num_blocks), 1)
    return {
        masked_name(tensor): MaskedMatrix(tensor, weights[tensor.name], settings)
        for tensor, _ in adapted(spec, blocks, settings.lora_targets)
    }


def filled(target: Array, pieces: Iterable[Array]) -> Array:
    """A contiguous array, with values that come flat and a piece at a time."""
    flat, first = target.reshape(-1), 0
    for piece in pieces:
        flat[first : first + piece.size] = piece
        first += piece.size
    return target


class GraphMasks:
    """Sparsely trained matrices by their names in the graphs.

    Attributes:
        matrices: by their names in the update.
        values: the masked entries as they are now, (1, entries) float32, by the same names.
    """

    def __init__(self, spec: ModelSpec, matrices: Mapping[str, MaskedMatrix]) -> None:
        self.matrices = matrices
        self.values = {name: filled(page_zeros(m.shape), m.start()) for name, m in matrices.items()}
        self._names = {
            part: {
                relative: masked_name(tensor)
                for relative, tensor in zip(relative_names(spec, part), part_tensors(spec, part), strict=True)
                if masked_name(tensor) in matrices
            }
            for part in range(spec.num_blocks)
        }
        self._dense = Pool()
        self._made: int | None = None  # the block whose matrices are in `_dense`,
        self._current = False  # and whether they are as its values are now

    def feeds(self, part: int) -> dict[str, Array]:
        """The matrices of a block as they are now, dense, by their names in the graphs; valid until another block's are asked for."""
        names, is_new = self._names[part], self._made != part
        is_current, self._made = self._current and not is_new, None
        found: dict[str, Array] = {}
        for relative, name in names.items():
            matrix = self.matrices[name]
            found[relative] = self._dense.take(relative, matrix.tensor.shape)
            if is_new:
                matrix.write_base(found[relative])
            if not is_current:
                matrix.scatter(self.values[name], found[relative])
        self._made, self._current = part, True
        return found

    def changed(self) -> None:
        """`values` have been written to."""
        self._current = False

    def trained_names(self, part: int) -> Mapping[str, str]:
        """What is trained in a block: the matrix's name in the graphs -> its masked entries' name in the update."""
        return self._names[part]
