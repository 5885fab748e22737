"""The model on a device's disk: fetched whole, kept over a restart, healed where it was damaged, refused where it is a lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_models import bert
from edge_runtime.errors import ModelError, WireError
from edge_runtime.keeper import MAX_BAD_HASHES, MISSING_S, ModelKeeper
from edge_runtime.manifest import encode_manifest, make_manifest
from edge_runtime.source import MANIFEST_FILE
from edge_runtime.store import BlobStore
from edge_runtime.transfer import Sender
from edge_runtime.versions import VERSIONS_FILE, read_versions
from edge_runtime.wire import Model, Need, decode_chunk

CONFIG: dict[str, int | float | str] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
SPEC = bert.describe(CONFIG, ["no", "yes"], 16)


class World:
    """A coordinator's store here, a device's folder there, and what it said. The device may be started anew at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.there = folder / "device", BlobStore(folder / "coordinator")
        self.events: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        """As after a power cut."""
        self.keeper = ModelKeeper(self.folder, (SPEC.family,), self.events.append)
        self.sender = Sender(self.there)

    def publish(self, version: int, seed: int) -> Model:
        """A version whose head comes from a seed, the rest is always the same; -> what the coordinator says of it."""
        blobs = {}
        for number, tensor in enumerate(SPEC.tensors):
            random = np.random.default_rng([number, seed if tensor.part == SPEC.num_blocks else 0])
            blobs[tensor.name] = self.there.put(random.normal(size=tensor.shape).astype("<f4").tobytes())
        tokenizer = b"a tokenizer"
        manifest = make_manifest(SPEC, blobs, self.there.put(tokenizer), len(tokenizer), version=version)
        data = encode_manifest(manifest)
        return Model(version, self.there.put(data), len(data), False)

    def fetch(self, change: Callable[[bytes], bytes] = lambda data: data) -> int:
        """Ask and be answered until nothing is missing; -> bytes that came. `change` is what the channel does to them."""
        while need := self.keeper.requests(0.0):
            self.answer(need, change)
            self.keeper.complete()
        return self.sender.sent_bytes

    def answer(self, need: Need, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        """Every chunk of a request arrives."""
        assert not self.sender.ask(need.ranges)
        while chunk := self.sender.next_chunk():
            blob, offset, data = decode_chunk(chunk)
            self.keeper.accept(blob, offset, change(data), 0.0)

    def is_whole(self) -> bool:
        """Whether the device holds the bytes of every tensor of its model."""
        manifest = self.keeper.manifest
        assert manifest
        return all(self.keeper.store.path(b).read_bytes() == self.there.path(b).read_bytes() for b in manifest.blobs())

    def kinds(self) -> list[str]:
        """What kinds of events there were."""
        return [event["event"] for event in self.events]


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A device that holds version 1."""
    world = World(tmp_path)
    world.keeper.announce(world.publish(1, seed=1))
    world.fetch()
    return world


def wrong(data: bytes) -> bytes:
    """As many bytes, other ones."""
    return bytes(len(data))


def test_a_model_is_held_when_every_byte_of_it_is_here_and_is_there_after_a_restart(world: World) -> None:
    for _ in range(2):
        assert (world.keeper.held, world.keeper.up_to_date) == (1, world.keeper.announced is not None)
        assert world.is_whole()
        world.start()


def test_the_next_version_costs_only_what_changed_and_leaves_one_before_it(world: World) -> None:
    head = sum(t.num_bytes for t in SPEC.tensors if t.part == SPEC.num_blocks)
    for version in (2, 3, 4):
        world.start()
        sent = world.sender.sent_bytes
        next_version = world.publish(version, seed=version)
        world.keeper.announce(next_version)
        assert world.fetch() - sent == next_version.manifest_bytes + head
        assert world.keeper.held == version
        whole = next_version.manifest_bytes + sum(world.keeper.manifest.blobs().values())  # type: ignore[union-attr]
        assert (
            world.keeper.store.used_bytes() == whole + next_version.manifest_bytes + head
        )  # what the one before changed
        assert [h.manifest.version for h in read_versions(world.folder).held] == [version, version - 1]


# damage


@pytest.mark.parametrize("length", [0, 7])
def test_a_tensor_that_the_disk_has_cut_short_is_fetched_again_and_nothing_else(world: World, length: int) -> None:
    model = world.keeper.announced
    tensor = SPEC.tensors[0]
    assert model and world.keeper.manifest
    path = world.keeper.store.path(world.keeper.manifest.tensors[0].blob)
    path.write_bytes(path.read_bytes()[:length])
    world.start()
    assert world.keeper.held == 0, "what is damaged is not passed on to training"
    world.keeper.announce(model)
    assert world.fetch() == tensor.num_bytes
    assert world.keeper.up_to_date and world.is_whole()


def test_a_tensor_that_is_gone_is_fetched_again(world: World) -> None:
    model = world.keeper.announced
    assert model and world.keeper.manifest
    world.keeper.store.delete(world.keeper.manifest.tensors[3].blob)
    world.start()
    assert world.keeper.held == 0
    world.keeper.announce(model)
    assert world.fetch() == SPEC.tensors[3].num_bytes
    assert world.is_whole()


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x80"])
def test_a_manifest_that_cannot_be_read_is_said_and_made_anew_without_fetching_the_tensors(
    world: World, content: bytes
) -> None:
    model = world.keeper.announced
    assert model
    (world.folder / MANIFEST_FILE).write_bytes(content)
    world.start()
    assert world.keeper.held == 0
    assert "fetched again" in world.events[-1]["reason"]
    world.keeper.announce(model)
    assert world.fetch() == 0, "every blob is here"
    assert world.keeper.complete() and world.is_whole()


@pytest.mark.parametrize("content", [b"", b"\xc1" * 300])
def test_a_damaged_copy_of_the_manifest_in_the_store_is_fetched_again_and_no_reason_to_refuse_the_version(
    world: World, content: bytes
) -> None:
    model = world.keeper.announced
    assert model
    (world.folder / MANIFEST_FILE).unlink()
    world.keeper.store.path(model.manifest).write_bytes(content)
    world.start()
    world.keeper.announce(model)
    assert world.fetch() == model.manifest_bytes
    assert world.keeper.complete() and world.is_whole()


def test_a_tensor_of_an_older_version_that_is_cut_short_is_fetched_again_when_a_newer_one_has_it_too(
    world: World,
) -> None:
    first = world.keeper.manifest
    assert first
    world.keeper.announce(world.publish(2, seed=2))
    world.fetch()
    head = world.keeper.store.path(first.tensors[-2].blob)
    head.write_bytes(head.read_bytes()[:5])
    world.keeper.announce(world.publish(3, seed=1))
    world.fetch()
    assert world.keeper.held == 3 and world.is_whole()


def test_damaged_choices_are_said_and_forgotten_and_the_newest_model_stays(world: World) -> None:
    (world.folder / VERSIONS_FILE).write_bytes(b"{")
    world.start()
    assert world.keeper.held == 1 and world.is_whole()
    assert "pins and marks are forgotten" in world.events[-1]["reason"]
    assert not (world.folder / VERSIONS_FILE).exists()


# which version


def test_the_same_number_with_another_manifest_is_another_model(world: World) -> None:
    """A fleet that was begun anew counts from 1 again."""
    before = world.keeper.manifest
    other = world.publish(1, seed=2)
    world.keeper.announce(other)
    assert (world.keeper.held, world.keeper.up_to_date) == (1, False)
    world.fetch()
    assert world.keeper.up_to_date and world.is_whole()
    assert world.keeper.manifest and world.keeper.manifest != before


def test_after_a_restart_only_an_announcement_of_the_held_manifest_makes_it_up_to_date(world: World) -> None:
    model = world.keeper.announced
    assert model
    world.start()
    assert not world.keeper.up_to_date, "nobody has said yet what is newest"
    world.keeper.announce(dataclasses.replace(model, finished=True))
    assert world.keeper.up_to_date
    assert world.keeper.requests(0.0) is None


def test_an_older_version_is_not_followed_and_why_is_said(world: World) -> None:
    world.keeper.announce(world.publish(2, seed=2))
    world.fetch()
    world.keeper.announce(world.publish(1, seed=1))
    assert world.kinds()[-1] == "old-model"
    assert world.keeper.requests(0.0) is None
    assert world.keeper.held == 2 and world.is_whole()


# lies


def test_a_manifest_that_never_has_the_announced_hash_is_refused_after_three_tries_until_another_is_announced(
    world: World,
) -> None:
    world.keeper.announce(world.publish(2, seed=2))
    with pytest.raises(WireError, match="model 2 does not have the hashes it was announced with"):
        world.fetch(wrong)
    assert world.kinds().count("bad-hash") == MAX_BAD_HASHES == 3
    assert world.keeper.requests(0.0) is None, "it is not fetched for ever"
    assert world.keeper.held == 1 and world.is_whole()
    world.keeper.announce(world.publish(3, seed=3))
    world.fetch()
    assert world.keeper.held == 3 and world.is_whole()


def test_a_tensor_that_never_has_its_hash_is_refused_after_three_tries_and_the_model_before_stays(world: World) -> None:
    world.keeper.announce(world.publish(2, seed=2))
    manifest = world.keeper.requests(0.0)
    assert manifest
    world.answer(manifest)
    with pytest.raises(WireError, match="model 2"):
        world.fetch(wrong)
    assert world.kinds().count("bad-hash") == 3
    assert world.keeper.requests(0.0) is None
    world.start()
    assert world.keeper.held == 1 and world.is_whole()


def test_bytes_that_were_wrong_twice_do_no_harm_and_do_not_count_against_the_next_version(world: World) -> None:
    for version in (2, 3, 4):
        world.keeper.announce(world.publish(version, seed=version))
        for _ in range(2):
            need = world.keeper.requests(0.0)
            assert need
            world.answer(need, wrong)
        world.fetch()
        assert world.keeper.held == version and world.is_whole()


def test_a_manifest_of_another_version_than_announced_is_refused_once(world: World) -> None:
    world.keeper.announce(dataclasses.replace(world.publish(3, seed=2), version=2))
    with pytest.raises(WireError, match="of version 3, version 2 was announced"):
        world.fetch()
    assert world.keeper.requests(0.0) is None


def test_a_family_that_this_device_does_not_allow_is_refused_once_and_no_tensor_is_fetched(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.keeper = ModelKeeper(world.folder, ("some.other",), world.events.append)
    model = world.publish(1, seed=1)
    world.keeper.announce(model)
    with pytest.raises(ModelError, match="see --family"):
        world.fetch()
    assert world.sender.sent_bytes == model.manifest_bytes
    assert world.keeper.requests(0.0) is None


def test_after_a_blob_that_the_coordinator_lacks_it_is_asked_again_later_and_what_came_stays(world: World) -> None:
    world.keeper.announce(world.publish(2, seed=2))
    need = world.keeper.requests(100.0)
    assert need
    for _ in range(2):
        world.keeper.missing(need.ranges[0].blob, 100.0)
    assert world.keeper.requests(100.0 + MISSING_S - 1) is None, "not in a tight loop"
    assert world.kinds().count("problem") == 1
    while need := world.keeper.requests(100.0 + MISSING_S):
        world.answer(need)
        world.keeper.complete()
    assert world.keeper.held == 2 and world.is_whole()


def test_a_newer_version_is_fetched_at_once_whatever_the_one_before_lacked(world: World) -> None:
    world.keeper.announce(world.publish(2, seed=2))
    need = world.keeper.requests(0.0)
    assert need
    world.keeper.missing(need.ranges[0].blob, 0.0)
    assert world.keeper.requests(1.0) is None
    world.keeper.announce(world.publish(3, seed=3))
    world.fetch()
    assert world.keeper.held == 3 and world.is_whole()
