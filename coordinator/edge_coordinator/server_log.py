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
    "broker-lost": lambda e: f"the connection to the broker is lost, it is made again: {e['reason']}",
    "round-opened": lambda e: f"round {e['round']}: waiting for devices",
    "adapters-begun": lambda e: (
        f"model {e['model_version']} begins with {e['tensors'] // 2} adapters, made from what the run has changed"
        if e["primed"]
        else f"model {e['model_version']} begins with {e['tensors'] // 2} fresh adapters"
        if e["tensors"]
        else f"model {e['model_version']} begins: adapters of before are merged into it"
    ),
    "joined": lambda e: (
        f"round {e['round']}: {e['device']} joins with {e['num_examples']} examples and {mib(e['budget_bytes'])}"
    ),
    "unable": lambda e: f"round {e['round']}: {e['device']} cannot take part: {e['reason']}",
    "round-planned": lambda e: f"round {e['round']}: {e['planned']} of {e['members']} devices have a plan",
    "granted": lambda e: (
        f"round {e['round']}: {e['device']} trains {what_is_trained(e['depth'])}"
        f"{' by adapters of rank ' + str(e['rank']) if e['rank'] else ''}"
        f"{' by one in ' + str(e['mask_every']) + ' entries' if e['mask_every'] and e['depth'] else ''}"
        f", at most {mib(e['peak_bytes'])}"
    ),
    "gave-up": lambda e: f"round {e['round']}: {e['device']} gives its plan back: {e['reason']}",
    "rejected": lambda e: f"round {e['round']}: {e['device']}'s update is refused: {e['reason']}",
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
    "bad-message": lambda e: f"{e['device']} sends what cannot be read as {e['kind']!r} (said once): {e['reason']}",
    "storage-error": lambda e: (
        f"the disk fails{' with an update of ' + e['device'] if e['device'] else ''}, it is tried again: {e['reason']}"
    ),
}


class ServerLog:
    """The coordinator's events for people: a line each; of a device's reports only what changes its state.

    A plan that is sent again, to a device that asks again, is shown once.
    """

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._granted: dict[str, int] = {}  # the newest round of which a device's plan was shown

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "status":
            if self._states.get(event["device"]) != event["state"]:
                self._states[event["device"]] = event["state"]
                note(f"{event['device']} is {event['state']}")
            return
        if kind == "granted":
            if self._granted.get(event["device"]) == event["round"]:
                return
            self._granted[event["device"]] = event["round"]
        note_event(event, SENTENCES)
