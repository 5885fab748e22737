"""What the agent's events say to a person watching `edge-runtime join`; scripts read the same events as JSON lines.

Not here: which events there are (`agent.py` and its parts emit them). Imports `console` and the planner's `mib`.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.console import Bar, Sentences, note_event, what_is_trained
from edge_runtime.planner import mib

SENTENCES: Sentences = {
    "connected": lambda e: "connected to the broker",
    "disconnected": lambda e: f"not connected, trying again: {e['reason']}",
    "old-model": lambda e: (
        f"the coordinator has model {e['announced']}, this device model {e['held']} already: {e['reason']}"
    ),
    "bad-hash": lambda e: f"bytes of the model came damaged ({e['blob'][:12]}): fetching them again",
    "nothing-fits": lambda e: f"round {e['round']}: this device cannot take part: {e['reason']}",
    "training": lambda e: (
        f"round {e['round']}: training {what_is_trained(e['depth'])}, {e['steps']} steps, "
        f"at most {mib(e['peak_bytes_promised'])}"
    ),
    "trained": lambda e: (
        f"round {e['round']}: trained in {e['train_s']:.1f} s, "
        f"peak {mib(e['peak_bytes'])} ({mib(e['promised_peak_bytes'])} promised), loss {e['last_loss']:.3f}"
    ),
    "backed-off": lambda e: (
        f"round {e['round']}: memory gets short: going on in smaller pieces of {e['micro_batch']} texts, "
        f"at most {mib(e['peak_bytes'])}"
    ),
    "waiting": lambda e: f"waiting: {e['reason']}",
    "going-on": lambda e: "the conditions of training hold: going on",
    "paused": lambda e: f"round {e['round']}: paused after step {e['step']} of {e['steps']}",
    "resumed": lambda e: f"round {e['round']}: goes on after step {e['step']} of {e['steps']}",
    "training-failed": lambda e: f"round {e['round']}: the training failed: {e['reason']}",
    "abandoned": lambda e: f"round {e['round']}: the training was stopped: {e['reason']}",
    "committed": lambda e: (
        f"round {e['round']}: the coordinator has the update "
        f"({mib(e['bytes_up'])} sent, {mib(e['bytes_down'])} received so far)"
    ),
    "rejected": lambda e: f"round {e['round']}: the coordinator refuses the update: {e['reason']}",
    "late": lambda e: f"round {e['round']}: too late: {e['reason']}",
    "excluded": lambda e: f"round {e['round']}: no plan for this device: {e['reason']}",
    "declined": lambda e: f"round {e['round']}: not taking part: {e['reason']}",
    "model": lambda e: f"model {e['model_version']} is here",
    "fetching": lambda e: f"fetching model {e['model_version']}: {mib(e['num_bytes'])}",
    "dropped": lambda e: f"deleted model {e['model_version']}: there was no room for model {e['for_version']}",
    "bad-message": lambda e: f"a message on {e['topic']} cannot be read: {e['reason']}",
    "problem": lambda e: f"cannot go on, trying again in 30 s: {e['reason']}",
    "storage-error": lambda e: f"the disk fails or holds something damaged: {e['reason']}",
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
