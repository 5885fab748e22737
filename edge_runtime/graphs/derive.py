"""Forward and backward of a torch model as plain ONNX graphs, by automatic differentiation ahead of time.

A block's joint forward-backward program is traced once with symbolic shapes (`make_fx` over `torch.autograd.grad`), exported
to ONNX with its weights as inputs, and cut in two where the gradient comes in (`partition.py`). So any family whose
parts `torch.export` understands trains on devices that have no torch, without a backward rule of ours. Needs torch, onnx
and onnxscript; runs in a process of its own (two minutes and 600 MiB for a shape of BERT). Not run on small devices.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from edge_runtime.errors import ModelError
from edge_runtime.graphs.bundle import (
    ANY,
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
    SAVING,
    GraphSet,
    block_kinds,
    part_tensors,
    relative_names,
    unpruned,
)
from edge_runtime.graphs.match import essential_config
from edge_runtime.graphs.partition import (
    cut_joint,
    fix_width,
    only_output,
    row_tables,
    take_length_from,
    take_shape_from,
    trim,
    without_output,
)
from edge_runtime.graphs.quantize import int8_forward
from edge_runtime.graphs.verify import verify
from edge_runtime.model import EMBED, ModelSpec, TensorSpec, load_family
from edge_runtime.pruning import CHANNELS, HEADS, group_size, groups_of
from edge_runtime.weights import MappedTensor

OPSET = 20  # the first with Gelu; onnxruntime runs it since 1.17
IR_VERSION = 9
LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir", "torch.fx")

Names = Sequence[str]


@dataclass(frozen=True)
class Sizes:
    """Of the traced example: tracing takes equal sizes for one and the same, and 0 and 1 for constants."""

    batch: int
    seq: int
    rank: int


def derive(spec: ModelSpec, weights: Mapping[str, MappedTensor]) -> GraphSet:
    """All graphs of a model: embedding, each kind of block (plain and with LoRA adapters) and head.

    Raises:
        ModelError: torch cannot export a part, or the graphs do not compute what the network does.
    """
    tensors = {t.name: torch.from_numpy(weights[t.name].array()) for t in spec.tensors}
    spec = _with_labels(unpruned(spec))
    model = _built(spec, tensors)
    sizes = _example_sizes(spec)
    kinds = block_kinds(spec)
    graphs: dict[str, bytes] = {}
    tables: dict[str, str] = {}
    with _quiet(), _plain_attention():
        try:
            embed = _embed_graph(spec, model, sizes)
            tables = row_tables(embed)
            graphs[EMBED_GRAPH] = trim(embed)
            bias = only_output(embed, "bias")
            if {i.name for i in bias.graph.input} == {"mask"}:
                graphs[BIAS_GRAPH] = trim(bias)  # for features that were computed before
            for kind in sorted(set(kinds)):
                graphs |= _block_graphs(spec, model, kinds.index(kind), f"block{kind}", sizes)
            graphs |= _head_graphs(spec, model, sizes)
            traced, checked = _pruned_examples(spec, sizes)
            if traced:
                graphs |= _any_graphs(traced, _built(traced, tensors), sizes)
        except ModelError:
            raise
        except Exception as error:  # torch's export errors share no type
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"{spec.family} cannot be turned into training graphs: {text}") from error
    found = GraphSet(spec.family, essential_config(spec.family, spec.config), spec.hidden, graphs, tables)
    for example in filter(None, (spec, checked)):
        network = model if example is spec else _built(example, tensors)
        firsts = [kinds.index(kind) for kind in sorted(set(kinds))]
        adapted = {i: with_lora(network.blocks[i], relative_names(spec, i), sizes.rank) for i in firsts}
        verify(example, network, found, {i: pair for i, pair in adapted.items() if pair[1]})
    return found


def _with_labels(spec: ModelSpec) -> ModelSpec:
    """The model with a number of labels that no other dimension has, so that the graphs serve any number.

    If the family wants its own labels, the model stays as it is.
    """
    taken = {n for t in spec.tensors if t.part < spec.num_blocks for n in t.shape} | {spec.hidden}
    count = next(n for n in (7, 11, 13, 23, 29) if n not in taken)
    try:
        other = load_family(spec.family).describe(spec.config, [f"label {i}" for i in range(count)], spec.max_length)
    except ModelError:
        return spec
    same = [(t.name, len(t.shape), t.part) for t in other.tensors] == [
        (t.name, len(t.shape), t.part) for t in spec.tensors
    ]
    return other if same else spec


def _built(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Any:
    """The network over these tensors; where they have another shape, over random ones."""
    given = {
        t.name: tensors[t.name] if tensors[t.name].shape == t.shape else torch.randn(t.shape) / math.sqrt(t.shape[-1])
        for t in spec.tensors
    }
    model: Any = load_family(spec.family).build(spec, given)
    return model.eval().requires_grad_(False)


def _example_sizes(spec: ModelSpec) -> Sizes:
    taken = {n for t in spec.tensors for n in t.shape} | {spec.heads, len(spec.labels)}
    free = [n for n in (*range(3, 64), 2) if n not in taken]
    short = [n for n in (17, 13, 11, *free) if n in free and n <= spec.max_length]
    if not short:
        raise ModelError(
            f"{spec.family} cannot be turned into training graphs: max_length {spec.max_length} is too short"
        )
    batch, rank = [n for n in free if n != short[0]][:2]
    return Sizes(batch, short[0], rank)


def _pruned_examples(spec: ModelSpec, sizes: Sizes) -> tuple[ModelSpec | None, ModelSpec | None]:
    """The model with other widths in its blocks, to be traced and to be checked with; None where it cannot be pruned.

    The traced widths are like no other size, and the checked ones other than those.
    """
    family: Any = load_family(spec.family)
    if not hasattr(family, "with_widths"):
        return None, None
    taken = {n for t in spec.tensors for n in t.shape} | {spec.heads, len(spec.labels), *vars(sizes).values()}
    head_size = spec.hidden // spec.heads
    heads = next(n for n in range(3, 64) if not {n, n * head_size} & (taken | {head_size}))
    wide = next(n for n in range(19, 128, 2) if n not in taken | {head_size, heads, heads * head_size})

    def of(heads: list[int], channels: list[int]) -> ModelSpec:
        config = family.with_widths(spec.config, heads, channels)
        found: ModelSpec = family.describe(config, spec.labels, spec.max_length)
        return found

    blocks = range(spec.num_blocks)
    return of([heads for _ in blocks], [wide for _ in blocks]), of([1 + i % 3 for i in blocks], [5 + i for i in blocks])


# the parts


def _embed_graph(spec: ModelSpec, model: Any, sizes: Sizes) -> onnx.ModelProto:
    names = [t.name for t in part_tensors(spec, EMBED)]
    parameters = _parameters(model, names)

    def run(ids: Tensor, mask: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        return _call(model, "embed", names, given, ids, mask)  # type: ignore[no-any-return]

    example = _ids_and_mask(sizes.batch, sizes.seq)
    graph = _export(
        run, example, (_BATCH_SEQ, _BATCH_SEQ), ["ids", "mask"], parameters, names, ["hidden", "bias"], spec.hidden
    )
    take_shape_from(graph, "ids", "mask")
    return graph


def _block_graphs(
    spec: ModelSpec, model: Any, part: int, name: str, sizes: Sizes, *, is_pruned: bool = False
) -> dict[str, bytes]:
    relative, block = relative_names(spec, part), model.blocks[part]
    example = _BlockExample(spec, model, sizes)
    free = {r: _free(spec, t, is_pruned) for r, t in zip(relative, part_tensors(spec, part), strict=True)}
    usual = dict(zip(relative, (t.shape for t in part_tensors(unpruned(spec), part)), strict=True))
    graphs = _train_graphs(block, relative, [], example, name, free, usual)
    adapted, lora = with_lora(block, relative, sizes.rank)
    if lora:
        for path in {n.rpartition(".")[0] for n in lora}:
            of_matrix = free[f"{path}.weight"] or {}
            free[f"{path}.lora_a"] = {0: _R} | {d: dim for d, dim in of_matrix.items() if d == 1}
            free[f"{path}.lora_b"] = {d: dim for d, dim in of_matrix.items() if d == 0} | {1: _R}
        graphs |= _train_graphs(adapted, relative, lora, example, f"{name}{LORA}", free, usual)
    return graphs


def _any_graphs(spec: ModelSpec, model: Any, sizes: Sizes) -> dict[str, bytes]:
    """The graphs of each kind of block for any number of heads and channels. Args: spec: of the widths to trace."""
    kinds, graphs = block_kinds(unpruned(spec)), dict[str, bytes]()
    for kind in sorted(set(kinds)):
        graphs |= _block_graphs(spec, model, kinds.index(kind), f"block{kind}{ANY}", sizes, is_pruned=True)
    return graphs


def _free(spec: ModelSpec, tensor: TensorSpec, is_pruned: bool) -> dict[int, Any] | None:
    """Which dimensions of a block's tensor vary, because it may have any number of heads and channels."""
    groups = groups_of(spec, tensor) if is_pruned else ("", "")
    dims = {HEADS: group_size(spec, HEADS) * _H, CHANNELS: _C}
    return {d: dims[group] for d, group in enumerate(groups) if group} or None


class _BlockExample:
    """What a block gets: hidden states, the bias that the model's `embed` gives, and which dimensions of it vary."""

    def __init__(self, spec: ModelSpec, model: Any, sizes: Sizes) -> None:
        batch, seq = sizes.batch, sizes.seq
        hidden, self.bias = model.embed(*_ids_and_mask(batch, seq))
        if not isinstance(self.bias, Tensor) or self.bias.dtype != torch.float32 or self.bias.ndim == 0:
            raise ModelError(f"{spec.family}: embed() must give the attention bias as a float32 tensor with dimensions")
        if hidden.shape != (batch, seq, spec.hidden):
            raise ModelError(f"{spec.family}: embed() gives {tuple(hidden.shape)}, wanted (batch, seq, {spec.hidden})")
        self.hidden = torch.randn(hidden.shape)
        fewer, shorter = (model.embed(*_ids_and_mask(*size))[1].shape for size in ((batch - 1, seq), (batch, seq - 1)))
        self.bias_dims: dict[int, Any] = {}
        for d, n in enumerate(self.bias.shape):
            if (n, fewer[d], shorter[d]) in ((batch, batch - 1, batch), (seq, seq, seq - 1)):
                self.bias_dims[d] = _B if fewer[d] != n else _S
            elif not n == fewer[d] == shorter[d]:
                raise ModelError(
                    f"{spec.family}: a dimension of embed()'s bias is neither batch nor sequence nor fixed"
                )


def _ids_and_mask(batch: int, seq: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 2, (batch, seq)), torch.ones(batch, seq, dtype=torch.int64)


def _train_graphs(
    block: Any,
    frozen: Names,
    lora: Names,
    example: _BlockExample,
    name: str,
    free: Mapping[str, Any],
    usual: Mapping[str, tuple[int, ...]],
) -> dict[str, bytes]:
    """Forward, forward that keeps what the backward pass needs, and backward, of one kind of block.

    Args:
        free: tensor -> which of its dimensions vary.
        usual: tensor -> its shape in the model that is not pruned.
    """
    hidden, bias = example.hidden, example.bias
    extra = [torch.tensor(0.5)] if lora else []  # the adapters' scale
    extra_names = ["lora_scale"] if lora else []
    names = [*frozen, *lora]
    parameters = _parameters(block, names)
    trained = list(lora) or list(frozen)
    split = len(extra)

    def joint(hidden: Tensor, bias: Tensor, d_out: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        hidden = hidden.detach().requires_grad_()
        tensors = {n: t.detach() for n, t in zip(names, given[split:], strict=True)}
        wanted = [tensors[n].requires_grad_() for n in trained]
        out = _call(block, "forward", names, [tensors[n] for n in names], hidden, bias, scale=given[:split])
        return (out, *torch.autograd.grad(out, [hidden, *wanted], d_out))

    dynamic = (_BATCH_SEQ, example.bias_dims, _BATCH_SEQ, *[None] * split)
    both = _export(
        joint,
        (hidden, bias, torch.randn_like(hidden), *extra),
        dynamic,
        ["hidden", "bias", "d_out", *extra_names],
        parameters,
        names,
        ["out", "d_hidden", *(GRADIENT + n for n in trained)],
        [free[n] for n in names],
        traced=True,
    )
    for matrix in (n for n in frozen if 0 in (free[n] or {}) and len(usual[n]) == 2):
        if (bias_of := matrix.removesuffix("weight") + "bias") in frozen:  # so that int8 needs no float32 weight
            take_length_from(both, matrix, bias_of)
    saving, backward = cut_joint(both, "d_out", "out", "hidden", usual)
    plain = only_output(saving, "out")
    first = without_output(backward, "d_hidden")
    named = {FORWARD: plain, SAVING: saving, BACKWARD: backward, FIRST_BACKWARD: first}
    if not lora:
        named[FORWARD_INT8] = int8_forward(plain)
    return {name + suffix: trim(graph) for suffix, graph in named.items()}


def _head_graphs(spec: ModelSpec, model: Any, sizes: Sizes) -> dict[str, bytes]:
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

    hidden, mask = torch.randn(sizes.batch, sizes.seq, spec.hidden), _ids_and_mask(sizes.batch, sizes.seq)[1]
    shapes = (_BATCH_SEQ, _BATCH_SEQ)
    plain = _export(forward, (hidden, mask), shapes, ["hidden", "mask"], parameters, names, ["logits"], spec.hidden)
    labels = torch.arange(sizes.batch) % len(spec.labels)
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
_H = torch.export.Dim("heads", min=1, max=1 << 10)
_C = torch.export.Dim("channels", min=1, max=1 << 17)
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
    free: Sequence[Any] | int,
    *,
    traced: bool = False,
) -> onnx.ModelProto:
    """A function of inputs and parameters as ONNX. `dynamic` and `free` say which of their dimensions vary.

    `free` as a number is the model's width: every dimension of the parameters but a last one of this size is free where
    torch finds that it may be (vocabulary, positions, labels).
    `traced`: the function differentiates, so it is traced to plain operations first.
    """
    width = free if isinstance(free, int) else 0
    if isinstance(free, int):
        free = [dict.fromkeys(range(p.ndim), torch.export.Dim.AUTO) for p in parameters]
    arguments = (*inputs, *parameters)
    if traced:
        graph = make_fx(
            function,
            tracing_mode="symbolic",
            decomposition_table=dict(torch._decomp.core_aten_decompositions()),
            _allow_non_fake_inputs=True,
        )(*arguments)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        function = graph

    class Wrapper(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    with torch.no_grad():
        program = torch.export.export(Wrapper(), arguments, dynamic_shapes=((*dynamic, *free),), strict=False)
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
    if width:
        fix_width(proto, [n for n, p in zip(names, parameters, strict=True) if p.shape[-1:] == (width,)], width)
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
