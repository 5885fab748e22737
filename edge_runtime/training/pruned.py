"""Training that prunes: some steps, importance, smaller tensors, more steps (FedSpine, Yao et al., arXiv 2501.02438).

A pruned model is an ordinary model of its family, so each stage is a backend of its own on smaller weights, which lie in files
beside the update while it lasts; what was trained goes over cut, and so do the optimizer's states where they are float32: an 8-bit
optimizer begins anew. Which groups go says `importance.py`, when `prune_plan.py`. Not the steps (the loop, the backends). One
backend lives at a time, and a few rows of one matrix's importance. Imports numpy, never torch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.importance import Scores, choose, sums
from edge_runtime.layout import A, B, scale
from edge_runtime.model import ModelSpec
from edge_runtime.prune_plan import kept_of, sent, stages
from edge_runtime.pruned_weights import write_pruned
from edge_runtime.pruning import cut, cut_rows, pruned_spec
from edge_runtime.records import Plan
from edge_runtime.training.loop import Backend
from edge_runtime.weights import MappedTensor, release_pages, write_arrays

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, MappedTensor]
Make = Callable[[ModelSpec, Weights, Weights], Backend]  # from a model, its weights, and A and B to begin from
Places = tuple["Array | None", "Array | None"]  # rows and columns, None for all


class PrunedTraining:
    """The stages of one plan with pruning.

    Attributes:
        kept: what is kept now.
        backend: what trains it; hold no other reference to it while `prune` is called.
    """

    backend: Backend

    def __init__(self, spec: ModelSpec, weights: Weights, start: Weights, plan: Plan, make: Make, draft: Path) -> None:
        """
        Args:
            spec, weights, start: the whole model, and the published A and B of its matrices.
            draft: where the update will be, beside which files stand until `close`.

        Raises:
            WireError: the plan begins with what this model does not have; UsageError: the model cannot be pruned.
        """
        assert plan.pruning, "a plan without pruning has no stages"
        self._whole, self._weights, self._plan, self._make, self._draft = spec, weights, plan, make, draft
        self._published = start
        self._scores: Scores | None = None
        self._rule, self._scale = plan.pruning.by, scale(plan.settings)
        self._tensors = {t.name: t for t in spec.tensors}
        self.kept = kept_of(spec, plan.pruning.kept)
        self._stages = stages(plan, self.kept.sparsity(spec))
        self._number, self._files = 0, [Path()] * 2
        self._open({name: cut(of.array(), *self._places(name)) for name, of in start.items()})

    @property
    def spec(self) -> ModelSpec:
        """The model that is left."""
        return pruned_spec(self._whole, self.kept)

    def is_due(self, step: int) -> bool:
        """Whether the model is to be pruned after so many steps of the plan."""
        return step in self._stages

    def prune(self, step: int) -> None:
        """Leave out what matters least, as far as the plan has come, and go on with what is left."""
        if step not in self._stages:
            return
        self._scores = self._scored()
        kept = choose(self._whole, self.kept, self._scores, self._stages[step])
        if kept == self.kept:
            return
        old = {name: self._places(name) for name in self.backend.values()}
        self.kept = kept
        ways = {name: _ways(places, self._places(name)) for name, places in old.items()}
        values = {name: cut(value, *ways[name]).copy() for name, value in self.backend.values().items()}
        states = self._states(ways)
        steps = self.backend.optimizer.steps
        del self.backend
        gc.collect()  # its memory is the next one's
        self._open(values)
        if states:
            self.backend.optimizer.steps = steps
        for name, arrays in states.items():
            for state, array in zip(self.backend.optimizer.states(name, values[name].size), arrays, strict=True):
                state[...] = array

    def deltas(self) -> Iterator[tuple[str, Array]]:
        """What was trained minus its start, flat, in the order of the update."""
        values = self.backend.values()
        for tensor in sent(self._whole, self._plan, self.kept.encode()):
            start = (self._published.get(tensor.name) or self._weights[tensor.name]).array()
            began = cut(start, *self._places(tensor.name))[tuple(slice(size) for size in tensor.shape)]
            yield tensor.name, (values[tensor.name] - began).reshape(-1)

    def close(self) -> None:
        """Delete the files."""
        for path in self._files:
            if path.name:
                path.unlink(missing_ok=True)

    def _open(self, values: Mapping[str, Array]) -> None:
        """A backend of what is kept. Args: values: A, B and where it was trained the head, in their shapes there."""
        before = self._files
        self._number += 1
        self._files = [
            self._draft.with_name(f"{self._draft.name}.{what}-{self._number}") for what in ("weights", "start")
        ]
        weights = write_pruned(self._whole, self.kept, self._weights, self._files[0])
        self._began = start = write_arrays(
            self._files[1], [(name, v.shape, partial(_same, v)) for name, v in values.items()]
        )
        self.backend = self._make(self.spec, {**weights, **{n: t for n, t in start.items() if n in weights}}, start)
        for path in before:
            if path.name:
                path.unlink(missing_ok=True)

    def _scored(self) -> Scores:
        """Importance by what the steps since this backend began have changed, smoothed with that before."""
        found, values, weights = Scores(self._whole), self.backend.values(), self._weights
        for name in values:
            stem = name.removesuffix(A)
            if name == stem or name not in self._published:
                continue
            tensor = self._tensors[stem + ".weight"]
            whole = weights[tensor.name].array()
            weight = cut(whole, *cut_rows(self._whole, self.kept, tensor))
            a, b = values[stem + A], values[stem + B]
            began = self._began[stem + A].array()[: len(a)], self._began[stem + B].array()[:, : len(a)]
            found.add(tensor, *sums(self._rule, weight, began, (a, b), self._scale), self.kept)
            release_pages(whole)
        return found.blended(self._scores)

    def _states(self, ways: Mapping[str, Places]) -> dict[str, list[Array]]:
        """The optimizer's states, cut as their tensors are; none of an optimizer with 8-bit states."""
        if self._plan.settings.optimizer == "adamw8bit":
            return {}
        optimizer, values = self.backend.optimizer, self.backend.values()
        return {
            name: [cut(s.reshape(v.shape), *ways[name]).reshape(-1).copy() for s in optimizer.states(name, v.size)]
            for name, v in values.items()
        }

    def _places(self, name: str) -> Places:
        """The rows and columns that are kept of a whole A, B or tensor of the model."""
        if name in self._tensors:
            return cut_rows(self._whole, self.kept, self._tensors[name])
        end = A if name.endswith(A) else B
        rows, columns = cut_rows(self._whole, self.kept, self._tensors[name.removesuffix(end) + ".weight"])
        return (None, columns) if end == A else (rows, None)


def _ways(old: Places, new: Places) -> Places:
    """Where rows and columns stand among those that were kept before."""
    found = [n if o is None or n is None else np.searchsorted(o, n) for o, n in zip(old, new, strict=True)]
    return found[0], found[1]


def _same(values: Array) -> Array:
    return values
