"""One training from job to report: backend, data and cache are opened, what interrupts it is heeded, the update is written.

Runs in the worker process. Not here: the loop over batches (`loop.py`), what pauses it (`orders.py`), how it goes on in smaller
pieces (`backoff.py`) or with less of the model (`pruned.py`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.codecs import PACKED
from edge_runtime.errors import StoreError
from edge_runtime.hardware import process_memory
from edge_runtime.layout import layout
from edge_runtime.model import ModelSpec
from edge_runtime.records import CostRow, Plan, TrainReport
from edge_runtime.store import atomic_writer
from edge_runtime.training.backoff import Pressure, Saved, begin_again, on_disk, put_aside
from edge_runtime.training.corpus import Corpus
from edge_runtime.training.jobs import Job, backend_of, emit, frozen_of, make_backend, plan_of, spec_of, weights_of
from edge_runtime.training.loop import Backend, Progress, accuracy, run
from edge_runtime.training.orders import Orders
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import from_plain, to_plain

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.training.prefix_cache import PrefixCache
    from edge_runtime.training.pruned import PrunedTraining

    Array = np.ndarray[Any, np.dtype[Any]]

SAID_EVERY_S = 0.2
PACKED_PAYS = 0.97  # of an update's bytes: zlib must save more to be worth its time on both sides


class Training:
    """A training under way in this process.

    Where the job names smaller candidates, memory is watched, and it goes on as one of them when that gets short.
    """

    def __init__(self, job: Job, orders: Orders, started: float, saved: Saved | None = None) -> None:
        """Args: started: when this process began, by the monotonic clock. saved: what it goes on from."""
        self.job, self.orders, self.started = job, orders, started
        self.spec, self.plan = spec_of(job), plan_of(job)
        self.pruned = pruned_training(job, self.spec, self.plan) if self.plan.pruning else None
        self._backend = None if self.pruned else backend_of(job, self.spec, self.plan)
        self.data = Corpus(Path(job["corpus"]))
        self.cache, self._pays = open_cache(job, self.spec, self.plan, self.data)
        self.done = saved.restore(self.backend) if saved else Progress()
        rows: tuple[CostRow, ...] = from_plain(tuple[CostRow, ...], job.get("smaller", []), "smaller")
        smaller = [row for row in rows if row.peak_bytes < self.plan.chosen.peak_bytes]
        self._pressure = Pressure(smaller, own_cgroup=bool(job.get("cgroup")))
        self._said = 0.0
        if saved and saved.is_smaller:
            emit(
                step=self.num_steps,
                steps=self.plan.steps,
                loss=self.done.losses[-1],
                smaller=to_plain(self.plan.chosen),
            )
        elif saved:
            emit(resumed=self.num_steps)

    @property
    def backend(self) -> Backend:
        """What trains now; pruning puts another in its place."""
        found = self.pruned.backend if self.pruned else self._backend
        assert found is not None
        return found

    @property
    def num_steps(self) -> int:
        """Steps that are made."""
        return len(self.done.losses)

    def run(self) -> TrainReport:
        """Train as planned and write the update: every trained tensor's delta in the plan's codec, in the order of `layout.py`.

        Raises:
            Left: it was told to leave, and is saved.
        """
        try:
            self._hold()
            while not run(
                self.backend,
                self.data,
                self.plan,
                self.done,
                self._progress,
                self.cache,
                self._pays,
                self._is_interrupted,
            ):
                if self.pruned:
                    self.pruned.prune(self.num_steps)
                if self.orders.paused:
                    self._hold()
                elif self._pressure.is_short():
                    self._go_on_smaller()
            if self.pruned and self.plan.steps == 1:  # nobody is asked to stop after the last step
                self.pruned.prune(1)
        finally:
            if self.cache is not None:
                self.cache.close()
        return self._finish()

    # what interrupts it

    def _is_interrupted(self) -> bool:
        return self.orders.paused or (self.pruned.is_due(self.num_steps) if self.pruned else self._pressure.is_short())

    def _hold(self) -> None:
        can_leave = (
            not self.pruned and "pause_file" in self.job
        )  # of one that prunes the stages would have to be kept too
        seconds = self.orders.hold(lambda: emit(paused=self.num_steps), self._put_aside if can_leave else None)
        if seconds:
            self.done.paused_s += seconds
            emit(resumed=self.num_steps)

    def _put_aside(self) -> None:
        put_aside(self._kept(), self.done, self.backend.arrays(), self.job["pause_file"])

    def _go_on_smaller(self) -> None:
        chosen = {"plan": {**self.job["plan"], "chosen": to_plain(self._pressure.smaller)}}
        with contextlib.suppress(OSError):  # no disk, or no room on it: go on as it is
            folder = on_disk(Path(self.job["update"]).parent, Path(self.job["cache"]))
            begin_again({**self._kept(), **chosen}, self.done, self.backend.arrays(), folder)
        self._pressure.give_up()

    def _kept(self) -> dict[str, Any]:
        """The job for whoever goes on, with what it began as."""
        self.done.peak_bytes = max(self.done.peak_bytes, process_memory().get("VmHWM", 0))
        job = self.job
        first = {"started": job.get("started", self.started), "first": job.get("first", job["plan"]["chosen"])}
        return {**job, **first}

    def _progress(self, step: int, loss: float) -> None:
        now = time.monotonic()
        self.done.start_s = self.done.start_s or now - self.started
        if now - self._said > SAID_EVERY_S or step == self.plan.steps:
            self._said = now
            emit(step=step, steps=self.plan.steps, loss=round(loss, 5))

    # its end

    def _finish(self) -> TrainReport:
        job, plan, done, pruned = self.job, self.plan, self.done, self.pruned
        peak = max(done.peak_bytes, process_memory().get("VmHWM", 0))
        first: CostRow = from_plain(CostRow, job["first"], "plan") if "first" in job else plan.chosen
        held_out = None
        if job.get("test_corpus"):
            held_out = accuracy(self.backend, Corpus(Path(job["test_corpus"])), plan.chosen.micro_batch)
        trained = (pruned.spec, plan, pruned.deltas()) if pruned else (self.spec, plan, self.backend.deltas())
        codec = write_deltas(job, *trained)
        if pruned:
            pruned.close()
        return TrainReport(
            depth=plan.chosen.depth,
            checkpointing=plan.chosen.checkpointing,
            micro_batch=plan.chosen.micro_batch,
            backend=self.backend.name,
            num_examples=len(self.data),
            steps=len(done.losses),
            first_loss=done.losses[0],
            last_loss=done.last_loss,
            train_s=done.seconds,
            total_s=time.monotonic() - job.get("started", self.started) - done.paused_s,
            peak_bytes=max(peak, process_memory().get("VmHWM", 0)),
            promised_peak_bytes=first.peak_bytes,
            promised_s=first.total_s(plan.settings.epochs),
            accuracy=held_out,
            cpu_s=done.cpu_s,
            start_s=done.start_s,
            rank=plan.chosen.rank,
            precision=plan.chosen.precision,
            cached=self.cache is not None,
            backed_off=done.backed_off,
            codec=codec,
            sparsity=pruned.kept.sparsity(self.spec) if pruned else 0.0,
            kept=pruned.kept.encode().hex() if pruned else "",
            paused_s=done.paused_s,
        )


def pruned_training(job: Job, spec: ModelSpec, plan: Plan) -> PrunedTraining:
    """The stages of a plan that prunes."""
    from edge_runtime.training.pruned import PrunedTraining

    def make(left: ModelSpec, weights: Mapping[str, MappedTensor], start: Mapping[str, MappedTensor]) -> Backend:
        return make_backend(job, plan, left, weights, start)

    return PrunedTraining(spec, weights_of(job), weights_of(job, "adapters"), plan, make, Path(job["update"]))


def write_deltas(job: Job, spec: ModelSpec, plan: Plan, deltas: Iterator[tuple[str, Array]]) -> str:
    """Write the update, and what error feedback keeps of it, whole or not at all; -> the codec it is in, with zlib where that pays."""
    from edge_runtime.encoding import pack_file, write_update
    from edge_runtime.residual import error_feedback

    name, target = plan.chosen.codec, Path(job["update"])
    sizes = {tensor.name: tensor.size for tensor in layout(spec, plan)}
    with contextlib.ExitStack() as stack:
        kept = job.get("residual")
        feedback = None
        if kept:
            places = (Path(kept["kept"]), Path(kept["draft"]))
            feedback = stack.enter_context(error_feedback(*places, kept["line"], kept["round"], sizes))
        file = stack.enter_context(atomic_writer(target))
        write_update(file, name, sizes, deltas, plan.settings.seed, feedback)
    if name == "f32":  # the codec of devices and coordinators that know no other
        return name
    packed = target.with_suffix(".zlib")
    with atomic_writer(packed) as file:
        pays = pack_file(target, file) <= PACKED_PAYS * target.stat().st_size
    if pays:
        os.replace(packed, target)
        return name + PACKED
    packed.unlink()
    return name


def open_cache(job: Job, spec: ModelSpec, plan: Plan, data: Corpus) -> tuple[PrefixCache | None, bool]:
    """-> (the cache of the prefix's outputs, where the plan wants one and it pays; whether it pays).

    It may pay and not be there: no disk, another process has it.
    """
    if not plan.chosen.cached:
        return None, False
    from edge_runtime.training.cache_folders import evict, free_share
    from edge_runtime.training.prefix_cache import PrefixCache, prefix_key

    root = Path(job["cache"])
    key = prefix_key(spec, frozen_of(job, spec, plan), plan.chosen.depth, data.folder.name, plan.chosen.precision)
    pays = plan.settings.epochs > 1
    with contextlib.suppress(OSError, StoreError):
        before = prefix_before(root / "last-prefix", key, job.get("round"))
        pays = cache_pays(plan.settings.epochs, job.get("round"), key, before)
        evict(root, free_share(root), key)
    return (PrefixCache.open(root, key, data, spec.hidden, free_share(root)) if pays else None), pays


def cache_pays(epochs: int, round_: str | None, key: str, before: str) -> bool:
    """Whether the prefix's outputs will be read again: with several epochs; in a fleet's first round, since most devices train
    the same in the next; and later when the prefix has not changed since the round before.

    A round that is trained again, after a crash, decides as it did the first time, so that it gives the same bits.
    """
    return epochs > 1 or before == key or (round_ is not None and not before)


def prefix_before(record: Path, key: str, round_: str | None) -> str:
    """The key of the prefix in the round before this one; `record` remembers this one's. "" if there was none."""
    try:
        last_round, last, before = record.read_text().split(" ")
    except (FileNotFoundError, ValueError):
        last_round = last = before = ""
    if round_ is None or last_round != round_:
        before = last
    with atomic_writer(record) as file:
        file.write(f"{round_ or ''} {key} {before}".encode())
    return before
