"""What every row of `tools/bench predict` does, whoever answers: start, first answer, memory, latencies. Imports nothing of ours.

A row gives `answer`: texts -> labels. Times are the lowest of several, memory is read from /proc.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = Callable[[Sequence[str]], list[str]]
WARM_UP = 2


def measure(job: Mapping[str, Any], started: float, answer: Answer) -> dict[str, Any]:
    """Everything but the opening, which happened before `answer` was there.

    Args:
        job: "long" (8 texts of at least the model's length), "texts" and "labels", "repeats".
        started: `time.perf_counter()` before anything heavy was imported.
    """
    answer(job["texts"][:1])
    cold_s, first = time.perf_counter() - started, memory()
    one = _lowest(lambda: answer(job["long"][:1]), job["repeats"])
    eight = _lowest(lambda: answer(job["long"]), max(2, job["repeats"] // 4))
    begun = time.perf_counter()
    found = [answer([text])[0] for text in job["texts"]]
    each_s = (time.perf_counter() - begun) / len(found)
    right = sum(a == b for a, b in zip(found, job["labels"], strict=True))
    after = memory()
    return {
        "cold_s": cold_s,
        "first_rss_bytes": first["VmRSS"],
        "first_anon_bytes": first["RssAnon"],
        "rss_bytes": after["VmRSS"],
        "anon_bytes": after["RssAnon"],
        "peak_rss_bytes": after["VmHWM"],
        "one_ms": 1e3 * one,
        "eight_ms": 1e3 * eight,
        "text_ms": 1e3 * each_s,
        "accuracy": right / len(found),
    }


def memory() -> dict[str, int]:
    """VmHWM, VmRSS and RssAnon of this process in bytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:", "RssAnon:")}


def tell(found: Mapping[str, Any]) -> None:
    """The row's line for the bench."""
    print(json.dumps({"result": found}), flush=True)


def _lowest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
