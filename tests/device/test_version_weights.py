"""A fleet's version with its adapters added in: exact, made once, only of the blocks that are asked for, and bounded."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_models import bert
from edge_runtime import version_weights
from edge_runtime.errors import StoreError
from edge_runtime.layout import A, B, layout
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.jobs import frozen_of
from edge_runtime.training.process import model_job
from edge_runtime.version_weights import KEEP, merged, pieces
from edge_runtime.weights import MappedTensor

Array = np.ndarray[Any, np.dtype[Any]]
CONFIG: dict[str, int | float | str] = {
    "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
SPEC = bert.describe(CONFIG, ["no", "yes"], 16)
SETTINGS = TrainSettings(lora_rank=2)
SCALE = 8.0


def plan(depth: int) -> Plan:
    return Plan(CostRow(depth, False, 4, 1, 1.0, 1.0, 1, rank=2 if depth else 0), SETTINGS, 1, adapters="ab")


def stored(folder: Path, values: Array) -> MappedTensor:
    """In a file that is named by its content, as blobs are."""
    data = values.astype("<f4").tobytes()
    path = folder / hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    return MappedTensor(str(path), 0, values.shape)


class World:
    """A model with adapters of all blocks; those of block 1 add nothing yet."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        chance = np.random.default_rng(seed)
        self.weights = {t.name: stored(folder, chance.normal(size=t.shape)) for t in SPEC.tensors}
        adapters = [t for t in layout(SPEC, plan(3)) if t.part < 3]
        self.adapters = {
            t.name: stored(folder, chance.normal(size=t.shape) * (t.part != 1 or t.name.endswith(A))) for t in adapters
        }

    def whole(self, name: str) -> Array:
        """A matrix with its adapter, rounded once."""
        stem = name.removesuffix(".weight")
        weight = self.weights[name].array().astype(np.float64)
        if stem + A not in self.adapters:
            return weight.astype(np.float32)
        a, b = (self.adapters[stem + end].array().astype(np.float64) for end in (A, B))
        return (weight + SCALE * b @ a).astype(np.float32)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "blobs")


def test_every_weight_is_what_the_adapters_make_of_it_and_others_stay_where_they_are(
    world: World, tmp_path: Path
) -> None:
    found = merged(SPEC, world.weights, world.adapters, SCALE, tmp_path)
    for tensor in SPEC.tensors:
        assert np.array_equal(found[tensor.name].array(), world.whole(tensor.name))
        adapted = tensor.is_adapted and tensor.part in (0, 2)
        assert (found[tensor.name] != world.weights[tensor.name]) == adapted
    assert merged(SPEC, world.weights, {}, 0.0, tmp_path) == world.weights


def test_a_set_is_made_once_and_another_version_has_its_own(world: World, tmp_path: Path) -> None:
    first = merged(SPEC, world.weights, world.adapters, SCALE, tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("merged/*/*")}
    assert merged(SPEC, world.weights, world.adapters, SCALE, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("merged/*/*")} == made
    for other in (
        merged(SPEC, world.weights, world.adapters, 2 * SCALE, tmp_path),
        merged(SPEC, world.weights, World(tmp_path / "more", 1).adapters, SCALE, tmp_path),
    ):
        assert not {t.path for t in other.values()} & {str(path) for path in made}


def test_a_few_sets_are_kept_and_the_one_in_use_is_among_them(world: World, tmp_path: Path) -> None:
    for number in range(KEEP + 3):
        found = merged(SPEC, world.weights, world.adapters, 1.0 + number, tmp_path)
        assert all(Path(t.path).exists() for t in found.values())
    assert len(list((tmp_path / "merged").iterdir())) == KEEP


HOLDER = """
import sys
from pathlib import Path
from edge_runtime.version_weights import _hold
assert _hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_what_another_process_uses_is_not_deleted_before_it_ends(world: World, tmp_path: Path) -> None:
    merged(SPEC, world.weights, world.adapters, SCALE, tmp_path)
    (used,) = (tmp_path / "merged").iterdir()
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(used)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin and other.stdout and other.stdout.readline() == b"held\n"
    files = {path.name: path.read_bytes() for path in used.iterdir()}
    for number in range(1, KEEP + 3):
        merged(SPEC, world.weights, world.adapters, SCALE + number, tmp_path)
    assert {path.name: path.read_bytes() for path in used.iterdir()} == files
    other.stdin.close()
    other.wait(10)
    merged(SPEC, world.weights, world.adapters, 2 * SCALE, tmp_path)
    assert not used.exists()


def test_a_set_that_cannot_be_made_is_an_error_and_no_endless_attempt(world: World, tmp_path: Path) -> None:
    merged(SPEC, world.weights, world.adapters, SCALE, tmp_path)
    (made,) = (tmp_path / "merged").iterdir()
    shutil.rmtree(made)
    made.write_text("in the way")
    with pytest.raises(StoreError, match="cannot be made"):
        merged(SPEC, world.weights, world.adapters, SCALE, tmp_path)


def test_a_set_that_was_cut_off_while_it_was_made_is_made_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        yield from list(pieces(*args))[:0]
        raise KeyboardInterrupt

    monkeypatch.setattr(version_weights, "pieces", broken)
    with pytest.raises(KeyboardInterrupt):
        merged(SPEC, world.weights, world.adapters, SCALE, tmp_path)
    assert list((tmp_path / "merged").iterdir()) == []
    monkeypatch.undo()
    found = merged(SPEC, world.weights, world.adapters, SCALE, tmp_path)
    assert all(np.array_equal(found[t.name].array(), world.whole(t.name)) for t in SPEC.tensors)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_training_computes_the_blocks_below_it_with_what_others_trained(
    depth: int, world: World, tmp_path: Path
) -> None:
    job = model_job("train", SPEC, world.weights, world.adapters, SCALE) | {"cache": str(tmp_path)}
    found = frozen_of(job, SPEC, plan(depth))
    for tensor in SPEC.tensors:
        below = tensor.part < 3 - depth
        wanted = world.whole(tensor.name) if below else world.weights[tensor.name].array()
        assert np.array_equal(found[tensor.name].array(), wanted), tensor.name


def test_a_large_matrix_is_added_up_some_rows_at_a_time(tmp_path: Path) -> None:
    """4096 x 1024 values, 16 MiB; what stands in memory is A, B and the rows at hand."""
    chance = np.random.default_rng(0)
    a, b = chance.normal(size=(8, 1024)), chance.normal(size=(4096, 8))
    weight = stored(tmp_path, np.zeros((4096, 1024)))
    places = stored(tmp_path, a), stored(tmp_path, b)
    tracemalloc.start()
    total = sum(float(piece.sum(dtype=np.float64)) for piece in pieces(weight, *places, 1.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == pytest.approx(
        float((b.astype("<f4").sum(0, "<f8") * a.astype("<f4").sum(1, "<f8")).sum()), rel=1e-4
    )
    assert peak < 12 << 20
