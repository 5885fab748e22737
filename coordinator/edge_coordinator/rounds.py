"""The round state machine: what happens next, given what has happened. No clock, no network, no ledger: all passed in.

    joining -> collecting -> closing -> published
        \\-> failed   \\-> failed

`joining` ends when as many as the goal, and everybody who is online, have answered, or at its deadline with a quorum; then the method plans for the whole cohort. With nobody there it waits.
`collecting` ends when the goal is reached, when every planned device has answered, or at its deadline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

State = Literal["joining", "collecting", "closing", "published", "failed"]


@dataclass(frozen=True)
class Rules:
    """What ends the phases."""

    goal: int
    quorum: int
    admit: int  # most devices in a cohort
    join_timeout_s: float
    report_timeout_s: float


@dataclass(frozen=True)
class RoundState:
    """One round as it stands."""

    number: int
    state: State
    deadline: float  # of the present phase, in the coordinator's clock
    joined: int = 0  # devices that could train something
    unable: int = 0  # devices that answered that they cannot, or that the method left out
    planned: int = 0
    committed: int = 0
    present: int = 0  # devices that are online and do not wait for conditions of their own
    gave_up: int = 0  # planned devices that said they cannot finish


def opened(number: int, rules: Rules, now: float) -> RoundState:
    """A new round waits for devices."""
    return RoundState(number, "joining", now + rules.join_timeout_s)


def may_join(round_: RoundState, rules: Rules) -> bool:
    """Whether one more device is admitted."""
    return round_.state == "joining" and round_.joined < rules.admit


def next_state(round_: RoundState, rules: Rules, now: float) -> State:
    """The state that this round should be in."""
    if round_.state == "joining":
        answered = round_.joined + round_.unable
        if round_.joined >= rules.quorum and (
            round_.joined >= rules.admit or answered >= max(rules.goal, round_.present)
        ):
            return "collecting"
        if now >= round_.deadline and round_.joined >= rules.quorum:
            return "collecting"
        if now >= round_.deadline and answered >= max(round_.present, 1):
            return "failed"  # everybody who is there has answered, and they are too few
    elif round_.state == "collecting":
        everybody = round_.committed + round_.gave_up >= round_.planned
        if round_.committed >= rules.goal or everybody or now >= round_.deadline:
            return "closing" if round_.committed >= rules.quorum else "failed"
    return round_.state


def collecting(round_: RoundState, rules: Rules, planned: int, now: float) -> RoundState:
    """The cohort has its plans."""
    return replace(round_, state="collecting", planned=planned, deadline=now + rules.report_timeout_s)
