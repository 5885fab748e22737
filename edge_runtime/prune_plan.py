"""What a plan with pruning says: when a device prunes and how far, what it must have kept in the end, what its update consists of.

FedSpine (Yao et al., arXiv 2501.02438): a device alternates structured pruning with steps that recover. Both sides of the wire use
this. Not which groups go (`importance.py`), not the training (`training/pruned.py`). Imports no numpy, but in `planned`.
"""

from __future__ import annotations

from edge_runtime.errors import EdgeError, UsageError, WireError
from edge_runtime.layout import layout
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.pruning import Kept, block_widths, decode_kept, pruned_spec
from edge_runtime.records import MAX_KEPT_BYTES, Plan

RULES = ("lora", "magnitude", "taylor")
ONCE = "taylor"  # prunes at its first pruning all that it ever does


def prune_steps(steps: int, every: int) -> tuple[int, ...]:
    """The steps after which a round of `steps` steps is pruned: each `every`, or sooner in a short round, never the last but of one."""
    apart = min(every, max(1, steps // 2))
    return tuple(range(apart, steps, apart)) or (1,)


def stages(plan: Plan, begun: float) -> dict[int, float]:
    """Step -> the sparsity that the model is pruned to after it; empty where it has that sparsity already.

    The cubic schedule s_t = S (1 - (1 - t / T)^3) of Zhu and Gupta, arXiv 1710.01878, between what the round begins with and its end.

    Args: begun: the sparsity that the device begins with.
    """
    pruning = plan.pruning
    if pruning is None or pruning.to <= begun:
        return {}
    places = prune_steps(plan.steps, pruning.every)
    if pruning.by == ONCE:
        return {places[0]: pruning.to}
    count = len(places)
    way = {step: 1 - (1 - (number + 1) / count) ** 3 for number, step in enumerate(places)}
    return {step: pruning.to if share == 1 else begun + (pruning.to - begun) * share for step, share in way.items()}


def time_share(spec: ModelSpec, plan: Plan) -> float:
    """The predicted seconds of a plan's steps as a share of the whole model's: what is left of the blocks' matrices, step by step.

    1 without pruning. Errors as `kept_of`.
    """
    if plan.pruning is None or not plan.steps:
        return 1.0
    sparsity = kept_of(spec, plan.pruning.kept).sparsity(spec)
    of, total = stages(plan, sparsity), 0.0
    for step in range(1, plan.steps + 1):
        total += 1 - sparsity
        sparsity = of.get(step, sparsity)
    return total / plan.steps


def kept_of(spec: ModelSpec, kept: bytes) -> Kept:
    """What of the whole model is kept; of no bytes all.

    Raises:
        WireError: the bytes are not of this model.
        UsageError: the model's family cannot be pruned.
    """
    return decode_kept(spec, kept) if kept else Kept.full(spec)


def spec_of(spec: ModelSpec, kept: bytes) -> ModelSpec:
    """The model that is left, the whole one of no bytes. Errors as `kept_of`."""
    if not kept:
        return spec
    return pruned_spec(spec, kept_of(spec, kept))


def numbers_kept(spec: ModelSpec, begun: Kept, sparsity: float) -> tuple[int, int]:
    """How many heads and channels a model of this sparsity keeps in all, at least one of each in each block.

    The same share of both, to the nearest, so that a higher sparsity never keeps more; no more than `begun` has.
    """
    widths, blocks = block_widths(spec), range(spec.num_blocks)
    found = []
    for all_, has in zip(zip(*widths, strict=True), (begun.num_heads, begun.num_channels), strict=True):
        there = sum(has(block) for block in blocks)
        found.append(min(there, max(spec.num_blocks, sum(all_) - int(sparsity * sum(all_) + 0.5))))
    return found[0], found[1]


def sent(spec: ModelSpec, plan: Plan, kept: bytes = b"") -> tuple[TensorSpec, ...]:
    """The tensors of a plan's update in its order, in the shapes of what is kept at the end. Errors as `kept_of` and `layout`."""
    return layout(spec_of(spec, kept), plan)


def planned(spec: ModelSpec, plan: Plan) -> tuple[TensorSpec, ...]:
    """As `sent`, before it is known what will be kept: of just so many values, since the sparsity says how many groups are.

    In a codec with scales the bytes may differ by some, as the groups lie among the blocks.
    """
    if plan.pruning is None:
        return layout(spec, plan)
    from edge_runtime.importance import any_kept

    kept = any_kept(spec, kept_of(spec, plan.pruning.kept), plan.pruning.to)
    return sent(spec, plan, kept.encode())


def misfit(spec: ModelSpec, plan: Plan) -> str:
    """Why a plan's pruning does not hold together; empty if it does, or if there is none. For plans from the network."""
    pruning = plan.pruning
    if pruning is None:
        return ""
    if pruning.by not in RULES:
        return f"pruning by {pruning.by!r} is not known here"
    if plan.adapters != "ab" or plan.chosen.depth != spec.num_blocks or plan.settings.lora_targets:
        return "pruning without adapters in all matrices of all blocks"
    if plan.settings.proximal_mu:
        return "pruning with proximal_mu: what is pruned has no start to be held near"
    try:
        kept_of(spec, pruning.kept)
    except EdgeError as error:
        return str(error)
    return ""


def offer_misfit(spec: ModelSpec, plan: Plan, kept: bytes) -> str:
    """Why what an update says it has kept is not what its plan asks for; empty if it is."""
    pruning = plan.pruning
    if pruning is None:
        return "the plan prunes nothing" if kept else ""
    if not kept:
        return "the update does not say what it has kept"
    try:
        found, begun = kept_of(spec, kept), kept_of(spec, pruning.kept)
    except WireError as error:
        return str(error)
    if not found.within(begun):
        return "the update keeps what its plan did not have"
    there = tuple(sum(of(b) for b in range(spec.num_blocks)) for of in (found.num_heads, found.num_channels))
    if there != (wanted := numbers_kept(spec, begun, pruning.to)):
        return f"the update keeps {there[0]} heads and {there[1]} channels, the plan {wanted[0]} and {wanted[1]}"
    return ""


def check_prunable(spec: ModelSpec) -> None:
    """Whether a fleet can prune a model.

    Raises:
        UsageError: its family cannot be pruned, or what is kept of it would not fit into a grant.
    """
    if (size := len(kept_of(spec, b"").encode())) > MAX_KEPT_BYTES:
        raise UsageError(
            f"what is kept of this model takes {size} bytes, a plan has room for {MAX_KEPT_BYTES}: take a smaller one"
        )
