"""What `tools/bench methods` simulates: the cells of its grid, each a simulation's folder, and fleets under limits.

A fleet's thirds are what they are called because their budgets come from the cost table of the very model: for a device that
is to train d blocks, half way between what d and d + 1 blocks need. That CAFF's plan has these depths is checked.
"""

from __future__ import annotations

import csv
import random
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_coordinator.config import CONFIG_FILE, load_config
from edge_coordinator.fleet import init
from edge_coordinator.sim.choose import Candidate, candidate, depth_of, planned
from edge_coordinator.sim.classes import OwnBudget
from edge_coordinator.sim.devices import Plans, VirtualDevice
from edge_coordinator.sim.making import SimOptions
from edge_coordinator.sim.results import Row, read_results
from edge_coordinator.sim.simulation import Simulation
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.records import TrainSettings
from edge_runtime.split import train_test
from edge_runtime.store import atomic_writer, lock_folder, make_folder
from tools import datasets

LIMITS = ("memory", "compute", "upload")
FLEETS = (*LIMITS, "open", "jetson")
BLOCKS = {"one": 1, "two": 2, "all": None}  # classes, from weak to strong: the blocks that a device of it can train
GFLOPS = {"one": 10.2, "two": 12.2, "all": 23.8}  # as a Pi Zero 2 W, 3 and 4 (docs/simulation.md)
JETSON = {"jetson-tx2": 30, "jetson-nx": 40, "jetson-agx": 10}  # LEGEND's fleet (arXiv 2412.20004), from weak to strong
OPEN_MEMORY = 64 << 30
RATES = (0.5, 1.0, 2.0)  # times the learning rates of blocks, head and adapters, alike for every method
DATA = {  # the partition that is usual for it, and the tokens that its texts are cut to
    "trec": ("dirichlet:0.5", 32),
    "trec-coarse": ("strength:0.1", 32),
    "debian": ("by:group", 32),
    "newsgroups": ("shards:2", 128),
}
HEAVY = (
    "store",
    "updates",
    "optimizer",
    "residual",
    "work",
)  # of a cell that is finished: 0.3 GB, and only results are asked for
VALIDATION_SHARE = 0.2  # of the training rows, on which learning rates are chosen
TEST_ROWS = 1500  # at most: a standard error of about a point
EVALUATE_EVERY = 3  # rounds between two points of a curve
LAST = 2  # of them whose mean is a run's accuracy: from round to round it swings by some points


class WrongThirds(EdgeError):
    """A device of the fleet cannot be limited to the blocks that its class is named after."""


@dataclass(frozen=True)
class Scale:
    """How large each simulation is."""

    devices: int
    goal: int
    rounds: int
    epochs: int
    rows: int  # of training data, at most


@dataclass(frozen=True)
class Setting:
    """What all methods of one comparison share."""

    data: str
    partition: str
    fleet: str

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.data}, {self.partition}, {self.fleet}"

    @property
    def classes(self) -> dict[str, float]:
        """The fleet's device classes, from weak to strong, and their shares."""
        return dict(JETSON) if self.fleet == "jetson" else dict.fromkeys(BLOCKS, 1)

    @property
    def slug(self) -> str:
        """For file names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name)


@dataclass(frozen=True)
class Cell:
    """One simulation. `tuning`: on a part of the training rows, tested on the rest of them."""

    setting: Setting
    model: str
    method: str
    rate: float
    seed: int
    tuning: bool = False

    @property
    def folder(self) -> str:
        """Below the bench's folder."""
        model = re.sub(r"[^a-z0-9]+", "-", self.model.lower()).strip("-")
        return f"{self.setting.slug}/{model}.{self.method}.x{self.rate:g}.seed{self.seed}{'.tuning' if self.tuning else ''}"


class Grid:
    """The cells on this disk. Nothing is simulated twice."""

    def __init__(self, work: Path, scale: Scale, limits_of: str, say: Callable[[str], None]) -> None:
        """Args: limits_of: the model whose cost table gives the budgets."""
        self.work, self.scale, self.limits_of, self._say = work, scale, limits_of, say

    def curve(self, cell: Cell) -> list[Row] | None:
        """The rounds of a cell that is finished, else None."""
        try:
            rows = read_results(self.work / cell.folder)[1]
        except UsageError:
            return None
        return rows if rows and rows[-1]["round"] >= self.scale.rounds else None

    def simulate(self, cell: Cell, progress: Callable[[Row], None], keep_going: Callable[[], bool]) -> list[Row]:
        """Begin a cell, or go on with it; -> its rounds.

        Raises:
            KeyboardInterrupt: `keep_going` turned False; the same call goes on from there.
            EdgeError: as its kind says.
        """
        folder, options = self._fleet(cell)
        with lock_folder(folder, "a coordinator"):
            Simulation(folder, options, progress=progress, say=lambda line: None, keep_going=keep_going).run()
        rows = self.curve(cell)
        assert rows, "it has run to its end"
        for name in HEAVY:
            shutil.rmtree(folder / name, ignore_errors=True)
        return rows

    def candidates(self, setting: Setting, models: Sequence[str], seed: int) -> list[Candidate]:
        """What the setting's devices can train of each network, under the same budgets."""
        folder, options = self._fleet(Cell(setting, self.limits_of, "caff", 1.0, seed))
        return [candidate(model, load_config(folder), options, self._say) for model in models]

    def _fleet(self, cell: Cell) -> tuple[Path, SimOptions]:
        """The cell's folder with fleet.toml and classes, made once, and its options."""
        folder, scale, setting = self.work / cell.folder, self.scale, cell.setting
        train, test = self._files(setting.data, cell.tuning)
        classes, base = folder / "classes.toml", folder / "classes.base.toml"
        shares = ",".join(name if share == 1 else f"{name}:{share:g}" for name, share in setting.classes.items())
        options = SimOptions(
            train, test, scale.devices, shares, classes, setting.partition, evaluate_every=EVALUATE_EVERY, workers=None
        )
        if classes.exists():  # it is written last
            return folder, options
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        init(
            folder, name="bench", base=cell.model, labels=_labels(train), max_length=DATA[setting.data][1], method=cell.method,
            rounds=scale.rounds, goal=scale.goal, quorum=1, seed=cell.seed,
        )  # fmt: skip
        _set(folder / CONFIG_FILE, _settings(cell.rate, scale.epochs))
        own: Mapping[str, OwnBudget] = {}
        base.write_text(class_file(own))
        if setting.fleet in LIMITS:
            config = load_config(folder)
            config = replace(config, train=replace(config.train, lora_rank=0))
            plans, devices = planned(self.limits_of, config, replace(options, class_file=base), self._say)
            own = budgets(plans, devices, config.train, setting.fleet)
        with atomic_writer(classes) as file:
            file.write(class_file(own).encode())
        return folder, options

    def _files(self, name: str, tuning: bool) -> tuple[Path, Path]:
        """Training and test rows of a data set as files, made once."""
        folder = self.work / "data" / f"{name}.{self.scale.rows}"
        names = ("fit", "check") if tuning else ("train", "test")
        paths = (folder / f"{names[0]}.csv", folder / f"{names[1]}.csv")
        if not all(path.exists() for path in paths):
            make_folder(folder)
            found = datasets.load(name, self._say)
            rows = some(found.train, self.scale.rows)
            known = {row.label for row in rows}
            test = some([row for row in found.test if row.label in known], min(self.scale.rows, TEST_ROWS))
            fit, check = train_test(rows, VALIDATION_SHARE, 0)
            made = {"train": rows, "test": test, "fit": fit, "check": check}
            for part, part_rows in made.items():
                datasets.write_csv(part_rows, folder / f"{part}.csv")
        return paths


def some(rows: Sequence[datasets.Row], most: int) -> list[datasets.Row]:
    """At most so many of them, always the same."""
    return list(rows) if len(rows) <= most else random.Random(0).sample(rows, most)


def _labels(path: Path) -> list[str]:
    """Of all training rows, also where only a part of them is trained on."""
    with path.with_name("train.csv").open(newline="", encoding="utf-8") as file:
        return sorted({row["label"] for row in csv.DictReader(file)})


def _settings(rate: float, epochs: int) -> dict[str, str]:
    usual = TrainSettings()
    rates = ("learning_rate", "head_learning_rate", "adapter_learning_rate")
    return {**{key: f"{getattr(usual, key) * rate:g}" for key in rates}, "epochs": str(epochs), "overselection": "1.0"}


def _set(path: Path, values: Mapping[str, str]) -> None:
    """Other values for keys of a fleet.toml."""
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        text, found = re.subn(rf"^{key} = \S+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    path.write_text(text, encoding="utf-8")


def budgets(
    plans: Plans, devices: Sequence[VirtualDevice], settings: TrainSettings, fleet: str
) -> dict[str, OwnBudget]:
    """A budget for each device of a limited class, such that it can train just the blocks that the class is named after.

    Raises:
        WrongThirds: one cannot, since its data make the costs of two depths too much alike.
    """
    found = {}
    for device in devices:
        blocks = BLOCKS[device.kind.name]
        if blocks is not None and blocks < plans.spec.num_blocks:
            found[device.name] = _between(plans, device, settings, fleet, blocks)
    for device in devices:
        limited = replace(device, own=found.get(device.name))
        wanted, depth = BLOCKS[device.kind.name] or plans.spec.num_blocks, depth_of(plans, limited, settings)
        if depth != min(wanted, plans.spec.num_blocks):
            raise WrongThirds(
                f"{device.name} of class {device.kind.name}, with {device.data.num_examples} examples, can train {depth} blocks "
                f"under {fleet} limits: take fewer devices, or another partition"
            )
    return found


def _between(plans: Plans, device: VirtualDevice, settings: TrainSettings, fleet: str, blocks: int) -> OwnBudget:
    """Half way between the least that this many blocks need, and one more."""
    scarce = replace(device, own=OwnBudget(memory_bytes=1)) if fleet == "memory" else device  # rows of least memory
    rows, _ = plans.table(scarce, settings, "")
    if max(row.depth for row in rows) <= blocks:
        raise WrongThirds(f"this machine could not measure what {blocks + 1} blocks need: free memory, and begin again")

    def needs(depth: int) -> float:
        of_depth = [row for row in rows if row.depth == depth]
        if fleet == "memory":
            return min(row.peak_bytes for row in of_depth)
        if fleet == "compute":
            return min(row.total_s(settings.epochs) for row in of_depth)
        return min(row.upload_bytes for row in of_depth)

    middle = (needs(blocks) + needs(blocks + 1)) / 2
    return {
        "memory": OwnBudget(memory_bytes=int(middle)),
        "compute": OwnBudget(time_s=middle),
        "upload": OwnBudget(upload_bytes=int(middle)),
    }[fleet]


def class_file(own: Mapping[str, OwnBudget]) -> str:
    """The classes, and the devices that have budgets of their own, as the simulator reads them."""
    lines = [f"[{name}]\nmemory = {OPEN_MEMORY}\ngflops = {gflops}\n" for name, gflops in GFLOPS.items()]
    for device, budget in own.items():
        values = {
            "memory": f"{budget.memory_bytes}B" if budget.memory_bytes else "",
            "time": f"{budget.time_s:.9f}s" if budget.time_s else "",
            "upload": f"{budget.upload_bytes}B" if budget.upload_bytes else "",
        }
        lines.append(f"[{device}]\n" + "".join(f'{key} = "{value}"\n' for key, value in values.items() if value))
    return "\n".join(lines)


def outcome(rows: Sequence[Row]) -> dict[str, Any]:
    """A finished cell in numbers: accuracies of the last rounds, sums, and a point for each round that was measured.

    Times are virtual seconds; peaks are what the plans promise.
    """
    points, sent = [], 0
    for row in rows:
        sent += row.get("bytes_up", 0)
        if row.get("accuracy") is not None:
            points.append({"round": row["round"], "s": row["closed_s"], "bytes_up": sent, "accuracy": row["accuracy"]})
    work = [d for row in rows for d in row["devices"]]
    done = [d for d in work if d["status"] == "committed"]
    classes = dict.fromkeys(d["class"] for d in work)
    peaks = {kind: max((d["peak_bytes"] for d in done if d["class"] == kind), default=None) for kind in classes}
    last = [row for row in rows if row.get("accuracy") is not None][1:][-LAST:] or rows[:1]  # without the untrained one
    of_class = {
        kind: [row["accuracy_of"][kind] for row in last if row["accuracy_of"].get(kind) is not None] for kind in classes
    }
    waited = [
        row["waiting_s"] / row["round_s"] for row in rows if row.get("waiting_s") is not None and row.get("round_s")
    ]
    return {
        "accuracy": statistics.fmean(row["accuracy"] for row in last),
        "accuracy_of": {kind: statistics.fmean(values) for kind, values in of_class.items() if values},
        "waiting_share": statistics.fmean(waited) if waited else None,
        "bytes_up": sent,
        "virtual_s": rows[-1]["closed_s"],
        "peak_bytes_of": peaks,
        "peak_bytes": max((d["peak_bytes"] for d in done), default=None),
        "taking_part_share": len({d["device"] for d in done}) / max(1, len({d["device"] for d in work})),
        "points": points,
    }


def time_to(points: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Virtual seconds until a curve first reaches an accuracy, straight lines between its points; None where it does not."""
    before: Mapping[str, Any] | None = None
    for point in points:
        if point["accuracy"] >= target:
            if before is None:
                return float(point["s"])
            share = (target - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return float(before["s"] + share * (point["s"] - before["s"]))
        before = point
    return None
