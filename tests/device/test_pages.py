"""Memory that gradients take over from each other."""

from __future__ import annotations

import numpy as np

from edge_runtime.training.pages import GradientSums


def test_tensors_of_one_role_take_over_their_memory_which_grows() -> None:
    sums = GradientSums()
    first = sums.place("a", (200, 100), "w")
    first[...] = 1
    further = sums.place("a", (200, 100), "w")
    further[...] = 2
    sums.add("a", first)
    sums.add("a", further)
    assert np.array_equal(sums.take("a"), np.full((200, 100), 3, np.float32)) and sums.names() == []
    smaller = sums.place("b", (90, 100), "w")
    assert np.shares_memory(smaller, first) and not np.shares_memory(smaller, further)
    assert not np.shares_memory(sums.place("c", (90, 100), "v"), first)
    sums.take("b")
    larger = sums.place("d", (300, 100), "w")
    assert larger.shape == (300, 100) and not larger.any()
    sums.take("d")
    assert np.shares_memory(sums.place("e", (10,), "w"), larger)
    assert sums.names() == ["c", "e"]
