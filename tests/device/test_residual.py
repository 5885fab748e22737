"""Error feedback: nothing is lost, nothing counts twice, whatever crashes; another line of models begins from nothing."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.codecs import CODECS
from edge_runtime.encoding import read_update, write_update
from edge_runtime.outbox import PENDING_FILE, Outbox
from edge_runtime.records import TrainReport, TrainSettings
from edge_runtime.residual import ErrorFeedback, Residual, error_feedback, line_of
from edge_runtime.wire import Grant
from tests.samples import MESSAGES, OTHER, small_manifest, small_spec

Array = np.ndarray[Any, np.dtype[Any]]
SPEC = small_spec(2, 300)
LINE, OTHER_LINE = "a" * 64, "b" * 64
GRANT: Grant = MESSAGES["grant"]
REPORT = TrainReport(2, True, 4, "onnx", 800, 50, 1.5, 0.75, 88.25, 95.0, 240 << 20, 250 << 20, 90.0, codec="topk10")


def sizes(depth: int) -> dict[str, int]:
    """Numbers of values by tensor."""
    return {t.name: t.size for t in SPEC.suffix(depth)}


def deltas(depth: int, seed: int) -> dict[str, Array]:
    """What a training changed."""
    chance = np.random.default_rng(seed)
    return {n: chance.normal(0, 0.01, size).astype(np.float32) for n, size in sizes(depth).items()}


def trained(
    residual: Residual, update: Path, changed: dict[str, Array], *, round_: int, line: str = LINE, codec: str = "topk10"
) -> dict[str, Array]:
    """What a training process writes: the update and the draft of its residual; -> what the update says."""
    depth = next(d for d in range(3) if list(sizes(d)) == list(changed))
    with (
        error_feedback(residual.kept, residual.draft, line, round_, sizes(depth)) as feedback,
        update.open("wb") as file,
    ):
        write_update(file, codec, sizes(depth), changed.items(), round_, feedback)
    found: dict[str, list[Array]] = {name: [] for name in changed}
    for tensor, _, values in read_update(update, SPEC.suffix(depth), codec):
        found[tensor.name].append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def kept(residual: Residual, depth: int, *, round_: int = 99, line: str = LINE) -> dict[str, Array]:
    """What is left out so far."""
    with Path(os.devnull).open("wb") as nowhere:
        feedback = ErrorFeedback(residual.kept, line, round_, nowhere, sizes(depth))
        found = {name: feedback.before(name, 0, size) for name, size in sizes(depth).items()}
        feedback.close()
    return found


def test_what_is_sent_and_what_is_kept_add_up_to_every_delta(tmp_path: Path) -> None:
    residual, total, sent = Residual(tmp_path / "r"), {n: np.zeros(s) for n, s in sizes(2).items()}, {}
    sent = {n: np.zeros(s) for n, s in sizes(2).items()}
    for round_ in range(1, 5):
        changed = deltas(2, round_)
        said = trained(residual, tmp_path / "u", changed, round_=round_)
        residual.stage()
        residual.settle(committed=True)
        for name, values in changed.items():
            total[name] += values
            sent[name] += said[name]
            left = kept(residual, 2)[name]
            assert np.abs(sent[name] + left - total[name]).max() < 1e-7
    assert np.count_nonzero(kept(residual, 2)["block.0.w"]) > 0.8 * sizes(2)["block.0.w"]


def test_a_residual_keeps_a_constant_delta_from_being_left_out_for_ever(tmp_path: Path) -> None:
    """Without error feedback the same tenth would be sent each round, and the rest never."""
    residual = Residual(tmp_path / "r")
    changed = {n: np.linspace(0.5, 1.0, s, dtype=np.float32) for n, s in sizes(1).items()}
    seen = np.zeros(sizes(1)["block.1.w"], bool)
    for round_ in range(1, 30):
        seen |= trained(residual, tmp_path / "u", changed, round_=round_)["block.1.w"] != 0
        residual.stage()
        residual.settle(committed=True)
    assert seen.all()


def test_a_retry_gives_the_same_bytes_and_applies_the_residual_once(tmp_path: Path) -> None:
    residual = Residual(tmp_path / "r")
    trained(residual, tmp_path / "u", deltas(2, 1), round_=1)
    residual.stage()
    residual.settle(committed=True)
    trained(residual, tmp_path / "u", deltas(2, 2), round_=2)
    first, draft = (tmp_path / "u").read_bytes(), residual.draft.read_bytes()
    trained(residual, tmp_path / "u", deltas(2, 2), round_=2)  # the process died before anybody heard of it
    assert (tmp_path / "u").read_bytes() == first
    assert residual.draft.read_bytes() == draft


def test_another_line_of_models_or_no_later_round_begins_from_nothing(tmp_path: Path) -> None:
    residual = Residual(tmp_path / "r")
    trained(residual, tmp_path / "u", deltas(2, 1), round_=3)
    residual.stage()
    residual.settle(committed=True)
    assert any(v.any() for v in kept(residual, 2, round_=4).values())
    assert not any(v.any() for v in kept(residual, 2, round_=3).values()), "a fleet that began anew"
    assert not any(v.any() for v in kept(residual, 2, line=OTHER_LINE).values())


def test_tensors_that_a_shallower_plan_leaves_alone_stay_kept(tmp_path: Path) -> None:
    residual = Residual(tmp_path / "r")
    trained(residual, tmp_path / "u", deltas(2, 1), round_=1)
    residual.stage()
    residual.settle(committed=True)
    before = kept(residual, 2)
    trained(residual, tmp_path / "u", deltas(1, 2), round_=2)
    residual.stage()
    residual.settle(committed=True)
    after = kept(residual, 2)
    for name in before:
        assert np.array_equal(before[name], after[name]) == (name not in sizes(1)), name


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"line": 1}\n', None, "nan", "cut"])
def test_a_damaged_residual_counts_as_none(tmp_path: Path, damage: bytes | str | None) -> None:
    residual = Residual(tmp_path / "r")
    trained(residual, tmp_path / "u", deltas(1, 1), round_=1)
    residual.stage()
    residual.settle(committed=True)
    data = residual.kept.read_bytes()
    if damage == "nan":
        residual.kept.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    elif damage == "cut":
        residual.kept.write_bytes(data[:-1])
    elif damage is None:
        residual.kept.unlink()
    else:
        residual.kept.write_bytes(damage)  # type: ignore[arg-type]
    assert not any(v.any() for v in kept(residual, 1).values())
    trained(residual, tmp_path / "u", deltas(1, 2), round_=2)
    residual.stage()
    residual.settle(committed=True)
    assert any(v.any() for v in kept(residual, 1).values())


def test_the_line_is_of_run_base_model_and_shape_and_outlives_a_new_version() -> None:
    manifest = small_manifest()
    plain = TrainSettings()
    line = line_of("first", manifest, plain)
    later = tuple(replace(t, blob=OTHER) if t.part >= 0 else t for t in manifest.tensors)
    assert line_of("first", replace(manifest, version=9, parent=OTHER, tensors=later), plain) == line
    others = [
        line_of("second", manifest, plain),
        line_of("first", manifest, TrainSettings(mask_every=4)),
        line_of("first", manifest, TrainSettings(mask_every=4, mask_seed=1)),
        line_of("first", replace(manifest, adapters=manifest.tensors[:2]), plain),
        line_of("first", replace(manifest, labels=("a", "b")), plain),
        line_of("first", replace(manifest, tensors=tuple(replace(t, blob=OTHER) for t in manifest.tensors)), plain),
    ]
    assert len({line, *others}) == 7


# with the outbox: what a device does, and where it may die


def outbox(folder: Path) -> Outbox:
    """As after a start."""
    return Outbox(folder, random.Random(1))


def put(box: Outbox, round_: int, depth: int = 2) -> None:
    """Train and take the update over."""
    trained(box.residual, box.draft, deltas(depth, round_), round_=round_)
    box.put(replace(GRANT, round=round_), REPORT)


def test_only_a_committed_update_moves_the_residual_on(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    put(box, 1)
    assert box.pending and box.pending.codec == "topk10" == box.pending.offer().codec
    box.settle("committed")
    first = kept(box.residual, 2)
    for round_, status in ((2, "late"), (3, "excluded")):
        put(box, round_)
        box.settle(status)
        assert all(np.array_equal(kept(box.residual, 2)[n], first[n]) for n in first)
    put(box, 4)
    box.settle("committed")
    assert not np.array_equal(kept(box.residual, 2)["block.0.w"], first["block.0.w"])
    assert sorted(p.name for p in (tmp_path / "residual").iterdir()) == ["kept"]


def test_a_refused_update_takes_the_residual_with_it(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    put(box, 1)
    box.settle("committed")
    put(box, 2)
    box.settle("rejected")
    assert list((tmp_path / "residual").iterdir()) == []


def test_a_restart_anywhere_applies_a_residual_once(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    put(box, 1)
    box.settle("committed")
    before = kept(box.residual, 2)
    trained(box.residual, box.draft, deltas(2, 2), round_=2)  # dies before the update is pending
    box = outbox(tmp_path)
    assert not box.residual.draft.exists()
    assert all(np.array_equal(kept(box.residual, 2)[n], before[n]) for n in before)
    put(box, 2)
    box = outbox(tmp_path)  # dies while it is offered
    assert box.pending
    assert all(np.array_equal(kept(box.residual, 2)[n], before[n]) for n in before)
    box.residual.settle(committed=True)  # dies between the residual and the end of the update
    after = kept(box.residual, 2)
    box = outbox(tmp_path)
    assert box.pending, "it will be offered again, and answered again"
    box.settle("committed")
    assert all(np.array_equal(kept(box.residual, 2)[n], after[n]) for n in after)
    assert not (tmp_path / PENDING_FILE).exists()


def test_an_update_of_another_codec_leaves_the_residual_alone(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    put(box, 1)
    box.settle("committed")
    before = box.residual.kept.read_bytes()
    box.draft.write_bytes(b"some int8")
    box.put(replace(GRANT, round=2), replace(REPORT, codec="int8"))
    box.settle("committed")
    assert box.residual.kept.read_bytes() == before


def test_every_codec_may_have_error_feedback(tmp_path: Path) -> None:
    for name in CODECS:
        residual = Residual(tmp_path / name)
        changed = deltas(1, 1)
        said = trained(residual, tmp_path / "u", changed, round_=1, codec=name)
        residual.stage()
        residual.settle(committed=True)
        left = kept(residual, 1)
        assert all(np.abs(said[n] + left[n] - changed[n]).max() < 1e-8 for n in changed)
