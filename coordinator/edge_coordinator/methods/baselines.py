"""The baselines that differ from CAFF in the plan alone (`docs/methods.md`).

`full` and `exclusive` plan alike where somebody cannot train everything: `exclusive` leaves that device out of the round,
`full` is FedAvg as published (McMahan et al., arXiv 1602.05629) and says that the device would have to. What a device is asked for
says `edge_runtime/asks.py`; only `straggler` must see the whole cohort.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_coordinator.methods.method import Choice, Cohort, Method, State, alone
from edge_runtime.asks import ASKS, deepest, fastest


def weakest(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
    """The depth of the weakest device that can train anything, on all of them."""
    depths = [row.depth for rows in cohort.tables.values() if (row := deepest(rows))]
    depth = min(depths, default=0)
    return {d: Choice(fastest([r for r in rows if r.depth == depth])) for d, rows in cohort.tables.items()}, state


FULL = alone("full")
HEAD = alone("head")
STRAGGLER = Method(ASKS["straggler"].summary, weakest)
EXCLUSIVE = alone("exclusive")
