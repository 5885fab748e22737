"""The device's side of a fleet: one state machine, one thread, durable across crash and power loss.

    newest model -> what could be trained here -> join -> grant -> train (worker process) -> update on disk -> offer
    -> chunks -> committed -> newest model ...

What must survive lies on disk: the model and partial transfers (`keeper.py`), and an update that is not yet committed
(`outbox.py`). Everything else is asked for again. Holds no torch, no numpy and no onnxruntime: idle it stays below 48 MiB
(tested). The clock and the transport are passed in.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.codecs import CODECS
from edge_runtime.errors import ConnectionFailed, DoesNotFit, EdgeError, StoreError, TrainingFailed, WireError
from edge_runtime.gate import Gate
from edge_runtime.keeper import Emit, ModelKeeper
from edge_runtime.kinds import FRESH
from edge_runtime.layout import layout, misfit, scale
from edge_runtime.manifest import Manifest
from edge_runtime.outbox import Outbox
from edge_runtime.planner import choose, mib, over_budget, shrink
from edge_runtime.prune_plan import misfit as pruning_misfit
from edge_runtime.records import CostRow, Plan, TrainReport
from edge_runtime.residual import feedback_job
from edge_runtime.session import Session
from edge_runtime.store import is_answered_from
from edge_runtime.topics import Topics
from edge_runtime.training.optimizers import OPTIMIZERS
from edge_runtime.training.patient import PatientWorker
from edge_runtime.transport import Connected, Disconnected, Event, Message, Transport
from edge_runtime.version import software
from edge_runtime.wire import (
    Ack,
    Grant,
    Join,
    Missing,
    Model,
    Need,
    Round,
    Status,
    decode,
    decode_chunk,
    encode,
    from_plain,
)

REPEAT_JOIN_S = 15.0
STATUS_S = 2.0  # least time between two progress messages
MAX_IN_FLIGHT = 8
MAX_ATTEMPTS = 3
SHRINK = 0.85  # of the memory at which an attempt was killed
EVENTS_A_TICK = 64
RETRY_S = 30.0  # after the disk was full or the data could not be read
MAX_REFUSALS = 3  # by the broker, one after the other
NICENESS = 5  # of the training process, without conditions


@dataclass
class Training:
    """A granted plan under way."""

    grant: Grant
    plan: Plan  # the grant's, or a smaller one of the same depth
    worker: PatientWorker
    attempt: int
    limit_bytes: int


class Agent:
    """Takes part in a fleet until told to stop."""

    def __init__(
        self,
        device: str,
        realm: str,
        folder: Path,
        session: Session,
        transport: Transport,
        emit: Emit,
        *,
        families: tuple[str, ...],
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: gate: whether training may go on now; None: always."""
        self.device, self.session, self.transport = device, session, transport
        self.emit, self.clock, self.gate = emit, clock, gate or Gate((), clock=clock)
        self.topics = Topics(realm)
        self.boot, self._sequence = os.urandom(8), 0
        self.bytes_up = self.bytes_down = 0
        self._folder = folder
        self.keeper = ModelKeeper(folder, families, emit)
        self.outbox = Outbox(folder, random.Random(self.boot))
        self._round: Round | None = None
        self._joined_at = 0.0  # when the last join was sent; 0 before
        self._settled: tuple[str, int] | None = None  # the round that has no more use for us
        self._training: Training | None = None
        self._retry_at = 0.0
        self._status_at, self._activity = 0.0, "starting"
        self._refusals = 0
        self._waiting_for = ""  # as it was last told
        self._train_ratio = self._uplink_bytes_per_s = 0.0  # as the last training and sending were
        self._sending_at: float | None = None  # since when the whole update is asked for; 0: not yet
        if self.outbox.damaged:
            emit({"event": "storage-error", "reason": self.outbox.damaged})

    # the loop

    def run(self, keep_going: Callable[[], bool]) -> None:
        """Until told to stop; then says goodbye. Raises ConnectionFailed if the broker refuses our credentials."""
        self.transport.start()
        try:
            while keep_going():
                event = self.transport.next_event(0.1)
                for _ in range(EVENTS_A_TICK):
                    if event is None:
                        break
                    self.handle(event)
                    event = self.transport.next_event(0.0)
                if event is not None:
                    self.handle(event)
                self.tick()
        finally:
            if self._training:
                self._training.worker.close()
            self._publish(self.topics.up(self.device, "st"), self._status("leaving"), retain=True)
            self.transport.stop()

    def handle(self, event: Event) -> None:
        """One thing that happened. A bad message changes nothing."""
        if isinstance(event, Connected):
            self._refusals = 0
            self.keeper.reconnected(self.clock())
            self.outbox.hurry()
            self._joined_at = 0.0
            self.emit({"event": "connected"})
            self._say(self._activity if self._training else self._at_rest, force=True)
        elif isinstance(event, Disconnected):
            self._disconnected(event)
        else:
            self.bytes_down += len(event.topic) + len(event.payload)
            try:
                self._message(event)
            except WireError as error:
                self.emit({"event": "bad-message", "topic": event.topic, "reason": str(error)})
            except (EdgeError, OSError) as error:
                self._wait_after(error)

    def tick(self) -> None:
        """What is next: chunks, the worker, the model, an offer, a join."""
        now = self.clock()
        try:
            while self.transport.in_flight() < MAX_IN_FLIGHT and (chunk := self.outbox.sender.next_chunk()):
                self._publish(self.topics.up(self.device, "c"), chunk)
            if self._training:
                if is_answered_from(self._folder):
                    self._training.worker.come_last()
                self._watch_training(self._training)
            else:
                self.gate.look()
            self._tell_waiting()
            if now < self._retry_at:
                return
            self._keep_model(now)
            if self.keeper.announced and (offer := self.outbox.due(now)):
                self._send("offer", offer)
            self._join_round(now)
        except (EdgeError, OSError) as error:
            self._wait_after(error)

    def _disconnected(self, event: Disconnected) -> None:
        self.emit({"event": "disconnected", "reason": event.reason})
        self._refusals += event.refused
        if self._refusals >= MAX_REFUSALS:
            raise ConnectionFailed(
                f"the broker refuses this device ({event.reason}): "
                "ask for new credentials with `edge-coordinator enroll --renew`"
            )

    # messages

    def _message(self, message: Message) -> None:
        kind = self.topics.kind(message.topic)
        if kind == "c":
            self.keeper.accept(*decode_chunk(message.payload), self.clock())
            return
        if not message.payload:
            return
        body = decode(message.payload, kind).body
        if isinstance(body, Model):
            self.keeper.announce(body)
            if self._training and (self._training.grant.model_version < body.version or body.finished):
                self._stop_training("the round ended without us")
        elif isinstance(body, Round):
            self._round_announced(body)
        elif isinstance(body, Grant):
            self._granted(body)
        elif isinstance(body, Need):
            self._sending_at = self._sending_at if self._sending_at != 0.0 else self.clock()
            self.outbox.sender.ask(body.ranges)
        elif isinstance(body, Ack):
            self._acknowledged(body)
        elif isinstance(body, Missing):
            self.keeper.missing(body.blob, self.clock())

    def _keep_model(self, now: float) -> None:
        """Ask for what the announced version still lacks; make it ours when it is whole."""
        if need := self.keeper.requests(now):
            self._send("need", need)
            self._say(f"fetching model {self.keeper.announced.version if self.keeper.announced else ''}")
        if self.keeper.complete():
            self._joined_at = 0.0
            self.emit({"event": "model", "model_version": self.keeper.held, **self._traffic()})
            self._say(self._at_rest, force=True)

    # joining

    def _round_announced(self, round_: Round) -> None:
        before = self._round
        if before is None or (round_.run, round_.round, round_.epoch) != (before.run, before.round, before.epoch):
            self._joined_at = 0.0
        self._round = round_
        if self._training and round_.run == self._training.grant.run and round_.round > self._training.grant.round:
            self._stop_training("the round ended without us")

    def _join_round(self, now: float) -> None:
        """Say what we could do for the open round, again and again until there is an answer."""
        round_, manifest = self._round, self.keeper.manifest
        if (
            round_ is None
            or self._training
            or not self.gate.is_open
            or self.outbox.pending
            or (round_.run, round_.round) == self._settled
        ):
            return
        if manifest is None or manifest.version != round_.model_version or not self.keeper.up_to_date:
            return
        if self._joined_at and now - self._joined_at < REPEAT_JOIN_S:
            return
        self._say("measuring")
        could = self.session.could_do(manifest, self.keeper.store, round_.settings, round_.adapters)
        reason = ""
        try:
            choose(could.rows, could.budget, round_.settings.epochs)
        except DoesNotFit as error:
            reason = str(error)
            needs = {"needs_bytes": error.needed_bytes, "budget_bytes": could.budget.memory_bytes}
            self.emit({"event": "nothing-fits", "round": round_.round, "reason": reason, **needs})
        least = min((row.peak_bytes for row in could.rows), default=0)
        examples = could.data.num_examples
        join = Join(
            round_.run, round_.round, self.boot, examples, could.budget, could.rows, least, reason[:500],
            self._train_ratio, self._uplink_bytes_per_s,
        )  # fmt: skip
        self._send("join", join)
        self._joined_at = now
        self._say("waiting for a plan")

    def _acknowledged(self, ack: Ack) -> None:
        pending = self.outbox.pending
        if pending and (ack.run, ack.round) == (pending.run, pending.round):
            self.emit({"event": ack.status, "round": ack.round, "reason": ack.reason, **self._traffic()})
            if ack.status == "committed" and self._sending_at:
                self._uplink_bytes_per_s = min(1e12, pending.num_bytes / max(1e-3, self.clock() - self._sending_at))
            self.outbox.settle(ack.status)
        elif self._training:
            return
        elif ack.status in ("excluded", "declined"):
            self.emit({"event": ack.status, "round": ack.round, "reason": ack.reason})
        self._settled = (ack.run, ack.round)
        self._say(f"{ack.status}: {ack.reason}"[:120] if ack.reason else self._at_rest)

    def _decline(self, grant: Grant, reason: str, needs_bytes: int = 0) -> None:
        """Give a granted plan back, so that the round does not wait for us."""
        budget = self.session.budget()
        self._send("join", Join(grant.run, grant.round, self.boot, 0, budget, (), needs_bytes, reason[:500]))
        self._settled = (grant.run, grant.round)
        self.emit({"event": "declined", "round": grant.round, "reason": reason})
        self._say(f"declined: {reason}"[:120], force=True)

    # training

    def _granted(self, grant: Grant) -> None:
        manifest = self.keeper.manifest
        if self._training or self.outbox.pending or (grant.run, grant.round) == self._settled:
            return
        if not self.gate.is_open:
            self._joined_at = 0.0  # the conditions have ended: ask again when they hold
            return
        if manifest is None or grant.model_version != manifest.version or not self.keeper.up_to_date:
            self._joined_at = 0.0  # the model is still on its way: ask again when it is here
            return
        try:
            could = self.session.could_do(manifest, self.keeper.store, grant.plan.settings, grant.plan.adapters)
        except (EdgeError, OSError) as error:
            self._decline(grant, str(error))
            return
        if (
            reason := _impossible(grant.plan, could.rows)
            or misfit(could.spec, grant.plan)
            or pruning_misfit(could.spec, grant.plan)
            or _strange(grant.plan, manifest)
        ):
            self._decline(grant, reason)
            return
        ours, most = could.ours(grant.plan), could.budget.upload_bytes
        if most is not None and ours.chosen.upload_bytes > most:
            size = mib(ours.chosen.upload_bytes)
            self._decline(grant, f"the plan's update has {size}, the upload budget is {mib(most)}")
            return
        plan = shrink(ours, could.rows, could.budget.memory_bytes)
        if plan is None:
            row = grant.plan.chosen
            self._decline(grant, f"the plan does not fit now: {over_budget(row, could.budget, 1)}", row.peak_bytes)
            return
        self._start(grant, plan, could.budget.memory_bytes, attempt=1)

    def _start(self, grant: Grant, plan: Plan, limit_bytes: int, attempt: int) -> None:
        assert self.keeper.manifest, "a grant is for the model that is held"
        self.outbox.drop_draft()
        job = self.session.job(self.keeper.manifest, self.keeper.store, plan)
        job |= {"update": str(self.outbox.draft.absolute()), "round": f"{grant.run}/{grant.round}"}
        if CODECS[plan.chosen.codec].sparse:
            kept, draft = self.outbox.residual.kept, self.outbox.residual.draft
            which = (grant.run, grant.round, self.keeper.manifest, plan.settings)
            job["residual"] = feedback_job(kept, draft, *which)
        worker = PatientWorker(
            job,
            self.gate,
            folders=(self.outbox.draft.parent, self.keeper.store.folder),
            peak_bytes=plan.chosen.peak_bytes,
            limit_bytes=limit_bytes,
            threads=self.session.threads,
            nice=NICENESS,
        )
        self._training = Training(grant, plan, worker, attempt, limit_bytes)
        chosen = plan.chosen
        self.emit(
            {
                "event": "training",
                "round": grant.round,
                "depth": chosen.depth,
                "checkpointing": chosen.checkpointing,
                "micro_batch": chosen.micro_batch,
                "peak_bytes_promised": chosen.peak_bytes,
                "limit_bytes": limit_bytes,
                "enforced_by": worker.enforced_by,
                "steps": plan.steps,
                "attempt": attempt,
            }
        )

    def _watch_training(self, training: Training) -> None:
        try:
            line = training.worker.poll(0.0)
        except TrainingFailed as error:
            self._training = None
            self._failed(training, error)
            return
        except (EdgeError, OSError) as error:
            self._training = None
            self.session.forget()  # tokenised data that is damaged is made anew for the next round
            self._decline(training.grant, str(error))
            return
        if line and "result" in line:
            self._training = None
            try:
                report: TrainReport = from_plain(TrainReport, line["result"]["report"], "report")
                self.outbox.put(training.grant, report)
                self._train_ratio, self._sending_at = min(1e6, report.train_s / max(1e-6, report.promised_s)), 0.0
            except (EdgeError, OSError) as error:
                self._decline(training.grant, str(error))
                return
            if self.keeper.manifest and not report.backed_off:
                self.session.trained(self.keeper.manifest.spec, training.plan, report.peak_bytes)
            told = {name: value for name, value in dataclasses.asdict(report).items() if name != "kept"}
            self.emit({"event": "trained", "round": training.grant.round, **told})
            self._say("sending", force=True)
        elif line and "smaller" in line:
            row = {key: line["smaller"][key] for key in ("checkpointing", "micro_batch", "peak_bytes")}
            self.emit({"event": "backed-off", "round": training.grant.round, "step": line["step"], **row})
        elif line and ("paused" in line or "resumed" in line):
            self._paused_or_resumed(training, line)
        elif line:
            self.emit({"event": "step", "round": training.grant.round, **line})
            self._say("training", step=line["step"], steps=line["steps"])

    def _paused_or_resumed(self, training: Training, line: dict[str, Any]) -> None:
        event = "paused" if "paused" in line else "resumed"
        step, steps = line[event], training.plan.steps
        self.emit({"event": event, "round": training.grant.round, "step": step, "steps": steps})
        self._say("training" if event == "resumed" else self._at_rest, step=step, steps=steps, force=True)

    def _tell_waiting(self) -> None:
        """Say what is waited for when it is something else, and when it is over."""
        found = self.gate.words
        if found != self._waiting_for:
            self._waiting_for = found
            self.emit({"event": "waiting", "reason": found} if found else {"event": "going-on"})
            self._say("training" if self._training and not found else self._at_rest, force=True)

    @property
    def _at_rest(self) -> str:
        """What this device does while it trains nothing."""
        return f"waiting: {self.gate.words}"[:120] if self.gate.words else "idle"

    def _failed(self, training: Training, error: TrainingFailed) -> None:
        """The child died, not the device. Killed: the same again, then smaller. Out of memory: smaller. Else given back."""
        out_of_memory = {"reason": str(error), "out_of_memory": error.out_of_memory}
        self.emit({"event": "training-failed", "round": training.grant.round, **out_of_memory})
        promised = training.plan.chosen.peak_bytes
        try:
            if self._try_again(training, error, promised):
                return
        except (EdgeError, OSError) as problem:
            error = TrainingFailed(f"{error}; {problem}")
        self._decline(training.grant, str(error), promised)

    def _try_again(self, training: Training, error: TrainingFailed, promised: int) -> bool:
        if error.killed and training.attempt == 1:
            self._start(training.grant, training.plan, self.session.budget().memory_bytes, training.attempt + 1)
            return True
        if self.keeper.manifest and error.out_of_memory:
            self.session.killed(self.keeper.manifest, self.keeper.store, training.plan, training.limit_bytes)
        if (error.out_of_memory or error.killed) and training.attempt < MAX_ATTEMPTS and self.keeper.manifest:
            plan = training.plan
            could = self.session.could_do(self.keeper.manifest, self.keeper.store, plan.settings, plan.adapters)
            smaller_bytes = int(promised * SHRINK)
            smaller = shrink(plan, could.rows_within(smaller_bytes), smaller_bytes)
            if smaller:
                self._start(training.grant, smaller, could.budget.memory_bytes, training.attempt + 1)
                return True
        return False

    def _stop_training(self, why: str) -> None:
        if self._training:
            self._training.worker.close()
            self.outbox.drop_draft()
            self.emit({"event": "abandoned", "round": self._training.grant.round, "reason": why})
            self._training = None
            self._say(self._at_rest, force=True)

    # saying things

    def _wait_after(self, error: Exception) -> None:
        """Something here is wrong that time or a person may mend: say so, lose nothing, try again later."""
        self.keeper.pause()
        self._retry_at = self.clock() + RETRY_S
        kind = "storage-error" if isinstance(error, StoreError | OSError) else "problem"
        self.emit({"event": kind, "reason": str(error)})
        self._say(f"problem: {error}"[:120], force=True)

    def _traffic(self) -> dict[str, int]:
        """Bytes of topics and payloads since this process started."""
        return {"bytes_up": self.bytes_up, "bytes_down": self.bytes_down}

    def _status(self, state: str, step: int = 0, steps: int = 0) -> bytes:
        number = self._round.round if self._round else 0
        return self._encode(
            Status(state, software(), self.keeper.held, self._activity, number, step, steps, not self.gate.is_open)
        )

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
        return encode(body, sent_at=time.time(), boot=self.boot, sequence=self._sequence)


def _impossible(plan: Plan, rows: tuple[CostRow, ...]) -> str:
    """Why a granted plan cannot be ours."""
    if plan.chosen.depth not in {row.depth for row in rows}:
        return f"the plan's depth {plan.chosen.depth} is not one of this model's"
    if plan.chosen.micro_batch > plan.settings.batch_size or plan.settings.optimizer not in OPTIMIZERS:
        return "the plan does not hold together"
    if plan.chosen.codec not in CODECS:
        return f"the plan's codec {plan.chosen.codec!r} is not known here: update edge-runtime on this device"
    return ""


def _strange(plan: Plan, manifest: Manifest) -> str:
    """Why a plan, which holds together, is none for the model that is held; empty if it is one."""
    of_model = plan.adapters not in ("", FRESH)
    if of_model != bool(manifest.adapters):
        return f"the plan's adapters are {plan.adapters!r}, the model has {len(manifest.adapters)} tensors of adapters"
    if not of_model:
        return ""
    if scale(plan.settings) != manifest.adapter_scale:
        return "the plan scales adapters in another way than the model"
    there = {t.name: t.shape for t in manifest.trainable}
    for tensor in layout(manifest.spec, plan):
        held = there.get(tensor.name, (0, 0))
        if len(held) != len(tensor.shape) or any(size > most for size, most in zip(tensor.shape, held, strict=True)):
            return f"the plan's {tensor.name} is {tensor.shape}, the model's {held}"
    return ""
