"""LoRA and masks in a training without a fleet: what it begins from, whether it makes sense, and what comes of it.

Not the files (`peft.py`) nor the arithmetic on weights (`merging.py`). Used by `local.py` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edge_runtime.errors import UsageError
from edge_runtime.layout import A, check_adapters, layout, linear_layers, masked_name, scale, targets
from edge_runtime.merging import as_start, merged
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.peft import Adapter, check_adapter
from edge_runtime.records import Plan, TrainSettings
from edge_runtime.source import Source, add_update
from edge_runtime.weights import MappedTensor

Places = Mapping[str, MappedTensor]


def begun(
    source: Source, given: Adapter, settings: TrainSettings, *, new_head: bool, progress: Callable[[str], None]
) -> tuple[Source, Adapter, TrainSettings]:
    """A model with the head of an adapter, the adapter, and settings that leave room for it.

    Raises:
        ModelError: the adapter is not this model's.
        UsageError: it has a higher rank or other layers than the settings ask for.
    """
    spec, known = source.spec, given.labels == source.spec.labels and not new_head
    if given.head and not known:
        progress("the adapter's head is left out: its labels are not these, or not known")
    given = check_adapter(given if known else replace(given, head={}, labels=None), spec, source.weights)
    source = replace(source, weights={**source.weights, **given.head})
    if settings.lora_rank and settings.lora_rank < given.rank:
        raise UsageError(f"the adapter has rank {given.rank}: ask for no lower --lora-rank than that, or for none")
    layers, wanted = linear_layers(spec), targets(spec, settings.lora_targets)
    if left := [stem for stem in given.scales if f"{stem}.weight" not in wanted]:
        raise UsageError(f"the adapter has {left[0]!r}, which is not among --lora-targets: add it, or give none")
    own = tuple(dict.fromkeys(layers[f"{stem}.weight"] for stem in given.scales))
    rank, names = settings.lora_rank or given.rank, settings.lora_targets or own
    return source, given, replace(settings, lora_rank=rank, lora_targets=names)


def check_lora(spec: ModelSpec, settings: TrainSettings, depth: int | None, given: Adapter | None) -> None:
    """Whether adapters or a mask as asked for make sense for a model.

    Raises:
        UsageError: they do not.
    """
    if depth == 0 and settings.lora_rank and given is None:
        raise UsageError("--depth 0 trains the head alone, which has no adapters: leave --lora-rank away, or go deeper")
    if depth == 0 and settings.mask_every:
        raise UsageError("--depth 0 trains the head alone, all of it: leave --mask-every away, or go deeper")
    if settings.lora_targets and not settings.lora_rank and not settings.mask_every:
        raise UsageError(
            "--lora-targets chooses layers for adapters or a mask: give their --lora-rank too, or --mask-every"
        )
    check_adapters(spec, settings, "--lora-rank")


def beginning(source: Source, given: Adapter | None, plan: Plan, scratch: Path) -> tuple[Places, Places]:
    """The weights that a plan trains on, with a given adapter added into its frozen blocks; what its own adapters begin from."""
    if given is None:
        return source.weights, {}
    from edge_runtime.training.adapters import random_a

    spec, settings = source.spec, plan.settings
    cut = spec.num_blocks - plan.chosen.depth
    weights = merged(spec, source.weights, given, scratch, range(cut))
    fresh = partial(random_a, settings.seed)
    trained = range(cut, spec.num_blocks)
    return weights, as_start(spec, given, settings.lora_rank, scale(settings), trained, scratch, fresh)


def results(
    spec: ModelSpec, plan: Plan, weights: Places, start: Places, given: Adapter | None, update: Path, scratch: Path
) -> tuple[Places, Adapter | None]:
    """The trained model's weights, adapters added in, and the adapters with the head by themselves.

    Args:
        weights, start: from `beginning`.
        given: the adapter that the model began with.
        update: the file of deltas in the plan's layout.
    """
    from edge_runtime.training.adapters import start_of

    settings = plan.settings
    if settings.mask_every:
        return {**weights, **_unmasked(spec, plan, weights, update, scratch)}, None

    def began(tensor: TensorSpec) -> Any:
        own = weights.get(tensor.name)
        return own.array() if own else start_of(start, settings.seed, tensor.name, tensor.shape)

    found = add_update(layout(spec, plan), began, update, scratch)
    for tensor in layout(spec, replace(plan, adapters="ab")) if plan.adapters == "b" else ():
        if tensor.name not in found:  # an A that stayed as it was
            path = scratch / f"{tensor.name}.still"
            began(tensor).astype("<f4").tofile(path)
            found[tensor.name] = MappedTensor(str(path), 0, tensor.shape)
    changed = {**weights, **{name: place for name, place in found.items() if name in weights}}
    if not settings.lora_rank:
        return changed, None
    tensors = {name: place for name, place in found.items() if name not in weights}
    scales = {name.removesuffix(A): scale(settings) for name in tensors if name.endswith(A)}
    trained = range(spec.num_blocks - plan.chosen.depth, spec.num_blocks)
    head = {t.name: changed[t.name] for t in spec.suffix(0)}
    changed = merged(spec, changed, Adapter(tensors, scales), scratch, trained)
    if given:  # and in the blocks that were not trained
        tensors |= {name: place for name, place in given.tensors.items() if name not in tensors}
        scales |= {stem: own for stem, own in given.scales.items() if stem not in scales}
    return changed, Adapter(tensors, scales, head, spec.labels, spec.max_length)


def _unmasked(spec: ModelSpec, plan: Plan, weights: Places, update: Path, scratch: Path) -> Places:
    """What a sparse training made of its tensors, whole: files below `scratch`, one tensor in memory at a time."""
    from edge_runtime.masks import indices

    settings = plan.settings
    matrices = {masked_name(t): t for t in spec.tensors if t.name in targets(spec, settings.lora_targets)}

    def places(matrix: TensorSpec) -> Any:
        return indices(settings.mask_seed, matrix.name, matrix.size, settings.mask_every)

    def began(tensor: TensorSpec) -> Any:
        matrix = matrices.get(tensor.name)
        return weights[matrix.name].array().reshape(-1)[places(matrix)] if matrix else weights[tensor.name].array()

    found = dict(add_update(layout(spec, plan), began, update, scratch))
    for name in matrices.keys() & found.keys():
        matrix, path = matrices[name], scratch / f"{matrices[name].name}.whole"
        whole = weights[matrix.name].array()
        whole.reshape(-1)[places(matrix)] = found.pop(name).array()
        whole.astype("<f4", copy=False).tofile(path)
        found[matrix.name] = MappedTensor(str(path), 0, matrix.shape)
    return found
