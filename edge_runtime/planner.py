"""From costs and budgets to the plan, and why the others lost. Pure: its test is two lines.

The rule of CAFF (`docs/methods.md`): train the deepest suffix that fits memory, time and upload. Smaller micro-batches come
before gradient checkpointing, since they save as much and cost less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edge_runtime.codecs import check_codec, pick_codec
from edge_runtime.cost import GRAPH_BACKEND, Calibration, DataShape, cost, micro_batches, trained
from edge_runtime.errors import DoesNotFit, UsageError
from edge_runtime.kinds import FRESH
from edge_runtime.model import ModelSpec
from edge_runtime.records import Budget, CostRow, Plan, TrainSettings
from edge_runtime.training.optimizers import OPTIMIZERS

MAX_ROWS = 512  # of a table in a fleet, of at most 212 bytes each: a join is below its 128 KiB
NO_SLOWER = 0.05  # of a step's predicted seconds: less is not worth memory


def check_settings(settings: TrainSettings) -> TrainSettings:
    """The settings, if they make sense together.

    Raises:
        UsageError: a value is out of its range.
    """
    if settings.optimizer not in OPTIMIZERS:
        raise UsageError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, it is {settings.optimizer!r}")
    check_codec(settings.codec)
    limits = {
        "epochs": (1, 1000),
        "batch_size": (1, 4096),
        "learning_rate": (0, 10),
        "head_learning_rate": (0, 10),
        "weight_decay": (0, 1),
        "adapter_learning_rate": (0, 10),
        "seed": (0, (1 << 63) - 1),
        "lora_rank": (0, 1024),
        "lora_alpha": (1e-3, 1e6),
        "proximal_mu": (0, 1e3),
        "mask_every": (0, 1 << 16),
        "mask_seed": (0, (1 << 63) - 1),
    }
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise UsageError(f"{name} must be from {low} to {high}, it is {value}")
    if settings.mask_every and settings.lora_rank:
        raise UsageError(
            "mask_every and lora_rank exclude each other: entries of the matrices are trained, or adapters"
        )
    return settings


def cost_table(
    spec: ModelSpec,
    data: DataShape,
    settings: TrainSettings,
    calibration: Calibration,
    budget: Budget,
    cached: bool = False,
    adapters: str = "ab",
    ranks: Sequence[int] = (),
) -> list[CostRow]:
    """One row for every suffix depth and rank, without and with gradient checkpointing, each with its best micro-batch and codec.

    Best is the smallest among the fastest (within NO_SLOWER) that fit the memory budget, else the smallest. Depth 0 (the head) has nothing to checkpoint.
    The codec is the settings', or for "auto" the finest whose update is within the upload budget. `adapters`: what is sent of
    LoRA, as in a plan; `ranks`: of the adapters in all blocks of a suffix, none above `settings.lora_rank`, which it is if there are none.
    """
    rows = []
    suffixes = [
        (depth, rank)
        for depth in range(1, deepest_promised(spec, calibration) + 1)
        for rank in ranks or (settings.lora_rank,)
    ]
    for depth, rank in [(0, 0), *suffixes]:
        what = trained(spec, depth, settings, (rank,) * depth, adapters)
        codec = pick_codec(what.update, settings.codec, budget.upload_bytes)
        for checkpointing in (False, True) if depth else (False,):
            tried = [
                cost(spec, data, settings, calibration, what, checkpointing, size, cached, codec)
                for size in micro_batches(min(settings.batch_size, data.num_examples))
            ]
            fitting = [row for row in tried if row.peak_bytes <= budget.memory_bytes]
            if not fitting:
                rows.append(min(tried, key=lambda r: r.peak_bytes))
                continue
            fast = min(r.step_s for r in fitting) * (1 + NO_SLOWER)
            rows.append(min((r for r in fitting if r.step_s <= fast), key=lambda r: r.peak_bytes))
    return rows


def deepest_promised(spec: ModelSpec, calibration: Calibration) -> int:
    """The deepest suffix whose peak can be told: the head alone where there was no memory to measure a block."""
    return 0 if calibration.backend == GRAPH_BACKEND and not calibration.block_peaks else spec.num_blocks


def offered_ranks(spec: ModelSpec, settings: TrainSettings, adapters: str) -> tuple[int, ...]:
    """The ranks that a device's table has in a fleet: the run's, half of it, and so on to 1, as far as MAX_ROWS goes.

    Empty where no adapters are exchanged; the run's alone where each device begins its own.
    """
    if adapters == FRESH:
        return (settings.lora_rank,)
    found: list[int] = []
    rank = settings.lora_rank if adapters else 0
    while rank and len(found) < max(1, (MAX_ROWS - 1) // (2 * spec.num_blocks)):
        found.append(rank)
        rank //= 2
    return tuple(found)


def over_budget(row: CostRow, budget: Budget, epochs: int) -> str:
    """Why a row does not fit, in words; empty if it fits."""
    return ", ".join(_lacking(row, budget, epochs).values())


def budgets_over(row: CostRow, budget: Budget, epochs: int) -> tuple[str, ...]:
    """The budgets that a row does not fit: of "memory", "time" and "upload"."""
    return tuple(_lacking(row, budget, epochs))


def _lacking(row: CostRow, budget: Budget, epochs: int) -> dict[str, str]:
    found = {}
    if row.peak_bytes > budget.memory_bytes:
        found["memory"] = f"memory {mib(row.peak_bytes)} > {mib(budget.memory_bytes)}"
    if budget.time_s is not None and row.total_s(epochs) > budget.time_s:
        found["time"] = f"time {row.total_s(epochs):.0f} s > {budget.time_s:.0f} s"
    if budget.upload_bytes is not None and row.upload_bytes > budget.upload_bytes:
        found["upload"] = f"upload {mib(row.upload_bytes)} > {mib(budget.upload_bytes)}"
    return found


def feasible(rows: Sequence[CostRow], budget: Budget, epochs: int) -> list[CostRow]:
    """The rows that fit all budgets, best first: deepest, of the highest rank, then fastest."""
    fitting = (r for r in rows if not over_budget(r, budget, epochs))
    return sorted(fitting, key=lambda r: (-r.depth, -r.rank, r.epoch_s))


def choose(rows: Sequence[CostRow], budget: Budget, epochs: int) -> CostRow:
    """The deepest suffix that fits.

    Raises:
        DoesNotFit: nothing does; it says what the cheapest candidate would need.
    """
    fitting = feasible(rows, budget, epochs)
    if fitting:
        return fitting[0]
    least = min(rows, key=lambda r: (r.peak_bytes, r.upload_bytes))
    raise DoesNotFit(
        f"not even the head can be trained: {over_budget(least, budget, epochs)}; raise the budget, or choose a smaller model or max_length",
        needed_bytes=least.peak_bytes,
    )


def make_plan(row: CostRow, data: DataShape, settings: TrainSettings) -> Plan:
    """The plan of a chosen row; adapters come out of it as adapters."""
    per_epoch = -(-data.num_examples // settings.batch_size)
    return Plan(row, settings, per_epoch * settings.epochs, adapters="ab" if row.rank else "")


def shrink(plan: Plan, rows: Sequence[CostRow], memory_bytes: int) -> Plan | None:
    """A granted plan made to fit what memory there is now: the same depth and rank, in smaller pieces. None if that is impossible.

    A row of a higher rank serves a lower one, which needs no more.
    """
    if plan.chosen.peak_bytes <= memory_bytes:
        return plan
    asked = plan.chosen
    enough = [r for r in rows if r.depth == asked.depth and r.rank >= asked.rank and bool(r.rank) == bool(asked.rank)]
    smaller = [r for r in enough if r.peak_bytes <= memory_bytes]
    if not smaller:
        return None
    nearest = min(smaller, key=lambda r: (r.rank, r.epoch_s))
    # what is sent stays as granted
    chosen = replace(nearest, rank=asked.rank, codec=asked.codec, upload_bytes=asked.upload_bytes)
    return replace(plan, chosen=chosen)


def smaller_rows(spec: ModelSpec, data: DataShape, calibration: Calibration, plan: Plan) -> list[CostRow]:
    """A plan's row in candidates that need less memory, the largest first: what it can go on as if memory gets short."""
    row, settings = plan.chosen, plan.settings
    what = trained(spec, row.depth, settings, plan.block_ranks, plan.adapters)
    tried = [
        cost(spec, data, settings, calibration, what, checkpointing, size, row.cached, row.codec)
        for size in micro_batches(min(settings.batch_size, data.num_examples))
        for checkpointing in ((False, True) if row.depth else (False,))
    ]
    useful = [t for t in tried if not any(u.peak_bytes <= t.peak_bytes and u.step_s < t.step_s for u in tried)]
    return sorted((r for r in useful if r.peak_bytes < row.peak_bytes), key=lambda r: -r.peak_bytes)


def mib(num_bytes: int) -> str:
    """Bytes for people: MiB with one digit where it is small."""
    value = num_bytes / 2**20
    return f"{value:.1f} MiB" if value < 10 else f"{value:.0f} MiB"
