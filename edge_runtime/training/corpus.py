"""Tokenised examples on disk: what training reads, and what the planner knows of the data before it.

A folder holds tokens.npy (int32, all texts one after the other), starts.npy (int64, one more than examples) and
labels.npy (int32), memory-mapped when read, plus corpus.json. It is private data: mode 0600, named by a hash of what it was
made from, and deletable. Imports numpy inside functions; knows no model and no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cost import BUCKETS
from edge_runtime.errors import DataError
from edge_runtime.store import disk_errors, sync_folder

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.data import Example

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Batch:
    """ids and mask (batch, seq) int64, labels (batch,) int64."""

    ids: Array
    mask: Array
    labels: Array

    def split(self, micro_batch: int) -> Iterator[Batch]:
        """The same examples in pieces of at most `micro_batch`, each padded to its own longest."""
        for start in range(0, len(self.labels), micro_batch):
            part = slice(start, start + micro_batch)
            longest = int(self.mask[part].sum(axis=1).max())
            yield Batch(self.ids[part, :longest], self.mask[part, :longest], self.labels[part])


class Corpus:
    """A tokenised data set, memory-mapped: resident memory is what a batch touches."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self.folder = folder
        try:
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            self.starts = np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False)
            self.labels = np.load(folder / "labels.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the tokenised data in {folder} is damaged ({error}): delete the folder, it is made anew"
            ) from None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The given examples, padded with 0 to the longest of them."""
        import numpy as np

        lengths = [int(self.starts[i + 1] - self.starts[i]) for i in indices]
        ids = np.zeros((len(indices), max(lengths)), np.int64)
        mask = np.zeros_like(ids)
        for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
            ids[row, :length] = self.tokens[self.starts[i] : self.starts[i + 1]]
            mask[row, :length] = 1
        return Batch(ids, mask, self.labels[list(indices)].astype(np.int64))

    def epoch(self, batch_size: int, seed: int) -> list[list[int]]:
        """The batches of one epoch: shuffled, examples of like length together, the batch with the longest text first.

        Longest first, so that the peak of memory comes at once and not at the end. The same seed gives the same batches.
        """
        length = [int(self.starts[i + 1] - self.starts[i]) for i in range(len(self))]
        shuffle = random.Random(seed)
        order = list(range(len(self)))
        shuffle.shuffle(order)
        batches = []
        for start in range(0, len(order), batch_size * BUCKETS):
            bucket = sorted(order[start : start + batch_size * BUCKETS], key=lambda i: (length[i], i))
            batches += [bucket[j : j + batch_size] for j in range(0, len(bucket), batch_size)]
        shuffle.shuffle(batches)
        heaviest = max(range(len(batches)), key=lambda b: (len(batches[b]) * max(length[i] for i in batches[b]), -b))
        batches.insert(0, batches.pop(heaviest))
        return batches


def build_corpus(
    examples: Sequence[Example], tokenizer_json: bytes, labels: Sequence[str], max_length: int, cache: Path
) -> Path:
    """Tokenise examples into a folder below `cache`, or find it there; -> the folder.

    The name is a hash of the texts, labels, tokenizer and length: any change makes another folder.
    """
    digest = hashlib.sha256(
        b"corpus 1\0" + hashlib.sha256(tokenizer_json).digest() + json.dumps([list(labels), max_length]).encode()
    )
    for example in examples:
        digest.update(json.dumps([example.text, example.label]).encode())
    folder = cache / digest.hexdigest()[:32]
    if (folder / "corpus.json").exists():
        return folder
    if not examples:
        raise DataError("there is no usable example in the data")
    with disk_errors(folder):
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".corpus."))
        try:
            _write(examples, tokenizer_json, labels, max_length, temporary)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not (folder / "corpus.json").exists():  # else another process was faster, and its work is the same
                    raise
            sync_folder(cache)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(
    examples: Sequence[Example], tokenizer_json: bytes, labels: Sequence[str], max_length: int, folder: Path
) -> None:
    import numpy as np

    from edge_runtime.tokenize import Tokenizer

    tokenizer = Tokenizer.from_bytes(tokenizer_json, max_length)
    number = {label: i for i, label in enumerate(labels)}
    tokens: list[Array] = []
    starts = [0]
    for begin in range(0, len(examples), 256):
        for ids in tokenizer.encode_batch([e.text for e in examples[begin : begin + 256]]):
            tokens.append(np.asarray(ids, np.int32))
            starts.append(starts[-1] + len(ids))
    lengths = np.diff(np.asarray(starts))
    histogram = np.bincount(lengths)
    arrays = {
        "tokens": np.concatenate(tokens),
        "starts": np.asarray(starts, np.int64),
        "labels": np.asarray([number[e.label] for e in examples], np.int32),
    }
    os.chmod(folder, 0o700)
    for name, array in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fchmod(file.fileno(), 0o600)
            os.fsync(file.fileno())
    found = {"num_examples": len(examples), "longest": int(lengths.max()), "lengths": [int(n) for n in histogram]}
    with (folder / "corpus.json").open("w") as file:
        json.dump(found, file)
        file.flush()
        os.fsync(file.fileno())
