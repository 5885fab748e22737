"""The frozen prefix's output for every training example, on disk across epochs and rounds.

While the last blocks are trained, what the first ones make of a text never changes: it is computed once and read
afterwards. One cache is a folder `<cache>/prefixes/<key>` with two files: features.f16, the hidden states of every real
token as float16, rows where the corpus has its tokens; and marks, 8 bytes an example: the CRC-32 of its key, number, tokens
and features, and the complement. The key names what the features were made from, so a cache is never stale: another
prefix tensor, tokenizer or text is another folder.

Nothing is synced. A mark is written after its features and proves them, so that a kill, a power cut or a damaged block
costs examples, which count as missing, and never gives a wrong value. Neither does disk trouble raise: training goes on
without the cache. Hidden states tell the text they came from: folders are 0700, files 0600, never in memory file systems,
and `delete_all` removes them. Not a trainer, knows no torch. numpy is imported inside functions.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.model import ModelSpec
from edge_runtime.training.cache_folders import (
    FEATURES,
    FOLDER,
    evict,
    free_bytes,
    in_memory,
    lock,
    open_private,
    private_folder,
    remove,
    used_bytes,
)
from edge_runtime.training.corpus import Corpus
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

ITEM, MARK_BYTES = 2, 8
RESERVE_BYTES = 256 << 20  # disk space that is left to everybody else
USEFUL_SHARE = 0.1  # of the examples; with fewer, looking them up is not worth it


@dataclass(frozen=True)
class Features:
    """What a cache gives for one batch.

    Attributes:
        indices: the examples asked for.
        hidden: (batch, longest, hidden) float32, 0 at padding and in the rows that are missing.
        missing: the rows of `hidden` that are not held: compute them, and `write` them.
    """

    indices: Sequence[int]
    hidden: Array
    missing: tuple[int, ...]


def prefix_key(
    spec: ModelSpec, weights: Mapping[str, MappedTensor], depth: int, corpus_folder_name: str, precision: str,
    blob_hashes: Mapping[str, bytes] | None = None,
) -> str:  # fmt: skip
    """The name of the features that a prefix makes of a corpus: a SHA-256 in hex.

    It changes with the bytes of any tensor below the suffix of depth `depth`, the architecture, the precision and the
    corpus, whose name is a hash of tokenizer, texts and lengths; not with a tensor of the suffix. `blob_hashes` gives the SHA-256
    of tensors' float32 bytes where they are known and the files are trusted; otherwise the files are read, 1 MiB in memory.

    Raises:
        ModelError: a tensor's file cannot be read.
    """
    cut = spec.num_blocks - depth
    frozen = []
    for tensor in spec.tensors:
        if tensor.part < cut:
            content = _content_hash(weights[tensor.name]) if blob_hashes is None else blob_hashes[tensor.name]
            frozen.append([tensor.name, tensor.shape, content.hex()])
    made_from = [spec.family, dict(spec.config), spec.heads, cut, precision, corpus_folder_name, frozen]
    return hashlib.sha256(b"prefix 1\0" + json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _content_hash(tensor: MappedTensor) -> bytes:
    """SHA-256 of the tensor as little-endian float32, whatever it is stored as."""
    digest = hashlib.sha256()
    for piece in tensor.pieces():
        digest.update(piece.data)
    return digest.digest()


def cache_bytes(num_tokens: int, hidden: int) -> int:
    """Disk space that surely holds the features of so many tokens; the marks are in it."""
    return num_tokens * (ITEM * hidden + MARK_BYTES)


class PrefixCache:
    """The features of one corpus from one prefix, held by one process at a time.

    Memory: 6 bytes an example; while reading, the float32 batch that is returned and one example as float16 (read with
    preadv, not mapped: mapped pages would count as ours). `prefetch` keeps two batches, the largest of the epoch.
    """

    def __init__(self, corpus: Corpus, key: str, hidden: int, features: int, marks: int, fits: int) -> None:
        """Over open and locked files; use `open`."""
        import numpy as np

        self._corpus, self._hidden, self._features, self._marks = corpus, hidden, features, marks
        self._fits, self._seed = fits, zlib.crc32(key.encode())
        self._width = ITEM * hidden  # bytes of a token
        self._enabled = True
        stored = np.zeros((fits, 2), np.uint32)
        _read_all(marks, stored, 0)
        self._crc = stored[:, 0].copy()
        self._beyond = np.zeros(fits, np.bool_)
        self._held = stored[:, 1] == ~stored[:, 0]  # a hole in the file is zeros, which are not each other's complement

    @classmethod
    def open(cls, root: Path, key: str, corpus: Corpus, hidden: int, max_bytes: int) -> PrefixCache | None:
        """The cache for `key` below the cache folder `root`, made if need be, or None where training must do without.

        None: `root` lies in memory, cannot be written or kept private, the disk is nearly full, another process has this
        cache open, or so little of the corpus fits into `max_bytes` that it is of no use. That bound is for all caches
        together: those that were not used for longest are deleted. If not all examples fit, the first ones are held.
        """
        folder = root / FOLDER / key
        descriptors: list[int] = []
        try:
            wanted = _fitting(corpus, hidden, max_bytes)
            if in_memory(folder):
                return None
            if wanted < _useful(corpus):
                evict(root, max_bytes, keep="")  # the bound holds for what an earlier, larger one left
                return None
            private_folder(folder)
            marks = lock(folder)
            if marks is None:
                return None
            descriptors.append(marks)
            features = open_private(folder / FEATURES)
            descriptors.append(features)
            _resize(features, marks, corpus, hidden, wanted)
            evict(root, max_bytes, key)
            fits = _fitting(corpus, hidden, max_bytes - used_bytes(root, but=key))  # others may be in use
            if fits < wanted:
                _resize(features, marks, corpus, hidden, fits)
            cache = cls(corpus, key, hidden, features, marks, fits)
            if fits < _useful(corpus) or not (cache.num_held or free_bytes(features) > RESERVE_BYTES):
                remove(folder)
                return None
            os.posix_fadvise(features, 0, 0, os.POSIX_FADV_RANDOM)  # neighbours on disk are not neighbours in a batch
            os.utime(marks)
            descriptors.clear()
            return cache
        except OSError:
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    @property
    def num_held(self) -> int:
        """Examples with features."""
        return int(self._held.sum())

    @property
    def overflowed(self) -> int:
        """Examples that were not held because a value is beyond float16 or not a number."""
        return int(self._beyond.sum())

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those of the examples that are not held."""
        return [i for i in indices if not self._has(i)]

    def read(self, indices: Sequence[int]) -> Array | None:
        """(batch, longest, hidden) float32, 0 at padding; None if an example is missing or turns out to be damaged."""
        import numpy as np

        out = np.empty(self._shape(indices), np.float32)
        features = self._load(indices, out, np.empty(out.shape[1:], np.float16))
        return None if features.missing else features.hidden

    def write(self, indices: Sequence[int], hidden: Array, lengths: Sequence[int]) -> None:
        """Keep the features of examples: rows of (batch, seq, hidden) float32, the first `lengths` of each being real.

        What is held, has no room or is beyond float16 is passed over. A full or broken disk ends the use of the cache; a full
        one gets the room back.

        Raises:
            ValueError: the shapes are not those of the corpus, which is a bug of the caller.
        """
        import numpy as np

        expected = [self._length(i) for i in indices]
        if list(lengths) != expected or hidden.shape != (len(expected), max(hidden.shape[1], *expected), self._hidden):
            raise ValueError(f"features of shape {hidden.shape} with lengths {list(lengths)}, wanted {expected}")
        new = [(row, i) for row, i in enumerate(indices) if i < self._fits and not self._has(i)]
        try:
            if not self._enabled or not new or free_bytes(self._features) < RESERVE_BYTES:
                return
            for row, i in new:
                with np.errstate(over="ignore"):
                    half = hidden[row, : expected[row]].astype(np.float16)
                if not np.isfinite(half).all():
                    self._beyond[i] = True
                    continue
                _write_all(self._features, half, self._offset(i))
                crc = self._checksum(i, half)
                _write_all(self._marks, np.array([crc, ~crc & 0xFFFFFFFF], np.uint32), i * MARK_BYTES)
                self._crc[i], self._held[i] = crc, True
        except OSError as error:
            self._give_up(delete=error.errno in (errno.ENOSPC, errno.EDQUOT))

    def prefetch(self, batches: Sequence[Sequence[int]]) -> Iterator[Features]:
        """Each batch's features in order, while a thread reads the next one's.

        Two buffers take turns: `hidden` is good until the next batch is asked for. Leaving the loop ends the thread. What
        is written meanwhile counts from the batch after the next.
        """
        from concurrent.futures import ThreadPoolExecutor

        import numpy as np

        if not batches:
            return
        shapes = [self._shape(indices) for indices in batches]
        buffers = [np.empty(max(map(math.prod, shapes)), np.float32) for _ in range(2)]
        scratch = np.empty((max(shape[1] for shape in shapes), self._hidden), np.float16)

        def load(n: int) -> Features:
            out = buffers[n % 2][: math.prod(shapes[n])].reshape(shapes[n])
            return self._load(batches[n], out, scratch)

        with ThreadPoolExecutor(1, "prefix-cache") as thread:
            ahead = thread.submit(load, 0)
            for n in range(len(batches)):
                features = ahead.result()
                if n + 1 < len(batches):
                    ahead = thread.submit(load, n + 1)
                yield features

    def close(self) -> None:
        """Let go of the files; everything is missing afterwards. Twice is fine."""
        self._give_up(delete=False)
        marks, features, self._marks, self._features = self._marks, self._features, -1, -1
        for descriptor in (marks, features):
            if descriptor >= 0:
                with suppress(OSError):
                    os.close(descriptor)

    def _has(self, i: int) -> bool:
        return i < self._fits and bool(self._held[i])

    def _length(self, i: int) -> int:
        return int(self._corpus.starts[i + 1]) - int(self._corpus.starts[i])

    def _offset(self, i: int) -> int:
        return int(self._corpus.starts[i]) * self._width

    def _shape(self, indices: Sequence[int]) -> tuple[int, int, int]:
        """Of a padded batch, as `Corpus.batch` pads it."""
        return len(indices), max(self._length(i) for i in indices), self._hidden

    def _checksum(self, i: int, half: Array) -> int:
        """Of features together with all they belong to, so that another example's, or another text's, never pass."""
        tokens = self._corpus.tokens[self._corpus.starts[i] : self._corpus.starts[i + 1]]
        return zlib.crc32(half.data, zlib.crc32(tokens.data, zlib.crc32(i.to_bytes(8, "little"), self._seed)))

    def _load(self, indices: Sequence[int], out: Array, scratch: Array) -> Features:
        """Fill `out` (batch, longest, hidden); `scratch` (longest, hidden) float16 takes one example at a time."""
        missing = []
        for row, i in enumerate(indices):
            half = scratch[: self._length(i)]
            if self._has(i):
                if self._fetch(i, half):
                    out[row, : len(half)] = half
                    out[row, len(half) :] = 0
                    continue
                self._held[i] = False  # damaged: it can be written again
            missing.append(row)
            out[row] = 0
        return Features(indices, out, tuple(missing))

    def _fetch(self, i: int, half: Array) -> bool:
        """Read one example's features; whether they are what was written."""
        try:
            return _read_all(self._features, half, self._offset(i)) and self._checksum(i, half) == self._crc[i]
        except OSError:
            return False

    def _give_up(self, *, delete: bool) -> None:
        """Hold nothing and write nothing any more."""
        self._enabled = False
        self._held[:] = False
        if delete:
            for descriptor in (self._marks, self._features):
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)


def _fitting(corpus: Corpus, hidden: int, max_bytes: int) -> int:
    """How many examples, counted from the first, have room."""
    import numpy as np

    starts = corpus.starts
    if (
        len(starts) != len(corpus) + 1
        or starts[0] != 0
        or starts[-1] != len(corpus.tokens)
        or (np.diff(starts) < 0).any()
    ):
        return 0  # a damaged corpus
    tokens = (max_bytes - MARK_BYTES * len(corpus)) // (ITEM * hidden)
    return max(0, int(np.searchsorted(starts, tokens, side="right")) - 1)


def _useful(corpus: Corpus) -> int:
    """Examples that a cache must have room for."""
    return max(1, math.ceil(USEFUL_SHARE * len(corpus)))


def _resize(features: int, marks: int, corpus: Corpus, hidden: int, fits: int) -> None:
    """Claim the room of that many examples, most of it a hole as yet, so that the size tells others what will be used."""
    os.ftruncate(features, int(corpus.starts[fits]) * ITEM * hidden)
    os.ftruncate(marks, MARK_BYTES * fits)


def _read_all(descriptor: int, array: Array, offset: int) -> bool:
    """Fill an array from a file; False if the file ends before."""
    left = array.reshape(-1).view("u1").data
    while left:
        count = os.preadv(descriptor, [left], offset)
        if not count:
            return False
        left, offset = left[count:], offset + count
    return True


def _write_all(descriptor: int, array: Array, offset: int) -> None:
    left = array.reshape(-1).view("u1").data
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
