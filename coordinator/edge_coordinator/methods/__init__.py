"""The methods by name. What a method is says `method.py`; one file each.

A method sees cost tables, budgets, names, shapes and numbers: never a socket, a file or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edge_coordinator.methods import (
    auto,
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
from edge_coordinator.methods.method import Choice, Cohort, Method, Options, State
from edge_runtime.codecs import CODECS
from edge_runtime.kinds import fits_kind
from edge_runtime.records import CostRow, TrainSettings
from edge_runtime.wire import Join

METHODS: dict[str, Method] = {
    "caff": caff.METHOD,
    "full": baselines.FULL,
    "head": baselines.HEAD,
    "straggler": baselines.STRAGGLER,
    "exclusive": baselines.EXCLUSIVE,
    "lora": lora.EVERYWHERE,
    "ffa-lora": lora.ONLY_B,
    "lora-suffix": lora.SUFFIX,
    "hetlora": hetlora.METHOD,
    "flexlora": flexlora.METHOD,
    "flora": flora.METHOD,
    "legend": legend.METHOD,
    "slora": slora.METHOD,
    "slora-legend": slora.WITH_LEGEND,
    "auto": auto.METHOD,
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
        return row.depth <= num_blocks and row.codec in CODECS and fits_kind(row, stage.settings, stage.adapters)

    tables = {
        device: feasible([row for row in join.table if usable(row)], join.budget, settings.epochs)
        for device, join in joins.items()
    }
    choices, after = method.configure(state, Cohort(number, joins, tables, num_blocks, stage.settings, options))
    why = f"{name} leaves out a device with these budgets"
    return {device: c if c.row or c.why else replace(c, why=why) for device, c in choices.items()}, after
