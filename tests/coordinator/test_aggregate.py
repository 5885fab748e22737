"""Sums of updates: exact, the same bits in any order and any pieces, and like a dense mean in float64."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_coordinator.aggregate import (
    MAX_DELTA,
    MAX_EXAMPLES,
    MAX_MEMBERS,
    SCALE_BITS,
    Partial,
    Update,
    apply,
    check_update,
    fold,
    mean_changes,
)
from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_coordinator.models import Models
from edge_runtime import encoding
from edge_runtime.codecs import CODECS, unpacked, update_bytes
from edge_runtime.errors import ModelError, StoreError
from edge_runtime.manifest import make_manifest
from edge_runtime.model import EMBED, ModelSpec, TensorSpec
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.store import BlobStore
from edge_runtime.wire import pack
from tests.samples import quickly, small_spec

SPEC = small_spec(3, 5)
Array = np.ndarray[Any, np.dtype[Any]]


def write_update(
    folder: Path, device: str, depth: int, num_examples: int, values: Array, spec: ModelSpec = SPEC
) -> Update:
    """An update whose deltas are `values`, repeated or cut to its size."""
    size = sum(t.size for t in spec.suffix(depth))
    path = folder / f"{device}.update"
    path.write_bytes(np.resize(values, size).astype("<f4").tobytes())
    return Update(device, path, num_examples, spec.suffix(depth))


def random_updates(folder: Path, seed: int, count: int, *, scale: float = 0.05) -> list[Update]:
    """Updates of different depths and weights."""
    chance = np.random.default_rng(seed)
    made = []
    for i in range(count):
        depth, examples = int(chance.integers(0, SPEC.num_blocks + 1)), int(chance.integers(1, 5000))
        made.append(write_update(folder, f"d{i}", depth, examples, chance.normal(0, scale, 500)))
    return made


def write_base(folder: Path, spec: ModelSpec = SPEC, seed: int = 0) -> dict[str, Path]:
    """Base tensors as files."""
    chance = np.random.default_rng(seed)
    paths = {}
    for i, tensor in enumerate(spec.tensors):
        paths[tensor.name] = folder / f"base{i}"
        paths[tensor.name].write_bytes(chance.normal(0, 0.5, tensor.size).astype("<f4").tobytes())
    return paths


def deltas(update: Update) -> dict[str, Array]:
    """An update's tensors in float64, read without the code under test."""
    raw, position, found = np.fromfile(update.path, "<f4").astype(np.float64), 0, {}
    for tensor in update.layout:
        found[tensor.name] = raw[position : position + tensor.size]
        position += tensor.size
    return found


def dense_mean(updates: Sequence[Update]) -> dict[str, Array]:
    """The weighted mean of each tensor over the devices that trained it, in float64, one sum after the other."""
    sums: dict[str, Array] = {}
    weights: dict[str, int] = {}
    for update in updates:
        for name, delta in deltas(update).items():
            sums[name] = sums.get(name, np.zeros_like(delta)) + update.num_examples * delta
            weights[name] = weights.get(name, 0) + update.num_examples
    return {name: total / weights[name] for name, total in sums.items()}


def means(partial: Partial, spec: ModelSpec = SPEC) -> dict[str, Array]:
    """What a partial sum stands for."""
    raw, position, found = np.fromfile(partial.path, "<i8"), 0, {}
    for tensor in spec.tensors:
        if tensor.name in partial.weights:
            total = raw[position : position + tensor.size]
            found[tensor.name] = total.astype(np.float64) / partial.weights[tensor.name] / 2**SCALE_BITS
            position += tensor.size
    assert position == raw.size
    return found


def applied(partial: Partial, base: dict[str, Path], store: BlobStore, spec: ModelSpec = SPEC) -> dict[str, bytes]:
    """The hashes of the tensors that the means change."""
    return apply(mean_changes(spec.tensors, partial), base, store)


def fold_in_pieces(updates: Sequence[Update], cuts: Sequence[int], folder: Path) -> Partial:
    """Fold some, then more onto them, and so on."""
    partial: Partial | None = None
    edges = [0, *sorted(cuts), len(updates)]
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        if end > start or partial is None:
            partial = fold(SPEC.tensors, partial, updates[start:end], folder / f"piece{i}")
    assert partial is not None
    return partial


@quickly(15)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 9), cuts=st.lists(st.integers(0, 9), max_size=4))
def test_any_order_and_any_pieces_give_the_same_bits_and_the_mean_of_a_dense_reference(
    tmp_path: Path, seed: int, count: int, cuts: list[int]
) -> None:
    updates = random_updates(tmp_path, seed, count)
    at_once = fold(SPEC.tensors, None, updates, tmp_path / "at-once")
    shuffled = random.Random(seed).sample(updates, count)
    pieces = fold_in_pieces(shuffled, [min(cut, count) for cut in cuts], tmp_path)
    assert pieces.path.read_bytes() == at_once.path.read_bytes()
    assert pieces.weights == at_once.weights
    reference, found = dense_mean(updates), means(at_once)
    assert set(found) == set(reference)
    for name, mean in reference.items():
        assert np.abs(found[name] - mean).max() <= 2**-27
    base, store = write_base(tmp_path), BlobStore(tmp_path / "store")
    assert applied(pieces, base, store) == applied(at_once, base, store)


@quickly(10)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-6, 1e-3, 0.05, 2.0]))
def test_the_new_tensors_are_base_plus_mean_to_the_last_bit_of_float32(tmp_path: Path, seed: int, scale: float) -> None:
    updates = random_updates(tmp_path, seed, 5, scale=scale / 4)
    base, store = write_base(tmp_path), BlobStore(tmp_path / "store")
    changed = applied(fold(SPEC.tensors, None, updates, tmp_path / "sum"), base, store)
    reference = dense_mean(updates)
    for name, blob in changed.items():
        new = np.fromfile(store.path(blob), "<f4").astype(np.float64)
        exact = np.fromfile(base[name], "<f4").astype(np.float64) + reference[name]
        half_ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
        assert (np.abs(new - exact) <= 2**-27 + half_ulp * 1.001).all()


def test_a_tensor_that_nobody_trained_stays_and_each_other_has_the_weight_of_those_who_did(tmp_path: Path) -> None:
    updates = [
        write_update(tmp_path, "head", 0, 10, np.float32(0.5)),
        write_update(tmp_path, "one", 1, 30, np.float32(-0.5)),
        write_update(tmp_path, "two", 2, 60, np.float32(1.0)),
    ]
    partial = fold(SPEC.tensors, None, updates, tmp_path / "sum")
    assert partial.weights == {
        "head.w": 100,
        "head.scale": 100,
        "block.2.w": 90,
        "block.2.b": 90,
        "block.1.w": 60,
        "block.1.b": 60,
    }
    changed = applied(partial, write_base(tmp_path), BlobStore(tmp_path / "store"))
    assert set(changed) == set(partial.weights)
    found = means(partial)
    assert found["head.scale"] == [0.5]
    assert (found["block.2.b"] == 0.5).all()
    assert (found["block.1.w"] == 1.0).all()


def test_an_update_of_all_blocks_reaches_blocks_and_head_and_never_the_embedding(tmp_path: Path) -> None:
    partial = fold(SPEC.tensors, None, [write_update(tmp_path, "all", 3, 1, np.float32(0.25))], tmp_path / "sum")
    assert set(partial.weights) == {t.name for t in SPEC.tensors if t.part != EMBED}


def test_deltas_of_different_tensors_are_not_mixed_up(tmp_path: Path) -> None:
    size = sum(t.size for t in SPEC.suffix(3))
    update = write_update(tmp_path, "d", 3, 7, np.arange(size, dtype=np.float32) / 128)
    found = means(fold(SPEC.tensors, None, [update], tmp_path / "sum"))
    for name, delta in deltas(update).items():
        assert (found[name] == delta).all()


def test_folding_leaves_the_old_sum_and_the_updates_as_they_were(tmp_path: Path) -> None:
    updates = random_updates(tmp_path, 1, 6)
    first = fold(SPEC.tensors, None, updates[:3], tmp_path / "first")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    second = fold(SPEC.tensors, first, updates[3:], tmp_path / "second")
    assert second.path != first.path
    assert {path: path.read_bytes() for path in before} == before
    again = fold(SPEC.tensors, first, updates[3:], tmp_path / "again")
    assert again.path.read_bytes() == second.path.read_bytes(), "after a crash it may be done once more"


def test_the_sum_of_the_most_members_with_the_most_examples_and_the_largest_deltas_does_not_overflow(
    tmp_path: Path,
) -> None:
    spec = replace(SPEC, num_blocks=1, tensors=(TensorSpec("head", (2,), 1),))
    update = write_update(tmp_path, "d", 0, MAX_EXAMPLES, np.array([MAX_DELTA, -MAX_DELTA]), spec)
    assert check_update(update) == ""
    members = [replace(update, device=f"d{i}") for i in range(MAX_MEMBERS)]
    partial = fold(spec.tensors, None, members, tmp_path / "sum")
    assert partial.weights == {"head": MAX_MEMBERS * MAX_EXAMPLES}
    assert np.fromfile(partial.path, "<i8").tolist() == [
        MAX_MEMBERS * MAX_EXAMPLES * 8 << SCALE_BITS,
        -(MAX_MEMBERS * MAX_EXAMPLES * 8 << SCALE_BITS),
    ]
    assert means(partial, spec)["head"].tolist() == [MAX_DELTA, -MAX_DELTA]


def test_a_change_below_the_scale_is_rounded_and_not_lost_in_a_drift(tmp_path: Path) -> None:
    """Rounding goes to the nearest even: it has no direction."""
    values = np.array([2**-29, 3 * 2**-29, -(2**-29), 2**-28, 0.0, 1e-30])
    spec = replace(SPEC, num_blocks=1, tensors=(TensorSpec("head", (6,), 1),))
    partial = fold(spec.tensors, None, [write_update(tmp_path, "d", 0, 1, values, spec)], tmp_path / "sum")
    assert np.fromfile(partial.path, "<i8").tolist() == [0, 2, 0, 1, 0, 0]


# what is not added


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(tmp_path: Path, bad: float, place: int) -> None:
    update = write_update(tmp_path, "d", 1, 5, np.float32(0.1))
    values = np.fromfile(update.path, "<f4")
    values[place] = bad
    update.path.write_bytes(values.tobytes())
    name = {0: "block.2.w", 7: "block.2.w", -1: "head.scale"}[place]
    assert check_update(update) == f"{name} has values that are not finite"


def test_a_change_that_is_no_training_is_refused(tmp_path: Path) -> None:
    assert check_update(write_update(tmp_path, "d", 2, 5, np.array([MAX_DELTA, -MAX_DELTA]))) == ""
    for value in (np.nextafter(np.float32(8), np.float32(9)), np.float32(-8.1), np.float32(3e38)):
        assert check_update(write_update(tmp_path, "d", 0, 5, value)) == "head.w changed by more than 8"


@pytest.mark.parametrize("change", [-4, -1, 1, 4, 4000])
def test_an_update_of_another_size_is_refused_with_both_sizes(tmp_path: Path, change: int) -> None:
    update = write_update(tmp_path, "d", 1, 5, np.float32(0.1))
    data = update.path.read_bytes()
    update.path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    assert check_update(update) == f"the update has {len(data) + change} bytes, its plan {len(data)}"


def test_an_empty_update_is_refused_and_not_mapped(tmp_path: Path) -> None:
    update = write_update(tmp_path, "d", 0, 5, np.float32(0.1))
    update.path.write_bytes(b"")
    assert "the update has 0 bytes" in check_update(update)


@quickly(40)
@given(raw=st.binary(min_size=44, max_size=44))
def test_random_bytes_of_the_right_size_are_added_or_refused_and_never_break_the_sum(
    tmp_path: Path, raw: bytes
) -> None:
    path = tmp_path / "random"
    path.write_bytes(raw)
    update = Update("d", path, MAX_EXAMPLES, SPEC.suffix(0))
    if check_update(update):
        return
    found = means(fold(SPEC.tensors, None, [update], tmp_path / "sum"))
    values = np.frombuffer(raw, "<f4").astype(np.float64)
    assert np.abs(np.concatenate([found["head.w"], found["head.scale"]]) - values).max() <= 2**-29


def test_a_model_that_would_not_be_finite_is_not_made(tmp_path: Path) -> None:
    base, store = write_base(tmp_path), BlobStore(tmp_path / "store")
    partial = fold(SPEC.tensors, None, [write_update(tmp_path, "d", 0, 5, np.array([8.0]))], tmp_path / "sum")
    for value in (math.nan, math.inf):
        base["head.scale"].write_bytes(np.float32(value).tobytes())
        with pytest.raises(ModelError, match="head.scale would not be finite: the model stays as it is"):
            applied(partial, base, store)


def test_tensors_without_elements_and_scalars_pass_through(tmp_path: Path) -> None:
    tensors = (
        TensorSpec("none", (0, 3), 0),
        TensorSpec("scalar", (), 0),
        TensorSpec("also none", (0,), 1),
        TensorSpec("head", (2,), 1),
        TensorSpec("last", (0,), 1),
    )
    spec = replace(SPEC, num_blocks=1, tensors=tensors)
    update = write_update(tmp_path, "d", 1, 5, np.array([1.0, 2.0, 3.0]), spec)
    assert check_update(update) == ""
    partial = fold(spec.tensors, fold(spec.tensors, None, [update], tmp_path / "one"), [update], tmp_path / "two")
    store = BlobStore(tmp_path / "store")
    changed = applied(partial, write_base(tmp_path, spec), store, spec)
    assert [store.size(changed[t.name]) for t in tensors] == [0, 4, 0, 8, 0]


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Ten tensors of 1 MiB: 20 MiB as sums. What one needs: its sum, its delta in float64 and two temporaries."""
    tensors = tuple(TensorSpec(f"t{i}", (1 << 18,), 1) for i in range(10))
    spec = replace(SPEC, num_blocks=1, tensors=tensors)
    updates = [write_update(tmp_path, f"d{i}", 0, 5, np.float32(0.5), spec) for i in range(2)]
    base, store = write_base(tmp_path, spec), BlobStore(tmp_path / "store")
    tracemalloc.start()
    for update in updates:
        assert check_update(update) == ""
    applied(fold(spec.tensors, None, updates, tmp_path / "sum"), base, store, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


# updates in codecs

WIDE = small_spec(2, 300)  # its matrices have more than a section, and top-k leaves values out


def encoded(folder: Path, device: str, depth: int, num_examples: int, seed: int, codec: str) -> Update:
    """A random update in a codec, with "+zlib" behind its name through zlib."""
    chance, raw = np.random.default_rng(seed), folder / f"{device}.raw"
    sizes = {t.name: t.size for t in WIDE.suffix(depth)}
    changed = ((name, chance.normal(0, 0.01, size).astype(np.float32)) for name, size in sizes.items())
    with raw.open("wb") as file:
        encoding.write_update(file, unpacked(codec), sizes, changed, seed)
    if codec == unpacked(codec):
        return Update(device, raw, num_examples, WIDE.suffix(depth), codec)
    path = folder / f"{device}.packed"
    path.write_bytes(zlib.compress(raw.read_bytes()))
    return Update(device, path, num_examples, WIDE.suffix(depth), codec)


def plain(update: Update, folder: Path) -> Update:
    """The same values, float32."""
    path = folder / f"{update.device}.plain"
    path.write_bytes(
        b"".join(v.tobytes() for _, _, v in encoding.read_update(update.path, update.layout, update.codec))
    )
    return replace(update, path=path, codec="f32")


OFFERED = [*CODECS, "f16+zlib", "int4+zlib", "topk1+zlib"]


def test_the_sum_is_exact_over_what_was_sent_in_any_mix_of_codecs_any_order_and_any_pieces(tmp_path: Path) -> None:
    updates = [encoded(tmp_path, f"d{i}", i % 3, 100 + i, i, codec) for i, codec in enumerate(OFFERED * 2)]
    assert [check_update(u) for u in updates] == [""] * len(updates)
    wanted = fold(WIDE.tensors, None, [plain(u, tmp_path) for u in updates], tmp_path / "plain-sum")
    at_once = fold(WIDE.tensors, None, updates, tmp_path / "at-once")
    assert at_once.path.read_bytes() == wanted.path.read_bytes()
    random.Random(1).shuffle(updates)
    first = fold(WIDE.tensors, None, updates[:7], tmp_path / "first")
    pieces = fold(WIDE.tensors, first, updates[7:], tmp_path / "second")
    assert pieces.path.read_bytes() == wanted.path.read_bytes()
    assert pieces.weights == wanted.weights


@pytest.mark.parametrize("codec", OFFERED)
def test_an_update_of_another_size_or_damaged_is_refused_whatever_its_codec(tmp_path: Path, codec: str) -> None:
    update = encoded(tmp_path, "d", 2, 10, 1, codec)
    data = update.path.read_bytes()
    for damaged in (data[:-1], data + b"\0", b"", bytes(update_bytes(WIDE.suffix(2), unpacked(codec)) + 1)):
        update.path.write_bytes(damaged)
        assert check_update(update), len(damaged)


def test_a_scale_that_makes_a_change_of_more_than_8_is_refused(tmp_path: Path) -> None:
    update = encoded(tmp_path, "d", 0, 10, 1, "int8")
    data = bytearray(update.path.read_bytes())
    data[0:2], data[20 + 2 : 20 + 3] = (0x4180).to_bytes(2, "little"), b"\x7f"  # 16, times 127
    update.path.write_bytes(data)
    assert check_update(update) == "head.w changed by more than 8"
    data[0:2] = (0x7F80).to_bytes(2, "little")
    update.path.write_bytes(data)
    assert check_update(update) == "head.w has a scale that is negative or not finite"


def test_what_the_disk_lost_since_the_check_is_no_sum(tmp_path: Path) -> None:
    update = encoded(tmp_path, "d", 2, 10, 1, "int4")
    update.path.write_bytes(update.path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="is damaged: the disk has lost bytes that were there"):
        fold(WIDE.tensors, None, [update], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


# with the ledger: each device once


def committed(ledger: Ledger, store: BlobStore, update: Update) -> bool:
    """As the server does it: the blob is durable, then the transaction."""
    blob, depth = store.put(update.path.read_bytes()), len({t.part for t in update.layout}) - 1
    plan = pack(Plan(CostRow(depth, False, 4, 1, 1.0, 1.0, 1), TrainSettings(), 1))
    with ledger.transaction():
        ledger.set_member("run", 1, Member(update.device, "planned", b"", bytes(16), plan, ""))
        return ledger.contribute(
            "run", 1, Contribution(update.device, blob, update.num_examples, depth, {}, False), 0.0
        )


def test_a_device_counts_once_however_often_and_in_whatever_pieces_its_update_comes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    models = Models(tmp_path, ledger)
    paths = write_base(tmp_path)
    blobs = {t.name: models.store.put(paths[t.name].read_bytes()) for t in SPEC.tensors}
    manifest = make_manifest(SPEC, blobs, models.store.put(b"tokenizer"), 9, version=1)
    manifest_blob = models.store.put(b"manifest")
    with ledger.transaction():
        ledger.open_round("run", 1, 1, 0.0, 0.0)
    updates = random_updates(tmp_path, 3, 5)
    for step, update in enumerate(updates):
        assert committed(ledger, models.updates, update)
        other = replace(update, num_examples=update.num_examples + 1)
        assert not committed(ledger, models.updates, other), "one contribution for each device and round"
        if step % 2:
            models.fold("run", 1, manifest, ledger.contributions("run", 1))
            models.fold("run", 1, manifest, ledger.contributions("run", 1))
    partial = models.fold("run", 1, manifest, ledger.contributions("run", 1))
    assert partial is not None
    reference = fold(SPEC.tensors, None, updates, tmp_path / "at-once")
    assert partial.path.read_bytes() == reference.path.read_bytes()
    assert partial.weights == reference.weights
    assert ledger.unfolded("run", 1) == {}
    assert [d for d, c in ledger.contributions("run", 1).items() if c.folded] == sorted(u.device for u in updates)
    assert models.updates.used_bytes() == partial.path.stat().st_size, "what is folded is deleted"
    new, _ = models.next_version(manifest, manifest_blob, mean_changes(SPEC.tensors, partial), "caff")
    trained = {t.name for update in updates for t in update.layout}
    assert {t.name for old, t in zip(manifest.tensors, new.tensors, strict=True) if old.blob != t.blob} == trained
    assert (new.version, new.method, new.parent) == (2, "caff", manifest_blob)


def test_a_crash_between_the_sum_and_its_transaction_is_made_good_by_doing_it_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    models = Models(tmp_path, ledger)
    blobs = {t.name: models.store.put(t.name.encode().ljust(t.num_bytes)[: t.num_bytes]) for t in SPEC.tensors}
    manifest = make_manifest(SPEC, blobs, models.store.put(b"tokenizer"), 9, version=1)
    with ledger.transaction():
        ledger.open_round("run", 1, 1, 0.0, 0.0)
    updates = random_updates(tmp_path, 4, 4)
    for update in updates:
        committed(ledger, models.updates, update)
    half_done = fold(SPEC.tensors, None, updates, models.updates.folder / "partial" / "sum.tmp")
    models.updates.adopt(half_done.path)
    again = Models(tmp_path, Ledger(tmp_path / "ledger.db"))
    partial = again.fold("run", 1, manifest, again.ledger.contributions("run", 1))
    assert partial is not None
    assert partial.path.read_bytes() == fold(SPEC.tensors, None, updates, tmp_path / "at-once").path.read_bytes()
    assert again.fold("run", 1, manifest, again.ledger.contributions("run", 1)) == partial
