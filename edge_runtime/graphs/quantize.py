"""A block's forward graph with int8 weights: for frozen blocks, whose weights then take a quarter of the bytes.

Each linear layer's weight W (out, in) becomes two inputs, "W:q" (in, out) int8 from -64 to 64 and "W:scale" (out,); the
layer's input is quantised as it comes, symmetrically to 8 bits, with one scale for each token, and the product is exact
integer arithmetic. A scale of a token's own keeps an example's result apart from what else is in its batch. Not here:
quantising weights, which devices do (`quantized.py`). Needs the onnx package, never on a device.

Why 7 bits: x86 without VNNI multiplies u8 by s8 with vpmaddubsw, which saturates the sum of two products at 2^15 - 1;
255 * 64 * 2 = 32640 never does, so every CPU gives the same integers (by arithmetic: run on AVX2 alone). Measured with
onnxruntime 1.31.1 on one Zen 3 core (AVX2, no VNNI, so s8 saturates): 4 blocks of MiniLM-L6 at 16 x 128, and the lowest
and mean cosine similarity with float32 over the tokens of 512 TREC questions:

    float32                                           573 ms
    one scale a batch, s7 (DynamicQuantizeMatMul)     325 ms  0.9777 0.9929
    one scale a batch, u8                             402 ms  0.9716 0.9936
    one scale a token, s7: this                       364 ms  0.9937 0.9980
    one scale a token, s8 (saturates)                 341 ms  0.9919 0.9980
    one scale a token, u8                             430 ms  0.9964 0.9987
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edge_runtime.graphs.bundle import QUANTIZED, SCALE

CONTRIB = "com.microsoft"  # onnxruntime's own operations, in every wheel
LARGEST, ZERO_POINT = 127, 128  # a token's values become 1 to 255
Shape = tuple[int | str, int | str]
LEAST = 1e-8  # stands for a token's largest value where that is smaller, so that nothing is divided by 0
CONSTANTS: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
    "int8:last": np.array([-1], np.int64),
    "int8:least": np.array([LEAST], np.float32),
    "int8:step": np.array([1 / LARGEST], np.float32),
    "int8:zero": np.array(ZERO_POINT, np.uint8),
    "int8:one": np.array(1, np.float32),
}


def int8_forward(forward: onnx.ModelProto) -> onnx.ModelProto:
    """The same block with quantised linear layers; the other inputs keep their names and order.

    A linear layer is a product with the transpose of a 2-D float input, as torch's export writes it. A weight that
    also serves something else stays as it is.
    """
    graph = forward.graph
    shapes = _matrices(graph)
    transposed = _transposed(graph, shapes)
    layers = _products(graph, shapes, transposed)
    weights = set(layers.values())
    nodes = _Nodes()
    for number, node in enumerate(graph.node):
        if number in layers:
            nodes.linear(node, layers[number])
        elif transposed.get(node.output[0]) not in weights:
            nodes.list.append(node)
    inputs: list[ValueInfoProto] = []
    for value in graph.input:
        inputs += _quantized_inputs(value.name, shapes[value.name]) if value.name in weights else [value]
    result = onnx.ModelProto()
    result.CopyFrom(forward)
    del result.graph.node[:], result.graph.input[:]
    result.graph.node.extend(nodes.list)
    result.graph.input.extend(inputs)
    if weights:
        result.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in CONSTANTS.items())
        if CONTRIB not in {o.domain for o in result.opset_import}:
            result.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return result


# which layers


def _matrices(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Inputs that may be a linear layer's weight -> (out, in)."""
    found = {}
    for value in graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or d.dim_param for d in kind.shape.dim]  # a symbol where pruning makes it smaller
        if kind.elem_type == TensorProto.FLOAT and len(shape) == 2 and all(shape):
            found[value.name] = (shape[0], shape[1])
    return found


def _transposed(graph: onnx.GraphProto, matrices: dict[str, Shape]) -> dict[str, str]:
    """Values that are a matrix's transpose -> the matrix."""
    return {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in matrices and _attributes(node).get("perm") != [0, 1]
    }


def _products(graph: onnx.GraphProto, matrices: dict[str, Shape], transposed: dict[str, str]) -> dict[int, str]:
    """Numbers of the nodes that are x W^T (+ bias) -> W, for every W that serves nothing else."""
    matrix = {**{name: name for name in matrices}, **transposed}
    found = {}
    spoiled = {matrix[o.name] for o in graph.output if o.name in matrix}
    for number, node in enumerate(graph.node):
        if node.output[0] in transposed:
            continue
        weight = _weight(node, matrices, transposed)
        if weight:
            found[number] = weight
        others = [name for place, name in enumerate(node.input) if place != 1 or not weight]
        spoiled |= {matrix[name] for name in others if name in matrix}
    return {number: weight for number, weight in found.items() if weight not in spoiled}


def _weight(node: NodeProto, matrices: dict[str, Shape], transposed: dict[str, str]) -> str | None:
    """W where a node is x W^T (+ bias)."""
    if node.op_type == "MatMul":
        return transposed.get(node.input[1])
    if node.op_type == "Gemm":
        given = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | _attributes(node)
        if (given["alpha"], given["beta"], given["transA"]) == (1.0, 1.0, 0):
            name = node.input[1]
            return transposed.get(name) if not given["transB"] else name if name in matrices else None
    return None


def _attributes(node: NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _quantized_inputs(weight: str, shape: Shape) -> list[ValueInfoProto]:
    width, inputs = shape
    return [
        helper.make_tensor_value_info(weight + QUANTIZED, TensorProto.INT8, [inputs, width]),
        helper.make_tensor_value_info(weight + SCALE, TensorProto.FLOAT, [width]),
    ]


# what they become


class _Nodes:
    """The new graph's nodes. A value that several layers read is quantised once."""

    def __init__(self) -> None:
        self.list: list[NodeProto] = []
        self._quantized: dict[tuple[str, bool], tuple[str, str]] = {}
        self._count = 0

    def linear(self, node: NodeProto, weight: str) -> None:
        """x W^T (+ bias) = token's scale * ((q - 128) W:q) * W:scale (+ bias)."""
        x, y, bias = node.input[0], node.output[0], [*node.input[2:]]
        flat = node.op_type == "Gemm"  # else x may have more dimensions than (tokens, in)
        if (x, flat) not in self._quantized:
            self._quantized[x, flat] = self._quantize(x if flat else self._add("Flatten", x, axis=-1))
        values, scales = self._quantized[x, flat]
        factors = [values, weight + QUANTIZED, "int8:one", weight + SCALE, "int8:zero"]
        product = self._add("MatMulIntegerToFloat", *factors, domain=CONTRIB)  # (tokens, out)
        product = self._add("Mul", product, scales, output=y if flat and not bias else "")
        if bias:
            self._add("Add", product, *bias, output=y)
        elif not flat:
            shape = self._add("Concat", self._add("Shape", x, end=-1), self._add("Shape", weight + SCALE), axis=0)
            self._add("Reshape", product, shape, output=y)

    def _quantize(self, x: str) -> tuple[str, str]:
        """x (tokens, in) -> (tokens, in) uint8 and the tokens' scales (tokens, 1)."""
        high = self._add("ReduceMax", x, "int8:last", keepdims=0)
        low = self._add("ReduceMin", x, "int8:last", keepdims=0)
        largest = self._add("Max", high, self._add("Neg", low), "int8:least")  # twice as fast as the largest of |x|
        scale = self._add("Mul", largest, "int8:step")  # (tokens,)
        zero = self._add("Expand", "int8:zero", self._add("Shape", scale))
        values = self._add("QuantizeLinear", x, scale, zero, axis=0)
        return values, self._add("Unsqueeze", scale, "int8:last")

    def _add(self, operation: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        """One more node; -> its output, which gets a name if it has none."""
        self._count += 1
        name = output or f"int8:{self._count}"
        self.list.append(helper.make_node(operation, inputs, [name], domain=domain, **attributes))
        return name
