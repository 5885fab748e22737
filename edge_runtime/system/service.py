"""`edge-runtime service`: the agent, and what answers beside it, as systemd services with a user of their own and few rights.

Everything that differs between devices stands in the device's file; the service takes data, state and budgets from its
[device] section. systemd hands the file over (LoadCredential), so that it stays root's alone. Not here: what the agent tells
systemd (`notify.py`), and the units' texts (`service_units.py`). Imports the device's small modules only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_runtime.credentials import read_credentials, relative_ca_file
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.store import atomic_writer, disk_errors
from edge_runtime.system.service_units import (
    CREDENTIAL,
    NAME,
    SERVING,
    STATE,
    STEPS_SINCE,
    Limits,
    Machine,
    agent_unit,
    server_unit,
)

UNITS = Path("etc/systemd/system")
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - by the unit's ProtectHome and PrivateTmp

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def this_machine(run: Run | None = None) -> Machine:
    """This one; where there is no systemd, as if for the newest."""
    try:
        shown = (run or call)(["systemctl", "--version"]).stdout
    except FileNotFoundError:
        shown = ""
    found = re.match(r"systemd (\d+)", shown)
    version = int(found[1]) if found else STEPS_SINCE
    return Machine(version, sys.executable, importlib.util.find_spec("torch") is not None)


def units(config: Path, limits: Limits, machine: Machine, port: int | None = None) -> dict[str, str]:
    """Unit -> its text for a device's file: the agent's, and with a port that of what answers over HTTP.

    Raises:
        UsageError: the file is none, a limit is none, or systemd is too old.
    """
    config = config.absolute()
    who = read_credentials(config)
    handed = {CREDENTIAL: config}
    if name := relative_ca_file(config):
        handed[name] = Path(who.ca_file)
    state = Path(who.settings.state or STATE)
    found = {NAME: agent_unit(state, handed, limits, machine)}
    return found if port is None else {**found, SERVING: server_unit(state, port, machine)}


def obstacle(config: Path, python: str) -> str:
    """Why the service, which starts nowhere and sees no home folder, would not find what it needs; empty if it would."""
    who, ca_file = read_credentials(config), relative_ca_file(config)
    if not who.settings.data:
        return f"{config}: name this device's examples in the [device] section, data, for the service"
    if "/" in ca_file:
        return f"{config}: ca_file must be absolute, or a file beside {config.name}, for the service"
    own = {"data": who.settings.data, "state": who.settings.state, "python": python, "ca_file": who.ca_file}
    for what, path in own.items():
        if not path or (what == "ca_file" and ca_file):  # which systemd hands over
            continue
        if not Path(path).is_absolute():
            return f"{config}: {what} must be an absolute path for the service, it is {path!r}"
        within = (path, *map(str, Path(path).parents))
        if hidden := [place for place in HIDDEN if place in within]:
            advice = (
                "install edge-runtime below /usr/local/lib" if what == "python" else "move it, for example below /srv"
            )
            return f"the service does not see {hidden[0]}, and {what} is {path}: {advice}"
    return ""


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of the system's programs to its end."""
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def install(
    config: Path, limits: Limits, port: int | None = None, *, root: Path = Path("/"), run: Run = call
) -> list[Path]:
    """Make the user, write the units, start them now and at every boot; -> their paths. Again: replaced and restarted.

    Args:
        port: where to answer over HTTP; None: not at all, a service that did is removed.
        root: where the units are written below; another only for tests, with a `run` of their own.

    Raises:
        UsageError: not root, no systemd, or the service could not read what it needs.
        EdgeError: one of the system's programs failed, or the service did not start.
    """
    _need_systemd(root, "install")
    machine = this_machine(run)
    if reason := obstacle(config, machine.python):
        raise UsageError(reason)
    texts = units(config, limits, machine, port)
    settings = read_credentials(config).settings
    if run(["id", "--user", NAME]).returncode:
        home = ["--home-dir", str(STATE), "--no-create-home", "--shell", "/usr/sbin/nologin"]
        _must(run, ["useradd", "--system", "--user-group", *home, NAME])
    if settings.state:
        _must(run, ["install", "--directory", f"--owner={NAME}", f"--group={NAME}", "--mode=0700", settings.state])
    for right, needed in (("-r", settings.data), ("-x", machine.python)):
        if run(["runuser", "--user", NAME, "--", "test", right, needed]).returncode:
            raise UsageError(
                f"the user {NAME} may not read {needed}: sudo chgrp {NAME} {needed} && sudo chmod g+r {needed}; "
                "the folders above it must let it through, too"
            )
    if SERVING not in texts:
        _remove(SERVING, root, run)
    paths = {name: unit_path(name, root) for name in texts}
    for name, path in paths.items():
        with disk_errors(path), atomic_writer(path, mode=0o644) as file:
            file.write(texts[name].encode())
    _must(run, ["systemctl", "daemon-reload"])
    for name, path in paths.items():
        _must(run, ["systemctl", "enable", path.name])
        waits = [] if name == NAME else ["--no-block"]  # for READY=1; `serve` is ready when the first model is there
        _must(run, ["systemctl", "restart", *waits, path.name])
    return list(paths.values())


def uninstall(*, root: Path = Path("/"), run: Run = call) -> bool:
    """Stop the services and remove their units; -> whether there was one. State, cache and user stay.

    Raises:
        UsageError, EdgeError: as `install`.
    """
    _need_systemd(root, "uninstall")
    removed = [_remove(name, root, run) for name in (SERVING, NAME)]
    return any(removed)


def unit_path(name: str = NAME, root: Path = Path("/")) -> Path:
    """Where a unit is written."""
    return root / UNITS / f"{name}.service"


def _remove(name: str, root: Path, run: Run) -> bool:
    """Stop one service and remove its unit; -> whether it was there."""
    path = unit_path(name, root)
    if not path.exists():
        return False
    _must(run, ["systemctl", "disable", "--now", path.name])
    with disk_errors(path):
        path.unlink()
    _must(run, ["systemctl", "daemon-reload"])
    run(["systemctl", "reset-failed", path.name])  # nothing to forget is no failure
    return True


def _need_systemd(root: Path, action: str) -> None:
    if os.geteuid() != 0:
        raise UsageError(f"service {action} changes the system: run it as root, with sudo")
    if not (root / "run/systemd/system").is_dir():
        raise UsageError(
            f"systemd does not run this machine, so that service {action} can do nothing: "
            "`edge-runtime service print` shows the unit; elsewhere run `edge-runtime join` under what restarts services there"
        )


def _must(run: Run, command: Sequence[str]) -> None:
    done = run(command)
    if done.returncode:
        shown = (done.stderr or done.stdout).strip().splitlines()
        more = f"; journalctl --unit {NAME} says more" if command[0] == "systemctl" else ""
        raise EdgeError(f"{' '.join(command)} failed: {shown[-1] if shown else done.returncode}{more}")
