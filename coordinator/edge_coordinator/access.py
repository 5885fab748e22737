"""Who may say what to the broker: the topics of each user, what may be retained, and the same as Mosquitto's ACL.

Pure: values in, a verdict out. No socket, no clock, no amqtt, no packets (`packets.py`); `gate.py` and `mosquitto.py`
carry the verdicts out. Topics are those of docs/wire.md, in the form of MQTT 3.1.1, section 4.7.

Imports `edge_runtime.topics`; anything in edge_coordinator may import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edge_runtime.topics import COORDINATOR, ID, check_id

Action = Literal["publish", "subscribe", "receive"]

MAX_RETAINED_BYTES = 16 * 1024  # of a device's presence message: the limit of control messages


def is_id(name: str) -> bool:
    """Whether `name` can be a device, realm or user."""
    return ID.match(name) is not None


def may(user: str, action: Action, topic: str, realm: str) -> bool:
    """Whether `user` may do `action` in `realm`.

    A filter passes only where everything that it can match is allowed, so `#` and `fl/1/{realm}/+/...` are refused
    to a device. `.../up/#` includes `.../up` itself, as in MQTT [4.7.1.2].

    Args:
        user: the authenticated user name, which is also the client id.
        action: "receive" is asked again for each delivery.
        topic: a topic name, or for "subscribe" a topic filter.
        realm: the fleet's id.
    """
    levels = topic.split("/")
    if not is_id(user) or not is_id(realm) or not well_formed(levels, wildcards=action == "subscribe"):
        return False
    root = ["fl", "1", realm]
    if user == COORDINATOR:
        return _inside(levels, root)
    if len(levels) == 7 and _inside(levels, [*root, "a"]):
        asker, device, kind = levels[4:]
        sends, hears = (asker, device) if kind == "ask" else (device, asker) if kind == "answer" else ("", "")
        return user == (sends if action == "publish" else hears)
    own = [*root, "d", user]
    if action == "publish":
        return _inside(levels, [*own, "up"])
    return any(_inside(levels, prefix) for prefix in ([*own, "dn"], [*root, "all"], [*root, "g"]))


def may_retain(user: str, topic: str, payload_bytes: int, realm: str) -> bool:
    """Whether the broker keeps this message for later subscribers.

    A device may have one retained message, its presence on `up/st`, of at most 16 KiB: the topics below `up/` are
    without number, so anything more generous lets one device fill the broker's memory.
    """
    if user == COORDINATOR:
        return True
    return topic == f"fl/1/{realm}/d/{user}/up/st" and payload_bytes <= MAX_RETAINED_BYTES


def well_formed(levels: Sequence[str], *, wildcards: bool) -> bool:
    """Whether the levels of a topic, or with `wildcards` those of a topic filter, are what MQTT 4.7 allows."""
    last = len(levels) - 1
    for number, level in enumerate(levels):
        if "\0" in level or ("+" in level and (not wildcards or level != "+")):
            return False
        if "#" in level and (not wildcards or level != "#" or number != last):
            return False
    return levels != [""]


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a filter selects a topic, both well-formed; `$` topics are no part of a realm and never match."""
    if "+" not in topic_filter:
        if not topic_filter.endswith("#"):
            return topic_filter == topic
        return topic.startswith(topic_filter[:-1]) or topic == topic_filter[:-2]
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for number, level in enumerate(wanted):
        if level == "#":
            return True
        if number >= len(levels) or level not in ("+", levels[number]):
            return False
    return len(wanted) == len(levels)


def mosquitto_acl(realm: str) -> str:
    """The text of Mosquitto's `acl_file` that says the same as `may` for publish and receive.

    Mosquitto 2.0's acl_file does not restrict SUBSCRIBE: a device that asks for `#` is told yes and then receives
    only what it may receive, which is checked for each message. `%u` is the user name; the listener needs
    `use_username_as_clientid true`. Mosquitto warns that two patterns hold no `%u`: they are meant for every user.

    Raises:
        UsageError: the realm is no id.
    """
    root = f"fl/1/{check_id('realm', realm)}"
    return (
        "# Written by edge-coordinator: changes are lost.\n"
        f"user {COORDINATOR}\n"
        f"topic readwrite {root}/#\n"
        "\n"
        f"pattern read {root}/all/#\n"
        f"pattern read {root}/g/#\n"
        f"pattern read {root}/d/%u/dn/#\n"
        f"pattern write {root}/d/%u/up/#\n"
        f"pattern write {root}/a/%u/+/ask\n"
        f"pattern read {root}/a/+/%u/ask\n"
        f"pattern write {root}/a/+/%u/answer\n"
        f"pattern read {root}/a/%u/+/answer\n"
    )


def _inside(levels: Sequence[str], prefix: Sequence[str]) -> bool:
    return levels[: len(prefix)] == prefix
