"""What a person reads of `edge-coordinator serve`: a sentence for every event, and nothing twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edge_coordinator.server_log import SENTENCES, ServerLog

SOURCES = Path(__file__).parents[2] / "coordinator"
FIELDS: dict[str, Any] = {
    "round": 3, "run": "first", "device": "pi-1", "reason": "so it is", "realm": "farm", "host": "h", "port": 1883, "broker": "embedded",
    "model_version": 4, "num_examples": 10, "budget_bytes": 1 << 28, "planned": 2, "members": ["a", "b"], "depth": 2,
    "peak_bytes": 1 << 27, "num_bytes": 1 << 20, "first_loss": 1.5, "last_loss": 0.5, "train_s": 9.0, "mean_loss": 0.5, "kind": "offer", "rank": 4, "mask_every": 10, "tensors": 24, "primed": False,
}  # fmt: skip


def kinds() -> set[str]:
    """The events that `serve` emits; `status` is shown by its state, `listening` is of the broker alone."""
    sources = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    return {*re.findall(r'"event": "([a-z-]+)"', sources), "joined", "unable"} - {"status", "listening"}


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_event_is_a_sentence_and_no_raw_fields(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kind in SENTENCES
    ServerLog()({"event": kind, **FIELDS})
    (line,) = capsys.readouterr().err.splitlines()
    assert "=" not in line


def test_a_full_disk_names_the_device_whose_update_it_was_if_any(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("pi-1", ""):
        ServerLog()({"event": "storage-error", "device": device, "reason": "no space"})
    first, second = capsys.readouterr().err.splitlines()
    assert "pi-1" in first
    assert "update" not in second


def test_a_plan_that_is_sent_again_is_shown_once_and_the_next_rounds_again(capsys: pytest.CaptureFixture[str]) -> None:
    log = ServerLog()
    for number, device in ((1, "pi-1"), (1, "pi-2"), (1, "pi-1"), (2, "pi-1"), (2, "pi-1")):
        log({**FIELDS, "event": "granted", "round": number, "device": device})
    shown = [line.partition(" trains")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["round 1: pi-1", "round 1: pi-2", "round 2: pi-1"]


def test_a_devices_state_is_shown_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    log = ServerLog()
    for state in ("online", "online", "offline"):
        log({"event": "status", "device": "pi-1", "state": state})
    assert capsys.readouterr().err == "pi-1 is online\npi-1 is offline\n"
