"""What this device would do under each method of a fleet: `edge-runtime plan --method`. Rules are `asks.py`'s, costs the planner's.

As in a cohort of its own, and with fleet.toml's defaults where the flags say nothing else. Imports no backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.asks import ASKS, Ask, Asker, distribution
from edge_runtime.console import table
from edge_runtime.errors import UsageError
from edge_runtime.kinds import kinds
from edge_runtime.local import Planned
from edge_runtime.planner import cost_table, feasible, mib, offered_ranks, over_budget
from edge_runtime.records import Budget, CostRow, TrainSettings

ALL = "all"
PlanWith = Callable[[TrainSettings], Planned]  # measures this machine for such settings, as `local.plan` does


@dataclass(frozen=True)
class MethodPlan:
    """What is asked of this device in one stage of a method, and what it would be given.

    Attributes:
        stage, stages: the first is 1.
        row: what it would train; None where nothing that would do fits.
        why_not: what the cheapest row that would do has too much.
        ranks: of the adapters in each trained block, where they differ.
        beyond: what the coordinator decides with the other devices in view.
    """

    method: str
    stage: int
    stages: int
    settings: TrainSettings
    row: CostRow | None
    why_not: str
    ranks: tuple[int, ...] = ()
    beyond: str = ""

    @property
    def total_s(self) -> float | None:
        """Seconds of a round's epochs."""
        return self.row.total_s(self.settings.epochs) if self.row else None

    def what(self, num_blocks: int) -> str:
        """What is trained, in words."""
        if self.row is None:
            return "nothing"
        depth, rank = self.row.depth, self.row.rank
        if not depth:
            return "the head"
        where = f"all {depth} blocks" if depth == num_blocks else f"the last {depth} of {num_blocks} blocks"
        where = "the last block" if depth == 1 else where
        if rank:
            shown = f"ranks {' '.join(map(str, self.ranks))}" if len(self.ranks) > 1 else f"rank {rank}"
            return f"adapters of {shown} in {where}"
        every = self.row.mask_every
        return f"one of {every} entries in {where}" if every else where

    def record(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "method": self.method,
            "stage": self.stage,
            "stages": self.stages,
            "row": dataclasses.asdict(self.row) if self.row else None,
            "total_s": self.total_s,
            "ranks": self.ranks,
            "mask_every": self.row.mask_every if self.row else 0,
            "why_not": self.why_not,
            "beyond": self.beyond,
        }


def names_of(text: str) -> list[str]:
    """The methods that a call asks for.

    Raises:
        UsageError: there is no such method.
    """
    if text != ALL and text not in ASKS:
        raise UsageError(f"--method must be {ALL} or one of {', '.join(ASKS)}, it is {text!r}")
    return list(ASKS) if text == ALL else [text]


def method_plans(names: Sequence[str], base: TrainSettings, plan_with: PlanWith) -> tuple[list[MethodPlan], Planned]:
    """What each method would give this device; -> and what was measured for one of them.

    Args:
        base: settings of the run; its rank and its mask hold for the methods that have one.
    """
    measured: dict[int, Planned] = {}

    def planned_for(settings: TrainSettings) -> Planned:
        if settings.lora_rank not in measured:  # all that the measuring depends on
            measured[settings.lora_rank] = plan_with(settings)
        return measured[settings.lora_rank]

    found = []
    for name in names:
        asks = ASKS[name]
        for number, ask in enumerate(asks.stages, 1):
            settings = ask.settings(base, asks.rank)
            of_kinds = [(planned_for(own), own, sent) for own, sent in kinds(settings, ask.adapters)]
            planned = of_kinds[0][0]
            blocks = planned.source.spec.num_blocks
            graded = asks.graded and settings.lora_rank
            ranks = distribution("arithmetic", blocks, settings.lora_rank) if graded else ()
            stage = (name, number, len(asks.stages))
            rows = [row for one in of_kinds for row in _rows(*one)]
            found.append(_one(stage, ask, Asker(blocks, settings, ranks), rows, planned.budget))
    return found, planned


def _rows(planned: Planned, settings: TrainSettings, adapters: str) -> list[CostRow]:
    """This device's table for one kind of training."""
    spec = planned.source.spec
    what = (spec, planned.prepared.data, settings, planned.calibration, planned.budget, planned.engine.cached)
    return cost_table(*what, adapters or "ab", offered_ranks(spec, settings, adapters))


def _one(stage: tuple[str, int, int], ask: Ask, asker: Asker, rows: Sequence[CostRow], budget: Budget) -> MethodPlan:
    settings = asker.settings
    row = ask.pick(feasible(rows, budget, settings.epochs), asker)
    if row:
        ranks = asker.ranks[asker.num_blocks - row.depth :] if row.depth else ()
        return MethodPlan(*stage, settings, row, "", ranks, ask.beyond)
    least = min(ask.suitable(rows, asker), key=lambda r: (r.peak_bytes, r.upload_bytes), default=None)
    why = over_budget(least, budget, settings.epochs) if least else "this device cannot tell what a block would take"
    return MethodPlan(*stage, settings, None, why, (), ask.beyond)


def shown(plans: Sequence[MethodPlan], num_blocks: int) -> str:
    """The table for people, and a line for each remark."""
    header = ("method", "stage", "would train", "micro-batch", "peak memory", "round", "upload", "")
    lines = []
    for plan in plans:
        stage = f"{plan.stage} of {plan.stages}" if plan.stages > 1 else ""
        cells = ["-"] * 4
        if (row := plan.row) and plan.total_s is not None:
            cells = [str(row.micro_batch), mib(row.peak_bytes), f"{plan.total_s:.1f} s", mib(row.upload_bytes)]
            cells[0] += ", checkpointing" if row.checkpointing else ""
        lines.append([plan.method, stage, plan.what(num_blocks), *cells, plan.why_not or plan.beyond])
    return table(header, lines)
