"""A small HTTP/1.1 server: reads bounded requests, hands them to one function, writes its answers, stops without dropping any.

Its bytes come from anybody: what is not a plain request with a length is refused before it is read, and a client that is
slow loses its connection and no one else's. Not which paths there are (`http_api.py`). No TLS, no chunked bodies, no
HTTP/2: a proxy does that. Standard library only (RFC 9112); not its http.server, where each connection costs a thread and
a client that sends a byte now and then is never too slow.

Memory: of each connection one request (`Limits.head_bytes` and `body_bytes`) and one answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (/[\x21-\x7e]{0,2000}) HTTP/1\.([01])\Z")
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*\Z")
ONCE = {"host", "content-length", "content-type", "transfer-encoding"}
MAX_HEADERS = 64
LINGER_S, LINGER_BYTES = 2.0, 8 << 20  # so that a client which is still sending reads why it was refused
END = b"\r\n\r\n"


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    connections: int = 128
    head_bytes: int = 16 << 10
    body_bytes: int = 1 << 20
    idle_s: float = 60.0  # until a request begins
    read_s: float = 20.0  # for all of a head, and for all of a body
    write_s: float = 20.0  # for all of an answer
    drain_s: float = 30.0  # for requests that are under way when the server stops


@dataclass(frozen=True)
class Request:
    """One request; headers in lower case."""

    method: str
    path: str  # without what follows a question mark
    headers: Mapping[str, str]
    body: bytes = b""
    keep_alive: bool = True


@dataclass(frozen=True)
class Response:
    """One answer."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpError(Exception):
    """A request that is refused, and why."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        """What the client reads."""
        return Response(
            to_json({"error": {"status": self.status, "message": self.message}}), self.status, headers=self.headers
        )


Handle = Callable[[Request], Awaitable[Response]]
Failed = Callable[[str, Exception], None]  # path and what no handler should raise
Observe = Callable[[str, int, float], None]  # path ("" where it could not be read), status, seconds


def to_json(value: Any) -> bytes:
    """JSON with a line end."""
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def parse_head(head: bytes) -> Request:
    """The request line and the headers, without the empty line that ends them.

    Raises:
        HttpError: it is no request that this server takes.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    matched = REQUEST_LINE.match(first)
    if matched is None:
        raise HttpError(400, "the first line is not METHOD /PATH HTTP/1.1")
    if len(lines) > MAX_HEADERS:
        raise HttpError(431, f"more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        header = HEADER.match(line)
        if header is None:
            raise HttpError(400, "a line of the head is not NAME: VALUE")
        name = header[1].lower()
        if name in headers and name in ONCE:
            raise HttpError(400, f"the header {name} comes twice")
        headers[name] = header[2]
    if matched[3] == "1" and "host" not in headers:
        raise HttpError(400, "the header Host is missing")
    closes = "close" in headers.get("connection", "").lower() or matched[3] == "0"
    return Request(matched[1], matched[2].partition("?")[0], headers, keep_alive=not closes)


def body_length(request: Request, most: int) -> int:
    """Bytes of the body that follows.

    Raises:
        HttpError: it has no length, or too much.
    """
    if "transfer-encoding" in request.headers:
        raise HttpError(411, "chunked bodies are not taken: send Content-Length")
    length = request.headers.get("content-length")
    if length is None:
        if request.method in ("POST", "PUT", "PATCH"):
            raise HttpError(411, "Content-Length is missing")
        return 0
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise HttpError(400, "Content-Length is not a number of bytes")
    if int(length) > most:
        raise HttpError(413, f"the body has {int(length)} bytes, the limit is {most}")
    return int(length)


class HttpServer:
    """Serves until `stop`."""

    def __init__(self, handle: Handle, limits: Limits, observe: Observe, failed: Failed) -> None:
        self._handle, self._limits, self._observe, self._failed = handle, limits, observe, failed
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()
        self._idle: set[asyncio.Task[Any]] = set()  # those of them that wait for a request to begin
        self._stopping = False

    @property
    def num_connections(self) -> int:
        """Open now."""
        return len(self._connections)

    async def start(self, host: str, port: int) -> int:
        """Listen; -> the port. Raises OSError where that cannot be."""
        self._server = await asyncio.start_server(self._connected, host, port, limit=self._limits.head_bytes)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Take no more requests, and end when those that have begun are answered, at most after `Limits.drain_s`."""
        self._stopping = True
        if self._server:
            self._server.close()
        for task in self._idle:
            task.cancel()
        if self._connections:
            _, late = await asyncio.wait(self._connections, timeout=self._limits.drain_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=LINGER_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task, "asyncio calls this in a task of its own"
        full = len(self._connections) >= self._limits.connections
        self._connections.add(task)
        try:
            if full:
                await self._refuse(
                    HttpError(503, "too many connections", Retry_After="1"), reader, writer, linger=False
                )
            else:
                while await self._exchange(task, reader, writer):
                    pass
        except (OSError, EOFError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # the client is gone or too slow, or we stop: nobody is left to tell
        finally:
            self._connections.discard(task)
            self._idle.discard(task)
            await _close(writer)

    async def _exchange(
        self, task: asyncio.Task[Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """One request and its answer; -> whether the connection goes on."""
        if self._stopping:
            return False
        self._idle.add(task)
        first = await asyncio.wait_for(reader.read(1), self._limits.idle_s)
        self._idle.discard(task)
        if not first:
            return False
        try:
            request = await self._read(first, reader, writer)
        except HttpError as error:
            await self._refuse(error, reader, writer)
            return False
        started = time.monotonic()
        response = await self._answer(request)
        keep = request.keep_alive and not self._stopping
        self._observe(request.path, response.status, time.monotonic() - started)
        await self._write(writer, response, keep=keep, bodiless=request.method == "HEAD")
        return keep

    async def _read(self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
        try:
            head = first + await asyncio.wait_for(reader.readuntil(END), self._limits.read_s)
            request = parse_head(head[: -len(END)])
            length = body_length(request, self._limits.body_bytes)
            if length and request.headers.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await asyncio.wait_for(reader.readexactly(length), self._limits.read_s)
        except asyncio.LimitOverrunError:
            raise HttpError(431, f"the head has more than {self._limits.head_bytes} bytes") from None
        except asyncio.TimeoutError:
            raise HttpError(408, f"the request did not come within {self._limits.read_s:g} s") from None
        return Request(request.method, request.path, request.headers, body, request.keep_alive)

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._handle(request)
        except HttpError as error:
            return error.response()
        except Exception as error:  # a bug of ours ends one request
            self._failed(request.path, error)
            return HttpError(500, "an error of this server: its log has more").response()

    async def _refuse(
        self, error: HttpError, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, linger: bool = True
    ) -> None:
        self._observe("", error.status, 0.0)
        await self._write(writer, error.response(), keep=False)
        if linger and writer.can_write_eof():
            writer.write_eof()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_discard(reader), LINGER_S)

    async def _write(
        self, writer: asyncio.StreamWriter, response: Response, *, keep: bool, bodiless: bool = False
    ) -> None:
        headers = {
            "content-type": response.content_type,
            "content-length": str(len(response.body)),
            "connection": "keep-alive" if keep else "close",
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            **response.headers,
        }
        lines = [f"HTTP/1.1 {response.status} {http.HTTPStatus(response.status).phrase}"]
        head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items())]).encode() + END
        writer.write(head if bodiless else head + response.body)
        await asyncio.wait_for(writer.drain(), self._limits.write_s)


async def _discard(reader: asyncio.StreamReader) -> None:
    left = LINGER_BYTES
    while left > 0 and (data := await reader.read(1 << 16)):
        left -= len(data)


async def _close(writer: asyncio.StreamWriter) -> None:
    """Send what is left, a moment at most."""
    try:
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), LINGER_S)
    except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
        writer.transport.abort()
