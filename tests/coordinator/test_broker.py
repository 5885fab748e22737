"""Both brokers over real sockets: log-in, limits and clients that misbehave.

The rules of topics: test_access.py; Mosquitto's files and process: test_mosquitto.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_coordinator import connection, gate
from edge_coordinator.access import MAX_RETAINED_BYTES
from edge_coordinator.broker import EmbeddedBroker
from edge_coordinator.fleet import Fleet, init
from edge_coordinator.gate import DEVICE_FILTERS
from edge_coordinator.secrets import hash_secret
from edge_runtime.errors import UsageError
from edge_runtime.topics import COORDINATOR
from tests.coordinator.brokers import (
    HOST,
    RawClient,
    RunningBroker,
    broker_kinds,
    connect_packet,
    logged_in,
    packet,
    start_broker,
    text,
)

pytestmark = pytest.mark.broker

REALM = "farm"
USERS = {COORDINATOR: "sc", "dev-a": "sa", "dev-b": "sb"}
HASHED = {user: hash_secret(secret) for user, secret in USERS.items()}
UP_A, UP_B = "fl/1/farm/d/dev-a/up", "fl/1/farm/d/dev-b/up"
DN_A = "fl/1/farm/d/dev-a/dn"
LIMIT = 100_000
Start = Callable[..., RunningBroker]


@pytest.fixture(params=broker_kinds(), scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def broker(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    broker = start_broker(kind, REALM, USERS, tmp_path_factory.mktemp("broker"), max_message_bytes=LIMIT)
    yield broker
    broker.stop()
    if kind == "amqtt":
        assert broker.output() == "", "a broker that no one gave a log is silent, whatever clients do"


@pytest.fixture
def start(kind: str, tmp_path: Path) -> Iterator[Start]:
    """Starts brokers of a test's own."""
    started: list[RunningBroker] = []

    def one(**options: Any) -> RunningBroker:
        started.append(start_broker(kind, REALM, USERS, tmp_path / str(len(started)), **options))
        return started[-1]

    yield one
    for broker in started:
        broker.stop()


@pytest.fixture
def coordinator(broker: RunningBroker) -> Iterator[RawClient]:
    with logged_in(broker.port, COORDINATOR, "sc") as client:
        assert client.subscribe("fl/1/farm/d/+/up/#") == [1]
        yield client


@pytest.fixture
def device(broker: RunningBroker) -> Iterator[RawClient]:
    with logged_in(broker.port, "dev-a", "sa") as client:
        yield client


# --- who may log in


@pytest.mark.parametrize(
    ("user", "secret"),
    [("dev-a", "sb"), ("dev-a", ""), ("dev-a", None), ("nobody", "sa"), ("", "sa"), (None, None), ("Dev-A", "sa")],
)
def test_who_is_not_enrolled_or_has_another_secret_is_refused(broker: RunningBroker, user: str, secret: str) -> None:
    with RawClient(broker.port) as client:
        assert client.log_in(user, secret, client_id="dev-a") in (4, 5, None)
        assert client.hung_up()


@pytest.mark.parametrize("client_id", ["dev-b", "", "coordinator", "dev-a/x"])
def test_a_client_id_that_is_not_the_user_name_gains_nothing(broker: RunningBroker, client_id: str) -> None:
    with logged_in(broker.port, "dev-b", "sb") as victim, logged_in(broker.port, COORDINATOR, "sc") as coordinator:
        coordinator.subscribe("fl/1/farm/d/+/up/#")
        with RawClient(broker.port) as client:
            code = client.log_in("dev-a", "sa", client_id=client_id)
            if broker.kind == "amqtt" or not client_id:
                assert code == 2
            else:  # Mosquitto puts the user name in the place of the client id
                assert code == 0
                client.publish(f"{UP_B}/forged", qos=1)
                client.publish(f"{UP_A}/mine", qos=1)
                assert coordinator.messages_until(f"{UP_A}/mine") == []
        assert victim.ping() and coordinator.ping()


def test_a_failed_log_in_takes_nothing_from_the_client_that_it_names(broker: RunningBroker, device: RawClient) -> None:
    device.subscribe(f"{DN_A}/#")
    for clean in (True, False):
        with RawClient(broker.port) as thief:
            assert thief.log_in("dev-a", "wrong", clean=clean) in (4, 5)
        with RawClient(broker.port) as thief:
            assert thief.log_in(COORDINATOR, "wrong", client_id="dev-a", clean=clean) in (4, 5)
    with logged_in(broker.port, COORDINATOR, "sc") as coordinator:
        device.publish("fl/1/farm/all/round", b"not mine to say", qos=1)
        coordinator.publish(f"{DN_A}/cmd", b"x", qos=1)
        assert device.message() == (f"{DN_A}/cmd", b"x", False)


def test_a_second_connection_takes_over_and_the_first_ones_will_is_sent(
    broker: RunningBroker, coordinator: RawClient
) -> None:
    will = (f"{UP_A}/st", b"offline", False)
    with logged_in(broker.port, "dev-a", "sa", will=will) as first:
        first.subscribe(f"{DN_A}/#")
        with logged_in(broker.port, "dev-a", "sa") as second:
            assert first.hung_up()
            second.publish(f"{UP_A}/st", b"online", qos=1)
            assert [coordinator.message()[1] for _ in range(2)] == [b"offline", b"online"]
            second.subscribe(f"{DN_A}/#")
            coordinator.publish(f"{DN_A}/cmd", b"x", qos=1)
            assert second.message()[0] == f"{DN_A}/cmd"


def test_enrolled_devices_get_in_without_a_restart_and_revoked_ones_do_not(start: Start) -> None:
    broker = start()
    with RawClient(broker.port) as client:
        assert client.log_in("dev-new", "sn") in (4, 5)
    broker.set_users({**USERS, "dev-new": "sn"})
    with logged_in(broker.port, "dev-new", "sn"):
        pass
    broker.set_users(USERS)
    with RawClient(broker.port) as client:
        assert client.log_in("dev-new", "sn") in (4, 5)


def test_no_session_outlives_its_connection(broker: RunningBroker, kind: str) -> None:
    if kind == "mosquitto":
        pytest.skip("Mosquitto keeps the session of a client that asks for it; ours ask for clean ones")
    for _ in range(2):
        with RawClient(broker.port) as client:
            client.socket.sendall(connect_packet("dev-a", "sa", clean=False))
            assert client.receive() == (0x20, b"\0\0")
            client.subscribe(f"{DN_A}/#")


# --- wills, retained messages, QoS


def test_a_will_on_another_devices_topic_is_dropped(broker: RunningBroker, coordinator: RawClient) -> None:
    for topic, payload in ((f"{UP_B}/st", b"forged"), ("fl/1/farm/all/round", b"forged"), (f"{UP_A}/st", b"lawful")):
        with RawClient(broker.port) as client:
            assert client.log_in("dev-a", "sa", will=(topic, payload, True)) == 0
            assert client.ping()
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # gone without a word
    assert coordinator.message()[:2] == (f"{UP_A}/st", b"lawful")
    coordinator.subscribe(f"{UP_B}/st", "fl/1/farm/all/#")
    coordinator.publish(f"{UP_A}/st", retain=True)
    assert coordinator.messages_until(f"{UP_A}/st") == []


def test_a_device_that_says_goodbye_leaves_no_will(broker: RunningBroker, coordinator: RawClient) -> None:
    for _ in range(20):
        with logged_in(broker.port, "dev-a", "sa", will=(f"{UP_A}/st", b"will", False)) as client:
            client.send(0xE0)
    with logged_in(broker.port, "dev-a", "sa") as client:
        client.publish(f"{UP_A}/end", qos=1)
        assert coordinator.messages_until(f"{UP_A}/end") == []


def test_everything_sent_before_goodbye_arrives(broker: RunningBroker, coordinator: RawClient) -> None:
    with logged_in(broker.port, "dev-a", "sa") as client:
        burst = b"".join(packet(0x30, text(f"{UP_A}/tel") + bytes((n,))) for n in range(200))
        client.socket.sendall(burst + packet(0xE0, b""))
        assert client.hung_up()
    assert [coordinator.message()[1][0] for _ in range(200)] == list(range(200))


def test_a_device_can_retain_only_its_presence(broker: RunningBroker, kind: str, device: RawClient) -> None:
    if kind == "mosquitto":
        pytest.skip("Mosquitto has no such rule: memory_limit bounds what devices retain")
    device.publish(f"{UP_A}/st", b"here", qos=1, retain=True)
    device.publish(f"{UP_A}/other", b"spam", qos=1, retain=True)
    device.publish(f"{UP_A}/st", bytes(MAX_RETAINED_BYTES + 1), qos=1, retain=True)
    assert device.ping()
    with logged_in(broker.port, COORDINATOR, "sc") as coordinator:
        coordinator.subscribe("fl/1/farm/d/+/up/#")
        device.publish(f"{UP_A}/end", qos=1)
        assert coordinator.message() == (f"{UP_A}/st", b"here", True)
        assert coordinator.message()[0] == f"{UP_A}/end"
        device.publish(f"{UP_A}/st", b"", qos=1, retain=True)
        assert coordinator.message() == (f"{UP_A}/st", b"", False)


def test_retained_messages_come_on_subscribing_and_only_to_who_subscribed(
    broker: RunningBroker, coordinator: RawClient, device: RawClient
) -> None:
    device.publish(f"{UP_A}/st", b"private", qos=1, retain=True)
    coordinator.publish("fl/1/farm/all/model", b"m7", qos=1, retain=True)
    assert coordinator.message()[1] == b"private"
    with logged_in(broker.port, "dev-b", "sb") as other:
        assert other.ping()
        other.subscribe("fl/1/farm/all/#")
        assert other.message() == ("fl/1/farm/all/model", b"m7", True)
        assert other.ping()
        with pytest.raises(TimeoutError):
            other.message(0.1)
    coordinator.publish("fl/1/farm/all/model", retain=True)
    device.publish(f"{UP_A}/st", qos=1, retain=True)
    assert coordinator.message()[1] == b""


def test_every_qos_arrives_once(coordinator: RawClient, device: RawClient) -> None:
    device.subscribe(f"{DN_A}/#", qos=2)
    for qos in (0, 1, 2):
        device.publish(f"{UP_A}/x", bytes((qos,)), qos=qos)
        assert device.ping()
        coordinator.publish(f"{DN_A}/x", bytes((qos,)), qos=qos)
        assert coordinator.ping()
        assert coordinator.message() == (f"{UP_A}/x", bytes((qos,)), False)
        assert device.message() == (f"{DN_A}/x", bytes((qos,)), False)
    device.publish(f"{UP_A}/end", qos=1)
    assert coordinator.messages_until(f"{UP_A}/end") == []


def test_messages_of_qos_2_that_are_never_released_do_not_pile_up(broker: RunningBroker) -> None:
    with logged_in(broker.port, "dev-a", "sa") as client:
        for packet_id in range(1, 200):
            client.send(0x34, text(f"{UP_A}/c") + packet_id.to_bytes(2, "big") + bytes(50_000))
        if broker.kind == "amqtt":  # Mosquitto keeps max_queued_messages of them and drops the others
            assert client.hung_up()
    assert resident_mib(broker.pid) < 120


# --- limits


def test_a_payload_above_the_limit_ends_the_connection_and_nothing_else(
    broker: RunningBroker, coordinator: RawClient
) -> None:
    with logged_in(broker.port, "dev-a", "sa") as client:
        client.publish(f"{UP_A}/c", bytes(LIMIT), qos=1)
        assert len(coordinator.message()[1]) == LIMIT
        client.publish(f"{UP_A}/c", bytes(LIMIT + 513), qos=1)
        assert client.hung_up()
    with logged_in(broker.port, "dev-a", "sa") as client:  # 256 MiB announced
        client.socket.sendall(b"\x30\xff\xff\xff\x7f")
        assert client.hung_up()
    assert coordinator.ping()


HOSTILE = {
    "reserved kind 0": b"\x00\x00",
    "reserved kind 15": b"\xf0\x00",
    "a second CONNECT": connect_packet("dev-a", "sa"),
    "CONNACK from a client": b"\x20\x02\0\0",
    "length of five bytes": b"\x30\xff\xff\xff\xff\x01",
    "QoS 3": packet(0x36, text(f"{UP_A}/x") + b"\0\1"),
    "packet id 0": packet(0x32, text(f"{UP_A}/x") + b"\0\0"),
    "topic longer than the packet": packet(0x30, b"\xff\xffab"),
    "no topic": packet(0x30, b""),
    "empty topic": packet(0x30, b"\0\0x"),
    "+ in a topic": packet(0x30, text(f"{UP_A}/+") + b"x"),
    "# in a topic": packet(0x32, text(f"{UP_A}/#") + b"\0\1x"),
    "NUL in a topic": packet(0x30, text(f"{UP_A}/\0") + b"x"),
    "topic not UTF-8": packet(0x30, b"\0\2\xff\xfe"),
    "surrogate in a topic": packet(0x30, b"\0\3\xed\xa0\x80"),
    "SUBSCRIBE without a filter": packet(0x82, b"\0\1"),
    "SUBSCRIBE with flags 0": packet(0x80, b"\0\1" + text("fl/1/farm/all/#") + b"\1"),
    "SUBSCRIBE with QoS 3": packet(0x82, b"\0\1" + text("fl/1/farm/all/#") + b"\3"),
    "SUBSCRIBE cut off": packet(0x82, b"\0\1" + text("fl/1/farm/all/#")),
    "SUBSCRIBE to no filter": packet(0x82, b"\0\1" + text("fl/1/#/all") + b"\1"),
    "PUBREL with flags 0": packet(0x60, b"\0\1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_packets_end_the_connection_and_nothing_else(
    broker: RunningBroker, coordinator: RawClient, name: str
) -> None:
    with logged_in(broker.port, "dev-a", "sa", will=(f"{UP_A}/st", b"gone", False)) as client:
        client.socket.sendall(HOSTILE[name])
        assert client.hung_up()
    if broker.kind == "amqtt" or name != "a second CONNECT":  # Mosquitto 2.0.11 sends no will there
        assert coordinator.message()[:2] == (f"{UP_A}/st", b"gone")


@pytest.mark.parametrize(
    "first",
    [
        b"\0" * 64,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        packet(0x30, text(f"{UP_A}/x") + b"x"),
        packet(0x10, text("MQTT") + b"\x04"),
        packet(0x10, text("HTTP") + b"\x04\x02\0\0\0\0"),
        packet(0x10, text("MQTT") + b"\x04\x03\0\0" + text("dev-a")),
        packet(0x10, text("MQTT") + b"\x04\xc2\0\0" + text("dev-a") + text("dev-a") + b"\0\x09s"),
        b"\x10\xff\xff\xff\x7f" + bytes(100_000),
    ],
)
def test_what_is_not_a_connect_packet_ends_the_connection(broker: RunningBroker, first: bytes) -> None:
    with RawClient(broker.port) as client:
        client.socket.sendall(first)
        with contextlib.suppress(OSError):
            client.socket.shutdown(socket.SHUT_WR)
        assert client.hung_up()


def test_older_and_newer_protocol_versions_are_told_so(broker: RunningBroker, kind: str) -> None:
    if kind == "mosquitto":
        pytest.skip("Mosquitto speaks MQTT 3.1 and 5 too")
    for level in (3, 5):
        with RawClient(broker.port) as client:
            assert client.log_in("dev-a", "sa", level=level) == 1


def test_a_flood_of_connections_keeps_nobody_out(broker: RunningBroker, coordinator: RawClient) -> None:
    silent = [socket.create_connection((HOST, broker.port)) for _ in range(300)]
    for one in silent[::2]:
        one.sendall(b"\x10\x40")
    with logged_in(broker.port, "dev-a", "sa") as client:
        client.publish(f"{UP_A}/x", qos=1)
        assert coordinator.message()[0] == f"{UP_A}/x"
    for one in silent:
        one.close()


def test_more_clients_than_allowed_are_refused_and_one_may_still_reconnect(start: Start) -> None:
    broker = start(max_connections=2)
    with logged_in(broker.port, "dev-a", "sa"), logged_in(broker.port, COORDINATOR, "sc") as coordinator:
        with RawClient(broker.port) as client:
            assert client.log_in("dev-b", "sb") in (3, None)
        if broker.kind == "amqtt":  # Mosquitto counts connections before it knows who they are
            with logged_in(broker.port, "dev-a", "sa"):
                assert coordinator.ping()


def test_a_device_cannot_subscribe_to_endlessly_many_filters(
    broker: RunningBroker, kind: str, device: RawClient
) -> None:
    if kind == "mosquitto":
        pytest.skip("Mosquitto has no such limit; memory_limit is its bound")
    codes = device.subscribe(*(f"{DN_A}/{number}" for number in range(2 * DEVICE_FILTERS)))
    assert codes == [1] * DEVICE_FILTERS + [0x80] * DEVICE_FILTERS
    for number in range(200):
        device.send(0xA2, b"\0\1" + text(f"{DN_A}/{number}"))
        assert device.receive() == (0xB0, b"\0\1")
        assert device.subscribe(f"{DN_A}/x{number}") == [1] if number < DEVICE_FILTERS else [0x80]


def test_a_silent_client_is_dropped_after_one_and_a_half_keepalives(
    broker: RunningBroker, coordinator: RawClient
) -> None:
    will = (f"{UP_A}/st", b"silent", False)
    with logged_in(broker.port, "dev-a", "sa", keepalive_s=1, will=will) as client:
        started_s = time.monotonic()
        assert client.hung_up(30.0)  # Mosquitto looks every five seconds
        assert time.monotonic() - started_s > 0.9
    assert coordinator.message()[1] == b"silent"


# --- slow clients


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def publish_mib(client: RawClient, topic: str, mib: int) -> None:
    """Publishes chunks of 64 KiB, QoS 1, and waits for each one's PUBACK."""
    for _ in range(mib * 16):
        client.publish(topic, bytes(65536), qos=1)
        answer = client.receive()
        assert answer is not None and answer[0] == 0x40


@pytest.mark.parametrize("qos", [0, 1])
def test_a_device_that_stops_reading_costs_bounded_memory_and_delays_nobody(start: Start, qos: int) -> None:
    broker = start()
    if broker.kind == "mosquitto" and qos == 0:
        pytest.skip("Mosquitto bounds messages of QoS 0 by number alone: 4096 per client, then memory_limit")
    with (
        logged_in(broker.port, COORDINATOR, "sc") as coordinator,
        logged_in(broker.port, "dev-a", "sa", keepalive_s=0) as stalled,
        logged_in(broker.port, "dev-b", "sb") as other,
    ):
        stalled.subscribe(f"{DN_A}/#", qos=qos)
        other.subscribe("fl/1/farm/all/#")
        before_mib = resident_mib(broker.pid)
        publish_mib(coordinator, f"{DN_A}/c", 96 if broker.kind == "amqtt" else 384)
        coordinator.publish("fl/1/farm/all/end", qos=1)
        assert other.message()[0] == "fl/1/farm/all/end"
        grown_mib = resident_mib(broker.pid) - before_mib
    assert grown_mib < (40 if broker.kind == "amqtt" else 300)  # max_queued_bytes is 256 MiB for every client


def test_a_device_that_reads_and_never_acknowledges_costs_bounded_memory(start: Start) -> None:
    broker = start()
    with (
        logged_in(broker.port, COORDINATOR, "sc") as coordinator,
        logged_in(broker.port, "dev-a", "sa", keepalive_s=0) as silent,
    ):
        silent.subscribe(f"{DN_A}/#")
        reading = threading.Thread(target=silent.hung_up, args=(60.0,))
        reading.start()
        before_mib = resident_mib(broker.pid)
        publish_mib(coordinator, f"{DN_A}/c", 64)
        assert resident_mib(broker.pid) - before_mib < (60 if broker.kind == "amqtt" else 100)
        silent.socket.shutdown(socket.SHUT_RDWR)
        reading.join()


def test_devices_wait_for_a_coordinator_that_reads_slowly_and_nothing_is_lost(start: Start) -> None:
    broker = start()
    if broker.kind == "mosquitto":
        pytest.skip("Mosquitto never slows a sender down: it queues 256 MiB, then drops")
    with (
        logged_in(broker.port, COORDINATOR, "sc", keepalive_s=0) as coordinator,
        logged_in(broker.port, "dev-a", "sa") as device,
    ):
        coordinator.subscribe("fl/1/farm/d/+/up/#", qos=0)
        before_mib = resident_mib(broker.pid)
        sender = threading.Thread(target=publish_mib, args=(device, f"{UP_A}/c", 64))
        sender.start()
        time.sleep(1.5)
        assert sender.is_alive(), "slowed down"
        assert resident_mib(broker.pid) - before_mib < 60
        for _ in range(64 * 16):
            assert len(coordinator.message()[1]) == 65536
        sender.join(10)
        assert not sender.is_alive()


def test_when_all_clients_together_hold_too_much_those_with_most_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TOTAL_BACKLOG_BYTES", 3 << 20)
    with (
        EmbeddedBroker(HOST, 0, REALM, HASHED.get) as broker,
        logged_in(broker.port, COORDINATOR, "sc") as coordinator,
        logged_in(broker.port, "dev-a", "sa") as much,
        logged_in(broker.port, "dev-b", "sb") as little,
    ):
        much.subscribe(f"{DN_A}/#")
        little.subscribe("fl/1/farm/d/dev-b/dn/#")
        publish_mib(coordinator, "fl/1/farm/d/dev-b/dn/c", 1)
        publish_mib(coordinator, f"{DN_A}/c", 4)
        assert much.hung_up()
        assert little.ping() and coordinator.ping()


def test_a_client_that_takes_nothing_for_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_S", 1.0)
    monkeypatch.setattr(gate, "DEVICE_BACKLOG_BYTES", 64 << 20)
    with (
        EmbeddedBroker(HOST, 0, REALM, HASHED.get) as broker,
        logged_in(broker.port, COORDINATOR, "sc") as coordinator,
        logged_in(broker.port, "dev-a", "sa", keepalive_s=0) as stalled,
    ):
        stalled.subscribe(f"{DN_A}/#", qos=0)
        publish_mib(coordinator, f"{DN_A}/c", 16)
        time.sleep(3.5)
        assert coordinator.ping()
        received = 0
        while (answer := stalled.receive()) is not None:
            received += len(answer[1])
        assert received < 16 << 20, "dropped with what it had not taken"


def test_many_devices_at_once_lose_nothing_and_keep_their_order(start: Start, kind: str) -> None:
    devices = {f"dev-{number}": "s" for number in range(40)}
    broker = start()
    broker.set_users({**USERS, **devices})
    with contextlib.ExitStack() as stack:
        coordinator = stack.enter_context(logged_in(broker.port, COORDINATOR, "sc"))
        coordinator.subscribe("fl/1/farm/d/+/up/#")
        clients = {user: stack.enter_context(logged_in(broker.port, user, "s")) for user in devices}
        for number in range(20):  # 13 MiB in all, as much as the sockets hold: nobody reads yet
            for user, client in clients.items():
                client.publish(f"fl/1/farm/d/{user}/up/c", bytes((number,)) * 16384, qos=1)
        got: dict[str, list[int]] = {user: [] for user in devices}
        for _ in range(20 * len(devices)):
            topic, payload, _ = coordinator.message()
            got[topic.split("/")[4]].append(payload[0])
    assert got == {user: list(range(20)) for user in devices}


def test_subscribing_clients_cost_others_no_message(
    broker: RunningBroker, coordinator: RawClient, device: RawClient
) -> None:
    device.subscribe(f"{DN_A}/#")
    stop = threading.Event()

    def subscribe() -> None:
        number = 0
        while not stop.is_set():
            with logged_in(broker.port, "dev-b", "sb") as other:
                other.subscribe(f"fl/1/farm/g/{number}/#", "fl/1/farm/all/#")
                number += 1

    churn = threading.Thread(target=subscribe)
    churn.start()
    for number in range(300):
        coordinator.publish(f"{DN_A}/c", number.to_bytes(2, "big"), qos=1)
    got = [int.from_bytes(device.message()[1], "big") for _ in range(300)]
    stop.set()
    churn.join()
    assert got == list(range(300))


# --- life and death


def test_after_a_kill_it_starts_again_on_the_same_port_with_nothing_kept(start: Start) -> None:
    broker = start()
    port, pid = broker.port, broker.pid
    with logged_in(port, COORDINATOR, "sc") as client:
        client.publish("fl/1/farm/all/model", b"old", qos=1, retain=True)
        assert client.receive() == (0x40, b"\0\1")
        broker.restart()
        assert client.hung_up()
    assert (broker.port, broker.pid != pid) == (port, True)
    with logged_in(port, COORDINATOR, "sc") as client:
        client.subscribe("fl/1/farm/#")
        with pytest.raises(TimeoutError):
            client.message(0.2)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    cert, key = (tmp_path_factory.mktemp("tls") / name for name in ("cert.pem", "key.pem"))
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return cert, key


def test_tls_carries_messages_and_plain_clients_get_nothing(start: Start, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    broker = start(certfile=cert, keyfile=key)
    context = ssl.create_default_context(cafile=str(cert))
    with RawClient(broker.port) as client:
        client.socket = context.wrap_socket(client.socket, server_hostname=HOST)
        assert client.log_in(COORDINATOR, "sc") == 0
        client.subscribe("fl/1/farm/#")
        client.publish("fl/1/farm/all/x", bytes(250_000), qos=1)
        assert len(client.message()[1]) == 250_000
    with RawClient(broker.port) as client:
        assert client.log_in(COORDINATOR, "sc") is None


def test_stop_leaves_no_thread_and_no_socket_and_may_be_repeated() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    broker = EmbeddedBroker(HOST, 0, REALM, HASHED.get)
    broker.stop()
    for _ in range(2):
        broker.start()
        assert broker.running
        with logged_in(broker.port, "dev-a", "sa") as client, RawClient(broker.port) as pending:
            client.subscribe("fl/1/farm/all/#")
            broker.stop()
            broker.stop()
            assert client.hung_up() and pending.hung_up()
        assert not broker.running
        with pytest.raises(ConnectionError):
            RawClient(broker.port)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_an_address_in_use_says_what_to_do() -> None:
    with EmbeddedBroker(HOST, 0, REALM, HASHED.get) as first:
        with pytest.raises(UsageError, match="another host or port"):
            EmbeddedBroker(HOST, first.port, REALM, HASHED.get).start()
        with pytest.raises(UsageError, match="runs already"):
            first.start()
        with logged_in(first.port, "dev-a", "sa"):
            pass


@pytest.mark.parametrize("address", [("192.0.2.1", 0), ("no such host", 0), (HOST, 70000)])
def test_an_address_that_is_not_ours_is_a_usage_error(address: tuple[str, int]) -> None:
    with pytest.raises(UsageError):
        EmbeddedBroker(*address, REALM, HASHED.get).start()


def test_a_certificate_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(UsageError, match="both"):
        EmbeddedBroker(HOST, 0, REALM, HASHED.get, certfile=tmp_path / "x.pem")
    with pytest.raises(UsageError, match="PEM"):
        EmbeddedBroker(HOST, 0, REALM, HASHED.get, certfile=tmp_path / "x.pem", keyfile=tmp_path / "y.pem").start()


def test_a_lookup_that_fails_refuses_the_client_and_harms_no_other() -> None:
    def lookup(user: str) -> str | None:
        if user == "dev-b":
            raise RuntimeError("the database is gone")
        return HASHED.get(user)

    with EmbeddedBroker(HOST, 0, REALM, lookup) as broker, logged_in(broker.port, "dev-a", "sa") as client:
        with RawClient(broker.port) as other:
            assert other.log_in("dev-b", "sb") == 3
        assert client.ping()


def test_drop_ends_a_revoked_users_connection() -> None:
    users = dict(HASHED)
    with EmbeddedBroker(HOST, 0, REALM, users.get) as broker, logged_in(broker.port, "dev-a", "sa") as client:
        del users["dev-a"]
        broker.drop("dev-a")
        broker.drop("nobody")
        assert client.hung_up()


def test_who_is_revoked_is_disconnected_before_long_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger of a fleet and the broker that `serve` starts; a second process revokes."""
    monkeypatch.setattr(gate, "RECHECK_S", 1.0)
    init(tmp_path, name=REALM, labels=["no", "yes"])
    fleet = Fleet(tmp_path)
    secrets = {name: fleet.enroll(name, tmp_path / f"{name}.toml").secret for name in ("dev-a", "dev-b")}
    with (
        EmbeddedBroker(HOST, 0, REALM, fleet.lookup()) as broker,
        logged_in(broker.port, COORDINATOR, fleet.secret()) as coordinator,
        logged_in(broker.port, "dev-a", secrets["dev-a"], will=(f"{UP_A}/st", b"gone", True)) as revoked,
        logged_in(broker.port, "dev-b", secrets["dev-b"]) as other,
    ):
        coordinator.subscribe(f"{UP_A}/st")
        Fleet(tmp_path).ledger.revoke("dev-a")
        assert revoked.hung_up()
        assert coordinator.message() == (f"{UP_A}/st", b"gone", False)
        assert other.ping() and coordinator.ping()


def test_who_got_a_new_secret_is_disconnected_where_it_logged_in_with_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "RECHECK_S", 1.0)
    init(tmp_path, name=REALM, labels=["no", "yes"])
    fleet = Fleet(tmp_path)
    secrets = {name: fleet.enroll(name, tmp_path / f"{name}.toml").secret for name in ("dev-a", "dev-b")}
    with (
        EmbeddedBroker(HOST, 0, REALM, fleet.lookup()) as broker,
        logged_in(broker.port, "dev-a", secrets["dev-a"]) as stolen,
        logged_in(broker.port, "dev-b", secrets["dev-b"]) as other,
    ):
        renewed = Fleet(tmp_path).enroll("dev-a", tmp_path / "dev-a.toml", renew=True).secret
        assert stolen.hung_up()
        with logged_in(broker.port, "dev-a", renewed) as device:
            time.sleep(2.5)
            assert device.ping() and other.ping()


def test_a_lookup_that_fails_disconnects_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "RECHECK_S", 1.0)
    broken = threading.Event()

    def lookup(user: str) -> str | None:
        if broken.is_set():
            raise RuntimeError("the database is gone")
        return HASHED.get(user)

    with EmbeddedBroker(HOST, 0, REALM, lookup) as broker, logged_in(broker.port, "dev-a", "sa") as client:
        broken.set()
        time.sleep(2.5)
        assert client.ping()


def test_a_child_broker_ends_on_sigterm(kind: str, start: Start) -> None:
    broker = start()
    os.kill(broker.pid, signal.SIGTERM)
    with pytest.raises(ConnectionError):
        for _ in range(100):
            RawClient(broker.port).socket.close()
            time.sleep(0.05)
