"""One client of the embedded broker: its socket, in the shape of amqtt's ReaderAdapter and WriterAdapter.

Of a packet, amqtt sees either all bytes, after `packets.parse_packet` accepted them, or the end of the stream. The
next packet is read only when amqtt has dealt with the one before: a sender is slowed by TCP, not queued. Writing never
waits; what is not written yet is counted, and `gate.py` bounds it.

Not the place for who may log in or who gets which message: that is `gate.py`, the only module that may import this
one. Imports `access`, `packets` and `edge_runtime`; of amqtt it knows the interface alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from edge_coordinator import access, packets
from edge_runtime.errors import WireError
from edge_runtime.topics import COORDINATOR

CONNECT_BYTES = access.MAX_RETAINED_BYTES + 4096  # a will of 16 KiB, names and a secret
CONNECT_S = 10.0  # of silence before the whole CONNECT packet has come
HANDLED_S = 10.0  # a client is read again after so long, whatever waits for the coordinator: its pings need answers
STALLED_S = 30.0  # a client with a backlog that takes no byte for so long is dropped
QOS2_IN_FLIGHT = 20

_log = logging.getLogger(__name__)


class Connection:
    """A client, from its TCP connection to its end.

    Attributes:
        user: the user name, which is the client id; empty before `admit`.
        hashed: the stored hash of the secret that it logged in with, for whoever checks it again.
        closed: nothing is read or written any more.
        filters: what it subscribed to.
        unacknowledged_bytes: of messages on their way to it, counted by who sends them.
        ended: amqtt was told that the stream is over.
        gone: amqtt has forgotten the connection.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        realm: str,
        max_message_bytes: int,
        must_wait: Callable[[Connection], bool],
    ) -> None:
        """Takes over a socket.

        Args:
            reader, writer: the socket's ends.
            realm: the fleet's id.
            max_message_bytes: the largest payload.
            must_wait: whether the next packet of this client has to wait.
        """
        self._reader = reader
        self._writer = writer
        self._realm = realm
        self._max_message_bytes = max_message_bytes
        self._must_wait = must_wait
        self._packet = b""
        self._at = 0
        self._left = False  # DISCONNECT was read
        self._qos2: set[int] = set()
        self._written = 0
        self._taken = (0, time.monotonic())  # bytes that the client has taken off the backlog, and since when
        self._silence_s = CONNECT_S  # 0 means no limit
        self._heard_s = time.monotonic()
        self._waiting = False  # for the broker, not for the client
        self.user = self.hashed = ""
        self.closed = False
        self.filters: set[str] = set()
        self.unacknowledged_bytes = 0
        self.ended = asyncio.Event()
        self.gone = asyncio.Event()

    def __str__(self) -> str:
        return self.user or "{}:{}".format(*self.get_peer_info())

    @property
    def is_coordinator(self) -> bool:
        """Whether the coordinator logged in here."""
        return self.user == COORDINATOR

    @property
    def backlog_bytes(self) -> int:
        """Bytes kept for this client; what is not acknowledged is mostly also what is not written."""
        return max(self._writer.transport.get_write_buffer_size(), self.unacknowledged_bytes)

    # --- what amqtt calls

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

    def write(self, data: bytes) -> None:
        """Queues a packet."""
        if not self.closed:
            self._written += len(data)
            self._writer.write(data)

    async def drain(self) -> None:
        """Never waits: amqtt would hold a task and two copies of every further message meanwhile."""

    def get_peer_info(self) -> tuple[str, int]:
        """Address and port, for logs."""
        peer = self._writer.get_extra_info("peername") or ("unknown", 0)
        return str(peer[0]), int(peer[1])

    def get_ssl_info(self) -> None:
        """No client certificates."""

    async def close(self) -> None:
        """Closes without waiting; what is written already has two seconds to leave."""
        if not self.closed:
            self.closed = True
            self._writer.close()
            asyncio.get_running_loop().call_later(2.0, self._writer.transport.abort)

    # --- what the gate calls

    async def connect(self) -> packets.Connect:
        """The CONNECT packet. Raises WireError, or OSError and EOFError when the client leaves."""
        first, _, body = await self._receive(CONNECT_BYTES)
        if first != packets.CONNECT << 4:
            raise WireError("the first packet is not CONNECT [3.1.0-1]")
        return packets.parse_connect(body)

    def refuse(self, code: int) -> None:
        """Answers CONNECT with a CONNACK that says no."""
        self.write(bytes((0x20, 2, 0, code)))

    def admit(self, connect: packets.Connect) -> None:
        """From now on this is the client that CONNECT names; amqtt reads a CONNECT that holds what it may know."""
        self.user = connect.client_id
        self._silence_s = 1.5 * connect.keepalive_s  # [3.1.2-24]
        self._packet, self._at = packets.connect_packet(_for_amqtt(connect, self._realm)), 0

    def abort(self, why: str, level: int = logging.DEBUG) -> None:
        """Closes at once and forgets the backlog."""
        if not self.closed:
            self.closed = True
            _log.log(level, "%s dropped: %s", self, why)
        self._writer.transport.abort()

    async def wait_closed(self) -> None:
        """Waits until the socket is closed, which `close` promises for soon."""
        with contextlib.suppress(OSError, EOFError):
            await self._writer.wait_closed()

    def check_clocks(self, now_s: float) -> None:
        """Drops a client that says nothing or takes nothing of its backlog. Call it about once a second."""
        buffered = self._writer.transport.get_write_buffer_size()
        if not buffered or self._written - buffered != self._taken[0]:
            self._taken = (self._written - buffered, now_s)
        if self._silence_s and not self._waiting and now_s - self._heard_s > self._silence_s:
            self.abort(f"not heard for {self._silence_s:.0f} s")
        elif now_s - self._taken[1] > STALLED_S:
            self.abort(f"took nothing for {STALLED_S:.0f} s", logging.WARNING)

    # --- how packets come in

    async def _next_packet(self) -> bytes:
        await self._until_handled()
        try:
            if self._left or self.closed:
                raise EOFError
            first, head, body = await self._receive(self._max_message_bytes + packets.HEADER_BYTES)
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
        self._heard_s = time.monotonic()
        return data

    def _check(self, first: int, body: bytes) -> int:
        """The packet's first byte as amqtt gets it: without the retain flag where the broker keeps nothing."""
        packet = packets.parse_packet(first, body)
        if packet.kind == packets.PUBLISH:
            if packet.payload_bytes > self._max_message_bytes:
                raise WireError(f"a payload of {packet.payload_bytes} bytes, the limit is {self._max_message_bytes}")
            if packet.qos == 2:
                self._qos2.add(packet.packet_id)
                if len(self._qos2) > QOS2_IN_FLIGHT:
                    raise WireError(f"more than {QOS2_IN_FLIGHT} messages of QoS 2 not released")
            if first & 1 and not access.may_retain(self.user, packet.topic, packet.payload_bytes, self._realm):
                first &= ~1
        elif packet.kind == packets.PUBREL:
            self._qos2.discard(packet.packet_id)
        elif packet.kind == packets.UNSUBSCRIBE:
            self.filters.difference_update(packet.filters)
        elif packet.kind == packets.DISCONNECT:
            self._left = True
        return first

    async def _until_handled(self) -> None:
        """Lets amqtt begin its tasks for the last packet (four turns) and finish them, for ten seconds at most."""
        self._waiting = True
        turns, pause_s = 0, 0.0
        until_s = time.monotonic() + HANDLED_S
        while turns < 4 or (self._must_wait(self) and time.monotonic() < until_s):
            await asyncio.sleep(pause_s)
            turns += 1
            pause_s = min(0.05, max(0, turns - 20) * 0.001)
        self._waiting = False
        self._heard_s = time.monotonic()


def _for_amqtt(connect: packets.Connect, realm: str) -> packets.Connect:
    """CONNECT without secret and keepalive (`check_clocks` watches it), and with no will but a lawful one."""
    user, topic, size = connect.client_id, connect.will_topic, len(connect.will_payload)
    if topic is None or not access.may(user, "publish", topic, realm):
        return packets.Connect(connect.level, user, user)
    retain = connect.will_retain and access.may_retain(user, topic, size, realm)
    return replace(connect, secret=None, keepalive_s=0, will_retain=retain)
