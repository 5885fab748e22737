"""Damaged, odd and random data files: nothing but a DataError comes out, and always soon."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_runtime.data import iter_texts, read_examples
from edge_runtime.errors import DataError
from edge_runtime.lines import MAX_ROW_CHARS

SUFFIXES = [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".csv.gz", ".json.gz"]
PIECES = [
    *(b"text,label\n", b"text\tlabel\r\n", b'"text";"label"\n', b"a,x\n", b'"', b'""', b",", b";", b"\t", b"\n", b"\r"),
    *(b"\0", b"\xff", b"\xfe", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xf0\x9f\x99", b"\xed\xa0\x80", b"\x85"),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b'{"text": "a", "label": "x"}',
        b'"text":',
        b"null",
        b"1e999",
        b"NaN",
        b"\\ud800",
        b"9" * 99,
    ),
]
ENCODINGS = st.sampled_from(
    [None, "utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7", "shift_jis", "idna"]
)
# one folder for all examples is fine: each overwrites the file of the one before
quickly = settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(path: Path, encoding: str | None = None) -> None:
    """Both ways of reading: each gives sound examples or a DataError that names the file."""
    for bad_rows in ("error", "skip"):
        try:
            found = read_examples(path, encoding=encoding, bad_rows=bad_rows)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert found.rows
            assert found.labels == tuple(sorted({row.label for row in found.rows}))
            assert [row.line for row in found.rows] == sorted(row.line for row in found.rows)
            for row in found.rows:
                assert row.text.strip()
                assert row.label.strip()
                (row.text + row.label).encode()


@quickly
@given(content=st.binary(max_size=300), suffix=st.sampled_from(SUFFIXES), encoding=ENCODINGS)
def test_random_bytes_are_read_or_refused(tmp_path: Path, content: bytes, suffix: str, encoding: str | None) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    read_or_refuse(path, encoding)


@quickly
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), suffix=st.sampled_from(SUFFIXES), encoding=ENCODINGS)
@example(pieces=[b"text,label\n", b'"', b"a,x\n", b"\0"], suffix=".csv", encoding=None)
@example(pieces=[b"[", b"[", b"]"], suffix=".json", encoding=None)
def test_random_pieces_of_the_formats_are_read_or_refused(
    tmp_path: Path, pieces: list[bytes], suffix: str, encoding: str | None
) -> None:
    path = tmp_path / f"a{suffix}"
    content = b"".join(pieces)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    read_or_refuse(path, encoding)


@quickly
@given(data=st.data(), suffix=st.sampled_from([".csv", ".jsonl", ".json", ".csv.gz"]))
def test_a_good_file_with_one_byte_changed_is_read_or_refused(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    rows = [{"text": f'text {i}, "quoted"', "label": "xy"[i % 2]} for i in range(5)]
    content = {
        ".jsonl": "\n".join(map(json.dumps, rows)).encode(),
        ".json": json.dumps(rows, indent=1).encode(),
    }.get(suffix, b"text,label\n" + b"\n".join(b'"text, %d",%c' % (i, b"xy"[i % 2]) for i in range(5)))
    content = gzip.compress(content) if suffix.endswith(".gz") else content
    at = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content[:at] + data.draw(st.binary(max_size=2)) + content[at + 1 :])
    read_or_refuse(path)


@quickly
@given(content=st.binary(max_size=300))
def test_random_bytes_are_lines_of_sound_text_for_prediction(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    try:
        texts = list(iter_texts(path))
    except DataError as error:
        assert str(path) in str(error)
    else:
        for text in texts:
            text.encode()
            assert not text.endswith(("\r", "\n"))


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_read_in_every_marked_encoding(tmp_path: Path, end: str, codec: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(end.join(["text,label", "é one,x", "", '"two', 'lines",y', ""]).encode(codec))
    found = read_examples(path)
    assert [(row.text, row.label, row.line) for row in found.rows] == [("é one", "x", 2), (f"two{end}lines", "y", 4)]


def test_latin_1_read_as_utf_8_names_each_bad_line_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nplain,x\nhé,x\nça,y\nalso plain,y\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 3 holds bytes that are not utf-8"):
        read_examples(path)
    found = read_examples(path, bad_rows="skip")
    assert [row.text for row in found.rows] == ["plain", "also plain"]
    assert [row.line for row in found.skipped] == [3, 4]
    assert len(read_examples(path, encoding="latin-1").rows) == 4


def test_utf_16_cut_in_the_middle_of_a_character_loses_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\none,x\ntwo,y".encode("utf-16")[:-1])
    found = read_examples(path, bad_rows="skip")
    assert [row.text for row in found.rows] == ["one"]
    assert found.skipped[0].reason == "line 3 holds bytes that are not utf-16"


def test_an_unbalanced_quote_says_how_many_lines_its_row_swallowed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\none,x\n"two,y\nthree,x\n"four" five,y\nsix,x\n"seven,y\neight,x\n')
    found = read_examples(path, bad_rows="skip")
    assert [row.text for row in found.rows] == ["one", "six"]
    assert [row.line for row in found.skipped] == [3, 7]
    assert found.skipped[0].reason.endswith("the row runs to line 5)")
    assert found.skipped[1].reason.endswith("the row runs to line 8)")


def test_empty_rows_are_no_rows_and_rows_of_empty_fields_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n\ntext,label\n\n   \none,x\n,\n\n")
    found = read_examples(path, bad_rows="skip")
    assert [row.line for row in found.rows] == [6]
    assert [row.line for row in found.skipped] == [7]


def test_nul_bytes_are_refused_in_any_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label,other\none,x,\0\ntwo,y,fine\n")
    found = read_examples(path, bad_rows="skip")
    assert [row.text for row in found.rows] == ["two"]
    path.write_bytes(b"text,la\0bel\none,x\n")
    with pytest.raises(DataError, match="in the header, line 1 holds a NUL byte"):
        read_examples(path)


def test_a_header_named_twice_is_refused_and_unnamed_columns_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("label,text,label\nx,one,x\n")
    with pytest.raises(DataError, match="'label' more than once"):
        read_examples(path)
    path.write_text(",text,label,\n1,one,x,\n")
    assert read_examples(path).rows[0].text == "one"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_a_huge_first_line_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"a" * (MAX_ROW_CHARS + 2) + b"\n")
    with pytest.raises(DataError, match="longer than 16,777,216 characters"):
        read_examples(path)


def test_many_quotes_that_reopen_on_every_line_take_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + 'a","b\n' * 300_000)
    with pytest.raises(DataError):
        read_examples(path)


def test_a_million_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n" * 1_000_000 + "text,label\none,x\n")
    assert read_examples(path).rows[0].line == 1_000_002
