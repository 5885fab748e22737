"""What the demo shows: a line for each device and round while it runs, then the table, the accuracy and the answers.

Not here: who prints the events (`demo_processes.py`), what happens when (`demo.py`). Imports the device's console,
errors, planner (`mib`) and predictor, `tools.demo_processes` and `tools.limits`.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.console import table
from edge_runtime.errors import TrainingFailed
from edge_runtime.planner import mib
from edge_runtime.predict import Predictor
from tools.demo_processes import Processes
from tools.limits import MemoryLimit

RUN_S, LAST_MODEL_S = 3600.0, 120.0  # longest run; longest wait for the devices to have the final model
OVER = ("nothing-fits", "declined", "excluded", "training-failed", "problem", "storage-error")


@dataclass
class DemoDevice:
    """One device of the demo and what became of it."""

    id: str
    limit: MemoryLimit
    num_examples: int
    depth: int | None = None
    checkpointing: bool = False
    promised_bytes: int = 0
    peak_bytes: int = 0
    train_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    committed: int = 0
    model_version: int = 0
    activity: str = "starting"

    def hear(self, event: dict[str, Any]) -> bool:
        """Take in what the device says of itself; -> whether its part in the round is over."""
        kind = event["event"]
        self.bytes_up = event.get("bytes_up", self.bytes_up)
        self.bytes_down = event.get("bytes_down", self.bytes_down)
        if kind == "training":
            self.depth, self.checkpointing = event["depth"], event["checkpointing"]
            self.promised_bytes = event["peak_bytes_promised"]
            self.activity = f"depth {self.depth}: training, {event['steps']} steps"
        elif kind == "step":
            self.activity = f"depth {self.depth}: step {event['step']}/{event['steps']}, loss {event['loss']:.3f}"
        elif kind == "trained":
            self.peak_bytes = max(self.peak_bytes, event["peak_bytes"])
            self.train_s += event["train_s"]
            self.activity = (
                f"depth {event['depth']}{' checkpointed' if event['checkpointing'] else ''}: "
                f"loss {event['first_loss']:.3f} -> {event['last_loss']:.3f} in {event['train_s']:.0f} s, "
                f"peak {mib(event['peak_bytes'])} of {mib(event['promised_peak_bytes'])} promised"
            )
        elif kind == "model":
            self.model_version = event["model_version"]
        elif kind == "fetching":
            self.activity = f"fetching model {event['model_version']}, {mib(event['num_bytes'])}"
        elif kind in OVER:
            self.activity = f"{kind}: {event.get('reason', '')}"
        return kind == "committed" or kind in OVER

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {
            "id": self.id,
            "memory_limit_bytes": self.limit.limit_bytes,
            "num_examples": self.num_examples,
            "depth": self.depth,
            "checkpointing": self.checkpointing,
            "peak_bytes_promised": self.promised_bytes,
            "peak_bytes_measured": self.peak_bytes,
            "train_s": round(self.train_s, 3),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "updates_committed": self.committed,
        }


class Lines:
    """One live line for each device and round: rewritten on a terminal, printed once when complete elsewhere."""

    def __init__(self, devices: Sequence[DemoDevice]) -> None:
        self._devices = devices
        self._live = sys.stdout.isatty()
        self._round = 1
        self._shown = 0

    def update(self) -> None:
        """Redraw the present round's lines."""
        if not self._live:
            return
        sys.stdout.write(f"\x1b[{self._shown}A" if self._shown else "")
        for device in self._devices:
            sys.stdout.write(f"\r\x1b[K  round {self._round}  {device.id:10} {device.activity[:90]}\n")
        self._shown = len(self._devices)
        sys.stdout.flush()

    def done(self, round_: int, device: DemoDevice) -> None:
        """A device has finished its part."""
        if not self._live:
            print(f"  round {round_}  {device.id:10} {device.activity}", flush=True)

    def open_round(self, round_: int) -> None:
        """Leave the lines as they are and begin below."""
        self._round, self._shown = round_, 0

    def close_round(self, line: str) -> None:
        """Leave the lines as they now are, and below them what became of the round."""
        self.update()
        self._shown = 0
        print(line, flush=True)


def follow(processes: Processes, devices: Sequence[DemoDevice], keep_going: Callable[[], bool]) -> int:
    """Show what happens until the run is finished and every device holds the final model; -> its version."""
    by_id = {device.id: device for device in devices}
    lines = Lines(devices)
    final, deadline = 0, time.monotonic() + RUN_S
    while keep_going() and time.monotonic() < deadline:
        try:
            who, event = processes.events.get(timeout=0.2)
        except queue.Empty:
            continue
        kind = event["event"]
        if kind == "ended":
            raise TrainingFailed(f"the {who} ended: {processes.last_words(who)}")
        if who in by_id:
            if by_id[who].hear(event):
                lines.done(event.get("round", 0), by_id[who])
        elif kind == "round-opened":
            lines.open_round(event["round"])
        elif kind == "committed":
            by_id[event["device"]].committed += 1
        elif kind == "round-published":
            made = f"model {event['model_version']} from {len(event['members'])} devices"
            lines.close_round(f"round {event['round']}: {made}, mean training loss {event['mean_loss']:.3f}")
        elif kind == "round-failed":
            print(f"round {event['round']} failed: {event['reason']}", flush=True)
        elif kind == "run-finished":
            final, deadline = event["model_version"], time.monotonic() + LAST_MODEL_S
        lines.update()
        if final and all(device.model_version == final for device in devices):
            return final
    if final:
        return final
    raise KeyboardInterrupt


def show(result: Mapping[str, Any], devices: Sequence[DemoDevice], method: str, questions: Sequence[str]) -> None:
    """The table, the accuracy, and an answer to each question."""
    onnx = result["onnx"]
    print(f"\n{_device_table(devices)}\n")
    print(
        f"test accuracy: {100 * result['accuracy_before']:.1f} % before, {100 * result['accuracy_after']:.1f} % after "
        f"{result['rounds']} rounds of {method}; "
        f"TF-IDF with a linear model {100 * result['tfidf_accuracy']:.1f} %"
    )
    print(
        f"{onnx['path']}: {mib(onnx['bytes'])}, logits within {onnx['max_abs_diff']:.1e} of torch; "
        f"{result['wall_s']:.0f} s in all\n"
    )
    for text, found in zip(questions, Predictor(onnx["path"]).predict(questions), strict=True):
        print(f"  {text}\n    -> {found.label}  ({100 * found.probability:.1f} %)")


def _device_table(devices: Sequence[DemoDevice]) -> str:
    before = ("device", "limit", "examples", "depth", "peak promised", "peak measured")
    after = ("train s", "sent", "received", "updates")
    rows = [
        [
            device.id,
            mib(device.limit.limit_bytes),
            str(device.num_examples),
            "-" if device.depth is None else f"{device.depth}{' ckpt' if device.checkpointing else ''}",
            mib(device.promised_bytes) if device.promised_bytes else "-",
            mib(device.peak_bytes) if device.peak_bytes else "-",
            f"{device.train_s:.1f}",
            mib(device.bytes_up),
            mib(device.bytes_down),
            str(device.committed),
        ]
        for device in devices
    ]
    return table([*before, *after], rows)
