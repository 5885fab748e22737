"""Sums of updates as 64-bit fixed point, one weight per tensor: devices may train different parts, in any order.

What an update's codec says is decoded to float32, and that is what counts: each delta is rounded once to 2^-28 and multiplied
by its device's number of examples. Integers add up to the same bits in whatever order they come, so arrival, crashes and
replays change nothing; so does folding some of them early. One section of a tensor is in memory at a time, for each update
one more, and in `apply` one tensor. numpy only; no torch, no network, no ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_coordinator.methods.method import Change
from edge_runtime.codecs import misfit, section_sizes, unpacked, update_bytes
from edge_runtime.errors import ModelError, StoreError, WireError
from edge_runtime.model import TensorSpec
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
    """A device's update on this disk: the deltas of its plan's tensors (`edge_runtime/layout.py`) in its codec."""

    device: str
    path: Path
    num_examples: int
    layout: tuple[TensorSpec, ...]
    codec: str = "f32"  # as it was offered


@dataclass(frozen=True)
class Partial:
    """Sums of some updates on this disk: int64, one after the other, of the tensors that have a weight."""

    path: Path
    weights: Mapping[str, int]  # examples behind each tensor


def check_update(update: Update) -> str:
    """Why an update cannot be added; empty if it can. Reads it once, a section at a time."""
    import numpy as np

    from edge_runtime.encoding import read_update

    size, planned = update.path.stat().st_size, unpacked(update.codec)
    expected = update_bytes(update.layout, planned)
    if misfit(update.codec, size, planned, expected):
        return f"the update has {size} bytes, its plan {expected}"
    try:
        for tensor, _, delta in read_update(update.path, update.layout, update.codec):
            if np.abs(delta).max(initial=0.0) > MAX_DELTA:
                return f"{tensor.name} changed by more than {MAX_DELTA:g}"
    except WireError as error:
        return str(error)
    return ""


def fold(tensors: Sequence[TensorSpec], partial: Partial | None, updates: Sequence[Update], out: Path) -> Partial:
    """Add updates to a partial sum, into a new file; the old one stays.

    Args:
        tensors: those to sum up, in the order that all layouts keep; others in an update are passed over.

    Raises:
        StoreError: what was checked before is not there any more as it was.
    """
    for start in range(0, max(1, len(updates)), AT_ONCE):
        partial = _fold(tensors, partial, updates[start : start + AT_ONCE], out)
    assert partial
    return partial


def _fold(tensors: Sequence[TensorSpec], partial: Partial | None, updates: Sequence[Update], out: Path) -> Partial:
    import numpy as np

    weights, wanted = dict(partial.weights) if partial else {}, {t.name: t.shape for t in tensors}
    readers: list[tuple[set[str], int, Iterator[Array]]] = []
    for update in updates:
        assert all(wanted.get(t.name, t.shape) == t.shape for t in update.layout), "what is summed up has one shape"
        names = {t.name for t in update.layout} & set(wanted)
        for name in names:
            weights[name] = weights.get(name, 0) + update.num_examples
        readers.append((names, update.num_examples, _sections(update, names)))
    old = _sum_offsets(tensors, partial.weights) if partial else {}
    with atomic_writer(out) as file:
        for tensor in tensors:
            if tensor.name not in weights:
                continue
            trained = [(examples, reader) for names, examples, reader in readers if tensor.name in names]
            start = 0
            for count in section_sizes(tensor.size):
                if partial and tensor.name in old:
                    total = np.array(_mapped(partial.path, old[tensor.name] + 8 * start, count, "<i8"))
                else:
                    total = np.zeros(count, np.int64)
                for examples, reader in trained:
                    delta = next(reader).astype(np.float64)
                    total += np.rint(delta * (1 << SCALE_BITS)).astype(np.int64) * examples
                file.write(total.astype("<i8", copy=False).tobytes())
                start += count
    return Partial(out, weights)


def mean_changes(tensors: Sequence[TensorSpec], partial: Partial) -> Iterator[Change]:
    """The weighted mean of the deltas of each tensor that has a weight, flat float64, one tensor at a time."""
    import numpy as np

    offsets = _sum_offsets(tensors, partial.weights)
    for tensor in tensors:
        if weight := partial.weights.get(tensor.name, 0):
            total = _mapped(partial.path, offsets[tensor.name], tensor.size, "<i8")
            yield Change(tensor.name, total.astype(np.float64) / (weight * (1 << SCALE_BITS)))


def apply(
    changes: Iterable[Change],
    base: Mapping[str, Path],
    store: BlobStore,
    step: Callable[[str, Array], Array] = lambda name, values: values,
) -> dict[str, bytes]:
    """New tensors = base + change, taken one at a time; -> the hash of each changed tensor, put into the store.

    Args:
        base: where the tensors lie that may change, float32.
        step: the server optimizer, from a tensor's name and change, flat float64, to the change that is made.

    Raises:
        ModelError: a tensor would not be finite.
    """
    import numpy as np

    changed: dict[str, bytes] = {}
    for change in changes:
        values = change.values.reshape(-1)
        if not change.replaces:
            values = np.fromfile(base[change.name], "<f4").astype(np.float64) + step(change.name, values)
        changed[change.name] = store.put(finite(change.name, values).tobytes())
    return changed


def finite(name: str, values: Array) -> Array:
    """A tensor as little-endian float32.

    Raises:
        ModelError: it is not finite.
    """
    import numpy as np

    new: Array = values.astype("<f4")
    if not np.isfinite(new).all():
        raise ModelError(f"{name} would not be finite: the model stays as it is")
    return new


def _mapped(path: Path, offset: int, size: int, dtype: str) -> Any:
    import numpy as np

    try:
        return np.memmap(path, dtype, "r", offset, size)
    except ValueError:
        raise StoreError(f"{path} is cut short: the disk has lost bytes that were there") from None


def _sum_offsets(tensors: Sequence[TensorSpec], weights: Mapping[str, int]) -> dict[str, int]:
    offsets, position = {}, 0
    for tensor in tensors:
        if tensor.name in weights:
            offsets[tensor.name] = position
            position += 8 * tensor.size
    return offsets


def _sections(update: Update, names: set[str]) -> Iterator[Array]:
    """The sections of an update's tensors of these names, in its order."""
    from edge_runtime.encoding import read_update

    try:
        for tensor, _, delta in read_update(update.path, update.layout, update.codec):
            if tensor.name in names:
                yield delta
    except (WireError, OSError) as error:
        raise StoreError(f"{update.path} is damaged: the disk has lost bytes that were there ({error})") from None
