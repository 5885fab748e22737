"""The file that lets a device into a fleet: written by the coordinator, edited by people, read by the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.credentials import Credentials, DeviceSection, format_credentials, read_credentials, toml_text
from edge_runtime.errors import UsageError
from tests.samples import quickly

PLAIN = Credentials("farm", "pi-1", "s3cret", "10.0.0.5", 1883)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ODD = [
    'quote " and \\ backslash',
    "tab\tnewline\n",
    "#comment",
    "[fleet]",
    "'''",
    '"""',
    "\0\x1f\x7f\x85\u2028",
    "größe",
    "🔥𝄞",
    "{realm}",
    "%s",
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def with_fleet(**changes: object) -> str:
    """A sound [fleet] section as TOML with some lines changed; None leaves one out."""
    values: dict[str, object] = {
        "realm": '"farm"',
        "device": '"pi-1"',
        "secret": '"s"',
        "host": '"h"',
        "port": 1883,
        **changes,
    }
    return "[fleet]\n" + "".join(f"{k} = {v}\n" for k, v in values.items() if v is not None)


def test_what_the_coordinator_writes_the_device_reads(tmp_path: Path) -> None:
    for credentials in (PLAIN, dataclasses.replace(PLAIN, ca_file="/etc/ca.pem", family="other.family", port=65535)):
        assert read_credentials(write(tmp_path / "d.toml", format_credentials(credentials))) == credentials


@pytest.mark.parametrize("odd", ODD)
def test_odd_characters_come_back_as_they_were(tmp_path: Path, odd: str) -> None:
    credentials = dataclasses.replace(PLAIN, secret=odd, host=odd, ca_file="/" + odd, family=odd)
    assert read_credentials(write(tmp_path / "d.toml", format_credentials(credentials))) == credentials


@quickly(100)
@given(secret=ANY_TEXT, host=ANY_TEXT.filter(bool), ca_file=ANY_TEXT.map(lambda t: "/" + t), port=st.integers(1, 65535))
def test_any_text_comes_back_as_it_was(tmp_path: Path, secret: str, host: str, ca_file: str, port: int) -> None:
    credentials = dataclasses.replace(PLAIN, secret=secret, host=host, ca_file=ca_file, port=port)
    path = tmp_path / "d.toml"
    path.write_bytes(format_credentials(credentials).encode())
    assert read_credentials(path) == credentials


def test_bytes_that_are_no_text_are_refused_when_they_are_written() -> None:
    with pytest.raises(UsageError, match="it is no UTF-8"):
        toml_text(b"/srv/\xff.pem".decode("utf-8", "surrogateescape"))


def test_a_secret_is_not_shown_in_a_log_line() -> None:
    assert "s3cret" not in repr(PLAIN)


def test_the_commented_device_section_is_true_to_the_defaults_when_it_is_uncommented(tmp_path: Path) -> None:
    text = format_credentials(PLAIN)
    lines = [line.removeprefix("# ") if line.startswith("# ") and " = " in line else line for line in text.splitlines()]
    found = read_credentials(write(tmp_path / "d.toml", "\n".join(lines))).settings
    defaults = DeviceSection()
    assert dataclasses.replace(found, data="", state="") == defaults
    assert found.data
    assert found.state


def test_a_device_section_gives_data_and_budgets(tmp_path: Path) -> None:
    text = with_fleet() + '[device]\ndata = "a.csv"\nmemory = "60%"\nthreads = 2\n'
    found = read_credentials(write(tmp_path / "d.toml", text))
    assert found.settings == DeviceSection(data="a.csv", memory="60%", threads=2)


def test_an_authority_file_is_looked_for_beside_the_file_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "d.toml", with_fleet(ca_file='"ca.pem"'))
    assert read_credentials(path).ca_file == str(tmp_path / "ca.pem")


def test_a_key_that_a_newer_coordinator_adds_to_fleet_is_ignored(tmp_path: Path) -> None:
    assert read_credentials(write(tmp_path / "d.toml", with_fleet(later=1))).device == "pi-1"


@pytest.mark.parametrize("key", ["realm", "device", "secret", "host", "port"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=rf"\[fleet\] needs {key}"):
        read_credentials(write(tmp_path / "d.toml", with_fleet(**{key: None})))


@pytest.mark.parametrize(
    ("key", "value"),
    [("realm", 5), ("secret", "[]"), ("port", '"1883"'), ("port", 1883.0), ("port", "true"), ("ca_file", "false")],
)
def test_a_key_of_another_type_is_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"\[fleet\] {key} must be"):
        read_credentials(write(tmp_path / "d.toml", with_fleet(**{key: value})))


@pytest.mark.parametrize(
    ("key", "value"), [("port", 0), ("port", -1), ("port", 65536), ("port", 10**30), ("host", '""')]
)
def test_an_address_that_no_socket_takes_is_refused_at_once(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=r"\[fleet\] needs a host, and a port from 1 to 65535"):
        read_credentials(write(tmp_path / "d.toml", with_fleet(**{key: value})))


@pytest.mark.parametrize("name", ["", "Pi", "a/b", "a+", "#", "a b", "é", "x" * 37, "a\\n", "..", "a.b", "$sys"])
@pytest.mark.parametrize("key", ["realm", "device"])
def test_a_name_that_could_change_a_topic_is_refused(tmp_path: Path, key: str, name: str) -> None:
    with pytest.raises(UsageError, match="must be 1 to 36 of a-z, 0-9, '-' and '_'"):
        read_credentials(write(tmp_path / "d.toml", with_fleet(**{key: f'"{name}"'})))


def test_no_device_bears_the_coordinators_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no device may be called coordinator"):
        read_credentials(write(tmp_path / "d.toml", with_fleet(device='"coordinator"')))


def test_an_unknown_key_of_the_device_section_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[device\] has no 'memroy'; it has data, state, memory"):
        read_credentials(write(tmp_path / "d.toml", with_fleet() + '[device]\nmemroy = "1GB"\n'))


@pytest.mark.parametrize(
    "content",
    [b"", b"[device]\n", b"fleet = 3", b"fleet = []", b"[[fleet]]", b"realm", b"\xff\xfe", b"\0", b"[fleet]\nrealm = \"\\ud83d\\ude00\"", b"a = " + b"[" * 20_000],
)  # fmt: skip
def test_what_is_no_credentials_file_is_refused_and_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="d.toml"):
        read_credentials(path)


def test_a_missing_file_tells_where_it_comes_from_and_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="edge-coordinator enroll"):
        read_credentials(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="Is a directory"):
        read_credentials(tmp_path)


@quickly(100)
@given(
    content=st.binary(max_size=60) | st.text(max_size=40).map(lambda t: (with_fleet() + t).encode("utf-8", "replace"))
)
def test_random_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.toml"
    path.write_bytes(content)
    try:
        read_credentials(path)
    except UsageError as error:
        assert "d.toml" in str(error)
