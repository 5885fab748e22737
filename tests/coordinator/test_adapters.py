"""Adapters on the coordinator: what each method makes of devices' A and B, beside dense float64; how a run begins with them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.collected import unpack
from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_coordinator.methods import METHODS
from edge_coordinator.methods.hetlora import product_norm, weights
from edge_coordinator.methods.method import Stage
from edge_coordinator.models import Models
from edge_coordinator.start_adapters import fresh_a
from edge_models import bert
from edge_runtime.encoding import write_update
from edge_runtime.errors import ModelError, StoreError, UsageError
from edge_runtime.layout import A, B, layout
from edge_runtime.manifest import Manifest, make_manifest
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.wire import pack

Array = np.ndarray[Any, np.dtype[Any]]
CONFIG: dict[str, int | float | str] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
SPEC = bert.describe(CONFIG, ["no", "yes"], 16)
RANK = 4
SETTINGS = TrainSettings(seed=5, lora_rank=RANK, lora_alpha=6.0)
SCALE = 1.5
QUERY = "encoder.layer.1.attention.self.query"
UP = "encoder.layer.0.intermediate.dense"


@dataclass
class Device:
    """A device of the round: its examples, its rank, and its deltas by name."""

    num_examples: int
    rank: int
    deltas: dict[str, Array]


class World:
    """A coordinator's models and one open round on a version with adapters."""

    def __init__(self, folder: Path, settings: TrainSettings = SETTINGS) -> None:
        self.ledger, self.settings = Ledger(folder / "ledger.db"), settings
        self.models = Models(folder, self.ledger)
        chance = np.random.default_rng(1)
        blobs = {t.name: self.put(chance.normal(0, 0.5, t.shape)) for t in SPEC.tensors}
        first = make_manifest(SPEC, blobs, self.models.store.put(b"tokenizer"), 9, version=1)
        self.first = first, self.models.store.put(b"manifest 1")
        begun = self.models.with_adapters(*self.first, Stage(settings, "ab"), "lora")
        assert begun is not None
        self.manifest, self.blob = begun
        self.devices: dict[str, Device] = {}
        with self.ledger.transaction():
            self.ledger.open_round("run", 1, 2, 0.0, 0.0)

    def put(self, values: Array) -> bytes:
        return self.models.store.put(values.astype("<f4").tobytes())

    def array(self, name: str, manifest: Manifest | None = None) -> Array:
        """A tensor of a version, float64."""
        manifest = manifest or self.manifest
        (tensor,) = [t for t in (*manifest.tensors, *manifest.adapters) if t.name == name]
        raw = np.fromfile(self.models.store.path(tensor.blob), "<f4").astype(np.float64)
        return raw.reshape(tensor.shape)

    def train(
        self, name: str, num_examples: int, rank: int, *, depth: int = 2, codec: str = "f32", adapters: str = "ab",
        change: Callable[[str, Array], Array] = lambda name, delta: delta,
    ) -> None:  # fmt: skip
        """A device commits random deltas."""
        row = CostRow(depth, False, 4, 1, 1.0, 1.0, 1, rank=rank if depth else 0, codec=codec)
        plan = Plan(row, self.settings, 1, adapters=adapters)
        chance, tensors = np.random.default_rng(len(self.devices) + 10), layout(SPEC, plan)
        deltas = {t.name: change(t.name, chance.normal(0, 0.05, t.shape)).astype(np.float32) for t in tensors}
        out = io.BytesIO()
        write_update(out, codec, {t.name: t.size for t in tensors}, ((n, d.reshape(-1)) for n, d in deltas.items()), 1)
        blob = self.models.updates.put(out.getvalue())
        with self.ledger.transaction():
            self.ledger.set_member("run", 1, Member(name, "planned", b"", bytes(16), pack(plan), ""))
            item = Contribution(name, blob, num_examples, depth, {}, False, codec)
            assert self.ledger.contribute("run", 1, item, 0.0)
        self.devices[name] = Device(num_examples, rank, {n: d.astype(np.float64) for n, d in deltas.items()})

    def close(self, method: str) -> Manifest:
        """The next version."""
        committed, rule = self.ledger.contributions("run", 1), METHODS[method]
        collected = self.models.collect("run", 1, self.manifest, committed, rule, self.settings)
        changes, state = rule.aggregate({}, collected)
        assert json.loads(json.dumps(state)) == state
        return self.models.next_version(self.manifest, self.blob, changes, method)[0]

    def local(self, device: Device, stem: str) -> tuple[Array, Array]:
        """A device's A and B after training."""
        a, b = self.array(stem + A)[: device.rank], self.array(stem + B)[:, : device.rank]
        return a + device.deltas.get(stem + A, 0.0), b + device.deltas[stem + B]

    def products(self, stem: str) -> dict[str, Array]:
        """B A of every device that trained a matrix."""
        found = {n: self.local(d, stem) for n, d in self.devices.items() if stem + B in d.deltas}
        return {name: b @ a for name, (a, b) in found.items()}

    def shares(self, names: list[str]) -> dict[str, float]:
        total = sum(self.devices[n].num_examples for n in names)
        return {n: self.devices[n].num_examples / total for n in names}

    def mean(self, name: str) -> Array:
        """The weighted mean delta of a tensor, dense float64."""
        names = [n for n, d in self.devices.items() if name in d.deltas]
        return sum((p * self.devices[n].deltas[name] for n, p in self.shares(names).items()), np.zeros(()))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def close_to(found: Array, wanted: Array, at_most: float = 3e-8) -> None:
    """Within the rounding of 2^-28 and of float32."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= at_most + np.abs(wanted).max() * 6e-8


def mixed(world: World, **how: Any) -> None:
    """Three devices of ranks 4, 2 and 1."""
    for name, examples, rank in (("c", 30, 4), ("a", 10, 2), ("b", 60, 1)):
        world.train(name, examples, rank, **how)


def unchanged(world: World, after: Manifest, names: Callable[[str], bool]) -> None:
    """Tensors that are the same blobs, so that nobody fetches them again."""
    before = {t.name: t.blob for t in (*world.manifest.tensors, *world.manifest.adapters)}
    same = {t.name for t in (*after.tensors, *after.adapters) if t.blob == before[t.name]}
    assert same == {n for n in before if names(n)}


def test_lora_averages_a_and_b_and_the_head_by_examples(world: World) -> None:
    for name, examples in (("a", 10), ("b", 30)):
        world.train(name, examples, RANK)
    after = world.close("lora")
    for name in (QUERY + A, QUERY + B, UP + A, UP + B, "classifier.weight"):
        close_to(world.array(name, after), world.array(name) + world.mean(name))
    adapters = {t.name for t in world.manifest.adapters} | {t.name for t in SPEC.suffix(0)}
    unchanged(world, after, lambda name: name not in adapters)


def test_lora_of_different_depths_is_averaged_layer_by_layer(world: World) -> None:
    world.train("deep", 10, RANK)
    world.train("shallow", 30, RANK, depth=1)
    world.train("head", 60, RANK, depth=0)
    after = world.close("lora-suffix")
    assert set(world.devices["head"].deltas) == {t.name for t in SPEC.suffix(0)}
    for name in (QUERY + B, UP + B, UP + A, "classifier.bias"):
        close_to(world.array(name, after), world.array(name) + world.mean(name))


def test_ffa_lora_never_moves_a_and_its_mean_of_products_is_exact(world: World) -> None:
    for name, examples in (("a", 10), ("b", 30)):
        world.train(name, examples, RANK, adapters="b")
    wanted = sum(p * world.products(QUERY)[n] for n, p in world.shares(["a", "b"]).items())
    after = world.close("ffa-lora")
    close_to(world.array(QUERY + B, after) @ world.array(QUERY + A, after), wanted, 1e-6)
    trained = {t.name for t in world.manifest.adapters if t.name.endswith(B)} | {t.name for t in SPEC.suffix(0)}
    unchanged(world, after, lambda name: name not in trained)


def test_hetlora_pads_with_zeros_and_weighs_by_the_norm_of_the_product(world: World) -> None:
    mixed(world)
    after = world.close("hetlora")
    for stem in (QUERY, UP):
        norms = {name: np.linalg.norm(product) for name, product in world.products(stem).items()}
        a, b = np.zeros_like(world.array(stem + A)), np.zeros_like(world.array(stem + B))
        for name, norm in norms.items():
            rank, (a_k, b_k) = world.devices[name].rank, world.local(world.devices[name], stem)
            a[:rank] += norm / sum(norms.values()) * a_k
            b[:, :rank] += norm / sum(norms.values()) * b_k
        close_to(world.array(stem + A, after), a)
        close_to(world.array(stem + B, after), b)
    close_to(
        world.array("classifier.weight", after), world.array("classifier.weight") + world.mean("classifier.weight")
    )


def test_hetlora_leaves_rows_that_nobody_of_the_round_has(world: World) -> None:
    world.train("a", 10, 2)
    world.train("b", 10, 1)
    after = world.close("hetlora")
    assert (world.array(QUERY + A, after)[2:] == world.array(QUERY + A)[2:]).all()
    assert (world.array(QUERY + A, after)[:2] != world.array(QUERY + A)[:2]).any()


def test_hetlora_counts_examples_where_every_norm_is_zero(world: World) -> None:
    mixed(world, change=lambda name, delta: delta * (not name.endswith(B)))
    after = world.close("hetlora")
    shares, a = world.shares(["a", "b", "c"]), np.zeros_like(world.array(QUERY + A))
    for name, share in shares.items():
        a[: world.devices[name].rank] += share * world.local(world.devices[name], QUERY)[0]
    close_to(world.array(QUERY + A, after), a)
    assert not world.array(QUERY + B, after).any()
    assert weights([0.0, 0.0], [3, 1]) == [0.75, 0.25]


def test_the_norm_of_a_product_needs_no_product() -> None:
    chance = np.random.default_rng(0)
    a, b = chance.normal(size=(3, 20)), chance.normal(size=(50, 3))
    assert math.isclose(product_norm(a, b), np.linalg.norm(b @ a), rel_tol=1e-12)


def test_flexlora_publishes_the_best_product_of_its_rank_and_its_first_rows_are_the_best_of_theirs(
    world: World,
) -> None:
    mixed(world)
    after = world.close("flexlora")
    for stem in (QUERY, UP):
        products = world.products(stem)
        mean = sum(p * products[n] for n, p in world.shares(list(products)).items())
        left, values, right = np.linalg.svd(mean)
        a, b = world.array(stem + A, after), world.array(stem + B, after)
        for rank in range(1, RANK + 1):
            best = left[:, :rank] * values[:rank] @ right[:rank]
            close_to(b[:, :rank] @ a[:rank], best, 1e-7)
        assert np.allclose(a @ a.T, np.eye(RANK), atol=1e-6)


def test_flexlora_of_no_training_changes_no_adapter(world: World) -> None:
    mixed(world, change=lambda name, delta: delta * (not name.endswith(B)))
    after = world.close("flexlora")
    unchanged(world, after, lambda name: not name.startswith("classifier"))


def test_flora_adds_the_exact_mean_product_to_the_base_and_begins_anew(world: World) -> None:
    mixed(world)
    after = world.close("flora")
    for stem in (QUERY, UP):
        products = world.products(stem)
        mean = sum(p * products[n] for n, p in world.shares(list(products)).items())
        close_to(world.array(stem + ".weight", after), world.array(stem + ".weight") + SCALE * mean)
        stacked_a = np.concatenate(
            [p * world.local(world.devices[n], stem)[0] for n, p in world.shares(list(products)).items()]
        )
        stacked_b = np.concatenate([world.local(world.devices[n], stem)[1] for n in products], axis=1)
        close_to(world.array(stem + ".weight", after), world.array(stem + ".weight") + SCALE * stacked_b @ stacked_a)
        assert (world.array(stem + A, after) == fresh_a(5, 1, stem + A, (RANK, mean.shape[1]))).all()
        assert not world.array(stem + B, after).any()
    assert (world.array(QUERY + A, after) != world.array(QUERY + A)).any()


@pytest.mark.parametrize("method", ["hetlora", "flexlora", "flora"])
def test_a_matrix_that_nobody_trained_stays(method: str, world: World) -> None:
    world.train("a", 10, 2, depth=1)
    after = world.close(method)
    assert {t.blob for t in after.adapters if t.part == 0} == {t.blob for t in world.manifest.adapters if t.part == 0}
    assert (world.array(QUERY + A, after) != world.array(QUERY + A)).any()
    assert world.array(UP + ".weight", after).tolist() == world.array(UP + ".weight").tolist()


@pytest.mark.parametrize("method", ["lora", "hetlora", "flexlora", "flora"])
@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_who_commits_first_and_how_often_it_closes_change_no_bit(method: str, codec: str, tmp_path: Path) -> None:
    versions = []
    for number, order in enumerate((("a", "b", "c"), ("c", "b", "a"))):
        world = World(tmp_path / str(number))
        for name in order:
            seed = ord(name)
            rank = RANK if method == "lora" else 1 + seed % 4
            world.train(name, seed, rank, codec=codec, change=lambda n, d, seed=seed: _random(seed, n, d.shape))
        versions += [world.close(method), world.close(method)]
    assert all(v == versions[0] for v in versions)


def _random(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng([seed, len(name), *name.encode()]).normal(0, 0.05, shape)


def test_updates_that_are_kept_stay_on_the_disk_until_the_round_is_over(world: World) -> None:
    mixed(world)
    world.close("hetlora")
    assert not any(c.folded for c in world.ledger.contributions("run", 1).values())
    world.models.updates.keep_only(world.ledger.live_blobs())
    again = world.close("hetlora")
    assert again.version == 3
    world.models.updates.keep_only(world.ledger.live_blobs())
    assert not list((world.models.updates.folder / "partial").iterdir()), (
        "what was unpacked is gone with the next clean"
    )


def test_a_kept_update_that_the_disk_lost_is_no_part_of_a_model(world: World) -> None:
    mixed(world)
    item = world.ledger.contributions("run", 1)["a"]
    path = world.models.updates.path(item.blob)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StoreError, match="lost bytes"):
        world.close("flora")


def test_values_that_would_not_be_finite_make_no_model(world: World) -> None:
    tensor = next(t for t in world.manifest.adapters if t.name == QUERY + A)
    bad = world.put(np.full(tensor.shape, np.inf))
    adapters = tuple(replace(t, blob=bad) if t.name == tensor.name else t for t in world.manifest.adapters)
    world.manifest = replace(world.manifest, adapters=adapters)
    world.train("a", 10, RANK)
    with pytest.raises(ModelError, match="would not be finite"):
        world.close("lora")


# how a run begins


def test_a_run_begins_with_random_a_and_zero_b_and_the_tensors_as_they_were(world: World) -> None:
    first, _ = world.first
    assert (world.manifest.version, world.manifest.tensors) == (2, first.tensors)
    assert world.manifest.adapter_scale == SCALE
    assert len(world.manifest.adapters) == 2 * 6 * 2
    for tensor in world.manifest.adapters:
        values = world.array(tensor.name)
        if tensor.name.endswith(B):
            assert not values.any()
        else:
            assert (values == fresh_a(5, 0, tensor.name, tensor.shape)).all()
            assert 0.5 / math.sqrt(tensor.shape[1]) < np.abs(values).max() <= 1 / math.sqrt(tensor.shape[1])
    assert world.models.with_adapters(world.manifest, world.blob, Stage(SETTINGS, "ab"), "lora") is None, "it has them"


def test_the_first_a_is_the_same_bits_on_every_machine() -> None:
    drawn = fresh_a(3, 0, "some.lora_a", (2, 4)).astype("<f4")
    assert drawn.tobytes().hex() == "a3c7fd3e1c4032bdf421e53e2c02ce3ece47fa3ec9d9bb3b498ced3d273cb2be"


def test_targets_say_which_matrices_have_adapters_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path / "some", replace(SETTINGS, lora_targets=("q", "v")))
    stems = {t.name.rsplit(".", 1)[0].rsplit(".", 1)[1] for t in world.manifest.adapters}
    assert stems == {"query", "value"}
    with pytest.raises(UsageError, match="'w' is no linear layer"):
        World(tmp_path / "none", replace(SETTINGS, lora_targets=("w",)))


@pytest.mark.parametrize("settings", [None, replace(SETTINGS, lora_rank=2), replace(SETTINGS, lora_alpha=8.0)])
def test_other_adapters_are_merged_into_the_model_before_a_run_begins(
    settings: TrainSettings | None, world: World
) -> None:
    mixed(world)
    world.manifest = world.close("hetlora")
    stage = Stage(settings, "ab") if settings else Stage(TrainSettings())
    made = world.models.with_adapters(world.manifest, world.blob, stage, "caff")
    assert made is not None
    after, _ = made
    for stem in (QUERY, UP):
        product = SCALE * world.array(stem + B) @ world.array(stem + A)
        close_to(world.array(stem + ".weight", after), world.array(stem + ".weight") + product)
        if settings:
            assert not world.array(stem + B, after).any()
    assert bool(after.adapters) == (settings is not None)
    assert (after.version, after.method) == (4, "caff")


def test_an_unpacked_update_is_what_was_sent(world: World, tmp_path: Path) -> None:
    world.train("a", 10, 2, codec="int8")
    (update,) = world.models._updates("run", 1, world.manifest, world.ledger.contributions("run", 1))
    raw = unpack(update, tmp_path / "raw")
    assert set(raw.places) == set(world.devices["a"].deltas)
    for name, delta in world.devices["a"].deltas.items():
        step = np.abs(delta).max() / 127 * 1.01
        assert np.abs(raw.places[name].array() - delta).max() <= step
