"""What FedSpine and the pruning baselines share: what each device keeps, and how adapters of different shapes become one model.

Yao et al., arXiv 2501.02438. A device goes on with the heads and channels that it has kept, and its sparsity only grows. Per entry
of a matrix over the devices i that still have it (m_i[e] = 1; reading), with q_i = n_i ||B_i A_i||_F of that matrix,

    dW[e] = sum q_i m_i[e] (B_i A_i)[e] / sum q_i m_i[e]

kept as it was where nobody has it; then the best product of the run's rank, B = U_r S_r and A = V_r^T, of the whole shape, of which
a device gets the first rows and columns at what it has kept. The head is averaged by examples. The fleet's own pruned model, which
is evaluated and exported, keeps at the devices' mean sparsity the groups that most of them keep, each device counting with its q
of all matrices. A device that the run does not know begins with what the fleet keeps. Memory: two matrices of float64 and what the
product needs. Not how far and by what importance devices prune (`fedspine.py`, `prune_baselines.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edge_coordinator.methods.best_product import best_product
from edge_coordinator.methods.hetlora import product_norm, weights
from edge_coordinator.methods.method import Change, Collected, Options, State
from edge_runtime.layout import A, B
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.prune_plan import kept_of
from edge_runtime.records import Pruning

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

EVERY = 20  # steps between two prunings: the paper's best
NEW = {"kept": "", "sparsity": 0.0}  # what a device keeps in the first round: all


def prune_rounds(state: State, options: Options) -> int:
    """The rounds in which devices prune: as fleet.toml says, else as the run began with it, else half of the rounds."""
    return options.prune_rounds or int(state.get("prune_rounds", 0)) or max(1, round(options.rounds / 2))


def known(state: State, device: str) -> Mapping[str, Any]:
    """What a device has kept and its sparsity; of one that the run does not know the fleet's."""
    found: Mapping[str, Any] = state.get("devices", {}).get(device) or state.get("fleet") or NEW
    return found


def pruning(state: State, device: str, to: float, by: str) -> Pruning:
    """How a device prunes in a round. Args: to: the sparsity to reach, no less than it has."""
    return Pruning(bytes.fromhex(known(state, device)["kept"]), to, EVERY, by)


def kept(state: State) -> bytes:
    """What the fleet's pruned model keeps."""
    return bytes.fromhex(state.get("fleet", NEW)["kept"])


def shares(collected: Collected) -> dict[str, float]:
    """q_i of all matrices as shares of their sum, by device; of the examples where nobody has changed anything."""
    squares = dict.fromkeys(collected.reports, 0.0)
    for matrix in collected.adapted:
        for one in collected.trained(matrix):
            squares[one.device] += product_norm(*one.load()) ** 2
    examples = [report.num_examples for report in collected.reports.values()]
    found = weights([n * math.sqrt(s) for n, s in zip(examples, squares.values(), strict=True)], examples)
    return dict(zip(squares, found, strict=True))


def remembered(state: State, collected: Collected, of: Mapping[str, float]) -> dict[str, Any]:
    """The state after a round: what its devices have kept, and what most of all do. Args: of: their shares."""
    devices, asked = dict(state.get("devices", {})), state["asked"]
    for device, report in collected.reports.items():
        weight = of[device] * sum(r.num_examples for r in collected.reports.values())
        devices[device] = {"kept": report.kept.hex(), "sparsity": asked[device]["to"], "weight": weight}
    return {**state, "devices": devices, "fleet": majority(collected.spec, devices.values())}


def majority(spec: ModelSpec, devices: Any) -> dict[str, Any]:
    """What most devices keep, at their mean sparsity. Args: devices: what the state says of each."""
    from edge_runtime.importance import Scores, choose
    from edge_runtime.pruning import kept_groups

    votes, total = Scores(spec), sum(d["weight"] for d in devices)
    for device in devices:
        has = kept_of(spec, bytes.fromhex(device["kept"]))
        for block in range(spec.num_blocks):
            heads, channels = kept_groups(spec, has, block)
            votes.heads[block] += device["weight"] / total * heads
            votes.channels[block] += device["weight"] / total * channels
    sparsity = sum(d["weight"] * d["sparsity"] for d in devices) / total
    chosen = choose(spec, kept_of(spec, b""), votes, sparsity, by_block=False)
    return {"kept": chosen.encode().hex(), "sparsity": sparsity}


def changes(collected: Collected) -> Iterator[Change]:
    """A and B as above, and the head's mean."""
    yield from collected.means()
    for matrix in collected.adapted:
        mean = mean_product(matrix, collected)
        if mean is None or not mean.any():  # nobody trained it, or to nothing: no directions to choose
            continue
        a, b = best_product(mean, collected.adapter(matrix)[0])
        stem = matrix.name.removesuffix(".weight")
        yield Change(stem + A, a, replaces=True)
        yield Change(stem + B, b, replaces=True)


def mean_product(matrix: TensorSpec, collected: Collected) -> Array | None:
    """The weighted mean of B_i A_i (outputs, inputs) entry by entry, float64, device after device; None where there is none."""
    import numpy as np

    trained = collected.trained(matrix)
    if not trained:
        return None
    norms = [one.num_examples * product_norm(*one.load()) for one in trained]
    total, weight = np.zeros(matrix.shape), np.zeros(matrix.shape)
    for share, one in zip(weights(norms, [t.num_examples for t in trained]), trained, strict=True):
        rows, columns = (np.arange(n) if p is None else p for n, p in zip(matrix.shape, one.places, strict=True))
        a, b = one.load()
        total[rows[:, None], columns] += share * (b @ a)
        weight[rows[:, None], columns] += share
    nobody = weight == 0
    if nobody.any():
        a, b = collected.adapter(matrix)
        total[nobody] = (b @ a)[nobody]
        weight[nobody] = 1.0
    total /= weight
    return total
