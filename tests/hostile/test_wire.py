"""Bytes that no honest peer sends: every decoder gives a sound record or its one error, soon and with little memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.codecs import CODECS
from edge_runtime.encoding import decode_section, read_update
from edge_runtime.errors import EdgeError, ModelError, WireError
from edge_runtime.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, encode_manifest
from edge_runtime.records import CostRow, Plan
from edge_runtime.weights import read_safetensors
from edge_runtime.wire import (
    MAX_CONTROL_BYTES,
    MAX_JOIN_BYTES,
    MESSAGES,
    Envelope,
    decode,
    decode_chunk,
    encode,
    encode_chunk,
    from_plain,
    unpack,
    unpack_as,
)
from tests.hostile.make_files import FOLDER, SECTION_VALUES, hostile_files
from tests.samples import BLOB, BOOT, message, quickly, small_manifest, small_spec

FILES = hostile_files()
KINDS = st.sampled_from(sorted(MESSAGES))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.sampled_from([0, 1, -1, 1 << 31, 1 << 50, 1 << 63])
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=40)
    | st.sampled_from([BLOB, BOOT, "first", "online"])
)
RECORDS: list[type[Any]] = [*MESSAGES.values(), Manifest, CostRow, Plan]
FIELD_NAMES = st.sampled_from(sorted({field.name for record in RECORDS for field in dataclasses.fields(record)}))
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELD_NAMES | st.text(max_size=3), inner, max_size=6),
    max_leaves=12,
)


def check_control(data: bytes, kind: str) -> None:
    """A record that could be sent again as it is, or WireError."""
    try:
        envelope = decode(data, kind)
    except WireError as error:
        assert len(str(error)) < 300
    else:
        again = encode(envelope.body, sent_at=envelope.sent_at, boot=envelope.boot, sequence=envelope.sequence)
        assert decode(again, kind) == envelope


def check_manifest(data: bytes) -> None:
    """A manifest whose parts can be used, or WireError."""
    try:
        manifest = decode_manifest(data)
    except WireError as error:
        assert len(str(error)) < 300
    else:
        assert manifest.spec.suffix(0)
        assert all(0 <= size <= 8 << 30 for size in manifest.blobs().values())
        assert decode_manifest(encode_manifest(manifest)) == manifest


def check_chunk(data: bytes) -> None:
    """Address and data as they were encoded, or WireError."""
    try:
        blob, offset, inside = decode_chunk(data)
    except WireError:
        return
    assert encode_chunk(blob, offset, inside) == data


def check_safetensors(path: Path) -> None:
    """Tensors that can all be read, or ModelError."""
    try:
        tensors = read_safetensors(path)
    except ModelError as error:
        assert str(path) in str(error)
        return
    for tensor in tensors.values():
        assert tensor.offset + tensor.num_bytes <= path.stat().st_size
        assert tensor.array().nbytes == 4 * tensor.array().size


def read_one(name: str) -> Any:
    """What the decoder that `name`'s folder tells makes of a file."""
    path = FOLDER / name
    folder, _, file = name.partition("/")
    if folder == "control":
        return decode(path.read_bytes(), file.removeprefix("ok-").partition("-")[0])
    if folder == "manifest":
        return decode_manifest(path.read_bytes())
    if folder == "section":
        return decode_section(CODECS[file.removeprefix("ok-").partition("-")[0]], SECTION_VALUES, path.read_bytes())
    if folder == "update":
        return list(read_update(path, small_spec().suffix(0), "f16+zlib"))
    return decode_chunk(path.read_bytes()) if folder == "chunk" else read_safetensors(path)


def test_the_files_are_those_that_the_script_makes() -> None:
    found = {str(path.relative_to(FOLDER)): path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
    assert found == FILES, "run `python -m tests.hostile.make_files`"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_hostile_file_is_refused_with_the_one_error_of_its_decoder_and_an_odd_one_is_read(name: str) -> None:
    if "/ok-" in name:
        read_one(name)
        return
    with pytest.raises(EdgeError) as caught:
        read_one(name)
    assert type(caught.value) is (ModelError if name.startswith("safetensors") else WireError)
    assert str(caught.value)


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith("control")))
def test_a_hostile_control_message_is_no_message_of_any_other_kind_either(name: str) -> None:
    for kind in [*MESSAGES, "", "c"]:
        check_control(FILES[name], kind)


def costs_little(read: Callable[[], Any], peak_bytes: int, cpu_s: float) -> None:
    """Run a decoder that may refuse, and hold it to a bound of memory and time, without the collector's over other tests' objects."""
    gc.freeze()
    started_s = time.thread_time()
    for _ in range(3):
        try_to(read)
    needed_s = (time.thread_time() - started_s) / 3
    gc.unfreeze()
    assert needed_s < cpu_s
    tracemalloc.start()
    try:
        try_to(read)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < peak_bytes


def try_to(read: Callable[[], Any]) -> None:
    """Run it; being refused is fine."""
    try:
        read()
    except EdgeError:
        return


@pytest.mark.parametrize("name", sorted(n for n, data in FILES.items() if len(data) > 4000))
def test_the_worst_small_file_takes_below_2_mib_and_a_blink(name: str) -> None:
    costs_little(lambda: read_one(name), 2 << 20, 0.5)


WORST = {
    "empty maps": b"\xdd%s" + b"\x80",
    "empty lists": b"\xdd%s" + b"\x90",
    "maps of one": b"\xdd%s" + b"\x81\xa0\xc0",
    "maps of one with a name": b"\xdd%s" + b"\x81\xa1n\x80",
    "large numbers": b"\xdd%s" + b"\xcd\x01\xff",
    "floats": b"\xdd%s" + b"\xcb" + struct.pack(">d", 1.5),
    "two-letter texts": b"\xdd%s" + b"\xa2ab",
    "non-Latin texts": b"\xdd%s" + b"\xa4\xf0\x9f\x99\x82",
    "one-byte bytes": b"\xdd%s" + b"\xc4\x01x",
}


def filled(what: str, size: int) -> bytes:
    """A list of `size` bytes in all that holds nothing but one of WORST."""
    head, _, item = WORST[what].partition(b"%s")
    count = (size - 5) // len(item)
    return head + count.to_bytes(4, "big") + item * count


@pytest.mark.parametrize("size", [MAX_CONTROL_BYTES, MAX_JOIN_BYTES])
@pytest.mark.parametrize("what", sorted(WORST))
def test_what_msgpack_builds_stays_below_80_bytes_for_each_byte_of_input(what: str, size: int) -> None:
    data = filled(what, size)
    costs_little(lambda: unpack(data, size), 80 * len(data), 0.5)


@pytest.mark.parametrize("header", [b"\xdd%s", b"\xdc\xff\xff", b"\x91\xdd%s", b"\x81\xa0\xdd%s"])
def test_nested_promises_of_the_largest_manifest_take_no_memory(header: bytes) -> None:
    """msgpack makes room for a list's items when it reads the list's header: this asks for gigabytes."""
    piece = header.replace(b"%s", (MAX_MANIFEST_BYTES // 2).to_bytes(4, "big"))
    data = piece * (MAX_MANIFEST_BYTES // len(piece))
    costs_little(lambda: decode_manifest(data), 1 << 20, 1.0)


def test_a_manifest_at_the_limit_that_names_nothing_but_tiny_tensors_is_refused_within_its_memory() -> None:
    plain = msgpack.unpackb(encode_manifest(small_manifest()))
    plain["tensors"] = [{}] * 100_000
    data = msgpack.packb(plain)
    costs_little(lambda: decode_manifest(data), 80 * len(data), 1.0)
    with pytest.raises(WireError, match="the length of manifest.tensors must be within 1 and 8192"):
        decode_manifest(data)


@quickly(200)
@given(data=st.binary(max_size=200), kind=KINDS)
def test_random_bytes_are_refused_by_every_decoder(data: bytes, kind: str) -> None:
    check_control(data, kind)
    check_manifest(data)
    check_chunk(data)


@quickly(120)
@given(data=st.data(), kind=KINDS)
def test_a_sound_message_with_some_bytes_changed_is_read_or_refused(data: st.DataObject, kind: str) -> None:
    check_control(mutated(data, message(kind)), kind)


@quickly(80)
@given(data=st.data())
def test_a_sound_manifest_with_some_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    check_manifest(mutated(data, encode_manifest(small_manifest())))


@quickly(60)
@given(data=st.data())
def test_a_sound_chunk_with_some_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    check_chunk(mutated(data, encode_chunk(BLOB, 65_536, b"some bytes of a blob")))


@quickly(80)
@given(data=st.data())
def test_a_sound_safetensors_file_with_some_bytes_changed_is_read_or_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    header = {
        name: {"dtype": dtype, "shape": [1], "data_offsets": [at, at + 4]}
        for name, dtype, at in [("a", "F32", 0), ("b", "I32", 4)]
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(mutated(data, struct.pack("<Q", len(raw)) + raw + bytes(8)))
    check_safetensors(path)


def mutated(data: st.DataObject, sound: bytes) -> bytes:
    """Up to three cuts, insertions or replacements."""
    changed = sound
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed)))
        end = data.draw(st.integers(start, min(len(changed), start + data.draw(st.sampled_from([0, 1, 4, 1000])))))
        changed = changed[:start] + data.draw(st.binary(max_size=4)) + changed[end:]
    return changed


@quickly(120)
@given(value=PLAIN, kind=KINDS)
def test_any_value_of_msgpack_is_read_or_refused(value: Any, kind: str) -> None:
    data = msgpack.packb(value)
    check_control(data, kind)
    check_manifest(data)
    for record in (CostRow, Plan):
        with contextlib.suppress(WireError):
            assert isinstance(unpack_as(record, data), record)


@quickly(120)
@given(data=st.data(), kind=KINDS)
def test_any_value_in_any_field_of_a_message_is_read_or_refused(data: st.DataObject, kind: str) -> None:
    plain = msgpack.unpackb(message(kind))
    plain["b"][data.draw(st.sampled_from(sorted(plain["b"])))] = data.draw(PLAIN)
    check_control(msgpack.packb(plain), kind)


@quickly(80)
@given(data=st.data())
def test_any_value_in_any_field_of_a_manifest_is_read_or_refused(data: st.DataObject) -> None:
    plain = msgpack.unpackb(encode_manifest(small_manifest()))
    inside = data.draw(st.sampled_from([plain, *plain["tensors"]]))
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(PLAIN)
    check_manifest(msgpack.packb(plain))


@quickly(80)
@given(
    text=st.text(max_size=30)
    | st.recursive(SCALARS.filter(lambda v: not isinstance(v, bytes)), st.lists).map(json.dumps)
)
def test_any_config_of_a_manifest_is_read_or_refused(text: str) -> None:
    plain = msgpack.unpackb(encode_manifest(small_manifest())) | {"config_json": text}
    check_manifest(msgpack.packb(plain))


@quickly(60)
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists), kind=KINDS)
def test_what_json_can_hold_and_msgpack_cannot_is_read_or_refused_too(value: Any, kind: str) -> None:
    """State files and worker results are JSON and go through the same checks."""
    for field in dataclasses.fields(MESSAGES[kind]):
        with contextlib.suppress(WireError):
            from_plain(MESSAGES[kind], {field.name: value}, "x")


@quickly(80)
@given(payload=st.binary(max_size=300))
def test_random_bytes_are_no_safetensors_file(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(payload)
    check_safetensors(path)
    path.write_bytes(struct.pack("<Q", len(payload)) + payload + bytes(8))
    check_safetensors(path)


@quickly(80)
@given(
    entry=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "I32", "U8", ""])
            | st.none()
            | st.lists(st.integers()),
            "shape": st.lists(
                st.integers(-2, 5) | st.sampled_from([1 << 32, 1 << 63, 1.0, True, "1", None]), max_size=4
            ),
            "data_offsets": st.lists(
                st.integers(-8, 40) | st.sampled_from([1 << 63, 1.0, None]), min_size=1, max_size=3
            ),
        }
    )
)
def test_any_entry_of_a_safetensors_header_is_read_or_refused(tmp_path: Path, entry: Any) -> None:
    raw = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(32))
    check_safetensors(path)


def test_an_envelope_is_a_frozen_value() -> None:
    envelope = decode(message("st"), "st")
    assert isinstance(envelope, Envelope)
    assert hash(envelope) == hash(decode(message("st"), "st"))
