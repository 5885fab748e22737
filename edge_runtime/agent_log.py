"""What the agent's events say to a person watching `edge-runtime join`; scripts read the same events as JSON lines.

Not here: which events there are (`agent.py` and its parts emit them). Imports `console` and the planner's `mib`.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.console import Bar, Sentences, note_event, what_is_trained
from edge_runtime.planner import mib

SENTENCES: Sentences = {
    "training": lambda e: (
        f"round {e['round']}: training {what_is_trained(e['depth'])}, {e['steps']} steps, "
        f"at most {mib(e['peak_bytes_promised'])}"
    ),
    "trained": lambda e: (
        f"round {e['round']}: trained in {e['train_s']:.1f} s, "
        f"peak {mib(e['peak_bytes'])} ({mib(e['promised_peak_bytes'])} promised), loss {e['last_loss']:.3f}"
    ),
    "committed": lambda e: (
        f"round {e['round']}: the coordinator has the update "
        f"({mib(e['bytes_up'])} sent, {mib(e['bytes_down'])} received so far)"
    ),
    "model": lambda e: f"model {e['model_version']} is here",
    "fetching": lambda e: f"fetching model {e['model_version']}: {mib(e['num_bytes'])}",
}


class AgentLog:
    """A line for each event; the steps of a training share one progress bar."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["event"] == "step":
            self._bar = self._bar or Bar(f"round {event['round']}")
            self._bar(event["step"], event["steps"], event["loss"])
        else:
            self._bar = None
            note_event(event, SENTENCES)
