"""Structured pruning: which attention heads and feed-forward channels of each block a model keeps, and its smaller tensors.

FedSpine (Yao et al., arXiv 2501.02438) prunes whole heads and channels: tensors become smaller, nothing is masked, and what is
left is an ordinary model of its family with widths of its own in each block. What a head or a channel is made of, the family
says (`model.Family`). Not which groups go (`importance.py`) and not the training. Imports the model and the weights; numpy inside
functions, so that an agent can check what is kept without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import UsageError, WireError
from edge_runtime.graphs.bundle import part_tensors, relative_names
from edge_runtime.model import ModelSpec, TensorSpec, load_family

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

HEADS, CHANNELS = "heads", "channels"


@dataclass(frozen=True)
class Kept:
    """The heads and channels that are kept of a model: for each block a bit for each one, most significant bit first.

    Bits beyond the last head or channel are 0.
    """

    heads: tuple[bytes, ...]
    channels: tuple[bytes, ...]

    @staticmethod
    def full(spec: ModelSpec) -> Kept:
        """All that the model has."""
        heads, channels = zip(*block_widths(spec), strict=True)
        return Kept(tuple(map(_ones, heads)), tuple(map(_ones, channels)))

    @staticmethod
    def of(heads: Sequence[Array], channels: Sequence[Array]) -> Kept:
        """From one bool for each head and for each channel of each block."""
        import numpy as np

        return Kept(*(tuple(np.packbits(mask).tobytes() for mask in masks) for masks in (heads, channels)))

    def encode(self) -> bytes:
        """Block after block, its heads before its channels."""
        return b"".join(heads + channels for heads, channels in zip(self.heads, self.channels, strict=True))

    def num_heads(self, block: int) -> int:
        """How many heads of a block are kept."""
        return _count(self.heads[block])

    def num_channels(self, block: int) -> int:
        """How many channels of a block are kept."""
        return _count(self.channels[block])

    def within(self, other: Kept) -> bool:
        """Whether nothing is kept here that `other`, of the same model, does not keep."""
        pairs = zip((*self.heads, *self.channels), (*other.heads, *other.channels), strict=True)
        return all(int.from_bytes(mine, "big") & ~int.from_bytes(theirs, "big") == 0 for mine, theirs in pairs)

    def sparsity(self, spec: ModelSpec) -> float:
        """The share of the parameters of the blocks' matrices that is gone, from 0 to 1. Args: spec: the whole model."""
        return 1 - matrix_parameters(pruned_spec(spec, self)) / matrix_parameters(spec)


def decode_kept(spec: ModelSpec, data: bytes) -> Kept:
    """Read what `Kept.encode` wrote. Args: spec: the whole model.

    Raises:
        WireError: it has another length, bits beyond the last group, or leaves a block without a head or a channel.
    """
    heads: list[bytes] = []
    channels: list[bytes] = []
    position = 0
    for block, widths in enumerate(block_widths(spec)):
        for masks, count, what in zip((heads, channels), widths, (HEADS, CHANNELS), strict=True):
            length = -(-count // 8)
            mask = data[position : position + length]
            position += length
            if len(mask) < length:
                raise WireError(f"{len(data)} bytes say what a pruned model keeps, its blocks have more {what}")
            if int.from_bytes(mask, "big") & ((1 << 8 * length - count) - 1):
                raise WireError(f"a pruned model keeps {what} of block {block} beyond its {count}")
            if not _count(mask):
                raise WireError(f"a pruned model keeps no {what} of block {block}")
            masks.append(mask)
    if position != len(data):
        raise WireError(f"{len(data)} bytes say what a pruned model keeps, wanted {position}")
    return Kept(tuple(heads), tuple(channels))


def kept_groups(spec: ModelSpec, kept: Kept, block: int) -> tuple[Array, Array]:
    """One bool for each head and one for each channel of a block: whether it is kept."""
    heads, channels = _widths(spec, block)
    return _bits(kept.heads[block], heads), _bits(kept.channels[block], channels)


def block_widths(spec: ModelSpec) -> list[tuple[int, int]]:
    """Heads and channels of each block.

    Raises:
        UsageError: the family does not say what its heads and channels are.
    """
    return [_widths(spec, block) for block in range(spec.num_blocks)]


def _widths(spec: ModelSpec, block: int) -> tuple[int, int]:
    found: dict[str, int] = {}
    for tensor in part_tensors(spec, block):
        rows = groups_of(spec, tensor)[0] if tensor.is_adapted else ""
        if rows:
            found[rows] = tensor.shape[0] // group_size(spec, rows)
    return found[HEADS], found[CHANNELS]


def groups_of(spec: ModelSpec, tensor: TensorSpec) -> tuple[str, str]:
    """What the rows and what the columns of a block's tensor belong to: HEADS, CHANNELS, or "" where they always stay.

    Raises:
        UsageError: as `block_widths`.
    """
    if not 0 <= tensor.part < spec.num_blocks:
        return "", ""
    family = load_family(spec.family)
    layers = {HEADS: getattr(family, "HEAD_LAYERS", ()), CHANNELS: getattr(family, "CHANNEL_LAYERS", ())}
    if not all(layers.values()):
        raise UsageError(f"{spec.family} cannot be pruned: it does not say what a head and a channel are made of")
    names = [t.name for t in part_tensors(spec, tensor.part)]
    layer = relative_names(spec, tensor.part)[names.index(tensor.name)].rpartition(".")[0]
    rows, columns = ("".join(g for g, of in layers.items() if layer in of[side]) for side in (0, 1))
    return rows, columns if len(tensor.shape) == 2 else ""


def group_size(spec: ModelSpec, group: str) -> int:
    """The rows, or columns, of a matrix that one head or channel takes."""
    return spec.hidden // spec.heads if group == HEADS else 1


def matrix_parameters(spec: ModelSpec) -> int:
    """Of the matrices of all blocks."""
    return sum(t.size for t in spec.tensors if 0 <= t.part < spec.num_blocks and t.is_adapted)


def pruned_spec(spec: ModelSpec, kept: Kept) -> ModelSpec:
    """The model that is left: of the same family, with its smaller tensors; `spec` itself where all is kept.

    Raises:
        UsageError: as `block_widths`.
    """
    family: Any = load_family(spec.family)
    heads, channels = ([_count(mask) for mask in masks] for masks in (kept.heads, kept.channels))
    if list(zip(heads, channels, strict=True)) == block_widths(spec):
        return spec
    config = family.with_widths(spec.config, heads, channels)
    found: ModelSpec = family.describe(config, spec.labels, spec.max_length)
    return found


def cut_rows(spec: ModelSpec, kept: Kept, tensor: TensorSpec) -> tuple[Array | None, Array | None]:
    """The rows and the columns of a tensor that are kept, int64 and increasing; None for all of them.

    Args:
        spec, tensor: the whole model and one of its tensors.
    """
    import numpy as np

    found: list[Array | None] = []
    for group in groups_of(spec, tensor):
        if not group:
            found.append(None)
            continue
        heads, channels = kept_groups(spec, kept, tensor.part)
        wanted = np.repeat(heads if group == HEADS else channels, group_size(spec, group))
        found.append(None if wanted.all() else np.flatnonzero(wanted))
    return found[0], found[1]


def cut(array: Array, rows: Array | None, columns: Array | None) -> Array:
    """Some rows and columns of a tensor, a copy; the array itself where all are wanted."""
    if rows is not None:
        array = array[rows]
    return array if columns is None else array[:, columns]


def expanded(array: Array, shape: tuple[int, ...], rows: Array | None, columns: Array | None) -> Array:
    """The tensor of the given shape of which `array` is the cut, with zeros for what is gone."""
    import numpy as np

    whole = np.zeros(shape, array.dtype)
    rows = np.arange(shape[0]) if rows is None else rows
    if columns is None:
        whole[rows] = array
    else:
        whole[rows[:, None], columns] = array
    return whole


def _count(mask: bytes) -> int:
    return int.from_bytes(mask, "big").bit_count()


def _ones(count: int) -> bytes:
    """A mask with all of its bits set."""
    length = -(-count // 8)
    return ((1 << count) - 1 << (8 * length - count)).to_bytes(length, "big")


def _bits(mask: bytes, count: int) -> Array:
    import numpy as np

    return np.unpackbits(np.frombuffer(mask, np.uint8), count=count).astype(bool)
