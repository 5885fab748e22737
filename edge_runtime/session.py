"""What a device can do with the fleet's model and its own data: tokenised corpus, calibration, cost table, budgets.

Between the agent, which talks, and the planner, which is pure. Remembers what is slow to make, for as long as model shape
and data file stay the same. Runs worker processes; imports no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge_runtime import hardware
from edge_runtime.budget import keeping_free, memory_budget
from edge_runtime.calibration import Remembered, calibrate, remembered
from edge_runtime.codecs import update_bytes
from edge_runtime.cost import Calibration, DataShape, cost, trained
from edge_runtime.engine import Engine, EngineOptions, check_options, find_engine
from edge_runtime.kinds import kinds
from edge_runtime.local import DataOptions, prepare
from edge_runtime.manifest import Manifest
from edge_runtime.model import ModelSpec
from edge_runtime.planner import MAX_ROWS, cost_table, offered_ranks, smaller_rows
from edge_runtime.prune_plan import planned, time_share
from edge_runtime.records import Budget, CostRow, DeviceProfile, Plan, TrainSettings
from edge_runtime.source import Checkpoint, Source
from edge_runtime.store import BlobStore
from edge_runtime.training.process import model_job, plan_job
from edge_runtime.wire import to_plain


@dataclass(frozen=True)
class CouldDo:
    """What this device could train for a round."""

    rows: tuple[CostRow, ...]
    budget: Budget
    data: DataShape
    spec: ModelSpec
    settings: TrainSettings
    calibration: Calibration
    cached: bool
    adapters: str = ""  # what of LoRA the fleet exchanges

    def ours(self, plan: Plan) -> Plan:
        """A granted plan with the cost that this device computes for it, whatever the grant says."""
        asked, settings = plan.chosen, plan.settings
        what = trained(self.spec, asked.depth, settings, plan.block_ranks, plan.adapters)
        how = (asked.checkpointing, asked.micro_batch, asked.cached, asked.codec)
        row = cost(self.spec, self.data, settings, self.calibration, what, *how)
        if plan.pruning:
            share, num_bytes = time_share(self.spec, plan), update_bytes(planned(self.spec, plan), asked.codec)
            seconds = (share * row.step_s, share * row.epoch_s, share * row.later_epoch_s)
            row = replace(row, step_s=seconds[0], epoch_s=seconds[1], later_epoch_s=seconds[2], upload_bytes=num_bytes)
        return replace(plan, chosen=row)

    def rows_within(self, memory_bytes: int) -> tuple[CostRow, ...]:
        """The table for another memory budget."""
        budget = replace(self.budget, memory_bytes=memory_bytes)
        what = (self.spec, self.data, self.settings, self.calibration, budget, self.cached, self.adapters)
        return tuple(cost_table(*what, offered_ranks(self.spec, self.settings, self.adapters)))


class Session:
    """One device's data and limits."""

    def __init__(
        self, data: Path, cache: Path, *, memory: str, time_s: float | None, upload_bytes: int | None, threads: int, options: DataOptions,
        say: Callable[[str], None], engine: EngineOptions | None = None, keep_free_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Args: keep_free_bytes: of the memory that is available, which budgets leave to others."""
        self.threads = threads
        self._data, self._cache, self._memory, self._options, self._say = data, cache, memory, options, say
        self._time_s, self._upload_bytes, self._keep_free_bytes = time_s, upload_bytes, keep_free_bytes
        self._engine = check_options(engine or EngineOptions())
        self._made: dict[object, _Made] = {}  # by `_choices`

    def forget(self) -> None:
        """Make the tokenised data anew when it is next needed: what is on disk may be damaged."""
        for made in self._made.values():
            shutil.rmtree(made.corpus, ignore_errors=True)
        self._made = {}

    def profile(self) -> DeviceProfile:
        """This machine now, without the speed probe."""
        return keeping_free(hardware.profile(speed=False), self._keep_free_bytes)

    def budget(self) -> Budget:
        """The limits now."""
        return Budget(memory_budget(self._memory, self.profile()), self._time_s, self._upload_bytes)

    def job(self, manifest: Manifest, store: BlobStore, plan: Plan) -> dict[str, object]:
        """What a training process needs besides where its update goes: plan, model, tokenised data, backend."""
        made = self._prepare(manifest, store, plan.settings)
        rows = smaller_rows(manifest.spec, made.data, made.calibration, plan)
        return {
            **plan_job(plan),
            "smaller": to_plain(rows) if self._memory == "auto" and not plan.pruning else [],
            **model_job(
                "train", manifest.spec, manifest.mapped(store), manifest.mapped_adapters(store), manifest.adapter_scale
            ),
            **made.engine.job(self._cache),
            "corpus": str(made.corpus),
            "test_corpus": None,
            "threads": self.threads,
        }

    def could_do(self, manifest: Manifest, store: BlobStore, settings: TrainSettings, adapters: str = "") -> CouldDo:
        """The cost table for a round's settings, of every kind that it asks for; the rest is the first kind's.

        Args: adapters: what of LoRA the fleet exchanges, as in a plan.

        Raises:
            DataError, MissingExtra, TrainingFailed: the data cannot be read, no backend is here, the probe failed.
        """
        budget, found = self.budget(), list[CouldDo]()
        for own, sent in kinds(settings, adapters):
            made = self._prepare(manifest, store, own)
            could = CouldDo((), budget, made.data, manifest.spec, own, made.calibration, made.engine.cached, sent)
            found.append(replace(could, rows=could.rows_within(budget.memory_bytes)))
        more = [row for could in found[1:] for row in could.rows if row.depth]  # the head is the same in all kinds
        return replace(found[0], rows=(*found[0].rows, *more[: MAX_ROWS - len(found[0].rows)]))

    def killed(self, manifest: Manifest, store: BlobStore, plan: Plan, limit_bytes: int) -> None:
        """A process was killed at its limit, above its promise: promise more for this model from now on."""
        made = self._prepare(manifest, store, plan.settings)
        place = self._remembered(manifest.spec, made, plan)
        self._use(made, place.correct(promised_bytes=plan.chosen.peak_bytes, limit_bytes=limit_bytes))

    def trained(self, spec: ModelSpec, plan: Plan, peak_bytes: int) -> None:
        """A training came to its end as planned: an earlier kill's correction may have been too much."""
        if made := self._made.get(_choices(plan.settings)):
            place = self._remembered(spec, made, plan)
            self._use(made, place.relax(promised_bytes=plan.chosen.peak_bytes, peak_bytes=peak_bytes))

    def _remembered(self, spec: ModelSpec, made: _Made, plan: Plan) -> Remembered:
        what = (spec, made.engine, made.data, plan.settings, self.threads, self._cache)
        return remembered(*what, budget_bytes=made.budget_bytes)

    def _use(self, made: _Made, calibration: Calibration | None) -> None:
        if calibration:
            for choices, known in self._made.items():
                if known is made:
                    self._made[choices] = replace(made, calibration=calibration)

    def _prepare(self, manifest: Manifest, store: BlobStore, settings: TrainSettings) -> _Made:
        """Tokenise and calibrate, or remember it: both depend on the model's shape, not on its weights."""
        stat = self._data.stat() if self._data.exists() else None
        choices = _choices(settings)
        key = (manifest.spec, manifest.tokenizer, manifest.graphs, stat and (stat.st_mtime_ns, stat.st_size))
        self._made = {of: known for of, known in self._made.items() if known.key == key and known.corpus.exists()}
        if choices not in self._made:
            checkpoint = Checkpoint(
                self._cache, store.path(manifest.tokenizer), manifest.max_length, manifest.labels, manifest.family
            )
            prepared = prepare(checkpoint, self._data, self._cache, self._options)
            if prepared.skipped:
                self._say(
                    f"{prepared.skipped} rows of {self._data} were skipped: {'; '.join(prepared.first_skipped[:3])}"
                )
            source = _source(manifest, store)
            shipped = store.path(manifest.graphs) if manifest.graphs else None
            engine = find_engine(source, self._engine, self._cache, self._say, shipped)
            budget_bytes = self.budget().memory_bytes
            calibration = calibrate(
                source,
                engine,
                prepared.data,
                settings,
                self.threads,
                self._cache,
                budget_bytes=budget_bytes,
                limit_bytes=memory_budget("auto", self.profile()),
            )
            self._made[choices] = _Made(key, prepared.corpus, prepared.data, engine, calibration, budget_bytes)
        return self._made[choices]


@dataclass(frozen=True)
class _Made:
    """What `_prepare` remembers, and what it belongs to."""

    key: object
    corpus: Path
    data: DataShape
    engine: Engine
    calibration: Calibration
    budget_bytes: int  # for which it was measured


def _choices(settings: TrainSettings) -> object:
    """What of the settings a calibration depends on."""
    return settings.optimizer, settings.lora_rank, settings.lora_targets


def _source(manifest: Manifest, store: BlobStore) -> Source:
    return Source(
        manifest.spec, manifest.mapped(store), store.path(manifest.tokenizer), {"model_version": str(manifest.version)}
    )
