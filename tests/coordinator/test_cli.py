"""The command line of a fleet: calls that are wrong change nothing and end with the exit code of their kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_coordinator.cli import main, parser
from edge_coordinator.config import CONFIG_FILE, load_config
from edge_coordinator.fleet import Fleet, init
from edge_runtime.version import software


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init(tmp_path / "farm", labels=["no", "yes"])
    return tmp_path / "farm"


def enrolled(folder: Path) -> list[str]:
    return [row["device"] for row in Fleet(folder).ledger.devices()]


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"edge-coordinator {software()}\n"


@pytest.mark.parametrize("names", [["a", "b", "Not An Id"], ["a", "b", "coordinator"], ["a", "b", "a"], ["a", "old"]])
def test_of_several_names_all_are_enrolled_or_none(
    folder: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = ["--fleet", str(folder)]
    assert main(["enroll", "old", *fleet]) == 0
    before = (folder / "devices" / "old.toml").read_bytes()
    assert main(["enroll", *names, *fleet]) == 2
    assert enrolled(folder) == ["old"]
    assert {path.name: path.read_bytes() for path in (folder / "devices").iterdir()} == {"old.toml": before}
    assert main(["enroll", "a", "b", *fleet]) == 0
    assert enrolled(folder) == ["a", "b", "old"]


def test_renewing_several_renews_none_when_one_was_never_enrolled(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = ["--fleet", str(folder)]
    assert main(["enroll", "a", *fleet]) == 0
    before, hashed = (folder / "devices" / "a.toml").read_bytes(), Fleet(folder).ledger.secret("a")
    assert main(["enroll", "a", "b", "--renew", *fleet]) == 2
    assert "there is no device b" in capsys.readouterr().err
    assert ((folder / "devices" / "a.toml").read_bytes(), Fleet(folder).ledger.secret("a")) == (before, hashed)
    assert not (folder / "devices" / "b.toml").exists()


def test_a_folder_for_no_version_is_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--fleet", str(folder), "--out", str(folder / "best")]) == 2
    assert "name the version" in capsys.readouterr().err
    assert main(["models", "--fleet", str(folder)]) == 0


def test_a_fleet_needs_its_classes_from_one_place_and_two_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "one.csv"
    data.write_text("text,label\none,yes\ntwo,yes\n")
    assert main(["init", str(tmp_path / "f"), "--labels", "a,b", "--labels-from", str(data)]) == 2
    assert main(["init", str(tmp_path / "f"), "--labels-from", str(data)]) == 3
    assert "has one label, 'yes'" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "f"), "--labels", "a,b", "--max-length", "1"]) == 2
    assert "max_length must be from 3" in capsys.readouterr().err
    assert not (tmp_path / "f" / CONFIG_FILE).exists()


def test_labels_from_a_file_with_a_bad_row_stop_with_its_line_or_leave_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "texts.csv"
    data.write_bytes("text,label\none,yes\ntwo,no\nthree,größer\n".encode("latin-1"))
    labels = ["--labels-from", str(data), "--json"]
    assert main(["init", str(tmp_path / "a"), *labels]) == 3
    assert f"{data}, line 4" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "b"), *labels, "--skip-bad-rows"]) == 0
    out, err = capsys.readouterr()
    assert '["no", "yes"]' in out and "skipped 1 bad rows; line 4" in err
    assert main(["init", str(tmp_path / "c"), *labels, "--encoding", "latin-1"]) == 0
    assert load_config(tmp_path / "c").model.labels == ("größer", "no", "yes")


def test_revoking_says_that_a_standing_connection_ends_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["enroll", "pi-1", "--fleet", str(folder)]) == 0
    assert main(["devices", "--revoke", "pi-1", "--fleet", str(folder)]) == 0
    assert "pi-1 is refused from now on; the broker ends its connection within 10 seconds" in capsys.readouterr().err


def test_json_before_a_nested_command_means_as_much_as_behind_it() -> None:
    for words in (["sim", "--json", "compare", "a"], ["sim", "compare", "a", "--json"]):
        assert parser().parse_args(words).json is True
    assert parser().parse_args(["sim", "compare", "a"]).json is False
