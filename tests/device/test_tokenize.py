"""Text to token numbers: hostile texts, hostile tokenizers, and the file's own settings replaced."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_models import hub
from edge_runtime.errors import ModelError
from edge_runtime.tokenize import Tokenizer, pad

CLS, SEP, UNK = 101, 102, 100
SMALL: dict[str, Any] = {
    "version": "1.0",
    "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "padding": {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 4, "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 7, "[PAD]": 4}, "unk_token": "[UNK]"},
}


@pytest.fixture(scope="module")
def real() -> bytes:
    return (hub.resolve("minilm-l6", print) / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def tokenizer(real: bytes) -> Tokenizer:
    return Tokenizer.from_bytes(real, 32)


def test_known_text_gives_the_published_numbers(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(["Hello, World!"]) == [[CLS, 7592, 1010, 2088, 999, SEP]]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, 30522)


def test_the_files_padding_and_truncation_are_replaced_by_ours(real: bytes) -> None:
    assert json.loads(real)["padding"]["strategy"] == {"Fixed": 128}
    short, long = Tokenizer.from_bytes(real, 8).encode_batch(["one two", "word " * 50])
    assert len(short) == 4
    assert len(long) == 8
    assert long[-1] == SEP
    assert len(Tokenizer.from_bytes(real, 300).encode_batch(["word " * 500])[0]) == 300


@pytest.mark.parametrize("text", ["", " ", "\n\t\u2003", "\0", "\x07\x1b", "\udc80"])
def test_a_text_of_nothing_gives_the_special_tokens_alone(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_batch([text]) == [[CLS, SEP]]


def test_control_characters_and_surrogates_do_not_hide_the_words_around_them(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode_batch(["hello world"])
    assert tokenizer.encode_batch(["hel\0lo wor\x07ld"]) == plain
    assert tokenizer.encode_batch(["hello\ud800 world"]) == plain
    assert tokenizer.encode_batch(["\ud83d\ude00"]) == tokenizer.encode_batch(["\U0001f600"])  # a split pair is joined


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(st.characters(), max_size=60), max_size=4))  # surrogates included
def test_any_text_gives_numbers_of_the_vocabulary_between_the_special_tokens(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    for row in tokenizer.encode_batch(texts):
        assert row[0] == CLS
        assert row[-1] == SEP
        assert 2 <= len(row) <= 32
        assert all(0 <= n < tokenizer.vocab_size for n in row)


def test_long_texts_give_what_they_would_uncut(real: bytes) -> None:
    words = "the quick brown fox jumps over the lazy dog "
    text = "  \n ".join(words * 100 for _ in range(3)) + " " * 10_000 + words * 100
    long = Tokenizer.from_bytes(real, 16)
    assert len(text) > 200 * 16
    assert long.encode_batch([text]) == long.encode_batch([text[:1000]])


@pytest.mark.parametrize("text", ["word " * 2_000_000, "x" * 10_000_000, " " * 10_000_000 + "x"])
def test_ten_megabytes_cost_next_to_nothing(tokenizer: Tokenizer, text: str) -> None:
    started = time.process_time()
    (row,) = tokenizer.encode_batch([text])
    assert time.process_time() - started < 0.5
    assert 3 <= len(row) <= 32


def test_many_texts_keep_their_order_across_internal_chunks(tokenizer: Tokenizer) -> None:
    texts = [f"{i} " + "filler " * 200 for i in range(300)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode_batch([text])[0] for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_pad_fills_to_the_longest_row_or_the_asked_length() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad([[]], 9)[0].tolist() == [[9]]
    assert pad([[1]], 0, length=4)[1].tolist() == [[1, 0, 0, 0]]
    assert ids.dtype == mask.dtype == "int64"


def test_the_pad_number_is_the_files_and_the_vocabulary_counts_gaps() -> None:
    tokenizer = Tokenizer.from_bytes(json.dumps(SMALL).encode(), 4)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (4, 8)
    assert tokenizer.encode_batch(["a b", "b", ""]) == [[0, 1], [1], []]


def test_a_pad_number_outside_the_vocabulary_is_not_believed() -> None:
    padding = {**SMALL["padding"], "pad_id": 10**9}
    assert Tokenizer.from_bytes(json.dumps({**SMALL, "padding": padding}).encode(), 4).pad_id == 4


PANICS = {  # the post-processor names a special token that it does not define: the library panics
    **SMALL,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    },
}


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**SMALL, "model": None}).encode(),
        json.dumps({**SMALL, "model": {"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"}}).encode(),
        json.dumps(PANICS).encode(),
    ],
)
def test_a_damaged_tokenizer_is_a_model_error(damaged: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer is damaged .* fetch tokenizer\.json again"):
        Tokenizer.from_bytes(damaged, 16)


def test_a_cut_off_tokenizer_file_and_a_missing_one_are_model_errors(real: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(real[:-100])
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", 16)
    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path / "none.json", 16)


@pytest.mark.parametrize("max_length", [2, 1, 0, -5])
def test_a_max_length_without_room_for_a_word_is_refused(real: bytes, max_length: Any) -> None:
    with pytest.raises(ModelError, match="leaves no room beside the tokenizer's 2 special tokens"):
        Tokenizer.from_bytes(real, max_length)


def test_windows_hold_every_token_of_a_text_and_share_a_quarter(real: bytes, tokenizer: Tokenizer) -> None:
    text = " ".join(f"word {i} of many" for i in range(200))
    rows, more = tokenizer.windows(text, 1000)
    room = tokenizer.max_length - tokenizer.special
    contents = [row[1:-1] for row in rows]
    assert all(len(row) == tokenizer.max_length for row in rows[:-1]) and not more
    step = room - room // 4
    whole = [token for row in contents[:-1] for token in row[:step]] + contents[-1]
    (long_row,) = Tokenizer.from_bytes(real, 100_000).encode_batch([text])
    assert whole == long_row[1:-1]
    fewer, more = tokenizer.windows(text, 3)
    assert (fewer, more) == (rows[:3], True)
