"""Questions over a fleet's broker, answered by the model that `serve` runs: one after the other, for the names on a list.

The broker makes sure that an asker's topic bears the asker's own name. Not the connection (`transport.py`), not the model
(`live_model.py`). Texts are neither logged nor kept. Holds one question at a time; more wait in the transport's inbox.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence

from edge_runtime.errors import EdgeError, WireError
from edge_runtime.predict import Prediction
from edge_runtime.serving.live_model import Emit
from edge_runtime.topics import Topics
from edge_runtime.transport import Connected, Disconnected, Message, Transport
from edge_runtime.wire import Answer, Ask, decode, encode, from_plain, to_plain

MAX_REASON = 500
MAX_TOLD = 100  # names of askers that are not on the list, and are told in the log once


class MqttAnswers:
    """Answers until told to stop."""

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        device: str,
        allowed: Collection[str],
        predict: Callable[[Sequence[str]], list[Prediction]],
        emit: Emit,
    ) -> None:
        self._transport, self._topics, self._device = transport, topics, device
        self._allowed, self._predict, self._emit = frozenset(allowed), predict, emit
        self._boot, self._sequence = os.urandom(8), 0
        self._told: set[str] = set()

    def run(self, keep_going: Callable[[], bool]) -> None:
        """Blocks; what has been asked when it ends is not answered, the asker asks again elsewhere or gives up."""
        self._transport.start()
        try:
            while keep_going():
                event = self._transport.next_event(0.1)
                if isinstance(event, Message):
                    self.answer(event)
                elif isinstance(event, Connected):
                    self._emit({"event": "connected"})
                elif isinstance(event, Disconnected):
                    self._emit({"event": "disconnected", "reason": event.reason})
        finally:
            self._transport.stop()

    def answer(self, message: Message) -> None:
        """One message of the broker's; a bad one changes nothing."""
        names = self._topics.asked(message.topic)
        if names is None or names[1] != self._device:
            return
        asker = names[0]
        try:
            ask = decode(message.payload, "ask").body
        except WireError as error:
            if self._first(asker):
                self._emit({"event": "bad-message", "topic": message.topic, "reason": str(error)})
            return
        if asker not in self._allowed:
            if self._first(asker):
                self._emit({"event": "not-allowed", "asker": asker})
            self._send(asker, Answer(ask.id, reason=f"{self._device} does not answer {asker}: see its --allow"))
            return
        self._send(asker, self._classified(ask))

    def _classified(self, ask: Ask) -> Answer:
        try:
            found = self._predict(ask.texts)
        except EdgeError as error:
            return Answer(ask.id, reason=str(error)[:MAX_REASON])
        version = found[0].model_version or 0
        return Answer(ask.id, tuple(p.label for p in found), tuple(p.probability for p in found), version)

    def _send(self, asker: str, answer: Answer) -> None:
        self._sequence += 1
        stamp = {"sent_at": time.time(), "boot": self._boot, "sequence": self._sequence}
        try:
            from_plain(Answer, to_plain(answer), "answer")  # one that nobody can read is no answer
            payload = encode(answer, **stamp)  # type: ignore[arg-type]
        except WireError as error:  # very long labels: fewer texts may do
            payload = encode(Answer(answer.id, reason=str(error)[:MAX_REASON]), **stamp)  # type: ignore[arg-type]
        self._transport.publish(self._topics.answers(asker, self._device), payload)

    def _first(self, asker: str) -> bool:
        """Whether an asker is told in the log now, so that nobody can fill it."""
        if asker in self._told or len(self._told) >= MAX_TOLD:
            return False
        self._told.add(asker)
        return True
