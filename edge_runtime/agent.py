"""The device's side of a fleet: one state machine, one thread, durable across crash and power loss.

    newest model -> what could be trained here -> join -> grant -> train (worker process) -> update on disk -> offer
    -> chunks -> committed -> newest model ...

What must survive lies on disk: the model (blobs and manifest), partial transfers, and an update that is not yet
committed (`pending.json`). Everything else is asked for again. Holds no torch, no numpy and no onnxruntime: idle it
stays below 64 MiB (tested). The clock and the transport are passed in.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge_runtime.calibration import worker_job
from edge_runtime.errors import ConnectionFailed, DoesNotFit, EdgeError, StoreError, TrainingFailed, WireError
from edge_runtime.manifest import Manifest, check_family, decode_manifest
from edge_runtime.planner import choose, mib, over_budget, shrink
from edge_runtime.records import CostRow, Plan, TrainReport
from edge_runtime.session import Offering, Session
from edge_runtime.source import MANIFEST_FILE, STORE_FOLDER
from edge_runtime.store import BlobStore, atomic_writer, read_json, write_json
from edge_runtime.topics import Topics
from edge_runtime.training.process import Worker
from edge_runtime.transfer import Receiver, Sender
from edge_runtime.transport import Connected, Disconnected, Event, Message, Transport
from edge_runtime.wire import (
    Ack,
    Grant,
    Join,
    Missing,
    Model,
    Need,
    Offer,
    Round,
    Status,
    decode,
    decode_chunk,
    encode,
    from_plain,
)

REPEAT_JOIN_S = 15.0
REPEAT_OFFER_S = (10.0, 120.0)  # first and longest pause between offers of one update
STATUS_S = 2.0  # least time between two progress messages
MAX_IN_FLIGHT = 8
MAX_ATTEMPTS = 3
SHRINK = 0.85  # of the memory at which an attempt was killed
RETRY_S = 30.0  # after the disk was full or the data could not be read
Emit = Callable[[dict[str, Any]], None]


def software() -> str:
    """Our version, for status messages."""
    try:
        return version("edge-runtime")
    except PackageNotFoundError:
        return "source"


@dataclass
class Training:
    """A granted plan under way."""

    grant: Grant
    plan: Plan  # the grant's, or a smaller one of the same depth
    worker: Worker
    update: Path
    attempt: int


class Agent:
    """Takes part in a fleet until told to stop."""

    def __init__(
        self, device: str, realm: str, folder: Path, session: Session, transport: Transport, emit: Emit, *,
        families: tuple[str, ...], clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.device, self.folder, self.session, self.transport, self.emit, self.clock = (
            device,
            folder,
            session,
            transport,
            emit,
            clock,
        )
        self.families = families
        self.topics = Topics(realm)
        self.store = BlobStore(folder / STORE_FOLDER)
        self.updates = BlobStore(folder / "updates")
        self.receiver, self.sender = Receiver(self.store), Sender(self.updates)
        self.boot, self._sequence = os.urandom(8), 0
        self.bytes_up = self.bytes_down = 0
        self._jitter = random.Random(self.boot)
        self._announced: Model | None = None
        self._incoming: Manifest | None = None  # the version being fetched
        self._round: Round | None = None
        self._joined_at = 0.0  # when the last join was sent; 0 before
        self._settled: tuple[str, int] | None = None  # the round that has no more use for us
        self._training: Training | None = None
        self._offer_pause, self._offer_at = REPEAT_OFFER_S[0], 0.0
        self._retry_at = 0.0
        self._status_at, self._activity = 0.0, "starting"
        self._refused = 0
        self.manifest = self._load_model()
        self._pending: Offering | None = self._load_pending()

    # the loop

    def run(self, keep_going: Callable[[], bool]) -> None:
        """Until told to stop; then says goodbye. Raises ConnectionFailed if the broker refuses our credentials."""
        self.transport.start()
        try:
            while keep_going():
                event = self.transport.next_event(0.1)
                while event is not None:
                    self.handle(event)
                    event = self.transport.next_event(0.0)
                self.tick()
        finally:
            if self._training:
                self._training.worker.close()
            self._publish(self.topics.up(self.device, "st"), self._status("leaving"), retain=True)
            self.transport.stop()

    def handle(self, event: Event) -> None:
        """One thing that happened. A bad message changes nothing."""
        if isinstance(event, Connected):
            self._refused = 0
            self.receiver.restart(self.clock())
            self.sender.clear()
            self._joined_at = self._offer_at = 0.0
            self._offer_pause = REPEAT_OFFER_S[0]
            self.emit({"event": "connected"})
            self._say("idle", force=True)
        elif isinstance(event, Disconnected):
            self.emit({"event": "disconnected", "reason": event.reason})
            self._refused += event.refused
            if self._refused >= 3:
                raise ConnectionFailed(
                    f"the broker refuses this device ({event.reason}): ask for new credentials with `edge-coordinator enroll --renew`"
                )
        else:
            self.bytes_down += len(event.topic) + len(event.payload)
            try:
                self._message(event)
            except WireError as error:
                self.emit({"event": "bad-message", "topic": event.topic, "reason": str(error)})
            except (EdgeError, OSError) as error:
                self._wait_after(error)

    def tick(self) -> None:
        """What is next: requests, chunks, a join, an offer, the worker."""
        now = self.clock()
        if need := self.receiver.requests(now):
            self._send("need", need)
        while self.transport.in_flight() < MAX_IN_FLIGHT and (chunk := self.sender.next_chunk()):
            self._publish(self.topics.up(self.device, "c"), chunk)
        if self._training:
            self._watch_training(self._training)
        if now < self._retry_at:
            return
        try:
            self._offer_pending(now)
            self._join_round(now)
        except (EdgeError, OSError) as error:
            self._wait_after(error)

    # messages

    def _message(self, message: Message) -> None:
        kind = self.topics.kind(message.topic)
        if kind == "c":
            self._chunk(*decode_chunk(message.payload))
            return
        if not message.payload:
            return
        body = decode(message.payload, kind).body
        if isinstance(body, Model):
            self._model(body)
        elif isinstance(body, Round):
            self._round_announced(body)
        elif isinstance(body, Grant):
            self._granted(body)
        elif isinstance(body, Need):
            self.sender.ask(body.ranges)
        elif isinstance(body, Ack):
            self._acknowledged(body)
        elif isinstance(body, Missing):
            self.receiver.cancel(body.blob)
            self._retry_at = self.clock() + 1.0

    # the model

    def _model(self, model: Model) -> None:
        """A version is announced: fetch its manifest, then the tensors that are not here."""
        held = self.manifest.version if self.manifest else 0
        if model.version < held:  # versions only grow: a coordinator that lost its ledger is told by its people
            self.emit({"event": "old-model", "announced": model.version, "held": held})
            return
        self._announced = model
        if self._training and self._training.grant.model_version < model.version:
            self._stop_training("the round ended without us")
        if self.manifest and model.version == held:
            return
        self.receiver.forget_all()
        if self.store.has(model.manifest):
            self._manifest_here(model.manifest)
        else:
            self.receiver.want(model.manifest, model.manifest_bytes, self.clock())

    def _chunk(self, blob: bytes, offset: int, data: bytes) -> None:
        done = self.receiver.accept(blob, offset, data, self.clock())
        if done is False:
            self.emit({"event": "bad-hash", "blob": blob.hex()})
        if done and self._announced and blob == self._announced.manifest:
            self._manifest_here(blob)
        elif done and self._incoming and self.receiver.idle:
            self._model_complete()

    def _manifest_here(self, blob: bytes) -> None:
        manifest = decode_manifest(self.store.path(blob).read_bytes())
        if self._announced and manifest.version != self._announced.version:
            raise WireError(
                f"the manifest is of version {manifest.version}, version {self._announced.version} was announced"
            )
        check_family(manifest, self.families)
        self._incoming = manifest
        now = self.clock()
        for wanted, size in manifest.blobs().items():
            self.receiver.want(wanted, size, now)
        self.emit({"event": "fetching", "model_version": manifest.version, "num_bytes": self.receiver.missing_bytes})
        self._say(f"fetching model {manifest.version}")
        if self.receiver.idle:
            self._model_complete()

    def _model_complete(self) -> None:
        """Every tensor is here and verified: the new version becomes ours in one rename, then the old tensors go."""
        assert self._incoming and self._announced
        manifest, self._incoming = self._incoming, None
        with atomic_writer(self.folder / MANIFEST_FILE) as file:
            file.write(self.store.path(self._announced.manifest).read_bytes())
        self.manifest = manifest
        self.store.keep_only([self._announced.manifest, *manifest.blobs()])
        self._joined_at = 0.0
        self.emit(
            {
                "event": "model",
                "model_version": manifest.version,
                "bytes_up": self.bytes_up,
                "bytes_down": self.bytes_down,
            }
        )
        self._say("idle", force=True)

    def _load_model(self) -> Manifest | None:
        try:
            manifest = decode_manifest((self.folder / MANIFEST_FILE).read_bytes())
            check_family(manifest, self.families)
        except FileNotFoundError:
            return None
        except EdgeError as error:
            self.emit(
                {"event": "storage-error", "reason": f"the stored model is not usable, it is fetched again: {error}"}
            )
            return None
        return manifest if all(self.store.has(blob) for blob in manifest.blobs()) else None

    # joining

    def _round_announced(self, round_: Round) -> None:
        if (
            self._round is None
            or (round_.run, round_.round) != (self._round.run, self._round.round)
            or round_.epoch != self._round.epoch
        ):
            self._joined_at = 0.0
        self._round = round_

    def _join_round(self, now: float) -> None:
        """Say what we could do for the open round, again and again until there is an answer."""
        round_ = self._round
        if round_ is None or self._training or self._pending or (round_.run, round_.round) == self._settled:
            return
        if (
            self.manifest is None
            or self.manifest.version != round_.model_version
            or (self._joined_at and now - self._joined_at < REPEAT_JOIN_S)
        ):
            return
        self._say("measuring")
        could = self.session.could_do(self.manifest, self.store, round_.settings)
        reason = ""
        try:
            choose(could.rows, could.budget, round_.settings.epochs)
        except DoesNotFit as error:
            reason = str(error)
            self.emit(
                {"event": "nothing-fits", "round": round_.round, "reason": reason, "needs_bytes": error.needed_bytes}
            )
        needs = min((row.peak_bytes for row in could.rows), default=0)
        self._send(
            "join",
            Join(
                round_.run,
                round_.round,
                self.boot,
                could.data.num_examples,
                could.budget,
                could.rows,
                needs,
                reason[:500],
            ),
        )
        self._joined_at = now
        self._say("waiting for a plan")

    def _acknowledged(self, ack: Ack) -> None:
        if self._pending and (ack.run, ack.round) == (self._pending.run, self._pending.round):
            if ack.status == "wait":
                return
            self.emit(
                {
                    "event": ack.status,
                    "round": ack.round,
                    "reason": ack.reason,
                    "bytes_up": self.bytes_up,
                    "bytes_down": self.bytes_down,
                }
            )
            self._forget_pending()
        if ack.status in ("committed", "late", "excluded", "declined", "rejected") and not self._training:
            self._settled = (ack.run, ack.round)
            if ack.status in ("excluded", "declined"):
                self.emit({"event": ack.status, "round": ack.round, "reason": ack.reason})
            self._say("idle" if not ack.reason else f"{ack.status}: {ack.reason}"[:120])

    def _decline(self, grant: Grant, reason: str, needs_bytes: int = 0) -> None:
        """Give a granted plan back, so that the round does not wait for us."""
        budget = self.session.budget()
        self._send("join", Join(grant.run, grant.round, self.boot, 0, budget, (), needs_bytes, reason[:500]))
        self._settled = (grant.run, grant.round)
        self.emit({"event": "declined", "round": grant.round, "reason": reason})
        self._say(f"declined: {reason}"[:120], force=True)

    # training

    def _granted(self, grant: Grant) -> None:
        if self._training or self._pending or (grant.run, grant.round) == self._settled:
            return
        if self.manifest is None or grant.model_version != self.manifest.version:
            self._joined_at = 0.0  # the model is still on its way: ask again when it is here
            return
        could = self.session.could_do(self.manifest, self.store, grant.plan.settings)
        if reason := _impossible(grant.plan, could.rows, could.data.num_examples):
            self._decline(grant, reason)
            return
        plan = shrink(grant.plan, could.rows, could.budget.memory_bytes)
        if plan is None:
            row = grant.plan.chosen
            self._decline(grant, f"the plan does not fit now: {over_budget(row, could.budget, 1)}", row.peak_bytes)
            return
        self._start(grant, plan, attempt=1)

    def _start(self, grant: Grant, plan: Plan, attempt: int) -> None:
        assert self.manifest
        source, corpus = self.session.inputs(self.manifest, self.store)
        update = self.folder / "updates" / "partial" / "update.tmp"
        job = worker_job("train", source) | {
            "plan": dataclasses.asdict(plan),
            "corpus": str(corpus),
            "test_corpus": None,
            "threads": self.session.threads,
            "update": str(update.absolute()),
        }
        limit = (
            max(self.session.budget().memory_bytes, plan.chosen.peak_bytes) if attempt == 1 else plan.chosen.peak_bytes
        )
        worker = Worker(job, limit_bytes=limit, threads=self.session.threads, nice=5)
        self._training = Training(grant, plan, worker, update, attempt)
        self.emit({"event": "training", "round": grant.round, "depth": plan.chosen.depth, "checkpointing": plan.chosen.checkpointing,
                   "micro_batch": plan.chosen.micro_batch, "peak_bytes_promised": plan.chosen.peak_bytes, "limit_bytes": limit,
                   "enforced_by": worker.enforced_by, "steps": plan.steps, "attempt": attempt})  # fmt: skip

    def _watch_training(self, training: Training) -> None:
        try:
            line = training.worker.poll(0.0)
        except TrainingFailed as error:
            self._training = None
            self._failed(training, error)
            return
        except (EdgeError, OSError) as error:
            self._training = None
            self._decline(training.grant, str(error))
            return
        if line is None:
            return
        if "result" in line:
            self._training = None
            self._trained(training, from_plain(TrainReport, line["result"]["report"], "report"))
        else:
            self.emit({"event": "step", "round": training.grant.round, **line})
            self._say("training", step=line["step"], steps=line["steps"])

    def _failed(self, training: Training, error: TrainingFailed) -> None:
        """Out of memory: the child died, not the device. Try the same depth smaller, then give the plan back."""
        self.emit(
            {
                "event": "training-failed",
                "round": training.grant.round,
                "reason": str(error),
                "out_of_memory": error.out_of_memory,
            }
        )
        if error.out_of_memory and training.attempt < MAX_ATTEMPTS and self.manifest:
            could = self.session.could_do(self.manifest, self.store, training.plan.settings)
            smaller = shrink(
                training.plan,
                could.rows_within(int(training.plan.chosen.peak_bytes * SHRINK)),
                int(training.plan.chosen.peak_bytes * SHRINK),
            )
            if smaller:
                self._start(training.grant, smaller, training.attempt + 1)
                return
        self._decline(training.grant, str(error), training.plan.chosen.peak_bytes)

    def _trained(self, training: Training, report: TrainReport) -> None:
        """The update is on disk: name it by its hash, note it as pending, and only then offer it."""
        size = training.update.stat().st_size
        blob = self.updates.adopt(training.update)
        grant = training.grant
        pending = Offering(
            grant.run, grant.round, grant.nonce.hex(), blob.hex(), size, report.num_examples, report.train_s,
            report.peak_bytes, report.first_loss, report.last_loss,
        )  # fmt: skip
        write_json(self.folder / "pending.json", dataclasses.asdict(pending))
        self._pending = pending
        self._offer_at, self._offer_pause = 0.0, REPEAT_OFFER_S[0]
        self.emit({"event": "trained", "round": grant.round, **dataclasses.asdict(report)})
        self._say("sending", force=True)

    def _stop_training(self, why: str) -> None:
        if self._training:
            self._training.worker.close()
            self._training.update.unlink(missing_ok=True)
            self.emit({"event": "abandoned", "round": self._training.grant.round, "reason": why})
            self._training = None

    # the update's way out

    def _offer_pending(self, now: float) -> None:
        """Offer the update until the coordinator has it in its ledger, more and more rarely."""
        pending = self._pending
        if pending is None or now < self._offer_at or not self._announced:
            return
        offer = Offer(
            pending.run, pending.round, bytes.fromhex(pending.nonce), bytes.fromhex(pending.blob), pending.num_bytes, "f32",
            pending.num_examples, pending.train_s, pending.peak_bytes, pending.first_loss, pending.last_loss,
        )  # fmt: skip
        self._send("offer", offer)
        self._offer_at = now + self._offer_pause * self._jitter.uniform(0.8, 1.2)
        self._offer_pause = min(2 * self._offer_pause, REPEAT_OFFER_S[1])

    def _load_pending(self) -> Offering | None:
        try:
            raw = read_json(self.folder / "pending.json")
            pending: Offering | None = from_plain(Offering, raw, "pending") if raw else None
        except (StoreError, WireError) as error:
            self.emit({"event": "storage-error", "reason": str(error)})
            pending = None
        if pending and self.updates.has(bytes.fromhex(pending.blob)):
            self.updates.keep_only([bytes.fromhex(pending.blob)])
            return pending
        self._forget_pending()
        return None

    def _forget_pending(self) -> None:
        (self.folder / "pending.json").unlink(missing_ok=True)
        self.updates.keep_only([])
        self.sender.clear()
        self._pending = None

    # saying things

    def _wait_after(self, error: Exception) -> None:
        """Something here is wrong that time or a person may mend: say so, lose nothing, try again later."""
        self.receiver.forget_all()
        self._incoming = None
        self._retry_at = self.clock() + RETRY_S
        self.emit(
            {"event": "storage-error" if isinstance(error, StoreError | OSError) else "problem", "reason": str(error)}
        )
        self._say(f"problem: {error}"[:120], force=True)

    def _status(self, state: str, step: int = 0, steps: int = 0) -> bytes:
        held = self.manifest.version if self.manifest else 0
        number = self._round.round if self._round else 0
        return self._encode(Status(state, software(), held, self._activity, number, step, steps))

    def _say(self, activity: str, *, step: int = 0, steps: int = 0, force: bool = False) -> None:
        now = self.clock()
        if activity != self._activity or force or now - self._status_at >= STATUS_S:
            self._activity, self._status_at = activity, now
            self._publish(self.topics.up(self.device, "st"), self._status("online", step, steps), retain=True)

    def _send(self, kind: str, body: Any) -> None:
        self._publish(self.topics.up(self.device, kind), self._encode(body))

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.bytes_up += len(topic) + len(payload)
        self.transport.publish(topic, payload, retain=retain)

    def _encode(self, body: Any) -> bytes:
        self._sequence += 1
        return encode(body, sent_at=self.clock(), boot=self.boot, sequence=self._sequence)


def _impossible(plan: Plan, rows: tuple[CostRow, ...], num_examples: int) -> str:
    """Why a granted plan cannot be ours."""
    if plan.chosen.depth not in {row.depth for row in rows}:
        return f"the plan's depth {plan.chosen.depth} is not one of this model's"
    if not num_examples:
        return "there are no examples"
    if plan.chosen.micro_batch > plan.settings.batch_size or plan.settings.optimizer not in ("adamw", "sgd"):
        return "the plan does not hold together"
    return ""


def needs_text(num_bytes: int) -> str:
    """For people: what would be needed."""
    return mib(num_bytes)
