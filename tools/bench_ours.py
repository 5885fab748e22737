"""One row of ours in a fresh process: `python -m tools.bench_ours JOB`, JSON lines out, as `bench_peers/train.py`.

Calls `edge_runtime.local.plan` and `train` as a user would. A row's options are arguments of these two or of
`TrainSettings`, by name; what this version does not have makes the row "unavailable". Peak is the training process's
VmHWM (the report's); CPU seconds are that process's, read from outside between its steps.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime import local
from edge_runtime.engine import EngineOptions
from edge_runtime.hardware import process_memory, reset_peak
from edge_runtime.records import CostRow, TrainSettings

OPEN_MEMORY = "64GB"  # no limit to speak of: the row's own depth decides
ENGINE = tuple(field.name for field in dataclasses.fields(EngineOptions))
OURS_ALONE = ("depth", "checkpointing", "micro_batch", "memory")  # options that this file explains, see `memory_of`
WORKER = b"edge_runtime.training.worker"


def main() -> None:
    """Plan, train, print."""
    reset_peak()
    job = json.loads(sys.argv[1])
    options = job["options"]
    if missing := sorted(set(options) - set(known_options())):
        say(result={"unavailable": f"this version has no {', '.join(missing)}"})
        return
    device = local.Device.measure(job["threads"], speed=False)
    planned = plan(job, device, OPEN_MEMORY)
    memory = memory_of(planned.rows, options)
    if memory != OPEN_MEMORY:
        planned = plan(job, device, memory)
    watch = WorkerTime()
    begun = time.perf_counter()
    trained = local.train(
        planned,
        Path(job["scratch"]) / "model",
        device=device,
        depth=options["depth"],
        progress=watch,
        **accepted(local.train, options),
    )
    train_wall_s = time.perf_counter() - begun
    report = trained.report
    if report.backend != options.get(
        "backend", report.backend
    ):  # accepted, but not carried out: not that row's numbers
        say(result={"unavailable": f"asked for backend {options['backend']}, {report.backend} trained"})
        return
    upload = next((row.upload_bytes for row in planned.rows if row.depth == report.depth), None)
    say(
        result={
            "peak_rss_bytes": report.peak_bytes,
            "cpu_s_per_step": watch.per_step(),
            "train_s": report.train_s,
            "process_s": train_wall_s,
            "bytes_up": upload,
            "accuracy": report.accuracy,
            "first_loss": report.first_loss,
            "last_loss": report.last_loss,
            "steps": report.steps,
            "promised_peak_bytes": report.promised_peak_bytes,
            "parent_peak_bytes": process_memory().get("VmHWM", 0),
            "enforced_by": trained.enforced_by,
            "detail": f"{report.backend}, {report.depth} blocks, micro-batch {report.micro_batch}"
            f"{', checkpointed' if report.checkpointing else ''}",
        }
    )


def plan(job: Mapping[str, Any], device: local.Device, memory: str) -> local.Planned:
    """The plan for a row within a memory budget."""
    fields = {field.name for field in dataclasses.fields(TrainSettings)}
    mine = {key: value for key, value in job["options"].items() if key in fields}
    settings = TrainSettings(
        **{**{k: v for k, v in job["settings"].items() if k in fields}, **mine, "seed": job["seed"]}
    )
    return local.plan(
        job["model"],
        job["data"],
        memory=memory,
        settings=settings,
        device=device,
        max_length=job["max_length"],
        new_head=True,
        test=job["test"],
        engine=EngineOptions(**{key: job["options"][key] for key in ENGINE if key in job["options"]}),
        progress=lambda line: say(note=line),
        **accepted(local.plan, job["options"]),
    )


def memory_of(rows: tuple[CostRow, ...], options: Mapping[str, Any]) -> str:
    """The memory budget that a row's options mean.

    "memory" is a budget as the command line takes it, "least" (the smallest plan of this depth), or absent. With
    "checkpointing" or "micro_batch" it is what the plan with them needs: the planner then has no room for another.
    """
    budget = str(options.get("memory", ""))
    wanted = [row for row in rows if row.depth == options["depth"]]
    for key in ("checkpointing", "micro_batch"):
        if key in options:
            wanted = [row for row in wanted if getattr(row, key) == options[key]]
    if not wanted:
        raise SystemExit(f"the cost table has no row for {dict(options)}")
    if budget == "least":
        return str(min(row.peak_bytes for row in wanted))
    if "checkpointing" in options or "micro_batch" in options:
        return str(max(row.peak_bytes for row in wanted))
    return budget or OPEN_MEMORY


def known_options() -> set[str]:
    """Every option that a row may have in this version."""
    named = {*inspect.signature(local.plan).parameters, *inspect.signature(local.train).parameters}
    return {*OURS_ALONE, *ENGINE, *named, *(field.name for field in dataclasses.fields(TrainSettings))}


def accepted(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that this function takes, without those that are explained here."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in options.items() if key in names and key not in OURS_ALONE}


class WorkerTime:
    """Progress of `local.train` that also reads the training process's CPU clock."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """After a step."""
        say(step=step, steps=steps, loss=loss)
        for pid in _children(os.getpid()):
            try:
                if WORKER in Path(f"/proc/{pid}/cmdline").read_bytes():
                    # The CPU clock of another process, to the nanosecond (clock_getcpuclockid of glibc).
                    self._last = (step, time.clock_gettime(~pid << 3 | 2))
                    self._first = self._first or self._last
            except OSError:
                continue

    def per_step(self) -> float | None:
        """CPU seconds a step, the first left out as warm-up."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])


def _children(pid: int) -> list[int]:
    """Processes that this one started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def say(**fields: Any) -> None:
    """One line for the bench."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
