"""One run of a fleet: opens rounds, has the method plan them, closes them into the next model. Ledger and blobs, no network.

`rounds.py` decides what is next; this does it, each step in one transaction and so that it may be repeated after a crash
and gives the same bits. The server tells the devices.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edge_coordinator import rounds
from edge_coordinator.aggregate import MAX_MEMBERS
from edge_coordinator.config import FleetConfig
from edge_coordinator.ledger import Contribution, Ledger, Member, read_join
from edge_coordinator.methods import METHODS, configure_train
from edge_coordinator.methods.method import Stage
from edge_coordinator.models import Models
from edge_coordinator.start_version import Primer, has_adapters
from edge_coordinator.tally import Tally
from edge_runtime.cost import DataShape
from edge_runtime.errors import StoreError, UsageError
from edge_runtime.kinds import of_row
from edge_runtime.layout import check_adapters
from edge_runtime.manifest import Manifest
from edge_runtime.planner import make_plan
from edge_runtime.prune_plan import check_prunable, kept_of
from edge_runtime.wire import pack

Emit = Callable[[dict[str, Any]], None]


class Run:
    """The rounds of the run that fleet.toml names.

    Raises UsageError if fleet.toml names targets of adapters that the model does not have, or prunes one that cannot be.

    Attributes:
        method: what plans and aggregates.
        manifest, manifest_blob: the newest model version and the hash of its manifest.
        epoch: counts the starts of this fleet's coordinator.

    `now` is the server's clock, which nobody sets: it decides when a phase ends. The ledger keeps Unix seconds, for people
    and for the next start, which gives an open phase its whole time again.
    """

    def __init__(self, config: FleetConfig, ledger: Ledger, models: Models, emit: Emit, now: float) -> None:
        newest = models.newest()
        if newest is None:
            raise StoreError("the fleet has no model yet: run `edge-coordinator init` again")
        self.manifest: Manifest = newest[0]
        self.manifest_blob: bytes = newest[1]
        self.config, self.ledger, self.models = config, ledger, models
        self._emit = emit
        self.name = config.run.name
        admit = min(MAX_MEMBERS, math.ceil(config.run.goal * config.run.overselection))
        timeouts = (config.run.join_timeout_s, config.run.report_timeout_s)
        self.rules = rounds.Rules(config.run.goal, config.run.quorum, admit, *timeouts)
        self._server = config.run.server_settings
        self._tally: Tally | None = None  # of the newest round
        self.method = METHODS[config.run.method]
        check_adapters(self.manifest.spec, config.train, "[train] lora_rank")
        if 0 < config.run.rank_budget < (blocks := self.manifest.num_blocks):
            given = f"[run] rank_budget {config.run.rank_budget} is below 1 for each of the model's {blocks} blocks"
            raise UsageError(f"{given}: give at least {blocks}, or 0 for that of the arithmetic distribution")
        if self.method.prunes:
            check_prunable(self.manifest.spec)
        self._deadline = now  # of the newest round's phase, by the server's clock
        self.epoch = self._resume(now)

    @property
    def finished(self) -> bool:
        """The run has had all its rounds."""
        last = self.ledger.last_round(self.name)
        return last is not None and last["round"] >= self.config.run.rounds and last["state"] in ("published", "failed")

    def state(self, present: int = 0) -> rounds.RoundState | None:
        """The newest round as the ledger has it; `present` devices are online."""
        last = self.ledger.last_round(self.name)
        if last is None:
            return None
        if self._tally is None or self._tally.number != last["round"]:
            members = self.ledger.members(self.name, last["round"]).values()
            self._tally = Tally(last["round"], members, self.ledger.contributions(self.name, last["round"]))
        counts = self._tally.counts(self.ledger.revoked())
        return rounds.RoundState(last["round"], last["state"], self._deadline, present=present, **counts)

    def stage(self, number: int) -> Stage:
        """What the method asks of the devices in a round."""
        remembered = self.ledger.method_state(self.name, self.config.run.method)
        return self.method.stage(
            remembered, number, self.manifest.num_blocks, self.config.train, self.config.run.method_options
        )

    def advance(self, now: float, present: int) -> str:
        """Do what is due; -> "opened", "planned", "published", "failed", or "" when nothing was."""
        state = self.state(present)
        if state is None or state.state in ("published", "failed"):
            return "" if self.finished else self._open(state.number + 1 if state else 1, now)
        wanted = rounds.next_state(state, self.rules, now)
        if wanted == "collecting" and state.state == "joining":
            return self._plan(state, now)
        if wanted == "failed":
            return self._fail(state)
        if wanted == "closing":
            return self._close(state)
        return ""

    def set_member(self, number: int, member: Member) -> None:
        """Write one member, durably."""
        with self.ledger.transaction():
            self.ledger.set_member(self.name, number, member)
        if self._tally and self._tally.number == number:
            self._tally.member(member)

    def contribute(self, number: int, item: Contribution) -> bool:
        """Commit an update, durably; False if this device's is in already."""
        with self.ledger.transaction():
            fresh = self.ledger.contribute(self.name, number, item, time.time())
        if self._tally and self._tally.number == number:
            self._tally.commit(item.device)
        return fresh

    def _resume(self, now: float) -> int:
        """Take up where the ledger stands: one epoch more, and an open phase gets its time again."""
        with self.ledger.transaction():
            epoch = int(self.ledger.get("epoch") or 0) + 1
            self.ledger.put("epoch", str(epoch))
            last = self.ledger.last_round(self.name)
            if last and last["state"] == "joining" and not has_adapters(self.manifest, self.stage(last["round"])):
                # nobody can join for a method whose adapters the model does not have, or not without them
                reason = "fleet.toml names other adapters now than when this round was opened"
                self._end_round(self.name, last["round"], "joining", "failed", reason)
            elif last and last["state"] in ("joining", "collecting"):
                time_s = self.rules.join_timeout_s if last["state"] == "joining" else self.rules.report_timeout_s
                self._deadline = now + time_s
                self.ledger.extend_round(self.name, last["round"], time.time() + time_s)
            for other in self.ledger.rounds():
                if other["run"] != self.name and other["state"] not in ("published", "failed"):
                    reason = f"fleet.toml names another run, {self.name}"
                    self._end_round(other["run"], other["round"], other["state"], "failed", reason)
                    self._emit(
                        {"event": "round-failed", "round": other["round"], "reason": f"{other['run']}: {reason}"}
                    )
        self.models.clean()
        return epoch

    def _open(self, number: int, now: float) -> str:
        self._prepare(number)
        opened = rounds.opened(number, self.rules, now)
        today = time.time()
        with self.ledger.transaction():
            self.ledger.open_round(self.name, number, self.manifest.version, today + self.rules.join_timeout_s, today)
        self._deadline = opened.deadline
        version = self.manifest.version
        self._emit({"event": "round-opened", "run": self.name, "round": number, "model_version": version})
        return "opened"

    def _prepare(self, number: int) -> None:
        """Publish the model as a version of its own where a round wants other adapters than it has.

        Tensors that stay as they are keep their states of the server optimizer.
        """
        name, before = self.config.run.method, self.manifest
        primer = self._primer()
        prepared = self.models.with_adapters(before, self.manifest_blob, self.stage(number), name, primer)
        if prepared is None:
            return
        manifest, blob = prepared
        same = {(t.name, t.blob) for t in (*before.tensors, *before.adapters)}
        kept = {t.name for t in (*manifest.tensors, *manifest.adapters) if (t.name, t.blob) in same}
        states = self.ledger.optimizer_states(self.name, before.version, self._server.name)
        with self.ledger.transaction():
            self.ledger.add_model(manifest.version, blob, self.name, number - 1, {}, time.time())
            states = {tensor: state for tensor, state in states.items() if tensor in kept}
            self.ledger.set_optimizer_states(self.name, manifest.version, self._server.name, states)
        self.manifest, self.manifest_blob = manifest, blob
        primed = bool(primer and manifest.adapters)
        event = {"model_version": manifest.version, "tensors": len(manifest.adapters), "primed": primed}
        self._emit({"event": "adapters-begun", **event})

    def _primer(self) -> Primer | None:
        """What the run's adapters are made from, where its method makes them from what the run has changed."""
        rows = self.ledger.models()
        start = self.ledger.run_start() if self.method.prime and rows[-1].run == self.name else None
        for row in rows:
            if self.method.prime and row.version == start and self.models.store.has(row.manifest):
                return Primer(self.models.manifest(row), self.method.prime)
        return None

    def _plan(self, state: rounds.RoundState, now: float) -> str:
        """The cohort is complete: the method plans for all of it at once."""
        members = self.ledger.members(self.name, state.number)
        joins = {d: read_join(m) for d, m in members.items() if m.status == "joined"}
        train, name, stage = self.config.train, self.config.run.method, self.stage(state.number)
        chosen, remembered = configure_train(
            name,
            self.ledger.method_state(self.name, name),
            joins,
            number=state.number,
            num_blocks=self.manifest.num_blocks,
            settings=train,
            options=self.config.run.method_options,
        )
        planned: list[Member] = []
        for device, choice in chosen.items():
            if choice.row is None:
                planned.append(replace(members[device], status="excluded", reason=choice.why))
                continue
            settings, adapters = of_row(stage.settings, stage.adapters, choice.row)
            settings = replace(settings, seed=_seed(train.seed, state.number, device))
            plan = make_plan(choice.row, DataShape(joins[device].num_examples, 0, 0.0), settings)
            plan = replace(plan, ranks=choice.ranks, adapters=adapters, pruning=choice.pruning)
            planned.append(replace(members[device], status="planned", nonce=os.urandom(16), plan=pack(plan)))
        after = rounds.collecting(state, self.rules, sum(m.plan is not None for m in planned), now)
        today = time.time()
        with self.ledger.transaction():
            until = today + self.rules.report_timeout_s
            self.ledger.move_round(self.name, state.number, "joining", "collecting", until, today)
            for member in planned:
                self.ledger.set_member(self.name, state.number, member)
            self.ledger.set_method_state(self.name, state.number, name, remembered)
        self._tally = None  # taken up anew
        self._deadline = after.deadline
        counts = {"planned": after.planned, "members": len(members)}
        self._emit({"event": "round-planned", "round": state.number, **counts})
        return "planned"

    def _close(self, state: rounds.RoundState) -> str:
        """closing -> published."""
        if state.state == "collecting":
            self.ledger.move_round(self.name, state.number, "collecting", "closing", time.time(), time.time())
        committed = self.ledger.contributions(self.name, state.number)
        name = self.config.run.method
        collected = self.models.collect(
            self.name, state.number, self.manifest, committed, self.method, self.config.train
        )
        changes, remembered = self.method.aggregate(self.ledger.method_state(self.name, name), collected)
        optimizer = self.models.optimizer(self.name, self.manifest.version, self._server)
        kept = self.method.kept(remembered)
        manifest, blob = self.models.next_version(self.manifest, self.manifest_blob, changes, name, optimizer, kept)
        examples = sum(c.num_examples for c in committed.values())
        loss = sum(c.num_examples * c.metrics["last_loss"] for c in committed.values()) / examples
        metrics = {"members": sorted(committed), "num_examples": examples, "mean_loss": round(loss, 5)}
        if kept:
            metrics["sparsity"] = round(kept_of(manifest.spec, kept).sparsity(manifest.spec), 5)
        with self.ledger.transaction():
            self._end_round(self.name, state.number, "closing", "published")
            self.ledger.add_model(manifest.version, blob, self.name, state.number, metrics, time.time())
            self.ledger.set_optimizer_states(self.name, manifest.version, self._server.name, optimizer.states)
            self.ledger.set_method_state(self.name, state.number, name, remembered)
        self.manifest, self.manifest_blob = manifest, blob
        self._emit({"event": "round-published", "round": state.number, "model_version": manifest.version, **metrics})
        return self._ended("published")

    def _fail(self, state: rounds.RoundState) -> str:
        of = state.planned or state.joined
        reason = f"{state.committed} of {of} devices reported, the quorum is {self.rules.quorum}"
        with self.ledger.transaction():
            self._end_round(self.name, state.number, state.state, "failed", reason)
        self._emit({"event": "round-failed", "round": state.number, "reason": reason})
        return self._ended("failed")

    def _end_round(self, run: str, number: int, old: str, new: str, reason: str = "") -> None:
        today = time.time()
        self.ledger.move_round(run, number, old, new, today, today, reason)

    def _ended(self, how: str) -> str:
        self.models.clean()
        if self.finished:
            self._emit({"event": "run-finished", "run": self.name, "model_version": self.manifest.version})
        return how


def _seed(seed: int, number: int, device: str) -> int:
    """The device's own seed for a round: the same in every run with the same settings."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{device}".encode()).digest()[:7], "big")
