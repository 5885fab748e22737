"""Mosquitto as the broker: writes its three files for a realm and runs it as a child process.

Not needed by a small fleet (`broker.py` runs in-process); takes over where that one ends, with a tenth of the CPU time
per byte. Keeps the same rules, with these differences that Mosquitto 2.0.11 leaves (each measured in
tests/coordinator/test_broker.py):

- a client id that differs from the user name is not refused but replaced by it (`use_username_as_clientid`), so
  nobody can evict or impersonate another client;
- a SUBSCRIBE is always granted and each delivery is checked instead;
- a device may retain messages on any topic below its own `up/`, and messages of QoS 0 for a client that does not read
  are bounded by their number only: `memory_limit` is the bound, for all clients together.

Imports `access`, `packets` and `edge_runtime`; the command line and tests import it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from edge_coordinator import access
from edge_coordinator.packets import HEADER_BYTES
from edge_runtime.errors import UsageError
from edge_runtime.transport import MAX_MESSAGE_BYTES

CONFIG, PASSWORDS, ACL, LOG = "mosquitto.conf", "passwords", "acl", "mosquitto.log"
START_S = 10.0
STOP_S = 5.0
PR_SET_PDEATHSIG = 1  # prctl(2)
_HASH = re.compile(r"\$7\$[0-9]{1,7}\$[A-Za-z0-9+/=]{1,64}\$[A-Za-z0-9+/=]{88}")

# max_queued_* count per client what is above the messages in flight. The coordinator is one client and takes what all
# devices send, so it decides: 256 MiB are the credit of 64 devices that upload at once (16 chunks and 4 MiB each). A
# device never has more than its own credit waiting. Mosquitto acknowledges first and drops in silence what does not
# fit: the end-to-end commit asks for it again, after a while.
_TEMPLATE = """\
# Written by edge-coordinator: changes are lost.
listener {port} {host}
max_connections {max_connections}
{tls}{user}allow_anonymous false
use_username_as_clientid true
allow_zero_length_clientid false
password_file {folder}/passwords
acl_file {folder}/acl
persistence false
persistent_client_expiration 1h
max_packet_size {max_packet_bytes}
max_inflight_messages 32
max_queued_messages 4096
max_queued_bytes 268435456
memory_limit {memory_limit_bytes}
set_tcp_nodelay true
sys_interval 0
connection_messages false
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
"""


def find_mosquitto() -> str | None:
    """Path of the `mosquitto` program on PATH or in /usr/sbin or /usr/local/sbin; None when there is none."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def write_config(
    folder: Path,
    realm: str,
    users: Iterable[tuple[str, str]],
    *,
    host: str = "127.0.0.1",
    port: int = 1883,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_connections: int = 10_000,
    memory_limit_bytes: int = 1 << 30,
    certfile: Path | None = None,
    keyfile: Path | None = None,
) -> Path:
    """Writes mosquitto.conf, passwords and acl into a folder, each with mode 0600 and replaced as a whole.

    A process started by root keeps the rights of root, since it has to read these files again after `reload`.

    Args:
        folder: created with mode 0700 where it is missing.
        realm: the fleet's id.
        users: user names with the strings of `secrets.hash_secret`; the coordinator among them.
        host, port: where it listens; port 0 is not possible here.
        max_message_bytes: a client that sends a payload of 512 bytes more is disconnected.
        max_connections: further clients are refused.
        memory_limit_bytes: of the broker's heap; at the limit messages are dropped and their clients disconnected.
        certfile, keyfile: PEM files: the listener speaks TLS.

    Returns:
        The path of mosquitto.conf.

    Raises:
        UsageError: an argument cannot stand in the files.
    """
    folder = folder.absolute()
    if not 0 < port <= 65535 or not re.fullmatch(r"[0-9A-Za-z.:_-]+", host):
        raise UsageError(f"cannot listen on {host!r}:{port}: give an address and a port of 1 to 65535")
    if (certfile is None) != (keyfile is None):
        raise UsageError("TLS needs a certificate and its key: give both certfile and keyfile, or neither")
    tls = "" if certfile is None or keyfile is None else _tls_lines(certfile, keyfile)
    text = _TEMPLATE.format(
        host=host,
        port=port,
        folder=_one_line(folder),
        tls=tls,
        user=f"user {pwd.getpwuid(0).pw_name}\n" if os.geteuid() == 0 else "",
        max_connections=max_connections,
        max_packet_bytes=max_message_bytes + HEADER_BYTES,  # the whole packet counts
        memory_limit_bytes=memory_limit_bytes,
    )
    acl = access.mosquitto_acl(realm)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_passwords(folder, users)
    _replace(folder / ACL, acl)
    _replace(folder / CONFIG, text)
    return folder / CONFIG


def write_passwords(folder: Path, users: Iterable[tuple[str, str]]) -> None:
    """Replaces the password file; `MosquittoProcess.reload` makes a running broker read it.

    Args:
        folder: the one of `write_config`.
        users: all users, as there.

    Raises:
        UsageError: a user name is no id or a hash is not one of `secrets.hash_secret`.
    """
    lines = []
    for user, hashed in users:
        if not access.is_id(user) or not _HASH.fullmatch(hashed):
            raise UsageError(f"user {user!r}: wanted an id and a hash made by hash_secret, enrol it again")
        lines.append(f"{user}:{hashed}\n")
    _replace(folder / PASSWORDS, "".join(lines))


class MosquittoProcess:
    """A Mosquitto that lives from `start` to `stop` and on Linux not longer than us; its log is `mosquitto.log`."""

    def __init__(self, folder: Path) -> None:
        """Names the folder that `write_config` filled."""
        self._folder = folder.absolute()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    def start(self) -> None:
        """Starts it and returns once clients can connect.

        Call it from a thread that lives as long as Mosquitto shall: on Linux it is killed when that thread ends, in
        whatever way, even by SIGKILL.

        Raises:
            UsageError: it runs already, is not installed, or ended at once, for example because the port is in use.
        """
        if self.running:
            raise UsageError("this Mosquitto runs already: stop it before starting it again")
        binary = find_mosquitto()
        if binary is None:
            raise UsageError("mosquitto is not installed: apt-get install mosquitto, or use the embedded broker")
        log = self._folder / LOG
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
            self._process = subprocess.Popen(
                [binary, "-c", str(self._folder / CONFIG)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent(),
            )
        deadline_s = time.monotonic() + START_S
        while " running\n" not in (text := log.read_text(errors="replace")):
            if not self.running or time.monotonic() > deadline_s:
                self.kill()
                last = " ".join(text.splitlines()[-3:]) or "it said nothing"
                raise UsageError(f"mosquitto did not start ({last}): correct what it names, see {log}")
            time.sleep(0.01)

    def reload(self) -> None:
        """Makes it read the password and ACL files again, soon; who may not log in any more is disconnected.

        Raises:
            UsageError: it does not run.
        """
        if self._process is None or not self.running:
            raise UsageError("this Mosquitto does not run: start it first")
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Ends it; may be called twice, or before `start`."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        """Ends it as a crash would: SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _end_with_parent() -> Callable[[], None] | None:
    """What a child runs before it becomes Mosquitto: the kernel kills it when the thread that started it has ended."""
    if not sys.platform.startswith("linux"):
        return None
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl
    arguments = PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)

    def set_signal() -> None:  # after fork: nothing here may take a lock
        prctl(*arguments)
        if os.getppid() != parent:  # it ended meanwhile
            os._exit(1)

    return set_signal


def _tls_lines(certfile: Path, keyfile: Path) -> str:
    return f"certfile {_one_line(certfile.absolute())}\nkeyfile {_one_line(keyfile.absolute())}\ntls_version tlsv1.2\n"


def _one_line(path: Path) -> str:
    if any(mark in str(path) for mark in "\n\r\0"):
        raise UsageError(f"{str(path)!r} holds a line break: choose another folder")
    return str(path)


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
