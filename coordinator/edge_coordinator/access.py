"""Who may say what to the broker: the topics of each user, and the packets that a client may send at all.

Pure: values in, a verdict out. No socket, no clock, no amqtt; `broker.py` and `mosquitto.py` carry the verdicts out.
Topics are those of docs/wire.md. Imports `edge_runtime.errors` and `.topics`; anything in edge_coordinator may import
it.

MQTT 3.1.1 is the OASIS standard of 2014-10-29; numbers such as [3.3.2-2] are its normative statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edge_runtime.errors import WireError
from edge_runtime.topics import COORDINATOR, ID, check_id

Action = Literal["publish", "subscribe", "receive"]

MAX_RETAINED_BYTES = 16 * 1024  # of a device's presence message: the limit of control messages


def is_id(name: str) -> bool:
    """Whether `name` can be a device, realm or user."""
    return ID.match(name) is not None


def may(user: str, action: Action, topic: str, realm: str) -> bool:
    """Whether `user` may do `action` in `realm`.

    A filter passes only where everything that it can match is allowed, so `#` and `fl/1/{realm}/+/...` are refused
    to a device. `.../up/#` includes `.../up` itself, as in MQTT [4.7.1.2].

    Args:
        user: the authenticated user name, which is also the client id.
        action: "receive" is asked again for each delivery.
        topic: a topic name, or for "subscribe" a topic filter.
        realm: the fleet's id.
    """
    levels = topic.split("/")
    if not is_id(user) or not is_id(realm) or not _well_formed(levels, wildcards=action == "subscribe"):
        return False
    root = ["fl", "1", realm]
    if user == COORDINATOR:
        return _inside(levels, root)
    own = [*root, "d", user]
    if action == "publish":
        return _inside(levels, [*own, "up"])
    return any(_inside(levels, prefix) for prefix in ([*own, "dn"], [*root, "all"], [*root, "g"]))


def may_retain(user: str, topic: str, payload_bytes: int, realm: str) -> bool:
    """Whether the broker keeps this message for later subscribers.

    A device may have one retained message, its presence on `up/st`, of at most 16 KiB: the topics below `up/` are
    without number, so anything more generous lets one device fill the broker's memory.
    """
    if user == COORDINATOR:
        return True
    return topic == f"fl/1/{realm}/d/{user}/up/st" and payload_bytes <= MAX_RETAINED_BYTES


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a filter selects a topic, both well-formed; `$` topics are no part of a realm and never match."""
    if "+" not in topic_filter:
        if not topic_filter.endswith("#"):
            return topic_filter == topic
        return topic.startswith(topic_filter[:-1]) or topic == topic_filter[:-2]
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for number, level in enumerate(wanted):
        if level == "#":
            return True
        if number >= len(levels) or level not in ("+", levels[number]):
            return False
    return len(wanted) == len(levels)


def mosquitto_acl(realm: str) -> str:
    """The text of Mosquitto's `acl_file` that says the same as `may` for publish and receive.

    Mosquitto 2.0's acl_file does not restrict SUBSCRIBE: a device that asks for `#` is told yes and then receives
    only what it may receive, which is checked for each message. `%u` is the user name; the listener needs
    `use_username_as_clientid true`. Mosquitto warns that two patterns hold no `%u`: they are meant for every user.

    Raises:
        UsageError: the realm is no id.
    """
    root = f"fl/1/{check_id('realm', realm)}"
    return (
        "# Written by edge-coordinator: changes are lost.\n"
        f"user {COORDINATOR}\n"
        f"topic readwrite {root}/#\n"
        "\n"
        f"pattern read {root}/all/#\n"
        f"pattern read {root}/g/#\n"
        f"pattern read {root}/d/%u/dn/#\n"
        f"pattern write {root}/d/%u/up/#\n"
    )


def _inside(levels: Sequence[str], prefix: Sequence[str]) -> bool:
    return levels[: len(prefix)] == prefix


def _well_formed(levels: Sequence[str], *, wildcards: bool) -> bool:
    last = len(levels) - 1
    for number, level in enumerate(levels):
        if "\0" in level or ("+" in level and (not wildcards or level != "+")):
            return False
        if "#" in level and (not wildcards or level != "#" or number != last):
            return False
    return levels != [""]


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
        return self.number(2) or _refuse("packet identifier 0 [2.3.1-1]")

    def _take(self, size: int) -> bytes:
        if size > self.left:
            raise WireError(f"a field of {size} bytes, the packet has {self.left} left")
        self._at += size
        return self._body[self._at - size : self._at]


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
    if will_topic is not None and not _well_formed(will_topic.split("/"), wildcards=False):
        raise WireError("a will topic that is empty or holds wildcards [4.7.3-1, 4.7.1-1]")
    will_payload = fields.data() if has_will else b""
    user = fields.text() if flags & 0x80 else None
    secret = fields.text() if flags & 0x40 else None
    _end(fields)
    return Connect(level, client_id, user, secret, keepalive_s, will_topic, will_payload, will_qos, bool(flags & 0x20))


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
    _end(fields)
    return packet


def _publish(flags: int, fields: _Fields) -> Packet:
    qos = flags >> 1 & 3
    topic = fields.text()
    if qos == 3 or (qos == 0 and flags & 0x08):
        raise WireError("QoS 3, or DUP with QoS 0 [3.3.1-2, 3.3.1-4]")
    if not _well_formed(topic.split("/"), wildcards=False) or topic.startswith("$"):
        raise WireError("a topic that is empty, holds wildcards or starts with $ [3.3.2-2, 4.7.2-1, 4.7.3-1]")
    packet_id = fields.packet_id() if qos else 0
    return Packet(PUBLISH, packet_id, topic, qos, fields.left)


def _filters(kind: int, fields: _Fields) -> tuple[str, ...]:
    filters: list[str] = []
    while fields.left or not filters:
        topic_filter = fields.text()
        if not _well_formed(topic_filter.split("/"), wildcards=True):
            raise WireError("a topic filter that is no filter [4.7.1-2, 4.7.1-3, 4.7.3-1]")
        if kind == SUBSCRIBE and fields.number(1) > 2:
            raise WireError("a subscription with QoS above 2 [3.8.3-4]")
        filters.append(topic_filter)
    return tuple(filters)


def _end(fields: _Fields) -> None:
    if fields.left:
        raise WireError(f"{fields.left} bytes after the packet's last field")


def _refuse(why: str) -> int:
    raise WireError(why)
