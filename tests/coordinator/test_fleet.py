"""A fleet's folder: made once, devices let in, renewed and shut out, and no secret in plain sight."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from edge_coordinator.config import CONFIG_FILE, load_config
from edge_coordinator.fleet import LEDGER_FILE, SECRET_FILE, Fleet, init, labels_of
from edge_coordinator.methods import METHODS
from edge_coordinator.models import Models
from edge_coordinator.secrets import hash_secret, verify_secret
from edge_runtime.credentials import read_credentials
from edge_runtime.errors import DataError, EdgeError, StoreError, UsageError
from edge_runtime.store import BlobStore
from edge_runtime.topics import COORDINATOR
from tests.worlds import fill, small_disk


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    init(tmp_path / "farm", labels=["no", "yes"], port=1999)
    return Fleet(tmp_path / "farm")


def verified(fleet: Fleet, user: str, secret: str) -> bool:
    """As the broker does it at a log-in."""
    return verify_secret(secret, fleet.lookup()(user) or "")


# making one


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("farm", "farm"),
        ("My Fleet!", "my-fleet"),
        ("ÜÖÄ", "fleet"),
        ("---", "fleet"),
        ("a" * 50, "a" * 36),
        ("a.b_c-1", "a-b_c-1"),
    ],
)
def test_a_fleet_is_named_after_its_folder_as_far_as_an_id_allows(tmp_path: Path, folder: str, name: str) -> None:
    init(tmp_path / folder, labels=["no", "yes"])
    assert load_config(tmp_path / folder).realm == name


def test_what_is_given_is_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    path = init(
        tmp_path / "f", name="f-1", base=str(tmp_path / "base"), family="my.family", labels=["ä", '"', "\\", "🔥", "#x", "{a}"],
        max_length=32, method="head", rounds=3, goal=5, quorum=4, seed=11, port=2000,
    )  # fmt: skip
    assert path == tmp_path / "f" / CONFIG_FILE
    config = load_config(tmp_path / "f")
    assert config.realm == "f-1"
    assert (config.model.base, config.model.family, config.model.max_length) == (
        str(tmp_path / "base"),
        "my.family",
        32,
    )
    assert config.model.labels == ("ä", '"', "\\", "🔥", "#x", "{a}")
    assert (config.run.method, config.run.rounds, config.run.goal, config.run.quorum) == ("head", 3, 5, 4)
    assert (config.train.seed, config.broker.port) == (11, 2000)


def test_a_base_that_is_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    init(tmp_path / "f", base="base", labels=["no", "yes"])
    assert load_config(tmp_path / "f").model.base == str(tmp_path / "base")


def test_a_fleet_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = init(tmp_path, name="a", labels=["no", "yes"])
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already: edit it, or choose another folder"):
        init(tmp_path, name="b", labels=["no", "yes"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong", [{"method": "cafe"}, {"goal": 0}, {"quorum": 9}, {"rounds": 0}, {"seed": -1}, {"port": 70_000}, {"labels": ["a", "a"]}, {"name": "A B"}, {"labels": ["\ud800", "a"]}])  # fmt: skip
def test_a_wrong_value_leaves_no_file(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        init(tmp_path, **{"labels": ["no", "yes"], **wrong})  # type: ignore[arg-type]
    assert not (tmp_path / CONFIG_FILE).exists()


def test_labels_come_from_a_data_file_sorted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,b\ntwo,a\nthree,b\n")
    assert labels_of(path, "text", "label") == ("a", "b")


def test_a_bad_row_is_named_with_its_line_or_skipped_on_demand_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\none,b\ntwo,a\ngrün,c\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 4: .*(.|\n)*--encoding.*--skip-bad-rows"):
        labels_of(path, "text", "label")
    assert labels_of(path, "text", "label", encoding="latin-1") == ("a", "b", "c")
    said: list[str] = []
    assert labels_of(path, "text", "label", skip_bad_rows=True, progress=said.append) == ("a", "b")
    assert "skipped 1 bad rows; line 4" in said[0]


# devices


def test_an_enrolled_device_has_a_file_that_lets_it_in(fleet: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "pi-1.toml"
    credentials = fleet.enroll("pi-1", out)
    assert read_credentials(out) == credentials
    assert (credentials.realm, credentials.device, credentials.host, credentials.port) == (
        "farm",
        "pi-1",
        "127.0.0.1",
        1999,
    )
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert verified(fleet, "pi-1", credentials.secret)
    assert not verified(fleet, "pi-1", credentials.secret + "x")
    assert not verified(fleet, "pi-2", credentials.secret)


def test_no_file_of_the_fleet_holds_a_devices_secret(fleet: Fleet, tmp_path: Path) -> None:
    credentials = fleet.enroll("pi-1", tmp_path / "pi-1.toml")
    for path in fleet.folder.rglob("*"):
        assert not path.is_file() or credentials.secret.encode() not in path.read_bytes()


def test_a_device_is_enrolled_once_and_the_second_try_changes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    first = fleet.enroll("pi-1", tmp_path / "one.toml")
    with pytest.raises(UsageError, match="exists already: --renew"):
        fleet.enroll("pi-1", tmp_path / "one.toml")
    with pytest.raises(UsageError, match="pi-1 is enrolled already"):
        fleet.enroll("pi-1", tmp_path / "two.toml")
    assert not (tmp_path / "two.toml").exists()
    assert read_credentials(tmp_path / "one.toml") == first
    assert [row["device"] for row in fleet.ledger.devices()] == ["pi-1"]
    assert verified(fleet, "pi-1", first.secret)


def test_a_renewed_device_has_a_new_secret_and_its_old_one_is_worth_nothing(fleet: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "pi-1.toml"
    old = fleet.enroll("pi-1", out)
    new = fleet.enroll("pi-1", out, renew=True)
    assert read_credentials(out) == new
    assert verified(fleet, "pi-1", new.secret)
    assert not verified(fleet, "pi-1", old.secret)


@pytest.mark.parametrize("renew", [False, True])
def test_a_file_that_is_left_of_a_device_nobody_knows_is_said_to_be_just_that(
    fleet: Fleet, tmp_path: Path, renew: bool
) -> None:
    (tmp_path / "pi-1.toml").write_text("of an older fleet")
    with pytest.raises(UsageError, match="exists already, and no pi-1 is enrolled: remove it"):
        fleet.enroll("pi-1", tmp_path / "pi-1.toml", renew=renew)
    (tmp_path / "pi-1.toml").unlink()
    fleet.enroll("pi-1", tmp_path / "pi-1.toml")


def test_a_device_that_was_never_enrolled_is_not_renewed(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no device pi-9"):
        fleet.enroll("pi-9", tmp_path / "pi-9.toml", renew=True)
    assert not (tmp_path / "pi-9.toml").exists()


def test_a_revoked_device_is_out_until_it_is_renewed(fleet: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "pi-1.toml"
    old = fleet.enroll("pi-1", out)
    fleet.enroll("pi-2", tmp_path / "pi-2.toml")
    fleet.ledger.revoke("pi-1")
    assert not verified(fleet, "pi-1", old.secret)
    assert [user for user, _ in fleet.users()] == [COORDINATOR, "pi-2"]
    with pytest.raises(UsageError, match="enrolled already"):
        fleet.enroll("pi-1", tmp_path / "again.toml")
    new = fleet.enroll("pi-1", out, renew=True)
    assert verified(fleet, "pi-1", new.secret)
    assert not verified(fleet, "pi-1", old.secret)


@pytest.mark.parametrize("name", ["", "Pi", "a/b", "+", "#", "../x", "a b", "é", "x" * 37, "a\n", "coordinator"])
def test_a_name_that_is_no_id_or_the_coordinators_is_refused_before_anything_is_written(
    fleet: Fleet, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="must be 1 to 36|no device may be called coordinator"):
        fleet.enroll(name, tmp_path / "out.toml")
    assert fleet.ledger.devices() == []
    assert not (tmp_path / "out.toml").exists()


def test_a_file_that_cannot_be_written_enrols_nobody(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError):
        fleet.enroll("pi-1", tmp_path / "file" / "pi-1.toml")
    assert fleet.ledger.devices() == []
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        fill(disk)
        with pytest.raises(StoreError, match="no space left"):
            fleet.enroll("pi-1", disk / "pi-1.toml")
        assert not (disk / "pi-1.toml").exists()
    assert fleet.ledger.devices() == []
    fleet.enroll("pi-1", tmp_path / "pi-1.toml")


def test_of_several_devices_all_have_their_files_or_none_is_enrolled(fleet: Fleet, tmp_path: Path) -> None:
    old = fleet.enroll("pi-1", tmp_path / "pi-1.toml")
    fleet.enroll("pi-0", tmp_path / "0.toml")
    (tmp_path / "file").write_bytes(b"")
    bad = {"pi-2": tmp_path / "pi-2.toml", "pi-3": tmp_path / "file" / "pi-3.toml"}
    with pytest.raises(StoreError):
        fleet.enroll_all(bad)
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        fill(disk)
        with pytest.raises(StoreError, match="no space left"):
            fleet.enroll_all({"pi-1": tmp_path / "pi-1.toml", "pi-0": disk / "pi-0.toml"}, renew=True)
    assert [row["device"] for row in fleet.ledger.devices()] == ["pi-0", "pi-1"]
    assert sorted(path.name for path in tmp_path.glob("*pi-*")) == ["pi-1.toml"]
    assert read_credentials(tmp_path / "pi-1.toml") == old
    assert verified(fleet, "pi-1", old.secret)
    made = fleet.enroll_all({"pi-2": tmp_path / "pi-2.toml", "pi-3": tmp_path / "pi-3.toml"})
    assert [read_credentials(tmp_path / f"{one.device}.toml") for one in made] == made
    assert all(verified(fleet, one.device, one.secret) for one in made)


def test_devices_are_told_the_address_that_reaches_the_broker(tmp_path: Path) -> None:
    def announced(broker: str, **options: str) -> str:
        folder = tmp_path / os.urandom(4).hex()
        init(folder, labels=["no", "yes"])
        text = (folder / CONFIG_FILE).read_text().partition("[broker]")[0]
        (folder / CONFIG_FILE).write_text(text + "[broker]\n" + broker)
        return Fleet(folder).enroll("pi-1", folder / "pi-1.toml", **options).host  # type: ignore[arg-type]

    assert announced('host = "10.0.0.5"') == "10.0.0.5"
    assert announced('host = "10.0.0.5"\nannounce_host = "broker.example"') == "broker.example"
    assert announced('announce_host = "broker.example"', host="flag.example") == "flag.example"
    for everywhere in ("0.0.0.0", "::", ""):
        assert announced(f'host = "{everywhere}"') == "127.0.0.1"


# the coordinator's own secret


def test_the_coordinators_secret_is_made_once_and_kept(fleet: Fleet) -> None:
    secret = fleet.secret()
    assert len(secret) == 43
    assert stat.S_IMODE((fleet.folder / SECRET_FILE).stat().st_mode) == 0o600
    assert verified(fleet, COORDINATOR, secret)
    again = Fleet(fleet.folder)
    assert again.secret() == secret
    assert again.ledger.get("coordinator_secret") == fleet.ledger.get("coordinator_secret"), "the hash too"


def test_after_a_kill_between_the_secret_and_its_hash_they_fit_again(fleet: Fleet) -> None:
    for stored in ("", hash_secret("an older one")):
        fleet.ledger.put("coordinator_secret", stored)
        again = Fleet(fleet.folder)
        assert verified(again, COORDINATOR, again.secret())


def test_a_lost_secret_file_is_replaced(fleet: Fleet) -> None:
    old = fleet.secret()
    (fleet.folder / SECRET_FILE).unlink()
    again = Fleet(fleet.folder)
    assert again.secret() != old
    assert verified(again, COORDINATOR, again.secret())
    assert not verified(again, COORDINATOR, old)


@pytest.mark.parametrize("content", ["", " \n", "\0folder"])
def test_a_secret_that_cannot_be_read_is_a_clear_error_and_can_be_removed(fleet: Fleet, content: str) -> None:
    path = fleet.folder / SECRET_FILE
    path.unlink()
    if content == "\0folder":
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(StoreError, match="remove it, and another secret is made"):
        Fleet(fleet.folder)
    path.rmdir() if path.is_dir() else path.unlink()
    assert verified(Fleet(fleet.folder), COORDINATOR, Fleet(fleet.folder).secret())


# the ledger


@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_a_lost_ledger_beside_models_is_refused_and_the_models_stay(fleet: Fleet, lost: str) -> None:
    blob = Models(fleet.folder, fleet.ledger).store.put(b"trained for weeks")
    fleet.ledger.close()
    kept = (fleet.folder / LEDGER_FILE).read_bytes()
    (fleet.folder / LEDGER_FILE).unlink()
    if lost == "empty":
        (fleet.folder / LEDGER_FILE).touch()
    for _ in range(2):
        with pytest.raises(StoreError, match="new or empty.*put the ledger back from a backup"):
            Fleet(fleet.folder)
    assert BlobStore(fleet.folder / "store").has(blob)
    (fleet.folder / LEDGER_FILE).write_bytes(kept)
    assert Fleet(fleet.folder).secret() == fleet.secret()


def test_a_first_import_that_was_killed_may_be_repeated(fleet: Fleet) -> None:
    Models(fleet.folder, fleet.ledger).store.put(b"the first tensor")
    assert Fleet(fleet.folder).ledger.newest_model() is None


def test_users_are_everybody_who_may_connect_with_their_hashes(fleet: Fleet, tmp_path: Path) -> None:
    secrets = {COORDINATOR: fleet.secret()}
    for device in ("pi-2", "pi-1"):
        secrets[device] = fleet.enroll(device, tmp_path / f"{device}.toml").secret
    users = fleet.users()
    assert [user for user, _ in users] == [COORDINATOR, "pi-1", "pi-2"]
    assert all(verify_secret(secrets[user], hashed) for user, hashed in users)


def test_the_brokers_thread_looks_up_with_a_ledger_of_its_own_and_sees_what_is_new(
    fleet: Fleet, tmp_path: Path
) -> None:
    find = fleet.lookup()
    found: list[str | None] = []
    asked, answered = threading.Event(), threading.Event()

    def broker() -> None:
        found.append(find("pi-1"))
        answered.set()
        asked.wait(10)
        found.append(find("pi-1"))

    thread = threading.Thread(target=broker)
    thread.start()
    assert answered.wait(10)
    fleet.enroll("pi-1", tmp_path / "pi-1.toml")
    asked.set()
    thread.join(10)
    assert found[0] is None
    assert found[1] == fleet.ledger.secret("pi-1")


def test_a_folder_that_is_no_fleet_is_told_so_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="edge-coordinator init"):
        Fleet(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_chosen_at_the_start(tmp_path: Path, method: str) -> None:
    init(tmp_path, name="f", labels=["no", "yes"], method=method)
    assert Fleet(tmp_path).config.run.method == method
    assert (tmp_path / LEDGER_FILE).exists()


def test_labels_of_a_missing_file_are_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(EdgeError):
        labels_of(tmp_path / "none.csv", "text", "label")
