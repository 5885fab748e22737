"""A simulation's results: one JSON line a round while it runs, tables at its end. No clock, no ledger.

    sim.json       what was simulated: options, classes, calibration
    rounds.jsonl   a line a round, with what every device did in it
    rounds.csv     the same as a table, without the devices; .parquet too where pyarrow is installed
    devices.csv    a row for each device and round

A line is written in one piece and synced before the next round counts: a line cut off by a kill is no line.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import StoreError, UsageError
from edge_runtime.optional import require
from edge_runtime.store import atomic_writer, disk_errors, read_json, write_json

SETTINGS_FILE, ROUNDS_FILE = "sim.json", "rounds.jsonl"
Row = dict[str, Any]


class Results:
    """The result files in a simulation's folder. Holds one round in memory.

    Attributes:
        last: the newest round, None before the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _repair(folder / ROUNDS_FILE)
        self.last: Row | None = None
        for row in self.rows():
            self.last = row

    def rows(self) -> Iterator[Row]:
        """Every round in turn, from the disk."""
        return _read_rounds(self.folder / ROUNDS_FILE)

    def settings(self, wanted: Mapping[str, Any], measured: Callable[[], Mapping[str, Any]]) -> Row:
        """What is being simulated: as the folder has it, or `wanted` and what is measured now in a new one.

        Raises:
            UsageError: the folder holds results of another simulation; names the first difference.
        """
        path = self.folder / SETTINGS_FILE
        known = _settings(path)
        if known is None:
            if self.last is not None:
                raise StoreError(f"{path} is missing, and rounds are there: simulate into another folder")
            fresh = {**wanted, **measured()}
            write_json(path, fresh)
            return fresh
        for key, value in json.loads(json.dumps(wanted)).items():
            if known.get(key) != value:
                raise UsageError(
                    f"{self.folder} holds a simulation with another {_difference(key, known.get(key), value)}; "
                    "give the same again to go on with it, or `edge-coordinator init` another folder"
                )
        return dict(known)

    def add(self, row: Row) -> None:
        """Append a round, durably."""
        path = self.folder / ROUNDS_FILE
        with disk_errors(path), path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.last = row

    def write_tables(self) -> list[Path]:
        """rounds.csv and devices.csv, and as Parquet where pyarrow is installed; -> what was written."""
        written = []
        tables: Mapping[str, Callable[[], Iterator[Row]]] = {
            "rounds": lambda: map(flat, self.rows()),
            "devices": lambda: ({"round": row["round"], **device} for row in self.rows() for device in row["devices"]),
        }
        for name, rows in tables.items():
            header = columns(rows())
            if not header:
                continue
            table = _write_csv(self.folder / f"{name}.csv", header, rows())
            written.append(table)
            if importlib.util.find_spec("pyarrow"):
                texts = {key for row in rows() for key, value in row.items() if isinstance(value, str)}
                written.append(_write_parquet(table.with_suffix(".parquet"), table, texts))
        return written


def _repair(path: Path) -> None:
    """Remove what a kill left of a last line."""
    try:
        with path.open("rb") as file:
            whole = max((file.tell() for line in iter(file.readline, b"") if line.endswith(b"\n")), default=0)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return
    if whole < size:
        with disk_errors(path), path.open("r+b") as file:
            file.truncate(whole)


def _difference(key: str, before: Any, now: Any) -> str:
    """Where two settings differ first, for people."""
    if key in ("data", "test") and before and now:  # hashes
        return f"--{key} file"
    if key in ("data", "test"):
        return f"--{key}: {'one, now none' if before else 'none, now one'}"
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(k for k in (*now, *before) if before.get(k) != now.get(k))
        return _difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"{key}: {before!r}, now {now!r}"


def _settings(path: Path) -> Row | None:
    """sim.json; None where there is none."""
    try:
        found = read_json(path)
    except StoreError:
        found = ()
    if found is not None and not isinstance(found, dict):
        raise StoreError(f"{path} is damaged: simulate into another folder")
    return found


def _read_rounds(path: Path) -> Iterator[Row]:
    """Every whole line."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    with file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict) or type(row.get("round")) is not int:
                    raise StoreError(f"{path} is damaged (line {number} is no round): simulate into another folder")
                yield row


def read_results(folder: Path) -> tuple[Row, list[Row]]:
    """-> (sim.json, the rounds) of a simulation that is finished, stopped or under way.

    Raises:
        UsageError: there is none in the folder. StoreError: what is there is damaged.
    """
    settings = _settings(folder / SETTINGS_FILE)
    if settings is None:
        raise UsageError(f"{folder} holds no simulation: there is no {SETTINGS_FILE}")
    return settings, list(_read_rounds(folder / ROUNDS_FILE))


def flat(row: Mapping[str, Any]) -> Row:
    """A round without its devices; what is by class becomes a column for each class."""
    found: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= {f"{key}_{inner}": number for inner, number in value.items()}
        elif not isinstance(value, list):
            found[key] = value
    return found


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key, in the order in which they appear."""
    return list({key: None for row in rows for key in row})


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Row]) -> Path:
    with atomic_writer(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.DictWriter(text, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()
    return path


def _write_parquet(path: Path, table: Path, texts: Iterable[str]) -> Path:
    """The same, with the types that its columns have: a text stays one, whatever it looks like."""
    read = require("pyarrow.csv", extra="sim")
    parquet = require("pyarrow.parquet", extra="sim")
    kinds = read.ConvertOptions(column_types=dict.fromkeys(texts, require("pyarrow", extra="sim").string()))
    parsing = read.ParseOptions(newlines_in_values=True)
    with atomic_writer(path) as file:
        parquet.write_table(read.read_csv(table, parse_options=parsing, convert_options=kinds), file)
    return path
