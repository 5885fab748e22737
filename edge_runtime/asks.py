"""What each method of a fleet asks of a device: its stages, the rows of a cost table that would do, and which of them is given.

The coordinator's methods choose by these same rules, and add what only it can know: the other devices, its `fleet.toml`, what it
remembers of rounds before. Alone in a cohort a device is given just what stands here. Not how devices' results become one model.
Pure; imports the records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from edge_runtime.kinds import FRESH
from edge_runtime.records import CostRow, TrainSettings

MASK_EVERY = 10  # of a sparse stage where nothing else is said
GAINS = {  # measured, by the share of the blocks that is trained: 0, a third, two thirds, all (docs/results/gains.md)
    "blocks": (0.0, 21.7, 27.5, 29.8),
    "adapters": (0.0, 17.3, 24.1, 27.0),
    "entries": (0.0, 14.4, 25.7, 29.0),
}
Rows: TypeAlias = Sequence[CostRow]


@dataclass(frozen=True)
class Asker:
    """What a choice depends on beside the table.

    Attributes:
        settings: of the stage.
        ranks: of the adapters of each block, from input to output, where they differ.
    """

    num_blocks: int
    settings: TrainSettings
    ranks: tuple[int, ...] = ()


Suitable = Callable[[Rows, Asker], list[CostRow]]
Best = Callable[[Rows, Asker], CostRow | None]


@dataclass(frozen=True)
class Ask:
    """What is asked in one stage of a method.

    Attributes:
        trains: the blocks themselves, masked entries of their matrices, adapters, or any of these (`kinds.py`).
        suitable: the rows of a table that would do, whether they fit or not.
        best: of suitable ones that fit, the one that is given.
        adapters: what of them is trained and sent, as in a plan.
        beyond: what the coordinator decides with the whole cohort in view, in words.
    """

    trains: Literal["blocks", "entries", "adapters", "any"]
    suitable: Suitable
    best: Best
    adapters: str = ""
    beyond: str = ""

    def pick(self, fitting: Rows, asker: Asker) -> CostRow | None:
        """The row that a device is given of those within its budgets; None if none of them would do."""
        return self.best(self.suitable(fitting, asker), asker)

    def settings(self, base: TrainSettings, rank: int) -> TrainSettings:
        """Of the stage. Args: base: the run's; rank: of adapters where those name none."""
        if self.trains == "blocks":
            return replace(base, lora_rank=0, lora_targets=base.lora_targets if base.mask_every else ())
        if self.trains == "entries":
            return replace(base, lora_rank=0, mask_every=base.mask_every or MASK_EVERY)
        every = (base.mask_every or MASK_EVERY) if self.trains == "any" else 0
        return replace(base, lora_rank=base.lora_rank or rank, mask_every=every)


@dataclass(frozen=True)
class Asks:
    """A method, as a device sees it.

    Attributes:
        summary: one line for lists and help texts.
        stages: what is asked, in this order.
        rank: of the adapters where fleet.toml names none.
        graded: blocks have ranks of a distribution (`distribution`).
    """

    summary: str
    stages: tuple[Ask, ...]
    rank: int = 8
    graded: bool = False


def deepest(rows: Rows, asker: Asker | None = None) -> CostRow | None:
    """The deepest row, the fastest among equals."""
    return max(rows, key=lambda r: (r.depth, -r.epoch_s), default=None)


def fastest(rows: Rows, asker: Asker | None = None) -> CostRow | None:
    """The fastest row."""
    return min(rows, key=lambda r: r.epoch_s, default=None)


def widest(rows: Rows, asker: Asker | None = None) -> CostRow | None:
    """The row of the largest rank, the fastest among equals."""
    return max(rows, key=lambda r: (r.rank, -r.epoch_s), default=None)


def expected_gain(row: CostRow, num_blocks: int) -> float:
    """Points of accuracy that a round of training such a row is expected to give beyond the head alone (`GAINS`)."""
    of_kind = GAINS["entries" if row.mask_every else "adapters" if row.rank else "blocks"]
    place = row.depth / num_blocks * (len(of_kind) - 1)
    below = min(int(place), len(of_kind) - 2)
    return of_kind[below] + (place - below) * (of_kind[below + 1] - of_kind[below])


def most_gain(rows: Rows, asker: Asker) -> CostRow | None:
    """The row of the largest expected gain; of equals the one that sends least, then the fastest."""
    return min(rows, key=lambda r: (-expected_gain(r, asker.num_blocks), r.upload_bytes, r.epoch_s), default=None)


def any_depth(rows: Rows, asker: Asker) -> list[CostRow]:
    """Every row."""
    return list(rows)


def head_alone(rows: Rows, asker: Asker) -> list[CostRow]:
    """Those that train no block."""
    return [row for row in rows if row.depth == 0]


def all_blocks(rows: Rows, asker: Asker) -> list[CostRow]:
    """Those that train every block."""
    return [row for row in rows if row.depth == asker.num_blocks]


def of_rank(rows: Rows, asker: Asker) -> list[CostRow]:
    """Those of the run's rank, and those of the head alone, which have none."""
    return [row for row in rows if row.rank == asker.settings.lora_rank or row.depth == 0]


def all_blocks_of_rank(rows: Rows, asker: Asker) -> list[CostRow]:
    """Those that train every block at the run's rank."""
    return all_blocks(of_rank(rows, asker), asker)


def by_depth(rows: Rows, asker: Asker) -> list[CostRow]:
    """One row for each depth from 0 on that has one whose rank covers the suffix's largest: of the lowest rank, the fastest.

    A depth between others may have none: all blocks may fit where fewer do not, for which the prefix is cached.
    """
    ranks, found = asker.ranks, list[CostRow]()
    for depth in range(len(ranks) + 1):
        needed = max(ranks[len(ranks) - depth :], default=0)
        of_depth = [row for row in rows if row.depth == depth and row.rank >= needed]
        if of_depth:
            found.append(min(of_depth, key=lambda row: (row.rank, row.epoch_s)))
    return found if found and not found[0].depth else []


def distribution(kind: str, num_blocks: int, largest: int, budget: int = 0) -> tuple[int, ...]:
    """The rank of each block, from input to output: at least 1, at most `largest`, in sum at most `budget` (if that is possible).

    Of LEGEND (`edge_coordinator/methods/legend.py`). `arithmetic`: r_0 + l, with r_0 = floor((budget - L (L - 1) / 2) / L);
    `decreasing`: the same backwards; `uniform`: floor(budget / L); `halving`: each block has twice the rank of the one before
    it. Without a budget it is the sum of the arithmetic distribution whose last rank is `largest`, so that all kinds may spend
    the same.
    """
    steps = num_blocks * (num_blocks - 1) // 2
    budget = budget or sum(max(1, largest - i) for i in range(num_blocks))
    if kind == "uniform":
        found = [budget // num_blocks] * num_blocks
    elif kind == "halving":
        found = [(budget << block) // ((1 << num_blocks) - 1) for block in range(num_blocks)]
    else:
        found = [(budget - steps) // num_blocks + block for block in range(num_blocks)]
    found = [min(largest, max(1, rank)) for rank in found]
    for block, rank in enumerate(found):  # where ranks below 1 became 1, the lowest of the others pay for them
        found[block] -= min(rank - 1, max(0, sum(found) - budget))
    return tuple(reversed(found)) if kind == "decreasing" else tuple(found)


DEEPEST = Ask("blocks", any_depth, deepest)
EVERYTHING = Ask("blocks", all_blocks, fastest)
WEAKEST = Ask("blocks", any_depth, deepest, beyond="no deeper than the weakest device of the round")
HEAD = Ask("blocks", head_alone, fastest)
ENTRIES = Ask("entries", all_blocks, fastest)
ENTRIES_OF_SUFFIX = Ask("entries", any_depth, deepest)
ADAPTERS = Ask("adapters", all_blocks_of_rank, fastest, "ab")
ONLY_B = Ask("adapters", all_blocks_of_rank, fastest, "b")
ADAPTERS_OF_SUFFIX = Ask("adapters", of_rank, deepest, "ab")
WIDEST = Ask("adapters", all_blocks, widest, "ab")
MOST_GAIN = Ask("any", any_depth, most_gain, FRESH)
PRUNED = Ask("adapters", all_blocks, widest, "ab", "a lower rank, and how far each device prunes")
GRADED = Ask("adapters", by_depth, deepest, "ab", "fewer blocks where other devices would have to wait")

ASKS: dict[str, Asks] = {
    "caff": Asks("the deepest suffix that fits each device's budgets", (DEEPEST,)),
    "full": Asks("FedAvg over all blocks and the head; a device that cannot has no part", (EVERYTHING,)),
    "head": Asks("only the task head, on every device", (HEAD,)),
    "straggler": Asks("every device trains the depth of the weakest that can train anything", (WEAKEST,)),
    "exclusive": Asks("only devices that can train everything take part", (EVERYTHING,)),
    "lora": Asks("adapters of one rank in all blocks, A and B averaged separately (FedIT)", (ADAPTERS,)),
    "ffa-lora": Asks("as lora with A frozen at its random start: only B is trained and sent", (ONLY_B,)),
    "lora-suffix": Asks("adapters of one rank in the deepest suffix that fits each device's budgets", (ADAPTERS_OF_SUFFIX,)),
    "hetlora": Asks("adapters of each device's largest rank, zero-padded, weighted by their norm", (WIDEST,)),
    "flexlora": Asks("adapters of each device's largest rank, their mean product cut anew by SVD", (WIDEST,)),
    "flora": Asks("adapters of each device's largest rank, stacked and merged into the base each round", (WIDEST,)),
    "legend": Asks(
        "adapters whose rank grows towards the output, as deep as keeps the round even (LEGEND)", (GRADED,), graded=True
    ),
    "slora": Asks(
        "some rounds of sparse training, whose changes become the adapters that LoRA begins with (SLoRA)",
        (ENTRIES, ADAPTERS),
        rank=10,
    ),
    "slora-legend": Asks(
        "as slora, but each device trains a suffix: the deepest that fits, then LEGEND's depths and ranks",
        (ENTRIES_OF_SUFFIX, GRADED),
        rank=10,
        graded=True,
    ),
    "auto": Asks("a suffix in full, adapters or masked entries of it: what promises most within the budgets", (MOST_GAIN,)),
    "fedspine": Asks(
        "heads and channels are pruned while adapters train, as far as a bandit chooses (FedSpine)", (PRUNED,)
    ),
    "prune-magnitude": Asks("as fedspine, all devices alike, by the magnitude of what goes", (WIDEST,)),
    "prune-oneshot": Asks("as fedspine, all devices alike, all at once in the first round (LLM-Pruner)", (WIDEST,)),
}  # fmt: skip
