"""FLoRA: the devices' adapters of whatever ranks are stacked, which adds up their products exactly, and merged into the base.

Wang, Shen, He, Sun, Wang, Lyu, Li: "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", arXiv 2409.05976. With p_k = n_k / sum n over the devices that trained a matrix, A = [p_1 A_1; p_2 A_2; ...] and
B = [B_1, B_2, ...], so that

    W <- W + (alpha / r) B A = W + (alpha / r) sum p_k B_k A_k

and every round begins with a fresh random A and B = 0. In the paper devices get the stack and merge it themselves; here the
coordinator does, and devices fetch the changed matrices: a download that does not grow with the number of devices. The head is
averaged by examples. Memory: one matrix of float64.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_coordinator.methods.flexlora import mean_product
from edge_coordinator.methods.method import Change, Collected, State, alone
from edge_coordinator.start_adapters import fresh_a
from edge_runtime.layout import A, B, scale


def aggregate(state: State, collected: Collected) -> tuple[Iterator[Change], State]:
    """The base as above, and fresh adapters."""
    return _changes(collected), state


def _changes(collected: Collected) -> Iterator[Change]:
    import numpy as np

    yield from collected.means()
    for matrix in collected.adapted:
        trained = collected.trained(matrix)
        if not trained:
            continue
        yield Change(matrix.name, scale(collected.settings) * mean_product(matrix, trained))
        a, b = collected.adapter(matrix)
        stem = matrix.name.removesuffix(".weight")
        yield Change(stem + A, fresh_a(collected.settings.seed, collected.number, stem + A, a.shape), replaces=True)
        yield Change(stem + B, np.zeros(b.shape), replaces=True)


METHOD = alone("flora", aggregate, keeps_updates=True, remakes_adapters=True)
