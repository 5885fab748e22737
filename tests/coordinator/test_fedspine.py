"""FedSpine on the coordinator: shapes and ranks against a dense reference, what it remembers, rewards, the fleet's model, the plans."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_coordinator.methods import METHODS, bandit, configure_train, fedspine, pruned
from edge_coordinator.methods.best_product import best_product
from edge_coordinator.methods.method import Options, Stage
from edge_coordinator.models import Models
from edge_runtime.encoding import write_update
from edge_runtime.importance import Scores, choose
from edge_runtime.layout import A, B
from edge_runtime.manifest import Manifest, make_manifest
from edge_runtime.prune_plan import kept_of, numbers_kept, sent
from edge_runtime.pruning import Kept, cut_rows, kept_groups
from edge_runtime.records import Budget, CostRow, Plan, Pruning, TrainSettings
from edge_runtime.wire import Join, encode, pack
from tests.networks import bert_spec

Array = np.ndarray[Any, np.dtype[Any]]
SPEC = bert_spec(24, 4, 20, blocks=2, labels=2)
FULL = Kept.full(SPEC)
RANK = 4
SETTINGS = TrainSettings(seed=5, lora_rank=RANK, lora_alpha=6.0)
METHOD_NAMES = ("fedspine", "prune-magnitude", "prune-oneshot")


def some_kept(seed: int, sparsity: float, begun: Kept = FULL) -> Kept:
    """What a device might keep."""
    scores, random = Scores(SPEC), np.random.default_rng(seed)
    for array in (*scores.heads, *scores.channels):
        array[...] = random.random(array.shape)
    return choose(SPEC, begun, scores, sparsity)


@dataclass
class Device:
    num_examples: int
    rank: int
    kept: Kept
    deltas: dict[str, Array]


class World:
    """A coordinator's models and one open round on a version with adapters that are not zero."""

    def __init__(self, folder: Path, method: str = "fedspine") -> None:
        self.ledger, self.method = Ledger(folder / "ledger.db"), METHODS[method]
        self.models = Models(folder, self.ledger)
        chance = np.random.default_rng(1)
        blobs = {t.name: self._put(chance.normal(0, 0.5, t.shape)) for t in SPEC.tensors}
        first = make_manifest(SPEC, blobs, self.models.store.put(b"tokenizer"), 9, version=1)
        begun = self.models.with_adapters(
            first, self.models.store.put(b"manifest"), Stage(SETTINGS, "ab", prunes=True), method
        )
        assert begun is not None
        adapters = tuple(replace(t, blob=self._put(chance.normal(0, 0.2, t.shape))) for t in begun[0].adapters)
        self.manifest, self.blob = replace(begun[0], adapters=adapters), begun[1]
        self.devices: dict[str, Device] = {}
        with self.ledger.transaction():
            self.ledger.open_round("run", 1, 2, 0.0, 0.0)

    def _put(self, values: Array) -> bytes:
        return self.models.store.put(values.astype("<f4").tobytes())

    def array(self, name: str, manifest: Manifest | None = None) -> Array:
        manifest = manifest or self.manifest
        (tensor,) = [t for t in (*manifest.tensors, *manifest.adapters) if t.name == name]
        return np.fromfile(self.models.store.path(tensor.blob), "<f4").astype(np.float64).reshape(tensor.shape)

    def train(
        self,
        name: str,
        num_examples: int,
        rank: int,
        kept: Kept,
        *,
        still: bool = False,
        codec: str = "f32",
        **said: Any,
    ) -> None:
        """A device commits random deltas in the shapes of what it keeps. Args: still: it changed no adapter."""
        row = CostRow(2, False, 4, 1, 1.0, 1.0, 1, rank=rank, codec=codec)
        plan = Plan(row, SETTINGS, 1, adapters="ab", pruning=Pruning(b"", 0.5, 20, "lora"))
        chance, tensors = np.random.default_rng(len(self.devices) + 10), sent(SPEC, plan, kept.encode())
        deltas = {t.name: (chance.normal(0, 0.05, t.shape) * (not still)).astype(np.float32) for t in tensors}
        out = io.BytesIO()
        write_update(out, codec, {t.name: t.size for t in tensors}, ((n, d.reshape(-1)) for n, d in deltas.items()), 1)
        metrics = {
            "first_loss": 2.0,
            "last_loss": 1.0,
            "train_s": 10.0,
            "num_bytes": 1000,
            **said,
            "kept": kept.encode().hex(),
        }
        join = Join("run", 1, bytes(8), num_examples, Budget(1 << 30), (), uplink_bytes_per_s=100.0)
        said_join = encode(join, sent_at=0.0, boot=bytes(8), sequence=0)
        with self.ledger.transaction():
            self.ledger.set_member("run", 1, Member(name, "planned", said_join, bytes(16), pack(plan), ""))
            blob = self.models.updates.put(out.getvalue())
            item = Contribution(name, blob, num_examples, 2, metrics, False, codec)
            assert self.ledger.contribute("run", 1, item, 0.0)
        self.devices[name] = Device(num_examples, rank, kept, {n: d.astype(np.float64) for n, d in deltas.items()})

    def close(self, state: dict[str, Any] | None = None) -> tuple[Manifest, dict[str, Any]]:
        """The next version, and what the method remembers."""
        asked = {name: {"to": 0.5, "point": [1.0, 0.5]} for name in self.devices}
        before = {"asked": asked, "trees": dict.fromkeys(asked, bandit.new_tree()), **(state or {})}
        committed = self.ledger.contributions("run", 1)
        collected = self.models.collect("run", 1, self.manifest, committed, self.method, SETTINGS)
        changes, after = self.method.aggregate(before, collected)
        found, _ = self.models.next_version(self.manifest, self.blob, changes, "m", kept=self.method.kept(after))
        assert json.loads(json.dumps(after)) == after
        return found, dict(after)

    def product(self, device: Device, stem: str) -> tuple[Array, Array]:
        """B_i A_i in the matrix's whole shape, and where the device has entries, dense and by hand."""
        (matrix,) = [t for t in SPEC.tensors if t.name == stem + ".weight"]
        rows, columns = (
            np.arange(n) if p is None else p
            for n, p in zip(matrix.shape, cut_rows(SPEC, device.kept, matrix), strict=True)
        )
        a = self.array(stem + A)[: device.rank][:, columns] + device.deltas[stem + A]
        b = self.array(stem + B)[:, : device.rank][rows] + device.deltas[stem + B]
        whole, has = np.zeros(matrix.shape), np.zeros(matrix.shape, bool)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                whole[row, column], has[row, column] = b[i] @ a[:, j], True
        return whole, has


def reference(world: World, stem: str) -> Array:
    """The aggregated product entry by entry: every matrix dense, every mask written out."""
    products = {name: world.product(device, stem) for name, device in world.devices.items()}
    q = {name: d.num_examples * np.linalg.norm(products[name][0]) for name, d in world.devices.items()}
    if not any(q.values()):
        q = {name: float(d.num_examples) for name, d in world.devices.items()}
    old = world.array(stem + B) @ world.array(stem + A)
    found = np.zeros(old.shape)
    for place in np.ndindex(*old.shape):
        there = [name for name, (_, has) in products.items() if has[place]]
        weight = sum(q[name] for name in there)
        found[place] = sum(q[n] * products[n][0][place] for n in there) / weight if there else old[place]
    return found


STEMS = ("encoder.layer.1.attention.self.query", "encoder.layer.0.attention.output.dense", "encoder.layer.0.intermediate.dense", "encoder.layer.1.output.dense")  # fmt: skip


def three(world: World, **how: Any) -> None:
    """Devices of other ranks that keep other groups; some entries nobody has."""
    for number, (name, examples, rank) in enumerate((("c", 30, 4), ("a", 10, 2), ("b", 60, 1))):
        world.train(name, examples, rank, some_kept(number, 0.7 if number else 0.45), **how)


def test_adapters_of_other_shapes_and_ranks_become_the_best_product_of_the_dense_mean(tmp_path: Path) -> None:
    world = World(tmp_path)
    three(world)
    after, _ = world.close()
    for stem in STEMS:
        wanted = reference(world, stem)
        has = sum(world.product(device, stem)[1].astype(int) for device in world.devices.values())
        assert {0, 1, 2} <= set(np.unique(has)), "entries that nobody, one and several devices have"
        a, b = best_product(wanted, world.array(stem + A))
        left, values, right = np.linalg.svd(wanted)
        assert np.allclose(b @ a, left[:, :RANK] * values[:RANK] @ right[:RANK], atol=1e-9)
        found = world.array(stem + B, after) @ world.array(stem + A, after)
        assert np.abs(found - b @ a).max() < 1e-6 * np.abs(wanted).max()
    name = "classifier.weight"
    mean = sum(d.num_examples / 100 * d.deltas[name] for d in world.devices.values())
    assert np.abs(world.array(name, after) - world.array(name) - mean).max() < 1e-7
    names = {t.name for t in SPEC.tensors if t.part < 2}
    assert {t.name: t.blob for t in after.tensors if t.name in names} == {
        t.name: t.blob for t in world.manifest.tensors if t.name in names
    }


def test_updates_in_a_codec_are_read_in_the_shapes_of_what_each_device_kept(tmp_path: Path) -> None:
    plain, coded = World(tmp_path / "plain"), World(tmp_path / "coded")
    three(plain)
    three(coded, codec="int8")
    first, second = plain.close()[0], coded.close()[0]
    for stem in STEMS:
        one, other = (w.array(stem + B, m) @ w.array(stem + A, m) for w, m in ((plain, first), (coded, second)))
        assert 0 < np.abs(one - other).max() < 0.02 * np.abs(one).max()


def test_a_single_whole_device_gives_its_own_product_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.train("only", 7, RANK, FULL)
    after, _ = world.close()
    for stem in STEMS:
        found = world.array(stem + B, after) @ world.array(stem + A, after)
        assert np.abs(found - world.product(world.devices["only"], stem)[0]).max() < 1e-6


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_devices_kept_is_remembered_and_what_most_of_them_keep_is_the_fleets_model(
    method: str, tmp_path: Path
) -> None:
    world = World(tmp_path, method)
    first, second = some_kept(1, 0.5), some_kept(2, 0.5)
    for name, kept in (("a", first), ("b", first), ("c", second)):
        world.train(name, 10, 2, kept)
    after, state = world.close()
    assert {name: (of["kept"], of["sparsity"]) for name, of in state["devices"].items()} == {
        "a": (first.encode().hex(), 0.5), "b": (first.encode().hex(), 0.5), "c": (second.encode().hex(), 0.5)
    }  # fmt: skip
    assert after.kept == first.encode() and state["fleet"]["sparsity"] == pytest.approx(0.5)
    assert pruned.known(state, "new")["kept"] == first.encode().hex(), "a newcomer begins with what the fleet keeps"


def test_the_fleets_model_has_the_devices_mean_sparsity() -> None:
    devices = [
        {"kept": some_kept(s, p).encode().hex(), "sparsity": p, "weight": w}
        for s, p, w in ((1, 0.2, 3.0), (2, 0.6, 1.0))
    ]
    fleet = pruned.majority(SPEC, devices)
    kept = kept_of(SPEC, bytes.fromhex(fleet["kept"]))
    assert fleet["sparsity"] == pytest.approx(0.3)
    assert (sum(map(kept.num_heads, (0, 1))), sum(map(kept.num_channels, (0, 1)))) == numbers_kept(SPEC, FULL, 0.3)
    heavy, light = (kept_of(SPEC, bytes.fromhex(d["kept"])) for d in devices)
    for block in range(2):
        of, has, too = (kept_groups(SPEC, k, block)[1] for k in (kept, heavy, light))
        assert not (of & ~has & ~too).any() or (of | ~(has | too)).all(), "what nobody keeps comes last"


def test_updates_that_changed_nothing_count_by_examples(tmp_path: Path) -> None:
    world = World(tmp_path)
    zero = tuple(replace(t, blob=world._put(np.zeros(t.shape))) for t in world.manifest.adapters)
    world.manifest = replace(world.manifest, adapters=zero)
    for name, examples in (("a", 30), ("b", 10)):
        world.train(name, examples, 2, some_kept(3, 0.5), still=True)
    after, state = world.close()
    assert [t.blob for t in after.adapters] == [t.blob for t in zero]
    assert [of["weight"] for of in state["devices"].values()] == pytest.approx([30, 10])


def test_the_reward_is_improvement_and_progress_and_share_over_how_far_the_time_is_from_the_mean(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.train("a", 10, 2, some_kept(1, 0.5), train_s=20.0)  # and 10 s to send 1000 bytes
    world.train("b", 10, 2, some_kept(2, 0.5), last_loss=3.0)
    asked = {"a": {"to": 0.5, "point": [0.8, 0.1]}, "b": {"to": 0.5, "point": [0.1, 0.9]}}
    _, state = world.close({"asked": asked, "best": 0.0})
    products = {n: [np.linalg.norm(world.product(d, t.name.removesuffix(".weight"))[0]) for t in SPEC.tensors if t.is_adapted and 0 <= t.part < 2]
                for n, d in world.devices.items()}  # fmt: skip
    norms = {n: float(np.sqrt(np.square(p).sum())) for n, p in products.items()}
    share = norms["a"] / sum(norms.values())
    raw = {"a": (0.5 + 0.8 + share) / (5 / 25 + 0.1), "b": max(0.0, -0.5 + 0.1 + 1 - share) / (5 / 25 + 0.1)}
    assert state["best"] == pytest.approx(max(raw.values()))
    for name, reward in raw.items():
        assert state["trees"][name]["seen"] == [[1, asked[name]["point"], pytest.approx(reward / state["best"])]]


# plans


def join(examples: int = 10) -> Join:
    table = tuple(
        CostRow(d, False, 4, 1 << 20, 0.1, 1.0, 1000, rank=r if d else 0) for d in (0, 1, 2) for r in (1, 2, 4)
    )
    return Join("run", 1, bytes(8), examples, Budget(1 << 30), table)


def plans(method: str, state: Any, number: int, joins: dict[str, Join], **options: Any) -> Any:
    how = Options(rounds=8, sparsity=0.5, **options)
    return configure_train(method, state, joins, number=number, num_blocks=2, settings=SETTINGS, options=how)


def test_the_bandit_gives_each_device_its_own_sparsity_and_rank_and_all_the_whole_sparsity_in_the_end() -> None:
    joins = {f"device-{n}": join() for n in range(6)}
    first, state = plans("fedspine", {}, 1, joins)
    assert all(c.row.depth == 2 and 1 <= c.row.rank <= RANK for c in first.values())
    asked = [c.pruning.to for c in first.values()]
    assert len({round(to, 6) for to in asked}) == 6 and all(0 <= to <= 0.5 for to in asked)
    assert {c.pruning.kept for c in first.values()} == {b""} and state["prune_rounds"] == 4
    again, same = plans("fedspine", {}, 1, joins)
    assert (again, same) == (first, state), "a round that is planned again is planned alike"
    last, _ = plans("fedspine", json.loads(json.dumps(state)), 4, joins)
    assert {c.pruning.to for c in last.values()} == {0.5}


def test_a_devices_sparsity_only_grows_and_it_goes_on_with_what_it_has_kept() -> None:
    kept = some_kept(1, 0.3).encode()
    state = {"devices": {"a": {"kept": kept.hex(), "sparsity": 0.3, "weight": 1.0}}}
    for number in range(1, 4):
        choices, state = plans("fedspine", state, number, {"a": join()})
        assert choices["a"].pruning.kept == kept and choices["a"].pruning.to >= 0.3


def test_the_baselines_follow_the_schedule_and_prune_at_once() -> None:
    found = {m: [plans(m, {}, n, {"a": join()})[0]["a"].pruning for n in range(1, 6)] for m in METHOD_NAMES[1:]}
    assert [p.to for p in found["prune-magnitude"]] == pytest.approx(
        [0.5 * (1 - (1 - n / 4) ** 3) for n in (1, 2, 3, 4, 4)]
    )
    assert [p.to for p in found["prune-oneshot"]] == [0.5] * 5
    assert {(m, p.by, p.every) for m, of in found.items() for p in of} == {
        ("prune-magnitude", "magnitude", 20),
        ("prune-oneshot", "taylor", 20),
    }


def test_a_device_that_cannot_train_all_blocks_is_left_out() -> None:
    shallow = replace(join(), table=tuple(row for row in join().table if row.depth < 2))
    for method in METHOD_NAMES:
        choices, state = plans(method, {}, 1, {"a": join(), "b": shallow})
        assert choices["b"].row is None and "leaves out" in choices["b"].why and list(state["asked"]) == ["a"]


def test_more_rounds_later_do_not_move_the_end_of_pruning() -> None:
    _, state = plans("fedspine", {}, 1, {"a": join()})
    assert pruned.prune_rounds(state, Options(rounds=100)) == 4
    assert pruned.prune_rounds(state, Options(rounds=100, prune_rounds=7)) == 7
    assert fedspine._draw(1, 2, "a", 0) == fedspine._draw(1, 2, "a", 0) != fedspine._draw(1, 2, "a", 1)
