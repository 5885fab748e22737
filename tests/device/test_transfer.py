"""Blobs over a bad channel: a receiver and a sender joined in one process, with time and losses made by the test."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.store import BlobStore
from edge_runtime.transfer import (
    CREDIT_BYTES,
    CREDIT_CHUNKS,
    MAX_PENDING_RANGES,
    Receiver,
    Sender,
    chunk_bytes_at,
    split,
)
from edge_runtime.wire import MAX_CHUNK_BYTES, BlobRange, Need, decode, decode_chunk, encode
from tests.samples import quickly

KIB, MIB = 1 << 10, 1 << 20
SIZES = [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 300 * KIB, MIB, MIB + 1, MIB + 256 * KIB, 2 * MIB + 7]
TIMEOUT_S = 10.0


def sha(data: bytes) -> bytes:
    """The name of a blob."""
    return hashlib.sha256(data).digest()


class World:
    """A receiver here, a sender there, and two queues between them. Either side may be started anew at any time."""

    def __init__(self, folder: Path, contents: list[bytes]) -> None:
        self.here, self.there = BlobStore(folder / "here"), BlobStore(folder / "there")
        self.contents = {self.there.put(data): data for data in contents}
        self.now = 0.0
        self.up: list[Need] = []
        self.down: list[bytes] = []
        self.sent_bytes: Counter[bytes] = Counter()
        self.asked: dict[bytes, int] = {}
        self.start_receiver()
        self.start_sender()

    def start_receiver(self) -> None:
        """A new process on the old disk, over a new connection."""
        self.receiver = Receiver(BlobStore(self.here.folder), timeout_s=TIMEOUT_S)
        self.reconnect()
        for blob, data in self.contents.items():
            self.receiver.want(blob, len(data), self.now)

    def start_sender(self) -> None:
        """The same on the other side."""
        self.sender = Sender(BlobStore(self.there.folder))
        self.reconnect()

    def reconnect(self) -> None:
        """What was on its way is lost, and both know."""
        self.up, self.down, self.asked = [], [], {}
        if hasattr(self, "sender"):
            self.sender.clear()
        self.receiver.restart(self.now)

    def request(self) -> None:
        """The receiver asks, within its credit."""
        need = self.receiver.requests(self.now)
        if need:
            for wanted in need.ranges:
                here = self.here.partial_bytes(wanted.blob)
                assert wanted.start in (here, self.asked.get(wanted.blob)), (
                    "what is asked for follows what was, or begins anew"
                )
                assert wanted.end <= len(self.contents[wanted.blob])
                self.asked[wanted.blob] = wanted.end
            decoded = decode(encode(need, sent_at=0.0, boot=bytes(8), sequence=0), "need").body
            self.up.append(decoded)
        self.check_credit()

    def check_credit(self) -> None:
        """What is asked for and not here is never more than the credit."""
        waiting = {b: (self.here.partial_bytes(b), end) for b, end in self.asked.items() if not self.here.has(b)}
        assert sum(max(0, end - start) for start, end in waiting.values()) <= CREDIT_BYTES
        assert sum(len(list(split(start, end))) for start, end in waiting.values()) <= CREDIT_CHUNKS

    def answer(self) -> bool:
        """The sender sends one chunk."""
        chunk = self.sender.next_chunk()
        if chunk:
            self.down.append(chunk)
            blob, _, data = decode_chunk(chunk)
            self.sent_bytes[blob] += len(data)
        return chunk is not None

    def deliver_up(self) -> None:
        """One request arrives."""
        if self.up:
            assert self.sender.ask(self.up.pop(0).ranges) == []

    def deliver_down(self) -> None:
        """One chunk arrives."""
        if self.down:
            blob, offset, data = decode_chunk(self.down.pop(0))
            done = self.receiver.accept(blob, offset, data, self.now)
            assert done is not False, "nothing that arrives has another hash"
            assert bool(done) <= self.here.has(blob)

    def run_to_the_end(self) -> None:
        """From here on the channel is good: everything must come, in a number of steps that its size explains."""
        steps = 200 + 20 * sum(len(data) // (64 * KIB) + 1 for data in self.contents.values())
        for _ in range(steps):
            if self.receiver.idle:
                break
            self.request()
            quiet = not (self.up or self.down)
            self.deliver_up()
            self.answer()
            self.deliver_down()
            self.now += TIMEOUT_S / 3 if quiet else 0.01
        assert self.receiver.idle
        assert self.receiver.missing_bytes == 0
        assert self.receiver.requests(self.now) is None
        for blob, data in self.contents.items():
            assert self.here.path(blob).read_bytes() == data
            assert self.here.partial_bytes(blob) == 0


def content(size: int, seed: int) -> bytes:
    """Bytes that no other blob of the same world has."""
    return random.Random(seed).randbytes(size)


ACTIONS = ["request", "request", "up", "answer", "answer", "answer", "down", "down", "down", "lose up", "lose down"]
RARE_ACTIONS = [
    "twice up",
    "twice down",
    "mix up",
    "mix down",
    "wait",
    "wait long",
    "crash receiver",
    "crash sender",
    "reconnect",
]


@quickly(40)
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
    actions=st.lists(st.sampled_from(ACTIONS * 3 + RARE_ACTIONS), max_size=150),
    seed=st.integers(0, 2**32),
)
def test_over_a_channel_that_loses_doubles_and_mixes_messages_with_crashes_on_both_sides_every_blob_arrives_exactly(
    tmp_path: Path, sizes: list[int], actions: list[str], seed: int
) -> None:
    world = World(tmp_path / os.urandom(8).hex(), [content(size, i) for i, size in enumerate(sizes)])
    chance = random.Random(seed)
    for action in actions:
        if action == "request":
            world.request()
        elif action == "answer":
            world.answer()
        elif action == "up":
            world.deliver_up()
        elif action == "down":
            world.deliver_down()
        elif action.startswith("wait"):
            world.now += 2 * TIMEOUT_S if action.endswith("long") else 1.0
        elif action.startswith("crash"):
            world.start_receiver() if action.endswith("receiver") else world.start_sender()
        elif action == "reconnect":
            world.reconnect()
        else:
            queue: list[Need] | list[bytes] = world.up if action.endswith("up") else world.down
            if queue and action.startswith("lose"):
                queue.pop(0)
            elif queue and action.startswith("twice"):
                queue.insert(chance.randrange(len(queue) + 1), queue[0])  # type: ignore[arg-type]
            else:
                chance.shuffle(queue)
        world.check_credit()
    world.run_to_the_end()


@quickly(12)
@given(sizes=st.lists(st.sampled_from([*SIZES, 5 * MIB + 1]), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_over_a_good_channel_every_byte_is_sent_once_and_never_more_than_the_credit_is_on_its_way(
    tmp_path: Path, sizes: list[int], seed: int
) -> None:
    world = World(tmp_path / os.urandom(8).hex(), [content(size, i) for i, size in enumerate(sizes)])
    chance = random.Random(seed)
    while not world.receiver.idle:
        chance.choice(
            [world.request, world.deliver_up, world.answer, world.answer, world.deliver_down, world.deliver_down]
        )()
        flying = sum(len(decode_chunk(chunk)[2]) for chunk in world.down)
        assert flying <= CREDIT_BYTES
        assert len(world.down) <= CREDIT_CHUNKS
        world.now += 0.001
    assert world.sent_bytes == {blob: len(data) for blob, data in world.contents.items() if data}
    assert world.receiver.received_bytes == sum(map(len, world.contents.values()))
    world.run_to_the_end()


@pytest.mark.parametrize("lost", [0, 3, 14])
def test_a_lost_chunk_is_asked_for_again_once_and_costs_at_most_the_window(tmp_path: Path, lost: int) -> None:
    data = content(MIB, 1)
    world = World(tmp_path, [data])
    world.request()
    world.deliver_up()
    while world.answer():
        pass
    assert len(world.down) == CREDIT_CHUNKS
    del world.down[lost]
    while not world.receiver.idle:
        world.deliver_down()
        world.request()
        world.deliver_up()
        world.answer()
    assert world.sent_bytes[sha(data)] <= 2 * MIB - lost * 64 * KIB
    world.run_to_the_end()


def test_the_last_chunk_lost_shows_as_silence_and_is_asked_for_after_the_timeout(tmp_path: Path) -> None:
    data = content(200 * KIB, 1)
    world = World(tmp_path, [data])
    world.request()
    world.deliver_up()
    while world.answer():
        pass
    world.down.pop()
    while world.down:
        world.deliver_down()
    world.now = TIMEOUT_S
    world.request()
    assert not world.up, "it may still come"
    world.now += 0.1
    world.request()
    assert world.up == [Need((BlobRange(sha(data), 192 * KIB, 200 * KIB),))]
    world.run_to_the_end()
    assert world.sent_bytes[sha(data)] == 208 * KIB


def test_a_request_asked_again_in_vain_waits_for_another_timeout(tmp_path: Path) -> None:
    world = World(tmp_path, [content(MIB, 1)])
    asked = 0
    for tenth in range(1000):
        world.now = tenth / 10
        asked += world.receiver.requests(world.now) is not None
    assert asked == 10, "once at the beginning and then every ten seconds"


def test_a_request_asked_again_replaces_what_the_sender_still_has_of_it(tmp_path: Path) -> None:
    """A slow link: the timeout strikes while the sender has not come to all of it yet."""
    data = content(2 * MIB, 1)
    store = BlobStore(tmp_path)
    blob = store.put(data)
    sender = Sender(store)
    sender.ask([BlobRange(blob, 0, 2 * MIB)])
    assert sender.next_chunk()
    for _ in range(5):
        sender.ask([BlobRange(blob, 0, 2 * MIB)])
        sender.ask([BlobRange(blob, 64 * KIB, 2 * MIB)])
    sent = 0
    while chunk := sender.next_chunk():
        sent += len(decode_chunk(chunk)[2])
    assert sent <= 2 * MIB


def test_a_transfer_resumes_from_what_is_on_disk_and_fetches_only_the_rest(tmp_path: Path) -> None:
    data = content(MIB + 5, 1)
    world = World(tmp_path, [data])
    for _ in range(10):
        world.request()
        world.deliver_up()
        world.answer()
        world.deliver_down()
    here = world.here.partial_bytes(sha(data))
    assert 0 < here < len(data)
    assert world.receiver.missing_bytes == len(data) - here
    world.start_receiver()
    assert world.receiver.missing_bytes == len(data) - here
    before = world.sent_bytes[sha(data)]
    world.run_to_the_end()
    assert world.sent_bytes[sha(data)] - before == len(data) - here


def test_a_partial_of_any_length_goes_on_even_one_that_ends_within_a_chunk(tmp_path: Path) -> None:
    for length in (1, 12_345, 64 * KIB + 1, MIB - 1, MIB + 1, MIB + 300 * KIB):
        data = content(MIB + 300 * KIB, length)
        world = World(tmp_path / str(length), [])
        world.contents[world.there.put(data)] = data
        world.here.append_partial(sha(data), 0, data[:length])
        world.start_receiver()
        world.run_to_the_end()
        assert sum(world.sent_bytes.values()) == len(data) - length


def test_a_whole_partial_that_was_not_yet_checked_is_checked_and_not_fetched(tmp_path: Path) -> None:
    data = content(100, 1)
    world = World(tmp_path, [])
    world.here.append_partial(sha(data), 0, data)
    world.receiver.want(sha(data), 100, 0.0)
    assert world.receiver.idle
    assert world.here.has(sha(data))


def test_a_whole_partial_with_another_hash_and_one_that_is_too_long_are_fetched_anew(tmp_path: Path) -> None:
    for length in (100, 150):
        data = content(100, 1)
        world = World(tmp_path / str(length), [])
        world.contents[world.there.put(data)] = data
        world.here.append_partial(sha(data), 0, bytes(length))
        world.start_receiver()
        assert world.receiver.missing_bytes == 100
        world.run_to_the_end()


def test_what_is_here_already_is_not_wanted_and_an_empty_blob_needs_no_message(tmp_path: Path) -> None:
    world = World(tmp_path, [b""])
    assert world.receiver.idle
    assert world.here.has(sha(b""))
    blob = world.here.put(b"already")
    world.receiver.want(blob, 7, 0.0)
    assert world.receiver.idle


def test_a_blob_damaged_at_the_sender_is_noticed_and_fetched_anew_until_it_is_whole(tmp_path: Path) -> None:
    data = content(100 * KIB, 1)
    world = World(tmp_path, [data])
    path = world.there.path(sha(data))
    path.write_bytes(data[:-1] + b"?")
    results = []
    for _ in range(4):
        world.request()
        world.deliver_up()
        world.answer()
        for chunk in world.down:
            results.append(world.receiver.accept(*decode_chunk(chunk), world.now))
        world.down.clear()
    assert False in results
    assert not world.here.has(sha(data))
    path.write_bytes(data)
    world.reconnect()
    world.here.drop_partial(sha(data))
    world.run_to_the_end()


def test_chunks_that_nobody_asked_for_change_nothing(tmp_path: Path) -> None:
    data = content(100, 1)
    world = World(tmp_path, [data])
    stranger = content(50, 2)
    assert world.receiver.accept(sha(stranger), 0, stranger, 0.0) is None
    for offset, piece in [(0, data + b"beyond"), (99, b"xx"), (100, b"x"), (1 << 50, b"x"), (50, data[50:])]:
        assert world.receiver.accept(sha(data), offset, piece, 0.0) is None
    assert world.here.used_bytes() == 0
    assert world.receiver.received_bytes == 0
    assert world.receiver.accept(sha(data), 0, data, 0.0) is True


def test_a_cancelled_blob_is_forgotten_with_what_came_of_it(tmp_path: Path) -> None:
    data = content(100 * KIB, 1)
    world = World(tmp_path, [data])
    world.receiver.accept(sha(data), 0, data[: 64 * KIB], 0.0)
    world.receiver.cancel(sha(data))
    assert world.receiver.idle
    assert world.here.partial_bytes(sha(data)) == 0
    assert world.receiver.accept(sha(data), 0, data[: 64 * KIB], 0.0) is None
    world.receiver.cancel(sha(b"never heard of"))


def test_forgetting_all_keeps_the_partials(tmp_path: Path) -> None:
    data = content(100 * KIB, 1)
    world = World(tmp_path, [data])
    world.receiver.accept(sha(data), 0, data[: 64 * KIB], 0.0)
    world.receiver.forget_all()
    assert world.receiver.idle
    assert world.receiver.requests(0.0) is None
    assert world.here.partial_bytes(sha(data)) == 64 * KIB


def test_many_small_blobs_are_asked_for_sixteen_at_a_time(tmp_path: Path) -> None:
    world = World(tmp_path, [content(10, i) for i in range(40)])
    need = world.receiver.requests(0.0)
    assert need is not None
    assert len(need.ranges) == 16
    assert world.receiver.requests(0.0) is None, "until something of it has come"
    world.reconnect()
    world.run_to_the_end()


# the sender alone


def test_chunks_are_64_kib_for_the_first_mib_and_256_kib_after_it() -> None:
    assert [stop - start for start, stop in split(0, 2 * MIB)] == [64 * KIB] * 16 + [256 * KIB] * 4
    assert list(split(5, 5)) == []
    assert list(split(MIB - 1, MIB + 1)) == [(MIB - 1, MIB + 1)]
    assert all(chunk_bytes_at(offset) <= MAX_CHUNK_BYTES for offset in (0, MIB - 1, MIB, 1 << 50))


def test_a_sender_tells_which_blobs_it_lacks_and_serves_the_others(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob, absent = store.put(b"x" * 100), sha(b"absent")
    sender = Sender(store)
    assert sender.ask([BlobRange(absent, 0, 5), BlobRange(blob, 10, 20)]) == [absent]
    chunk = sender.next_chunk()
    assert chunk is not None
    assert decode_chunk(chunk) == (blob, 10, b"x" * 10)
    assert sender.next_chunk() is None


@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 5), (20, 10), (1 << 50, 1 << 50), (0, 1 << 50)])
def test_a_range_that_makes_no_sense_is_passed_over(tmp_path: Path, start: int, end: int) -> None:
    store = BlobStore(tmp_path)
    sender = Sender(store)
    assert sender.ask([BlobRange(store.put(b"x" * 100), start, end)]) == []
    assert sender.next_chunk() is None


def test_a_range_above_the_credit_is_passed_over(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(bytes(CREDIT_BYTES + 1))
    sender = Sender(store)
    sender.ask([BlobRange(blob, 0, CREDIT_BYTES + 1)])
    assert sender.next_chunk() is None
    sender.ask([BlobRange(blob, 1, CREDIT_BYTES + 1)])
    assert sender.next_chunk() is not None


def test_a_peer_that_asks_without_end_is_held_to_a_bound(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(bytes(1000))
    sender = Sender(store)
    for start in range(0, 1000, 2):
        sender.ask([BlobRange(blob, start, start + 1)] * 3)
    sent = 0
    while sender.next_chunk():
        sent += 1
    assert sent == MAX_PENDING_RANGES


def test_a_blob_removed_while_it_is_sent_is_passed_over_and_named_when_it_is_asked_for_again(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    gone, stays = store.put(bytes(200 * KIB)), store.put(b"stays")
    sender = Sender(store)
    sender.ask([BlobRange(gone, 0, 200 * KIB), BlobRange(stays, 0, 5)])
    assert sender.next_chunk() is not None
    store.delete(gone)
    chunk = sender.next_chunk()
    assert chunk is not None
    assert decode_chunk(chunk)[0] == stays
    assert sender.ask([BlobRange(gone, 0, 5)]) == [gone]


def test_a_blob_that_the_disk_has_cut_short_is_named_instead_of_what_is_left_of_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(bytes(200 * KIB))
    sender = Sender(store)
    assert sender.ask([BlobRange(blob, 0, 200 * KIB)]) == []
    os.truncate(store.path(blob), 100)
    assert sender.next_chunk() is None, "no chunk that is shorter than it was asked for"
    assert sender.ask([BlobRange(blob, 0, 101), BlobRange(blob, 0, 100)]) == [blob]


def test_what_a_peer_asked_before_it_reconnected_is_forgotten(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    sender = Sender(store)
    sender.ask([BlobRange(store.put(b"x"), 0, 1)])
    sender.clear()
    assert sender.next_chunk() is None
    assert sender.sent_bytes == 0
