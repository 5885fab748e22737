"""The codecs of an update: their names, what each sends, the exact number of bytes, and the choice within a budget. Pure.

A plan names a codec, so that number of bytes and layout are known before an update comes and it needs no header. How values
become bytes is `encoding.py`, which needs numpy. Imports the model's shape and the errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from edge_runtime.errors import UsageError
from edge_runtime.model import TensorSpec

SECTION = 1 << 16  # values of a tensor that are encoded by themselves; the last section of a tensor is shorter
BLOCK = 64  # values that share a scale
SCALE_BYTES = 2  # the upper half of a float32
DENSE_SIZE = 1 << 15  # a tensor of at most so many values is sent whole: biases, norms, most heads
AUTO = "auto"
PACKED = "+zlib"  # behind a codec's name in an offer: the bytes went through zlib on top


@dataclass(frozen=True)
class Codec:
    """How a tensor's deltas are sent.

    Attributes:
        bits: of a value: floats of 32 or 16, or integers of 8 or 4 with a scale for each block.
        one_in: how many values there are to one that is sent; those of the largest magnitude are. 1 sends all.
    """

    bits: int
    one_in: int = 1

    @property
    def sparse(self) -> bool:
        """Whether it leaves values out, which error feedback then keeps for the next update."""
        return self.one_in > 1

    def of(self, size: int) -> Codec:
        """The codec of a tensor of `size` values."""
        return replace(self, one_in=1) if size <= DENSE_SIZE else self

    def kept(self, count: int) -> int:
        """How many of a section's `count` values are sent."""
        return -(-count // self.one_in)

    def section_bytes(self, count: int) -> int:
        """Bytes of a section of `count` values."""
        kept = self.kept(count)
        index = sum(index_bytes(count, kept)) if self.sparse else 0
        return index + -(-kept * self.bits // 8) + (SCALE_BYTES * -(-kept // BLOCK) if self.bits <= 8 else 0)


CODECS = {  # the finest first
    "f32": Codec(32),
    "f16": Codec(16),
    "int8": Codec(8),
    "int4": Codec(4),
    "topk10": Codec(8, 10),
    "topk1": Codec(8, 100),
}
CHOSEN = ("f32", "f16", "int8", "int4", "topk10")  # what "auto" chooses from: below, a shallower suffix does better


def low_bits(count: int, kept: int) -> int:
    """Bits of an index that are written as they are: log2 of the mean gap, rounded down."""
    return (count // kept).bit_length() - 1


def index_bytes(count: int, kept: int) -> tuple[int, int]:
    """Bytes of the low and of the high bits of `kept` indices below `count` (Elias-Fano, see `encoding.py`)."""
    low = low_bits(count, kept)
    return -(-kept * low // 8), -(-(kept + ((count - 1) >> low)) // 8)


def section_sizes(size: int) -> list[int]:
    """The numbers of values of a tensor's sections."""
    return [min(SECTION, size - start) for start in range(0, size, SECTION)]


@lru_cache(maxsize=4096)  # a cost table asks for the same few sizes thousands of times
def tensor_bytes(name: str, size: int) -> int:
    """Bytes of a tensor of `size` values in the codec of that name."""
    codec = CODECS[name].of(size)
    whole, rest = divmod(size, SECTION)
    return whole * codec.section_bytes(SECTION) + (codec.section_bytes(rest) if rest else 0)


def update_bytes(tensors: Iterable[TensorSpec], name: str) -> int:
    """Bytes of an update of these tensors (`layout.py`), before zlib."""
    return sum(tensor_bytes(name, t.size) for t in tensors)


def check_codec(name: str) -> str:
    """The name of a codec, or "auto".

    Raises:
        UsageError: there is none of that name.
    """
    if name not in CODECS and name != AUTO:
        raise UsageError(f"codec must be {AUTO} or one of {', '.join(CODECS)}, it is {name!r}")
    return name


def pick_codec(tensors: Sequence[TensorSpec], wanted: str, budget_bytes: int | None) -> str:
    """The codec for an update of these tensors: the wanted one, or for "auto" the finest whose update is within the budget, else the smallest.

    Raises:
        UsageError: there is none of that name.
    """
    if check_codec(wanted) != AUTO:
        return wanted
    fits = (c for c in CHOSEN if budget_bytes is None or update_bytes(tensors, c) <= budget_bytes)
    return next(fits, min(CHOSEN, key=lambda c: update_bytes(tensors, c)))


def unpacked(name: str) -> str:
    """The codec that an offer's name means, without zlib."""
    return name.removesuffix(PACKED)


def misfit(name: str, num_bytes: int, planned: str, expected_bytes: int) -> str:
    """Why an offered update is not what its plan says; empty if it is. Through zlib it must have become smaller."""
    if name == planned and num_bytes == expected_bytes:
        return ""
    if name == planned + PACKED and 0 < num_bytes < expected_bytes:
        return ""
    return f"the update must be {expected_bytes} bytes of {planned}, it is {num_bytes} of {name}"
