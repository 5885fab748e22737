"""Carries messages: MQTT by paho, and a public in-process double with the same behaviour for tests and simulation.

Both put what arrives into one queue that the owner's single thread reads, so no handler runs on a foreign thread.
Delivery is at least once while connected and nothing across a disconnect: whatever must survive is asked for again
(`docs/wire.md`). Imports paho inside `MqttTransport` only.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_runtime.errors import ConnectionFailed, WireError

if TYPE_CHECKING:
    import paho.mqtt.client as mqtt

MAX_MESSAGE_BYTES = (256 << 10) + 1024
INBOX_MESSAGES = 256


@dataclass(frozen=True)
class Message:
    """Something arrived."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Connected:
    """The connection is up and the subscriptions are in place: ask again for whatever was under way."""


@dataclass(frozen=True)
class Disconnected:
    """The connection is lost; it is being made again. `refused` tells that the broker said no."""

    reason: str
    refused: bool = False


Event = Message | Connected | Disconnected


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when the connection breaks."""

    topic: str
    payload: bytes


class Transport(Protocol):
    """What agent and coordinator need of a carrier."""

    def start(self) -> None:
        """Begin connecting; returns at once."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send, at least once while connected; dropped while not."""

    def next_event(self, timeout_s: float) -> Event | None:
        """The next thing that happened, or None after `timeout_s` seconds."""

    def in_flight(self) -> int:
        """Messages handed over and not yet taken by the broker."""

    def stop(self) -> None:
        """Disconnect cleanly. Idempotent."""


class MqttTransport:
    """MQTT 3.1.1 over paho, clean sessions, QoS 1, reconnecting with back-off from 1 to 60 seconds."""

    def __init__(
        self,
        host: str,
        port: int,
        user: str,
        password: str,
        filters: Iterable[str],
        *,
        will: Will | None = None,
        ca_file: Path | None = None,
        keepalive_s: int = 30,
        inbox_messages: int = INBOX_MESSAGES,
    ) -> None:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.host, self.port = host, port
        self._filters = list(filters)
        self._inbox: queue.Queue[Event] = queue.Queue(inbox_messages)
        self._published = self._acknowledged = 0  # one writer each: the owner's thread, paho's thread
        self._stopped = False
        self._ok = mqtt.MQTT_ERR_SUCCESS
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=user,
            clean_session=True,
            protocol=mqtt.MQTTv311,
            reconnect_on_failure=True,
        )
        client.username_pw_set(user, password)
        if ca_file is not None:
            client.tls_set(ca_certs=str(ca_file))
        if will:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.max_inflight_messages_set(20)
        client.max_queued_messages_set(200)
        client.reconnect_delay_set(1, 60)
        client.connect_timeout = 10.0
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_subscribe, client.on_message, client.on_publish = (
            self._on_subscribe,
            self._on_message,
            self._on_publish,
        )
        client.on_connect_fail = self._on_connect_fail
        self._client = client
        self._keepalive_s = keepalive_s

    def start(self) -> None:
        try:
            self._client.connect_async(self.host, self.port, keepalive=self._keepalive_s)
        except ValueError as error:
            raise ConnectionFailed(f"the broker's address {self.host!r}:{self.port} is not usable: {error}") from None
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if len(payload) > MAX_MESSAGE_BYTES:  # one oversize message would block everything behind it for ever
            raise WireError(f"a message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        if not self._client.is_connected():
            return
        if self._client.publish(topic, payload, qos=1, retain=retain).rc == self._ok:
            self._published += 1

    def next_event(self, timeout_s: float) -> Event | None:
        try:
            return self._inbox.get(timeout=max(timeout_s, 0.0)) if timeout_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None

    def in_flight(self) -> int:
        return max(0, self._published - self._acknowledged)

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._client.disconnect()
        self._client.loop_stop()

    # paho's network thread

    def _put(self, event: Event) -> None:
        while not self._stopped:  # a full inbox stops reading from the socket: TCP holds the sender back
            try:
                return self._inbox.put(event, timeout=0.5)
            except queue.Full:
                continue

    def _on_connect(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._put(Disconnected(str(reason), refused=True))
            return
        client.subscribe([(f, 1) for f in self._filters])

    def _on_subscribe(self, client: mqtt.Client, userdata: Any, mid: int, reasons: list[Any], properties: Any) -> None:
        refused = [f for f, r in zip(self._filters, reasons, strict=False) if r.is_failure]
        if refused:
            self._put(Disconnected(f"the broker refuses the subscription to {refused[0]}", refused=True))
        else:
            self._put(Connected())

    def _on_disconnect(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if not self._stopped and not (reason.is_failure and str(reason) == "Not authorized"):
            self._put(Disconnected(str(reason)))

    def _on_connect_fail(self, client: mqtt.Client, userdata: Any) -> None:
        self._put(Disconnected(f"no broker answers at {self.host}:{self.port}"))

    def _on_message(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        self._put(Message(message.topic, bytes(message.payload)))

    def _on_publish(self, client: mqtt.Client, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        self._acknowledged += 1


@dataclass
class LocalBroker:
    """An in-process broker: topics, wildcards, retained messages and wills. No authentication: for one process only."""

    retained: dict[str, bytes] = field(default_factory=dict)
    clients: dict[str, LocalTransport] = field(default_factory=dict)

    def deliver(self, topic: str, payload: bytes, retain: bool) -> None:
        """To every client whose filters match."""
        if retain:
            if payload:
                self.retained[topic] = payload
            else:
                self.retained.pop(topic, None)
        for client in list(self.clients.values()):
            if any(matches(f, topic) for f in client.filters):
                client.inbox.append(Message(topic, payload))


class LocalTransport:
    """A `Transport` on a LocalBroker. Everything happens at the call; events wait in a list."""

    def __init__(self, broker: LocalBroker, user: str, filters: Iterable[str], *, will: Will | None = None) -> None:
        self.broker, self.user, self.filters, self.will = broker, user, list(filters), will
        self.inbox: deque[Event] = deque()

    def start(self) -> None:
        self.broker.clients[self.user] = self
        self.inbox.append(Connected())
        for topic, payload in list(self.broker.retained.items()):
            if any(matches(f, topic) for f in self.filters):
                self.inbox.append(Message(topic, payload))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if len(payload) > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        if self.broker.clients.get(self.user) is self:
            self.broker.deliver(topic, payload, retain)

    def next_event(self, timeout_s: float) -> Event | None:
        return self.inbox.popleft() if self.inbox else None

    def in_flight(self) -> int:
        return 0

    def stop(self) -> None:
        if self.broker.clients.get(self.user) is self:
            del self.broker.clients[self.user]

    def break_connection(self) -> None:
        """As if the network failed: the will is published, what was queued is lost."""
        self.stop()
        self.inbox = deque([Disconnected("the connection was broken")])
        if self.will:
            self.broker.deliver(self.will.topic, self.will.payload, retain=True)


def matches(topic_filter: str, topic: str) -> bool:
    """MQTT 3.1.1 section 4.7 for filters without a leading `$`."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(levels) or level not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)
