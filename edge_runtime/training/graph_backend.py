"""The backend without torch: a model's derived ONNX graphs run block by block in onnxruntime, the optimizer in numpy.

What stands in memory: the trained tensors with their optimizer states; one block's gradients, or with several micro-batches
and without checkpointing every trained block's; the hidden states of one batch; one block's working memory for one micro-batch.
Frozen weights are read from the mapped file, one block at a time, and their pages let go. With checkpointing only block
inputs are kept and each block runs forward again before its backward pass, for all micro-batches in turn, so that a
block's gradients are applied and freed before the next block's appear. Imports numpy and onnxruntime, never torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
    SAVING,
    GraphSet,
    block_graphs,
    part_tensors,
    relative_names,
)
from edge_runtime.graphs.quantized import QuantizedTensors
from edge_runtime.graphs.session import Graphs
from edge_runtime.layout import ranks_of
from edge_runtime.model import EMBED, ModelSpec
from edge_runtime.records import Plan
from edge_runtime.training.adapters import LoraAdapters, deltas, pull_back
from edge_runtime.training.corpus import Batch
from edge_runtime.training.graph_adapters import GraphAdapters
from edge_runtime.training.masked import GraphMasks, masked_matrices
from edge_runtime.training.optimizers import Optimizer
from edge_runtime.training.pages import GradientSums, Pool, page_copy
from edge_runtime.weights import MappedTensor, release_pages

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Piece:
    """A micro-batch on its way through the blocks."""

    batch: Batch
    hidden: Array  # (batch, seq, hidden) float32
    bias: Array  # what every block adds to its attention scores


class GraphBackend:
    """Trains the last blocks, or adapters or masked entries in them, and the head, in float32 on the CPU."""

    name = "onnx"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, MappedTensor],
        plan: Plan,
        graphs: GraphSet,
        threads: int,
        scratch: Path,
        start: Mapping[str, MappedTensor] | None = None,
    ) -> None:
        """`scratch` is the device's cache folder, for an int8 copy of the prefix; `start` what adapters begin from."""
        self._spec, self._weights, self._plan, self._set = spec, weights, plan, graphs
        self._chosen = plan.chosen
        self._cut = spec.num_blocks - plan.chosen.depth  # the first trained block
        self._of_block = block_graphs(spec)
        self._graphs = Graphs(graphs.graphs, threads)
        self._names = {
            part: dict(zip(relative_names(spec, part), (t.name for t in part_tensors(spec, part)), strict=True))
            for part in range(spec.num_blocks)
        }
        self._head = [t.name for t in spec.suffix(0)]
        self._lora: GraphAdapters | None = None
        self._masks: GraphMasks | None = None
        if plan.chosen.rank and plan.chosen.depth:
            self._lora = GraphAdapters(spec, LoraAdapters(spec, plan, start), ranks_of(spec, plan))
            self._trained: dict[str, Array] = {n: self._lora.tensors[n] for n in self._lora.trained}
            self._trained |= {n: page_copy(weights[n].array()) for n in self._head}
        elif plan.settings.mask_every:
            self._masks = GraphMasks(spec, masked_matrices(spec, weights, plan))
            self._trained = {**self._masks.values, **{n: page_copy(weights[n].array()) for n in self._head}}
        else:
            self._trained = {t.name: page_copy(weights[t.name].array()) for t in spec.suffix(plan.chosen.depth)}
        self._int8: QuantizedTensors | None = None
        if plan.chosen.precision == "int8" and self._cut:
            self._int8 = QuantizedTensors.open(scratch, spec, weights, range(self._cut))
        self.optimizer = Optimizer(plan.settings, self._head, self._lora.trained if self._lora else ())
        self._sums = GradientSums()
        self._pool = Pool()
        self._open_graphs()

    # what the training loop calls

    def step(self, batch: Batch, features: Array | None = None) -> float:
        """One optimizer step; `features` (batch, seq, hidden) is the prefix's output where it is known. -> mean loss."""
        self.optimizer.begin_step()
        pieces = self.prefix(batch, features)
        scale = 1.0 / len(batch.labels)
        if self._chosen.depth == 0:
            return self._head_only(pieces, scale)
        if self._chosen.checkpointing:
            return self._layer_by_layer(pieces, scale)
        return self._piece_by_piece(pieces, scale)

    def correct(self, batch: Batch) -> Array:
        right: Array = self.logits(batch).argmax(-1) == batch.labels
        return right

    def logits(self, batch: Batch, features: Array | None = None) -> Array:
        """(batch, labels) float32."""
        (piece,) = self.prefix(batch, features, micro_batch=len(batch.labels))
        for part in range(self._cut, self._spec.num_blocks):
            with self._tensors(part) as tensors:
                piece.hidden = self._forward(part, piece, tensors, ("hidden", 0, part % 2))
        feeds = {"hidden": piece.hidden, "mask": batch.mask, **self._head_tensors()}
        return self._graphs[HEAD_FORWARD].run(feeds)["logits"]

    def deltas(self) -> Iterator[tuple[str, Array]]:
        """Trained tensor minus its start, float32 and flat, in the order of the plan's layout, a piece at a time."""
        return deltas(self._spec, self._plan, self._changes, self._lora.adapters if self._lora else None)

    def _changes(self, name: str) -> Iterator[Array]:
        """A trained tensor minus its start, flat, a piece at a time."""
        if self._lora and name in self._lora.tensors:
            return self._lora.adapters.changes(name)
        if self._masks and name in self._masks.matrices:
            return self._masks.matrices[name].changes(self._trained[name])
        return self._weights[name].differences(self._trained[name])

    def values(self) -> dict[str, Array]:
        """What is trained, by name."""
        return dict(self._trained)

    def arrays(self) -> Iterator[Array]:
        """Everything that steps change, in a fixed order."""
        for name, array in self._trained.items():
            yield array
            yield from self.optimizer.states(name, array.size)

    def prefix(self, batch: Batch, features: Array | None = None, micro_batch: int = 0) -> list[Piece]:
        """The batch in micro-batches with the frozen prefix's output, block after block for all of them."""
        parts = list(batch.split(micro_batch or self._chosen.micro_batch))
        if features is not None:
            return self._from_features(parts, features)
        pieces = [self._embed(part, number) for number, part in enumerate(parts)]
        for part in range(self._cut):
            with self._tensors(part) as tensors:
                for number, piece in enumerate(pieces):
                    piece.hidden = self._forward(part, piece, tensors, ("hidden", number, part % 2))
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
                kept.append(self._saving(part, piece, part))
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
                for number, piece in enumerate(pieces):
                    piece.hidden = self._forward(part, piece, tensors, ("input", number, part + 1))
        total = 0.0
        backward: list[Array] = []  # the gradient of each micro-batch's hidden state
        for number, piece in enumerate(pieces):  # the last block is not run twice: its backward pass follows at once
            kept = self._saving(last_block, piece)
            loss, gradient = self._head_backward(piece, kept.pop("out"), scale, number)
            total += loss
            backward.append(self._backward(last_block, kept, gradient, number))
        self._update()
        for part in range(last_block - 1, self._cut - 1, -1):
            hidden = inputs.pop()
            for number, piece in enumerate(pieces):
                piece.hidden = hidden[number]
                kept = self._saving(part, piece)
                del kept["out"]
                backward[number] = self._backward(part, kept, backward[number], number)
            self._update()
        return total

    def features(self, batch: Batch) -> Array:
        """The prefix's output (batch, seq, hidden) float32, zero at padding: what a cache keeps."""
        found = np.zeros((*batch.ids.shape, self._spec.hidden), np.float32)
        start = 0
        for piece in self.prefix(batch):
            count, seq = piece.batch.ids.shape
            np.multiply(piece.hidden, piece.batch.mask[:, :, None], out=found[start : start + count, :seq])
            start += count
        return found

    # what the probe measures: they disturb nothing but the gradient sums

    def saved_bytes(self, batch: Batch) -> int:
        """What the last block keeps of a batch for its backward pass."""
        (piece,) = self.prefix(batch, micro_batch=len(batch.labels))
        kept = self._saving(self._spec.num_blocks - 1, piece)
        return sum(array.nbytes for name, array in kept.items() if name not in ("bias", "hidden"))

    def block(self, batch: Batch, pieces: int) -> Callable[[], object]:
        """A frozen block's forward pass on so many micro-batches."""
        piece = self._embed(batch)

        def forward() -> None:
            with self._tensors(0) as tensors:
                for _ in range(pieces):
                    self._forward(0, piece, tensors, ("timed",))

        return forward

    # parts of a step

    def _embed(self, batch: Batch, number: int = 0) -> Piece:
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
        found = self._run(EMBED_GRAPH, feeds, lambda name: (name, number, 1))
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

    def _forward(self, part: int, piece: Piece, tensors: Mapping[str, Array], place: object) -> Array:
        feeds = {"hidden": piece.hidden, "bias": piece.bias, **tensors}
        return self._run(self._graph(part, FORWARD), feeds, lambda name: place)["out"]

    def _saving(self, part: int, piece: Piece, place: int = 0) -> dict[str, Array]:
        """The block's output "out" and what its backward pass needs besides its tensors; valid until `place` is used again."""
        with self._tensors(part) as tensors:
            feeds = {"hidden": piece.hidden, "bias": piece.bias}
            found = self._run(self._graph(part, SAVING), {**feeds, **tensors}, lambda name: ("saved", place, name))
        return {**found, **feeds}

    def _run(self, graph: str, feeds: Mapping[str, Array], key: Callable[[str], object]) -> dict[str, Array]:
        """Run a graph with its outputs in the pool's arrays of the given keys."""
        return self._graphs[graph].run_into(feeds, lambda name, shape, kind: self._pool.take(key(name), shape, kind))

    def _backward(self, part: int, kept: dict[str, Array], gradient: Array, number: int = 0) -> Array:
        """Add the block's gradients to the sums; -> the gradient of its input (empty for the first trained block)."""
        graph = self._graph(part, FIRST_BACKWARD if part == self._cut else BACKWARD)
        full = self._trained_names(part)
        masks = self._masks.matrices if self._masks else {}
        wanted = {"d_hidden", *(GRADIENT + relative for relative in full)}
        if part == self._cut and not full:  # nothing of it is trained
            return _NOTHING

        def place(name: str, shape: tuple[int, ...], kind: str) -> Array:
            if name == "d_hidden":
                return self._pool.take(("gradient", number, part % 2), shape, kind)
            relative = name.removeprefix(GRADIENT)
            if full[relative] in masks:  # dense, until its entries are taken out of it
                return self._pool.take(("dense", relative), shape)
            return self._sums.place(full[relative], shape, relative)

        with self._tensors(part) as tensors:
            found = self._graphs[graph].run_into({**kept, "d_out": gradient, **tensors}, place, wanted)
        before = found.pop("d_hidden", _NOTHING)
        for output, value in found.items():
            relative = output.removeprefix(GRADIENT)
            name = full[relative]
            if name in masks:
                self._sums.add_pieces(name, masks[name].shape, masks[name].gather(value), relative)
            else:
                self._sums.add(name, value)
        return before

    def _head_backward(self, piece: Piece, hidden: Array, scale: float, number: int = 0) -> tuple[float, Array]:
        feeds = {"hidden": hidden, "mask": piece.batch.mask, "labels": piece.batch.labels}
        feeds |= {"scale": np.array(scale, np.float32), **self._head_tensors()}

        def place(name: str, shape: tuple[int, ...], kind: str) -> Array:
            if name.startswith(GRADIENT):
                return self._sums.place(name.removeprefix(GRADIENT), shape)
            return self._pool.take(
                ("gradient" if name == "d_hidden" else name, number, self._spec.num_blocks % 2), shape, kind
            )

        found = self._graphs[HEAD_BACKWARD].run_into(feeds, place)
        for name in self._head:
            self._sums.add(name, found[GRADIENT + name])
        return float(found["loss"]), found["d_hidden"]

    def _update(self, part: int | None = None) -> None:
        """Apply and free all gradients, or one block's."""
        names = self._sums.names()
        if part is not None:
            of_block = set(self._trained_names(part).values())
            names = [name for name in names if name in of_block]
        mu = self._plan.settings.proximal_mu
        for name in names:
            gradient = self._sums.take(name)
            if mu:
                pull_back(gradient, self._changes(name), mu)
            self.optimizer.update(name, self._trained[name], gradient)
        if self._masks:
            self._masks.changed()

    def _trained_names(self, part: int) -> Mapping[str, str]:
        """What is trained in a block: its name in the graphs -> its full name."""
        if self._lora:
            return self._lora.trained_names(part)
        return self._masks.trained_names(part) if self._masks else self._names[part]

    # tensors and graphs

    @contextlib.contextmanager
    def _tensors(self, part: int) -> Iterator[dict[str, Array]]:
        """A block's tensors by their names in the graphs; frozen ones from the file, their pages let go afterwards."""
        mapped: list[Array] = []
        feeds = self._masks.feeds(part) if self._masks and part >= self._cut else {}
        for relative, name in self._names[part].items():
            if relative in feeds:
                continue
            array = self._trained.get(name)
            if array is None:
                array = self._weights[name].array()
                mapped.append(array)
            feeds[relative] = array
        if self._int8 and part < self._cut:
            quantized = self._int8.feeds(part)
            feeds |= quantized
            mapped += list(quantized.values())[:1]  # letting go of one lets go of all: they are one map
        if self._lora and part >= self._cut:
            feeds |= self._lora.feeds(part)
        try:
            yield feeds
        finally:
            for array in mapped:
                release_pages(array)

    def _head_tensors(self) -> dict[str, Array]:
        return {name: self._trained[name] for name in self._head}

    def _graph(self, part: int, suffix: str) -> str:
        if self._int8 and part < self._cut and suffix == FORWARD:
            suffix = FORWARD_INT8
        lora = LORA if self._lora and part >= self._cut else ""
        return self._of_block[part] + lora + suffix

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
