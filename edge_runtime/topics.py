"""MQTT topic names of one realm (`docs/wire.md`): at most six slashes, ids that every broker accepts. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_runtime.errors import UsageError

ID = re.compile(r"[a-z0-9_-]{1,36}\Z")
COORDINATOR = "coordinator"  # its user name at the broker; no device may bear it


def check_id(kind: str, value: str) -> str:
    """`value`, if it is an id.

    Raises:
        UsageError: it has other characters or is too long.
    """
    if not ID.match(value):
        raise UsageError(f"{kind} {value!r} must be 1 to 36 of a-z, 0-9, '-' and '_'")
    return value


@dataclass(frozen=True)
class Topics:
    """Builds and reads the topics of one realm (a fleet, or a shard of one)."""

    realm: str

    def all(self, kind: str) -> str:
        """To every device: coord, model, round."""
        return f"fl/1/{self.realm}/all/{kind}"

    def down(self, device: str, kind: str) -> str:
        """Coordinator to one device: grant, need, ack, c."""
        return f"fl/1/{self.realm}/d/{device}/dn/{kind}"

    def up(self, device: str, kind: str) -> str:
        """One device to the coordinator: st, join, offer, need, c."""
        return f"fl/1/{self.realm}/d/{device}/up/{kind}"

    def asks(self, asker: str, device: str) -> str:
        """From a client to the one that answers for a device: ask."""
        return f"fl/1/{self.realm}/a/{asker}/{device}/ask"

    def answers(self, asker: str, device: str) -> str:
        """And back: answer."""
        return f"fl/1/{self.realm}/a/{asker}/{device}/answer"

    def asked(self, topic: str) -> tuple[str, str] | None:
        """(asker, device) of a topic of questions or answers of this realm, else None."""
        parts = topic.split("/")
        if len(parts) != 7 or parts[:4] != ["fl", "1", self.realm, "a"] or not all(map(ID.match, parts[4:6])):
            return None
        return parts[4], parts[5]

    def device_filters(self, device: str) -> list[str]:
        """What a device subscribes to."""
        return [self.all("+"), self.down(device, "+")]

    def coordinator_filters(self) -> list[str]:
        """What the coordinator subscribes to."""
        return [self.up("+", "+")]

    def sender(self, topic: str) -> tuple[str, str] | None:
        """(device, kind) of an upward topic of this realm, else None."""
        parts = topic.split("/")
        if len(parts) != 7 or parts[:4] != ["fl", "1", self.realm, "d"] or parts[5] != "up" or not ID.match(parts[4]):
            return None
        return parts[4], parts[6]

    def kind(self, topic: str) -> str:
        """The last level."""
        return topic.rsplit("/", 1)[-1]
