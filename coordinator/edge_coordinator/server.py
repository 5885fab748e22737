"""The coordinator's loop: messages in, ledger and blobs, answers out. One thread; decisions are in `rounds` and `methods`.

Nothing counts until the ledger has it: a device is told `committed` after its transaction, so that this process may be
killed at any point and goes on from the ledger, the blobs and the partial transfers. Rounds are `run.py`'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edge_coordinator import rounds
from edge_coordinator.aggregate import Update, check_update
from edge_coordinator.config import FleetConfig
from edge_coordinator.ledger import Contribution, Ledger, Member, read_join
from edge_coordinator.models import FOLD_AT, Models
from edge_coordinator.peers import MAX_BAD_HASHES, Peer, Peers
from edge_coordinator.run import Emit, Run
from edge_runtime.codecs import misfit, update_bytes
from edge_runtime.errors import StoreError, WireError
from edge_runtime.planner import feasible
from edge_runtime.prune_plan import offer_misfit, sent
from edge_runtime.records import Plan
from edge_runtime.topics import Topics
from edge_runtime.transport import Connected, Disconnected, Event, Message, Transport
from edge_runtime.version import software
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
    unpack_as,
)

MAX_IN_FLIGHT = 16  # messages handed to the transport and not yet taken by the broker
RETRY_S = 10.0  # after the disk was full
EVENTS_A_TICK = 64
HAND_OVER_S = 60.0
STATUS_EVENT_S = 1.0  # least time between two status events of one device that brings no news, or too many
KNOWN_S = 10.0  # after this the ledger is asked again whether a device may speak
MAX_NEWS = 3  # times that a device's change of mind in one round is reported, and a change of its state at once


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: clock: what deadlines and waiting go by, so that setting the machine's time moves none of them."""
        self.config, self.ledger, self.models = config, ledger, models
        self.transport, self.emit, self.clock = transport, emit, clock
        self.run = Run(config, ledger, models, emit, clock())
        self.topics = Topics(config.realm)
        self.peers = Peers(models.store, models.updates)
        self.boot, self._sequence = os.urandom(8), 0
        self._next_attempt = 0.0  # not before this time: after a full disk, and between rounds
        self._connected = False
        self._finished_at = 0.0
        self._known_devices: dict[str, float] = {}  # when the ledger was last asked

    # the loop

    def serve(self, keep_going: Callable[[], bool], *, until_finished: bool = False) -> None:
        """Run until told to stop."""
        self.transport.start()
        while keep_going() and not (until_finished and self._handed_over()):
            event = self.transport.next_event(0.05)
            for _ in range(EVENTS_A_TICK):  # a device that floods us must not keep the others from their turn
                if event is None:
                    break
                self.handle(event)
                event = self.transport.next_event(0.0)
            if event is not None:
                self.handle(event)
            self.tick()
        self._broadcast("coord", Coordinator("down", self.run.epoch, software()))
        self.transport.stop()

    def _handed_over(self) -> bool:
        """The run is finished and every device that is online holds its model, or has had a minute to fetch it."""
        if not self.run.finished:
            return False
        self._finished_at = self._finished_at or time.monotonic()
        newest = self.run.manifest.version
        # of the ledger, since a coordinator that was killed meanwhile and started again has not heard from them yet
        online = [d for d in self.ledger.devices() if d["state"] == "online" and not d["revoked"]]
        return all(d["model_version"] == newest for d in online) or time.monotonic() - self._finished_at > HAND_OVER_S

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
            if self._enrolled(device):
                self._from_device(self.peers.get(device), kind, event.payload)

    def tick(self) -> None:
        """What time and credit allow: requests, chunks, the next step of the round."""
        now = self.clock()
        for peer in self.peers.busy():
            if need := peer.receiver.requests(now):
                self._send(peer.device, "need", need)
            if peer.status is not peer.told:
                self._report_late(peer)
            self.peers.rest(peer)
        while self.transport.in_flight() < MAX_IN_FLIGHT and (chunk := self.peers.next_chunk()):
            self.transport.publish(self.topics.down(chunk[0], "c"), chunk[1])
        if now >= self._next_attempt and self._connected:
            try:
                self._advance(now)
            except (StoreError, OSError) as error:
                self._next_attempt = now + RETRY_S
                self.emit({"event": "storage-error", "device": "", "reason": str(error)})

    def _advance(self, now: float) -> None:
        happened = self.run.advance(now, len(self.peers.ready()))
        if happened == "opened":
            self._announce_model()  # the run may have begun with other adapters
            self._announce_round()
        elif happened == "planned":
            state = self.run.state()
            assert state is not None, "a round was just planned"
            for member in self.ledger.members(self.run.name, state.number).values():
                if member.status != "unable":
                    self._answer_member(member, state.number)
        elif happened:
            self._next_attempt = now + self.config.run.pause_s
            self._turn_away_offers()
            self._announce()

    def _turn_away_offers(self) -> None:
        """The round has ended: what is still on its way counts no more, and is told so."""
        for peer in self.peers.all():
            peer.news = peer.changes = 0
            if peer.offer:
                self._too_late(peer, peer.offer)

    def _too_late(self, peer: Peer, offer: Offer) -> None:
        peer.receiver.cancel(offer.blob)
        peer.offer = None
        if offer.blob not in self.ledger.live_blobs():
            self.models.updates.delete(offer.blob)
        self._ack(peer.device, offer.run, offer.round, "late", "the round is closed", offer.blob)

    # messages

    def _from_device(self, peer: Peer, kind: str, payload: bytes) -> None:
        try:
            self._message(peer, kind, payload)
        except WireError as error:
            if kind not in peer.refused:  # once a kind: a device that talks nonsense must not fill the log
                peer.refused.add(kind)
                self.emit({"event": "bad-message", "device": peer.device, "kind": kind[:36], "reason": str(error)})
        except (StoreError, OSError) as error:
            peer.receiver.forget_all()
            peer.offer = None
            self.emit({"event": "storage-error", "device": peer.device, "reason": str(error)})

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
        self.peers.heard(peer, status)
        if status.state != "online":
            peer.sender.clear()
        self._report(peer, status)

    def _report(self, peer: Peer, status: Status) -> None:
        """Put a status into ledger and log: a few changes in a round at once, all else at most once a second."""
        told, now = peer.told, time.monotonic()
        changed = told is None or (told.state, told.model_version) != (status.state, status.model_version)
        if (not changed or peer.changes >= MAX_NEWS) and now - peer.told_at < STATUS_EVENT_S:
            return  # `tick` comes back to it
        if changed:
            self.ledger.seen(peer.device, status.state, status.model_version, status.software, time.time())
        peer.told, peer.told_at = status, now
        peer.changes += changed
        self.emit({"event": "status", "device": peer.device, "state": status.state, "model_version": status.model_version,
                   "activity": status.activity, "round": status.round, "step": status.step, "steps": status.steps})  # fmt: skip

    def _report_late(self, peer: Peer) -> None:
        """What a device said last, if it was too soon to report it then, or the disk was full."""
        if peer.status is None or time.monotonic() - peer.told_at < STATUS_EVENT_S:
            return
        try:
            self._report(peer, peer.status)
        except StoreError as error:
            peer.told_at = time.monotonic() + RETRY_S
            self.emit({"event": "storage-error", "device": peer.device, "reason": str(error)})

    def _join(self, peer: Peer, join: Join, payload: bytes) -> None:
        state = self.run.state()
        if (
            state is None
            or (join.run, join.round) != (self.run.name, state.number)
            or state.state not in ("joining", "collecting")
        ):
            self._ack(peer.device, join.run, join.round, "late", "this round is not open any more")
            return
        member = self.ledger.member(self.run.name, state.number, peer.device)
        if state.state == "collecting":
            if member is None:
                self._ack(peer.device, join.run, join.round, "late", "the round has begun: join the next one")
            elif not join.table and member.plan is not None:  # it cannot do what it was granted
                self.run.set_member(state.number, replace(member, status="gave-up", reason=join.reason))
                self.emit({"event": "gave-up", "round": state.number, "device": peer.device, "reason": join.reason})
            else:
                self._answer_member(member, state.number)
            return
        able = (
            bool(join.table and feasible(join.table, join.budget, self.config.train.epochs)) and join.num_examples > 0
        )
        if able and (member is None or member.status != "joined") and not rounds.may_join(state, self.run.rules):
            self._ack(peer.device, join.run, join.round, "late", "the round has devices enough")
            return
        fresh = Member(peer.device, "joined" if able else "unable", payload, None, None, join.reason)
        peer.news += member is None or member.status != fresh.status
        if peer.news > MAX_NEWS and member is not None:
            return  # it changes its mind again and again: what it said first stands
        self.run.set_member(state.number, fresh)
        if member is None or member.status != fresh.status:
            self.emit({"event": "joined" if able else "unable", "round": state.number, "device": peer.device, "reason": join.reason,
                       "num_examples": join.num_examples, "needs_bytes": join.needs_bytes, "budget_bytes": join.budget.memory_bytes})  # fmt: skip
        if not able:
            self._ack(peer.device, join.run, join.round, "declined", join.reason)

    def _answer_member(self, member: Member, number: int) -> None:
        """What a device of the cohort is told: its plan, that its update is in, or why it has none."""
        contribution = self.ledger.contribution(self.run.name, number, member.device)
        if contribution:
            self._ack(member.device, self.run.name, number, "committed", blob=contribution.blob)
        elif member.plan is not None and member.nonce is not None:
            plan: Plan = unpack_as(Plan, member.plan)
            self._send(
                member.device,
                "grant",
                Grant(
                    self.run.name,
                    number,
                    member.nonce,
                    self.run.manifest.version,
                    plan,
                    self.run.rules.report_timeout_s,
                ),
            )
            self.emit({"event": "granted", "round": number, "device": member.device, "depth": plan.chosen.depth,
                       "checkpointing": plan.chosen.checkpointing, "peak_bytes": plan.chosen.peak_bytes, "codec": plan.chosen.codec,
                       "rank": plan.chosen.rank, "mask_every": plan.settings.mask_every})  # fmt: skip
        else:
            self._ack(
                member.device,
                self.run.name,
                number,
                "excluded" if member.status == "excluded" else "declined",
                member.reason,
            )

    def _offer(self, peer: Peer, offer: Offer) -> None:
        contribution = self.ledger.contribution(offer.run, offer.round, peer.device)
        if contribution:
            self._ack(peer.device, offer.run, offer.round, "committed", blob=contribution.blob)
            return
        state = self.run.state()
        if state is None or (offer.run, offer.round) != (self.run.name, state.number) or state.state != "collecting":
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
        member = self.ledger.member(self.run.name, number, device)
        if member is None or member.plan is None or member.nonce != offer.nonce:
            return "there is no plan with this lease"
        plan: Plan = unpack_as(Plan, member.plan)
        spec = self.run.manifest.spec
        if reason := offer_misfit(spec, plan, offer.kept):
            return reason
        expected = update_bytes(sent(spec, plan, offer.kept), plan.chosen.codec)
        if reason := misfit(offer.codec, offer.num_bytes, plan.chosen.codec, expected):
            return reason
        joined = read_join(member).num_examples
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
        state = self.run.state()
        if state is None or (offer.run, offer.round, state.state) != (self.run.name, state.number, "collecting"):
            self._too_late(peer, offer)
            return
        member = self.ledger.member(self.run.name, offer.round, peer.device)
        assert member and member.plan is not None
        plan: Plan = unpack_as(Plan, member.plan)
        depth, tensors = plan.chosen.depth, sent(self.run.manifest.spec, plan, offer.kept)
        update = Update(peer.device, self.models.updates.path(offer.blob), offer.num_examples, tensors, offer.codec)
        if reason := check_update(update):
            self._reject(peer, offer, reason)
            return
        metrics = {
            "train_s": offer.train_s,
            "peak_bytes": offer.peak_bytes,
            "first_loss": offer.first_loss,
            "last_loss": offer.last_loss,
        }
        pruned = {"kept": offer.kept.hex()} if offer.kept else {}
        stored = {**metrics, "num_bytes": offer.num_bytes, **pruned}
        item = Contribution(peer.device, offer.blob, offer.num_examples, depth, stored, False, offer.codec)
        fresh = self.run.contribute(offer.round, item)
        peer.offer, peer.bad_hashes = None, 0
        self._ack(peer.device, self.run.name, offer.round, "committed", blob=offer.blob)
        if fresh:
            self.emit({"event": "committed", "round": offer.round, "device": peer.device, "depth": depth, "codec": offer.codec, "num_bytes": offer.num_bytes,
                       "num_examples": offer.num_examples, **metrics})  # fmt: skip
        if not self.run.method.keeps_updates:
            unfolded = self.ledger.unfolded(self.run.name, offer.round)
            if len(unfolded) >= FOLD_AT:
                self.models.fold(self.run.name, offer.round, self.run.manifest, unfolded)

    def _reject(self, peer: Peer, offer: Offer, reason: str) -> None:
        peer.receiver.cancel(offer.blob)
        live = self.ledger.live_blobs()
        if offer.blob not in live:
            self.models.updates.delete(offer.blob)
        peer.offer, peer.bad_hashes = None, 0
        member = self.ledger.member(self.run.name, offer.round, peer.device)
        if member and member.plan is not None and member.nonce == offer.nonce:
            self.run.set_member(offer.round, replace(member, status="gave-up", reason=f"rejected: {reason}"[:500]))
        self._ack(peer.device, offer.run, offer.round, "rejected", reason, offer.blob)
        self.emit({"event": "rejected", "round": offer.round, "device": peer.device, "reason": reason})

    # sending

    def _announce(self) -> None:
        """The retained messages that tell a newcomer everything."""
        self._broadcast("coord", Coordinator("up", self.run.epoch, software()))
        self._announce_model()
        self._announce_round()

    def _announce_model(self) -> None:
        size = self.models.store.size(self.run.manifest_blob)
        self._broadcast("model", Model(self.run.manifest.version, self.run.manifest_blob, size, self.run.finished))

    def _announce_round(self) -> None:
        state = self.run.state()
        if state is None or state.state not in ("joining", "collecting"):
            return
        base, stage = self.run.manifest.version, self.run.stage(state.number)
        message = Round(
            self.run.name,
            state.number,
            self.run.epoch,
            base,
            self.config.run.method,
            stage.settings,
            self.run.rules.join_timeout_s,
            stage.adapters,
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
        return encode(body, sent_at=time.time(), boot=self.boot, sequence=self._sequence)

    def _enrolled(self, device: str) -> bool:
        """Asked of the ledger now and then, so that a device which is revoked while connected is heard no more."""
        now = time.monotonic()
        if now - self._known_devices.get(device, -KNOWN_S) >= KNOWN_S:
            if self.ledger.secret(device) is None:
                self._known_devices.pop(device, None)
                self.peers.forget(device)  # no round waits for it
                return False
            self._known_devices[device] = now
        return True
