"""Which plans with adapters an agent takes: those of the model that it holds, in ranks that it has."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from edge_models import bert
from edge_runtime.agent import _strange
from edge_runtime.layout import layout, misfit
from edge_runtime.manifest import Manifest, StoredTensor, make_manifest
from edge_runtime.records import CostRow, Plan, TrainSettings

CONFIG: dict[str, int | float | str] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
SPEC = bert.describe(CONFIG, ["no", "yes"], 16)
SETTINGS = TrainSettings(lora_rank=4, lora_targets=("q", "v"))


def plan(rank: int = 4, depth: int = 2, adapters: str = "ab", ranks: tuple[int, ...] = (), **settings: Any) -> Plan:
    row = CostRow(depth, False, 4, 1, 1.0, 1.0, 1, rank=rank if depth else 0)
    return Plan(row, replace(SETTINGS, **settings), 1, ranks, adapters)


def held(of: Plan | None) -> Manifest:
    """A version with the adapters of a plan."""
    blobs = {t.name: hashlib.sha256(t.name.encode()).digest() for t in SPEC.tensors}
    manifest = make_manifest(SPEC, blobs, bytes(32), 9, version=2)
    tensors = [t for t in layout(SPEC, of) if t.part < 2] if of else []
    adapters = tuple(StoredTensor(t.name, t.shape, t.part, hashlib.sha256(t.name.encode()).digest()) for t in tensors)
    return replace(manifest, adapters=adapters, adapter_scale=4.0 if of else 0.0)


@pytest.mark.parametrize(
    "granted",
    [plan(), plan(2), plan(1, 1), plan(depth=0), plan(adapters="b"), plan(3, ranks=(1, 3)), plan(lora_targets=("q",))],
)
def test_a_plan_of_the_models_ranks_or_lower_ones_is_taken(granted: Plan) -> None:
    assert _strange(granted, held(plan())) == ""


def test_a_plan_that_the_models_adapters_do_not_hold_is_given_back() -> None:
    model = held(plan(2))
    assert "query.lora_a is (4, 8), the model's (2, 8)" in _strange(plan(4), model)
    assert "the model's (0, 0)" in _strange(plan(2, lora_targets=("up",)), model)
    assert _strange(plan(2, lora_alpha=1.0), model) == "the plan scales adapters in another way than the model"


def test_a_plan_with_adapters_of_its_own_is_for_a_model_that_has_none() -> None:
    own = plan(adapters="fresh")
    assert _strange(own, held(None)) == "" == misfit(SPEC, own)
    assert "the plan's adapters are 'fresh'" in _strange(own, held(plan()))
    for lie in (plan(adapters="fresh", mask_every=4), plan(adapters="fresher"), plan(0, adapters="fresh"), plan(9, adapters="fresh"),
                plan(adapters="fresh", ranks=(1,)), plan(adapters="fresh", depth=3), plan(adapters="fresh", lora_rank=0)):  # fmt: skip
        assert misfit(SPEC, lie), lie


def test_a_plan_without_adapters_is_none_for_a_model_that_has_them_and_the_other_way_round() -> None:
    assert "the plan's adapters are ''" in _strange(plan(0, adapters=""), held(plan()))
    assert "the model has 0 tensors of adapters" in _strange(plan(), held(None))
    assert _strange(plan(0, adapters=""), held(None)) == ""
