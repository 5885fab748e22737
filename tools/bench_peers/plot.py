"""Bars of a bench's rows as SVG: `python -m tools.bench_peers.plot RESULTS.json OUT.svg`, RESULTS as `--json` writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PANELS = (  # key, title, divisor, number format
    ("peak_rss_bytes", "peak RSS, MiB", 2**20, "{:.0f}"),
    ("cpu_s_per_step", "CPU seconds a step", 1, "{:.2f}"),
    ("wall_s", "seconds", 1, "{:.0f}"),
    ("bytes_up", "bytes sent, MiB", 2**20, "{:.2f}"),
    ("accuracy", "accuracy, %", 0.01, "{:.1f}"),
)
OURS, PEER = "#1b6ca8", "#b0b0b0"


def main() -> None:
    """One panel for each number that any row has."""
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "edge-runtime", "font.size": 8})
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    results = json.loads(Path(sys.argv[1]).read_text())
    rows: list[dict[str, Any]] = results["rows"][::-1]  # the first on top
    panels = [p for p in PANELS if any(row[p[0]] is not None for row in rows)]
    size = (2.2 + 2.3 * len(panels), 0.9 + 0.28 * len(rows))
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False, figsize=size)
    for axis, (key, title, divisor, shown) in zip(axes[0], panels, strict=True):
        values = [(row[key] or 0) / divisor for row in rows]
        bars = axis.barh(
            [row["name"] for row in rows],
            values,
            color=[OURS if row["name"].startswith("ours") else PEER for row in rows],
        )
        texts = ["" if row[key] is None else shown.format(v) for row, v in zip(rows, values, strict=True)]
        axis.bar_label(bars, texts, padding=2)
        axis.set_title(title)
        axis.set_xlim(0, 1.25 * max(values) or 1)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results["title"])
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
