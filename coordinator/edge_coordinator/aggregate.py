"""Sums of updates as 64-bit fixed point, one weight per tensor: devices may train different parts, in any order.

Each delta is rounded once to 2^-28 and multiplied by its device's number of examples. Integers add up to the same bits in
whatever order they come, so arrival, crashes and replays change nothing; so does folding some of them early. One tensor
is in memory at a time. numpy only; no torch, no network, no ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError, StoreError
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.store import BlobStore, atomic_writer

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

SCALE_BITS = 28
MAX_DELTA = 8.0  # a larger change of a weight in one round is no training
MAX_EXAMPLES = 1 << 20  # as the wire's `num_examples`
MAX_MEMBERS = 2000
# The largest possible sum: 2000 members * 2^20 examples * 8 * 2^28 < 2^62, so int64 cannot overflow.
assert MAX_MEMBERS * MAX_EXAMPLES * int(MAX_DELTA) << SCALE_BITS < 1 << 63


@dataclass(frozen=True)
class Update:
    """A device's update on this disk: the deltas of the suffix's tensors one after the other, float32."""

    device: str
    path: Path
    num_examples: int
    depth: int


@dataclass(frozen=True)
class Partial:
    """Sums of some updates on this disk: int64, one after the other, of the tensors that have a weight."""

    path: Path
    weights: Mapping[str, int]  # examples behind each tensor


def check_update(spec: ModelSpec, update: Update) -> str:
    """Why an update cannot be added; empty if it can. Reads it once, a tensor at a time."""
    import numpy as np

    expected = sum(t.num_bytes for t in spec.suffix(update.depth))
    if update.path.stat().st_size != expected:
        return f"the update has {update.path.stat().st_size} bytes, its plan {expected}"
    for tensor, delta in _deltas(spec, update):
        if not np.isfinite(delta).all():
            return f"{tensor.name} has values that are not finite"
        if np.abs(delta).max(initial=0.0) > MAX_DELTA:
            return f"{tensor.name} changed by more than {MAX_DELTA:g}"
    return ""


def fold(spec: ModelSpec, partial: Partial | None, updates: Sequence[Update], out: Path) -> Partial:
    """Add updates to a partial sum, into a new file; the old one stays."""
    import numpy as np

    weights = dict(partial.weights) if partial else {}
    for update in updates:
        for tensor in spec.suffix(update.depth):
            weights[tensor.name] = weights.get(tensor.name, 0) + update.num_examples
    old = _sum_offsets(spec, partial.weights) if partial else {}
    with atomic_writer(out) as file:
        for tensor in spec.tensors:
            if tensor.name not in weights:
                continue
            if partial and tensor.name in old:
                total = np.array(_mapped(partial.path, old[tensor.name], tensor.size, "<i8"))
            else:
                total = np.zeros(tensor.size, np.int64)
            for update in updates:
                delta = _delta(spec, update, tensor)
                if delta is not None:
                    total += (
                        np.rint(delta.astype(np.float64) * (1 << SCALE_BITS)).astype(np.int64) * update.num_examples
                    )
            file.write(total.astype("<i8", copy=False).tobytes())
    return Partial(out, weights)


def apply(spec: ModelSpec, partial: Partial, base: Mapping[str, Path], store: BlobStore) -> dict[str, bytes]:
    """New tensors = base + weighted mean of the deltas; -> the hash of each changed tensor, put into the store."""
    import numpy as np

    changed: dict[str, bytes] = {}
    offsets = _sum_offsets(spec, partial.weights)
    for tensor in spec.tensors:
        weight = partial.weights.get(tensor.name, 0)
        if not weight:
            continue
        total = _mapped(partial.path, offsets[tensor.name], tensor.size, "<i8")
        mean = total.astype(np.float64) / (weight * (1 << SCALE_BITS))
        new = (np.fromfile(base[tensor.name], "<f4").astype(np.float64) + mean).astype("<f4")
        if not np.isfinite(new).all():
            raise ModelError(f"{tensor.name} would not be finite: the model stays as it is")
        changed[tensor.name] = store.put(new.tobytes())
    return changed


def _mapped(path: Path, offset: int, size: int, dtype: str) -> Any:
    import numpy as np

    try:
        return np.memmap(path, dtype, "r", offset, size)
    except ValueError:
        raise StoreError(f"{path} is cut short: the disk has lost bytes that were there") from None


def _sum_offsets(spec: ModelSpec, weights: Mapping[str, int]) -> dict[str, int]:
    offsets, position = {}, 0
    for tensor in spec.tensors:
        if tensor.name in weights:
            offsets[tensor.name] = position
            position += 8 * tensor.size
    return offsets


def _delta(spec: ModelSpec, update: Update, wanted: TensorSpec) -> Array | None:

    offset = 0
    for tensor in spec.suffix(update.depth):
        if tensor.name == wanted.name:
            found: Array = _mapped(update.path, offset, tensor.size, "<f4")
            return found
        offset += tensor.num_bytes
    return None


def _deltas(spec: ModelSpec, update: Update) -> Sequence[tuple[TensorSpec, Any]]:

    offset, found = 0, []
    for tensor in spec.suffix(update.depth):
        found.append((tensor, _mapped(update.path, offset, tensor.size, "<f4")))
        offset += tensor.num_bytes
    return found
