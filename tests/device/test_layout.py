"""What an update consists of: order and shapes of adapters, targets by name, plans that do not hold together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_models import bert
from edge_runtime.errors import UsageError
from edge_runtime.layout import layout, misfit, scale, targets
from edge_runtime.model import ModelSpec
from edge_runtime.records import CostRow, Plan, TrainSettings

CONFIG: dict[str, int | float | str] = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 9,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


@pytest.fixture
def spec() -> ModelSpec:
    return bert.describe(CONFIG, ("a", "b"), 8)


def plan(depth: int, rank: int = 4, *, ranks: tuple[int, ...] = (), adapters: str = "ab", **settings: Any) -> Plan:
    row = CostRow(depth, False, 1, 0, 0.0, 0.0, 0, rank=rank)
    return Plan(row, TrainSettings(**{"lora_rank": 4, **settings}), 1, ranks, adapters)


def named(spec: ModelSpec, plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    return [(t.name, t.shape) for t in layout(spec, plan)]


def test_an_update_without_adapters_is_the_suffix(spec: ModelSpec) -> None:
    assert layout(spec, plan(2, adapters="")) == spec.suffix(2)


def test_adapters_come_in_the_models_order_with_their_blocks_rank_then_the_head(spec: ModelSpec) -> None:
    found = named(spec, plan(2, ranks=(1, 4), lora_targets=("down", "q")))
    assert found == [
        ("encoder.layer.1.attention.self.query.lora_a", (1, 8)),
        ("encoder.layer.1.attention.self.query.lora_b", (8, 1)),
        ("encoder.layer.1.output.dense.lora_a", (1, 16)),
        ("encoder.layer.1.output.dense.lora_b", (8, 1)),
        ("encoder.layer.2.attention.self.query.lora_a", (4, 8)),
        ("encoder.layer.2.attention.self.query.lora_b", (8, 4)),
        ("encoder.layer.2.output.dense.lora_a", (4, 16)),
        ("encoder.layer.2.output.dense.lora_b", (8, 4)),
        ("classifier.weight", (2, 8)),
        ("classifier.bias", (2,)),
    ]


def test_without_targets_every_linear_layer_of_the_trained_blocks_has_an_adapter(spec: ModelSpec) -> None:
    found = layout(spec, plan(1))
    assert len(found) == 2 * 6 + 2
    assert {t.part for t in found[:-2]} == {2}


def test_with_a_frozen_only_b_is_sent(spec: ModelSpec) -> None:
    everything = layout(spec, plan(2))
    assert layout(spec, plan(2, adapters="b")) == tuple(t for t in everything if not t.name.endswith(".lora_a"))


def test_the_head_alone_has_no_adapters(spec: ModelSpec) -> None:
    assert layout(spec, plan(0)) == spec.suffix(0)


def test_a_mask_has_an_entry_for_every_so_many_of_a_matrix_in_the_trained_blocks(spec: ModelSpec) -> None:
    found = layout(spec, plan(1, 0, adapters="", lora_rank=0, mask_every=10, lora_targets=("q", "up")))
    matrices = {
        t.name: t
        for t in spec.tensors
        if t.part == 2 and t.name.endswith(("query.weight", "intermediate.dense.weight"))
    }
    assert {t.name.replace(".masked", ".weight"): t.shape for t in found if t.part == 2} == {
        name: (-(-t.size // 10),) for name, t in matrices.items()
    }
    assert found[-2:] == spec.suffix(0)
    every = layout(spec, plan(3, 0, adapters="", lora_rank=0, mask_every=1))
    assert sum(t.size for t in every if t.part < 3) == sum(
        t.size for t in spec.suffix(3) if t.part < 3 and t.is_adapted
    )


def test_a_short_name_means_one_layer_and_the_end_of_a_name_all_that_end_so(spec: ModelSpec) -> None:
    last = "encoder.layer.2."
    assert last + "output.dense.weight" in targets(spec, ["down"])
    assert last + "attention.output.dense.weight" not in targets(spec, ["down"])
    assert targets(spec, ["output.dense"]) == targets(spec, ["down"])
    assert targets(spec, ["query"]) == targets(spec, ["q"]) == targets(spec, ["attention.self.query"])
    assert targets(spec, ["dense"]) == targets(spec, ["o", "up", "down"])
    assert targets(spec, []) == targets(spec, ["q", "k", "v", "o", "up", "down"])


@pytest.mark.parametrize("name", ["w", "", "LayerNorm", "classifier", "uery", "word_embeddings"])
def test_a_name_of_no_layer_is_refused_with_those_there_are(spec: ModelSpec, name: str) -> None:
    with pytest.raises(UsageError, match=r"choose from q, k, v, o, up, down, attention.self.query, .*, output.dense$"):
        targets(spec, ["q", name])


def test_the_scale_is_one_for_all_ranks() -> None:
    assert scale(TrainSettings(lora_rank=8)) == 2.0
    assert scale(TrainSettings(lora_rank=8, lora_alpha=4.0)) == 0.5


def test_a_plan_that_holds_together_fits(spec: ModelSpec) -> None:
    for sound in (plan(2), plan(2, ranks=(1, 4)), plan(0), plan(3, 0, adapters="", lora_rank=0), plan(1, 2)):
        assert misfit(spec, sound) == ""


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (plan(2, adapters="a"), "adapters 'a' are not known"),
        (plan(4), "depth 4"),
        (plan(2, ranks=(4,)), "1 ranks for 2 blocks"),
        (plan(2, ranks=(1, 5)), "above 4"),
        (plan(2, 8), "above 4"),
        (plan(2, 0), "without a rank"),
        (plan(0, 0, lora_rank=0), "without a rank"),
        (plan(1, lora_targets=("w",)), "'w' is no linear layer"),
        (plan(1, mask_every=10), "a mask with adapters 'ab'"),
    ],
)
def test_a_plan_that_does_not_is_told_why(spec: ModelSpec, wrong: Plan, why: str) -> None:
    assert why in misfit(spec, wrong)


def test_ranks_without_any_in_the_row_are_refused(spec: ModelSpec) -> None:
    wrong = plan(2, ranks=(1, 2))
    assert "above 0" in misfit(spec, replace(wrong, chosen=replace(wrong.chosen, rank=0)))
