"""Durable files: whole or absent, whatever is killed, damaged or full."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from edge_runtime.errors import StoreError, UsageError
from edge_runtime.store import (
    STALE_S,
    BlobStore,
    atomic_writer,
    disk_errors,
    file_sha256,
    gone_if_empty,
    lock_folder,
    read_json,
    scratch_folder,
    write_json,
)
from tests.samples import quickly
from tests.worlds import fill, killed_after_ready, small_disk


def sha(data: bytes) -> bytes:
    """The name of a blob."""
    return hashlib.sha256(data).digest()


def all_files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store")


# blobs


def test_a_blob_is_named_by_its_hash_and_comes_back_as_it_was(store: BlobStore) -> None:
    for data in (b"", b"some bytes", os.urandom(3 << 20)):
        blob = store.put(data)
        assert blob == sha(data)
        assert store.has(blob)
        assert store.size(blob) == len(data)
        assert store.path(blob).read_bytes() == data
        assert file_sha256(store.path(blob)) == blob


def test_the_same_bytes_are_stored_once(store: BlobStore) -> None:
    blob = store.put(b"x" * 1000)
    first = store.path(blob).stat()
    assert store.put(b"x" * 1000) == blob
    assert store.path(blob).stat() == first
    assert store.used_bytes() == 1000


def test_blobs_are_readable_by_their_owner_only(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"adopted")
    os.chmod(tmp_path / "made", 0o644)
    for blob in (store.put(b"put"), store.adopt(tmp_path / "made")):
        assert stat.S_IMODE(store.path(blob).stat().st_mode) == 0o600
        assert stat.S_IMODE(store.path(blob).parent.stat().st_mode) == 0o700


def test_an_adopted_file_is_moved_and_not_copied(store: BlobStore, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.write_bytes(b"x" * 5000)
    inode = made.stat().st_ino
    blob = store.adopt(made)
    assert not made.exists()
    assert store.path(blob).stat().st_ino == inode
    made.write_bytes(b"x" * 5000)
    assert store.adopt(made) == blob, "the same content again"
    assert not made.exists()


def test_deleting_takes_the_blob_and_its_partial_and_twice_is_fine(store: BlobStore) -> None:
    blob = store.put(b"here")
    store.append_partial(sha(b"coming"), 0, b"com")
    for _ in range(2):
        store.delete(blob)
        store.delete(sha(b"coming"))
    assert store.used_bytes() == 0
    assert not store.has(blob)


def test_keeping_some_frees_all_others_and_says_how_much(store: BlobStore) -> None:
    kept, gone = store.put(b"k" * 10), store.put(b"g" * 100)
    coming, dropped = sha(b"coming"), sha(b"dropped")
    store.append_partial(coming, 0, b"c" * 5)
    store.append_partial(dropped, 0, b"d" * 1000)
    assert store.keep_only([kept, coming]) == 1100
    assert store.has(kept)
    assert not store.has(gone)
    assert (store.partial_bytes(coming), store.partial_bytes(dropped)) == (5, 0)
    assert store.used_bytes() == 15
    assert store.keep_only([]) == 15


def test_no_name_of_a_blob_leads_out_of_the_store(store: BlobStore) -> None:
    for name in (b"../../../../etc/passwd", b"/etc/passwd\0", b".", b"\0", bytes(32)):
        assert store.folder in store.path(name).resolve().parents
        assert not store.has(name)


def test_hashing_a_large_file_holds_one_buffer(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(40 << 20)
    tracemalloc.start()
    file_sha256(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


# partial transfers


def test_a_partial_grows_only_at_its_end_and_becomes_a_blob_when_its_hash_is_right(store: BlobStore) -> None:
    data = os.urandom(10_000)
    blob = sha(data)
    assert store.partial_bytes(blob) == 0
    assert not store.append_partial(blob, 1, data[1:100]), "a gap"
    assert store.append_partial(blob, 0, data[:4000])
    assert not store.append_partial(blob, 0, data[:4000]), "a duplicate"
    assert not store.append_partial(blob, 3999, data[3999:]), "an overlap"
    assert store.append_partial(blob, 4000, data[4000:])
    assert not store.has(blob)
    assert store.finish_partial(blob)
    assert store.path(blob).read_bytes() == data
    assert store.partial_bytes(blob) == 0


def test_a_partial_with_another_hash_is_discarded(store: BlobStore) -> None:
    blob = sha(b"promised")
    store.append_partial(blob, 0, b"came")
    assert not store.finish_partial(blob)
    assert not store.has(blob)
    assert store.partial_bytes(blob) == 0


def test_a_partial_goes_on_in_a_new_process(store: BlobStore) -> None:
    data = os.urandom(9000)
    store.append_partial(sha(data), 0, data[:5000])
    again = BlobStore(store.folder)
    assert again.partial_bytes(sha(data)) == 5000
    assert again.append_partial(sha(data), 5000, data[5000:])
    assert again.finish_partial(sha(data))


class PartialMachine(RuleBasedStateMachine):
    """Appends, restarts, finishes and drops in any order, beside a model that is a bytearray."""

    folder: Path
    data = os.urandom(64)

    @initialize()
    def begin(self) -> None:
        self.folder = self.make_folder()
        self.store = BlobStore(self.folder)
        self.model: bytearray | None = None
        self.done = False

    make_folder: Callable[[], Path]

    @rule(offset=st.integers(0, 64), length=st.integers(0, 40), sound=st.booleans())
    def append(self, offset: int, length: int, sound: bool) -> None:
        piece = self.data[offset : offset + length] if sound else bytes(length)
        here = len(self.model or b"")
        took = self.store.append_partial(sha(self.data), offset, piece)
        assert took == (offset == here)
        if took:
            self.model = (self.model or bytearray()) + piece

    @rule()
    def go_on(self) -> None:
        here = self.store.partial_bytes(sha(self.data))
        assert self.store.append_partial(sha(self.data), here, self.data[here : here + 20])
        self.model = (self.model or bytearray()) + self.data[here : here + 20]

    @rule()
    def restart(self) -> None:
        self.store = BlobStore(self.folder)

    @rule()
    def finish(self) -> None:
        if self.model is None:
            return
        right = bytes(self.model) == self.data
        assert self.store.finish_partial(sha(self.data)) == right
        self.done |= right
        self.model = None

    @rule()
    def drop(self) -> None:
        self.store.drop_partial(sha(self.data))
        self.model = None

    @invariant()
    def as_the_model(self) -> None:
        if hasattr(self, "store"):
            assert self.store.partial_bytes(sha(self.data)) == len(self.model or b"")
            assert self.store.has(sha(self.data)) == self.done
            assert not self.done or self.store.path(sha(self.data)).read_bytes() == self.data


def test_partials_behave_like_bytes_in_any_order_of_appends_restarts_and_ends(tmp_path: Path) -> None:
    numbers = iter(range(10**6))

    class Machine(PartialMachine):
        make_folder = staticmethod(lambda: tmp_path / str(next(numbers)))

    run_state_machine_as_test(Machine, settings=quickly(25))


# killed processes

HALF_WRITTEN = """
import sys
from pathlib import Path
from edge_runtime.store import BlobStore, atomic_writer
store = BlobStore(Path(sys.argv[1]))
store.put(b"whole")
with atomic_writer(store.path(bytes.fromhex(sys.argv[2]))) as file:
    file.write(b"ha")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
    import time; time.sleep(60)
"""


def test_a_killed_process_leaves_no_half_blob_and_its_draft_goes_when_it_is_old(tmp_path: Path) -> None:
    half = sha(b"half")
    killed_after_ready(HALF_WRITTEN, tmp_path, half.hex())
    store = BlobStore(tmp_path)
    assert store.has(sha(b"whole"))
    assert not store.has(half)
    (draft,) = (p for p in tmp_path.rglob(".*") if p.is_file())
    assert draft.read_bytes() == b"ha"
    os.utime(draft, (time.time(), time.time() - STALE_S - 1))
    BlobStore(tmp_path)
    assert not draft.exists()
    assert all_files(tmp_path) == {str(store.path(sha(b"whole")).relative_to(tmp_path)): b"whole"}


def test_opening_a_store_does_not_disturb_a_process_that_writes_into_it(tmp_path: Path) -> None:
    """`edge-coordinator models --export` runs beside `serve`."""
    store = BlobStore(tmp_path)
    blob = sha(b"being written")
    with atomic_writer(store.path(blob)) as file:
        file.write(b"being written")
        BlobStore(tmp_path)
    assert store.has(blob)


def test_the_drafts_of_a_killed_process_are_freed_with_what_is_not_wanted(tmp_path: Path) -> None:
    killed_after_ready(HALF_WRITTEN, tmp_path, sha(b"half").hex())
    store = BlobStore(tmp_path)
    assert store.keep_only([sha(b"whole")]) == 2
    assert store.used_bytes() == 5


APPENDING = """
import sys
from pathlib import Path
from edge_runtime.store import BlobStore
store, data = BlobStore(Path(sys.argv[1])), bytes(range(256)) * 40
for offset in range(0, 5000, 1000):
    store.append_partial(bytes(32), offset, data[offset:offset + 1000])
print("ready", flush=True)
import time; time.sleep(60)
"""


def test_what_a_killed_process_appended_is_there(tmp_path: Path) -> None:
    killed_after_ready(APPENDING, tmp_path)
    assert BlobStore(tmp_path).partial_bytes(bytes(32)) == 5000


# full disks


@pytest.fixture
def full(tmp_path: Path) -> Iterator[tuple[BlobStore, Path, bytes]]:
    """A store on a disk of 1 MiB with one blob and a partial of 3000 bytes, and 20,000 bytes left."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store = BlobStore(disk / "store")
        blob = store.put(os.urandom(50_000))
        store.append_partial(bytes(32), 0, bytes(3000))
        yield store, fill(disk, leave=20_000), blob


def test_a_full_disk_refuses_a_blob_keeps_what_was_there_and_frees_nothing_else(
    full: tuple[BlobStore, Path, bytes],
) -> None:
    store, filler, _ = full
    before = all_files(store.folder)
    for _ in range(3):
        with pytest.raises(StoreError, match="no space left to write .*: free some, nothing that was stored is lost"):
            store.put(os.urandom(30_000))
    assert all_files(store.folder) == before
    filler.unlink()
    assert store.has(store.put(os.urandom(30_000)))


@pytest.mark.parametrize("size", [1500, 20_000, 30_000, 200_000])
def test_a_full_disk_keeps_a_partial_as_it_was_and_it_goes_on_when_there_is_space(
    full: tuple[BlobStore, Path, bytes], size: int
) -> None:
    store, filler, blob = full
    with filler.open("ab", buffering=0) as file:
        file.write(bytes(20_000 - 4096 * (size > 10_000)))  # a page is left, or nothing but the rest of the partial's
    before = all_files(store.folder)
    with pytest.raises(StoreError, match="no space left"):
        store.append_partial(bytes(32), 3000, b"\1" * size)
    assert all_files(store.folder) == before
    filler.unlink()
    assert store.append_partial(bytes(32), 3000, b"\1" * size)
    assert store.partial_bytes(bytes(32)) == 3000 + size
    assert store.has(blob)


def test_a_full_disk_leaves_an_old_state_file(full: tuple[BlobStore, Path, bytes]) -> None:
    store, _, _ = full
    path = store.folder / "state.json"
    write_json(path, {"old": 1})
    with pytest.raises(StoreError, match="no space left"):
        write_json(path, {"new": "x" * 40_000})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in store.folder.iterdir() if p.is_file()] == ["state.json"]


def test_a_finished_transfer_needs_no_further_space(full: tuple[BlobStore, Path, bytes]) -> None:
    store, filler, _ = full
    data = os.urandom(8000)
    store.append_partial(sha(data), 0, data)
    (store.folder / "blobs" / sha(data).hex()[:2]).mkdir(exist_ok=True)
    with filler.open("ab", buffering=0) as file, pytest.raises(OSError):
        for _ in range(1000):
            file.write(bytes(4096))
    assert store.finish_partial(sha(data))
    assert store.path(sha(data)).read_bytes() == data


def test_disk_errors_say_what_to_do_and_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write .*: Not a directory"), disk_errors(tmp_path):
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "file" / "below").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"), disk_errors(tmp_path):
        (tmp_path / "loop").read_bytes()


# atomic files


def test_an_atomic_file_appears_whole_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    with atomic_writer(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with atomic_writer(path, mode=0o644) as file:
        file.write(b"newer")
        assert path.read_bytes() == b"new"
    assert path.read_bytes() == b"newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_writer(path) as file:
        file.write(b"new" * 100_000)
        raise error
    assert all_files(tmp_path) == {"file": b"old"}


def test_a_file_in_place_of_a_folder_and_the_other_way_round_are_store_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(StoreError, match="cannot write"), atomic_writer(path) as file:
            file.write(b"x")
    assert all_files(tmp_path) == {"file": b""}


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_json(path, 1)
    assert read_json(path) == 1


def test_a_json_state_comes_back_and_its_absence_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert read_json(path) is None
    assert read_json(path, {"a": 1}) == {"a": 1}
    write_json(path, {"b": [1, "ü", None], "a": 1.5})
    assert read_json(path) == {"a": 1.5, "b": [1, "ü", None]}
    before = path.read_bytes()
    write_json(path, json.loads(before))
    assert path.read_bytes() == before, "the same value is the same bytes"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 1}x', b"[" * 100_000, b"9" * 10_000])
def test_a_damaged_json_state_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"state.json is damaged .*: remove it to start afresh"):
        read_json(path)


def test_a_value_that_is_no_json_leaves_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, b"bytes")
    assert all_files(tmp_path) == {"state.json": b"1"}


# one process a folder

HOLDING = """
import sys
from pathlib import Path
from edge_runtime.store import lock_folder
with lock_folder(Path(sys.argv[1]), "another agent"):
    print("ready", flush=True)
    import time; time.sleep(60)
"""


def test_a_folder_is_held_by_one_at_a_time_and_free_again_after_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with lock_folder(folder, "an agent"):
        with (
            pytest.raises(UsageError, match="an agent is running in .*state already: stop it, or use another folder"),
            lock_folder(folder, "an agent"),
        ):
            pass
        with lock_folder(tmp_path / "other", "an agent"):
            pass
    with lock_folder(folder, "an agent"):
        pass


def test_a_killed_process_holds_no_folder(tmp_path: Path) -> None:
    killed_after_ready(HOLDING, tmp_path)
    with lock_folder(tmp_path, "an agent"):
        pass


def test_a_scratch_folder_goes_with_its_process_and_those_of_killed_ones_go_first(tmp_path: Path) -> None:
    for name in ("s.999999999.x", "s.999999998.y", f"s.{os.getpid()}.alive", "s.other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    held = os.open(tmp_path / "s.999999998.y", os.O_RDONLY)  # of a process in another container
    fcntl.flock(held, fcntl.LOCK_SH)
    with scratch_folder(tmp_path, "s.") as folder:
        (folder / "file").write_text("x")
        there = {path.name for path in tmp_path.iterdir()}
        assert there == {"s.999999998.y", f"s.{os.getpid()}.alive", "s.other", folder.name}
    os.close(held)
    assert not folder.exists()
    with scratch_folder(tmp_path, "s."):
        assert not (tmp_path / "s.999999998.y").exists()


def test_a_new_folder_that_nothing_came_of_goes_again(tmp_path: Path) -> None:
    for name, is_there, file, stays in (("a", False, "", False), ("b", False, "x", True), ("c", True, "", True)):
        folder = tmp_path / name
        if is_there:
            folder.mkdir()
        with gone_if_empty(folder), scratch_folder(folder, ".s."):
            if file:
                (folder / file).write_text("x")
        assert folder.exists() == stays
