"""Which of several networks a fleet should train: CAFF's choice of architecture, from each device's cost table. `best` is pure.

Pfeiffer et al., arXiv 2411.07826: among pretrained networks of one family with different depths, l* maximises the mean over
the devices of t_c(l), the number of blocks that device c can train. Reading: every device must manage at least one block, and
ties go to the deeper network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_coordinator.config import FleetConfig
from edge_coordinator.sim.devices import Plans, VirtualDevice
from edge_coordinator.sim.making import SimOptions, calibrated, calibrations, check_options, make_devices
from edge_runtime.asks import deepest
from edge_runtime.engine import EngineOptions, find_engine
from edge_runtime.local import prepare
from edge_runtime.planner import budgets_over, feasible
from edge_runtime.records import TrainSettings
from edge_runtime.source import find_checkpoint, open_source
from edge_runtime.store import cache_folder
from edge_runtime.training.corpus import Corpus


@dataclass(frozen=True)
class Candidate:
    """A network, and how many of its blocks each device could train; 0 is the head alone, or nothing."""

    model: str
    num_blocks: int
    depths: Mapping[str, int]  # by device
    held_by: Mapping[str, int] = field(default_factory=dict)  # budget -> devices that it keeps from a block more

    @property
    def mean(self) -> float:
        """Over the devices."""
        return sum(self.depths.values()) / len(self.depths)

    @property
    def least(self) -> int:
        """Of the weakest device."""
        return min(self.depths.values())


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """l*; None where no network leaves every device a block to train."""
    able = [c for c in candidates if c.least >= 1]
    return max(able, key=lambda c: (c.mean, c.num_blocks), default=None)


def planned(
    model: str, config: FleetConfig, options: SimOptions, say: Callable[[str], None]
) -> tuple[Plans, list[VirtualDevice]]:
    """What the cost tables of a simulation's devices are made from, for a network, with the settings of fleet.toml.

    Raises:
        UsageError, DataError, ModelError, MissingExtra: as their names say.
    """
    check_options(options)
    section, train, cache = config.model, config.train, cache_folder()
    say(f"{model}: reading it and the data")
    checkpoint = find_checkpoint(
        model, max_length=section.max_length, family=section.family, new_head=True, progress=say
    )
    source = open_source(checkpoint, section.labels, cache)
    prepared = prepare(replace(checkpoint, labels=section.labels), options.data, cache, options.reading)
    engine = find_engine(source, EngineOptions(), cache, say)
    measured = calibrated(source, engine, prepared.data, train, options.threads, say)
    kinds = [kind for kind, _ in options.kinds]
    by_class = calibrations(measured, source.spec, prepared.data, train.batch_size, kinds)
    devices = make_devices(options, section.labels, Corpus(prepared.corpus), train.seed)
    return Plans(source.spec, by_class, engine.cached), devices


def depth_of(plans: Plans, device: VirtualDevice, settings: TrainSettings) -> int:
    """t_c: the blocks that a device can train."""
    table, budget = plans.table(device, settings, "")
    row = deepest(feasible(table, budget, settings.epochs))
    return row.depth if row else 0


def held_by(plans: Plans, device: VirtualDevice, settings: TrainSettings, depth: int) -> tuple[str, ...]:
    """The budgets that keep a device of this depth from a block more: those of the row that lacks the fewest."""
    table, budget = plans.table(device, settings, "")
    lacking = [budgets_over(row, budget, settings.epochs) for row in table if row.depth == depth + 1]
    return min(lacking, key=len, default=())


def candidate(model: str, config: FleetConfig, options: SimOptions, say: Callable[[str], None]) -> Candidate:
    """What the devices of a simulation could train of a network. Raises: as `planned`."""
    settings = replace(config.train, lora_rank=0)
    plans, devices = planned(model, replace(config, train=settings), options, say)
    depths = {d.name: depth_of(plans, d, settings) for d in devices}
    counts = Counter(name for d in devices for name in held_by(plans, d, settings, depths[d.name]))
    return Candidate(model, plans.spec.num_blocks, depths, counts)


def described(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """For people and scripts: one row a network, the chosen one marked."""
    chosen = best(candidates)
    return [
        {
            "model": c.model,
            "blocks": c.num_blocks,
            "mean_depth": round(c.mean, 4),
            "least_depth": c.least,
            "devices_by_depth": {str(depth): count for depth, count in sorted(Counter(c.depths.values()).items())},
            "held_by": dict(sorted(c.held_by.items())),
            "chosen": c is chosen,
        }
        for c in candidates
    ]
