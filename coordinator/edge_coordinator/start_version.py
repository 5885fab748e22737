"""The tensors of the version that a run, or a stage of it, begins with: adapters that the model does not have yet, and its matrices.

Adapters that are there and not wanted are merged into their matrices. Wanted ones begin as a fresh A and B = 0, or are primed
with what the run has changed so far (`methods/slora.py`). One matrix is in memory at a time. numpy; no ledger, no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge_coordinator.aggregate import finite
from edge_coordinator.methods.method import Prime, Stage
from edge_coordinator.start_adapters import adapter_tensors, fresh_a
from edge_runtime.kinds import FRESH
from edge_runtime.layout import A, B, scale
from edge_runtime.manifest import Manifest, StoredTensor
from edge_runtime.model import TensorSpec
from edge_runtime.store import BlobStore
from edge_runtime.version_weights import pieces

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Primer:
    """What the adapters of a version are made from.

    Attributes:
        start: the version that the run began with.
        prime: the method's.
    """

    start: Manifest
    prime: Prime


def has_adapters(manifest: Manifest, stage: Stage) -> bool:
    """Whether a version has just the adapters that a stage trains, and is whole where the stage does not prune.

    Raises:
        UsageError: a target is no linear layer of the model.
    """
    there = tuple(TensorSpec(t.name, t.shape, t.part) for t in manifest.adapters)
    same = there == tuple(_wanted(manifest, stage)) and manifest.adapter_scale == _scale(stage)
    return same and (stage.prunes or not manifest.kept)


def begin(base: Manifest, stage: Stage, store: BlobStore, primer: Primer | None = None) -> Manifest:
    """The tensors and adapters that a stage begins with, put into the store, in place of those of `base`."""
    wanted = {t.name: t for t in _wanted(base, stage)}
    old = {t.name: t.blob for t in primer.start.tensors} if primer else {}
    made: dict[str, bytes] = {}
    tensors: list[StoredTensor] = []
    for tensor in base.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem + A not in wanted:
            tensors.append(replace(tensor, blob=_merged(base, tensor, store)))
            continue
        fresh = fresh_a(stage.settings.seed, 0, stem + A, wanted[stem + A].shape)
        if primer:
            tensors.append(replace(tensor, blob=old[tensor.name]))
            pair = primer.prime(_changed(base, tensor, store, old[tensor.name]), fresh)
        else:
            tensors.append(replace(tensor, blob=_merged(base, tensor, store)))
            pair = fresh, _zeros(wanted[stem + B].shape)
        for name, values in zip((stem + A, stem + B), pair, strict=True):
            made[name] = store.put(finite(name, values).tobytes())
    adapters = tuple(StoredTensor(t.name, t.shape, t.part, made[t.name]) for t in wanted.values())
    kept = base.kept if stage.prunes else b""
    return replace(base, tensors=tuple(tensors), adapters=adapters, adapter_scale=_scale(stage), kept=kept)


def _wanted(manifest: Manifest, stage: Stage) -> Sequence[TensorSpec]:
    return adapter_tensors(manifest.spec, stage.settings, stage.ranks) if stage.adapters not in ("", FRESH) else ()


def _scale(stage: Stage) -> float:
    return scale(stage.settings) if stage.adapters not in ("", FRESH) else 0.0


def _merged(base: Manifest, tensor: StoredTensor, store: BlobStore) -> bytes:
    """A tensor's blob with what its adapter adds."""
    pairs, stem = base.mapped_adapters(store), tensor.name.removesuffix(".weight")
    if stem + A not in pairs:
        return tensor.blob
    weight = base.mapped(store)[tensor.name]
    added = pieces(weight, pairs[stem + A], pairs[stem + B], base.adapter_scale)
    return store.put(b"".join(piece.tobytes() for piece in added))


def _changed(base: Manifest, tensor: StoredTensor, store: BlobStore, old: bytes) -> Array:
    """A matrix with what its adapter adds, less what it was, (outputs, inputs), float64."""
    import numpy as np

    def values(blob: bytes) -> Array:
        return np.fromfile(store.path(blob), "<f4").astype(np.float64)

    return (values(_merged(base, tensor, store)) - values(old)).reshape(tensor.shape)


def _zeros(shape: tuple[int, ...]) -> Array:
    import numpy as np

    return np.zeros(shape)
