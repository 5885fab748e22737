"""Labels for texts, from an exported file or from a model's own folder: onnxruntime and tokenizers only, never torch.

A file written by `export.py` is self-contained: it carries the tokenizer and the labels. A folder (a checkpoint's or an
agent's) runs from its own memory-mapped weights (`mapped_network.py`); an agent's can be followed from version to version.
Not a server and not a loader for other people's ONNX files. Imports the errors and the tokenizer wrapper; onnxruntime,
numpy and what a folder needs inside functions.

Memory: of a file onnxruntime's copy of the weights (twice while it loads), of a folder the pages of its weights; and for
one internal batch of at most `BATCH_TOKENS` padded tokens about 4 * BATCH_TOKENS * (2 * feed_forward + 4 * hidden +
3 * heads * longest text) bytes: 18 MiB for MiniLM-L6 at 128 tokens. Measured for the whole process (an exported file,
86 MiB of weights, x86-64): peak 186 MiB while loading, 164 MiB then, 185 MiB after a thousand texts of up to 128 tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import (
    BadVersion,
    DataError,
    EdgeError,
    MissingExtra,
    ModelError,
    StoreError,
    UsageError,
    WireError,
)
from edge_runtime.tokenize import Tokenizer, pad

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    from edge_runtime.graphs.bundle import GraphSet
    from edge_runtime.mapped_network import MappedNetwork
    from edge_runtime.source import Checkpoint, Source
    from edge_runtime.versions import Stamp

    Array = np.ndarray[Any, np.dtype[Any]]

FORMAT = "edge-runtime 1"  # of the metadata in an exported file
BATCH_TOKENS = 512  # padded tokens in one internal batch; more gains no speed on a CPU
MAX_LENGTH = 1 << 17
WINDOW_TEXTS = 1024  # texts that are tokenized and sorted by length together
MAX_WINDOWS = 256  # of one long text: some seconds
TRUNCATE, WINDOW = LONG = ("truncate", "window")  # what becomes of texts of more tokens than the model reads at once
TRIALS = ("", "Hello.", "How far is it from Denver to Aspen ?", "a river in the mountains " * 40)  # of a newer version
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"
# Slower than the two nodes that it replaces. An exported MiniLM-L6, one thread, onnxruntime 1.31, lowest times: without it 7.0
# instead of 7.5 ms at 1 x 16 tokens, 78 instead of 90 ms at 8 x 32; logits within 1.2e-6.
SLOW = ["SkipLayerNormFusion"]


@dataclass(frozen=True)
class Prediction:
    """The most probable label of a text, and the probability of every label (they add up to 1).

    Attributes:
        model_version: of the fleet's model that answered; None for a model of no fleet.
        truncated: whether the text has more than what was read of it.
        windows: parts of the text whose probabilities this is the mean of, each weighted with its tokens.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]
    model_version: int | None = None
    truncated: bool = False
    windows: int = 1


class Predictor:
    """A model, ready to use; safe to call from several threads.

    Attributes:
        num_truncated: texts so far of which a rest was not read.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        *,
        family: str | None = None,
        adapter: str | Path | None = None,
        long: str = TRUNCATE,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load an exported file, a checkpoint folder that has a head, or the version that answers of an agent's folder.

        Args:
            threads: None takes one for each physical core.
            family: module that knows the architecture of a checkpoint folder (default: BERT's).
            adapter: a folder with LoRA adapters to add in, ours or PEFT's; the model may then be a base, by alias too.
            long: `truncate` reads the first `max_length` tokens of a text, `window` up to `MAX_WINDOWS` parts of so many
                that overlap by a quarter.
            progress: gets lines of text, should the folder's graphs have to be derived first (tens of seconds, once).

        Raises:
            ModelError: it is missing, damaged, a file that was not exported by edge-runtime, or a folder without a head.
            BadVersion: a `ModelError` of a version in an agent's folder.
            MissingExtra: the folder's graphs are not known here and cannot be derived without torch.
            UsageError: `long` is something else.
        """
        if long not in LONG:
            raise UsageError(f"long is {' or '.join(LONG)}, it is {long!r}")
        self.num_truncated = 0
        self._long, self._counting = long, threading.Lock()
        self._path, self._threads, self._progress = Path(path), threads, progress
        self._family, self._loading = family, threading.Lock()
        self._adapter = Path(adapter) if adapter else None
        self._seen: Stamp = None  # of the agent's versions that were read last, usable or not
        self._version = self._open_folder(None) if adapter or self._path.is_dir() else _open_file(self._path, threads)

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the logits."""
        return self._version.labels

    @property
    def max_length(self) -> int:
        """Tokens after which a text is cut."""
        return self._version.tokenizer.max_length

    @property
    def metadata(self) -> Mapping[str, str]:
        """Where the model comes from, for example the model version and the method."""
        return self._version.metadata

    @property
    def version(self) -> bytes:
        """What tells the version of an agent's folder that answers: the SHA-256 of its manifest. Empty for other models."""
        return self._version.checkpoint.version if self._version.checkpoint else b""

    def refresh(self) -> bool:
        """Take over the version that answers of an agent's folder now; -> whether it was another. Else it costs two `stat`.

        It is tried on a few built-in texts first. Calls that are under way end on the version that they began with. False
        at once while another thread is loading.

        Raises:
            ModelError, WireError, MissingExtra: the other version cannot be used. The one before stays, and this one is
                not tried again.
            StoreError: the disk is full, or a file of the folder is damaged. The one before stays until the next call.
        """
        if self._seen is None or not self._loading.acquire(blocking=False):
            return False
        try:
            if self._stamp() in (None, self._seen):
                return False
            before = self._version
            version = self._open_folder(before)
            if version is before:
                return False
            version.check()
            self._version = version
            return True
        except StoreError:
            self._seen = ()
            raise
        finally:
            self._loading.release()

    def check(self) -> None:
        """Try the model on a few built-in texts, which warms it up too.

        Raises:
            ModelError: it fails on one, or what it gives are no probabilities. `BadVersion` of an agent's folder.
        """
        self._version.check()

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """One prediction for each text, in their order, all from one version of the model.

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
        version = self._version
        found: list[Prediction] = []
        for start in range(0, len(texts), WINDOW_TEXTS):
            found += version.predict(texts[start : start + WINDOW_TEXTS], self._long)
        with self._counting:
            self.num_truncated += sum(one.truncated for one in found)
        return found

    def _open_folder(self, before: _Version | None) -> _Version:
        """The model that the folder holds now; `before` itself if that is still the one."""
        self._seen = self._stamp()
        while True:
            try:
                return self._read_folder(before)
            except EdgeError:
                tried, self._seen = self._seen, self._stamp()
                if self._seen == tried:
                    raise
                # the agent took over a newer version meanwhile and deleted what only the older one had: begin again

    def _stamp(self) -> Stamp:
        from edge_runtime.versions import stamp

        return stamp(self._path)

    def _read_folder(self, before: _Version | None) -> _Version:
        from edge_runtime.source import DEFAULT_FAMILY, find_checkpoint

        checkpoint = find_checkpoint(str(self._path), family=self._family or DEFAULT_FAMILY, progress=self._progress)
        if before is not None and before.checkpoint == checkpoint:
            return before
        with _named(checkpoint):
            return self._read_checkpoint(checkpoint, before)

    def _read_checkpoint(self, checkpoint: Checkpoint, before: _Version | None) -> _Version:
        from edge_runtime.mapped_network import MappedNetwork
        from edge_runtime.merging import with_adapter
        from edge_runtime.store import cache_folder

        old = before.network if before is not None else None
        with with_adapter(checkpoint, self._adapter) as source:  # mapped files are read after they are gone, too
            graph_set = _graph_set(source, old, cache_folder(), self._progress)
            network = MappedNetwork(source, graph_set, self._threads or 0, old)
        if before is not None and _tokenizing(before.checkpoint) == _tokenizing(checkpoint):
            tokenizer = before.tokenizer
        else:
            tokenizer = Tokenizer.from_file(source.tokenizer, source.spec.max_length)
        words = source.spec.config.get("vocab_size")
        if isinstance(words, int) and tokenizer.vocab_size > words:
            raise ModelError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {words}: they are not a pair")
        return _Version(source.spec.labels, source.metadata, tokenizer, network.logits, network, checkpoint)


@dataclass(frozen=True)
class _Version:
    """One version of a model. Nothing of it changes, so a text is tokenized, classified and labelled by one version."""

    labels: tuple[str, ...]
    metadata: Mapping[str, str]
    tokenizer: Tokenizer
    logits: Callable[[Array, Array], Array]
    network: MappedNetwork | None = None  # of a folder
    checkpoint: Checkpoint | None = None

    def predict(self, texts: Sequence[str], long: str = TRUNCATE) -> list[Prediction]:
        rows, longer = self.tokenizer.encode_marked(texts)
        found = {i: self._prediction(probabilities) for i, probabilities in self._probabilities(rows)}
        for i in longer:
            found[i] = self._windowed(texts[i]) if long == WINDOW else replace(found[i], truncated=True)
        return [found[i] for i in range(len(texts))]

    def _windowed(self, text: str) -> Prediction:
        """The mean over a long text's windows, each weighted with its tokens."""
        rows, truncated = self.tokenizer.windows(text, MAX_WINDOWS)
        weights = [max(1, len(row) - self.tokenizer.special) for row in rows]
        sums = [0.0] * len(self.labels)
        for i, probabilities in sorted(self._probabilities(rows)):
            sums = [total + weights[i] * value for total, value in zip(sums, probabilities, strict=True)]
        mean = self._prediction([total / sum(weights) for total in sums])
        return replace(mean, truncated=truncated, windows=len(rows))

    def _probabilities(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """(number of a row, probabilities of the labels), rows of similar length together."""
        for batch in length_buckets([len(row) for row in rows], BATCH_TOKENS):
            logits = self.logits(*pad([rows[i] for i in batch], self.tokenizer.pad_id))
            yield from zip(batch, softmax(_finite(logits)).tolist(), strict=True)

    def _prediction(self, probabilities: Sequence[float]) -> Prediction:
        stored = self.metadata.get("model_version", "")
        model_version = int(stored) if stored.isascii() and stored.isdecimal() and len(stored) < 20 else None
        best = max(range(len(self.labels)), key=probabilities.__getitem__)
        by_label = dict(zip(self.labels, probabilities, strict=True))
        return Prediction(self.labels[best], probabilities[best], by_label, model_version)

    def check(self) -> None:
        """As `Predictor.check`."""
        with _named(self.checkpoint):
            for found in self.predict(TRIALS):
                values = found.probabilities.values()
                if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
                    raise ModelError("what the model gives for a text are no probabilities: choose another version")


def evaluate(model: str | Path | Predictor, rows: Iterable[tuple[str, str]], threads: int | None = None) -> float:
    """The share of (text, label) rows whose label is predicted, from 0 to 1; reads `rows` as a stream.

    Raises:
        DataError: there are no rows, or a row has a label that the model does not know.
        ModelError: as `Predictor`.
    """
    predictor = model if isinstance(model, Predictor) else Predictor(model, threads)
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


# a file


def _open_file(path: Path, threads: int | None) -> _Version:
    session = open_session(path, threads)
    stored = dict(session.get_modelmeta().custom_metadata_map)
    if stored.pop("format", None) != FORMAT:
        raise ModelError(f"{path} is not a model exported by this edge-runtime ({FORMAT}): export it again")
    try:
        labels, max_length = json.loads(stored.pop("labels")), int(stored.pop("max_length"))
        tokenizer = stored.pop("tokenizer").encode()
    except (KeyError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} lacks labels, max_length or tokenizer ({error!r}): export it again") from None
    if not isinstance(labels, list) or len({n for n in labels if isinstance(n, str)}) < len(labels):
        raise ModelError(f"{path} has labels that are not a list of different texts: export it again")
    if not 0 < max_length <= MAX_LENGTH:
        raise ModelError(f"{path} has max_length {max_length}, wanted 1 to {MAX_LENGTH}: export it again")
    names = tuple(i.name for i in session.get_inputs())
    outputs = [(o.name, o.shape[-1:]) for o in session.get_outputs()]
    if names != INPUTS or outputs != [(OUTPUT, [len(labels)])]:
        raise ModelError(f"{path} maps {names} to {outputs}, wanted {INPUTS} to {len(labels)} logits")
    return _Version(
        tuple(labels),
        stored,
        Tokenizer.from_bytes(tokenizer, max_length),
        lambda ids, mask: run_session(session, ids, mask),
    )


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
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW
        )
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
    return _finite(logits)


# a folder


def _graph_set(source: Source, before: MappedNetwork | None, cache: Path, progress: Callable[[str], None]) -> GraphSet:
    """The graphs that run a model: those of the version before, those that came with it, or what is known here."""
    from edge_runtime.graphs.find import find_graphs, read_graphs
    from edge_runtime.optional import install_command

    if before is not None and (before.spec == source.spec or before.graph_set.fits(source.spec)):
        return before.graph_set
    if source.graphs is not None and (shipped := read_graphs(source.graphs)).fits(source.spec):
        return shipped
    path = find_graphs(source.spec, source.weights, cache, progress=progress)
    if path is None:
        raise MissingExtra(
            f"no graphs are known here for this {source.spec.family}: {install_command('train')} to derive them "
            "once, or run `edge-runtime export` on another machine and predict with the file"
        )
    return read_graphs(path)


def _tokenizing(checkpoint: Checkpoint | None) -> tuple[Path, int] | None:
    """Equal for versions in one agent's folder that make the same tokens: its tokenizers are named by their hashes."""
    return (checkpoint.tokenizer, checkpoint.max_length) if checkpoint else None


@contextlib.contextmanager
def _named(checkpoint: Checkpoint | None) -> Iterator[None]:
    """What is wrong with a version of an agent's folder, as an error that names it."""
    try:
        yield
    except (ModelError, WireError) as error:
        if checkpoint is None or checkpoint.manifest is None:
            raise
        number = checkpoint.manifest.version
        raise BadVersion(f"model {number}: {error}", version=number, manifest=checkpoint.version) from error


# numbers


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


def _finite(logits: Array) -> Array:
    import numpy as np

    if not np.isfinite(logits).all():
        raise ModelError("the model's logits are not finite: its training diverged, choose an earlier version")
    return logits


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
