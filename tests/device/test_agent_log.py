"""What a person reads of `edge-runtime join`: a sentence for every event that the agent has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.agent_log import SENTENCES, AgentLog

SOURCES = Path(__file__).parents[2] / "edge_runtime"
NAMED_BY_A_VARIABLE = {"committed", "rejected", "late", "excluded", "declined", "problem", "storage-error"}
FIELDS: dict[str, Any] = {
    "round": 3, "reason": "so it is", "announced": 1, "held": 2, "blob": "ab" * 32, "topic": "fl/1/farm/all/model",
    "needs_bytes": 1 << 28, "budget_bytes": 1 << 27, "depth": 2, "steps": 7, "peak_bytes_promised": 1 << 28, "train_s": 1.5,
    "peak_bytes": 1 << 27, "promised_peak_bytes": 1 << 28, "last_loss": 0.5, "out_of_memory": True, "bytes_up": 1 << 20,
    "bytes_down": 1 << 21, "micro_batch": 2, "model_version": 4, "num_bytes": 1 << 20,
}  # fmt: skip


def kinds() -> set[str]:
    """The events that the device's sources emit; `step` is the progress bar's."""
    sources = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    return {*re.findall(r'"event": "([a-z-]+)"', sources), *NAMED_BY_A_VARIABLE} - {"step"}


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_event_is_a_sentence_with_its_reason_and_no_raw_fields(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind in SENTENCES
    AgentLog()({"event": kind, **FIELDS})
    (line,) = capsys.readouterr().err.splitlines()
    assert "=" not in line
    if kind in NAMED_BY_A_VARIABLE - {"committed"}:
        assert "so it is" in line
