"""How much each head and channel of a model matters, and which of them go: what structured pruning decides by.

Guided by LoRA (LoRAPrune, Zhang et al., arXiv 2305.18403, whose use by FedSpine, arXiv 2501.02438, is our reading): with dA and dB
the change of A and B over some steps, G = dB A + B dA - dB dA is exactly the change of B A, and stands for the gradient of the frozen
W_0. An entry's importance is (G (W_0 + s B A))^2. Of the baselines it is |W_0 + s B A| ("magnitude"), or |G (W_0 + s B A)| ("taylor",
the first-order criterion of LLM-Pruner, Ma et al., arXiv 2305.11627). A head sums over its rows of q, k, v and columns of o, a
channel over its row and column. Imports numpy and the pruning; never torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.prune_plan import numbers_kept
from edge_runtime.pruning import HEADS, Kept, block_widths, cut_rows, group_size, groups_of, kept_groups

Array = np.ndarray[Any, np.dtype[Any]]
SMOOTHED = 0.8  # of the importance so far, with what the newest steps say
ROWS = 1 << 15  # values of a matrix worked on at once


class Scores:
    """The importance of every head and channel of a whole model, float64; of those that are gone nothing is asked."""

    def __init__(self, spec: ModelSpec) -> None:
        widths = block_widths(spec)
        self.heads = [np.zeros(heads) for heads, _ in widths]
        self.channels = [np.zeros(channels) for _, channels in widths]
        self._spec = spec

    def add(self, tensor: TensorSpec, rows: Array, columns: Array, kept: Kept) -> None:
        """Add a matrix's sums of importance by row and by column, of the rows and columns that are kept.

        Args: tensor: of the whole model.
        """
        for sums, group, places in zip(
            (rows, columns), groups_of(self._spec, tensor), cut_rows(self._spec, kept, tensor), strict=True
        ):
            if not group:
                continue
            of = (self.heads if group == HEADS else self.channels)[tensor.part]
            where = np.arange(sums.size) if places is None else places
            np.add.at(of, where // group_size(self._spec, group), sums)

    def blended(self, before: Scores | None) -> Scores:
        """Smoothed over the pieces of a training: SMOOTHED of what was, the rest of what is."""
        if before is None:
            return self
        found = Scores(self._spec)
        for new, old, now in zip(
            (*found.heads, *found.channels),
            (*before.heads, *before.channels),
            (*self.heads, *self.channels),
            strict=True,
        ):
            new[...] = SMOOTHED * old + (1 - SMOOTHED) * now
        return found


def sums(
    rule: str, weight: Array, before: tuple[Array, Array], after: tuple[Array, Array], scale: float
) -> tuple[Array, Array]:
    """The importance of a matrix's entries, summed by row and by column, float64.

    Args:
        weight: W_0 (outputs, inputs), as a file maps it.
        before, after: A (rank, inputs) and B (outputs, rank) before and after some steps.
        scale: of B A.

    Memory: a few pieces of ROWS values.
    """
    (a0, b0), (a, b) = ((x.astype(np.float64), y.astype(np.float64)) for x, y in (before, after))
    by_row, by_column = np.zeros(weight.shape[0]), np.zeros(weight.shape[1])
    step = max(1, ROWS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        whole = weight[part] + scale * (b[part] @ a)
        if rule != "magnitude":
            db, da = b[part] - b0[part], a - a0
            whole *= db @ a + b[part] @ da - db @ da
        found = whole * whole if rule == "lora" else np.abs(whole)
        by_row[part] = found.sum(axis=1)
        by_column += found.sum(axis=0)
    return by_row, by_column


def choose(spec: ModelSpec, begun: Kept, scores: Scores, sparsity: float, *, by_block: bool = True) -> Kept:
    """What is kept of `begun` at this sparsity: the groups of most importance among all blocks, at least one in each.

    Among equals the first. Args: by_block: each block's scores count as shares of their sum, since blocks differ in the size of their
    gradients (as Michel et al., arXiv 1905.10650, compare heads); else as they are.
    """
    there = [kept_groups(spec, begun, block) for block in range(spec.num_blocks)]
    heads, channels = numbers_kept(spec, begun, sparsity)
    return Kept.of(
        _best(scores.heads, [h for h, _ in there], heads, by_block),
        _best(scores.channels, [c for _, c in there], channels, by_block),
    )


def any_kept(spec: ModelSpec, begun: Kept, sparsity: float) -> Kept:
    """Some of `begun` that a model of this sparsity could keep."""
    return choose(spec, begun, Scores(spec), sparsity)


def _best(scores: Sequence[Array], there: Sequence[Array], count: int, by_block: bool) -> list[Array]:
    """The `count` best of what is there, as one bool for each group of each block."""
    shares = []
    for values, has in zip(scores, there, strict=True):
        total = values[has].sum() if by_block else 1.0
        share = np.where(has, values / (total if total > 0 else 1.0), -np.inf)
        share[int(np.argmax(share))] = np.inf  # the last one stays
        shares.append(share)
    order = np.argsort(-np.concatenate(shares), kind="stable")[:count]
    chosen = np.zeros(sum(s.size for s in shares), bool)
    chosen[order] = True
    return np.split(chosen, np.cumsum([s.size for s in shares])[:-1])
