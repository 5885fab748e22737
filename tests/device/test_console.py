"""What a person's terminal gets to see: sentences, and never the control characters of a device or a file."""

from __future__ import annotations

import pytest

from edge_runtime.console import note, note_event


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("pi-1's update is in\t(6.8 MiB, größer, 🔥)", "pi-1's update is in\t(6.8 MiB, größer, 🔥)"),
        ("\x1b[2J\x1b[Hall is well", "?[2J?[Hall is well"),
        ("declined\rjoined", "declined?joined"),
        ("declined\nround 1: published", "declined?round 1: published"),
        ("a\x07\x08\x00\x7f\x9b31mb", "a?????31mb"),
        ("abc\u202e\u2066cba", "abc??cba"),  # writing from right to left
        ("file-\udcff.csv", "file-?.csv"),  # a name that is no UTF-8
    ],
)
def test_control_characters_in_a_note_are_made_harmless(
    line: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    note(line)
    assert capsys.readouterr() == ("", shown + "\n")


def test_the_words_of_a_device_within_an_event_are_harmless_too(capsys: pytest.CaptureFixture[str]) -> None:
    event = {"event": "rejected", "device": "pi-1", "reason": "\x1b]0;owned\x07"}
    note_event(event, {"rejected": lambda e: f"{e['device']}: {e['reason']}"})
    note_event(event, {})
    assert capsys.readouterr().err == "pi-1: ?]0;owned?\nrejected device=pi-1 reason=?]0;owned?\n"
