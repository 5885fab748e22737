"""The demo: broker, coordinator and devices as processes, each device under a memory limit, real model, real data.

Run it as `tools/demo`, which makes the environment first. Prints a line for each device and round, then a table, the
accuracy and three answers; `--json FILE` gets everything the table shows.
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_coordinator.fleet import init
from edge_coordinator.methods import METHODS
from edge_runtime.budget import AGENT_RESERVE_BYTES, parse_bytes
from edge_runtime.console import note, run_main, table, until_told_to_stop
from edge_runtime.errors import EdgeError, TrainingFailed, UsageError
from edge_runtime.planner import mib
from edge_runtime.predict import Predictor, evaluate
from edge_runtime.split import dirichlet
from tools import datasets
from tools.limits import MemoryLimit
from tools.tfidf import tfidf_accuracy

DEVICE_LIMITS = ("450MB", "600MB", "800MB", "1200MB")
MARKER = ".edge-demo"
QUESTIONS = {
    "trec": ("Where is the Louvre ?", "Who wrote Pride and Prejudice ?", "How many people live in Iceland ?"),
    "debian": (
        "multiplayer platform game in a medieval castle",
        "library for reading and writing compressed archives in Haskell",
        "command line tool to watch network traffic and find who uses the bandwidth",
    ),
}
LIMITS = {"trec": (4_300, 1_100), "debian": (5_000, 1_500)}  # training and test examples used
MAX_LENGTH = {"trec": 64, "debian": 64}


@dataclass
class DemoDevice:
    """One device of the demo and what became of it."""

    id: str
    limit: MemoryLimit
    num_examples: int
    process: subprocess.Popen[str] | None = None
    depth: int | None = None
    checkpointing: bool = False
    promised: int = 0
    peak: int = 0
    train_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    committed: int = 0
    model_version: int = 0
    activity: str = "starting"

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {
            "id": self.id,
            "memory_limit_bytes": self.limit.limit_bytes,
            "num_examples": self.num_examples,
            "depth": self.depth,
            "checkpointing": self.checkpointing,
            "peak_bytes_promised": self.promised,
            "peak_bytes_measured": self.peak,
            "train_s": round(self.train_s, 3),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "updates_committed": self.committed,
        }


@dataclass
class Demo:
    """The processes and what they say."""

    folder: Path
    port: int
    broker: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    events: queue.Queue[tuple[str, dict[str, Any]]] = field(default_factory=queue.Queue)

    def start(self, who: str, command: list[str]) -> subprocess.Popen[str]:
        """Run a command whose output is JSON lines; its errors go to a log file."""
        log = (self.folder / f"{who}.log").open("w")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        log.close()
        self.processes.append(process)
        threading.Thread(target=self._read, args=(who, process), daemon=True).start()
        return process

    def _read(self, who: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            try:
                self.events.put((who, json.loads(line)))
            except ValueError:
                continue
        self.events.put((who, {"event": "ended"}))

    def wait_for(self, who: str, event: str, seconds: float) -> dict[str, Any]:
        """The next event of one kind."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                source, found = self.events.get(timeout=0.2)
            except queue.Empty:
                continue
            if source == who and found["event"] == event:
                return found
            if source == who and found["event"] == "ended":
                break
        raise TrainingFailed(f"the {who} did not start: {self.last_words(who)}")

    def last_words(self, who: str) -> str:
        """The end of a process's log."""
        lines = (self.folder / f"{who}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"see {self.folder / who}.log"

    def stop(self) -> None:
        """End every process, the newest first."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Lines:
    """One live line for each device and round: rewritten on a terminal, printed once when complete elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown = 0

    def update(self, round_: int, devices: list[DemoDevice]) -> None:
        """Redraw the present round's lines."""
        if not self._live:
            return
        sys.stdout.write(f"\x1b[{self._shown}A" if self._shown else "")
        for device in devices:
            sys.stdout.write(f"\r\x1b[K  round {round_}  {device.id:10} {device.activity[:90]}\n")
        self._shown = len(devices)
        sys.stdout.flush()

    def done(self, round_: int, device: DemoDevice) -> None:
        """A device has finished its part."""
        if not self._live:
            print(f"  round {round_}  {device.id:10} {device.activity}", flush=True)

    def keep(self) -> None:
        """Leave the lines as they are; the next round begins below."""
        self._shown = 0


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="tools/demo",
        description="A fleet of devices with different memory finetunes a real transformer over a real MQTT broker.",
        epilog="examples:\n  tools/demo\n  tools/demo --rounds 10 --devices 2GB,2GB,2GB,2GB\n  tools/demo --data debian --method straggler --json out.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        choices=("trec", "debian"),
        default="trec",
        help="TREC questions (45 classes) or Debian packages (40 sections)",
    )
    parser.add_argument("--model", default="minilm-l6", help="alias, folder or Hugging Face id (%(default)s)")
    parser.add_argument("--method", choices=list(METHODS), default="caff", help="(%(default)s)")
    parser.add_argument(
        "--devices", default="4", help=f"a number, or memory limits such as {','.join(DEVICE_LIMITS)} (the default's)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="Dirichlet parameter of the split over devices (%(default)s)"
    )
    parser.add_argument("--broker", choices=("amqtt", "mosquitto"), default="amqtt", help="(%(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("demo-run"), help="where everything is written (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that the table shows")
    args = parser.parse_args()
    return run_main(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """The whole demo."""
    started = time.monotonic()
    limits = device_limits(args.devices)
    folder = fresh_folder(args.dir)
    data = datasets.load(args.data, note)
    train, test = data.train, data.test
    if args.data == "debian":
        from tools.tfidf import sample

        train, test = sample(train, LIMITS["debian"][0], args.seed), sample(test, LIMITS["debian"][1], args.seed)
    note(
        f"{len(train)} training and {len(test)} test examples, {len({r.label for r in train})} classes; {data.licence}"
    )
    tfidf = tfidf_accuracy(train, test)
    parts = dirichlet([row.label for row in train], len(limits), args.alpha, args.seed, min_examples=8)
    devices = [
        DemoDevice(f"device-{i}", MemoryLimit(f"demo-{i}", limit), len(part))
        for i, (limit, part) in enumerate(zip(limits, parts, strict=True), 1)
    ]
    datasets.write_csv(test, folder / "test.csv")
    for device, part in zip(devices, parts, strict=True):
        datasets.write_csv([train[i] for i in part], folder / f"{device.id}.csv")
    demo = Demo(folder, free_port(), args.broker)
    result: dict[str, Any] = {}
    with until_told_to_stop() as keep_going:
        try:
            labels = tuple(sorted({row.label for row in [*train, *test]}))
            start_fleet(demo, args, labels, len(devices))
            before = export(folder, 1, "before", test_texts(test))
            result["accuracy_before"] = evaluate(before["path"], ((r.text, r.label) for r in test))
            start_devices(demo, devices)
            final = follow(demo, devices, args.rounds, keep_going)
        finally:
            demo.stop()
            for device in devices:
                device.limit.remove()
    after = export(folder, final, "after", test_texts(test))
    accuracy = evaluate(after["path"], ((r.text, r.label) for r in test))
    result |= {
        "accuracy_after": accuracy,
        "tfidf_accuracy": tfidf,
        "rounds": args.rounds,
        "wall_s": round(time.monotonic() - started, 1),
        "devices": [device.record() for device in devices],
        "onnx": {
            "path": str(after["path"]),
            "bytes": after["num_bytes"],
            "accuracy": accuracy,
            "max_abs_diff": after["max_abs_diff"],
        },
    }
    show(result, devices, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def device_limits(text: str) -> list[int]:
    """ "4" or "450MB,600MB" -> bytes of each device."""
    if text.isdigit():
        if not 1 <= int(text) <= 64:
            raise UsageError(f"--devices must be 1 to 64 or a list of memory limits, it is {text}")
        return [parse_bytes(DEVICE_LIMITS[i % len(DEVICE_LIMITS)]) for i in range(int(text))]
    return [parse_bytes(part) for part in text.split(",")]


def fresh_folder(folder: Path) -> Path:
    """An empty folder; a former demo's is cleared, anything else is refused."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise UsageError(f"{folder} is not empty and no former demo: name another with --dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder.absolute()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_texts(rows: list[datasets.Row]) -> list[str]:
    """Real texts for the export's parity check."""
    return [row.text for row in rows[:32]]


def start_fleet(demo: Demo, args: argparse.Namespace, labels: tuple[str, ...], num_devices: int) -> None:
    """fleet.toml, credentials, broker and coordinator."""
    fleet = demo.folder / "fleet"
    path = init(
        fleet, name="demo", base=args.model, labels=labels, max_length=MAX_LENGTH[args.data], method=args.method, rounds=args.rounds,
        goal=num_devices, quorum=1, seed=args.seed, port=demo.port,
    )  # fmt: skip
    if args.broker == "mosquitto":
        path.write_text(path.read_text().replace('kind = "embedded"', 'kind = "external"'))
        demo.start(
            "broker", command("edge_coordinator.cli", "broker", "--fleet", str(fleet), "--kind", "mosquitto", "--json")
        )
        demo.wait_for("broker", "listening", 20)
    names = [f"device-{i}" for i in range(1, num_devices + 1)]
    subprocess.run(
        command("edge_coordinator.cli", "enroll", *names, "--fleet", str(fleet)), check=True, stdout=subprocess.DEVNULL
    )
    note(f"starting the {args.broker} broker and the coordinator")
    demo.start("coordinator", command("edge_coordinator.cli", "serve", "--fleet", str(fleet), "--json"))
    demo.wait_for("coordinator", "serving", 120)


def start_devices(demo: Demo, devices: list[DemoDevice]) -> None:
    """Each device as a process of its own, within its limit."""
    for device in devices:
        program = command(
            "edge_runtime.cli", "join", "--config", str(demo.folder / "fleet" / "devices" / f"{device.id}.toml"), "--data",
            str(demo.folder / f"{device.id}.csv"), "--state", str(demo.folder / device.id), "--threads", "1", "--json",
        )  # fmt: skip
        if not device.limit.enforced:  # then the training process alone is held to what the device would leave it
            program += ["--memory", str(max(1, device.limit.limit_bytes - AGENT_RESERVE_BYTES))]
        device.process = demo.start(device.id, device.limit.command(program))
    kept = (
        "by a cgroup each" if devices[0].limit.enforced else "by a watchdog only: this machine allows no cgroups here"
    )
    note(f"{len(devices)} devices, memory limits kept {kept}")


def command(module: str, *arguments: str) -> list[str]:
    """A command line of ours under this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def follow(demo: Demo, devices: list[DemoDevice], rounds: int, keep_going: Any) -> int:
    """Show what happens until the run is finished and every device holds the final model; -> its version."""
    by_id = {device.id: device for device in devices}
    lines = Lines()
    round_, final, deadline = 1, 0, time.monotonic() + 3600
    while keep_going() and time.monotonic() < deadline:
        try:
            who, event = demo.events.get(timeout=0.2)
        except queue.Empty:
            continue
        kind = event["event"]
        if kind == "ended":
            raise TrainingFailed(f"the {who} ended: {demo.last_words(who)}")
        if who in by_id:
            device_event(by_id[who], event, lines)
        elif kind == "round-opened":
            round_ = event["round"]
            lines.keep()
        elif kind == "committed":
            by_id[event["device"]].committed += 1
        elif kind == "round-published":
            lines.update(round_, devices)
            lines.keep()
            print(
                f"round {event['round']}: model {event['model_version']} from {len(event['members'])} devices, mean training loss {event['mean_loss']:.3f}",
                flush=True,
            )
        elif kind == "round-failed":
            print(f"round {event['round']} failed: {event['reason']}", flush=True)
        elif kind == "run-finished":
            final, deadline = event["model_version"], time.monotonic() + 120
        lines.update(round_, devices)
        if final and all(d.model_version == final for d in devices):
            return final
    if final:
        return final
    raise KeyboardInterrupt


def device_event(device: DemoDevice, event: dict[str, Any], lines: Lines) -> None:
    """What a device says of itself."""
    kind = event["event"]
    device.bytes_up = event.get("bytes_up", device.bytes_up)
    device.bytes_down = event.get("bytes_down", device.bytes_down)
    if kind == "training":
        device.depth, device.checkpointing, device.promised = (
            event["depth"],
            event["checkpointing"],
            event["peak_bytes_promised"],
        )
        device.activity = f"depth {device.depth}: training, {event['steps']} steps"
    elif kind == "step":
        device.activity = f"depth {device.depth}: step {event['step']}/{event['steps']}, loss {event['loss']:.3f}"
    elif kind == "trained":
        device.peak = max(device.peak, event["peak_bytes"])
        device.train_s += event["train_s"]
        device.activity = (
            f"depth {event['depth']}{' checkpointed' if event['checkpointing'] else ''}: loss {event['first_loss']:.3f} -> {event['last_loss']:.3f} "
            f"in {event['train_s']:.0f} s, peak {mib(event['peak_bytes'])} of {mib(event['promised_peak_bytes'])} promised"
        )
    elif kind == "committed":
        lines.done(event["round"], device)
    elif kind == "model":
        device.model_version = event["model_version"]
    elif kind == "fetching":
        device.activity = f"fetching model {event['model_version']}, {mib(event['num_bytes'])}"
    elif kind in ("nothing-fits", "declined", "excluded", "training-failed", "problem", "storage-error"):
        device.activity = f"{kind}: {event.get('reason', '')}"
        lines.done(event.get("round", 0), device)


def export(folder: Path, version: int, name: str, samples: list[str]) -> dict[str, Any]:
    """A model version as ONNX, in processes of their own, as a user would."""
    note(f"exporting model {version} to ONNX")
    fleet, checkpoint, out = folder / "fleet", folder / name, folder / f"{name}.onnx"
    texts = folder / "samples.jsonl"
    texts.write_text("".join(json.dumps({"text": text, "label": "-"}) + "\n" for text in samples))
    subprocess.run(
        command(
            "edge_coordinator.cli", "models", "--fleet", str(fleet), "--export", str(version), "--out", str(checkpoint)
        ),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    made = subprocess.run(
        command("edge_runtime.cli", "export", str(checkpoint), "--out", str(out), "--data", str(texts), "--json"),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if made.returncode:
        raise EdgeError(f"the export of model {version} failed")
    report: dict[str, Any] = json.loads(made.stdout)
    return report


def show(result: dict[str, Any], devices: list[DemoDevice], args: argparse.Namespace) -> None:
    """The table, the accuracy, three answers."""
    print()
    rows = [
        [
            d.id,
            mib(d.limit.limit_bytes),
            str(d.num_examples),
            "-" if d.depth is None else f"{d.depth}{' ckpt' if d.checkpointing else ''}",
            mib(d.promised) if d.promised else "-",
            mib(d.peak) if d.peak else "-",
            f"{d.train_s:.1f}",
            mib(d.bytes_up),
            mib(d.bytes_down),
            str(d.committed),
        ]
        for d in devices
    ]
    print(
        table(
            [
                "device",
                "limit",
                "examples",
                "depth",
                "peak promised",
                "peak measured",
                "train s",
                "sent",
                "received",
                "updates",
            ],
            rows,
        )
    )
    onnx = result["onnx"]
    print(
        f"\ntest accuracy: {100 * result['accuracy_before']:.1f} % before, {100 * result['accuracy_after']:.1f} % after {args.rounds} rounds of {args.method}; TF-IDF with a linear model {100 * result['tfidf_accuracy']:.1f} %"
    )
    print(
        f"{onnx['path']}: {mib(onnx['bytes'])}, logits within {onnx['max_abs_diff']:.1e} of torch; {result['wall_s']:.0f} s in all\n"
    )
    for text, found in zip(QUESTIONS[args.data], Predictor(onnx["path"]).predict(QUESTIONS[args.data]), strict=True):
        print(f"  {text}\n    -> {found.label}  ({100 * found.probability:.1f} %)")


if __name__ == "__main__":
    sys.exit(main())
