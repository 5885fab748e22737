"""LoRA and FedProx in both backends: the same numbers, what is trained and what stays, what an update begins from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_models import bert
from edge_runtime.errors import ModelError
from edge_runtime.graphs.find import read_graphs
from edge_runtime.layout import A, B, layout
from edge_runtime.model import EMBED, ModelSpec
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.adapters import LoraAdapters, random_a
from edge_runtime.training.corpus import Batch
from edge_runtime.training.graph_backend import GraphBackend
from edge_runtime.training.torch_backend import TorchBackend
from edge_runtime.weights import MappedTensor
from tests.networks import bert_spec, write_random, write_weights

Array = np.ndarray[Any, np.dtype[Any]]
Backend = GraphBackend | TorchBackend
Make = Callable[..., Backend]
BACKENDS = ("onnx", "torch")
BLOCKS, STEPS = 3, 4


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return bert_spec(blocks=BLOCKS)


@pytest.fixture(scope="module")
def weights(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, MappedTensor]:
    return write_weights(spec, tmp_path_factory.mktemp("weights") / "weights.f32")


def plan(depth: int = 2, *, ranks: tuple[int, ...] = (), adapters: str = "ab", **how: Any) -> Plan:
    rank, micro, checkpointing = how.pop("rank", 4), how.pop("micro", 16), how.pop("checkpointing", False)
    row = CostRow(depth, checkpointing, micro, 0, 0.0, 0.0, 0, rank=rank)
    settings = {"lora_rank": rank, "optimizer": "sgd", "adapter_learning_rate": 0.3, "head_learning_rate": 0.3, **how}
    return Plan(row, TrainSettings(**settings), STEPS, ranks, adapters)


@pytest.fixture
def make(spec: ModelSpec, weights: dict[str, MappedTensor], tmp_path: Path) -> Make:
    """A backend by name."""

    def made(name: str, wanted: Plan, start: Mapping[str, MappedTensor] | None = None) -> Backend:
        if name == "torch":
            return TorchBackend(spec, weights, wanted, 1, start)
        path = bert.bundled_graphs(spec)
        assert path is not None
        return GraphBackend(spec, weights, wanted, read_graphs(path), 1, tmp_path, start)

    return made


def batch(spec: ModelSpec, seed: int) -> Batch:
    """Texts of different lengths, one of a single token."""
    random = np.random.default_rng(seed)
    lengths = np.array([13, *random.integers(1, 14, 4), 1])
    mask = (np.arange(13)[None] < lengths[:, None]).astype(np.int64)
    words = next(t.shape[0] for t in spec.tensors if t.part == EMBED)
    return Batch(random.integers(1, words, mask.shape) * mask, mask, random.integers(0, 3, len(lengths)))


def trained(backend: Backend, spec: ModelSpec, steps: int = STEPS) -> tuple[list[float], dict[str, Array]]:
    """-> losses, the update's tensors flat."""
    losses = [backend.step(batch(spec, seed)) for seed in range(steps)]
    found: dict[str, list[Array]] = {}
    for name, piece in backend.deltas():
        found.setdefault(name, []).append(np.array(piece))
    return losses, {name: np.concatenate(pieces) for name, pieces in found.items()}


CASES: list[dict[str, Any]] = [
    {"depth": 3, "ranks": (1, 4, 2), "lora_targets": ("q", "v", "down"), "micro": 4},
    {"depth": 2, "ranks": (8, 3), "rank": 8, "checkpointing": True, "micro": 2, "lora_alpha": 4.0},
    {"depth": 2, "adapters": "b", "lora_targets": ("attention.output.dense", "up"), "micro": 4},
    {"depth": 1, "rank": 5, "adapters": "", "checkpointing": True},
    {"depth": 2, "optimizer": "momentum", "adapter_learning_rate": 0.05, "proximal_mu": 0.5, "ranks": (2, 4)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_backends_train_the_same_adapters(spec: ModelSpec, make: Make, case: dict[str, Any]) -> None:
    wanted = plan(**case)
    (losses, graphs), (again, network) = (trained(make(name, wanted), spec) for name in BACKENDS)
    assert losses == pytest.approx(again, rel=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3
    assert list(graphs) == list(network) == [t.name for t in layout(spec, wanted)]
    for tensor in layout(spec, wanted):
        ours, theirs = graphs[tensor.name], network[tensor.name]
        assert ours.shape == theirs.shape == (tensor.size,)
        assert abs(ours - theirs).max() <= 2e-4 * max(abs(theirs).max(), 1e-3), tensor.name
    assert any(abs(d).max() > 1e-3 for n, d in network.items() if n.endswith(B) or not case.get("adapters", "ab"))


@pytest.mark.parametrize("name", BACKENDS)
def test_an_update_as_adapters_is_the_dense_one_of_the_same_training(name: str, spec: ModelSpec, make: Make) -> None:
    adapters = trained(make(name, plan(seed=3)), spec)[1]
    dense = trained(make(name, plan(seed=3, adapters="")), spec)[1]
    assert list(dense) == [t.name for t in spec.suffix(2)]
    for tensor in spec.suffix(2):
        stem = tensor.name.removesuffix(".weight")
        if stem + A in adapters:
            outputs, inputs = tensor.shape
            a = adapters[stem + A].reshape(4, inputs) + random_a(3, stem + A, 4, inputs)
            product = adapters[stem + B].reshape(outputs, 4) @ a * np.float32(16 / 4)
            assert dense[tensor.name].reshape(tensor.shape) == pytest.approx(product, rel=1e-5, abs=1e-5)
        elif tensor.part < BLOCKS:
            assert not dense[tensor.name].any()
        else:
            assert np.array_equal(dense[tensor.name], adapters[tensor.name])


@pytest.mark.parametrize("name", BACKENDS)
def test_training_goes_on_from_given_adapters_cut_to_the_plans_ranks(
    name: str, spec: ModelSpec, make: Make, tmp_path: Path
) -> None:
    wanted = plan(2, ranks=(2, 4), adapter_learning_rate=1e-3)
    given = write_random(tmp_path / "start.f32", {t.name: t.shape for t in layout(spec, plan(2)) if t.part < BLOCKS})
    backend = make(name, wanted, given)
    assert all(not piece.any() for _, piece in backend.deltas())
    first = backend.step(batch(spec, 0))
    assert first != pytest.approx(make(name, wanted).step(batch(spec, 0)), rel=1e-3)
    assert backend._lora is not None
    for tensor in layout(spec, wanted)[:-2]:
        began = given[tensor.name].array()[: tensor.shape[0], : tensor.shape[1]]
        moved = backend._lora.tensors[tensor.name] - began
        assert 0 < abs(moved).max() < 0.01
        sent = np.concatenate([piece for n, piece in backend.deltas() if n == tensor.name])
        assert np.array_equal(sent, moved.reshape(-1))


@pytest.mark.parametrize("name", BACKENDS)
def test_only_what_is_trained_has_states_and_a_frozen_a_never_moves(name: str, spec: ModelSpec, make: Make) -> None:
    wanted = plan(2, adapters="b", optimizer="adamw", lora_targets=("q", "v"))
    backend = make(name, wanted)
    assert backend._lora is not None
    before = {n: a.copy() for n, a in backend._lora.tensors.items()}
    trained(backend, spec)
    assert set(backend.optimizer._moments) == {t.name for t in layout(spec, wanted)}
    for n, values in backend._lora.tensors.items():
        assert np.array_equal(values, before[n]) == n.endswith(A)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rank", [0, 4])
def test_fedprox_pulls_every_trained_value_back_to_the_rounds_start(
    name: str, rank: int, spec: ModelSpec, make: Make
) -> None:
    """One step more with the term is one without it, less rate * mu * (w - w at the start)."""
    how: dict[str, Any] = {"rank": rank, "adapters": "ab" if rank else "", "learning_rate": 0.3}
    moved = trained(make(name, plan(2, **how)), spec, 1)[1]
    free, pulled = (trained(make(name, plan(2, proximal_mu=mu, **how)), spec, 2)[1] for mu in (0.0, 0.7))
    for tensor, distance in moved.items():
        assert pulled[tensor] == pytest.approx(free[tensor] - np.float32(0.3 * 0.7) * distance, rel=1e-5, abs=1e-5), (
            tensor
        )
    assert max(abs(d).max() for d in moved.values()) > 1e-2


def test_a_lower_rank_begins_with_the_first_rows_of_a_higher_one() -> None:
    assert np.array_equal(random_a(5, "x.lora_a", 2, 64), random_a(5, "x.lora_a", 8, 64)[:2])
    assert not np.array_equal(random_a(5, "x.lora_a", 2, 64), random_a(5, "y.lora_a", 2, 64))
    assert not np.array_equal(random_a(5, "x.lora_a", 2, 64), random_a(6, "x.lora_a", 2, 64))


@pytest.mark.parametrize("shape", [(2, 128), (4, 64), (4,), (4, 128, 1)])
def test_an_adapter_to_begin_from_of_another_shape_is_refused(
    shape: tuple[int, ...], spec: ModelSpec, tmp_path: Path
) -> None:
    name = "encoder.layer.2.attention.self.query.lora_a"
    given = (
        write_random(tmp_path / "start.f32", {name: shape}) if len(shape) == 2 else {name: MappedTensor("x", 0, shape)}
    )
    with pytest.raises(ModelError, match=r"wanted \(4, 128\) or a higher rank"):
        LoraAdapters(spec, plan(1), given)
