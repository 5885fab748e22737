"""Int8 forward graphs: near the float32 ones, exact integers on every CPU, the same result in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from edge_runtime.graphs.check import check_graph
from edge_runtime.graphs.partition import operations, trim
from edge_runtime.graphs.quantize import int8_forward
from edge_runtime.graphs.quantized import LEVELS
from edge_runtime.graphs.session import Graph

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, WIDE = 32, 48
TENSORS = {"up.weight": (WIDE, WIDTH), "up.bias": (WIDE,), "down.weight": (WIDTH, WIDE)}
FLAT = [  # as torch exports linear layers with a bias
    helper.make_node("Reshape", ["hidden", "flat"], ["x"]),
    helper.make_node("Transpose", ["up.weight"], ["up"], perm=[1, 0]),
    helper.make_node("Gemm", ["x", "up", "up.bias"], ["h"]),
    helper.make_node("Relu", ["h"], ["r"]),
    helper.make_node("Gemm", ["r", "down.weight"], ["d"], transB=1),
    helper.make_node("Shape", ["hidden"], ["shape"]),
    helper.make_node("Reshape", ["d", "shape"], ["out"]),
]
DEEP = [  # and without
    helper.make_node("Transpose", ["up.weight"], ["up"], perm=[1, 0]),
    helper.make_node("MatMul", ["hidden", "up"], ["m"]),
    helper.make_node("Add", ["m", "up.bias"], ["h"]),
    helper.make_node("Relu", ["h"], ["r"]),
    helper.make_node("Transpose", ["down.weight"], ["down"], perm=[1, 0]),
    helper.make_node("MatMul", ["r", "down"], ["out"]),
]


def block(nodes: list[NodeProto]) -> onnx.ModelProto:
    """A model of hidden (batch, seq, width) and TENSORS."""
    inputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "seq", WIDTH])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in TENSORS.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "seq", WIDTH])
    flat = helper.make_tensor("flat", TensorProto.INT64, [2], [-1, WIDTH])
    graph = helper.make_graph(nodes, "block", inputs, [output], [flat])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    """The graph's output in onnxruntime."""
    return Graph("block", trim(model), 1).run(feeds)["out"]


def tensors(seed: int = 0) -> dict[str, Array]:
    """Values for TENSORS."""
    random = np.random.default_rng(seed)
    return {n: (random.standard_normal(s) / WIDTH**0.5).astype(np.float32) for n, s in TENSORS.items()}


def quantized(values: dict[str, Array]) -> dict[str, Array]:
    """The same for an int8 graph, the float32 matrices left out."""
    feeds = {n: v for n, v in values.items() if v.ndim != 2}
    for name, weight in values.items():
        if weight.ndim == 2:
            scale = abs(weight).max(axis=1) / LEVELS
            feeds[f"{name}:q"] = np.ascontiguousarray(np.rint(weight / scale[:, None]).astype(np.int8).T)
            feeds[f"{name}:scale"] = scale
    return feeds


def hidden(batch: int, seq: int) -> Array:
    """Hidden states of tokens that differ in size."""
    random = np.random.default_rng(1)
    values = random.standard_normal((batch, seq, WIDTH)) * random.uniform(0.01, 50, (batch, seq, 1))
    return values.astype(np.float32)


@pytest.mark.parametrize("nodes", [FLAT, DEEP], ids=["Gemm", "MatMul"])
def test_it_is_near_the_float32_graph_for_every_token(nodes: list[NodeProto]) -> None:
    model, x, values = block(nodes), hidden(3, 5), tensors()
    expected = run(model, {"hidden": x, **values})
    found = run(int8_forward(model), {"hidden": x, **quantized(values)})
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 0.03


@pytest.mark.parametrize("nodes", [FLAT, DEEP], ids=["Gemm", "MatMul"])
def test_it_computes_what_the_quantised_numbers_say(nodes: list[NodeProto]) -> None:
    def linear(x: Array, name: str) -> Array:
        scale = (abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127)).astype(np.float32)
        integers = np.rint(x / scale).astype(np.int64) @ feeds[f"{name}.weight:q"].astype(np.int64)
        out: Array = integers * scale * feeds[f"{name}.weight:scale"]
        return out

    feeds, x = quantized(tensors()), hidden(2, 4)
    h = linear(x, "up") + feeds["up.bias"]
    expected = linear(np.maximum(h, 0).astype(np.float32), "down")
    found = run(int8_forward(block(nodes)), {"hidden": x, **feeds})
    assert abs(found - expected).max() < 1e-2 * abs(expected).max()  # a value between two integers may go either way
    assert np.median(abs(found - expected) / abs(expected)) < 1e-5


def test_the_largest_products_do_not_saturate() -> None:
    values = {n: np.ones(s, np.float32) for n, s in TENSORS.items()}
    values["up.bias"][:] = 0
    for sign in (1, -1):
        values["up.weight"] = np.full(TENSORS["up.weight"], sign, np.float32)
        x = np.full((1, 2, WIDTH), sign, np.float32)
        assert np.allclose(run(int8_forward(block(FLAT)), {"hidden": x, **quantized(values)}), WIDTH * WIDE)


def test_a_token_of_zeros_gives_the_bias_alone() -> None:
    feeds = quantized(tensors())
    x = hidden(1, 3)
    x[0, 1] = 0
    found = run(int8_forward(block(FLAT)), {"hidden": x, **feeds})
    again = run(int8_forward(block(FLAT)), {"hidden": np.zeros((1, 1, WIDTH), np.float32), **feeds})
    assert np.isfinite(found).all()
    assert (found[0, 1] == again[0, 0]).all()


@pytest.mark.parametrize("nodes", [FLAT, DEEP], ids=["Gemm", "MatMul"])
def test_an_example_gives_the_same_in_any_batch(nodes: list[NodeProto]) -> None:
    feeds, x = quantized(tensors()), hidden(4, 6)
    graph = Graph("block", trim(int8_forward(block(nodes))), 1)
    together = graph.run({"hidden": x, **feeds})["out"]
    for row in range(4):
        alone = graph.run({"hidden": x[row : row + 1, :3].copy(), **feeds})["out"]
        assert (alone[0] == together[row, :3]).all()


def test_inputs_take_the_weights_places_and_the_rest_keep_theirs() -> None:
    found = check_graph(trim(int8_forward(block(FLAT)))).inputs
    assert list(found) == ["hidden", "up.weight:q", "up.weight:scale", "up.bias", "down.weight:q", "down.weight:scale"]
    assert found["up.weight:q"].shape == (WIDTH, WIDE)
    assert found["up.weight:scale"].shape == (WIDE,)


def test_a_value_that_several_layers_read_is_quantised_once() -> None:
    nodes = [
        helper.make_node("Reshape", ["hidden", "flat"], ["x"]),
        helper.make_node("Gemm", ["x", "up.weight", "up.bias"], ["a"], transB=1),
        helper.make_node("Gemm", ["x", "up.weight"], ["b"], transB=1),
        helper.make_node("Add", ["a", "b"], ["h"]),
        helper.make_node("Gemm", ["h", "down.weight"], ["d"], transB=1),
        helper.make_node("Shape", ["hidden"], ["shape"]),
        helper.make_node("Reshape", ["d", "shape"], ["out"]),
    ]
    model, x, values = block(nodes), hidden(2, 3), tensors()
    small = int8_forward(model)
    counts = operations(trim(small))
    assert (counts["QuantizeLinear"], counts["MatMulIntegerToFloat"], counts["Gemm"]) == (2, 3, 0)
    expected = run(model, {"hidden": x, **values})
    found = run(small, {"hidden": x, **quantized(values)})
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "extra",
    [
        helper.make_node("Add", ["up.weight", "up.weight"], ["other"]),
        helper.make_node("Neg", ["up"], ["other"]),
        helper.make_node("MatMul", ["up.weight", "up"], ["other"]),
        helper.make_node("Gemm", ["x", "up"], ["other"], alpha=2.0),
        helper.make_node("Gemm", ["x", "down", "up.weight"], ["other"]),
    ],
    ids=["matrix", "transpose", "left operand", "scaled product", "as a bias"],
)
def test_a_weight_that_also_serves_something_else_stays_float32(extra: NodeProto) -> None:
    model = block([*FLAT[:3], helper.make_node("Transpose", ["down.weight"], ["down"]), extra, *FLAT[3:]])
    small = int8_forward(model)
    names = {i.name for i in small.graph.input}
    assert "up.weight" in names
    assert "down.weight:q" in names
    weight = next(n for n in small.graph.node if n.op_type == "Gemm" and n.output[0] == "h")
    assert list(weight.input) == ["x", "up", "up.bias"]


def test_a_matrix_that_is_multiplied_as_it_is_is_no_linear_layer() -> None:
    nodes = [
        helper.make_node("MatMul", ["hidden", "down.weight"], ["m"]),  # (in, out), not torch's way
        helper.make_node("Identity", ["m"], ["out"]),
    ]
    model = block(nodes)
    assert int8_forward(model) == model


def test_the_given_model_stays_as_it_is() -> None:
    model = block(FLAT)
    before = model.SerializeToString(deterministic=True)
    int8_forward(model)
    assert model.SerializeToString(deterministic=True) == before
