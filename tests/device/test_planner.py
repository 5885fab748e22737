"""From costs and budgets to a plan: always within the budgets, deepest first, and the reason when nothing fits."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_models import bert
from edge_runtime.codecs import CHOSEN, update_bytes
from edge_runtime.cost import Calibration, DataShape, cost, trained
from edge_runtime.errors import DoesNotFit, UsageError
from edge_runtime.layout import sent
from edge_runtime.planner import (
    check_settings,
    choose,
    cost_table,
    feasible,
    make_plan,
    mib,
    offered_ranks,
    over_budget,
    shrink,
    smaller_rows,
)
from edge_runtime.records import Budget, CostRow, TrainSettings
from edge_runtime.wire import Join, pack
from tests.samples import quickly, small_spec

MIB = 1 << 20
SPEC = small_spec(4, 128)
DATA = DataShape(1000, 128, 32.0)
SETTINGS = TrainSettings(epochs=2, batch_size=16)
CALIBRATION = Calibration("torch", 100 * MIB, 1e-4, 2e-5, 3e-4, 7e-5, 1e-9)
NO_LIMIT = Budget(1 << 50)

ROWS = st.lists(
    st.builds(
        CostRow,
        depth=st.integers(0, 6),
        checkpointing=st.booleans(),
        micro_batch=st.sampled_from([1, 4, 16]),
        peak_bytes=st.integers(1, 1000),
        step_s=st.just(1.0),
        epoch_s=st.floats(0.1, 100),
        upload_bytes=st.integers(1, 1000),
    ),
    min_size=1,
    max_size=12,
)
BUDGETS = st.builds(Budget, st.integers(0, 1000), st.none() | st.floats(0, 300), st.none() | st.integers(0, 1000))


def row(depth: int, peak_mib: int, *, epoch_s: float = 10.0, upload_mib: float = 1.0, micro_batch: int = 16) -> CostRow:
    """A made-up candidate."""
    return CostRow(depth, False, micro_batch, peak_mib * MIB, 1.0, epoch_s, int(upload_mib * MIB))


@quickly(150)
@given(rows=ROWS, budget=BUDGETS, epochs=st.integers(1, 5))
def test_what_is_chosen_fits_every_budget_and_nothing_deeper_does(
    rows: list[CostRow], budget: Budget, epochs: int
) -> None:
    def fits(candidate: CostRow) -> bool:
        return (
            candidate.peak_bytes <= budget.memory_bytes
            and (budget.time_s is None or epochs * candidate.epoch_s <= budget.time_s)
            and (budget.upload_bytes is None or candidate.upload_bytes <= budget.upload_bytes)
        )

    fitting = [candidate for candidate in rows if fits(candidate)]
    assert sorted(map(repr, feasible(rows, budget, epochs))) == sorted(map(repr, fitting))
    if not fitting:
        with pytest.raises(DoesNotFit) as caught:
            choose(rows, budget, epochs)
        assert caught.value.needed_bytes == min(r.peak_bytes for r in rows)
        return
    chosen = choose(rows, budget, epochs)
    assert chosen in fitting
    assert chosen.depth == max(r.depth for r in fitting)
    assert chosen.epoch_s == min(r.epoch_s for r in fitting if r.depth == chosen.depth)


@quickly(40)
@given(
    memory=st.integers(90, 220),
    time_s=st.none() | st.floats(0.1, 200),
    upload=st.none() | st.integers(0, 700_000),
    epochs=st.integers(1, 3),
)
def test_no_row_of_a_table_is_granted_over_budget_and_more_budget_never_gives_less(
    memory: int, time_s: float | None, upload: int | None, epochs: int
) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=epochs)
    depths = []
    for factor in (1.0, 1.1, 2.0, 10.0):
        budget = Budget(int(memory * MIB * factor), time_s and time_s * factor, upload and int(upload * factor))
        rows = cost_table(SPEC, DATA, settings, CALIBRATION, budget)
        try:
            chosen = choose(rows, budget, epochs)
        except DoesNotFit:
            depths.append(-1)
        else:
            assert over_budget(chosen, budget, epochs) == ""
            depths.append(chosen.depth)
    assert depths == sorted(depths)


@pytest.mark.parametrize("which", ["memory_bytes", "time_s", "upload_bytes"])
def test_each_budget_by_itself_takes_the_plan_from_all_blocks_to_none_and_never_up(which: str) -> None:
    free = cost_table(SPEC, DATA, SETTINGS, CALIBRATION, NO_LIMIT)
    whole = choose(free, NO_LIMIT, 2)
    assert whole.depth == 4
    depths = []
    for step in range(140):
        share = 0.92**step
        budget = {
            "memory_bytes": Budget(int(whole.peak_bytes * share)),
            "time_s": dataclasses.replace(NO_LIMIT, time_s=2 * whole.epoch_s * share),
            "upload_bytes": dataclasses.replace(NO_LIMIT, upload_bytes=int(whole.upload_bytes * share)),
        }[which]
        try:
            depths.append(choose(cost_table(SPEC, DATA, SETTINGS, CALIBRATION, budget), budget, 2).depth)
        except DoesNotFit:
            depths.append(-1)
    assert depths[0] == 4
    assert depths[-1] == -1
    assert depths == sorted(depths, reverse=True)
    assert set(depths) >= {4, 3, 2, 1, 0, -1} or which == "memory_bytes"


def test_with_auto_an_upload_budget_takes_first_the_finest_codec_then_the_depth() -> None:
    settings = dataclasses.replace(SETTINGS, codec="auto")
    whole = choose(cost_table(SPEC, DATA, settings, CALIBRATION, NO_LIMIT), NO_LIMIT, 2)
    assert (whole.depth, whole.codec) == (4, "f32")
    seen: list[tuple[int, str]] = []
    for step in range(140):
        budget = dataclasses.replace(NO_LIMIT, upload_bytes=int(whole.upload_bytes * 0.92**step))
        try:
            chosen = choose(cost_table(SPEC, DATA, settings, CALIBRATION, budget), budget, 2)
        except DoesNotFit:
            break
        assert (
            chosen.upload_bytes == update_bytes(SPEC.suffix(chosen.depth), chosen.codec) <= (budget.upload_bytes or 0)
        )
        seen.append((chosen.depth, chosen.codec))
    at_full_depth = list(dict.fromkeys(codec for depth, codec in seen if depth == 4))
    assert at_full_depth == list(CHOSEN[: len(at_full_depth)]) and len(at_full_depth) >= 4
    depths = [depth for depth, _ in seen]
    assert depths == sorted(depths, reverse=True) and depths[-1] == 0


def test_a_codec_that_is_named_stays_whatever_the_plan_shrinks_to() -> None:
    settings = dataclasses.replace(SETTINGS, codec="int4")
    rows = cost_table(SPEC, DATA, settings, CALIBRATION, NO_LIMIT)
    assert {row.codec for row in rows} == {"int4"}
    granted = dataclasses.replace(choose(rows, NO_LIMIT, 2), codec="int8", upload_bytes=5)
    tight = Budget(granted.peak_bytes - MIB)
    smaller = shrink(
        make_plan(granted, DATA, settings), cost_table(SPEC, DATA, settings, CALIBRATION, tight), tight.memory_bytes
    )
    assert smaller and smaller.chosen.peak_bytes < granted.peak_bytes
    assert (smaller.chosen.codec, smaller.chosen.upload_bytes) == ("int8", 5)
    for row in smaller_rows(SPEC, DATA, CALIBRATION, make_plan(granted, DATA, settings)):
        assert row.codec == "int8"


def test_a_table_has_every_depth_without_and_with_checkpointing_and_the_head_once() -> None:
    rows = cost_table(SPEC, DATA, SETTINGS, CALIBRATION, NO_LIMIT)
    assert [(r.depth, r.checkpointing) for r in rows] == [(0, False)] + [
        (d, c) for d in range(1, 5) for c in (False, True)
    ]
    for row in rows:
        every = [
            cost(SPEC, DATA, SETTINGS, CALIBRATION, trained(SPEC, row.depth, SETTINGS), row.checkpointing, size)
            for size in (16, 8, 4, 2, 1)
        ]
        fast = [r for r in every if r.step_s <= 1.05 * min(r.step_s for r in every)]
        assert row == min(fast, key=lambda r: r.peak_bytes), "with room enough the smallest of the fast ones"


def test_smaller_micro_batches_come_before_gradient_checkpointing() -> None:
    """Walking the memory down at full depth: large pieces, then smaller ones, and only then checkpointing."""
    settings = dataclasses.replace(SETTINGS, batch_size=64)
    data = dataclasses.replace(DATA, longest=512, mean_length=100.0)
    slow = dataclasses.replace(CALIBRATION, forward_fixed_s=1e-3, train_fixed_s=3e-3)  # so that pieces cost time
    seen: list[tuple[bool, int]] = []
    for memory in range(2000, 100, -4):
        budget = Budget(memory * MIB)
        try:
            chosen = choose([r for r in cost_table(SPEC, data, settings, slow, budget) if r.depth == 4], budget, 1)
        except DoesNotFit:
            break
        if (chosen.checkpointing, chosen.micro_batch) not in seen:
            seen.append((chosen.checkpointing, chosen.micro_batch))
    without = [size for checkpointing, size in seen if not checkpointing]
    every = [64, 32, 16, 8, 4, 2, 1]
    assert without == every[every.index(without[0]) :] and len(without) >= 3, "every smaller micro-batch is tried"
    assert [checkpointing for checkpointing, _ in seen] == sorted(checkpointing for checkpointing, _ in seen)


def test_where_nothing_fits_the_table_tells_the_least_that_each_depth_needs() -> None:
    rows = cost_table(SPEC, DATA, SETTINGS, CALIBRATION, Budget(1))
    for candidate in rows:
        roomy = cost_table(SPEC, DATA, SETTINGS, CALIBRATION, Budget(candidate.peak_bytes))
        fits = next(r for r in roomy if (r.depth, r.checkpointing) == (candidate.depth, candidate.checkpointing))
        assert fits.peak_bytes <= candidate.peak_bytes
        tight = cost_table(SPEC, DATA, SETTINGS, CALIBRATION, Budget(candidate.peak_bytes - 1))
        still = next(r for r in tight if (r.depth, r.checkpointing) == (candidate.depth, candidate.checkpointing))
        assert still.peak_bytes >= candidate.peak_bytes


def test_fewer_examples_than_a_batch_make_a_table_for_them_and_none_do_too() -> None:
    for examples in (0, 1, 5):
        rows = cost_table(SPEC, dataclasses.replace(DATA, num_examples=examples), SETTINGS, CALIBRATION, NO_LIMIT)
        assert all(r.micro_batch <= max(1, examples) for r in rows)


def test_every_budget_that_is_passed_is_named_with_what_was_wanted_and_what_there_is() -> None:
    candidate = row(2, 200, epoch_s=10.0, upload_mib=3.0)
    assert over_budget(candidate, NO_LIMIT, 5) == ""
    assert over_budget(candidate, Budget(200 * MIB, 50.0, 3 * MIB), 5) == "", "just enough is enough"
    assert over_budget(candidate, Budget(100 * MIB), 5) == "memory 200 MiB > 100 MiB"
    assert over_budget(candidate, Budget(1 << 50, 49.0), 5) == "time 50 s > 49 s"
    assert over_budget(candidate, Budget(1 << 50, None, MIB), 5) == "upload 3.0 MiB > 1.0 MiB"
    assert (
        over_budget(candidate, Budget(0, 0.0, 0), 5)
        == "memory 200 MiB > 0.0 MiB, time 50 s > 0 s, upload 3.0 MiB > 0.0 MiB"
    )


def test_when_nothing_fits_the_error_says_what_the_cheapest_needs_and_what_to_do() -> None:
    rows = [row(1, 300), row(0, 180)]
    with pytest.raises(
        DoesNotFit, match=r"not even the head can be trained: memory 180 MiB > 96 MiB; raise the budget"
    ) as caught:
        choose(rows, Budget(96 * MIB), 1)
    assert caught.value.needed_bytes == 180 * MIB


def test_a_plan_counts_the_steps_of_all_epochs_with_the_last_short_one() -> None:
    settings = TrainSettings(epochs=3, batch_size=16)
    for examples, steps in [(16, 3), (17, 6), (160, 30), (161, 33), (1, 3), (0, 0)]:
        assert make_plan(row(1, 1), DataShape(examples, 9, 5.0), settings).steps == steps


def test_a_granted_plan_that_fits_stays_and_one_that_does_not_becomes_the_fastest_smaller_one_of_its_depth() -> None:
    granted = make_plan(row(2, 300), DATA, SETTINGS)
    rows = [
        row(2, 250, epoch_s=20.0, micro_batch=8),
        row(2, 150, epoch_s=40.0, micro_batch=1),
        row(1, 100),
        row(3, 100),
    ]
    assert shrink(granted, rows, 300 * MIB) is granted
    smaller = shrink(granted, rows, 260 * MIB)
    assert smaller is not None
    assert (smaller.chosen, smaller.settings, smaller.steps) == (rows[0], granted.settings, granted.steps)
    smallest = shrink(granted, rows, 249 * MIB)
    assert smallest is not None
    assert smallest.chosen == rows[1]
    assert shrink(granted, rows, 149 * MIB) is None
    assert shrink(granted, [], 299 * MIB) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1001),
        ("batch_size", 0),
        ("batch_size", 4097),
        ("learning_rate", -1e-9),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("head_learning_rate", 11.0),
        ("weight_decay", 1.5),
        ("seed", -1),
        ("seed", 1 << 63),
        ("optimizer", "adam"),
        ("optimizer", ""),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{field} must be"):
        check_settings(dataclasses.replace(TrainSettings(), **{field: value}))  # type: ignore[arg-type]


def test_settings_within_range_are_those_that_the_wire_carries() -> None:
    for settings in (TrainSettings(), TrainSettings(1000, 4096, 10.0, 0.0, 1.0, "sgd", (1 << 63) - 1)):
        assert check_settings(settings) is settings


def test_sizes_for_people() -> None:
    assert [mib(n) for n in (0, MIB // 2, 3 * MIB, 10 * MIB, 471_859_200)] == [
        "0.0 MiB",
        "0.5 MiB",
        "3.0 MiB",
        "10 MiB",
        "450 MiB",
    ]


@pytest.mark.parametrize("depth", [0, 3])
def test_what_a_plan_can_go_on_as_has_its_depth_and_needs_less_and_less(depth: int) -> None:
    what = trained(SPEC, depth, SETTINGS)
    whole = cost(SPEC, DATA, SETTINGS, CALIBRATION, what, False, 16)
    smaller = smaller_rows(SPEC, DATA, CALIBRATION, make_plan(whole, DATA, SETTINGS))
    peaks = [whole.peak_bytes, *(candidate.peak_bytes for candidate in smaller)]
    assert len(smaller) >= 2 and peaks == sorted(set(peaks), reverse=True)
    assert {candidate.depth for candidate in smaller} == {depth}
    assert all(slower.step_s >= faster.step_s for faster, slower in itertools.pairwise(smaller))
    assert smaller_rows(SPEC, DATA, CALIBRATION, make_plan(smaller[-1], DATA, SETTINGS)) == []


def test_a_correction_raises_every_promise_and_no_time() -> None:
    corrected = dataclasses.replace(CALIBRATION, correction=1.5)
    for depth in range(5):
        before, after = (
            cost(SPEC, DATA, SETTINGS, c, trained(SPEC, depth, SETTINGS), False, 8) for c in (CALIBRATION, corrected)
        )
        assert after.peak_bytes == pytest.approx(1.5 * before.peak_bytes, rel=0.02)
        assert after.step_s == before.step_s


# adapters

LORA = bert.describe(
    {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 200,
     "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}, ["no", "yes"], 32,
)  # fmt: skip


def test_a_fleets_table_offers_every_depth_in_ranks_halved_down_to_one() -> None:
    settings = dataclasses.replace(SETTINGS, lora_rank=12)
    assert offered_ranks(LORA, settings, "ab") == (12, 6, 3, 1)
    assert offered_ranks(LORA, settings, "") == ()
    for adapters in ("ab", "b"):
        rows = cost_table(
            LORA, DATA, settings, CALIBRATION, NO_LIMIT, False, adapters, offered_ranks(LORA, settings, adapters)
        )
        assert {(r.depth, r.rank) for r in rows} == {(0, 0), *itertools.product((1, 2, 3, 4), (12, 6, 3, 1))}
        for row in rows:
            ranks = (row.rank,) * row.depth
            assert row.upload_bytes == update_bytes(sent(LORA, row.depth, ranks, settings, adapters), "f32")
    full = sorted((r for r in rows if r.depth == 4 and not r.checkpointing), key=lambda r: r.rank)
    assert [r.peak_bytes for r in full] == sorted(r.peak_bytes for r in full), "no lower rank needs more memory"
    assert feasible(rows, NO_LIMIT, 1)[0].rank == 12


@pytest.mark.parametrize(("blocks", "rank", "offered"), [(6, 1024, 11), (24, 1024, 10), (255, 64, 1), (1000, 64, 1)])
def test_a_table_of_many_ranks_fits_into_a_join(blocks: int, rank: int, offered: int) -> None:
    spec = dataclasses.replace(LORA, num_blocks=blocks)
    ranks = offered_ranks(spec, dataclasses.replace(SETTINGS, lora_rank=rank), "ab")
    assert len(ranks) == offered
    assert ranks[0] == rank
    if blocks <= 255:
        widest = CostRow(1000, True, 4096, 1 << 50, 1e9, 1e9, 1 << 50, "onnx", 1024, "float32", True, 1e9, "topk10")
        rows = (widest,) * (1 + 2 * blocks * len(ranks))
        assert (
            len(pack(Join("r" * 64, 1, bytes(8), 1 << 20, Budget(1 << 50, 1e9, 1 << 50), rows, 0, "x" * 500)))
            < 127 << 10
        )


def test_a_plan_of_another_rank_than_offered_shrinks_into_pieces_of_the_next_higher() -> None:
    settings = dataclasses.replace(SETTINGS, lora_rank=8)
    ranks = offered_ranks(LORA, settings, "ab")
    measured = dataclasses.replace(CALIBRATION, rank=8, saved_per_token_bytes=10_000)
    rows = cost_table(LORA, DATA, settings, measured, NO_LIMIT, False, "ab", ranks)
    (granted,) = [r for r in rows if (r.depth, r.rank, r.checkpointing) == (4, 8, False)]
    plan = dataclasses.replace(make_plan(dataclasses.replace(granted, rank=7), DATA, settings), ranks=(4, 5, 6, 7))
    tight = cost_table(LORA, DATA, settings, measured, Budget(1), False, "ab", ranks)
    less = min(r.peak_bytes for r in tight if (r.depth, r.rank) == (4, 8))
    assert less < granted.peak_bytes
    smaller = shrink(plan, cost_table(LORA, DATA, settings, measured, Budget(less), False, "ab", ranks), less)
    assert smaller
    assert (smaller.chosen.rank, smaller.ranks, smaller.chosen.upload_bytes) == (7, (4, 5, 6, 7), granted.upload_bytes)
    assert smaller.chosen.peak_bytes <= less
