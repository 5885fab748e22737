"""LoRA with one rank: every device trains adapters of the run's rank, and A and B are averaged separately.

LoRA itself is Hu et al., arXiv 2106.09685: a frozen matrix W becomes W + (alpha / r) B A, A (r, inputs), B (outputs, r).
`lora` is FedIT (Zhang et al., arXiv 2305.05644): with p_k = n_k / sum n,

    A <- sum p_k A_k        B <- sum p_k B_k

whose product is not the mean of the products. `ffa-lora` (Sun et al., arXiv 2403.12313) leaves A at its random start, so that
sum p_k (B_k A) = (sum p_k B_k) A is exact, and only B is sent. Both ask for all blocks at the one rank; a device that cannot is
left out, as with `full`. `lora-suffix` is ours: the same rank in the deepest suffix that fits, averaged layer by layer, as CAFF.
The sums are the exact ones of every tensor (`aggregate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_coordinator.methods.caff import at_depth, deepest
from edge_coordinator.methods.method import Choice, Cohort, State
from edge_runtime.records import CostRow


def everywhere(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
    """adapters of one rank in all blocks, A and B averaged separately (FedIT)"""
    rank, depth = cohort.settings.lora_rank, cohort.num_blocks
    return {d: Choice(at_depth(of_rank(rows, rank), depth)) for d, rows in cohort.tables.items()}, state


def only_b(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
    """as lora with A frozen at its random start: only B is trained and sent"""
    return everywhere(state, cohort)


def suffix(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
    """adapters of one rank in the deepest suffix that fits each device's budgets"""
    rank = cohort.settings.lora_rank
    return {device: Choice(deepest(of_rank(rows, rank))) for device, rows in cohort.tables.items()}, state


def largest_rank(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
    """Adapters in all blocks, of the largest rank that fits each device's budgets; the fastest among equals."""
    full = {d: [r for r in rows if r.depth == cohort.num_blocks] for d, rows in cohort.tables.items()}
    return {d: Choice(max(rows, key=lambda r: (r.rank, -r.epoch_s), default=None)) for d, rows in full.items()}, state


def of_rank(rows: Sequence[CostRow], rank: int) -> list[CostRow]:
    """The rows of one rank, and those of the head alone, which have none."""
    return [row for row in rows if row.rank == rank or row.depth == 0]
