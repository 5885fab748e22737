"""Simulations side by side: a table, and a plot where matplotlib is installed. Reads result files; simulates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_coordinator.sim.progress import duration
from edge_coordinator.sim.results import Row, read_results
from edge_runtime.console import table
from edge_runtime.errors import StoreError, UsageError
from edge_runtime.optional import require
from edge_runtime.planner import mib

HEADER = (
    "run",
    "method",
    "devices",
    "rounds",
    "failed",
    "time",
    "round",
    "waiting",
    "accuracy",
    "weakest class",
    "sent",
    "received",
)


def summarise(folder: Path, target: float | None) -> Row:
    """One simulation in numbers. Times are virtual seconds; accuracies are shares, of the last round that has one.

    Args:
        target: the accuracy to reach; `target_s` is when it was, None if it was not.

    Raises:
        UsageError: the folder holds no simulation. StoreError: what it holds is damaged.
    """
    try:
        return _summary(folder, target, *read_results(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder} holds results that are damaged, or of another version ({error!r})") from None


def _summary(folder: Path, target: float | None, settings: Row, rounds: Sequence[Row]) -> Row:
    done = [row for row in rounds if row["round"] > 0]
    published = [row for row in done if row["state"] == "published"]
    measured = [row for row in rounds if row.get("accuracy") is not None]
    by_class = measured[-1]["accuracy_of"] if measured else {}
    weakest = min(by_class, key=lambda name: _strength(settings["figures"][name]), default=None)
    reached = [row["closed_s"] for row in measured if target is not None and row["accuracy"] >= target]
    return {
        "run": str(folder),
        "method": settings["run"]["method"],
        "devices": len({d["device"] for row in done for d in row["devices"]}),
        "rounds": len(done),
        "failed": len(done) - len(published),
        "time_s": rounds[-1]["closed_s"] if rounds else 0.0,
        "round_s": _mean([row["round_s"] for row in done]),
        "waiting_s": _mean([row["waiting_s"] for row in published]),
        "accuracy": measured[-1]["accuracy"] if measured else None,
        "weakest_class": weakest,
        "weakest_class_accuracy": by_class.get(weakest),
        "bytes_up": sum(row["bytes_up"] for row in done),
        "bytes_down": sum(row["bytes_down"] for row in done),
        "target": target,
        "target_s": min(reached, default=None),
    }


def text_table(rows: Sequence[Row], target: float | None) -> str:
    """The summaries for people."""
    header = [*HEADER, *([f"to {100 * target:g} %"] if target is not None else [])]
    return table(header, [_cells(row, target) for row in rows])


def plot(folders: Sequence[Path], out: Path) -> None:
    """Accuracy over virtual time, a line for each run, as an image in the format of `out`'s suffix.

    Raises:
        MissingExtra: matplotlib is not installed.
        UsageError: no run has an accuracy to show, the suffix names no image format, or the file cannot be written.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder: give --plot a file such as accuracy.png")
    lines = []
    for folder in folders:
        measured = [row for row in read_results(folder)[1] if row.get("accuracy") is not None]
        if measured:
            lines.append(
                (folder, [row["closed_s"] / 60 for row in measured], [100 * row["accuracy"] for row in measured])
            )
    if not lines:
        raise UsageError("none of these runs has an accuracy: simulate with --test")
    require("matplotlib", extra="sim")
    figure = require("matplotlib.figure", extra="sim").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for folder, minutes, accuracy in lines:
        axes.plot(minutes, accuracy, marker=".", label=str(folder))
    axes.set(xlabel="virtual time (minutes)", ylabel="accuracy (%)")
    axes.legend()
    try:
        figure.savefig(out)
    except (ValueError, OSError) as error:
        raise UsageError(f"--plot {out}: {error}") from None


def _cells(row: Row, target: float | None) -> list[str]:
    cells = [row["run"], row["method"], str(row["devices"]), str(row["rounds"]), str(row["failed"]), duration(row["time_s"]), _time(row["round_s"]),
             _time(row["waiting_s"]), _percent(row["accuracy"]), _percent(row["weakest_class_accuracy"]), mib(row["bytes_up"]), mib(row["bytes_down"])]  # fmt: skip
    return [*cells, _time(row["target_s"])] if target is not None else cells


def _strength(figures: dict[str, Any]) -> tuple[float, int]:
    """As `DeviceClass.strength`."""
    return (float("inf") if figures["gflops"] is None else figures["gflops"]), figures["memory_bytes"]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
