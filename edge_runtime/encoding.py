"""Deltas as bytes and back, section by section; what the bytes mean is `docs/wire.md`, how many there are `codecs.py`.

Integers: blocks of 64 values share a scale s, the largest magnitude by 127 or 7, rounded up to the upper half of a float32;
a value x becomes floor(x / s + u) with u uniform in [0, 1), which is x / s in the mean (stochastic rounding as in QSGD,
Alistarh et al. 2017, arXiv 1610.02132). s times an integer is exact in float32, so both sides hold the same values.
Top-k: the largest magnitudes of each section, their indices as Elias-Fano (Vigna 2013, arXiv 1206.4300), their values as int8.
What comes in is hostile: a decoder returns finite values of the right number or raises WireError. Holds some sections in
memory, never a tensor. Imports numpy; no torch, no network.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from edge_runtime.codecs import (
    BLOCK,
    CODECS,
    PACKED,
    SCALE_BYTES,
    SECTION,
    Codec,
    index_bytes,
    low_bits,
    section_sizes,
    unpacked,
)
from edge_runtime.errors import TrainingFailed, WireError
from edge_runtime.model import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
Random = np.random.Generator
ROUNDING = 0x656E636F  # beside a plan's seed: other random numbers than training draws from it
NOT_FINITE = 0x7F80  # from here on the upper half of a float32 is infinite, not a number or negative
READ_BYTES = 1 << 16


class Feedback(Protocol):
    """Error feedback: what earlier updates left out is added to this one, what this one leaves out is kept."""

    def before(self, name: str, start: int, count: int) -> Array:
        """What is kept of a tensor's values from `start` on."""

    def keep(self, left: Array) -> None:
        """What the next section in turn leaves out."""


def rounding(seed: int) -> Random:
    """The random numbers of an update's stochastic rounding: the same for the same plan, so that a retry gives the same bytes."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, ROUNDING])))


# sections


def encode_section(codec: Codec, values: Array, random: Random) -> bytes:
    """A section of float32 values, all finite."""
    if codec.sparse:
        kept = codec.kept(values.size)
        largest = np.argpartition(np.abs(values), values.size - kept)[values.size - kept :]
        largest.sort()
        return _encode_indices(largest, values.size) + _quantise(values[largest], codec.bits, random)
    if codec.bits == 32:
        return values.astype("<f4", copy=False).tobytes()
    if codec.bits == 16:
        with np.errstate(over="ignore"):  # above 65504 it is infinite, and refused: no update may hold more than 8
            return values.astype("<f2").tobytes()
    return _quantise(values, codec.bits, random)


def decode_section(codec: Codec, count: int, data: bytes) -> Array:
    """The `count` values of a section, float32.

    Raises:
        WireError: the bytes are not what `encode_section` writes for so many values.
    """
    if len(data) != codec.section_bytes(count):
        raise WireError(f"a section of {len(data)} bytes, {codec.section_bytes(count)} are wanted")
    if codec.sparse:
        kept = codec.kept(count)
        end = sum(index_bytes(count, kept))
        found = np.zeros(count, np.float32)
        found[_decode_indices(data[:end], kept, count)] = _dequantise(data[end:], codec.bits, kept)
    elif codec.bits <= 8:
        found = _dequantise(data, codec.bits, count)
    else:
        found = np.frombuffer(data, "<f4" if codec.bits == 32 else "<f2").astype(np.float32, copy=False)
    if not np.isfinite(found).all():
        raise WireError("values that are not finite")
    return found


def _quantise(values: Array, bits: int, random: Random) -> bytes:
    """Scales, then integers: of 8 bits in two's complement, of 4 bits with 8 added, the first in the lower half of a byte."""
    most = (1 << (bits - 1)) - 1
    blocks = np.zeros((-(-values.size // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: values.size] = values
    wanted = np.abs(blocks).max(axis=1) / np.float32(most)
    scales = ((wanted.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype("<u2")
    steps = _scales(scales)[:, None]
    blocks /= np.where(steps > 0, steps, np.float32(1))
    blocks += random.random(blocks.shape, np.float32)
    codes: Array = np.clip(np.floor(blocks), -most, most).astype(np.int8).reshape(-1)[: values.size]
    if bits == 4:
        halves = np.zeros(-(-codes.size // 2) * 2, np.uint8)
        halves[: codes.size] = codes + 8
        codes = halves[::2] | halves[1::2] << 4
    return bytes(scales.tobytes() + codes.tobytes())


def _dequantise(data: bytes, bits: int, count: int) -> Array:
    blocks = -(-count // BLOCK)
    scales = np.frombuffer(data, "<u2", blocks)
    if (scales >= NOT_FINITE).any():
        raise WireError("a scale that is negative or not finite")
    raw = np.frombuffer(data, np.uint8, offset=SCALE_BYTES * blocks)
    if bits == 4:
        halves = np.empty(2 * raw.size, np.uint8)
        halves[::2], halves[1::2] = raw & 15, raw >> 4
        if halves[count:].any():
            raise WireError("bits that mean nothing are set")
        codes = halves[:count].astype(np.int8) - np.int8(8)
    else:
        codes = raw.view(np.int8)
    if (codes == -(1 << (bits - 1))).any():
        raise WireError("an integer that no encoder writes")
    values: Array = np.zeros(blocks * BLOCK, np.float32)
    values[:count] = codes
    with np.errstate(over="ignore"):  # the caller refuses what is not finite
        values.reshape(blocks, BLOCK)[...] *= _scales(scales)[:, None]
    return values[:count]


def _scales(halves: Array) -> Array:
    """The float32 whose upper halves these are."""
    found: Array = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found


def _encode_indices(indices: Array, count: int) -> bytes:
    """Increasing indices below `count`: their low bits one after the other, then bit `(index >> low) + rank` for each."""
    low = low_bits(count, indices.size)
    lows = (indices[:, None] >> np.arange(low)) & 1
    highs = np.zeros(indices.size + ((count - 1) >> low), np.uint8)
    highs[(indices >> low) + np.arange(indices.size)] = 1
    return (
        np.packbits(lows.astype(np.uint8).reshape(-1), bitorder="little").tobytes()
        + np.packbits(highs, bitorder="little").tobytes()
    )


def _decode_indices(data: bytes, kept: int, count: int) -> Array:
    """Strictly increasing, below `count`."""
    low, low_bytes = low_bits(count, kept), index_bytes(count, kept)[0]
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    lows, highs = bits[: 8 * low_bytes], bits[8 * low_bytes :]
    places = np.flatnonzero(highs)
    if lows[kept * low :].any() or highs[kept + ((count - 1) >> low) :].any():
        raise WireError("bits that mean nothing are set")
    if places.size != kept:
        raise WireError(f"{places.size} indices, {kept} are wanted")
    indices = (places - np.arange(kept) << low) + lows[: kept * low].reshape(kept, low) @ (1 << np.arange(low))
    if (np.diff(indices) <= 0).any() or indices[-1] >= count:
        raise WireError("indices that do not increase, or lie beyond the tensor")
    return indices


# updates


def write_update(
    file: IO[bytes], codec_name: str, sizes: dict[str, int], deltas: Iterable[tuple[str, Array]], seed: int,
    feedback: Feedback | None = None,
) -> None:  # fmt: skip
    """Encode deltas, which come as flat pieces of tensors in the order of the plan's layout.

    Args:
        sizes: number of values of each tensor by name.
        feedback: only for codecs that leave values out.

    Raises:
        TrainingFailed: a value is not finite.
    """
    random = rounding(seed)
    for name, start, section in _sections(deltas):
        if not np.isfinite(section).all():
            raise TrainingFailed(f"the weights of {name} are not finite after training: lower the learning rate")
        codec = CODECS[codec_name].of(sizes[name])
        values = section if feedback is None else section + feedback.before(name, start, section.size)
        data = encode_section(codec, values, random)
        file.write(data)
        if feedback is not None:
            feedback.keep(values - decode_section(codec, values.size, data))


def _sections(pieces: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, int, Array]]:
    """Pieces of tensors of any size as sections: name, where in the tensor it begins, float32 values."""
    for name, group in itertools.groupby(pieces, itemgetter(0)):
        start, left = 0, np.empty(0, np.float32)
        for _, piece in group:
            left = np.concatenate([left, piece]) if left.size else piece
            while left.size >= SECTION:
                yield name, start, left[:SECTION]
                start, left = start + SECTION, left[SECTION:]
        if left.size:
            yield name, start, left


def pack_file(source: Path, target: IO[bytes]) -> int:
    """A file's bytes through zlib, entropy coding alone, since deltas hardly repeat; -> the number of bytes."""
    packer = zlib.compressobj(6, strategy=zlib.Z_HUFFMAN_ONLY)
    with source.open("rb") as file:
        while data := file.read(READ_BYTES):
            target.write(packer.compress(data))
    target.write(packer.flush())
    return target.tell()


def read_update(path: Path, layout: Sequence[TensorSpec], codec_name: str) -> Iterator[tuple[TensorSpec, int, Array]]:
    """The sections of an update's tensors in the layout's order: tensor, where in it the section begins, float32 values.

    Raises:
        WireError: it is not such an update; said of the first section that shows it, or at the end.
    """
    with path.open("rb") as file:
        source = _Unpacked(file) if codec_name.endswith(PACKED) else file
        for tensor in layout:
            codec, start = CODECS[unpacked(codec_name)].of(tensor.size), 0
            for count in section_sizes(tensor.size):
                try:
                    yield tensor, start, decode_section(codec, count, source.read(codec.section_bytes(count)))
                except WireError as error:
                    raise WireError(f"{tensor.name} has {error}") from None
                start += count
        if source.read(1):
            raise WireError("the update has more bytes than its plan")
        if isinstance(source, _Unpacked):
            source.check_end()


class _Unpacked:
    """A file that went through zlib, read as before; never more in memory than what is asked for and one buffer."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._zlib = file, zlib.decompressobj()

    def read(self, count: int) -> bytes:
        """`count` bytes, fewer where the stream ends or is cut off."""
        found = bytearray()
        while len(found) < count and not self._zlib.eof:
            data = self._zlib.unconsumed_tail or self._file.read(READ_BYTES)
            try:
                found += (piece := self._zlib.decompress(data, count - len(found)))
            except zlib.error as error:
                raise WireError(f"bytes that zlib does not read ({error})") from None
            if not data and not piece:
                break
        return bytes(found)

    def check_end(self) -> None:
        """Whether the stream ended whole, and nothing came behind it."""
        if not self._zlib.eof or self._zlib.unused_data or self._file.read(1):
            raise WireError("the update's zlib stream does not end where its file does")
