"""What the coordinator holds for each connected device: its transfers in both directions, and what it last said.

All of it can be lost: a device asks again after every reconnect. Bounded for each device. No ledger, no decisions.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from edge_runtime.store import BlobStore
from edge_runtime.transfer import Receiver, Sender
from edge_runtime.wire import Offer, Status

MAX_BAD_HASHES = 3


@dataclass
class Peer:
    """One device, from the coordinator's point of view."""

    device: str
    sender: Sender
    receiver: Receiver
    status: Status | None = None  # what it said last
    told: Status | None = None  # what of that was reported last
    offer: Offer | None = None  # whose blob is being fetched
    bad_hashes: int = 0
    told_at: float = 0.0  # when that was
    news: int = 0  # changes of mind reported in this round, so that logs stay bounded
    changes: int = 0  # of state or model version reported in this round, for the same reason
    refused: set[str] = field(default_factory=set)  # kinds of bad messages already reported, so that logs stay bounded


class Peers:
    """The devices that have said something since this coordinator started."""

    def __init__(self, models: BlobStore, updates: BlobStore) -> None:
        self._models, self._updates = models, updates
        self._peers: dict[str, Peer] = {}
        self._busy: dict[str, None] = {}  # in order: who has said something that may not be done with
        self._online: set[str] = set()
        self._waiting: set[str] = set()  # of these, for conditions of their own
        self._turn: list[str] = []

    def get(self, device: str) -> Peer:
        """The device's peer, made at its first word; it is looked at until it `rest`s."""
        if device not in self._peers:
            self._peers[device] = Peer(device, Sender(self._models), Receiver(self._updates))
        self._busy[device] = None
        return self._peers[device]

    def heard(self, peer: Peer, status: Status) -> None:
        """What a device says of itself."""
        peer.status = status
        (self._online.add if status.state == "online" else self._online.discard)(peer.device)
        (self._waiting.add if status.waiting else self._waiting.discard)(peer.device)

    def forget(self, device: str) -> None:
        """It was revoked: it is not there any more, whatever it said last."""
        self._peers.pop(device, None)
        self._busy.pop(device, None)
        self._online.discard(device)
        self._waiting.discard(device)

    def ready(self) -> Set[str]:
        """Devices that are there and may train now: those that a round waits for."""
        return self._online - self._waiting

    def online(self) -> Set[str]:
        """Devices that are there now."""
        return self._online

    def all(self) -> list[Peer]:
        """Every peer."""
        return list(self._peers.values())

    def busy(self) -> list[Peer]:
        """The peers that have something under way, or may have: work goes with these and not with the fleet."""
        return [self._peers[device] for device in self._busy]

    def rest(self, peer: Peer) -> None:
        """If nothing of a peer is under way, it is not looked at until it says something."""
        if peer.receiver.idle and peer.sender.idle and peer.status is peer.told:
            self._busy.pop(peer.device, None)

    def next_chunk(self) -> tuple[str, bytes] | None:
        """The next chunk to send, device after device in turn."""
        for _ in range(len(self._busy)):
            if not self._turn:
                self._turn = list(self._busy)
            device = self._turn.pop()
            if device in self._busy and (chunk := self._peers[device].sender.next_chunk()):
                return device, chunk
        return None

    def reset_transfers(self, now: float) -> None:
        """After our own reconnect: whatever was in flight is lost."""
        for peer in self._peers.values():
            peer.sender.clear()
            peer.receiver.restart(now)
