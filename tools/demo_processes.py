"""The demo's processes, started as a user would start them, and the events that they print as JSON lines.

Not here: what an event means and how it is shown (`demo_view.py`), the order of things (`demo.py`). Imports
`edge_coordinator.fleet`, the device's budget, console and errors, and `tools.limits`.
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_coordinator.fleet import init
from edge_runtime.budget import AGENT_RESERVE_BYTES
from edge_runtime.console import note
from edge_runtime.errors import EdgeError, TrainingFailed
from tools.limits import MemoryLimit

EXTERNAL_BROKER_S, COORDINATOR_S = 20.0, 120.0  # longest start; the coordinator may have a model to fetch


class Processes:
    """Processes that print events, and the queue of (who, event) that all of them fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._started: list[subprocess.Popen[str]] = []

    def start(self, who: str, command: Sequence[str]) -> None:
        """Run a command whose output is JSON lines; its errors go to a log file."""
        with (self.folder / f"{who}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        self._started.append(process)
        threading.Thread(target=self._read, args=(who, process), daemon=True).start()

    def _read(self, who: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            try:
                self.events.put((who, json.loads(line)))
            except ValueError:
                continue
        self.events.put((who, {"event": "ended"}))

    def wait_for(self, who: str, event: str, seconds: float) -> None:
        """Until a process has said so; the events before are dropped."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                source, found = self.events.get(timeout=0.2)
            except queue.Empty:
                continue
            if source == who and found["event"] == event:
                return
            if source == who and found["event"] == "ended":
                break
        raise TrainingFailed(f"the {who} did not start: {self.last_words(who)}")

    def last_words(self, who: str) -> str:
        """The end of a process's log."""
        lines = (self.folder / f"{who}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"see {self.folder / who}.log"

    def stop(self) -> None:
        """End every process, the newest first."""
        for process in reversed(self._started):
            if process.poll() is None:
                process.terminate()
        for process in reversed(self._started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_fleet(
    processes: Processes, args: argparse.Namespace, labels: Sequence[str], max_length: int, num_devices: int
) -> None:
    """fleet.toml, credentials, broker and coordinator."""
    fleet = processes.folder / "fleet"
    path = init(
        fleet,
        name="demo",
        base=args.model,
        labels=labels,
        max_length=max_length,
        method=args.method,
        rounds=args.rounds,
        goal=num_devices,
        quorum=1,
        seed=args.seed,
        port=_free_port(),
    )
    where = ("--fleet", str(fleet))
    if args.broker == "mosquitto":
        path.write_text(path.read_text().replace('kind = "embedded"', 'kind = "external"'))
        processes.start("broker", _command("edge_coordinator.cli", "broker", *where, "--kind", "mosquitto", "--json"))
        processes.wait_for("broker", "listening", EXTERNAL_BROKER_S)
    names = [f"device-{i}" for i in range(1, num_devices + 1)]
    enroll = _command("edge_coordinator.cli", "enroll", *names, *where)
    subprocess.run(enroll, check=True, stdout=subprocess.DEVNULL)
    note(f"starting the {args.broker} broker and the coordinator")
    processes.start("coordinator", _command("edge_coordinator.cli", "serve", *where, "--json"))
    processes.wait_for("coordinator", "serving", COORDINATOR_S)


def start_devices(processes: Processes, limits: Mapping[str, MemoryLimit]) -> None:
    """Each device as a process of its own, within its limit."""
    folder = processes.folder
    for device, limit in limits.items():
        config = folder / "fleet" / "devices" / f"{device}.toml"
        files = ("--config", str(config), "--data", str(folder / f"{device}.csv"), "--state", str(folder / device))
        program = _command("edge_runtime.cli", "join", *files, "--threads", "1", "--json")
        if not limit.enforced:  # then the training process alone is held to what the device would leave it
            program += ["--memory", str(max(1, limit.limit_bytes - AGENT_RESERVE_BYTES))]
        processes.start(device, limit.command(program))
    enforced = next(iter(limits.values())).enforced
    kept = "by a cgroup each" if enforced else "by a watchdog only: this machine allows no cgroups here"
    note(f"{len(limits)} devices, memory limits kept {kept}")


def export_model(folder: Path, version: int, name: str, samples: Sequence[str]) -> dict[str, Any]:
    """A model version as ONNX, in processes of their own, checked on the samples; -> the report."""
    note(f"exporting model {version} to ONNX")
    checkpoint, texts = folder / name, folder / "samples.jsonl"
    texts.write_text("".join(json.dumps({"text": text, "label": "-"}) + "\n" for text in samples))
    write = ("--export", str(version), "--out", str(checkpoint))
    models = _command("edge_coordinator.cli", "models", "--fleet", str(folder / "fleet"), *write)
    subprocess.run(models, check=True, stdout=subprocess.DEVNULL)
    files = (str(checkpoint), "--out", str(folder / f"{name}.onnx"), "--data", str(texts))
    export = _command("edge_runtime.cli", "export", *files, "--json")
    made = subprocess.run(export, stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode:
        raise EdgeError(f"the export of model {version} failed")
    report: dict[str, Any] = json.loads(made.stdout)
    return report


def _command(module: str, *arguments: str) -> list[str]:
    """A command line of ours under this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def _free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
