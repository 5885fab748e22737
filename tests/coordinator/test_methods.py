"""What each method grants to a cohort, from cost tables alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_coordinator.methods import METHODS, SUMMARIES, configure_train
from edge_coordinator.methods.method import Choice, Options, Stage, State, one_rank
from edge_runtime.asks import ASKS, Asker, distribution
from edge_runtime.kinds import fits_kind
from edge_runtime.planner import feasible
from edge_runtime.records import Budget, CostRow, TrainSettings
from edge_runtime.wire import Join
from tests.samples import BOOT, quickly

BLOCKS = 4
MIB = 1 << 20


def row(
    depth: int, *, checkpointing: bool = False, epoch_s: float | None = None, peak_mib: int | None = None, rank: int = 0, mask_every: int = 0
) -> CostRow:  # fmt: skip
    """A candidate that costs more the deeper it is, and a little more the higher its rank."""
    peak = (100 + 50 * depth + rank if peak_mib is None else peak_mib) * MIB
    seconds, upload = 10.0 * (depth + 1) if epoch_s is None else epoch_s, (depth + 1) * MIB
    return CostRow(depth, checkpointing, 16, peak, 1.0, seconds, upload, rank=rank, mask_every=mask_every)


RANKS = (8, 4, 2, 1)
TABLE = tuple(row(depth) for depth in range(BLOCKS + 1))
ADAPTERS = tuple(row(depth, rank=rank if depth else 0) for depth in range(BLOCKS + 1) for rank in RANKS[: depth + 1])


def join(
    memory_mib: int = 10_000,
    *,
    table: tuple[CostRow, ...] = TABLE,
    time_s: float | None = None,
    upload_mib: int | None = None,
) -> Join:
    """What a device with such budgets says."""
    upload = None if upload_mib is None else upload_mib * MIB
    return Join("first", 1, BOOT, 100, Budget(memory_mib * MIB, time_s, upload), table)


def choices(method: str, joins: dict[str, Join], epochs: int = 1) -> dict[str, Choice]:
    """What each device is granted by a method that has no state yet; with adapters of rank 8 at most."""
    settings = TrainSettings(epochs=epochs, lora_rank=8 if METHODS[method].adapters else 0)
    chosen, state = configure_train(
        method, {}, joins, number=1, num_blocks=BLOCKS, settings=settings, options=Options()
    )
    assert json.loads(json.dumps(state)) == state
    return chosen


def depths(method: str, joins: dict[str, Join], epochs: int = 1) -> dict[str, int | None]:
    """The granted depth of each device."""
    chosen = choices(method, joins, epochs)
    assert set(chosen) == set(joins)
    return {device: choice.row.depth if choice.row else None for device, choice in chosen.items()}


STRONG, MIDDLE, WEAK, NONE = join(), join(210), join(150), join(99)
COHORT = {"strong": STRONG, "middle": MIDDLE, "weak": WEAK, "none": NONE}


def test_caff_gives_each_device_the_deepest_suffix_that_fits_it() -> None:
    assert depths("caff", COHORT) == {"strong": 4, "middle": 2, "weak": 1, "none": None}


def test_caff_heeds_time_for_all_epochs_and_upload_too() -> None:
    assert depths(
        "caff", {"a": join(time_s=30.0), "b": join(upload_mib=2), "c": join(300, time_s=20.0, upload_mib=3)}
    ) == {"a": 2, "b": 1, "c": 1}
    assert depths("caff", {"a": join(time_s=30.0)}, epochs=3) == {"a": 0}
    assert depths("caff", {"a": join(time_s=30.0)}, epochs=4) == {"a": None}


def test_caff_takes_the_faster_of_two_ways_to_the_same_depth() -> None:
    slow, fast = row(2, checkpointing=True, epoch_s=50.0), row(2, epoch_s=40.0)
    for table in ((slow, fast), (fast, slow)):
        assert choices("caff", {"a": join(table=table)})["a"].row == fast
    assert choices("caff", {"a": join(table=(slow, row(2, peak_mib=20_000)))})["a"].row == slow


def adapters(memory_mib: int = 10_000, table: tuple[CostRow, ...] = ADAPTERS) -> Join:
    """What a device with such a budget says in a run with adapters."""
    return join(memory_mib, table=table)


def ranks(method: str, joins: dict[str, Join]) -> dict[str, tuple[int, int] | None]:
    """The granted depth and rank of each device."""
    return {d: (c.row.depth, c.row.rank) if c.row else None for d, c in choices(method, joins).items()}


@pytest.mark.parametrize("method", ["lora", "ffa-lora"])
def test_lora_has_one_rank_in_all_blocks_and_leaves_out_who_cannot(method: str) -> None:
    cohort = {"strong": adapters(308), "weak": adapters(307)}
    assert ranks(method, cohort) == {"strong": (4, 8), "weak": None}


def test_lora_suffix_has_one_rank_in_the_deepest_suffix_that_fits() -> None:
    cohort = {"strong": adapters(308), "middle": adapters(307), "weak": adapters(157), "none": adapters(99)}
    assert ranks("lora-suffix", cohort) == {"strong": (4, 8), "middle": (3, 8), "weak": (0, 0), "none": None}


@pytest.mark.parametrize("method", ["hetlora", "flexlora", "flora"])
def test_each_device_has_the_largest_rank_that_fits_in_all_blocks(method: str) -> None:
    cohort = {"strong": adapters(), "middle": adapters(307), "weak": adapters(301), "none": adapters(300)}
    assert ranks(method, cohort) == {"strong": (4, 8), "middle": (4, 4), "weak": (4, 1), "none": None}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_row_of_a_rank_that_the_run_does_not_have_is_never_granted(method: str) -> None:
    of_block = tuple(row(depth, rank=9) for depth in range(BLOCKS + 1))
    plain = () if METHODS[method].adapters else tuple(row(d, rank=8) for d in range(BLOCKS + 1))
    assert depths(method, {"a": join(table=(*of_block, *plain))}) == {"a": None}


def slora(number: int, rounds: int, sparse_rounds: int = 0, state: State | None = None, density: float = 0.1) -> Stage:
    """What slora asks of a round."""
    options = Options(sparse_rounds=sparse_rounds, sparse_density=density, rounds=rounds)
    return METHODS["slora"].stage(state or {}, number, BLOCKS, TrainSettings(seed=5, lora_rank=10), options)


def test_slora_masks_a_third_of_the_rounds_and_then_has_adapters_with_scale_one() -> None:
    for rounds, sparse in ((1, 1), (2, 1), (3, 1), (6, 2), (10, 3), (15, 5)):
        stages = [slora(number, rounds) for number in range(1, rounds + 1)]
        assert [s.adapters for s in stages] == [""] * sparse + ["ab"] * (rounds - sparse)
    first, second = slora(1, 3).settings, slora(2, 3).settings
    assert first == TrainSettings(seed=5, mask_every=10, mask_seed=5)
    assert second == TrainSettings(seed=5, lora_rank=10, lora_alpha=10.0)
    assert [slora(1, 3, density=d).settings.mask_every for d in (1.0, 0.5, 0.01, 1e-4)] == [1, 2, 100, 10_000]


def test_the_end_of_sloras_first_stage_is_as_the_run_began_unless_it_is_named() -> None:
    assert slora(4, 30, state={"sparse_rounds": 3}).adapters == "ab"
    assert slora(4, 30, sparse_rounds=9, state={"sparse_rounds": 3}).adapters == ""
    options = Options(rounds=9)
    _, state = configure_train(
        "slora", {}, {}, number=1, num_blocks=BLOCKS, settings=TrainSettings(lora_rank=8), options=options
    )
    assert state == {"sparse_rounds": 3}


@pytest.mark.parametrize(("number", "rank"), [(1, 0), (2, 8)])
def test_slora_asks_for_all_blocks_in_both_stages(number: int, rank: int) -> None:
    cohort = {
        "strong": adapters(308, (*TABLE, *ADAPTERS)),
        "weak": adapters(299, (*TABLE, *ADAPTERS)),
        "old": adapters(308, ADAPTERS),
    }
    chosen, _ = configure_train(
        "slora",
        {},
        cohort,
        number=number,
        num_blocks=BLOCKS,
        settings=TrainSettings(lora_rank=8),
        options=Options(rounds=3),
    )
    found = {d: (c.row.depth, c.row.rank) if c.row else None for d, c in chosen.items()}
    assert found == {"strong": (4, rank), "weak": None, "old": (4, rank) if rank else None}


def test_slora_under_legend_takes_the_deepest_suffix_that_fits_and_then_legends_depths_and_ranks() -> None:
    both = (*TABLE, *ADAPTERS)
    cohort = {"strong": adapters(10_000, both), "middle": adapters(220, both), "head": adapters(149, both)}
    settings, state = TrainSettings(lora_rank=8), {}
    for number, wanted in ((1, {"strong": (4, 0, ()), "middle": (2, 0, ()), "head": (0, 0, ())}),
                           (2, {"strong": (4, 8, (5, 6, 7, 8)), "middle": (2, 8, (7, 8)), "head": (0, 0, ())})):  # fmt: skip
        options = Options(rounds=3, suffix_depths="deepest")
        chosen, state = configure_train("slora-legend", state, cohort, number=number, num_blocks=BLOCKS, settings=settings, options=options)  # fmt: skip
        assert {d: (c.row.depth, c.row.rank, c.ranks) for d, c in chosen.items() if c.row} == wanted
    assert state["sparse_rounds"] == 1 and set(state["rates"]) == set(cohort)
    even, _ = configure_train("slora-legend", state, cohort, number=2, num_blocks=BLOCKS, settings=settings, options=Options(rounds=3))  # fmt: skip
    assert even["middle"].ranks == (7, 8)


def test_head_trains_the_head_on_every_device_that_can() -> None:
    assert depths("head", COHORT) == {"strong": 0, "middle": 0, "weak": 0, "none": None}


@pytest.mark.parametrize("method", ["full", "exclusive"])
def test_full_and_exclusive_leave_out_who_cannot_train_everything(method: str) -> None:
    assert depths(method, COHORT) == {"strong": 4, "middle": None, "weak": None, "none": None}


def test_straggler_trains_on_every_device_what_the_weakest_can_that_can_anything() -> None:
    assert depths("straggler", COHORT) == {"strong": 1, "middle": 1, "weak": 1, "none": None}
    assert depths("straggler", {"strong": STRONG, "none": NONE}) == {"strong": 4, "none": None}
    assert depths("straggler", {"none": NONE}) == {"none": None}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_nobody_is_an_answer_too_and_an_empty_cohort_is_one(method: str) -> None:
    assert depths(method, {}) == {}
    assert depths(method, {"a": join(table=())}) == {"a": None}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_depth_that_the_model_does_not_have_is_never_granted(method: str) -> None:
    """A hostile table: an update of that depth has no size and would stop the coordinator."""
    forged = join(table=(row(1000, peak_mib=1, epoch_s=0.0), row(BLOCKS + 1, peak_mib=1, epoch_s=0.0)))
    assert depths(method, {"forged": forged}) == {"forged": None}
    both = join(table=(*TABLE, *ADAPTERS, row(1000, peak_mib=1, epoch_s=0.0)))
    assert depths(method, {"both": both, "strong": STRONG})["both"] in range(BLOCKS + 1)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_codec_that_the_coordinator_does_not_know_is_never_granted(method: str) -> None:
    known, unknown = (tuple(replace(r, codec=codec) for r in (*TABLE, *ADAPTERS)) for codec in ("int8", "int2"))
    chosen = choices(method, {"a": join(table=unknown), "b": join(table=(*unknown, *known))})
    assert chosen["a"].row is None
    assert chosen["b"].row and chosen["b"].row.codec == "int8"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_device_that_is_left_out_is_told_why_and_by_whom(method: str) -> None:
    choice = choices(method, {"none": NONE})["none"]
    assert choice.row is None
    assert choice.why.startswith(method)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_a_line_that_says_what_it_does(method: str) -> None:
    assert 10 < len(SUMMARIES[method]) < 100


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_a_method_asks_of_a_device_is_written_once(method: str) -> None:
    made, asks = METHODS[method], ASKS[method]
    assert (made.summary, made.rank, made.adapters) == (asks.summary, asks.rank, asks.stages[-1].adapters)
    assert (made.prime is not None, made.block_ranks is not one_rank) == (len(asks.stages) > 1, asks.graded)


CANDIDATES = st.builds(
    row,
    st.integers(0, BLOCKS + 2),
    checkpointing=st.booleans(),
    epoch_s=st.floats(0.1, 100),
    peak_mib=st.integers(1, 500),
    rank=st.sampled_from([0, 1, 4, 8, 9]),
    mask_every=st.sampled_from([0, 0, 10, 7]),
)
JOINS = st.builds(
    join,
    st.integers(0, 500),
    table=st.lists(CANDIDATES, max_size=10).map(tuple),
    time_s=st.none() | st.floats(0, 300),
    upload_mib=st.none() | st.integers(0, 6),
)


@pytest.mark.parametrize(
    ("method", "stage"), [(m, n) for m in sorted(METHODS) for n in range(1, 1 + len(ASKS[m].stages))]
)
@quickly(40)
@given(join=JOINS, epochs=st.integers(1, 3))
def test_a_device_alone_in_its_cohort_is_given_what_plan_tells_it(
    method: str, stage: int, join: Join, epochs: int
) -> None:
    options, asks = Options(rounds=3), ASKS[method]
    rank = 8 if METHODS[method].adapters else 0
    given, _ = configure_train(method, {}, {"a": join}, number=stage, num_blocks=BLOCKS,
                               settings=TrainSettings(epochs=epochs, lora_rank=rank), options=options)  # fmt: skip
    settings = asks.stages[stage - 1].settings(TrainSettings(epochs=epochs, lora_rank=rank), asks.rank)
    ranks = distribution("arithmetic", BLOCKS, rank) if asks.graded else ()
    adapters = asks.stages[stage - 1].adapters
    usable = [r for r in join.table if r.depth <= BLOCKS and fits_kind(r, settings, adapters)]
    fitting = feasible(usable, join.budget, epochs)
    assert given["a"].row == asks.stages[stage - 1].pick(fitting, Asker(BLOCKS, settings, ranks))


@pytest.mark.parametrize("method", sorted(METHODS))
@quickly(40)
@given(joins=st.dictionaries(st.text("abc-1", min_size=1, max_size=4), JOINS, max_size=5), epochs=st.integers(1, 3))
def test_no_device_is_granted_what_it_did_not_offer_or_what_is_over_its_budgets(
    method: str, joins: dict[str, Join], epochs: int
) -> None:
    chosen = choices(method, joins, epochs)
    assert set(chosen) == set(joins)
    for device, choice in chosen.items():
        if choice.row is None:
            continue
        budget = joins[device].budget
        assert choice.row in joins[device].table
        assert choice.row.depth <= BLOCKS
        assert choice.row.peak_bytes <= budget.memory_bytes
        assert budget.time_s is None or choice.row.epoch_s * epochs <= budget.time_s
        assert budget.upload_bytes is None or choice.row.upload_bytes <= budget.upload_bytes
    turned = choices(method, dict(reversed(joins.items())), epochs)
    assert turned == chosen, "the order of arrival does not matter"
