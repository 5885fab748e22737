"""The gate before amqtt: who becomes a client of the embedded broker, and who is sent what.

amqtt 0.12 alone drops the session that a CONNECT names before it asks for the password, reads packets of any size,
never enforces keepalive, lets both of two clients with one id live, and queues without limit for a client that does
not read (250 MiB published to a stopped subscriber: 262 MiB more resident memory, for ever). So amqtt keeps the
protocol's exchanges and the lists of sessions, subscriptions and retained messages, and nothing else:

- `Gate` accepts, authenticates and replaces connections before amqtt hears of them, and watches their clocks;
- `connection.Connection` is what amqtt gets for reader and writer: whole, checked packets in, bounded bytes out;
- `_Rules` replaces what amqtt decides: subscriptions, delivery of messages and of retained messages.

Not thread-safe: everything here lives in the broker's thread and event loop. Imports `access`, `connection`,
`packets`, `secrets` and `edge_runtime`; amqtt only when a gate opens. Only `broker` may import it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from edge_coordinator import access
from edge_coordinator.connection import CONNECT_S, Connection
from edge_coordinator.packets import Connect
from edge_coordinator.secrets import hash_secret, new_secret, verify_secret
from edge_runtime.errors import UsageError, WireError
from edge_runtime.optional import require
from edge_runtime.topics import COORDINATOR

Lookup = Callable[[str], "str | None"]

RECHECK_S = 10.0  # after this the lookup is asked again whether a connected client may stay
PENDING_CONNECTIONS = 128  # not authenticated yet; one more drops the oldest
DEVICE_BACKLOG_BYTES = 8 << 20  # twice the credit of 4 MiB that one transfer may have in flight
COORDINATOR_BACKLOG_BYTES = 64 << 20
COORDINATOR_PAUSE_BYTES = 16 << 20  # with this much waiting for the coordinator, devices are not read
TOTAL_BACKLOG_BYTES = 256 << 20
MESSAGE_OVERHEAD_BYTES = 2048  # what a queued message costs beside its payload: a task, a future, a record
DEVICE_FILTERS = 32
COORDINATOR_FILTERS = 1024
BROADCAST_QUEUE = 64  # messages received and not yet handed to their subscribers
ACCEPTED, WRONG_LEVEL, WRONG_CLIENT_ID, UNAVAILABLE, NOT_AUTHORISED = 0, 1, 2, 3, 5  # CONNACK codes [3.2.2.3]

_log = logging.getLogger(__name__)


class Gate:
    """Accepts connections and hands those that may log in to amqtt."""

    def __init__(self, realm: str, lookup: Lookup, max_message_bytes: int, max_connections: int) -> None:
        """Describes a gate; the arguments are those of `EmbeddedBroker`."""
        self._realm = realm
        self._lookup = lookup
        self._max_message_bytes = max_message_bytes
        self._max_connections = max_connections
        self._nobody = hash_secret(new_secret())  # an unknown user costs as much time as a known one
        self._rules = _Rules(realm)
        self._pending: dict[Connection, None] = {}
        self._serving: dict[asyncio.Task[None], Connection] = {}
        self._amqtt: Any = None
        self._server: asyncio.Server
        self._watching: asyncio.Task[None]

    async def open(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Starts amqtt and begins to accept.

        Raises:
            MissingExtra: amqtt is not installed.
            UsageError: this amqtt is another than we know.
        """
        module = require("amqtt.broker", extra="broker")
        logging.getLogger("amqtt").setLevel(logging.ERROR)  # it warns of every client that misbehaves
        # The listener is "external": amqtt opens no socket, the gate hands it the connections.
        self._amqtt = module.Broker({"listeners": {"default": {"type": "external"}}, "plugins": {}})
        self._rules.take_charge(self._amqtt)
        await self._amqtt.start()
        timeout_s = None if tls is None else CONNECT_S
        self._server = await asyncio.start_server(
            self._serve, sock=listener, backlog=256, ssl=tls, ssl_handshake_timeout=timeout_s
        )
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stops accepting, ends every connection, and amqtt."""
        self._server.close()
        self._watching.cancel()
        for connection in self._serving.values():
            connection.abort("the broker stops")
        if self._serving:
            _, late = await asyncio.wait(list(self._serving), timeout=5.0)
            for task in late:
                task.cancel()
        await self._amqtt.shutdown()

    def drop(self, user: str) -> None:
        """Ends a user's connection, if there is one."""
        connection = self._rules.connections.get(user)
        if connection is not None:
            connection.abort("asked to")

    def _drop_revoked(self) -> None:
        """Ends the connections of users that may not log in any more, or not with the secret that they did with."""
        for user, connection in list(self._rules.connections.items()):
            try:
                hashed = self._lookup(user)
            except Exception:  # the caller's, as in `_verdict`: who is in stays in
                _log.exception("the lookup of %s failed", user)
                return
            if hashed != connection.hashed:
                connection.abort("its secret is not the one that it logged in with")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(reader, writer, self._realm, self._max_message_bytes, self._rules.must_wait)
        self._serving[task] = connection
        try:
            if await self._log_in(connection):
                await self._hand_over(connection)
        except (WireError, EOFError, OSError, asyncio.TimeoutError) as error:
            _log.debug("%s: %s", connection, error)
        finally:
            self._pending.pop(connection, None)
            await self._rules.forget(connection)
            connection.gone.set()
            await connection.close()
            await connection.wait_closed()
            del self._serving[task]

    async def _log_in(self, connection: Connection) -> bool:
        """Reads CONNECT and decides; True when the connection is the user's only one from now on."""
        if len(self._pending) >= PENDING_CONNECTIONS:
            next(iter(self._pending)).abort("too many connections wait for their CONNECT")
        self._pending[connection] = None
        connect = await asyncio.wait_for(connection.connect(), CONNECT_S)
        code, connection.hashed = self._verdict(connect)
        if code == ACCEPTED:
            while (old := self._rules.connections.get(connect.client_id)) is not None:
                old.abort("the client connected again")  # [3.1.4-2]
                await old.gone.wait()
            if len(self._rules.connections) >= self._max_connections:
                code = UNAVAILABLE
        if code != ACCEPTED or connection.closed:
            connection.refuse(code)
            return False
        del self._pending[connection]
        connection.admit(connect)
        self._rules.connections[connection.user] = connection
        return True

    def _verdict(self, connect: Connect) -> tuple[int, str]:
        """-> (CONNACK code, the stored hash of the secret that lets it in)."""
        if connect.level != 4:
            return WRONG_LEVEL, ""
        if connect.user is None or connect.secret is None or not access.is_id(connect.user):
            return NOT_AUTHORISED, ""
        try:
            hashed = self._lookup(connect.user)
        except Exception:  # the lookup is the caller's: whatever it raises, the broker lives
            _log.exception("the lookup of %s failed", connect.user)
            return UNAVAILABLE, ""
        if not verify_secret(connect.secret, hashed or self._nobody) or hashed is None:
            return NOT_AUTHORISED, ""
        return (ACCEPTED if connect.client_id == connect.user else WRONG_CLIENT_ID), hashed

    async def _hand_over(self, connection: Connection) -> None:
        """amqtt serves the connection until it ends."""
        session = asyncio.ensure_future(self._amqtt.external_connected(connection, connection, "default"))
        ended = asyncio.ensure_future(connection.ended.wait())
        try:
            await asyncio.wait((session, ended), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((session,), timeout=5.0)  # amqtt can miss an end that comes right after CONNECT
        finally:
            ended.cancel()
            session.cancel()
        if session.done() and not session.cancelled() and session.exception() is not None:
            _log.warning("amqtt gave up on %s: %r", connection, session.exception())

    async def _watch(self) -> None:
        """Once a second: the clocks of each client and the sum of all backlogs; now and then who was revoked or renewed."""
        checked_s = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            now_s = time.monotonic()
            if now_s - checked_s >= RECHECK_S:
                checked_s = now_s
                self._drop_revoked()
            connected = list(self._rules.connections.values())
            for connection in [*self._pending, *connected]:
                connection.check_clocks(now_s)
            connected.sort(key=lambda one: one.backlog_bytes)
            while connected and sum(one.backlog_bytes for one in connected) > TOTAL_BACKLOG_BYTES:
                connected.pop().abort("too much waits for all clients together", logging.WARNING)
            self._rules.tidy()


class _Rules:
    """What amqtt decides and does for messages, decided and done by us."""

    def __init__(self, realm: str) -> None:
        self.connections: dict[str, Connection] = {}  # authenticated, by user name, which is the client id
        self._realm = realm
        self._amqtt: Any = None
        self._queue: asyncio.Queue[dict[str, Any]]
        self._deliveries: set[asyncio.Task[object]] = set()

    def take_charge(self, amqtt: Any) -> None:
        """Puts our methods in the place of amqtt's. Not its plugins: they are asked too late and not about everything.

        Raises:
            UsageError: this amqtt has other methods.
        """
        ours: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
            "_authenticate": self.authenticate,
            "_topic_filtering": self.allow,
            "_run_broadcast": self.broadcast,
            "_publish_retained_messages_for_subscription": self.send_retained,
        }
        known = (*ours, "_delete_session", "_broadcast_queue", "subscriptions", "retained_messages", "sessions")
        missing = [name for name in known if not hasattr(amqtt, name)]
        if missing:
            raise UsageError(f"amqtt has no {', '.join(missing)}: pip install 'amqtt>=0.12,<0.13'")
        for name, method in ours.items():
            setattr(amqtt, name, method)
        self._queue = amqtt._broadcast_queue = asyncio.Queue(BROADCAST_QUEUE)
        self._amqtt = amqtt

    async def authenticate(self, session: Any, _listener: object) -> bool:
        """The gate has asked for the secret."""
        return session.username in self.connections

    async def allow(self, session: Any, topic: str, action: Any) -> bool:
        """Verdict on a publish or a subscription; a refused publish is acknowledged and dropped, as in Mosquitto."""
        connection = self.connections.get(session.username)
        if connection is None or not access.may(session.username, action.value, topic, self._realm):
            return False
        if action.value == "subscribe" and topic not in connection.filters:
            if len(connection.filters) >= (COORDINATOR_FILTERS if connection.is_coordinator else DEVICE_FILTERS):
                return False
            connection.filters.add(topic)
        return True

    def must_wait(self, connection: Connection) -> bool:
        """Whether the next packet of this client has to wait: for its last one, or for the coordinator to read."""
        session, _ = self._amqtt.sessions.get(connection.user, (None, None))
        if session is not None and session.delivered_message_queue.qsize():
            return True
        coordinator = self.connections.get(COORDINATOR)
        if coordinator is None or connection.is_coordinator or connection.closed:
            return False
        return coordinator.backlog_bytes > COORDINATOR_PAUSE_BYTES

    async def broadcast(self, _running: object) -> None:
        """Hands messages to their subscribers: each connection gets a message once. Does not wait for any of them."""
        self._fan_out(await self._queue.get())
        for _ in range(min(8, self._queue.qsize())):  # few: sockets get their turn in between
            self._fan_out(self._queue.get_nowait())

    async def send_retained(self, subscription: tuple[str, int], session: Any) -> None:
        """Sends what is retained to a new subscriber; amqtt would send it to every client that connects."""
        topic_filter, qos = subscription
        if all(one is not session for one, _ in self._amqtt.subscriptions.get(topic_filter, ())):
            return
        for topic, kept in self._amqtt.retained_messages.items():
            if access.matches(topic_filter, topic):
                self._deliver(session.client_id, topic, kept.data, min(qos, kept.qos or 0), retain=True)

    async def forget(self, connection: Connection) -> None:
        """Ends the session of a closed connection, unless a newer one has its place."""
        if self.connections.get(connection.user) is connection:
            del self.connections[connection.user]
            await self._amqtt._delete_session(connection.user)

    def tidy(self) -> None:
        """Removes the empty lists that amqtt leaves behind when a client unsubscribes."""
        subscriptions = self._amqtt.subscriptions
        for topic_filter in [name for name, subscribers in subscriptions.items() if not subscribers]:
            del subscriptions[topic_filter]

    def _fan_out(self, message: dict[str, Any]) -> None:
        topic: str = message["topic"]
        wanted: dict[str, int] = {}
        for topic_filter, subscribers in self._amqtt.subscriptions.items():
            if subscribers and access.matches(topic_filter, topic):
                for session, qos in subscribers:
                    wanted[session.client_id] = max(qos, wanted.get(session.client_id, 0))
        for user, qos in wanted.items():
            self._deliver(user, topic, message["data"], min(qos, message.get("qos", qos)))

    def _deliver(self, user: str, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> None:
        """Sends one message to one client, or drops a client that has too much waiting already."""
        connection = self.connections.get(user)
        session, handler = self._amqtt.sessions.get(user, (None, None))
        if connection is None or connection.closed or session is None or session.transitions.state != "connected":
            return
        if not access.may(user, "receive", topic, self._realm):
            return
        cost_bytes = len(payload) + MESSAGE_OVERHEAD_BYTES
        limit_bytes = COORDINATOR_BACKLOG_BYTES if connection.is_coordinator else DEVICE_BACKLOG_BYTES
        if connection.backlog_bytes + cost_bytes > limit_bytes:
            connection.abort(f"more than {limit_bytes >> 20} MiB wait for it", logging.WARNING)
            return
        connection.unacknowledged_bytes += cost_bytes
        task = asyncio.ensure_future(handler.mqtt_publish(topic, payload, qos, retain))
        self._deliveries.add(task)
        task.add_done_callback(partial(self._delivered, connection, cost_bytes))

    def _delivered(self, connection: Connection, cost_bytes: int, task: asyncio.Task[object]) -> None:
        self._deliveries.discard(task)
        connection.unacknowledged_bytes -= cost_bytes
        if not task.cancelled() and task.exception() is not None:  # amqtt gives up on a PUBACK after 5 s
            _log.debug("%s: %s", connection, task.exception())
