"""`edge-runtime join`: what the flags and the device's config file make together, and the agent run with it.

Not here: the flags (`cli.py`), the agent (`agent.py`), the message of that name (`wire.py`). May import every module of
the device; only `commands.py` imports it, when that command runs.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

from edge_runtime import local
from edge_runtime.agent import Agent
from edge_runtime.agent_log import AgentLog
from edge_runtime.budget import parse_bytes, parse_seconds
from edge_runtime.conditions import kept_free_bytes, parse_conditions
from edge_runtime.console import note, print_json, until_told_to_stop
from edge_runtime.credentials import Credentials, DeviceSection, read_credentials
from edge_runtime.engine import EngineOptions
from edge_runtime.errors import DataError, UsageError
from edge_runtime.gate import Gate
from edge_runtime.notify import alive, notify
from edge_runtime.session import Session
from edge_runtime.store import lock_folder
from edge_runtime.topics import Topics
from edge_runtime.transport import MqttTransport, Will
from edge_runtime.version import software
from edge_runtime.wire import Status, encode


def join(args: Namespace) -> None:
    """Run the agent until told to stop; flags win over the [device] section of the config file."""
    who = read_credentials(args.config)
    wanted = _flags_over(args, who.settings)
    state = Path(wanted.state or f"edge-{who.device}").absolute()
    session = _session(wanted, state / "cache")
    gate = Gate(parse_conditions(wanted.when))
    session.budget()  # a budget that is no budget is said at once
    transport = _transport(who)
    log = print_json if args.json else AgentLog()
    with lock_folder(state, "an agent"), until_told_to_stop() as may_go_on:

        def keep_going() -> bool:
            alive()
            if not may_go_on():
                notify("STOPPING=1")
            return may_go_on()

        agent = Agent(who.device, who.realm, state, session, transport, log, families=(who.family,), gate=gate)
        notify("READY=1")
        agent.run(keep_going)


def _flags_over(args: Namespace, section: DeviceSection) -> DeviceSection:
    """The [device] section with the flags that were given in their place; every field has a flag of its name."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(section)}
    return dataclasses.replace(section, **{name: value for name, value in given.items() if value})


def _session(wanted: DeviceSection, cache: Path) -> Session:
    """This device's data and limits.

    Raises:
        UsageError: there is no such data, or a limit is none.
    """
    if not wanted.data:
        raise UsageError("name this device's examples: --data FILE, or data in the [device] section of the config")
    data = Path(wanted.data)
    if not data.exists():
        raise DataError(f"{data} is missing: --data names this device's examples")
    return Session(
        data.absolute(),
        cache,
        memory=wanted.memory,
        time_s=parse_seconds(wanted.time) if wanted.time else None,
        upload_bytes=parse_bytes(wanted.upload) if wanted.upload else None,
        threads=wanted.threads or local.Device.measure(speed=False).threads,
        engine=EngineOptions(wanted.backend, wanted.precision, not wanted.no_prefix_cache),
        options=local.DataOptions(wanted.text_column, wanted.label_column, wanted.encoding or None, "skip"),
        say=note,
        keep_free_bytes=kept_free_bytes(parse_conditions(wanted.when)),
    )


def _transport(who: Credentials) -> MqttTransport:
    """The connection to the fleet's broker, which tells the coordinator when we are gone."""
    topics = Topics(who.realm)
    farewell = encode(Status("offline", software(), 0), sent_at=0.0, boot=bytes(8), sequence=0)
    return MqttTransport(
        who.host,
        who.port,
        who.device,
        who.secret,
        topics.device_filters(who.device),
        will=Will(topics.up(who.device, "st"), farewell),
        ca_file=Path(who.ca_file) if who.ca_file else None,
    )
