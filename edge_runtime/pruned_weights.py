"""The smaller tensors of a pruned model, in a file. What is kept, and of which rows and columns it is made, is `pruning.py`'s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.pruning import Kept, cut, cut_rows, pruned_spec
from edge_runtime.weights import MappedTensor, release_pages, write_arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def write_pruned(
    spec: ModelSpec, kept: Kept, weights: Mapping[str, MappedTensor], path: Path
) -> dict[str, MappedTensor]:
    """The weights of the model that is left. Tensors that become smaller go into one file, atomically; the others stay.

    Memory: one tensor.

    Args:
        spec, weights: the whole model.
        path: the safetensors file; not written where nothing becomes smaller.
    """
    smaller = {t.name: t.shape for t in pruned_spec(spec, kept).tensors}

    def make(tensor: TensorSpec) -> Array:
        whole = weights[tensor.name].array()
        found = cut(whole, *cut_rows(spec, kept, tensor))
        release_pages(whole)
        return found

    items = [(t.name, smaller[t.name], lambda t=t: make(t)) for t in spec.tensors if smaller[t.name] != t.shape]
    return {**weights, **(write_arrays(path, items) if items else {})}
