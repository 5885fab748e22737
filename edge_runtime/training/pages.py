"""Arrays with pages of their own, for what lives as long as the training: weights, optimizer states, gradient sums.

Kept out of the heap, they leave no holes between the short-lived activations, which the heap then serves again and again.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

LEAST_BYTES = 64 << 10  # smaller arrays are not worth a mapping


def page_zeros(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """An array of zeros whose memory becomes resident as it is written."""
    import numpy as np

    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < LEAST_BYTES:
        return np.zeros(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype).reshape(shape)


def page_copy(source: Array) -> Array:
    """A float32 copy."""
    copy = page_zeros(source.shape)
    copy[...] = source
    return copy


class Pool:
    """Arrays by what they are for; the memory of each is used again in the next step, and grows where it must."""

    def __init__(self) -> None:
        self._buffers: dict[object, Array] = {}

    def take(self, key: object, shape: tuple[int, ...], kind: str = "float32") -> Array:
        """An array of this shape with any values; what was taken under the same key before is overwritten."""
        import numpy as np

        num_bytes = max(1, math.prod(shape) * np.dtype(kind).itemsize)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes < num_bytes:
            buffer = self._buffers[key] = page_zeros((num_bytes,), "uint8")
        return buffer[:num_bytes].view(kind)[: math.prod(shape)].reshape(shape)


class GradientSums:
    """Sums of gradients over micro-batches, by tensor; their memory is used again for the next block and step.

    `place` gives the array that a gradient is to be written into, `add` counts it in. Tensors of one role, or of one shape where
    none is said, take over each other's memory, and it grows where it must: blocks of a pruned model differ in their widths.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}
        self._roles: dict[str, object] = {}  # of those that have a sum,
        self._buffers: dict[str, Array] = {}  # and the flat memory that it begins in
        self._free: dict[object, list[Array]] = {}  # flat
        self._scratch = Pool()
        self._given: dict[object, int] = {}  # scratch arrays of a role that are in use

    def place(self, name: str, shape: tuple[int, ...], role: str = "") -> Array:
        """For the first gradient of a tensor its sum itself, for a further one scratch memory."""
        kind = role or shape
        if name in self._sums:
            self._given[kind] = number = self._given.get(kind, 0) + 1
            return self._scratch.take((kind, number), shape)
        free, size = self._free.get(kind), math.prod(shape)
        buffer = free.pop() if free else None
        if buffer is None or buffer.size < size:
            buffer = page_zeros((size,))
        self._roles[name], self._buffers[name] = kind, buffer
        self._sums[name] = array = buffer[:size].reshape(shape)
        return array

    def add(self, name: str, gradient: Array) -> None:
        """Count in what was written where `place` said."""
        total = self._sums[name]
        if gradient is not total:
            total += gradient
            self._given[self._roles[name]] -= 1

    def add_pieces(self, name: str, shape: tuple[int, ...], pieces: Iterable[Array], role: str = "") -> None:
        """Count in a gradient that comes flat, a piece at a time; no scratch memory is needed."""
        first, start = name not in self._sums, 0
        total = (self.place(name, shape, role) if first else self._sums[name]).reshape(-1)
        for piece in pieces:
            part = total[start : start + piece.size]
            if first:
                part[...] = piece
            else:
                part += piece
            start += piece.size

    def names(self) -> list[str]:
        """The tensors that have a sum now, in the order of their first gradient."""
        return list(self._sums)

    def take(self, name: str) -> Array:
        """A tensor's sum, which the caller may overwrite until the next `place`; it is forgotten."""
        array = self._sums.pop(name)
        self._free.setdefault(self._roles.pop(name), []).append(self._buffers.pop(name))
        return array
