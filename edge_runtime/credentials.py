"""The one file that lets a device into a fleet: where the broker is, who the device is, its secret. TOML, mode 0600.

Written by `edge-coordinator enroll`, read by `edge-runtime join --config`. A person may add a [device] section with the
data file and budgets; flags win over it. Imports the errors only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from edge_runtime.errors import UsageError
from edge_runtime.topics import COORDINATOR, check_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class DeviceSection:
    """[device]: what `edge-runtime join` otherwise takes as flags."""

    data: str = ""
    state: str = ""
    memory: str = "auto"
    time: str = ""
    upload: str = ""
    threads: int = 0
    backend: str = "auto"
    precision: str = "float32"
    no_prefix_cache: bool = False
    text_column: str = "text"
    label_column: str = "label"
    encoding: str = ""
    when: str = ""


@dataclass(frozen=True)
class Credentials:
    """A device's way into its fleet."""

    realm: str
    device: str
    secret: str = field(repr=False)
    host: str
    port: int
    ca_file: str = ""
    family: str = "edge_models.bert"
    settings: DeviceSection = DeviceSection()


def read_credentials(path: Path) -> Credentials:
    """Read a device's file.

    Raises:
        UsageError: it is missing, no TOML, or lacks something.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: the coordinator makes it with `edge-coordinator enroll DEVICE`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from None
    found = _take(
        raw.get("fleet"),
        {"realm": str, "device": str, "secret": str, "host": str, "port": int},
        "fleet",
        path,
        required=True,
    )
    found |= _take(raw.get("fleet"), {"ca_file": str, "family": str}, "fleet", path)
    section = _take(
        raw.get("device", {}), {f.name: type(f.default) for f in fields(DeviceSection)}, "device", path, only=True
    )
    if found.get("ca_file") and not Path(found["ca_file"]).is_absolute():
        found["ca_file"] = str(path.parent / found["ca_file"])
    check_id("realm", found["realm"])
    if check_id("device", found["device"]) == COORDINATOR:
        raise UsageError(f"{path}: no device may be called {COORDINATOR}")
    if not found["host"] or not 1 <= found["port"] <= 65535:
        raise UsageError(f"{path}: [fleet] needs a host, and a port from 1 to 65535")
    return Credentials(**found, settings=DeviceSection(**section))


def relative_ca_file(path: Path) -> str:
    """What [fleet] ca_file of a sound file names from that file's folder; empty where it is absolute or there is none."""
    named = str(tomllib.loads(path.read_text(encoding="utf-8"))["fleet"].get("ca_file", ""))
    return "" if Path(named).is_absolute() else named


def _take(
    values: Any, kinds: dict[str, type], section: str, path: Path, *, required: bool = False, only: bool = False
) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UsageError(f"{path} has no section [{section}]")
    if only and (unknown := set(values) - set(kinds)):
        raise UsageError(f"{path}: [{section}] has no {sorted(unknown)[0]!r}; it has {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name in values and type(values[name]) is not kind:
            raise UsageError(f"{path}: [{section}] {name} must be {kind.__name__}, it is {values[name]!r}")
        if required and name not in values:
            raise UsageError(f"{path}: [{section}] needs {name}")
    return {name: values[name] for name in kinds if name in values}


def format_credentials(credentials: Credentials) -> str:
    """The file's text, with a commented [device] section to fill in."""
    quoted = {
        f.name: toml_text(str(getattr(credentials, f.name)))
        for f in fields(Credentials)
        if f.name not in ("settings", "port")
    }
    return f"""\
# Lets this device into the fleet. Keep it secret: whoever has it is this device.
# edge-runtime join --config THIS-FILE

[fleet]
realm = {quoted["realm"]}
device = {quoted["device"]}
secret = {quoted["secret"]}
host = {quoted["host"]}
port = {credentials.port}
ca_file = {quoted["ca_file"]}                # the broker's certificate authority; empty for no TLS
family = {quoted["family"]}

[device]                    # the same as the flags of `edge-runtime join`, which win over it
# data = "/srv/texts.csv"   # this device's private examples: CSV or JSON lines with text and label
# state = "/var/lib/edge"   # where the model and unfinished work are kept
# memory = "auto"           # or 450MB, or 60%: the peak of the training process
# time = ""                 # for one round's training, for example 15m
# upload = ""               # for one update, for example 8MB
# threads = 0               # 0: all cores
# when = ""                 # train only while these hold, for example "idle, charging, temperature<70"
"""


def toml_text(value: str) -> str:
    """A text as a TOML basic string.

    JSON's escapes are a subset of TOML's but for one: a character beyond U+FFFF as two surrogates. So it stays as it is.

    Raises:
        UsageError: it holds bytes that are no text, as a file name may.
    """
    import json

    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UsageError(f"{value!r} cannot be written to a TOML file: it is no UTF-8")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
