"""A model's network over its own files: the forward graphs of its set, with the memory-mapped weights as inputs.

Nothing is exported, copied or packed, so that a model is ready in milliseconds and its weights are pages of the file, which
the system takes back when memory is short. Not the tokenizer and the labels (`predict.py`), not where a model or its
graphs come from (`source.py`, `graphs/find.py`). Imports the graphs, the weights, numpy and onnxruntime, never torch.

Memory: the pages of the weights that were read (file-backed); a copy of what the file does not hold as float32; one
block's working memory for one batch. Measured for the whole process (MiniLM-L6, x86-64): 45 MiB anonymous when loaded
(35 before; 149 with an exported file), 52 to 56 after a thousand texts of up to 128 tokens (168), 125 mapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_runtime.errors import ModelError
from edge_runtime.graphs.bundle import (
    EMBED_GRAPH,
    FORWARD,
    HEAD_FORWARD,
    GraphSet,
    block_graphs,
    part_tensors,
    relative_names,
)
from edge_runtime.graphs.session import Graph, Graphs
from edge_runtime.model import EMBED
from edge_runtime.source import Source
from edge_runtime.weights import MappedTensor

Array = np.ndarray[Any, np.dtype[Any]]
Step = tuple[Graph, Mapping[str, Array]]  # a graph and the tensors of one part, by their names in it


class MappedNetwork:
    """Logits of one model; never changes, safe to use from several threads.

    Attributes:
        spec: its architecture.
        graph_set: whose graphs run it.
    """

    def __init__(self, source: Source, graph_set: GraphSet, threads: int, before: MappedNetwork | None = None) -> None:
        """Map every tensor; of `before`, the version before this one, keep the graphs and what did not change.

        Args:
            graph_set: one that fits the model (`GraphSet.fits`, which is not asked again: it takes longer than all else).

        Raises:
            ModelError: a file is gone or cut off, a tensor is missing, or onnxruntime cannot run a graph.
        """
        self.spec = spec = source.spec
        self.graph_set: GraphSet = graph_set
        self._graphs: Graphs = (
            before._graphs
            if before is not None and before.graph_set == graph_set
            else Graphs(graph_set.graphs, threads)
        )
        known = before._arrays if before is not None else {}
        self._arrays: dict[MappedTensor, Array] = {}
        for tensor in spec.tensors:
            place = source.weights.get(tensor.name)
            if place is None or place.shape != tensor.shape:
                raise ModelError(f"the model needs {tensor.name!r} of {tensor.shape}, it has {place and place.shape}")
            self._arrays[place] = known[place] if place in known else _mapped(place)
        arrays = {t.name: self._arrays[source.weights[t.name]] for t in spec.tensors}
        names = [[t.name for t in part_tensors(spec, part)] for part in range(spec.num_blocks)]
        self._embed: Step = self._graphs[EMBED_GRAPH], {t.name: arrays[t.name] for t in part_tensors(spec, EMBED)}
        self._blocks: list[Step] = [
            (
                self._graphs[name + FORWARD],
                {
                    relative: arrays[name]
                    for relative, name in zip(relative_names(spec, part), names[part], strict=True)
                },
            )
            for part, name in enumerate(block_graphs(spec))
        ]
        self._head: Step = self._graphs[HEAD_FORWARD], {t.name: arrays[t.name] for t in spec.suffix(0)}

    def logits(self, ids: Array, mask: Array) -> Array:
        """Logits (batch, labels) float32 for ids and mask (batch, seq) int64.

        Raises:
            ModelError: the numbers are not those of the model's tokenizer.
        """
        graph, tensors = self._embed
        found = graph.run({"ids": ids, "mask": mask, **tensors})
        hidden, bias = found["hidden"], found["bias"]  # (batch, seq, hidden)
        for graph, tensors in self._blocks:
            hidden = graph.run({"hidden": hidden, "bias": bias, **tensors})["out"]
        graph, tensors = self._head
        return graph.run({"hidden": hidden, "mask": mask, **tensors})["logits"]


def _mapped(place: MappedTensor) -> Array:
    try:
        return place.array()
    except (OSError, ValueError) as error:  # numpy says ValueError of a file that is shorter than the tensor
        raise ModelError(f"{place.path} is gone or cut off ({error}): fetch or train the model again") from None
