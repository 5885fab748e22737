"""Which entries of a matrix sparse training changes: a random mask that a seed defines, so that indices are never sent.

The first stage of SLoRA (Babakniya et al., arXiv 2308.06522) draws one mask for each dense layer, uniform, the same for every
device and round. Our reading: one entry, drawn at random, in each run of `every` consecutive ones, so that both sides know the
number of entries without drawing, and a mask is drawn without sorting. The same seed gives the same mask with every numpy:
only raw bits of Philox are used. Imports numpy and the layout.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from edge_runtime.layout import place_bytes

Array = np.ndarray[Any, np.dtype[Any]]


PIECE = 1 << 15  # places drawn at once


def indices(seed: int, name: str, size: int, every: int) -> Array:
    """The masked places of a flat tensor, increasing, (size / every rounded up,) int64. Memory: twice that."""
    places = np.arange(0, size, every, dtype=np.int64)
    places += offsets(seed, name, size, every)
    return places


def offsets(seed: int, name: str, size: int, every: int) -> Array:
    """The same as places within their runs of `every` entries: uint8, or uint16 where runs are longer than 256."""
    key = int.from_bytes(hashlib.sha256(f"mask/{seed}/{name}".encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key)
    found = np.empty(-(-size // every), f"uint{8 * place_bytes(every)}")
    for start in range(0, found.size, PIECE):
        drawn = bits.random_raw(min(PIECE, found.size - start))
        runs = np.minimum(size - every * np.arange(start, start + drawn.size), every)  # the last may be shorter
        found[start : start + drawn.size] = drawn % runs.astype(np.uint64)
    return found
