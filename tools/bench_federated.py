"""`tools/bench federated`: a complete run of ours beside Flower with PEFT LoRA: two devices, four rounds, same data.

All processes are on this machine, each device's traffic goes through a proxy that counts it, and each device's memory is
sampled over all of its processes. A row is an entry of `ENTRIES`. Imports `bench_common`, `bench_flower`, the demo's
processes, the data sets; torch and Flower only in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_coordinator.methods import METHODS
from edge_runtime.console import note, run_main
from edge_runtime.errors import EdgeError
from edge_runtime.predict import evaluate
from edge_runtime.split import dirichlet
from tools import bench_common as bench
from tools import bench_flower, datasets
from tools.demo_processes import Processes, export_model, start_fleet

DEVICES, ROUNDS, MAX_LENGTH = 2, 4, 64
QUICK_ROUNDS, QUICK_ROWS = 2, (96, 64)  # training and test examples in a quick run
MIN_EXAMPLES = 8  # of a device
RUN_S = 3600.0  # longest run
SAMPLE_S = 0.1
DEVICE_TAG = "EDGE_BENCH_DEVICE"


@dataclass(frozen=True)
class Entry:
    """A row to measure.

    Attributes:
        method: of ours; "" is Flower.
        join: flags of `edge-runtime join` for every device: memory, upload, time, backend, ...
        options, settings: for Flower, as in `bench_training.Entry`.
    """

    name: str
    method: str = ""
    join: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


ENTRIES = (
    Entry("ours, caff, 330 MB", "caff", {"memory": "330MB"}),
    Entry("ours, caff, 15 MB of upload", "caff", {"memory": "330MB", "upload": "15MB"}),
    Entry("ours, caff, 15 MB, int8 prefix", "caff", {"memory": "330MB", "upload": "15MB", "precision": "int8"}),
    Entry("ours, caff, torch, 450 MB", "caff", {"memory": "450MB", "backend": "torch"}),
    Entry("Flower + PEFT LoRA", options={"train": "lora"}, settings={"learning_rate": 1e-3}),
)
COLUMNS = {
    "name": "row",
    "peak_rss_bytes": "peak RSS of a device",
    "idle_rss_bytes": "idle RSS",
    "wall_s": "s in all",
    "cpu_s_per_step": "CPU s a step",
    "bytes_up": "sent by a device",
    "bytes_down": "received",
    "accuracy": "TREC accuracy",
    "detail": "how",
}
NOTES = (
    "Peak RSS of a device: all its processes together, the sum of their VmHWM at the worst moment (sampled every "
    f"{SAMPLE_S} s), the larger device; pages that two of its processes share count twice.",
    "Idle RSS: its processes together (VmRSS, median). Of Flower after it connected and before the run; of ours whenever, "
    "after it connected, the agent has no child.",
    "Sent and received: bytes on the TCP connections of a device as a proxy counts them, the mean of the devices. Ours "
    "fetches the model over MQTT and this is part of it; Flower's devices have it on disk beforehand.",
    "Seconds: from starting the server to the last aggregated model; waiting for the idle measurement is left out.",
    "CPU seconds a step are those of the training process (Flower: of the train function), mean over devices.",
)


@dataclass
class Run:
    """What a run was, for the row."""

    accuracy: float
    wall_s: float
    cpu_s_per_step: float | None
    idle_from: float
    idle_until: float
    detail: str
    more: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Parse and run; -> the exit code."""
    args = parser().parse_args()
    return run_main(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    """The bench's options."""
    made = bench.bench_parser(
        "federated",
        f"A complete run of ours beside Flower with PEFT LoRA: {DEVICES} devices, memory, seconds, bytes, accuracy.",
        "",
        "--quick --rows Flower",
        "--out docs/results --json federated.json",
    )
    add = made.add_argument
    add("--rounds", type=bench.whole, default=ROUNDS, help="(%(default)s)")
    add("--alpha", type=float, default=0.5, help="Dirichlet parameter of the split over devices (%(default)s)")
    add("--model", default="minilm-l6", help="alias, folder or Hugging Face id (%(default)s)")
    return made


def run(args: argparse.Namespace) -> int:
    """All rows, one after the other."""
    names = bench.chosen_names([entry.name for entry in ENTRIES], args.rows)
    if args.list:
        print("\n".join(names))
        return 0
    if args.quick:
        args.rounds = min(args.rounds, QUICK_ROUNDS)
    entries = [entry for entry in ENTRIES if entry.name in names]
    machine = bench.machine()
    python = bench.peers_environment()
    parts, test = data(args)
    rows = []
    for entry in entries:
        try:
            with bench.scratch() as folder:
                rows.append(one(entry, parts, test, folder, args, python))
        except bench.RowUnavailable as error:
            note(f"{entry.name}: left out, {error}")
            rows.append(bench.make_row(entry.name, detail=str(error)))
        except (EdgeError, OSError) as error:
            note(f"{entry.name}: failed: {error}")
            rows.append(bench.make_row(entry.name, detail=f"failed: {error}"))
    bench.finish(
        "federated",
        args,
        rows,
        title=f"Federated: {DEVICES} devices, {args.rounds} rounds, {args.model}, {args.threads} thread(s) each",
        columns=COLUMNS,
        notes=[
            *NOTES,
            f"Data: TREC, 45 classes, Dirichlet {args.alpha} over the devices, seed {args.seed}, one epoch a round.",
        ],
        versions=bench.versions(python),
        machine=machine,
        python=python,
    )
    return bench.exit_code(rows)


def data(args: argparse.Namespace) -> tuple[list[list[datasets.Row]], list[datasets.Row]]:
    """Each device's examples, and those for testing."""
    found = datasets.load("trec", note)
    train, test = found.train, found.test
    if args.quick:
        train, test = train[: QUICK_ROWS[0]], test[: QUICK_ROWS[1]]
        known = {row.label for row in train}
        test = [row for row in test if row.label in known]
    parts = dirichlet([row.label for row in train], DEVICES, args.alpha, args.seed, min_examples=MIN_EXAMPLES)
    note(f"{' and '.join(str(len(part)) for part in parts)} training examples, {len(test)} for testing")
    return [[train[i] for i in part] for part in parts], test


def one(
    entry: Entry,
    parts: Sequence[Sequence[datasets.Row]],
    test: Sequence[datasets.Row],
    folder: Path,
    args: argparse.Namespace,
    python: Path,
) -> bench.Row:
    """A complete run as a row."""
    note(f"{entry.name}: starting")
    devices = [f"device-{i}" for i in range(1, len(parts) + 1)]
    labels = sorted({row.label for row in [*(row for part in parts for row in part), *test]})
    with Sampler(devices) as sampler, contextlib.ExitStack() as stack:

        def through_proxy(port: int) -> Proxy:
            return stack.enter_context(Proxy(port))

        if entry.method:
            done, proxies = ours(entry, parts, test, labels, folder, args, through_proxy)
        else:
            proxies = []

            def listen(port: int) -> int:
                proxies.append(through_proxy(port))
                return proxies[-1].port

            flower = bench_flower.Flower(python, folder, args, labels, dict(entry.options), dict(entry.settings))
            found = flower.run(parts, test, MAX_LENGTH, listen, lambda i: f"{DEVICE_TAG}={devices[i]}")
            done = Run(**found)
    up, down = [p.bytes_up for p in proxies], [p.bytes_down for p in proxies]
    peaks = [sampler.peak(device) for device in devices]
    row = bench.make_row(
        entry.name,
        peak_rss_bytes=max(peaks),
        cpu_s_per_step=done.cpu_s_per_step,
        wall_s=done.wall_s,
        bytes_up=int(statistics.mean(up)),
        accuracy=done.accuracy,
        bytes_down=int(statistics.mean(down)),
        idle_rss_bytes=sampler.idle(done.idle_from, done.idle_until),
        detail=done.detail,
        devices=[
            {"peak_rss_bytes": peak, "bytes_up": u, "bytes_down": d} for peak, u, d in zip(peaks, up, down, strict=True)
        ],
        **done.more,
    )
    note(f"{entry.name}: " + ", ".join(f"{COLUMNS[k]} {bench.shown(k, row[k])}" for k in list(COLUMNS)[1:-1]))
    return row


def ours(
    entry: Entry,
    parts: Sequence[Sequence[datasets.Row]],
    test: Sequence[datasets.Row],
    labels: Sequence[str],
    folder: Path,
    args: argparse.Namespace,
    through_proxy: Callable[[int], Proxy],
) -> tuple[Run, list[Proxy]]:
    """Broker, coordinator and devices, as the demo starts them, until the run is finished."""
    if missing := [flag for flag in entry.join if f"--{flag}" not in join_help()]:
        raise bench.RowUnavailable(f"this version's join has no --{missing[0]}")
    devices = {f"device-{i}": part for i, part in enumerate(parts, 1)}
    for device, part in devices.items():
        datasets.write_csv(part, folder / f"{device}.csv")
    processes, begun = Processes(folder), time.monotonic()
    fleet = argparse.Namespace(
        model=args.model, method=entry.method, rounds=args.rounds, seed=args.seed, broker="amqtt"
    )
    assert entry.method in METHODS, entry.method
    proxies = []
    heard = Heard()
    try:
        start_fleet(processes, fleet, labels, MAX_LENGTH, len(parts))
        for device in devices:
            config = folder / "fleet" / "devices" / f"{device}.toml"
            port = int(re.findall(r"^port = (\d+)", config.read_text(), re.M)[0])
            proxies.append(through_proxy(port))
            config.write_text(re.sub(r"(?m)^port = \d+", f"port = {proxies[-1].port}", config.read_text()))
            files = ("--config", str(config), "--data", str(folder / f"{device}.csv"), "--state", str(folder / device))
            flags = [word for flag, value in entry.join.items() for word in (f"--{flag}", value)]
            program = [sys.executable, "-m", "edge_runtime.cli", "join", *files, *flags, "--json"]
            tags = (f"{DEVICE_TAG}={device}", bench.RUN_TAG)
            processes.start(device, ["/usr/bin/env", *tags, *program, "--threads", str(args.threads)])
        heard.follow(processes, begun)
        ended = time.monotonic()
    finally:
        processes.stop()
    wall_s = ended - begun
    exported = export_model(folder, heard.final, "after", [row.text for row in test[:32]])
    accuracy = evaluate(exported["path"], ((row.text, row.label) for row in test))
    cpu = [report["cpu_s"] / report["steps"] for report in heard.reports if "cpu_s" in report]
    kinds = sorted({(r["backend"], r["depth"], r["checkpointing"]) for r in heard.reports})
    detail = "; ".join(f"{b}, {d} blocks{', checkpointed' if c else ''}" for b, d, c in kinds)
    more = {
        "train_peak_rss_bytes": max(r["peak_bytes"] for r in heard.reports),
        "train_s": sum(r["train_s"] for r in heard.reports),
        "payload_bytes_up": heard.bytes_up,
    }
    mean_cpu = statistics.mean(cpu) if cpu else None
    return Run(accuracy, wall_s, mean_cpu, heard.connected, ended, detail, more), proxies


def join_help() -> str:
    """The help of `edge-runtime join`, to know which flags this version has."""
    from edge_runtime.cli import parser as device_parser

    actions = device_parser()._subparsers
    assert actions is not None
    choices: Any = actions._group_actions[0].choices
    text: str = choices["join"].format_help()
    return text


class Heard:
    """What the processes of ours said."""

    def __init__(self) -> None:
        self.final = 0
        self.connected = 0.0  # when the last device was
        self.bytes_up: dict[str, int] = {}
        self.reports: list[dict[str, Any]] = []

    def follow(self, processes: Processes, begun: float) -> None:
        """Until the run is finished.

        Raises:
            EdgeError: a process ended, or it takes too long.
        """
        while time.monotonic() < begun + RUN_S:
            try:
                who, event = processes.events.get(timeout=0.5)
            except queue.Empty:
                continue
            kind = event["event"]
            if kind == "ended":
                raise EdgeError(f"the {who} ended: {processes.last_words(who)}")
            self.bytes_up[who] = event.get("bytes_up", self.bytes_up.get(who, 0))
            if kind == "connected":
                self.connected = time.monotonic()
            elif kind == "trained":
                self.reports.append(event)
                note(f"  round {event['round']}: {who} trained {event['steps']} steps in {event['train_s']:.0f} s")
            elif kind in ("nothing-fits", "declined", "training-failed"):
                note(f"  {who}: {kind}: {event.get('reason', '')}")
            elif kind == "round-published":
                note(f"  round {event['round']}: model {event['model_version']}, {time.monotonic() - begun:.0f} s")
            elif kind == "run-finished":
                self.final = event["model_version"]
                return
        raise EdgeError(f"the run took longer than {RUN_S:.0f} s")


class Proxy:
    """Passes TCP connections on to a port of this machine and counts their bytes."""

    def __init__(self, target: int) -> None:
        self.bytes_up = self.bytes_down = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                device, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # not there yet: the device tries again
                    device.close()
                    continue
                for source, sink, up in ((device, server, True), (server, device, False)):
                    threading.Thread(target=self._pass_on, args=(source, sink, up), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 16):
                with self._lock:
                    if up:
                        self.bytes_up += len(block)
                    else:
                        self.bytes_down += len(block)
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Sampler:
    """Looks at the memory of each device's processes again and again."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = devices
        self._samples: dict[str, list[tuple[float, int, int, int]]] = {device: [] for device in devices}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for device in self._devices:
                held = [memory_of(pid) for pid in bench.tagged(f"{DEVICE_TAG}={device}")]
                held = [one for one in held if one[0]]
                sums = (sum(peak for peak, _ in held), sum(now for _, now in held))
                self._samples[device].append((time.monotonic(), len(held), *sums))

    def peak(self, device: str) -> int:
        """The largest sum of the peaks of the processes that a device had at one moment."""
        return max((peak for _, _, peak, _ in self._samples[device]), default=0)

    def idle(self, begin: float, end: float) -> int | None:
        """What a device holds while nothing trains: `idle_of` between two moments."""
        within = [[s for s in of_device if begin <= s[0] <= end and s[1]] for of_device in self._samples.values()]
        return idle_of(within)


def idle_of(samples: Sequence[Sequence[tuple[float, int, int, int]]]) -> int | None:
    """The median of each device's samples with the fewest processes; the mean of the devices."""
    found = []
    for of_device in filter(None, samples):
        fewest = min(number for _, number, _, _ in of_device)
        found.append(statistics.median(now for _, number, _, now in of_device if number == fewest))
    return int(statistics.mean(found)) if found else None


def memory_of(pid: int) -> tuple[int, int]:
    """VmHWM and VmRSS of a process in bytes; zeros when it is gone."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS"):
                found[name] = int(value.split()[0]) * 1024
    return found.get("VmHWM", 0), found.get("VmRSS", 0)


if __name__ == "__main__":
    sys.exit(main())
