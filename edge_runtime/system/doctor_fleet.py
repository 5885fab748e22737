"""What `edge-runtime doctor` checks of the way to the fleet: credentials, certificates, broker, coordinator, its clock.

What was seen is one record, what it means another function, so that each can be tested alone. The coordinator's clock is
told by a question that changes nothing: a device asks for a blob that nobody has, and the answer bears the time.
Imports transport and wire; the order of all checks is `doctor.py`'s.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.credentials import Credentials
from edge_runtime.errors import ConnectionFailed, WireError
from edge_runtime.store import is_locked
from edge_runtime.system.doctor import OK, UNKNOWN, WARNING, WRONG, Finding
from edge_runtime.topics import Topics
from edge_runtime.transport import Connected, Disconnected, Message, MqttTransport, Transport
from edge_runtime.wire import BlobRange, Coordinator, Missing, Need, decode, encode

CONNECT_S, ANSWER_S = 5.0, 10.0
SOON_S = 30 * 86400.0  # a certificate's end is near
SKEW_S, MOST_SKEW_S = 5.0, 60.0
RENEW = "ask for new credentials with `edge-coordinator enroll --renew`"


@dataclass(frozen=True)
class Reached:
    """How a connection to the broker went, without MQTT.

    Attributes:
        problem: what went wrong; empty if nothing did.
        not_after_s: the end of the broker's certificate in Unix seconds; None without TLS.
    """

    problem: str = ""
    advice: str = ""
    not_after_s: float | None = None


@dataclass(frozen=True)
class Answer:
    """What the broker and the coordinator said.

    Attributes:
        refused: why the broker refuses us.
        coordinator: up or down, as the broker remembers it; empty: it knows of none.
        skew_s: the coordinator's clock less ours, within half a round trip, `within_s`; None: it did not answer.
    """

    connected: bool = False
    refused: str = ""
    coordinator: str = ""
    skew_s: float | None = None
    within_s: float = 0.0


def examine(who: Credentials, state: Path) -> Iterator[Finding]:
    """The checks after that of the file itself."""
    if who.ca_file:
        yield authority(Path(who.ca_file), time.time())
    reached = reach(who.host, who.port, who.ca_file)
    yield broker(reached, who)
    if reached.problem:
        return
    yield certificate(reached, who.host, time.time())
    if busy := _busy(state):
        yield Finding("coordinator", UNKNOWN, f"not asked: {busy}")
        return
    filters = Topics(who.realm).device_filters(who.device)
    ca_file = Path(who.ca_file) if who.ca_file else None
    transport = MqttTransport(who.host, who.port, who.device, who.secret, filters, ca_file=ca_file)
    answer = ask(transport, who)
    yield login(answer)
    yield coordinator(answer)
    yield skew(answer)


def _busy(state: Path) -> str:
    """Why the device's one connection must be left alone: the broker would end the agent's for a second one."""
    try:
        state.stat()
        (state / ".lock").stat()
    except PermissionError:
        return f"{state} is another user's, whose agent may be connected: run this with sudo"
    except OSError:
        return ""
    return f"the agent of {state} is running, and a device connects once: stop it to have this checked" * is_locked(
        state
    )


def credentials(path: Path) -> Finding:
    """Whether the device's file is its owner's alone."""
    mode = stat.S_IMODE(path.stat().st_mode)
    found = f"{path}, mode {mode:04o}"
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        advice = f"others may use it, and whoever reads it is this device: chmod 600 {path}; if others had it, {RENEW}"
        return Finding("credentials", WRONG, found, advice)
    return Finding("credentials", OK, found)


def authority(ca_file: Path, now_s: float) -> Finding:
    """Whether the file of the certificate authority can be read and when it ends."""
    check = "authority"
    try:
        context = ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        advice = "copy the CA's certificate (PEM) from the coordinator's machine, and correct ca_file"
        return Finding(check, WRONG, f"{ca_file} cannot be used: {error}", advice)
    ends = [_seconds(found.get("notAfter")) for found in context.get_ca_certs()]
    if not ends:
        return Finding(check, UNKNOWN, f"{ca_file} names no authority whose end can be read")
    return _until(check, str(ca_file), min(ends), now_s, "make a new one, and copy it to every device")


def broker(reached: Reached, who: Credentials) -> Finding:
    """Whether the broker's address answers."""
    found = f"{who.host}:{who.port}"
    if reached.problem:
        return Finding("broker", WRONG, f"{found}: {reached.problem}", reached.advice)
    return Finding("broker", OK, f"{found} answers")


def certificate(reached: Reached, host: str, now_s: float) -> Finding:
    """When the broker's certificate ends, which was valid just now; or that there is none."""
    check = "certificate"
    if reached.not_after_s is not None:
        renew = "renew [broker] certfile on the coordinator's machine, and restart the broker"
        return _until(check, "the broker's", reached.not_after_s, now_s, renew)
    if _is_local(host):
        return Finding(check, OK, "no TLS, on this machine alone")
    return Finding(check, WARNING, "no TLS: secret and models travel in clear", "docs/operations.md, Brokers, TLS")


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _until(check: str, what: str, ends_s: float, now_s: float, advice: str) -> Finding:
    """A certificate's end."""
    days = (ends_s - now_s) / 86400
    when = time.strftime("%Y-%m-%d", time.gmtime(ends_s))
    if days < 0:
        return Finding(check, WRONG, f"{what} ended {when}", advice)
    near = days * 86400 < SOON_S
    found = f"{what} is valid until {when}, {days:.0f} days"
    return Finding(check, WARNING if near else OK, found, advice if near else "")


def login(answer: Answer) -> Finding:
    """Whether the broker takes our credentials."""
    if answer.refused:
        return Finding("login", WRONG, f"the broker refuses this device: {answer.refused}", RENEW)
    if not answer.connected:
        advice = "it may speak TLS, then set ca_file, or be no MQTT broker: correct host and port"
        return Finding("login", WRONG, "something listens there, and no MQTT login comes about", advice)
    return Finding("login", OK, "the broker takes the device's credentials")


def coordinator(answer: Answer) -> Finding:
    """Whether the coordinator is there."""
    check = "coordinator"
    if answer.skew_s is not None:
        return Finding(check, OK, "answers")
    if not answer.connected:
        return Finding(check, UNKNOWN, "not asked")
    said = {"": "the broker has never heard of one", "down": "it has stopped"}.get(answer.coordinator, "it is silent")
    advice = (
        "start `edge-coordinator serve`; meanwhile a device waits. It is silent towards a device that was revoked, too"
    )
    return Finding(check, WRONG, f"does not answer: {said}", advice)


def skew(answer: Answer) -> Finding:
    """How far the coordinator's clock is from ours."""
    check = "clock skew"
    if answer.skew_s is None:
        return Finding(check, UNKNOWN, "the coordinator did not say its time")
    size = abs(answer.skew_s)
    found = f"{size:.1f} s {'behind' if answer.skew_s > 0 else 'before'} the coordinator, give or take {answer.within_s:.1f}"
    if size <= SKEW_S + answer.within_s:
        return Finding(check, OK, found)
    advice = "synchronise both clocks (timedatectl set-ntp true): certificates have a first and a last day, and logs tell times"
    return Finding(check, WARNING if size <= MOST_SKEW_S else WRONG, found, advice)


# probes


def reach(host: str, port: int, ca_file: str, timeout_s: float = CONNECT_S) -> Reached:
    """Connect, and shake hands where there is TLS."""
    context = None
    try:
        context = ssl.create_default_context(cafile=ca_file) if ca_file else None
    except OSError:
        return Reached(f"not asked, {ca_file} cannot be used", "put the authority's file right first")
    try:
        with socket.create_connection((host, port), timeout_s) as carrier:
            return _shake_hands(context, carrier, host) if context else Reached()
    except socket.gaierror as error:
        return Reached(f"the name is not known ({error.strerror})", "look at DNS, or write the address as host")
    except OSError as error:
        advice = "look at the network, and at host and port in the device's file; is the broker running?"
        return Reached(str(error.strerror or error), advice)


def _shake_hands(context: ssl.SSLContext, carrier: socket.socket, host: str) -> Reached:
    try:
        with context.wrap_socket(carrier, server_hostname=host) as secure:
            return Reached(not_after_s=_seconds((secure.getpeercert() or {}).get("notAfter")))
    except ssl.SSLCertVerificationError as error:
        advice = (
            "the certificate must be of this ca_file, for this host, and of this day: look at each, and at the clock"
        )
        return Reached(f"its certificate is refused: {error.verify_message}", advice)
    except OSError as error:  # it says something else, hangs up, or waits for us to speak MQTT
        reason = getattr(error, "reason", None) or error
        return Reached(f"no TLS comes about: {reason}", "the broker may have none: see [broker] certfile there")


def _seconds(when: object) -> float:
    return float(ssl.cert_time_to_seconds(str(when)))


def ask(
    transport: Transport, who: Credentials, *, timeout_s: float = ANSWER_S, clock: Callable[[], float] = time.time
) -> Answer:
    """Log in as the device and ask the coordinator for a blob that nobody has: its answer bears its time."""
    topics, blob, asked_s = Topics(who.realm), os.urandom(32), 0.0
    answer, end = Answer(), time.monotonic() + timeout_s
    try:
        transport.start()
        while time.monotonic() < end and answer.skew_s is None and not answer.refused:
            event = transport.next_event(0.1)
            if isinstance(event, Disconnected) and event.refused:
                answer = Answer(refused=event.reason)
            elif isinstance(event, Connected):
                answer, asked_s = Answer(connected=True, coordinator=answer.coordinator), clock()
                need = encode(Need((BlobRange(blob, 0, 1),)), sent_at=asked_s, boot=os.urandom(8), sequence=1)
                transport.publish(topics.up(who.device, "need"), need)
            elif isinstance(event, Message):
                answer = _read(event, topics.kind(event.topic), blob, asked_s, clock(), answer)
    except ConnectionFailed as error:
        return Answer(refused=str(error))
    finally:
        transport.stop()
    return answer


def _read(message: Message, kind: str, blob: bytes, asked_s: float, now_s: float, before: Answer) -> Answer:
    """What one message adds to an answer; nothing, if it is of another kind or cannot be read."""
    if kind not in ("coord", "missing") or not message.payload:
        return before
    try:
        envelope = decode(message.payload, kind)
    except WireError:
        return before
    if isinstance(envelope.body, Coordinator):
        return Answer(before.connected, coordinator=envelope.body.state)
    if not isinstance(envelope.body, Missing) or envelope.body.blob != blob:
        return before
    half_s = max(0.0, now_s - asked_s) / 2
    return Answer(before.connected, "", before.coordinator, envelope.sent_at - asked_s - half_s, half_s)
