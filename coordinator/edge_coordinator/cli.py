"""The command line of a fleet: `edge-coordinator init | enroll | serve | broker | devices | runs | models | sim`.

Parses, calls, prints. Every command has `--help` with examples; those that scripts read have `--json`. Not here: what the
coordinator's events say (`server_log.py`). Imports the coordinator and what it may of the device's side; `serve` and
`broker` import the loop and the brokers when they run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from edge_coordinator.fleet import Fleet, init, labels_of
from edge_coordinator.methods import METHODS, SUMMARIES
from edge_coordinator.models import describe_versions
from edge_coordinator.sim.command import add_sim
from edge_runtime.console import (
    INTERRUPTED,
    Commands,
    new_parser,
    note,
    print_json,
    run_main,
    table,
    until_told_to_stop,
)
from edge_runtime.errors import UsageError
from edge_runtime.store import is_locked, lock_folder
from edge_runtime.topics import COORDINATOR, Topics
from edge_runtime.transport import MqttTransport, Will
from edge_runtime.version import software

_parser = partial(new_parser, exit_codes=(0, 2, 3, 4, 6, 7, 8, 10, INTERRUPTED))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code."""
    parsed = parser().parse_args(arguments)
    return run_main(lambda: int(parsed.run(parsed)))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _parser(
        None,
        "edge-coordinator",
        "Finetune one model over a fleet of small devices, over MQTT.",
        "edge-coordinator init my-fleet --labels-from texts.csv",
        "edge-coordinator enroll pi-1 --fleet my-fleet",
        "edge-coordinator serve --fleet my-fleet",
        "edge-coordinator models --fleet my-fleet --export 11 --out best",
        "edge-coordinator models --fleet my-fleet --export 11 --adapter-out my-adapter",
    )
    top.add_argument("--version", action="version", version=f"edge-coordinator {software()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_init, _add_enroll, _add_serve, _add_broker, _add_devices, _add_runs, _add_models, add_sim):
        add(commands)
    return top


def _add_init(commands: Commands) -> None:
    make = _parser(
        commands,
        "init",
        "Make a folder with a commented fleet.toml.",
        "edge-coordinator init my-fleet --labels-from texts.csv",
        "edge-coordinator init my-fleet --model ./my-checkpoint --labels yes,no --method straggler",
    )
    make.add_argument("folder", type=Path)
    make.add_argument("--name", help="of the fleet, part of every topic (default: the folder's name)")
    make.add_argument("--model", default="minilm-l6", help="alias, checkpoint folder or Hugging Face id (%(default)s)")
    make.add_argument("--family", default="edge_models.bert", help="module that knows the architecture (%(default)s)")
    make.add_argument("--labels", help="the classes, separated by commas")
    make.add_argument("--labels-from", type=Path, metavar="DATA", help="take the classes from a labelled file")
    make.add_argument("--text-column", default="text")
    make.add_argument("--label-column", default="label")
    make.add_argument("--encoding", help="of DATA (default: UTF-8, or what its byte order mark says)")
    skip = "leave out rows of DATA that cannot be used, with their labels, instead of stopping"
    make.add_argument("--skip-bad-rows", action="store_true", help=skip)
    make.add_argument("--max-length", type=int, default=128, help="tokens (%(default)s)")
    make.add_argument(
        "--method", default="caff", choices=list(METHODS), help="; ".join(f"{n}: {s}" for n, s in SUMMARIES.items())
    )
    make.add_argument("--rounds", type=int, default=10, help="(%(default)s)")
    make.add_argument("--goal", type=int, default=2, help="updates that complete a round (%(default)s)")
    make.add_argument("--quorum", type=int, default=1, help="updates without which a round fails (%(default)s)")
    make.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    make.add_argument("--port", type=int, default=1883, help="of the broker (%(default)s)")
    make.set_defaults(run=run_init)


def _add_enroll(commands: Commands) -> None:
    enroll = _parser(
        commands,
        "enroll",
        "Give devices their credentials, one file each.",
        "edge-coordinator enroll pi-1 pi-2 --fleet my-fleet",
        "edge-coordinator enroll pi-1 --fleet my-fleet --renew --host coordinator.lan",
    )
    enroll.add_argument("device", nargs="+")
    enroll.add_argument("--out", type=Path, help="folder for DEVICE.toml (default: devices/ in the fleet's folder)")
    enroll.add_argument("--host", help="address of the broker as the devices see it")
    enroll.add_argument("--renew", action="store_true", help="replace the secret of a device that is enrolled already")
    _fleet_flag(enroll)
    enroll.set_defaults(run=run_enroll)


def _add_serve(commands: Commands) -> None:
    serve = _parser(
        commands,
        "serve",
        "Run the fleet: broker (unless external), rounds, aggregation. Goes on where it stopped.",
        "edge-coordinator serve --fleet my-fleet",
        "edge-coordinator serve --fleet my-fleet --until-finished --json",
    )
    serve.add_argument("--until-finished", action="store_true", help="end when the run has had its rounds")
    _fleet_flag(serve)
    serve.set_defaults(run=run_serve)


def _add_broker(commands: Commands) -> None:
    broker = _parser(
        commands,
        "broker",
        'Run only the broker, for [broker] kind = "external": the embedded one alone, or Mosquitto with our rules.',
        "edge-coordinator broker --fleet my-fleet --kind mosquitto",
    )
    broker.add_argument("--kind", choices=("amqtt", "mosquitto"), default="mosquitto", help="(%(default)s)")
    _fleet_flag(broker)
    broker.set_defaults(run=run_broker)


def _add_devices(commands: Commands) -> None:
    devices = _parser(
        commands,
        "devices",
        "List the devices, or refuse one.",
        "edge-coordinator devices --fleet my-fleet --json",
        "edge-coordinator devices --fleet my-fleet --revoke pi-1",
    )
    devices.add_argument("--revoke", metavar="DEVICE", help="refuse this device from now on")
    _fleet_flag(devices)
    devices.set_defaults(run=run_devices)


def _add_runs(commands: Commands) -> None:
    runs = _parser(commands, "runs", "List the rounds.", "edge-coordinator runs --fleet my-fleet --json")
    _fleet_flag(runs)
    runs.set_defaults(run=run_runs)


def _add_models(commands: Commands) -> None:
    models = _parser(
        commands,
        "models",
        "List the model versions, or write one as a checkpoint folder.",
        "edge-coordinator models --fleet my-fleet",
        "edge-coordinator models --fleet my-fleet --export 11 --out best",
    )
    models.add_argument("--export", type=int, metavar="VERSION", help="write this version to --out")
    models.add_argument("--out", type=Path, help="folder for the checkpoint of --export, adapters merged")
    adapters = "folder for the adapters of --export and the head alone, which PEFT reads too; with or instead of --out"
    models.add_argument("--adapter-out", type=Path, metavar="FOLDER", help=adapters)
    _fleet_flag(models)
    models.set_defaults(run=run_models)


def _fleet_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fleet", type=Path, default=Path(), help="the fleet's folder (default: this one)")


def run_init(args: argparse.Namespace) -> int:
    """Make the fleet's folder and its fleet.toml, with the classes from --labels or a labelled file."""
    if args.labels and args.labels_from:
        raise UsageError("--labels and --labels-from both name the classes: leave out one")
    labels: Sequence[str] = [label.strip() for label in args.labels.split(",")] if args.labels else ()
    if args.labels_from:
        how = {"encoding": args.encoding, "skip_bad_rows": args.skip_bad_rows, "progress": note}
        labels = labels_of(args.labels_from, args.text_column, args.label_column, **how)
    path = init(
        args.folder, name=args.name, base=args.model, family=args.family, labels=labels, max_length=args.max_length, method=args.method,
        rounds=args.rounds, goal=args.goal, quorum=args.quorum, seed=args.seed, port=args.port,
    )  # fmt: skip
    if args.json:
        print_json({"config": str(path), "labels": list(labels)})
    else:
        print(
            f"wrote {path} with {len(labels)} labels"
            + ("" if labels else ": put the classes into [model] labels before `serve`")
        )
    return 0


def run_enroll(args: argparse.Namespace) -> int:
    """Enrol the devices, all or none, and write the files that let them in."""
    fleet = Fleet(args.fleet)
    fleet.refuse_simulated()
    files = {device: (args.out or args.fleet / "devices") / f"{device}.toml" for device in args.device}
    if len(files) < len(args.device):
        raise UsageError("a device is named twice: name each once")
    fleet.enroll_all(files, renew=args.renew, host=args.host)
    for device, out in files.items():
        if args.json:
            print_json({"device": device, "config": str(out)})
        else:
            print(f"{out}: copy it to {device} and run `edge-runtime join --config {out.name} --data FILE` there")
    return 0


def run_serve(args: argparse.Namespace) -> int:
    """Run the embedded broker, unless it is external, and the rounds until told to stop."""
    from edge_coordinator.broker import EmbeddedBroker
    from edge_coordinator.server import Server
    from edge_coordinator.server_log import ServerLog

    fleet = Fleet(args.fleet)
    fleet.refuse_simulated()
    log = print_json if args.json else ServerLog()
    with lock_folder(args.fleet, "a coordinator"), until_told_to_stop() as keep_going:
        models = fleet.models(note)
        section = fleet.config.broker
        broker = None
        if section.kind == "embedded":
            certfile, keyfile = fleet.certificate()
            address = (section.host, section.port, fleet.config.realm, fleet.lookup())
            broker = EmbeddedBroker(*address, certfile=certfile, keyfile=keyfile)
            broker.start()
        try:
            host, port = fleet.broker_address()
            server = Server(
                fleet.config, fleet.ledger, models, _transport(fleet, host, broker.port if broker else port), log
            )
            log({"event": "serving", "realm": fleet.config.realm, "host": host, "port": broker.port if broker else port, "epoch": server.run.epoch,
                 "broker": section.kind, "model_version": server.run.manifest.version})  # fmt: skip
            server.serve(keep_going, until_finished=args.until_finished)
        finally:
            if broker:
                broker.stop()
    return 0


def _transport(fleet: Fleet, host: str, port: int) -> MqttTransport:
    from edge_coordinator.server import down_message

    topics = Topics(fleet.config.realm)
    ca_file = Path(fleet.config.broker.ca_file) if fleet.config.broker.ca_file else None
    return MqttTransport(
        host, port, COORDINATOR, fleet.secret(), topics.coordinator_filters(), will=Will(topics.all("coord"), down_message()), ca_file=ca_file,
        inbox_messages=1024,
    )  # fmt: skip


def run_broker(args: argparse.Namespace) -> int:
    """broker"""
    from edge_coordinator.broker import EmbeddedBroker, run
    from edge_coordinator.mosquitto import MosquittoProcess, write_config, write_passwords

    fleet = Fleet(args.fleet)
    fleet.refuse_simulated()
    section = fleet.config.broker

    def ready(port: int) -> None:
        print_json({"event": "listening", "host": section.host, "port": port}) if args.json else note(
            f"listening on {section.host}:{port}"
        )

    if args.kind == "amqtt":
        certfile, keyfile = fleet.certificate()
        address = (section.host, section.port, fleet.config.realm, fleet.lookup())
        broker = EmbeddedBroker(*address, certfile=certfile, keyfile=keyfile)
        run(broker, on_ready=lambda: ready(broker.port))
        return 0
    folder = args.fleet / "mosquitto"
    users = fleet.users()
    certfile, keyfile = fleet.certificate()
    write_config(
        folder, fleet.config.realm, users, host=section.host, port=section.port, certfile=certfile, keyfile=keyfile
    )
    process = MosquittoProcess(folder)
    with until_told_to_stop() as keep_going:
        process.start()
        ready(section.port)
        try:
            while keep_going() and process.running:
                time.sleep(0.5)
                if (now := fleet.users()) != users:  # somebody was enrolled or refused
                    users = now
                    write_passwords(folder, users)
                    process.reload()
        finally:
            process.stop()
    return 0


def run_devices(args: argparse.Namespace) -> int:
    """List the devices as the ledger knows them; with --revoke refuse one first."""
    fleet = Fleet(args.fleet)
    if args.revoke:
        fleet.ledger.revoke(args.revoke)
        note(f"{args.revoke} is refused from now on; the broker ends its connection within 10 seconds")
    rows = fleet.ledger.devices()
    if rows and not is_locked(args.fleet):
        note("no coordinator runs here: states are as it heard them last")
    if args.json:
        print_json(rows)
        return 0
    print(table(["device", "state", "model", "last seen", "enrolled", ""],
                [[r["device"], r["state"] or "never seen", str(r["model_version"] or "-"), _when(r["last_seen"]), _when(r["enrolled_at"]),
                  "revoked" if r["revoked"] else ""] for r in rows]))  # fmt: skip
    return 0


def run_runs(args: argparse.Namespace) -> int:
    """List the rounds of every run."""
    rows = Fleet(args.fleet).ledger.rounds()
    if args.json:
        print_json(rows)
        return 0
    print(table(["run", "round", "state", "base model", "members", "updates", "opened", ""],
                [[r["run"], str(r["round"]), r["state"], str(r["base_version"]), str(r["members"]), str(r["committed"]), _when(r["opened_at"]), r["reason"]] for r in rows]))  # fmt: skip
    return 0


def run_models(args: argparse.Namespace) -> int:
    """List the model versions; with --export write one as a checkpoint folder instead."""
    fleet = Fleet(args.fleet)
    if args.export is not None:
        return _export(fleet, args)
    if args.out is not None or args.adapter_out is not None:
        flag = "--adapter-out" if args.out is None else "--out"
        raise UsageError(f"{flag} is the folder for --export VERSION: name the version")
    rows = describe_versions(fleet.ledger)
    if args.json:
        print_json(rows)
        return 0
    print(table(["version", "run", "round", "published", "devices", "examples", "mean loss"],
                [[str(r["version"]), r["run"] or "-", str(r["round"] or "-"), _when(r["created_at"]), str(len(r.get("members", ()))),
                  str(r.get("num_examples", "-")), str(r.get("mean_loss", "-"))] for r in rows]))  # fmt: skip
    return 0


def _export(fleet: Fleet, args: argparse.Namespace) -> int:
    """Write one version: whole, or its adapters, or both."""
    if args.out is None and args.adapter_out is None:
        raise UsageError("--export needs --out FOLDER, or --adapter-out FOLDER")
    from edge_coordinator.models import Models

    models, written = Models(args.fleet, fleet.ledger), {}
    if args.adapter_out is not None:
        models.export_adapter(args.export, args.adapter_out)
        written["adapter"] = str(args.adapter_out)
    if args.out is not None:
        models.export_folder(args.export, args.out)
        written["folder"] = str(args.out)
    if args.json:
        print_json({"version": args.export, **written})
        return 0
    for what, folder in written.items():
        print(f"{'the adapter of ' if what == 'adapter' else ''}model {args.export} is in {folder}")
    return 0


def _when(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


if __name__ == "__main__":
    sys.exit(main())
