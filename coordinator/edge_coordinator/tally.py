"""What the ledger has of one round's devices, in numbers that are kept up with it: a message costs the same in any fleet.

Made from the ledger when a round is taken up, told of each change after its transaction. Pure; imports the ledger's records.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_coordinator.ledger import Member


class Tally:
    """The devices of one round by what they have come to. Holds their names alone."""

    def __init__(self, number: int, members: Iterable[Member], committed: Iterable[str]) -> None:
        self.number = number
        self._joined: set[str] = set()
        self._unable: set[str] = set()
        self._planned: set[str] = set()
        self._busy: set[str] = set()  # with a plan, not given up, not committed
        self._gave_up: set[str] = set()  # a plan, and no update
        self._committed = set(committed)
        for member in members:
            self.member(member)

    def member(self, member: Member) -> None:
        """A device's row is new or another."""
        name, planned = member.device, member.plan is not None
        self._put(self._joined, name, member.status in ("joined", "planned"))
        self._put(self._unable, name, member.status in ("unable", "excluded"))
        self._put(self._planned, name, planned)
        open_ = planned and name not in self._committed
        self._put(self._busy, name, open_ and member.status != "gave-up")
        self._put(self._gave_up, name, open_ and member.status == "gave-up")

    def commit(self, device: str) -> None:
        """A device's update is in."""
        self._committed.add(device)
        self._busy.discard(device)
        self._gave_up.discard(device)

    def counts(self, revoked: Iterable[str]) -> dict[str, int]:
        """As `RoundState` names them; who was revoked with a plan has given up."""
        return {
            "joined": len(self._joined),
            "unable": len(self._unable),
            "planned": len(self._planned),
            "committed": len(self._committed),
            "gave_up": len(self._gave_up) + sum(device in self._busy for device in revoked),
        }

    @staticmethod
    def _put(group: set[str], name: str, wanted: bool) -> None:
        if wanted:
            group.add(name)
        else:
            group.discard(name)
