"""A model as one self-contained ONNX file, float32 or int8, checked before it appears.

The file holds weights, tokenizer, labels and where the model came from; nothing about the exporting machine (file
paths, stack traces) is left in it. Its network is put together from the model's graphs (`graphs/compose.py`), without torch;
torch exports what has none (`export_torch.py`). Not the reader (`predict.py`). Imports the records, errors, store,
tokenizer and predict modules; numpy, the graphs and torch inside functions.

Memory: onnxruntime's copy of the weights while the file is compared; for int8 all quantised weights besides.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError, UsageError
from edge_runtime.model import ModelSpec
from edge_runtime.optional import require
from edge_runtime.predict import FORMAT, Predictor, open_session, run_session
from edge_runtime.source import Source
from edge_runtime.store import atomic_writer, cache_folder, disk_errors, scratch_folder, sync_folder
from edge_runtime.tokenize import Tokenizer, pad
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.graphs.bundle import GraphSet

    Array = np.ndarray[Any, np.dtype[Any]]
    Batch = tuple[Array, Array]  # ids and mask
    Examples = Sequence[tuple[str, str | None]]  # texts with their labels

FLOAT32, INT8 = "float32", "int8"
OPSET, ONNXRUNTIME = "20", ">=1.17"  # the first that runs this opset's Gelu; written into each file
MAX_ABS_DIFF = 1e-4  # between the file's logits and those of the model, both float32
MAX_LOSS = 0.005  # of accuracy, or of labels that agree, by int8
ROUNDING = 1e-9  # of the difference of two shares
MAX_SAMPLES = 64  # of the given texts, for comparing logits
MAX_CHECKED = 2000  # of the given examples, for comparing int8 with float32


@dataclass(frozen=True)
class Int8Check:
    """What int8 costs on held-out examples, from 0 to 1.

    Attributes:
        num_examples: that were compared.
        agreement: the share that gets the same label from both files.
        accuracy_float32, accuracy_int8: None without labelled examples.
    """

    num_examples: int
    agreement: float
    accuracy_float32: float | None = None
    accuracy_int8: float | None = None

    @property
    def passed(self) -> bool:
        """Whether int8 loses at most half a point of accuracy, or without labels as much agreement."""
        if self.accuracy_float32 is None or self.accuracy_int8 is None:
            return self.agreement >= 1 - MAX_LOSS - ROUNDING
        return self.accuracy_int8 >= self.accuracy_float32 - MAX_LOSS - ROUNDING


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the model.

    Attributes:
        path: the ONNX file.
        precision: of what was written: float32 also where int8 was asked for and lost too much.
        num_bytes: its length.
        max_abs_diff: the largest difference of a logit between the float32 file and the model on the samples.
        compared_with: what ran the model: torch, or the graphs of its set where torch is not installed.
        seconds: wall time of the whole export, checks included.
        num_samples: texts that were compared.
        int8: what int8 costs; None where it was not asked for.
    """

    path: Path
    precision: str
    num_bytes: int
    max_abs_diff: float
    compared_with: str
    seconds: float
    num_samples: int
    int8: Int8Check | None = None


def check_file(out: Path) -> None:
    """Whether a file may be written to `out`.

    Raises:
        UsageError: it is a folder.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder: name the ONNX file to write, for example {out / 'model.onnx'}")


def export_onnx(
    spec: ModelSpec,
    tensors: Mapping[str, MappedTensor],
    tokenizer_json: bytes,
    out: Path,
    *,
    samples: Sequence[str],
    metadata: Mapping[str, str],
    graphs: Path | None = None,
    precision: str = FLOAT32,
    examples: Examples = (),
    progress: Callable[[str], None] = lambda line: None,
) -> ExportReport:
    """Write the model to `out`, replacing it only if onnxruntime gives the model's logits on the samples.

    Inputs of the file: input_ids and attention_mask, int64 (batch, sequence), any batch, sequence up to max_length.
    Output: logits, float32 (batch, labels).

    Args:
        spec, tensors: the model; every tensor of the spec.
        tokenizer_json: the bytes of its tokenizer.json, which go into the file.
        samples: real texts to compare on, at least one; the first 64 are used.
        metadata: written beside our own entries, for example the model version and the method.
        graphs: a graph set that came with the model.
        precision: "int8" writes the int8 file if it loses at most half a point on the examples, else float32.
        examples: held-out texts with their labels, for int8; `samples` without labels stand in where there are none.
        progress: gets lines of text, should graphs have to be derived for int8 (a minute or two).

    Raises:
        ModelError: the parts do not fit together, torch cannot export the family, or the logits differ.
        MissingExtra: the model's graphs are not known and torch, onnx or onnxscript is not installed.
        UsageError: `out` is a folder, there is no sample, or the metadata is not text or takes one of our names.
        StoreError: the disk is full; what was at `out` is still there.
    """
    started = time.monotonic()
    check_file(out)
    source = Source(spec, tensors, out, metadata, graphs=graphs)  # its tokenizer is read by nobody here
    entries = _entries(source, tokenizer_json)
    tokenizer = Tokenizer.from_bytes(tokenizer_json, spec.max_length)
    words = spec.config.get("vocab_size")
    if isinstance(words, int) and tokenizer.vocab_size > words:
        raise ModelError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {words}: they are not a pair")
    missing = [t.name for t in spec.tensors if t.name not in tensors]
    if missing:
        raise ModelError(f"the model lacks {len(missing)} tensors, the first is {missing[0]!r}: fetch it again")
    if isinstance(samples, str) or not samples:
        raise UsageError("export needs a list with at least one sample text to compare on")
    entries |= {"weights_sha256": _weights_hash(spec, tensors)}
    rows = tokenizer.encode_batch(samples[:MAX_SAMPLES])
    batches = _batches(rows, tokenizer)
    graph_set = _graph_set(source, precision == INT8, progress)
    model, compared_with, wanted = _reference(source, graph_set, batches)
    found = None
    with disk_errors(out), scratch_folder(out.parent, f".{out.name[:32]}.") as folder:
        draft = folder / f"{FLOAT32}.onnx"
        _write(draft, source, graph_set, model, entries | {"precision": FLOAT32})
        diff = _max_abs_diff(draft, batches, wanted, compared_with)
        chosen = draft
        if precision == INT8:
            small = folder / f"{INT8}.onnx"
            _write(small, source, graph_set, None, entries | {"precision": INT8})
            known = [(text, label) for text, label in examples if label in spec.labels]
            found = compare(draft, small, _spread(known or [(text, None) for text in samples]))
            chosen = small if found.passed else draft
        written = chosen.stem
        os.replace(chosen, out)
        sync_folder(out.parent)
    seconds = time.monotonic() - started
    return ExportReport(out, written, out.stat().st_size, diff, compared_with, seconds, len(rows), found)


def compare(float32: Path, int8: Path, examples: Examples) -> Int8Check:
    """Both files' answers to the same texts; the accuracies where the examples have labels."""
    texts = [text for text, _ in examples]
    plain = [found.label for found in Predictor(float32).predict(texts)]
    try:
        small = [found.label for found in Predictor(int8).predict(texts)]
    except ModelError:  # what it gives are no numbers
        small = [""] * len(texts)
    agreement = _share(plain, small)
    labels = [label for _, label in examples if label is not None]
    if len(labels) < len(texts):
        return Int8Check(len(texts), agreement)
    return Int8Check(len(texts), agreement, _share(plain, labels), _share(small, labels))


def _share(one: Sequence[str], other: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _spread(examples: Examples) -> Examples:
    """At most `MAX_CHECKED` of the examples, evenly spread over all."""
    step = -(-len(examples) // MAX_CHECKED)
    return examples[:: step or 1]


def _entries(source: Source, tokenizer_json: bytes) -> dict[str, str]:
    """The file's metadata_props."""
    own = {
        "format": FORMAT,
        "family": source.spec.family,
        "labels": json.dumps(list(source.spec.labels)),
        "max_length": str(source.spec.max_length),
        "tokenizer": tokenizer_json.decode(errors="replace"),  # what is damaged here fails as a tokenizer later
        "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
        "opset": OPSET,
        "onnxruntime": ONNXRUNTIME,
    }
    for key, value in source.metadata.items():
        if key in {*own, "weights_sha256", "precision"} or not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(f"metadata must be texts under other names than {', '.join(own)}: {key!r} is not")
    return {**own, **source.metadata}


def _weights_hash(spec: ModelSpec, weights: Mapping[str, MappedTensor]) -> str:
    """SHA-256 of the tensors' names, shapes and float32 values, in the model's order: which model a file came from."""
    digest = hashlib.sha256()
    for tensor in spec.tensors:
        digest.update(json.dumps([tensor.name, list(tensor.shape)]).encode())
        for piece in weights[tensor.name].pieces():
            digest.update(piece.data)
    return digest.hexdigest()


def _graph_set(source: Source, needed: bool, progress: Callable[[str], None]) -> GraphSet | None:
    """The graphs that came with the model or are known here; `needed`: else they are derived, or it is an error."""
    from edge_runtime.graphs.find import find_graphs, read_graphs

    if source.graphs is not None and (shipped := read_graphs(source.graphs)).fits(source.spec):
        return shipped
    path = find_graphs(source.spec, source.weights, cache_folder(), derive=needed, progress=progress)
    if path is None and needed:
        require("torch", extra="train")
        raise ModelError("an int8 file is put together from the model's graphs, and it has none: export float32")
    return read_graphs(path) if path else None


def _reference(source: Source, graph_set: GraphSet | None, batches: Sequence[Batch]) -> tuple[Any, str, list[Array]]:
    """-> torch's network where torch is there, what ran the model, and its logits."""
    if graph_set is None or importlib.util.find_spec("torch") is not None:
        require("torch", extra="train")
        from edge_runtime import export_torch

        model = export_torch.build(source.spec, source.weights)
        return model, "torch", export_torch.logits(model, batches)
    import numpy as np

    from edge_runtime.mapped_network import MappedNetwork

    network = MappedNetwork(source, graph_set, 0)
    wanted = [network.logits(*batch) for batch in batches]
    if not all(np.isfinite(logits).all() for logits in wanted):
        raise ModelError("the model's logits are not finite: its training diverged, choose an earlier version")
    return None, "its graphs", wanted


def _write(draft: Path, source: Source, graph_set: GraphSet | None, model: Any, entries: Mapping[str, str]) -> None:
    from edge_runtime.graphs.compose import compose, write_onnx

    with atomic_writer(draft, mode=0o644) as file:
        if graph_set is None:
            from edge_runtime import export_torch

            export_torch.write(model, source.spec.max_length, entries, file)
        else:
            is_int8 = entries["precision"] == INT8
            write_onnx(compose(graph_set, source.spec, source.weights, is_int8=is_int8), entries, file)


def _batches(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[Batch]:
    """ids and masks of the rows at several batch sizes and paddings, and one batch of the full length."""
    batches, left, sizes = [], list(rows), itertools.cycle(((1, 0), (2, 3), (5, 0), (8, 11)))
    while left:
        size, extra = next(sizes)
        longest = max(len(row) for row in left[:size])
        batches.append(pad(left[:size], tokenizer.pad_id, length=min(longest + extra, tokenizer.max_length)))
        left = left[size:]
    tokens = [n for row in rows for n in row] or [tokenizer.pad_id]
    full = list(itertools.islice(itertools.cycle(tokens), tokenizer.max_length))
    return [*batches, pad([full, rows[0]], tokenizer.pad_id)]


def _max_abs_diff(path: Path, batches: Sequence[Batch], wanted: Sequence[Array], compared_with: str) -> float:
    """The largest difference of a logit.

    Raises:
        ModelError: it is more than `MAX_ABS_DIFF`, or onnxruntime cannot run the file.
    """
    import numpy as np

    session = open_session(path)
    pairs = zip(batches, wanted, strict=True)
    worst = max(float(np.abs(run_session(session, *batch) - logits).max()) for batch, logits in pairs)
    if not worst <= MAX_ABS_DIFF:
        raise ModelError(
            f"the exported file differs from {compared_with} by {worst:.2e}, allowed are {MAX_ABS_DIFF:.0e}: nothing was "
            "written. Report this with the versions of torch and onnxruntime"
        )
    return worst
