"""`tools/bench methods`: methods beside each other in the simulator, under limits, on real data, over seeds.

A grid of methods x data x partitions x fleets x seeds. For each method, data set and partition the learning rate is chosen from
the same small grid, in the first of the fleets, on a fifth of the training rows and the first seed; with that rate each seed trains
on all of them and is tested. `full` is the reference that nothing limits. Each cell is a simulation's folder, so a bench that was
stopped goes on, and `edge-coordinator sim compare` reads the cells too. The grid is `bench_methods_grid.py`'s, the plots
`bench_methods_plot.py`'s; the methods' names are the coordinator's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_coordinator.methods import METHODS
from edge_coordinator.sim.choose import described
from edge_coordinator.sim.partition import parse_partition
from edge_coordinator.sim.progress import duration
from edge_runtime.console import INTERRUPTED, note, run_main, until_told_to_stop
from edge_runtime.errors import UsageError
from edge_runtime.store import cache_folder, lock_folder
from tools import bench_common as bench
from tools.bench_methods_grid import DATA, FLEETS, LIMITS, RATES, Cell, Grid, Scale, Setting, outcome, time_to

FIRST = ("caff", "lora", "hetlora", "straggler", "exclusive", "head", "full")  # those of them that there are
COLUMNS = {
    "name": "method",
    "setting": "data, partition, limits",
    "rate": "rate x",
    "accuracy": "accuracy",
    "spread": "+- over seeds",
    "weak_share": "on what the weakest class holds",
    "middle_share": "the middle one",
    "strong_share": "the strongest",
    "taking_part_share": "devices that took part",
    "virtual_time": "virtual time",
    "waiting_share": "of a round waited",
    "target_time": "to the target",
    "bytes_up": "sent",
    "peak_bytes": "device memory",
}


def main() -> int:
    """Parse and run; -> the exit code."""
    args = parser().parse_args()
    return run_main(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    """The bench's options."""
    what = "Methods beside each other in the simulator: thirds of a fleet under limits, real data, several seeds."
    made = bench.bench_parser(
        "methods", what, "--quick", "--methods caff,lora,exclusive --data trec --fleets memory", "--out docs/results", rows=False
    )  # fmt: skip
    add = made.add_argument
    add("--methods", default=",".join(n for n in FIRST if n in METHODS), help="of the coordinator's (%(default)s)")
    add("--data", default="trec,debian", help=f"of {', '.join(DATA)} (%(default)s)")
    add("--partitions", help="instead of each data set's own: " + ", ".join(f"{n} {p}" for n, (p, _) in DATA.items()))
    add("--fleets", default="memory,compute,upload", help=f"of {', '.join(FLEETS)} (%(default)s)")
    add("--seeds", type=bench.whole, default=3, help="runs, from --seed on (%(default)s)")
    add("--rates", default=",".join(f"{r:g}" for r in RATES), help="times the usual learning rates (%(default)s)")
    add("--models", default="minilm-l6", help="budgets are the first one's, caff runs on all (%(default)s)")
    add("--examples", type=bench.whole, default=5000, help="of training data, at most (%(default)s)")
    add("--devices", type=bench.whole, default=30, help="(%(default)s)")
    add("--goal", type=bench.whole, default=10, help="updates a round (%(default)s)")
    add("--rounds", type=bench.whole, default=15, help="(%(default)s)")
    add("--epochs", type=bench.whole, default=1, help="local epochs (%(default)s)")
    target = "accuracy to reach, in percent (default: the lowest among the methods of a table, `head` left out)"
    add("--target", type=float, metavar="PERCENT", help=target)
    add("--work", type=Path, help="folder of the cells (default: in the cache)")
    add("--page", default="methods", metavar="NAME", help="of the page in --out (%(default)s)")
    return made


def chosen(text: str, known: Sequence[str], flag: str) -> list[str]:
    """The names in a list, each of them known.

    Raises:
        UsageError: one is not.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"{flag}: there is no {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Every data set, partition and fleet that is asked for."""
    found = []
    for data in chosen(args.data, list(DATA), "--data"):
        for partition in args.partitions.split(",") if args.partitions else [DATA[data][0]]:
            parse_partition(partition)
            found += [Setting(data, partition, fleet) for fleet in chosen(args.fleets, FLEETS, "--fleets")]
    return found


def rates_of(text: str) -> list[float]:
    """The grid of learning rates.

    Raises:
        UsageError: no numbers above 0.
    """
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if not rates or not 0 < rates[0] <= rates[-1] <= 100:
        raise UsageError(f"--rates are numbers above 0, they are {text!r}")
    return rates


def small(args: argparse.Namespace) -> None:
    """--quick: minutes. What to compare stays as it was asked for."""
    usual = parser().parse_args([])
    if args.data == usual.data and not args.partitions:
        args.data, args.partitions = "trec-coarse", "iid"
    args.methods = "caff,exclusive,head" if args.methods == usual.methods else args.methods
    args.fleets = "memory" if args.fleets == usual.fleets else args.fleets
    args.seeds, args.rates = 1, "1"
    args.devices, args.goal, args.rounds, args.epochs, args.examples = 6, 6, 2, 1, 240


def run(args: argparse.Namespace) -> int:
    """Simulate what is not simulated yet, and write what came out."""
    if args.quick:
        small(args)
    methods, settings = chosen(args.methods, list(METHODS), "--methods"), settings_of(args)
    rates, models = rates_of(args.rates), list(dict.fromkeys(args.models.split(",")))
    if args.goal > args.devices:
        raise UsageError(f"--goal {args.goal} is more than --devices {args.devices}")
    scale = Scale(args.devices, args.goal, args.rounds, args.epochs, args.examples)
    work = args.work or cache_folder() / "bench" / "methods"
    work = work / f"{args.devices}.{args.goal}.{args.rounds}.{args.epochs}.{args.examples}"
    machine = bench.machine()
    with lock_folder(work, "a bench"), until_told_to_stop() as keep_going:
        grid = Grid(work, scale, models[0], note)
        try:
            rows, choices = measure(grid, Plan(settings, methods, models, rates, args.seed, args.seeds), keep_going)
        except KeyboardInterrupt:
            note("stopped; the same command goes on from here")
            return INTERRUPTED
    targets = reach(rows, None if args.target is None else args.target / 100)
    write(args, rows, choices, targets, machine)
    return bench.exit_code(rows)


class Plan:
    """The grid's axes."""

    def __init__(
        self, settings: Sequence[Setting], methods: Sequence[str], models: Sequence[str], rates: Sequence[float], first: int, seeds: int
    ) -> None:  # fmt: skip
        self.settings, self.models, self.rates = settings, models, rates
        self.seeds = range(first, first + seeds)
        others = [("caff", model) for model in models[1:]]
        self.rows = [(method, models[0]) for method in methods] + others

    def name(self, method: str, model: str) -> str:
        """A row's name."""
        return method if len(self.models) == 1 else f"{method}, {model}"

    def tried(self, setting: Setting, method: str, model: str) -> dict[float, Cell]:
        """Where a method's learning rate is chosen: for each rate a cell, the same for all fleets; none to choose: none."""
        if len(self.rates) < 2:
            return {}
        same = (s for s in self.settings if (s.data, s.partition) == (setting.data, setting.partition))
        where = unlimited(next(same), method)
        return {rate: Cell(where, model, method, rate, self.seeds[0], tuning=True) for rate in self.rates}

    def runs(self, setting: Setting, method: str, model: str, rate: float) -> dict[int, Cell]:
        """What is compared: for each seed a cell."""
        where = unlimited(setting, method)
        return {seed: Cell(where, model, method, rate, seed) for seed in self.seeds}

    def __len__(self) -> int:
        """Number of cells."""
        rows = [(setting, *row) for setting in self.settings for row in self.rows]
        tuning = {cell for row in rows for cell in self.tried(*row).values()}
        return len(tuning) + len({cell for row in rows for cell in self.runs(*row, self.rates[0]).values()})


def unlimited(setting: Setting, method: str) -> Setting:
    """The setting that a method is run in: `full` trains everything everywhere, whatever limits the others have."""
    return replace(setting, fleet="open") if method == "full" and setting.fleet in LIMITS else setting


def measure(
    grid: Grid, plan: Plan, keep_going: Callable[[], bool]
) -> tuple[list[bench.Row], dict[str, list[dict[str, Any]]]]:
    """-> (a row for each setting and method, CAFF's choice among the models for each setting)."""
    seen: set[Cell] = set()

    def finished(cell: Cell) -> dict[str, Any]:
        seen.add(cell)
        begun = grid.curve(cell)
        if begun is None:
            said = f"[{len(seen)}/{len(plan)}] {cell.setting.name}: {cell.method} on {cell.model}, rate x {cell.rate:g}, seed {cell.seed}"
            note(said + (", choosing the rate" if cell.tuning else ""))
            begun = grid.simulate(cell, shown, keep_going)
        return outcome(begun)

    rows, choices = [], {}
    for setting in plan.settings:
        if len(plan.models) > 1:
            choices[setting.name] = described(grid.candidates(setting, plan.models, plan.seeds[0]))
        for method, model in plan.rows:
            tried = {rate: finished(cell)["accuracy"] for rate, cell in plan.tried(setting, method, model).items()}
            rate = best_rate(tried) if tried else plan.rates[0]
            runs = {seed: finished(cell) for seed, cell in plan.runs(setting, method, model, rate).items()}
            rows.append(row(plan.name(method, model), setting, rate, tried, runs))
    return rows, choices


def shown(row: bench.Row) -> None:
    """A finished round."""
    if "closed_s" in row and row.get("accuracy") is not None:
        note(f"  round {row['round']}: accuracy {100 * row['accuracy']:.1f} %")


def best_rate(tried: dict[float, float]) -> float:
    """The rate of the best accuracy; of equals the one nearest to 1, then the smaller."""
    return min(tried, key=lambda rate: (-tried[rate], abs(rate - 1), rate))


def row(
    name: str, setting: Setting, rate: float, tried: dict[float, float], runs: dict[int, dict[str, Any]]
) -> bench.Row:
    """A method in a setting: means over seeds, the runs beside them."""
    found = list(runs.values())

    def mean(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return statistics.fmean(there) if there else None

    accuracies = [run["accuracy"] for run in found]
    peaks = [run["peak_bytes"] for run in found if run["peak_bytes"] is not None]
    return bench.make_row(
        name,
        accuracy=mean(accuracies),
        bytes_up=int(statistics.fmean(run["bytes_up"] for run in found)),
        peak_rss_bytes=None,  # nothing is measured on a device: what is promised is peak_bytes
        setting=setting.name,
        rate=rate,
        spread=f"{100 * statistics.stdev(accuracies):.1f} %" if len(accuracies) > 1 else "-",
        **{
            f"{place}_share": mean([run["accuracy_of"].get(kind) for run in found])
            for place, kind in zip(("weak", "middle", "strong"), setting.classes, strict=True)
        },
        classes=list(setting.classes),
        waiting_share=mean([run["waiting_share"] for run in found]),
        taking_part_share=mean([run["taking_part_share"] for run in found]),
        virtual_time=duration(statistics.fmean(run["virtual_s"] for run in found)),
        virtual_s=mean([run["virtual_s"] for run in found]),
        peak_bytes=max(peaks, default=None),
        rates_tried={f"{r:g}": accuracy for r, accuracy in tried.items()},
        runs=[{"seed": seed, **run} for seed, run in runs.items()],
    )


def reach(rows: Sequence[bench.Row], asked: float | None) -> dict[str, float]:
    """Add to each row when it reached its setting's target, the mean over its seeds; -> setting -> target.

    Where none is asked for it is the lowest accuracy that a row of the setting ends with, without `head`.
    """
    targets: dict[str, float] = {}
    for row in rows:
        others = [r["accuracy"] for r in rows if r["setting"] == row["setting"] and r["name"] != "head"]
        target = targets[row["setting"]] = asked if asked is not None else min(others, default=row["accuracy"])
        times = [time_to(run["points"], target) for run in row["runs"]]
        reached = [time for time in times if time is not None]
        row["target_s"] = statistics.fmean(reached) if len(reached) == len(times) else None
        row["target_time"] = "not by all seeds" if row["target_s"] is None else duration(row["target_s"])
    return targets


def notes(args: argparse.Namespace, choices: dict[str, list[dict[str, Any]]], targets: dict[str, float]) -> list[str]:
    """What one must know to read the table."""
    said = [
        f"{args.devices} virtual devices. Under memory, compute or upload limits a third each can train all blocks, two, or one, by budgets half "
        f"way between what so many blocks and one more need in the cost table of {args.models.split(',')[0]}; `jetson`: LEGEND's 30 TX2, 40 NX, "
        "10 AGX, or so many of a hundred, without limits.",
        f"{args.goal} updates a round, {args.rounds} rounds of {args.epochs} epoch(s). AdamW; a rate counts times 2e-4 in blocks, 2e-3 in head and adapters, "
        f"the same grid {args.rates} for every method, chosen under the first kind of limits on a fifth of the training rows with seed {args.seed}; then "
        f"{args.seeds} seed(s) on all of them. `full` is without limits in every table: what could be reached.",
        "Accuracy is the mean of the last two measured rounds of a run. Time is virtual and device memory is what plans promise (largest over devices): predicted, "
        "not measured. Accuracy on what a class holds: by label, weighted by how many examples of it the class's devices have. `of a round waited`: mean share of a "
        "round that a device waits for the slowest.",
        "Targets: "
        + "; ".join(f"{setting} {100 * target:.1f} %" for setting, target in targets.items())
        + ". The time to one is interpolated between measured rounds, mean over seeds.",
    ]
    for setting, rows in choices.items():
        picked = next((r["model"] for r in rows if r["chosen"]), "none")
        depths = ", ".join(f"{r['model']} {r['mean_depth']:.2f} of {r['blocks']}" for r in rows)
        said.append(f"CAFF's choice of architecture, {setting}: {picked} (mean blocks trained: {depths}).")
    return said


def write(
    args: argparse.Namespace, rows: list[bench.Row], choices: dict[str, Any], targets: dict[str, float], machine: dict[str, Any]
) -> None:  # fmt: skip
    """Table, JSON, page and plots."""
    bench.finish(
        "methods", args, rows, title="Methods in the simulator", columns=COLUMNS, notes=notes(args, choices, targets),
        versions=bench.versions(None), machine=machine, python=None, figures={"choices": choices, "targets": targets}, page=args.page,
    )  # fmt: skip
    if args.out:
        from tools.bench_methods_plot import draw_settings

        page, drawn = args.out / f"{args.page}.md", draw_settings(rows, args.out, args.page)
        images = "\n".join(f"![{name}]({path.name})\n" for name, path in drawn.items())
        page.write_text(page.read_text(encoding="utf-8") + "\n" + images, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
