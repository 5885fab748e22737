"""auto on the coordinator: which kind of training a device is given, and what devices of all kinds make of a model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_coordinator.methods import METHODS, configure_train
from edge_coordinator.methods.method import Options
from edge_coordinator.models import Models
from edge_runtime.asks import GAINS, expected_gain
from edge_runtime.encoding import write_update
from edge_runtime.kinds import of_row
from edge_runtime.layout import MASKED, A, B, layout
from edge_runtime.manifest import Manifest, make_manifest
from edge_runtime.masks import indices
from edge_runtime.records import Budget, CostRow, Plan, TrainSettings
from edge_runtime.training.adapters import random_a
from edge_runtime.wire import Join, pack
from tests.coordinator.test_adapters import QUERY, SPEC, UP
from tests.samples import BOOT

Array = np.ndarray[Any, np.dtype[Any]]
RUN = TrainSettings(seed=5, lora_rank=4, lora_alpha=6.0)
STAGE = METHODS["auto"].stage({}, 1, 2, RUN, Options(sparse_density=0.25))
BLOCKS = 3


def row(kind: str, depth: int, peak: int = 1, upload: int | None = None, epoch_s: float = 1.0) -> CostRow:
    size = {"blocks": 1000, "entries": 100, "adapters": 30}[kind] * depth + 1 if upload is None else upload
    rank, every = 8 if kind == "adapters" and depth else 0, 10 if kind == "entries" and depth else 0
    return CostRow(depth, False, 4, peak, 1.0, epoch_s, size, rank=rank, mask_every=every)


def table(**how: Any) -> tuple[CostRow, ...]:
    """All kinds in all depths; deeper ones hold more, and the blocks themselves more than a part of them."""
    peaks = {"blocks": 10, "entries": 9, "adapters": 8}
    rows = [
        row(kind, depth, peak=peak * depth, **how) for depth in range(1, BLOCKS + 1) for kind, peak in peaks.items()
    ]
    return (row("blocks", 0), *rows)


def given(rows: tuple[CostRow, ...], memory: int = 1000, upload: int | None = None) -> tuple[str, int] | None:
    """Kind and depth that a device with such budgets is given."""
    settings, join = TrainSettings(lora_rank=8), Join("first", 1, BOOT, 10, Budget(memory, None, upload), rows)
    found, state = configure_train(
        "auto", {}, {"a": join}, number=1, num_blocks=BLOCKS, settings=settings, options=Options()
    )
    assert state == {}
    chosen = found["a"].row
    return chosen and ("entries" if chosen.mask_every else "adapters" if chosen.rank else "blocks", chosen.depth)


def test_a_device_trains_what_promises_most_within_its_budgets() -> None:
    assert given(table()) == ("blocks", 3)
    assert given(table(), memory=29) == ("entries", 3) == given(table(), upload=999)
    assert given(table(), upload=299) == ("adapters", 3)
    assert given(table(), upload=89) == ("adapters", 2)
    assert given(table(), memory=26) == ("blocks", 2)
    assert given(table(), memory=23) == ("blocks", 2) and given(table(), memory=19) == ("entries", 2)
    assert given(table(), memory=10) == ("blocks", 1), "seven points above a tenth of its entries"
    assert given(table(), memory=9) == ("adapters", 1)
    assert given(table(), memory=7) == ("blocks", 0) and given(table(), memory=0) is None


def test_of_rows_that_promise_and_send_the_same_the_fastest_is_taken() -> None:
    slow, fast = row("entries", 3, epoch_s=9.0), row("entries", 3, epoch_s=2.0)
    for rows in ((slow, fast), (fast, slow)):
        found, _ = configure_train("auto", {}, {"a": Join("first", 1, BOOT, 10, Budget(100), rows)}, number=1,
                                   num_blocks=3, settings=TrainSettings(lora_rank=8), options=Options())  # fmt: skip
        assert found["a"].row == fast


def test_the_expected_gain_is_as_measured_at_thirds_and_on_the_line_between() -> None:
    for kind, points in GAINS.items():
        assert points[0] == 0 and len(points) == 4
        assert [expected_gain(row(kind, depth), 3) for depth in (1, 2, 3)] == pytest.approx(points[1:])
        assert expected_gain(row(kind, 3), 6) == pytest.approx((points[1] + points[2]) / 2)
        assert expected_gain(row(kind, 1), 12) == pytest.approx(points[1] / 4)
    assert expected_gain(row("blocks", 0), 3) == 0


def test_a_row_with_another_mask_or_rank_than_the_rounds_or_with_both_is_not_given() -> None:
    lies = (replace(row("entries", 3), mask_every=7), replace(row("entries", 3), rank=8), replace(row("adapters", 3), rank=4),
            replace(row("blocks", 0), mask_every=10), replace(row("blocks", 0), rank=8))  # fmt: skip
    assert given(lies) is None
    assert given((*lies, row("blocks", 1))) == ("blocks", 1)


def test_each_kind_has_settings_that_a_plan_may_have_and_masks_differ_from_round_to_round() -> None:
    assert (STAGE.adapters, STAGE.settings.lora_rank, STAGE.settings.mask_every) == ("fresh", 4, 4)
    found = {}
    for kind in GAINS:
        what = row(kind, 2)
        settings, adapters = of_row(
            STAGE.settings, STAGE.adapters, replace(what, mask_every=4 if what.mask_every else 0)
        )
        found[kind] = (settings.lora_rank, settings.mask_every, adapters)
    assert found == {"blocks": (0, 0, ""), "adapters": (4, 0, "fresh"), "entries": (0, 4, "")}
    seeds = [METHODS["auto"].stage({}, n, 2, RUN, Options()).settings.mask_seed for n in (1, 2, 3)]
    assert len(set(seeds)) == 3


class World:
    """A coordinator's models and one open round of auto."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder / "ledger.db")
        self.models = Models(folder, self.ledger)
        chance = np.random.default_rng(1)
        blobs = {
            t.name: self.models.store.put(chance.normal(0, 0.5, t.shape).astype("<f4").tobytes()) for t in SPEC.tensors
        }
        self.manifest = make_manifest(SPEC, blobs, self.models.store.put(b"tokenizer"), 9, version=1)
        self.devices: dict[str, tuple[int, Plan, dict[str, Array]]] = {}
        with self.ledger.transaction():
            self.ledger.open_round("run", 1, 1, 0.0, 0.0)

    def train(self, name: str, num_examples: int, kind: str, depth: int = 2, codec: str = "f32") -> None:
        """A device commits random deltas of its own."""
        rank, every = (4, 0) if kind == "adapters" and depth else (0, 4 if kind == "entries" and depth else 0)
        chosen = CostRow(depth, False, 4, 1, 1.0, 1.0, 1, rank=rank, codec=codec, mask_every=every)
        settings, adapters = of_row(STAGE.settings, STAGE.adapters, chosen)
        plan = Plan(chosen, replace(settings, seed=1000 + num_examples), 1, adapters=adapters)
        chance, tensors = np.random.default_rng(num_examples), layout(SPEC, plan)
        deltas = {t.name: chance.normal(0, 0.05, t.shape).astype(np.float32) for t in tensors}
        out = io.BytesIO()
        write_update(out, codec, {t.name: t.size for t in tensors}, ((n, d.reshape(-1)) for n, d in deltas.items()), 1)
        with self.ledger.transaction():
            self.ledger.set_member("run", 1, Member(name, "planned", b"", bytes(16), pack(plan), ""))
            blob = self.models.updates.put(out.getvalue())
            assert self.ledger.contribute(
                "run", 1, Contribution(name, blob, num_examples, depth, {}, False, codec), 0.0
            )
        self.devices[name] = num_examples, plan, {n: d.astype(np.float64) for n, d in deltas.items()}

    def dense(self, name: str, matrix: str) -> Array | None:
        """What a device changed in a matrix, by other means than the product's."""
        _, plan, deltas = self.devices[name]
        (tensor,) = [t for t in SPEC.tensors if t.name == matrix]
        stem = matrix.removesuffix(".weight")
        if matrix in deltas:
            return deltas[matrix]
        if stem + A in deltas:
            a = random_a(plan.settings.seed, stem + A, *deltas[stem + A].shape) + deltas[stem + A]
            return 6.0 / 4.0 * np.einsum("or,ri->oi", deltas[stem + B], a)
        if stem + MASKED in deltas:
            flat = np.zeros(tensor.size)
            for place, value in zip(indices(6, matrix, tensor.size, 4), deltas[stem + MASKED], strict=True):
                flat[place] = value
            return flat.reshape(tensor.shape)
        return None

    def close(self) -> Manifest:
        """The next version."""
        committed, rule = self.ledger.contributions("run", 1), METHODS["auto"]
        collected = self.models.collect("run", 1, self.manifest, committed, rule, RUN)
        changes, state = rule.aggregate({}, collected)
        assert json.loads(json.dumps(state)) == state
        return self.models.next_version(self.manifest, bytes(32), changes, "auto")[0]

    def array(self, name: str, manifest: Manifest) -> Array:
        (tensor,) = [t for t in manifest.tensors if t.name == name]
        return np.fromfile(self.models.store.path(tensor.blob), "<f4").astype(np.float64).reshape(tensor.shape)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def mixed(world: World, names: tuple[str, ...] = ("full", "sparse", "lora", "shallow", "head")) -> None:
    how = {"full": (10, "blocks", 2), "sparse": (20, "entries", 2), "lora": (30, "adapters", 2), "shallow": (15, "adapters", 1),
           "head": (25, "blocks", 0)}  # fmt: skip
    for name in names:
        world.train(name, *how[name])


def test_all_kinds_make_the_weighted_mean_of_the_devices_models_matrix_by_matrix(world: World) -> None:
    mixed(world)
    after = world.close()
    for tensor in SPEC.tensors:
        if tensor.part < 0:
            continue
        own = {n: world.dense(n, tensor.name) for n in world.devices}
        found = {n: d for n, d in own.items() if d is not None}
        if tensor.name == UP + ".weight":
            assert set(found) == {"full", "sparse", "lora"}
        if tensor.name == QUERY + ".weight":
            assert set(found) == {"full", "sparse", "lora", "shallow"}
        if tensor.name == "classifier.weight":
            assert set(found) == set(world.devices)
        total = sum(world.devices[n][0] for n in found)
        mean = sum(world.devices[n][0] / total * d for n, d in found.items())
        moved = world.array(tensor.name, after) - world.array(tensor.name, world.manifest)
        assert np.abs(moved - mean).max() < 3e-8 + 6e-8 * np.abs(world.array(tensor.name, after)).max(), tensor.name
    assert after.adapters == () and after.adapter_scale == 0.0


def test_a_matrix_that_nobody_trained_stays_and_vectors_are_those_of_who_trained_them_in_full(world: World) -> None:
    mixed(world, ("lora", "shallow"))
    after = world.close()
    before = {t.name: t.blob for t in world.manifest.tensors}
    changed = {t.name for t in after.tensors if t.blob != before[t.name]}
    matrices = {t.name for t in SPEC.tensors if 0 <= t.part < 2 and len(t.shape) == 2}
    assert changed == matrices | {t.name for t in SPEC.suffix(0)}
    world.train("deeper", 40, "blocks", 1)
    after = world.close()
    vector = "encoder.layer.1.attention.self.query.bias"
    moved = world.array(vector, after) - world.array(vector, world.manifest)
    assert np.abs(moved - world.devices["deeper"][2][vector]).max() < 1e-7


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_who_commits_first_and_how_often_it_closes_change_no_bit(codec: str, tmp_path: Path) -> None:
    versions = []
    for number, order in enumerate((("full", "sparse", "lora"), ("lora", "sparse", "full"))):
        world = World(tmp_path / str(number))
        for name in order:
            world.train(
                name, 10 + len(name), {"full": "blocks", "sparse": "entries", "lora": "adapters"}[name], codec=codec
            )
        versions += [world.close(), world.close()]
    assert all(v == versions[0] for v in versions)
