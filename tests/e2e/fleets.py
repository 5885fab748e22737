"""A real fleet for tests: coordinator, broker and devices as processes that can be killed and started again.

The model is a small BERT with random weights and the real tokenizer, so that a round takes seconds; real weights are in
tests/models and in the demo. `Fleet.tensors` is what two runs are compared by, bit for bit.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.fleet import init
from edge_coordinator.models import Models
from edge_coordinator.sim.simulation import SimOptions, Simulation
from edge_models import hub
from edge_runtime.weights import MappedTensor, write_safetensors

HERE = Path(__file__).parent
CONFIG = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 30522,
    "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
LABELS = ("colour", "number", "place")
WORDS = {
    "colour": ["red", "blue", "green", "yellow"],
    "number": ["one", "seven", "ninety", "thousand"],
    "place": ["Paris", "Rome", "river", "mountain"],
}


def tiny_model(folder: Path, blocks: int = 2) -> Path:
    """A checkpoint folder of 4 MB whose weights come from a seed."""
    from edge_models import bert

    folder.mkdir(parents=True)
    config = {**CONFIG, "num_hidden_layers": blocks}
    spec = bert.describe(config, LABELS, 32)
    random = np.random.default_rng(7)
    located = []
    for number, tensor in enumerate(t for t in spec.tensors if t.part < spec.num_blocks):
        values = (
            np.ones(tensor.shape) if tensor.name.endswith("LayerNorm.weight") else random.normal(0, 0.1, tensor.shape)
        )
        path = folder / f"{number}.raw"
        values.astype("<f4").tofile(path)
        located.append((tensor.name, MappedTensor(str(path), 0, tensor.shape)))
    write_safetensors(folder / "model.safetensors", located)
    for raw in folder.glob("*.raw"):
        raw.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(hub.resolve("minilm-l6", print) / "tokenizer.json", folder / "tokenizer.json")
    return folder


def write_data(path: Path, seed: int, count: int = 24) -> Path:
    """Labelled texts that a small model can learn."""
    random = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            label = LABELS[random.integers(len(LABELS))]
            words = random.choice(WORDS[label], random.integers(2, 6))
            writer.writerow([f"the {' '.join(words)} of it", label])
    return path


class Fleet:
    """Processes by name: `coordinator`, `broker` where it is external, and the devices."""

    def __init__(
        self, folder: Path, model: Path, *, devices: int = 2, rounds: int = 2, broker: str = "embedded", method: str = "caff", epochs: int = 1, cache: Path | None = None,
        memory: Sequence[str] = (), goal: int | None = None, quorum: int | None = None, report_timeout_s: float = 300.0,
        codec: str = "f32", upload: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.folder, self.broker, self.port = folder, broker, _free_port()
        self.fleet = folder / "fleet"
        self.devices = [f"device-{i}" for i in range(devices)]
        self.memory = list(memory) or ["2GB"] * devices
        self.upload = list(upload) or [""] * devices
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        goal = goal or devices
        path = init(
            self.fleet, name="test", base=str(model), labels=LABELS, max_length=32, method=method, rounds=rounds, goal=goal, quorum=quorum or goal, seed=3, port=self.port
        )  # fmt: skip
        text = (
            path.read_text()
            .replace("report_timeout_s = 3600.0", f"report_timeout_s = {report_timeout_s}")
            .replace("epochs = 1", f"epochs = {epochs}")
            .replace('codec = "f32"', f'codec = "{codec}"')
        )
        path.write_text(
            text.replace('kind = "embedded"', f'kind = "{"embedded" if broker == "embedded" else "external"}"')
        )
        self.run("edge_coordinator.cli", "enroll", *self.devices, "--fleet", str(self.fleet))
        for number, device in enumerate(self.devices):
            write_data(folder / f"{device}.csv", number)
            if cache and cache.exists():
                shutil.copytree(cache, folder / device / "cache")

    def run(self, module: str, *arguments: str) -> str:
        """Run a command to its end."""
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True, env=_environment()
        )
        return done.stdout

    def start(self, name: str, *, crash_at: int = 0) -> None:
        """Start a process; with `crash_at` it kills itself at that write boundary."""
        if name == "coordinator":
            command = ["edge_coordinator.cli", "serve", "--fleet", str(self.fleet), "--json"]
        elif name == "broker":
            command = ["edge_coordinator.cli", "broker", "--fleet", str(self.fleet), "--kind", self.broker, "--json"]
        else:
            config, data = self.fleet / "devices" / f"{name}.toml", self.folder / f"{name}.csv"
            memory, upload = (wanted[self.devices.index(name)] for wanted in (self.memory, self.upload))
            command = ["edge_runtime.cli", "join", "--config", str(config), "--data", str(data), "--state", str(self.folder / name),
                       "--memory", memory, "--threads", "1", "--json", *(["--upload", upload] if upload else [])]  # fmt: skip
        prefix = [sys.executable, str(HERE / "crashing.py"), str(crash_at)] if crash_at else [sys.executable, "-m"]
        with (self.folder / f"{name}.log").open("ab") as log, (self.folder / f"{name}.err").open("ab") as err:
            self.processes[name] = subprocess.Popen(
                [*prefix, *command], stdout=log, stderr=err, env=_environment(), start_new_session=True
            )

    def start_all(self) -> None:
        """Broker, coordinator, devices."""
        if self.broker != "embedded":
            self.start("broker")
        self.start("coordinator")
        for device in self.devices:
            self.start(device)

    def kill(self, name: str) -> None:
        """SIGKILL, no goodbye."""
        self.processes[name].kill()
        self.processes[name].wait()

    def alive(self, name: str) -> bool:
        """Whether a process runs."""
        return name in self.processes and self.processes[name].poll() is None

    def events(self, name: str, kind: str | None = None) -> list[dict[str, Any]]:
        """What a process has said so far, over all its lives."""
        path = self.folder / f"{name}.log"
        found = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # cut off by a kill
                event = json.loads(line)
                if kind is None or event["event"] == kind:
                    found.append(event)
        return found

    def wait(self, what: Callable[[], object], seconds: float = 120.0) -> None:
        """Until something is true; fails with everybody's last words."""
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s\n{self.last_words()}")
            time.sleep(0.05)

    def finished(self) -> bool:
        """The run is over and every device holds the final model."""
        done = self.events("coordinator", "run-finished")
        if not done:
            return False
        held = {event["device"]: event["model_version"] for event in self.events("coordinator", "status")}
        return all(held.get(device) == done[-1]["model_version"] for device in self.devices)

    def last_words(self) -> str:
        """The end of every log."""
        names = ["coordinator", "broker", *self.devices]
        texts = [
            f"--- {n}\n"
            + "".join(
                (self.folder / f"{n}.{end}").read_text()[-1500:]
                for end in ("log", "err")
                if (self.folder / f"{n}.{end}").exists()
            )
            for n in names
        ]
        return "\n".join(texts)

    def stop(self) -> None:
        """End everything."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def tensors(self) -> list[str]:
        """The hashes of the newest model's tensors: equal only for the same bits."""
        folder = FleetFolder(self.fleet)
        newest = Models(self.fleet, folder.ledger).newest()
        assert newest
        return [t.blob.hex() for t in newest[0].tensors]

    def counted(self) -> list[tuple[int, str, int]]:
        """(round, device, examples) of every contribution in the ledger."""
        ledger = FleetFolder(self.fleet).ledger
        rounds = [r["round"] for r in ledger.rounds()]
        return [(n, c.device, c.num_examples) for n in rounds for c in ledger.contributions("first", n).values()]

    def round_states(self) -> list[str]:
        """How each round ended."""
        return [r["state"] for r in FleetFolder(self.fleet).ledger.rounds()]


@contextlib.contextmanager
def running(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, stopped at the end whatever happens."""
    try:
        yield fleet
    finally:
        fleet.stop()


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_for(folder: Path, options: SimOptions, events: int) -> None:
    """Until so many things have happened, or the end."""
    seen: list[dict[str, Any]] = []
    Simulation(folder, options, progress=seen.append, say=print, keep_going=lambda: len(seen) < events).run()
