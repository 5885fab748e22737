"""The round state machine: when a round goes on, when it ends, and that it always does one of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_coordinator.rounds import RoundState, Rules, State, collecting, may_join, next_state, opened
from tests.samples import quickly

RULES = Rules(goal=4, quorum=2, admit=6, join_timeout_s=60.0, report_timeout_s=600.0)
OPEN = opened(7, RULES, 1000.0)
RUNNING = collecting(replace(OPEN, joined=6), RULES, 6, 1010.0)

RULE_SETS = st.builds(
    lambda quorum, more, extra: Rules(quorum + more, quorum, quorum + more + extra, 60.0, 600.0),
    quorum=st.integers(1, 5),
    more=st.integers(0, 5),
    extra=st.integers(0, 5),
)
COUNTS = st.integers(0, 12)
ROUNDS = st.builds(
    RoundState,
    number=st.just(1),
    state=st.sampled_from(["joining", "collecting", "closing", "published", "failed"]),
    deadline=st.just(100.0),
    joined=COUNTS,
    unable=COUNTS,
    planned=COUNTS,
    committed=COUNTS,
    present=COUNTS,
    gave_up=COUNTS,
)


def joining(joined: int = 0, unable: int = 0, present: int = 0) -> RoundState:
    """A round that is open for joining until second 1060."""
    return replace(OPEN, joined=joined, unable=unable, present=present)


def after(round_: RoundState, seconds: float) -> State:
    """The state so many seconds after it was opened."""
    return next_state(round_, RULES, 1000.0 + seconds)


def test_a_new_round_waits_for_devices_until_its_join_deadline() -> None:
    assert RoundState(7, "joining", 1060.0) == OPEN
    assert after(OPEN, 0) == "joining"


def test_it_begins_when_as_many_as_the_goal_and_everybody_online_have_answered() -> None:
    assert after(joining(joined=4, present=4), 1) == "collecting"
    assert after(joining(joined=3, unable=1, present=4), 1) == "collecting", "who cannot has answered too"
    assert after(joining(joined=4, present=5), 1) == "joining", "the fifth may still answer"
    assert after(joining(joined=3, present=3), 1) == "joining", "a fourth may still come"


def test_it_begins_at_once_when_the_over_selection_is_full() -> None:
    assert after(joining(joined=6, present=100), 1) == "collecting"
    assert after(joining(joined=5, present=100), 1) == "joining"


def test_no_more_devices_are_admitted_than_the_over_selection_and_none_after_joining() -> None:
    assert may_join(joining(joined=5), RULES)
    assert not may_join(joining(joined=6), RULES)
    for state in ("collecting", "closing", "published", "failed"):
        assert not may_join(replace(OPEN, state=state), RULES)


def test_at_the_deadline_it_begins_with_a_quorum() -> None:
    assert after(joining(joined=2, present=9), 59.9) == "joining"
    assert after(joining(joined=2, present=9), 60) == "collecting"


def test_at_the_deadline_it_fails_when_everybody_there_has_answered_and_they_are_too_few() -> None:
    assert after(joining(joined=1, unable=2, present=3), 59.9) == "joining"
    assert after(joining(joined=1, unable=2, present=3), 60) == "failed"
    assert after(joining(unable=3, present=3), 60) == "failed", "nobody is able"
    assert after(joining(joined=1, unable=1, present=3), 3600) == "joining", "one is still measuring"


def test_with_nobody_there_it_waits_for_ever() -> None:
    assert after(joining(), 1e9) == "joining"


def test_planning_begins_the_report_deadline() -> None:
    assert (RUNNING.state, RUNNING.planned, RUNNING.deadline, RUNNING.joined) == ("collecting", 6, 1610.0, 6)


def test_it_closes_when_the_goal_is_reached_whatever_the_others_do() -> None:
    assert after(replace(RUNNING, committed=3), 20) == "collecting"
    assert after(replace(RUNNING, committed=4), 20) == "closing"


def test_it_closes_when_every_planned_device_has_answered() -> None:
    assert after(replace(RUNNING, committed=2, gave_up=3), 20) == "collecting"
    assert after(replace(RUNNING, committed=2, gave_up=4), 20) == "closing"
    assert after(replace(RUNNING, committed=1, gave_up=5), 20) == "failed", "below the quorum"
    assert after(replace(RUNNING, gave_up=6), 20) == "failed"
    assert after(replace(RUNNING, planned=0), 20) == "failed", "the method left everybody out"
    assert after(replace(RUNNING, planned=3, committed=3), 20) == "closing", "fewer than the goal were planned"


def test_at_the_report_deadline_a_quorum_closes_it_and_less_fails_it() -> None:
    assert after(replace(RUNNING, committed=2), 609.9) == "collecting"
    assert after(replace(RUNNING, committed=2), 610) == "closing"
    assert after(replace(RUNNING, committed=1), 610) == "failed"


@pytest.mark.parametrize("state", ["closing", "published", "failed"])
@quickly(30)
@given(round_=ROUNDS, rules=RULE_SETS, now=st.floats(0, 1e6))
def test_nothing_but_its_own_work_moves_a_round_that_is_closing_or_over(
    state: State, round_: RoundState, rules: Rules, now: float
) -> None:
    assert next_state(replace(round_, state=state), rules, now) == state


@quickly(200)
@given(round_=ROUNDS, rules=RULE_SETS, now=st.floats(0, 200))
def test_no_round_goes_on_below_its_quorum_or_fails_before_its_time(
    round_: RoundState, rules: Rules, now: float
) -> None:
    state = next_state(round_, rules, now)
    if round_.state == "joining":
        assert state in ("joining", "collecting", "failed")
        assert state != "collecting" or round_.joined >= rules.quorum
        assert state != "failed" or (now >= round_.deadline and round_.joined < rules.quorum)
        assert state != "joining" or now < round_.deadline or round_.joined < rules.quorum
    if round_.state == "collecting":
        assert state in ("collecting", "closing", "failed")
        assert state != "closing" or round_.committed >= rules.quorum
        assert state != "failed" or round_.committed < rules.quorum
        assert state != "collecting" or now < round_.deadline
    assert next_state(round_, rules, now) == state, "it depends on nothing else"


@quickly(100)
@given(rules=RULE_SETS, seed=st.integers(0, 2**32), devices=st.integers(1, 15))
def test_a_round_always_ends_once_everybody_who_is_there_answers_or_leaves(
    rules: Rules, seed: int, devices: int
) -> None:
    chance = random.Random(seed)
    round_, now = replace(opened(1, rules, 0.0), present=devices), 0.0
    path: list[State] = [round_.state]
    while round_.state not in ("closing", "failed"):
        now += chance.random() * 20
        assert now < 20 * devices + 60 + 600 + 60
        answered = round_.joined + round_.unable
        if round_.state == "joining" and answered < round_.present:
            if answered and chance.random() < 0.2:
                round_ = replace(round_, present=round_.present - 1)
            elif may_join(round_, rules) and chance.random() < 0.7:
                round_ = replace(round_, joined=round_.joined + 1)
            else:
                round_ = replace(round_, unable=round_.unable + 1)
        elif round_.committed + round_.gave_up < round_.planned and chance.random() < 0.3:
            name = chance.choice(["committed", "committed", "gave_up"])
            round_ = replace(round_, **{name: getattr(round_, name) + 1})
        state = next_state(round_, rules, now)
        if state != round_.state:
            path.append(state)
            planned = chance.randint(0, round_.joined)
            round_ = collecting(round_, rules, planned, now) if state == "collecting" else replace(round_, state=state)
    assert path in (["joining", "failed"], ["joining", "collecting", "closing"], ["joining", "collecting", "failed"])
    assert round_.joined <= rules.admit
