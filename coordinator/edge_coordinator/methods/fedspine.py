"""FedSpine: each device prunes heads and channels while it trains adapters, how far and of which rank a bandit chooses for it.

Yao et al., arXiv 2501.02438. In a round the coordinator picks for each device the sparsity p that it prunes to and the rank r of its
adapters (`bandit.py`, one tree for each device over p / S and r / R); the device alternates pruning, by importance from the changes
of A and B (`edge_runtime/importance.py`), with recovery; the coordinator puts the different shapes together (`pruned.py`) and tells
the bandit how it went. The paper names the parts of the reward; the formula is ours:

    (relative improvement of the loss + p / S + share of the round's q) / (|T_i - mean T| / mean T + 0.1)

T_i the seconds of training, and of sending where the uplink is known; divided by the largest that the run has seen. Readings: p is at
least what the device has, and S from the last of `prune_rounds` rounds on; no rank is above what fits the device; a draw depends on
the run's seed, the round and the device's name alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial

from edge_coordinator.methods import bandit, pruned
from edge_coordinator.methods.method import (
    Aggregate,
    Change,
    Choice,
    Cohort,
    Collected,
    Configure,
    Method,
    Report,
    State,
)
from edge_runtime.asks import ASKS

BY = "lora"
EVEN = 0.1  # added to how far a device's time is from the mean


def configure(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
    """a bandit chooses how far each device prunes and of which rank it trains adapters (FedSpine)"""
    sparsity, last = cohort.options.sparsity, pruned.prune_rounds(state, cohort.options)
    trees, asked = dict(state.get("trees", {})), {}
    choices = {}
    for device, table in sorted(cohort.tables.items()):
        rows = [row for row in table if row.depth == cohort.num_blocks and row.rank]
        if not rows:
            choices[device] = Choice(None)
            continue
        has = pruned.known(state, device)["sparsity"]
        draw = partial(_draw, cohort.settings.seed, cohort.number, device)
        tree = trees.get(device) or bandit.new_tree()
        point, trees[device] = bandit.choose(tree, cohort.number, min(1.0, has / sparsity), draw)
        share = 1.0 if cohort.number >= last else point[0]
        row = max(rows, key=lambda r: (r.rank, -r.epoch_s))  # the largest that fits, which serves a lower one
        rank = min(1 + int(point[1] * cohort.settings.lora_rank), row.rank)
        to = max(has, share * sparsity)
        ranks = (rank,) * cohort.num_blocks
        choices[device] = Choice(row, ranks=ranks, pruning=pruned.pruning(state, device, to, BY))
        asked[device] = {"to": to, "point": [share, point[1]]}
    return choices, {**state, "trees": trees, "asked": asked, "prune_rounds": last}


def _draw(seed: int, number: int, device: str, side: int) -> float:
    """From [0, 1), the same on every platform."""
    digest = hashlib.sha256(f"bandit/{seed}/{number}/{device}/{side}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def aggregate(state: State, collected: Collected) -> tuple[Iterator[Change], State]:
    """The next adapters, and what the bandit learns."""
    shares = pruned.shares(collected)
    after = pruned.remembered(state, collected, shares)
    raw = rewards(collected.reports, shares, {d: state["asked"][d]["point"][0] for d in collected.reports})
    best = max(state.get("best", 0.0), *raw.values())
    trees = dict(state["trees"])
    for device, reward in raw.items():
        point = tuple(state["asked"][device]["point"])
        trees[device] = bandit.learn(trees[device], collected.number, point, reward / best if best else 0.0)
    return pruned.changes(collected), {**after, "trees": trees, "best": best}


def rewards(
    reports: Mapping[str, Report], shares: Mapping[str, float], progress: Mapping[str, float]
) -> dict[str, float]:
    """What each device's action brought, as above, not below 0. Args: progress: p / S."""
    mean_s = sum(report.seconds for report in reports.values()) / len(reports)
    found = {}
    for device, report in reports.items():
        better = (report.first_loss - report.last_loss) / report.first_loss if report.first_loss > 0 else 0.0
        apart = abs(report.seconds - mean_s) / mean_s if mean_s else 0.0
        found[device] = max(0.0, better + progress[device] + shares[device]) / (apart + EVEN)
    return found


def method(name: str, configure: Configure, aggregate: Aggregate) -> Method:
    """A method that prunes."""
    asks = ASKS[name]
    return Method(asks.summary, configure, aggregate, adapters="ab", keeps_updates=True, remakes_adapters=True, rank=asks.rank,
                  prunes=True, kept=pruned.kept)  # fmt: skip


METHOD = method("fedspine", configure, aggregate)
