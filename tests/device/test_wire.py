"""Messages, records and chunks: what is written is what is read, the same bytes for ever, and bounds that hold."""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import WireError
from edge_runtime.records import Budget, CostRow, DeviceProfile, Plan, Range
from edge_runtime.wire import (
    CHUNK_HEADER,
    MAX_CHUNK_BYTES,
    MAX_CONTROL_BYTES,
    MAX_JOIN_BYTES,
    MAX_MANIFEST_BYTES,
    MESSAGES,
    Ack,
    Join,
    decode,
    decode_chunk,
    encode,
    encode_chunk,
    from_plain,
    pack,
    unpack,
    unpack_as,
)
from tests import samples
from tests.golden.make import FOLDER, golden
from tests.samples import BLOB, BOOT, HEAD_ROW, message, quickly, values

GOLDEN = golden()


def changed(kind: str, **fields: Any) -> bytes:
    """The fixed message of a kind with other fields in its body."""
    plain = msgpack.unpackb(message(kind))
    plain["b"].update(fields)
    data: bytes = msgpack.packb(plain)
    return data


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_encoder_still_writes_the_golden_bytes(name: str) -> None:
    assert GOLDEN[name] == (FOLDER / name).read_bytes(), "the wire has changed: see tests/golden/make.py"


def test_every_kind_of_message_has_golden_bytes() -> None:
    assert set(samples.MESSAGES) == set(MESSAGES)
    files = {path.name for path in FOLDER.iterdir() if path.suffix in (".msgpack", ".chunk")}
    assert files == set(GOLDEN)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_golden_bytes_are_read_as_the_value_they_were_made_from(kind: str) -> None:
    envelope = decode((FOLDER / f"{kind}.msgpack").read_bytes(), kind)
    assert envelope.body == samples.MESSAGES[kind]
    assert (envelope.sent_at, envelope.boot, envelope.sequence) == (1_700_000_000.5, BOOT, 42)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
@quickly(20)
@given(data=st.data())
def test_every_record_within_its_bounds_arrives_as_it_was_sent(kind: str, data: st.DataObject) -> None:
    body = data.draw(values(MESSAGES[kind]))
    envelope = decode(encode(body, sent_at=12.25, boot=BOOT, sequence=1), kind)
    assert envelope.body == body
    assert hash(envelope.body) == hash(body), "tuples arrive as tuples"


@pytest.mark.parametrize("kind", [Plan, CostRow, DeviceProfile])
@quickly(20)
@given(data=st.data())
def test_a_packed_record_is_unpacked_as_itself_and_always_to_the_same_bytes(kind: Any, data: st.DataObject) -> None:
    record = data.draw(values(kind))
    packed = pack(record)
    assert unpack_as(kind, packed) == record
    assert pack(unpack_as(kind, packed)) == packed


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_a_field_that_a_newer_peer_adds_is_ignored(kind: str) -> None:
    plain = msgpack.unpackb(message(kind))
    plain["later"] = {"signature": b"x" * 64}
    plain["b"]["later"] = [1, 2, {"deep": None}]
    assert decode(msgpack.packb(plain), kind).body == samples.MESSAGES[kind]


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_a_missing_field_is_named_unless_it_has_a_default(kind: str) -> None:
    for field in dataclasses.fields(MESSAGES[kind]):
        plain = msgpack.unpackb(message(kind))
        del plain["b"][field.name]
        if field.default is dataclasses.MISSING:
            with pytest.raises(WireError, match=rf"^b\.{field.name} is missing"):
                decode(msgpack.packb(plain), kind)
        else:
            assert getattr(decode(msgpack.packb(plain), kind).body, field.name) == field.default


@pytest.mark.parametrize("kind", sorted(MESSAGES))
@pytest.mark.parametrize("wrong", [None, -1, 1 << 63, "x" * 501, b"", [], {}, True, 1.5, [[]], [{}]])
def test_a_field_of_another_type_or_out_of_bounds_is_refused_and_named_or_it_is_sound(kind: str, wrong: Any) -> None:
    for field in dataclasses.fields(MESSAGES[kind]):
        try:
            body = decode(changed(kind, **{field.name: wrong}), kind).body
        except WireError as error:
            assert str(error).startswith((f"b.{field.name}", f"the length of b.{field.name}"))
        else:
            assert decode(encode(body, sent_at=0.0, boot=BOOT, sequence=0), kind).body == body


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["train_s", "first_loss", "last_loss"])
def test_numbers_that_are_not_finite_are_refused(field: str, number: float) -> None:
    with pytest.raises(WireError, match=f"b.{field} must be finite"):
        decode(changed("offer", **{field: number}), "offer")


@pytest.mark.parametrize("field", ["first_loss", "last_loss"])
def test_the_losses_of_an_offer_are_bounded_so_that_no_device_shifts_a_rounds_mean_without_end(field: str) -> None:
    for number in (1e6, -1e6, 0.0):
        assert getattr(decode(changed("offer", **{field: number}), "offer").body, field) == number
    for number in (1.001e6, -1.001e6, 1e308):
        with pytest.raises(WireError, match=f"b.{field} must be within -1e\\+06 and 1e\\+06"):
            decode(changed("offer", **{field: number}), "offer")


def test_a_manifest_is_announced_with_a_bounded_size() -> None:
    for size in (1, MAX_MANIFEST_BYTES):
        assert decode(changed("model", manifest_bytes=size), "model").body.manifest_bytes == size
    for size in (0, MAX_MANIFEST_BYTES + 1, 1 << 40):
        with pytest.raises(WireError, match="b.manifest_bytes must be within 1 and 524288"):
            decode(changed("model", manifest_bytes=size), "model")


def test_a_whole_number_passes_for_a_float_and_never_the_other_way_round() -> None:
    assert decode(changed("offer", train_s=3), "offer").body.train_s == 3.0
    with pytest.raises(WireError, match="must be int, it is float"):
        decode(changed("offer", num_bytes=3.0), "offer")
    with pytest.raises(WireError, match="must be int, it is bool"):
        decode(changed("offer", num_bytes=True), "offer")
    with pytest.raises(WireError, match="must be float, it is bool"):
        decode(changed("offer", train_s=True), "offer")


def test_bounds_hold_deep_inside_lists_of_records_and_the_error_says_where() -> None:
    rows = [dataclasses.asdict(HEAD_ROW), {**dataclasses.asdict(HEAD_ROW), "micro_batch": 0}]
    with pytest.raises(WireError, match=r"b\.table\[1\]\.micro_batch must be within 1 and 4096, it is 0"):
        decode(changed("join", table=rows), "join")


def test_an_absent_value_passes_where_the_record_allows_it_and_nowhere_else() -> None:
    body = decode(changed("join", budget={"memory_bytes": 5, "time_s": None}), "join").body
    assert (body.budget.time_s, body.budget.upload_bytes) == (None, None)
    with pytest.raises(WireError, match="must be int, it is NoneType"):
        decode(changed("join", budget={"memory_bytes": None}), "join")


@pytest.mark.parametrize("version", [0, 2, -1, "1", 1.0, True, None, [1], {}])
def test_another_protocol_version_is_refused_with_what_to_do(version: Any) -> None:
    plain = msgpack.unpackb(message("st"))
    plain["v"] = version
    with pytest.raises(WireError, match="this is version 1: update the older side"):
        decode(msgpack.packb(plain), "st")


def test_a_message_counts_only_on_a_topic_of_its_own_kind() -> None:
    for kind in MESSAGES:
        for topic_kind in [*MESSAGES, "", "c", "x" * 10_000]:
            if kind != topic_kind:
                with pytest.raises(WireError, match="on a topic of kind"):
                    decode(message(kind), topic_kind)


@pytest.mark.parametrize(
    "envelope",
    [{"boot": b"seven b"}, {"seq": -1}, {"seq": 1 << 62 | 1}, {"ts": math.nan}, {"ts": "now"}, {"boot": "b" * 8}],
)
def test_a_damaged_envelope_is_refused(envelope: dict[str, Any]) -> None:
    plain = {**msgpack.unpackb(message("st")), **envelope}
    with pytest.raises(WireError, match=next(iter(envelope))):
        decode(msgpack.packb(plain), "st")


def test_a_message_over_the_limit_is_neither_written_nor_read() -> None:
    rows = (HEAD_ROW,) * 1024
    join = dataclasses.replace(samples.MESSAGES["join"], table=rows)
    with pytest.raises(WireError, match=f"a join message of .* is over the limit of {MAX_JOIN_BYTES}"):
        encode(join, sent_at=0.0, boot=BOOT, sequence=0)
    for kind, limit in ((kind, MAX_JOIN_BYTES if kind == "join" else MAX_CONTROL_BYTES) for kind in MESSAGES):
        plain = {**msgpack.unpackb(message(kind)), "pad": b""}
        room = limit - len(msgpack.packb({**plain, "pad": bytes(limit // 2)})) + limit // 2
        assert decode(msgpack.packb({**plain, "pad": bytes(room)}), kind).body == samples.MESSAGES[kind]
        with pytest.raises(WireError, match=f"over the limit of {limit}"):
            decode(msgpack.packb({**plain, "pad": bytes(room + 1)}), kind)


def test_the_cost_table_of_a_model_with_255_blocks_fits_one_join_in_any_case() -> None:
    wide = CostRow(1000, False, 4096, 1 << 50, 1234.5678901, 1e9 / 3, 1 << 50)
    body = Join("r" * 64, 1 << 31, BOOT, 1 << 20, Budget(1 << 50, 1e9 / 3, 1 << 50), (wide,) * 511, 1 << 50, "🔥" * 500)
    data = encode(body, sent_at=1.5, boot=BOOT, sequence=1 << 62)
    assert len(data) <= MAX_JOIN_BYTES
    assert decode(data, "join").body == body


def test_a_text_that_is_no_unicode_is_sent_with_question_marks_instead_of_not_at_all() -> None:
    name = b"/data/gr\xf6\xdfe.csv".decode("utf-8", "surrogateescape")
    body = decode(encode(Ack("first", 1, "rejected", name), sent_at=0.0, boot=BOOT, sequence=0), "ack").body
    assert body.reason == "/data/gr??e.csv"


def test_from_plain_bounds_the_numbers_of_json_that_msgpack_could_not_carry() -> None:
    with pytest.raises(WireError, match="x must be finite"):
        from_plain(float, 10**400, "x")
    with pytest.raises(WireError, match="x must be within"):
        from_plain(int, 10**400, "x")
    with pytest.raises(WireError, match="x must be within"):
        from_plain(Annotated[int, Range(0, 5)], -(10**400), "x")


@dataclass(frozen=True)
class Texts:
    """Lists without bounds of their own."""

    names: tuple[str, ...]


def test_lists_and_texts_without_bounds_of_their_own_have_default_ones() -> None:
    assert from_plain(Texts, {"names": ["a"] * 512}, "t").names == ("a",) * 512
    with pytest.raises(WireError, match="the length of t.names must be within 0 and 512, it is 513"):
        from_plain(Texts, {"names": ["a"] * 513}, "t")
    with pytest.raises(WireError, match=r"the length of t.names\[0\] must be within 0 and 200"):
        from_plain(Texts, {"names": ["a" * 201]}, "t")


def test_unpack_reads_what_msgpack_writes() -> None:
    value = {"a": [1, -1, 2**63, -(2**63), 1.5, None, True, "ü", b"\xff", {}], "b" * 300: list(range(70_000))}
    assert unpack(msgpack.packb(value), 1 << 20) == value


def test_a_list_that_promises_more_than_the_message_holds_is_refused_before_it_is_made() -> None:
    for data in (
        b"\x92\xc0",
        b"\xdc\x00\x02\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\x80\x00\x00\x00",
        b"\x91" * 10,
        b"\x81\xa1a\xdc\x00\x09",
    ):
        with pytest.raises(WireError):
            unpack(data, 1024)


@quickly(60)
@given(
    blob=st.binary(min_size=32, max_size=32), offset=st.integers(0, 1 << 50), data=st.binary(min_size=1, max_size=2000)
)
def test_a_chunk_arrives_as_it_was_sent(blob: bytes, offset: int, data: bytes) -> None:
    assert decode_chunk(encode_chunk(blob, offset, data)) == (blob, offset, data)


def test_the_largest_chunk_is_read_and_a_larger_one_or_an_empty_one_is_not() -> None:
    assert len(decode_chunk(encode_chunk(BLOB, 0, bytes(MAX_CHUNK_BYTES)))[2]) == MAX_CHUNK_BYTES
    for size in (0, MAX_CHUNK_BYTES + 1):
        with pytest.raises(WireError, match="a chunk of"):
            decode_chunk(encode_chunk(BLOB, 0, bytes(size)))


def test_every_flipped_bit_of_a_chunk_is_noticed_except_in_its_address() -> None:
    """The blob's hash and the offset are not under the checksum: the receiver holds them against what it asked for."""
    good = encode_chunk(BLOB, 7, b"some data")
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            blob, offset, data = decode_chunk(bytes(bad))
        except WireError:
            continue
        assert 4 <= bit // 8 < 44
        assert (blob, offset) != (BLOB, 7)
        assert data == b"some data"


def test_a_chunk_header_is_52_bytes_in_network_order() -> None:
    magic, blob, offset, length, crc = CHUNK_HEADER.unpack((FOLDER / "c.chunk").read_bytes()[:52])
    assert (magic, blob, offset, length, crc) == (b"EFC1", BLOB, 65_536, 20, zlib.crc32(b"some bytes of a blob"))
