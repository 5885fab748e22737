"""A model's whole network as one ONNX file, put together from the forward graphs of its set: no torch, no onnx package.

The graphs of the embedding, of each block and of the head become one graph, the weights its constants. In int8 the blocks'
linear layers are the int8 graphs (`quantize.py` says how they compute), and tables that are only looked up by row keep their
rows as 8 bits with one scale each. Not the checks of what is written (`export.py`). Imports numpy, the bundle, the graphs'
check and the weights.

Memory: one tensor at a time for float32; of int8 all quantised weights (a quarter of the model).

The format: https://protobuf.dev/programming-guides/encoding/, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any

import numpy as np

from edge_runtime.errors import ModelError
from edge_runtime.graphs.bundle import (
    EMBED_GRAPH,
    FORWARD,
    FORWARD_INT8,
    HEAD_FORWARD,
    QUANTIZED,
    SCALE,
    GraphSet,
    block_graphs,
    part_tensors,
    relative_names,
)
from edge_runtime.graphs.check import check_graph, varint
from edge_runtime.graphs.quantized import quantize, quantize_rows
from edge_runtime.model import EMBED, ModelSpec
from edge_runtime.weights import MappedTensor

Array = np.ndarray[Any, np.dtype[Any]]

OPSET, CONTRIB = 20, "com.microsoft"
IR_VERSION = 9
MAX_FILE_BYTES = (1 << 31) - 1  # a protobuf message ends here
IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
FLOAT, INT64 = 1, 7  # TensorProto.DataType
DTYPES = {"float32": FLOAT, "int8": 3}
TRANSPOSED = ":t"


@dataclass(frozen=True)
class Node:
    """One operation; `attributes` are its encoded fields."""

    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""
    attributes: bytes = b""


@dataclass(frozen=True)
class Constant:
    """A tensor of the file, which `load` gives when it is written: float32 or int8."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


@dataclass
class Network:
    """A graph that is being put together.

    Attributes:
        nodes: in an order in which they can run.
        constants: weights by name.
        small: the graphs' own constants by name, as encoded fields without the name.
    """

    labels: int
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)


def compose(
    graph_set: GraphSet, spec: ModelSpec, weights: Mapping[str, MappedTensor], *, is_int8: bool = False
) -> Network:
    """The network of a model from graphs that fit it.

    Raises:
        ModelError: the set lacks a graph, or a graph or the weights cannot be used.
    """
    network = Network(len(spec.labels))
    tensors = {t.name: weights[t.name] for t in spec.tensors}
    plain = {name: name for name in tensors}
    embed = {t.name: t.name for t in part_tensors(spec, EMBED)}
    _add(network, graph_set, EMBED_GRAPH, "embed/", {"ids": IDS, "mask": MASK, "hidden": "hidden/0"} | embed)
    for part, name in enumerate(block_graphs(spec)):
        names = {"hidden": f"hidden/{part}", "out": f"hidden/{part + 1}", "bias": "embed/bias"}
        for relative, tensor in zip(relative_names(spec, part), part_tensors(spec, part), strict=True):
            names |= {relative + suffix: tensor.name + suffix for suffix in ("", QUANTIZED, SCALE)}
        _add(network, graph_set, name + (FORWARD_INT8 if is_int8 else FORWARD), f"{part}/", names)
    _add(
        network,
        graph_set,
        HEAD_FORWARD,
        "head/",
        {"hidden": f"hidden/{spec.num_blocks}", "mask": MASK, "logits": LOGITS} | plain,
    )
    if is_int8:
        for table in graph_set.row_tables:
            _quantize_rows(network, table, tensors[table])
    _drop_unused(network)
    _bind(network, tensors)
    return network


def write_onnx(network: Network, metadata: Mapping[str, str], file: IO[bytes]) -> None:
    """Write the file as protobuf, one tensor in memory at a time.

    Inputs: input_ids and attention_mask, int64 (batch, sequence). Output: logits, float32 (batch, labels).

    Raises:
        ModelError: it would be 2 GiB or more.
    """
    graph = b"".join(_bytes(1, _encoded(node)) for node in network.nodes) + _bytes(2, b"g")
    graph += b"".join(_bytes(5, fields + _bytes(8, name.encode())) for name, fields in network.small.items())
    graph += b"".join(_bytes(11, _value(name, INT64, ("batch", "sequence"))) for name in (IDS, MASK))
    graph += _bytes(12, _value(LOGITS, FLOAT, ("batch", network.labels)))
    domains = sorted({node.domain for node in network.nodes} | {""})
    head = _number(1, IR_VERSION) + _bytes(2, b"edge-runtime")
    head += b"".join(_bytes(8, _bytes(1, d.encode()) + _number(2, 1 if d else OPSET)) for d in domains)
    for key, value in metadata.items():
        head += _bytes(14, _bytes(1, key.encode()) + _bytes(2, value.encode()))
    starts = []  # of each constant, up to its raw bytes
    sizes = [int(np.prod(c.shape)) * np.dtype(c.dtype).itemsize for c in network.constants.values()]
    for (name, constant), size in zip(network.constants.items(), sizes, strict=True):
        start = b"".join(_number(1, n) for n in constant.shape) + _number(2, DTYPES[constant.dtype])
        start += _bytes(8, name.encode()) + tag(9, size)
        starts.append(tag(5, len(start) + size) + start)
    graph_bytes = len(graph) + sum(map(len, starts)) + sum(sizes)
    if len(head) + graph_bytes > MAX_FILE_BYTES - 16:
        raise ModelError(f"the model needs {graph_bytes} bytes, an ONNX file holds 2 GiB: choose a smaller model")
    file.write(head + tag(7, graph_bytes) + graph)
    for start, constant in zip(starts, network.constants.values(), strict=True):
        file.write(start)
        file.write(np.ascontiguousarray(constant.load(), np.dtype(constant.dtype).newbyteorder("<")).data)


# one graph of the set


def _add(network: Network, graph_set: GraphSet, name: str, prefix: str, names: Mapping[str, str]) -> None:
    """Append a graph. Its inputs and outputs become `names`, everything else gets the prefix."""
    data = graph_set.graphs.get(name)
    if data is None:
        raise ModelError(f"the model's graph set has no graph {name!r}: derive it again with this version")
    check_graph(data)
    called = {"": ""} | dict(names)
    (graph,) = (content for number, content, _ in _fields(data) if number == 7)
    for number, value, _ in _fields(graph):
        if number == 1:
            node = _decoded(value)
            new = {v: called.get(v, prefix + v) for v in (*node.inputs, *node.outputs)}
            network.nodes.append(_renamed(node, new))
        elif number == 5:
            (own,) = (content.decode() for n, content, _ in _fields(value) if n == 8)
            network.small[prefix + own] = b"".join(raw for n, _, raw in _fields(value) if n != 8)


def _decoded(data: bytes) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: [], 7: []}
    attributes = b""
    for number, content, raw in _fields(data):
        if number in texts:
            texts[number].append(content.decode())
        elif number == 5:
            attributes += raw
    return Node("".join(texts[4]), tuple(texts[1]), tuple(texts[2]), "".join(texts[7]), attributes)


def _encoded(node: Node) -> bytes:
    fields = [(1, name) for name in node.inputs] + [(2, name) for name in node.outputs]
    fields += [(4, node.operation)] + [(7, node.domain)] * bool(node.domain)
    return b"".join(_bytes(number, text.encode()) for number, text in fields) + node.attributes


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    inputs, outputs = (tuple(names.get(v, v) for v in values) for values in (node.inputs, node.outputs))
    return replace(node, inputs=inputs, outputs=outputs)


# the whole


def _drop_unused(network: Network) -> None:
    """Leave out the nodes and the outputs that nothing needs, such as what a normalisation keeps for its gradient."""
    wanted, kept = {LOGITS}, []
    for node in reversed(network.nodes):
        if not wanted.isdisjoint(node.outputs):
            outputs = list(node.outputs)
            while outputs[-1] not in wanted:
                outputs.pop()
            kept.append(replace(node, outputs=tuple(outputs)))
            wanted.update(node.inputs)
    network.nodes = kept[::-1]
    network.small = {name: fields for name, fields in network.small.items() if name in wanted}
    network.constants = {name: found for name, found in network.constants.items() if name in wanted}


def _bind(network: Network, tensors: Mapping[str, MappedTensor]) -> None:
    """Make the weights constants. A matrix that is only transposed is written transposed, which saves it at each load."""
    turned = {
        node.outputs[0]: node.inputs[0]
        for node in network.nodes
        if node.operation == "Transpose"
        and len(tensors[node.inputs[0]].shape if node.inputs[0] in tensors else ()) == 2
    }
    nodes = [node for node in network.nodes if node.outputs[0] not in turned]
    network.nodes = [_renamed(node, {value: name + TRANSPOSED for value, name in turned.items()}) for node in nodes]
    for name in dict.fromkeys(v for node in network.nodes for v in node.inputs):
        base, is_turned = name.removesuffix(TRANSPOSED), name.endswith(TRANSPOSED)
        if base in tensors:
            found = tensors[base]
            load = (lambda tensor=found: tensor.array().T) if is_turned else found.array
            network.constants[name] = Constant("float32", found.shape[::-1] if is_turned else found.shape, load)
        elif name.endswith(QUANTIZED) and (base := name.removesuffix(QUANTIZED)) in tensors:
            for array, suffix in zip(quantize(tensors[base]), (QUANTIZED, SCALE), strict=True):
                network.constants[base + suffix] = _held(array)


def _held(array: Array) -> Constant:
    return Constant(array.dtype.name, array.shape, lambda: array)


def _quantize_rows(network: Network, table: str, tensor: MappedTensor) -> None:
    """Look rows up as int8 and multiply each with its scale."""
    users = [node for node in network.nodes if table in node.inputs]
    if [node.operation for node in users] != ["Gather"] or users[0].inputs[0] != table:
        return
    values, scales = quantize_rows(tensor)
    rows, scale = table + ":rows", table + ":scales"
    network.constants |= {rows: _held(values), scale: _held(scales)}
    (user,) = users
    index, out = user.inputs[1], user.outputs[0]
    to_float = _bytes(5, _bytes(1, b"to") + _number(3, FLOAT) + _number(20, 2))  # 20: the attribute's type, 2: INT
    place = network.nodes.index(user)
    network.nodes[place : place + 1] = [
        replace(user, inputs=(rows, index), outputs=(out + ":q",)),
        Node("Cast", (out + ":q",), (out + ":f",), attributes=to_float),
        replace(user, inputs=(scale, index), outputs=(out + ":s",)),
        Node("Mul", (out + ":f", out + ":s"), (out,)),
    ]


def _value(name: str, dtype: int, shape: tuple[str | int, ...]) -> bytes:
    """ValueInfoProto of a tensor."""
    dims = (_number(1, d) if isinstance(d, int) else _bytes(2, d.encode()) for d in shape)
    tensor = _number(1, dtype) + _bytes(2, b"".join(_bytes(1, dim) for dim in dims))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))


# protobuf; what is read was checked by `check_graph`


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The fields of a message: number, content (of texts, bytes and messages), and the whole field as it stands."""
    position = 0
    while position < len(data):
        start = position
        tag, position = varint(data, position)
        content = b""
        if tag & 7 == 0:
            _, position = varint(data, position)
        elif tag & 7 == 2:
            length, position = varint(data, position)
            content = data[position : position + length]
            position += length
        else:
            position += 4 if tag & 7 == 5 else 8
        yield tag >> 3, content, data[start:position]


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return tag(number, len(value)) + value


def tag(number: int, length: int) -> bytes:
    """What stands before a field of `length` bytes."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
