"""Whether training may go on now: looks at the machine now and then, and remembers how it stood.

What the conditions are and when they hold is `conditions.py`, what is read `sensors.py`; who stops and goes on with a
training is `training/patient.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_runtime.conditions import Condition, Stand, after, shown, unmet, words
from edge_runtime.errors import UsageError
from edge_runtime.sensors import Own, Sensors

LOOK_S = 1.0  # between two looks
TELL_S = 60.0  # after which the same wait is told with new numbers
MEMORY = "free-memory"


class Gate:
    """One device's conditions, and how they stand.

    Attributes:
        words: what is waited for, with numbers that are at most `TELL_S` old; empty while training may go on.
    """

    def __init__(
        self,
        conditions: tuple[Condition, ...],
        sensors: Sensors | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Raises:
            UsageError: this machine cannot say what one of the conditions looks at.
        """
        self._conditions, self._clock = conditions, clock
        self._sensors = sensors or Sensors(clock=clock)
        for condition in conditions:
            if why := self._sensors.lacks(condition.name):
                raise UsageError(f"the condition {shown(condition)} cannot be told here: {why}; leave it out")
        self._stand, self._looked_at, self._told_at = Stand(is_open=True), clock(), clock()
        self.words = ""
        self._look(Own())

    @property
    def is_open(self) -> bool:
        """Whether training may go on, as of the last look."""
        return self._stand.is_open

    @property
    def has_conditions(self) -> bool:
        """Whether it may ever close."""
        return bool(self._conditions)

    @property
    def wants_memory(self) -> bool:
        """Whether memory is among what is waited for: a training that only stands still would hold it."""
        return any(u.name == MEMORY for u in self._stand.unmet)

    def look(self, own: Own = Own()) -> bool:  # noqa: B008 - frozen
        """Look at the machine, if the last look is `LOOK_S` ago; -> `is_open`."""
        if self._conditions and self._clock() - self._looked_at >= LOOK_S:
            self._look(own)
        return self.is_open

    def wait(self, told: Callable[[str], None]) -> None:
        """Until training may begin; tells what is waited for."""
        said = ""
        while not self.look():
            if self.words != said:
                said = self.words
                told(f"waiting: {said}")
            time.sleep(LOOK_S / 2)

    def _look(self, own: Own) -> None:
        now, before = self._clock(), self._stand
        self._looked_at = now
        self._stand = after(before, unmet(self._conditions, self._sensors.read(own)), now)
        other = [u.name for u in self._stand.unmet] != [u.name for u in before.unmet]
        if other or self._stand.is_open != before.is_open or now - self._told_at >= TELL_S:
            self.words, self._told_at = words(self._stand), now
