"""The training process: one job in as JSON on standard input, JSON lines out. Its exit returns all its memory.

Started by `process.py` as `python -m edge_runtime.training.worker`; ends when its standard input closes, so that it never
outlives an agent that was killed. What else comes there: `orders.py`. Jobs: `corpus` (tokenise), `probe` (calibrate), `train`, `evaluate`, `derive` (training graphs).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.codecs import PACKED
from edge_runtime.cost import GRAPH_BACKEND
from edge_runtime.data import Example, Examples, read_examples
from edge_runtime.errors import EdgeError, ModelError, StoreError, UsageError
from edge_runtime.hardware import process_memory
from edge_runtime.layout import layout
from edge_runtime.model import ModelSpec, load_family
from edge_runtime.records import CostRow, Plan, Pruning, TrainReport
from edge_runtime.split import train_test
from edge_runtime.store import atomic_writer
from edge_runtime.training.corpus import Corpus, build_corpus
from edge_runtime.training.orders import Left, Orders
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import from_plain, to_plain, unpack_as

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.graphs.bundle import GraphSet
    from edge_runtime.training.backoff import Saved
    from edge_runtime.training.loop import Backend
    from edge_runtime.training.prefix_cache import PrefixCache
    from edge_runtime.training.pruned import PrunedTraining

    Array = np.ndarray[Any, np.dtype[Any]]

STARTED = time.monotonic()
ORDERS = Orders()
PACKED_PAYS = 0.97  # of an update's bytes: zlib must save more to be worth its time on both sides
Job = Mapping[str, Any]


def emit(**fields: Any) -> None:
    """One line to the agent."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def spec_of(job: Job) -> ModelSpec:
    """The architecture a job speaks of."""
    return load_family(job["family"]).describe(job["config"], job["labels"], job["max_length"])


def weights_of(job: Job, what: str = "weights") -> dict[str, MappedTensor]:
    """Where a job's weights lie, or with "adapters" the A and B that training begins from."""
    return {
        name: MappedTensor(path, offset, tuple(shape), dtype)
        for name, (path, offset, shape, dtype) in job.get(what, {}).items()
    }


def plan_of(job: Job) -> Plan:
    """What a job is to train."""
    plan: Plan = from_plain(Plan, job["plan"], "plan")
    if "pruning" in job:
        plan = replace(plan, pruning=unpack_as(Pruning, bytes.fromhex(job["pruning"])))
    return plan


def corpus(job: Job) -> dict[str, Any]:
    """Read and tokenise a data file, and one for testing; -> where they lie and what rows were skipped."""

    def read(path: str, labels: Sequence[str] | None) -> Examples:
        columns = {key: job[key] for key in ("text_column", "label_column", "encoding", "bad_rows")}
        return read_examples(path, labels=labels, **columns)

    examples = read(job["data"], job["labels"])
    labels = job["labels"] or examples.labels
    rows: Sequence[Example] = examples.rows
    held_out: Sequence[Example] = ()
    if job["test"]:
        held_out = read(job["test"], labels).rows
    elif job["holdout"] > 0:
        rows, held_out = train_test(rows, job["holdout"], job["seed"])
    tokenizer, cache = Path(job["tokenizer"]).read_bytes(), Path(job["cache"])
    return {
        "folder": str(build_corpus(rows, tokenizer, labels, job["max_length"], cache)),
        "test_folder": str(build_corpus(held_out, tokenizer, labels, job["max_length"], cache)) if held_out else None,
        "labels": list(labels),
        "skipped": examples.num_skipped,
        "first_skipped": [f"line {bad.line}: {bad.reason}" for bad in examples.skipped],
    }


def backend_of(job: Job, spec: ModelSpec, plan: Plan) -> Backend:
    """The backend that the plan names."""
    return make_backend(job, plan, spec, frozen_of(job, spec, plan), weights_of(job, "adapters"))


def make_backend(
    job: Job, plan: Plan, spec: ModelSpec, weights: Mapping[str, MappedTensor], start: Mapping[str, MappedTensor]
) -> Backend:
    """The backend that the plan names, on these weights and with adapters that begin from `start`."""
    if plan.chosen.backend != GRAPH_BACKEND:
        from edge_runtime.training.torch_backend import TorchBackend

        return TorchBackend(spec, weights, plan, job["threads"], start)
    from edge_runtime.training.graph_backend import GraphBackend

    return GraphBackend(spec, weights, plan, graphs_of(job, spec), job["threads"], Path(job["cache"]), start)


def frozen_of(job: Job, spec: ModelSpec, plan: Plan) -> dict[str, MappedTensor]:
    """Where the weights lie, those of blocks that the plan does not train with what the fleet's adapters add to them."""
    from edge_runtime.version_weights import merged

    weights, adapters = weights_of(job), weights_of(job, "adapters")
    if not adapters:
        return weights
    below = spec.num_blocks - plan.chosen.depth
    return merged(spec, weights, adapters, job["adapter_scale"], Path(job["cache"]), below=below)


def graphs_of(job: Job, spec: ModelSpec) -> GraphSet:
    """The graph set that a job names, if it is this model's: it may have come over the network.

    Raises:
        ModelError: it is another model's.
    """
    from edge_runtime.graphs.find import read_graphs
    from edge_runtime.graphs.match import misfit

    graphs = read_graphs(Path(job["graphs"]))
    if reason := misfit(graphs, spec):
        raise ModelError(f"the training graphs in {job['graphs']} are not this model's: {reason}")
    return graphs


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


def train(job: Job, saved: Saved | None = None) -> dict[str, Any]:
    """Train as planned and write the update: every trained tensor's delta in the plan's codec, in the order of `layout.py`.

    Where the job names smaller candidates, memory is watched, and training goes on as one of them when it gets short.
    """
    from edge_runtime.training.backoff import Pressure, begin_again, on_disk, put_aside
    from edge_runtime.training.loop import Progress, accuracy, run

    spec, plan = spec_of(job), plan_of(job)
    pruned = pruned_training(job, spec, plan) if plan.pruning else None
    trained = pruned or Unpruned(backend_of(job, spec, plan))
    data = Corpus(Path(job["corpus"]))
    cache, pays = open_cache(job, spec, plan, data)
    done = saved.restore(trained.backend) if saved else Progress()
    rows: tuple[CostRow, ...] = from_plain(tuple[CostRow, ...], job.get("smaller", []), "smaller")
    pressure = Pressure(
        [row for row in rows if row.peak_bytes < plan.chosen.peak_bytes], own_cgroup=bool(job.get("cgroup"))
    )
    last = 0.0

    def stop() -> bool:
        return ORDERS.paused or (pruned.is_due(len(done.losses)) if pruned else pressure.is_short())

    def kept() -> dict[str, Any]:
        done.peak_bytes = max(done.peak_bytes, process_memory().get("VmHWM", 0))
        first = {"started": job.get("started", STARTED), "first": job.get("first", job["plan"]["chosen"])}
        return {**job, **first}

    def save() -> None:
        put_aside(kept(), done, trained.backend.arrays(), job["pause_file"])

    def hold() -> None:
        can_leave = not pruned and "pause_file" in job  # of a training that prunes the stages would have to be kept too
        seconds = ORDERS.hold(lambda: emit(paused=len(done.losses)), save if can_leave else None)
        if seconds:
            done.paused_s += seconds
            emit(resumed=len(done.losses))

    def progress(step: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        done.start_s = done.start_s or now - STARTED
        if now - last > 0.2 or step == plan.steps:
            last = now
            emit(step=step, steps=plan.steps, loss=round(loss, 5))

    if saved and saved.is_smaller:
        emit(step=len(done.losses), steps=plan.steps, loss=done.losses[-1], smaller=to_plain(plan.chosen))
    elif saved:
        emit(resumed=len(done.losses))
    try:
        hold()
        while not run(trained.backend, data, plan, done, progress, cache, pays, stop):
            if pruned:
                pruned.prune(len(done.losses))
            if ORDERS.paused:
                hold()
            elif pressure.is_short():
                chosen = {"plan": {**job["plan"], "chosen": to_plain(pressure.smaller)}}
                with contextlib.suppress(OSError):  # no disk, or no room on it: go on as it is
                    folder = on_disk(Path(job["update"]).parent, Path(job["cache"]))
                    begin_again({**kept(), **chosen}, done, trained.backend.arrays(), folder)
                pressure.give_up()
        if pruned and plan.steps == 1:  # nobody is asked to stop after the last step
            pruned.prune(1)
    finally:
        if cache is not None:
            cache.close()
    peak = max(done.peak_bytes, process_memory().get("VmHWM", 0))
    first: CostRow = from_plain(CostRow, job["first"], "plan") if "first" in job else plan.chosen
    held_out = (
        accuracy(trained.backend, Corpus(Path(job["test_corpus"])), plan.chosen.micro_batch)
        if job.get("test_corpus")
        else None
    )
    codec = update(job, *((pruned.spec, plan, pruned.deltas()) if pruned else (spec, plan, trained.backend.deltas())))
    if pruned:
        pruned.close()
    report = TrainReport(
        depth=plan.chosen.depth,
        checkpointing=plan.chosen.checkpointing,
        micro_batch=plan.chosen.micro_batch,
        backend=trained.backend.name,
        num_examples=len(data),
        steps=len(done.losses),
        first_loss=done.losses[0],
        last_loss=done.last_loss,
        train_s=done.seconds,
        total_s=time.monotonic() - job.get("started", STARTED) - done.paused_s,
        peak_bytes=max(peak, process_memory().get("VmHWM", 0)),
        promised_peak_bytes=first.peak_bytes,
        promised_s=first.total_s(plan.settings.epochs),
        accuracy=held_out,
        cpu_s=done.cpu_s,
        start_s=done.start_s,
        rank=plan.chosen.rank,
        precision=plan.chosen.precision,
        cached=cache is not None,
        backed_off=done.backed_off,
        codec=codec,
        sparsity=pruned.kept.sparsity(spec) if pruned else 0.0,
        kept=pruned.kept.encode().hex() if pruned else "",
        paused_s=done.paused_s,
    )
    return {"report": to_plain(report)}


@dataclass
class Unpruned:
    """A training whose backend stays: what `PrunedTraining` is without stages."""

    backend: Backend


def pruned_training(job: Job, spec: ModelSpec, plan: Plan) -> PrunedTraining:
    """The stages of a plan that prunes."""
    from edge_runtime.training.pruned import PrunedTraining

    def make(left: ModelSpec, weights: Mapping[str, MappedTensor], start: Mapping[str, MappedTensor]) -> Backend:
        return make_backend(job, plan, left, weights, start)

    return PrunedTraining(spec, weights_of(job), weights_of(job, "adapters"), plan, make, Path(job["update"]))


def update(job: Job, spec: ModelSpec, plan: Plan, deltas: Iterator[tuple[str, Array]]) -> str:
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


def probe(job: Job) -> dict[str, Any]:
    """Measure what the planner's formulas cannot know of this machine."""
    from edge_runtime.training.probe import Probed, measure_graphs, measure_torch

    choices = {
        key: job[key]
        for key in ("mean", "longest", "threads", "optimizer", "rank", "targets", "precision", "room", "limit")
    }
    probed = Probed(spec_of(job), weights_of(job), **choices)
    if job["backend"] == GRAPH_BACKEND:
        found = measure_graphs(probed, graphs_of(job, probed.spec), Path(job["cache"]))
    else:
        found = measure_torch(probed)
    return {"calibration": to_plain(found)}


def evaluate(job: Job) -> dict[str, Any]:
    """Classify a tokenised data set with what is left of a model; -> for each label how many are right, and how many there are."""
    from edge_runtime.records import TrainSettings
    from edge_runtime.training.loop import classified
    from edge_runtime.version_weights import left

    whole, size = spec_of(job), job["batch_size"]
    plan = Plan(CostRow(0, False, size, 0, 0.0, 0.0, 0, backend=job["backend"]), TrainSettings(batch_size=size), 0)
    weights = frozen_of(job, whole, plan)
    spec, weights = left(whole, weights, bytes.fromhex(job.get("kept", "")), Path(job["cache"]))
    backend = make_backend(job, plan, spec, weights, {})
    right, total = [0] * len(spec.labels), [0] * len(spec.labels)
    for label, is_right in classified(backend, Corpus(Path(job["corpus"])), size):
        total[label] += 1
        right[label] += is_right
    return {"right": right, "total": total}


def derive(job: Job) -> dict[str, Any]:
    """Derive a model's training graphs and write them to a file."""
    from edge_runtime.graphs.bundle import encode_graphs
    from edge_runtime.graphs.derive import derive

    graphs = encode_graphs(derive(spec_of(job), weights_of(job)))
    with atomic_writer(Path(job["graphs"])) as file:
        file.write(graphs)
    return {}


JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "corpus": corpus,
    "train": train,
    "probe": probe,
    "evaluate": evaluate,
    "derive": derive,
}


def read_job() -> tuple[Job, Saved | None]:
    """-> (the job that standard input names, or that a training was saved with; that training)."""
    from edge_runtime.training.backoff import Saved

    if len(sys.argv) > 1:  # it goes on in smaller pieces
        saved = Saved(int(sys.argv[1]))
        return saved.job, saved
    job = json.loads(sys.stdin.readline())
    if not job.get("resume"):
        return job, None
    saved = Saved(os.dup(job["pause_file"]))  # it was paused, and its process gone meanwhile
    return {**saved.job, "cgroup": job["cgroup"], "pause_file": job["pause_file"]}, saved


def main() -> int:
    """Run the one job that standard input names."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")  # if memory runs out, this process goes and not the device
    job, saved = read_job()
    if job.get("cgroup"):
        Path(job["cgroup"]).write_text(str(os.getpid()))
    threading.Thread(target=ORDERS.listen, args=(sys.stdin,), daemon=True).start()
    try:
        if job["job"] not in JOBS:
            raise UsageError(f"no such job: {job['job']!r}")
        emit(result=train(job, saved) if saved else JOBS[job["job"]](job))
    except Left:
        emit(left=True)
    except EdgeError as error:
        emit(error=str(error), kind=type(error).__name__)
        return error.exit_code
    except MemoryError:
        emit(error="out of memory", kind="MemoryError")
        return 1
    except RuntimeError as error:  # torch says so when its allocator gets nothing
        if "allocate" not in str(error):
            raise
        emit(error=str(error).splitlines()[0][:200], kind="MemoryError")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
