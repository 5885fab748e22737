"""The physical lines of a file or stream: .gz, encodings and byte order marks, bounded and counted.

Not here: what a line means, as a row, a text or a label (`data.py`). Imports the standard library and `errors` only.

In memory: one line, of at most `MAX_ROW_CHARS` characters.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from edge_runtime.errors import DataError, UsageError

MAX_ROW_CHARS = 16 << 20
BOMS = (  # utf-32 first: its little-endian mark begins with that of utf-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What the decoder writes for bytes it cannot decode. No valid file decodes to half a surrogate pair, so a line that
# holds one is a line with invalid bytes, and reading goes on with the next.
INVALID = "\udcff"
SURROGATE = re.compile("[\ud800-\udfff]")
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeError)  # EOFError, zlib.error: a damaged .gz


class RowTooLong(Exception):
    """Raised through csv.reader, which then begins afresh with the next line."""


class Lines:
    """The physical lines of a text stream, bounded and counted; `csv.reader` pulls from it.

    `begin()` opens a row: from there `first` is its first line, `problem` what its lines turned out to hold, and all
    its lines together are bounded, which ends a quotation that never closes.
    """

    def __init__(self, stream: TextIO, name: str, encoding: str) -> None:
        self.stream, self.name, self.encoding = stream, name, encoding
        self.number = 0
        self.first = 1
        self.problem: str | None = None
        self._row_chars = 0
        self._held: str | None = None

    def begin(self) -> None:
        """Open a row with the next line."""
        self.first, self.problem, self._row_chars = self.number + 1, None, 0

    def peek(self) -> str:
        """The next line that is not blank, "" at the end, cut at the bound; it stays in place."""
        while self._held is None:
            line = self.stream.readline(MAX_ROW_CHARS + 1)
            if self.number == 0:
                line = line.removeprefix("\ufeff")  # what a named encoding such as utf-8 or utf-16-le leaves there
            if line.endswith(("\n", "\r")) and not line.strip():
                self.number += 1
            else:
                self._held = line
        return self._held

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line, self._held = self._held, None
        if line is None:
            line = self.stream.readline(MAX_ROW_CHARS + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._row_chars += len(line)
        if self._row_chars > MAX_ROW_CHARS:
            while line and not line.endswith(("\n", "\r")):
                line = self.stream.readline(1 << 20)
            raise RowTooLong(f"longer than {MAX_ROW_CHARS:,} characters")
        if INVALID in line:
            self.problem = f"line {self.number} holds bytes that are not {self.encoding}"
        elif "\0" in line:
            self.problem = f"line {self.number} holds a NUL byte (as UTF-16 without a byte order mark does)"
            line = line.replace("\0", "\ufffd")  # csv in Python 3.10 refuses it; the row is lost anyway
        return line


@contextlib.contextmanager
def open_lines(
    source: str | os.PathLike[str] | TextIO | BinaryIO, encoding: str | None, *, errors: str = "edge_runtime.mark"
) -> Iterator[Lines]:
    """The lines of a file or stream, with whatever goes wrong on the way as a DataError.

    Args:
        encoding: a Python codec name; None means what the byte order mark says, and UTF-8 without one.
        errors: a codec error handler; ours marks the line, see `INVALID`.
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    name = str(path) if path is not None else str(getattr(source, "name", "the stream"))
    with contextlib.ExitStack() as stack:
        try:
            binary: Any = getattr(source, "buffer", source)
            if path is not None:
                binary = stack.enter_context((gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb"))
            if isinstance(binary, io.TextIOBase):  # an io.StringIO: there is nothing to decode
                yield Lines(cast(TextIO, binary), name, "text")
                return
            if not hasattr(binary, "peek"):
                binary = io.BufferedReader(binary)
                stack.callback(_let_go, binary)
            codec = _codec(binary, encoding)
            text = io.TextIOWrapper(binary, codec, errors, newline="")
            stack.callback(_let_go, text)
            yield Lines(text, name, codec)
        except FileNotFoundError:
            raise DataError(f"there is no file {name}: correct the path") from None
        except IsADirectoryError:
            raise DataError(f"{name} is a folder: name one file in it") from None
        except UNREADABLE as error:
            raise DataError(f"cannot read {name}: {error}: correct or replace the file, or its --encoding") from None


def _let_go(wrapper: io.TextIOWrapper | io.BufferedReader) -> None:
    """Leave the stream below open, which the wrapper's end would close; it may be closed already."""
    with contextlib.suppress(ValueError):
        wrapper.detach()


def _codec(binary: io.BufferedReader, encoding: str | None) -> str:
    """The codec to read with: the one asked for, else what the byte order mark says, else UTF-8."""
    if encoding is None:
        head = binary.peek(4)
        return next((codec for bom, codec in BOMS if head.startswith(bom)), "utf-8")
    try:
        "".encode(encoding)  # refuses also what is a codec but no text encoding, such as base64
        return codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise UsageError(f"Python knows no text encoding {encoding!r}: try utf-8, utf-16 or latin-1") from None


def _mark(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler that puts `INVALID` in place of bytes it cannot decode."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return INVALID, error.end


codecs.register_error("edge_runtime.mark", _mark)
