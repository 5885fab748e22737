"""The rules as values, and that both brokers keep them: each topic below is tried on a real broker and on `may`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial

import pytest

from edge_coordinator.access import (
    MAX_RETAINED_BYTES,
    Action,
    matches,
    may,
    may_retain,
    mosquitto_acl,
)
from edge_coordinator.packets import connect_packet as written
from edge_coordinator.packets import parse_connect, parse_packet
from edge_runtime.errors import UsageError, WireError
from edge_runtime.topics import COORDINATOR
from tests.coordinator.brokers import RunningBroker, broker_kinds, connect_packet, logged_in, start_broker, text

REALM = "farm"
SECRETS = {COORDINATOR: "sc", "dev-a": "sa", "dev-b": "sb", "d": "sd"}
TOPICS = [
    "fl/1/farm",
    "fl/1/farm/all",
    "fl/1/farm/all/round",
    "fl/1/farm/all/x/y",
    "fl/1/farm/allx/round",
    "fl/1/farm/g",
    "fl/1/farm/g/dev-a",
    "fl/1/farm/g/tomatoes/cmd",
    "fl/1/farm/d",
    "fl/1/farm/d/dev-a",
    "fl/1/farm/d/dev-a/dn",
    "fl/1/farm/d/dev-a/dn/cmd",
    "fl/1/farm/d/dev-a/up",
    "fl/1/farm/d/dev-a/up/st",
    "fl/1/farm/d/dev-a/up/x/y/z",
    "fl/1/farm/d/dev-a/upx/st",
    "fl/1/farm/d/dev-a/other/st",
    "fl/1/farm/d/dev-a/",
    "fl/1/farm/d//up/st",
    "fl/1/farm/d/dev-b/up/st",
    "fl/1/farm/d/dev-b/dn/cmd",
    "fl/1/farm/d/dev-/up/st",
    "fl/1/farm/d/dev-aa/up/st",
    "fl/1/farm/d/DEV-A/up/st",
    "fl/1/farm/d/dev-a/dev-a/up/st",
    "fl/1/farm/x/dev-a/up/st",
    "fl/1/farm/d/d/up/st",
    "fl/1/farm/d/d/dn/cmd",
    "fl/1/farm/d/%u/up/st",
    "fl/1/farm/d/coordinator/up/st",
    "fl/1/farm/a/dev-a/dev-b/ask",
    "fl/1/farm/a/dev-a/dev-b/answer",
    "fl/1/farm/a/dev-b/dev-a/ask",
    "fl/1/farm/a/dev-b/dev-a/answer",
    "fl/1/farm/a/dev-a/dev-a/ask",
    "fl/1/farm/a/dev-a/d/answer",
    "fl/1/farm/a/dev-a/dev-b/other",
    "fl/1/farm/a/dev-a/dev-b/ask/x",
    "fl/1/farm/a/dev-a/ask",
    "fl/1/farm/a",
]


@pytest.mark.parametrize(
    ("user", "action", "topic", "allowed"),
    [
        ("dev-a", "publish", "fl/1/farm/d/dev-a/up/st", True),
        ("dev-a", "publish", "fl/1/farm/d/dev-b/up/st", False),
        ("dev-a", "publish", "fl/1/farm/d/dev-a/dn/cmd", False),
        ("dev-a", "publish", "fl/1/farm/all/round", False),
        ("dev-a", "publish", "fl/1/other/d/dev-a/up/st", False),
        ("dev-a", "publish", "fl/1/farm/d/dev-a/up/+", False),
        ("dev-a", "publish", "fl/1/farm/d/dev-a/up/#", False),
        ("dev-a", "publish", "fl/1/farm/d/dev-a/up/\0", False),
        ("dev-a", "publish", "", False),
        ("dev-a", "receive", "fl/1/farm/d/dev-a/up/st", False),
        ("dev-a", "subscribe", "fl/1/farm/d/dev-a/dn/#", True),
        ("dev-a", "subscribe", "fl/1/farm/d/dev-a/dn/+/x", True),
        ("dev-a", "subscribe", "fl/1/farm/all/#", True),
        ("dev-a", "subscribe", "fl/1/farm/all/+", True),
        ("dev-a", "subscribe", "fl/1/farm/g/tomatoes/#", True),
        ("dev-a", "subscribe", "fl/1/farm/g/#", True),
        ("dev-a", "subscribe", "#", False),
        ("dev-a", "subscribe", "+", False),
        ("dev-a", "subscribe", "+/#", False),
        ("dev-a", "subscribe", "fl/1/farm/#", False),
        ("dev-a", "subscribe", "fl/1/farm/d/#", False),
        ("dev-a", "subscribe", "fl/1/farm/d/+/dn/#", False),
        ("dev-a", "subscribe", "fl/1/farm/+/#", False),
        ("dev-a", "subscribe", "fl/1/+/all/#", False),
        ("dev-a", "subscribe", "fl/+/farm/all/#", False),
        ("dev-a", "subscribe", "+/1/farm/all/#", False),
        ("dev-a", "subscribe", "fl/1/farm/all#", False),
        ("dev-a", "subscribe", "fl/1/farm/all/#/x", False),
        ("dev-a", "subscribe", "fl/1/farm/all/x+", False),
        ("dev-a", "subscribe", "$SYS/#", False),
        ("dev-a", "subscribe", "$share/x/fl/1/farm/all/#", False),
        ("dev-a", "publish", "fl/1/farm/a/dev-a/dev-b/ask", True),
        ("dev-a", "publish", "fl/1/farm/a/dev-b/dev-c/ask", False),
        ("dev-a", "publish", "fl/1/farm/a/dev-b/dev-a/ask", False),
        ("dev-a", "publish", "fl/1/farm/a/dev-b/dev-a/answer", True),
        ("dev-a", "publish", "fl/1/farm/a/dev-a/dev-b/answer", False),
        ("dev-a", "publish", "fl/1/other/a/dev-a/dev-b/ask", False),
        ("dev-a", "receive", "fl/1/farm/a/dev-b/dev-a/ask", True),
        ("dev-a", "receive", "fl/1/farm/a/dev-a/dev-b/ask", False),
        ("dev-a", "receive", "fl/1/farm/a/dev-b/dev-c/answer", False),
        ("dev-a", "subscribe", "fl/1/farm/a/+/dev-a/ask", True),
        ("dev-a", "subscribe", "fl/1/farm/a/dev-a/+/answer", True),
        ("dev-a", "subscribe", "fl/1/farm/a/+/+/ask", False),
        ("dev-a", "subscribe", "fl/1/farm/a/+/dev-a/+", False),
        ("dev-a", "subscribe", "fl/1/farm/a/dev-a/#", False),
        ("dev-a", "subscribe", "fl/1/farm/a/+/dev-b/ask", False),
        ("+", "subscribe", "fl/1/farm/a/+/+/ask", False),
        (COORDINATOR, "subscribe", "fl/1/farm/#", True),
        (COORDINATOR, "subscribe", "fl/1/farm/d/+/up/#", True),
        (COORDINATOR, "subscribe", "fl/1/+/d/x/up/#", False),
        (COORDINATOR, "subscribe", "#", False),
        (COORDINATOR, "publish", "fl/1/farm/all/round", True),
        (COORDINATOR, "publish", "fl/1/other/all/round", False),
        (COORDINATOR, "publish", "$SYS/x", False),
        ("+", "subscribe", "fl/1/farm/d/+/dn/#", False),
        ("#", "subscribe", "fl/1/farm/d/#", False),
        ("", "publish", "fl/1/farm/d//up/st", False),
        ("Dev", "publish", "fl/1/farm/d/Dev/up/st", False),
        ("a/up", "publish", "fl/1/farm/d/a/up/up/st", False),
        ("x" * 37, "publish", f"fl/1/farm/d/{'x' * 37}/up/st", False),
    ],
)
def test_may(user: str, action: Action, topic: str, allowed: bool) -> None:
    assert may(user, action, topic, REALM) is allowed


def test_a_filter_that_passes_selects_nothing_that_may_not_be_received() -> None:
    parts = ["d", "a", "dev-a", "dn", "up", "ask", "all", "g", "+", "#"]
    checked = 0
    for start in ("fl/1/farm", "fl/1/+", "+/1/farm"):
        for depth in range(5):
            for rest in itertools.product(parts, repeat=depth):
                topic_filter = "/".join((start, *rest))
                if may("dev-a", "subscribe", topic_filter, REALM):
                    for topic in filter(partial(matches, topic_filter), TOPICS):
                        assert may("dev-a", "receive", topic, REALM), (topic_filter, topic)
                        checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    ("topic_filter", "topic", "selected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("+", "a/b", False),
        ("+/+", "a/b", True),
        ("+/b/#", "a/b", True),
        ("+/b/#", "a/c/d", False),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("+/#", "a", True),
    ],
)
def test_matches_as_mqtt_4_7_says(topic_filter: str, topic: str, selected: bool) -> None:
    assert matches(topic_filter, topic) is selected


def test_a_device_may_retain_its_presence_and_nothing_else() -> None:
    assert may_retain("dev-a", "fl/1/farm/d/dev-a/up/st", MAX_RETAINED_BYTES, REALM)
    assert not may_retain("dev-a", "fl/1/farm/d/dev-a/up/st", MAX_RETAINED_BYTES + 1, REALM)
    assert not may_retain("dev-a", "fl/1/farm/d/dev-a/up/st2", 1, REALM)
    assert not may_retain("dev-a", "fl/1/farm/d/dev-b/up/st", 1, REALM)
    assert may_retain(COORDINATOR, "fl/1/farm/all/model", 1 << 20, REALM)


@pytest.mark.parametrize("realm", ["", "a b", "a/b", "a\nuser x", "+", "#"])
def test_a_realm_that_could_break_out_of_the_acl_file_is_refused(realm: str) -> None:
    with pytest.raises(UsageError):
        mosquitto_acl(realm)


def test_connect_packets_of_every_length_are_read_or_refused() -> None:
    whole = connect_packet("dev-a", "s", will=("fl/1/farm/d/dev-a/up/st", b"off", True))[2:]
    connect = parse_connect(whole)
    assert (connect.user, connect.secret, connect.will_payload, connect.will_retain) == ("dev-a", "s", b"off", True)
    for length in range(len(whole)):
        with pytest.raises(WireError):
            parse_connect(whole[:length])
    with pytest.raises(WireError):
        parse_connect(whole + b"x")


@pytest.mark.parametrize("will", [None, ("fl/1/farm/d/dev-a/up/st", b"off", True), ("x", bytes(20_000), False)])
def test_a_connect_packet_is_written_as_it_is_read(will: tuple[str, bytes, bool] | None) -> None:
    packet = connect_packet("dev-a", "s", will=will, keepalive_s=300)
    assert written(parse_connect(packet[packet.index(b"\0\4MQTT") :])) == packet


def test_no_bytes_make_the_packet_reader_raise_anything_but_wire_error() -> None:
    body = b"\0\1" + text("fl/1/farm/all/#") + b"\1" + text("ä") + b"\2"
    for first in range(256):
        for length in range(len(body) + 1):
            with contextlib.suppress(WireError):
                parse_packet(first, body[:length])


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.broker) for kind in broker_kinds()], scope="module")
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    broker = start_broker(request.param, REALM, SECRETS, tmp_path_factory.mktemp("access"))
    yield broker
    broker.stop()


@pytest.mark.parametrize("user", ["dev-a", "dev-b", "d"])
def test_a_broker_forwards_what_may_says_a_device_may_publish(broker: RunningBroker, user: str) -> None:
    end = f"fl/1/farm/d/{user}/up/end"
    with (
        logged_in(broker.port, COORDINATOR, "sc") as coordinator,
        logged_in(broker.port, user, SECRETS[user]) as device,
    ):
        assert coordinator.subscribe("fl/1/farm/#") == [1]
        for topic in [*TOPICS, "other/topic"]:
            device.publish(topic, b"x", qos=1)
        device.publish(end, qos=1)
        assert coordinator.messages_until(end) == [topic for topic in TOPICS if may(user, "publish", topic, REALM)]


@pytest.mark.parametrize("user", ["dev-a", "dev-b", "d"])
def test_a_broker_delivers_what_may_says_a_device_may_receive(broker: RunningBroker, user: str) -> None:
    end = f"fl/1/farm/d/{user}/dn/end"
    with (
        logged_in(broker.port, COORDINATOR, "sc") as coordinator,
        logged_in(broker.port, user, SECRETS[user]) as device,
    ):
        granted = [device.subscribe(topic)[0] != 0x80 for topic in TOPICS]
        assert device.subscribe(end, "#")[0] == 1
        if broker.kind == "amqtt":  # Mosquitto 2.0's acl_file grants every subscription and checks deliveries
            assert granted == [may(user, "subscribe", topic, REALM) for topic in TOPICS]
        for topic in [*TOPICS, end]:
            coordinator.publish(topic, b"x", qos=1)
        wanted = [topic for topic in TOPICS if may(user, "receive", topic, REALM)]
        assert list(dict.fromkeys(device.messages_until(end))) == wanted


def test_a_broker_gives_the_coordinator_its_realm_and_no_more(broker: RunningBroker) -> None:
    with logged_in(broker.port, COORDINATOR, "sc") as coordinator:
        coordinator.subscribe("fl/1/farm/#", "#", "$SYS/#", "other/#")
        for topic in [*TOPICS, "other/x", "fl/1/other/all/round", "fl/1/farm/end"]:
            coordinator.publish(topic, b"x", qos=1)
        assert list(dict.fromkeys(coordinator.messages_until("fl/1/farm/end"))) == TOPICS


def test_nobody_gets_wildcards_past_a_broker(broker: RunningBroker) -> None:
    with (
        logged_in(broker.port, COORDINATOR, "sc") as coordinator,
        logged_in(broker.port, "dev-a", "sa") as device,
    ):
        wide = ["#", "+/#", "fl/1/farm/#", "fl/1/farm/d/+/dn/#", "fl/1/+/all/#", "$SYS/#", "fl/1/farm/d/dev-b/dn/#"]
        codes = device.subscribe(*wide)
        if broker.kind == "amqtt":
            assert codes == [0x80] * len(wide)
        coordinator.publish("fl/1/farm/d/dev-b/dn/secret", b"x", qos=1)
        coordinator.publish("fl/1/other/all/round", b"x", qos=1)
        device.subscribe("fl/1/farm/d/dev-a/dn/#")
        coordinator.publish("fl/1/farm/d/dev-a/dn/end", b"x", qos=1)
        assert device.messages_until("fl/1/farm/d/dev-a/dn/end") == []
