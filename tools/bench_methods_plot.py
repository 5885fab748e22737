"""The plots of `tools/bench methods`: a figure for each setting, PNG and SVG, colour-blind safe, lines labelled where they end.

Colours are those of Okabe and Ito (2008); what has the same colour differs in its dashes. Needs matplotlib.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.optional import require
from tools.bench_common import MIB, Row

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # without yellow: too light
DASHES = ("-", "--", ":")
LINES = (("round", "round", 1.0), ("s", "virtual minutes", 60.0), ("bytes_up", "MiB sent by all devices", float(MIB)))
GAP = 0.045  # of a panel's height, between two labels


PLACES = {"weak": "v", "middle": "s", "strong": "o"}  # of a class among its fleet's, and its mark


def draw_settings(rows: Sequence[Row], out: Path, name: str = "methods") -> dict[str, Path]:
    """-> setting -> its SVG, which is called `name` and the setting; a PNG of the same name lies beside it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    library = require("matplotlib", extra="sim")
    library.use("agg")
    library.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "edge-runtime", "font.size": 9})
    found: dict[str, Path] = {}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        path = out / f"{name}-{''.join(c if c.isalnum() or c == '.' else '-' for c in setting.replace(', ', '-'))}.svg"
        figure = draw_one(setting, [row for row in rows if row["setting"] == setting])
        figure.savefig(path, metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=110)
        found[setting] = path
    return found


def draw_one(setting: str, rows: Sequence[Row]) -> Any:
    """Five panels: accuracy against rounds, virtual time and bytes; by device class; device memory."""
    figure = require("matplotlib.figure", extra="sim").Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    styles = {row["name"]: style(number) for number, row in enumerate(rows)}
    for axis, (key, title, divisor) in zip(axes[0], LINES, strict=True):
        ends = []
        for row in rows:
            points = mean_points(row["runs"], key)
            x, y = [p[0] / divisor for p in points], [100 * p[1] for p in points]
            axis.plot(x, y, linewidth=1.8, **styles[row["name"]])
            low, high = [100 * p[2] for p in points], [100 * p[3] for p in points]
            axis.fill_between(x, low, high, color=styles[row["name"]]["color"], alpha=0.12, linewidth=0)
            ends.append((y[-1], x[-1], row["name"]))
        axis.set(xlabel=title, ylabel="test accuracy, %")
        label_ends(axis, ends, styles)
        axis.spines[["top", "right"]].set_visible(False)
    by_class(axes[1][0], rows, styles)
    memory(axes[1][1], rows, styles)
    axes[1][2].axis("off")
    text = "line: mean over seeds; band: lowest to highest\n\nclasses `one`, `two`, `all`: blocks that\na device can train under the limits"
    axes[1][2].text(0, 0.9, text, va="top")
    figure.suptitle(setting)
    return figure


def style(number: int) -> dict[str, Any]:
    """Of the line with this number: colours first, then dashes."""
    return {"color": OKABE_ITO[number % len(OKABE_ITO)], "linestyle": DASHES[number // len(OKABE_ITO) % len(DASHES)]}


def mean_points(runs: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float, float, float]]:
    """Of the rounds that all runs measured: (mean of `key`, mean accuracy, lowest, highest)."""
    found = []
    for points in zip(*(run["points"] for run in runs), strict=False):
        accuracies = [point["accuracy"] for point in points]
        place = statistics.fmean(point[key] for point in points)
        found.append((place, statistics.fmean(accuracies), min(accuracies), max(accuracies)))
    return found


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels: in the same order, as near to their own as a gap between them allows."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed: list[list[int]] = []  # groups that touch, each centred on its own heights

    def low(group: list[int]) -> float:
        return statistics.fmean(heights[i] for i in group) - gap * (len(group) - 1) / 2

    for i in order:
        placed.append([i])
        while len(placed) > 1 and low(placed[-1]) - (low(placed[-2]) + gap * (len(placed[-2]) - 1)) < gap:
            last = placed.pop()
            placed[-1] += last
    found = [0.0] * len(heights)
    for group in placed:
        for number, i in enumerate(group):
            found[i] = low(group) + gap * number
    return found


def label_ends(axis: Any, ends: Sequence[tuple[float, float, str]], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Each line's name at the panel's right, in its colour, with a thin line to where it ends."""
    bottom, top = axis.get_ylim()
    left, right = axis.get_xlim()
    beyond = right + 0.03 * (right - left)
    heights = spread([end[0] for end in ends], GAP * (top - bottom))
    for (y, x, name), height in zip(ends, heights, strict=True):
        colour = styles[name]["color"]
        axis.plot([x, beyond], [y, height], color=colour, linewidth=0.5, clip_on=False)
        axis.text(beyond, height, f" {name}", color=colour, va="center", clip_on=False)
    axis.set_xlim(left, right)
    axis.set_ylim(min(bottom, *heights), max(top, *heights))


def by_class(axis: Any, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracy on what each class holds: a row a method, a mark a class."""
    for place, row in enumerate(reversed(rows)):
        for kind, mark in PLACES.items():
            if (share := row[f"{kind}_share"]) is not None:
                axis.plot(100 * share, place, mark, color=styles[row["name"]]["color"], markersize=6)
    for kind, mark in zip(rows[0]["classes"], PLACES.values(), strict=True):
        axis.plot([], [], mark, color="#666666", label=kind)
    axis.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axis.set(xlabel="test accuracy on what a class holds, %")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    axis.spines[["top", "right"]].set_visible(False)


def memory(axis: Any, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """The largest promised peak of each method's plans."""
    peaks = [(row["peak_bytes"] or 0) / MIB for row in reversed(rows)]
    bars = axis.barh(range(len(rows)), peaks, color=[styles[row["name"]]["color"] for row in reversed(rows)])
    axis.bar_label(bars, [f"{peak:.0f}" if peak else "none" for peak in peaks], padding=2)
    axis.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axis.set(xlabel="largest promised peak of a device, MiB")
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
