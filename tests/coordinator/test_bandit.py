"""The bandit: it looks everywhere once, then where it paid, and comes back in time; its tree is plain JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from edge_coordinator.methods import bandit


def play(rounds: int, reward: Any, least: float = 0.0, seed: int = 0) -> tuple[list[tuple[float, ...]], bandit.Tree]:
    random, tree, points = np.random.default_rng(seed), bandit.new_tree(), []
    for number in range(1, rounds + 1):
        point, tree = bandit.choose(tree, number, least, lambda side: float(random.random()))
        tree = json.loads(json.dumps(tree))  # as the ledger keeps it
        tree = bandit.learn(tree, number, point, reward(point))
        points.append(point)
    return points, tree


def test_the_bound_is_the_papers() -> None:
    tree: dict[str, Any] = {
        "regions": [[[0.0, 0.5], [0.0, 1.0]], [[0.5, 1.0], [0.0, 1.0]]],
        "seen": [[1, [0.1, 0.2], 0.4], [2, [0.7, 0.9], 1.0], [3, [0.2, 0.1], 0.1]],
    }
    ages = [bandit.DISCOUNT**age for age in (3, 2, 1)]
    count, mean = bandit.visits(tree, tree["regions"][0], 4)
    assert count == pytest.approx(ages[0] + ages[2])
    assert mean == pytest.approx((ages[0] * 0.4 + ages[2] * 0.1) / count)
    assert bandit.bound(count, mean, sum(ages)) == pytest.approx(mean + math.sqrt(2 * math.log(sum(ages)) / count))
    assert bandit.bound(0.5, 0.3, 0.5) == 0.3, "less than one action tells nothing of what is left to explore"
    assert bandit.bound(0.0, 0.0, 3.0) == math.inf


def test_regions_cover_the_square_once_and_become_no_narrower_than_the_width() -> None:
    _, tree = play(110, lambda point: 1.0)
    for point in np.random.default_rng(1).random((200, 2)).tolist():
        assert sum(bandit.inside(region, point) for region in tree["regions"]) == 1
    sides = [high - low for region in tree["regions"] for low, high in region]
    assert min(sides) > bandit.WIDTH / 2 and len(tree["seen"]) == bandit.REMEMBERED


def test_it_goes_where_it_pays() -> None:
    found = []
    for seed in range(5):
        points, _ = play(60, lambda point: 1.0 if point[0] > 0.5 and point[1] < 0.5 else 0.0, seed=seed)
        found.append(sum(point[0] > 0.5 and point[1] < 0.5 for point in points[20:]) / 40)
    assert sum(found) / len(found) > 0.6 and min(found) > 0.3, "by chance it would be a quarter"


def test_a_half_that_nobody_was_in_stands_as_its_share_of_the_whole() -> None:
    half = [[0.0, 0.5], [0.0, 1.0]]
    quarters = bandit.split(half)
    assert bandit.split([[0.0, 1.0]] * 2)[0] == half and quarters[1] == [[0.0, 0.5], [0.5, 1.0]]
    assert bandit.parent(half) == [[0.0, 1.0]] * 2 and bandit.parent([[0.0, 1.0]] * 2) is None
    assert [bandit.parent(quarter) for quarter in quarters] == [half, half]
    tree = {"regions": [*quarters, [[0.5, 1.0], [0.0, 1.0]]], "seen": [[1, [0.2, 0.1], 0.5]]}
    age = bandit.DISCOUNT
    assert [bandit.standing(tree, r, 2) for r in tree["regions"]] == [(age, 0.5), (age / 2, 0.5), (age / 2, 0.5)]


def test_it_never_goes_below_the_least() -> None:
    points, _ = play(20, lambda point: 1.0 - point[0], least=0.6)
    assert all(point[0] >= 0.6 for point in points)
    assert all(point == pytest.approx((1.0, point[1])) for point in play(5, lambda point: 0.0, least=1.0)[0])
