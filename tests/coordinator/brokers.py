"""Real brokers for tests, each a process of its own that can be killed, and a client that can misbehave.

`start_broker` is for end-to-end tests too. Run as a program it is the amqtt kind's process. Imports edge_coordinator.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_coordinator.broker import EmbeddedBroker, run
from edge_coordinator.mosquitto import MosquittoProcess, find_mosquitto, write_config, write_passwords
from edge_coordinator.secrets import hash_secret
from edge_runtime.errors import UsageError
from edge_runtime.transport import MAX_MESSAGE_BYTES

HOST = "127.0.0.1"
Received = tuple[str, bytes, bool]  # topic, payload, retained


def broker_kinds() -> list[str]:
    """The kinds that this machine can run: "amqtt", and "mosquitto" where its program is installed."""
    return ["amqtt"] + (["mosquitto"] if find_mosquitto() else [])


class RunningBroker:
    """A broker in a child process. `host` and `port` stay the same across `restart`."""

    def __init__(self, kind: str, folder: Path, port: int, config: dict[str, Any]) -> None:
        self.kind = kind
        self.host = HOST
        self.port = port
        self.folder = folder
        self._config = config
        self._users: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None
        self._mosquitto = MosquittoProcess(folder)

    @property
    def pid(self) -> int:
        """Process id, for /proc and signals."""
        pid = self._mosquitto.pid if self._process is None else self._process.pid
        assert pid is not None
        return pid

    def set_users(self, users: dict[str, str]) -> None:
        """Enrols and revokes without a restart. Args: secrets by user name."""
        kept = {user: secret for user, secret in self._users.items() if users.get(user) == secret}
        self._users = {user: kept.get(user) or hash_secret(secret) for user, secret in users.items()}
        temporary = self.folder / "users.tmp"
        temporary.write_text(json.dumps(self._users))
        temporary.replace(self.folder / "users.json")
        if self._mosquitto.running:
            write_passwords(self.folder, self._users.items())
            self._mosquitto.reload()
            time.sleep(0.2)  # Mosquitto says nothing when it has read the file

    def start(self) -> None:
        """Starts it on `port`; 0 picks a free one."""
        if self.kind == "amqtt":
            self._start_amqtt()
            return
        for attempt in range(5):
            port = self.port or free_port()
            write_config(self.folder, users=self._users.items(), port=port, **self._config)
            try:
                self._mosquitto.start()
            except UsageError:
                if self.port or attempt == 4:
                    raise
            else:
                self.port = port
                return

    def stop(self) -> None:
        """Ends it in good order; may be called twice."""
        self._mosquitto.stop()
        if self._process is not None:
            self._process.terminate()
            self._reap()

    def kill(self) -> None:
        """SIGKILL."""
        self._mosquitto.kill()
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self) -> None:
        """Kills it where it runs and starts it again on the same port, with nothing left of what it held."""
        self.kill()
        self.start()

    def output(self) -> str:
        """What the amqtt kind's process has printed."""
        return (self.folder / "output.log").read_text()

    def _start_amqtt(self) -> None:
        config = {"port": self.port, **{name: str(value) for name, value in self._config.items()}}
        (self.folder / "config.json").write_text(json.dumps(config))
        with (self.folder / "output.log").open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder)],
                stdin=subprocess.PIPE,  # the child ends when this process does
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip().isdigit():
            self.kill()
            raise UsageError(f"the broker did not start: {self.output()}")
        self.port = int(line)

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait(20)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process = None


def start_broker(
    kind: str, realm: str, users: dict[str, str], folder: Path, port: int = 0, **options: Any
) -> RunningBroker:
    """Starts a broker and returns it once clients can connect.

    Args:
        kind: one of `broker_kinds()`.
        users: secrets by user name, "coordinator" among them.
        folder: an empty one of its own.
        port: 0 picks a free one.
        options: max_message_bytes, max_connections, certfile, keyfile, as in both kinds' own constructors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    broker = RunningBroker(kind, folder, port, {"realm": realm, **options})
    broker.set_users(users)
    broker.start()
    return broker


class RawClient:
    """An MQTT 3.1.1 client as a bare socket: nothing that it is told to send is corrected."""

    def __init__(self, port: int, timeout_s: float = 5.0) -> None:
        self.socket = socket.create_connection((HOST, port), timeout_s)
        self._packet_id = 0
        self._kept: list[Received] = []

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, first: int, body: bytes = b"") -> None:
        """Sends one packet, or the part of it that the broker still wants to have."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(packet(first, body))

    def log_in(self, user: str, secret: str, **changes: Any) -> int | None:
        """The CONNACK's return code; None when the broker hung up instead. Changes: as in `connect_packet`."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(connect_packet(user, secret, **changes))
        answer = self.receive()
        return None if answer is None else answer[1][1]

    def publish(self, topic: str, payload: bytes = b"", qos: int = 0, *, retain: bool = False) -> int:
        """Sends without waiting; the packet id."""
        self._packet_id = self._packet_id % 65535 + 1
        packet_id = self._packet_id.to_bytes(2, "big") if qos else b""
        self.send(0x30 | qos << 1 | retain, text(topic) + packet_id + payload)
        return self._packet_id

    def subscribe(self, *filters: str, qos: int = 1) -> list[int]:
        """Asks and waits for the SUBACK's codes; 0x80 is no."""
        body = b"\0\7" + b"".join(text(one) + bytes((qos,)) for one in filters)
        self.send(0x82, body)
        while (answer := self.receive()) is not None:
            if answer[0] == 0x90:
                return list(answer[1][2:])
            self._keep(*answer)
        raise AssertionError("disconnected instead of SUBACK")

    def ping(self) -> bool:
        """Whether the broker still answers, after everything sent before."""
        self.send(0xC0)
        while (answer := self.receive()) is not None:
            if answer[0] == 0xD0:
                return True
            self._keep(*answer)
        return False

    def message(self, timeout_s: float = 5.0) -> Received:
        """The next message, acknowledged. Raises TimeoutError when none comes."""
        while not self._kept:
            answer = self.receive(timeout_s)
            assert answer is not None, "disconnected"
            self._keep(*answer)
        return self._kept.pop(0)

    def messages_until(self, topic: str) -> list[str]:
        """Topics of all messages before one on `topic`."""
        seen: list[str] = []
        while (got := self.message()[0]) != topic:
            seen.append(got)
        return seen

    def receive(self, timeout_s: float = 5.0) -> tuple[int, bytes] | None:
        """The next packet's first byte and body; None when the broker closed the connection."""
        self.socket.settimeout(timeout_s)
        try:
            first, length, shift = self._exactly(1)[0], 0, 0
            while True:
                byte = self._exactly(1)[0]
                length |= (byte & 0x7F) << shift
                shift += 7
                if not byte & 0x80:
                    return first, self._exactly(length)
        except (ConnectionError, EOFError):
            return None

    def hung_up(self, timeout_s: float = 5.0) -> bool:
        """Whether the broker closes the connection in time, whatever it sends before."""
        try:
            while self.receive(timeout_s) is not None:
                pass
        except TimeoutError:
            return False
        return True

    def _keep(self, first: int, body: bytes) -> None:
        if first >> 4 == 3:
            end = 2 + int.from_bytes(body[:2], "big")
            qos = first >> 1 & 3
            if qos:
                self.send(0x40 if qos == 1 else 0x50, body[end : end + 2])
            self._kept.append((body[2:end].decode(), body[end + 2 * bool(qos) :], bool(first & 1)))
        elif first >> 4 == 5:  # PUBREC of ours
            self.send(0x62, body)
        elif first >> 4 == 6:  # PUBREL of theirs
            self.send(0x70, body)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return data


def connect_packet(
    user: str | None,
    secret: str | None,
    *,
    client_id: str | None = None,
    will: tuple[str, bytes, bool] | None = None,
    keepalive_s: int = 60,
    clean: bool = True,
    level: int = 4,
) -> bytes:
    """A CONNECT. Args: client_id: None is the user name; will: topic, payload, retained."""
    flags = clean << 1 | (user is not None) << 7 | (secret is not None) << 6
    fields = text(client_id if client_id is not None else user or "")
    if will is not None:
        flags |= 0x0C | will[2] << 5  # QoS 1
        fields += text(will[0]) + len(will[1]).to_bytes(2, "big") + will[1]
    fields += b"".join(text(part) for part in (user, secret) if part is not None)
    return packet(0x10, text("MQTT") + bytes((level, flags)) + keepalive_s.to_bytes(2, "big") + fields)


def packet(first: int, body: bytes) -> bytes:
    """Any packet: first byte, length, body."""
    head, length = b"", len(body)
    while not head or length:
        head += bytes((length & 0x7F | (0x80 if length > 0x7F else 0),))
        length >>= 7
    return bytes((first,)) + head + body


def text(value: str) -> bytes:
    """An MQTT string."""
    encoded = value.encode()
    return len(encoded).to_bytes(2, "big") + encoded


@contextlib.contextmanager
def logged_in(port: int, user: str, secret: str, **changes: Any) -> Iterator[RawClient]:
    """A client that the broker has accepted."""
    with RawClient(port) as client:
        assert client.log_in(user, secret, **changes) == 0
        yield client


def free_port() -> int:
    """A port that nobody listens on, for now."""
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _serve(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def lookup(user: str) -> str | None:
        users: dict[str, str] = json.loads((folder / "users.json").read_text())
        return users.get(user)

    def watch_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()
    broker = EmbeddedBroker(
        HOST,
        config["port"],
        config["realm"],
        lookup,
        int(config.get("max_message_bytes", MAX_MESSAGE_BYTES)),
        max_connections=int(config.get("max_connections", 1024)),
        certfile=Path(config["certfile"]) if "certfile" in config else None,
        keyfile=Path(config["keyfile"]) if "keyfile" in config else None,
    )
    run(broker, on_ready=lambda: print(broker.port, flush=True))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
