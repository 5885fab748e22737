"""An update on its way out: after a power cut there is the whole of it to offer, or nothing, and the disk is free again."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import StoreError, WireError
from edge_runtime.outbox import PENDING_FILE, Outbox
from edge_runtime.records import TrainReport
from edge_runtime.wire import Grant
from tests.samples import MESSAGES
from tests.worlds import fill, small_disk

GRANT: Grant = MESSAGES["grant"]
REPORT = TrainReport(2, True, 4, "torch", 800, 50, 1.5, 0.75, 88.25, 95.0, 240 << 20, 250 << 20, 90.0)


def outbox(folder: Path) -> Outbox:
    """A device's outbox, as after a start."""
    return Outbox(folder, random.Random(1))


def trained(folder: Path, data: bytes = b"an update" * 1000) -> Outbox:
    """One that holds an update."""
    box = outbox(folder)
    box.draft.write_bytes(data)
    box.put(GRANT, REPORT)
    return box


def files(folder: Path) -> list[str]:
    """What lies on the disk."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def update_file(box: Outbox) -> Path:
    """Where the update's bytes lie."""
    assert box.pending
    return box.sender.store.path(bytes.fromhex(box.pending.blob))


def test_an_update_is_offered_again_after_a_restart_and_gone_after_its_answer(tmp_path: Path) -> None:
    offer = trained(tmp_path).due(0.0)
    box = outbox(tmp_path)
    assert offer and box.due(0.0) == offer
    assert (offer.nonce, offer.num_bytes, offer.last_loss) == (GRANT.nonce, 9000, 0.75)
    assert box.due(1.0) is None, "not again at once"
    assert box.due(100.0) == offer
    box.clear()
    assert box.due(1e9) is None
    assert outbox(tmp_path).pending is None
    assert files(tmp_path) == []


@pytest.mark.parametrize("length", [0, 8999])
def test_an_update_that_the_disk_has_cut_short_is_dropped_and_never_offered(tmp_path: Path, length: int) -> None:
    os.truncate(update_file(trained(tmp_path)), length)
    box = outbox(tmp_path)
    assert box.pending is None
    assert box.due(0.0) is None
    assert files(tmp_path) == []


def test_an_update_whose_bytes_are_gone_is_dropped(tmp_path: Path) -> None:
    update_file(trained(tmp_path)).unlink()
    assert outbox(tmp_path).pending is None
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "changes", [None, {"round": "4"}, {"blob": "x" * 64}, {"nonce": "ü" * 32}, {"num_examples": 0}, {"num_bytes": None}]
)
def test_a_note_that_cannot_be_read_is_said_and_dropped_with_its_update(tmp_path: Path, changes: Any) -> None:
    trained(tmp_path)
    note = tmp_path / PENDING_FILE
    whole = note.read_text()
    note.write_text(json.dumps(json.loads(whole) | changes) if changes else whole[:50])
    box = outbox(tmp_path)
    assert box.pending is None
    assert box.damaged
    assert files(tmp_path) == []
    assert not outbox(tmp_path).damaged, "it is over"


def test_a_draft_of_a_training_that_was_killed_is_gone_at_the_next_start(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.draft.write_bytes(b"half")
    outbox(tmp_path)
    assert files(tmp_path) == []


def test_an_update_that_no_room_is_left_to_note_is_refused_and_takes_no_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        box = outbox(disk)
        box.draft.write_bytes(bytes(100_000))
        filler = fill(disk)
        with pytest.raises(StoreError, match="no space left"):
            box.put(GRANT, REPORT)
        assert box.pending is None
        assert files(disk) == [filler.name]
        filler.unlink()
        box.draft.write_bytes(b"the next one")
        box.put(GRANT, REPORT)
        assert outbox(disk).due(0.0) == box.due(0.0)


@pytest.mark.parametrize("loss", [2e6, -2e6])
def test_an_update_whose_offer_no_coordinator_would_read_is_refused_before_it_is_promised(
    tmp_path: Path, loss: float
) -> None:
    box = outbox(tmp_path)
    box.draft.write_bytes(b"an update")
    diverged = TrainReport(**{**vars(REPORT), "last_loss": loss})
    with pytest.raises(WireError, match="offer.last_loss must be within"):
        box.put(GRANT, diverged)
    assert box.pending is None
    assert files(tmp_path) == []
