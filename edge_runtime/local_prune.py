"""A smaller model without any data or training, by the size of its weights: what `edge-runtime prune` does.

Whole heads and channels go, those whose weights are smallest (magnitude pruning; heads and channels as Michel et al.,
arXiv 1905.10650, and FedSpine, arXiv 2501.02438, take them), the same share of both. Not pruning in a fleet, which is guided by
what devices train. Imports the pruning and the sources; no torch.

Memory: some rows of one matrix while it chooses, one smaller tensor while it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.errors import UsageError
from edge_runtime.importance import Scores, choose, sums
from edge_runtime.model import ModelSpec
from edge_runtime.model_folder import check_model_folder, save_folder
from edge_runtime.pruned_weights import write_pruned
from edge_runtime.pruning import CHANNELS, HEADS, Kept, block_widths, groups_of, pruned_spec
from edge_runtime.source import DEFAULT_FAMILY, find_checkpoint, open_source
from edge_runtime.store import cache_folder, scratch_folder
from edge_runtime.weights import MappedTensor, release_pages

SCRATCH = "pruned."  # in the cache folder, and the number of the process


@dataclass(frozen=True)
class Pruned:
    """What came of it.

    Attributes:
        folder: the smaller model.
        sparsity: the share of the parameters of the blocks' matrices that is gone.
        widths_before, widths: heads and channels of each block.
        parameters_before, parameters: of the whole model, embedding and head among them.
    """

    folder: Path
    sparsity: float
    widths_before: tuple[tuple[int, int], ...]
    widths: tuple[tuple[int, int], ...]
    parameters_before: int
    parameters: int


def prune(
    model: str,
    sparsity: float,
    out: Path,
    *,
    family: str = DEFAULT_FAMILY,
    progress: Callable[[str], None] = lambda line: None,
) -> Pruned:
    """Write a model without the heads and channels of the smallest weights as a checkpoint folder.

    Args:
        model: a checkpoint folder, an alias, a hub id or an agent's folder; without a head it stays without.
        sparsity: the share of heads, and of channels, that goes.
        out: the folder to write.

    Raises:
        UsageError: whole heads and channels do not allow this sparsity, the family cannot be pruned, or `out` holds other things.
        ModelError: there is no such model, or it is damaged.
    """
    if not 0 < sparsity < 1:  # NaN too
        raise UsageError(f"the sparsity must be above 0 and below 1, it is {sparsity}")
    check_model_folder(out)
    checkpoint, cache = find_checkpoint(model, family=family, progress=progress), cache_folder()
    source = open_source(checkpoint, ("no", "yes"), cache)
    spec, kept = source.spec, by_magnitude(source.spec, source.weights, sparsity)
    smaller = pruned_spec(spec, kept)
    with scratch_folder(cache, SCRATCH) as scratch:
        weights = write_pruned(spec, kept, source.weights, scratch / "blocks.safetensors")
        save_folder(out, smaller, weights, source.tokenizer, has_head=checkpoint.labels is not None)
    parts = range(-1, spec.num_blocks + (checkpoint.labels is not None))
    before, after = (sum(t.size for t in of.tensors if t.part in parts) for of in (spec, smaller))
    widths = tuple(block_widths(spec)), tuple(block_widths(smaller))
    return Pruned(out, kept.sparsity(spec), *widths, before, after)


def by_magnitude(spec: ModelSpec, weights: Mapping[str, MappedTensor], sparsity: float) -> Kept:
    """What is kept at this sparsity: the heads, and the channels, of the largest weights among all blocks.

    A group's size is the sum of its absolute weights as a share of its block's. One of each stays in every block.

    Raises:
        UsageError: then too few groups would go; it says how far the model can be pruned.
    """
    for number, group in enumerate((HEADS, CHANNELS)):
        _check(sum(widths[number] for widths in block_widths(spec)), spec.num_blocks, sparsity, group)
    scores, full = Scores(spec), Kept.full(spec)
    for tensor in spec.tensors:
        if tensor.is_adapted and any(groups_of(spec, tensor)):
            matrix = weights[tensor.name].array()
            no_adapter = np.zeros((0, matrix.shape[1])), np.zeros((matrix.shape[0], 0))
            scores.add(tensor, *sums("magnitude", matrix, no_adapter, no_adapter, 0.0), full)
            release_pages(matrix)
    return choose(spec, full, scores, sparsity)


def _check(count: int, num_blocks: int, sparsity: float, what: str) -> None:
    left = count - int(sparsity * count + 0.5)
    if left < num_blocks:
        most = 1 - num_blocks / count
        raise UsageError(
            f"a sparsity of {sparsity} would leave {left} of {count} {what}, fewer than the model's {num_blocks} blocks: "
            f"at most {most:.3f} is possible"
        )
