"""Runs a worker process under a memory limit, watches it, and turns its end into a result or an error.

Hard limit: a cgroup of its own where this process may make one (v1 or v2). Elsewhere RLIMIT_DATA stops a runaway, and a
watchdog reads the anonymous memory 20 times a second and kills a worker that passes its limit. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

from edge_runtime import errors
from edge_runtime.errors import EdgeError, TrainingFailed
from edge_runtime.hardware import memory_cgroups, process_memory
from edge_runtime.model import ModelSpec
from edge_runtime.notify import alive
from edge_runtime.records import Plan
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import pack, to_plain

POLL_S = 0.05
CGROUP = "edge-train"
LAST_IN_CLASS = 7  # of eight priorities at the disk
# RLIMIT_DATA counts reserved address space: thread stacks and allocator arenas that are never touched come on top.
RLIMIT_RESERVE_BYTES = 512 << 20

# torch: tensors go back to the system as soon as they are freed, so that the peak is that of the law, not of the heap's
# holes. onnxruntime has an arena of its own for them (`graphs/session.py`).
HEAP = {
    "onnx": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    "torch": {"MALLOC_MMAP_THRESHOLD_": str(256 << 10), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}


def model_job(
    job: str, spec: ModelSpec, weights: Mapping[str, MappedTensor], adapters: Mapping[str, MappedTensor] | None = None, adapter_scale: float = 0.0, kept: bytes = b"",
) -> dict[str, Any]:  # fmt: skip
    """The fields of a worker's job that describe a model.

    Args:
        adapters: A and B that training begins from; what they add to blocks that are not trained is merged in the worker.
        adapter_scale: what B A is multiplied by there.
        kept: of a pruned model, which is to be evaluated.
    """

    def places(tensors: Mapping[str, MappedTensor]) -> dict[str, Any]:
        return {name: (w.path, w.offset, w.shape, w.dtype) for name, w in tensors.items()}

    return {
        "job": job,
        "family": spec.family,
        "config": dict(spec.config),
        "labels": list(spec.labels),
        "max_length": spec.max_length,
        "weights": places({t.name: weights[t.name] for t in spec.tensors}),
        "adapters": places(adapters or {}),
        "adapter_scale": adapter_scale,
        "kept": kept.hex(),
    }


def plan_job(plan: Plan) -> dict[str, Any]:
    """The fields of a worker's job that say what to train. What pruning begins with is bytes, which JSON has not."""
    pruning = {"pruning": pack(plan.pruning).hex()} if plan.pruning else {}
    return {"plan": to_plain(replace(plan, pruning=None)), **pruning}


class Worker:
    """One worker process. Use `poll` in a loop, or `run_worker` to wait for it."""

    def __init__(
        self, job: Mapping[str, Any], *, limit_bytes: int | None, threads: int, nice: int = 0, pause_file: IO[bytes] | None = None,
    ) -> None:  # fmt: skip
        """Args: pause_file: where a training that is told to leave is put aside, and goes on from with {"resume": true}."""
        self.limit_bytes = limit_bytes
        self._cgroup = _make_cgroup(limit_bytes) if limit_bytes else None
        self.enforced_by = "cgroup" if self._cgroup else "rlimit and watchdog" if limit_bytes else "nothing"
        self._over_limit = self._closed = False
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            **HEAP.get(job.get("backend", ""), {}),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.training.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us to handle
            pass_fds=[pause_file.fileno()] if pause_file else [],
        )
        self.pid = self._process.pid
        if limit_bytes and self._cgroup is None:
            _limit_data(self.pid, limit_bytes + RLIMIT_RESERVE_BYTES)
        if nice:
            _lower_priority(self.pid, nice)
        procs = str(self._cgroup / "cgroup.procs") if self._cgroup else None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        if limit_bytes and self._cgroup is None:
            threading.Thread(target=self._watch, daemon=True).start()
        kept = {"pause_file": pause_file.fileno()} if pause_file else {}
        self.tell(json.dumps({**job, **kept, "cgroup": procs}))

    def tell(self, line: str) -> None:
        """Send it a line: its job, then the words of `orders.py`. One that has died has nothing told: `poll` says why."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def lower(self, nice: int) -> None:
        """Give it, as it runs, at least this niceness."""
        _lower_priority(self.pid, nice)

    def poll(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line of progress ({"step", "steps", "loss"}) or the end ({"result"}), or None.

        Raises:
            EdgeError: what the worker reported, or TrainingFailed if it died.
        """
        try:
            line = self._lines.get(timeout=timeout_s) if timeout_s > 0 else self._lines.get_nowait()
        except queue.Empty:
            return None
        if line is None:
            raise self._failure()
        if "error" in line:
            self.close()
            kind = getattr(errors, line["kind"], None)
            if line["kind"] == "MemoryError":
                raise TrainingFailed(f"training ran out of memory: {line['error']}", out_of_memory=True)
            if kind is None or not issubclass(kind, EdgeError):
                raise TrainingFailed(line["error"])
            raise kind(line["error"])
        if "result" in line:
            self.close()
        return line

    def close(self) -> None:
        """Kill the process if it still runs, and give everything back. Idempotent."""
        if self._process.poll() is None:
            with contextlib.suppress(BrokenPipeError, OSError):
                assert self._process.stdin
                self._process.stdin.close()  # a worker that has finished ends by itself
            try:
                self._process.wait(2 if not self._over_limit else 0)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()
        if not self._closed:  # later the number may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # what it forked
        self._closed = True
        if self._cgroup:
            _remove_cgroup(self._cgroup)
            self._cgroup = None
        self._stderr.close()

    def _read(self, stream: IO[bytes]) -> None:
        for raw in stream:
            with contextlib.suppress(ValueError):
                self._lines.put(json.loads(raw))
        self._lines.put(None)

    def _watch(self) -> None:
        while self._process.poll() is None:
            held = process_memory(self.pid)
            if held.get("RssAnon", 0) + held.get("VmSwap", 0) > (self.limit_bytes or 0):  # mapped files can be evicted
                self._over_limit = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            time.sleep(POLL_S)

    def _failure(self) -> TrainingFailed:
        code = self._process.wait()
        self._stderr.seek(0)
        tail = self._stderr.read()[-2000:].decode(errors="replace").strip().splitlines()
        for_memory, at_own_limit = _killed_for_memory(self._cgroup) if self._cgroup else (False, False)
        self.close()
        if self._over_limit or at_own_limit:
            limit = (self.limit_bytes or 0) / 2**20
            return TrainingFailed(
                f"the training process was killed at its memory limit of {limit:.0f} MiB", out_of_memory=True
            )
        if for_memory:
            return TrainingFailed(
                "the training process was killed because the device, or the container around it, ran out of memory",
                killed=True,
            )
        if code < 0:
            return TrainingFailed(f"the training process was killed by signal {-code}", killed=True)
        return TrainingFailed(f"the training process ended with code {code}: {tail[-1] if tail else 'no message'}")


def run_worker(
    job: Mapping[str, Any],
    *,
    limit_bytes: int | None = None,
    threads: int = 1,
    timeout_s: float = math.inf,
) -> dict[str, Any]:
    """Run one job to its end; -> its result. Ctrl-C ends the worker too. Errors as `wait_for`."""
    return wait_for(Worker(job, limit_bytes=limit_bytes, threads=threads), lambda step, steps, loss: None, timeout_s)


class Polled(Protocol):
    """A `Worker`, or what stands before one."""

    def poll(self, timeout_s: float) -> dict[str, Any] | None:
        """As `Worker.poll`."""

    def close(self) -> None:
        """As `Worker.close`."""


def wait_for(
    worker: Polled,
    progress: Callable[[int, int, float], None],
    timeout_s: float = math.inf,
    other: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Wait for a worker's result; whatever happens, Ctrl-C too, the worker is gone afterwards. `other` has lines that are no step.

    Raises:
        EdgeError: as `Worker.poll`, or TrainingFailed after `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    try:
        while True:
            line = worker.poll(0.5)
            alive()  # the agent waits here too, while its data is tokenised: that is no hanging
            if time.monotonic() > end:
                raise TrainingFailed(f"the process had no result after {timeout_s:.0f} s and was ended")
            if line and "result" in line:
                result: dict[str, Any] = line["result"]
                return result
            if line and "step" in line:
                progress(line["step"], line["steps"], line["loss"])
            elif line:
                other(line)
    finally:
        worker.close()


def _make_cgroup(limit_bytes: int) -> Path | None:
    """A memory cgroup below our own with that limit, or None where that is not allowed."""
    for parent, version in memory_cgroups()[:1]:
        _remove_left_over(parent)
        folder = parent / f"{CGROUP}-{os.getpid()}-{time.monotonic_ns()}"
        limit_file = "memory.limit_in_bytes" if version == 1 else "memory.max"
        try:
            folder.mkdir()
        except OSError:
            return None
        try:
            (folder / limit_file).write_text(str(limit_bytes))
            if version == 2 and (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")
            return folder
        except OSError:  # v2 without the memory controller delegated to us
            _remove_cgroup(folder)
    return None


def _remove_left_over(parent: Path) -> None:
    """Cgroups of agents that were killed before they could remove them; one that is in use cannot be removed."""
    for folder in parent.glob(f"{CGROUP}-*-*"):
        owner = folder.name.split("-")[2]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _killed_for_memory(folder: Path) -> tuple[bool, bool]:
    """-> (whether the kernel has killed something in this cgroup for memory, whether at this cgroup's own limit)."""
    for name in ("memory.events", "memory.oom_control"):  # v2, v1
        try:
            counts = dict(line.split() for line in (folder / name).read_text().splitlines())
            hits = counts["oom"] if "oom" in counts else (folder / "memory.failcnt").read_text()
            killed = int(counts.get("oom_kill", 0)) > 0
            return killed, killed and int(hits) > 0
        except (OSError, ValueError):
            continue
    return False, False


def _remove_cgroup(folder: Path) -> None:
    for _ in range(20):  # the kernel needs a moment after the last process is gone
        try:
            return folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)


def _lower_priority(pid: int, nice: int) -> None:
    """Niceness of a process, and of its session: where the kernel weighs sessions as groups, its own ranks it in there alone.

    And the last place among those that wait for the disk, not the idle class: a training that holds files goes on.
    """
    import psutil

    if hasattr(psutil.Process, "ionice") and hasattr(psutil, "IOPRIO_CLASS_BE"):  # Linux
        with contextlib.suppress(psutil.Error, OSError):
            psutil.Process(pid).ionice(psutil.IOPRIO_CLASS_BE, LAST_IN_CLASS)
    with contextlib.suppress(OSError):
        nice = max(nice, os.getpriority(os.PRIO_PROCESS, pid))
        os.setpriority(os.PRIO_PROCESS, pid, nice)
    for thread in Path(f"/proc/{pid}/task").glob("*"):  # Linux: each has its own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def _limit_data(pid: int, limit_bytes: int) -> None:
    import resource

    if hasattr(resource, "prlimit"):
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
