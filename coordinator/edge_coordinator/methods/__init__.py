"""The methods by name. What a method is says `method.py`; one file each.

A method sees cost tables, budgets, names, shapes and numbers: never a socket, a file or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from edge_coordinator.methods import (
    baselines,
    caff,
    fedspine,
    flexlora,
    flora,
    hetlora,
    legend,
    lora,
    prune_baselines,
    slora,
)
from edge_coordinator.methods.method import Choice, Cohort, Configure, Method, Options, State, by_table
from edge_runtime.codecs import CODECS
from edge_runtime.records import CostRow, TrainSettings
from edge_runtime.wire import Join


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _averaging(choose: Callable[..., Mapping[str, CostRow | None]]) -> Method:
    """A method that differs in the plan alone."""
    return Method(_first_line(choose), by_table(choose))


def _lora(configure: Configure, *, adapters: str = "ab") -> Method:
    """A method that averages A and B separately."""
    return Method(_first_line(configure), configure, adapters=adapters)


METHODS: dict[str, Method] = {
    "caff": _averaging(caff.choose),
    "full": _averaging(baselines.full),
    "head": _averaging(baselines.head),
    "straggler": _averaging(baselines.straggler),
    "exclusive": _averaging(baselines.exclusive),
    "lora": _lora(lora.everywhere),
    "ffa-lora": _lora(lora.only_b, adapters="b"),
    "lora-suffix": _lora(lora.suffix),
    "hetlora": hetlora.METHOD,
    "flexlora": flexlora.METHOD,
    "flora": flora.METHOD,
    "legend": legend.METHOD,
    "slora": slora.METHOD,
    "fedspine": fedspine.METHOD,
    "prune-magnitude": prune_baselines.MAGNITUDE,
    "prune-oneshot": prune_baselines.ONESHOT,
}
SUMMARIES: dict[str, str] = {name: method.summary for name, method in METHODS.items()}


def configure_train(
    name: str,
    state: State,
    joins: Mapping[str, Join],
    *,
    number: int,
    num_blocks: int,
    settings: TrainSettings,
    options: Options,
) -> tuple[dict[str, Choice], State]:
    """What each device of a cohort trains, and the method's next state.

    Args:
        joins: what each device said it could do; rows over its own budgets, of depths that the model does not have, of
            codecs that are not known, or of ranks that the round does not have, are not offered to the method.
        settings: the run's.
    """
    from edge_runtime.planner import feasible

    method = METHODS[name]
    stage = method.stage(state, number, num_blocks, settings, options)

    def usable(row: CostRow) -> bool:
        ranked = 1 <= row.rank <= stage.settings.lora_rank if stage.adapters and row.depth else row.rank == 0
        return row.depth <= num_blocks and row.codec in CODECS and ranked

    tables = {
        device: feasible([row for row in join.table if usable(row)], join.budget, settings.epochs)
        for device, join in joins.items()
    }
    choices, after = method.configure(state, Cohort(number, joins, tables, num_blocks, stage.settings, options))
    why = f"{name} leaves out a device with these budgets"
    return {device: c if c.row or c.why else replace(c, why=why) for device, c in choices.items()}, after
