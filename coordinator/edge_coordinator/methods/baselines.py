"""The baselines that differ from CAFF in the plan alone (`docs/methods.md`).

`full` and `exclusive` plan alike where somebody cannot train everything: `exclusive` leaves that device out of the round,
`full` is FedAvg as published (McMahan et al., arXiv 1602.05629) and says that the device would have to.
"""

from __future__ import annotations

from edge_coordinator.methods.caff import Tables, at_depth, deepest
from edge_runtime.records import CostRow


def full(tables: Tables, num_blocks: int) -> dict[str, CostRow | None]:
    """FedAvg over all blocks and the head; a device that cannot has no part"""
    return {device: at_depth(rows, num_blocks) for device, rows in tables.items()}


def head(tables: Tables, num_blocks: int) -> dict[str, CostRow | None]:
    """only the task head, on every device"""
    return {device: at_depth(rows, 0) for device, rows in tables.items()}


def straggler(tables: Tables, num_blocks: int) -> dict[str, CostRow | None]:
    """every device trains the depth of the weakest that can train anything"""
    depths = [row.depth for rows in tables.values() if (row := deepest(rows))]
    weakest = min(depths, default=0)
    return {device: at_depth(rows, weakest) for device, rows in tables.items()}


def exclusive(tables: Tables, num_blocks: int) -> dict[str, CostRow | None]:
    """only devices that can train everything take part"""
    return full(tables, num_blocks)
