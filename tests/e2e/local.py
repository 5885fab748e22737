"""A coordinator in this process over the in-process broker, and a scripted device that can lie. No training, no sockets."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.fleet import init
from edge_coordinator.models import Models
from edge_coordinator.server import Server
from edge_runtime.codecs import PACKED
from edge_runtime.encoding import write_update
from edge_runtime.importance import any_kept
from edge_runtime.model import ModelSpec
from edge_runtime.prune_plan import kept_of, planned, sent
from edge_runtime.pruning import Kept
from edge_runtime.records import Budget, CostRow, Plan
from edge_runtime.store import BlobStore
from edge_runtime.topics import Topics
from edge_runtime.transfer import Sender
from edge_runtime.transport import LocalBroker, LocalTransport, Message
from edge_runtime.wire import Ack, Grant, Join, Need, Offer, Round, Status, decode, encode
from tests.e2e.fleets import LABELS

GIB = 1 << 30


class World:
    """A coordinator whose clock is set by the test."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        devices: int = 2,
        rounds: int = 1,
        method: str = "caff",
        goal: int = 0,
        quorum: int = 1,
        twice: bool = False,
    ) -> None:
        self.folder, self.now = folder, 1_000_000.0
        self.broker = LocalBroker() if not twice else TwiceBroker()
        init(
            folder,
            name="test",
            base=str(model),
            labels=LABELS,
            max_length=32,
            method=method,
            rounds=rounds,
            goal=goal or devices,
            quorum=quorum,
        )
        self.fleet = FleetFolder(folder)
        self.names = [f"device-{i}" for i in range(devices)]
        for name in self.names:
            self.fleet.enroll(name, folder / "devices" / f"{name}.toml")
        self.events: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        """A coordinator, as after a start or a restart."""
        topics = Topics("test")
        transport = LocalTransport(self.broker, "coordinator", topics.coordinator_filters())
        models = self.fleet.models(print)
        self.server = Server(
            self.fleet.config, self.fleet.ledger, models, transport, self.events.append, clock=lambda: self.now
        )
        transport.start()

    def step(self, *devices: FakeDevice, times: int = 20) -> None:
        """Let everybody read and answer for a while."""
        for _ in range(times):
            while (event := self.server.transport.next_event(0)) is not None:
                self.server.handle(event)
            self.server.tick()
            for device in devices:
                device.step()

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        """The coordinator's events of one kind."""
        return [e for e in self.events if e["event"] == kind]

    def tensors(self) -> list[str]:
        """The newest model, bit for bit."""
        newest = Models(self.folder, self.fleet.ledger).newest()
        assert newest
        return [t.blob.hex() for t in newest[0].tensors]


class TwiceBroker(LocalBroker):
    """Delivers every message twice."""

    def deliver(self, topic: str, payload: bytes, retain: bool) -> None:
        """As the broker, two times."""
        super().deliver(topic, payload, retain)
        super().deliver(topic, payload, retain)


class FakeDevice:
    """Speaks the protocol with made-up updates; `tamper` changes the offer before it is sent."""

    def __init__(
        self, world: World, name: str, *, table: tuple[CostRow, ...] = (), memory: int = GIB, examples: int = 10, reason: str = "",
        update: Callable[[int], bytes] | None = None, tamper: Callable[[Offer], Offer] = lambda offer: offer, serve: bool = True, packed: bool = False,
        keep: Callable[[ModelSpec, Kept, float], Kept] = any_kept,
    ) -> None:  # fmt: skip
        self.world, self.name, self.table, self.memory, self.examples, self.reason = (
            world,
            name,
            table,
            memory,
            examples,
            reason,
        )
        self.update, self.tamper, self.serve, self.packed, self.keep = update, tamper, serve, packed, keep
        self.topics = Topics("test")
        self.transport = LocalTransport(world.broker, name, self.topics.device_filters(name))
        self.store = BlobStore(world.folder.parent / f"fake-{name}")
        self.sender = Sender(self.store)
        self.acks: list[Ack] = []
        self.grants: list[Grant] = []
        self._sequence = 0
        self.transport.start()
        self.send("st", Status("online", "test", 1))

    def send(self, kind: str, body: Any) -> None:
        """A control message of ours."""
        self._sequence += 1
        self.transport.publish(
            self.topics.up(self.name, kind), encode(body, sent_at=0.0, boot=bytes(8), sequence=self._sequence)
        )

    def step(self) -> None:
        """Read and answer everything."""
        while (event := self.transport.next_event(0)) is not None:
            if isinstance(event, Message) and event.payload and not event.topic.endswith("/c"):
                self._answer(decode(event.payload, self.topics.kind(event.topic)).body)
        while self.serve and (chunk := self.sender.next_chunk()):
            self.transport.publish(self.topics.up(self.name, "c"), chunk)

    def join(self, run: str, number: int) -> None:
        """Join a round."""
        self.send(
            "join", Join(run, number, bytes(8), self.examples, Budget(self.memory), self.table, 123 << 20, self.reason)
        )

    def offer(self, grant: Grant) -> None:
        """Make an update for a plan and offer it."""
        spec = self.world.server.run.manifest.spec
        size, kept = sum(t.num_bytes for t in planned(spec, grant.plan)), b""
        if grant.plan.pruning:
            kept = self.keep(spec, kept_of(spec, grant.plan.pruning.kept), grant.plan.pruning.to).encode()
        data = self.update(size) if self.update else constant_update(size, 0.01)
        codec = grant.plan.chosen.codec
        if codec != "f32":
            data, codec = encoded(spec, grant.plan, data, kept), codec + PACKED * self.packed
            data = zlib.compress(data) if self.packed else data
        blob = self.store.put(data)
        offer = Offer(
            grant.run, grant.round, grant.nonce, blob, len(data), codec, self.examples, 1.0, 1, 2.0, 1.0, kept
        )
        self.send("offer", self.tamper(offer))

    def _answer(self, body: Any) -> None:
        if isinstance(body, Round):
            self.join(body.run, body.round)
        elif isinstance(body, Grant):
            self.grants.append(body)
            self.offer(body)
        elif isinstance(body, Need):
            self.sender.ask(body.ranges)
        elif isinstance(body, Ack):
            self.acks.append(body)


def constant_update(size: int, value: float) -> bytes:
    """An update whose every delta is the same."""
    return np.full(size // 4, value, "<f4").tobytes()


def encoded(spec: ModelSpec, plan: Plan, data: bytes, kept: bytes = b"") -> bytes:
    """A float32 update in its plan's codec."""
    sizes = {t.name: t.size for t in sent(spec, plan, kept)}
    values, pieces = np.frombuffer(data, "<f4"), []
    for name, size in sizes.items():
        pieces.append((name, values[:size]))
        values = values[size:]
    out = io.BytesIO()
    write_update(out, plan.chosen.codec, sizes, pieces, plan.settings.seed)
    return out.getvalue()


def rows(
    *depths: int, peak: int = 1 << 20, upload: int = 1000, epoch_s: float = 1.0, codec: str = "f32", rank: int = 0
) -> tuple[CostRow, ...]:
    """A cost table with these depths, of adapters of a rank."""
    return tuple(CostRow(d, False, 4, peak, 0.1, epoch_s, upload, rank=rank if d else 0, codec=codec) for d in depths)


def lie(**changes: Any) -> Callable[[Offer], Offer]:
    """A tamper that replaces fields of the offer."""
    return lambda offer: replace(offer, **changes)


def random_hash() -> bytes:
    """The hash of nothing we have."""
    return hashlib.sha256(os.urandom(8)).digest()
