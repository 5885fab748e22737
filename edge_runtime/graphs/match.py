"""Whether a graph set computes a model, as far as names, shapes and configuration tell: wrong graphs must not train silently.

Every graph's inputs are compared with the tensors of the part that it stands for, and its gradients with those to be
trained. That graphs compute the right thing is checked where they are derived (`verify.py`). Imports no onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from edge_runtime.errors import WireError
from edge_runtime.graphs.bundle import (
    BACKWARD,
    BIAS_GRAPH,
    EMBED_GRAPH,
    FIRST_BACKWARD,
    FORWARD,
    FORWARD_INT8,
    GRADIENT,
    HEAD_BACKWARD,
    HEAD_FORWARD,
    LORA,
    QUANTIZED,
    SAVED,
    SAVING,
    SCALE,
    GraphSet,
    block_graphs,
    part_tensors,
    relative_names,
)
from edge_runtime.graphs.check import GraphFacts, Value, check_graph
from edge_runtime.model import EMBED, ConfigValue, ModelSpec, TensorSpec, load_family

FLOAT, INT8 = 1, 3  # ONNX's numbers
# What a graph gets beside tensors
EMBED_INPUTS, BLOCK_INPUTS, HEAD_INPUTS = (
    {"ids", "mask"},
    {"hidden", "bias", "d_out"},
    {"hidden", "mask", "labels", "scale"},
)

Tensors = Mapping[str, Value]


def essential_config(family: str, config: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
    """What of a model's configuration its graphs depend on; of a free number only whether it is zero, of a free text nothing.

    Which keys are free a family says in `GRAPH_FREE_CONFIG`: those that change the sizes of its tensors, or the number
    of blocks, and nothing else of what it computes.
    """
    free: frozenset[str] = getattr(load_family(family), "GRAPH_FREE_CONFIG", frozenset())
    found = {key: value for key, value in config.items() if not (key in free and isinstance(value, str))}
    return {key: int(bool(value)) if key in free else value for key, value in found.items()}


def misfit(graphs: GraphSet, spec: ModelSpec) -> str | None:
    """Why these graphs do not compute `spec`; None if they do.

    Raises:
        ModelError: the model's family cannot be imported.
    """
    if graphs.family != spec.family:
        return f"they are of the family {graphs.family!r}"
    if essential_config(spec.family, graphs.config) != essential_config(spec.family, spec.config):
        return "they were made for another configuration"
    if graphs.hidden != spec.hidden:
        return f"they are {graphs.hidden} wide, the model {spec.hidden}"
    try:
        return next(_Match(graphs).all(spec), None)
    except WireError as error:
        return str(error)


class _Match:
    """Compares the graphs of a set; what differs comes out in words."""

    def __init__(self, graphs: GraphSet) -> None:
        self._graphs, self._row_tables = graphs.graphs, graphs.row_tables
        self._read: dict[str, GraphFacts] = {}

    def all(self, spec: ModelSpec) -> Iterator[str]:
        """Every difference."""
        yield from self._inputs(EMBED_GRAPH, _tensors(part_tensors(spec, EMBED)), EMBED_INPUTS)
        yield from self._has(EMBED_GRAPH, ("hidden", "bias"))
        yield from self._tables({t.name: t.shape for t in part_tensors(spec, EMBED)})
        if BIAS_GRAPH in self._graphs:
            yield from self._inputs(BIAS_GRAPH, {}, {"mask"})
            yield from self._has(BIAS_GRAPH, ("bias",))
        seen: set[object] = set()
        for part, name in enumerate(block_graphs(spec)):
            values = _tensors(part_tensors(spec, part)).values()
            tensors = dict(zip(relative_names(spec, part), values, strict=True))
            if (kind := (name, *tensors.items())) not in seen:
                yield from self._block(name, tensors, spec.hidden)
            seen.add(kind)
        head = _tensors(spec.suffix(0))
        yield from self._inputs(HEAD_FORWARD, head, HEAD_INPUTS)
        yield from self._has(HEAD_FORWARD, ("logits",))
        yield from self._inputs(HEAD_BACKWARD, head, HEAD_INPUTS, every=False)
        yield from self._gradients(HEAD_BACKWARD, head, ("loss", "d_hidden"))

    def _tables(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Tensors of which only the rows at hand are read: matrices, by an input that numbers rows."""
        given = self._facts(EMBED_GRAPH).inputs
        for tensor, index in self._row_tables.items():
            if index not in EMBED_INPUTS & given.keys() or index == "mask":
                yield f"{EMBED_GRAPH} numbers the rows of {tensor!r} by {index!r}"
            elif len(shapes.get(tensor, ())) != 2:
                yield f"{EMBED_GRAPH} reads rows of {tensor!r}, which is no matrix of the embedding"

    def _block(self, name: str, tensors: Tensors, hidden: int) -> Iterator[str]:
        shape = self._facts(name + FORWARD).inputs.get("hidden", Value(FLOAT, ())).shape
        if shape[2:] != (hidden,):
            yield f"{name}{FORWARD} has hidden states of {shape}, the model of width {hidden}"
        yield from self._train(name, tensors, {}, BLOCK_INPUTS)
        if name + FORWARD_INT8 in self._graphs:
            given = self._facts(name + FORWARD_INT8).inputs
            wanted: dict[str, Value] = {}
            for tensor, value in tensors.items():
                if tensor + QUANTIZED in given and len(value.shape) == 2:
                    wanted[tensor + QUANTIZED] = Value(INT8, value.shape[::-1])
                    wanted[tensor + SCALE] = Value(FLOAT, value.shape[:1])
                else:
                    wanted[tensor] = value
            yield from self._inputs(name + FORWARD_INT8, wanted, BLOCK_INPUTS)
            yield from self._has(name + FORWARD_INT8, ("out",))
        if name + LORA + FORWARD in self._graphs:
            outputs = self._facts(name + LORA + FIRST_BACKWARD).outputs
            adapters = {
                n: _adapter(n, tensors) for n in (o.removeprefix(GRADIENT) for o in outputs if o.startswith(GRADIENT))
            }
            yield from self._train(name + LORA, tensors, adapters, {*BLOCK_INPUTS, "lora_scale"})

    def _train(self, name: str, frozen: Tensors, adapters: Tensors, others: set[str]) -> Iterator[str]:
        every = {**frozen, **adapters}
        for forward in (FORWARD, SAVING):
            yield from self._inputs(name + forward, every, others)
            yield from self._has(name + forward, ("out",))
        saved = {n: v for n, v in self._facts(name + SAVING).outputs.items() if n.startswith(SAVED)}
        for backward, gives in ((BACKWARD, ("d_hidden",)), (FIRST_BACKWARD, ())):
            given = self._facts(name + backward).inputs
            kept = {n: saved[n] for n in given if n in saved}
            yield from self._inputs(name + backward, {**every, **kept}, others, every=False)
            yield from self._gradients(name + backward, adapters or frozen, gives)

    def _inputs(self, name: str, wanted: Tensors, others: set[str], *, every: bool = True) -> Iterator[str]:
        """`others`: inputs that are no tensors of the model. `every`: the graph must want all tensors."""
        given = {n: v for n, v in self._facts(name).inputs.items() if n not in others}
        yield from _differences(name, given, wanted)
        if every and (lacking := wanted.keys() - given.keys()):
            yield f"{name} does without {min(lacking)!r}"

    def _gradients(self, name: str, wanted: Tensors, others: Iterable[str]) -> Iterator[str]:
        given = {n.removeprefix(GRADIENT): v for n, v in self._facts(name).outputs.items() if n.startswith(GRADIENT)}
        yield from _differences(name, given, wanted)
        yield from self._has(name, [*others, *(GRADIENT + n for n in wanted)])

    def _has(self, name: str, outputs: Iterable[str]) -> Iterator[str]:
        for output in outputs:
            found = self._facts(name).outputs.get(output)
            if found is None or found.dtype != FLOAT:
                yield f"{name} does not give {output!r} as float32"
            elif output == "loss" and found.shape != ():
                yield f"{name} gives a loss of {found.shape}, not one number"

    def _facts(self, name: str) -> GraphFacts:
        if name not in self._read:
            if name not in self._graphs:
                raise WireError(f"they lack {name}")
            self._read[name] = check_graph(self._graphs[name])
        return self._read[name]


def _tensors(tensors: Iterable[TensorSpec]) -> dict[str, Value]:
    return {t.name: Value(FLOAT, t.shape) for t in tensors}


def _adapter(name: str, tensors: Tensors) -> Value:
    """A (rank, in) or B (out, rank) of a layer; the rank is free."""
    stem, _, which = name.rpartition(".")
    matrix = tensors[f"{stem}.weight"].shape if f"{stem}.weight" in tensors else ()
    if len(matrix) != 2 or which not in ("lora_a", "lora_b"):
        raise WireError(f"they have an adapter {name!r} without its matrix")
    return Value(FLOAT, (None, matrix[1]) if which == "lora_a" else (matrix[0], None))


def _differences(name: str, given: Tensors, wanted: Tensors) -> Iterator[str]:
    for tensor, value in given.items():
        if tensor not in wanted:
            yield f"{name} has {tensor!r}, the model has not"
        elif value.dtype != wanted[tensor].dtype or not _matches(value.shape, wanted[tensor].shape):
            yield f"{name} has {tensor!r} of {value.shape}, the model of {wanted[tensor].shape}"


def _matches(found: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(a == b or a is None or b is None for a, b in pairs)
