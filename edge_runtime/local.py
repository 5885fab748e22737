"""Finetuning on one device, without a coordinator: what `edge-runtime plan` and `train` do, as Python functions.

    from edge_runtime import Device, plan, train, Predictor

No torch in this process: tokenising, calibration and training each run in a worker process that gives its memory back.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_runtime import hardware
from edge_runtime.budget import memory_budget, parse_bytes, parse_seconds
from edge_runtime.calibration import Remembered, calibrate, remembered
from edge_runtime.cost import Calibration, DataShape, shape_of
from edge_runtime.engine import Engine, EngineOptions, check_options, find_engine, torch_version
from edge_runtime.errors import DataError, DoesNotFit, StoreError, TrainingFailed, UsageError
from edge_runtime.gate import Gate
from edge_runtime.local_lora import beginning, begun, check_lora, results
from edge_runtime.model_folder import check_model_folder, save_folder
from edge_runtime.peft import Adapter, check_adapter_folder, fingerprint, read_adapter, write_adapter
from edge_runtime.planner import check_settings, choose, cost_table, make_plan, mib, over_budget, smaller_rows
from edge_runtime.records import Budget, CostRow, DeviceProfile, Plan, TrainReport, TrainSettings
from edge_runtime.source import (
    DEFAULT_FAMILY,
    Checkpoint,
    Source,
    delta_base,
    find_checkpoint,
    open_source,
)
from edge_runtime.store import cache_folder, gone_if_empty, read_json, scratch_folder
from edge_runtime.training.patient import PatientWorker
from edge_runtime.training.process import model_job, run_worker, wait_for
from edge_runtime.wire import from_plain, to_plain

SCRATCH = ".training."  # and the number of the process: in the folder that is written to


@dataclass(frozen=True)
class Device:
    """This machine, as the planner sees it: what it measured, and how many threads training may use."""

    profile: DeviceProfile
    threads: int

    @staticmethod
    def measure(threads: int | None = None, *, speed: bool = True) -> Device:
        """Measure this machine; about a second, or at once without the speed probe."""
        return Device(hardware.profile(speed=speed), threads or hardware.usable_cores())


@dataclass(frozen=True)
class DataOptions:
    """How to read a data file."""

    text_column: str = "text"
    label_column: str = "label"
    encoding: str | None = None
    bad_rows: str = "error"  # or "skip"


@dataclass(frozen=True)
class Prepared:
    """Data tokenised for a model: where it lies, its shape, and what was left out."""

    corpus: Path
    test_corpus: Path | None
    data: DataShape
    labels: tuple[str, ...]
    skipped: int
    first_skipped: tuple[str, ...]
    full: int = 0  # training texts of max_length tokens: what they have beyond is cut off


@dataclass(frozen=True)
class Planned:
    """The whole cost table with what fits, the choice and the reasons."""

    rows: tuple[CostRow, ...]
    why_not: tuple[str, ...]  # for each row; empty where it fits
    chosen: Plan | None
    refusal: str  # why nothing was chosen
    budget: Budget
    source: Source
    prepared: Prepared
    engine: Engine
    calibration: Calibration
    watched: bool = False  # the budget was "auto": training goes on in smaller pieces if memory gets short
    adapter: Adapter | None = None  # what the model begins with, beside its weights
    model: str = ""  # what it was called

    def smaller(self, plan: Plan) -> list[CostRow]:
        """What a plan can go on as if memory gets short."""
        return smaller_rows(self.source.spec, self.prepared.data, self.calibration, plan)


def prepare(
    checkpoint: Checkpoint,
    data: str | Path,
    cache: Path,
    options: DataOptions,
    *,
    holdout: float = 0.0,
    seed: int = 0,
    test: str | Path | None = None,
) -> Prepared:
    """Read and tokenise a data file in a worker process; what was done before is found again by its hash."""
    job = {
        "job": "corpus",
        "data": str(Path(data).absolute()),
        "tokenizer": str(checkpoint.tokenizer),
        "labels": checkpoint.labels,
        "max_length": checkpoint.max_length,
        "cache": str((cache / "corpora").absolute()),
        "holdout": holdout,
        "seed": seed,
        "test": str(Path(test).absolute()) if test else None,
        **dataclasses.asdict(options),
    }
    found = run_worker(job)
    shape = read_shape(Path(found["folder"]))
    test_corpus = Path(found["test_folder"]) if found["test_folder"] else None
    if test_corpus:  # what is measured at the end stays within the promise, too
        shape = dataclasses.replace(shape, longest=max(shape.longest, read_shape(test_corpus).longest))
    return Prepared(
        Path(found["folder"]),
        test_corpus,
        shape,
        tuple(found["labels"]),
        found["skipped"],
        tuple(found["first_skipped"]),
        _lengths(Path(found["folder"]))[checkpoint.max_length],
    )


def _lengths(corpus: Path) -> Counter[int]:
    """How many texts have each length in tokens."""
    return Counter({n: count for n, count in enumerate(read_json(corpus / "corpus.json")["lengths"]) if count})


def plan(
    model: str,
    data: str | Path,
    *,
    memory: str = "auto",
    time: str | None = None,
    upload: str | None = None,
    settings: TrainSettings | None = None,
    device: Device | None = None,
    max_length: int | None = None,
    family: str = DEFAULT_FAMILY,
    new_head: bool = False,
    options: DataOptions | None = None,
    engine: EngineOptions | None = None,
    holdout: float = 0.0,
    test: str | Path | None = None,
    adapter: str | Path | None = None,
    depth: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Planned:
    """What could be trained here: every suffix depth with and without gradient checkpointing, and the choice.

    Args:
        model: a checkpoint folder, an alias such as "minilm-l6", a hub id, or an agent's folder.
        data: CSV, TSV or JSON lines with a text and a label in each row.
        memory, time, upload: budgets, for example "450MB", "60%" or "auto"; "15m"; "2MB".
        engine: backend, precision of the frozen prefix, and whether its outputs may be cached on disk.
        holdout: share of the data kept for testing; `test` is a file for the same purpose.
        adapter: a folder with LoRA adapters, ours or PEFT's, to begin from; its rank and layers hold where the settings name
            none, its head where its labels are known.
        depth: that `train` will be asked for, so that a wrong one is told before anything is measured.

    Raises:
        UsageError, DataError, ModelError, MissingExtra: as their names say. That nothing fits is no error here.
    """
    settings = check_settings(settings or TrainSettings())
    device = device or Device.measure(speed=False)
    budget = Budget(
        memory_budget(memory, device.profile),
        parse_seconds(time) if time else None,
        parse_bytes(upload) if upload else None,
    )
    cache = cache_folder()
    engine = check_options(engine or EngineOptions())
    if engine.backend == "torch":
        torch_version()  # say at once that it is missing
    checkpoint = find_checkpoint(model, max_length=max_length, family=family, new_head=new_head, progress=progress)
    if adapter and settings.mask_every:
        raise UsageError(
            "--mask-every trains entries of the matrices, --adapter goes on with adapters: give one of them"
        )
    given = read_adapter(Path(adapter), checkpoint.family) if adapter else None
    if given and given.labels and not new_head:
        checkpoint = replace(checkpoint, labels=given.labels)
    progress("reading the data")
    prepared = prepare(
        checkpoint, data, cache, options or DataOptions(), holdout=holdout, seed=settings.seed, test=test
    )
    if len(prepared.labels) < 2:
        raise DataError(f"{data} has one label, {prepared.labels[0]!r}: a classifier needs examples of two at least")
    source = open_source(checkpoint, prepared.labels, cache)
    _check_depth(source, depth)
    if given:
        source, given, settings = begun(source, given, settings, new_head=new_head, progress=progress)
    check_lora(source.spec, settings, depth, given)
    found = find_engine(source, engine, cache, progress)
    progress("measuring this machine with the model")
    calibration = calibrate(
        source,
        found,
        prepared.data,
        settings,
        device.threads,
        cache,
        budget_bytes=budget.memory_bytes,
        limit_bytes=memory_budget("auto", device.profile),
    )
    cached = found.cached and settings.epochs > 1
    rows = cost_table(source.spec, prepared.data, settings, calibration, budget, cached)
    why_not = tuple(over_budget(row, budget, settings.epochs) for row in rows)
    chosen, refusal = None, ""
    try:
        chosen = make_plan(choose(rows, budget, settings.epochs), prepared.data, settings)
    except DoesNotFit as error:
        refusal = str(error)
    watched = memory == "auto"
    parts = (source, prepared, found, calibration, watched, given, model)
    return Planned(tuple(rows), why_not, chosen, refusal, budget, *parts)


@dataclass(frozen=True)
class Trained:
    """The finetuned model's folder, what its training took, and how it was kept within its limit."""

    folder: Path
    report: TrainReport
    enforced_by: str


def train(
    planned: Planned,
    out: str | Path | None,
    *,
    device: Device | None = None,
    depth: int | None = None,
    delta: bool = False,
    adapter_out: str | Path | None = None,
    gate: Gate | None = None,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    note: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Carry out a plan in a worker process under its memory budget, and save the model as a folder.

    Args:
        planned: from `plan`.
        depth: train this suffix depth instead of the deepest that fits.
        out: folder for the whole model; None with `adapter_out` alone.
        delta: write only the trained tensors and a reference to the base's folder, which must stay as it is.
        adapter_out: folder for the adapters and the head alone, which PEFT reads too.
        gate: the conditions; training pauses while they do not hold, and comes after what else the device does.
        progress: called with (step, steps, loss).
        note: called with what is waited for.

    Raises:
        DoesNotFit: nothing fits, or the asked depth does not.
        TrainingFailed: the process ended without a result.
    """
    out, adapter_out = Path(out) if out else None, Path(adapter_out) if adapter_out else None
    device = device or Device.measure(speed=False)
    check_outputs(out, adapter_out, delta=delta)
    base = delta_base(planned.source, out) if delta and out else None
    chosen = _chosen(planned, depth)
    check_lora(planned.source.spec, chosen.settings, depth, planned.adapter)
    if adapter_out and not planned.adapter and not chosen.chosen.rank:
        raise UsageError("there will be no adapters to write: give --lora-rank, room for a block, or no --adapter-out")
    folder = out or adapter_out
    assert folder, "one of them was asked for"
    with gone_if_empty(folder), scratch_folder(folder, SCRATCH) as scratch:
        source, update = planned.source, scratch / "update.f32"
        weights, start = beginning(source, planned.adapter, chosen, scratch)
        job = (
            model_job("train", source.spec, weights, start)
            | planned.engine.job(cache_folder())
            | {
                "plan": to_plain(replace(chosen, chosen=replace(chosen.chosen, codec="f32"))),  # it stays here
                "corpus": str(planned.prepared.corpus),
                "test_corpus": str(planned.prepared.test_corpus) if planned.prepared.test_corpus else None,
                "smaller": to_plain(planned.smaller(chosen)) if planned.watched else [],
                "threads": device.threads,
                "update": str(update.absolute()),
            }
        )
        conditions = gate or Gate(())
        worker = PatientWorker(
            job,
            conditions,
            folders=(scratch, cache_folder()),
            peak_bytes=chosen.chosen.peak_bytes,
            limit_bytes=planned.budget.memory_bytes,
            threads=device.threads,
            nice=0,
        )

        def other(line: dict[str, Any]) -> None:
            if "paused" in line:
                note(f"paused after step {line['paused']} of {chosen.steps}, waiting: {conditions.words}")
            elif "resumed" in line:
                note(f"goes on after step {line['resumed']} of {chosen.steps}")

        try:
            report: TrainReport = from_plain(TrainReport, wait_for(worker, progress, other=other)["report"], "report")
        except TrainingFailed as error:
            raise _corrected(error, planned, chosen, device) from None
        if not report.backed_off:
            _remembered(planned, chosen, device).relax(
                promised_bytes=chosen.chosen.peak_bytes, peak_bytes=report.peak_bytes
            )
        changed, adapter = results(source.spec, chosen, weights, start, planned.adapter, update, scratch)
        if adapter_out and adapter:
            adapter = replace(adapter, base=fingerprint(source.spec, source.weights))
            write_adapter(adapter_out, adapter, planned.model)
        if out:
            save_folder(out, source.spec, changed, source.tokenizer, base)
    return Trained(folder, report, worker.enforced_by)


def check_outputs(out: Path | None, adapter_out: Path | None, *, delta: bool) -> None:
    """Whether a training's results may be written where they are to go: asked before anything long begins, too.

    Raises:
        UsageError: they may not.
    """
    if out is None and adapter_out is None:
        raise UsageError("name a folder for the model, --out, or for its adapters, --adapter-out")
    if delta and out is None:
        raise UsageError("--delta says how the model is written: name its folder, --out")
    if out and adapter_out and out.absolute() == adapter_out.absolute():
        raise UsageError("--out and --adapter-out are one folder: name two")
    if adapter_out:
        check_adapter_folder(adapter_out)
    if out:
        check_model_folder(out)


def _corrected(error: TrainingFailed, planned: Planned, plan: Plan, device: Device) -> TrainingFailed:
    """The error; if the process was killed at its limit, this machine's calibration now promises more."""
    if not error.out_of_memory:
        return error
    promised = plan.chosen.peak_bytes
    _remembered(planned, plan, device).correct(promised_bytes=promised, limit_bytes=planned.budget.memory_bytes)
    return TrainingFailed(
        f"{error}, though {mib(promised)} were promised: the promises for this model are corrected, run the command again",
        out_of_memory=True,
    )


def _remembered(planned: Planned, plan: Plan, device: Device) -> Remembered:
    what = (planned.source.spec, planned.engine, planned.prepared.data, plan.settings)
    return remembered(*what, device.threads, cache_folder(), budget_bytes=planned.budget.memory_bytes)


def _check_depth(source: Source, depth: int | None) -> None:
    if depth is not None and not 0 <= depth <= source.spec.num_blocks:
        raise UsageError(f"the model has depths 0 to {source.spec.num_blocks}, not {depth}")


def _chosen(planned: Planned, depth: int | None) -> Plan:
    if planned.chosen is None:
        raise DoesNotFit(planned.refusal, needed_bytes=min(row.peak_bytes for row in planned.rows))
    if depth is None:
        return planned.chosen
    of_depth = [(row, why) for row, why in zip(planned.rows, planned.why_not, strict=True) if row.depth == depth]
    _check_depth(planned.source, depth)
    if not of_depth:
        raise DoesNotFit(f"depth {depth} does not fit: there was not enough memory even to measure a block")
    fitting = [row for row, why in of_depth if not why]
    if not fitting:
        raise DoesNotFit(
            f"depth {depth} does not fit: {of_depth[-1][1]}", needed_bytes=min(r.peak_bytes for r, _ in of_depth)
        )
    row = min(fitting, key=lambda r: r.epoch_s)
    return make_plan(row, planned.prepared.data, planned.chosen.settings)


def read_shape(corpus: Path) -> DataShape:
    """What the costs depend on in a tokenised data set.

    Raises:
        StoreError: it is damaged.
    """
    stats = read_json(corpus / "corpus.json")
    try:
        return shape_of(stats["lengths"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise StoreError(f"{corpus / 'corpus.json'} is damaged: delete the folder {corpus}") from None
