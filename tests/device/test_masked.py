"""Sparse training in both backends: the same steps as dense gradients with a mask, memory for the masked entries alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_models import bert
from edge_runtime.graphs.find import read_graphs
from edge_runtime.layout import layout, masked_name
from edge_runtime.masks import indices
from edge_runtime.model import EMBED, ModelSpec, TensorSpec, load_family
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.training.graph_backend import GraphBackend
from edge_runtime.training.masked import PIECE, MaskedMatrix, filled
from edge_runtime.training.torch_backend import TorchBackend
from edge_runtime.weights import MappedTensor
from tests.networks import bert_spec, write_weights

Array = np.ndarray[Any, np.dtype[Any]]
Backend = GraphBackend | TorchBackend
Make = Callable[..., Backend]
BACKENDS = ("onnx", "torch")
BLOCKS, STEPS = 3, 3
TOLERANCE = 1e-4  # of what a tensor moved by, relative to the largest


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return bert_spec(blocks=BLOCKS)


@pytest.fixture(scope="module")
def weights(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, MappedTensor]:
    return write_weights(spec, tmp_path_factory.mktemp("weights") / "weights.f32")


@pytest.fixture
def make(spec: ModelSpec, weights: dict[str, MappedTensor], tmp_path: Path) -> Make:
    """A backend by name."""

    def made(name: str, wanted: Plan) -> Backend:
        if name == "torch":
            return TorchBackend(spec, weights, wanted, 1)
        path = bert.bundled_graphs(spec)
        assert path is not None
        return GraphBackend(spec, weights, wanted, read_graphs(path), 1, tmp_path)

    return made


def plan(depth: int, every: int, *, micro: int = 16, checkpointing: bool = False, **how: Any) -> Plan:
    row = CostRow(depth, checkpointing, micro, 0, 0.0, 0.0, 0)
    settings = {"learning_rate": 0.3, "head_learning_rate": 0.2, "optimizer": "sgd", "mask_seed": every, **how}
    return Plan(row, TrainSettings(mask_every=every, **settings), STEPS)


def batch(spec: ModelSpec, seed: int) -> Batch:
    """Texts of different lengths, one of a single token."""
    random = np.random.default_rng(seed)
    lengths = np.array([13, *random.integers(1, 14, 4), 1])
    mask = (np.arange(13)[None] < lengths[:, None]).astype(np.int64)
    words = next(t.shape[0] for t in spec.tensors if t.part == EMBED)
    return Batch(random.integers(1, words, mask.shape) * mask, mask, random.integers(0, 3, len(lengths)))


def matrices(spec: ModelSpec, wanted: Plan) -> dict[str, TensorSpec]:
    """The matrices that a plan trains sparsely, by their masked entries' names in its layout."""
    names = {t.name for t in layout(spec, wanted)}
    return {masked_name(t): t for t in spec.tensors if masked_name(t) in names}


def places(matrix: TensorSpec, wanted: Plan) -> Array:
    return indices(wanted.settings.mask_seed, matrix.name, matrix.size, wanted.settings.mask_every)


def deltas(backend: Backend) -> dict[str, Array]:
    found: dict[str, list[Array]] = {}
    for name, piece in backend.deltas():
        assert piece.ndim == 1
        found.setdefault(name, []).append(np.array(piece))
    return {name: np.concatenate(pieces) for name, pieces in found.items()}


def reference(
    spec: ModelSpec, weights: Mapping[str, MappedTensor], wanted: Plan, steps: int
) -> tuple[list[float], dict[str, Array]]:
    """The same training by torch autograd and torch.optim in float64: dense, gradients times the mask, the rest put back."""
    settings = wanted.settings
    start = {name: torch.from_numpy(w.array()).double() for name, w in weights.items()}
    network: Any = load_family(spec.family).build(spec, {name: value.clone() for name, value in start.items()})
    network.eval().requires_grad_(False)
    named = dict(network.named_parameters())
    chosen = {t.name: torch.zeros(t.size) for t in matrices(spec, wanted).values()}
    for matrix in matrices(spec, wanted).values():
        chosen[matrix.name][places(matrix, wanted)] = 1
    head = [t.name for t in spec.suffix(0)]
    for name in (*chosen, *head):
        named[name].requires_grad_()
    adam = settings.optimizer == "adamw"
    groups: list[dict[str, Any]] = [
        {"params": [named[n] for n in chosen], "lr": settings.learning_rate},
        {"params": [named[n] for n in head if named[n].ndim > 1], "lr": settings.head_learning_rate},
        {"params": [named[n] for n in head if named[n].ndim == 1], "lr": settings.head_learning_rate},
    ]
    decays = [settings.weight_decay] * 2 + [0.0]
    optimizer: Any
    if adam:
        optimizer = torch.optim.AdamW([g | {"weight_decay": d} for g, d in zip(groups, decays, strict=True)])
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9 if settings.optimizer == "momentum" else 0.0)
    losses = []
    for seed in range(steps):
        given = batch(spec, seed)
        optimizer.zero_grad()
        logits = network(torch.from_numpy(given.ids), torch.from_numpy(given.mask))
        loss = F.cross_entropy(logits, torch.from_numpy(given.labels))
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name in (*chosen, *head):
                named[name].grad += settings.proximal_mu * (named[name] - start[name])
            for name, mask in chosen.items():
                named[name].grad *= mask.view_as(named[name])
            optimizer.step()
            for name, mask in chosen.items():  # weight decay moved the rest too
                named[name].copy_(torch.where(mask.view_as(named[name]) > 0, named[name], start[name]))
    found = {}
    for tensor in layout(spec, wanted):
        of = matrices(spec, wanted).get(tensor.name)
        full = of.name if of else tensor.name
        moved = (named[full].detach() - start[full]).numpy().reshape(-1)
        found[tensor.name] = moved[places(of, wanted)] if of else moved
    return losses, found


CASES: list[dict[str, Any]] = [
    {"depth": 3, "every": 1, "micro": 4},
    {"depth": 2, "every": 10, "checkpointing": True, "micro": 2},
    {"depth": 1, "every": 7, "proximal_mu": 0.5, "optimizer": "momentum", "learning_rate": 0.05},
    {"depth": 3, "every": 100, "micro": 4, "checkpointing": True, "lora_targets": ("q", "v", "down")},
    {"depth": 2, "every": 1000, "micro": 4, "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.2},
    {"depth": 2, "every": 3, "lora_targets": ("2.attention.self.key", "2.output.dense"), "checkpointing": True},
    {"depth": 0, "every": 10},
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_entries_take_the_steps_of_dense_training_with_masked_gradients(
    case: dict[str, Any], name: str, spec: ModelSpec, weights: dict[str, MappedTensor], make: Make
) -> None:
    wanted = plan(**case)
    backend = make(name, wanted)
    losses = [backend.step(batch(spec, seed)) for seed in range(STEPS)]
    ours, (wanted_losses, theirs) = deltas(backend), reference(spec, weights, wanted, STEPS)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert [(n, v.size) for n, v in ours.items()] == [(t.name, t.size) for t in layout(spec, wanted)]
    largest = max(abs(moved).max() for moved in theirs.values())
    for tensor, moved in theirs.items():
        assert abs(ours[tensor] - moved).max() <= TOLERANCE * max(abs(moved).max(), 0.01 * largest), tensor
    assert largest > 1e-3


@pytest.mark.parametrize("name", BACKENDS)
def test_sums_and_states_are_of_the_masked_entries_alone(name: str, spec: ModelSpec, make: Make) -> None:
    wanted = plan(2, 10, optimizer="adamw", learning_rate=1e-3, micro=2)
    backend = make(name, wanted)
    for seed in range(2):
        backend.step(batch(spec, seed))
    entries = {t.name: t.size for t in layout(spec, wanted)}
    assert {n: [m.size for m in pair] for n, pair in backend.optimizer._moments.items()} == {
        n: [size, size] for n, size in entries.items()
    }
    freed = [array.size for arrays in backend._sums._free.values() for array in arrays]
    assert sum(freed) <= sum(entries.values())
    if isinstance(backend, TorchBackend):
        assert not freed
        assert all(parameter.grad is None for parameter in backend._model.parameters())  # type: ignore[attr-defined]
        return
    block = sum(t.num_bytes for t in matrices(spec, plan(1, 10)).values())
    assert backend._masks is not None
    made = [buffer.nbytes for buffer in backend._masks._dense._buffers.values()]
    dense = [b.nbytes for key, b in backend._pool._buffers.items() if isinstance(key, tuple) and key[0] == "dense"]
    assert sum(made) == sum(dense) == block, "dense stands one block, its matrices and their gradients"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_training_that_is_saved_and_restored_goes_on_to_the_same_bits(
    name: str, optimizer: str, spec: ModelSpec, make: Make
) -> None:
    wanted = plan(2, 5, optimizer=optimizer, learning_rate=1e-3)
    before, after = make(name, wanted), make(name, wanted)
    after.correct(batch(spec, 9))  # its matrices are made before it is restored
    for seed in range(2):
        before.step(batch(spec, seed))
    for saved, restored in zip(before.arrays(), after.arrays(), strict=True):
        restored[...] = saved
    after.optimizer.steps = 2
    assert before.step(batch(spec, 2)) == after.step(batch(spec, 2))
    ours, theirs = deltas(after), deltas(before)
    assert all(np.array_equal(ours[n], theirs[n]) and ours[n].any() for n in theirs)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_trained_sparsely_is_what_the_model_answers_with(
    name: str, spec: ModelSpec, weights: dict[str, MappedTensor], make: Make, tmp_path: Path
) -> None:
    """The deltas, put into the base at the mask's places, give the trained model's logits; nothing else has changed."""
    wanted = plan(2, 4)
    backend = make(name, wanted)
    for seed in range(STEPS):
        backend.step(batch(spec, seed))
    changed, given = dict(weights), batch(spec, 9)
    for number, (of, moved) in enumerate(deltas(backend).items()):
        matrix = matrices(spec, wanted).get(of)
        full = matrix.name if matrix else of
        whole = weights[full].array()
        whole.reshape(-1)[places(matrix, wanted) if matrix else slice(None)] += moved
        whole.tofile(tmp_path / str(number))
        changed[full] = MappedTensor(str(tmp_path / str(number)), 0, whole.shape)
    path = bert.bundled_graphs(spec)
    assert path is not None
    plain = replace(wanted, settings=TrainSettings(), chosen=replace(wanted.chosen, depth=0))
    logits = [GraphBackend(spec, w, plain, read_graphs(path), 1, tmp_path).logits(given) for w in (changed, weights)]
    if isinstance(backend, GraphBackend):
        assert backend.logits(given) == pytest.approx(logits[0], abs=1e-4)
    assert np.array_equal(backend.correct(given), logits[0].argmax(-1) == given.labels)
    assert abs(logits[0] - logits[1]).max() > 1e-2


@pytest.mark.parametrize(("size", "every"), [(3 * PIECE * 2 + 5, 2), (70_001, 300), (9, 65_536), (PIECE + 3, 1)])
def test_masked_entries_come_and_go_in_pieces(size: int, every: int, tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal(size).astype("<f4")
    values.tofile(tmp_path / "w")
    tensor = TensorSpec("x.weight", (1, size), 0)
    settings = TrainSettings(mask_every=every, mask_seed=3)
    mask = MaskedMatrix(tensor, MappedTensor(str(tmp_path / "w"), 0, tensor.shape), settings)
    there = indices(3, tensor.name, size, every)
    assert mask.shape == (1, there.size)
    for found in (mask.gather(values), mask.start()):
        assert np.array_equal(np.concatenate(list(found)), values[there])
    other = np.arange(size, dtype=np.float32)
    mask.scatter(values[there], other)
    wanted = np.arange(size, dtype=np.float32)
    wanted[there] = values[there]
    assert np.array_equal(other, wanted)
    assert np.array_equal(
        filled(np.empty(mask.shape, np.float32), mask.changes(values[there] + 1)).ravel() > 0, there >= 0
    )
    mask.write_base(other)
    assert np.array_equal(other, values)


PEAK = """
import sys
from pathlib import Path
import numpy as np
from edge_models import bert
from edge_runtime.graphs.find import read_graphs
from edge_runtime.hardware import process_memory
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.weights import MappedTensor
folder, every = Path(sys.argv[1]), int(sys.argv[2])
config = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024,
          "vocab_size": 90, "max_position_embeddings": 40, "type_vocab_size": 2, "hidden_act": "gelu"}
spec = bert.describe(config, ["a", "b"], 40)
places, offset = {}, 0
for t in spec.tensors:
    places[t.name] = MappedTensor(str(folder / "w"), offset, t.shape)
    offset += t.num_bytes
if not (folder / "w").exists():
    np.random.default_rng(0).normal(0, 0.05, offset // 4).astype("<f4").tofile(folder / "w")
row = CostRow(6, False, 4, 0, 0.0, 0.0, 0)
plan = Plan(row, TrainSettings(mask_every=every), 2)
ids = np.ones((4, 8), np.int64)
from edge_runtime.training.graph_backend import GraphBackend
backend = GraphBackend(spec, places, plan, read_graphs(bert.bundled_graphs(spec)), 1, folder)
for _ in range(2):
    backend.step(Batch(ids, ids, np.array([0, 1, 0, 1])))
print(process_memory()["VmHWM"])
"""


def test_a_tenth_of_all_blocks_needs_much_less_memory_than_all_of_them(tmp_path: Path) -> None:
    """4.7 million values with AdamW are 57 MB, of which a tenth, one block dense and its gradient are 12."""
    full, sparse = (
        int(subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), every], capture_output=True, check=True).stdout)
        for every in ("0", "10")
    )
    assert full - sparse > 40 << 20
