"""A bandit over a continuous space: upper confidence bounds of regions, which a decision tree splits finer where it looks.

FedSpine (Yao et al., arXiv 2501.02438) chooses pruning ratio and rank so; the formulas are those of the same lab's FedMP (Jiang et
al., ICDE 2022). For region j after the actions a_s of the rounds s < t, with a discount g,

    N_j = sum g^(t-s) 1{a_s in j}        R_j = sum g^(t-s) 1{a_s in j} reward_s / N_j        U_j = R_j + sqrt(2 ln(sum_j N_j) / N_j)

The region with the largest U_j is drawn from, evenly, and is split while it is wider than WIDTH. Readings: the space is the unit
square; the widest side is split in its middle; ln of less than 1 counts as 0; a region that nobody was in since it was split off
counts as its share of the smallest one before it where somebody was. A tree is a value: plain JSON in, plain JSON out. Pure,
without numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DISCOUNT = 0.95
WIDTH = 0.1  # of a region, below which it is not split
REMEMBERED = 100  # actions; older ones count less than 0.6 % of the newest

Point = tuple[float, ...]
Region = Sequence[Sequence[float]]  # (low, high) of each side
Tree = Mapping[str, Any]  # {"regions": [...], "seen": [[round, point, reward], ...]}


def new_tree(sides: int = 2) -> Tree:
    """One region, nothing seen."""
    return {"regions": [[[0.0, 1.0]] * sides], "seen": []}


def choose(tree: Tree, number: int, least: float, draw: Callable[[int], float]) -> tuple[Point, Tree]:
    """The action of round `number`, and the tree with its region split.

    Args:
        least: of the first side; regions below are not chosen any more.
        draw: an even draw from [0, 1) for each side.
    """
    regions: list[Region] = list(tree["regions"])
    open_ = [r for r in regions if r[0][1] >= least] or regions
    weights = {id(r): standing(tree, r, number) for r in open_}
    total = sum(n for n, _ in weights.values())
    best = max(open_, key=lambda r: bound(*weights[id(r)], total))
    point = []
    for side, (low, high) in enumerate(best):
        low = min(high, max(low, least)) if side == 0 else low
        point.append(low + (high - low) * draw(side))
    place = next(i for i, r in enumerate(regions) if r is best)
    regions[place : place + 1] = split(best)
    return tuple(point), {**tree, "regions": regions}


def learn(tree: Tree, number: int, point: Point, reward: float) -> Tree:
    """The tree with what an action brought."""
    seen = [*tree["seen"], [number, list(point), reward]]
    return {**tree, "seen": seen[-REMEMBERED:]}


def standing(tree: Tree, region: Region, number: int) -> tuple[float, float]:
    """N_j and R_j of a region, or its share of those of the smallest one before it that was chosen at all."""
    share, (count, mean) = 1.0, visits(tree, region, number)
    while not count and (before := parent(region)) is not None:
        region, share = before, share / 2
        count, mean = visits(tree, region, number)
    return share * count, mean


def visits(tree: Tree, region: Region, number: int) -> tuple[float, float]:
    """-> N_j, R_j: how often a region was chosen, and its mean reward, both discounted."""
    count = total = 0.0
    for when, point, reward in tree["seen"]:
        if inside(region, point):
            weight = DISCOUNT ** (number - when)
            count, total = count + weight, total + weight * reward
    return count, total / count if count else 0.0


def bound(count: float, mean: float, total: float) -> float:
    """U_j; infinite where nothing was ever chosen."""
    return mean + math.sqrt(2 * math.log(max(1.0, total)) / count) if count else math.inf


def inside(region: Region, point: Sequence[float]) -> bool:
    """Whether a point lies in a region; its upper edges belong to the next one, but for those of the whole space."""
    return all(low <= x and (x < high or x == high == 1.0) for (low, high), x in zip(region, point, strict=True))


def split(region: Region) -> list[Region]:
    """The halves of a region across its widest side; itself if that is narrow already."""
    widest = max(range(len(region)), key=lambda side: region[side][1] - region[side][0])
    low, high = region[widest]
    if high - low <= WIDTH:
        return [region]
    middle = (low + high) / 2
    return [[*region[:widest], half, *region[widest + 1 :]] for half in ([low, middle], [middle, high])]


def parent(region: Region) -> Region | None:
    """The region that this one is a half of; None for the whole space."""
    widths = [high - low for low, high in region]
    side = max(i for i, width in enumerate(widths) if width == min(widths))  # of equal ones the first is split first
    width = 2 * widths[side]
    if width > 1:
        return None
    low = region[side][0] // width * width
    return [*region[:side], [low, low + width], *region[side + 1 :]]
