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
PADS = ("[PAD]", "<pad>", "<|endoftext|>")
WORD = re.compile(r"\S+")


class Tokenizer:
    """Texts to lists of at most `max_length` token numbers, special tokens included. Build it with `from_bytes`.

    Attributes:
        max_length: tokens after which a text is cut.
        pad_id: the number to fill a batch with; the mask, not this number, is what tells padding from tokens.
        vocab_size: every token number is below this.
    """

    def __init__(self, inner: tokenizers.Tokenizer, max_length: int, pad_id: int, vocab_size: int) -> None:
        """Use `from_bytes` or `from_file`, which check."""
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
            inner.enable_truncation(max_length=max(max_length, special + 1))
            probe = inner.encode_batch(["", "probe \u2603"])[0].ids  # some defects show only here
            vocab_size = 1 + max([*inner.get_vocab(with_added_tokens=True).values(), *probe], default=0)
        if max_length <= special:
            raise ModelError(f"max_length {max_length} leaves no room beside the tokenizer's {special} special tokens")
        candidates = (pad_id, *(inner.token_to_id(name) for name in PADS))
        return cls(inner, max_length, next((i for i in candidates if i is not None and i < vocab_size), 0), vocab_size)

    @classmethod
    def from_file(cls, path: Path, max_length: int) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            ModelError: it is missing, no tokenizer, or max_length is too small.
        """
        return cls.from_bytes(read_tokenizer_file(path), max_length)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text. An empty text gives the special tokens alone; any `str` is accepted.

        Memory: beside the result, what the library holds for `CHUNK_CHARACTERS` or for one text, each cut to 200
        characters a token of max_length first: under 40 MiB for max_length up to 512 (measured).

        Raises:
            ModelError: the tokenizer cannot encode a text.
        """
        limit = CHARACTERS_PER_TOKEN * self.max_length
        rows: list[list[int]] = []
        chunk: list[str] = []
        size = 0
        for text in texts:
            chunk.append(_clean(text, limit))
            size += len(chunk[-1])
            if size > CHUNK_CHARACTERS:
                rows += self._encode(chunk)
                chunk, size = [], 0
        return rows + self._encode(chunk)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encode = getattr(self._inner, "encode_batch_fast", self._inner.encode_batch)  # not in tokenizers 0.19
        with _library_errors():
            return [encoding.ids for encoding in encode(texts)]


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


def _clean(text: str, limit: int) -> str:
    """At most `limit` characters that UTF-8 can say; of a longer text the start, its white space collapsed."""
    if len(text) > limit:
        words, size = [], 0
        for match in WORD.finditer(text):  # stops early: a text of 10 MB is neither split nor copied
            words.append(text[match.start() : min(match.end(), match.start() + limit)])
            size += len(words[-1]) + 1
            if size > limit:
                break
        text = " ".join(words)[:limit]
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates: pairs become their character, lone ones U+FFFD
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
