"""The gate of derived graphs: in onnxruntime they must compute what the family's torch network does, forward and backward.

Every block is run, since blocks whose tensors have equal shapes share their graphs and could still differ in what they do.
Needs torch and onnxruntime; called where graphs are derived (`derive.py`), never on a device without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch  # noqa: TID253 - as in derive.py
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor  # noqa: TID253

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
    block_graphs,
    part_tensors,
    relative_names,
)
from edge_runtime.graphs.match import misfit
from edge_runtime.graphs.session import Graphs
from edge_runtime.model import EMBED, ModelSpec

TOLERANCE = 1e-4  # relative to a tensor's largest value
# A gradient far below the block's largest may be nothing but rounding, as that of attention's key bias, which is zero in
# theory: it is compared on the scale of the block.
LEAST_SCALE = 1e-2
BATCH, SEQ = 4, 9  # other sizes than those that were traced

Run = dict[str, Any]


def verify(spec: ModelSpec, model: Any, graphs: GraphSet, lora_blocks: Mapping[int, tuple[Any, Sequence[str]]]) -> None:
    """Compare graphs with the network they were derived from. `lora_blocks`: number of a block -> it with adapters, their names.

    Raises:
        ModelError: they differ, or do not match the spec.
    """
    if reason := misfit(graphs, spec):
        raise ModelError(f"the graphs derived for {spec.family} do not match its describe(): {reason}")
    opened = Graphs(graphs.graphs, 1)
    names_of = block_graphs(spec)
    ids, mask, labels = _examples(spec, graphs)
    with torch.no_grad():
        logits = model(ids, mask)
        hidden, bias = model.embed(ids, mask)
    found = _run(
        opened, EMBED_GRAPH, {"ids": ids, "mask": mask}, _named(model, [t.name for t in part_tensors(spec, EMBED)])
    )
    _same("embed()'s hidden states", found["hidden"], hidden)
    _same("embed()'s bias", found["bias"], bias)
    if BIAS_GRAPH in graphs.graphs:
        _same("embed()'s bias", _run(opened, BIAS_GRAPH, {"mask": mask}, {})["bias"], bias)
    composed = found["hidden"]
    for part, name in enumerate(names_of):
        tensors = _named(model.blocks[part], relative_names(spec, part))
        if names_of.index(name) == part:
            _check_block(opened, name, model.blocks[part], hidden, bias, tensors, list(tensors), {})
        if part in lora_blocks:
            block, names = lora_blocks[part]
            scale = {"lora_scale": _scale_of(block)}
            every = _named(block, [*relative_names(spec, part), *names])
            _check_block(opened, name + LORA, block, hidden, bias, every, names, scale)
        with torch.no_grad():
            hidden = model.blocks[part](hidden, bias)
        composed = _run(opened, name + FORWARD, {"hidden": composed, "bias": bias}, tensors)["out"]
        first = names_of.index(name)
        other = (
            "" if first == part else f" (its tensors have the shapes of block {first}'s, but does it compute the same?)"
        )
        _same(f"the output of block {part}{other}", composed, hidden)
    _check_head(spec, model, opened, composed, mask, labels, logits)


def _examples(spec: ModelSpec, graphs: GraphSet) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask with padding of several lengths, labels."""
    seq = min(SEQ, spec.max_length)
    rows = [t.shape[0] for t in spec.tensors if graphs.row_tables.get(t.name) == "ids"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min([*rows, 1 << 30]) if rows else 2, (BATCH, seq), generator=generator)
    lengths = torch.tensor([seq, max(1, seq // 2), 1, max(1, seq - 1)])
    mask = (torch.arange(seq)[None] < lengths[:, None]).to(torch.int64)
    return ids, mask, torch.arange(BATCH) % len(spec.labels)


def _check_block(
    opened: Graphs,
    name: str,
    block: Any,
    hidden: Tensor,
    bias: Tensor,
    tensors: Mapping[str, Tensor],
    trained: Sequence[str],
    scale: Mapping[str, Tensor],
) -> None:
    given = hidden.detach().clone().requires_grad_()
    wanted = [p.requires_grad_() for n, p in block.named_parameters() if n in set(trained)]
    order = [n for n, _ in block.named_parameters() if n in set(trained)]
    out = block(given, bias)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    d_hidden, *gradients = torch.autograd.grad(out, [given, *wanted], d_out)
    for parameter in wanted:
        parameter.requires_grad_(False)
    feeds = {"hidden": hidden, "bias": bias, **scale}
    saved = _run(opened, name + SAVING, feeds, tensors)
    _same(f"the output of {name}{SAVING}", saved.pop("out"), out)
    _same(f"the output of {name}{FORWARD}", _run(opened, name + FORWARD, feeds, tensors)["out"], out)
    for kind in (BACKWARD, FIRST_BACKWARD):
        found = _run(opened, name + kind, {**saved, **feeds, "d_out": d_out}, tensors)
        least = LEAST_SCALE * max(float(g.abs().max()) for g in gradients)
        for parameter, gradient in zip(order, gradients, strict=True):
            _same(f"the gradient of {parameter} in {name}{kind}", found[GRADIENT + parameter], gradient, least)
        if kind == BACKWARD:
            _same(f"the gradient of the input of {name}", found["d_hidden"], d_hidden)


def _check_head(
    spec: ModelSpec, model: Any, opened: Graphs, hidden: Tensor, mask: Tensor, labels: Tensor, logits: Tensor
) -> None:
    names = [t.name for t in spec.suffix(0)]
    tensors = _named(model, names)
    _same("the logits", _run(opened, HEAD_FORWARD, {"hidden": hidden, "mask": mask}, tensors)["logits"], logits)
    given = hidden.detach().clone().requires_grad_()
    parameters = dict(model.named_parameters())
    wanted = [parameters[n].requires_grad_() for n in names]
    loss = F.cross_entropy(model.head(given, mask), labels, reduction="sum") * 0.25
    d_hidden, *gradients = torch.autograd.grad(loss, [given, *wanted])
    for parameter in wanted:
        parameter.requires_grad_(False)
    feeds = {"hidden": hidden, "mask": mask, "labels": labels, "scale": torch.tensor(0.25)}
    found = _run(opened, HEAD_BACKWARD, feeds, tensors)
    _same("the loss", found["loss"], loss)
    _same("the gradient of the head's input", found["d_hidden"], d_hidden)
    least = LEAST_SCALE * max(float(g.abs().max()) for g in gradients)
    for name, gradient in zip(names, gradients, strict=True):
        _same(f"the gradient of {name}", found[GRADIENT + name], gradient, least)


def _named(module: Any, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    return {n: parameters[n].detach() for n in names}


def _scale_of(block: Any) -> Tensor:
    """Set the adapters' scale to a plain number again; tracing left its own there."""
    scale = torch.tensor(0.5)
    for part in block.modules():
        if hasattr(part, "lora_a"):
            part.scale = scale
    return scale


def _run(opened: Graphs, name: str, feeds: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    arrays = {n: t.detach().contiguous().numpy() for n, t in {**tensors, **feeds}.items()}
    return {n: torch.from_numpy(a) for n, a in opened[name].run(arrays).items()}


def _same(what: str, found: Tensor, wanted: Tensor, least_scale: float = 0.0) -> None:
    if found.shape != wanted.shape:
        raise ModelError(
            f"the derived graphs are wrong: {what} is {tuple(found.shape)}, torch gives {tuple(wanted.shape)}"
        )
    if not wanted.numel():
        return
    wanted = wanted.detach()
    scale = max(float(wanted.abs().max()), least_scale, 1e-12)
    worst = float((found - wanted).abs().max()) / scale
    if not worst <= TOLERANCE:  # NaN too
        raise ModelError(
            f"the derived graphs are wrong: {what} differs from torch's by {worst:.1e} of its largest value, "
            f"allowed are {TOLERANCE:.0e}. Train this model with torch, or report it"
        )
