"""What an ONNX graph says of itself, read from its bytes without the onnx package, refusing what no graph of ours has.

Graph sets come from the network and from caches, and onnxruntime would follow a file name in them. So before a session
is made, every byte is walked: only the fields that a plain graph needs, nothing beside it in files, no subgraphs (If, Loop,
Scan), functions, sparse tensors, strings or operators of strangers, no large constants. What a sound-looking graph may
still do is use memory and time when it runs: the worker's memory limit is there for that. Imports the errors alone.

The format: https://protobuf.dev/programming-guides/encoding/, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edge_runtime.errors import WireError

DOMAINS = ("", "com.microsoft")
MAX_NODES = 1 << 14
MAX_CONSTANT_BYTES = 4 << 20  # of one initialiser; a table of positions fits
MAX_DIMENSIONS = 8
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}  # TensorProto.DataType
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TEXT_BYTES = 512  # of a name

# The fields that may occur: number -> whether it may occur more than once.
_MODEL = {1: False, 2: False, 3: False, 4: False, 5: False, 6: False, 7: False, 8: True}
_OPSET = {1: False, 2: False}
_GRAPH = {1: True, 2: False, 5: True, 10: False, 11: True, 12: True}
_NODE = {1: True, 2: True, 3: False, 4: False, 5: True, 6: False, 7: False}
_ATTRIBUTE = {1: False, 2: False, 3: False, 4: False, 5: False, 7: True, 8: True, 20: False}
_TENSOR = {1: True, 2: False, 4: True, 5: True, 7: True, 8: False, 9: False, 10: True, 11: True, 12: False}
_VALUE = {1: False, 2: False, 3: False}
_TYPE = {1: False}
_TENSOR_TYPE = {1: False, 2: False}
_SHAPE = {1: True}
_DIMENSION = {1: False, 2: False}
# Those that are texts: onnxruntime takes any bytes, and fails where it tells Python.
_TEXTS = {
    "the model": (2, 3, 4, 6),
    "an operator set": (1,),
    "the graph": (2, 10),
    "a node": (1, 2, 3, 4, 6, 7),
    "an attribute": (1, 4, 9),
    "a tensor": (8, 12),
    "an input or output": (1, 3),
    "a dimension": (2,),
}


@dataclass(frozen=True)
class Value:
    """An input or output: the number of its type in ONNX (1 float32, 7 int64), and its shape, None where it is free."""

    dtype: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class GraphFacts:
    """Inputs and outputs of a graph that passed, in its order."""

    inputs: dict[str, Value]
    outputs: dict[str, Value]


def check_graph(data: bytes) -> GraphFacts:
    """Read a serialised ONNX model.

    Raises:
        WireError: it is damaged, or has something that a graph of ours does not have.
    """
    graphs = [_sub(value) for number, value in _fields(data, _MODEL, "the model") if _opset_checked(number, value)]
    if len(graphs) != 1:
        raise WireError("an ONNX model needs one graph")
    inputs: dict[str, Value] = {}
    outputs: dict[str, Value] = {}
    constants: set[str] = set()
    nodes = 0
    for number, value in _fields(graphs[0], _GRAPH, "the graph"):
        if number == 1:
            nodes += 1
            _check_node(_sub(value))
        elif number == 5:
            constants.add(_check_tensor(_sub(value)))
        elif number in (11, 12):
            name, found = _value(_sub(value))
            side = inputs if number == 11 else outputs
            if name in side:
                raise WireError("an ONNX graph names an input or output twice")
            side[name] = found
    if nodes > MAX_NODES or not outputs:
        raise WireError(f"an ONNX graph of {nodes} nodes and {len(outputs)} outputs")
    if constants & inputs.keys():
        raise WireError("an ONNX graph has a constant in place of an input")
    return GraphFacts(inputs, outputs)


def _opset_checked(number: int, value: int | bytes) -> bool:
    """Whether a field of the model is its graph; operator sets are checked."""
    if number == 8:
        for inner, text in _fields(_sub(value), _OPSET, "an operator set"):
            if inner == 1:
                _check_domain(text)
    return number == 7


def _check_node(data: bytes) -> None:
    for number, value in _fields(data, _NODE, "a node"):
        if number == 4 and _text(value) in CONTROL_FLOW:
            raise WireError(f"an ONNX graph with control flow ({_text(value)})")
        if number == 7:
            _check_domain(value)
        if number == 5:
            for inner, attribute in _fields(_sub(value), _ATTRIBUTE, "an attribute"):
                if inner == 5:
                    _check_tensor(_sub(attribute))


def _check_tensor(data: bytes) -> str:
    """-> its name."""
    name, dtype, raw, listed = "", 0, -1, 0
    shape: list[int] = []
    for number, value in _fields(data, _TENSOR, "a tensor"):
        if number == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = len(_sub(value))
        elif number in (4, 5, 7, 10, 11):
            listed += len(value) if isinstance(value, bytes) else 10
    if dtype not in ITEM_BYTES or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"an ONNX graph with a constant of type {dtype} and {len(shape)} dimensions")
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if num_bytes > MAX_CONSTANT_BYTES or max(shape, default=0) > MAX_CONSTANT_BYTES:
        raise WireError(f"an ONNX graph with a constant of {num_bytes} bytes, allowed are {MAX_CONSTANT_BYTES}")
    if raw not in (-1, num_bytes) or listed > 10 * num_bytes or (raw >= 0 and listed):
        raise WireError("an ONNX graph with a constant whose bytes do not match its shape")
    return name


def _value(data: bytes) -> tuple[str, Value]:
    name, found = "", None
    for number, value in _fields(data, _VALUE, "an input or output"):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for _, tensor in _fields(_sub(value), _TYPE, "a type"):
                found = _tensor_type(_sub(tensor))
    if not name or found is None:
        raise WireError("an ONNX graph with an input or output without name or type")
    return name, found


def _tensor_type(data: bytes) -> Value:
    dtype = 0
    shape: list[int | None] = []
    for number, value in _fields(data, _TENSOR_TYPE, "a tensor's type"):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2:
            for _, dimension in _fields(_sub(value), _SHAPE, "a shape"):
                sizes = [v for n, v in _fields(_sub(dimension), _DIMENSION, "a dimension") if n == 1]
                shape.append(sizes[0] if sizes and isinstance(sizes[0], int) else None)
    if dtype not in ITEM_BYTES or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"an ONNX graph with an input or output of type {dtype} and {len(shape)} dimensions")
    return Value(dtype, tuple(shape))


def _check_domain(value: int | bytes) -> None:
    if (domain := _text(value)) not in DOMAINS:
        raise WireError(f"an ONNX graph with operators of {domain[:60]!r}, allowed are ONNX's and com.microsoft")


# protobuf


def _fields(data: bytes, allowed: dict[int, bool], where: str) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: numbers as int, texts, bytes and messages as bytes."""
    position, seen, texts = 0, set(), _TEXTS.get(where, ())
    while position < len(data):
        tag, position = varint(data, position)
        number, kind = tag >> 3, tag & 7
        if number not in allowed:
            raise WireError(f"an ONNX graph with field {number} in {where}, which no graph of ours has")
        if number in seen and not allowed[number]:
            raise WireError(f"an ONNX graph with field {number} of {where} twice")
        seen.add(number)
        if kind == _VARINT:
            value, position = varint(data, position)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise WireError("an ONNX graph that is no protobuf message")
        if length > len(data) - position:
            raise WireError("an ONNX graph that is cut off")
        content = data[position : position + length]
        if number in texts:
            _text(content)
        yield number, content
        position += length


def varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of a protobuf message; -> (number, where the next byte lies)."""
    number = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise WireError("an ONNX graph that is no protobuf message, or is cut off")
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7


def _varints(data: bytes) -> list[int]:
    numbers, position = [], 0
    while position < len(data):
        number, position = varint(data, position)
        numbers.append(number)
        if len(numbers) > MAX_DIMENSIONS:
            raise WireError("an ONNX graph with a constant of too many dimensions")
    return numbers


def _sub(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise WireError("an ONNX graph with a number in place of a message")
    return value


def _text(value: int | bytes) -> str:
    data = _sub(value)
    if len(data) > _TEXT_BYTES:
        raise WireError(f"an ONNX graph with a name of {len(data)} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WireError("an ONNX graph with a name that is not UTF-8") from None
