"""A simulation's progress for people: one line that rewrites itself on a terminal, a line a round elsewhere. Prints only."""

from __future__ import annotations

import sys

from edge_coordinator.sim.results import Row
from edge_runtime.console import note, print_json

WIDTH = 24


def duration(seconds: float) -> str:
    """Virtual time for people: 75.2 s, 1:02:03."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def sentence(row: Row) -> str:
    """What came of a round."""
    accuracy = f", accuracy {100 * row['accuracy']:.1f} %" if row.get("accuracy") is not None else ""
    if row["round"] == 0:
        return f"before the first round{accuracy}"
    at = f"round {row['round']} at {duration(row['closed_s'])}"
    if row["state"] == "failed":
        return f"{at}: failed, {row['reason']}"
    took = f"{row['committed']} of {row['online']} devices in {duration(row['round_s'])}"
    return f"{at}: {took}, loss {row['mean_loss']:.3f}{accuracy}"


class Progress:
    """Shows what a `Simulation` reports."""

    def __init__(self, rounds: int, as_json: bool) -> None:
        self._rounds, self._json, self._done, self._round = rounds, as_json, 0, 0
        self._live = sys.stderr.isatty() and not as_json

    def __call__(self, row: Row) -> None:
        """An update that is in, or a round that is finished; as JSON the round without its devices."""
        if "committed" in row and "goal" in row:
            self._committed(row)
        elif self._json:
            print_json({key: value for key, value in row.items() if key != "devices"})
        else:
            if self._live:
                sys.stderr.write("\r\x1b[K")
            note(sentence(row))

    def _committed(self, row: Row) -> None:
        self._done = self._done + 1 if row["round"] == self._round else 1
        self._round = row["round"]
        if self._live:
            filled = min(WIDTH, WIDTH * self._done // max(1, row["goal"]))
            bar = "#" * filled + "." * (WIDTH - filled)
            sys.stderr.write(f"\r\x1b[K[{bar}] round {self._round}/{self._rounds}  {self._done}/{row['goal']} updates")
            sys.stderr.flush()
