"""HetLoRA: each device trains adapters of its own rank; truncated down, zero-padded up.

Cho, Liu, Xu, Fahrezi, Joshi: "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432.
A device of rank r_k begins from the first r_k rows of A and columns of B. At the end of the round, for each matrix,

    s_k = ||B_k A_k||_F        A <- sum s_k pad(A_k) / sum s_k        B <- sum s_k pad(B_k) / sum s_k

Readings: the norm is of each matrix by itself, as in the paper's notation for one layer; where all norms are zero the weights
are the numbers of examples; a row of A (and its column of B) that no device of the round has stays as it is, since zero in
both could never be trained again. The head is averaged by examples. Not in: the paper's pruning of a device's own rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edge_coordinator.methods.method import Change, Collected, State, alone
from edge_runtime.layout import A, B

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def aggregate(state: State, collected: Collected) -> tuple[Iterator[Change], State]:
    """A and B as above."""
    return _changes(collected), state


def _changes(collected: Collected) -> Iterator[Change]:
    import numpy as np

    yield from collected.means()
    for matrix in collected.adapted:
        trained = collected.trained(matrix)
        if not trained:
            continue
        shares = weights([product_norm(*t.load()) for t in trained], [t.num_examples for t in trained])
        a, b = collected.adapter(matrix)
        most = max(t.rank for t in trained)
        mean_a, mean_b = np.zeros((most, a.shape[1])), np.zeros((b.shape[0], most))
        for share, one in zip(shares, trained, strict=True):
            a_k, b_k = one.load()
            mean_a[: one.rank] += share * a_k
            mean_b[:, : one.rank] += share * b_k
        mean_a -= a[:most]
        mean_b -= b[:, :most]
        stem = matrix.name.removesuffix(".weight")
        yield Change(stem + A, np.pad(mean_a, ((0, len(a) - most), (0, 0))))
        yield Change(stem + B, np.pad(mean_b, ((0, 0), (0, len(a) - most))))


def product_norm(a: Array, b: Array) -> float:
    """||B A||_F without the product: the trace of (B^T B) (A A^T)."""
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def weights(norms: list[float], num_examples: list[int]) -> list[float]:
    """Shares that add up to 1: of the norms, or of the examples where every norm is zero."""
    of = norms if sum(norms) > 0 else [float(n) for n in num_examples]
    return [value / sum(of) for value in of]


METHOD = alone("hetlora", aggregate, keeps_updates=True)
