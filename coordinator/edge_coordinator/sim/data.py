"""The one tokenised data set of a simulation, and a device's part of it. numpy inside functions; no model, no network.

A part is a list of indices; only while it is trained on is it a folder of its own, cut from the whole, with the same
arrays that the device would have made from the same rows.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

from edge_runtime import cost
from edge_runtime.cost import DataShape
from edge_runtime.data import read_examples
from edge_runtime.errors import DataError
from edge_runtime.local import DataOptions
from edge_runtime.training.corpus import Corpus


def shape_of(corpus: Corpus, part: Sequence[int]) -> DataShape:
    """What a part's costs depend on. Lengths in tokens."""
    import numpy as np

    histogram = np.bincount([int(corpus.starts[i + 1] - corpus.starts[i]) for i in part])
    return cost.shape_of([int(n) for n in histogram])


def cut(corpus: Corpus, part: Sequence[int], folder: Path) -> None:
    """Write the part as a tokenised data set of its own."""
    import numpy as np

    pieces = [corpus.tokens[corpus.starts[i] : corpus.starts[i + 1]] for i in part]
    lengths = [len(piece) for piece in pieces]
    folder.mkdir(mode=0o700)
    np.save(folder / "tokens.npy", np.concatenate(pieces), allow_pickle=False)
    np.save(folder / "starts.npy", np.cumsum([0, *lengths], dtype=np.int64), allow_pickle=False)
    np.save(folder / "labels.npy", corpus.labels[list(part)], allow_pickle=False)
    histogram = [int(n) for n in np.bincount(lengths)]
    stats = {"num_examples": len(lengths), "longest": max(lengths), "lengths": histogram}
    (folder / "corpus.json").write_text(json.dumps(stats))


def packed(part: Sequence[int]) -> array[int]:
    """Indices in 4 bytes each."""
    return array("I", part)


def read_column(data: Path, column: str, options: DataOptions, num_examples: int) -> list[str]:
    """The value of a column in each usable row.

    Raises:
        DataError: there is no such column, or it lacks values that the rows with a text and a label need.
    """
    found = read_examples(
        data, text_column=options.text_column, label_column=column, encoding=options.encoding, bad_rows="skip"
    )
    if len(found.rows) != num_examples:
        lines = "".join(f", in line {bad.line} not" for bad in found.skipped[:1])
        raise DataError(
            f"{data} has {len(found.rows)} rows with a {column}{lines}, and {num_examples} with a label: give a file where all rows have both"
        )
    return [row.label for row in found.rows]
