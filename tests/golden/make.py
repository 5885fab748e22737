"""Writes the golden bytes beside it: run `python -m tests.golden.make` after a wire change that is meant.

Devices in the field speak these bytes: a change of one needs a new protocol number, or a default for the new field.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.manifest import encode_manifest
from edge_runtime.wire import encode_chunk
from tests.samples import BLOB, MESSAGES, message, small_manifest

FOLDER = Path(__file__).parent


def golden() -> dict[str, bytes]:
    """The bytes of every kind of message by file name."""
    files = {f"{kind}.msgpack": message(kind) for kind in MESSAGES}
    files["manifest.msgpack"] = encode_manifest(small_manifest())
    files["c.chunk"] = encode_chunk(BLOB, 65_536, b"some bytes of a blob")
    return files


if __name__ == "__main__":
    for name, data in golden().items():
        (FOLDER / name).write_bytes(data)
