"""The gate of training graphs: shipped and derived sets give torch autograd's gradients, and train where no torch is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import prenorm
import pytest
import torch
import torch.nn.functional as F

from edge_models import bert
from edge_runtime.graphs import bundle, check, derive, find, match, partition, verify
from edge_runtime.graphs.bundle import GraphSet, encode_graphs
from edge_runtime.model import EMBED, ModelSpec, load_family
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.training.graph_backend import GraphBackend
from edge_runtime.weights import MappedTensor
from tests.networks import bert_spec, write_weights
from tools import graphs as tool

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # of a gradient, relative to its tensor's largest value
Array = np.ndarray[Any, Any]
SMALL = (128, 2, 512, 2)
OTHERS = [shape for shape in tool.SHAPES if shape != SMALL]
PRENORM = {"hidden": 20, "heads": 4, "wide": 24, "layers": 4, "vocab": 50, "positions": 32}


@dataclass
class Model:
    """Random weights in a file, and the graphs."""

    spec: ModelSpec
    weights: dict[str, MappedTensor]
    graphs: GraphSet


def shipped(folder: Path, shape: tuple[int, int, int, int], **more: Any) -> Model:
    spec = bert_spec(*shape, **{"labels": 4, **more})
    path = bert.bundled_graphs(spec)
    assert path is not None
    return Model(spec, write_weights(spec, folder / "weights.f32"), find.read_graphs(path))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The smallest shipped set, with other vocabulary, positions, labels and depth than it was derived with."""
    return shipped(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A user's own family, derived as a user's is: found through the cache, in a worker."""
    folder = tmp_path_factory.mktemp("own")
    spec = prenorm.describe(PRENORM, ["a", "b", "c"], 32)
    weights = write_weights(spec, folder / "weights.f32")
    lines: list[str] = []
    path = find.find_graphs(spec, weights, folder, progress=lines.append)
    assert path is not None, lines
    return Model(spec, weights, find.read_graphs(path))


def random_batch(spec: ModelSpec, seed: int, count: int = 5, longest: int = 13) -> Batch:
    """Texts of different lengths, one of a single token."""
    random = np.random.default_rng(seed)
    words = next(t.shape[0] for t in spec.tensors if t.part == EMBED)
    lengths = random.integers(1, longest + 1, count)
    lengths[0], lengths[-1] = longest, 1
    mask = (np.arange(longest)[None] < lengths[:, None]).astype(np.int64)
    ids = random.integers(1, words, (count, longest)) * mask
    return Batch(ids, mask, random.integers(0, len(spec.labels), count))


class Recorder:
    """In place of an optimizer: keeps the gradients."""

    def __init__(self) -> None:
        self.gradients: dict[str, Array] = {}

    def begin_step(self) -> None:
        """Nothing to count."""

    def update(self, name: str, weight: Array, gradient: Array) -> None:
        """One tensor's gradient of the whole batch."""
        assert name not in self.gradients
        self.gradients[name] = np.array(gradient)


def graph_gradients(
    model: Model,
    batch: Batch,
    scratch: Path,
    depth: int,
    *,
    micro: int = 16,
    checkpointing: bool = False,
    rank: int = 0,
    ranks: tuple[int, ...] = (),
    targets: tuple[str, ...] = (),
    adapters: str = "ab",
) -> tuple[float, dict[str, Array], GraphBackend]:
    """-> (loss, gradients, backend): one step of the graph backend. Adapters are set to random values, B too."""
    row = CostRow(depth, checkpointing, micro, 0, 0.0, 0.0, 0, "onnx", rank)
    settings = TrainSettings(lora_rank=rank, lora_targets=targets)
    plan = Plan(row, settings, 1, ranks, adapters if rank else "")
    backend = GraphBackend(model.spec, model.weights, plan, model.graphs, 1, scratch)
    recorder: Any = Recorder()
    backend.optimizer = recorder
    if backend._lora:
        random = np.random.default_rng(3)
        for values in backend._lora.tensors.values():
            values[...] = random.normal(0, 0.3 * values.shape[1] ** -0.5, values.shape)
    return backend.step(batch), recorder.gradients, backend


def torch_gradients(model: Model, batch: Batch, backend: GraphBackend) -> tuple[float, dict[str, Array]]:
    """The same by torch autograd in float64, on the family's own network."""
    spec = model.spec
    network: Any = load_family(spec.family).build(
        spec, {n: torch.from_numpy(w.array()).double() for n, w in model.weights.items()}
    )
    network.eval().requires_grad_(False)
    wanted: dict[str, torch.Tensor] = {}
    named = dict(network.named_parameters())
    if backend._lora:
        for part in range(backend._cut, spec.num_blocks):
            adapted, _ = derive.with_lora(network.blocks[part], bundle.relative_names(spec, part), 2)
            places = dict(adapted.named_modules())
            trained = backend._lora.trained_names(part)
            for relative, given in backend._lora.feeds(part).items():
                if relative == "lora_scale":
                    continue
                stem, _, which = relative.rpartition(".")
                value = torch.nn.Parameter(torch.from_numpy(given).double())
                setattr(places[stem], which, value)
                places[stem].scale = float(backend._lora.adapters.scale)
                if relative in trained:
                    wanted[trained[relative]] = value
            network.blocks[part] = adapted
        wanted |= {t.name: named[t.name] for t in spec.suffix(0)}
    else:
        wanted = {t.name: named[t.name] for t in spec.suffix(backend._chosen.depth)}
    for value in wanted.values():
        value.requires_grad_()
    logits = network(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
    loss = F.cross_entropy(logits, torch.from_numpy(batch.labels))
    value = loss.item()
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return value, {n: g.numpy() for n, g in zip(wanted, gradients, strict=True)}


def worst_error(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """The largest relative error of a tensor; one that is zero in theory is compared with the largest gradient."""
    assert found.keys() == wanted.keys()
    largest = max(float(abs(g).max()) for g in wanted.values())
    worst = 0.0
    for name, gradient in wanted.items():
        own_largest = float(abs(gradient).max())
        scale = own_largest if own_largest > 1e-10 * largest else 0.1 * largest  # attention's key bias
        error = float(abs(found[name] - gradient).max()) / scale
        assert np.isfinite(error), name
        worst = max(worst, error)
    return worst


def gate(model: Model, scratch: Path, seed: int, depth: int, **how: Any) -> float:
    random = np.random.default_rng(seed)
    batch = random_batch(model.spec, seed, int(random.integers(2, 8)), int(random.integers(2, 30)))
    loss, found, backend = graph_gradients(model, batch, scratch, depth, **how)
    wanted_loss, wanted = torch_gradients(model, batch, backend)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    return worst_error(found, wanted)


CASES: list[dict[str, Any]] = [
    {"seed": 1, "depth": 0},
    {"seed": 2, "depth": 1},
    {"seed": 3, "depth": 2, "micro": 2},
    {"seed": 4, "depth": 3, "checkpointing": True, "micro": 3},
    {"seed": 5, "depth": 3},
    {"seed": 6, "depth": 1, "rank": 1},
    {"seed": 7, "depth": 2, "rank": 8, "micro": 2},
    {"seed": 8, "depth": 3, "rank": 3, "checkpointing": True},
]
LORA_CASES: list[dict[str, Any]] = [
    {"seed": 9, "depth": 2, "rank": 8, "ranks": (1, 8), "micro": 2},
    {"seed": 10, "depth": 2, "rank": 4, "targets": ("q", "v"), "micro": 3},
    {"seed": 11, "depth": 3, "rank": 5, "ranks": (5, 2, 3), "targets": ("down", "key"), "checkpointing": True},
    {"seed": 12, "depth": 2, "rank": 6, "adapters": "b"},
    {"seed": 13, "depth": 1, "rank": 2, "targets": ("attention.output.dense",), "adapters": "b", "checkpointing": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shipped_sets_gradients_are_torchs(small: Model, case: dict[str, Any], tmp_path: Path) -> None:
    assert gate(small, tmp_path, **case) <= TOLERANCE


@pytest.mark.parametrize("case", LORA_CASES, ids=str)
def test_ranks_targets_and_frozen_a_have_torchs_gradients(small: Model, case: dict[str, Any], tmp_path: Path) -> None:
    assert gate(small, tmp_path, **case) <= TOLERANCE


def pruned(model: Model, folder: Path, seed: int) -> Model:
    """The same set for a model whose blocks have heads and channels of their own number; the last block is whole."""
    random, blocks = np.random.default_rng(seed), model.spec.num_blocks
    heads = [*random.integers(1, model.spec.heads + 1, blocks - 1).tolist(), model.spec.heads]
    channels = [*random.integers(1, model.spec.feed_forward, blocks - 1).tolist(), model.spec.feed_forward]
    spec = bert.describe(bert.with_widths(model.spec.config, heads, channels), model.spec.labels, 40)
    assert bert.bundled_graphs(spec) == bert.bundled_graphs(model.spec) and match.misfit(model.graphs, spec) is None
    assert bundle.block_graphs(spec) == ["block0.any"] * (blocks - 1) + ["block0"]
    return Model(spec, write_weights(spec, folder / "pruned.f32", seed), model.graphs)


PRUNED_CASES: list[dict[str, Any]] = [
    {"seed": 21, "depth": 3},
    {"seed": 22, "depth": 3, "checkpointing": True, "micro": 3},
    {"seed": 23, "depth": 3, "rank": 3, "micro": 2},
    {"seed": 24, "depth": 3, "rank": 5, "checkpointing": True, "targets": ("q", "down")},
    {"seed": 25, "depth": 2, "rank": 1, "adapters": "b"},
]


@pytest.mark.parametrize("case", PRUNED_CASES, ids=str)
def test_a_pruned_models_gradients_are_torchs(small: Model, case: dict[str, Any], tmp_path: Path) -> None:
    assert gate(pruned(small, tmp_path, case["seed"]), tmp_path, **case) <= TOLERANCE


def test_a_pruned_prefix_runs_in_int8(small: Model, tmp_path: Path) -> None:
    model = pruned(small, tmp_path, 26)
    found = []
    for precision in ("float32", "int8"):
        row = CostRow(1, False, 4, 0, 0.0, 0.0, 0, "onnx", precision=precision)
        backend = GraphBackend(model.spec, model.weights, Plan(row, TrainSettings(), 1), model.graphs, 1, tmp_path)
        batch = random_batch(model.spec, 26)
        found.append(backend.features(batch)[batch.mask > 0])
    exact, quantized = found
    cosines = (exact * quantized).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(quantized, axis=1)
    assert 0.98 < cosines.min() < 1
    inputs = check.check_graph(model.graphs.graphs["block0.any.forward_int8"]).inputs
    assert sum(name.endswith(":q") for name in inputs) == 6 and "intermediate.dense.weight" not in inputs


@pytest.mark.parametrize("shape", OTHERS, ids=lambda shape: "-".join(map(str, shape)))
def test_every_other_shipped_set_trains_like_torch(shape: tuple[int, int, int, int], tmp_path: Path) -> None:
    model = shipped(tmp_path, shape, blocks=2)
    assert gate(model, tmp_path, 9, 2, micro=4) <= TOLERANCE
    assert gate(model, tmp_path, 10, 1, rank=4) <= TOLERANCE
    assert gate(pruned(model, tmp_path, 11), tmp_path, 11, 2, micro=4) <= TOLERANCE
    assert gate(pruned(model, tmp_path, 12), tmp_path, 12, 2, rank=4) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradients_of_a_users_own_family_are_torchs(own: Model, case: dict[str, Any], tmp_path: Path) -> None:
    assert gate(own, tmp_path, **case) <= TOLERANCE


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointing_changes_no_bit(small: Model, rank: int, tmp_path: Path) -> None:
    batch = random_batch(small.spec, 11)
    loss, plain, _ = graph_gradients(small, batch, tmp_path, 3, rank=rank, micro=2)
    again, checkpointed, _ = graph_gradients(small, batch, tmp_path, 3, rank=rank, micro=2, checkpointing=True)
    assert loss == again
    assert plain.keys() == checkpointed.keys()
    assert all(np.array_equal(plain[name], checkpointed[name]) for name in plain)


def test_micro_batches_give_the_gradients_of_the_whole_batch(small: Model, tmp_path: Path) -> None:
    batch = random_batch(small.spec, 12, count=7)
    loss, whole, _ = graph_gradients(small, batch, tmp_path, 3)
    again, pieces, _ = graph_gradients(small, batch, tmp_path, 3, micro=2)
    assert again == pytest.approx(loss, rel=1e-6)
    wanted = {name: gradient.astype(np.float64) for name, gradient in whole.items() if "key.bias" not in name}
    assert worst_error({name: pieces[name] for name in wanted}, wanted) < 1e-4


def test_a_batch_with_a_row_of_nothing_but_padding_stays_finite(small: Model, tmp_path: Path) -> None:
    batch = random_batch(small.spec, 13)
    mask = batch.mask.copy()
    mask[-1] = 0
    loss, gradients, _ = graph_gradients(small, replace(batch, mask=mask), tmp_path, 3)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in gradients.values())


# which sets fit which models


def test_a_set_serves_every_depth_vocabulary_and_number_of_labels_and_positions(small: Model) -> None:
    for blocks, labels, words, positions, types in ((1, 2, 30, 40, 2), (12, 300, 5000, 512, 2), (3, 4, 128, 128, 5)):
        spec = bert_spec(
            *SMALL,
            blocks=blocks,
            labels=labels,
            vocab_size=words,
            max_position_embeddings=positions,
            type_vocab_size=types,
        )
        assert match.misfit(small.graphs, spec) is None


@pytest.mark.parametrize(
    "change",
    [
        {"type_vocab_size": 0},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 1e-5},
        {"num_attention_heads": 4},
        {"intermediate_size": 256},
        {"hidden_size": 64},
        {"heads_by_block": "1,2,2", "hidden_act": "relu"},
    ],
    ids=str,
)
def test_a_set_does_not_fit_what_it_does_not_compute(small: Model, change: dict[str, Any]) -> None:
    config = {**small.spec.config, **change}
    spec = bert.describe(config, small.spec.labels, 40)
    assert not small.graphs.fits(spec)
    assert bert.bundled_graphs(spec) != bert.bundled_graphs(small.spec)


@pytest.mark.parametrize("part", [EMBED, 0, 1, 3])
def test_a_set_does_not_fit_other_tensors_under_the_same_configuration(small: Model, part: int) -> None:
    spec = small.spec
    number = next(i for i, t in enumerate(spec.tensors) if t.part == part and len(t.shape) == 1 + (part != EMBED))
    for tensor in (
        replace(spec.tensors[number], name=spec.tensors[number].name + "x"),
        replace(spec.tensors[number], shape=tuple(n + 1 for n in spec.tensors[number].shape)),
    ):
        changed = replace(spec, tensors=(*spec.tensors[:number], tensor, *spec.tensors[number + 1 :]))
        assert match.misfit(small.graphs, changed)
        assert match.misfit(small.graphs, replace(spec, tensors=(*spec.tensors[:number], *spec.tensors[number + 1 :])))


@pytest.mark.parametrize("name", ["embed", "block0.saving", "block0.backward", "head.backward"])
def test_a_set_without_one_of_its_graphs_fits_nothing(small: Model, name: str) -> None:
    others = {n: g for n, g in small.graphs.graphs.items() if n != name}
    assert match.misfit(replace(small.graphs, graphs=others), small.spec) == f"they lack {name}"


def test_graphs_in_each_others_place_do_not_fit(small: Model) -> None:
    graphs = dict(small.graphs.graphs)
    graphs["block0.forward"], graphs["block0.backward"] = graphs["block0.backward"], graphs["block0.forward"]
    assert not replace(small.graphs, graphs=graphs).fits(small.spec)


def test_every_shape_of_the_tool_is_shipped_and_nothing_else() -> None:
    names = {bert.graphs_name(h, n, f, types=bool(t)) for h, n, f, t in tool.SHAPES}
    assert {path.name for path in tool.FOLDER.iterdir()} == names
    for shape in tool.SHAPES:
        path = bert.bundled_graphs(spec := bert_spec(*shape))
        assert path is not None
        assert path.stat().st_size < 24 << 10
        assert find.read_graphs(path).fits(spec)


# deriving


SHIPPED = ROOT / "models/edge_models/graphs/bert-128-2-512.graphs"


@pytest.mark.slow
def test_deriving_gives_the_bytes_that_are_shipped_whatever_the_order_of_sets(tmp_path: Path) -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "models", "coordinator"))
    is_as_shipped = torch.__version__.startswith("2.13.")  # which made the shipped ones; another may write other bytes
    made = [SHIPPED.read_bytes()] if is_as_shipped else []
    for seed in ("1", "2")[len(made) :]:  # of the order of sets
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "-m", "tools.graphs", "128-2-512", "--out", str(tmp_path / seed)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.append((tmp_path / seed / SHIPPED.name).read_bytes())
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_users_own_family_is_derived_once_serves_other_depths_and_trains(own: Model, tmp_path: Path) -> None:
    path = Path(next(iter(own.weights.values())).path).parent
    assert find.find_graphs(own.spec, own.weights, path, derive=False) is not None
    other = prenorm.describe({**PRENORM, "layers": 6, "vocab": 70, "positions": 20}, ["a", "b"], 16)
    assert find.find_graphs(other, {}, path, derive=False) is not None
    assert find.find_graphs(prenorm.describe({**PRENORM, "heads": 2}, ["a", "b"], 16), {}, path, derive=False) is None
    assert bundle.block_kinds(own.spec) == [0, 1, 0, 1]
    row = CostRow(2, False, 4, 0, 0.0, 0.0, 0, "onnx")
    settings = TrainSettings(learning_rate=3e-3, head_learning_rate=3e-3)
    backend = GraphBackend(own.spec, own.weights, Plan(row, settings, 20), own.graphs, 1, tmp_path)
    batch = random_batch(own.spec, 14, count=4)
    losses = [backend.step(batch) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture
def network(small: Model) -> Iterator[Any]:
    tensors = {n: torch.from_numpy(w.array()) for n, w in small.weights.items()}
    yield bert.build(small.spec, tensors).eval().requires_grad_(False)


def test_the_check_of_derived_graphs_passes_what_is_right(small: Model, network: Any) -> None:
    relative = bundle.relative_names(small.spec, 0)
    verify.verify(small.spec, network, small.graphs, {0: derive.with_lora(network.blocks[0], relative, 5)})


def test_the_check_of_derived_graphs_names_a_block_that_behaves_differently(small: Model, network: Any) -> None:
    network.blocks[2].intermediate.activation = F.relu
    with pytest.raises(verify.ModelError, match="block 2 .*shapes of block 0's"):
        verify.verify(small.spec, network, small.graphs, {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("block0.backward", ("block0.backward", "Exp", "Sqrt"), "the gradient of"),
        ("block0.lora.backward", ("block0.lora.backward", "Exp", "Sqrt"), "in block0.lora.backward"),
        ("head.backward", ("head.backward", "Exp", "Abs"), "the gradient of"),
        ("embed", ("embed", "Sub", "Add"), r"embed\(\)'s bias"),
    ],
)
def test_the_check_of_derived_graphs_finds_a_wrong_gradient(
    small: Model, network: Any, name: str, change: tuple[str, str, str], message: str
) -> None:
    import onnx

    proto = onnx.load_from_string(small.graphs.graphs[name])
    changed = [node for node in proto.graph.node if node.op_type == change[1]]
    assert changed
    for node in changed:
        node.op_type = change[2]
    graphs = replace(small.graphs, graphs={**small.graphs.graphs, name: proto.SerializeToString()})
    with pytest.raises(verify.ModelError, match=message):
        verify.verify(
            small.spec,
            network,
            graphs,
            {0: derive.with_lora(network.blocks[0], bundle.relative_names(small.spec, 0), 5)},
        )


def test_the_traced_sizes_are_unlike_every_size_of_the_model() -> None:
    config = {**bert_spec(12, 3, 17, 2).config, "max_position_embeddings": 11, "vocab_size": 13}
    spec = bert.describe(config, ["a", "b", "c", "d", "e"], 11)
    sizes = derive._example_sizes(spec)
    found = [sizes.batch, sizes.seq, sizes.rank]
    assert len(set(found)) == 3
    assert not set(found) & {n for t in spec.tensors for n in t.shape}
    assert sizes.seq <= 11


def test_a_graphs_operations_can_be_counted(small: Model) -> None:
    assert partition.operations(small.graphs.graphs["bias"]) == {"Unsqueeze": 1, "Cast": 1, "Sub": 1, "Mul": 1}


# without torch

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "onnx_ir"):
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)

sys.meta_path.insert(0, Blocked())
"""
TRAIN = """
import importlib.util, json
from pathlib import Path
import numpy as np
from edge_models import bert
from edge_runtime.graphs.find import find_graphs, read_graphs
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.training.graph_backend import GraphBackend
from edge_runtime.weights import MappedTensor

importlib.util.find_spec = lambda name: None
job = json.loads(sys.argv[1])
spec = bert.describe(job["config"], job["labels"], 40)
weights = {n: MappedTensor(p, o, tuple(s), d) for n, (p, o, s, d) in job["weights"].items()}
lines = []
missing = bert.describe({**job["config"], "hidden_act": "relu"}, job["labels"], 40)
assert find_graphs(missing, weights, Path(job["cache"]), progress=lines.append) is None
graphs = read_graphs(find_graphs(spec, weights, Path(job["cache"]), progress=lines.append))
random = np.random.default_rng(0)
batch = Batch(random.integers(1, 90, (4, 9)), np.ones((4, 9), np.int64), np.arange(4))
losses = {}
for rank in (0, 4):
    row = CostRow(2, True, 2, 0, 0.0, 0.0, 0, "onnx", rank)
    settings = TrainSettings(learning_rate=1e-3, head_learning_rate=1e-3, lora_rank=rank)
    backend = GraphBackend(spec, weights, Plan(row, settings, 12), graphs, 1, Path(job["cache"]))
    losses[rank] = [backend.step(batch) for _ in range(12)]
    assert list(dict(backend.deltas())) == [tensor.name for tensor in spec.suffix(2)]
print(json.dumps({"losses": losses, "lines": lines, "torch": "torch" in sys.modules}))
"""


def test_a_shipped_set_trains_at_once_where_there_is_no_torch(small: Model, tmp_path: Path) -> None:
    job = {
        "config": dict(small.spec.config),
        "labels": list(small.spec.labels),
        "cache": str(tmp_path),
        "weights": {n: (w.path, w.offset, w.shape, w.dtype) for n, w in small.weights.items()},
    }
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "models"))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + TRAIN, json.dumps(job)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"] is False
    assert all(losses[-1] < 0.5 * losses[0] for losses in found["losses"].values())
    assert found["lines"] == ["training graphs cannot be derived here: torch, onnx, onnxscript not installed"]


def test_the_same_set_gives_the_same_bytes(small: Model) -> None:
    path = bert.bundled_graphs(small.spec)
    assert path is not None
    assert encode_graphs(small.graphs) == path.read_bytes()
    assert encode_graphs(replace(small.graphs, graphs=dict(reversed(small.graphs.graphs.items())))) == path.read_bytes()
