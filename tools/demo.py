"""The demo: broker, coordinator and devices as processes, each device under a memory limit, real model, real data.

Run it as `tools/demo`, which makes the environment first. Here are its options and the order in which things happen;
the processes are in `demo_processes.py`, what it shows in `demo_view.py`. Prints a line for each device and round, then
a table, the accuracy and three answers; `--json FILE` gets everything the table shows. May import everything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_coordinator.methods import METHODS
from edge_runtime.budget import parse_bytes
from edge_runtime.console import note, run_main, until_told_to_stop
from edge_runtime.errors import UsageError
from edge_runtime.predict import evaluate
from edge_runtime.split import dirichlet
from tools import datasets
from tools.demo_processes import Processes, export_model, start_devices, start_fleet
from tools.demo_view import DemoDevice, follow, show
from tools.limits import MemoryLimit
from tools.tfidf import sample, tfidf_accuracy

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
DEBIAN_ROWS = (5_000, 1_500)  # training and test examples used
MAX_LENGTH = 64  # tokens
PARITY_TEXTS = 32  # real texts on which an export is compared with torch
MIN_EXAMPLES = 8  # of a device


def main() -> int:
    """Parse and run; -> the exit code."""
    args = parser().parse_args()
    return run_main(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    """The demo's options."""
    made = argparse.ArgumentParser(
        prog="tools/demo",
        description="A fleet of devices with different memory finetunes a real transformer over a real MQTT broker.",
        epilog="examples:\n  tools/demo\n  tools/demo --rounds 10 --devices 2GB,2GB,2GB,2GB\n"
        "  tools/demo --data debian --method straggler --json out.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    data = "TREC questions (45 classes) or Debian packages (40 sections)"
    add("--data", choices=("trec", "debian"), default="trec", help=data)
    add("--model", default="minilm-l6", help="alias, folder or Hugging Face id (%(default)s)")
    add("--method", choices=list(METHODS), default="caff", help="(%(default)s)")
    devices = f"a number, or memory limits such as {','.join(DEVICE_LIMITS)} (the default's)"
    add("--devices", default="4", help=devices)
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--seed", type=int, default=1, help="(%(default)s)")
    add("--alpha", type=float, default=0.5, help="Dirichlet parameter of the split over devices (%(default)s)")
    add("--broker", choices=("amqtt", "mosquitto"), default="amqtt", help="(%(default)s)")
    add("--dir", type=Path, default=Path("demo-run"), help="where everything is written (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything that the table shows")
    return made


def run(args: argparse.Namespace) -> int:
    """The whole demo: data, fleet, first model, devices, rounds, last model, table."""
    started = time.monotonic()
    limits = device_limits(args.devices)
    folder = fresh_folder(args.dir)
    train, test = load(args.data, args.seed)
    tfidf = tfidf_accuracy(train, test)
    devices = make_devices(folder, train, limits, args)
    datasets.write_csv(test, folder / "test.csv")
    labels = sorted({row.label for row in [*train, *test]})
    samples = [row.text for row in test[:PARITY_TEXTS]]
    processes = Processes(folder)
    with until_told_to_stop() as keep_going:
        try:
            start_fleet(processes, args, labels, MAX_LENGTH, len(devices))
            before = export_model(folder, 1, "before", samples)
            accuracy_before = accuracy(before, test)
            start_devices(processes, {device.id: device.limit for device in devices})
            final = follow(processes, devices, keep_going)
        finally:
            processes.stop()
            for device in devices:
                device.limit.remove()
    after = export_model(folder, final, "after", samples)
    result: dict[str, Any] = {
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy(after, test),
        "tfidf_accuracy": tfidf,
        "rounds": args.rounds,
        "wall_s": round(time.monotonic() - started, 1),
        "devices": [device.record() for device in devices],
    }
    result["onnx"] = {
        "path": str(after["path"]),
        "bytes": after["num_bytes"],
        "accuracy": result["accuracy_after"],
        "max_abs_diff": after["max_abs_diff"],
    }
    show(result, devices, args.method, QUESTIONS[args.data])
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


def load(name: str, seed: int) -> tuple[list[datasets.Row], list[datasets.Row]]:
    """Training and test rows: all of TREC, a random part of Debian's packages."""
    data = datasets.load(name, note)
    train, test = data.train, data.test
    if name == "debian":
        train, test = sample(train, DEBIAN_ROWS[0], seed), sample(test, DEBIAN_ROWS[1], seed)
    classes = len({row.label for row in train})
    note(f"{len(train)} training and {len(test)} test examples, {classes} classes; {data.licence}")
    return train, test


def make_devices(
    folder: Path, train: Sequence[datasets.Row], limits: Sequence[int], args: argparse.Namespace
) -> list[DemoDevice]:
    """A memory limit and a skewed part of the training examples for each device."""
    labels = [row.label for row in train]
    parts = dirichlet(labels, len(limits), args.alpha, args.seed, min_examples=MIN_EXAMPLES)
    devices = []
    for i, (limit, part) in enumerate(zip(limits, parts, strict=True), 1):
        device = DemoDevice(f"device-{i}", MemoryLimit(f"demo-{i}", limit), len(part))
        datasets.write_csv([train[n] for n in part], folder / f"{device.id}.csv")
        devices.append(device)
    return devices


def accuracy(exported: Mapping[str, Any], test: Sequence[datasets.Row]) -> float:
    """Of an exported model on the test examples."""
    return evaluate(exported["path"], ((row.text, row.label) for row in test))


if __name__ == "__main__":
    sys.exit(main())
