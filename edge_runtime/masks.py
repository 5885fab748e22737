"""Which entries of a matrix sparse training changes: a random mask that a seed defines, so that indices are never sent.

The first stage of SLoRA (Babakniya et al., arXiv 2308.06522) draws one mask for each dense layer, uniform, the same for every
device and round. Our reading: one entry, drawn at random, in each run of `every` consecutive ones, so that both sides know the
number of entries without drawing, and a mask is drawn without sorting. The same seed gives the same mask with every numpy:
only raw bits of Philox are used. Imports numpy.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def indices(seed: int, name: str, size: int, every: int) -> Array:
    """The masked places of a flat tensor, increasing, (size / every rounded up,) int64. Memory: four times that."""
    key = int.from_bytes(hashlib.sha256(f"mask/{seed}/{name}".encode()).digest()[:16], "little")
    places = np.arange(0, size, every, dtype=np.int64)
    drawn = np.random.Philox(key=key).random_raw(places.size)
    drawn %= np.minimum(size - places, every).astype(np.uint64)
    places += drawn.astype(np.int64)
    return places
