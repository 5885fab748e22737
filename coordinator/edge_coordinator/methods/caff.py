"""CAFF: each device trains the deepest suffix that fits its memory, time and upload.

Pfeiffer, Ahmed, Khalili, Henkel: "Efficient Federated Finetuning of Tiny Transformers with Resource-Constrained Devices",
arXiv 2411.07826. Depth t_c = max { t : M(t) <= M_c, O(t) <= O_c, U(t) <= U_c }; aggregation per layer over the devices
that trained it; the head is always trained. Reading: a device's rows already satisfy its three budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_runtime.records import CostRow

Tables = Mapping[str, Sequence[CostRow]]


def choose(tables: Tables, num_blocks: int) -> dict[str, CostRow | None]:
    """the deepest suffix that fits each device's budgets"""
    return {device: deepest(rows) for device, rows in tables.items()}


def deepest(rows: Sequence[CostRow]) -> CostRow | None:
    """The deepest row, the fastest among equals."""
    return max(rows, key=lambda r: (r.depth, -r.epoch_s), default=None)


def at_depth(rows: Sequence[CostRow], depth: int) -> CostRow | None:
    """The fastest row of one depth."""
    return min((r for r in rows if r.depth == depth), key=lambda r: r.epoch_s, default=None)
