"""A broker inside this process: amqtt behind a gate of our own, for a fleet of up to about 200 devices.

Not a general MQTT broker: MQTT 3.1.1 over TCP or TLS, one realm, no anonymous clients, no `$SYS`, no sessions that
outlive a connection. For more devices or bytes see `mosquitto.py`, which keeps the same rules.

amqtt 0.12 alone drops the session that a CONNECT names before it asks for the password, reads packets of any size,
never enforces keepalive, lets both of two clients with one id live, and queues without limit for a client that does
not read (250 MiB published to a stopped subscriber: 262 MiB more resident memory, for ever). So a connection meets
three classes, each with one concern:

- `_Gate` accepts, authenticates and replaces connections before amqtt hears of them, and watches their clocks;
- `_Connection` is what amqtt gets for reader and writer: whole, checked packets in, bounded bytes out;
- `_Rules` replaces what amqtt decides: subscriptions, delivery of messages and of retained messages.

Imports `access`, `secrets` and `edge_runtime`; amqtt only when a broker starts. The command line and tests import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from edge_coordinator import access
from edge_coordinator.secrets import hash_secret, new_secret, verify_secret
from edge_runtime.errors import ConnectionFailed, UsageError, WireError
from edge_runtime.optional import require
from edge_runtime.topics import COORDINATOR, check_id
from edge_runtime.transport import MAX_MESSAGE_BYTES

Lookup = Callable[[str], "str | None"]

HEADER_BYTES = 512  # a PUBLISH's topic and packet id: the longest topic of docs/wire.md has 130
CONNECT_BYTES = access.MAX_RETAINED_BYTES + 4096  # a will of 16 KiB, names and a secret
CONNECT_S = 10.0  # from the TCP connection to the whole CONNECT packet
PENDING_CONNECTIONS = 128  # not authenticated yet; one more drops the oldest
DEVICE_BACKLOG_BYTES = 8 << 20  # twice the credit of 4 MiB that one transfer may have in flight
COORDINATOR_BACKLOG_BYTES = 64 << 20
COORDINATOR_PAUSE_BYTES = 16 << 20  # with this much waiting for the coordinator, devices are not read
TOTAL_BACKLOG_BYTES = 256 << 20
MESSAGE_OVERHEAD_BYTES = 2048  # what a queued message costs beside its payload: a task, a future, a record
HANDLED_S = 10.0  # a client is read again after so long, whatever waits for the coordinator: its pings need answers
STALLED_S = 30.0  # a client with a backlog that takes no byte for so long is dropped
DEVICE_FILTERS = 32
COORDINATOR_FILTERS = 1024
QOS2_IN_FLIGHT = 20
BROADCAST_QUEUE = 64  # messages received and not yet handed to their subscribers
ACCEPTED, WRONG_LEVEL, WRONG_CLIENT_ID, UNAVAILABLE, NOT_AUTHORISED = 0, 1, 2, 3, 5  # CONNACK codes [3.2.2.3]

_log = logging.getLogger(__name__)


class EmbeddedBroker:
    """amqtt in a thread and an event loop of its own.

    Memory: up to 256 MiB of messages that clients have not taken yet (measured: 430 MiB resident), then those with
    most are dropped; beside that one message per client that is just being read, and 13 MiB for 200 idle devices. All
    of it is lost when the broker stops, which the end-to-end commit (docs/wire.md) allows.

    Attributes:
        host: the address as given.
        port: the port it listens on; with port 0 known after `start`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        realm: str,
        lookup: Lookup,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        *,
        max_connections: int = 1024,
        certfile: Path | None = None,
        keyfile: Path | None = None,
    ) -> None:
        """Describes a broker; `start` starts it.

        Args:
            host: address or name to listen on.
            port: 0 picks a free one.
            realm: the only fleet whose topics exist.
            lookup: stored hash of a user's secret, or None for a user that may not log in. Called in the broker's
                thread at each log-in and has to return within milliseconds.
            max_message_bytes: the largest payload; a client that sends more is disconnected.
            max_connections: of authenticated clients; more are told that the server is unavailable.
            certfile: certificate chain in PEM format: the listener speaks TLS 1.2 or newer. Needs keyfile.
            keyfile: its private key.

        Raises:
            UsageError: the realm is no id or one of certfile and keyfile is missing.
        """
        check_id("realm", realm)
        if (certfile is None) != (keyfile is None):
            raise UsageError("TLS needs a certificate and its key: give both certfile and keyfile, or neither")
        self.host = host
        self.port = port
        self._certfile, self._keyfile = certfile, keyfile
        self._rules = _Rules(realm)
        self._gate = _Gate(self._rules, lookup, max_message_bytes, max_connections)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether the broker's thread lives."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Starts to listen and returns once clients can connect.

        Raises:
            UsageError: it runs already, the address is in use or not ours, or the certificate cannot be read.
            MissingExtra: amqtt is not installed.
        """
        if self.running:
            raise UsageError("this broker runs already: stop it before starting it again")
        module = require("amqtt.broker", extra="broker")
        _relay_log()
        tls = _tls_context(self._certfile, self._keyfile)
        listener = _listen(self.host, self.port)
        self.port = listener.getsockname()[1]
        self._ready.clear()
        self._failure = None
        run = partial(asyncio.run, self._main(module, listener, tls))
        self._thread = threading.Thread(target=run, name="edge-broker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            self._thread = None
            raise self._failure

    def stop(self) -> None:
        """Disconnects everyone and ends the thread; may be called twice, or before `start`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop ended by itself
                self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join()

    def drop(self, user: str) -> None:
        """Disconnects a user, for one whose secret was just revoked. Any thread may call it."""
        if self.running and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._gate.drop, user)

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _main(self, module: Any, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_loop_error)
        self._stopping = asyncio.Event()
        try:
            # The listener is "external": amqtt opens no socket, the gate hands it the connections.
            broker = module.Broker({"listeners": {"default": {"type": "external"}}, "plugins": {}}, self._loop)
            self._rules.take_charge(broker)
            await broker.start()
            await self._gate.open(broker, listener, tls)
        except BaseException as error:
            self._failure = error
            listener.close()
            return
        finally:
            self._ready.set()
        try:
            await self._stopping.wait()
        finally:
            await self._gate.close()
            await broker.shutdown()


def run(
    host: str,
    port: int,
    realm: str,
    lookup: Lookup,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    *,
    max_connections: int = 1024,
    certfile: Path | None = None,
    keyfile: Path | None = None,
    on_ready: Callable[[EmbeddedBroker], None] | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, for a process that is nothing but a broker; main thread only.

    Args:
        on_ready: called once it listens, with the broker whose `port` is known by then.

    Raises:
        UsageError, MissingExtra: as `EmbeddedBroker.start`.
        ConnectionFailed: the broker's thread ended by itself.
    """
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    broker = EmbeddedBroker(
        host,
        port,
        realm,
        lookup,
        max_message_bytes,
        max_connections=max_connections,
        certfile=certfile,
        keyfile=keyfile,
    )
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with broker:
            if on_ready is not None:
                on_ready(broker)
            while not ended.wait(0.5):
                if not broker.running:
                    raise ConnectionFailed("the broker ended by itself: see the log of edge_coordinator.broker")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Connection:
    """One client's socket, in the shape of amqtt's ReaderAdapter and WriterAdapter.

    Of a packet, amqtt sees either all bytes, after `access.parse_packet` accepted them, or the end of the stream.
    The next packet is read only when amqtt has dealt with the one before: a sender is slowed by TCP, not queued.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rules: _Rules) -> None:
        self._reader = reader
        self._writer = writer
        self._rules = rules
        self._packet = b""
        self._at = 0
        self._left = False  # DISCONNECT was read
        self._qos2: set[int] = set()
        self._taken = (0, time.monotonic())  # bytes that the client has taken off the backlog, and since when
        self._written = 0
        self.user = ""
        self.max_message_bytes = 0
        self.keepalive_s = CONNECT_S / 1.5
        self.heard_s = time.monotonic()
        self.waiting = False  # for the broker, not for the client
        self.closed = False
        self.unacknowledged_bytes = 0
        self.filters: set[str] = set()
        self.ended = asyncio.Event()  # amqtt was told that the stream is over
        self.gone = asyncio.Event()  # amqtt has forgotten the connection

    @property
    def is_coordinator(self) -> bool:
        return self.user == COORDINATOR

    @property
    def backlog_bytes(self) -> int:
        """Bytes kept for this client; what is not acknowledged is mostly also what is not written."""
        buffered: int = self._writer.transport.get_write_buffer_size()
        return max(buffered, self.unacknowledged_bytes)

    async def read(self, n: int = -1) -> bytes:
        """The next n bytes of the current packet. Raises IncompleteReadError, which amqtt takes as the end."""
        if n == 0:
            return b""
        if self._at == len(self._packet):
            self._packet, self._at = await self._next_packet(), 0
        chunk = self._packet[self._at : self._at + n]
        if n < 0 or len(chunk) < n:  # a packet that we accept and amqtt reads differently
            self.abort("amqtt read past the end of a packet")
            raise asyncio.IncompleteReadError(chunk, n)
        self._at += n
        return chunk

    def feed_eof(self) -> None:
        """Part of amqtt's interface, never called by its broker."""

    def write(self, data: bytes) -> None:
        """Queues a packet; `_Rules.deliver` bounds the queue."""
        if not self.closed:
            self._written += len(data)
            self._writer.write(data)

    async def drain(self) -> None:
        """Never waits: amqtt would hold a task and two copies of every further message meanwhile."""

    def get_peer_info(self) -> tuple[str, int]:
        """Address and port, for amqtt's log."""
        peer = self._writer.get_extra_info("peername") or ("unknown", 0)
        return str(peer[0]), int(peer[1])

    def get_ssl_info(self) -> None:
        """Part of amqtt's interface: client certificates are not used."""

    async def close(self) -> None:
        """Closes without waiting; what is written already has two seconds to leave."""
        if not self.closed:
            self.closed = True
            self._writer.close()
            asyncio.get_running_loop().call_later(2.0, self._writer.transport.abort)

    def abort(self, why: str, level: int = logging.DEBUG) -> None:
        """Closes at once and forgets the backlog."""
        if not self.closed:
            self.closed = True
            _log.log(level, "%s dropped: %s", self.user or self.get_peer_info(), why)
        self._writer.transport.abort()

    async def wait_closed(self) -> None:
        """Waits until the socket is closed, which `close` promises for soon."""
        with contextlib.suppress(OSError, EOFError):
            await self._writer.wait_closed()

    def refuse(self, code: int) -> None:
        """Answers CONNECT with a CONNACK that says no."""
        self.write(bytes((0x20, 2, 0, code)))

    def stalled(self, now_s: float) -> bool:
        """Whether the client has taken no byte of its backlog for a long time. Call it about once a second."""
        buffered = self._writer.transport.get_write_buffer_size()
        if not buffered or self._written - buffered != self._taken[0]:
            self._taken = (self._written - buffered, now_s)
        return now_s - self._taken[1] > STALLED_S

    async def connect(self) -> access.Connect:
        """The CONNECT packet. Raises WireError, or OSError and EOFError when the client leaves."""
        first, _, body = await self._receive(CONNECT_BYTES)
        if first != access.CONNECT << 4:
            raise WireError("the first packet is not CONNECT [3.1.0-1]")
        return access.parse_connect(body)

    def admit(self, connect: access.Connect, realm: str, max_message_bytes: int) -> None:
        """From now on this is the client `connect.user`; amqtt reads a CONNECT that holds what it may know."""
        self.user = connect.client_id
        self.keepalive_s = float(connect.keepalive_s)
        self.max_message_bytes = max_message_bytes
        self._packet, self._at = _connect_for_amqtt(connect, realm), 0

    async def _next_packet(self) -> bytes:
        await self._until_handled()
        try:
            if self._left or self.closed:
                raise EOFError
            first, head, body = await self._receive(self.max_message_bytes + HEADER_BYTES)
            return bytes((self._check(first, body),)) + head + body
        except (EOFError, OSError):
            pass
        except WireError as error:
            self.abort(str(error))
        # Not at once: amqtt cancels what it has begun for this client, even a DISCONNECT, when it sees the end.
        await self._until_handled()
        self.ended.set()
        raise asyncio.IncompleteReadError(b"", 1)

    async def _receive(self, max_bytes: int) -> tuple[int, bytes, bytes]:
        """First byte, remaining length as sent, and body. Checks the length before it reads on."""
        first = await self._some(1)
        head, length = b"", 0
        while not head or head[-1] & 0x80:
            if len(head) == 4:
                raise WireError("a remaining length of more than four bytes [2.2.3]")
            head += await self._some(1)
            length |= (head[-1] & 0x7F) << 7 * (len(head) - 1)
        if length > max_bytes:
            raise WireError(f"a packet of {length} bytes, the limit is {max_bytes}")
        parts = []
        while length:
            parts.append(await self._some(length))
            length -= len(parts[-1])
        return first[0], head, b"".join(parts)

    async def _some(self, n: int) -> bytes:
        data = await self._reader.read(n)
        if not data:
            raise EOFError
        self.heard_s = time.monotonic()
        return data

    def _check(self, first: int, body: bytes) -> int:
        """The packet's first byte as amqtt gets it: without the retain flag where the broker keeps nothing."""
        packet = access.parse_packet(first, body)
        if packet.kind == access.PUBLISH:
            if packet.payload_bytes > self.max_message_bytes:
                raise WireError(f"a payload of {packet.payload_bytes} bytes, the limit is {self.max_message_bytes}")
            if packet.qos == 2:
                self._qos2.add(packet.packet_id)
                if len(self._qos2) > QOS2_IN_FLIGHT:
                    raise WireError(f"more than {QOS2_IN_FLIGHT} messages of QoS 2 not released")
            if first & 1 and not self._rules.may_retain(self, packet.topic, packet.payload_bytes):
                first &= ~1
        elif packet.kind == access.PUBREL:
            self._qos2.discard(packet.packet_id)
        elif packet.kind == access.UNSUBSCRIBE:
            self.filters.difference_update(packet.filters)
        elif packet.kind == access.DISCONNECT:
            self._left = True
        return first

    async def _until_handled(self) -> None:
        """Lets amqtt begin its tasks for the last packet (four turns) and finish them, for ten seconds at most."""
        self.waiting = True
        turns, pause_s = 0, 0.0
        until_s = time.monotonic() + HANDLED_S
        while turns < 4 or (self._rules.busy_with(self) and time.monotonic() < until_s):
            await asyncio.sleep(pause_s)
            turns += 1
            pause_s = min(0.05, max(0, turns - 20) * 0.001)
        self.waiting = False
        self.heard_s = time.monotonic()


class _Rules:
    """What amqtt decides and does for messages, decided and done by us; lives in the broker's thread."""

    def __init__(self, realm: str) -> None:
        self.realm = realm
        self.connections: dict[str, _Connection] = {}  # authenticated, by user name, which is the client id
        self._broker: Any = None
        self._queue: asyncio.Queue[dict[str, Any]]
        self._deliveries: set[asyncio.Task[object]] = set()

    def take_charge(self, broker: Any) -> None:
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
        missing = [name for name in known if not hasattr(broker, name)]
        if missing:
            raise UsageError(f"amqtt has no {', '.join(missing)}: pip install 'amqtt>=0.12,<0.13'")
        for name, method in ours.items():
            setattr(broker, name, method)
        self._queue = broker._broadcast_queue = asyncio.Queue(BROADCAST_QUEUE)
        self._broker = broker

    async def authenticate(self, session: Any, _listener: object) -> bool:
        """The gate has asked for the secret."""
        return session.username in self.connections

    async def allow(self, session: Any, topic: str, action: Any) -> bool:
        """Verdict on a publish or a subscription; a refused publish is acknowledged and dropped, as in Mosquitto."""
        connection = self.connections.get(session.username)
        if connection is None or not access.may(session.username, action.value, topic, self.realm):
            return False
        if action.value == "subscribe" and topic not in connection.filters:
            if len(connection.filters) >= (COORDINATOR_FILTERS if connection.is_coordinator else DEVICE_FILTERS):
                return False
            connection.filters.add(topic)
        return True

    def may_retain(self, connection: _Connection, topic: str, payload_bytes: int) -> bool:
        """Whether the retain flag of a publish stays."""
        return access.may_retain(connection.user, topic, payload_bytes, self.realm)

    def busy_with(self, connection: _Connection) -> bool:
        """Whether the next packet of this client has to wait."""
        session, _ = self._broker.sessions.get(connection.user, (None, None))
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
        if all(one is not session for one, _ in self._broker.subscriptions.get(topic_filter, ())):
            return
        for topic, kept in self._broker.retained_messages.items():
            if access.matches(topic_filter, topic):
                self.deliver(session.client_id, topic, kept.data, min(qos, kept.qos or 0), retain=True)

    def _fan_out(self, message: dict[str, Any]) -> None:
        topic: str = message["topic"]
        wanted: dict[str, int] = {}
        for topic_filter, subscribers in self._broker.subscriptions.items():
            if subscribers and access.matches(topic_filter, topic):
                for session, qos in subscribers:
                    wanted[session.client_id] = max(qos, wanted.get(session.client_id, 0))
        for user, qos in wanted.items():
            self.deliver(user, topic, message["data"], min(qos, message.get("qos", qos)))

    def deliver(self, user: str, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> None:
        """Sends one message to one client, or drops a client that has too much waiting already."""
        connection = self.connections.get(user)
        session, handler = self._broker.sessions.get(user, (None, None))
        if connection is None or connection.closed or session is None or session.transitions.state != "connected":
            return
        if not access.may(user, "receive", topic, self.realm):
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

    def _delivered(self, connection: _Connection, cost_bytes: int, task: asyncio.Task[object]) -> None:
        self._deliveries.discard(task)
        connection.unacknowledged_bytes -= cost_bytes
        if not task.cancelled() and task.exception() is not None:  # amqtt gives up on a PUBACK after 5 s
            _log.debug("%s: %s", connection.user, task.exception())

    async def forget(self, connection: _Connection) -> None:
        """Ends the session of a closed connection, unless a newer one has its place."""
        if self.connections.get(connection.user) is connection:
            del self.connections[connection.user]
            await self._broker._delete_session(connection.user)

    def tidy(self) -> None:
        """Removes the empty lists that amqtt leaves behind when a client unsubscribes."""
        subscriptions = self._broker.subscriptions
        for topic_filter in [name for name, subscribers in subscriptions.items() if not subscribers]:
            del subscriptions[topic_filter]


class _Gate:
    """Accepts connections and hands those that may log in to amqtt; lives in the broker's thread."""

    def __init__(self, rules: _Rules, lookup: Lookup, max_message_bytes: int, max_connections: int) -> None:
        self._rules = rules
        self._lookup = lookup
        self._max_message_bytes = max_message_bytes
        self._max_connections = max_connections
        self._nobody = hash_secret(new_secret())  # an unknown user costs as much time as a known one
        self._pending: dict[_Connection, None] = {}
        self._serving: dict[asyncio.Task[None], _Connection] = {}
        self._broker: Any = None
        self._server: asyncio.Server | None = None
        self._watching: asyncio.Task[None] | None = None

    async def open(self, broker: Any, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Starts to accept."""
        self._broker = broker
        timeout_s = None if tls is None else CONNECT_S
        self._server = await asyncio.start_server(
            self._serve, sock=listener, backlog=256, ssl=tls, ssl_handshake_timeout=timeout_s
        )
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stops accepting and ends every connection."""
        if self._server is not None:
            self._server.close()
        if self._watching is not None:
            self._watching.cancel()
        for connection in self._serving.values():
            connection.abort("the broker stops")
        if self._serving:
            _, late = await asyncio.wait(list(self._serving), timeout=5.0)
            for task in late:
                task.cancel()

    def drop(self, user: str) -> None:
        """Ends a user's connection, if there is one."""
        connection = self._rules.connections.get(user)
        if connection is not None:
            connection.abort("asked to")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = self._serving[task] = _Connection(reader, writer, self._rules)
        try:
            if await self._log_in(connection):
                await self._hand_over(connection)
        except (WireError, EOFError, OSError) as error:
            _log.debug("%s: %s", connection.user or connection.get_peer_info(), error)
        finally:
            self._pending.pop(connection, None)
            await self._rules.forget(connection)
            connection.gone.set()
            await connection.close()
            await connection.wait_closed()
            del self._serving[task]

    async def _log_in(self, connection: _Connection) -> bool:
        """Reads CONNECT and decides; True when the connection is the user's only one from now on."""
        if len(self._pending) >= PENDING_CONNECTIONS:
            next(iter(self._pending)).abort("too many connections wait for their CONNECT")
        self._pending[connection] = None
        connect = await connection.connect()
        code = self._verdict(connect)
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
        connection.admit(connect, self._rules.realm, self._max_message_bytes)
        self._rules.connections[connection.user] = connection
        return True

    def _verdict(self, connect: access.Connect) -> int:
        if connect.level != 4:
            return WRONG_LEVEL
        if connect.user is None or connect.secret is None or not access.is_id(connect.user):
            return NOT_AUTHORISED
        try:
            hashed = self._lookup(connect.user)
        except Exception:  # the lookup is the caller's: whatever it raises, the broker lives
            _log.exception("the lookup of %s failed", connect.user)
            return UNAVAILABLE
        if not verify_secret(connect.secret, hashed or self._nobody) or hashed is None:
            return NOT_AUTHORISED
        return ACCEPTED if connect.client_id == connect.user else WRONG_CLIENT_ID

    async def _hand_over(self, connection: _Connection) -> None:
        """amqtt serves the connection until it ends."""
        session = asyncio.ensure_future(self._broker.external_connected(connection, connection, "default"))
        ended = asyncio.ensure_future(connection.ended.wait())
        try:
            await asyncio.wait((session, ended), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((session,), timeout=5.0)  # amqtt can miss an end that comes right after CONNECT
        finally:
            ended.cancel()
            session.cancel()
        if session.done() and not session.cancelled() and session.exception() is not None:
            _log.warning("amqtt gave up on %s: %r", connection.user, session.exception())

    async def _watch(self) -> None:
        """Once a second: silence, stalls and the sum of all backlogs."""
        while True:
            await asyncio.sleep(1.0)
            now_s = time.monotonic()
            connected = list(self._rules.connections.values())
            for connection in [*self._pending, *connected]:
                limit_s = 1.5 * connection.keepalive_s  # [3.1.2-24]; 0 means no limit
                if limit_s and not connection.waiting and now_s - connection.heard_s > limit_s:
                    connection.abort(f"not heard for {limit_s:.0f} s")
                elif connection.stalled(now_s):
                    connection.abort(f"took nothing for {STALLED_S:.0f} s", logging.WARNING)
            connected.sort(key=lambda one: one.backlog_bytes)
            while connected and sum(one.backlog_bytes for one in connected) > TOTAL_BACKLOG_BYTES:
                connected.pop().abort("too much waits for all clients together", logging.WARNING)
            self._rules.tidy()


def _connect_for_amqtt(connect: access.Connect, realm: str) -> bytes:
    """CONNECT once more, for amqtt: a clean session, no keepalive (`_Gate` watches it), no secret, a lawful will."""
    flags, fields = 0x82, _text(connect.client_id)
    topic = connect.will_topic
    if topic is not None and access.may(connect.client_id, "publish", topic, realm):
        keep = connect.will_retain and access.may_retain(connect.client_id, topic, len(connect.will_payload), realm)
        flags |= 0x04 | connect.will_qos << 3 | keep << 5
        fields += _text(topic) + len(connect.will_payload).to_bytes(2, "big") + connect.will_payload
    body = _text("MQTT") + bytes((4, flags, 0, 0)) + fields + _text(connect.client_id)
    head, length = b"", len(body)
    while not head or length:
        head += bytes((length & 0x7F | (0x80 if length > 0x7F else 0),))
        length >>= 7
    return bytes((access.CONNECT << 4,)) + head + body


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return len(encoded).to_bytes(2, "big") + encoded


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"a port is 0 to 65535, this is {port}: choose another")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): stop what uses that address, "
            "or give another host or port (0 picks a free port)"
        ) from error


def _tls_context(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    if certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"cannot use certificate {certfile} with key {keyfile} ({error}): both are PEM files that belong together"
        ) from error
    return context


class _Relay(logging.Handler):
    """amqtt warns of every client that misbehaves: that is DEBUG here, and its errors are WARNING."""

    def emit(self, record: logging.LogRecord) -> None:
        level = logging.WARNING if record.levelno >= logging.ERROR else logging.DEBUG
        _log.log(level, "%s: %s", record.name, record.getMessage())


def _relay_log() -> None:
    logger = logging.getLogger("amqtt")
    if not any(isinstance(handler, _Relay) for handler in logger.handlers):
        logger.addHandler(_Relay())
        logger.propagate = False
        logger.setLevel(logging.WARNING)


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.debug("%s: %r", context.get("message"), context.get("exception"))
