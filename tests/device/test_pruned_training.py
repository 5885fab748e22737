"""Training that prunes: the same steps as a whole network whose groups are zero, importance from what A and B moved, plans that lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_models import bert
from edge_runtime import prune_plan
from edge_runtime.errors import WireError
from edge_runtime.graphs.find import read_graphs
from edge_runtime.importance import Scores, any_kept, choose, sums
from edge_runtime.layout import A, B, adapter_tensors
from edge_runtime.model import EMBED, ModelSpec
from edge_runtime.prune_plan import numbers_kept, offer_misfit, planned, prune_steps, sent, stages
from edge_runtime.pruning import CHANNELS, HEADS, Kept, cut, cut_rows, expanded, group_size, groups_of, kept_groups
from edge_runtime.records import CostRow, Plan, Pruning, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.training.graph_backend import GraphBackend
from edge_runtime.training.pruned import PrunedTraining
from edge_runtime.training.torch_backend import TorchBackend
from edge_runtime.weights import MappedTensor
from tests.networks import bert_spec, write_random, write_weights

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, MappedTensor]
SPEC = bert_spec(24, 4, 20, blocks=2)
RANK = 4
FULL = Kept.full(SPEC)


def plan(steps: int = 4, *, rank: int = RANK, depth: int = 2, adapters: str = "ab", kept: bytes = b"", to: float = 0.5, every: int = 2,
         by: str = "lora", **settings: Any) -> Plan:  # fmt: skip
    row = CostRow(depth, False, 8, 0, 0.0, 0.0, 0, rank=rank)
    usual = {
        "lora_rank": RANK,
        "adapter_learning_rate": 0.05,
        "head_learning_rate": 0.1,
        "optimizer": "sgd",
        **settings,
    }
    return Plan(row, TrainSettings(**usual), steps, adapters=adapters, pruning=Pruning(kept, to, every, by))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MappedTensor]:
    return write_weights(SPEC, tmp_path_factory.mktemp("weights") / "weights.f32")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MappedTensor]:
    """A and B of all matrices, none of them zero."""
    tensors = adapter_tensors(SPEC, dict.fromkeys(range(2), RANK), ())
    return write_random(tmp_path_factory.mktemp("start") / "start.f32", {t.name: t.shape for t in tensors}, 5)


def batch(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    mask = np.ones((8, 9), np.int64)
    words = next(t.shape[0] for t in SPEC.tensors if t.part == EMBED)
    return Batch(random.integers(1, words, mask.shape), mask, random.integers(0, 3, 8))


def train(
    wanted: Plan, weights: Mapping[str, MappedTensor], start: Mapping[str, MappedTensor], folder: Path,
    after: Callable[[int, PrunedTraining], None] = lambda step, training: None,
) -> PrunedTraining:  # fmt: skip
    """As the worker does it."""

    def make(spec: ModelSpec, given: Mapping[str, MappedTensor], begun: Mapping[str, MappedTensor]) -> TorchBackend:
        return TorchBackend(spec, given, wanted, 1, begun)

    training = PrunedTraining(SPEC, weights, start, wanted, make, folder / "update")
    for step in range(1, wanted.steps + 1):
        training.backend.step(batch(step))
        training.prune(step) if step < wanted.steps or wanted.steps == 1 else None
        after(step, training)
    return training


def zeroed(backend: TorchBackend, kept: Kept) -> None:
    """Set what a kept model does not have to zero, in W_0, biases, A and B."""
    with torch.no_grad():
        values, named = backend.values(), dict(backend._model.named_parameters())
        for tensor in SPEC.tensors:
            rows, columns = cut_rows(SPEC, kept, tensor)
            array = named[tensor.name].detach().numpy()
            array[...] = expanded(cut(array, rows, columns), tensor.shape, rows, columns)
            stem = tensor.name.removesuffix(".weight")
            if stem + A in values:
                a, b = values[stem + A], values[stem + B]
                a[...] = expanded(cut(a, None, columns), a.shape, None, columns)
                b[...] = expanded(cut(b, rows, None), b.shape, rows, None)


@pytest.mark.parametrize("how", [{"optimizer": "sgd"}, {"optimizer": "adamw", "adapter_learning_rate": 0.002}, {"optimizer": "momentum", "rank": 3}], ids=str)  # fmt: skip
def test_a_pruned_model_trains_on_as_the_whole_one_whose_groups_are_zero(
    how: dict[str, Any], weights: dict[str, MappedTensor], start: dict[str, MappedTensor], tmp_path: Path
) -> None:
    wanted = plan(steps=6, **how)
    kept: dict[int, Kept] = {}
    training = train(wanted, weights, start, tmp_path, lambda step, of: kept.update({step: of.kept}))
    whole = TorchBackend(SPEC, weights, wanted, 1, start)
    for step in range(1, 7):
        whole.step(batch(step))
        zeroed(whole, kept[step])
    assert [round(kept[step].sparsity(SPEC), 2) for step in (1, 2, 4, 6)] == [0, 0.49, 0.5, 0.5]
    ours, theirs = training.backend.values(), whole.values()
    for name, value in ours.items():
        places = training._places(name)
        assert np.abs(value - cut(theirs[name], *places)).max() < 3e-5, name
    moved = dict(training.deltas())
    assert list(moved) == [t.name for t in sent(SPEC, wanted, training.kept.encode())]
    for tensor in sent(SPEC, wanted, training.kept.encode()):
        began = (start.get(tensor.name) or weights[tensor.name]).array()
        began = cut(began, *training._places(tensor.name))[tuple(slice(n) for n in tensor.shape)]
        assert np.array_equal(moved[tensor.name], (ours[tensor.name] - began).reshape(-1))
        assert moved[tensor.name].any() or tensor.name.endswith("bias")
    training.close()
    assert not list(tmp_path.iterdir()), "no file of the stages is left"


def test_both_backends_prune_and_train_alike(tmp_path: Path) -> None:
    spec = bert_spec(128, 2, 512, blocks=2)  # one of those that graphs are bundled for
    weights = write_weights(spec, tmp_path / "weights.f32")
    tensors = adapter_tensors(spec, dict.fromkeys(range(2), RANK), ())
    start = write_random(tmp_path / "start.f32", {t.name: t.shape for t in tensors}, 5)
    wanted, graphs = plan(optimizer="adamw", adapter_learning_rate=0.001), bert.bundled_graphs(spec)
    assert graphs

    def torch_backend(of: ModelSpec, given: Weights, begun: Weights) -> TorchBackend:
        return TorchBackend(of, given, wanted, 1, begun)

    def graph_backend(of: ModelSpec, given: Weights, begun: Weights) -> GraphBackend:
        return GraphBackend(of, given, wanted, read_graphs(graphs), 1, tmp_path, begun)

    found = []
    for make in (torch_backend, graph_backend):
        training = PrunedTraining(spec, weights, start, wanted, make, tmp_path / "update")
        for step in range(1, 5):
            training.backend.step(batch(step))
            training.prune(step)
        found.append((training.kept, {name: np.array(piece) for name, piece in training.deltas()}))
    assert found[0][0] == found[1][0] and found[0][0].sparsity(spec) == pytest.approx(0.5)
    for name, moved in found[0][1].items():
        assert np.abs(moved - found[1][1][name]).max() < 1e-4 + 0.01 * np.abs(moved).max(), name


def test_an_eight_bit_optimizer_goes_on_anew_and_a_single_step_prunes_too(
    weights: dict[str, MappedTensor], start: dict[str, MappedTensor], tmp_path: Path
) -> None:
    training = train(plan(steps=4, optimizer="adamw8bit"), weights, start, tmp_path)
    assert training.backend.optimizer.steps == 2
    training = train(plan(steps=1), weights, start, tmp_path)
    assert training.kept.sparsity(SPEC) == pytest.approx(0.5)


def test_a_device_goes_on_with_what_it_has_kept_and_prunes_no_further_than_asked(
    weights: dict[str, MappedTensor], start: dict[str, MappedTensor], tmp_path: Path
) -> None:
    first = train(plan(to=0.25), weights, start, tmp_path)
    again = train(plan(kept=first.kept.encode(), to=0.25), weights, start, tmp_path)
    assert again.kept == first.kept
    more = train(plan(kept=first.kept.encode(), to=0.5), weights, start, tmp_path)
    assert more.kept.within(first.kept) and more.kept.sparsity(SPEC) == pytest.approx(0.5)
    with pytest.raises(WireError):
        train(plan(kept=b"\xff"), weights, start, tmp_path)


@pytest.mark.parametrize("rule", prune_plan.RULES)
def test_importance_is_what_the_paper_says_entry_by_entry(rule: str) -> None:
    random = np.random.default_rng(3)
    weight, a0, b0 = (random.normal(size=shape) for shape in ((6, 5), (2, 5), (6, 2)))
    a, b = a0 + 0.1 * random.normal(size=a0.shape), b0 + 0.1 * random.normal(size=b0.shape)
    whole, change = weight + 1.5 * b @ a, b @ a - b0 @ a0
    wanted = {"lora": (change * whole) ** 2, "magnitude": np.abs(whole), "taylor": np.abs(change * whole)}[rule]
    by_row, by_column = sums(rule, weight, (a0, b0), (a, b), 1.5)
    assert np.allclose(by_row, wanted.sum(axis=1)) and np.allclose(by_column, wanted.sum(axis=0))


def test_a_heads_importance_is_its_rows_of_q_k_v_and_columns_of_o_and_a_channels_its_row_and_column() -> None:
    random, kept = np.random.default_rng(4), any_kept(SPEC, FULL, 0.4)
    scores, wanted = Scores(SPEC), {HEADS: np.zeros((2, 4)), CHANNELS: np.zeros((2, 20))}
    for tensor in SPEC.tensors:
        if tensor.part < 0 or not tensor.is_adapted or tensor.part == 2:
            continue
        entries, places = random.random(tensor.shape), cut_rows(SPEC, kept, tensor)
        entries = cut(entries, *places)
        scores.add(tensor, entries.sum(axis=1), entries.sum(axis=0), kept)
        dense = expanded(entries, tensor.shape, *places)
        for axis, group in enumerate(groups_of(SPEC, tensor)):
            if group:
                by = dense.sum(axis=1 - axis).reshape(-1, group_size(SPEC, group)).sum(axis=1)
                wanted[group][tensor.part] += by
    assert np.allclose(scores.heads, wanted[HEADS]) and np.allclose(scores.channels, wanted[CHANNELS])


def test_the_least_important_groups_go_and_each_block_keeps_one() -> None:
    scores = Scores(SPEC)
    for block in range(2):
        scores.heads[block][...] = [4, 3, 2, 1] if block else [1, 2, 3, 4]
        scores.channels[block][...] = np.arange(20)
    kept = choose(SPEC, FULL, scores, 0.5)
    assert [list(kept_groups(SPEC, kept, block)[0]) for block in (0, 1)] == [
        [False, False, True, True],
        [True, True, False, False],
    ]
    assert kept_groups(SPEC, kept, 0)[1].tolist() == [False] * 10 + [True] * 10
    least = choose(SPEC, FULL, scores, 0.99)
    assert [(least.num_heads(b), least.num_channels(b)) for b in (0, 1)] == [(1, 1), (1, 1)]
    assert choose(SPEC, kept, Scores(SPEC), 0.5) == kept, "of what is gone nothing comes back"


def test_a_higher_sparsity_never_keeps_more() -> None:
    numbers = [numbers_kept(SPEC, FULL, s / 200) for s in range(199)]
    assert all(a >= c and b >= d for (a, b), (c, d) in itertools.pairwise(numbers))
    assert numbers[0] == (8, 40) and numbers[100] == (4, 20)


def test_prunings_leave_steps_to_recover() -> None:
    assert prune_steps(100, 20) == (20, 40, 60, 80) and prune_steps(90, 20) == (20, 40, 60, 80)
    assert prune_steps(7, 20) == (3, 6) and prune_steps(2, 20) == (1,) and prune_steps(1, 20) == (1,)
    assert list(stages(plan(80, every=20), 0.0).values()) == pytest.approx([0.5 * 19 / 27, 0.5 * 26 / 27, 0.5])
    assert list(stages(plan(80, every=20), 0.2).values()) == pytest.approx(
        [0.2 + 0.3 * 19 / 27, 0.2 + 0.3 * 26 / 27, 0.5]
    )
    assert stages(plan(80, every=20, by="taylor"), 0.2) == {20: 0.5}
    assert stages(plan(80), 0.5) == {}


def test_the_values_of_an_update_are_counted_before_it_is_known_what_is_kept() -> None:
    wanted = plan(to=0.4)
    before = sum(t.num_bytes for t in planned(SPEC, wanted))
    for seed in range(5):
        scores, random = Scores(SPEC), np.random.default_rng(seed)
        for array in (*scores.heads, *scores.channels):
            array[...] = random.random(array.shape) ** 4
        kept = choose(SPEC, FULL, scores, 0.4)
        assert sum(t.num_bytes for t in sent(SPEC, wanted, kept.encode())) == before
        assert offer_misfit(SPEC, wanted, kept.encode()) == ""


def test_what_an_update_says_it_has_kept_is_held_against_its_plan() -> None:
    kept = any_kept(SPEC, FULL, 0.4)
    wanted = plan(to=0.4)
    assert offer_misfit(SPEC, replace(wanted, pruning=None), b"") == ""
    assert offer_misfit(SPEC, replace(wanted, pruning=None), kept.encode()) == "the plan prunes nothing"
    assert offer_misfit(SPEC, wanted, b"") == "the update does not say what it has kept"
    assert "wanted 8" in offer_misfit(SPEC, wanted, kept.encode() + b"\0") or "bytes" in offer_misfit(SPEC, wanted, kept.encode() + b"\0")  # fmt: skip
    assert "keeps no heads" in offer_misfit(SPEC, wanted, bytes(len(kept.encode())))
    assert "8 heads and 40 channels, the plan 5 and 24" in offer_misfit(SPEC, wanted, FULL.encode())
    other = plan(kept=any_kept(SPEC, FULL, 0.3).encode(), to=0.4)
    mirrored = Kept.of(*([~m | (np.arange(m.size) == 0) for m in of] for of in zip(*(kept_groups(SPEC, kept, b) for b in (0, 1)), strict=True)))  # fmt: skip
    assert offer_misfit(SPEC, other, mirrored.encode()) == "the update keeps what its plan did not have"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"by": "chance"}, "pruning by 'chance' is not known"),
        ({"kept": b"\0" * 8}, "keeps no heads"),
        ({"kept": b"\xf0"}, "bytes say what a pruned model keeps"),
        ({"depth": 1}, "pruning without adapters in all matrices"),
        ({"adapters": "b"}, "pruning without adapters in all matrices"),
        ({"lora_targets": ("q",)}, "pruning without adapters in all matrices"),
        ({"proximal_mu": 0.1}, "pruning with proximal_mu"),
    ],
)
def test_a_plan_whose_pruning_does_not_hold_together_is_told_so(changes: dict[str, Any], why: str) -> None:
    found = prune_plan.misfit(SPEC, plan(**changes))
    assert why in found and bool(found) == bool(why)
