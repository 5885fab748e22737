"""The virtual devices: they speak the device's protocol over the in-process broker, at the times of a virtual clock.

What a real device decides, these decide with the same functions: cost table, choice, what is given back. What takes a
real device time (fetching the model, training, sending) takes virtual seconds, from bytes, the link and the plan's
predicted seconds. One transport carries all of them, and each is a small record. The training itself is the pool's.

Not as on a real device: bytes of models and updates do not pass through the broker, both sides being on one disk; what
the frozen prefix gave is not kept from one round to the next.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_coordinator.sim.classes import DeviceClass, OwnBudget
from edge_coordinator.sim.clock import Clock
from edge_coordinator.sim.data import cut
from edge_coordinator.sim.pool import Pool
from edge_coordinator.sim.residuals import Residuals
from edge_runtime.codecs import CODECS, update_bytes
from edge_runtime.cost import Calibration, DataShape
from edge_runtime.engine import Engine
from edge_runtime.errors import DoesNotFit, UsageError
from edge_runtime.kinds import kinds
from edge_runtime.layout import A
from edge_runtime.manifest import Manifest, StoredTensor
from edge_runtime.model import ModelSpec
from edge_runtime.planner import MAX_ROWS, choose, cost_table, offered_ranks
from edge_runtime.prune_plan import planned, time_share
from edge_runtime.records import Budget, CostRow, TrainSettings
from edge_runtime.store import BlobStore
from edge_runtime.topics import Topics
from edge_runtime.training.corpus import Corpus
from edge_runtime.training.process import model_job, plan_job
from edge_runtime.transport import LocalBroker, LocalTransport, Message
from edge_runtime.version import software
from edge_runtime.wire import Ack, Grant, Join, Offer, Round, Status, decode, encode

USER = "devices"
MAX_DRAWS = 10_000  # of who is online, while a round waits for somebody to join
BOOT = bytes(8)


@dataclass
class VirtualDevice:
    """One device: its class, its examples and what it holds. No connection, no files."""

    name: str
    kind: DeviceClass
    part: array[int]  # indices of its examples
    data: DataShape
    uplink_bytes_per_s: float
    own: OwnBudget | None = None
    held: int = 0  # the newest model version that it holds whole
    online: bool = False

    @property
    def budget(self) -> Budget:
        """Its own, or its class's."""
        return (self.own or OwnBudget()).instead_of(self.kind)


@dataclass
class Plans:
    """What the devices' plans are made from: the same for all of them but for the class."""

    spec: ModelSpec
    calibrations: Mapping[str, Calibration]  # by class
    cached: bool
    masked: Mapping[str, Calibration] = field(
        default_factory=dict
    )  # of plans without adapters, in a run with others too

    def table(
        self, device: VirtualDevice, settings: TrainSettings, adapters: str
    ) -> tuple[tuple[CostRow, ...], Budget]:
        """The device's cost table and its budgets."""
        budget, rows = device.budget, list[CostRow]()
        for own, sent in kinds(settings, adapters):
            measured = self.masked if self.masked and not own.lora_rank else self.calibrations
            what = (self.spec, device.data, own, measured[device.kind.name], budget, self.cached, sent)
            found = cost_table(*what, offered_ranks(self.spec, own, sent))
            rows += [row for row in found if row.depth or not rows]
        return tuple(rows[:MAX_ROWS]), budget


@dataclass
class Downloads:
    """How many bytes a device must fetch, by the version that it holds: parts of the model change with rounds.

    The adapters of a part, and A and B of them, count as parts of their own.
    """

    changed: dict[int, int] = field(default_factory=dict)  # number of a part -> the version in which it last changed

    def publish(self, before: Manifest, after: Manifest) -> list[int]:
        """Note a new version; -> the parts that changed in it."""
        old = {tensor.name: tensor.blob for _, tensor in _numbered(before)}
        parts = sorted({number for number, tensor in _numbered(after) if old.get(tensor.name) != tensor.blob})
        self.changed |= dict.fromkeys(parts, after.version)
        return parts

    def num_bytes(self, manifest: Manifest, manifest_bytes: int, held: int) -> int:
        """Manifest, and the tensors that are newer than what is held; everything for a device that holds nothing."""
        if held == manifest.version:
            return 0
        fresh = (t for number, t in _numbered(manifest) if self.changed.get(number, 1) > held)
        total = manifest_bytes + sum(t.num_bytes for t in fresh)
        return total + (0 if held else manifest.tokenizer_bytes + manifest.graphs_bytes)


def _numbered(manifest: Manifest) -> Iterator[tuple[int, StoredTensor]]:
    """Every tensor with the number of what it belongs to: its part, or beyond all parts its block's A or B."""
    for tensor in manifest.tensors:
        yield tensor.part, tensor
    for tensor in manifest.adapters:
        kind = 1 if tensor.name.endswith(A) else 2
        yield kind * (manifest.num_blocks + 1) + tensor.part, tensor


class VirtualFleet:
    """All devices of a simulation.

    Attributes:
        rows: what each device that was online did in the round, by name.
    """

    def __init__(
        self,
        devices: Sequence[VirtualDevice],
        broker: LocalBroker,
        realm: str,
        clock: Clock,
        pool: Pool,
        *,
        plans: Plans,
        engine: Engine,
        corpus: Corpus,
        store: BlobStore,
        updates: BlobStore,
        residuals: Residuals,
        seed: int,
        dropout: float,
        threads: int,
    ) -> None:
        """Args: dropout: the probability that a device vanishes after it has got a plan."""
        self.devices = {d.name: d for d in devices}
        self.topics, self.clock, self.pool = Topics(realm), clock, pool
        self.transport = LocalTransport(broker, USER, [self.topics.all("+"), self.topics.down("+", "+")])
        self.downloads = Downloads()
        self.rows: dict[str, dict[str, Any]] = {}
        self._plans, self._engine, self._corpus, self._store, self._updates = plans, engine, corpus, store, updates
        self._residuals = residuals
        self._seed, self._dropout, self._threads = seed, dropout, threads
        self._round: Round | None = None
        self._manifest: Manifest | None = None
        self._manifest_bytes = self._sequence = self._draws = 0

    def handle(self, message: Message) -> None:
        """What the coordinator says to one device or to all."""
        if not message.payload:
            return
        body = decode(message.payload, self.topics.kind(message.topic)).body
        if isinstance(body, Round):
            if self._round is None or body.round != self._round.round:
                self._begin(body)
        elif isinstance(body, Grant):
            self._granted(self._addressee(message.topic), body)
        elif isinstance(body, Ack):
            self._acknowledged(self._addressee(message.topic), body)

    def hold(self, manifest: Manifest, manifest_bytes: int) -> None:
        """The version that the coordinator serves from now on."""
        self._manifest, self._manifest_bytes = manifest, manifest_bytes

    def end_round(self) -> list[dict[str, Any]]:
        """Nothing of the round is under way any more; -> what each device did in it."""
        for row in self.rows.values():
            if row["status"] in ("planned", "joined", "online"):
                row["status"] = "late" if row["status"] == "planned" else "not asked"
        self.pool.close()
        rows = [self.rows[name] for name in sorted(self.rows)]
        self.rows, self._round = {}, None
        return rows

    def recall(self, last: Mapping[str, Any]) -> None:
        """What was left undone of the last round in the results, if a kill came between."""
        self._residuals.settle(last["devices"], lambda device: self.pool.residual(work_name(last["round"], device)))

    def settle(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A round is in the results: what its updates left out is kept from now on, and its trainings are forgotten."""
        self._residuals.settle(rows, lambda device: self.pool.residual(work_name(number, device)))
        self.pool.end_round()

    # a round

    def _begin(self, round_: Round) -> None:
        self._round, self._draws = round_, 0
        self._look_around(round_)

    def _look_around(self, round_: Round) -> None:
        """Some devices are online. While the round waits for more, others may come, one draw for each waiting time."""
        if self._round != round_ or any("depth" in row for row in self.rows.values()):
            return
        if self._draws == MAX_DRAWS:
            raise UsageError(
                f"round {round_.round}: nobody could join in {MAX_DRAWS} waiting times of {round_.join_within_s:g} s: "
                "the classes' availability or downlink is too low for this model"
            )
        fresh = []
        for device in self.devices.values():
            if device.name in self.rows:
                continue
            there = self._chance("online", device, self._draws) < device.kind.availability
            if there != device.online:
                device.online = there
                self._send(device, "st", Status("online" if there else "offline", software(), device.held))
            if there:
                self.rows[device.name] = {"device": device.name, "class": device.kind.name, "status": "online",
                                          "num_examples": device.data.num_examples, "held": device.held}  # fmt: skip
                fresh.append(device)
        assert self._manifest, "the coordinator holds a model before it opens a round"
        for device in sorted(fresh, key=lambda d: self._chance("order", d, self._draws)):  # who comes first by chance
            num_bytes = self.downloads.num_bytes(self._manifest, self._manifest_bytes, device.held)
            seconds = num_bytes / device.kind.downlink_bytes_per_s
            self.clock.at(self.clock.now_s + seconds, self._join, round_, device, num_bytes, seconds)
        self._draws += 1
        self.clock.at(self.clock.now_s + round_.join_within_s, self._look_around, round_)

    def _join(self, round_: Round, device: VirtualDevice, num_bytes: int, seconds: float) -> None:
        """The model has come: say what could be trained."""
        if self._round != round_:
            return
        device.held = round_.model_version
        row = self.rows[device.name]
        row |= {"status": "joined", "held": device.held, "bytes_down": num_bytes, "download_s": round(seconds, 6)}
        if not device.online:
            return
        table, budget = self._plans.table(device, round_.settings, round_.adapters)
        reason = ""
        try:
            choose(table, budget, round_.settings.epochs)
        except DoesNotFit as error:
            reason = str(error)
            row |= {"status": "unable", "reason": reason}
        least = min(r.peak_bytes for r in table)
        examples = device.data.num_examples
        join = Join(
            round_.run, round_.round, BOOT, examples, budget, table, least, reason[:500], 1.0, device.uplink_bytes_per_s
        )
        self._send(device, "join", join)

    def _granted(self, device: VirtualDevice, grant: Grant) -> None:
        row, chosen = self.rows[device.name], grant.plan.chosen
        assert self._manifest, "a plan is for the model that is served"
        train_s = chosen.total_s(grant.plan.settings.epochs) * time_share(self._manifest.spec, grant.plan)
        upload_s = planned_bytes(self._manifest, grant) / device.uplink_bytes_per_s
        row |= {"status": "planned", "depth": chosen.depth, "rank": chosen.rank, "mask_every": grant.plan.settings.mask_every, "checkpointing": chosen.checkpointing, "micro_batch": chosen.micro_batch,
                "peak_bytes": chosen.peak_bytes, "train_s": round(train_s, 6), "upload_s": round(upload_s, 6)}  # fmt: skip
        due_s = self.clock.now_s + train_s + upload_s
        if self._chance("drop", device) < self._dropout:
            gone_s = self.clock.now_s + self._chance("when", device) * (train_s + upload_s)
            self.clock.at(gone_s, self._vanish, self._round, device)
            return
        manifest = self._manifest
        assert manifest and manifest.version == grant.model_version, "devices train the version that is served"
        self.pool.submit(due_s, _work(grant, device), lambda scratch: self._job(device, grant, manifest, scratch))
        self.clock.at(due_s, self._offer, self._round, device, grant)

    def _job(self, device: VirtualDevice, grant: Grant, manifest: Manifest, scratch: Path) -> Mapping[str, Any]:
        """As `Session.job`, for a part of the one data set."""
        cut(self._corpus, device.part, scratch / "corpus")
        feedback = {}
        if CODECS[grant.plan.chosen.codec].sparse:
            draft = self.pool.residual(_work(grant, device))
            feedback["residual"] = self._residuals.job(device.name, draft, grant, manifest)
        return {
            **feedback,
            **plan_job(grant.plan),
            "smaller": [],
            **model_job(
                "train",
                manifest.spec,
                manifest.mapped(self._store),
                manifest.mapped_adapters(self._store),
                manifest.adapter_scale,
            ),
            **self._engine.job(scratch / "cache"),
            "corpus": str((scratch / "corpus").absolute()),
            "test_corpus": None,
            "threads": self._threads,
        }

    def _offer(self, round_: Round, device: VirtualDevice, grant: Grant) -> None:
        """The last byte of the update has arrived: it is on the coordinator's disk, and the coordinator is told so."""
        if self._round != round_ or not device.online:
            return
        trained, row = self.pool.wait(_work(grant, device)), self.rows[device.name]
        report = trained.report
        if report is None:  # as an agent gives its plan back
            row |= {"status": "gave-up", "reason": trained.failure}
            join = Join(
                grant.run, grant.round, BOOT, 0, Budget(device.budget.memory_bytes), (), 0, trained.failure[:500]
            )
            self._send(device, "join", join)
            return
        num_bytes = trained.update.stat().st_size
        draft = self._updates.folder / "partial" / f"{device.name}.tmp"
        draft.unlink(missing_ok=True)
        os.link(trained.update, draft)  # the pool keeps its own until the round is in the results
        blob = self._updates.adopt(draft)
        row |= {"bytes_up": num_bytes, "finished_s": round(self.clock.now_s, 6), "first_loss": report.first_loss, "last_loss": report.last_loss}  # fmt: skip
        row |= {"sparsity": round(report.sparsity, 5)} if grant.plan.pruning else {}
        offer = Offer(
            run=grant.run,
            round=grant.round,
            nonce=grant.nonce,
            blob=blob,
            num_bytes=num_bytes,
            codec=report.codec,
            num_examples=report.num_examples,
            train_s=row["train_s"],
            peak_bytes=row["peak_bytes"],
            first_loss=report.first_loss,
            last_loss=report.last_loss,
            kept=bytes.fromhex(report.kept),
        )
        self._send(device, "offer", offer)

    def _vanish(self, round_: Round, device: VirtualDevice) -> None:
        if self._round == round_:
            device.online = False
            self.rows[device.name]["status"] = "dropped"
            self._send(device, "st", Status("offline", software(), device.held))

    def _acknowledged(self, device: VirtualDevice, ack: Ack) -> None:
        row = self.rows.get(device.name)
        if row is not None and row["status"] not in ("unable", "gave-up", "dropped"):
            row["status"] = "not asked" if ack.status == "late" and "depth" not in row else ack.status
            if ack.status in ("rejected", "excluded"):
                row["reason"] = ack.reason

    # small things

    def _addressee(self, topic: str) -> VirtualDevice:
        return self.devices[topic.split("/")[4]]

    def _send(self, device: VirtualDevice, kind: str, body: Any) -> None:
        self._sequence += 1
        message = encode(body, sent_at=0.0, boot=BOOT, sequence=self._sequence)
        self.transport.publish(self.topics.up(device.name, kind), message)

    def _chance(self, what: str, device: VirtualDevice, number: int = 0) -> float:
        """A number from 0 to 1 that depends on the seed, the round and the device alone."""
        assert self._round, "chance decides within rounds"
        return chance(self._seed, what, self._round.round, device.name, number)


def planned_bytes(manifest: Manifest | None, grant: Grant) -> int:
    """The bytes of the update that a plan is for: of its own ranks, which may be below those of its row."""
    assert manifest, "a plan is for the model that is served"
    return update_bytes(planned(manifest.spec, grant.plan), grant.plan.chosen.codec)


def _work(grant: Grant, device: VirtualDevice) -> str:
    return work_name(grant.round, device.name)


def work_name(round_: int, device: str) -> str:
    """What a training is called on disk."""
    return f"{round_}.{device}"


def chance(seed: int, *what: object) -> float:
    """A uniform draw from [0, 1) that depends on its arguments alone, the same on every platform."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)
