"""Simulates a fleet: the real coordinator and virtual devices in one process, by a virtual clock; training in worker processes.

Rounds, methods, ledger, sums and model versions are those of `edge-coordinator serve`, driven here message by message.
A simulation's folder is a fleet's folder with result files in it; after a kill it goes on from the last round in them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_coordinator.fleet import SIMULATED, Fleet
from edge_coordinator.methods import METHODS
from edge_coordinator.models import Models
from edge_coordinator.server import Server
from edge_coordinator.sim.classes import DeviceClass, read_budgets
from edge_coordinator.sim.clock import Clock, nothing
from edge_coordinator.sim.devices import Plans, VirtualDevice, VirtualFleet
from edge_coordinator.sim.making import SimOptions, calibrated, calibrations, check_options, make_devices
from edge_coordinator.sim.pool import Pool, Start, on_this_machine
from edge_coordinator.sim.residuals import Residuals
from edge_coordinator.sim.results import Results, Row
from edge_runtime import hardware
from edge_runtime.cost import Calibration
from edge_runtime.engine import Engine, EngineOptions, find_engine
from edge_runtime.errors import StoreError, UsageError
from edge_runtime.local import Prepared, prepare
from edge_runtime.manifest import Manifest
from edge_runtime.model import ModelSpec
from edge_runtime.source import Checkpoint, Source
from edge_runtime.store import cache_folder, file_sha256
from edge_runtime.topics import COORDINATOR, Topics
from edge_runtime.training.corpus import Corpus
from edge_runtime.training.process import model_job, run_worker
from edge_runtime.transport import LocalBroker, LocalTransport, Message
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import from_plain, to_plain

WORK_FOLDER, RESIDUAL_FOLDER = "work", "residual"
MASKED = "masked_calibration"  # in sim.json, beside "calibration"


class Simulation:
    """One simulated fleet. Holds index lists and small records; models and updates are on disk."""

    def __init__(
        self, folder: Path, options: SimOptions, *, progress: Callable[[Row], None], say: Callable[[str], None], keep_going: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Read data, calibrate this machine once, make the devices, and go to the last round that is in the results.

        Args: progress: called with what happens in a round (a committed update) and with each finished round's row.

        Raises:
            UsageError: options that make no sense, or other ones than the folder's simulation had.
            DataError, ModelError, MissingExtra, StoreError: as their names say.
        """
        check_options(options)
        self.options, self._progress, self._keep_going = options, progress, keep_going
        self.fleet = Fleet(folder)
        self.results = Results(folder)
        self._mark(folder)
        self._rewind()
        self.models: Models = self.fleet.models(say)
        config, newest = self.fleet.config, self.models.newest()
        assert newest, "the first model was just imported"
        manifest = newest[0]
        say("reading the data")
        self._prepared = _prepare(manifest, self.models, options)
        self.corpus = Corpus(self._prepared.corpus)
        self.engine = _engine(manifest, self.models, say)
        kinds = [kind for kind, _ in options.kinds]
        self.spec: ModelSpec = manifest.spec
        devices = make_devices(options, self.spec.labels, self.corpus, config.train.seed)  # first: options may be wrong
        settings = self.results.settings(self._description(kinds), lambda: self._calibrated(manifest, say))
        calibrated, masked = (self._of_classes(settings.get(name), kinds) for name in ("calibration", MASKED))
        self._enroll([d.name for d in devices])

        last = self.results.last or {"round": 0, "closed_s": 0.0, "devices": []}
        self.clock = Clock(last["closed_s"] + (config.run.pause_s if last["round"] else 0.0))
        self.broker = LocalBroker()
        start, workers = _start(options)
        self.pool = Pool(folder / WORK_FOLDER, workers, start, keep_going)
        self.virtual = VirtualFleet(
            devices, self.broker, config.realm, self.clock, self.pool,
            plans=Plans(self.spec, calibrated, self.engine.cached, masked),
            engine=self.engine, corpus=self.corpus, store=self.models.store, updates=self.models.updates,
            residuals=Residuals(folder / RESIDUAL_FOLDER), seed=config.train.seed, dropout=options.dropout, threads=options.threads,
        )  # fmt: skip
        self.virtual.recall(last)
        self._recall(devices)
        if config.run.goal > len(devices):
            say(
                f"[run] goal is {config.run.goal} of {len(devices)} devices: every round waits join_timeout_s for more of them"
            )
        self._opened_s = self.clock.now_s
        self._counts: dict[str, int] = {}  # of the round that is open
        self._ended: dict[str, Any] = {}  # the coordinator's event that ended a round, until it is in the results
        self._transport = LocalTransport(self.broker, COORDINATOR, Topics(config.realm).coordinator_filters())
        self.server = Server(config, self.fleet.ledger, self.models, self._transport, self._happened, clock=self.clock)
        self._before = self._manifest_of(last.get("model_version"))
        self._begun: Row = {}  # of the round that is open
        self._hold()

    @property
    def finished(self) -> bool:
        """Every round of the run is in the results."""
        return self.server.run.finished and not self._ended

    @property
    def num_published(self) -> int:
        """Rounds that gave a model."""
        return sum(row["state"] == "published" for row in self.results.rows())

    def run(self) -> None:
        """Simulate until the run has had its rounds.

        Raises:
            KeyboardInterrupt: `keep_going` turned False; what is done is kept.
            TrainingFailed: this machine could not train an update.
        """
        self._transport.start()
        self.virtual.transport.start()
        try:
            if self.results.last is None:
                self._write(self._accuracy_row())
            while not self._settle():
                if not self._keep_going():
                    raise KeyboardInterrupt
                if not self.clock.step():
                    raise AssertionError("nothing is due, and the run is not finished")
        finally:
            self.pool.close()
            self.results.write_tables()

    # the loop

    def _settle(self) -> bool:
        """Let everybody read and answer until nobody has anything to say; -> whether the run is finished."""
        while True:
            self._exchange()
            self.server.tick()
            if self._ended:
                self._end_round()
            if self.finished:
                return True
            if not self._transport.inbox and not self.virtual.transport.inbox:
                return False

    def _exchange(self) -> None:
        """Deliver what was sent, and what is sent in answer, until all is read: an answer counts before the round ends."""
        while self._transport.inbox or self.virtual.transport.inbox:
            while (event := self._transport.next_event(0.0)) is not None:
                self.server.handle(event)
            while (event := self.virtual.transport.next_event(0.0)) is not None:
                if isinstance(event, Message):
                    self.virtual.handle(event)

    def _happened(self, event: dict[str, Any]) -> None:
        """What the coordinator reports: its deadlines become times of the clock."""
        kind, run, now_s = event["event"], self.fleet.config.run, self.clock.now_s
        if kind == "round-opened":
            self._hold()  # the round may begin with other adapters
            self._opened_s, self._counts = now_s, {}
            self.clock.at(now_s + run.join_timeout_s, nothing)
        elif kind == "round-planned":
            self._counts = {"members": event["members"], "planned": event["planned"]}
            self.clock.at(now_s + run.report_timeout_s, nothing)
        elif kind == "committed":
            self._progress(
                {"committed": event["device"], "round": event["round"], "goal": min(run.goal, self._counts["planned"])}
            )
        elif kind in ("round-published", "round-failed"):
            self._ended = event
            self.clock.at(now_s + run.pause_s, nothing)
        elif kind == "bad-message":  # of our own devices: a value of their class that no message may hold
            raise UsageError(
                f"{event['device']} said what no device may say: {event['reason']}; is a figure of its class too large?"
            )
        elif kind == "storage-error":  # a coordinator waits for the disk to be mended; nobody mends it in virtual time
            raise StoreError(event["reason"])

    def _end_round(self) -> None:
        """The coordinator has published or given up a round: measure, write it down, and forget what it needed."""
        event, self._ended = self._ended, {}
        published = event["event"] == "round-published"
        manifest = self.server.run.manifest
        parts = self.virtual.downloads.publish(self._before, manifest)
        self._before = manifest
        begun, self._begun = self._begun, {}
        self._hold()
        work = self.virtual.end_round()
        row: Row = {
            "round": event["round"],
            "state": "published" if published else "failed",
            "model_version": manifest.version,
            "opened_s": round(self._opened_s, 6),
            "closed_s": self.clock.now_s,
            "round_s": round(self.clock.now_s - self._opened_s, 6),
            **_summary(work, self._counts),
            "num_examples": event.get("num_examples", 0),
            "mean_loss": event.get("mean_loss"),
            **({"sparsity": event["sparsity"]} if "sparsity" in event else {}),
            "reason": "; ".join(filter(None, [event.get("reason", ""), "" if published else _why(work)])),
        }
        last = event["round"] >= self.fleet.config.run.rounds
        if self.options.test and (last or event["round"] % self.options.evaluate_every == 0):
            row |= self._accuracies(manifest)
        self._write(row | begun | {"changed_parts": parts, "devices": work})
        self.virtual.settle(event["round"], work)

    def _hold(self) -> None:
        """The version that is served from now on. One that no round has made is what the next round begins with."""
        run = self.server.run
        if run.manifest.version != self._before.version:
            parts = self.virtual.downloads.publish(self._before, run.manifest)
            self._begun = {"begun_version": run.manifest.version, "begun_parts": parts}
            self._before = run.manifest
        self.virtual.hold(run.manifest, self.models.store.size(run.manifest_blob))

    def _write(self, row: Row) -> None:
        self.fleet.ledger.sync()  # the results are never ahead of the ledger
        self.results.add(row)
        self._progress(row)

    # accuracy

    def _accuracy_row(self) -> Row:
        """The model before the first round."""
        row: Row = {
            "round": 0,
            "state": "start",
            "model_version": self._before.version,
            "opened_s": 0.0,
            "closed_s": 0.0,
            "round_s": 0.0,
        }
        return (
            row | (self._accuracies(self._before) if self.options.test else {}) | {"changed_parts": [], "devices": []}
        )

    def _accuracies(self, manifest: Manifest) -> Row:
        """Accuracy on the test file, and for each device class by the labels that its devices hold."""
        assert self._prepared.test_corpus, "asked for with a test file alone"
        job = {
            **model_job("evaluate", manifest.spec, *self._mapped(manifest)),
            **self.engine.job(cache_folder()),
            "corpus": str(self._prepared.test_corpus),
            "batch_size": self.fleet.config.train.batch_size,
            "threads": self.options.threads,
        }
        found = run_worker(job, threads=self.options.threads)
        right, total = found["right"], found["total"]
        by_label = [r / t if t else None for r, t in zip(right, total, strict=True)]
        by_class = {}
        for kind in sorted({d.kind.name for d in self.virtual.devices.values()}):
            counts = self._labels_of(kind)
            known = [
                (count, share) for count, share in zip(counts, by_label, strict=True) if share is not None and count
            ]
            if known:
                by_class[kind] = round(sum(c * s for c, s in known) / sum(c for c, _ in known), 5)
        return {"accuracy": round(sum(right) / sum(total), 5), "accuracy_of": by_class}

    def _mapped(self, manifest: Manifest) -> tuple[dict[str, MappedTensor], dict[str, MappedTensor], float, bytes]:
        store = self.models.store
        return manifest.mapped(store), manifest.mapped_adapters(store), manifest.adapter_scale, manifest.kept

    def _labels_of(self, kind: str) -> list[int]:
        """How many examples of each label the devices of a class hold."""
        counts = [0] * len(self.spec.labels)
        for device in self.virtual.devices.values():
            if device.kind.name == kind:
                for label in self.corpus.labels[list(device.part)]:
                    counts[int(label)] += 1
        return counts

    # making it

    def _mark(self, folder: Path) -> None:
        ledger = self.fleet.ledger
        if ledger.get(SIMULATED) is None and (ledger.devices() or ledger.rounds()):
            raise UsageError(f"{folder} is a real fleet's: `edge-coordinator init` another folder to simulate in")
        ledger.put(SIMULATED, "1")
        ledger.sync_when_told()

    def _rewind(self) -> None:
        """What the ledger has beyond the results is simulated again; trainings that are done are still on disk."""
        last = self.results.last
        with self.fleet.ledger.transaction():
            self.fleet.ledger.rewind(self.fleet.config.run.name, last["round"] if last else 0)

    def _description(self, kinds: Sequence[DeviceClass]) -> Row:
        """What must be the same when a simulation goes on."""
        config, options = self.fleet.config, self.options
        return {
            "model": {
                "base": config.model.base,
                "labels": len(config.model.labels),
                "max_length": config.model.max_length,
            },
            "run": {k: v for k, v in to_plain(config.run).items() if k != "rounds"},
            "train": to_plain(config.train),
            "data": file_sha256(options.data).hex(),
            "test": file_sha256(options.test).hex() if options.test else "",
            "reading": dataclasses.asdict(options.reading),
            "devices": options.devices,
            "classes": options.classes,
            "figures": {kind.name: to_plain(kind) for kind in kinds},
            "budgets": {name: to_plain(own) for name, own in read_budgets(options.class_file).items()},
            "partition": options.partition,
            "dropout": options.dropout,
            "evaluate_every": options.evaluate_every,
            "threads": options.threads,
        }

    def _calibrated(self, manifest: Manifest, say: Callable[[str], None]) -> Row:
        """What this machine measured with the run's settings, and without adapters where the method has rounds or plans so."""
        config, source = self.fleet.config, _source(manifest, self.models)
        method, options = METHODS[config.run.method], config.run.method_options
        first = method.stage({}, 1, manifest.num_blocks, config.train, options).settings
        measured = {"calibration": config.train} | (
            {MASKED: dataclasses.replace(first, lora_rank=0)} if first.mask_every > config.train.mask_every else {}
        )
        data, threads = self._prepared.data, self.options.threads
        return {n: to_plain(calibrated(source, self.engine, data, s, threads, say)) for n, s in measured.items()}

    def _of_classes(self, measured: Any, kinds: Sequence[DeviceClass]) -> Mapping[str, Calibration]:
        if measured is None:
            return {}
        found: Calibration = from_plain(Calibration, measured, "calibration")
        return calibrations(found, self.spec, self._prepared.data, self.fleet.config.train.batch_size, kinds)

    def _manifest_of(self, version: int | None) -> Manifest:
        """The version that the last round in the results ended with; the newest before there are any."""
        rows = {row.version: row for row in self.fleet.ledger.models()}
        return self.models.manifest(rows[version]) if version else self.server.run.manifest

    def _enroll(self, names: Sequence[str]) -> None:
        """No secret is behind these: nobody can connect as a virtual device."""
        known = {row["device"] for row in self.fleet.ledger.devices()}
        with self.fleet.ledger.transaction():
            for name in names:
                if name not in known:
                    self.fleet.ledger.enroll(name, SIMULATED, time.time())

    def _recall(self, devices: Sequence[VirtualDevice]) -> None:
        """What the devices held when the simulation was left."""
        by_name = {d.name: d for d in devices}
        for row in self.results.rows():
            self.virtual.downloads.changed |= dict.fromkeys(row.get("begun_parts", ()), row.get("begun_version", 0))
            self.virtual.downloads.changed |= dict.fromkeys(row["changed_parts"], row["model_version"])
            for work in row["devices"]:
                by_name[work["device"]].held = work["held"]


def _source(manifest: Manifest, models: Models) -> Source:
    return Source(manifest.spec, manifest.mapped(models.store), models.store.path(manifest.tokenizer), {})


def _prepare(manifest: Manifest, models: Models, options: SimOptions) -> Prepared:
    tokenizer = models.store.path(manifest.tokenizer)
    cache = cache_folder()
    checkpoint = Checkpoint(cache, tokenizer, manifest.max_length, manifest.labels, manifest.family)
    return prepare(checkpoint, options.data, cache, options.reading, test=options.test)


def _engine(manifest: Manifest, models: Models, say: Callable[[str], None]) -> Engine:
    shipped = models.store.path(manifest.graphs) if manifest.graphs else None
    return find_engine(_source(manifest, models), EngineOptions(), cache_folder(), say, shipped)


def _start(options: SimOptions) -> tuple[Start, int]:
    """-> (what runs a training, how many at a time)."""
    if options.engine == "ray":
        from edge_coordinator.sim.ray_engine import RayEngine

        cluster = RayEngine(options.threads)
        return cluster.start, options.workers or cluster.workers
    cores = hardware.usable_cores()
    return on_this_machine(options.threads), options.workers or max(1, cores // options.threads)


def _why(work: Sequence[Mapping[str, Any]]) -> str:
    """Why a round had too few updates: what became of most of its devices, and what one of the unable ones said."""
    counts = Counter(str(row["status"]) for row in work)
    said = next((str(row["reason"]) for row in work if row["status"] == "unable"), "")
    return ", ".join(f"{number} {status}" for status, number in counts.most_common()) + (f": {said}" if said else "")


def _summary(work: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> Row:
    """What a round's devices did, in numbers. Waiting: a committed device's time until the last one's (LEGEND)."""
    of = {
        status: sum(row["status"] == status for row in work)
        for status in ("committed", "late", "dropped", "unable", "gave-up")
    }
    ends = [row["finished_s"] for row in work if row["status"] == "committed"]
    waiting = statistics.fmean(max(ends) - end for end in ends) if ends else None
    return {
        "online": len(work),
        "members": counts.get("members", 0),
        "planned": counts.get("planned", 0),
        **{status.replace("-", "_"): number for status, number in of.items()},
        "waiting_s": round(waiting, 6) if waiting is not None else None,
        "bytes_up": sum(row.get("bytes_up", 0) for row in work),
        "bytes_down": sum(row.get("bytes_down", 0) for row in work),
    }
