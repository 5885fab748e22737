"""Reads labelled text (CSV, TSV, JSON lines, a JSON array; plain or .gz) and says exactly what is wrong with it.

Not here: physical lines and encodings (`lines.py`), how examples are divided (`split.py`), tokens (`tokenize.py`), data
sets to download (`tools/datasets.py`). Imports the standard library, `lines` and `errors` only.

In memory: the examples handed back and one row; the file never sits there as a whole. A row has at most `MAX_ROW_CHARS`
characters; reading one that long takes 96 MiB of ASCII and 192 MiB with emoji (measured), all others a few KiB. The one
exception is a JSON array, which is one string of at most `MAX_ARRAY_CHARS`.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TextIO, cast

from edge_runtime.errors import DataError, UsageError
from edge_runtime.lines import INVALID, MAX_ROW_CHARS, SURROGATE, Lines, RowTooLong, open_lines

MAX_ARRAY_CHARS = 256 << 20
MAX_LABEL_CHARS = 200  # as in a manifest
KEPT_BAD_ROWS = 20
NAMED_BAD_ROWS = 5
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text; `line` is the physical line of the file (from 1) where its row begins."""

    text: str
    label: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, the physical line where it begins (from 1), and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Examples:
    """What a file holds.

    Attributes:
        rows: the usable rows in the file's order.
        labels: the labels that occur in `rows`, sorted.
        skipped: the first `KEPT_BAD_ROWS` rows that were skipped.
        num_skipped: how many rows were skipped in all.
    """

    rows: tuple[Example, ...]
    labels: tuple[str, ...]
    skipped: tuple[BadRow, ...] = ()
    num_skipped: int = 0


class _Raw(NamedTuple):
    """A row as the file has it; `problem` says why it is not even that."""

    line: int
    text: object = None
    label: object = None
    problem: str | None = None


def read_examples(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    label_column: str = "label",
    encoding: str | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    labels: Sequence[str] | None = None,
) -> Examples:
    """Read every labelled text of a .csv, .tsv, .jsonl, .ndjson or .json file, or one of these followed by .gz.

    The delimiter of a .csv or .tsv is the comma, semicolon or tab that its header line uses. Labels may be numbers or
    booleans, which become text as JSON spells them (1, 2.5, true); blank lines are not rows.

    Args:
        encoding: a Python codec name; None means what the byte order mark says, and UTF-8 without one.
        bad_rows: "skip" leaves out rows that cannot be used and counts them; "error" names the first of them.
        labels: the only labels allowed; a row with another one is bad.

    Raises:
        DataError: the file cannot be read, has no usable row, or has a bad row and `bad_rows` is "error".
        UsageError: text and label are asked from one column, or the encoding is unknown.
    """
    if text_column == label_column:
        raise UsageError(f"text and label cannot both be the column {text_column!r}: name two columns")
    if bad_rows not in ("error", "skip"):
        raise UsageError(f"bad_rows is 'error' or 'skip', not {bad_rows!r}")
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or a device may never end
        raise DataError(f"{path} is not a regular file: give a file")
    allowed = None if labels is None else frozenset(labels)
    rows: list[Example] = []
    bad: list[BadRow] = []
    num_bad = 0
    known: dict[str, str] = {}  # one string per label, not one per row
    with open_lines(path, encoding) as lines:
        for raw in _rows(path, lines, text_column, label_column):
            row = _check(raw, allowed)
            if isinstance(row, Example):
                rows.append(Example(row.text, known.setdefault(row.label, row.label), row.line))
                continue
            num_bad += 1
            if len(bad) < KEPT_BAD_ROWS:
                bad.append(row)
            if bad_rows == "error":
                rows.clear()  # nothing will be handed back: read on only to count
    if num_bad and bad_rows == "error":
        raise DataError(_describe_bad(path, bad, num_bad))
    if not rows:
        why = f"all its {num_bad} rows are bad; line {bad[0].line}: {bad[0].reason}" if bad else "it has no rows"
        raise DataError(f"{path}: {why}: give a file with at least one labelled text")
    return Examples(tuple(rows), tuple(sorted(known)), tuple(bad), num_bad)


def iter_texts(source: str | os.PathLike[str] | TextIO | BinaryIO, encoding: str | None = None) -> Iterator[str]:
    """One text per line of a file or an open stream such as `sys.stdin`, without the line's end; blank lines too.

    Bytes that are not of the encoding (default: what the byte order mark says, UTF-8 without one) become U+FFFD. A stream is
    left open.

    Raises:
        DataError: the file cannot be read, there is no such encoding, or a line is longer than `MAX_ROW_CHARS` characters.
    """
    with open_lines(source, encoding, errors="replace") as lines:
        while True:
            lines.begin()
            try:
                line = next(lines, None)
            except RowTooLong as error:
                raise DataError(f"{lines.name}, line {lines.first} is {error}: divide it") from None
            if line is None:
                return
            yield SURROGATE.sub("\ufffd", line.rstrip("\r\n"))


def _check(raw: _Raw, allowed: frozenset[str] | None) -> Example | BadRow:
    """A row as an example, or why it is none."""
    if raw.problem is not None:
        return BadRow(raw.line, raw.problem)
    text, label = raw.text, raw.label
    if isinstance(label, (bool, int, float)):
        if isinstance(label, float) and not math.isfinite(label):
            return BadRow(raw.line, "the label is not a finite number")
        label = json.dumps(label)
    for name, value in (("text", text), ("label", label)):
        if value is None:
            return BadRow(raw.line, f"the {name} is missing or null")
        if not isinstance(value, str):
            return BadRow(raw.line, f"the {name} is no string but {_kind(value)}")
        if not value.strip():
            return BadRow(raw.line, f"the {name} is empty")
        if "\0" in value or SURROGATE.search(value):
            return BadRow(raw.line, f"the {name} holds a NUL or half a surrogate pair")
    label = cast(str, label).strip()
    if len(label) > MAX_LABEL_CHARS:
        return BadRow(raw.line, f"the label has {len(label):,} characters, at most {MAX_LABEL_CHARS} are allowed")
    if allowed is not None and label not in allowed:
        some = ", ".join(sorted(allowed)[:8]) + (", ..." if len(allowed) > 8 else "")
        return BadRow(raw.line, f"the label {label!r} is not among the {len(allowed)} known ones ({some})")
    return Example(cast(str, text), label, raw.line)


def _describe_bad(path: Path, bad: Sequence[BadRow], num_bad: int) -> str:
    shown = [f"  {path}, line {row.line}: {row.reason}" for row in bad[:NAMED_BAD_ROWS]]
    if num_bad > len(shown):
        shown.append(f"  and {num_bad - len(shown)} more")
    return (
        f"{path}: {num_bad} of its rows cannot be used\n" + "\n".join(shown) + "\n"
        "Correct the file, name its encoding with --encoding or its columns with --text-column and --label-column, "
        "or leave such rows out with --skip-bad-rows."
    )


def _rows(path: Path, lines: Lines, text_column: str, label_column: str) -> Iterator[_Raw]:
    """The rows of a file as its suffix says."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: wanted {', '.join(SUFFIXES)} or one of these and .gz: rename or convert it")
    if not lines.peek():
        raise DataError(f"{path} is empty: give a file with at least one labelled text")
    if suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, lines, text_column, label_column)
    elif suffix == ".json" and lines.peek().lstrip().startswith("["):
        yield from _array_rows(path, lines, text_column, label_column)
    else:
        yield from _json_rows(lines, text_column, label_column)


def _too_long(lines: Lines, error: RowTooLong) -> _Raw:
    upto = "" if lines.number == lines.first else f" (it runs to line {lines.number}: is a quotation not closed?)"
    return _Raw(lines.first, problem=f"the row is {error}{upto}")


def _csv_rows(path: Path, lines: Lines, text_column: str, label_column: str) -> Iterator[_Raw]:
    # The limit is one for the process and 128 KiB by default; ours is enforced by `Lines`, so raising it is harmless.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_CHARS))
    reader = csv.reader(lines, delimiter=_delimiter(lines.peek(), (text_column, label_column)), strict=True)
    lines.begin()
    try:
        header = [name.strip() for name in next(reader)]
    except (csv.Error, RowTooLong) as error:
        raise DataError(f"{path}, line {lines.first}: the header is damaged ({error}): correct it") from None
    if lines.problem:
        raise DataError(f"{path}: in the header, {lines.problem}: correct it or name the encoding with --encoding")
    text_at, label_at = _columns(path, header, (text_column, label_column))
    while True:
        lines.begin()
        try:
            fields = next(reader, None)
        except RowTooLong as error:
            yield _too_long(lines, error)
            continue
        except csv.Error as error:
            upto = "" if lines.number == lines.first else f"; the row runs to line {lines.number}"
            yield _Raw(lines.first, problem=f"quotes do not match ({error}{upto})")
            continue
        if fields is None:
            return
        if lines.problem:
            yield _Raw(lines.first, problem=lines.problem)
        elif len(fields) == len(header):
            yield _Raw(lines.first, fields[text_at], fields[label_at])
        elif any(f.strip() for f in fields) or len(fields) > 1:  # else a blank line
            yield _Raw(lines.first, problem=f"it has {len(fields)} fields, the header has {len(header)}")


def _delimiter(line: str, wanted: Sequence[str]) -> str:
    """The delimiter that finds most of the wanted columns in the header line, and then most columns."""

    def found(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([line[:65536].replace("\0", "")], delimiter=delimiter), [])]
        return len(set(wanted) & set(names)), len(names)

    return max((",", ";", "\t"), key=found)


def _columns(path: Path, header: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where the wanted columns are."""
    twice = sorted(name for name, n in Counter(header).items() if n > 1 and name)
    if twice:
        raise DataError(f"{path}: the header names {', '.join(map(repr, twice))} more than once: rename or drop one")
    for name in wanted:
        if name not in header:
            raise DataError(
                f"{path} has no column {name!r}; it has {', '.join(map(repr, header))}: "
                "name its columns with --text-column and --label-column"
            )
    return [header.index(name) for name in wanted]


def _json_rows(lines: Lines, text_column: str, label_column: str) -> Iterator[_Raw]:
    """One JSON object on each line."""
    while True:
        lines.begin()
        try:
            line = next(lines, None)
        except RowTooLong as error:
            yield _too_long(lines, error)
            continue
        if line is None:
            return
        if lines.problem:
            yield _Raw(lines.first, problem=lines.problem)
        elif line.strip():
            try:
                yield _object_row(lines.first, json.loads(line), text_column, label_column)
            except (ValueError, RecursionError) as error:
                yield _Raw(lines.first, problem=f"it is not JSON ({error})")


def _array_rows(path: Path, lines: Lines, text_column: str, label_column: str) -> Iterator[_Raw]:
    """The objects of one JSON array, decoded one at a time. A syntax error ends it: there is no next row to go to."""
    text = lines.peek() + lines.stream.read(MAX_ARRAY_CHARS)
    if len(text) > MAX_ARRAY_CHARS:
        raise DataError(f"{path}: a JSON array above {MAX_ARRAY_CHARS >> 20} MiB: write one object a line (.jsonl)")
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    line, counted = lines.number + 1, 0
    at = text.index("[") + 1
    while True:
        at = cast("re.Match[str]", blank.match(text, at)).end()
        line, counted = line + len(re.findall(r"\r\n?|\n", text[counted:at])), at
        if text[at : at + 1] == "]" and not text[at + 1 :].strip():
            return
        begin = at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: the JSON array breaks off ({error}): correct the file") from None
        if at - begin > MAX_ROW_CHARS:
            yield _Raw(line, problem=f"the row is longer than {MAX_ROW_CHARS:,} characters")
        elif INVALID in text[begin:at]:
            yield _Raw(line, problem=f"it holds bytes that are not {lines.encoding}")
        else:
            yield _object_row(line, value, text_column, label_column)
        at = cast("re.Match[str]", blank.match(text, at)).end()
        if text[at : at + 1] not in (",", "]"):
            raise DataError(f"{path}, line {line}: the JSON array breaks off after this row: correct the file")
        at += text[at] == ","


def _object_row(line: int, value: object, text_column: str, label_column: str) -> _Raw:
    if not isinstance(value, dict):
        return _Raw(line, problem=f"it is no JSON object but {_kind(value)}")
    for name in (text_column, label_column):
        if name not in value:
            keys = ", ".join(map(repr, list(value)[:8]))
            return _Raw(line, problem=f"it has no {name!r}" + (f"; it has {keys}" if keys else ""))
    return _Raw(line, value[text_column], value[label_column])


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
