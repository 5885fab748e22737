"""FlexLoRA: the mean of the devices' products B A, cut by SVD into adapters of each device's rank.

Bai, Chen, Qian, Yao, Li: "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv 2402.11505. For each matrix, with p_k = n_k / sum n over the devices that trained it,

    dW = sum p_k B_k A_k = U S V^T        B <- U_r S_r        A <- V_r^T

and a device of rank r_k gets the first r_k singular directions back: the first rows of A and columns of B. Readings: the
singular values go to B, so that rows of A keep about the length that they are drawn with; what is published, evaluated and
exported is cut at the run's rank, the largest. The head is averaged by examples. Memory: one matrix of float64 and what its
SVD needs, about four times as much. The bits are those of one machine's linear algebra with one number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edge_coordinator.methods.best_product import best_product
from edge_coordinator.methods.method import Change, Collected, State, Trained, alone
from edge_runtime.layout import A, B
from edge_runtime.model import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def aggregate(state: State, collected: Collected) -> tuple[Iterator[Change], State]:
    """A and B as above."""
    return _changes(collected), state


def _changes(collected: Collected) -> Iterator[Change]:
    yield from collected.means()
    for matrix in collected.adapted:
        product = mean_product(matrix, collected.trained(matrix))
        if not product.any():  # nobody trained it, or to nothing: no directions to choose
            continue
        a, _ = collected.adapter(matrix)  # rows beyond the product's directions stay, and add nothing
        a, b = best_product(product, a)
        stem = matrix.name.removesuffix(".weight")
        yield Change(stem + A, a, replaces=True)
        yield Change(stem + B, b, replaces=True)


def mean_product(matrix: TensorSpec, trained: Sequence[Trained]) -> Array:
    """sum p_k B_k A_k (outputs, inputs) in float64, device after device; zeros where there is none."""
    import numpy as np

    total, num_examples = np.zeros(matrix.shape), sum(t.num_examples for t in trained)
    for one in trained:
        a, b = one.load()
        total += (one.num_examples / num_examples) * (b @ a)
    return total


METHOD = alone("flexlora", aggregate, keeps_updates=True, remakes_adapters=True)
