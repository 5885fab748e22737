"""A broker inside this process: amqtt behind a gate of our own, for a fleet of up to about 200 devices.

Not a general MQTT broker: MQTT 3.1.1 over TCP or TLS, one realm, no anonymous clients, no `$SYS`, no sessions that
outlive a connection. For more devices or bytes see `mosquitto.py`, which keeps the same rules.

Here are the broker's thread, its listening socket and its end; what is said on a connection is for `gate.py`. Imports
`gate` and `edge_runtime`. The command line and tests import it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_coordinator.gate import Gate, Lookup
from edge_runtime.console import until_told_to_stop
from edge_runtime.errors import ConnectionFailed, UsageError
from edge_runtime.topics import check_id
from edge_runtime.transport import MAX_MESSAGE_BYTES

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
                thread at each log-in, and again every 10 seconds for each client, which is disconnected if it is another
                or None by then; has to return within milliseconds.
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
        self._gate = Gate(realm, lookup, max_message_bytes, max_connections)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event

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
        tls = _tls_context(self._certfile, self._keyfile)
        listener = _listen(self.host, self.port)
        self.port = listener.getsockname()[1]
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        work = self._main(listener, tls, ready)
        self._thread = threading.Thread(target=asyncio.run, args=(work,), name="edge-broker", daemon=True)
        self._thread.start()
        failure = ready.exception()
        if failure is not None:
            self._thread.join()
            self._thread = None
            raise failure

    def stop(self) -> None:
        """Disconnects everyone and ends the thread; may be called twice, or before `start`."""
        thread = self._thread
        if thread is not None:
            self._tell(self._stopping.set)
            thread.join()
            self._thread = None

    def drop(self, user: str) -> None:
        """Disconnects a user, for one whose secret was just revoked. Any thread may call it."""
        self._tell(self._gate.drop, user)

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _tell(self, what: Callable[..., None], *arguments: str) -> None:
        if self.running and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(what, *arguments)

    async def _main(
        self, listener: socket.socket, tls: ssl.SSLContext | None, ready: concurrent.futures.Future[None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_loop_error)
        self._stopping = asyncio.Event()
        try:
            await self._gate.open(listener, tls)
        except BaseException as error:
            listener.close()
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            await self._stopping.wait()
        finally:
            await self._gate.close()


def run(broker: EmbeddedBroker, on_ready: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM, for a process that is nothing but a broker; main thread only.

    Args:
        broker: one that does not run yet.
        on_ready: called once it listens and `broker.port` is known.

    Raises:
        UsageError, MissingExtra: as `EmbeddedBroker.start`.
        ConnectionFailed: the broker's thread ended by itself.
    """
    with until_told_to_stop() as keep_going, broker:
        on_ready()
        while keep_going():
            if not broker.running:
                raise ConnectionFailed("the broker ended by itself: the traceback above says why, start it again")
            time.sleep(0.2)


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


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.debug("%s: %r", context.get("message"), context.get("exception"))
