"""`edge-runtime service`: the agent as a systemd service with a user of its own, few rights, and limits that systemd keeps.

Everything that differs between devices stands in the device's file; the service takes data, state and budgets from its
[device] section. systemd hands the file over (LoadCredential), so that it stays root's alone. Not here: what the agent tells
systemd (`notify.py`). Imports the device's small modules only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.budget import parse_bytes
from edge_runtime.credentials import read_credentials, relative_ca_file
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.store import atomic_writer, disk_errors

NAME = "edge-runtime"  # of the unit and of the user
STATE = Path("/var/lib") / NAME
UNIT = Path("etc/systemd/system") / f"{NAME}.service"
CREDENTIAL = "device.toml"
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - by the unit's ProtectHome and PrivateTmp
STEPS_SINCE, CREDENTIALS_SINCE = 254, 247  # versions of systemd: RestartSteps, LoadCredential
WATCHDOG_S = 300  # the longest step of the agent's loop is the hash of one tensor
WITH_TORCH = "# no MemoryDenyWriteExecute: torch makes its code as it runs"

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]

TEMPLATE = """\
# Written by `edge-runtime service install`, which replaces it. Changes of your own: systemctl edit {name}
[Unit]
Description=edge-runtime: finetunes the fleet's model on this device's data
Wants=network-online.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={python} -m edge_runtime.cli join --config ${{CREDENTIALS_DIRECTORY}}/{credential} --state {state}
{credentials}
Environment=EDGE_CACHE=/var/cache/{name} PYTHONDONTWRITEBYTECODE=1
WatchdogSec={watchdog_s}
Restart=always
{restart}
TimeoutStopSec=30
KillMode=mixed

# Over the limit the kernel takes the training process first, and the agent goes on.
MemoryMax={memory_max}
MemorySwapMax=0
OOMPolicy=continue
{cpu}
TasksMax=256
LimitCORE=0

User={name}
Group={name}
UMask=0077
StateDirectory={name}
StateDirectoryMode=0700
CacheDirectory={name}
CacheDirectoryMode=0700
{writable}NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateMounts=yes
DevicePolicy=closed
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
{write_execute}
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

StandardOutput=journal
StandardError=journal
SyslogIdentifier={name}

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Limits:
    """What systemd allows agent and training together."""

    memory_max: str = "80%"  # of the machine's RAM, or a size as in budgets
    cpu_quota: str = ""  # 150%: one and a half cores; empty: all, after everything else on the machine


@dataclass(frozen=True)
class Machine:
    """What the unit is for."""

    systemd: int  # its version: older ones know less
    python: str  # the interpreter that edge-runtime is installed in
    torch: bool  # whether torch is installed there


def this_machine(run: Run | None = None) -> Machine:
    """This one; where there is no systemd, as if for the newest."""
    try:
        shown = (run or call)(["systemctl", "--version"]).stdout
    except FileNotFoundError:
        shown = ""
    found = re.match(r"systemd (\d+)", shown)
    version = int(found[1]) if found else STEPS_SINCE
    return Machine(version, sys.executable, importlib.util.find_spec("torch") is not None)


def unit(config: Path, limits: Limits, machine: Machine) -> str:
    """The unit's text for a device's file.

    Raises:
        UsageError: the file is none, a limit is none, or systemd is too old.
    """
    config = config.absolute()
    who = read_credentials(config)
    if machine.systemd < CREDENTIALS_SINCE:
        raise UsageError(f"systemd is version {machine.systemd}, this service needs {CREDENTIALS_SINCE} or newer")
    state = Path(who.settings.state or STATE)
    handed = {CREDENTIAL: config}
    if name := relative_ca_file(config):
        handed[name] = Path(who.ca_file)
    backed_off = "RestartSec=5\nRestartSteps=8\nRestartMaxDelaySec=600"
    return TEMPLATE.format(
        name=NAME,
        python=_word(machine.python),
        credential=CREDENTIAL,
        state=_word(str(state)),
        credentials="\n".join(f"LoadCredential={key}:{_escaped(str(path))}" for key, path in handed.items()),
        watchdog_s=WATCHDOG_S,
        restart=backed_off if machine.systemd >= STEPS_SINCE else "RestartSec=60",
        write_execute=WITH_TORCH if machine.torch else "MemoryDenyWriteExecute=yes",
        memory_max=_memory(limits.memory_max),
        cpu=_cpu(limits.cpu_quota),
        writable="" if state == STATE else f"ReadWritePaths={_word(str(state))}\n",
    )


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


def _memory(text: str) -> str:
    """MemoryMax: a share of the RAM, or bytes."""
    if re.fullmatch(r"[1-9]\d?%|100%", text):
        return text
    if text.endswith("%"):
        raise UsageError(f"--memory-max {text} must be from 1% to 100%, or a size such as 600MB")
    return str(parse_bytes(text))


def _cpu(quota: str) -> str:
    """Others on the device come first; a quota besides, where one is wanted."""
    if quota and not re.fullmatch(r"[1-9]\d{0,4}%", quota):
        raise UsageError(f"--cpu-quota {quota} must be a share of one core, for example 150%")
    return "CPUWeight=20\nIOWeight=20" + (f"\nCPUQuota={quota}" if quota else "")


def _escaped(text: str) -> str:
    """A path in a setting: no specifiers."""
    if not text.isprintable():
        raise UsageError(f"{text!r} has characters that a unit cannot hold")
    return text.replace("%", "%%")


def _word(text: str) -> str:
    """One word of a command line or of a list: quoted, no specifiers, no variables."""
    quoted = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return quoted if re.fullmatch(r"[\w./%+-]+", quoted) else f'"{quoted}"'


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of the system's programs to its end."""
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def install(config: Path, limits: Limits, *, root: Path = Path("/"), run: Run = call) -> Path:
    """Make the user, write the unit, start it now and at every boot; -> the unit's path. Again: replaced and restarted.

    Args:
        root: where the unit is written below; another only for tests, with a `run` of their own.

    Raises:
        UsageError: not root, no systemd, or the service could not read what it needs.
        EdgeError: one of the system's programs failed, or the service did not start.
    """
    _need_systemd(root, "install")
    machine = this_machine(run)
    if reason := obstacle(config, machine.python):
        raise UsageError(reason)
    text = unit(config, limits, machine)
    settings = read_credentials(config).settings
    if run(["id", "--user", NAME]).returncode:
        home = ["--home-dir", str(STATE), "--no-create-home", "--shell", "/usr/sbin/nologin"]
        _must(run, ["useradd", "--system", "--user-group", *home, NAME])
    if settings.state:
        _must(run, ["install", "--directory", f"--owner={NAME}", f"--group={NAME}", "--mode=0700", settings.state])
    for right, path in (("-r", settings.data), ("-x", machine.python)):
        if run(["runuser", "--user", NAME, "--", "test", right, path]).returncode:
            raise UsageError(
                f"the user {NAME} may not read {path}: sudo chgrp {NAME} {path} && sudo chmod g+r {path}; "
                "the folders above it must let it through, too"
            )
    with disk_errors(root / UNIT), atomic_writer(root / UNIT, mode=0o644) as file:
        file.write(text.encode())
    _must(run, ["systemctl", "daemon-reload"])
    _must(run, ["systemctl", "enable", UNIT.name])
    _must(run, ["systemctl", "restart", UNIT.name])  # waits for READY=1
    return root / UNIT


def uninstall(*, root: Path = Path("/"), run: Run = call) -> bool:
    """Stop the service and remove its unit; -> whether there was one. State, cache and user stay.

    Raises:
        UsageError, EdgeError: as `install`.
    """
    _need_systemd(root, "uninstall")
    if not (root / UNIT).exists():
        return False
    _must(run, ["systemctl", "disable", "--now", UNIT.name])
    with disk_errors(root / UNIT):
        (root / UNIT).unlink()
    _must(run, ["systemctl", "daemon-reload"])
    run(["systemctl", "reset-failed", UNIT.name])  # nothing to forget is no failure
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
