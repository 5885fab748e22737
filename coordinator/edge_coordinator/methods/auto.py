"""auto: each device trains a suffix in full, adapters of it, or masked entries of it, whichever promises most within its budgets.

Ours. A device's table has rows of all three kinds; of those within its budgets it is given the one of the largest expected gain
(`edge_runtime/asks.py`, from measured figures). That they may become one model follows FLoRA (Wang et al., arXiv 2409.05976) for
every kind: a round begins without adapters, B = 0, so all devices train the same base W; when it closes each device's change is a
dense dW of the same shape, B_k A_k scaled, or entries at their places and 0 elsewhere, or all of it; and with n_k examples

    W <- W + sum n_k dW_k / sum n_k        over the devices k that trained the matrix, in whatever way

which is exact: the mean of the devices' models. Biases, norms and the head: the exact sums of all who trained them, as ever. A of a
device's adapters comes from its plan's seed, so nobody fetches any; masks are the same for all devices of a round, other entries in
each round, from `[train] seed`. Memory: two matrices of float64. The bits of a product are those of one machine's linear algebra.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edge_coordinator.methods.method import Change, Collected, Options, State, alone
from edge_runtime.records import TrainSettings


def aggregate(state: State, collected: Collected) -> tuple[Iterator[Change], State]:
    """The mean of the devices' models, matrix by matrix."""
    return _changes(collected), state


def _changes(collected: Collected) -> Iterator[Change]:
    import numpy as np

    yield from collected.means()
    for matrix in collected.adapted:
        trained = collected.dense(matrix)
        if not trained:
            continue
        total, num_examples = np.zeros(matrix.shape), sum(one.num_examples for one in trained)
        for one in trained:
            total += (one.num_examples / num_examples) * one.load()
        yield Change(matrix.name, total)


def round_settings(state: State, number: int, settings: TrainSettings, options: Options) -> TrainSettings:
    """A rank and a mask, for a device to choose from."""
    every = max(2, round(1 / options.sparse_density))
    return replace(settings, mask_every=every, mask_seed=(settings.seed + number) % (1 << 63))


METHOD = replace(alone("auto", aggregate, keeps_updates=True, remakes_adapters=True), round_settings=round_settings)
