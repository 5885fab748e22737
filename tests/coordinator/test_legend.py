"""LEGEND's ranks over the blocks and depths over the devices, from numbers alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_coordinator.methods import configure_train
from edge_coordinator.methods.legend import DISTRIBUTIONS, lcd
from edge_coordinator.methods.method import Choice, Options, State
from edge_runtime.asks import distribution
from edge_runtime.records import Budget, CostRow, TrainSettings
from edge_runtime.wire import Join
from tests.samples import BOOT, quickly

BLOCKS = 4
SETTINGS = TrainSettings(lora_rank=8)


def test_the_distributions_of_one_budget() -> None:
    assert distribution("arithmetic", 6, 8) == (3, 4, 5, 6, 7, 8)
    assert distribution("decreasing", 6, 8) == (8, 7, 6, 5, 4, 3)
    assert distribution("uniform", 6, 8) == (5,) * 6
    assert distribution("halving", 6, 8) == (1, 1, 2, 4, 8, 8), "33 shared out as 1 to 32, within 1 and 8"
    assert distribution("arithmetic", 6, 16, budget=33) == (3, 4, 5, 6, 7, 8)
    assert distribution("arithmetic", 6, 4) == (1, 1, 1, 2, 3, 4)


@quickly(200)
@given(
    kind=st.sampled_from(DISTRIBUTIONS),
    blocks=st.integers(1, 40),
    largest=st.integers(1, 64),
    budget=st.integers(0, 4000),
)
def test_ranks_are_within_their_bounds_and_their_budget(kind: str, blocks: int, largest: int, budget: int) -> None:
    found = distribution(kind, blocks, largest, budget)
    assert len(found) == blocks and all(1 <= rank <= largest for rank in found)
    assert sum(found) <= max(budget or blocks * largest, blocks)
    assert list(found) == sorted(found, reverse=kind == "decreasing")


def test_the_fastest_sets_the_time_and_others_train_what_they_can_within_it() -> None:
    times = {"fast": [1.0, 2.0, 3.0, 4.0], "slow": [1.0, 3.0, 5.0, 7.0], "slowest": [1.0, 6.0, 11.0]}
    assert lcd(times, 0.5) == {"fast": 3, "slow": 2, "slowest": 1}


def test_a_device_that_waits_goes_deeper_where_it_does_not_delay_the_round() -> None:
    times = {"fast": [0.0, 1.0], "a": [0.0, 2.0, 4.0], "slow": [0.0, 10.0]}
    assert lcd(times, 0.01) == {"fast": 1, "a": 2, "slow": 1}


def test_the_head_alone_is_trained_where_nothing_else_fits() -> None:
    assert lcd({"a": [1.0], "b": [2.0]}, 0.1) == {"a": 0, "b": 0} and lcd({}, 0.1) == {}


@quickly(200)
@given(
    rates=st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 10), st.integers(0, 8)), min_size=1, max_size=8),
    waiting=st.floats(0, 1),
)
def test_every_device_has_a_depth_that_it_can_and_nobody_could_go_deeper_unnoticed(
    rates: list[tuple[float, float, int]], waiting: float
) -> None:
    times = {f"d{i}": [start + block * k for k in range(most + 1)] for i, (start, block, most) in enumerate(rates)}
    depths = lcd(times, waiting)
    assert all(min(1, len(times[d]) - 1) <= depth < len(times[d]) for d, depth in depths.items())
    now = {d: times[d][depth] for d, depth in depths.items() if depth}
    most = max(now.values(), default=0.0)
    if sum(most - t for t in now.values()) > waiting * most * len(now):
        assert not any(len(times[d]) > depth + 1 and times[d][depth + 1] < most for d, depth in depths.items() if depth)


def table(block_s: float, deepest: int = BLOCKS) -> tuple[CostRow, ...]:
    """Rows of a device that takes 10 s for the head and `block_s` for each block; 1000 bytes for each rank of a block."""
    rows = [CostRow(0, False, 16, 1, 1.0, 10.0, 500)]
    for depth in range(1, deepest + 1):
        for rank in (8, 4, 2, 1):
            size = 500 + 1000 * rank * depth
            rows.append(CostRow(depth, False, 16, 1, 1.0, 10.0 + block_s * depth, size, rank=rank))
    return tuple(rows)


def join(rows: tuple[CostRow, ...], ratio: float = 0.0, uplink: float = 0.0) -> Join:
    return Join("first", 1, BOOT, 100, Budget(1000), rows, train_ratio=ratio, uplink_bytes_per_s=uplink)


def choose(
    joins: dict[str, Join], state: State | None = None, options: Options | None = None
) -> tuple[dict[str, Choice], State]:
    return configure_train(
        "legend", state or {}, joins, number=1, num_blocks=BLOCKS, settings=SETTINGS, options=options or Options()
    )


def depths(found: dict[str, Choice]) -> dict[str, int | None]:
    return {device: choice.row.depth if choice.row else None for device, choice in found.items()}


def test_a_slower_device_trains_fewer_blocks_with_the_same_ranks() -> None:
    found, state = choose({"fast": join(table(10.0)), "slow": join(table(20.0))})
    assert depths(found) == {"fast": 4, "slow": 2}
    assert (found["fast"].ranks, found["slow"].ranks) == ((5, 6, 7, 8), (7, 8))
    assert found["slow"].row and found["slow"].row.rank == 8, "a row of which no rank of the suffix is above"
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize("suffixes", ["even", "deepest"])
def test_all_blocks_are_trained_where_they_fit_and_a_depth_between_does_not(suffixes: str) -> None:
    rows = tuple(row for row in table(10.0) if row.depth not in (2, 3))
    found, _ = choose({"a": join(rows), "slow": join(table(30.0))}, options=Options(suffix_depths=suffixes))
    assert depths(found)["a"] == 4 and found["a"].ranks == (5, 6, 7, 8)
    assert choose({"a": join(rows[1:])})[0]["a"].row is None, "not even the head fits"


def test_depths_of_caff_with_ranks_of_legend() -> None:
    found, _ = choose(
        {"fast": join(table(10.0)), "slow": join(table(20.0, deepest=3))}, options=Options(suffix_depths="deepest")
    )
    assert depths(found) == {"fast": 4, "slow": 3} and found["slow"].ranks == (6, 7, 8)


def test_what_a_device_measures_is_smoothed_and_changes_its_depth_in_time() -> None:
    joins, state = {"a": join(table(10.0)), "b": join(table(10.0))}, {}
    found, state = choose(joins)
    assert depths(found) == {"a": 4, "b": 4}
    joins["b"] = join(table(10.0), ratio=3.0)
    seen = []
    for _ in range(12):
        found, state = choose(joins, state)
        seen.append(depths(found)["b"])
    assert seen == sorted(seen, reverse=True) and (seen[0], seen[-1]) == (2, 1)
    assert state["rates"]["b"]["block_s"] == pytest.approx(30.0 - 20.0 * 0.8**12)


def test_a_slow_uplink_costs_depth_and_an_unknown_one_nothing() -> None:
    fast, slow = join(table(10.0), 1.0, 1e9), join(table(10.0), 1.0, 400.0)
    assert depths(choose({"fast": fast, "slow": slow})[0]) == {"fast": 4, "slow": 1}
    assert depths(choose({"fast": fast, "new": join(table(10.0))})[0]) == {"fast": 4, "new": 4}


def test_whom_only_the_head_or_nothing_fits_is_no_measure_for_the_others() -> None:
    found, _ = choose({"a": join(table(10.0)), "head": join(table(1.0, deepest=0)), "none": join(())})
    assert depths(found) == {"a": 4, "head": 0, "none": None}
    assert found["none"].why and found["head"].ranks == ()


def test_a_table_without_the_run_s_rank_reaches_as_deep_as_its_ranks_do() -> None:
    low = tuple(row for row in table(10.0) if row.rank < 8)
    found, _ = choose({"a": join(low)}, options=replace(Options(), rank_distribution="decreasing"))
    assert depths(found) == {"a": 0}, "the last block has rank 5 and rows end at 4"
