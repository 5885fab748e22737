"""What the coordinator's events say to a person watching `edge-coordinator serve`; scripts read them as JSON lines.

Not here: which events there are (`server.py` emits them). Imports the device's `console` and the planner's `mib`.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.console import Sentences, note, note_event, what_is_trained
from edge_runtime.planner import mib

SENTENCES: Sentences = {
    "serving": lambda e: (
        f"serving fleet {e['realm']} on {e['host']}:{e['port']} ({e['broker']} broker), model {e['model_version']}; "
        "stop with Ctrl-C"
    ),
    "round-opened": lambda e: f"round {e['round']}: waiting for devices",
    "joined": lambda e: (
        f"round {e['round']}: {e['device']} joins with {e['num_examples']} examples and {mib(e['budget_bytes'])}"
    ),
    "unable": lambda e: f"round {e['round']}: {e['device']} cannot take part: {e['reason']}",
    "granted": lambda e: (
        f"round {e['round']}: {e['device']} trains {what_is_trained(e['depth'])}, at most {mib(e['peak_bytes'])}"
    ),
    "committed": lambda e: (
        f"round {e['round']}: {e['device']}'s update is in ({mib(e['num_bytes'])}, "
        f"loss {e['first_loss']:.3f} -> {e['last_loss']:.3f}, {e['train_s']:.0f} s, {mib(e['peak_bytes'])})"
    ),
    "round-published": lambda e: (
        f"round {e['round']}: model {e['model_version']} from {len(e['members'])} devices, "
        f"mean loss {e['mean_loss']:.3f}"
    ),
    "round-failed": lambda e: f"round {e['round']} failed: {e['reason']}",
    "run-finished": lambda e: f"run {e['run']} is finished: model {e['model_version']}",
}


class ServerLog:
    """The coordinator's events for people: a line each; of a device's reports only what changes its state."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["event"] != "status":
            note_event(event, SENTENCES)
        elif self._states.get(event["device"]) != event["state"]:
            self._states[event["device"]] = event["state"]
            note(f"{event['device']} is {event['state']}")
