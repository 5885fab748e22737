"""LEGEND: adapters whose rank grows towards the output, in as many of the last blocks of each device as keep the round even.

Liu et al., arXiv 2412.20004, IEEE TMC 2025. One global distribution of ranks over the blocks, so that a layer has the same rank
on every device; a device of depth k trains the last k blocks (`edge_runtime/asks.py`). Its time (reading) is

    t_i(k) = forward_i + k mu_i + beta_i * (sum of the ranks of the last k blocks)

mu_i the backward time of a block with an adapter, beta_i the upload time of a rank-1 adapter of a block; both measured on the
device and smoothed, mu <- 0.8 mu + 0.2 measured. LCD, the greedy choice of depths (the steps are our reading, `lcd`), keeps the
mean waiting time small; it is run anew every round. A and B are averaged layer by layer over the devices that trained them;
the head is always trained. Readings: forward and mu come from the device's cost table times what its last training took of the
promised seconds, beta from the bytes of the table and the uplink that the device saw; waiting is a share of the round's time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_coordinator.methods.method import Choice, Cohort, Method, Options, State
from edge_runtime.asks import ASKS, Asker, by_depth, distribution
from edge_runtime.records import CostRow, TrainSettings

DISTRIBUTIONS = ("arithmetic", "uniform", "halving", "decreasing")
DEPTHS = ("even", "deepest")
KEPT = 0.8  # of a smoothed measurement, as the paper has it


@dataclass(frozen=True)
class Rates:
    """What a device needs, in seconds."""

    forward_s: float  # a round with the head alone, its update sent
    block_s: float  # mu: more for each block that is trained
    rank_s: float  # beta: more for each rank of each block that is sent


def configure(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
    """Ranks that grow towards the output, in the last blocks, as deep as keeps the round even."""
    options, blocks = cohort.options, cohort.num_blocks
    ranks = block_ranks(blocks, cohort.settings, options)
    asker = Asker(blocks, cohort.settings, ranks)
    known: dict[str, Mapping[str, float]] = dict(state.get("rates", {}))
    times: dict[str, list[float]] = {}
    usable: dict[str, list[CostRow]] = {}
    for device, table in sorted(cohort.tables.items()):
        usable[device] = rows = by_depth(table, asker)
        if not rows:
            continue
        join = cohort.joins[device]
        found = rates(rows, ranks, cohort.settings.epochs, join.train_ratio or 1.0, join.uplink_bytes_per_s)
        known[device] = smoothed(known.get(device), found)
        found = Rates(**known[device])
        times[device] = [
            found.forward_s + row.depth * found.block_s + found.rank_s * sum(ranks[blocks - row.depth :])
            for row in rows
        ]
    deepest = {device: len(of) - 1 for device, of in times.items()}
    chosen = lcd(times, options.waiting_share) if options.suffix_depths == "even" else deepest
    choices = dict.fromkeys(cohort.tables, Choice(None))
    for device, place in chosen.items():
        row = usable[device][place]
        choices[device] = Choice(row, ranks=ranks[blocks - row.depth :])
    return choices, {**state, "rates": known}


def block_ranks(num_blocks: int, settings: TrainSettings, options: Options) -> tuple[int, ...]:
    """The one distribution of the run."""
    return distribution(options.rank_distribution, num_blocks, settings.lora_rank, options.rank_budget)


def rates(rows: Sequence[CostRow], ranks: Sequence[int], epochs: int, ratio: float, uplink_bytes_per_s: float) -> Rates:
    """A device's rates, from its rows by depth, what its training takes of the promised seconds, and its uplink (0: not known)."""
    head, deepest = rows[0], rows[-1]
    block_s = (deepest.total_s(epochs) - head.total_s(epochs)) / max(1, deepest.depth)
    sent = [row.upload_bytes / max(1.0, uplink_bytes_per_s) if uplink_bytes_per_s else 0.0 for row in (head, deepest)]
    rank_s = (sent[1] - sent[0]) / max(1, deepest.depth * deepest.rank)
    return Rates(head.total_s(epochs) * ratio + sent[0], max(0.0, block_s) * ratio, max(0.0, rank_s))


def smoothed(before: Mapping[str, float] | None, now: Rates) -> dict[str, float]:
    """What a device needs, smoothed over the rounds, as plain values."""
    values = {"forward_s": now.forward_s, "block_s": now.block_s, "rank_s": now.rank_s}
    return {name: KEPT * before[name] + (1 - KEPT) * v if before else v for name, v in values.items()}


def lcd(times: Mapping[str, Sequence[float]], waiting_share: float) -> dict[str, int]:
    """What each device trains, so that the mean wait is small: a place in its times, which are those of what fits it, from the
    head alone (0) to the deepest; as a rule place and depth are one.

    The most capable device (the least time for a block) takes all it can and sets T; every other the deepest with
    t <= T (1 + eps), else the least above the head. Then, while the mean wait is above eps of the slowest device's time, the device that waits longest
    of those that can go one deeper within it does; if there is none, the slowest trains one block less. Devices that can train no block are not waited for, nor counted.
    """
    depths = {device: len(of) - 1 for device, of in times.items()}
    able = [device for device, depth in depths.items() if depth]
    if not able:
        return depths
    first = min(able, key=lambda device: (times[device][1] - times[device][0], device))
    bound = times[first][-1] * (1 + waiting_share)
    for device in able:
        fitting = [k for k in range(1, len(times[device])) if times[device][k] <= bound]
        depths[device] = max(fitting, default=1)
    while True:
        now = {device: times[device][depths[device]] for device in able}
        slowest = max(now, key=lambda device: (now[device], device))
        most = now[slowest]
        if sum(most - t for t in now.values()) <= waiting_share * most * len(now):
            return depths
        deeper = [d for d in able if depths[d] + 1 < len(times[d]) and times[d][depths[d] + 1] < most]
        if deeper:
            depths[min(deeper, key=lambda device: (now[device], device))] += 1
        elif depths[slowest] > 1:
            depths[slowest] -= 1
        else:
            return depths


METHOD = Method(ASKS["legend"].summary, configure, adapters="ab", block_ranks=block_ranks)
