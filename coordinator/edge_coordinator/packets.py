"""The packets of MQTT 3.1.1 that a client may send, read from bytes; and CONNECT written as bytes.

Pure: bytes in, a value or WireError out. Says what a packet is, not who may send it (`access.py`) or what follows from
it (`gate.py`). Not a codec: of a packet after CONNECT only the fields that the broker has to check are read, and amqtt
reads the same bytes again.

Imports `access` and `edge_runtime.errors`; anything in edge_coordinator may import it.

MQTT 3.1.1 is the OASIS standard of 2014-10-29; numbers such as [3.3.2-2] are its normative statements.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_coordinator.access import well_formed
from edge_runtime.errors import WireError

HEADER_BYTES = 512  # of a PUBLISH beside its payload: the longest topic of docs/wire.md has 130, a packet id two
CONNECT, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 1, 3, 4, 5, 6, 7
SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 8, 10, 12, 14
_FLAGS = {PUBACK: 0, PUBREC: 0, PUBREL: 2, PUBCOMP: 0, SUBSCRIBE: 2, UNSUBSCRIBE: 2, PINGREQ: 0, DISCONNECT: 0}


@dataclass(frozen=True)
class Connect:
    """A CONNECT packet. `level` is 4 for MQTT 3.1.1; with another level the other fields are empty."""

    level: int
    client_id: str = ""
    user: str | None = None
    secret: str | None = None
    keepalive_s: int = 0
    will_topic: str | None = None
    will_payload: bytes = b""
    will_qos: int = 0
    will_retain: bool = False


@dataclass(frozen=True)
class Packet:
    """What a broker must know of a packet after CONNECT before it acts on it; `packet_id` 0 means none."""

    kind: int
    packet_id: int = 0
    topic: str = ""
    qos: int = 0
    payload_bytes: int = 0
    filters: tuple[str, ...] = ()


def parse_connect(body: bytes) -> Connect:
    """Reads the body of a client's first packet.

    Raises:
        WireError: it is no CONNECT of MQTT 3.1.1 or of a version that says so.
    """
    fields = _Fields(body)
    name, level = fields.text(), fields.number(1)
    if name not in ("MQTT", "MQIsdp"):
        raise WireError("not MQTT [3.1.2-1]")
    if name != "MQTT" or level != 4:
        return Connect(level if name == "MQTT" else 3)
    flags, keepalive_s = fields.number(1), fields.number(2)
    has_will, will_qos = bool(flags & 0x04), flags >> 3 & 3
    if flags & 0x01 or will_qos == 3 or (not has_will and flags & 0x38) or (flags & 0x40 and not flags & 0x80):
        raise WireError(f"CONNECT flags {flags:#04x} [3.1.2-3, 3.1.2-11 to 15, 3.1.2-22]")
    client_id = fields.text()
    will_topic = fields.text() if has_will else None
    if will_topic is not None and not well_formed(will_topic.split("/"), wildcards=False):
        raise WireError("a will topic that is empty or holds wildcards [4.7.3-1, 4.7.1-1]")
    will_payload = fields.data() if has_will else b""
    user = fields.text() if flags & 0x80 else None
    secret = fields.text() if flags & 0x40 else None
    fields.end()
    return Connect(level, client_id, user, secret, keepalive_s, will_topic, will_payload, will_qos, bool(flags & 0x20))


def connect_packet(connect: Connect) -> bytes:
    """The whole packet that `parse_connect` reads as `connect`, of MQTT 3.1.1 and with a clean session."""
    flags, fields = 0x02, _text(connect.client_id)
    if connect.will_topic is not None:
        flags |= 0x04 | connect.will_qos << 3 | connect.will_retain << 5
        fields += _text(connect.will_topic) + _data(connect.will_payload)
    if connect.user is not None:
        flags |= 0x80
        fields += _text(connect.user)
    if connect.secret is not None:
        flags |= 0x40
        fields += _text(connect.secret)
    body = _text("MQTT") + bytes((4, flags)) + connect.keepalive_s.to_bytes(2, "big") + fields
    head, length = b"", len(body)
    while not head or length:
        head += bytes((length & 0x7F | (0x80 if length > 0x7F else 0),))
        length >>= 7
    return bytes((CONNECT << 4,)) + head + body


def parse_packet(first: int, body: bytes) -> Packet:
    """Reads what a connected client sent.

    Args:
        first: the packet's first byte: kind and flags.
        body: everything after the remaining length.

    Raises:
        WireError: a client must not send this; the connection has to be closed [4.8.0-1].
    """
    kind, flags, fields = first >> 4, first & 0x0F, _Fields(body)
    if kind == PUBLISH:
        return _publish(flags, fields)
    if _FLAGS.get(kind) != flags:
        raise WireError(f"a client must not send packet kind {kind} with flags {flags} [2.2.2-2]")
    if kind in (PINGREQ, DISCONNECT):
        packet = Packet(kind)
    elif kind in (SUBSCRIBE, UNSUBSCRIBE):
        packet = Packet(kind, fields.packet_id(), filters=_filters(kind, fields))
    else:
        packet = Packet(kind, fields.packet_id())
    fields.end()
    return packet


class _Fields:
    """Reads the fields of one packet's body and never past its end."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def data(self) -> bytes:
        return self._take(self.number(2))

    def text(self) -> str:
        try:
            text = self.data().decode("utf-8")
        except UnicodeDecodeError as error:
            raise WireError("a string is not UTF-8 [1.5.3-1]") from error
        if "\0" in text:
            raise WireError("a string holds NUL [1.5.3-2]")
        return text

    def packet_id(self) -> int:
        packet_id = self.number(2)
        if not packet_id:
            raise WireError("packet identifier 0 [2.3.1-1]")
        return packet_id

    def end(self) -> None:
        if self.left:
            raise WireError(f"{self.left} bytes after the packet's last field")

    def _take(self, size: int) -> bytes:
        if size > self.left:
            raise WireError(f"a field of {size} bytes, the packet has {self.left} left")
        self._at += size
        return self._body[self._at - size : self._at]


def _publish(flags: int, fields: _Fields) -> Packet:
    qos = flags >> 1 & 3
    topic = fields.text()
    if qos == 3 or (qos == 0 and flags & 0x08):
        raise WireError("QoS 3, or DUP with QoS 0 [3.3.1-2, 3.3.1-4]")
    if not well_formed(topic.split("/"), wildcards=False) or topic.startswith("$"):
        raise WireError("a topic that is empty, holds wildcards or starts with $ [3.3.2-2, 4.7.2-1, 4.7.3-1]")
    packet_id = fields.packet_id() if qos else 0
    return Packet(PUBLISH, packet_id, topic, qos, fields.left)


def _filters(kind: int, fields: _Fields) -> tuple[str, ...]:
    filters: list[str] = []
    while fields.left or not filters:
        topic_filter = fields.text()
        if not well_formed(topic_filter.split("/"), wildcards=True):
            raise WireError("a topic filter that is no filter [4.7.1-2, 4.7.1-3, 4.7.3-1]")
        if kind == SUBSCRIBE and fields.number(1) > 2:
            raise WireError("a subscription with QoS above 2 [3.8.3-4]")
        filters.append(topic_filter)
    return tuple(filters)


def _text(text: str) -> bytes:
    return _data(text.encode("utf-8"))


def _data(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data
