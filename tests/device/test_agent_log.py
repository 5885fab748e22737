"""What a person reads of `edge-runtime join` and `serve`: a sentence for every event that they have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.agent_log import SENTENCES, AgentLog
from edge_runtime.serving import serve

SOURCES = Path(__file__).parents[2] / "edge_runtime"
OF_SERVE = ("serve.py", "live_model.py", "mqtt_answers.py")
NAMED_BY_A_VARIABLE = {"committed", "rejected", "late", "excluded", "declined", "problem", "storage-error"}
FIELDS: dict[str, Any] = {
    "round": 3, "reason": "so it is", "announced": 1, "held": 2, "blob": "ab" * 32, "topic": "fl/1/farm/all/model",
    "needs_bytes": 1 << 28, "budget_bytes": 1 << 27, "depth": 2, "steps": 7, "peak_bytes_promised": 1 << 28, "train_s": 1.5,
    "peak_bytes": 1 << 27, "promised_peak_bytes": 1 << 28, "last_loss": 0.5, "out_of_memory": True, "bytes_up": 1 << 20,
    "bytes_down": 1 << 21, "micro_batch": 2, "model_version": 4, "num_bytes": 1 << 20,
    "for_version": 5, "before": 3, "load_s": 0.1, "answers": 3, "asker": "pi-2", "host": "127.0.0.1", "port": 8765, "requests": 9, "path": "/predict",
}  # fmt: skip


def kinds(of_serve: bool) -> set[str]:
    """The events that the sources of one command emit; `step` is the progress bar's."""
    files = [path for path in SOURCES.rglob("*.py") if (path.name in OF_SERVE) == of_serve]
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    return {*re.findall(r'"event": "([a-z-]+)"', sources), *(() if of_serve else NAMED_BY_A_VARIABLE)} - {"step"}


@pytest.mark.parametrize("kind", sorted(kinds(of_serve=False)))
def test_every_event_is_a_sentence_with_its_reason_and_no_raw_fields(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind in SENTENCES
    AgentLog()({"event": kind, **FIELDS})
    (line,) = capsys.readouterr().err.splitlines()
    assert "=" not in line
    if kind in NAMED_BY_A_VARIABLE - {"committed"}:
        assert "so it is" in line


@pytest.mark.parametrize("kind", sorted(kinds(of_serve=True)))
def test_every_event_of_serve_is_a_sentence_too(kind: str) -> None:
    assert "None" not in serve.SENTENCES[kind]({"event": kind, **FIELDS})
