"""`edge-runtime serve`: the model, the answers and the server put together, and run until told to stop.

Not the flags (`cli.py`). Only `commands.py` imports it, when the command runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import traceback
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from edge_runtime.console import Sentences, note, note_event, print_json
from edge_runtime.credentials import Credentials, read_credentials
from edge_runtime.errors import UsageError
from edge_runtime.notify import alive, notify
from edge_runtime.serving.http_api import Api
from edge_runtime.serving.http_server import HttpServer, Limits
from edge_runtime.serving.live_model import Emit, LiveModel
from edge_runtime.serving.mqtt_answers import MqttAnswers
from edge_runtime.store import answering_from
from edge_runtime.topics import Topics, check_id
from edge_runtime.versions import is_state_folder

FOLLOW_S = 0.2  # between two looks for another version
SENTENCES: Sentences = {
    "serving": lambda e: f"serving {_model(e)} on http://{e['host']}:{e['port']}/",
    "swapped": lambda e: f"{_model(e)} answers now, in place of {e['before']} ({e['load_s']:.2f} s beside it)",
    "refused": lambda e: f"{_model(e)} is not used, {e['answers'] or 'none'} answers: {e['reason']}",
    "storage-error": lambda e: f"the disk fails or holds something damaged: {e['reason']}",
    "failed": lambda e: f"{e['path']} failed: {e['reason']}",
    "connected": lambda e: "connected to the broker",
    "disconnected": lambda e: f"not connected to the broker, trying again: {e['reason']}",
    "bad-message": lambda e: f"a message on {e['topic']} cannot be read: {e['reason']}",
    "not-allowed": lambda e: f"{e['asker']} asked over the broker, which --allow does not name",
    "stopping": lambda e: "stopping: what has begun is still answered",
    "stopped": lambda e: f"stopped after {e['requests']} requests",
}


def serve(args: Namespace) -> int:
    """Load the model, answer, and stop at SIGTERM or Ctrl-C; -> the exit code."""
    if bool(args.config) != bool(args.allow):
        raise UsageError(
            "answers over the broker need both --config, the name to answer under, and --allow, who may ask"
        )
    who = read_credentials(args.config) if args.config else None
    one_line = threading.Lock()  # of several threads

    def emit(event: dict[str, Any]) -> None:
        with one_line:
            (print_json if args.json else _tell)(event)

    with answering_from(args.model) if is_state_folder(args.model) else contextlib.nullcontext():
        return _load_and_serve(args, who, emit)


def _load_and_serve(args: Namespace, who: Credentials | None, emit: Emit) -> int:
    model = LiveModel(
        args.model, args.threads, emit, family=args.family, adapter=args.adapter, long=args.long, progress=note
    )
    answers = _answers(who, args.allow, model, emit) if who else None
    asyncio.run(_serve(model, args.host, args.port, emit, answers))
    return 0


def _answers(who: Credentials, allowed: Sequence[str], model: LiveModel, emit: Emit) -> MqttAnswers:
    from edge_runtime.serving.ask import connect

    topics = Topics(who.realm)
    for name in allowed:
        check_id("asker", name)
    transport = connect(who, [topics.asks("+", who.device)])
    return MqttAnswers(transport, topics, who.device, allowed, model.predict, emit)


async def _serve(model: LiveModel, host: str, port: int, emit: Emit, answers: MqttAnswers | None) -> None:
    api = Api(model, host)
    server = HttpServer(api.answer, Limits(), api.metrics.observe, lambda path, error: emit(_failure(path, error)))
    api.num_connections = lambda: server.num_connections
    told = _signals()
    try:
        bound = await server.start(host, port)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}: choose another --port") from None
    emit({"event": "serving", "host": host, "port": bound, "model_version": model.model_version})
    notify("READY=1")
    following = asyncio.create_task(_follow(model, told, emit))
    asked = None
    if answers:
        asked = asyncio.get_running_loop().run_in_executor(None, answers.run, lambda: not told.is_set())
    await told.wait()
    notify("STOPPING=1")
    emit({"event": "stopping"})
    await server.stop()
    api.close()
    await following
    if asked:
        await asked
    emit({"event": "stopped", "requests": api.metrics.requests})


async def _follow(model: LiveModel, told: asyncio.Event, emit: Emit) -> None:
    """Look for another version again and again, beside what answers; a log that nobody reads any more ends it all."""
    loop = asyncio.get_running_loop()
    while not told.is_set():
        alive()
        try:
            await loop.run_in_executor(None, model.follow)
        except BrokenPipeError:
            told.set()
            raise
        except Exception as error:  # a bug of ours: the version that answers goes on
            emit(_failure("another version", error))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(told.wait(), FOLLOW_S)


def _signals() -> asyncio.Event:
    """Set at SIGTERM or Ctrl-C; a second one interrupts at once."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return told


def _failure(path: str, error: Exception) -> dict[str, Any]:
    """What went wrong and where; not the error's own words, which may quote a text."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
    return {"event": "failed", "path": path[:100], "reason": f"{type(error).__name__} at {place}"}


def _tell(event: dict[str, Any]) -> None:
    note_event(event, SENTENCES)


def _model(event: dict[str, Any]) -> str:
    return "the model" if event["model_version"] is None else f"model {event['model_version']}"
