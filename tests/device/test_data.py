"""What `edge_runtime.data` reads, and what it says where it cannot."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from edge_runtime.data import BadRow, Example, iter_texts, read_examples
from edge_runtime.errors import DataError, UsageError
from edge_runtime.lines import MAX_ROW_CHARS


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_rows_come_in_order_with_their_lines_and_sorted_labels(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, "a.csv", "text,label\nfine,pos\nawful,neg\n"))
    assert found.rows == (Example("fine", "pos", 2), Example("awful", "neg", 3))
    assert found.labels == ("neg", "pos")
    assert (found.skipped, found.num_skipped) == ((), 0)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.CSV"])
def test_the_header_line_decides_the_delimiter(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [("id", "text", "label"), ("1", '"one, two; three"', "x")]
    path = write(tmp_path, name, "\n".join(delimiter.join(row) for row in rows))
    assert read_examples(path).rows == (Example("one, two; three", "x", 2),)


def test_a_comma_inside_a_column_name_does_not_fool_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "id, or number, or name;text;label\n1;hello, you;x\n")
    assert read_examples(path).rows[0].text == "hello, you"


def test_the_line_is_where_the_row_begins_though_quoted_fields_hold_line_breaks(tmp_path: Path) -> None:
    content = 'text,label\n"a\nb\r\nc",x\n\n\n"say ""hi""",y\n'
    rows = read_examples(write(tmp_path, "a.csv", content)).rows
    assert rows == (Example("a\nb\r\nc", "x", 2), Example('say "hi"', "y", 7))


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "stars,review\n5,great\n")
    found = read_examples(path, text_column="review", label_column="stars")
    assert found.rows == (Example("great", "5", 2),)


def test_json_lines_turn_numbers_and_booleans_into_labels_as_json_spells_them(tmp_path: Path) -> None:
    labels = [1, 2.5, True, "1"]
    content = "\n".join(json.dumps({"text": "t", "label": label}) for label in labels)
    found = read_examples(write(tmp_path, "a.jsonl", content))
    assert [row.label for row in found.rows] == ["1", "2.5", "true", "1"]
    assert found.labels == ("1", "2.5", "true")


def test_a_json_array_gives_the_line_of_each_object(tmp_path: Path) -> None:
    content = '[\n {"text": "a",\n  "label": "x"},\n\n {"text": "b", "label": "y"}, {"text": "c", "label": "x"}\n]\n'
    rows = read_examples(write(tmp_path, "a.json", content)).rows
    assert rows == (Example("a", "x", 2), Example("b", "y", 5), Example("c", "x", 5))


def test_a_json_file_may_also_hold_one_object_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '\n{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    assert [row.line for row in read_examples(path).rows] == [2, 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.gz", "text,label\nhé,x\n"),
        ("a.jsonl.gz", '{"text": "hé", "label": "x"}'),
        ("a.json.gz", '[{"text": "hé", "label": "x"}]'),
    ],
)
def test_a_compressed_file_reads_like_a_plain_one(tmp_path: Path, name: str, content: str) -> None:
    found = read_examples(write(tmp_path, name, gzip.compress(content.encode())))
    assert [(row.text, row.label) for row in found.rows] == [("hé", "x")]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text,label\nhéllo 🙂,x\n"), ("a.json", '[{"text": "héllo 🙂", "label": "x"}]')],
)
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, name: str, content: str, codec: str) -> None:
    assert read_examples(write(tmp_path, name, content.encode(codec))).rows[0].text == "héllo 🙂"


@pytest.mark.parametrize("codec", ["latin-1", "cp1252", "utf-16-le", "shift_jis", "utf-8"])
def test_a_named_encoding_is_used(tmp_path: Path, codec: str) -> None:
    text = "日本" if codec == "shift_jis" else "hé"
    path = write(tmp_path, "a.csv", f"text,label\n{text},x\n".encode(codec))
    assert read_examples(path, encoding=codec).rows[0].text == text


def test_a_byte_order_mark_is_no_part_of_the_first_column_though_the_encoding_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\nhé,x\n".encode("utf-8-sig"))
    assert read_examples(path, encoding="utf-8").rows[0].text == "hé"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"only one", "it has 1 fields, the header has 2"),
        (b"a,b,c", "it has 3 fields, the header has 2"),
        (b",x", "the text is empty"),
        (b"  ,x", "the text is empty"),
        (b"a,", "the label is empty"),
        (b"a,other", "the label 'other' is not among the 2 known ones (x, y)"),
        (b"a\xff,x", "line 3 holds bytes that are not utf-8"),
        (b"a\0,x", "line 3 holds a NUL byte"),
        (b'"a"b,x', "quotes do not match"),
        (b"a," + b"l" * 300, "the label has 300 characters, at most 200"),
    ],
)
def test_a_bad_csv_row_is_named_or_skipped(tmp_path: Path, row: bytes, reason: str) -> None:
    path = write(tmp_path, "a.csv", b"text,label\ngood,x\n" + row + b"\nafter,y\n")
    with pytest.raises(DataError) as caught:
        read_examples(path, labels=("y", "x"))
    message = str(caught.value)
    assert f"{path}, line 3: {reason}" in message
    assert all(flag in message for flag in ("--encoding", "--text-column", "--skip-bad-rows"))
    found = read_examples(path, labels=("y", "x"), bad_rows="skip")
    assert [(row.text, row.line) for row in found.rows] == [("good", 2), ("after", 4)]
    assert found.num_skipped == 1
    assert found.skipped[0].line == 3
    assert found.skipped[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("nonsense", "it is not JSON"),
        ('{"text": "a", "label": "x"', "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ('["a", "x"]', "it is no JSON object but a list"),
        ("3", "it is no JSON object but a number"),
        ('{"text": "a"}', "it has no 'label'; it has 'text'"),
        ("{}", "it has no 'text'"),
        ('{"text": null, "label": "x"}', "the text is missing or null"),
        ('{"text": "a", "label": null}', "the label is missing or null"),
        ('{"text": 3, "label": "x"}', "the text is no string but a number"),
        ('{"text": "a", "label": ["x"]}', "the label is no string but a list"),
        ('{"text": "a", "label": {}}', "the label is no string but an object"),
        ('{"text": "a", "label": NaN}', "the label is not a finite number"),
        ('{"text": "a", "label": 1e999}', "the label is not a finite number"),
        ('{"text": "a\\u0000", "label": "x"}', "the text holds a NUL or half a surrogate pair"),
        ('{"text": "a", "label": "\\ud800"}', "the label holds a NUL or half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named_or_skipped(tmp_path: Path, row: str, reason: str) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "good", "label": "x"}\n' + row + '\n{"text": "after", "label": "y"}\n')
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert f"{path}, line 2: {reason}" in str(caught.value)
    found = read_examples(path, bad_rows="skip")
    assert [(row.text, row.line) for row in found.rows] == [("good", 1), ("after", 3)]
    assert found.num_skipped == 1


def test_a_row_of_a_json_array_with_invalid_bytes_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", b'[{"text": "\xff", "label": "x"},\n{"text": "b", "label": "x"}]')
    found = read_examples(path, bad_rows="skip")
    assert found.skipped == (BadRow(1, "it holds bytes that are not utf-8"),)
    assert found.rows == (Example("b", "x", 2),)


@pytest.mark.parametrize(
    "content", ['[{"text": "a", "label": "x"}', "[1 2]", '[\n{"text": }]', "[] trailing", "[" * 9999]
)
def test_a_broken_json_array_is_an_error_even_when_skipping(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="the JSON array breaks off"):
        read_examples(write(tmp_path, "a.json", content), bad_rows="skip")


def test_five_bad_rows_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\n" + "one field\n" * 30 + "a,x\n")
    with pytest.raises(DataError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert [f"line {line}:" in message for line in range(2, 8)] == [True] * 5 + [False]
    assert "30 of its rows" in message
    assert "and 25 more" in message
    found = read_examples(path, bad_rows="skip")
    assert (len(found.skipped), found.num_skipped) == (20, 30)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.csv", "text,label\n\n", "it has no rows"),
        ("a.json", "[]", "it has no rows"),
        ("a.csv", "title,class\na,x\n", "has no column 'text'; it has 'title', 'class'"),
        ("a.csv", "text,label,text\na,x,b\n", "'text' more than once"),
        ("a.csv", b"te\xffxt,label\na,x\n", "in the header, line 1 holds bytes that are not utf-8"),
        ("a.csv", 'text,"label\na,x\n', "the header is damaged"),
        ("a.txt", "text,label\na,x\n", "wanted .csv, .tsv, .jsonl"),
        ("a.csv.gz", "text,label\na,x\n", "cannot read"),
        ("a.csv.gz", gzip.compress(b"text,label\na,x\n" * 99, mtime=0)[:-9], "cannot read"),
    ],
)
def test_an_unusable_file_says_what_is_wrong_with_it(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_examples(path, bad_rows="skip")
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_without_one_good_row_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\n,x\n,y\n")
    with pytest.raises(DataError, match=r"all its 2 rows are bad; line 2: the text is empty"):
        read_examples(path, bad_rows="skip")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_examples(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_examples(tmp_path / "folder.csv")


@pytest.mark.timeout(20)
def test_a_pipe_and_a_device_which_may_never_end_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name in ("pipe.csv", "zero.csv"):
        with pytest.raises(DataError, match="is not a regular file: give a file"):
            read_examples(tmp_path / name)


def test_utf_16_without_its_mark_is_an_error_that_names_the_encoding_flag(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\na,x\n".encode("utf-16-le"))
    for encoding in (None, "utf-16"):
        with pytest.raises(DataError, match="--encoding"):
            read_examples(path, encoding=encoding)


@pytest.mark.parametrize("encoding", ["no-such", "base64", "rot13", "a\0b"])
def test_an_encoding_that_python_lacks_is_a_usage_error(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(UsageError, match="Python knows no text encoding"):
        read_examples(write(tmp_path, "a.csv", "text,label\na,x\n"), encoding=encoding)


def test_text_and_label_from_one_column_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name two columns"):
        read_examples(tmp_path / "a.csv", text_column="label")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_row_above_the_bound_is_skipped_and_the_next_one_read(tmp_path: Path, name: str) -> None:
    huge = "h" * (MAX_ROW_CHARS + 10)
    if name == "a.csv":
        content = f"text,label\n{huge},x\nnext,y\n"
    else:
        content = json.dumps({"text": huge, "label": "x"}) + "\n" + '{"text": "next", "label": "y"}\n'
    found = read_examples(write(tmp_path, name, content), bad_rows="skip")
    assert [row.text for row in found.rows] == ["next"]
    assert "longer than 16,777,216 characters" in found.skipped[0].reason


def test_a_quotation_that_never_closes_is_bounded_and_says_how_far_it_ran(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    line = b"x" * 1023 + b"\n"
    path.write_bytes(b'text,label\na,x\n"never closed,y\n' + line * (20 << 10))  # 20 MiB
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read_examples(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "line 3: the row is longer than 16,777,216 characters (it runs to line 16387" in str(caught.value)
    assert peak_bytes < 96 << 20  # the csv module keeps a field as 4 bytes a character: 64 MiB


def test_a_small_compressed_file_of_one_endless_line_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"a" * (1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="longer than"):
            read_examples(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 48 << 20


def test_reading_holds_the_examples_and_not_the_file_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(10_000):
            file.write(json.dumps({"text": f"text {i}", "label": i % 7, "unused": "u" * 2000}) + "\n")
    tracemalloc.start()
    try:
        found = read_examples(path)
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.rows) == 10_000
    assert path.stat().st_size > 19 << 20
    assert peak_bytes < held_bytes + (2 << 20)


def test_equal_labels_are_one_string(tmp_path: Path) -> None:
    rows = read_examples(write(tmp_path, "a.csv", "text,label\na,long label\nb,long label\n")).rows
    assert rows[0].label is rows[1].label


def test_iter_texts_gives_each_line_of_a_file_without_its_end(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\r\n\n  two \rthree".encode("utf-8-sig"))
    assert list(iter_texts(path)) == ["one", "", "  two ", "three"]


def test_iter_texts_replaces_bytes_that_are_not_text(tmp_path: Path) -> None:
    assert list(iter_texts(write(tmp_path, "a.txt", b"a\xffb\nc\xed\xa0\x80\n"))) == ["a\ufffdb", "c\ufffd\ufffd\ufffd"]


def test_iter_texts_reads_streams_and_leaves_them_open() -> None:
    for stream in (io.BytesIO(b"a\nb\n"), io.StringIO("a\nb\n"), io.TextIOWrapper(io.BytesIO(b"a\nb\n"))):
        assert list(iter_texts(stream)) == ["a", "b"]
        assert not stream.closed


def test_iter_texts_hands_on_a_line_from_a_pipe_before_the_next_is_written() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as source, open(writing, "wb", buffering=0) as sink:
        texts = iter_texts(source)
        sink.write(b"first line\n")
        assert next(texts) == "first line"
        sink.write(b"second\n")
        assert next(texts) == "second"


def test_iter_texts_refuses_an_endless_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"short\n" + b"a" * (MAX_ROW_CHARS + 1))
    texts = iter_texts(path)
    assert next(texts) == "short"
    with pytest.raises(DataError, match=r"a\.txt, line 2 is longer than"):
        next(texts)


def test_iter_texts_of_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        list(iter_texts(tmp_path / "none.txt"))
