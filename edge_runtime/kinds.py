"""Rounds whose devices may train different things: a suffix in full, adapters of it, or masked entries of it.

The settings of such a round have both a rank and a mask, which in any plan exclude each other: a device offers rows of every
kind, and a plan has the settings of its own. Pure; imports the records.
"""

from __future__ import annotations

from dataclasses import replace

from edge_runtime.records import CostRow, TrainSettings

FRESH = "fresh"  # adapters of a plan whose model has none: A is drawn from the plan's seed, B zero; both are sent
# Times the run's learning rates of blocks and of adapters: the best of 1, 2.5 and 5, and of 0.5 and 1 (docs/methods.md).
SPARSE_RATE, ADAPTER_RATE = 5.0, 0.5


def is_mixed(settings: TrainSettings) -> bool:
    """Whether these are the settings of such a round."""
    return bool(settings.lora_rank and settings.mask_every)


def kinds(settings: TrainSettings, adapters: str) -> tuple[tuple[TrainSettings, str], ...]:
    """What a device may train in a round: settings and adapters as in a plan; the round's own where there is one kind."""
    if not is_mixed(settings):
        return ((settings, adapters),)
    return tuple(_kind(settings, adapters, rank, every) for rank, every in
                 ((0, 0), (settings.lora_rank, 0), (0, settings.mask_every)))  # fmt: skip


def of_row(settings: TrainSettings, adapters: str, row: CostRow) -> tuple[TrainSettings, str]:
    """A round's settings and adapters for the plan of a row."""
    if not is_mixed(settings):
        return settings, adapters
    return _kind(settings, adapters, settings.lora_rank if row.rank else 0, row.mask_every)


def fits_kind(row: CostRow, settings: TrainSettings, adapters: str) -> bool:
    """Whether a row is one that a round asks for. For tables from the network."""
    if is_mixed(settings):
        known = ((0, 0), (settings.lora_rank, 0), (0, settings.mask_every))
        return (row.rank, row.mask_every) in (known if row.depth else known[:1])
    if adapters and row.depth:
        return 1 <= row.rank <= settings.lora_rank
    return row.rank == 0


def _kind(settings: TrainSettings, adapters: str, rank: int, every: int) -> tuple[TrainSettings, str]:
    changed = replace(settings, lora_rank=rank, mask_every=every, mask_seed=settings.mask_seed if every else 0)
    if every:
        changed = replace(changed, learning_rate=min(10.0, SPARSE_RATE * settings.learning_rate))
    if rank:
        changed = replace(changed, adapter_learning_rate=ADAPTER_RATE * settings.adapter_learning_rate)
    return changed, adapters if rank else ""
