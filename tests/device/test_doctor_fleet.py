"""What `doctor` says of the way to the fleet: real files and certificates, real sockets, a transport that answers at will."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.credentials import Credentials
from edge_runtime.store import lock_folder
from edge_runtime.system import doctor_fleet as fleet
from edge_runtime.transport import Connected, Disconnected, Event, Message
from edge_runtime.wire import Coordinator, Missing, Need, decode, encode

WHO = Credentials("farm", "pi", "secret", "127.0.0.1", 1883)
DAY_S = 86400.0


@pytest.mark.parametrize(
    ("mode", "verdict"), [(0o600, "ok"), (0o400, "ok"), (0o640, "wrong"), (0o604, "wrong"), (0o660, "wrong")]
)
def test_credentials_that_others_may_use_are_found(tmp_path: Path, mode: int, verdict: str) -> None:
    path = tmp_path / "pi.toml"
    path.touch()
    path.chmod(mode)
    found = fleet.credentials(path)
    assert found.verdict == verdict and f"mode {mode:04o}" in found.found
    assert (f"chmod 600 {path}" in found.advice) == (verdict == "wrong")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Valid for 40 days, for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    cert, key = (tmp_path_factory.mktemp("tls") / name for name in ("cert.pem", "key.pem"))
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 40 -subj /CN=hub"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def tls_port(certificate: tuple[Path, Path]) -> Iterator[int]:
    """A server that shakes hands and hangs up."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    client = server.accept()[0]
                except OSError:
                    return
                try:
                    context.wrap_socket(client, server_side=True).close()
                except OSError:
                    client.close()

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_a_certificate_is_told_before_it_ends(certificate: tuple[Path, Path], tls_port: int) -> None:
    reached = fleet.reach("127.0.0.1", tls_port, str(certificate[0]))
    assert reached.problem == "" and reached.not_after_s == pytest.approx(time.time() + 40 * DAY_S, abs=600)
    for days, verdict in ((0, "ok"), (20, "warning"), (41, "wrong")):
        now_s = time.time() + days * DAY_S
        assert fleet.certificate(reached, "hub.lan", now_s).verdict == verdict
        assert fleet.authority(certificate[0], now_s).verdict == verdict


def test_a_certificate_for_another_name_or_of_another_authority_is_refused_with_the_reason(
    certificate: tuple[Path, Path], tls_port: int
) -> None:
    named = fleet.reach("localhost", tls_port, str(certificate[0]))
    assert "its certificate is refused: Hostname mismatch" in named.problem
    bundled = ssl.get_default_verify_paths().cafile
    if bundled:
        assert "self-signed" in fleet.reach("127.0.0.1", tls_port, bundled).problem
    assert fleet.broker(named, WHO).verdict == "wrong" and named.advice


def test_an_authority_that_is_missing_or_none_is_found(tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("not a certificate")
    for name in ("missing.pem", "none.pem"):
        assert fleet.authority(tmp_path / name, time.time()).verdict == "wrong"
        assert "cannot be used" in fleet.reach("127.0.0.1", 9, str(tmp_path / name)).problem


def test_a_broker_that_does_not_answer_has_no_name_or_no_tls_is_told_apart(certificate: tuple[Path, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert fleet.reach("127.0.0.1", port, "") == fleet.Reached()
        server.accept()[0].close()
        threading.Thread(target=lambda: server.accept()[0].sendall(b"no tls here"), daemon=True).start()
        assert "no TLS comes about" in fleet.reach("127.0.0.1", port, str(certificate[0])).problem
        silent = fleet.reach("127.0.0.1", port, str(certificate[0]), timeout_s=0.2)
        assert "no TLS comes about: _ssl" in silent.problem and "timed out" in silent.problem
    assert fleet.reach("127.0.0.1", port, "").problem == "Connection refused"
    assert "the name is not known" in fleet.reach("no-such-host.invalid", 1, "").problem


def test_no_tls_beyond_this_machine_is_a_warning() -> None:
    assert fleet.certificate(fleet.Reached(), "127.0.0.1", 0).verdict == "ok"
    assert fleet.certificate(fleet.Reached(), "hub.lan", 0).verdict == "warning"


class Answering:
    """A transport whose other end behaves as told: what it says at first, and its clock, where it answers at all."""

    def __init__(self, *first: Event, ahead_s: float | None = None) -> None:
        self.inbox, self.ahead_s, self.stopped = list(first), ahead_s, False

    def start(self) -> None: ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        body = decode(payload, "need").body
        assert topic == "fl/1/farm/d/pi/up/need" and isinstance(body, Need)
        if self.ahead_s is not None:
            stale = encode(Missing(bytes(32)), sent_at=1.0, boot=bytes(8), sequence=1)
            sent_at = time.time() + self.ahead_s
            fresh = encode(Missing(body.ranges[0].blob), sent_at=sent_at, boot=bytes(8), sequence=2)
            self.inbox += [Message("fl/1/farm/d/pi/dn/missing", data) for data in (b"\xc1", stale, fresh)]

    def next_event(self, timeout_s: float) -> Event | None:
        return self.inbox.pop(0) if self.inbox else None

    def in_flight(self) -> int:
        return 0

    def stop(self) -> None:
        self.stopped = True


def ask(*first: Event, ahead_s: float | None = None) -> fleet.Answer:
    """The answer of such a fleet, and that the connection was given up."""
    transport = Answering(*first, ahead_s=ahead_s)
    answer = fleet.ask(transport, WHO, timeout_s=0.2)
    assert transport.stopped
    return answer


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "named"),
    [(0.0, "ok", ""), (-4.0, "ok", "4.0 s before"), (30.0, "warning", "30.0 s behind"), (-3600.0, "wrong", "before")],
)
def test_the_coordinators_clock_is_compared_with_ours(ahead_s: float, verdict: str, named: str) -> None:
    answer = ask(Connected(), ahead_s=ahead_s)
    assert fleet.coordinator(answer).verdict == fleet.login(answer).verdict == "ok"
    found = fleet.skew(answer)
    assert found.verdict == verdict and named in found.found


def test_a_slow_answer_leaves_room_for_its_way() -> None:
    assert fleet.skew(fleet.Answer(True, "", "up", 6.0, 3.0)).verdict == "ok"
    assert fleet.skew(fleet.Answer(True, "", "up", 6.0, 0.1)).verdict == "warning"


@pytest.mark.parametrize(
    ("events", "login", "coordinator", "named"),
    [
        ([Disconnected("Not authorized", refused=True)], "wrong", "unknown", ""),
        ([Disconnected("lost")], "wrong", "unknown", ""),
        ([Connected()], "ok", "wrong", "the broker has never heard of one"),
        (["down", Connected()], "ok", "wrong", "it has stopped"),
        ([Connected(), "up"], "ok", "wrong", "it is silent"),
    ],
)
def test_a_fleet_that_does_not_answer_is_found(
    events: list[Event | str], login: str, coordinator: str, named: str
) -> None:
    def said(state: str) -> Message:
        data = encode(Coordinator(state, 1, "0.1.0"), sent_at=1.0, boot=bytes(8), sequence=1)
        return Message("fl/1/farm/all/coord", data)

    answer = ask(*(said(event) if isinstance(event, str) else event for event in events))
    assert (fleet.login(answer).verdict, fleet.coordinator(answer).verdict) == (login, coordinator)
    assert named in fleet.coordinator(answer).found and fleet.skew(answer).verdict == "unknown"


def test_an_agent_that_runs_keeps_its_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, lock_folder(tmp_path / "state", "an agent"):
        who = replace(WHO, port=server.getsockname()[1])
        *_, last = fleet.examine(who, tmp_path / "state")
        assert (last.check, last.verdict) == ("coordinator", "unknown") and "is running" in last.found
        server.settimeout(0.1)
        server.accept()[0].close()  # to see whether it answers
        with pytest.raises(TimeoutError):
            server.accept()
