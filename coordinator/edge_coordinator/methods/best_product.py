"""The best approximation of a matrix by a product of two thin ones (Eckart and Young 1936): where adapters come from. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

LEAST = 1e-7  # of the largest singular value: smaller ones count as none


def best_product(change: Array, fresh: Array) -> tuple[Array, Array]:
    """A (r, inputs) and B (outputs, r) with B A nearest to `change` (outputs, inputs) = U S V^T: A = V_r^T, B = U_r S_r.

    By the eigenvectors of the smaller of change change^T and change^T change: a third of the time of a whole SVD, and in float64
    exact for all but directions of less than `LEAST`. Memory: a few matrices of the smaller side squared, and one more of `change`.

    Args: fresh: A whose rows stand where `change` has no direction; those of B are zero there.
    """
    import numpy as np

    wide = change if change.shape[0] <= change.shape[1] else change.T
    squares, vectors = np.linalg.eigh(wide @ wide.T)
    squares, left = squares[::-1][: len(fresh)], vectors[:, ::-1][:, : len(fresh)]  # the largest first
    values = np.sqrt(squares[squares > LEAST**2 * squares.max(initial=0.0)])
    left = left[:, : values.size]
    right = left.T @ wide / values[:, None]
    a, b = fresh.copy(), np.zeros((len(change), len(fresh)))
    inner, outer = (right, left) if wide is change else (left.T, right.T)
    a[: values.size], b[:, : values.size] = inner, outer * values
    return a, b
