"""The backend without torch: a model's derived ONNX graphs run block by block in onnxruntime, the optimizer in numpy.

What stands in memory: the trained tensors with their optimizer states; one block's gradients, or with several micro-batches
and without checkpointing every trained block's; the hidden states of one batch; one block's working memory for one micro-batch.
Frozen weights are read from the mapped file, one block at a time, and their pages let go. With checkpointing only block
inputs are kept and each block runs forward again before its backward pass, for all micro-batches in turn, so that a
block's gradients are applied and freed before the next block's appear. Imports numpy and onnxruntime, never torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from edge_runtime.graphs.session import Graphs
from edge_runtime.model import EMBED, ModelSpec
from edge_runtime.records import Plan
from edge_runtime.training.adapters import LoraAdapters
from edge_runtime.training.corpus import Batch
from edge_runtime.training.optimizers import Optimizer
from edge_runtime.training.pages import GradientSums, page_copy
from edge_runtime.weights import MappedTensor, release_pages

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Piece:
    """A micro-batch on its way through the blocks."""

    batch: Batch
    hidden: Array  # (batch, seq, hidden) float32
    bias: Array  # what every block adds to its attention scores


class GraphBackend:
    """Trains the last blocks, or adapters in them, and the head, in float32 on the CPU."""

    name = "onnx"

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, MappedTensor], plan: Plan, graphs: GraphSet, threads: int
    ) -> None:
        self._spec, self._weights, self._plan, self._set = spec, weights, plan, graphs
        self._chosen = plan.chosen
        self._cut = spec.num_blocks - plan.chosen.depth  # the first trained block
        self._kinds = block_kinds(spec)
        self._graphs = Graphs(graphs.graphs, threads)
        self._names = {
            part: dict(zip(relative_names(spec, part), (t.name for t in part_tensors(spec, part)), strict=True))
            for part in range(spec.num_blocks)
        }
        self._head = [t.name for t in spec.suffix(0)]
        self._lora: LoraAdapters | None = None
        if plan.chosen.rank:
            self._lora = LoraAdapters(spec, range(self._cut, spec.num_blocks), plan.chosen.rank, plan.settings)
            self._trained: dict[str, Array] = dict(self._lora.tensors)
            self._trained |= {n: page_copy(weights[n].array()) for n in self._head}
        else:
            self._trained = {t.name: page_copy(weights[t.name].array()) for t in spec.suffix(plan.chosen.depth)}
        self._optimizer = Optimizer(plan.settings, self._head, set(self._lora.tensors) if self._lora else ())
        self._sums = GradientSums()
        self._alone = True  # whether the batch is one micro-batch
        self._open_graphs()

    # what the training loop calls

    def step(self, batch: Batch, features: Array | None = None) -> float:
        """One optimizer step; `features` (batch, seq, hidden) is the prefix's output where it is known. -> mean loss."""
        self._optimizer.begin_step()
        pieces = self.prefix(batch, features)
        self._alone = len(pieces) == 1
        scale = 1.0 / len(batch.labels)
        if self._chosen.depth == 0:
            return self._head_only(pieces, scale)
        if self._chosen.checkpointing:
            return self._layer_by_layer(pieces, scale)
        return self._piece_by_piece(pieces, scale)

    def correct(self, batch: Batch, features: Array | None = None) -> int:
        """How many examples of a batch the model classifies rightly."""
        logits = self.logits(batch, features)
        return int((logits.argmax(-1) == batch.labels).sum())

    def logits(self, batch: Batch, features: Array | None = None) -> Array:
        """(batch, labels) float32."""
        (piece,) = self.prefix(batch, features, micro_batch=len(batch.labels))
        for part in range(self._cut, self._spec.num_blocks):
            with self._tensors(part) as tensors:
                piece.hidden = self._forward(part, piece, tensors)
        feeds = {"hidden": piece.hidden, "mask": batch.mask, **self._head_tensors()}
        return self._graphs[HEAD_FORWARD].run(feeds)["logits"]

    def deltas(self) -> Iterator[tuple[str, Array]]:
        """Trained tensor minus its start, float32, in the order of the plan's suffix, one at a time."""
        for tensor in self._spec.suffix(self._chosen.depth):
            if tensor.name in self._trained:
                base = self._weights[tensor.name].array()
                yield tensor.name, self._trained[tensor.name] - base
                release_pages(base)
            else:
                assert self._lora is not None, "every other tensor of the suffix is trained"
                yield tensor.name, self._lora.delta(tensor)

    def prefix(self, batch: Batch, features: Array | None = None, micro_batch: int = 0) -> list[Piece]:
        """The batch in micro-batches with the frozen prefix's output, block after block for all of them."""
        parts = list(batch.split(micro_batch or self._chosen.micro_batch))
        if features is not None:
            return self._from_features(parts, features)
        pieces = [self._embed(part) for part in parts]
        for part in range(self._cut):
            with self._tensors(part) as tensors:
                for piece in pieces:
                    piece.hidden = self._forward(part, piece, tensors)
        return pieces

    # the three ways through a step

    def _head_only(self, pieces: Sequence[Piece], scale: float) -> float:
        total = 0.0
        for piece in pieces:
            loss, _ = self._head_backward(piece, piece.hidden, scale)
            total += loss
        self._update()
        return total

    def _piece_by_piece(self, pieces: list[Piece], scale: float) -> float:
        """Forward and backward through all trained blocks, one micro-batch after the other; nothing is computed twice."""
        total = 0.0
        last_block = self._spec.num_blocks - 1
        count = len(pieces)
        for number in range(count):
            piece = pieces.pop(0)
            kept: list[dict[str, Array]] = []
            for part in range(self._cut, last_block + 1):
                kept.append(self._saving(part, piece))
                piece.hidden = kept[-1].pop("out")
            loss, gradient = self._head_backward(piece, piece.hidden, scale)
            total += loss
            for part in range(last_block, self._cut - 1, -1):
                gradient = self._backward(part, kept.pop(), gradient)
                if number == count - 1:
                    self._update(part)
        self._update()
        return total

    def _layer_by_layer(self, pieces: list[Piece], scale: float) -> float:
        """Gradient checkpointing (Chen et al. 2016): block inputs are kept, the rest is computed again, block by block."""
        last_block = self._spec.num_blocks - 1
        inputs: list[list[Array]] = []
        for part in range(self._cut, last_block):
            inputs.append([piece.hidden for piece in pieces])
            with self._tensors(part) as tensors:
                for piece in pieces:
                    piece.hidden = self._forward(part, piece, tensors)
        total = 0.0
        backward: list[Array] = []  # the gradient of each micro-batch's hidden state
        for piece in pieces:  # the last block is not run twice: its backward pass follows at once
            kept = self._saving(last_block, piece)
            loss, gradient = self._head_backward(piece, kept.pop("out"), scale)
            total += loss
            backward.append(self._backward(last_block, kept, gradient))
        self._update()
        for part in range(last_block - 1, self._cut - 1, -1):
            hidden = inputs.pop()
            for number, piece in enumerate(pieces):
                piece.hidden = hidden[number]
                kept = self._saving(part, piece)
                del kept["out"]
                backward[number] = self._backward(part, kept, backward[number])
            self._update()
        return total

    # parts of a step

    def _embed(self, batch: Batch) -> Piece:
        feeds: dict[str, Array] = {"ids": batch.ids, "mask": batch.mask}
        mapped = []
        for tensor in part_tensors(self._spec, EMBED):
            index = self._set.row_tables.get(tensor.name)
            if index is None:
                mapped.append(self._weights[tensor.name].array())
                feeds[tensor.name] = mapped[-1]
            else:  # of the vocabulary only the rows at hand
                numbers, places = np.unique(feeds[index], return_inverse=True)
                feeds[tensor.name] = self._weights[tensor.name].rows(numbers.tolist())
                feeds[index] = places.reshape(batch.ids.shape).astype(np.int64)
        found = self._graphs[EMBED_GRAPH].run(feeds)
        for array in mapped:
            release_pages(array)
        return Piece(batch, found["hidden"], found["bias"])

    def _from_features(self, parts: Sequence[Batch], features: Array) -> list[Piece]:
        pieces, start = [], 0
        for batch in parts:
            count, seq = batch.ids.shape
            hidden = np.ascontiguousarray(features[start : start + count, :seq])
            pieces.append(Piece(batch, hidden, self._graphs[BIAS_GRAPH].run({"mask": batch.mask})["bias"]))
            start += count
        return pieces

    def _forward(self, part: int, piece: Piece, tensors: Mapping[str, Array]) -> Array:
        feeds = {"hidden": piece.hidden, "bias": piece.bias, **tensors}
        return self._graphs[self._graph(part, FORWARD)].run(feeds)["out"]

    def _saving(self, part: int, piece: Piece) -> dict[str, Array]:
        """The block's output "out" and what its backward pass needs besides its tensors."""
        with self._tensors(part) as tensors:
            feeds = {"hidden": piece.hidden, "bias": piece.bias}
            found = self._graphs[self._graph(part, SAVING)].run({**feeds, **tensors})
        return {**found, **feeds}

    def _backward(self, part: int, kept: dict[str, Array], gradient: Array) -> Array:
        """Add the block's gradients to the sums; -> the gradient of its input (empty for the first trained block)."""
        name = self._graph(part, FIRST_BACKWARD if part == self._cut else BACKWARD)
        with self._tensors(part) as tensors:
            found = self._graphs[name].run({**kept, "d_out": gradient, **tensors})
        before = found.pop("d_hidden", _NOTHING)
        full = self._lora.names(part) if self._lora else self._names[part]
        for output, value in found.items():
            self._sums.add(full[output.removeprefix(GRADIENT)], value, alone=self._alone)
        return before

    def _head_backward(self, piece: Piece, hidden: Array, scale: float) -> tuple[float, Array]:
        feeds = {"hidden": hidden, "mask": piece.batch.mask, "labels": piece.batch.labels}
        feeds |= {"scale": np.array(scale, np.float32), **self._head_tensors()}
        found = self._graphs[HEAD_BACKWARD].run(feeds)
        for name in self._head:
            self._sums.add(name, found[GRADIENT + name], alone=self._alone)
        return float(found["loss"]), found["d_hidden"]

    def _update(self, part: int | None = None) -> None:
        """Apply and free all gradients, or one block's."""
        names = self._sums.names()
        if part is not None:
            of_block = set((self._lora.names(part) if self._lora else self._names[part]).values())
            names = [name for name in names if name in of_block]
        for name in names:
            self._optimizer.update(name, self._trained[name], self._sums.peek(name))
            self._sums.done(name, alone=self._alone)

    # tensors and graphs

    @contextlib.contextmanager
    def _tensors(self, part: int) -> Iterator[dict[str, Array]]:
        """A block's tensors by their names in the graphs; frozen ones from the file, their pages let go afterwards."""
        mapped: list[Array] = []
        feeds: dict[str, Array] = {}
        for relative, name in self._names[part].items():
            array = self._trained.get(name)
            if array is None:
                array = self._weights[name].array()
                mapped.append(array)
            feeds[relative] = array
        if self._lora and part >= self._cut:
            feeds |= {relative: self._trained[name] for relative, name in self._lora.names(part).items()}
            feeds["lora_scale"] = self._lora.scale
        try:
            yield feeds
        finally:
            for array in mapped:
                release_pages(array)

    def _head_tensors(self) -> dict[str, Array]:
        return {name: self._trained[name] for name in self._head}

    def _graph(self, part: int, suffix: str) -> str:
        lora = LORA if self._lora and part >= self._cut else ""
        return f"block{self._kinds[part]}{lora}{suffix}"

    def _open_graphs(self) -> None:
        trained = range(self._cut, self._spec.num_blocks)
        names = {EMBED_GRAPH, HEAD_BACKWARD}
        names |= {self._graph(part, FORWARD) for part in range(self._cut)}
        names |= {
            self._graph(part, suffix)
            for part in trained
            for suffix in (SAVING, BACKWARD)[: 2 if len(trained) > 1 else 1]
        }
        names |= {self._graph(part, FIRST_BACKWARD) for part in trained[:1]}
        self._graphs.open(sorted(names))


_NOTHING = np.empty(0, np.float32)
