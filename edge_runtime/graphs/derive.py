"""Forward and backward of a torch model as plain ONNX graphs, by automatic differentiation ahead of time.

A block's joint forward-backward program is traced once with symbolic shapes (`make_fx` over `torch.autograd.grad`), exported
to ONNX with its weights as inputs, and cut in two where the gradient comes in (`partition.py`). So any family whose
parts `torch.export` understands trains on devices that have no torch, without a backward rule of ours. Needs torch, onnx
and onnxscript; runs in a process of its own (about 20 s and 900 MiB for MiniLM). Not run on small devices.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from edge_runtime.errors import ModelError
from edge_runtime.graphs.bundle import (
    BACKWARD,
    BIAS_GRAPH,
    EMBED_GRAPH,
    FIRST_BACKWARD,
    FORWARD,
    GRADIENT,
    HEAD_BACKWARD,
    HEAD_FORWARD,
    LORA,
    SAVING,
    GraphSet,
    block_kinds,
    part_tensors,
    relative_names,
)
from edge_runtime.graphs.partition import cut_joint, row_tables, trim, without_output
from edge_runtime.model import EMBED, ModelSpec, load_family
from edge_runtime.weights import MappedTensor

OPSET = 20  # the first with Gelu; onnxruntime runs it since 1.17
IR_VERSION = 9
BATCH, SEQ, RANK = 3, 17, 5  # of the traced example: different from each other and from 0 and 1, which tracing bakes in
TOLERANCE = 1e-4  # of the check against the family's own network, relative to the largest logit
LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir", "torch.fx")

Names = Sequence[str]
Dynamic = Any  # torch.export's nested description of dynamic dimensions


def derive(spec: ModelSpec, weights: Mapping[str, MappedTensor]) -> GraphSet:
    """All graphs of a model: embedding, each kind of block (plain and with LoRA adapters) and head.

    Raises:
        ModelError: torch cannot export a part, or the graphs do not compute what the network does.
    """
    model = load_family(spec.family).build(
        spec, {t.name: torch.from_numpy(weights[t.name].array()) for t in spec.tensors}
    )
    for parameter in model.parameters():  # type: ignore[attr-defined]
        parameter.requires_grad_(False)
    kinds = block_kinds(spec)
    graphs: dict[str, bytes] = {}
    tables: dict[str, str] = {}
    with _quiet(), _plain_attention():
        try:
            embed = _embed_graph(spec, model)
            tables = row_tables(embed)
            graphs[EMBED_GRAPH] = trim(embed)
            graphs[BIAS_GRAPH] = trim(without_output(embed, "hidden"))  # for features that were computed before
            for kind in sorted(set(kinds)):
                block = kinds.index(kind)
                graphs |= _block_graphs(spec, model.blocks[block], block, f"block{kind}")
            graphs |= _head_graphs(spec, model)
        except ModelError:
            raise
        except Exception as error:  # torch's export errors share no type
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"{spec.family} cannot be turned into training graphs: {text}") from error
    return GraphSet(spec.family, dict(spec.config), spec.hidden, graphs, tables)


# the parts


def _embed_graph(spec: ModelSpec, model: Any) -> onnx.ModelProto:
    names = [t.name for t in part_tensors(spec, EMBED)]
    parameters = _parameters(model, names)

    def run(ids: Tensor, mask: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        return _call(model, "embed", names, given, ids, mask)  # type: ignore[no-any-return]

    ids = torch.randint(0, 2, (BATCH, SEQ))
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    inputs, dynamic = (ids, mask), (_BATCH_SEQ, _BATCH_SEQ)
    return _export(run, inputs, dynamic, ["ids", "mask"], parameters, names, ["hidden", "bias"], spec.hidden)


def _block_graphs(spec: ModelSpec, block: Any, part: int, name: str) -> dict[str, bytes]:
    relative = relative_names(spec, part)
    hidden, bias = _example(spec, block)
    graphs = _train_graphs(block, relative, [], (hidden, bias), name)
    adapted, lora = with_lora(block, relative, RANK)
    return graphs | _train_graphs(adapted, relative, lora, (hidden, bias), f"{name}{LORA}")


def _train_graphs(
    block: Any, frozen: Names, lora: Names, example: tuple[Tensor, Tensor], name: str
) -> dict[str, bytes]:
    """Forward, forward that keeps what the backward pass needs, and backward, of one kind of block."""
    hidden, bias = example
    extra = [torch.tensor(0.5)] if lora else []  # the adapters' scale
    extra_names = ["lora_scale"] if lora else []
    names = [*frozen, *lora]
    parameters = _parameters(block, names)
    trained = list(lora) or list(frozen)
    split = len(extra)

    def forward(hidden: Tensor, bias: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return (_call(block, "forward", names, given[split:], hidden, bias, scale=given[:split]),)

    def joint(hidden: Tensor, bias: Tensor, d_out: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        hidden = hidden.detach().requires_grad_()
        tensors = {n: t.detach() for n, t in zip(names, given[split:], strict=True)}
        wanted = [tensors[n].requires_grad_() for n in trained]
        out = _call(block, "forward", names, [tensors[n] for n in names], hidden, bias, scale=given[:split])
        return (out, *torch.autograd.grad(out, [hidden, *wanted], d_out))

    shapes = ({0: _B, 1: _S}, {d: (_B if n == BATCH else _S) for d, n in enumerate(bias.shape) if n in (BATCH, SEQ)})
    inputs, input_names = (hidden, bias, *extra), ["hidden", "bias", *extra_names]
    plain = _export(
        forward,
        inputs,
        (*shapes, *[None] * split),
        input_names,
        parameters,
        names,
        ["out"],
        lora_dims=set(lora),
        traced=True,
    )
    inputs, input_names = (hidden, bias, torch.randn_like(hidden), *extra), ["hidden", "bias", "d_out", *extra_names]
    outputs = ["out", "d_hidden", *(GRADIENT + n for n in trained)]
    both = _export(
        joint,
        inputs,
        (*shapes, {0: _B, 1: _S}, *[None] * split),
        input_names,
        parameters,
        names,
        outputs,
        lora_dims=set(lora),
        traced=True,
    )
    saving, backward = cut_joint(both, "d_out", "out", "hidden")
    first = without_output(backward, "d_hidden")
    named = {FORWARD: plain, SAVING: saving, BACKWARD: backward, FIRST_BACKWARD: first}
    return {name + suffix: trim(graph) for suffix, graph in named.items()}


def _head_graphs(spec: ModelSpec, model: Any) -> dict[str, bytes]:
    names = [t.name for t in spec.suffix(0)]
    parameters = _parameters(model, names)

    def forward(hidden: Tensor, mask: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return (_call(model, "head", names, given, hidden, mask),)

    def joint(hidden: Tensor, mask: Tensor, labels: Tensor, scale: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        hidden = hidden.detach().requires_grad_()
        wanted = [t.detach().requires_grad_() for t in given]
        logits = _call(model, "head", names, wanted, hidden, mask)
        loss = F.cross_entropy(logits, labels, reduction="sum") * scale
        return (loss.detach(), *torch.autograd.grad(loss, [hidden, *wanted]))

    hidden = torch.randn(BATCH, SEQ, spec.hidden)
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    shapes = ({0: _B, 1: _S}, _BATCH_SEQ)
    plain = _export(forward, (hidden, mask), shapes, ["hidden", "mask"], parameters, names, ["logits"], spec.hidden)
    labels = torch.arange(BATCH) % 2
    both = _export(
        joint,
        (hidden, mask, labels, torch.tensor(0.5)),
        (*shapes, {0: _B}, None),
        ["hidden", "mask", "labels", "scale"],
        parameters,
        names,
        ["loss", "d_hidden", *(GRADIENT + n for n in names)],
        spec.hidden,
        traced=True,
    )
    return {HEAD_FORWARD: trim(plain), HEAD_BACKWARD: trim(both)}


def _example(spec: ModelSpec, model_part: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, SEQ, spec.hidden), torch.zeros(BATCH, 1, 1, SEQ)


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale * B A (Hu et al. 2021, https://arxiv.org/abs/2106.09685). A (rank, in), B (out, rank)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.randn(base.out_features, rank))
        self.scale: Tensor | float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = F.linear(x, self.lora_a)
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_b) * self.scale


def with_lora(block: Any, relative: Names, rank: int) -> tuple[Any, list[str]]:
    """A copy of a block whose linear layers have adapters, and the adapters' names, two for each layer."""
    adapted = copy.deepcopy(block)
    names = []
    for path in [p.removesuffix(".weight") for p in relative if p.endswith(".weight")]:
        parent, _, leaf = path.rpartition(".")
        layer = adapted.get_submodule(path)
        if isinstance(layer, nn.Linear):
            setattr(adapted.get_submodule(parent), leaf, LoraLinear(layer, rank))
            names += [f"{path}.lora_a", f"{path}.lora_b"]
    return adapted, names


# exporting

_B = torch.export.Dim("batch", min=1, max=1 << 16)
_S = torch.export.Dim("seq", min=1, max=1 << 16)
_R = torch.export.Dim("rank", min=1, max=1 << 12)
_BATCH_SEQ = {0: _B, 1: _S}


def _parameters(module: Any, names: Names) -> list[Tensor]:
    found = dict(module.named_parameters())
    return [found[n].detach() for n in names]


def _call(
    module: Any, method: str, names: Names, given: Sequence[Tensor], *args: Tensor, scale: Sequence[Tensor] = ()
) -> Any:
    """A method of a module with the given tensors in place of its parameters."""
    if scale:
        for part in module.modules():
            if isinstance(part, LoraLinear):
                part.scale = scale[0]
    wrapper = _Method(module, method)
    return torch.func.functional_call(wrapper, {f"module.{n}": t for n, t in zip(names, given, strict=True)}, args)


class _Method(nn.Module):
    """Another method than `forward` as a module's forward."""

    def __init__(self, module: Any, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any) -> Any:
        return getattr(self.module, self.method)(*args)


def _export(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    dynamic: Sequence[Any],
    input_names: Names,
    parameters: Sequence[Tensor],
    names: Names,
    outputs: Names,
    free_but: int | None = None,
    *,
    lora_dims: set[str] = frozenset(),  # type: ignore[assignment]
    traced: bool = False,
) -> onnx.ModelProto:
    """A function of inputs and parameters as ONNX, batch and sequence dynamic.

    `free_but`: every dimension of a parameter but those of this size is dynamic too (vocabulary, positions, labels), where
    torch allows it. `traced`: the function differentiates, so it is traced to plain operations first.
    """
    shapes: list[Any] = []
    for number, (name, tensor) in enumerate(zip(names, parameters, strict=True)):
        if name in lora_dims:
            shapes.append({tensor.shape.index(RANK): _R})
        elif free_but is not None:
            free = {d: torch.export.Dim(f"p{number}_{d}", min=1) for d, n in enumerate(tensor.shape) if n != free_but}
            shapes.append(free or None)
        else:
            shapes.append(None)
    if free_but is not None:  # one label count for weight and bias
        sizes: dict[int, Any] = {}
        for tensor, shape in zip(parameters, shapes, strict=True):
            for d in shape or {}:
                shape[d] = sizes.setdefault(tensor.shape[d], shape[d])
    try:
        return _export_with(function, inputs, dynamic, input_names, parameters, names, outputs, shapes, traced)
    except Exception:
        if free_but is None:
            raise
        fixed = [None] * len(
            parameters
        )  # some model needs its vocabulary's size as a number: the graphs serve that size alone
        return _export_with(function, inputs, dynamic, input_names, parameters, names, outputs, fixed, traced)


def _export_with(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    dynamic: Sequence[Any],
    input_names: Names,
    parameters: Sequence[Tensor],
    names: Names,
    outputs: Names,
    shapes: Sequence[Any],
    traced: bool,
) -> onnx.ModelProto:
    arguments = (*inputs, *parameters)
    if traced:
        graph = make_fx(
            function,
            tracing_mode="symbolic",
            decomposition_table=torch._decomp.core_aten_decompositions(),
            _allow_non_fake_inputs=True,
        )(*arguments)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        function = graph

    class Wrapper(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    with torch.no_grad():
        program = torch.export.export(Wrapper(), arguments, dynamic_shapes=((*dynamic, *shapes),), strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[*input_names, *names],
            output_names=list(outputs),
        )
    assert exported is not None
    proto: onnx.ModelProto = exported.model_proto
    proto.ir_version = IR_VERSION
    return proto


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as two products and a softmax: what torch fuses has no backward pass in ONNX."""
    fused = F.scaled_dot_product_attention

    def plain(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = (query * factor) @ key.transpose(-1, -2)
        return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ value

    F.scaled_dot_product_attention = plain
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks about optional packages help nobody."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
