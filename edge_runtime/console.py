"""What the command lines share: help, errors to exit codes, events and progress for people, tables, stopping cleanly.

Not here: any one command, its flags or its sentences. Imports the standard library and `errors` only.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TextIO, TypeAlias

from edge_runtime.errors import EdgeError, StoreError

INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk, a quota or a limit says that takes no more
EXIT_CODES = {
    0: "done",
    2: "usage",
    3: "data",
    4: "model",
    5: "does not fit",
    6: "training failed",
    7: "connection",
    8: "extra missing",
    9: "wire",
    10: "storage",
    INTERRUPTED: "stopped",
}
_lost = False  # whether the last JSON line found no space: more than the stream can tell where it has no buffer
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Sentences: TypeAlias = Mapping[str, Callable[[dict[str, Any]], str]]


def new_parser(
    commands: Commands | None, name: str, what: str, *examples: str, exit_codes: Iterable[int], nested: bool = False
) -> argparse.ArgumentParser:
    """A command line, or one of its `commands`, which has `--json`; its help ends with examples and exit codes.

    Args:
        nested: below a command, whose own `--json` means as much.
    """
    codes = ", ".join(f"{code} {EXIT_CODES[code]}" for code in exit_codes)
    epilog = "\n  ".join(["examples:", *examples]) + f"\n\nexit codes: {codes}"
    options: dict[str, Any] = {
        "description": what,
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    if commands is None:
        return argparse.ArgumentParser(name, **options)
    made = commands.add_parser(name, help=what, **options)
    default = argparse.SUPPRESS if nested else False
    made.add_argument("--json", action="store_true", default=default, help="print JSON for scripts")
    return made


def run_main(main: Callable[[], int]) -> int:
    """Run a command: our errors become one line and their exit code; Ctrl-C, SIGTERM and SIGHUP clean up and end with 130.

    A closed pipe is no error. What could not be printed because the disk is full is one, at the end.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def interrupt(number: int, frame: object) -> None:
        for asked in before:
            signal.signal(asked, signal.SIG_IGN)  # once is enough: what cleans up is not interrupted
        raise KeyboardInterrupt

    try:
        for number, handler in before.items():
            if handler == signal.SIG_DFL:  # not where nohup has it ignored
                signal.signal(number, interrupt)
        code = main()
        sys.stdout.flush()
        return _no_space() if _lost else code
    except EdgeError as error:
        _say(f"error: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _say("stopped", sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in FULL:
            raise
        return _no_space()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the caller closed it
            _give_up_unprinted(stream)


def _no_space() -> int:
    _say("error: no space left for what this command prints: free some", sys.stderr)
    return StoreError.exit_code


def note(line: str) -> None:
    """Something a person may want to know, on standard error."""
    _say(printable(line), sys.stderr)


def printable(text: str) -> str:
    """A text on one line of its own that cannot move the cursor: a device's words, or somebody's."""
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)


def print_json(value: Any) -> None:
    """One JSON value on a line of its own."""
    global _lost
    _lost = not _say(json.dumps(value), sys.stdout)


def _say(line: str, stream: TextIO) -> bool:
    """Print a line at once; -> whether a full disk took it. It must not end what logs there, as a closed pipe does."""
    try:
        print(line, file=stream, flush=True)
        return True
    except OSError as error:
        if error.errno not in FULL:
            raise
        return False


def _give_up_unprinted(stream: TextIO) -> None:
    """Let go what a stream cannot write: the interpreter would try once more as it ends, and complain."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def what_is_trained(depth: int) -> str:
    """A suffix depth in words."""
    return {0: "the head", 1: "the last block"}.get(depth, f"the last {depth} blocks")


def note_event(event: dict[str, Any], sentences: Sentences) -> None:
    """An event for people: in its kind's sentence, or with its fields as they are where the kind has none."""
    note(sentences.get(event["event"], _plain_event)(event))


def _plain_event(event: dict[str, Any]) -> str:
    return " ".join([event["event"], *(f"{k}={v}" for k, v in event.items() if k != "event")])


class Bar:
    """Training progress: one line that rewrites itself on a terminal, a line every ten percent elsewhere."""

    def __init__(self, label: str) -> None:
        self._label, self._start, self._tenth = label, time.monotonic(), -1
        self._live = sys.stderr.isatty()
        self._first: tuple[int, float] | None = None  # (step, seconds) that was first shown

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """Show that `step` of `steps` is done."""
        elapsed = time.monotonic() - self._start
        if self._first is None:
            self._first = (step, elapsed)  # what came before was no step
        first, before = self._first
        left = f", {(elapsed - before) / (step - first) * (steps - step):.0f} s left" if step > first else ""
        text = f"{self._label} {step}/{steps}  loss {loss:.3f}  {elapsed:.0f} s{left}"
        if self._live:
            done = 24 * step // steps
            end = "\n" if step == steps else ""
            sys.stderr.write(f"\r\x1b[K[{'#' * done}{'.' * (24 - done)}] {text}{end}")
            sys.stderr.flush()
        elif 10 * step // steps > self._tenth:
            self._tenth = 10 * step // steps
            note(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned; numbers to the right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if c[:1].isdigit() or c == "-" else c.ljust(w) for c, w in zip(cells, widths, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]).replace(" -", " -"), *(line(row) for row in rows)])


@contextlib.contextmanager
def until_told_to_stop() -> Iterator[Callable[[], bool]]:
    """`keep_going()` turns False at SIGTERM or Ctrl-C; a second one interrupts at once."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: not stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
