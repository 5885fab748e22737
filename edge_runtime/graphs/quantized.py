"""The frozen blocks' linear weights as int8 on a device's disk, made once and memory-mapped afterwards.

Symmetric with one scale for each output, from -64 to 64 (`quantize.py` says why). One set is a folder
`<cache>/int8/<key>` with weights.bin, the arrays one after the other, and index.json with their places and the SHA-256
of the whole. The key names what they were made from, so a set is never stale; the newest two are kept. A damaged one is
made anew. Held while quantising: one tensor as int8 and some rows as float32. Imports numpy; knows no onnx and no
onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_runtime.errors import ModelError, StoreError
from edge_runtime.graphs.bundle import QUANTIZED, SCALE, part_tensors, relative_names
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.store import STALE_S, atomic_writer, file_sha256, make_folder, read_json, write_json
from edge_runtime.weights import MappedTensor

Array = np.ndarray[Any, np.dtype[Any]]

FOLDER, WEIGHTS, INDEX = "int8", "weights.bin", "index.json"
FORMAT = 1
LEVELS = 64  # the largest integer
LEAST = 1e-30  # rows of smaller weights become 0
KEPT = 2
ALIGNMENT = 64  # of every array in the file
CHUNK = 1 << 18  # elements of a tensor that are float32 at a time


class QuantizedTensors:
    """The quantised weights of some blocks, mapped: `weights.release_pages` on any array lets go of all their pages."""

    def __init__(self, names: Mapping[int, Mapping[str, TensorSpec]], places: Mapping[str, int], data: Array) -> None:
        """Over an open file; use `open`."""
        self._names, self._places, self._data = names, places, data

    @classmethod
    def open(cls, cache: Path, spec: ModelSpec, weights: Mapping[str, MappedTensor], parts: range) -> QuantizedTensors:
        """The int8 weights of the blocks `parts`, made below the cache folder if they are not there.

        Every matrix of a block counts as a linear layer's weight (out, in); an int8 graph asks for those that are.

        Raises:
            ModelError: the weights cannot be read.
            StoreError: the disk is full or cannot be written.
        """
        names = {part: _matrices(spec, part) for part in parts}
        tensors = [tensor for of_part in names.values() for tensor in of_part.values()]
        places, num_bytes = _layout(tensors)
        folder = cache / FOLDER / _key(tensors, weights)
        if not _sound(folder, places, num_bytes):
            _make(folder, tensors, weights, places, num_bytes)
        _evict(cache, folder)
        if not num_bytes:  # there is no map of nothing
            return cls(names, places, np.empty(0, np.uint8))
        try:
            os.utime(folder)
            return cls(names, places, np.memmap(folder / WEIGHTS, np.uint8, "r", shape=(num_bytes,)))
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {folder / WEIGHTS}: {error}") from None

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return len(self._data)

    def feeds(self, part: int) -> dict[str, Array]:
        """A block's quantised weights by the names of the int8 graph's inputs: "W:q" (in, out) and "W:scale" (out,)."""
        feeds = {}
        for relative, tensor in self._names[part].items():
            width, inputs = tensor.shape
            start = self._places[tensor.name]
            middle = start + _aligned(tensor.size)
            feeds[relative + QUANTIZED] = self._data[start : start + tensor.size].view(np.int8).reshape(inputs, width)
            feeds[relative + SCALE] = self._data[middle : middle + 4 * width].view("<f4")
        return feeds


def quantize(tensor: MappedTensor) -> tuple[Array, Array]:
    """A matrix (out, in) -> (in, out) int8 and (out,) float32, so that q * scale is the transpose, nearly."""
    width, inputs = tensor.shape
    values, scales = np.empty((inputs, width), np.int8), np.empty(width, np.float32)
    rows = max(1, CHUNK // inputs)
    for start in range(0, width, rows):
        part = slice(start, min(width, start + rows))
        chunk = _piece(tensor, start * inputs, (part.stop - start, inputs)).array()
        scale, integers = _levels(chunk, LEVELS, tensor)
        scales[part], values[:, part] = scale[:, 0], integers.T
    return values, scales


def quantize_rows(tensor: MappedTensor) -> tuple[Array, Array]:
    """A table (rows, width) -> the same as int8 from -127 to 127, and (rows, 1) float32, so that q * scale is the table, nearly."""
    count, width = tensor.shape
    values, scales = np.empty((count, width), np.int8), np.empty((count, 1), np.float32)
    rows = max(1, CHUNK // width)
    for start in range(0, count, rows):
        part = slice(start, min(count, start + rows))
        chunk = _piece(tensor, start * width, (part.stop - start, width)).array()
        scales[part], values[part] = _levels(chunk, 127, tensor)
    return values, scales


def _levels(chunk: Array, levels: int, tensor: MappedTensor) -> tuple[Array, Array]:
    """-> each row's scale (rows, 1) and its values as integers up to `levels`, still float32."""
    largest = np.maximum(chunk.max(axis=1), -chunk.min(axis=1))[:, None]
    if not np.isfinite(largest).all():
        raise ModelError(f"the weights in {tensor.path} are not finite: fetch them again")
    scales = np.where(largest < LEAST, 1, largest) / levels
    return scales, np.rint(chunk / scales)


def _matrices(spec: ModelSpec, part: int) -> dict[str, TensorSpec]:
    """A block's matrices by their names in the graphs."""
    tensors = zip(relative_names(spec, part), part_tensors(spec, part), strict=True)
    return {relative: tensor for relative, tensor in tensors if len(tensor.shape) == 2 and tensor.size}


def _layout(tensors: list[TensorSpec]) -> tuple[dict[str, int], int]:
    """Where each tensor begins in the file, its scales behind it, and the file's length."""
    places, end = {}, 0
    for tensor in tensors:
        places[tensor.name] = end
        end += _aligned(tensor.size) + _aligned(4 * tensor.shape[0])
    return places, end


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _piece(tensor: MappedTensor, start: int, shape: tuple[int, ...]) -> MappedTensor:
    """Some elements of a tensor from element `start`."""
    item = tensor.num_bytes // math.prod(tensor.shape)
    return MappedTensor(tensor.path, tensor.offset + start * item, shape, tensor.dtype)


def _key(tensors: list[TensorSpec], weights: Mapping[str, MappedTensor]) -> str:
    """SHA-256 of the tensors' names, shapes and float32 values."""
    digest = hashlib.sha256(b"int8 %d %d\0" % (FORMAT, LEVELS))
    for tensor in tensors:
        digest.update(json.dumps([tensor.name, tensor.shape]).encode())
        for piece in weights[tensor.name].pieces():
            digest.update(piece.data)
    return digest.hexdigest()


def _sound(folder: Path, places: Mapping[str, int], num_bytes: int) -> bool:
    """Whether a whole set of this layout lies in a folder."""
    try:
        index = read_json(folder / INDEX, {})
        if not isinstance(index, dict) or (index.get("places"), index.get("num_bytes")) != (places, num_bytes):
            return False
        path = folder / WEIGHTS
        return path.stat().st_size == num_bytes and file_sha256(path).hex() == index.get("sha256")
    except (OSError, StoreError):
        return False


def _make(
    folder: Path, tensors: list[TensorSpec], weights: Mapping[str, MappedTensor], places: dict[str, int], num_bytes: int
) -> None:
    """Write a set; another process that writes the same one does no harm."""
    for path in (folder.parent, folder):
        make_folder(path, mode=0o700)
    for draft in folder.glob(".*"):  # of a process that was killed
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime > STALE_S:
                draft.unlink()
    digest = hashlib.sha256()
    with atomic_writer(folder / WEIGHTS) as file:
        for tensor in tensors:
            _write(file, digest, *quantize(weights[tensor.name]))  # held by no name, so that it is gone before the next
    write_json(folder / INDEX, {"places": places, "num_bytes": num_bytes, "sha256": digest.hexdigest()})


def _write(file: IO[bytes], digest: hashlib._Hash, values: Array, scales: Array) -> None:
    for array in (values, scales.astype("<f4", copy=False)):
        for data in (array.data, bytes(_aligned(array.nbytes) - array.nbytes)):
            file.write(data)
            digest.update(data)


def _evict(cache: Path, used: Path) -> None:
    """Delete all sets but the newest, and `used` is never deleted. A process that has one open keeps its map."""
    with suppress(OSError):
        others = sorted((f for f in (cache / FOLDER).iterdir() if f != used), key=_last_use, reverse=True)
        for folder in others[KEPT - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)


def _last_use(folder: Path) -> float:
    """When a set was made or opened last."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
