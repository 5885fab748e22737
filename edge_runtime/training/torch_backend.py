"""The torch backend: a frozen prefix without stored activations, a trained suffix, gradient checkpointing by hand.

Lean on purpose: no torch.optim, no torch.utils.checkpoint and no transformers, because each pulls torch._dynamo and sympy
(68 MB and 1.5 s). Weights that are not trained stay memory-mapped; only the suffix is copied. This is the one module of
the device that imports torch; nothing imports it but the worker process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from edge_runtime.cost import is_table
from edge_runtime.model import ModelSpec, load_family
from edge_runtime.records import Plan
from edge_runtime.training.adapters import LoraAdapters, deltas, pull_back
from edge_runtime.training.corpus import Batch
from edge_runtime.training.masked import filled, masked_matrices
from edge_runtime.training.optimizers import Optimizer
from edge_runtime.training.pages import GradientSums, page_zeros
from edge_runtime.training.torch_adapters import adapt
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class TorchBackend:
    """Trains the last blocks, or adapters or masked entries in them, and the head of a model in float32 on the CPU.

    Memory: 4 bytes per trained weight for itself, 4 for its gradient, 8 more with AdamW; the activations of one
    micro-batch; the prefix only as the file pages that it touches. With a mask the last two are for masked entries alone,
    the matrices that they are of are private copies, and one dense gradient lives at a time.
    """

    name = "torch"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, MappedTensor],
        plan: Plan,
        threads: int,
        start: Mapping[str, MappedTensor] | None = None,
    ) -> None:
        """`start`: what adapters begin from."""
        torch.set_num_threads(threads)
        torch.manual_seed(plan.settings.seed)
        self._spec, self._depth, self._plan = spec, plan.chosen.depth, plan
        self._lora = LoraAdapters(spec, plan, start) if plan.chosen.rank and self._depth else None
        self._masked, self._sums = masked_matrices(spec, weights, plan), GradientSums()
        whole = not self._lora and not self._masked
        self._base = {t.name: weights[t.name] for t in spec.suffix(self._depth if whole else 0)}
        tensors = {t.name: torch.from_numpy(weights[t.name].array()) for t in spec.tensors}
        for name in (*self._base, *(matrix.tensor.name for matrix in self._masked.values())):
            tensors[name] = tensors[name].clone()
        self._model = load_family(spec.family).build(spec, tensors)
        self._tables = read_by_row(self._model, {t.name: weights[t.name] for t in spec.tensors if is_table(t)})
        for name, parameter in self._model.named_parameters():  # type: ignore[attr-defined]
            parameter.requires_grad_(name in self._base)
        named = dict(self._model.named_parameters())  # type: ignore[attr-defined]
        self._trained = adapt(self._model, self._lora) if self._lora else {}
        for name, matrix in self._masked.items():
            self._trained[name] = named[matrix.tensor.name].requires_grad_()
            collect = partial(self._collect, name)
            self._trained[name].register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
        self._trained |= {name: named[name] for name in self._base}
        head = {t.name for t in spec.suffix(0)}
        self.optimizer = Optimizer(plan.settings, head, self._lora.trained if self._lora else ())

    def step(self, batch: Batch) -> float:
        total = 0.0
        for part in batch.split(self._plan.chosen.micro_batch):
            total += self._accumulate(part, len(batch.labels))
        self.optimizer.begin_step()
        mu = self._plan.settings.proximal_mu
        collected = self._sums.names()
        for name, parameter in self._trained.items():
            if name in collected:
                self._update_masked(name)
            elif parameter.grad is not None:
                gradient = parameter.grad.contiguous().numpy()
                if mu:
                    pull_back(gradient, self._changes(name), mu)
                self.optimizer.update(name, parameter.detach().numpy(), gradient)
                parameter.grad = None
        self._sums = GradientSums()  # its memory is the next step's activations'
        return total

    def correct(self, batch: Batch) -> Array:
        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        with torch.no_grad():
            hidden, bias = self._model.embed(ids, mask)
            for block in self._model.blocks:
                hidden = block(hidden, bias)
            predicted = self._model.head(hidden, mask).argmax(-1)
        right: Array = predicted.numpy() == batch.labels
        return right

    def deltas(self) -> Iterator[tuple[str, Array]]:
        return deltas(self._spec, self._plan, self._changes, self._lora)

    def _changes(self, name: str) -> Iterator[Array]:
        """A trained tensor minus its start, flat, a piece at a time."""
        if self._lora and name in self._lora.tensors:
            return self._lora.changes(name)
        if name in self._masked:
            return self._masked[name].changes(self._masked_values(name))
        return self._base[name].differences(self._trained[name].detach().numpy())

    def values(self) -> dict[str, Array]:
        return {name: parameter.detach().numpy() for name, parameter in self._trained.items()}

    def arrays(self) -> Iterator[Array]:
        for name, parameter in self._trained.items():
            yield parameter.detach().numpy()
            size = math.prod(self._masked[name].shape) if name in self._masked else parameter.numel()
            yield from self.optimizer.states(name, size)

    # masked entries

    def _collect(self, name: str, matrix: Any) -> None:
        """Add the masked entries of a matrix's gradient to their sum, and let go of the gradient, as soon as it is there."""
        mask = self._masked[name]
        self._sums.add_pieces(name, mask.shape, mask.gather(matrix.grad.numpy()))
        matrix.grad = None

    def _update_masked(self, name: str) -> None:
        mask, gradient, values = self._masked[name], self._sums.take(name), self._masked_values(name)
        if mu := self._plan.settings.proximal_mu:
            pull_back(gradient, mask.changes(values), mu)
        self.optimizer.update(name, values, gradient)
        mask.scatter(values, self._trained[name].detach().numpy())

    def _masked_values(self, name: str) -> Array:
        """The masked entries of a matrix as they are now, (1, entries)."""
        mask = self._masked[name]
        return filled(page_zeros(mask.shape), mask.gather(self._trained[name].detach().numpy()))

    # What the probe times: one block on a batch.

    def block(self, batch: Batch, pieces: int) -> Callable[[], object]:
        """A block's forward pass on so many micro-batches."""
        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        block = self._model.blocks[0]
        with torch.no_grad():
            hidden, bias = self._model.embed(ids, mask)

        def forward() -> None:
            with torch.no_grad():
                for _ in range(pieces):
                    block(hidden, bias)

        return forward

    def saved_bytes(self, batch: Batch) -> int:
        """What the last block keeps of a batch for its backward pass, beside weights."""
        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        weights = {p.untyped_storage().data_ptr() for p in self._model.parameters()}  # type: ignore[attr-defined]
        kept: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.no_grad():
            hidden, bias = self._model.embed(ids, mask)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = self._model.blocks[-1](hidden.requires_grad_(), bias)  # held, so that no place is counted twice
        del out
        return sum(size for place, size in kept.items() if place not in weights)

    def touch(self) -> None:
        """Read every weight that a step reads once, so that its mapped pages are resident as in a long run."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():  # type: ignore[attr-defined]
                if name not in self._tables:
                    parameter.view(-1)[::1024].sum()  # a page holds 1024 of them

    def _accumulate(self, part: Batch, batch_size: int) -> float:
        """Forward and backward of one micro-batch; adds to the gradients. -> its share of the batch's mean loss."""
        ids, mask, labels = (torch.from_numpy(a) for a in (part.ids, part.mask, part.labels))
        blocks = list(self._model.blocks)
        cut = len(blocks) - self._depth
        with torch.no_grad():  # the prefix: nothing is stored
            hidden, bias = self._model.embed(ids, mask)
            for block in blocks[:cut]:
                hidden = block(hidden, bias)
        if self._plan.chosen.checkpointing:
            return self._checkpointed(blocks[cut:], hidden, bias, mask, labels, batch_size)
        for block in blocks[cut:]:
            hidden = block(hidden, bias)
        loss = F.cross_entropy(self._model.head(hidden, mask), labels, reduction="sum") / batch_size
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _checkpointed(
        self, blocks: list[Any], hidden: Any, bias: Any, mask: Any, labels: Any, batch_size: int
    ) -> float:
        """Only each block's input is kept; its inside is computed again when its turn comes (Chen et al. 2016)."""
        inputs = []
        with torch.no_grad():
            for block in blocks:
                inputs.append(hidden)  # (batch, seq, hidden)
                hidden = block(hidden, bias)
        hidden.requires_grad_(bool(blocks))
        loss = F.cross_entropy(self._model.head(hidden, mask), labels, reduction="sum") / batch_size
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = hidden.grad
        del hidden
        for i in reversed(range(len(blocks))):
            hidden = inputs.pop().requires_grad_(i > 0)
            # The product with the gradient, and not backward(gradient), which imports sympy: 33 MB.
            out = blocks[i](hidden, bias)
            if out.requires_grad:  # not where nothing of the first block is trained
                (out * gradient).sum().backward()
            gradient = hidden.grad
        return float(loss.detach())


def read_by_row(model: Any, tables: Mapping[str, MappedTensor]) -> list[str]:
    """Have a model's tables read from their files, the rows of the tokens at hand; -> the names of those that are.

    As mapped pages a vocabulary would become resident bit by bit: 45 MiB of MiniLM's.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and (table := tables.get(f"{name}.weight")):
            module.forward = partial(_rows, table)  # type: ignore[method-assign]
            found.append(f"{name}.weight")
    return found


def _rows(table: MappedTensor, ids: Any) -> Any:
    """ids (any shape) -> their rows (any shape, columns)."""
    numbers, places = torch.unique(ids, return_inverse=True)
    return F.embedding(places, torch.from_numpy(table.rows(numbers.tolist())))
