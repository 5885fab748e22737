"""The texts of the systemd units that `service.py` installs: the agent's, and that of `serve`, which answers on the same device.

Both run as one user, see the same folders and have the same few rights. Pure: what differs between machines is in `Machine`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.budget import parse_bytes
from edge_runtime.errors import UsageError

NAME = "edge-runtime"  # of the agent's unit and of the user
SERVING = "edge-runtime-serve"
STATE = Path("/var/lib") / NAME
CREDENTIAL = "device.toml"
STEPS_SINCE, CREDENTIALS_SINCE = 254, 247  # versions of systemd: RestartSteps, LoadCredential
WATCHDOG_S = (
    300  # the longest step of the agent's loop is the hash of one tensor, of the server's a version that is loaded
)
WITH_TORCH = "# no MemoryDenyWriteExecute: torch makes its code as it runs"

AGENT = """\
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

"""
SERVER = """\
# Written by `edge-runtime service install`, which replaces it. Changes of your own: systemctl edit {name}
[Unit]
Description=edge-runtime: answers with the fleet's model on this device
After=network.target {user}.service
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={python} -m edge_runtime.cli serve {state} --port {port}
Environment=EDGE_CACHE=/var/cache/{user} PYTHONDONTWRITEBYTECODE=1
WatchdogSec={watchdog_s}
Restart=always
# Also until the first model is there.
RestartSec=15
TimeoutStopSec=45
KillMode=mixed

# Answers come before training: more of the processor where both want it, and the last to go where memory ends.
CPUWeight=200
IOWeight=200
OOMScoreAdjust=-200
MemorySwapMax=0
TasksMax=64
LimitCORE=0
IPAddressDeny=any
IPAddressAllow=localhost

"""
RIGHTS = """\
User={user}
Group={user}
UMask=0077
StateDirectory={user}
StateDirectoryMode=0700
CacheDirectory={user}
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


def agent_unit(state: Path, handed: Mapping[str, Path], limits: Limits, machine: Machine) -> str:
    """The unit of `join`. Args: handed: what systemd hands over (LoadCredential), name -> file.

    Raises:
        UsageError: a limit is none, or systemd is too old.
    """
    if machine.systemd < CREDENTIALS_SINCE:
        raise UsageError(f"systemd is version {machine.systemd}, this service needs {CREDENTIALS_SINCE} or newer")
    backed_off = "RestartSec=5\nRestartSteps=8\nRestartMaxDelaySec=600"
    return AGENT.format(
        name=NAME,
        python=_word(machine.python),
        credential=CREDENTIAL,
        state=_word(str(state)),
        credentials="\n".join(f"LoadCredential={key}:{_escaped(str(path))}" for key, path in handed.items()),
        watchdog_s=WATCHDOG_S,
        restart=backed_off if machine.systemd >= STEPS_SINCE else "RestartSec=60",
        memory_max=_memory(limits.memory_max),
        cpu=_cpu(limits.cpu_quota),
    ) + _rights(NAME, state, machine)


def server_unit(state: Path, port: int, machine: Machine) -> str:
    """The unit of `serve` on the agent's folder, on loopback."""
    return SERVER.format(
        name=SERVING, user=NAME, python=_word(machine.python), state=_word(str(state)), port=port, watchdog_s=WATCHDOG_S
    ) + _rights(SERVING, state, machine)


def _rights(name: str, state: Path, machine: Machine) -> str:
    return RIGHTS.format(
        name=name,
        user=NAME,
        write_execute=WITH_TORCH if machine.torch else "MemoryDenyWriteExecute=yes",
        writable="" if state == STATE else f"ReadWritePaths={_word(str(state))}\n",
    )


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
