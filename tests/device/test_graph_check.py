"""Hostile graph sets and ONNX graphs: refused before onnxruntime sees them, and never the end of the process."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from edge_models import bert
from edge_runtime.errors import ModelError, WireError
from edge_runtime.graphs import bundle
from edge_runtime.graphs.bundle import GraphSet, decode_graphs, encode_graphs
from edge_runtime.graphs.check import MAX_CONSTANT_BYTES, check_graph
from edge_runtime.graphs.session import Graph, Graphs
from edge_runtime.wire import pack
from tests.samples import quickly

FOLDER = Path(bert.__file__).parent / "graphs"
FILE = (FOLDER / "bert-128-2-512.graphs").read_bytes()
SET = decode_graphs(FILE)
NAMES = sorted(SET.graphs)


def model(*nodes: onnx.NodeProto, constants: tuple[TensorProto, ...] = (), **more: Any) -> ModelProto:
    """x (2,) -> y (2,)."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph(nodes or [helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, **more)


def plain(proto: ModelProto) -> bytes:
    proto.producer_name = ""
    data: bytes = proto.SerializeToString()
    return data


def external(proto: ModelProto) -> None:
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [2], [0, 0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    proto.graph.initializer.append(tensor)


def external_without_location(proto: ModelProto) -> None:
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [2], [0, 0])
    tensor.external_data.add(key="location", value="/etc/passwd")
    proto.graph.initializer.append(tensor)


def external_in_an_attribute(proto: ModelProto) -> None:
    tensor = TensorProto(dims=[2], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def branch() -> onnx.GraphProto:
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [2])
    return helper.make_graph([helper.make_node("Neg", ["x"], ["o"])], "b", [], [out])


def subgraph(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("If", ["x"], ["o"], then_branch=branch(), else_branch=branch()))


def subgraph_of_another_operation(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Neg", ["x"], ["o"], body=branch()))


def loop_without_body(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Loop", ["x"], ["o"]))


def function(proto: ModelProto) -> None:
    opset = [helper.make_opsetid("", 20)]
    proto.functions.append(helper.make_function("f", "F", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], opset))


def strange_domain(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Neg", ["x"], ["o"], domain="ai.strange"))


def strange_operators(proto: ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))


def large_constant(proto: ModelProto) -> None:
    values = np.zeros(MAX_CONSTANT_BYTES // 4 + 1, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "c"))


def constant_of_a_promised_size(proto: ModelProto) -> None:
    proto.graph.initializer.append(TensorProto(name="c", dims=[1 << 32, 1 << 32], data_type=1))


def constant_of_negative_size(proto: ModelProto) -> None:
    proto.graph.initializer.append(TensorProto(name="c", dims=[-1], data_type=1))


def constant_cut_off(proto: ModelProto) -> None:
    proto.graph.initializer.append(TensorProto(name="c", dims=[4], data_type=1, raw_data=bytes(12)))


def constant_of_texts(proto: ModelProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("c", TensorProto.STRING, [1], [b"a"]))


def constant_for_an_input(proto: ModelProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("x", TensorProto.FLOAT, [2], [0, 0]))


def sparse_constant(proto: ModelProto) -> None:
    proto.graph.sparse_initializer.add().dims.append(2)


def metadata(proto: ModelProto) -> None:
    proto.metadata_props.add(key="k", value="v")


def sequence_input(proto: ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2]))


def input_twice(proto: ModelProto) -> None:
    proto.graph.input.append(proto.graph.input[0])


def no_output(proto: ModelProto) -> None:
    del proto.graph.output[:]


def many_dimensions(proto: ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, [1] * 40))


def long_name(proto: ModelProto) -> None:
    proto.graph.node[0].op_type = "N" * 5000


def too_many_nodes(proto: ModelProto) -> None:
    proto.graph.node.extend(helper.make_node("Neg", ["x"], [f"n{i}"]) for i in range(17_000))


HOSTILE: list[Callable[[ModelProto], None]] = [
    external,
    external_without_location,
    external_in_an_attribute,
    subgraph,
    subgraph_of_another_operation,
    loop_without_body,
    function,
    strange_domain,
    strange_operators,
    large_constant,
    constant_of_a_promised_size,
    constant_of_negative_size,
    constant_cut_off,
    constant_of_texts,
    constant_for_an_input,
    sparse_constant,
    metadata,
    sequence_input,
    input_twice,
    no_output,
    many_dimensions,
    long_name,
    too_many_nodes,
]


def test_a_plain_graph_passes_and_runs() -> None:
    data = plain(model())
    facts = check_graph(data)
    assert {n: (v.dtype, v.shape) for n, v in {**facts.inputs, **facts.outputs}.items()} == {
        "x": (1, (2,)),
        "y": (1, (2,)),
    }
    found = Graph("g", data, 1).run({"x": np.array([1, -2], np.float32)})
    assert found["y"].tolist() == [-1, 2]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__.replace("_", "-"))
def test_a_graph_with_what_no_graph_of_ours_has_is_refused(change: Callable[[ModelProto], None]) -> None:
    proto = model()
    change(proto)
    data = plain(proto)
    with pytest.raises(WireError, match="ONNX"):
        check_graph(data)
    with pytest.raises(ModelError, match="'g' is refused"):
        Graph("g", data, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x3a",
        b"\x3a\x05ab",
        b"\x3b",
        b"\xff" * 12,
        b"\x3a\x00\x3a\x00",
        b"\x38\x01",
        b"\x3a\xff\xff\xff\xff\xff\x7f",
    ],
    ids=["empty", "no-length", "cut", "group", "long-tag", "two-graphs", "number-for-a-graph", "length-beyond-reason"],
)
def test_bytes_that_are_no_graph_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        check_graph(data)


def test_every_shipped_graph_passes_and_is_read_as_onnx_reads_it() -> None:
    for path in FOLDER.iterdir():
        for data in decode_graphs(path.read_bytes()).graphs.values():
            facts, graph = check_graph(data), onnx.load_from_string(data).graph
            for found, wanted in ((facts.inputs, graph.input), (facts.outputs, graph.output)):
                assert list(found) == [v.name for v in wanted]
                for value in wanted:
                    kind = value.type.tensor_type
                    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
                    assert (found[value.name].dtype, found[value.name].shape) == (kind.elem_type, shape)


@st.composite
def mutated(draw: st.DrawFn, sound: bytes, changes: int = 4) -> bytes:
    """Bytes with some of them changed, cut out, doubled or put in."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, changes))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(1, 8)))
        match draw(st.integers(0, 4)):
            case 0:
                data[at:end] = draw(st.binary(max_size=8))
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                del data[at:]
            case _:
                if at < len(data):
                    data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@quickly(300)
@given(st.data())
def test_a_mutated_graph_is_refused_or_opens_and_never_ends_the_process(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    changed = data.draw(mutated(SET.graphs[name]))
    try:
        graph = Graph(name, changed, 1)
    except ModelError:
        return
    assert graph.outputs


@quickly(200)
@given(st.binary(max_size=300))
def test_random_bytes_are_no_graph(data: bytes) -> None:
    with pytest.raises(WireError):
        check_graph(data)


@quickly(300)
@given(st.data())
def test_a_mutated_file_is_refused_or_read(data: st.DataObject) -> None:
    try:
        found = decode_graphs(data.draw(mutated(FILE)))
    except WireError:
        return
    assert found == SET  # the compressed data has a checksum, so only what changes nothing may pass


@quickly(300)
@given(st.data())
def test_a_mutated_set_within_a_sound_file_is_refused_or_does_not_fit(data: st.DataObject) -> None:
    inner = zlib.decompress(FILE[len(bundle.MAGIC) :])
    # the names, configuration and first graphs, where most of the structure is
    start = data.draw(st.sampled_from([0, len(inner) - 600]))
    changed = inner[:start] + data.draw(mutated(inner[start : start + 600])) + inner[start + 600 :]
    try:
        found = decode_graphs(bundle.MAGIC + zlib.compress(changed))
        found.fits(SPEC)
    except (WireError, ModelError):
        return


CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
SPEC = bert.describe(CONFIG, ["a", "b"], 20)


def test_a_bomb_is_not_unpacked() -> None:
    bomb = bundle.MAGIC + zlib.compress(bytes(bundle.MAX_BYTES + 1), 9)
    assert len(bomb) < 1 << 20
    with pytest.raises(WireError, match="too long"):
        decode_graphs(bomb)


@pytest.mark.parametrize(
    "data", [b"", b"EGS1", bundle.MAGIC, FILE[:-1], FILE + b"x", b"EGS1" + FILE[4:], bytes(5 << 20)]
)
def test_what_is_no_file_of_graphs_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_graphs(data)


def file_with(**fields: Any) -> bytes:
    @bundle.dataclass(frozen=True)
    class Other:
        format: Any = bundle.FORMAT
        family: Any = "edge_models.bert"
        config_json: Any = "{}"
        hidden: Any = 8
        graphs: Any = (bundle._Graph("embed", b"x"),)
        row_tables_json: Any = "{}"

    return bundle.MAGIC + zlib.compress(pack(replace(Other(), **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 1},
        {"config_json": "[]"},
        {"config_json": '{"a": [1]}'},
        {"config_json": '{"a": null}'},
        {"config_json": "{"},
        {"config_json": "[" * 9000},
        {"hidden": -1},
        {"graphs": ()},
        {"graphs": (bundle._Graph("embed", b""),)},
        {"graphs": (bundle._Graph("embed", b"x"), bundle._Graph("embed", b"y"))},
        {"row_tables_json": '{"a": 1}'},
        {"family": ""},
    ],
    ids=str,
)
def test_a_set_with_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    assert decode_graphs(file_with()).hidden == 8
    with pytest.raises(WireError):
        decode_graphs(file_with(**fields))


def test_a_set_comes_back_as_it_was() -> None:
    graphs = GraphSet("a.family", {"n": 3, "eps": 1e-12, "act": "relu"}, 8, {"b": b"2", "a": b"1"}, {"t": "ids"})
    assert decode_graphs(encode_graphs(graphs)) == graphs


def test_a_set_that_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(ModelError, match="at most"):
        encode_graphs(GraphSet("f", {}, 8, {"a": bytes(bundle.MAX_BYTES)}))


def test_a_graph_that_a_set_lacks_is_named() -> None:
    with pytest.raises(ModelError, match=r"has no graph 'block7\.forward'"):
        Graphs(SET.graphs, 1)["block7.forward"]
