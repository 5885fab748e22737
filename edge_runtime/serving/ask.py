"""`edge-runtime ask`: texts classified by a device of the fleet, over the fleet's broker.

Not the answering side (`mqtt_answers.py`), not the flags (`cli.py`). Only `commands.py` imports it, when the command runs.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.console import print_json
from edge_runtime.credentials import Credentials, read_credentials
from edge_runtime.errors import ConnectionFailed, EdgeError, UsageError, WireError
from edge_runtime.topics import Topics, check_id
from edge_runtime.transport import Connected, Disconnected, Message, MqttTransport, Transport
from edge_runtime.wire import MAX_ASKED_TEXTS, MAX_CONTROL_BYTES, Answer, Ask, decode, encode


def ask(args: Namespace) -> int:
    """Ask, print the answers; -> the exit code."""
    who = read_credentials(args.config)
    topics, device = Topics(who.realm), check_id("device", args.device)
    transport = connect(who, [topics.answers(who.device, "+")])
    answer = question(transport, topics, who.device, device, args.text, args.timeout)
    for text, label, probability in zip(args.text, answer.labels, answer.probabilities, strict=True):
        if args.json:
            record = {"text": text, "label": label, "probability": probability}
            print_json({**record, "model_version": answer.model_version or None})
        else:
            print(f"{label} {100 * probability:.1f} %\t{text}")
    return 0


def connect(who: Credentials, filters: Sequence[str]) -> MqttTransport:
    """A connection to the fleet's broker under an enrolled name, for questions or answers; not started."""
    ca_file = Path(who.ca_file) if who.ca_file else None
    return MqttTransport(who.host, who.port, who.device, who.secret, filters, ca_file=ca_file)


def question(
    transport: Transport, topics: Topics, asker: str, device: str, texts: Sequence[str], timeout_s: float
) -> Answer:
    """The answer to one question; the transport is started and stopped.

    Raises:
        UsageError: too many texts, or too long ones.
        ConnectionFailed: no answer in time, or the broker refuses us.
        EdgeError: the device says that it does not answer, and why.
    """
    asked = Ask(os.urandom(16), tuple(texts))
    if not 0 < len(texts) <= MAX_ASKED_TEXTS:
        raise UsageError(f"a question has 1 to {MAX_ASKED_TEXTS} texts, this one has {len(texts)}")
    try:
        payload = encode(asked, sent_at=time.time(), boot=os.urandom(8), sequence=1)
    except WireError:
        raise UsageError(
            f"the texts are longer than the {MAX_CONTROL_BYTES} bytes of one question: ask for fewer"
        ) from None
    transport.start()
    problem = f"does `edge-runtime serve` answer for it, and allow {asker}?"
    try:
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            event = transport.next_event(min(left, 0.5))
            if isinstance(event, Connected):
                transport.publish(topics.asks(asker, device), payload)
            elif isinstance(event, Disconnected):
                problem = event.reason
                if event.refused:
                    raise ConnectionFailed(f"the broker refuses {asker}: {problem}")
            elif isinstance(event, Message) and topics.asked(event.topic) == (asker, device):
                answer: Answer = decode(event.payload, "answer").body
                if answer.id == asked.id:
                    return _checked(answer, len(texts))
    finally:
        transport.stop()
    raise ConnectionFailed(f"no answer from {device} within {timeout_s:g} s: {problem}")


def _checked(answer: Answer, num_texts: int) -> Answer:
    if answer.reason:
        raise EdgeError(answer.reason)
    if not len(answer.labels) == len(answer.probabilities) == num_texts:
        raise WireError(f"{len(answer.labels)} labels came for {num_texts} texts")
    return answer
