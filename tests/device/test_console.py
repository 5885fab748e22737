"""What a person's terminal gets to see: sentences, and never the control characters of a device or a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import console
from edge_runtime.console import Bar, note, note_event

FULL = Path("/dev/full")  # every write says that there is no space left
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this machine has no /dev/full")


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


# a log on a disk that is full


def on_a_full_disk(code: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python code whose standard output goes to a full disk."""
    with FULL.open("wb") as log:
        return subprocess.run([sys.executable, "-c", code, *arguments], stdout=log, stderr=subprocess.PIPE, check=False)


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_log_on_a_full_disk_does_not_end_what_writes_it(
    unbuffered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of `join --json` and `serve --json` and what they note beside it; there is room again at the end."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code = """
import os, sys
from edge_runtime.console import note, print_json, run_main

def main():
    os.dup2(1, 2)
    for i in range(1000):
        print_json({"event": "status", "number": i})
        note(f"pi-{i} is online")
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    print_json({"event": "stopped"})
    return 0

sys.exit(run_main(main))
"""
    done = on_a_full_disk(code, str(tmp_path / "log"))
    assert done.returncode == 0
    assert b'{"event": "stopped"}\n' in (tmp_path / "log").read_bytes()


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    [
        ["edge_runtime.start", "profile", "--json"],
        ["edge_coordinator.start", "init", "{folder}", "--labels", "a,b"],
        ["edge_coordinator.start", "init", "{folder}", "--labels", "a,b", "--json"],
    ],
)
def test_output_that_a_full_disk_does_not_take_is_one_line_and_the_exit_code_of_storage(
    command: list[str], unbuffered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    module, *arguments = (word.format(folder=tmp_path / "f") for word in command)
    done = on_a_full_disk(f"import sys; from {module} import main; sys.exit(main())", *arguments)
    assert (done.returncode, done.stderr.count(b"\n")) == (10, 1)
    assert b"no space left" in done.stderr


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_command_that_is_asked_to_end_cleans_up_once_and_exits_with_130(number: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, time
from edge_runtime.console import run_main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

def main():
    try:
        os.kill(os.getpid(), signal.{number})
        time.sleep(60)
    finally:
        if signal.{number} != signal.SIGINT:
            os.kill(os.getpid(), signal.{number})  # a second one, while it cleans up
        open(sys.argv[1], "w").write("clean")
    return 0

sys.exit(run_main(main))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert (tmp_path / "file").read_text() == "clean"


def test_what_nohup_has_ignored_stays_ignored() -> None:
    code = """
import os, signal, sys
from edge_runtime.console import run_main
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.exit(run_main(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


def test_the_time_that_is_left_is_told_from_the_second_step_on_and_counts_no_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0, 31.0, 32.0])  # made, then half a minute until the first step
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    bar = Bar("training")
    for step in (1, 2, 3):
        bar(step, 10, 0.5)
    assert re.findall(r"(\d+) s left", capsys.readouterr().err) == ["8", "7"]
