"""A model's graph set: the ONNX graphs that train and run it, as one small file that travels like a tensor.

Names of graphs and of their inputs and outputs are defined here, once. Imports no torch, no onnx and no onnxruntime.

    embed             ids, mask, tensors of the embedding part    -> hidden, bias
    bias              mask                                        -> bias
    block<K>.forward  hidden, bias, tensors                       -> out
    block<K>.saving   hidden, bias, tensors                       -> out, s:0 ... s:n
    block<K>.backward s:0 ... s:n, hidden, bias, d_out, tensors   -> d_hidden, g:tensor ...
    block<K>.first_backward   the same without d_hidden, for the first trained block
    block<K>.forward_int8     as forward, with W:q (in, out) int8 and W:scale (out) for each linear layer's weight W
    block<K>.lora.*   all four with lora_scale and two adapters for each linear layer; gradients of the adapters alone
    head.forward      hidden, mask, tensors                       -> logits
    head.backward     hidden, mask, labels, scale, tensors        -> loss, d_hidden, g:tensor ...

K is the number of a kind of block: blocks whose tensors have the same names and shapes share their graphs, so a set serves
every depth. Where blocks can be pruned, block<K>.any.* are the same graphs for blocks of any number of heads and channels. ids, mask and labels are int64 (batch, seq), (batch, seq), (batch); everything else is float32.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from edge_runtime.errors import ModelError, WireError
from edge_runtime.model import ConfigValue, ModelSpec, TensorSpec, load_family
from edge_runtime.records import Name, Range
from edge_runtime.wire import pack, unpack_as

FORMAT = 2
MAX_BYTES = 16 << 20  # of a set as it is used
MAX_FILE_BYTES = 4 << 20  # of a set as it travels: compressed
MAGIC = b"EGS2"
EMBED_GRAPH, BIAS_GRAPH, HEAD_FORWARD, HEAD_BACKWARD = "embed", "bias", "head.forward", "head.backward"
FORWARD, SAVING, BACKWARD, FIRST_BACKWARD = ".forward", ".saving", ".backward", ".first_backward"
FORWARD_INT8 = ".forward_int8"
QUANTIZED, SCALE = ":q", ":scale"
LORA = ".lora"
ANY = ".any"
GRADIENT, SAVED = "g:", "s:"


@dataclass(frozen=True)
class GraphSet:
    """The graphs of one architecture.

    Attributes:
        family, config: whose network this is; some keys of the config do not matter (`Family.GRAPH_FREE_CONFIG`).
        hidden: the network's width.
        graphs: ONNX models by name, as above.
        row_tables: tensors of the embedding part that are only looked up by row -> the input that numbers the rows.
    """

    family: str
    config: Mapping[str, ConfigValue]
    hidden: int
    graphs: Mapping[str, bytes]
    row_tables: Mapping[str, str] = field(default_factory=dict)

    def fits(self, spec: ModelSpec) -> bool:
        """Whether these graphs compute `spec`; `match.misfit` says why not."""
        from edge_runtime.graphs.match import misfit

        return misfit(self, spec) is None


def part_tensors(spec: ModelSpec, part: int) -> list[TensorSpec]:
    """The tensors of one part, in the model's order."""
    return [t for t in spec.tensors if t.part == part]


def relative_names(spec: ModelSpec, part: int) -> list[str]:
    """The names of a block's tensors without what they all begin with ("encoder.layer.3.")."""
    names = [t.name for t in part_tensors(spec, part)]
    cut = len(common_prefix(names))
    return [n[cut:] for n in names]


def common_prefix(names: list[str]) -> str:
    """The longest common beginning that ends with a dot."""
    first, last = min(names), max(names)
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return first[: first[:same].rfind(".") + 1]


def block_kinds(spec: ModelSpec) -> list[int]:
    """The number of each block's kind: equal for blocks whose tensors have the same names and shapes."""
    seen: dict[tuple[object, ...], int] = {}
    kinds = []
    for part in range(spec.num_blocks):
        shapes = tuple(t.shape for t in part_tensors(spec, part))
        kinds.append(seen.setdefault((tuple(relative_names(spec, part)), shapes), len(seen)))
    return kinds


def block_graphs(spec: ModelSpec) -> list[str]:
    """What the names of each block's graphs begin with: "block<K>", or "block<K>.any" for a block that is pruned."""
    whole = unpruned(spec)
    kinds = block_kinds(whole)
    if whole == spec:
        return [f"block{kind}" for kind in kinds]
    same = [part_tensors(spec, part) == part_tensors(whole, part) for part in range(spec.num_blocks)]
    return [f"block{kind}" + ("" if is_whole else ANY) for kind, is_whole in zip(kinds, same, strict=True)]


def unpruned(spec: ModelSpec) -> ModelSpec:
    """The model with all of its heads and channels; `spec` itself if nothing of it is pruned."""
    family: Any = load_family(spec.family)
    if not hasattr(family, "with_widths"):
        return spec
    config = family.with_widths(spec.config, [spec.heads] * spec.num_blocks, [spec.feed_forward] * spec.num_blocks)
    if config == spec.config:
        return spec
    found: ModelSpec = family.describe(config, spec.labels, spec.max_length)
    return found


# as bytes


@dataclass(frozen=True)
class _Graph:
    name: Name
    onnx: Annotated[bytes, Range(1, MAX_BYTES)]


@dataclass(frozen=True)
class _File:
    format: Annotated[int, Range(FORMAT, FORMAT)]
    family: Name
    config_json: Annotated[str, Range(2, 16 << 10)]
    hidden: Annotated[int, Range(1, 1 << 20)]
    graphs: Annotated[tuple[_Graph, ...], Range(1, 512)]
    row_tables_json: Annotated[str, Range(2, 16 << 10)]


def encode_graphs(graphs: GraphSet) -> bytes:
    """The set's bytes, compressed: the same set gives the same bytes."""
    files = tuple(_Graph(name, graphs.graphs[name]) for name in sorted(graphs.graphs))
    config, tables = (json.dumps(dict(value), sort_keys=True) for value in (graphs.config, graphs.row_tables))
    data = pack(_File(FORMAT, graphs.family, config, graphs.hidden, files, tables))
    compressed = MAGIC + zlib.compress(data, 9)
    if len(data) > MAX_BYTES or len(compressed) > MAX_FILE_BYTES:
        raise ModelError(
            f"the model's graphs are {len(data)} bytes, at most {MAX_BYTES} can be stored: use torch for it"
        )
    return compressed


def decode_graphs(data: bytes) -> GraphSet:
    """Read a graph set; what an ONNX graph in it may do is checked where it is opened (`session.py`).

    Raises:
        WireError: it is damaged.
    """
    file: _File = unpack_as(_File, _decompress(data), MAX_BYTES)
    try:
        config, tables = json.loads(file.config_json), json.loads(file.row_tables_json)
    except (ValueError, RecursionError):
        raise WireError("the graph set's config is not JSON") from None
    if not isinstance(config, dict) or not all(type(v) in (int, float, str, bool) for v in config.values()):
        raise WireError("the graph set's config must be a flat map of numbers and texts")
    if not isinstance(tables, dict) or not all(isinstance(v, str) for v in tables.values()):
        raise WireError("the graph set's row tables must be a map of texts")
    names = [g.name for g in file.graphs]
    if len(set(names)) != len(names):
        raise WireError("the graph set names a graph twice")
    return GraphSet(file.family, config, file.hidden, {g.name: g.onnx for g in file.graphs}, tables)


def _decompress(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES or data[: len(MAGIC)] != MAGIC:
        raise WireError(f"not a graph set of this version, or one of more than {MAX_FILE_BYTES >> 20} MiB")
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data[len(MAGIC) :], MAX_BYTES + 1)
    except zlib.error as error:
        raise WireError(f"a damaged graph set: {error}") from None
    if len(plain) > MAX_BYTES or not stream.eof or stream.unused_data:
        raise WireError("a damaged graph set: it is cut off, too long, or has something after its end")
    return plain
