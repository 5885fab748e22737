"""Writes `files/`: small hostile inputs for every decoder. Run `python -m tests.hostile.make_files` after a change here.

A file's folder names the decoder. A name that begins with `ok-` is odd and yet sound; all others must be refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack

from edge_runtime.manifest import Manifest
from edge_runtime.records import MAX_KEPT_BYTES
from edge_runtime.wire import CHUNK_HEADER, MAX_CONTROL_BYTES, encode_chunk, pack
from tests.samples import BLOB, MESSAGES, OTHER, message, small_manifest

FOLDER = Path(__file__).parent / "files"
SECTION_VALUES = 100
NAN32 = b"\xca\x7f\xc0\x00\x00"


def control_files() -> dict[str, bytes]:
    """Control messages; the name begins with the kind of the topic they come on, `st` where it does not matter."""
    status = message("st")
    files = {
        "st-empty": b"",
        "st-nil": b"\xc0",
        "st-number": b"\x01",
        "st-list": msgpack.packb([1, "st", 0.0, bytes(8), 0, {}]),
        "st-empty-map": b"\x80",
        "st-trailing-byte": status + b"\xc0",
        "st-twice": status + status,
        "st-unused-first-byte": b"\xc1",
        "st-text-of-4-gib": b"\xdb\xff\xff\xff\xff",
        "st-bytes-of-4-gib": b"\xc6\xff\xff\xff\xff",
        "st-list-of-4-gi": b"\xdd\xff\xff\xff\xff",
        "st-map-of-4-gi": b"\xdf\xff\xff\xff\xff",
        "st-extension-of-4-gib": b"\xc9\xff\xff\xff\xff\x01",
        "st-text-longer-than-the-message": b"\xd9\x10short",
        "st-lists-that-promise-lists": b"\xdc\x3f\xff" * (MAX_CONTROL_BYTES // 3),
        "st-short-lists-that-promise-lists": b"\x9f" * MAX_CONTROL_BYTES,
        "st-maps-that-promise-maps": b"\x8f\xa0" * (MAX_CONTROL_BYTES // 2),
        "st-only-empty-maps": b"\xdc\x3f\xf0" + b"\x80" * 0x3FF0,
        "st-only-empty-lists": b"\xdc\x3f\xf0" + b"\x90" * 0x3FF0,
        "st-only-maps-of-one": b"\xdc\x10\x00" + b"\x81\xa1a\xc0" * 0xFF0 + b"\xc0" * 16,
        "st-only-maps-of-one-as-body": _envelope("st", b=[{"a": None}] * 4000),
        "st-one-byte-over-the-limit": _padded(MAX_CONTROL_BYTES + 1),
        "ok-st-at-the-limit": _padded(MAX_CONTROL_BYTES),
        "st-deep-lists": b"\x91" * 5000 + b"\xc0",
        "st-deep-maps": b"\x81\xa1a" * 5000 + b"\xc0",
        "st-deep-version": _deep("st", "v"),
        "st-deep-type": _deep("st", "t"),
        "st-deep-body": _deep("st", "b"),
        "st-deep-field": _changed("st", round="here").replace(b"\xa4here", b"\x91" * 1000 + b"\xc0"),
        "ok-st-deep-unknown-field": _deep("st", "later"),
        "st-version-2": _envelope("st", v=2),
        "st-version-true": _envelope("st", v=True),
        "st-version-1.0": _envelope("st", v=1.0),
        "st-other-type": _envelope("st", t="join"),
        "st-no-type": _without("st", "t"),
        "st-no-boot": _without("st", "boot"),
        "st-no-body": _without("st", "b"),
        "st-body-is-nil": _envelope("st", b=None),
        "st-body-is-list": _envelope("st", b=[]),
        "st-time-nan": _envelope("st", ts=math.nan),
        "st-time-nan-of-4-bytes": msgpack.packb(_plain("st") | {"ts": 0}).replace(b"\xa2ts\x00", b"\xa2ts" + NAN32),
        "st-time-infinite": _envelope("st", ts=math.inf),
        "st-time-text": _envelope("st", ts="now"),
        "st-boot-of-7-bytes": _envelope("st", boot=bytes(7)),
        "st-boot-text": _envelope("st", boot="12345678"),
        "st-sequence-negative": _envelope("st", seq=-1),
        "st-sequence-2-to-64": _envelope("st", seq=(1 << 64) - 1),
        "st-count-2-to-64": _changed("st", round=(1 << 64) - 1),
        "st-count-negative": _changed("st", step=-1),
        "st-count-is-bool": _changed("st", steps=True),
        "st-count-is-float": _changed("st", steps=1.0),
        "st-text-is-bytes": _changed("st", state=b"online"),
        "st-text-empty": _changed("st", state=""),
        "st-text-too-long": _changed("st", activity="x" * 121),
        "ok-st-text-with-nul-and-control-characters": _changed("st", activity="\0\x1b[2J\u202e"),
        "st-not-utf-8": status.replace(b"training", b"train\xff\xfeg"),
        "st-surrogate-in-utf-8": status.replace(b"training", b"trai\xed\xa0\x80g"),
        "st-overlong-utf-8": status.replace(b"training", b"traini\xc0\xaf"),
        "st-extension-type": msgpack.packb(_plain("st") | {"later": msgpack.ExtType(5, b"abc")}),
        "st-timestamp-type": msgpack.packb(_plain("st") | {"later": msgpack.Timestamp(1, 2)}),
        "st-extension-as-body": msgpack.packb(_plain("st") | {"b": msgpack.ExtType(5, b"abc")}),
        "st-number-as-key": msgpack.packb(_plain("st") | {1: 2}, strict_types=False),
        "st-nil-as-key": b"\x81\xc0\xc0",
        "st-list-as-key": b"\x81\x91\xc0\xc0",
        "st-map-as-key": b"\x81\x80\xc0",
        "st-duplicate-type": _twice(msgpack.packb(_plain("st")), "t", "join"),
        "ok-st-duplicate-sequence": _twice(msgpack.packb(_plain("st")), "seq", 43),
        "model-manifest-of-31-bytes": _changed("model", manifest=BLOB[:31]),
        "model-manifest-as-text": _changed("model", manifest=BLOB.hex()[:32]),
        "model-version-2-to-64": _changed("model", version=(1 << 64) - 1),
        "model-bytes-beyond-reason": _changed("model", manifest_bytes=1 << 51),
        "round-rate-nan": _changed("round", settings={"learning_rate": math.nan}),
        "round-rate-infinite": _changed("round", settings={"learning_rate": math.inf}),
        "round-rate-negative": _changed("round", settings={"learning_rate": -1e-9}),
        "round-no-epochs": _changed("round", settings={"epochs": 0}),
        "round-seed-negative": _changed("round", settings={"seed": -1}),
        "join-budget-negative": _changed("join", budget={"memory_bytes": -1}),
        "join-row-deep": _changed("join", table=[{**dataclasses.asdict(MESSAGES["join"].table[0]), "depth": 1001}]),
        "join-rows-are-numbers": _changed("join", table=[1, 2]),
        "join-too-many-rows": _changed("join", table=[{}] * 1025),
        "join-table-is-map": _changed("join", table={"0": {}}),
        "grant-no-plan": _changed("grant", plan=None),
        "grant-nonce-short": _changed("grant", nonce=bytes(15)),
        "grant-time-negative": _changed("grant", report_within_s=-1),
        "grant-pruning-is-a-list": _changed("grant", plan=_plain("grant")["b"]["plan"] | {"pruning": []}),
        "grant-pruning-kept-too-long": _pruning(kept=bytes(MAX_KEPT_BYTES + 1)),
        "grant-pruning-kept-is-text": _pruning(kept="all"),
        "grant-pruning-of-everything": _pruning(to=1.0),
        "grant-pruning-nan": _pruning(to=math.nan),
        "grant-pruning-less-than-nothing": _pruning(to=-0.1),
        "grant-pruning-never": _pruning(every=0),
        "grant-pruning-without-a-rule": _pruning(by=""),
        "ok-grant-pruning-is-nil": _changed("grant", plan=_plain("grant")["b"]["plan"] | {"pruning": None}),
        "offer-kept-too-long": _changed("offer", kept=bytes(MAX_KEPT_BYTES + 1)),
        "offer-kept-is-text": _changed("offer", kept="all"),
        "offer-no-examples": _changed("offer", num_examples=0),
        "offer-examples-beyond-the-sum": _changed("offer", num_examples=(1 << 20) + 1),
        "offer-loss-nan": _changed("offer", last_loss=math.nan),
        "offer-bytes-negative": _changed("offer", num_bytes=-1),
        "ack-reason-too-long": _changed("ack", reason="x" * 501),
        "ack-blob-of-33-bytes": _changed("ack", blob=bytes(33)),
        "need-nothing": _changed("need", ranges=[]),
        "need-too-much": _changed("need", ranges=[{"blob": BLOB, "start": 0, "end": 1}] * 17),
        "need-negative": _changed("need", ranges=[{"blob": BLOB, "start": -1, "end": 1}]),
        "missing-nothing": _changed("missing", blob=None),
        "ask-nothing": _changed("ask", texts=[]),
        "ask-too-much": _changed("ask", texts=["a"] * 65),
        "ask-one-text": _changed("ask", texts="a"),
        "ask-bytes": _changed("ask", texts=[b"a"]),
        "ask-id-of-15-bytes": _changed("ask", id=bytes(15)),
        "ask-over-the-limit": _changed("ask", texts=["x" * MAX_CONTROL_BYTES]),
        "ok-ask-an-empty-text": _changed("ask", texts=[""]),
        "answer-too-much": _changed("answer", labels=["a"] * 65),
        "answer-label-too-long": _changed("answer", labels=["x" * 201]),
        "answer-probability-2": _changed("answer", probabilities=[2.0]),
        "answer-probability-nan": _changed("answer", probabilities=[math.nan]),
        "answer-probability-text": _changed("answer", probabilities=["1"]),
        "answer-version-negative": _changed("answer", model_version=-1),
    }
    for kind in MESSAGES:
        files[f"{kind}-cut"] = message(kind)[:-5]
    return files


def manifest_files() -> dict[str, bytes]:
    """Manifests that are damaged or do not hold together."""
    sound = small_manifest()
    first, *rest = sound.tensors

    def tensor(**changes: Any) -> bytes:
        return _manifest(tensors=(dataclasses.replace(first, **changes), *rest))

    return {
        "empty": b"",
        "cut": pack(sound)[:-9],
        "a-list": b"\x90",
        "extension-type": pack(sound).replace(b"\xa6parent\xc4\x20" + BLOB, b"\xa6parent\xd6\x05abcd"),
        "format-2": _manifest(format=2),
        "version-negative": _manifest(version=-1),
        "kept-too-long": _manifest(kept=bytes(MAX_KEPT_BYTES + 1)),
        "kept-is-text": _manifest(kept="all"),
        "no-tensors": _manifest(tensors=()),
        "one-tensor-twice": _manifest(tensors=(first, first, *rest)),
        "one-name-twice": tensor(name=rest[0].name),
        "one-blob-two-sizes": tensor(blob=rest[0].blob),
        "tokenizer-and-tensor-two-sizes": tensor(blob=OTHER),
        "ok-one-blob-one-size": tensor(shape=rest[0].shape, blob=rest[0].blob),
        "ok-no-elements": tensor(shape=(0, 7)),
        "a-block-missing": _manifest(tensors=tuple(t for t in sound.tensors if t.part != 0)),
        "no-head": _manifest(tensors=tuple(t for t in sound.tensors if t.part != 2)),
        "a-block-too-many": tensor(part=3),
        "part-below-the-embedding": tensor(part=-2),
        "blocks-1000": _manifest(num_blocks=1000),
        "no-blocks": _manifest(num_blocks=0),
        "shape-of-2-to-64-elements": tensor(shape=(1 << 32, 1 << 32)),
        "shape-that-overflows-to-0": tensor(shape=(1 << 40, 1 << 24)),
        "shape-beyond-reason": tensor(shape=(1 << 40,) * 8),
        "dimension-beyond-reason": tensor(shape=((1 << 40) + 1,)),
        "dimension-negative": tensor(shape=(-1,)),
        "nine-dimensions": tensor(shape=(1,) * 9),
        "tensor-without-name": tensor(name=""),
        "hash-of-31-bytes": tensor(blob=BLOB[:31]),
        "no-tokenizer": _manifest(tokenizer_bytes=0),
        "tokenizer-beyond-reason": _manifest(tokenizer_bytes=(64 << 20) + 1),
        "no-labels": _manifest(labels=()),
        "a-label-twice": _manifest(labels=("a", "a")),
        "an-empty-label": _manifest(labels=("a", "")),
        "no-family": _manifest(family=""),
        "config-not-json": _manifest(config_json="{layers: 2}"),
        "config-cut": _manifest(config_json='{"a": 1'),
        "config-a-list": _manifest(config_json="[1, 2]"),
        "config-nested": _manifest(config_json='{"a": {"b": 1}}'),
        "config-null": _manifest(config_json='{"a": null}'),
        "config-nan": _manifest(config_json='{"a": NaN}'),
        "config-infinite": _manifest(config_json='{"a": -Infinity}'),
        "config-overflow": _manifest(config_json='{"a": 1e999}'),
        "config-deep": _manifest(config_json="[" * 16_000),
        "config-deep-value": _manifest(config_json='{"a": ' + "[" * 8000 + "]" * 8000 + "}"),
        "config-too-long": _manifest(config_json=json.dumps({"a": "x" * 16_384})),
    }


def chunk_files() -> dict[str, bytes]:
    """Chunks whose header or data is damaged."""
    sound = encode_chunk(BLOB, 65_536, b"some bytes")

    def chunk(
        magic: bytes = b"EFC1", offset: int = 0, length: int = 4, crc: int = 0xADF3F363, data: bytes = b"data"
    ) -> bytes:
        return CHUNK_HEADER.pack(magic, BLOB, offset, length, crc) + data

    return {
        "ok-sound": chunk(),
        "ok-beyond-every-blob": chunk(offset=1 << 50),
        "empty": b"",
        "only-magic": b"EFC1",
        "only-header": sound[:52],
        "header-cut": sound[:30],
        "data-cut": sound[:-1],
        "trailing-byte": sound + b"x",
        "other-magic": chunk(magic=b"EFC2"),
        "length-of-4-gib": chunk(length=0xFFFFFFFF),
        "length-0": chunk(length=0),
        "checksum-wrong": chunk(crc=0),
        "offset-beyond-reason": chunk(offset=(1 << 50) + 1),
        "offset-2-to-64": chunk(offset=(1 << 64) - 1),
        "a-control-message": message("st"),
    }


def safetensors_files() -> dict[str, bytes]:
    """Files that a checkpoint folder might hold."""

    def one(data: bytes = bytes(8), **entry: Any) -> bytes:
        return _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}, data)

    return {
        "ok-sound": one(),
        "ok-no-tensors": _safetensors({}, b""),
        "ok-odd-metadata": _safetensors({"__metadata__": [1, None]}, b""),
        "ok-duplicate-name": _raw(b'{"a":0,"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "ok-name-with-path": _safetensors(
            {"../../etc/passwd": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b""
        ),
        "empty": b"",
        "seven-bytes": bytes(7),
        "header-of-2-to-64": b"\xff" * 8 + b"{}",
        "header-longer-than-the-file": struct.pack("<Q", 3) + b"{}",
        "header-empty": struct.pack("<Q", 0),
        "header-not-json": _raw(b"PK\x03\x04 a zip file"),
        "header-not-utf-8": _raw(b'{"\xff": 1}'),
        "header-cut": _raw(b'{"a": '),
        "header-a-list": _raw(b"[]"),
        "header-null": _raw(b"null"),
        "header-deep": _raw(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        "header-number-of-5000-digits": _raw(b'{"a":' + b"9" * 5000 + b"}"),
        "entry-null": _safetensors({"a": None}),
        "entry-a-list": _safetensors({"a": [1, 2, 3]}),
        "entry-empty": _safetensors({"a": {}}),
        "entry-text": _safetensors({"a": "dtype"}),
        "dtype-unknown": one(dtype="F8"),
        "dtype-a-list": one(dtype=["F32"]),
        "dtype-a-map": one(dtype={}),
        "dtype-null": one(dtype=None),
        "shape-null": one(shape=None),
        "shape-a-number": one(shape=2),
        "shape-a-text": one(shape="2"),
        "shape-of-texts": one(shape=["2"]),
        "shape-of-floats": one(shape=[2.0]),
        "shape-of-bools": one(shape=[True, 2]),
        "shape-negative": one(shape=[-2]),
        "shape-twice-negative": one(shape=[-1, -2]),
        "shape-nan": one(shape=[math.nan]),
        "shape-of-2-to-64-elements": one(shape=[1 << 32, 1 << 32], data_offsets=[0, 0]),
        "shape-beyond-reason": one(shape=[10**300], data_offsets=[0, 4 * 10**300]),
        "shape-other-than-the-bytes": one(shape=[3]),
        "offsets-null": one(data_offsets=None),
        "offsets-three": one(data_offsets=[0, 4, 8]),
        "offsets-of-texts": one(data_offsets=["0", "8"]),
        "offsets-swapped": one(data_offsets=[8, 0]),
        "offsets-negative": one(data_offsets=[-8, 0]),
        "offsets-beyond-the-file": one(data_offsets=[4, 12]),
        "offsets-far-beyond-the-file": one(data_offsets=[1 << 62, (1 << 62) + 8]),
        "data-cut": one(data=bytes(7)),
    }


def section_files() -> dict[str, bytes]:
    """Sections of `SECTION_VALUES` values; the name begins with the codec."""
    bf16_one, nan16 = b"\x80\x3f", b"\x00\x7e"
    two_scales, ten = bf16_one * 2, bytes(range(1, 11))
    # ten indices below 100: 3 low bits each (4 bytes), then bit index // 8 + rank of 22 (3 bytes)
    lows, highs = bytes(4), sum(1 << (high + rank) for rank, high in enumerate(range(0, 10))).to_bytes(3, "little")
    same = sum(1 << rank for rank in range(10)).to_bytes(3, "little")
    beyond = sum(1 << (high + rank) for rank, high in enumerate([*range(9), 12])).to_bytes(3, "little")
    return {
        "ok-f32-zeros": bytes(400),
        "f32-nan": bytes(396) + b"\x00\x00\xc0\x7f",
        "f32-infinite": bytes(396) + b"\x00\x00\x80\x7f",
        "f32-cut": bytes(399),
        "ok-f16-subnormal": b"\x01\x00" * 100,
        "f16-nan": bytes(198) + nan16,
        "f16-infinite": bytes(198) + b"\x00\x7c",
        "ok-int8": two_scales + b"\x81" * 50 + b"\x7f" * 50,
        "int8-minus-128": two_scales + bytes(99) + b"\x80",
        "int8-scale-infinite": bf16_one + b"\x80\x7f" + bytes(100),
        "int8-scale-nan": b"\xc0\x7f" + bf16_one + bytes(100),
        "int8-scale-negative": bf16_one + b"\x80\xbf" + bytes(100),
        "int8-scale-that-overflows": b"\x7f\x7f" * 2 + b"\x7f" * 100,
        "int8-one-byte-more": two_scales + bytes(101),
        "ok-int4": two_scales + b"\x1f" * 50,
        "int4-nibble-0": two_scales + b"\x88" * 49 + b"\x80",
        "ok-topk10": lows + highs + bf16_one + ten,
        "topk10-index-twice": lows + same + bf16_one + ten,
        "topk10-indices-fall": b"\x0f" + bytes(3) + same + bf16_one + ten,
        "topk10-index-beyond": bytes(3) + b"\x38" + beyond + bf16_one + ten,
        "topk10-index-too-few": lows + b"\x01\x00\x00" + bf16_one + ten,
        "topk10-index-too-many": lows + b"\xff\xff\x3f" + bf16_one + ten,
        "topk10-bits-behind-the-low-ones": bytes(3) + b"\x40" + highs + bf16_one + ten,
        "topk10-bits-behind-the-high-ones": lows + highs[:2] + bytes([highs[2] | 0x80]) + bf16_one + ten,
        "topk10-int8-minus-128": lows + highs + bf16_one + b"\x80" + ten[1:],
        "topk10-cut": lows + highs + bf16_one + ten[:-1],
    }


def update_files() -> dict[str, bytes]:
    """Updates of the head of `small_spec()`, two tensors of 6 and 1 values, in f16 through zlib."""
    whole = zlib.compress(bytes(14), 0)  # stored, so that every zlib writes the same bytes
    return {
        "ok-zeros": whole,
        "empty": b"",
        "no-zlib": bytes(14),
        "cut": whole[:-1],
        "checksum-wrong": whole[:-1] + b"\xff",
        "one-byte-less": zlib.compress(bytes(13), 0),
        "one-byte-more": zlib.compress(bytes(15), 0),
        "longer-than-a-buffer": zlib.compress(bytes(200_000), 0),
        "trailing-byte": whole + b"\0",
        "two-streams": whole + whole,
        "nan": zlib.compress(bytes(12) + b"\x00\x7e", 0),
    }


def hostile_files() -> dict[str, bytes]:
    """All of them, by path below `files/`."""
    folders = {
        "control": control_files(),
        "manifest": manifest_files(),
        "chunk": chunk_files(),
        "safetensors": safetensors_files(),
        "section": section_files(),
        "update": update_files(),
    }
    return {f"{folder}/{name}": data for folder, files in folders.items() for name, data in files.items()}


def _plain(kind: str) -> dict[str, Any]:
    plain: dict[str, Any] = msgpack.unpackb(message(kind))
    return plain


def _envelope(kind: str, **changes: Any) -> bytes:
    data: bytes = msgpack.packb(_plain(kind) | changes)
    return data


def _changed(kind: str, **changes: Any) -> bytes:
    return _envelope(kind, b=_plain(kind)["b"] | changes)


def _pruning(**changes: Any) -> bytes:
    plan = _plain("grant")["b"]["plan"]
    return _changed("grant", plan=plan | {"pruning": plan["pruning"] | changes})


def _without(kind: str, key: str) -> bytes:
    data: bytes = msgpack.packb({k: v for k, v in _plain(kind).items() if k != key})
    return data


def _padded(size: int) -> bytes:
    data = _envelope("st", pad=bytes(1 << 12))
    return _envelope("st", pad=bytes((1 << 12) + size - len(data)))


def _twice(packed_map: bytes, key: str, value: Any) -> bytes:
    assert 0x80 <= packed_map[0] < 0x8F
    data: bytes = bytes([packed_map[0] + 1]) + packed_map[1:] + msgpack.packb(key) + msgpack.packb(value)
    return data


def _deep(kind: str, key: str, levels: int = 1015) -> bytes:
    """A list in a list in a list, as deep as msgpack's stack allows, in place of a value of the envelope."""
    packed = _envelope(kind, **{key: "here"})
    return packed.replace(b"\xa4here", b"\x91" * levels + b"\xc0")


def _manifest(**changes: Any) -> bytes:
    manifest: Manifest = small_manifest(**changes)
    return pack(manifest)


def _safetensors(header: Mapping[str, Any], data: bytes = bytes(8)) -> bytes:
    return _raw(json.dumps(header).encode(), data)


def _raw(header: bytes, data: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


if __name__ == "__main__":
    for path, data in hostile_files().items():
        file = FOLDER / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
