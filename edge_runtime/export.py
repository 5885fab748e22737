"""A model as one self-contained ONNX file, checked against torch before it appears.

The file holds weights, tokenizer, labels and where the model came from; nothing about the exporting machine (file
paths, stack traces) is left in it. Not quantisation, and not the reader (`predict.py`). Imports the records, errors,
store, tokenizer and predict modules; torch, onnx and numpy inside functions.

Memory, measured for MiniLM-L6 (86 MiB of weights; torch 2.13, onnxruntime 1.31, x86-64): 680 MiB resident at the peak,
of which 450 are anonymous (torch and its exporter 315, onnxruntime's copy for the check 135) and the rest mapped files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edge_runtime.errors import ModelError, UsageError
from edge_runtime.model import ModelSpec, SplitModel, load_family
from edge_runtime.optional import require
from edge_runtime.predict import FORMAT, INPUTS, OUTPUT, open_session, run_session
from edge_runtime.store import atomic_writer, disk_errors, make_folder, sync_folder
from edge_runtime.tokenize import Tokenizer, pad
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir

    Array = np.ndarray[Any, np.dtype[Any]]

OPSET = 20  # the first with Gelu; with file format 9, onnxruntime runs it since 1.17
IR_VERSION = 9
MAX_ABS_DIFF = 1e-4  # between onnxruntime's and torch's logits, both float32
MAX_SAMPLES = 64  # of the given texts, for the check
MAX_FILE_BYTES = (1 << 31) - 1  # a protobuf message ends here
LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from torch.

    Attributes:
        path: the ONNX file.
        num_bytes: its length.
        max_abs_diff: the largest difference of a logit between onnxruntime and torch on the samples.
        seconds: wall time of the whole export, check included.
        num_samples: texts that were compared.
    """

    path: Path
    num_bytes: int
    max_abs_diff: float
    seconds: float
    num_samples: int


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
) -> ExportReport:
    """Write the model to `out`, replacing it only if onnxruntime gives torch's logits on the samples.

    Inputs of the file: input_ids and attention_mask, int64 (batch, sequence), any batch, sequence up to max_length.
    Output: logits, float32 (batch, labels).

    Args:
        spec, tensors: the model; every tensor of the spec.
        tokenizer_json: the bytes of its tokenizer.json, which go into the file.
        samples: real texts to compare on, at least one; the first 64 are used.
        metadata: written beside our own entries, for example the model version and the method.

    Raises:
        ModelError: the parts do not fit together, torch cannot export the family, or the logits differ.
        MissingExtra: torch, onnx or onnxscript is not installed.
        UsageError: `out` is a folder, there is no sample, or the metadata is not text or takes one of our names.
    """
    started = time.monotonic()
    check_file(out)
    for module in ("torch", "onnx", "onnxscript"):
        require(module, extra="train")
    entries = _entries(spec, tokenizer_json, metadata)
    tokenizer = Tokenizer.from_bytes(tokenizer_json, spec.max_length)
    words = spec.config.get("vocab_size")
    if isinstance(words, int) and tokenizer.vocab_size > words:
        raise ModelError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {words}: they are not a pair")
    if isinstance(samples, str) or not samples:
        raise UsageError("export needs a list with at least one sample text to compare torch and onnxruntime on")
    rows = tokenizer.encode_batch(samples[:MAX_SAMPLES])
    model = _build(spec, tensors)
    batches = _batches(rows, tokenizer)
    wanted = _torch_logits(model, batches)
    program = _export(model, spec.max_length)
    with disk_errors(out):
        make_folder(out.parent)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:32]}.") as folder:
            draft = Path(folder) / "model.onnx"
            with atomic_writer(draft, mode=0o644) as file:
                _write(program, entries, file)

            diff = _max_abs_diff(draft, batches, wanted)
            draft.replace(out)
        sync_folder(out.parent)
    num_bytes = out.stat().st_size
    return ExportReport(out, num_bytes, diff, time.monotonic() - started, len(rows))


def _entries(spec: ModelSpec, tokenizer_json: bytes, metadata: Mapping[str, str]) -> dict[str, str]:
    """The file's metadata_props."""
    own = {
        "format": FORMAT,
        "family": spec.family,
        "labels": json.dumps(list(spec.labels)),
        "max_length": str(spec.max_length),
        "tokenizer": tokenizer_json.decode(errors="replace"),  # what is damaged here fails as a tokenizer later
    }
    for key, value in metadata.items():
        if key in own or not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(f"metadata must be texts under other names than {', '.join(own)}: {key!r} is not")
    return {**own, **metadata}


def _build(spec: ModelSpec, tensors: Mapping[str, MappedTensor]) -> Any:
    """The family's torch network over the mapped weights."""
    import torch

    missing = [t.name for t in spec.tensors if t.name not in tensors]
    if missing:
        raise ModelError(f"the model lacks {len(missing)} tensors, the first is {missing[0]!r}: fetch it again")
    mapped = {t.name: torch.from_numpy(tensors[t.name].array()) for t in spec.tensors}
    model: Any = load_family(spec.family).build(spec, mapped)
    return model.eval().requires_grad_(False)


def _export(model: SplitModel, max_length: int) -> onnx_ir.Model:
    """The network as an ONNX graph, without the exporter's notes about this machine."""
    import torch
    from onnx_ir.traversal import RecursiveGraphIterator

    ids = torch.zeros(2, min(max_length, 7), dtype=torch.int64)  # sizes 0 and 1 would be taken for constants
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=max_length)}
    try:
        with _silence():
            program = torch.onnx.export(
                model,  # type: ignore[arg-type]  # a SplitModel is an nn.Module
                (ids, torch.ones_like(ids)),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_shapes=(axes, axes),
                verbose=False,
            )
    except Exception as error:  # the exporter passes on whatever the family's code raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"torch cannot export this model: {reason}") from error
    assert program is not None  # with dynamo=True it never is
    graph = program.model.graph
    nodes = list(RecursiveGraphIterator(graph))
    values = (*graph.inputs, *graph.initializers.values(), *(v for node in nodes for v in node.outputs))
    noted: Any
    for noted in (program.model, graph, *nodes, *values):
        noted.metadata_props.clear()  # names of classes and stack traces with file paths
        noted.doc_string = None
    return program.model


def _write(model: onnx_ir.Model, entries: Mapping[str, str], file: IO[bytes]) -> None:
    """Write the file as protobuf, one tensor in memory at a time (`onnx_ir.save` holds the weights three times).

    A message is a row of fields, each `number << 3 | 2`, its length and its bytes
    (https://protobuf.dev/programming-guides/encoding/); ModelProto.graph is field 7, GraphProto.initializer 5 and
    TensorProto.raw_data 9 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
    """
    import onnx
    from onnx_ir import serde

    tensors: dict[str, Any] = {name: value.const_value for name, value in model.graph.initializers.items()}
    model.graph.initializers.clear()
    proto = serde.serialize_model(model)
    proto.ir_version = IR_VERSION
    onnx.helper.set_model_props(proto, dict(entries))
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    head = proto.SerializeToString()

    starts = []  # of each initializer, up to its raw bytes
    for name, tensor in tensors.items():
        shape = [int(n) for n in tensor.shape]
        start = onnx.TensorProto(name=name, dims=shape, data_type=int(tensor.dtype)).SerializeToString()
        start += _field(9, tensor.nbytes)
        starts.append(_field(5, len(start) + tensor.nbytes) + start)
    graph_bytes = len(graph) + sum(map(len, starts)) + sum(t.nbytes for t in tensors.values())
    if len(head) + graph_bytes > MAX_FILE_BYTES - 16:
        raise ModelError(f"the model needs {graph_bytes} bytes, an ONNX file holds 2 GiB: choose a smaller model")
    file.write(head + _field(7, graph_bytes) + graph)
    for start, tensor in zip(starts, tensors.values(), strict=True):
        file.write(start)
        file.write(tensor.tobytes())


def _field(number: int, length: int) -> bytes:
    """Tag and length of a protobuf field of bytes."""
    out = bytearray([number << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*out, length])


def _batches(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[tuple[Array, Array]]:
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


def _torch_logits(model: Any, batches: Sequence[tuple[Array, Array]]) -> list[Array]:
    """What the file must give."""
    import torch

    with torch.inference_mode():
        wanted = [model(torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in batches]
    if not all(torch.isfinite(logits).all() for logits in wanted):
        raise ModelError("the model's logits are not finite: its training diverged, choose an earlier version")
    return [logits.numpy() for logits in wanted]


def _max_abs_diff(path: Path, batches: Sequence[tuple[Array, Array]], wanted: Sequence[Array]) -> float:
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
            f"the exported file differs from torch by {worst:.2e}, allowed are {MAX_ABS_DIFF:.0e}: nothing was "
            "written. Report this with the versions of torch and onnxruntime"
        )
    return worst


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress, warnings or log lines of the exporter."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
