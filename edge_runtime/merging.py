"""Adapters on disk and the weights that they belong to: added in, or made what a training begins from. Files, never copies in memory.

Not the files of an adapter (`peft.py`), not the training (`training/adapters.py`). Imports numpy inside functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError
from edge_runtime.layout import A, B
from edge_runtime.model import ModelSpec
from edge_runtime.peft import Adapter, check_adapter, read_adapter
from edge_runtime.source import Checkpoint, Source, find_checkpoint, open_source
from edge_runtime.store import cache_folder, scratch_folder
from edge_runtime.version_weights import pieces
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

MAX_LABELS = 1 << 16


def merged(
    spec: ModelSpec, weights: Mapping[str, MappedTensor], adapter: Adapter, folder: Path, parts: Container[int]
) -> dict[str, MappedTensor]:
    """The weights with the adapter's layers of these parts added in, W + scale * B A, as files below `folder`.

    Holds some rows of one matrix in memory.
    """
    result = dict(weights)
    for tensor in spec.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem not in adapter.scales or tensor.part not in parts:
            continue
        a, b = adapter.tensors[stem + A], adapter.tensors[stem + B]
        path = folder / f"{stem}.merged"
        with path.open("wb") as file:
            file.writelines(piece.tobytes() for piece in pieces(weights[tensor.name], a, b, adapter.scales[stem]))
        result[tensor.name] = MappedTensor(str(path), 0, tensor.shape)
    return result


def as_start(
    spec: ModelSpec, adapter: Adapter, rank: int, scale: float, parts: Container[int], folder: Path, fresh: Callable[[str, int, int], Array]
) -> dict[str, MappedTensor]:  # fmt: skip
    """What training of adapters of one rank and scale begins from: the same sums, as files below `folder`.

    B takes the difference of the scales; rows of A beyond the adapter's rank come from `fresh(name, rank, inputs)`, and their
    columns of B are zero.
    """
    import numpy as np

    found = {}
    for tensor in spec.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem not in adapter.scales or tensor.part not in parts:
            continue
        a, b = adapter.tensors[stem + A].array(), adapter.tensors[stem + B].array()
        longer, wider = fresh(stem + A, rank, tensor.shape[1]).copy(), np.zeros((tensor.shape[0], rank), np.float32)
        longer[: a.shape[0]] = a
        wider[:, : b.shape[1]] = b * np.float32(adapter.scales[stem] / scale)
        for which, values in ((A, longer), (B, wider)):
            path = folder / f"{stem}{which}.start"
            path.write_bytes(values.astype("<f4").tobytes())
            found[stem + which] = MappedTensor(str(path), 0, values.shape)
    return found


def open_with_adapter(
    model: str, adapter: Path | None, family: str, progress: Callable[[str], None]
) -> contextlib.AbstractContextManager[Source]:
    """`with_adapter` of a model by its name or folder."""
    return with_adapter(find_checkpoint(model, family=family, progress=progress), adapter)


@contextlib.contextmanager
def with_adapter(checkpoint: Checkpoint, adapter: Path | None) -> Iterator[Source]:
    """A model with an adapter added in, whose files lie in the cache folder until the end of the block.

    Raises:
        ModelError: the adapter is not this model's, or neither has a head whose classes are known.
    """
    cache = cache_folder()
    if adapter is None:
        yield open_source(checkpoint, None, cache)
        return
    given = read_adapter(adapter, checkpoint.family)
    sizes = {t.shape[0] for t in given.head.values() if t.shape}
    labels = given.labels or (checkpoint.labels if len(checkpoint.labels or ()) in sizes or not sizes else None)
    if labels is None and len(sizes) == 1:  # as transformers calls classes without names
        labels = tuple(f"LABEL_{i}" for i in range(min(sizes.pop(), MAX_LABELS)))
    if labels is None:
        raise ModelError(
            f"{adapter} has no head that reads the mean of the tokens, nor has the model: "
            "begin a training from it, `edge-runtime train --adapter`"
        )
    checkpoint = replace(checkpoint, labels=labels, max_length=given.max_length or checkpoint.max_length)
    source = open_source(checkpoint, None, cache)
    given = check_adapter(given, source.spec, source.weights)
    with scratch_folder(cache, "merged.") as folder:
        weights = merged(source.spec, source.weights, given, folder, range(source.spec.num_blocks))
        yield replace(source, weights={**weights, **given.head})
