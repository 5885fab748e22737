"""Labels for texts from an exported model file: onnxruntime and tokenizers only, never torch.

A file written by `export.py` is self-contained: it carries the tokenizer and the labels. Not a server and not a loader
for other people's ONNX files. Imports the errors and the tokenizer wrapper; onnxruntime and numpy inside functions.

Memory: onnxruntime's copy of the weights (twice while it loads), and for one internal batch of at most `BATCH_TOKENS`
padded tokens about 4 * BATCH_TOKENS * (2 * feed_forward + 4 * hidden + 3 * heads * longest text) bytes: 18 MiB for
MiniLM-L6 at 128 tokens. Measured for the whole process (86 MiB of weights, x86-64): peak 186 MiB while loading,
164 MiB then, 185 MiB after a thousand texts of up to 128 tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import DataError, ModelError, UsageError
from edge_runtime.tokenize import Tokenizer, pad

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    Array = np.ndarray[Any, np.dtype[Any]]

FORMAT = "edge-runtime 1"  # of the metadata in an exported file
BATCH_TOKENS = 512  # padded tokens in one internal batch; more gains no speed on a CPU
MAX_LENGTH = 1 << 17
WINDOW_TEXTS = 1024  # texts that are tokenized and sorted by length together
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"


@dataclass(frozen=True)
class Prediction:
    """The most probable label of a text, and the probability of every label (they add up to 1)."""

    label: str
    probability: float
    probabilities: Mapping[str, float]


class Predictor:
    """An exported model, ready to use; safe to call from several threads.

    Attributes:
        labels: in the order of the logits.
        max_length: tokens after which a text is cut.
        metadata: what the exporter wrote besides, for example the model version and the method.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        """Load the file; `threads` None takes one for each physical core.

        Raises:
            ModelError: the file is missing, damaged, or was not exported by edge-runtime.
        """
        self._session = open_session(Path(path), threads)
        stored = dict(self._session.get_modelmeta().custom_metadata_map)
        if stored.pop("format", None) != FORMAT:
            raise ModelError(f"{path} is not a model exported by this edge-runtime ({FORMAT}): export it again")
        try:
            labels, self.max_length = json.loads(stored.pop("labels")), int(stored.pop("max_length"))
            tokenizer = stored.pop("tokenizer").encode()
        except (KeyError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} lacks labels, max_length or tokenizer ({error!r}): export it again") from None
        if not isinstance(labels, list) or len({n for n in labels if isinstance(n, str)}) < len(labels):
            raise ModelError(f"{path} has labels that are not a list of different texts: export it again")
        if not 0 < self.max_length <= MAX_LENGTH:
            raise ModelError(f"{path} has max_length {self.max_length}, wanted 1 to {MAX_LENGTH}: export it again")
        self.labels: tuple[str, ...] = tuple(labels)
        names = tuple(i.name for i in self._session.get_inputs())
        outputs = [(o.name, o.shape[-1:]) for o in self._session.get_outputs()]
        if names != INPUTS or outputs != [(OUTPUT, [len(self.labels)])]:
            raise ModelError(f"{path} maps {names} to {outputs}, wanted {INPUTS} to {len(self.labels)} logits")
        self.metadata: Mapping[str, str] = stored
        self._tokenizer = Tokenizer.from_bytes(tokenizer, self.max_length)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """One prediction for each text, in their order.

        Raises:
            ModelError: the network fails on its own tokenizer's numbers, or gives something that is not a number.
            UsageError: `texts` is a single text, or one of them is no text.
        """
        if isinstance(texts, str):
            raise UsageError("predict wants a list of texts, it got one text: predict([text])")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UsageError(
                    f"predict wants a list of texts, number {i} (from 0) is {type(text).__name__}, not str"
                )
        found: list[Prediction] = []
        for start in range(0, len(texts), WINDOW_TEXTS):
            found += self._window(texts[start : start + WINDOW_TEXTS])
        return found

    def _window(self, texts: Sequence[str]) -> list[Prediction]:
        rows = self._tokenizer.encode_batch(texts)
        found: dict[int, Prediction] = {}
        for batch in length_buckets([len(row) for row in rows], BATCH_TOKENS):
            logits = run_session(self._session, *pad([rows[i] for i in batch], self._tokenizer.pad_id))
            for i, probabilities in zip(batch, softmax(logits).tolist(), strict=True):
                best = max(range(len(self.labels)), key=probabilities.__getitem__)
                by_label = dict(zip(self.labels, probabilities, strict=True))
                found[i] = Prediction(self.labels[best], probabilities[best], by_label)
        return [found[i] for i in range(len(texts))]


def evaluate(path: str | Path, rows: Iterable[tuple[str, str]], threads: int | None = None) -> float:
    """The share of (text, label) rows whose label is predicted, from 0 to 1; reads `rows` as a stream.

    Raises:
        DataError: there are no rows, or a row has a label that the model does not know.
        ModelError: as `Predictor`.
    """
    predictor = Predictor(path, threads)
    known, right, seen = set(predictor.labels), 0, 0
    stream = iter(rows)
    while window := list(itertools.islice(stream, WINDOW_TEXTS)):
        for number, (_, label) in enumerate(window, seen + 1):
            if label not in known:
                known_labels = ", ".join(predictor.labels[:20])
                raise DataError(f"row {number} has label {label!r}, which is not one of the model's: {known_labels}")
        predictions = predictor.predict([text for text, _ in window])
        right += sum(p.label == label for p, (_, label) in zip(predictions, window, strict=True))
        seen += len(window)
    if not seen:
        raise DataError("there is no row to evaluate on")
    return right / seen


def open_session(path: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """An onnxruntime session with little working memory that does not spin while idle.

    Raises:
        ModelError: there is no such file, or it is not an ONNX model that this onnxruntime runs.
    """
    import onnxruntime

    if not path.is_file():
        raise ModelError(f"there is no model file {path}: export one, or correct the path")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters arrives as an exception
    options.enable_mem_pattern = False  # a plan for each shape seen: 293 instead of 193 MiB at 512 tokens (MiniLM-L6)
    options.intra_op_num_threads = max(threads or 0, 0)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no type
        raise ModelError(f"{path} is damaged or no ONNX model ({_first_line(error)}): export it again") from None


def run_session(session: onnxruntime.InferenceSession, ids: Array, mask: Array) -> Array:
    """Logits (batch, labels) float32 for ids and mask (batch, seq) int64.

    Raises:
        ModelError: the network fails, or gives something that is not a number.
    """
    import numpy as np

    try:
        logits = np.asarray(session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))[0])
    except Exception as error:  # as above
        raise ModelError(f"the model fails on these texts ({_first_line(error)}): export it again") from None
    if not np.isfinite(logits).all():
        raise ModelError("the model's logits are not finite: its training diverged, choose an earlier version")
    return logits


def softmax(logits: Array) -> Array:
    """Probabilities (batch, labels) float64, without overflow for any finite logits."""
    import numpy as np

    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def length_buckets(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: rows times the longest is at most `batch_tokens`, or it is one row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
