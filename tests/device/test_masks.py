"""Masks of sparse training: the same everywhere from a seed, uniform, one entry in every so many."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edge_runtime.masks import indices


@pytest.mark.parametrize(("size", "every"), [(1000, 10), (1003, 10), (7, 10), (1, 1), (64, 1), (99_991, 3)])
def test_each_run_of_entries_has_one_in_it(size: int, every: int) -> None:
    found = indices(3, "w", size, every)
    assert found.dtype == np.int64 and found.tolist() == sorted(set(found.tolist()))
    assert (found // every).tolist() == list(range(-(-size // every)))
    assert found[-1] < size


def test_a_seed_and_a_name_give_the_same_mask_on_every_machine() -> None:
    drawn = indices(7, "encoder.layer.0.attention.self.query.weight", 147_456, 10)
    assert drawn[:5].tolist() == [9, 18, 22, 35, 47]
    assert hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()[:16] == "8c7f5b1e410d3543"
    for other in (indices(8, "encoder.layer.0.attention.self.query.weight", 147_456, 10), indices(7, "x", 147_456, 10)):
        assert (other == drawn).mean() == pytest.approx(0.1, abs=0.02)


def test_places_are_uniform() -> None:
    counts = np.bincount(indices(1, "w", 200_000, 10) % 10, minlength=10)
    assert counts.sum() == 20_000
    assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi-square with 9 degrees of freedom: 0.04 % lie above
