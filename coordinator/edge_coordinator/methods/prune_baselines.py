"""The baselines of FedSpine: every device the same sparsity and rank, other importance (`edge_runtime/importance.py`).

`prune-magnitude` is federated magnitude pruning: |W_0 + s B A| summed over a head or channel; the fleet's sparsity follows over the
rounds t of T = `prune_rounds` the cubic schedule S (1 - (1 - t / T)^3) of Zhu and Gupta, arXiv 1710.01878. `prune-oneshot` is the
criterion of LLM-Pruner (Ma et al., arXiv 2305.11627), first-order Taylor, in a fleet: a device prunes all at once, after the first
steps of its first round, and only recovers from then on. Reading: the gradient of a frozen matrix is what its adapter moved by, as
FedSpine has it. Adapters are of the largest rank that fits each device; shapes are put together as `pruned.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edge_coordinator.methods import pruned
from edge_coordinator.methods.fedspine import method
from edge_coordinator.methods.method import Change, Choice, Cohort, Collected, Configure, State, by_ask
from edge_runtime.asks import WIDEST


def _by(rule: str, once: bool) -> Configure:
    """The plans of a baseline."""

    def configure(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
        last = 1 if once else pruned.prune_rounds(state, cohort.options)
        share = 1 - (1 - min(1.0, cohort.number / last)) ** 3
        rows, _ = by_ask(WIDEST)(state, cohort)
        choices, asked = {}, {}
        for device, choice in sorted(rows.items()):
            if choice.row is None:
                choices[device] = choice
                continue
            to = max(pruned.known(state, device)["sparsity"], share * cohort.options.sparsity)
            choices[device] = Choice(choice.row, pruning=pruned.pruning(state, device, to, rule))
            asked[device] = {"to": to}
        return choices, {**state, "asked": asked, "prune_rounds": last}

    return configure


def aggregate(state: State, collected: Collected) -> tuple[Iterator[Change], State]:
    """The next adapters, and what everybody has kept."""
    return pruned.changes(collected), pruned.remembered(state, collected, pruned.shares(collected))


MAGNITUDE = method("prune-magnitude", _by("magnitude", once=False), aggregate)
ONESHOT = method("prune-oneshot", _by("taylor", once=True), aggregate)
