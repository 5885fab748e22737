"""A network as ONNX by torch's own exporter, for models whose graphs are not known; and its logits, to compare with.

Not what is checked and when a file appears (`export.py`). Needs torch; the exporter needs onnx and onnxscript too.

Memory, measured for MiniLM-L6 (86 MiB of weights; torch 2.13, onnxruntime 1.31, x86-64): 680 MiB resident at the peak,
of which 450 are anonymous (torch and its exporter 315, onnxruntime's copy for the check 135) and the rest mapped files.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from edge_runtime.errors import ModelError
from edge_runtime.model import ModelSpec, SplitModel, load_family
from edge_runtime.optional import require
from edge_runtime.predict import INPUTS, OUTPUT
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir

    Array = np.ndarray[Any, np.dtype[Any]]

OPSET, IR_VERSION = 20, 9  # as `graphs/compose.py`
LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


def build(spec: ModelSpec, tensors: Mapping[str, MappedTensor]) -> Any:
    """The family's torch network over the mapped weights."""
    import torch

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


def write(model: SplitModel, max_length: int, entries: Mapping[str, str], file: IO[bytes]) -> None:
    """Export the network and write the file as protobuf, one tensor in memory at a time.

    `onnx_ir.save` would hold the weights three times.

    A message is a row of fields, each `number << 3 | 2`, its length and its bytes
    (https://protobuf.dev/programming-guides/encoding/); ModelProto.graph is field 7, GraphProto.initializer 5 and
    TensorProto.raw_data 9 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
    """
    for module in ("onnx", "onnxscript"):
        require(module, extra="train")
    import onnx
    from onnx_ir import serde

    from edge_runtime.graphs.compose import MAX_FILE_BYTES, tag

    exported = _export(model, max_length)
    tensors: dict[str, Any] = {name: value.const_value for name, value in exported.graph.initializers.items()}
    exported.graph.initializers.clear()
    proto = serde.serialize_model(exported)
    proto.ir_version = IR_VERSION
    onnx.helper.set_model_props(proto, dict(entries))
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    head = proto.SerializeToString()

    starts = []  # of each initializer, up to its raw bytes
    for name, tensor in tensors.items():
        shape = [int(n) for n in tensor.shape]
        start = onnx.TensorProto(name=name, dims=shape, data_type=int(tensor.dtype)).SerializeToString()
        start += tag(9, tensor.nbytes)
        starts.append(tag(5, len(start) + tensor.nbytes) + start)
    graph_bytes = len(graph) + sum(map(len, starts)) + sum(t.nbytes for t in tensors.values())
    if len(head) + graph_bytes > MAX_FILE_BYTES - 16:
        raise ModelError(f"the model needs {graph_bytes} bytes, an ONNX file holds 2 GiB: choose a smaller model")
    file.write(head + tag(7, graph_bytes) + graph)
    for start, tensor in zip(starts, tensors.values(), strict=True):
        file.write(start)
        file.write(tensor.tobytes())


def logits(model: Any, batches: Sequence[tuple[Array, Array]]) -> list[Array]:
    """The network's logits, which must be finite."""
    import torch

    with torch.inference_mode():
        wanted = [model(torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in batches]
    if not all(torch.isfinite(logits).all() for logits in wanted):
        raise ModelError("the model's logits are not finite: its training diverged, choose an earlier version")
    return [logits.numpy() for logits in wanted]


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
