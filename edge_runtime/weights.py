"""Where a model's weights lie: a safetensors file or single blobs, always memory-mapped, never copied by us.

numpy is imported only by the functions that hand out arrays, so that the idle agent needs none. The format is
https://huggingface.co/docs/safetensors: 8 bytes header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4}
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I64": "<i8", "I32": "<i4"}  # numpy's names
MAX_HEADER_BYTES = 16 << 20
MAX_JSON_BYTES = 8 << 20


@dataclass(frozen=True)
class MappedTensor:
    """One tensor's place: `num_bytes` from `offset` in the file at `path`, little-endian, row-major."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str = "F32"

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def array(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor as float32: a copy-on-write map of the file for F32, a converted copy otherwise."""
        import numpy as np

        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, np.float32)
        array = np.memmap(self.path, dtype=STORED[self.dtype], mode="c", offset=self.offset, shape=self.shape)
        return _as_float32(array, self.dtype)

    def pieces(self, size: int = 1 << 18) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
        """All values as little-endian float32, flat, `size` at a time; raises ModelError if they cannot be read."""
        count, item = math.prod(self.shape), ITEM_BYTES[self.dtype]
        for start in range(0, count, size):
            piece = MappedTensor(self.path, self.offset + start * item, (min(size, count - start),), self.dtype)
            try:
                values = piece.array().astype("<f4", copy=False)
            except (OSError, ValueError) as error:
                raise ModelError(f"cannot read the weights in {self.path}: {error}") from None
            yield values

    def differences(self, changed: np.ndarray[Any, np.dtype[Any]]) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
        """Another float32 array of this shape minus this one, flat, a mebibyte at a time."""
        flat, start = changed.reshape(-1), 0
        for piece in self.pieces():
            yield flat[start : start + piece.size] - piece
            start += piece.size

    def rows(self, numbers: Sequence[int]) -> np.ndarray[Any, np.dtype[Any]]:
        """Some rows of a matrix as float32 (len(numbers), columns), read and not mapped: no page stays resident."""
        import numpy as np

        item = ITEM_BYTES[self.dtype]
        stride = item * math.prod(self.shape[1:])
        out = np.empty((len(numbers), *self.shape[1:]), STORED[self.dtype])
        file = os.open(self.path, os.O_RDONLY)
        try:
            for target, number in zip(out, numbers, strict=True):
                if not 0 <= number < self.shape[0]:
                    raise ModelError(f"row {number} of a table of {self.shape[0]}: tokenizer and model are not a pair")
                if os.preadv(file, [target], self.offset + number * stride) != stride:
                    raise ModelError(f"{self.path} is cut off: fetch it again")
        finally:
            os.close(file)
        return _as_float32(out, self.dtype)


def release_pages(array: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Let go of a mapped array's resident pages; they come back from the file when they are read again."""
    mapped = getattr(array, "_mmap", None)  # numpy.memmap's own map
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def _as_float32(array: np.ndarray[Any, np.dtype[Any]], dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    import numpy as np

    if dtype == "F32":
        return array
    if dtype == "BF16":  # the upper half of a float32's bits
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def read_json_object(path: Path, wanted: str) -> dict[str, Any]:
    """A small JSON file that lies beside a checkpoint's tensors. Args: wanted: what its folder should hold, for the error.

    Raises:
        ModelError: it is missing, too large, or no JSON object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        value = json.loads(raw) if len(raw) <= MAX_JSON_BYTES else None
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: wanted a folder with {wanted}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object of at most {MAX_JSON_BYTES >> 20} MiB: fetch it again")
    return value


def read_safetensors(path: Path) -> dict[str, MappedTensor]:
    """The tensors of a safetensors file by name, with every offset checked against the file.

    Raises:
        ModelError: the file is missing, cut off or not safetensors.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise ModelError(f"{path} is not a safetensors file, or it is cut off: fetch it again")
            header = json.loads(file.read(header_bytes))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path} as safetensors: {error}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is not a safetensors file: its header is no map")
    start = 8 + header_bytes
    tensors: dict[str, MappedTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, dtype, (begin, end) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError("negative or non-integer number")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: the entry of {name!r} is damaged ({error}): fetch the file again") from None
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ModelError(f"{path}: {name!r} has dtype {dtype}, wanted one of {', '.join(ITEM_BYTES)}")
        tensor = MappedTensor(str(path), start + begin, shape, dtype)
        if end - begin != tensor.num_bytes or start + end > file_bytes:
            raise ModelError(f"{path}: the bytes of {name!r} do not match its shape {shape} or the file's length")
        tensors[name] = tensor
    return tensors


def write_safetensors(path: Path, tensors: Iterable[tuple[str, MappedTensor]]) -> None:
    """Write tensors as one float32 safetensors file, one tensor in memory at a time, replacing `path` atomically."""
    write_arrays(path, [(name, tensor.shape, tensor.array) for name, tensor in tensors])


def write_arrays(
    path: Path, items: Sequence[tuple[str, tuple[int, ...], Callable[[], Array]]]
) -> dict[str, MappedTensor]:
    """As `write_safetensors` of arrays that are made when their turn comes: (name, shape, maker). -> where they lie."""
    from edge_runtime.store import atomic_writer

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in items:
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8 bytes
    with atomic_writer(path) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, _, make in items:
            file.write(make().astype("<f4", copy=False).tobytes())
    return {
        name: MappedTensor(str(path), 8 + len(raw) + header[name]["data_offsets"][0], shape) for name, shape, _ in items
    }
