"""Which versions a device keeps and which one answers, whoever is killed at whatever moment, and on a full disk."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import versions
from edge_runtime.cli import main
from edge_runtime.errors import ModelError, StoreError, UsageError
from edge_runtime.source import MANIFEST_FILE
from edge_runtime.versions import (
    VERSIONS_FILE,
    answering,
    make_room,
    mark_bad,
    mark_checked,
    note_try,
    read_versions,
    rollback,
    stamp,
    use,
)
from tests.device.test_keeper import World
from tests.e2e.test_full_disk import fill, small_disk


def fetch(world: World, *numbers: int) -> None:
    """The device becomes whole in these versions, one after the other."""
    for number in numbers:
        world.keeper.announce(world.publish(number, seed=number))
        world.fetch()


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the many small writes of these tests wait for no disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def world(quick: Path) -> World:
    """A device that was given versions 1, 2 and 3."""
    world = World(quick)
    fetch(world, 1, 2, 3)
    return world


def held(world: World) -> list[int]:
    return [h.manifest.version for h in read_versions(world.folder).held]


def answers(world: World) -> int:
    return answering(world.folder).manifest.version


def blob_of(world: World, number: int) -> bytes:
    return read_versions(world.folder).find(number).blob


# which one


def test_the_newest_answers_until_another_is_pinned_and_then_that_one_whatever_comes(world: World) -> None:
    assert (held(world), answers(world)) == ([3, 2], 3)
    assert use(world.folder, 2).manifest.version == 2
    fetch(world, 4, 5)
    assert (held(world), answers(world), world.keeper.held) == ([5, 4, 2], 2, 5)
    assert use(world.folder, None).manifest.version == 5
    fetch(world, 6)
    assert (held(world), answers(world)) == ([6, 5], 6)


def test_a_rollback_goes_to_the_version_before_and_stays_there_and_from_the_last_there_is_none(world: World) -> None:
    now, before = rollback(world.folder)
    assert now and (now.manifest.version, before.manifest.version, answers(world)) == (3, 2, 2)
    fetch(world, 4)
    assert answers(world) == 2
    with pytest.raises(UsageError, match="no version before model 2"):
        rollback(world.folder)


def test_what_is_not_held_cannot_be_used_and_what_there_is_is_said(world: World) -> None:
    with pytest.raises(UsageError, match="model 1 is not whole on this device; there are: 3, 2"):
        use(world.folder, 1)


def test_a_bad_version_answers_no_more_and_what_answers_instead_is_kept_until_there_is_a_better_one(
    world: World,
) -> None:
    mark_checked(world.folder, blob_of(world, 2))
    mark_bad(world.folder, blob_of(world, 3), "not finite")
    assert answers(world) == 2
    fetch(world, 4)
    mark_bad(world.folder, blob_of(world, 4), "not finite either")
    fetch(world, 5)
    mark_bad(world.folder, blob_of(world, 5), "nor this")
    assert (held(world), answers(world)) == ([5, 2], 2)
    fetch(world, 6)
    assert (held(world), answers(world)) == ([6, 2], 6)
    mark_checked(world.folder, blob_of(world, 6))
    fetch(world, 7)
    assert (held(world), answers(world)) == ([7, 6], 7)


def test_the_version_that_was_checked_last_is_kept_until_a_newer_one_is(world: World) -> None:
    mark_checked(world.folder, blob_of(world, 3))
    fetch(world, 4, 5, 6)
    assert held(world) == [6, 5, 3]


def test_a_rollback_passes_over_bad_versions(world: World) -> None:
    use(world.folder, 2)
    fetch(world, 4, 5)
    mark_bad(world.folder, blob_of(world, 4), "no")
    use(world.folder, None)
    assert rollback(world.folder)[1].manifest.version == 2


def test_where_all_are_bad_that_is_said_and_using_one_forgets_its_mark(world: World) -> None:
    for number in (3, 2):
        mark_bad(world.folder, blob_of(world, number), f"reason {number}")
    with pytest.raises(ModelError, match=r"every model .* marked bad \(3: reason 3; 2: reason 2\): `edge-runtime"):
        answering(world.folder)
    use(world.folder, 3)
    assert answers(world) == 3


def test_a_version_that_came_again_is_no_longer_bad(world: World) -> None:
    mark_bad(world.folder, blob_of(world, 3), "cut off")
    assert answers(world) == 2
    assert world.keeper.manifest
    world.keeper.store.delete(world.keeper.manifest.tensors[0].blob)
    model = world.keeper.announced
    assert model
    world.start()
    world.keeper.announce(model)
    world.fetch()
    assert (held(world), answers(world)) == ([3, 2], 3)


def test_tries_are_counted_until_one_ends_well(world: World) -> None:
    blob = blob_of(world, 3)
    assert [note_try(world.folder, blob) for _ in range(3)] == [0, 1, 2]
    mark_checked(world.folder, blob)
    assert note_try(world.folder, blob) == 0


def test_whoever_follows_the_folder_sees_every_change(world: World) -> None:
    seen = {stamp(world.folder)}
    for change in (
        lambda: use(world.folder, 2),
        lambda: use(world.folder, None),
        lambda: mark_bad(world.folder, blob_of(world, 3), "no"),
        lambda: fetch(world, 4),
    ):
        change()
        seen.add(stamp(world.folder))
    assert len(seen) == 5
    assert stamp(world.folder / "store") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"older": ["x"]}', b'{"use": 7}', b'{"checked": "zz"}', b"[" * 10_000, b'{"marks": [{}]}'],
)
def test_a_damaged_file_of_choices_is_an_error_that_names_it(world: World, content: bytes) -> None:
    (world.folder / VERSIONS_FILE).write_bytes(content)
    with pytest.raises(StoreError, match=r"versions\.json is damaged .*: remove it"):
        answering(world.folder)


def test_a_version_of_which_a_blob_is_gone_or_cut_short_is_not_held(world: World) -> None:
    manifest = read_versions(world.folder).find(2).manifest
    path = world.keeper.store.path(manifest.tensors[-1].blob)
    path.write_bytes(path.read_bytes()[:-1])
    assert (held(world), answers(world)) == ([3], 3)
    path = world.keeper.store.path(read_versions(world.folder).find(3).manifest.tensors[-1].blob)
    path.unlink()
    assert held(world) == []


def test_a_process_that_does_not_let_go_is_waited_for_and_then_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "LOCK_S", 0.1)
    with versions._changing(world.folder), pytest.raises(StoreError, match="another process holds"):
        use(world.folder, 2)


# power cuts


def killed_at(boundary: int, act: Callable[[], object]) -> bool:
    """Do it in a child that dies by SIGKILL before its N-th fsync, rename or deletion; -> whether it died there."""
    child = os.fork()
    if not child:
        seen = 0

        def around(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == boundary:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapped

        try:
            os.fsync, os.replace = around(os.fsync), around(os.replace)
            Path.unlink = around(Path.unlink)  # type: ignore[method-assign]
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_device_killed_at_any_write_of_a_take_over_holds_a_version_that_answers_and_goes_on(quick: Path) -> None:
    world = World(quick)
    fetch(world, 1, 2)
    number, boundary, deaths = 2, 0, 0
    while True:
        boundary += 1
        model = world.publish(number + 1, seed=number + 1)

        def act(model: Any = model) -> None:
            world.keeper.announce(model)
            world.fetch()
            world.keeper.complete()  # where nothing was missing

        died = killed_at(boundary, act)
        deaths += died
        world.start()
        there = held(world)
        assert there[0] in (number, number + 1) and there[1] == there[0] - 1, (boundary, there)
        assert answers(world) == there[0] == world.keeper.held
        assert world.is_whole()
        if not died:
            break
        act()
        number += 1
        assert held(world)[:2] == [number, number - 1]
    assert deaths > 12
    blobs = {b for h in read_versions(world.folder).held for b in (h.blob, *h.manifest.blobs())}
    assert {p.name for p in (world.folder / "store" / "blobs").glob("*/*")} >= {b.hex() for b in blobs}


@pytest.mark.parametrize("change", ["use", "rollback", "bad"])
def test_a_choice_killed_at_any_write_is_made_or_not(world: World, change: str) -> None:
    def act() -> None:
        if change == "use":
            use(world.folder, 2)
        elif change == "rollback":
            rollback(world.folder)
        else:
            mark_bad(world.folder, blob_of(world, 3), "no")

    boundary = 0
    while killed_at(boundary := boundary + 1, act):
        assert answers(world) in (3, 2)
        use(world.folder, 3)
        assert answers(world) == 3
    assert boundary >= 3
    assert answers(world) == 2


# full disks


def test_a_full_disk_keeps_what_answers_and_the_choice_that_was_made(tmp_path: Path) -> None:
    with small_disk(tmp_path / "device", "4M") as disk:
        world = World(tmp_path)
        fetch(world, 1, 2)
        use(world.folder, 1)
        model = world.publish(3, seed=3)
        ballast = fill(disk, 0)
        world.keeper.announce(model)
        with pytest.raises(StoreError, match="no space left"):
            world.fetch()
        with pytest.raises(StoreError, match="no space left"):
            use(world.folder, None)
        world.keeper.pause()
        world.start()
        assert (held(world), answers(world), world.keeper.held) == ([2, 1], 1, 2)
        ballast.unlink()
        world.keeper.announce(model)
        world.fetch()
        assert (held(world), answers(world)) == ([3, 2, 1], 1)


def test_where_there_is_no_room_for_a_newer_version_the_older_ones_go_but_not_the_one_that_answers(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "device", "4M") as disk:
        world = World(tmp_path)
        fetch(world, 1, 2)
        mark_checked(world.folder, blob_of(world, 1))
        fetch(world, 3)
        assert held(world) == [3, 2, 1]
        use(world.folder, 2)
        fill(disk, 64 << 10)
        fetch(world, 4)
        (dropped,) = [event for event in world.events if event["event"] == "dropped"]
        assert (dropped["model_version"], dropped["for_version"]) == (1, 4)
        assert (held(world), answers(world)) == ([4, 3, 2], 2)


def test_room_is_made_on_a_disk_that_takes_no_write_at_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "device", "4M") as disk:
        world = World(tmp_path)
        fetch(world, 1, 2, 3)
        before = world.keeper.store.used_bytes()
        fill(disk, 0)
        assert make_room(world.folder, world.keeper.store, []) == [2]
        assert world.keeper.store.used_bytes() < before
        assert (held(world), answers(world)) == ([3], 3)


# the command


def test_models_lists_uses_and_rolls_back(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> list[dict[str, Any]]:
        assert main(["models", *words, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    state = str(world.folder)
    rows = run("list", state)
    assert [(r["model_version"], r["newest"], r["answers"]) for r in rows] == [(3, True, True), (2, False, False)]
    assert 0 < rows[0]["own_bytes"] < rows[0]["num_bytes"]
    assert run("use", state, "2") == [{"model_version": 2, "pinned": True}]
    assert [r["pinned"] for r in run("list", state)] == [False, True]
    assert run("use", state, "newest") == [{"model_version": 3, "pinned": False}]
    assert run("rollback", state) == [{"model_version": 2, "pinned": True, "before": 3}]
    mark_bad(world.folder, blob_of(world, 3), "not finite")
    assert main(["models", "list", state]) == 0
    shown = capsys.readouterr().out
    assert "bad: not finite" in shown and "answers" in shown and "pinned" in shown


@pytest.mark.parametrize(("words", "code"), [(["use", "9"], 2), (["use", "none"], 2), (["list"], 4), (["rollback"], 4)])
def test_models_says_what_is_wrong(tmp_path: Path, world: World, words: list[str], code: int) -> None:
    state = world.folder if code == 2 else tmp_path
    (tmp_path / MANIFEST_FILE).unlink(missing_ok=True)
    try:
        ended = main(["models", words[0], str(state), *words[1:]])
    except SystemExit as end:
        ended = int(str(end.code))
    assert ended == code
