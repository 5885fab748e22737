"""What the coordinator must not forget: counted once, all or nothing, there after a kill, readable by the next one."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_runtime.errors import StoreError, UsageError
from tests.samples import quickly
from tests.worlds import fill, killed_after_ready, small_disk

BLOB, OTHER = b"b" * 32, b"o" * 32


def contribution(device: str, blob: bytes = BLOB, examples: int = 100) -> Contribution:
    """A committed update."""
    return Contribution(device, blob, examples, 2, {"last_loss": 0.5, "train_s": 12.0}, False)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.db")
    yield opened
    opened.close()


def reopened(ledger: Ledger, tmp_path: Path) -> Ledger:
    """The same file in a new process."""
    ledger.close()
    return Ledger(tmp_path / "ledger.db")


# opening


def test_a_new_ledger_is_empty_and_readable_by_its_owner_only(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.devices() == ledger.rounds() == []
    assert ledger.models() == []
    assert ledger.newest_model() is None
    assert ledger.last_round("run") is None
    assert ledger.live_blobs() == set()
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_single_value_is_kept_and_replaced(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.get("epoch") is None
    ledger.put("epoch", "1")
    ledger.put("epoch", "2")
    assert reopened(ledger, tmp_path).get("epoch") == "2"


def test_a_ledger_of_another_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        db.execute("INSERT INTO meta VALUES ('schema', '99')")
    with pytest.raises(StoreError, match="is of schema 99, this coordinator writes 3: use the version that made it"):
        Ledger(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [("meta",)]


def test_a_ledger_of_schema_2_is_taken_over_and_its_method_remembers_nothing(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as db, db:
        db.execute("DROP TABLE method_states")
        db.execute("UPDATE meta SET value = '2' WHERE key = 'schema'")
    for _ in range(2):
        ledger = Ledger(tmp_path / "ledger.db")
        assert ledger.get("schema") == "3"
        assert ledger.method_state("run", "caff") == {}
        ledger.close()


def test_a_methods_state_is_its_own_and_goes_with_a_rewind(ledger: Ledger) -> None:
    for number in (1, 2):
        ledger.set_method_state("run", number, "legend", {"step": number, "of": {"a": [0.1, None]}})
    ledger.set_method_state("run", 2, "legend", {"step": 3})
    assert ledger.method_state("run", "legend") == {"step": 3}
    assert ledger.method_state("run", "caff") == ledger.method_state("other", "legend") == {}
    ledger.rewind("run", 1)
    assert ledger.method_state("run", "legend") == {"step": 1, "of": {"a": [0.1, None]}}


def test_a_ledger_of_schema_1_is_taken_over_with_float32_as_the_codec_of_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("ALTER TABLE contributions DROP COLUMN codec")
        db.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
        db.execute("INSERT INTO contributions VALUES ('run', 1, 'a', x'01', 5, 2, '{}', 0.0, 0)")
    for _ in range(2):
        ledger = Ledger(path)
        assert ledger.get("schema") == "3"
        assert ledger.contributions("run", 1)["a"].codec == "f32"
        ledger.close()


@pytest.mark.parametrize(
    "content", [b"no database at all, only some text that is long enough to look at", b"\0" * 4096]
)
def test_a_file_that_is_no_ledger_is_refused_and_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="ledger"):
        Ledger(path).devices()


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot open the ledger"):
        Ledger(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write"):
        Ledger(tmp_path / "file" / "ledger.db")


# devices


def test_a_device_is_enrolled_once(ledger: Ledger) -> None:
    ledger.enroll("pi-1", "hash", 5.0)
    with pytest.raises(UsageError, match="pi-1 is enrolled already: `enroll pi-1 --renew`"):
        ledger.enroll("pi-1", "other", 6.0)
    assert ledger.secret("pi-1") == "hash"
    assert [row["device"] for row in ledger.devices()] == ["pi-1"]


def test_a_revoked_device_has_no_secret_until_it_is_renewed(ledger: Ledger) -> None:
    ledger.enroll("pi-1", "hash", 5.0)
    ledger.revoke("pi-1")
    assert ledger.secret("pi-1") is None
    assert ledger.devices()[0]["revoked"] == 1
    ledger.renew("pi-1", "fresh")
    assert ledger.secret("pi-1") == "fresh"
    assert ledger.devices()[0]["revoked"] == 0


def test_a_device_that_is_not_there_cannot_be_renewed_or_revoked(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="there is no device pi-9: see `edge-coordinator devices`"):
        ledger.renew("pi-9", "x")
    with pytest.raises(UsageError, match="there is no device pi-9: see `edge-coordinator devices`"):
        ledger.revoke("pi-9")
    assert ledger.secret("pi-9") is None


def test_what_a_device_last_said_is_listed_without_its_secret(ledger: Ledger) -> None:
    ledger.enroll("pi-2", "hash", 5.0)
    ledger.enroll("pi-1", "hash", 5.0)
    ledger.seen("pi-1", "online", 3, "0.1.0", 77.5)
    ledger.seen("stranger", "online", 3, "0.1.0", 77.5)
    first, second = ledger.devices()
    assert "secret" not in first
    assert (first["device"], first["last_seen"], first["state"], first["model_version"], first["software"]) == (
        "pi-1",
        77.5,
        "online",
        3,
        "0.1.0",
    )
    assert (second["device"], second["last_seen"], second["state"]) == ("pi-2", None, "")


@quickly(40)
@given(
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
    | st.sampled_from(["'; DROP TABLE devices; --", '"', "%", "?"])
)
def test_no_text_is_taken_for_a_statement(tmp_path: Path, name: str) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    before = {row["device"] for row in ledger.devices()}
    if name not in before:
        ledger.enroll(name, name, 0.0)
    ledger.put(name + "-key", name)
    assert ledger.secret(name) == name
    assert ledger.get(name + "-key") == name
    assert {row["device"] for row in ledger.devices()} == before | {name}
    ledger.close()


# models and rounds


def test_versions_are_listed_oldest_first_and_the_newest_is_the_highest(ledger: Ledger) -> None:
    ledger.add_model(2, OTHER, "run", 1, {"mean_loss": 0.5}, 2.0)
    ledger.add_model(1, BLOB, "", 0, {}, 1.0)
    assert [m.version for m in ledger.models()] == [1, 2]
    newest = ledger.newest_model()
    assert newest is not None
    assert (newest.version, newest.manifest, newest.run, newest.round, newest.metrics) == (
        2,
        OTHER,
        "run",
        1,
        {"mean_loss": 0.5},
    )


def test_the_same_version_twice_is_refused_and_takes_its_transaction_with_it(ledger: Ledger) -> None:
    ledger.add_model(1, BLOB, "", 0, {}, 1.0)
    with pytest.raises(StoreError, match="UNIQUE"), ledger.transaction():
        ledger.put("epoch", "5")
        ledger.add_model(1, OTHER, "", 0, {}, 1.0)
    assert ledger.get("epoch") is None
    assert [m.manifest for m in ledger.models()] == [BLOB]


def test_a_round_moves_only_from_the_state_it_is_in(ledger: Ledger) -> None:
    ledger.open_round("run", 1, 1, 60.0, 0.0)
    assert not ledger.move_round("run", 1, "collecting", "closing", 0.0, 5.0)
    assert ledger.move_round("run", 1, "joining", "collecting", 100.0, 5.0)
    assert not ledger.move_round("run", 1, "joining", "collecting", 100.0, 5.0), "one of two wins"
    last = ledger.last_round("run")
    assert last is not None
    assert (last["state"], last["deadline"], last["closed_at"]) == ("collecting", 100.0, None)
    assert ledger.move_round("run", 1, "collecting", "failed", 100.0, 7.0, "too few")
    last = ledger.last_round("run")
    assert last is not None
    assert (last["state"], last["closed_at"], last["reason"]) == ("failed", 7.0, "too few")
    assert not ledger.move_round("other", 1, "failed", "joining", 0.0, 0.0)


def test_a_phase_gets_its_time_again_even_where_the_clock_was_ahead_before(ledger: Ledger) -> None:
    ledger.open_round("run", 1, 1, 60.0, 0.0)
    for deadline in (50.0, 90.0):
        ledger.extend_round("run", 1, deadline)
        last = ledger.last_round("run")
        assert last is not None
        assert last["deadline"] == deadline


def test_rounds_are_listed_with_their_counts_and_runs_are_apart(ledger: Ledger) -> None:
    for number, run in enumerate(["a", "a", "b"], 1):
        ledger.open_round(run, number, 1, 60.0, float(number))
    ledger.set_member("a", 1, Member("pi-1", "joined", b"m", None, None, ""))
    ledger.set_member("a", 1, Member("pi-2", "joined", b"m", None, None, ""))
    ledger.contribute("a", 1, contribution("pi-1"), 5.0)
    assert [(r["run"], r["round"], r["members"], r["committed"]) for r in ledger.rounds()] == [
        ("a", 1, 2, 1),
        ("a", 2, 0, 0),
        ("b", 3, 0, 0),
    ]
    assert [r["round"] for r in ledger.rounds("a")] == [1, 2]
    last = ledger.last_round("a")
    assert last is not None
    assert last["round"] == 2


def test_a_member_comes_back_as_it_was_and_is_replaced_by_its_next_word(ledger: Ledger, tmp_path: Path) -> None:
    joined = Member("pi-2", "joined", b"\0\xff", None, None, "")
    planned = Member("pi-2", "planned", b"\0\xff", bytes(16), b"plan", "why")
    ledger.set_member("run", 1, Member("pi-1", "unable", b"", None, None, "no memory"))
    ledger.set_member("run", 1, joined)
    assert ledger.members("run", 1)["pi-2"] == joined
    ledger.set_member("run", 1, planned)
    members = reopened(ledger, tmp_path).members("run", 1)
    assert members["pi-2"] == planned
    assert list(members) == ["pi-1", "pi-2"]


# contributions


def test_a_contribution_counts_once_however_often_it_comes(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.contribute("run", 1, contribution("pi-1"), 5.0)
    for again in (contribution("pi-1"), contribution("pi-1", OTHER, 999)):
        assert not ledger.contribute("run", 1, again, 6.0)
    assert ledger.contribute("run", 2, contribution("pi-1"), 7.0), "another round"
    assert ledger.contribute("other", 1, contribution("pi-1"), 7.0), "another run"
    assert reopened(ledger, tmp_path).contributions("run", 1) == {"pi-1": contribution("pi-1")}


def test_from_many_threads_at_once_each_device_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    counted: list[str] = []

    def work() -> None:
        mine = Ledger(path)
        for number in range(8):
            with mine.transaction():
                if mine.contribute("run", 1, contribution(f"pi-{number}"), 0.0):
                    counted.append(f"pi-{number}")
        mine.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted) == [f"pi-{number}" for number in range(8)]


def test_a_partial_sum_its_members_and_that_they_are_folded_are_one_transaction(ledger: Ledger) -> None:
    for device in ("pi-1", "pi-2", "pi-3"):
        ledger.contribute("run", 1, contribution(device), 5.0)
    with pytest.raises(KeyboardInterrupt), ledger.transaction():
        ledger.set_partial("run", 1, OTHER, {"head": 200}, ["pi-1", "pi-2"])
        raise KeyboardInterrupt
    assert ledger.partial("run", 1) is None
    assert not any(c.folded for c in ledger.contributions("run", 1).values())
    with ledger.transaction():
        ledger.set_partial("run", 1, OTHER, {"head": 200}, ["pi-1", "pi-2"])
    assert ledger.partial("run", 1) == (OTHER, {"head": 200})
    assert [c.folded for c in ledger.contributions("run", 1).values()] == [True, True, False]
    assert ledger.partial("run", 2) is None


def test_live_blobs_are_the_unfolded_contributions_and_the_sums_of_open_rounds(ledger: Ledger) -> None:
    blobs = [bytes([i]) * 32 for i in range(5)]
    for number in (1, 2):
        ledger.open_round("run", number, 1, 60.0, 0.0)
    ledger.contribute("run", 1, contribution("pi-1", blobs[0]), 0.0)
    ledger.contribute("run", 2, contribution("pi-1", blobs[1]), 0.0)
    ledger.contribute("run", 2, contribution("pi-2", blobs[2]), 0.0)
    ledger.set_partial("run", 2, blobs[3], {}, ["pi-1"])
    assert ledger.live_blobs() == {blobs[0], blobs[2], blobs[3]}
    ledger.move_round("run", 1, "joining", "failed", 0.0, 0.0)
    assert ledger.live_blobs() == {blobs[2], blobs[3]}
    ledger.move_round("run", 2, "joining", "published", 0.0, 0.0)
    assert ledger.live_blobs() == set()


# all or nothing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StoreError, UsageError])
def test_an_error_takes_back_the_whole_transaction_and_passes_on(ledger: Ledger, error: type[BaseException]) -> None:
    ledger.put("epoch", "1")
    with pytest.raises(error), ledger.transaction():
        ledger.put("epoch", "2")
        ledger.enroll("pi-1", "hash", 0.0)
        raise error("stop")
    assert ledger.get("epoch") == "1"
    assert ledger.devices() == []
    with ledger.transaction():
        ledger.put("epoch", "3")
    assert ledger.get("epoch") == "3", "the next one works"


def test_a_transaction_inside_another_is_refused_and_nothing_of_either_remains(ledger: Ledger) -> None:
    with pytest.raises(StoreError, match="within a transaction"), ledger.transaction():
        ledger.put("outer", "1")
        with ledger.transaction():
            ledger.put("inner", "1")
    assert (ledger.get("outer"), ledger.get("inner")) == (None, None)


def test_what_is_not_committed_is_seen_by_nobody_else(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "ledger.db")
    with ledger.transaction():
        ledger.put("epoch", "2")
        assert other.get("epoch") is None
    assert other.get("epoch") == "2"
    other.close()


BETWEEN_STATEMENTS = """
import sys, time
from pathlib import Path
from edge_coordinator.ledger import Contribution, Ledger, Member
ledger = Ledger(Path(sys.argv[1]))
def commit(device):
    ledger.contribute("run", 1, Contribution(device, b"b" * 32, 100, 2, {}, False), 0.0)
with ledger.transaction():
    ledger.open_round("run", 1, 1, 60.0, 0.0)
    commit("pi-1")
with ledger.transaction():
    commit("pi-2")
    for statement in range(int(sys.argv[2])):
        [lambda: commit("pi-3"),
         lambda: ledger.set_partial("run", 1, b"s" * 32, {"head": 200}, ["pi-1", "pi-2"]),
         lambda: ledger.move_round("run", 1, "joining", "published", 0.0, 0.0),
         lambda: ledger.add_model(2, b"m" * 32, "run", 1, {}, 0.0)][statement]()
    if sys.argv[3] == "inside":
        print("ready", flush=True); time.sleep(60)
print("ready", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("statements", [0, 2, 4])
def test_a_process_killed_between_statements_leaves_what_was_committed_and_nothing_else(
    tmp_path: Path, statements: int
) -> None:
    killed_after_ready(BETWEEN_STATEMENTS, tmp_path / "ledger.db", statements, "inside")
    ledger = Ledger(tmp_path / "ledger.db")
    assert list(ledger.contributions("run", 1)) == ["pi-1"]
    assert ledger.partial("run", 1) is None
    assert ledger.models() == []
    last = ledger.last_round("run")
    assert last is not None
    assert last["state"] == "joining"


def test_a_process_killed_after_its_transaction_leaves_all_of_it(tmp_path: Path) -> None:
    killed_after_ready(BETWEEN_STATEMENTS, tmp_path / "ledger.db", 4, "after")
    ledger = Ledger(tmp_path / "ledger.db")
    assert {device: c.folded for device, c in ledger.contributions("run", 1).items()} == {
        "pi-1": True,
        "pi-2": True,
        "pi-3": False,
    }
    assert [m.version for m in ledger.models()] == [2]
    last = ledger.last_round("run")
    assert last is not None
    assert last["state"] == "published"


def test_a_full_disk_is_a_store_error_everywhere_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        ledger = Ledger(disk / "ledger.db")
        ledger.enroll("pi-1", "hash", 0.0)
        ledger.open_round("run", 1, 1, 60.0, 0.0)
        filler = fill(disk)
        long = "x" * 100_000
        with pytest.raises(StoreError, match="full"), ledger.transaction():
            ledger.put("long", long)
        for write in (
            lambda: ledger.put("long", long),
            lambda: ledger.seen("pi-1", long, 1, "s", 0.0),
            lambda: ledger.renew("pi-1", long),
            lambda: ledger.enroll("pi-2", long, 0.0),
            lambda: ledger.contribute("run", 1, contribution(long), 0.0),
        ):
            with pytest.raises(StoreError, match="full"):
                write()
        assert ledger.secret("pi-1") == "hash"
        assert ledger.contributions("run", 1) == {}
        filler.unlink()
        with ledger.transaction():
            ledger.put("long", long)
        assert ledger.get("long") == long
        ledger.close()


# the version that a run began with


def test_a_runs_start_is_what_its_first_round_began_with_until_another_run_makes_a_version(ledger: Ledger) -> None:
    assert ledger.run_start() is None
    ledger.add_model(1, BLOB, "", 0, {}, 0.0)
    assert ledger.run_start() is None, "no run has made anything"
    ledger.open_round("a", 1, 1, 0.0, 0.0)
    for number in (2, 3):
        ledger.add_model(number, BLOB, "a", number, {}, 0.0)
    assert ledger.run_start() == 1
    ledger.add_model(4, BLOB, "b", 0, {}, 0.0)
    assert ledger.run_start() is None, "adapters of run b, whose first round is not open yet"
    ledger.open_round("b", 1, 4, 0.0, 0.0)
    assert ledger.run_start() == 4
    ledger.add_model(5, BLOB, "b", 1, {}, 0.0)
    assert ledger.run_start() == 4
    ledger.add_model(6, BLOB, "a", 4, {}, 0.0)
    assert ledger.run_start() is None, "run b came between"
