"""Mosquitto's files and its process, as `mosquitto.py` writes and runs them; what clients see of it: test_broker.py."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_coordinator import mosquitto
from edge_coordinator.mosquitto import MosquittoProcess, find_mosquitto, write_config
from edge_coordinator.secrets import hash_secret
from edge_runtime.errors import UsageError
from edge_runtime.topics import COORDINATOR
from tests.coordinator.brokers import HOST, RawClient, free_port, logged_in, start_broker

REALM = "farm"
USERS = {COORDINATOR: "sc", "dev-a": "sa", "dev-b": "sb"}
HASHED = {user: hash_secret(secret) for user, secret in USERS.items()}


def test_mosquittos_files_are_private_complete_and_replaced_as_a_whole(tmp_path: Path) -> None:
    config = write_config(tmp_path / "a folder", REALM, HASHED.items(), port=1884, max_message_bytes=1000)
    folder = config.parent
    for name in ("mosquitto.conf", "passwords", "acl"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert "allow_anonymous false\n" in config.read_text() and "max_packet_size 1512\n" in config.read_text()
    before = (folder / "passwords").read_text()
    with pytest.raises(UsageError):
        write_config(folder, REALM, [("dev-a", "no hash")])
    assert (folder / "passwords").read_text() == before
    assert sorted(os.listdir(folder)) == ["acl", "mosquitto.conf", "passwords"]


@pytest.mark.parametrize("user", ["", "a:b", "a\nroot", "+", "Ä"])
def test_a_user_name_that_could_break_the_password_file_is_refused(tmp_path: Path, user: str) -> None:
    with pytest.raises(UsageError):
        write_config(tmp_path, REALM, [(user, HASHED["dev-a"])])


@pytest.mark.parametrize("host", ["", "a b", "127.0.0.1\nallow_anonymous true"])
def test_a_host_that_could_break_the_configuration_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError):
        write_config(tmp_path, REALM, [], host=host)


def test_without_the_program_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosquitto, "find_mosquitto", lambda: None)
    write_config(tmp_path, REALM, [])
    with pytest.raises(UsageError, match="apt-get install mosquitto"):
        MosquittoProcess(tmp_path).start()


needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.mark.broker
@needs_mosquitto
def test_mosquitto_on_a_port_in_use_is_a_usage_error(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        write_config(tmp_path, REALM, HASHED.items(), port=taken.getsockname()[1])
        process = MosquittoProcess(tmp_path)
        with pytest.raises(UsageError, match="in use"):
            process.start()
        assert not process.running
        process.stop()


@pytest.mark.broker
@needs_mosquitto
def test_mosquitto_disconnects_a_revoked_user_on_reload(tmp_path: Path) -> None:
    broker = start_broker("mosquitto", REALM, USERS, tmp_path)
    with logged_in(broker.port, "dev-a", "sa") as client, logged_in(broker.port, "dev-b", "sb") as other:
        broker.set_users({user: secret for user, secret in USERS.items() if user != "dev-a"})
        assert client.hung_up()
        assert other.ping()
    broker.stop()
    broker.stop()


@pytest.mark.broker
@needs_mosquitto
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux kills a child with its parent")
def test_mosquitto_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    port = free_port()
    write_config(tmp_path, REALM, HASHED.items(), port=port)
    program = "import sys, time; from pathlib import Path; from edge_coordinator.mosquitto import MosquittoProcess; "
    program += "MosquittoProcess(Path(sys.argv[1])).start(); print(flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"\n"
        with logged_in(port, "dev-a", "sa") as client:
            parent.kill()
            parent.wait()
            assert client.hung_up()
    for _ in range(100):
        try:
            RawClient(port).socket.close()
        except ConnectionError:
            return
        time.sleep(0.05)
    raise AssertionError("somebody still listens")
