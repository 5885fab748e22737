"""What an update consists of: which linear layers have LoRA adapters or masks, and in which order their values come.

Both sides of the wire derive it from the model's shape and the plan, so an update needs no header. Pure, without numpy.
Not the adapters' values (`training/adapters.py`), not their bytes (`encoding.py`). Imports the model and the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_runtime.errors import UsageError
from edge_runtime.graphs.bundle import common_prefix
from edge_runtime.kinds import FRESH
from edge_runtime.model import ModelSpec, TensorSpec, load_family
from edge_runtime.records import Plan, TrainSettings

A, B = ".lora_a", ".lora_b"  # in place of ".weight": (rank, inputs) and (outputs, rank)
MASKED = ".masked"  # in place of ".weight": the trained entries of a matrix (`masks.py`)
ADAPTERS = ("", "ab", "b", FRESH)


def layout(spec: ModelSpec, plan: Plan) -> tuple[TensorSpec, ...]:
    """The tensors of an update, in its order.

    With `plan.adapters` A and B (for "b" only B) of each adapted layer in the model's order, then the head; with
    `mask_every` the masked entries of each such layer, then the head; else the suffix.

    Raises:
        UsageError: a target is no linear layer of the model.
    """
    return sent(spec, plan.chosen.depth, plan.block_ranks, plan.settings, plan.adapters)


def sent(
    spec: ModelSpec, depth: int, ranks: Sequence[int], settings: TrainSettings, adapters: str
) -> tuple[TensorSpec, ...]:
    """As `layout`, for the last `depth` blocks with adapters of these ranks."""
    if settings.mask_every:
        return (*masked_tensors(spec, depth, settings), *spec.suffix(0))
    if not adapters or not any(ranks):
        return spec.suffix(depth)
    return (*adapter_tensors(spec, _numbered(spec, ranks), settings.lora_targets, adapters), *spec.suffix(0))


def masked_tensors(spec: ModelSpec, depth: int, settings: TrainSettings) -> list[TensorSpec]:
    """The masked entries (entries,) of each matrix that `lora_targets` choose in the last `depth` blocks."""
    blocks = range(spec.num_blocks - depth, spec.num_blocks)
    return [
        TensorSpec(masked_name(t), (-(-t.size // settings.mask_every),), t.part)
        for t, _ in adapted(spec, dict.fromkeys(blocks, 1), settings.lora_targets)
    ]


def masked_name(matrix: TensorSpec) -> str:
    """The name of a matrix's masked entries."""
    return matrix.name.removesuffix(".weight") + MASKED


def place_bytes(every: int) -> int:
    """What tells the place of a masked entry in its run of `every`."""
    return 1 if every <= 256 else 2


def adapter_tensors(
    spec: ModelSpec, ranks: Mapping[int, int], names: Sequence[str], adapters: str = "ab"
) -> list[TensorSpec]:
    """A and B, or for "b" only B, of each adapted layer in the model's order.

    Args:
        ranks: of each adapted block by its number.
        names: of the layers, as for `targets`.
    """
    found: list[TensorSpec] = []
    for tensor, rank in adapted(spec, ranks, names):
        (outputs, inputs), stem = tensor.shape, tensor.name.removesuffix(".weight")
        if adapters != "b":
            found.append(TensorSpec(stem + A, (rank, inputs), tensor.part))
        found.append(TensorSpec(stem + B, (outputs, rank), tensor.part))
    return found


def adapted(spec: ModelSpec, ranks: Mapping[int, int], names: Sequence[str]) -> list[tuple[TensorSpec, int]]:
    """The matrices that have an adapter, each with its rank, in the model's order. Args: as `adapter_tensors`."""
    chosen = targets(spec, names)
    return [(t, ranks[t.part]) for t in spec.tensors if t.part in ranks and t.name in chosen]


def ranks_of(spec: ModelSpec, plan: Plan) -> dict[int, int]:
    """The rank of each adapted block by its number; empty where the blocks themselves are trained."""
    return _numbered(spec, plan.block_ranks)


def _numbered(spec: ModelSpec, ranks: Sequence[int]) -> dict[int, int]:
    """The ranks of the last blocks by their numbers, without those of rank 0."""
    return {spec.num_blocks - len(ranks) + i: rank for i, rank in enumerate(ranks) if rank}


def scale(settings: TrainSettings) -> float:
    """What B A is multiplied by: one number for the whole run (Hu et al. 2021, arXiv 2106.09685: alpha / r)."""
    return settings.lora_alpha / settings.lora_rank


def targets(spec: ModelSpec, names: Sequence[str]) -> frozenset[str]:
    """The full names of all matrices that `names` choose; all blocks' linear layers where there are none.

    A name is one of the family's short ones ("q"), or the end of a layer's own ("attention.self.query", "query").

    Raises:
        UsageError: a name chooses nothing; it lists what can be chosen.
    """
    layers = linear_layers(spec)
    if not names:
        return frozenset(layers)
    short: Mapping[str, str] = getattr(load_family(spec.family), "LAYER_NAMES", {})
    found: set[str] = set()
    for name in names:
        exact = [full for full, layer in layers.items() if layer == short.get(name, name)]
        chosen = exact or [full for full in layers if full.endswith(f".{name}.weight")]
        if not chosen:
            known = ", ".join(dict.fromkeys([*short, *layers.values()]))
            raise UsageError(f"{name!r} is no linear layer of this model's blocks: choose from {known}")
        found |= set(chosen)
    return frozenset(found)


def check_adapters(spec: ModelSpec, settings: TrainSettings, flag: str) -> None:
    """Whether a model has the layers that adapters or masks are asked for, and room for their rank. Args: flag: what the rank is called.

    Raises:
        UsageError: it has not.
    """
    chosen = targets(spec, settings.lora_targets)
    smallest = min((min(t.shape) for t in spec.tensors if t.name in chosen), default=0)
    if settings.lora_rank > smallest:
        raise UsageError(
            f"{flag} {settings.lora_rank} is above the smaller side of a matrix that it is for, {smallest}: "
            "an adapter of that rank can do no more than the matrix itself"
        )


def linear_layers(spec: ModelSpec) -> dict[str, str]:
    """The matrices of the blocks: full name -> the layer's name within its block, without ".weight"."""
    blocks: dict[int, list[TensorSpec]] = {}
    for tensor in spec.tensors:
        if 0 <= tensor.part < spec.num_blocks:
            blocks.setdefault(tensor.part, []).append(tensor)
    found: dict[str, str] = {}
    for tensors in blocks.values():
        begin = len(common_prefix([t.name for t in tensors]))
        found |= {t.name: t.name[begin:].removesuffix(".weight") for t in tensors if t.is_adapted}
    return found


def misfit(spec: ModelSpec, plan: Plan) -> str:
    """Why a plan's adapters do not hold together; empty if they do. For plans from the network."""
    row, settings = plan.chosen, plan.settings
    if plan.adapters not in ADAPTERS:
        return f"adapters {plan.adapters!r} are not known"
    if row.depth > spec.num_blocks:
        return f"depth {row.depth} of a model with {spec.num_blocks} blocks"
    if plan.ranks and len(plan.ranks) != row.depth:
        return f"{len(plan.ranks)} ranks for {row.depth} blocks"
    if max(plan.ranks, default=row.rank) > row.rank or row.rank > settings.lora_rank:
        return f"ranks {plan.ranks or row.rank} above {min(row.rank, settings.lora_rank)}"
    if plan.adapters and not (settings.lora_rank and (row.rank or not row.depth)):
        return "adapters without a rank"
    if settings.mask_every and (plan.adapters or settings.lora_rank):
        return f"a mask with adapters {plan.adapters!r} of rank {settings.lora_rank}"
    try:
        targets(spec, settings.lora_targets)
    except UsageError as error:
        return str(error)
    return ""
