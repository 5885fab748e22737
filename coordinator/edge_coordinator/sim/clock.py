"""A virtual clock: time stands still until the next thing that is due. No threads, no waiting, no real time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """What is due, in the order of its time and then of its arrival here.

    Attributes:
        now_s: virtual seconds since the simulation began.
    """

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def __call__(self) -> float:
        """Now, as the coordinator asks for it."""
        return self.now_s

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action(*arguments)` at a time, at once if that has passed."""
        heapq.heappush(self._due, (max(time_s, self.now_s), self._count, action, arguments))
        self._count += 1

    def step(self) -> bool:
        """Go on to the next time at which something is due, and do all that is due then; False if nothing is."""
        if not self._due:
            return False
        self.now_s = self._due[0][0]
        while self._due and self._due[0][0] <= self.now_s:
            _, _, action, arguments = heapq.heappop(self._due)
            action(*arguments)
        return True


def nothing() -> None:
    """For times at which only the coordinator has something to do."""
