"""`edge-coordinator sim` and `sim compare`: flags, and what they call. Imports the simulation when it runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edge_coordinator.sim import ENGINES
from edge_coordinator.sim.classes import BUILT_IN
from edge_coordinator.sim.partition import HELP
from edge_runtime.console import INTERRUPTED, Commands, new_parser, note, print_json, table, until_told_to_stop
from edge_runtime.errors import DoesNotFit, UsageError
from edge_runtime.store import lock_folder

if TYPE_CHECKING:
    from edge_coordinator.sim.making import SimOptions

_parser = partial(new_parser, exit_codes=(0, 2, 3, 4, 6, 8, 10, INTERRUPTED))
_nested_parser = partial(_parser, nested=True)


def add_sim(commands: Commands) -> None:
    """The command and its flags."""
    sim = _parser(
        commands,
        "sim",
        "Simulate a fleet on this machine: virtual devices of given classes, by a virtual clock. Goes on where it stopped.",
        "edge-coordinator init my-sim --labels-from train.csv --goal 20 --rounds 10",
        "edge-coordinator sim --fleet my-sim --data train.csv --test test.csv --devices 100 --classes pi-zero-2w:2,pi-4:1",
        "edge-coordinator sim --fleet my-sim --data debian.csv --partition by:maintainer --classes pi-5",
        "edge-coordinator sim compare my-sim other-sim --target 0.8",
    )
    _device_flags(sim)
    sim.add_argument("--test", type=Path, help="labelled texts to measure accuracy on")
    sim.add_argument(
        "--dropout", type=float, default=0.0, metavar="P", help="probability that a device vanishes after its plan"
    )
    sim.add_argument(
        "--evaluate-every", type=int, default=1, metavar="K", help="rounds between two looks at --test (%(default)s)"
    )
    sim.add_argument("--workers", type=int, help="trainings at a time (default: one for each core)")
    sim.add_argument(
        "--engine",
        default="local",
        choices=ENGINES,
        help="where trainings run: this machine, or Ray's cluster (%(default)s)",
    )
    sim.set_defaults(run=run_sim)
    nested = sim.add_subparsers(metavar="[compare]", title="commands")
    compare = _nested_parser(
        nested,
        "compare",
        "Print simulations side by side.",
        "edge-coordinator sim compare caff straggler --target 0.8",
        "edge-coordinator sim compare caff straggler --plot accuracy.png",
    )
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a simulation")
    compare.add_argument("--target", type=float, help="accuracy from 0 to 1: show when each run reached it")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy over virtual time (needs matplotlib)")
    compare.set_defaults(run=run_compare)
    choose = _nested_parser(
        nested,
        "choose",
        "Say which of several networks the devices should train: the one of which they can train most blocks (CAFF).",
        "edge-coordinator sim choose minilm-l3 minilm-l6 --fleet my-sim --data train.csv --devices 100 --classes pi-3:2,pi-4:1",
    )
    choose.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="alias, checkpoint folder or Hugging Face id; all of fleet.toml's family",
    )
    _device_flags(choose)
    choose.set_defaults(run=run_choose)


def _device_flags(command: argparse.ArgumentParser) -> None:
    """The fleet, its data and its devices."""
    command.add_argument("--fleet", type=Path, default=Path(), help="folder with fleet.toml (default: this one)")
    command.add_argument("--data", type=Path, help="labelled texts, divided over the devices")
    command.add_argument(
        "--devices", type=int, metavar="N", help="how many (with by:COLUMN default: all values, else the largest N)"
    )
    command.add_argument(
        "--classes",
        default="pi-4",
        metavar="NAME:SHARE,...",
        help=f"device classes (%(default)s): {', '.join(BUILT_IN)}",
    )
    command.add_argument("--class-file", type=Path, metavar="TOML", help="more classes, see docs/simulation.md")
    command.add_argument("--partition", default="iid", help=f"(%(default)s) {HELP}")
    command.add_argument("--text-column", default="text")
    command.add_argument("--label-column", default="label")
    command.add_argument("--encoding", help="of the files (default: UTF-8, or what the byte order mark says)")
    command.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used")
    command.add_argument("--threads", type=int, default=1, help="of one training (%(default)s)")


def _options(args: argparse.Namespace) -> SimOptions:
    from edge_coordinator.sim.making import SimOptions
    from edge_runtime.local import DataOptions

    if args.data is None:
        raise UsageError("--data is missing: the labelled texts that are divided over the devices")
    reading = DataOptions(args.text_column, args.label_column, args.encoding, "skip" if args.skip_bad_rows else "error")
    return SimOptions(
        data=args.data, devices=args.devices, classes=args.classes, class_file=args.class_file, partition=args.partition,
        threads=args.threads, reading=reading,
    )  # fmt: skip


def run_sim(args: argparse.Namespace) -> int:
    """Simulate the run of fleet.toml to its end, or on from where it was left."""
    from edge_coordinator.config import load_config
    from edge_coordinator.sim.progress import Progress
    from edge_coordinator.sim.simulation import Simulation

    options = replace(
        _options(args), test=args.test, dropout=args.dropout, evaluate_every=args.evaluate_every, workers=args.workers, engine=args.engine
    )  # fmt: skip
    rounds = load_config(args.fleet).run.rounds
    with lock_folder(args.fleet, "a coordinator"), until_told_to_stop() as keep_going:
        simulation = Simulation(
            args.fleet, options, progress=Progress(rounds, args.json), say=note, keep_going=keep_going
        )
        try:
            simulation.run()
        except KeyboardInterrupt:
            note("stopped; the same command goes on from here")
            return INTERRUPTED
    if not args.json:
        _print([args.fleet], None, as_json=False)
    if simulation.num_published:
        return 0
    note("no round was published: see `reason` in devices.csv")
    return DoesNotFit.exit_code


def run_compare(args: argparse.Namespace) -> int:
    """Print the runs side by side; with --plot draw them too."""
    if args.target is not None and not 0 < args.target <= 1:
        raise UsageError(f"--target must be above 0 and at most 1, it is {args.target}")
    if args.plot is not None:
        from edge_coordinator.sim.compare import plot

        plot(args.runs, args.plot)
    _print(args.runs, args.target, as_json=args.json)
    return 0


def run_choose(args: argparse.Namespace) -> int:
    """Print what the devices could train of each network, and which is CAFF's choice."""
    from edge_coordinator.config import load_config
    from edge_coordinator.sim.choose import candidate, described

    config, options = load_config(args.fleet), _options(args)
    rows = described([candidate(model, config, options, note) for model in dict.fromkeys(args.models)])
    if args.json:
        print_json(rows)
        return 0
    header = ["network", "blocks", "blocks trained, mean", "least", "devices by depth", "held back by", ""]
    cells = [
        [str(r["model"]), str(r["blocks"]), f"{r['mean_depth']:.2f}", str(r["least_depth"]),
         ", ".join(f"{depth}: {count}" for depth, count in r["devices_by_depth"].items()),
         ", ".join(f"{budget}: {count}" for budget, count in r["held_by"].items()), "chosen" if r["chosen"] else ""]
        for r in rows
    ]  # fmt: skip
    print(table(header, cells))
    if not any(r["chosen"] for r in rows):
        print("none: of each of them some device cannot train a block")
    return 0


def _print(runs: list[Path], target: float | None, *, as_json: bool) -> None:
    from edge_coordinator.sim.compare import summarise, text_table

    rows = [summarise(run, target) for run in runs]
    if as_json:
        print_json(rows)
    else:
        print(text_table(rows, target))
