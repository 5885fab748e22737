"""The methods by name. A method is how plans are chosen and how their results become one model; one file each.

All here aggregate layer by layer (`aggregate.py`); they differ in the plan alone. A method sees cost tables, budgets and
numbers: never a weight, a socket or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edge_coordinator.methods import baselines, caff
from edge_runtime.codecs import CODECS
from edge_runtime.records import CostRow
from edge_runtime.wire import Join


@dataclass(frozen=True)
class Choice:
    """What a method decides for one device: a row of its cost table, or why it has none this round."""

    row: CostRow | None
    why: str = ""


Choose = Callable[[Mapping[str, Sequence[CostRow]], int], dict[str, CostRow | None]]

METHODS: dict[str, Choose] = {
    "caff": caff.choose,
    "full": baselines.full,
    "head": baselines.head,
    "straggler": baselines.straggler,
    "exclusive": baselines.exclusive,
}
SUMMARIES: dict[str, str] = {name: (choose.__doc__ or "").splitlines()[0] for name, choose in METHODS.items()}


def configure_train(method: str, joins: Mapping[str, Join], num_blocks: int, epochs: int) -> dict[str, Choice]:
    """What each device of a cohort trains.

    Args:
        joins: what each device said it could do; rows over its own budgets, and of depths that the model does not
            have or of codecs that are not known, are not offered to the method.
    """
    from edge_runtime.planner import feasible

    tables = {
        device: feasible(
            [row for row in join.table if row.depth <= num_blocks and row.codec in CODECS], join.budget, epochs
        )
        for device, join in joins.items()
    }
    chosen = METHODS[method](tables, num_blocks)
    return {
        device: Choice(row, "" if row else f"{method} leaves out a device with these budgets")
        for device, row in chosen.items()
    }
