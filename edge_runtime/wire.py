"""Messages and their bytes: bounded msgpack maps, typed, checked before use, and the binary chunk (`docs/wire.md`).

Whatever comes in, a decoder returns a valid record or raises WireError, with no more memory than a small multiple of
the input. Never pickle. Imports the records; knows no topic, socket or clock.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
import types
import typing
import zlib
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union

import msgpack

from edge_runtime.errors import WireError
from edge_runtime.records import (
    Budget,
    Bytes,
    CostRow,
    Count,
    KeptGroups,
    Name,
    Plan,
    Range,
    Reason,
    Seconds,
    Sha256,
    TrainSettings,
)

PROTOCOL = 1
MAX_CONTROL_BYTES = 16 << 10
MAX_JOIN_BYTES = 128 << 10  # its cost table: two rows a block, of at most 212 bytes each; 255 blocks fit in any case
MAX_MANIFEST_BYTES = 512 << 10  # a 24-block BERT needs about 50 KiB
MAX_ASKED_TEXTS = 64
DEFAULT_TEXT = Range(0, 200)
DEFAULT_INT = Range(-(1 << 63), (1 << 63) - 1)
DEFAULT_ITEMS = Range(0, 512)


@dataclass(frozen=True)
class Status:
    """`up/st`, retained, and as the will with state "offline"."""

    state: Name  # online | offline | leaving
    software: Name
    model_version: Count  # the newest version held whole, 0 for none
    activity: Annotated[str, Range(0, 120)] = ""
    round: Count = 0
    step: Count = 0
    steps: Count = 0
    waiting: bool = False  # for the conditions of training: no round waits for this device meanwhile


@dataclass(frozen=True)
class Coordinator:
    """`all/coord`, retained: the coordinator is up, in its epoch (one more at each start)."""

    state: Name  # up | down
    epoch: Count
    software: Name


@dataclass(frozen=True)
class Model:
    """`all/model`, retained: the newest model version."""

    version: Count
    manifest: Sha256
    manifest_bytes: Annotated[int, Range(1, MAX_MANIFEST_BYTES)]
    finished: bool  # the run has no further round


@dataclass(frozen=True)
class Round:
    """`all/round`, retained: a round is open for joining."""

    run: Name
    round: Count
    epoch: Count
    model_version: Count
    method: Name
    settings: TrainSettings
    join_within_s: Seconds
    adapters: Annotated[str, Range(0, 8)] = ""  # what of LoRA adapters is sent, as in a plan


@dataclass(frozen=True)
class Join:
    """`up/join`: what this device could do for the round."""

    run: Name
    round: Count
    boot: Annotated[bytes, Range(8, 8)]
    num_examples: Annotated[int, Range(0, 1 << 20)]
    budget: Budget
    table: Annotated[tuple[CostRow, ...], Range(0, 1024)]
    needs_bytes: Bytes = 0  # the least memory any row needs, for a device where none fits
    reason: Reason = ""  # why it cannot take part, if it cannot
    train_ratio: Annotated[float, Range(0, 1e6)] = 0.0  # seconds of its last training over those promised; 0: none yet
    uplink_bytes_per_s: Annotated[float, Range(0, 1e12)] = 0.0  # as its last update was sent; 0: none yet


@dataclass(frozen=True)
class Grant:
    """`dn/grant`: the plan for this device, its lease named by the nonce."""

    run: Name
    round: Count
    nonce: Annotated[bytes, Range(16, 16)]
    model_version: Count
    plan: Plan
    report_within_s: Seconds


@dataclass(frozen=True)
class Offer:
    """`up/offer`: the update is durable on the device and ready to be fetched."""

    run: Name
    round: Count
    nonce: Annotated[bytes, Range(16, 16)]
    blob: Sha256
    num_bytes: Bytes
    codec: Name
    num_examples: Annotated[int, Range(1, 1 << 20)]
    train_s: Seconds
    peak_bytes: Bytes
    first_loss: Annotated[float, Range(-1e6, 1e6)]
    last_loss: Annotated[float, Range(-1e6, 1e6)]
    kept: KeptGroups = b""  # of a pruned model, at the end; empty: nothing was pruned


@dataclass(frozen=True)
class Ack:
    """`dn/ack`: the answer to a join or an offer."""

    run: Name
    round: Count
    status: Name  # committed | rejected | late | excluded | declined | wait
    reason: Reason = ""
    blob: Annotated[bytes, Range(0, 32)] = b""


@dataclass(frozen=True)
class BlobRange:
    """Bytes `start` to `end` (excluded) of a blob."""

    blob: Sha256
    start: Bytes
    end: Bytes


@dataclass(frozen=True)
class Need:
    """`up/need` and `dn/need`: the receiver asks for ranges, within its credit."""

    ranges: Annotated[tuple[BlobRange, ...], Range(1, 16)]


@dataclass(frozen=True)
class Missing:
    """`dn/missing`: a blob that was asked for is not here."""

    blob: Sha256


@dataclass(frozen=True)
class Ask:
    """`a/ASKER/DEVICE/ask`: texts to classify."""

    id: Annotated[bytes, Range(16, 16)]  # chosen at random by the asker
    texts: Annotated[tuple[Annotated[str, Range(0, MAX_CONTROL_BYTES)], ...], Range(1, MAX_ASKED_TEXTS)]


@dataclass(frozen=True)
class Answer:
    """`a/ASKER/DEVICE/answer`: the labels of an `Ask`'s texts in their order, or why there are none."""

    id: Annotated[bytes, Range(16, 16)]
    labels: Annotated[tuple[Annotated[str, Range(0, 200)], ...], Range(0, MAX_ASKED_TEXTS)] = ()
    probabilities: Annotated[tuple[Annotated[float, Range(0, 1)], ...], Range(0, MAX_ASKED_TEXTS)] = ()
    model_version: Count = 0  # that answered; 0 for a model of no fleet
    reason: Reason = ""


MESSAGES: dict[str, type[Any]] = {
    "st": Status,
    "coord": Coordinator,
    "model": Model,
    "round": Round,
    "join": Join,
    "grant": Grant,
    "offer": Offer,
    "ack": Ack,
    "need": Need,
    "missing": Missing,
    "ask": Ask,
    "answer": Answer,
}
KINDS = {cls: kind for kind, cls in MESSAGES.items()}


@dataclass(frozen=True)
class Envelope:
    """What every control message carries around its body."""

    sent_at: float  # Unix seconds by the sender's clock: for logs only
    boot: bytes  # random per start of the sender, 8 bytes
    sequence: int  # counts up within a boot
    body: Any


def encode(body: Any, *, sent_at: float, boot: bytes, sequence: int) -> bytes:
    """A control message. Raises WireError if it is over the limit: that is our bug or an absurd configuration."""
    fields = {
        "v": PROTOCOL,
        "t": KINDS[type(body)],
        "ts": float(sent_at),
        "boot": boot,
        "seq": sequence,
        "b": to_plain(body),
    }
    # a reason may quote a file name that is no UTF-8: that must not keep the message from being sent
    data: bytes = msgpack.packb(fields, use_bin_type=True, unicode_errors="replace")
    if len(data) > (limit := limit_bytes(KINDS[type(body)])):
        raise WireError(f"a {fields['t']} message of {len(data)} bytes is over the limit of {limit}")
    return data


def limit_bytes(kind: str) -> int:
    """The longest control message of a kind."""
    return MAX_JOIN_BYTES if kind == "join" else MAX_CONTROL_BYTES


def decode(data: bytes, kind: str) -> Envelope:
    """Check and read a control message that came on a topic of `kind`.

    Raises:
        WireError: it is too large, not msgpack, of another version or kind, or a field is missing or out of bounds.
    """
    fields = unpack(data, limit_bytes(kind))
    if not isinstance(fields, dict):
        raise WireError("a control message must be a map")
    version, named = fields.get("v"), fields.get("t")
    if type(version) is not int or version != PROTOCOL:
        raise WireError(
            f"protocol version {_shown(version)} is not understood, this is version {PROTOCOL}: update the older side"
        )
    if named != kind or kind not in MESSAGES:
        raise WireError(f"a message of type {_shown(named)} on a topic of kind {kind[:20]!r}")
    sent_at = from_plain(float, fields.get("ts"), "ts")
    boot = from_plain(Annotated[bytes, Range(8, 8)], fields.get("boot"), "boot")
    sequence = from_plain(Annotated[int, Range(0, 1 << 62)], fields.get("seq"), "seq")
    return Envelope(sent_at, boot, sequence, from_plain(MESSAGES[kind], fields.get("b"), "b"))


def _shown(value: Any) -> str:
    """For an error: not the repr of a list that is a thousand deep."""
    return repr(value)[:24] if isinstance(value, int | str) else f"({type(value).__name__})"


def pack(record: Any) -> bytes:
    """A record alone, without envelope: for ledgers and manifests. The same value gives the same bytes."""
    data: bytes = msgpack.packb(to_plain(record), use_bin_type=True)
    return data


def unpack_as(kind: Any, data: bytes, max_bytes: int = MAX_CONTROL_BYTES) -> Any:
    """A record that `pack` wrote, checked like one from the network."""
    return from_plain(kind, unpack(data, max_bytes), kind.__name__.lower())


def unpack(data: bytes, max_bytes: int) -> Any:
    """msgpack with every limit set: no extension types, text keys, and no length beyond the input's own.

    What it builds stays below about 80 bytes for each byte of input (measured with nothing but empty maps).
    """
    if len(data) > max_bytes:
        raise WireError(f"a message of {len(data)} bytes is over the limit of {max_bytes}")
    _check_counts(data)
    limit = len(data)
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=limit,
            max_map_len=limit,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData) as error:
        raise WireError(f"not a readable message: {str(error)[:100]}") from None


# msgpack's first bytes: how many bytes follow, how wide the number of bytes is, how wide the number of items is
_FIXED = {
    0xC0: 0,
    0xC2: 0,
    0xC3: 0,
    0xCA: 4,
    0xCB: 8,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ITEMS = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def _check_counts(data: bytes) -> None:
    """Refuse more promised items than there are bytes: msgpack makes room for a list before it reads any of it.

    Every item takes a byte, so sound messages pass. Without this, 16 KiB of nested list headers cost 78 MiB (measured).
    """
    position = promised = 0
    while position < len(data) and promised <= len(data):
        first = data[position]
        position += 1
        if 0x80 <= first < 0xA0:  # small map or list
            promised += (first & 15) * (2 if first < 0x90 else 1)
        elif 0xA0 <= first < 0xC0:  # small text
            position += first & 31
        elif first in _FIXED:
            position += _FIXED[first]
        elif first in _BYTES or first in _ITEMS:
            width = _BYTES.get(first) or _ITEMS[first]
            count = int.from_bytes(data[position : position + width], "big")
            position += width
            if first in _BYTES:
                position += count
            else:
                promised += count * (2 if first >= 0xDE else 1)
        elif 0xC0 < first < 0xE0:  # the rest are small integers
            raise WireError("not a readable message: an extension type")
    if promised > len(data):
        raise WireError("not a readable message: it promises more items than it has bytes")


def to_plain(value: Any) -> Any:
    """A record as maps, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return value


@functools.cache
def _fields(cls: Any) -> list[tuple[str, Any, bool]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    missing = dataclasses.MISSING
    return [
        (f.name, hints[f.name], f.default is missing and f.default_factory is missing) for f in dataclasses.fields(cls)
    ]


T = TypeVar("T")


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """`value` checked against a type hint (records, Annotated bounds, unions with None, tuples, scalars).

    Unknown keys of a record are ignored, so that a newer peer may send more. Raises WireError naming the field.
    """
    bounds: Range | None = None
    if typing.get_origin(kind) is Annotated:
        kind, *extra = typing.get_args(kind)
        bounds = next((e for e in extra if isinstance(e, Range)), None)
    if typing.get_origin(kind) in (Union, types.UnionType):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        (inner,) = [c for c in choices if c is not type(None)]
        return from_plain(Annotated[inner, bounds] if bounds else inner, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise WireError(f"{where} must be a map")
        found: dict[str, Any] = {}
        for name, hint, required in _fields(kind):
            if name in value:
                found[name] = from_plain(hint, value[name], f"{where}.{name}")
            elif required:
                raise WireError(f"{where}.{name} is missing")
        return kind(**found)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise WireError(f"{where} must be a list")
        _bounded(len(value), bounds or DEFAULT_ITEMS, f"the length of {where}")
        item = typing.get_args(kind)[0]
        return tuple(from_plain(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return _scalar(kind, value, bounds, where)


def _scalar(kind: Any, value: Any, bounds: Range | None, where: str) -> Any:
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:  # a whole number of JSON has no bounds
            number = math.inf
        if not math.isfinite(number):
            raise WireError(f"{where} must be finite")
        if bounds:
            _bounded(number, bounds, where)
        return number
    if type(value) is not kind:  # bool is no int here
        raise WireError(f"{where} must be {kind.__name__}, it is {type(value).__name__}")
    if kind is int:
        _bounded(value, bounds or DEFAULT_INT, where)
    elif kind is not bool:
        _bounded(len(value), bounds or DEFAULT_TEXT, f"the length of {where}")
    return value


def _bounded(number: float, bounds: Range, where: str) -> None:
    if not bounds.low <= number <= bounds.high:
        raise WireError(f"{where} must be within {bounds.low:g} and {bounds.high:g}, it is {str(number)[:24]}")


# A chunk is not msgpack: magic, the blob's hash, offset, length, CRC-32 of the data, then the data.
CHUNK_HEADER = struct.Struct(">4s32sQII")
CHUNK_MAGIC = b"EFC1"
MAX_CHUNK_BYTES = 256 << 10


def encode_chunk(blob: bytes, offset: int, data: bytes) -> bytes:
    """One chunk of a blob."""
    return CHUNK_HEADER.pack(CHUNK_MAGIC, blob, offset, len(data), zlib.crc32(data)) + data


def decode_chunk(payload: bytes) -> tuple[bytes, int, bytes]:
    """-> (blob, offset, data).

    Raises:
        WireError: wrong magic, length or checksum.
    """
    if not CHUNK_HEADER.size < len(payload) <= CHUNK_HEADER.size + MAX_CHUNK_BYTES:
        raise WireError(f"a chunk of {len(payload)} bytes")
    magic, blob, offset, length, crc = CHUNK_HEADER.unpack_from(payload)
    data = payload[CHUNK_HEADER.size :]
    if magic != CHUNK_MAGIC or length != len(data) or offset > 1 << 50:
        raise WireError("not a chunk")
    if zlib.crc32(data) != crc:
        raise WireError("a chunk whose checksum is wrong")
    return blob, offset, data
