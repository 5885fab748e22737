"""Text to token numbers, the same way for training, export and prediction: a thin wrapper over `tokenizers`.

The tokenizer.json is a checkpoint's own, but its truncation and padding are replaced by the model's max_length and by
none. Not a vocabulary trainer, and no torch; `tokenizers` and numpy are imported only when they are used. Imports the
errors.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

    Int64Array = np.ndarray[Any, np.dtype[np.int64]]

MAX_JSON_BYTES = 64 << 20
CHARACTERS_PER_TOKEN = 200  # a text is cut at this times max_length; WordPiece knows no word of more than 100
CHUNK_CHARACTERS = 1 << 16  # encoded together: the library holds even the tokens that it cuts off
SHARED = 4  # two windows that follow each other share a quarter of their tokens
PADS = ("[PAD]", "<pad>", "<|endoftext|>")
WORD = re.compile(r"\S+")


class Tokenizer:
    """Texts to lists of at most `max_length` token numbers, special tokens included. Build it with `from_bytes`.

    Attributes:
        max_length: tokens after which a text is cut.
        pad_id: the number to fill a batch with; the mask, not this number, is what tells padding from tokens.
        vocab_size: every token number is below this.
        special: tokens of a row that are no text's.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, max_length: int, pad_id: int, vocab_size: int, special: int
    ) -> None:
        """Use `from_bytes` or `from_file`, which check."""
        self.special = special
        self.max_length = max_length
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self._inner = inner

    @classmethod
    def from_bytes(cls, json_bytes: bytes, max_length: int) -> Tokenizer:
        """Read the bytes of a tokenizer.json.

        Raises:
            ModelError: they are no tokenizer, or max_length leaves no room beside its special tokens.
        """
        import tokenizers

        if len(json_bytes) > MAX_JSON_BYTES:
            raise ModelError(f"the tokenizer has {len(json_bytes)} bytes, wanted at most {MAX_JSON_BYTES}")
        with _library_errors():
            inner = tokenizers.Tokenizer.from_str(json_bytes.decode())
            pad_id = (inner.padding or {}).get("pad_id")
            special = inner.num_special_tokens_to_add(is_pair=False)
            inner.no_padding()
            longest = max(max_length, special + 1)
            inner.enable_truncation(max_length=longest, stride=(longest - special) // SHARED)
            probe = inner.encode_batch(["", "probe \u2603"])[0].ids  # some defects show only here
            vocab_size = 1 + max([*inner.get_vocab(with_added_tokens=True).values(), *probe], default=0)
        if max_length <= special:
            raise ModelError(f"max_length {max_length} leaves no room beside the tokenizer's {special} special tokens")
        candidates = (pad_id, *(inner.token_to_id(name) for name in PADS))
        pad_id = next((i for i in candidates if i is not None and i < vocab_size), 0)
        return cls(inner, max_length, pad_id, vocab_size, special)

    @classmethod
    def from_file(cls, path: Path, max_length: int) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            ModelError: it is missing, no tokenizer, or max_length is too small.
        """
        return cls.from_bytes(read_tokenizer_file(path), max_length)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text. An empty text gives the special tokens alone; any `str` is accepted."""
        return self.encode_marked(texts)[0]

    def encode_marked(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """-> (the rows of `encode_batch`, the numbers of the texts that have more tokens than their rows).

        Memory: beside the result, what the library holds for `CHUNK_CHARACTERS` or for one text, each cut to 200
        characters a token of max_length first: under 40 MiB for max_length up to 512 (measured).

        Raises:
            ModelError: the tokenizer cannot encode a text.
        """
        limit = CHARACTERS_PER_TOKEN * self.max_length
        rows: list[list[int]] = []
        longer: list[int] = []
        chunk: list[str] = []
        size = 0

        def encode_chunk() -> None:
            for found in self._encode(chunk):
                if len(found.ids) >= self.max_length and found.overflowing:
                    longer.append(len(rows))
                rows.append(found.ids)
            chunk.clear()

        for number, text in enumerate(texts):
            cleaned, is_cut = _clean(text, limit)
            if is_cut:
                longer.append(number)
            chunk.append(cleaned)
            size += len(cleaned)
            if size > CHUNK_CHARACTERS:
                encode_chunk()
                size = 0
        encode_chunk()
        return rows, sorted(set(longer))

    def windows(self, text: str, most: int) -> tuple[list[list[int]], bool]:
        """All tokens of a long text: -> (rows as `encode_batch` gives them, at most `most`; whether there is more).

        A row shares a quarter of its tokens with the one before, but for one in every `CHUNK_CHARACTERS`. Memory: as
        `encode_batch`, beside the result.

        Raises:
            ModelError: the tokenizer cannot encode the text.
        """
        rows: list[list[int]] = []
        start = 0
        while start < len(text) and len(rows) <= most:
            end = start + CHUNK_CHARACTERS
            if end < len(text):
                end = max(text.rfind(space, start + 1, end) for space in " \n\t") + 1 or end
            (found,) = self._encode([_clean(text[start:end], CHUNK_CHARACTERS)[0]])
            rows += [part.ids for part in (found, *found.overflowing) if len(part.ids) > self.special]
            start = end
        return (rows or self.encode_batch([""]))[:most], len(rows) > most or bool(text[start:].strip())

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        encode = getattr(self._inner, "encode_batch_fast", self._inner.encode_batch)  # not in tokenizers 0.19
        with _library_errors():
            found: list[tokenizers.Encoding] = encode(list(texts))
            return found


def read_tokenizer_file(path: Path) -> bytes:
    """The bytes of a tokenizer.json, unchecked but for their number.

    Raises:
        ModelError: the file is missing, unreadable or too long.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelError(f"cannot read the tokenizer {path} ({error.strerror}): it belongs to the checkpoint") from None
    if len(raw) > MAX_JSON_BYTES:
        raise ModelError(f"{path} has more than {MAX_JSON_BYTES} bytes: wanted a tokenizer.json")
    return raw


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, length: int = 0) -> tuple[Int64Array, Int64Array]:
    """Fill up to the longest row, or to `length`: -> ids and mask, (rows, length >= 1) int64, mask 1 for a token."""
    import numpy as np

    length = max([length, 1, *(len(row) for row in rows)])
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """The library raises bare Exceptions, and its Rust panics are not even Exceptions."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"the tokenizer is damaged ({str(error)[:200]}): fetch tokenizer.json again") from None
        raise


def _clean(text: str, limit: int) -> tuple[str, bool]:
    """-> (at most `limit` characters that UTF-8 can say, of a longer text the start, its white space collapsed; whether more followed)."""
    size = 0
    if len(text) > limit:
        words = []
        for match in WORD.finditer(text):  # stops early: a text of 10 MB is neither split nor copied
            words.append(text[match.start() : min(match.end(), match.start() + limit)])
            size += len(words[-1]) + 1
            if size > limit:
                break
        text = " ".join(words)[:limit]
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates: pairs become their character, lone ones U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, size > limit
