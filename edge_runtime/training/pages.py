"""Arrays with pages of their own, for what lives as long as the training: weights, optimizer states, gradient sums.

Kept out of the heap, they leave no holes between the short-lived activations, which the heap then serves again and again.
"""

from __future__ import annotations

import math
import mmap
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


class GradientSums:
    """Sums of gradients over micro-batches, by tensor; their memory is used again for the next block and step."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}
        self._free: dict[tuple[int, ...], list[Array]] = {}

    def add(self, name: str, gradient: Array, *, alone: bool) -> None:
        """Add a micro-batch's gradient. `alone`: there is no other, so it need not be copied."""
        if name in self._sums:
            self._sums[name] += gradient
        elif alone:
            self._sums[name] = gradient
        else:
            free = self._free.get(gradient.shape)
            self._sums[name] = total = free.pop() if free else page_zeros(gradient.shape)
            total[...] = gradient

    def names(self) -> list[str]:
        """The tensors that have a sum now, in the order of their first gradient."""
        return list(self._sums)

    def peek(self, name: str) -> Array:
        """A tensor's sum, which the caller may overwrite; then call `done`."""
        return self._sums[name]

    def done(self, name: str, *, alone: bool) -> None:
        """Forget a sum and keep its memory for another of the same shape."""
        array = self._sums.pop(name)
        if not alone:
            self._free.setdefault(array.shape, []).append(array)
