"""Questions over the fleet's broker: who is answered, with what, and what a hostile asker or device gets out of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.cli import main
from edge_runtime.credentials import Credentials, format_credentials
from edge_runtime.errors import ConnectionFailed, EdgeError, ModelError, UsageError, WireError
from edge_runtime.predict import Prediction
from edge_runtime.serving.ask import question
from edge_runtime.serving.mqtt_answers import MAX_TOLD, MqttAnswers
from edge_runtime.topics import COORDINATOR, Topics
from edge_runtime.transport import LocalBroker, LocalTransport, Message
from edge_runtime.wire import Answer, Ask, decode, encode
from tests.coordinator.brokers import broker_kinds, start_broker
from tests.device.test_predict import small_file
from tests.device.test_serve import serving

TOPICS = Topics("farm")
ID = bytes(range(16))


def predict(texts: Sequence[str]) -> list[Prediction]:
    """The label is the text itself, or a very long one."""
    if "fail" in texts:
        raise ModelError("not today")
    texts = ["\U0001f34e" * 200 if text == "long" else text for text in texts]
    return [Prediction(text, 0.75, {text: 0.75, "other": 0.25}, 7) for text in texts]


class World:
    """A device that answers `desk` and what it said; everything happens at the call."""

    def __init__(self) -> None:
        self.broker, self.events = LocalBroker(), list[dict[str, Any]]()
        transport = LocalTransport(self.broker, "pi", [TOPICS.asks("+", "pi")])
        transport.start()
        self.answers = MqttAnswers(transport, TOPICS, "pi", ["desk"], predict, self.events.append)
        self.desk = LocalTransport(self.broker, "desk", [TOPICS.answers("desk", "+")])
        self.desk.start()
        self.desk.inbox.clear()

    def ask(self, payload: bytes, topic: str = "") -> list[Answer]:
        """What comes back to the desk."""
        self.answers.answer(Message(topic or TOPICS.asks("desk", "pi"), payload))
        found = [decode(m.payload, "answer").body for m in self.desk.inbox if isinstance(m, Message)]
        self.desk.inbox.clear()
        return found


def ask_bytes(*texts: str) -> bytes:
    return encode(Ask(ID, texts), sent_at=0.0, boot=bytes(8), sequence=1)


def test_texts_are_answered_in_their_order_with_the_version_and_the_questions_id() -> None:
    assert World().ask(ask_bytes("b", "", "a")) == [Answer(ID, ("b", "", "a"), (0.75,) * 3, 7)]


def test_a_model_that_fails_is_an_answer_with_the_reason() -> None:
    assert World().ask(ask_bytes("fail")) == [Answer(ID, reason="not today")]


def test_an_answer_that_is_too_long_for_a_message_says_so() -> None:
    for texts, why in ((["x" * 201], "within 0 and 200"), (["long"] * 64, "over the limit")):
        (found,) = World().ask(ask_bytes(*texts))
        assert found.labels == () and why in found.reason


def test_who_is_not_on_the_list_is_told_and_the_log_once() -> None:
    world = World()
    other = LocalTransport(world.broker, "other", [TOPICS.answers("other", "+")])
    other.start()
    for _ in range(3):
        assert world.ask(ask_bytes("a"), TOPICS.asks("other", "pi")) == []
    assert world.events == [{"event": "not-allowed", "asker": "other"}]
    answers = [decode(m.payload, "answer").body for m in other.inbox if isinstance(m, Message)]
    assert [(a.labels, "does not answer other" in a.reason) for a in answers] == [((), True)] * 3
    for number in range(2 * MAX_TOLD):
        world.ask(ask_bytes("a"), TOPICS.asks(f"x{number}", "pi"))
    assert len(world.events) == MAX_TOLD


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x91" * 5000, ask_bytes("a")[:-3]])
def test_bytes_that_are_no_question_are_not_answered_and_told_once(payload: bytes) -> None:
    world = World()
    assert world.ask(payload) == world.ask(payload) == []
    assert [event["event"] for event in world.events] == ["bad-message"]
    assert len(world.ask(ask_bytes("a"))) == 1


@pytest.mark.parametrize(
    "topic", ["", "fl/1/other/a/desk/pi/ask", "fl/1/farm/a/desk/pi2/ask", "fl/1/farm/a/DESK/pi/ask"]
)
def test_a_topic_of_somebody_else_is_not_answered(topic: str) -> None:
    world = World()
    assert world.ask(ask_bytes("a"), topic or "fl/1/farm/d/pi/dn/ask") == []
    assert world.events == []


# the asker


class Forged(LocalTransport):
    """A connection on which these answers wait."""

    def __init__(self, *answers: Answer | bytes) -> None:
        super().__init__(LocalBroker(), "desk", [])
        self.answers = answers

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        asked = decode(payload, "ask").body.id
        for answer in self.answers:
            if isinstance(answer, Answer):
                given = Answer(asked if answer.id == ID else answer.id, *list(vars(answer).values())[1:])
                answer = encode(given, sent_at=0.0, boot=bytes(8), sequence=1)
            self.inbox.append(Message(TOPICS.answers("desk", "pi"), answer))


def test_only_the_answer_to_this_question_counts() -> None:
    stale, good = Answer(bytes(16), ("old",), (1.0,)), Answer(ID, ("new",), (0.5,), 3)
    assert question(Forged(stale, good), TOPICS, "desk", "pi", ["a"], 5).labels == ("new",)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(ID, ("a", "b"), (1.0, 1.0)), WireError),
        (Answer(ID, ("a",), ()), WireError),
        (b"\xc1", WireError),
        (Answer(ID, reason="no"), EdgeError),
        (Answer(bytes(16), ("a",), (1.0,)), ConnectionFailed),
    ],
)
def test_an_answer_that_is_none_is_an_error(answer: Answer | bytes, error: type[EdgeError]) -> None:
    with pytest.raises(error):
        question(Forged(answer), TOPICS, "desk", "pi", ["a"], 0.3)


@pytest.mark.parametrize("texts", [[], ["a"] * 65, ["x" * 20_000]])
def test_a_question_that_is_too_long_is_a_usage_error(texts: list[str]) -> None:
    with pytest.raises(UsageError):
        question(Forged(), TOPICS, "desk", "pi", texts, 0.3)


def test_serve_wants_a_name_and_a_list_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "none", "--allow", "desk"]) == 2
    assert "both --config" in capsys.readouterr().err


# with real brokers

SECRETS = {COORDINATOR: "c", "pi": "p", "desk": "d", "other": "o"}


@pytest.mark.broker
@pytest.mark.parametrize("kind", broker_kinds())
def test_a_client_asks_a_device_over_a_real_broker_and_others_may_neither_ask_nor_listen(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = start_broker(kind, "farm", SECRETS, tmp_path / "broker")
    try:

        def config(name: str) -> Path:
            path = tmp_path / f"{name}.toml"
            path.write_text(format_credentials(Credentials("farm", name, SECRETS[name], broker.host, broker.port)))
            return path

        def ask(name: str, *texts: str) -> tuple[int, list[dict[str, Any]]]:
            code = main(["ask", "--config", str(config(name)), "pi", *texts, "--json", "--timeout", "30"])
            return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

        model = small_file(tmp_path / "m.onnx", {})
        with serving(model, flags=["--config", str(config("pi")), "--allow", "desk,coordinator"]) as server:
            server.event("connected")
            code, answers = ask("desk", "one two", "soup")
            assert (code, [a["label"] for a in answers], answers[0]["model_version"]) == (0, ["c", "c"], None)
            assert ask("other", "soup") == (1, [])
            assert server.event("not-allowed")["asker"] == "other"
            broker.restart()
            server.event("disconnected")
            server.event("connected")
            assert ask("desk", "soup")[0] == 0
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
    finally:
        broker.stop()
