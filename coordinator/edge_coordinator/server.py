"""The coordinator's loop: messages in, ledger and sums, answers out. One thread; every decision is in `rounds` and `methods`.

Nothing counts until the ledger has it: a device is told `committed` after its transaction, so that this process may be
killed at any point and goes on from the ledger, the blobs and the partial transfers.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edge_coordinator import rounds
from edge_coordinator.aggregate import MAX_MEMBERS, Update, check_update
from edge_coordinator.config import FleetConfig
from edge_coordinator.ledger import Contribution, Ledger, Member
from edge_coordinator.methods import configure_train
from edge_coordinator.models import FOLD_AT, Models
from edge_coordinator.peers import MAX_BAD_HASHES, Peer, Peers
from edge_runtime.cost import DataShape
from edge_runtime.errors import StoreError, WireError
from edge_runtime.manifest import Manifest
from edge_runtime.planner import feasible, make_plan
from edge_runtime.records import Plan
from edge_runtime.topics import Topics
from edge_runtime.transport import Connected, Disconnected, Event, Message, Transport
from edge_runtime.wire import (
    Ack,
    Coordinator,
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
    pack,
    unpack_as,
)

MAX_IN_FLIGHT = 16  # messages handed to the transport and not yet taken by the broker
RETRY_S = 10.0  # after the disk was full
Emit = Callable[[dict[str, Any]], None]


def software() -> str:
    """Our version, for status messages."""
    try:
        return version("edge-runtime")
    except PackageNotFoundError:
        return "source"


def down_message() -> bytes:
    """What the broker says for us when our connection breaks."""
    return encode(Coordinator("down", 0, software()), sent_at=0.0, boot=bytes(8), sequence=0)


class Server:
    """Runs the rounds of one fleet over a transport."""

    def __init__(
        self,
        config: FleetConfig,
        ledger: Ledger,
        models: Models,
        transport: Transport,
        emit: Emit,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        newest = models.newest()
        if newest is None:
            raise StoreError("the fleet has no model yet: run `edge-coordinator init` again")
        self.config, self.ledger, self.models, self.transport, self.emit, self.clock = (
            config,
            ledger,
            models,
            transport,
            emit,
            clock,
        )
        self.manifest: Manifest = newest[0]
        self.manifest_blob: bytes = newest[1]
        self.topics = Topics(config.realm)
        self.peers = Peers(models.store, models.updates)
        self.run = config.run.name
        admit = min(MAX_MEMBERS, math.ceil(config.run.goal * config.run.overselection))
        self.rules = rounds.Rules(
            config.run.goal, config.run.quorum, admit, config.run.join_timeout_s, config.run.report_timeout_s
        )
        self.boot, self._sequence = os.urandom(8), 0
        self._next_attempt = 0.0  # not before this time: after a full disk, and between rounds
        self._connected = False
        self._known_devices: set[str] = set()
        self._resume()

    @property
    def finished(self) -> bool:
        """The run has had all its rounds."""
        last = self.ledger.last_round(self.run)
        return last is not None and last["round"] >= self.config.run.rounds and last["state"] in ("published", "failed")

    # the loop

    def serve(self, keep_going: Callable[[], bool], *, until_finished: bool = False) -> None:
        """Run until told to stop."""
        self.transport.start()
        while keep_going() and not (until_finished and self.finished):
            event = self.transport.next_event(0.05)
            while event is not None:
                self.handle(event)
                event = self.transport.next_event(0.0)
            self.tick()
        self._broadcast("coord", Coordinator("down", self.epoch, software()))
        self.transport.stop()

    def handle(self, event: Event) -> None:
        """One thing that happened. Whatever a message holds, this returns."""
        if isinstance(event, Connected):
            self._connected = True
            self.peers.reset_transfers(self.clock())
            self._announce()
        elif isinstance(event, Disconnected):
            self._connected = False
            self.emit({"event": "broker-lost", "reason": event.reason})
        elif isinstance(event, Message) and (sender := self.topics.sender(event.topic)):
            device, kind = sender
            if not self._enrolled(device):
                return
            peer = self.peers.get(device)
            try:
                self._message(peer, kind, event.payload)
            except WireError as error:
                if kind not in peer.refused:  # once a kind: a device that talks nonsense must not fill the log
                    peer.refused.add(kind)
                    self.emit({"event": "bad-message", "device": device, "kind": kind, "reason": str(error)})
            except (StoreError, OSError) as error:
                peer.receiver.forget_all()
                peer.offer = None
                self.emit({"event": "storage-error", "device": device, "reason": str(error)})

    def tick(self) -> None:
        """What time and credit allow: requests, chunks, the next state of the round."""
        now = self.clock()
        for peer in self.peers.all():
            if need := peer.receiver.requests(now):
                self._send(peer.device, "need", need)
        while self.transport.in_flight() < MAX_IN_FLIGHT and (chunk := self.peers.next_chunk()):
            self.transport.publish(self.topics.down(chunk[0], "c"), chunk[1])
        if now >= self._next_attempt:
            try:
                self._advance(now)
            except (StoreError, OSError) as error:
                self._next_attempt = now + RETRY_S
                self.emit({"event": "storage-error", "device": "", "reason": str(error)})

    # rounds

    def _resume(self) -> None:
        """Take up where the ledger stands: one epoch more, and every open phase gets its time again."""
        now = self.clock()
        with self.ledger.transaction():
            self.epoch = int(self.ledger.get("epoch") or 0) + 1
            self.ledger.put("epoch", str(self.epoch))
            last = self.ledger.last_round(self.run)
            if last and last["state"] in ("joining", "collecting"):
                time_s = self.rules.join_timeout_s if last["state"] == "joining" else self.rules.report_timeout_s
                self.ledger.extend_round(self.run, last["round"], now + time_s)
        self.models.clean()

    def _state(self) -> rounds.RoundState | None:
        last = self.ledger.last_round(self.run)
        if last is None:
            return None
        members = self.ledger.members(self.run, last["round"]).values()
        committed = self.ledger.contributions(self.run, last["round"])
        return rounds.RoundState(
            last["round"],
            last["state"],
            last["deadline"],
            joined=sum(m.status in ("joined", "planned") for m in members),
            unable=sum(m.status in ("unable", "excluded") for m in members),
            planned=sum(m.plan is not None for m in members),
            committed=len(committed),
            present=len(self.peers.online()),
            gave_up=sum(m.status == "gave-up" and m.device not in committed for m in members),
        )

    def _advance(self, now: float) -> None:
        state = self._state()
        if state is None or state.state in ("published", "failed"):
            if not self.finished and self._connected:
                self._open(state.number + 1 if state else 1, now)
            return
        wanted = rounds.next_state(state, self.rules, now)
        if wanted == "collecting" and state.state == "joining":
            self._plan(state, now)
        elif wanted == "failed":
            self._fail(state, now)
        elif wanted == "closing":
            self._close(state, now)

    def _open(self, number: int, now: float) -> None:
        opened = rounds.opened(number, self.rules, now)
        with self.ledger.transaction():
            self.ledger.open_round(self.run, number, self.manifest.version, opened.deadline, now)
        self.emit({"event": "round-opened", "run": self.run, "round": number, "model_version": self.manifest.version})
        self._announce_round()

    def _plan(self, state: rounds.RoundState, now: float) -> None:
        """The cohort is complete: the method plans for all of it at once."""
        members = self.ledger.members(self.run, state.number)
        joins = {d: _read_join(m) for d, m in members.items() if m.status == "joined"}
        chosen = configure_train(self.config.run.method, joins, self.manifest.num_blocks, self.config.train.epochs)
        planned: list[Member] = []
        for device, choice in chosen.items():
            if choice.row is None:
                planned.append(replace(members[device], status="excluded", reason=choice.why))
                continue
            settings = replace(self.config.train, seed=_seed(self.config.train.seed, state.number, device))
            plan = make_plan(choice.row, DataShape(joins[device].num_examples, 0, 0.0), settings)
            planned.append(replace(members[device], status="planned", nonce=os.urandom(16), plan=pack(plan)))
        after = rounds.collecting(state, self.rules, sum(m.plan is not None for m in planned), now)
        with self.ledger.transaction():
            self.ledger.move_round(self.run, state.number, "joining", "collecting", after.deadline, now)
            for member in planned:
                self.ledger.set_member(self.run, state.number, member)
        self.emit({"event": "round-planned", "round": state.number, "planned": after.planned, "members": len(members)})
        for member in planned:
            self._answer_member(member, state.number)

    def _close(self, state: rounds.RoundState, now: float) -> None:
        """closing -> published. Each step may be repeated after a crash and gives the same bits."""
        if state.state == "collecting" and not self.ledger.move_round(
            self.run, state.number, "collecting", "closing", state.deadline, now
        ):
            return
        committed = self.ledger.contributions(self.run, state.number)
        partial = self.models.fold(self.run, state.number, self.manifest, committed)
        assert partial is not None, "a round closes with at least one contribution"
        manifest, blob = self.models.next_version(self.manifest, self.manifest_blob, partial, self.config.run.method)
        examples = sum(c.num_examples for c in committed.values())
        loss = sum(c.num_examples * c.metrics["last_loss"] for c in committed.values()) / examples
        metrics = {"members": sorted(committed), "num_examples": examples, "mean_loss": round(loss, 5)}
        with self.ledger.transaction():
            if not self.ledger.move_round(self.run, state.number, "closing", "published", now, now):
                return
            self.ledger.add_model(manifest.version, blob, self.run, state.number, metrics, now)
        self.manifest, self.manifest_blob = manifest, blob
        self.emit({"event": "round-published", "round": state.number, "model_version": manifest.version, **metrics})
        self._after_round(now)

    def _fail(self, state: rounds.RoundState, now: float) -> None:
        reason = (
            f"{state.committed} of {state.planned or state.joined} devices reported, the quorum is {self.rules.quorum}"
        )
        with self.ledger.transaction():
            self.ledger.move_round(self.run, state.number, state.state, "failed", now, now, reason)
        self.emit({"event": "round-failed", "round": state.number, "reason": reason})
        self._after_round(now)

    def _after_round(self, now: float) -> None:
        self.models.clean()
        self._next_attempt = now + self.config.run.pause_s
        if self.finished:
            self.emit({"event": "run-finished", "run": self.run, "model_version": self.manifest.version})
        self._announce()

    # messages

    def _message(self, peer: Peer, kind: str, payload: bytes) -> None:
        if kind == "c":
            self._chunk(peer, payload)
            return
        if not payload and kind == "st":
            return
        body = decode(payload, kind).body
        if isinstance(body, Status):
            self._status(peer, body)
        elif isinstance(body, Need):
            for blob in peer.sender.ask(body.ranges):
                self._send(peer.device, "missing", Missing(blob))
        elif isinstance(body, Join):
            self._join(peer, body, payload)
        elif isinstance(body, Offer):
            self._offer(peer, body)

    def _status(self, peer: Peer, status: Status) -> None:
        before, peer.status = peer.status, status
        if status.state != "online":
            peer.sender.clear()
        changed = before is None or (before.state, before.model_version) != (status.state, status.model_version)
        if changed:
            self.ledger.seen(peer.device, status.state, status.model_version, status.software, self.clock())
        self.emit({"event": "status", "device": peer.device, "state": status.state, "model_version": status.model_version,
                   "activity": status.activity, "round": status.round, "step": status.step, "steps": status.steps})  # fmt: skip

    def _join(self, peer: Peer, join: Join, payload: bytes) -> None:
        state = self._state()
        if (
            state is None
            or (join.run, join.round) != (self.run, state.number)
            or state.state not in ("joining", "collecting")
        ):
            self._ack(peer.device, join.run, join.round, "late", "this round is not open any more")
            return
        member = self.ledger.members(self.run, state.number).get(peer.device)
        if state.state == "collecting":
            if member is None:
                self._ack(peer.device, join.run, join.round, "late", "the round has begun: join the next one")
            elif not join.table and member.plan is not None:  # it cannot do what it was granted
                self._set_member(state.number, replace(member, status="gave-up", reason=join.reason))
                self.emit({"event": "gave-up", "round": state.number, "device": peer.device, "reason": join.reason})
            else:
                self._answer_member(member, state.number)
            return
        able = (
            bool(join.table and feasible(join.table, join.budget, self.config.train.epochs)) and join.num_examples > 0
        )
        if able and (member is None or member.status != "joined") and not rounds.may_join(state, self.rules):
            self._ack(peer.device, join.run, join.round, "late", "the round has devices enough")
            return
        fresh = Member(peer.device, "joined" if able else "unable", payload, None, None, join.reason)
        self._set_member(state.number, fresh)
        if member is None or member.status != fresh.status:
            self.emit({"event": "joined" if able else "unable", "round": state.number, "device": peer.device, "reason": join.reason,
                       "num_examples": join.num_examples, "needs_bytes": join.needs_bytes, "budget_bytes": join.budget.memory_bytes})  # fmt: skip
        if not able:
            self._ack(peer.device, join.run, join.round, "declined", join.reason)

    def _answer_member(self, member: Member, number: int) -> None:
        """What a device of the cohort is told: its plan, that its update is in, or why it has none."""
        contribution = self.ledger.contributions(self.run, number).get(member.device)
        if contribution:
            self._ack(member.device, self.run, number, "committed", blob=contribution.blob)
        elif member.plan is not None and member.nonce is not None:
            plan: Plan = unpack_as(Plan, member.plan)
            self._send(
                member.device,
                "grant",
                Grant(self.run, number, member.nonce, self.manifest.version, plan, self.rules.report_timeout_s),
            )
            self.emit({"event": "granted", "round": number, "device": member.device, "depth": plan.chosen.depth,
                       "checkpointing": plan.chosen.checkpointing, "peak_bytes": plan.chosen.peak_bytes})  # fmt: skip
        else:
            self._ack(
                member.device,
                self.run,
                number,
                "excluded" if member.status == "excluded" else "declined",
                member.reason,
            )

    def _offer(self, peer: Peer, offer: Offer) -> None:
        contribution = self.ledger.contributions(offer.run, offer.round).get(peer.device)
        if contribution:
            self._ack(peer.device, offer.run, offer.round, "committed", blob=contribution.blob)
            return
        state = self._state()
        if state is None or (offer.run, offer.round) != (self.run, state.number) or state.state != "collecting":
            self._ack(peer.device, offer.run, offer.round, "late", "the round is closed", offer.blob)
            return
        if reason := self._why_refuse(peer.device, offer, state.number):
            self._reject(peer, offer, reason)
            return
        if peer.offer and peer.offer.blob != offer.blob:
            peer.receiver.cancel(peer.offer.blob)
        peer.offer = offer
        peer.receiver.want(offer.blob, offer.num_bytes, self.clock())
        if self.models.updates.has(offer.blob):
            self._commit(peer, offer)

    def _why_refuse(self, device: str, offer: Offer, number: int) -> str:
        member = self.ledger.members(self.run, number).get(device)
        if member is None or member.plan is None or member.nonce != offer.nonce:
            return "there is no plan with this lease"
        plan: Plan = unpack_as(Plan, member.plan)
        expected = sum(t.num_bytes for t in self.manifest.spec.suffix(plan.chosen.depth))
        if offer.codec != "f32" or offer.num_bytes != expected:
            return f"the update must be {expected} bytes of f32, it is {offer.num_bytes} of {offer.codec}"
        joined = _read_join(member).num_examples
        if offer.num_examples != joined:
            return f"the update counts {offer.num_examples} examples, the device joined with {joined}"
        return ""

    def _chunk(self, peer: Peer, payload: bytes) -> None:
        blob, offset, data = decode_chunk(payload)
        done = peer.receiver.accept(blob, offset, data, self.clock())
        if done and peer.offer and peer.offer.blob == blob:
            self._commit(peer, peer.offer)
        elif done is False and peer.offer:
            peer.bad_hashes += 1
            if peer.bad_hashes >= MAX_BAD_HASHES:
                self._reject(peer, peer.offer, "the bytes do not have the hash that was offered")

    def _commit(self, peer: Peer, offer: Offer) -> None:
        """The update is whole and durable: check it, write the transaction, and only then say so."""
        member = self.ledger.members(self.run, offer.round)[peer.device]
        assert member.plan is not None
        depth = unpack_as(Plan, member.plan).chosen.depth
        update = Update(peer.device, self.models.updates.path(offer.blob), offer.num_examples, depth)
        if reason := check_update(self.manifest.spec, update):
            self._reject(peer, offer, reason)
            return
        metrics = {
            "train_s": offer.train_s,
            "peak_bytes": offer.peak_bytes,
            "first_loss": offer.first_loss,
            "last_loss": offer.last_loss,
        }
        item = Contribution(peer.device, offer.blob, offer.num_examples, depth, metrics, False)
        with self.ledger.transaction():
            fresh = self.ledger.contribute(self.run, offer.round, item, self.clock())
        peer.offer, peer.bad_hashes = None, 0
        self._ack(peer.device, self.run, offer.round, "committed", blob=offer.blob)
        if fresh:
            self.emit({"event": "committed", "round": offer.round, "device": peer.device, "depth": depth, "num_bytes": offer.num_bytes,
                       "num_examples": offer.num_examples, **metrics})  # fmt: skip
        committed = self.ledger.contributions(self.run, offer.round)
        if sum(not c.folded for c in committed.values()) >= FOLD_AT:
            self.models.fold(self.run, offer.round, self.manifest, committed)

    def _reject(self, peer: Peer, offer: Offer, reason: str) -> None:
        peer.receiver.cancel(offer.blob)
        live = self.ledger.live_blobs()
        if offer.blob not in live:
            self.models.updates.delete(offer.blob)
        peer.offer, peer.bad_hashes = None, 0
        member = self.ledger.members(self.run, offer.round).get(peer.device)
        if member and member.plan is not None and member.nonce == offer.nonce:
            self._set_member(offer.round, replace(member, status="gave-up", reason=f"rejected: {reason}"[:500]))
        self._ack(peer.device, offer.run, offer.round, "rejected", reason, offer.blob)
        self.emit({"event": "rejected", "round": offer.round, "device": peer.device, "reason": reason})

    # sending

    def _announce(self) -> None:
        """The retained messages that tell a newcomer everything."""
        self._broadcast("coord", Coordinator("up", self.epoch, software()))
        size = self.models.store.size(self.manifest_blob)
        self._broadcast("model", Model(self.manifest.version, self.manifest_blob, size, self.finished))
        self._announce_round()

    def _announce_round(self) -> None:
        state = self._state()
        if state is None or state.state not in ("joining", "collecting"):
            return
        base = self.manifest.version
        message = Round(
            self.run,
            state.number,
            self.epoch,
            base,
            self.config.run.method,
            self.config.train,
            self.rules.join_timeout_s,
        )
        self._broadcast("round", message)

    def _broadcast(self, kind: str, body: Any) -> None:
        self.transport.publish(self.topics.all(kind), self._encode(body), retain=True)

    def _send(self, device: str, kind: str, body: Any) -> None:
        self.transport.publish(self.topics.down(device, kind), self._encode(body))

    def _ack(self, device: str, run: str, number: int, status: str, reason: str = "", blob: bytes = b"") -> None:
        self._send(device, "ack", Ack(run, number, status, reason[:500], blob))

    def _encode(self, body: Any) -> bytes:
        self._sequence += 1
        return encode(body, sent_at=self.clock(), boot=self.boot, sequence=self._sequence)

    def _set_member(self, number: int, member: Member) -> None:
        with self.ledger.transaction():
            self.ledger.set_member(self.run, number, member)

    def _enrolled(self, device: str) -> bool:
        if device not in self._known_devices:
            if self.ledger.secret(device) is None:
                return False
            self._known_devices.add(device)
        return True


def _read_join(member: Member) -> Join:
    body = decode(member.join_message, "join").body
    assert isinstance(body, Join)
    return body


def _seed(seed: int, number: int, device: str) -> int:
    """The device's own seed for a round: the same in every run with the same settings."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{device}".encode()).digest()[:7], "big")
