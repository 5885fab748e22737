"""What systemd hears of the agent, through a socket of our own: a real `edge-runtime join`, and the call alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import notify
from edge_runtime.credentials import Credentials, format_credentials


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setattr(notify, "_beaten_at", float("-inf"))
        yield end


def waiting(manager: socket.socket) -> list[bytes]:
    """What has come so far."""
    manager.setblocking(False)
    found = []
    try:
        while True:
            found.append(manager.recv(100))
    except BlockingIOError:
        return found


def test_without_a_service_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")


@pytest.mark.parametrize("address", ["/nobody/listens", "@nobody-listens", "x" * 200])
def test_a_socket_that_nobody_listens_at_is_no_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify.notify("READY=1")


def test_an_abstract_address_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"edge-runtime-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        assert notify.notify("READY=1")
        assert end.recv(100) == b"READY=1"


def test_the_watchdog_hears_a_few_beats_in_an_interval_however_often_we_call(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    end = time.monotonic() + 0.45
    while time.monotonic() < end:
        notify.alive()
    beats = waiting(manager)
    assert set(beats) == {b"WATCHDOG=1"} and 3 <= len(beats) <= 5


@pytest.mark.parametrize(("pid", "usec"), [("1", "1000"), (None, ""), (None, "soon")])
def test_a_watchdog_over_another_process_or_none_hears_nothing(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, pid: str | None, usec: str
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    notify.alive()
    assert waiting(manager) == []


def test_join_says_that_it_is_ready_alive_and_stopping(tmp_path: Path, manager: socket.socket) -> None:
    config, data = tmp_path / "pi.toml", tmp_path / "texts.csv"
    config.write_text(format_credentials(Credentials("farm", "pi", "secret", "127.0.0.1", 1)))  # no broker there
    data.write_text("text,label\na,b\n")
    command = [sys.executable, "-m", "edge_runtime.cli", "join", "--config", str(config), "--data", str(data)]
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    with subprocess.Popen(
        [*command, "--state", str(tmp_path / "state")],
        env={**os.environ, "WATCHDOG_USEC": "800000", "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    ) as agent:
        assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        agent.send_signal(signal.SIGTERM)
        last = b""
        while last != b"STOPPING=1":
            last = manager.recv(100)
        assert agent.wait(20) == 0
