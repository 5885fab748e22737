"""Cached features are right or missing: whatever is padded, changed, damaged, killed, full or deleted."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.data import Example
from edge_runtime.errors import ModelError, StoreError
from edge_runtime.store import file_sha256
from edge_runtime.training import prefix_cache
from edge_runtime.training.cache_folders import delete_all, evict, in_memory
from edge_runtime.training.corpus import Corpus, build_corpus
from edge_runtime.training.prefix_cache import PrefixCache, cache_bytes, prefix_key
from edge_runtime.training.train_job import cache_pays, prefix_before
from edge_runtime.weights import MappedTensor, read_safetensors, write_safetensors
from tests.samples import quickly, small_spec
from tests.worlds import fill, small_disk

HIDDEN = 24
KEY, OTHER_KEY = "a" * 64, "b" * 64
PLENTY = 1 << 30
Array = np.ndarray[Any, np.dtype[Any]]


def make_corpus(folder: Path, lengths: Sequence[int], seed: int = 0) -> Corpus:
    """A tokenised data set of texts of those lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    np.save(folder / "tokens.npy", np.random.default_rng(seed).integers(1, 30_000, starts[-1]).astype(np.int32))
    np.save(folder / "starts.npy", starts)
    np.save(folder / "labels.npy", np.zeros(len(lengths), np.int32))
    return Corpus(folder)


def lengths_of(corpus: Corpus, indices: Sequence[int]) -> list[int]:
    """Real tokens of examples."""
    return [int(corpus.starts[i + 1] - corpus.starts[i]) for i in indices]


def computed(corpus: Corpus, indices: Sequence[int], hidden: int = HIDDEN) -> Array:
    """What a prefix makes of a batch: depends on example and token alone, and is never 0 at padding."""
    lengths = lengths_of(corpus, indices)
    out = np.full((len(indices), max(lengths), hidden), 7.0, np.float32)
    for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
        out[row, :length] = np.random.default_rng(i).standard_normal((length, hidden)) * 3
    return out


def expected(corpus: Corpus, indices: Sequence[int], hidden: int = HIDDEN) -> Array:
    """What the cache must give for it."""
    out = computed(corpus, indices, hidden).astype(np.float16).astype(np.float32)
    for row, length in enumerate(lengths_of(corpus, indices)):
        out[row, length:] = 0
    return out


def write(cache: PrefixCache, corpus: Corpus, indices: Sequence[int], hidden: int = HIDDEN) -> None:
    """As training does after it computed a batch."""
    cache.write(indices, computed(corpus, indices, hidden), lengths_of(corpus, indices))


def opened(root: Path, corpus: Corpus, key: str = KEY, max_bytes: int = PLENTY, hidden: int = HIDDEN) -> PrefixCache:
    """A cache where there must be one."""
    cache = PrefixCache.open(root, key, corpus, hidden, max_bytes)
    assert cache is not None
    return cache


def check_all(cache: PrefixCache, corpus: Corpus) -> int:
    """Every example is right or missing; -> how many are right."""
    right = 0
    for i in range(len(corpus)):
        features = cache.read([i])
        if features is not None:
            assert np.array_equal(features, expected(corpus, [i])), i
            right += 1
    return right


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests run where little is free."""
    monkeypatch.setattr(prefix_cache, "RESERVE_BYTES", 1 << 20)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", [5, 1, 9, 3, 3, 12, 2, 7])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def full(root: Path, corpus: Corpus) -> Iterator[PrefixCache]:
    """A cache that holds every example."""
    cache = opened(root, corpus)
    write(cache, corpus, range(len(corpus)))
    yield cache
    cache.close()


# what comes back


def test_what_was_written_comes_back_also_in_a_later_round(root: Path, corpus: Corpus) -> None:
    cache = opened(root, corpus)
    assert cache.missing([0, 1, 2]) == [0, 1, 2]
    assert cache.read([0]) is None
    write(cache, corpus, [2, 0])
    for again in range(2):
        assert cache.missing([0, 1, 2, 3]) == [1, 3]
        got = cache.read([0, 2])
        assert got is not None
        assert got.dtype == np.float32
        assert np.array_equal(got, expected(corpus, [0, 2]))
        assert cache.read([0, 1]) is None
        assert cache.num_held == 2
        cache.close()
        if not again:
            cache = opened(root, corpus)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 1000), st.integers(1, 9))
@quickly(40)
def test_any_batching_gives_the_same_values_whatever_the_padding(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int, batch_size: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    corpus = make_corpus(folder / "corpus", lengths)
    cache = opened(folder, corpus)
    for indices in corpus.epoch(batch_size, seed):
        write(cache, corpus, indices)
    for indices in corpus.epoch(1 + batch_size // 2, seed + 1):
        got = cache.read(indices)
        assert got is not None
        batch = corpus.batch(indices)
        assert got.shape == (*batch.ids.shape, HIDDEN)
        exact = computed(corpus, indices) * batch.mask[..., None]
        assert np.allclose(got, exact, rtol=2**-11, atol=2**-25)  # float16 has 11 bits
        assert np.array_equal(got, expected(corpus, indices))
    cache.close()


def test_rows_may_be_padded_further_than_the_batch_needs(root: Path, corpus: Corpus) -> None:
    cache = opened(root, corpus)
    wide = np.full((2, 40, HIDDEN), np.nan, np.float32)  # what stands at padding is never looked at
    for row, i in enumerate([1, 3]):
        wide[row, : lengths_of(corpus, [i])[0]] = computed(corpus, [i])[0]
    cache.write([1, 3], wide, lengths_of(corpus, [1, 3]))
    got = cache.read([1, 3])
    assert got is not None
    assert np.array_equal(got, expected(corpus, [1, 3]))
    cache.close()


@pytest.mark.parametrize("value", [70_000.0, -1e30, float("inf"), float("nan")])
def test_an_example_beyond_float16_is_counted_and_not_held(root: Path, corpus: Corpus, value: float) -> None:
    cache = opened(root, corpus)
    hidden = computed(corpus, [0, 2, 3])
    hidden[1, 4, 5] = value
    for _ in range(2):
        cache.write([0, 2, 3], hidden, lengths_of(corpus, [0, 2, 3]))
        assert cache.missing([0, 2, 3]) == [2]
        assert cache.overflowed == 1, "counted once"
    cache.close()


def test_the_largest_float16_is_held(root: Path, corpus: Corpus) -> None:
    cache = opened(root, corpus)
    cache.write([1], np.full((1, 1, HIDDEN), 65_504, np.float32), [1])
    got = cache.read([1])
    assert got is not None
    assert (got == 65_504).all()
    assert cache.overflowed == 0
    cache.close()


@pytest.mark.parametrize("shape, lengths", [((1, 5, HIDDEN), [4]), ((1, 4, HIDDEN), [5]), ((1, 5, HIDDEN + 1), [5])])
def test_shapes_that_are_not_the_corpus_ones_are_a_bug(
    root: Path, corpus: Corpus, shape: tuple[int, ...], lengths: list[int]
) -> None:
    cache = opened(root, corpus)
    with pytest.raises(ValueError, match="wanted"):
        cache.write([0], np.zeros(shape, np.float32), lengths)
    cache.close()


# the key


def weights_file(path: Path, change: str = "", dtype: str = "F32") -> dict[str, MappedTensor]:
    """Weights of the small model, with one number of one tensor changed."""
    tensors = {}
    for n, tensor in enumerate(small_spec(3).tensors):
        values: Array = np.array(np.random.default_rng(n).standard_normal(tensor.shape), np.float16)
        if tensor.name == change:
            values.flat[-1] += 1
        place = path.with_name(f"{path.name}.{n}")
        place.write_bytes(values.astype(np.float32 if dtype == "F32" else np.float16).tobytes())
        tensors[tensor.name] = MappedTensor(str(place), 0, tensor.shape, dtype)
    return tensors


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_the_key_changes_with_every_prefix_tensor_and_with_no_suffix_tensor(tmp_path: Path, depth: int) -> None:
    spec = small_spec(3)
    before = prefix_key(spec, weights_file(tmp_path / "w"), depth, "corpus", "fp32")
    assert before == prefix_key(spec, weights_file(tmp_path / "w2"), depth, "corpus", "fp32")
    suffix = {t.name for t in spec.suffix(depth)}
    assert len(suffix) < len(spec.tensors)
    for tensor in spec.tensors:
        after = prefix_key(spec, weights_file(tmp_path / "c", tensor.name), depth, "corpus", "fp32")
        assert (after == before) == (tensor.name in suffix), tensor.name


def test_the_key_changes_with_all_else_that_makes_features(tmp_path: Path) -> None:
    spec, weights = small_spec(3), weights_file(tmp_path / "w")
    other_config = dataclasses.replace(spec, config={**spec.config, "eps": 1e-5})
    other_heads = dataclasses.replace(spec, heads=3)
    keys = [
        prefix_key(spec, weights, 1, "corpus", "fp32"),
        prefix_key(spec, weights, 2, "corpus", "fp32"),
        prefix_key(spec, weights, 1, "other", "fp32"),
        prefix_key(spec, weights, 1, "corpus", "int8"),
        prefix_key(other_config, weights, 1, "corpus", "fp32"),
        prefix_key(other_heads, weights, 1, "corpus", "fp32"),
    ]
    assert len(set(keys)) == len(keys)


def test_another_text_or_tokenizer_is_another_corpus_name(tmp_path: Path) -> None:
    def tokenizer(**vocabulary: int) -> bytes:
        model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "[PAD]": 1, **vocabulary}, "unk_token": "[UNK]"}
        return json.dumps(
            {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
        ).encode()

    def key(text: str, tokens: bytes, max_length: int = 8) -> str:
        folder = build_corpus([Example(text, "x", 1)], tokens, ["x", "y"], max_length, tmp_path)
        return prefix_key(spec, weights, 1, folder.name, "fp32")

    spec, weights = small_spec(3), weights_file(tmp_path / "w")
    same = tokenizer(a=2, b=3)
    keys = {key("a b", same), key("a  b", same), key("a b", tokenizer(a=3, b=2)), key("a b", same, 4)}
    assert len(keys) == 4
    assert key("a b", same) in keys


def test_the_key_is_the_same_wherever_the_same_weights_lie(tmp_path: Path) -> None:
    spec, weights = small_spec(3), weights_file(tmp_path / "w")
    write_safetensors(tmp_path / "model.safetensors", weights.items())
    blobs = {name: file_sha256(Path(w.path)) for name, w in weights.items()}
    keys = {
        prefix_key(spec, weights, 1, "corpus", "fp32"),
        prefix_key(spec, read_safetensors(tmp_path / "model.safetensors"), 1, "corpus", "fp32"),
        prefix_key(spec, weights_file(tmp_path / "half", dtype="F16"), 1, "corpus", "fp32"),
        prefix_key(spec, {}, 1, "corpus", "fp32", blobs),
    }
    assert len(keys) == 1


def test_hashing_the_weights_holds_little_and_a_missing_file_says_so(tmp_path: Path) -> None:
    spec = small_spec(1)
    (tmp_path / "large").write_bytes(bytes(40 << 20))
    large = {t.name: MappedTensor(str(tmp_path / "large"), 0, (10 << 20,)) for t in spec.tensors}
    tracemalloc.start()
    prefix_key(spec, large, 0, "corpus", "fp32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20
    (tmp_path / "large").unlink()
    with pytest.raises(ModelError, match="large"):
        prefix_key(spec, large, 0, "corpus", "fp32")


def test_features_of_other_tokens_are_not_taken(root: Path, corpus: Corpus, full: PrefixCache) -> None:
    """A corpus that was damaged when the features were made and is made anew has the same name."""
    full.close()
    tokens = np.load(corpus.folder / "tokens.npy")
    tokens[int(corpus.starts[2])] += 1
    np.save(corpus.folder / "tokens.npy", tokens)
    cache = opened(root, Corpus(corpus.folder))
    assert cache.read([2]) is None
    assert check_all(cache, corpus) == len(corpus) - 1
    cache.close()


# bounds


def test_if_not_all_examples_fit_the_first_ones_are_held(root: Path, corpus: Corpus) -> None:
    room = cache_bytes(int(corpus.starts[4]), HIDDEN)
    for _ in range(2):
        cache = opened(root, corpus, max_bytes=room)
        for i in reversed(range(len(corpus))):
            write(cache, corpus, [i])
        assert cache.missing(range(len(corpus))) == [4, 5, 6, 7]
        assert check_all(cache, corpus) == 4
        cache.close()
        assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) <= room


def test_the_bytes_it_asks_for_hold_the_whole_corpus(root: Path, corpus: Corpus) -> None:
    cache = opened(root, corpus, max_bytes=cache_bytes(int(corpus.starts[-1]), HIDDEN))
    write(cache, corpus, range(len(corpus)))
    assert cache.num_held == len(corpus)
    cache.close()


def test_a_lower_bound_cuts_a_cache_and_a_higher_one_lets_it_grow_again(
    root: Path, corpus: Corpus, full: PrefixCache
) -> None:
    full.close()
    room = cache_bytes(int(corpus.starts[4]), HIDDEN)
    cache = opened(root, corpus, max_bytes=room)
    assert check_all(cache, corpus) == 4
    cache.close()
    cache = opened(root, corpus)
    assert cache.missing(range(len(corpus))) == [4, 5, 6, 7]
    write(cache, corpus, range(len(corpus)))
    assert check_all(cache, corpus) == len(corpus)
    cache.close()


def test_a_bound_of_no_use_gives_none_and_leaves_nothing(root: Path, corpus: Corpus, full: PrefixCache) -> None:
    full.close()
    for max_bytes in (0, -5, 100):
        assert PrefixCache.open(root, KEY, corpus, HIDDEN, max_bytes) is None
    assert not [p for p in root.rglob("*") if p.is_file()]


def test_the_caches_not_used_for_longest_make_room(root: Path, corpus: Corpus) -> None:
    one = int(corpus.starts[-1]) * HIDDEN * 2 + len(corpus) * 8
    for day, key in enumerate("cdef"):
        cache = opened(root, corpus, key * 64)
        write(cache, corpus, range(len(corpus)))
        cache.close()
        os.utime(root / "prefixes" / (key * 64) / "marks", (day, day))
    opened(root, corpus, "c" * 64).close()  # used again: now d is the oldest
    evict(root, 10 * one, keep="")
    assert len(list((root / "prefixes").iterdir())) == 4
    evict(root, 3 * one, keep="")
    assert sorted(p.name[0] for p in (root / "prefixes").iterdir()) == ["c", "e", "f"]
    cache = opened(root, corpus, "9" * 64, max_bytes=2 * one)
    assert sorted(p.name[0] for p in (root / "prefixes").iterdir()) == ["9", "c"]
    evict(root, 0, keep="c" * 64)
    assert sorted(p.name[0] for p in (root / "prefixes").iterdir()) == ["9", "c"], "one is open, one is to be kept"
    second = opened(root, corpus, max_bytes=2 * one)
    assert sorted(p.name[0] for p in (root / "prefixes").iterdir()) == ["9", "a"], "c made room"
    assert PrefixCache.open(root, "8" * 64, corpus, HIDDEN, 2 * one) is None, "both others are open"
    assert sorted(p.name[0] for p in (root / "prefixes").iterdir()) == ["9", "a"]
    for each in (cache, second):
        write(each, corpus, range(len(corpus)))
        assert check_all(each, corpus) == len(corpus)
        each.close()


# where it does not go


def test_it_never_lies_in_memory(corpus: Corpus, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("this machine has no /dev/shm")
    root = shm / f"edge-runtime-test-{os.getpid()}"
    assert PrefixCache.open(root, KEY, corpus, HIDDEN, PLENTY) is None
    assert not root.exists()
    assert in_memory(shm / "not" / "there")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "prefixes").symlink_to(shm)
    assert PrefixCache.open(tmp_path / "linked", KEY, corpus, HIDDEN, PLENTY) is None
    assert not (shm / KEY).exists()


@pytest.mark.parametrize(
    "system, expect",
    [
        ("ext4 /dev/mmcblk0p2 rw", False),
        ("tmpfs tmpfs rw,size=1k", True),
        ("ramfs none rw", True),
        ("ext4 /dev/zram0 rw", True),
        ("overlay overlay rw,lowerdir=/a,upperdir=/dev/shm,workdir=/w", True),
        ("overlay overlay rw,lowerdir=/a,upperdir=/not/there,workdir=/w", False),
        ("overlay overlay", False),
    ],
)
def test_the_mount_table_tells_what_is_memory(tmp_path: Path, system: str, expect: bool) -> None:
    def line(path: Path, what: str) -> str:
        device = path.stat().st_dev
        return f"36 35 {os.major(device)}:{os.minor(device)} / /mnt\\040x rw,noatime shared:1 master:2 - {what}\n"

    mounts = tmp_path / "mountinfo"
    mounts.write_text("1 0 0:9999 / /other rw - tmpfs tmpfs rw\n" + line(tmp_path, system))
    if Path("/dev/shm").is_dir():
        mounts.write_text(mounts.read_text() + line(Path("/dev/shm"), "tmpfs tmpfs rw"))
    elif "/dev/shm" in system:
        pytest.skip("this machine has no /dev/shm")
    assert in_memory(tmp_path / "cache", mounts) is expect
    assert in_memory(tmp_path, tmp_path / "absent"), "a system that does not tell is not trusted"


def test_a_disk_that_is_nearly_full_is_left_alone(
    root: Path, corpus: Corpus, full: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.close()
    cache = opened(root, corpus, OTHER_KEY)
    write(cache, corpus, [0])
    monkeypatch.setattr(prefix_cache, "RESERVE_BYTES", 1 << 60)
    write(cache, corpus, [1])
    assert cache.missing([0, 1]) == [1], "no more is written, what is held is of use"
    cache.close()
    assert PrefixCache.open(root, "c" * 64, corpus, HIDDEN, PLENTY) is None
    assert not (root / "prefixes" / ("c" * 64)).exists()
    again = opened(root, corpus)
    assert check_all(again, corpus) == len(corpus)
    again.close()


def test_a_disk_that_fills_up_gets_its_room_back_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "in_memory", lambda path: False)
    monkeypatch.setattr(prefix_cache, "RESERVE_BYTES", 0)
    corpus = make_corpus(tmp_path / "corpus", [20] * 50)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        cache = opened(disk, corpus, hidden=1000)
        write(cache, corpus, [0, 1], 1000)
        assert cache.missing([0, 1]) == []
        filler = fill(disk, leave=60_000)  # one example and a half
        write(cache, corpus, [2, 3, 4], 1000)
        assert cache.missing(range(5)) == [0, 1, 2, 3, 4]
        assert cache.read([0]) is None
        write(cache, corpus, [5], 1000)
        assert [f.missing for f in cache.prefetch([[0], [1, 5]])] == [(0,), (0, 1)]
        cache.close()
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 100_000
        filler.unlink()
        cache = opened(disk, corpus, hidden=1000)
        assert cache.num_held == 0
        write(cache, corpus, [2], 1000)
        got = cache.read([2])
        assert got is not None
        assert np.array_equal(got, expected(corpus, [2], 1000))
        cache.close()


@pytest.mark.parametrize("call", ["pwrite", "preadv", "ftruncate", "chmod", "utime", "fstatvfs"])
def test_no_disk_error_is_raised(root: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise OSError(5, "Input/output error")

    cache = opened(root, corpus)
    write(cache, corpus, [0, 1])
    with monkeypatch.context() as patched:
        patched.setattr(os, call, broken)
        write(cache, corpus, [2])
        cache.read([0])
        assert len(list(cache.prefetch([[0], [2]]))) == 2
        again = PrefixCache.open(root, OTHER_KEY, corpus, HIDDEN, PLENTY)
        if again is not None:
            write(again, corpus, [0])
            again.close()
    check_all(cache, corpus)
    cache.close()


def test_a_folder_that_is_a_file_or_belongs_to_others_gives_none(root: Path, corpus: Corpus) -> None:
    root.mkdir()
    (root / "prefixes").write_text("a file")
    assert PrefixCache.open(root, KEY, corpus, HIDDEN, PLENTY) is None
    (root / "prefixes").unlink()
    (root / "prefixes" / KEY).mkdir(parents=True)
    (root / "prefixes" / KEY / "marks").symlink_to(root / "elsewhere")
    assert PrefixCache.open(root, KEY, corpus, HIDDEN, PLENTY) is None
    assert not (root / "elsewhere").exists()


def test_a_file_system_without_permissions_gives_none(
    root: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fchmod", lambda descriptor, mode: None)
    (root / "prefixes" / KEY).mkdir(parents=True)
    (root / "prefixes" / KEY / "marks").touch(0o644)
    assert PrefixCache.open(root, KEY, corpus, HIDDEN, PLENTY) is None


def test_the_owner_alone_can_read_it(root: Path, corpus: Corpus, full: PrefixCache) -> None:
    full.close()
    folder = root / "prefixes" / KEY
    for path in (folder, folder.parent):
        os.chmod(path, 0o755)
    for path in folder.iterdir():
        os.chmod(path, 0o644)
    before = os.umask(0)
    try:
        for key in (KEY, OTHER_KEY):
            cache = opened(root, corpus, key)
            write(cache, corpus, [0])
            cache.close()
    finally:
        os.umask(before)
    paths = [root / "prefixes", *(root / "prefixes").rglob("*")]
    assert len(paths) == 7
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


# damage


def test_any_damage_makes_examples_missing_and_never_wrong(root: Path, corpus: Corpus, full: PrefixCache) -> None:
    full.close()
    files = [root / "prefixes" / KEY / name for name in ("features.f16", "marks")]
    whole = [path.read_bytes() for path in files]
    shuffle = random.Random(3)
    rights = set()
    for _ in range(300):
        for path, content in zip(files, whole, strict=True):
            damaged = bytearray(content)
            for _ in range(shuffle.choice([0, 0, 1, 3])):
                kind, at = shuffle.choice(["bit", "cut", "zeros", "swap", "longer"]), shuffle.randrange(len(content))
                if kind == "bit" and at < len(damaged):
                    damaged[at] ^= 1 << shuffle.randrange(8)
                elif kind == "cut":
                    del damaged[at:]
                elif kind == "zeros":
                    damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
                elif kind == "swap":
                    damaged = damaged[at // 8 * 8 :] + damaged[: at // 8 * 8]
                else:
                    damaged += bytes([shuffle.randrange(256)]) * 100
            path.write_bytes(damaged)
        cache = opened(root, corpus)
        right = check_all(cache, corpus)
        rights.add(right)
        missing = cache.missing(range(len(corpus)))
        assert len(missing) == len(corpus) - right, "what turned out to be damaged is missing from then on"
        if missing:
            write(cache, corpus, missing)
        assert check_all(cache, corpus) == len(corpus), "and can be written again"
        cache.close()
    assert {0, len(corpus)} < rights, "the damage was of all degrees"


def test_another_caches_files_are_not_taken(root: Path, corpus: Corpus, full: PrefixCache) -> None:
    full.close()
    os.rename(root / "prefixes" / KEY, root / "prefixes" / OTHER_KEY)
    cache = opened(root, corpus, OTHER_KEY)
    assert check_all(cache, corpus) == 0
    cache.close()


def test_a_damaged_corpus_gives_none(root: Path, corpus: Corpus) -> None:
    for starts in ([0, 5, 3, 15, 18, 21, 33, 35, 42], [0, 42], [1, 6, 7, 15, 18, 21, 33, 35, 42], [0] * 8 + [99]):
        np.save(corpus.folder / "starts.npy", np.asarray(starts, np.int64))
        assert PrefixCache.open(root, KEY, Corpus(corpus.folder), HIDDEN, PLENTY) is None


WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from edge_runtime.training import prefix_cache
from edge_runtime.training.corpus import Corpus
prefix_cache.RESERVE_BYTES = 0
root, folder, key, hidden, seed, die_at = sys.argv[1:]
corpus, calls, pwrite = Corpus(Path(folder)), 0, os.pwrite

def half_a_write(descriptor, data, offset):  # the kill comes in the middle of it
    global calls
    calls += 1
    if calls == int(die_at):
        pwrite(descriptor, data[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(descriptor, data, offset)

os.pwrite = half_a_write
cache = prefix_cache.PrefixCache.open(Path(root), key, corpus, int(hidden), 1 << 30)
for epoch in range(10_000):
    for indices in corpus.epoch(7, int(seed) + epoch):
        lengths = [int(corpus.starts[i + 1] - corpus.starts[i]) for i in indices]
        features = np.zeros((len(indices), max(lengths), int(hidden)), np.float32)
        for row, (i, length) in enumerate(zip(indices, lengths)):  # as computed() does
            features[row, :length] = np.random.default_rng(i).standard_normal((length, int(hidden))) * 3
        cache.write(indices, features, lengths)
        if not epoch:
            print("ready", flush=True)
    cache._held[:] = False  # and all of it over again
"""


def killed_writer(root: Path, corpus: Corpus, *, seed: int, after_s: float | None = None, die_at: int = 0) -> None:
    """A process that fills the cache and is killed, after a while or in the middle of a write."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(corpus.folder), KEY, str(HIDDEN), str(seed), str(die_at)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert child.stdout is not None
    with child.stdout:
        if after_s is not None:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(after_s)
            child.kill()
        assert child.wait(60) == -signal.SIGKILL


def test_after_a_kill_at_any_moment_everything_read_is_right(root: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", [1 + 7 * i % 50 for i in range(300)])
    moments = random.Random(8)
    rights = []
    for n in range(6):
        if n == 3:
            delete_all(root)
        killed_writer(root, corpus, seed=n, after_s=moments.uniform(0, 0.04))
        cache = opened(root, corpus)
        rights.append(check_all(cache, corpus))
        assert len(cache.missing(range(len(corpus)))) == len(corpus) - rights[-1]
        cache.close()
    assert min(rights) > 0


def test_after_a_kill_inside_a_write_everything_read_is_right(root: Path, corpus: Corpus) -> None:
    for die_at in (1, 2, 3, 8, 20, 33):  # features and marks, of the first pass and of those over held examples
        delete_all(root)
        killed_writer(root, corpus, seed=die_at, die_at=die_at)
        cache = opened(root, corpus)
        assert check_all(cache, corpus) >= (min(die_at, 16) - 1) // 2 - (die_at > 16)
        write(cache, corpus, cache.missing(range(len(corpus))) or [0])
        assert check_all(cache, corpus) == len(corpus)
        cache.close()


# sharing and deletion


def test_a_cache_is_held_by_one_process_at_a_time(root: Path, corpus: Corpus, full: PrefixCache) -> None:
    assert PrefixCache.open(root, KEY, corpus, HIDDEN, PLENTY) is None
    code = (
        "import sys; from pathlib import Path; from edge_runtime.training.corpus import Corpus\n"
        "from edge_runtime.training.prefix_cache import PrefixCache\n"
        "print(PrefixCache.open(Path(sys.argv[1]), sys.argv[3], Corpus(Path(sys.argv[2])), int(sys.argv[4]), 1 << 30))"
    )
    command = [sys.executable, "-c", code, str(root), str(corpus.folder), KEY, str(HIDDEN)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout == "None\n"
    assert check_all(full, corpus) == len(corpus), "the second did no harm"
    other = opened(root, corpus, OTHER_KEY)
    full.close()
    opened(root, corpus).close()
    other.close()


def test_deleting_leaves_nothing_also_while_a_process_has_it_open(
    root: Path, corpus: Corpus, full: PrefixCache
) -> None:
    (root / "kept").write_text("not a cache")
    delete_all(root)
    assert [p.name for p in root.iterdir()] == ["kept"]
    check_all(full, corpus)
    full._held[3] = False
    write(full, corpus, [3])
    fresh = opened(root, corpus)
    assert fresh.num_held == 0
    write(fresh, corpus, [1])
    full.close()
    assert check_all(fresh, corpus) == 1, "the deleted one is another file"
    fresh.close()
    for _ in range(2):
        delete_all(root)
    assert [p.name for p in root.iterdir()] == ["kept"]


def test_deleting_says_when_it_could_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    (root / "prefixes").write_text("a file")
    with pytest.raises(StoreError, match="cannot delete"):
        delete_all(root)


def test_a_closed_cache_holds_nothing(corpus: Corpus, full: PrefixCache) -> None:
    full.close()
    full.close()
    assert full.missing([0, 1]) == [0, 1]
    assert full.read([0]) is None
    write(full, corpus, [0])
    assert full.missing([0]) == [0]


# reading ahead


def test_batches_come_in_order_and_are_right_until_the_next_is_asked_for(corpus: Corpus, full: PrefixCache) -> None:
    batches = [b for seed in range(20) for b in corpus.epoch(3, seed)]
    came = []
    for features in full.prefetch(batches):
        came.append(features.indices)
        assert features.missing == ()
        time.sleep(0.002)  # while the next one is read
        assert np.array_equal(features.hidden, expected(corpus, features.indices))
    assert came == batches
    assert list(full.prefetch([])) == []


def test_a_batch_of_which_a_part_is_held_says_which_rows_are_missing(root: Path, corpus: Corpus) -> None:
    cache = opened(root, corpus)
    write(cache, corpus, [0, 2, 7])
    (features,) = cache.prefetch([[2, 5, 0, 1]])
    assert features.missing == (1, 3)
    want = expected(corpus, [2, 5, 0, 1])
    want[[1, 3]] = 0
    assert np.array_equal(features.hidden, want)
    cache.close()


def test_the_first_epoch_fills_it_while_it_is_read(root: Path, corpus: Corpus) -> None:
    cache = opened(root, corpus)
    for epoch in range(3):
        for features in cache.prefetch(corpus.epoch(2, epoch)):
            assert len(features.missing) == (0 if epoch else len(features.indices))
            if features.missing:
                write(cache, corpus, features.indices)
            else:
                assert np.array_equal(features.hidden, expected(corpus, features.indices))
    cache.close()


def test_leaving_early_ends_the_thread(corpus: Corpus, full: PrefixCache) -> None:
    def readers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("prefix-cache")]

    batches = corpus.epoch(2, 0)
    for _ in full.prefetch(batches):
        assert readers()
        break
    ahead = full.prefetch(batches)
    next(ahead)
    del ahead
    with pytest.raises(RuntimeError, match="training failed"):
        for _ in full.prefetch(batches):
            raise RuntimeError("training failed")
    full.prefetch(batches)  # never begun
    assert readers() == []


def test_the_next_batch_is_read_while_this_one_is_trained_and_no_other(
    corpus: Corpus, full: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[int] = []
    fetch = full._fetch

    def watched(i: int, half: Array) -> bool:
        touched.append(i)
        return fetch(i, half)

    monkeypatch.setattr(full, "_fetch", watched)
    ahead = full.prefetch([[0], [1], [2], [3]])
    for n in range(4):
        next(ahead)
        deadline = time.monotonic() + 10
        while len(touched) < min(n + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert touched == list(range(min(n + 2, 4)))


def test_reading_ahead_holds_two_batches(root: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", [10 + n % 90 for n in range(320)])
    cache = opened(root, corpus, hidden=384)
    for indices in corpus.epoch(16, 0):
        write(cache, corpus, indices, 384)
    batches = corpus.epoch(16, 1)
    heaviest = max(len(b) * max(lengths_of(corpus, b)) for b in batches) * 384 * 4
    example = 99 * 384 * 2
    tracemalloc.start()
    for features in cache.prefetch(batches):
        assert not features.missing
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * heaviest + example + 200_000
    cache.close()


def test_a_round_that_is_trained_again_decides_as_the_first_time(tmp_path: Path) -> None:
    record = tmp_path / "last-prefix"
    assert prefix_before(record, "a", "run/1") == ""
    assert prefix_before(record, "a", "run/1") == "", (
        "after a crash: the features of its own first try are not of a round before"
    )
    assert prefix_before(record, "a", "run/2") == "a"
    assert prefix_before(record, "a", "run/2") == "a"
    assert prefix_before(record, "b", "run/3") == "a"
    record.write_text("damaged")
    assert prefix_before(record, "b", "run/4") == ""
    assert prefix_before(record, "b", None) == "b" == prefix_before(record, "b", None), (
        "without rounds every training counts"
    )


def test_it_pays_in_the_first_round_and_while_the_prefix_stays_the_same() -> None:
    assert cache_pays(1, "run/1", "a", before="") and cache_pays(1, "run/2", "a", before="a")
    assert not cache_pays(1, "run/2", "b", before="a"), "another prefix in each round is never read again"
    assert cache_pays(2, "run/2", "b", before="a") and not cache_pays(1, None, "a", before="")
