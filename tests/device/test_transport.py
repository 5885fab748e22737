"""Both carriers keep the same promises: the public in-process double, and paho over real brokers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConnectionFailed, UsageError, WireError
from edge_runtime.topics import COORDINATOR, Topics, check_id
from edge_runtime.transport import (
    MAX_MESSAGE_BYTES,
    Connected,
    Disconnected,
    Event,
    LocalBroker,
    LocalTransport,
    Message,
    MqttTransport,
    Transport,
    Will,
    matches,
)
from tests.coordinator.brokers import RunningBroker, broker_kinds, start_broker
from tests.samples import quickly

TOPICS = Topics("farm")
SECRETS = {COORDINATOR: "sc", "dev-a": "sa", "dev-b": "sb"}
PATIENCE_S = 15.0


class LocalCarrier:
    """Clients of one in-process broker."""

    kind = "local"

    def __init__(self) -> None:
        self.broker = LocalBroker()

    def client(self, user: str, filters: list[str], will: Will | None = None) -> Transport:
        """Not yet started."""
        return LocalTransport(self.broker, user, filters, will=will)

    def cut(self, transport: Transport) -> None:
        """The network fails."""
        assert isinstance(transport, LocalTransport)
        transport.break_connection()


class MqttCarrier:
    """Clients of one real broker."""

    def __init__(self, broker: RunningBroker) -> None:
        self.kind, self.broker = broker.kind, broker

    def client(self, user: str, filters: list[str], will: Will | None = None, inbox_messages: int = 256) -> Transport:
        """Not yet started."""
        address = self.broker.host, self.broker.port
        return MqttTransport(*address, user, SECRETS[user], filters, will=will, inbox_messages=inbox_messages)

    def cut(self, transport: Transport) -> None:
        """The network fails."""
        assert isinstance(transport, MqttTransport)
        connection = transport._client.socket()
        assert isinstance(connection, socket.socket)
        connection.shutdown(socket.SHUT_RDWR)


Carrier = LocalCarrier | MqttCarrier
Connect = Callable[..., Transport]


class _Lazy(dict[str, RunningBroker]):
    """Brokers by kind, each started when it is first used."""

    def __init__(self, start: Callable[[str], RunningBroker]) -> None:
        super().__init__()
        self._start = start

    def __missing__(self, kind: str) -> RunningBroker:
        self[kind] = self._start(kind)
        return self[kind]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningBroker]]:
    brokers = _Lazy(lambda kind: start_broker(kind, TOPICS.realm, SECRETS, tmp_path_factory.mktemp(kind)))
    yield brokers
    for one in brokers.values():
        one.stop()


@pytest.fixture(params=["local", *(pytest.param(kind, marks=pytest.mark.broker) for kind in broker_kinds())])
def carrier(request: pytest.FixtureRequest, running: dict[str, RunningBroker]) -> Carrier:
    if request.param == "local":
        return LocalCarrier()
    return MqttCarrier(running[request.param])


@pytest.fixture(params=broker_kinds())
def broker(request: pytest.FixtureRequest, running: dict[str, RunningBroker]) -> RunningBroker:
    return running[request.param]


@pytest.fixture
def connect(carrier: Carrier) -> Iterator[Connect]:
    """Starts clients that are stopped after the test."""
    started: list[Transport] = []

    def one(user: str, *filters: str, will: Will | None = None) -> Transport:
        transport = carrier.client(user, list(filters), will)
        started.append(transport)
        transport.start()
        assert next_event(transport) == Connected()
        return transport

    yield one
    for transport in started:
        transport.stop()


def next_event(transport: Transport) -> Event:
    """The next event, within patience."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        event = transport.next_event(0.1)
        if event is not None:
            return event
    raise AssertionError("nothing happened")


def nothing_comes(transport: Transport) -> bool:
    """For a third of a second; in one process it would be here already."""
    if isinstance(transport, LocalTransport):
        return transport.next_event(0.0) is None
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        if transport.next_event(0.05) is not None:
            return False
    return True


def quiet(transport: Transport) -> None:
    """Wait until the broker has taken everything."""
    end = time.monotonic() + PATIENCE_S
    while transport.in_flight() and time.monotonic() < end:
        time.sleep(0.01)
    assert transport.in_flight() == 0


def test_a_message_arrives_byte_for_byte_at_those_whose_filter_matches(connect: Connect) -> None:
    coordinator = connect(COORDINATOR, *TOPICS.coordinator_filters())
    device, other = connect("dev-a", *TOPICS.device_filters("dev-a")), connect("dev-b", *TOPICS.device_filters("dev-b"))
    for payload in (b"text", bytes(range(256)), b"", b"\0" * MAX_MESSAGE_BYTES):
        device.publish(TOPICS.up("dev-a", "c"), payload)
        assert next_event(coordinator) == Message(TOPICS.up("dev-a", "c"), payload)
    coordinator.publish(TOPICS.down("dev-a", "ack"), b"yours")
    assert next_event(device) == Message(TOPICS.down("dev-a", "ack"), b"yours")
    coordinator.publish(TOPICS.all("round"), b"everybody's")
    for each in (device, other):
        assert next_event(each) == Message(TOPICS.all("round"), b"everybody's")


def test_messages_keep_their_order(connect: Connect) -> None:
    coordinator, device = (
        connect(COORDINATOR, *TOPICS.coordinator_filters()),
        connect("dev-a", *TOPICS.device_filters("dev-a")),
    )
    for number in range(100):
        device.publish(TOPICS.up("dev-a", "c"), b"%d" % number)
    for number in range(100):
        assert next_event(coordinator) == Message(TOPICS.up("dev-a", "c"), b"%d" % number)
    quiet(device)


def test_a_retained_message_waits_for_those_who_come_later_until_it_is_emptied(connect: Connect) -> None:
    coordinator = connect(COORDINATOR, *TOPICS.coordinator_filters())
    coordinator.publish(TOPICS.all("model"), b"one", retain=True)
    coordinator.publish(TOPICS.all("model"), b"two", retain=True)
    coordinator.publish(TOPICS.all("round"), b"not retained")
    quiet(coordinator)
    device = connect("dev-a", *TOPICS.device_filters("dev-a"))
    assert next_event(device) == Message(TOPICS.all("model"), b"two")
    assert nothing_comes(device)
    coordinator.publish(TOPICS.all("model"), b"", retain=True)
    assert next_event(device) == Message(TOPICS.all("model"), b"")
    assert nothing_comes(connect("dev-b", *TOPICS.device_filters("dev-b")))


def test_the_will_is_said_when_the_connection_breaks_and_stays_for_those_who_come_later(
    carrier: Carrier, connect: Connect
) -> None:
    coordinator = connect(COORDINATOR, *TOPICS.coordinator_filters())
    will = Will(TOPICS.up("dev-a", "st"), b"offline")
    device = connect("dev-a", *TOPICS.device_filters("dev-a"), will=will)
    carrier.cut(device)
    assert next_event(coordinator) == Message(will.topic, b"offline")
    coordinator.stop()
    late = connect(COORDINATOR, *TOPICS.coordinator_filters())
    assert next_event(late) == Message(will.topic, b"offline")
    late.publish(will.topic, b"", retain=True)
    quiet(late)


def test_after_a_clean_goodbye_there_is_no_will_and_stopping_twice_is_fine(connect: Connect) -> None:
    coordinator = connect(COORDINATOR, *TOPICS.coordinator_filters())
    device = connect("dev-a", *TOPICS.device_filters("dev-a"), will=Will(TOPICS.up("dev-a", "st"), b"offline"))
    device.publish(TOPICS.up("dev-a", "join"), b"leaving")
    assert next_event(coordinator) == Message(TOPICS.up("dev-a", "join"), b"leaving")
    device.stop()
    device.stop()
    assert nothing_comes(coordinator)


def test_after_a_break_it_is_said_that_the_connection_is_lost_and_then_that_it_is_there_again(
    carrier: Carrier, connect: Connect
) -> None:
    coordinator, device = (
        connect(COORDINATOR, *TOPICS.coordinator_filters()),
        connect("dev-a", *TOPICS.device_filters("dev-a")),
    )
    carrier.cut(device)
    lost = next_event(device)
    assert isinstance(lost, Disconnected)
    assert not lost.refused
    if carrier.kind == "local":
        device.start()
    assert next_event(device) == Connected()
    device.publish(TOPICS.up("dev-a", "join"), b"again")
    assert next_event(coordinator) == Message(TOPICS.up("dev-a", "join"), b"again")
    coordinator.publish(TOPICS.down("dev-a", "ack"), b"welcome")
    assert next_event(device) == Message(TOPICS.down("dev-a", "ack"), b"welcome")


def test_what_is_published_while_there_is_no_connection_is_dropped(carrier: Carrier, connect: Connect) -> None:
    coordinator = connect(COORDINATOR, *TOPICS.coordinator_filters())
    early = carrier.client("dev-a", TOPICS.device_filters("dev-a"))
    early.publish(TOPICS.up("dev-a", "join"), b"too early")
    assert early.in_flight() == 0
    device = connect("dev-b", *TOPICS.device_filters("dev-b"))
    device.stop()
    device.publish(TOPICS.up("dev-b", "join"), b"too late")
    assert nothing_comes(coordinator)


def test_a_message_over_the_limit_is_refused_here_and_blocks_nothing(connect: Connect) -> None:
    coordinator, device = (
        connect(COORDINATOR, *TOPICS.coordinator_filters()),
        connect("dev-a", *TOPICS.device_filters("dev-a")),
    )
    with pytest.raises(WireError, match=f"over the limit of {MAX_MESSAGE_BYTES}"):
        device.publish(TOPICS.up("dev-a", "c"), bytes(MAX_MESSAGE_BYTES + 1))
    device.publish(TOPICS.up("dev-a", "c"), b"next")
    assert next_event(coordinator) == Message(TOPICS.up("dev-a", "c"), b"next")


def test_waiting_for_an_event_ends_when_the_time_is_over(connect: Connect) -> None:
    device = connect("dev-a", *TOPICS.device_filters("dev-a"))
    started_s = time.perf_counter()
    assert device.next_event(0.0) is None
    assert device.next_event(-1.0) is None
    assert device.next_event(0.1) is None
    assert time.perf_counter() - started_s < 5.0


# MQTT alone


@pytest.mark.broker
def test_a_reader_that_is_slow_holds_its_sender_back_and_loses_nothing(broker: RunningBroker) -> None:
    coordinator = MqttCarrier(broker).client(COORDINATOR, TOPICS.coordinator_filters(), inbox_messages=3)
    device = MqttCarrier(broker).client("dev-a", TOPICS.device_filters("dev-a"))
    for transport in (coordinator, device):
        transport.start()
        assert next_event(transport) == Connected()
    for number in range(60):
        device.publish(TOPICS.up("dev-a", "c"), bytes([number]) * 20_000)
    time.sleep(0.3)
    found = [event for event in (next_event(coordinator) for _ in range(60)) if isinstance(event, Message)]
    assert [event.payload[0] for event in found] == list(range(60))
    coordinator.stop()
    device.stop()


@pytest.mark.broker
def test_a_wrong_secret_is_told_as_a_refusal(broker: RunningBroker) -> None:
    transport = MqttTransport(broker.host, broker.port, "dev-a", "wrong", TOPICS.device_filters("dev-a"))
    transport.start()
    event = next_event(transport)
    assert isinstance(event, Disconnected)
    assert event.refused
    assert "uthori" in event.reason or "user name" in event.reason
    transport.stop()


@pytest.mark.broker
def test_a_subscription_that_the_embedded_broker_refuses_is_told_with_its_filter(
    running: dict[str, RunningBroker],
) -> None:
    """Mosquitto accepts every filter and then delivers nothing."""
    filters = [TOPICS.all("+"), TOPICS.down("dev-b", "+")]
    transport = MqttTransport(running["amqtt"].host, running["amqtt"].port, "dev-a", "sa", filters)
    transport.start()
    assert next_event(transport) == Disconnected(f"the broker refuses the subscription to {filters[1]}", refused=True)
    transport.stop()


@pytest.mark.broker
def test_a_broker_that_restarts_is_found_again(tmp_path: Path) -> None:
    broker = start_broker(broker_kinds()[-1], TOPICS.realm, SECRETS, tmp_path)
    device = MqttCarrier(broker).client("dev-a", TOPICS.device_filters("dev-a"))
    device.start()
    assert next_event(device) == Connected()
    broker.restart()
    assert isinstance(next_event(device), Disconnected)
    event = next_event(device)
    while isinstance(event, Disconnected):
        event = next_event(device)
    assert event == Connected()
    device.stop()
    broker.stop()


def test_where_no_broker_listens_that_is_said_and_stopping_ends_the_search() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        transport = MqttTransport("127.0.0.1", port, "dev-a", "sa", [])
        transport.start()
        assert next_event(transport) == Disconnected(f"no broker answers at 127.0.0.1:{port}")
        started_s = time.perf_counter()
        transport.stop()
        assert time.perf_counter() - started_s < 10.0


@pytest.mark.parametrize(("host", "port"), [("", 1883), ("127.0.0.1", 0), ("127.0.0.1", -5)])
def test_an_address_that_cannot_be_one_is_refused_at_once(host: str, port: int) -> None:
    with pytest.raises(ConnectionFailed, match="is not usable"):
        MqttTransport(host, port, "dev-a", "sa", []).start()


# filters and names


@pytest.mark.parametrize(
    ("topic_filter", "topic", "match"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/b", "a", False),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a/", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("+/b", "a/b", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("a/+/c/#", "a/b/c/d/e", True),
        ("a/+/c/#", "a/b/x/d", False),
        ("A/b", "a/b", False),
        ("a/b/", "a/b", False),
    ],
)
def test_filters_match_as_mqtt_3_1_1_says(topic_filter: str, topic: str, match: bool) -> None:
    assert matches(topic_filter, topic) is match


NAMES = st.text("abc019_-", min_size=1, max_size=36)
ANY_NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("ab/+#$.\0\n", max_size=6)


@quickly(60)
@given(realm=NAMES, device=NAMES, kind=st.sampled_from(["st", "join", "offer", "need", "c"]))
def test_the_sender_of_an_upward_topic_is_the_device_that_built_it(realm: str, device: str, kind: str) -> None:
    topics = Topics(realm)
    topic = topics.up(device, kind)
    assert topics.sender(topic) == (device, kind)
    assert topics.kind(topic) == kind
    assert topic.count("/") <= 6
    assert matches(topics.coordinator_filters()[0], topic)
    assert not any(matches(f, topic) for f in topics.device_filters(device))
    assert topics.sender(topics.down(device, kind)) is None
    assert topics.sender(topics.all(kind)) is None
    assert Topics(realm + "x").sender(topic) is None


@quickly(150)
@given(name=ANY_NAME)
def test_a_name_that_is_an_id_changes_no_topic_and_any_other_is_refused(name: str) -> None:
    sound = 1 <= len(name) <= 36 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    if sound:
        assert check_id("device", name) == name
        return
    with pytest.raises(UsageError, match="must be 1 to 36 of"):
        check_id("device", name)
    found = TOPICS.sender(TOPICS.up(name, "st"))
    assert found is None, "a forged name is nobody"


@quickly(150)
@given(
    topic=ANY_NAME
    | st.lists(st.sampled_from(["fl", "1", "farm", "d", "dev-a", "up", "dn", "", "st", "..", "DEV"]), max_size=9).map(
        "/".join
    )
)
def test_any_other_topic_is_nobodys(topic: str) -> None:
    found = TOPICS.sender(topic)
    if found is not None:
        device, kind = found
        assert topic == TOPICS.up(device, kind)
        assert check_id("device", device) == device
        assert "/" not in kind
