"""Sums of updates as 64-bit fixed point, one weight per tensor: devices may train different parts, in any order.

What an update's codec says is decoded to float32, and that is what counts: each delta is rounded once to 2^-28 and multiplied
by its device's number of examples. Integers add up to the same bits in whatever order they come, so arrival, crashes and
replays change nothing; so does folding some of them early. One section of a tensor is in memory at a time, for each update
one more, and in `apply` one tensor. numpy only; no torch, no network, no ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.codecs import misfit, section_sizes, unpacked, update_bytes
from edge_runtime.errors import ModelError, StoreError, WireError
from edge_runtime.model import ModelSpec
from edge_runtime.store import BlobStore, atomic_writer

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

SCALE_BITS = 28
MAX_DELTA = 8.0  # a larger change of a weight in one round is no training
MAX_EXAMPLES = 1 << 20  # as the wire's `num_examples`
MAX_MEMBERS = 2000
AT_ONCE = 64  # updates whose files are open while they are added
# The largest possible sum: 2000 members * 2^20 examples * 8 * 2^28 < 2^62, so int64 cannot overflow.
assert MAX_MEMBERS * MAX_EXAMPLES * int(MAX_DELTA) << SCALE_BITS < 1 << 63


@dataclass(frozen=True)
class Update:
    """A device's update on this disk: the deltas of the suffix's tensors one after the other, in its codec."""

    device: str
    path: Path
    num_examples: int
    depth: int
    codec: str = "f32"  # as it was offered


@dataclass(frozen=True)
class Partial:
    """Sums of some updates on this disk: int64, one after the other, of the tensors that have a weight."""

    path: Path
    weights: Mapping[str, int]  # examples behind each tensor


def check_update(spec: ModelSpec, update: Update) -> str:
    """Why an update cannot be added; empty if it can. Reads it once, a section at a time."""
    import numpy as np

    from edge_runtime.encoding import read_update

    size, planned = update.path.stat().st_size, unpacked(update.codec)
    expected = update_bytes(spec.suffix(update.depth), planned)
    if misfit(update.codec, size, planned, expected):
        return f"the update has {size} bytes, its plan {expected}"
    try:
        for tensor, _, delta in read_update(update.path, spec, update.depth, update.codec):
            if np.abs(delta).max(initial=0.0) > MAX_DELTA:
                return f"{tensor.name} changed by more than {MAX_DELTA:g}"
    except WireError as error:
        return str(error)
    return ""


def fold(spec: ModelSpec, partial: Partial | None, updates: Sequence[Update], out: Path) -> Partial:
    """Add updates to a partial sum, into a new file; the old one stays.

    Raises:
        StoreError: what was checked before is not there any more as it was.
    """
    for start in range(0, max(1, len(updates)), AT_ONCE):
        partial = _fold(spec, partial, updates[start : start + AT_ONCE], out)
    assert partial
    return partial


def _fold(spec: ModelSpec, partial: Partial | None, updates: Sequence[Update], out: Path) -> Partial:
    import numpy as np

    weights = dict(partial.weights) if partial else {}
    for update in updates:
        for tensor in spec.suffix(update.depth):
            weights[tensor.name] = weights.get(tensor.name, 0) + update.num_examples
    old = _sum_offsets(spec, partial.weights) if partial else {}
    readers = [(update, _sections(spec, update)) for update in updates]
    with atomic_writer(out) as file:
        for tensor in spec.tensors:
            if tensor.name not in weights:
                continue
            trained = [(u, r) for u, r in readers if tensor.part >= spec.num_blocks - u.depth]
            start = 0
            for count in section_sizes(tensor.size):
                if partial and tensor.name in old:
                    total = np.array(_mapped(partial.path, old[tensor.name] + 8 * start, count, "<i8"))
                else:
                    total = np.zeros(count, np.int64)
                for update, reader in trained:
                    delta = next(reader).astype(np.float64)
                    total += np.rint(delta * (1 << SCALE_BITS)).astype(np.int64) * update.num_examples
                file.write(total.astype("<i8", copy=False).tobytes())
                start += count
    return Partial(out, weights)


def apply(
    spec: ModelSpec,
    partial: Partial,
    base: Mapping[str, Path],
    store: BlobStore,
    step: Callable[[str, Array], Array] = lambda name, mean: mean,
) -> dict[str, bytes]:
    """New tensors = base + step(weighted mean of the deltas); -> the hash of each changed tensor, put into the store.

    Args:
        step: from a tensor's name and mean delta, flat float64, to its change: the server optimizer.
    """
    import numpy as np

    changed: dict[str, bytes] = {}
    offsets = _sum_offsets(spec, partial.weights)
    for tensor in spec.tensors:
        weight = partial.weights.get(tensor.name, 0)
        if not weight:
            continue
        total = _mapped(partial.path, offsets[tensor.name], tensor.size, "<i8")
        mean = total.astype(np.float64) / (weight * (1 << SCALE_BITS))
        new = (np.fromfile(base[tensor.name], "<f4").astype(np.float64) + step(tensor.name, mean)).astype("<f4")
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


def _sections(spec: ModelSpec, update: Update) -> Iterator[Array]:
    """The sections of an update, tensor after tensor in the model's order."""
    from edge_runtime.encoding import read_update

    try:
        for _, _, delta in read_update(update.path, spec, update.depth, update.codec):
            yield delta
    except (WireError, OSError) as error:
        raise StoreError(f"{update.path} is damaged: the disk has lost bytes that were there ({error})") from None
