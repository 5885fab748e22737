"""`edge-runtime serve`: many clients during many swaps, a version that fails, clients that are slow or hostile, a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.cli import main
from edge_runtime.errors import ModelError, StoreError
from edge_runtime.manifest import encode_manifest, make_manifest
from edge_runtime.serving.http_api import MAX_TEXTS, Api
from edge_runtime.serving.http_pages import PATHS
from edge_runtime.serving.http_server import (
    HttpError,
    HttpServer,
    Limits,
    Observe,
    Request,
    Response,
    body_length,
    parse_head,
)
from edge_runtime.serving.live_model import MAX_TRIES, LiveModel
from edge_runtime.source import STORE_FOLDER
from edge_runtime.store import BlobStore, is_answered_from
from edge_runtime.versions import VERSIONS_FILE, answering, mark_bad, note_try, read_versions, rollback, take_over, use
from tests.device.test_mapped_network import with_head
from tests.device.test_predict import small_file
from tests.e2e.fleets import CONFIG, LABELS, tiny_model
from tests.e2e.test_full_disk import fill, small_disk

CRASHING = Path(__file__).parents[1] / "e2e" / "crashing.py"
TEXT = "the red river of Paris"


class Device:
    """The state folder of a device whose agent takes over a version when it is told to."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.store = BlobStore(folder / STORE_FOLDER)

    def hold(self, version: int, *, broken: bool = False) -> None:
        """Become whole in a version: a head from its number, or one that is not finite; all else as it was."""
        spec, weights = with_head(self.base, self.folder / ".made", LABELS, seed=version)
        blobs = {name: self.store.put(weights[name].array().tobytes()) for name in weights}
        if broken:
            blobs["classifier.bias"] = self.store.put(np.full(len(LABELS), np.nan, "<f4").tobytes())
        tokenizer = (self.base / "tokenizer.json").read_bytes()
        manifest = make_manifest(spec, blobs, self.store.put(tokenizer), len(tokenizer), version=version)
        data = encode_manifest(manifest)
        self.store.put(data)
        take_over(self.folder, self.store, manifest, data)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder of a shape that graphs are bundled for."""
    with mock.patch.dict(CONFIG, hidden_size=128, intermediate_size=512):
        return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def device(tmp_path: Path, base: Path) -> Device:
    """A device that holds version 1."""
    found = Device(tmp_path / "device", base)
    found.hold(1)
    return found


class Live(LiveModel):
    """A model and what it said."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        super().__init__(folder, 1, self.events.append, **options)

    def answers(self) -> int | None:
        """The version that answers a text now."""
        (found,) = self.predict([TEXT])
        assert found.model_version == self.model_version
        return found.model_version

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.events]


# the model that answers


def test_the_newest_the_pinned_and_the_one_before_answer_as_they_are_chosen(device: Device) -> None:
    live = Live(device.folder)
    assert live.answers() == 1
    for change, version, pinned in (
        (lambda: device.hold(2), 2, False),
        (lambda: rollback(device.folder), 1, True),
        (lambda: device.hold(3), 1, True),
        (lambda: use(device.folder, None), 3, False),
    ):
        change()
        live.follow()
        assert (live.answers(), live.pinned, live.refused) == (version, pinned, {})
    assert live.swaps == 3
    assert live.kinds() == ["swapped"] * 3
    assert read_versions(device.folder).choice.checked == answering(device.folder).blob.hex()


def test_a_version_that_fails_its_check_is_marked_and_the_one_before_goes_on(device: Device) -> None:
    live = Live(device.folder)
    device.hold(2, broken=True)
    live.follow()
    assert live.answers() == 1
    (event,) = live.events
    assert (event["event"], event["model_version"], event["answers"]) == ("refused", 2, 1)
    assert "not finite" in live.refused[2]
    assert answering(device.folder).manifest.version == 1, "nobody else begins with it"
    for _ in range(3):
        live.follow()
    assert len(live.events) == 1, "it is not tried again"
    assert Live(device.folder).answers() == 1
    device.hold(3)
    live.follow()
    assert (live.answers(), live.refused) == (3, {})


def test_a_person_may_try_a_bad_version_again_and_is_told_again(device: Device) -> None:
    live = Live(device.folder)
    device.hold(2, broken=True)
    live.follow()
    use(device.folder, 2)
    live.follow()
    assert live.answers() == 1
    assert live.kinds() == ["refused", "refused"]


def test_at_the_start_a_version_that_fails_is_passed_over_and_where_none_is_well_that_is_the_error(
    device: Device,
) -> None:
    device.hold(2, broken=True)
    live = Live(device.folder)
    assert (live.answers(), list(live.refused)) == (1, [2])
    mark_bad(device.folder, answering(device.folder).blob, "for the test")
    with pytest.raises(ModelError, match="every model .* is marked bad"):
        Live(device.folder)


def test_a_version_that_a_process_dies_of_is_passed_over_after_three_tries_unless_it_is_the_last(
    device: Device,
) -> None:
    device.hold(2)
    for _ in range(MAX_TRIES):
        note_try(device.folder, answering(device.folder).blob)  # and no word of how it ended
    live = Live(device.folder)
    assert (live.answers(), live.kinds()) == (1, ["refused"])
    assert "died 3 times" in live.refused[2]
    for _ in range(MAX_TRIES + 1):
        note_try(device.folder, answering(device.folder).blob)
    assert Live(device.folder).answers() == 1


def test_what_cannot_be_written_or_read_now_is_said_and_tried_later_and_the_version_before_answers(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    live = Live(device.folder, clock=lambda: now)
    device.hold(2)
    with monkeypatch.context() as patch:

        def full(*arguments: Any, **options: Any) -> None:
            raise StoreError("no space left")

        patch.setattr("edge_runtime.merging.open_source", full)
        for _ in range(3):
            live.follow()
    assert (live.answers(), live.kinds()) == (1, ["storage-error"])
    assert read_versions(device.folder).choice.marks == ()
    live.follow()
    assert live.answers() == 1, "not before some time has passed"
    now = 31.0
    live.follow()
    assert live.answers() == 2


def test_on_a_full_disk_a_good_version_takes_over_and_a_bad_one_does_not_though_no_mark_can_be_written(
    tmp_path: Path, base: Path
) -> None:
    with small_disk(tmp_path / "device", "64M") as disk:
        device = Device(disk, base)
        device.hold(1)
        live = Live(disk)
        for version, broken in ((2, False), (3, True)):
            device.hold(version, broken=broken)
            ballast = fill(disk, 0)
            for _ in range(2):
                live.follow()
            assert live.answers() == 2
            ballast.unlink()
        assert set(live.kinds()) == {"storage-error", "swapped", "refused"}
        assert live.kinds().count("swapped") == live.kinds().count("refused") == 1
        assert "not finite" in live.refused[3]
        again = Live(disk)
        assert (again.answers(), list(again.refused)) == (2, [3]), (
            "now that there is room it is tried again, and marked"
        )
        assert answering(disk).manifest.version == 2


def test_a_damaged_file_of_choices_does_not_stop_what_answers(device: Device) -> None:
    live = Live(device.folder)
    (device.folder / VERSIONS_FILE).write_bytes(b"{")
    live.follow()
    assert (live.answers(), live.kinds()) == (1, ["storage-error"])


def test_an_exported_file_answers_and_never_changes(tmp_path: Path) -> None:
    live = Live(small_file(tmp_path / "m.onnx", {}))
    live.follow()
    assert (live.answers(), live.swaps, live.labels, live.events) == (None, 0, ("a", "b", "c"), [])
    with pytest.raises(ModelError, match="not finite"):
        Live(small_file(tmp_path / "n.onnx", {}, np.nan))


# the protocol


@contextlib.contextmanager
def listening(
    handle: Any, limits: Limits | None = None, observe: Observe = lambda path, status, seconds: None
) -> Iterator[tuple[int, HttpServer, asyncio.AbstractEventLoop]]:
    """A server in a thread; -> its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    failed: list[Exception] = []

    async def begin() -> tuple[HttpServer, int]:
        server = HttpServer(handle, limits or Limits(), observe, lambda path, error: failed.append(error))
        return server, await server.start("127.0.0.1", 0)

    server, port = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    try:
        yield port, server, loop
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def echo(request: Request) -> Response:
    """The request's body, later where the path says so."""
    if request.path == "/slow":
        await asyncio.sleep(0.4)
    if request.path == "/bug":
        raise ZeroDivisionError
    return Response(request.body or request.path.encode())


@pytest.fixture(scope="module")
def echo_port() -> Iterator[int]:
    limits = Limits(connections=8, head_bytes=4096, body_bytes=1000, idle_s=1.0, read_s=0.3, write_s=1.0)
    with listening(echo, limits) as (port, _, _):
        yield port


def talk(port: int, sent: bytes, *, then: float = 0.0) -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(sent)
        if then:
            time.sleep(then)
        client.shutdown(socket.SHUT_WR)
        found = b""
        while data := client.recv(65536):
            found += data
        return found


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/2\r\nHost: a\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001, 413),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 65 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: " + b"a" * 9000, 431),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ],
)
def test_what_is_no_plain_bounded_request_is_refused_in_json_and_the_connection_ends(
    echo_port: int, sent: bytes, status: int
) -> None:
    head, _, body = talk(echo_port, sent).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in head
    assert json.loads(body)["error"]["status"] == status


def test_requests_of_one_connection_are_answered_in_their_order_until_it_is_to_close(echo_port: int) -> None:
    one = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nfirst"
    last = b"GET /second?x=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    found = talk(echo_port, one + last + one)
    assert [part[:5] for part in found.split(b"\r\n\r\n")[1:]] == [b"first", b"/seco"]
    assert found.count(b"HTTP/1.1 200 OK") == 2
    old = talk(echo_port, b"GET /old HTTP/1.0\r\n\r\n")
    assert old.endswith(b"/old") and b"connection: close" in old
    assert talk(echo_port, b"HEAD /long HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


def test_a_client_that_asks_before_it_sends_a_body_is_told_to_go_on(echo_port: int) -> None:
    asked = b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab"
    assert talk(echo_port, asked).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_a_slow_client_loses_its_connection_and_says_a_byte_now_and_then_in_vain(echo_port: int) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", echo_port), 10) as client:
        with contextlib.suppress(OSError):
            for byte in b"GET / HTTP/1.1\r\nHost: a slow client\r\n":
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
    half = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf"
    with socket.create_connection(("127.0.0.1", echo_port), 10) as client:
        client.sendall(half)
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", echo_port), 10) as client:
        assert client.recv(100) == b"", "one that says nothing at all is let go"
    assert time.monotonic() - started < 10


def test_a_bug_ends_one_request_and_tells_the_client_nothing_of_it(echo_port: int) -> None:
    found = talk(echo_port, b"GET /bug HTTP/1.0\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 500 ") and b"ZeroDivision" not in found
    assert talk(echo_port, b"GET /fine HTTP/1.0\r\n\r\n").endswith(b"/fine")


def test_connections_over_the_limit_are_refused_and_there_is_room_again_later(echo_port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", echo_port), 10))
        time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", echo_port), 10) as one_more:
            assert one_more.recv(100).startswith(b"HTTP/1.1 503 ")
    end = time.monotonic() + 10
    while not talk(echo_port, b"GET /fine HTTP/1.0\r\n\r\n").endswith(b"/fine"):
        assert time.monotonic() < end


def test_a_server_that_stops_answers_what_has_begun_and_lets_idle_clients_go() -> None:
    with listening(echo) as (port, server, loop):
        idle = socket.create_connection(("127.0.0.1", port), 10)
        found: list[bytes] = []
        asking = threading.Thread(target=lambda: found.append(talk(port, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")))
        asking.start()
        while server.num_connections < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        asking.join(10)
        assert found[0].startswith(b"HTTP/1.1 200 OK") and found[0].endswith(b"/slow")
        assert idle.recv(10) == b""
        idle.close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), 1)


@given(st.binary(max_size=200) | st.text(alphabet="GET /HTP1.:\r\n\tab0", max_size=80).map(str.encode))
def test_any_bytes_are_a_request_or_a_refusal(head: bytes) -> None:
    for prefix in (b"", b"GET / HTTP/1.1\r\nHost: a\r\n"):
        try:
            request = parse_head(prefix + head)
            assert 0 <= body_length(request, 1000) <= 1000
            assert not set("\r\n\0") & set("".join(request.headers.values()) + request.path)
        except HttpError as error:
            assert 400 <= error.status < 500


# the answers


@pytest.fixture(scope="module")
def api_port(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[int]:
    """A server that answers from a device's folder."""
    device = Device(tmp_path_factory.mktemp("api") / "device", base)
    device.hold(1)
    api = Api(Live(device.folder), "127.0.0.1")
    with listening(api.answer, observe=api.metrics.observe) as (port, _, _):
        yield port
    api.close()


JSON = {"Content-Type": "application/json"}


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON, or text, of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, sent, {**JSON, **headers})
        answer = connection.getresponse()
        data = answer.read()
        kind = answer.getheader("content-type", "")
        return answer.status, json.loads(data) if kind == "application/json" and data else data.decode()
    finally:
        connection.close()


def test_texts_are_classified_alone_and_together(api_port: int) -> None:
    status, one = ask(api_port, "POST", "/predict", {"text": TEXT})
    assert status == 200
    assert set(one["probabilities"]) == set(LABELS)
    assert sum(one["probabilities"].values()) == pytest.approx(1)
    assert one["probability"] == one["probabilities"][one["label"]] == max(one["probabilities"].values())
    status, many = ask(api_port, "POST", "/predict/batch", {"texts": [TEXT, "", "seven \ud800 \0"]})
    assert status == 200
    assert many["predictions"][0]["label"] == one["label"]
    assert [found["model_version"] for found in many["predictions"]] == [1] * 3
    assert ask(api_port, "POST", "/predict/batch", {"texts": []}) == (200, {"predictions": []})


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/predict", b"", 400),
        ("/predict", b"{", 400),
        ("/predict", b"\xff", 400),
        ("/predict", b"[" * 100_000, 400),
        ("/predict", b'{"text": ' + b"9" * 500_000 + b"}", 422),
        ("/predict", [], 422),
        ("/predict", {}, 422),
        ("/predict", {"text": 7}, 422),
        ("/predict", {"text": None}, 422),
        ("/predict", {"text": "a", "more": 1}, 422),
        ("/predict", {"texts": ["a"]}, 422),
        ("/predict/batch", {"texts": "a"}, 422),
        ("/predict/batch", {"texts": ["a", 1]}, 422),
        ("/predict/batch", {"texts": ["a"] * (MAX_TEXTS + 1)}, 413),
        ("/predict", b" " * ((1 << 20) + 1), 413),
        ("/nothing", {"text": "a"}, 404),
        ("/health", {"text": "a"}, 405),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(api_port: int, path: str, body: Any, status: int) -> None:
    found, answer = ask(api_port, "POST", path, body)
    assert found == status == answer["error"]["status"]
    assert answer["error"]["message"]


def test_another_sites_page_cannot_use_a_visitors_browser_to_ask(api_port: int) -> None:
    asked = {"text": TEXT}
    assert ask(api_port, "POST", "/predict", asked, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(api_port, "POST", "/predict", asked, Host="evil.example:80")[0] == 403
    assert ask(api_port, "OPTIONS", "/predict", Host="localhost")[0] == 405
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8765", "[::1]:8765", "[::1]"):
        assert ask(api_port, "POST", "/predict", asked, Host=host)[0] == 200


def test_every_path_of_the_description_is_there_and_says_what_it_is(api_port: int) -> None:
    status, document = ask(api_port, "GET", "/openapi.json")
    assert status == 200 and document["openapi"] == "3.1.0"
    assert set(document["paths"]) == set(PATHS)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"]
            body = {"text": TEXT} if path == "/predict" else {"texts": [TEXT]} if method == "post" else None
            status, answer = ask(api_port, method.upper(), path, body)
            assert status == 200
            ((_, kind),) = operation["responses"]["200"]["content"].items()
            if "schema" in kind:
                conforms(answer, kind["schema"], document)
    conforms(ask(api_port, "GET", "/none")[1], {"$ref": "#/components/schemas/Error"}, document)


def conforms(value: Any, schema: Any, document: Any) -> None:
    """As much of JSON schema as the description uses."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "enum" in schema:
        assert value in schema["enum"]
    kinds = schema.get("type", [])
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    types["null"] = type(None)
    assert not kinds or any(isinstance(value, types[k]) for k in ([kinds] if isinstance(kinds, str) else kinds))
    if isinstance(value, dict) and "properties" in schema:
        assert set(value) == set(schema["required"]) == set(schema["properties"])
        for name, inner in schema["properties"].items():
            conforms(value[name], inner, document)
    for item in value if isinstance(value, list) else []:
        conforms(item, schema["items"], document)


def test_metrics_are_lines_that_prometheus_reads_and_count_what_was_asked(api_port: int) -> None:
    def count(name: str) -> float:
        _, text = ask(api_port, "GET", "/metrics")
        for line in text.splitlines():
            assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{[^{}]*\})? [0-9.e+-]+", line), line
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    texts = count("edge_runtime_texts_total")
    ask(api_port, "POST", "/predict/batch", {"texts": [TEXT] * 5})
    for number in range(3):
        ask(api_port, "GET", f"/nothing-{number}")
    assert count("edge_runtime_texts_total") == texts + 5
    assert count('edge_runtime_request_seconds_count{path="other"}') >= 3
    assert "nothing" not in ask(api_port, "GET", "/metrics")[1], "clients cannot make the counters grow"
    assert count("edge_runtime_model_version") == 1
    assert count("process_resident_memory_bytes") > 1 << 20


def test_the_page_needs_nothing_from_elsewhere(api_port: int) -> None:
    status, page = ask(api_port, "GET", "/")
    assert status == 200 and "<form>" in page
    assert not re.search(r"https?://|//[a-z]", page)


# the whole of it


@pytest.mark.parametrize("flags", [["--port", "65536"], ["--port", "-1"], ["--host", "no.such.host.invalid"], []])
def test_where_it_cannot_listen_that_is_a_usage_error(tmp_path: Path, flags: list[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = flags or ["--port", str(other.getsockname()[1])]
        try:
            assert main(["serve", str(small_file(tmp_path / "m.onnx", {})), *words]) == 2
        except SystemExit as end:
            assert end.code == 2


class Server:
    """`edge-runtime serve` as a process."""

    def __init__(self, model: Path, crash_at: int = 0, flags: Sequence[str] = ()) -> None:
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
        program = [str(CRASHING), str(crash_at)] if crash_at else ["-m"]
        command = ["edge_runtime.cli", "serve", str(model), "--port", "0", "--threads", "1", "--json"]
        self.process = subprocess.Popen(
            [sys.executable, *program, *command, *flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )
        self.port = self.event("serving")["port"]

    def event(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        assert self.process.stdout
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind:
                return event
        raise AssertionError(f"ended without {kind}")

    def wait_for(self, version: int) -> None:
        """Until a version answers."""
        end = time.monotonic() + 60
        while ask(self.port, "GET", "/health")[1]["model_version"] != version:
            assert time.monotonic() < end
            time.sleep(0.02)


@contextlib.contextmanager
def serving(model: Path, crash_at: int = 0, flags: Sequence[str] = ()) -> Iterator[Server]:
    """The process, killed at the end whatever happens; with `crash_at` it kills itself at that write boundary."""
    server = Server(model, crash_at, flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_a_service_manager_hears_when_it_answers_that_it_goes_on_and_when_it_stops(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        with serving(device.folder) as server:
            heard = {manager.recv(100) for _ in range(3)}
            assert heard == {b"READY=1", b"WATCHDOG=1"}
            server.process.terminate()
            while manager.recv(100) != b"STOPPING=1":
                pass
            assert server.process.wait(20) == 0


WRITES_OF_A_START = 12  # boundaries: a note of the try and one of its end, each an fsync, a rename, an fsync
SWAPS = int(os.environ.get("EDGE_TEST_SWAPS", "12"))


def test_clients_meet_no_error_while_versions_come_fail_and_are_rolled_back(device: Device) -> None:
    failed: list[object] = []
    seen: list[list[int]] = [[] for _ in range(4)]
    done = threading.Event()

    def load(number: int, port: int) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            while not done.is_set():
                batch = len(seen[number]) % 3 == 0
                body = json.dumps({"texts": [TEXT, ""]} if batch else {"text": TEXT})
                connection.request("POST", "/predict/batch" if batch else "/predict", body, JSON)
                answer = connection.getresponse()
                found = json.loads(answer.read())
                assert answer.status == 200, found
                versions = {one["model_version"] for one in (found["predictions"] if batch else [found])}
                assert len(versions) == 1
                seen[number].append(versions.pop())
            connection.close()
        except BaseException as error:  # told below, by the test's own thread
            failed.append(error)

    with serving(device.folder) as server:
        threads = [threading.Thread(target=load, args=(number, server.port)) for number in range(4)]
        for thread in threads:
            thread.start()
        for version in range(2, SWAPS + 1):
            device.hold(version)
            server.wait_for(version)
        assert is_answered_from(device.folder), "the agent knows of it"
        device.hold(SWAPS + 1, broken=True)
        refused = server.event("refused")
        assert (refused["model_version"], refused["answers"]) == (SWAPS + 1, SWAPS)
        health = ask(server.port, "GET", "/health")[1]
        assert (health["status"], health["model_version"]) == ("degraded", SWAPS)
        assert health["refused"][0]["model_version"] == SWAPS + 1
        assert failed == [] and all(found == sorted(found) for found in seen), "a client never goes back by itself"
        device.hold(SWAPS + 2)
        server.wait_for(SWAPS + 2)
        assert main(["models", "rollback", str(device.folder)]) == 0
        server.wait_for(SWAPS)
        done.set()
        for thread in threads:
            thread.join(60)
        assert failed == []
        assert set().union(*seen) >= {1, SWAPS, SWAPS + 2} and SWAPS + 1 not in set().union(*seen)
        server.process.send_signal(signal.SIGTERM)
        assert server.event("stopped")["requests"] > sum(map(len, seen))
        assert server.process.wait(30) == 0
    assert not is_answered_from(device.folder)


def test_a_server_that_is_killed_in_the_middle_of_a_swap_comes_back_with_a_version_that_answers(
    device: Device,
) -> None:
    with serving(
        device.folder, crash_at=WRITES_OF_A_START + 6
    ) as server:  # the try is noted, the version not yet loaded
        device.hold(2)
        assert server.process.wait(60) == -signal.SIGKILL
    assert [mark.tries for mark in read_versions(device.folder).choice.marks] == [1]
    with serving(device.folder) as server:
        assert ask(server.port, "POST", "/predict", {"text": TEXT})[1]["model_version"] == 2
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
    assert read_versions(device.folder).choice.marks == ()
