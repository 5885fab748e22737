"""Cuts a joint forward-backward ONNX graph in two, and trims graphs to what onnxruntime needs.

The forward half gives, besides the block's output, the values that the backward half wants ("saved"). A value that is cheap
to compute again from saved ones (an activation function, a normalisation, a change of layout) is computed again instead.
Needs the onnx package; used where graphs are derived, never on a device.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx

from edge_runtime.graphs.bundle import SAVED

# Everything but matrix products and softmax: elementwise or a change of layout, far below a product's cost.
DEAR = {"MatMul", "Gemm", "Softmax", "LogSoftmax", "Conv", "Einsum"}
MAX_CHAIN = 8


def cut_joint(
    joint: onnx.ModelProto,
    gradient_input: str,
    output: str,
    same_shape: str,
    usual: Mapping[str, Sequence[int]],
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """-> (forward that also gives the saved values, backward from saved values and the output's gradient).

    Args:
        same_shape: an input of the gradient's shape, whose dimensions stand in for it: they are no dependence on it.
        usual: sizes of inputs whose dimensions vary, for choosing what to save.
    """
    graph = joint.graph
    take_shape_from(joint, gradient_input, same_shape)
    given = {i.name for i in graph.input} | {i.name for i in graph.initializer} | {""}  # "": an optional input left out
    late = {gradient_input}  # values that depend on the gradient
    for node in graph.node:
        if late & set(node.input):
            late |= set(node.output) - {""}
    backward_outputs = [o.name for o in graph.output if o.name in late]
    backward_nodes = [n for n in graph.node if set(n.output) & late]
    order = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    sizes = _Sizes(graph, usual)
    plan = _Recompute(graph, backward_nodes, late | given, given)
    saved_set, again = plan.solve(set())
    for candidate in [o for n in graph.node for o in n.output if o and o not in late]:
        if candidate not in saved_set:  # saving it may make more than its own bytes cheap to compute again
            others, chain = plan.solve({candidate})
            if candidate in others and sizes.total(others) < sizes.total(saved_set):
                saved_set, again, plan.wanted = others, chain, plan.wanted | {candidate}
    again.sort(key=lambda n: order[n.output[0]])
    saved = sorted(saved_set, key=lambda v: order[v])
    names = {value: f"{SAVED}{i}" for i, value in enumerate(saved)}
    forward = _sub_graph(joint, [n for n in graph.node if not set(n.output) & late], [output, *saved], names)
    backward = _sub_graph(joint, [*again, *backward_nodes], backward_outputs, names)
    return forward, backward


class _Recompute:
    """Which forward values the backward nodes need, and which of them cheap operations give again from the others."""

    def __init__(
        self, graph: onnx.GraphProto, backward: list[onnx.NodeProto], known: set[str], given: set[str]
    ) -> None:
        self.backward, self.known, self.given = backward, known, given
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.order = {name: i for i, name in enumerate(self.producer)}
        self.wanted: set[str] = set()  # values that are saved although the backward nodes do not read them

    def solve(self, extra: set[str]) -> tuple[set[str], list[onnx.NodeProto]]:
        """-> (values to save, forward nodes to repeat), with `extra` and `wanted` among those that may be saved."""
        allowed = self.wanted | extra
        again: list[onnx.NodeProto] = []
        repeated: set[str] = set()
        crossing = self._crossing([])
        for value in sorted(crossing, key=lambda v: -self.order[v]):
            free = self.given | repeated | allowed | (crossing - set(self.producer[value].output))
            chain = self._chain(self.producer[value], free, MAX_CHAIN)
            if chain is None:
                continue
            again += [n for n in chain if not set(n.output) & repeated]
            repeated |= {o for n in chain for o in n.output}
            crossing = self._crossing(again)
        return crossing, again

    def _crossing(self, again: list[onnx.NodeProto]) -> set[str]:
        nodes = [*self.backward, *again]
        made = {o for n in again for o in n.output}
        return {i for n in nodes for i in n.input if i not in self.known and i not in made}

    def _chain(self, node: onnx.NodeProto, free: set[str], depth: int) -> list[onnx.NodeProto] | None:
        """The cheap nodes that compute a node from free values, it itself last; None if there is no such way."""
        if node.op_type in DEAR or depth == 0:
            return None
        nodes: list[onnx.NodeProto] = []
        for i in node.input:
            if i not in free:
                before = self._chain(self.producer[i], free, depth - 1)
                if before is None:
                    return None
                nodes += [n for n in before if n not in nodes]
        return [*nodes, node]


class _Sizes:
    """Elements of a graph's values for a usual batch."""

    def __init__(self, graph: onnx.GraphProto, usual: Mapping[str, Sequence[int]]) -> None:
        shapes = {v.name: v.type.tensor_type.shape.dim for v in [*graph.value_info, *graph.output, *graph.input]}
        self._shapes = shapes
        self._known: dict[str, int] = {}  # of expressions, which take long to read
        self._symbols = {d.dim_param: n for d, n in zip(shapes["hidden"], (4, 128), strict=False) if d.dim_param}
        for name, sizes in usual.items():
            for d, n in zip(shapes.get(name, ()), sizes, strict=False):
                if multiple := _multiple(d.dim_param):
                    self._symbols[multiple[1]] = n // multiple[0]

    def total(self, names: set[str]) -> int:
        """Elements of all of these."""
        return sum(math.prod(self._dimension(d) for d in self._shapes[n]) for n in names)

    def _dimension(self, d: onnx.TensorShapeProto.Dimension) -> int:
        if d.dim_param and d.dim_param not in self._known:
            import sympy  # type: ignore[import-untyped]

            symbols = {sympy.Symbol(k): v for k, v in self._symbols.items()}
            value = sympy.sympify(d.dim_param, locals={str(k): k for k in symbols}).subs(symbols)
            self._known[d.dim_param] = int(value) if value.is_number else 8  # an adapter's rank
        return self._known[d.dim_param] if d.dim_param else int(d.dim_value)


def take_shape_from(model: onnx.ModelProto, name: str, other: str) -> None:
    """Where only the shape of an input is wanted, take that of another input of the same shape (leading dimensions)."""
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] == name:
            node.input[0] = other


def take_length_from(model: onnx.ModelProto, name: str, other: str) -> None:
    """Where only the first dimension of an input is wanted, take that of another input, which has the same."""
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] == name and {a.name: a.i for a in node.attribute}.get("end") == 1:
            node.input[0] = other


def fix_width(model: onnx.ModelProto, names: list[str], width: int) -> None:
    """Write down that the last dimension of these inputs is `width`, where the exporter left it open."""
    for value in model.graph.input:
        if value.name in names:
            value.type.tensor_type.shape.dim[-1].dim_value = width


def only_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with one of its outputs and what that output needs."""
    return _sub_graph(model, list(model.graph.node), [name], {})


def without_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model without one of its outputs and without what only that output needs."""
    outputs = [o.name for o in model.graph.output if o.name != name]
    return _sub_graph(model, list(model.graph.node), outputs, {})


def _sub_graph(
    whole: onnx.ModelProto, nodes: list[onnx.NodeProto], outputs: list[str], names: dict[str, str]
) -> onnx.ModelProto:
    """A model of some of the nodes. `names` are the saved values' new names; they come in where no node makes them."""
    graph = whole.graph
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & (set(node.output) - {""}):
            kept.append(node)
            wanted |= set(node.input)
    kept.reverse()
    made = {o for n in kept for o in n.output}
    used = {i for n in kept for i in n.input} | set(outputs)
    types = {v.name: v for v in [*graph.value_info, *graph.output, *graph.input]}
    result = onnx.ModelProto()
    result.CopyFrom(whole)
    del result.graph.node[:], result.graph.input[:], result.graph.output[:], result.graph.initializer[:]
    del result.graph.value_info[:]
    result.graph.initializer.extend(i for i in graph.initializer if i.name in used)
    result.graph.input.extend(i for i in graph.input if i.name in used)
    result.graph.input.extend(types[v] for v in names if v in used and v not in made)
    result.graph.output.extend(types[o] for o in outputs)
    result.graph.node.extend(kept)
    for node in result.graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
        node.output[:] = [names.get(o, o) for o in node.output]
    for value in [*result.graph.input, *result.graph.output]:
        value.name = names.get(value.name, value.name)
    return result


def row_tables(embed: onnx.ModelProto) -> dict[str, str]:
    """Parameters that are only looked up row by row with an integer input that serves nothing else: name -> that input.

    Of such a table (the word embeddings) a device needs only the rows of the tokens at hand.
    """
    graph = embed.graph
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    integers = {i.name for i in graph.input if i.type.tensor_type.elem_type == onnx.TensorProto.INT64}
    tables = {}
    for node in graph.node:
        if node.op_type != "Gather" or any(a.name == "axis" and a.i != 0 for a in node.attribute):
            continue
        table, index = node.input
        if index in integers and users[table] == [node] and users[index] == [node]:
            tables[table] = index
    return tables


def trim(model: onnx.ModelProto) -> bytes:
    """The model's bytes without the exporter's remarks, its values renamed short; the same model gives the same bytes."""
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    slim.doc_string = slim.producer_name = slim.producer_version = slim.domain = ""
    del slim.metadata_props[:]
    graph = slim.graph
    graph.name, graph.doc_string = "g", ""
    del graph.value_info[:], graph.metadata_props[:]
    public = {v.name for v in [*graph.input, *graph.output]}
    short: dict[str, str] = {"": ""}

    def rename(name: str) -> str:
        if name in public:
            return name
        return short.setdefault(name, f"v{len(short)}")

    for initializer in graph.initializer:
        initializer.name = rename(initializer.name)
        initializer.doc_string = ""
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [rename(n) for n in node.input]
        node.output[:] = [rename(n) for n in node.output]
    symbols: dict[str, str] = {}  # torch numbers them by what else it traced
    parts: dict[str, tuple[int, str]] = {}  # symbols of which only a multiple is an input's dimension
    for value in graph.input:
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param:
                multiple, new = _multiple(d.dim_param), symbols.setdefault(d.dim_param, f"d{len(symbols)}")
                if multiple and multiple[0] > 1:
                    parts[multiple[1]] = multiple[0], new
                d.dim_param = new
    for value in graph.output:
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param:
                expression = _renamed(d.dim_param, symbols, parts)
                d.ClearField("dim_param")
                if expression:
                    d.dim_param = expression
    for value in [*graph.input, *graph.output]:
        value.doc_string = ""
        del value.metadata_props[:]
    onnx.checker.check_model(slim)
    data: bytes = slim.SerializeToString(deterministic=True)
    return data


def _multiple(expression: str) -> tuple[int, str] | None:
    """The number and the symbol of a dimension such as "32*s1" or "s1"; None for others."""
    match = re.fullmatch(r"(?:(\d+)\*)?([A-Za-z_]\w*)", expression)
    return (int(match[1] or 1), match[2]) if match else None


def _renamed(expression: str, symbols: dict[str, str], parts: dict[str, tuple[int, str]]) -> str:
    """A dimension such as "12*s1" under the inputs' new symbols, its factors sorted; "" where they do not tell it.

    Of a symbol s of which an input has only 32*s as d2, "64*s" becomes "2*d2" and "3*s" becomes "3*d2/32".
    """
    names = set(re.findall(r"[A-Za-z_]\w*", expression))
    if names <= symbols.keys():
        renamed = re.sub(r"[A-Za-z_]\w*", lambda match: symbols[match[0]], expression)
        return "*".join(sorted(renamed.split("*"))) if re.fullmatch(r"\w+(\*\w+)*", renamed) else renamed
    if not re.fullmatch(r"\w+(\*\w+)*", expression) or not names <= symbols.keys() | parts.keys():
        return ""
    number, factors = 1, []
    for factor in expression.split("*"):
        if factor.isdecimal():
            number *= int(factor)
        elif factor in symbols:
            factors.append(symbols[factor])
        else:
            size, symbol = parts[factor]
            whole = number % size == 0  # torch writes the number first
            number = number // size if whole else number
            factors.append(symbol if whole else f"{symbol}/{size}")
    return "*".join(sorted([str(number)] * (number != 1) + factors))


def operations(data: bytes) -> Counter[str]:
    """How often each operation occurs in a graph; for tests and people."""
    return Counter(n.op_type for n in onnx.load_from_string(data).graph.node)
