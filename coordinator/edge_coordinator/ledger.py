"""What the coordinator must not forget, in SQLite: devices, models, rounds, members, contributions, partial sums.

WAL with synchronous=FULL: what a transaction wrote is there after a power cut. A contribution is one row under the key
(round, device), so it counts once however often its message comes. Bytes of tensors are blobs beside it, named here by hash.
One thread uses one Ledger; the broker's thread opens its own.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import StoreError, UsageError
from edge_runtime.store import disk_errors
from edge_runtime.wire import Join, decode

VERSION = 3  # 1 had no codec with a contribution, 2 no state of a method
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (
    device TEXT PRIMARY KEY, secret TEXT NOT NULL, enrolled_at REAL NOT NULL, revoked INTEGER NOT NULL DEFAULT 0,
    last_seen REAL, state TEXT NOT NULL DEFAULT '', model_version INTEGER NOT NULL DEFAULT 0, software TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS models (
    version INTEGER PRIMARY KEY, manifest BLOB NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    created_at REAL NOT NULL, metrics TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
    run TEXT NOT NULL, round INTEGER NOT NULL, state TEXT NOT NULL, base_version INTEGER NOT NULL, deadline REAL NOT NULL,
    opened_at REAL NOT NULL, closed_at REAL, reason TEXT NOT NULL DEFAULT '', PRIMARY KEY (run, round));
CREATE TABLE IF NOT EXISTS members (
    run TEXT NOT NULL, round INTEGER NOT NULL, device TEXT NOT NULL, status TEXT NOT NULL, join_message BLOB NOT NULL,
    nonce BLOB, plan BLOB, reason TEXT NOT NULL DEFAULT '', PRIMARY KEY (run, round, device));
CREATE TABLE IF NOT EXISTS contributions (
    run TEXT NOT NULL, round INTEGER NOT NULL, device TEXT NOT NULL, blob BLOB NOT NULL, num_examples INTEGER NOT NULL,
    depth INTEGER NOT NULL, metrics TEXT NOT NULL, committed_at REAL NOT NULL, folded INTEGER NOT NULL DEFAULT 0,
    codec TEXT NOT NULL DEFAULT 'f32',
    PRIMARY KEY (run, round, device));
CREATE TABLE IF NOT EXISTS method_states (
    run TEXT NOT NULL, round INTEGER NOT NULL, method TEXT NOT NULL, state TEXT NOT NULL, PRIMARY KEY (run, round));
CREATE TABLE IF NOT EXISTS partials (
    run TEXT NOT NULL, round INTEGER NOT NULL, blob BLOB NOT NULL, weights TEXT NOT NULL, members TEXT NOT NULL,
    PRIMARY KEY (run, round)); -- members: empty now, contributions.folded says who is in
CREATE INDEX IF NOT EXISTS unfolded ON contributions (run, round, device) WHERE folded = 0;
CREATE INDEX IF NOT EXISTS revoked ON devices (device) WHERE revoked;
CREATE TABLE IF NOT EXISTS optimizer_states (
    run TEXT NOT NULL, version INTEGER NOT NULL, optimizer TEXT NOT NULL, tensor TEXT NOT NULL, blob BLOB NOT NULL,
    PRIMARY KEY (run, version, tensor));
"""


@dataclass(frozen=True)
class Contribution:
    """A committed update."""

    device: str
    blob: bytes
    num_examples: int
    depth: int
    metrics: Mapping[str, Any]
    folded: bool
    codec: str = "f32"  # of its blob, as it was offered

    @property
    def kept(self) -> bytes:
        """What it has kept of a pruned model; empty: all."""
        return bytes.fromhex(self.metrics.get("kept", ""))


@dataclass(frozen=True)
class Member:
    """A device of a cohort: status is joined, unable, planned, excluded or gave-up."""

    device: str
    status: str
    join_message: bytes
    nonce: bytes | None
    plan: bytes | None
    reason: str


def read_join(member: Member) -> Join:
    """What a member said when it joined."""
    body = decode(member.join_message, "join").body
    assert isinstance(body, Join), "only joins are kept with members"
    return body


@dataclass(frozen=True)
class ModelRow:
    """A published version."""

    version: int
    manifest: bytes
    run: str
    round: int
    created_at: float
    metrics: Mapping[str, Any]


@contextlib.contextmanager
def _sqlite_errors() -> Iterator[None]:
    """SQLite's errors as ours, but for a second row under one key: that is the caller's business."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise StoreError(f"the ledger cannot be read or written: {error}") from error


class Ledger:
    """The database of one fleet."""

    def __init__(self, path: Path) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
            path.chmod(0o600)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"cannot open the ledger {path}: {error}") from None
        try:
            self._prepare(path)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, path: Path) -> None:
        known = self._rows("SELECT name FROM sqlite_master WHERE name = 'meta'")
        found = self.get("schema") if known else str(VERSION)
        if found not in (None, "1", "2", str(VERSION)):
            raise StoreError(
                f"{path} is of schema {found}, this coordinator writes {VERSION}: use the version that made it"
            )
        with _sqlite_errors():
            self._db.executescript(SCHEMA)
        if found in ("1", "2"):
            with self.transaction():
                if found == "1":
                    self._write("ALTER TABLE contributions ADD COLUMN codec TEXT NOT NULL DEFAULT 'f32'")
                self.put("schema", str(VERSION))
        if self.get("schema") is None:
            self.put("schema", str(VERSION))

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def sync_when_told(self) -> None:
        """From now on a power cut may take the transactions since the last `sync`; the end of this process none of them.

        For a simulation, which can do a round again; never for a fleet, whose devices delete what is committed.
        """
        with _sqlite_errors():
            self._db.execute("PRAGMA synchronous=NORMAL")

    def sync(self) -> None:
        """Everything that was written is on the disk when this returns."""
        with _sqlite_errors():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it returns.

        Raises:
            StoreError: the disk is full or the file is damaged; nothing of the transaction remains.
        """
        self._write("BEGIN IMMEDIATE")
        try:
            yield
            self._write("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:  # SQLite has rolled back by itself where the disk was full
                self._write("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StoreError(f"the ledger cannot be written: {error}") from error
            raise

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with _sqlite_errors():
            return self._db.execute(query, values).fetchall()

    def _write(self, statement: str, values: Sequence[Any] = ()) -> int:
        """-> the number of rows changed."""
        with _sqlite_errors():
            return self._db.execute(statement, values).rowcount

    # meta

    def get(self, key: str) -> str | None:
        """A single value."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        return rows[0]["value"] if rows else None

    def put(self, key: str, value: str) -> None:
        """Set a single value."""
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # devices

    def enroll(self, device: str, secret_hash: str, now: float) -> None:
        """Add a device.

        Raises:
            UsageError: it is enrolled already.
        """
        try:
            self._write(
                "INSERT INTO devices (device, secret, enrolled_at) VALUES (?, ?, ?)", (device, secret_hash, now)
            )
        except sqlite3.IntegrityError:
            raise UsageError(
                f"{device} is enrolled already: `enroll {device} --renew` gives it new credentials"
            ) from None

    def renew(self, device: str, secret_hash: str) -> None:
        """Give a device another secret, and lift a revocation."""
        if not self._write("UPDATE devices SET secret = ?, revoked = 0 WHERE device = ?", (secret_hash, device)):
            raise UsageError(f"there is no device {device}: see `edge-coordinator devices`")

    def revoke(self, device: str) -> None:
        """Refuse a device from now on."""
        if not self._write("UPDATE devices SET revoked = 1 WHERE device = ?", (device,)):
            raise UsageError(f"there is no device {device}: see `edge-coordinator devices`")

    def secret(self, device: str) -> str | None:
        """The stored hash of a device that may connect."""
        rows = self._rows("SELECT secret FROM devices WHERE device = ? AND revoked = 0", (device,))
        return rows[0]["secret"] if rows else None

    def revoked(self) -> set[str]:
        """The devices that may not connect any more."""
        return {row["device"] for row in self._rows("SELECT device FROM devices WHERE revoked")}

    def devices(self) -> list[dict[str, Any]]:
        """Every device, without its secret."""
        rows = self._rows("SELECT * FROM devices ORDER BY device")
        return [{k: v for k, v in dict(row).items() if k != "secret"} for row in rows]

    def seen(self, device: str, state: str, model_version: int, software: str, now: float) -> None:
        """Note what a device last said of itself."""
        self._write(
            "UPDATE devices SET last_seen = ?, state = ?, model_version = ?, software = ? WHERE device = ?",
            (now, state, model_version, software, device),
        )

    # models

    def add_model(
        self, version: int, manifest: bytes, run: str, round_: int, metrics: Mapping[str, Any], now: float
    ) -> None:
        """Publish a version; the same one twice is an error of ours."""
        self._write(
            "INSERT INTO models VALUES (?, ?, ?, ?, ?, ?)", (version, manifest, run, round_, now, json.dumps(metrics))
        )

    def models(self) -> list[ModelRow]:
        """All versions, oldest first."""
        rows = self._rows("SELECT * FROM models ORDER BY version")
        return [
            ModelRow(r["version"], r["manifest"], r["run"], r["round"], r["created_at"], json.loads(r["metrics"]))
            for r in rows
        ]

    def newest_model(self) -> ModelRow | None:
        """The version that is published."""
        rows = self.models()
        return rows[-1] if rows else None

    def run_start(self) -> int | None:
        """The version that the newest version's run began with; None if it has no round, or other runs made versions since."""
        query = (
            "SELECT base_version FROM rounds WHERE round = 1 AND run = (SELECT run FROM models ORDER BY version DESC LIMIT 1)"
            " AND NOT EXISTS (SELECT 1 FROM models WHERE version > rounds.base_version AND models.run != rounds.run)"
        )
        rows = self._rows(query)
        return rows[0]["base_version"] if rows else None

    # the server optimizer

    def optimizer_states(self, run: str, version: int, optimizer: str) -> dict[str, bytes]:
        """The blob of each tensor's state as of a model version; nothing of another optimizer or run."""
        query = "SELECT tensor, blob FROM optimizer_states WHERE run = ? AND version = ? AND optimizer = ?"
        return {row["tensor"]: row["blob"] for row in self._rows(query, (run, version, optimizer))}

    def set_optimizer_states(self, run: str, version: int, optimizer: str, states: Mapping[str, bytes]) -> None:
        """The states of a version, in the transaction that publishes it. Those of the version before stay, for a
        simulation that rewinds to it; older ones go."""
        self._write("DELETE FROM optimizer_states WHERE version < ?", (version - 1,))
        for tensor, blob in states.items():
            self._write("INSERT INTO optimizer_states VALUES (?, ?, ?, ?, ?)", (run, version, optimizer, tensor, blob))

    def optimizer_blobs(self) -> set[bytes]:
        """Every state that is kept."""
        return {row["blob"] for row in self._rows("SELECT blob FROM optimizer_states")}

    # rounds

    def open_round(self, run: str, number: int, base_version: int, deadline: float, now: float) -> None:
        """A new round in state joining."""
        self._write(
            "INSERT INTO rounds (run, round, state, base_version, deadline, opened_at) VALUES (?, ?, 'joining', ?, ?, ?)",
            (run, number, base_version, deadline, now),
        )

    def move_round(
        self, run: str, number: int, old: str, new: str, deadline: float, now: float, reason: str = ""
    ) -> bool:
        """Compare and set a round's state; False if it was not in `old`."""
        closed = now if new in ("published", "failed") else None
        return bool(
            self._write(
                "UPDATE rounds SET state = ?, deadline = ?, closed_at = ?, reason = ? WHERE run = ? AND round = ? AND state = ?",
                (new, deadline, closed, reason, run, number, old),
            )
        )

    def extend_round(self, run: str, number: int, deadline: float) -> None:
        """After the coordinator was away: the phase gets its time again, whatever the clock was when it began."""
        self._write("UPDATE rounds SET deadline = ? WHERE run = ? AND round = ?", (deadline, run, number))

    def last_round(self, run: str) -> dict[str, Any] | None:
        """The newest round of a run."""
        rows = self._rows("SELECT * FROM rounds WHERE run = ? ORDER BY round DESC LIMIT 1", (run,))
        return dict(rows[0]) if rows else None

    def rounds(self, run: str | None = None) -> list[dict[str, Any]]:
        """All rounds with their counts, oldest first."""
        rows = self._rows(
            "SELECT r.*, (SELECT COUNT(*) FROM members m WHERE m.run = r.run AND m.round = r.round) AS members,"
            " (SELECT COUNT(*) FROM contributions c WHERE c.run = r.run AND c.round = r.round) AS committed"
            " FROM rounds r WHERE ? IS NULL OR r.run = ? ORDER BY r.opened_at",
            (run, run),
        )
        return [dict(row) for row in rows]

    def rewind(self, run: str, number: int) -> None:
        """Forget the rounds of a run after `number` and the models they made, for a simulation that goes on from there."""
        for table in ("rounds", "members", "contributions", "partials", "models", "method_states"):
            self._write(f"DELETE FROM {table} WHERE run = ? AND round > ?", (run, number))
        self._write("DELETE FROM optimizer_states WHERE version > (SELECT MAX(version) FROM models)")

    # what a method remembers

    def method_state(self, run: str, method: str) -> dict[str, Any]:
        """The newest state of a run's method; {} if it has none, or if the run's method was another one then."""
        rows = self._rows("SELECT * FROM method_states WHERE run = ? ORDER BY round DESC LIMIT 1", (run,))
        state: dict[str, Any] = json.loads(rows[0]["state"]) if rows and rows[0]["method"] == method else {}
        return state

    def set_method_state(self, run: str, number: int, method: str, state: Mapping[str, Any]) -> None:
        """The state as of a round: call within the transaction of what it belongs to. Those of earlier rounds stay."""
        self._write(
            "INSERT OR REPLACE INTO method_states VALUES (?, ?, ?, ?)", (run, number, method, json.dumps(dict(state)))
        )

    # members and contributions

    def set_member(self, run: str, number: int, member: Member) -> None:
        """Add or replace a member."""
        self._write(
            "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (run, number, member.device, member.status, member.join_message, member.nonce, member.plan, member.reason),
        )

    def members(self, run: str, number: int) -> dict[str, Member]:
        """The cohort by device, in order of their names."""
        rows = self._rows("SELECT * FROM members WHERE run = ? AND round = ? ORDER BY device", (run, number))
        return {r["device"]: _member(r) for r in rows}

    def member(self, run: str, number: int, device: str) -> Member | None:
        """One of the cohort."""
        key = (run, number, device)
        rows = self._rows("SELECT * FROM members WHERE run = ? AND round = ? AND device = ?", key)
        return _member(rows[0]) if rows else None

    def contribute(self, run: str, number: int, item: Contribution, now: float) -> bool:
        """Commit an update; False if this device's is in already."""
        return bool(
            self._write(
                "INSERT OR IGNORE INTO contributions (run, round, device, blob, num_examples, depth, metrics, committed_at,"
                " codec) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run,
                    number,
                    item.device,
                    item.blob,
                    item.num_examples,
                    item.depth,
                    json.dumps(item.metrics),
                    now,
                    item.codec,
                ),
            )
        )

    def contributions(self, run: str, number: int) -> dict[str, Contribution]:
        """Committed updates by device."""
        rows = self._rows("SELECT * FROM contributions WHERE run = ? AND round = ? ORDER BY device", (run, number))
        return {r["device"]: _contribution(r) for r in rows}

    def contribution(self, run: str, number: int, device: str) -> Contribution | None:
        """One device's committed update."""
        key = (run, number, device)
        rows = self._rows("SELECT * FROM contributions WHERE run = ? AND round = ? AND device = ?", key)
        return _contribution(rows[0]) if rows else None

    def unfolded(self, run: str, number: int) -> dict[str, Contribution]:
        """Committed updates that no partial sum holds yet."""
        query = (
            "SELECT * FROM contributions INDEXED BY unfolded WHERE run = ? AND round = ? AND folded = 0 ORDER BY device"
        )
        return {r["device"]: _contribution(r) for r in self._rows(query, (run, number))}

    # partial sums

    def partial(self, run: str, number: int) -> tuple[bytes, dict[str, int]] | None:
        """-> (blob of the sums, weight of each tensor)."""
        rows = self._rows("SELECT * FROM partials WHERE run = ? AND round = ?", (run, number))
        return (rows[0]["blob"], json.loads(rows[0]["weights"])) if rows else None

    def set_partial(self, run: str, number: int, blob: bytes, weights: Mapping[str, int], fresh: Sequence[str]) -> None:
        """The sum and its weights, and that the updates of these devices are in it now: call within one transaction."""
        self._write("INSERT OR REPLACE INTO partials VALUES (?, ?, ?, ?, '')", (run, number, blob, json.dumps(weights)))
        for device in fresh:
            self._write(
                "UPDATE contributions SET folded = 1 WHERE run = ? AND round = ? AND device = ?", (run, number, device)
            )

    def live_blobs(self) -> set[bytes]:
        """Blobs of contributions not yet folded and of partial sums, of rounds that are still open."""
        open_rounds = "(SELECT run, round FROM rounds WHERE state NOT IN ('published', 'failed'))"
        rows = [
            *self._rows(f"SELECT blob FROM contributions WHERE folded = 0 AND (run, round) IN {open_rounds}"),
            *self._rows(f"SELECT blob FROM partials WHERE (run, round) IN {open_rounds}"),
        ]
        return {row["blob"] for row in rows}


def _member(r: sqlite3.Row) -> Member:
    return Member(r["device"], r["status"], r["join_message"], r["nonce"], r["plan"], r["reason"])


def _contribution(r: sqlite3.Row) -> Contribution:
    metrics, folded = json.loads(r["metrics"]), bool(r["folded"])
    return Contribution(r["device"], r["blob"], r["num_examples"], r["depth"], metrics, folded, r["codec"])
