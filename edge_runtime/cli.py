"""The command line of a device: `edge-runtime profile | plan | train | join | export | predict`.

Parses, calls, prints. Every command has `--help` with examples; those that scripts read have `--json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from edge_runtime import local
from edge_runtime.budget import memory_budget, parse_bytes, parse_seconds
from edge_runtime.console import (
    Bar,
    note,
    plain_event,
    print_json,
    run_main,
    table,
    until_told_to_stop,
    what_is_trained,
)
from edge_runtime.errors import UsageError
from edge_runtime.planner import mib
from edge_runtime.records import TrainSettings
from edge_runtime.source import DEFAULT_FAMILY, find_checkpoint, open_source

SAMPLES = (
    "How far is it from Denver to Aspen ?",
    "What is the name of the river that runs through the old town, and why was it once feared by the people who lived there ?",
    "Hello.",
    "The library parses configuration files and reports errors with line and column numbers.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; -> the exit code."""
    parsed = parser().parse_args(arguments)
    return run_main(lambda: int(parsed.run(parsed)))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _command(
        None, "edge-runtime", "Finetune a small transformer within this device's real memory, alone or in a fleet, and answer with it.",
        "edge-runtime profile\nedge-runtime plan minilm-l6 --data texts.csv --memory 600MB\nedge-runtime train minilm-l6 --data texts.csv --out my-model\n"
        "edge-runtime export my-model --out my-model.onnx\nedge-runtime predict my-model.onnx 'Where is the Louvre ?'",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    profile = _command(
        commands,
        "profile",
        "Measure this machine: memory and its real limit, cores, speed, temperature, battery.",
        "edge-runtime profile --json",
    )
    profile.set_defaults(run=run_profile)

    plan = _command(commands, "plan", "Show what could be trained here, at what cost, what fits, and the choice.",
                    "edge-runtime plan minilm-l6 --data texts.csv\nedge-runtime plan ./my-model --data texts.jsonl --memory 450MB --time 10m --upload 8MB")  # fmt: skip
    _training_flags(plan)
    plan.add_argument("--upload", help="most bytes of one update, for example 8MB")
    plan.set_defaults(run=run_plan)

    train = _command(commands, "train", "Finetune a model on this device, within a memory budget, without any coordinator.",
                     "edge-runtime train minilm-l6 --data texts.csv --out my-model\nedge-runtime train minilm-l3 --data t.csv --test held.csv --out m --memory 400MB --epochs 3")  # fmt: skip
    _training_flags(train)
    train.add_argument("--out", required=True, type=Path, help="folder for the finetuned model")
    train.add_argument(
        "--depth", type=int, help="train this suffix depth instead of the deepest that fits (0 = the head)"
    )
    train.set_defaults(run=run_train, upload=None)

    join = _command(commands, "join", "Take part in a fleet until told to stop.",
                    "edge-runtime join --config pi-7.toml --data texts.csv --state /var/lib/edge\nedge-runtime join --config pi-7.toml --memory 450MB --upload 8MB")  # fmt: skip
    join.add_argument(
        "--config", required=True, type=Path, help="the file that `edge-coordinator enroll` made for this device"
    )
    join.add_argument("--data", help="this device's examples: CSV, TSV or JSON lines")
    join.add_argument("--state", help="folder for the model and unfinished work (default: ./edge-DEVICE)")
    join.add_argument("--memory", help="peak memory of training: 450MB, 60%% or auto")
    join.add_argument("--time", help="longest training in one round, for example 15m")
    join.add_argument("--upload", help="most bytes of one update, for example 8MB")
    join.add_argument("--threads", type=int, help="threads for training (default: all cores)")
    _data_flags(join, defaults=False)
    join.set_defaults(run=run_join)

    export = _command(commands, "export", "Write a model as one ONNX file, checked against torch.",
                      "edge-runtime export my-model --out my-model.onnx\nedge-runtime export /var/lib/edge --out fleet.onnx --data texts.csv")  # fmt: skip
    export.add_argument("model", help="a folder from `train`, or the --state folder of `join`")
    export.add_argument("--out", required=True, type=Path, help="the ONNX file to write")
    export.add_argument("--data", type=Path, help="texts to compare on (default: a few built-in sentences)")
    export.add_argument("--family", default=DEFAULT_FAMILY, help="module that knows the architecture (%(default)s)")
    _data_flags(export)
    export.set_defaults(run=run_export)

    predict = _command(commands, "predict", "Classify texts with an exported model; needs no torch.",
                       "edge-runtime predict m.onnx 'Where is the Louvre ?' 'Who wrote Emma ?'\nedge-runtime predict m.onnx --file texts.txt --json\ncat texts.txt | edge-runtime predict m.onnx")  # fmt: skip
    predict.add_argument("model", type=Path, help="an ONNX file from `edge-runtime export`")
    predict.add_argument("text", nargs="*", help="texts to classify (default: one for each line of standard input)")
    predict.add_argument("--file", type=Path, help="read one text from each line of this file")
    predict.add_argument("--evaluate", type=Path, metavar="DATA", help="print the accuracy on a labelled file instead")
    predict.add_argument("--top", type=int, default=1, help="labels to show for each text (%(default)s)")
    predict.add_argument("--threads", type=int, help="threads (default: physical cores)")
    _data_flags(predict)
    predict.set_defaults(run=run_predict)
    return top


def _command(commands: Any, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    text = (
        "examples:\n  "
        + examples.replace("\n", "\n  ")
        + "\n\nexit codes: 0 done, 2 usage, 3 data, 4 model, 5 does not fit, 6 training failed, 7 connection, 8 extra missing, 9 wire, 10 storage, 130 stopped"
    )
    options: dict[str, Any] = {
        "description": what,
        "epilog": text,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    made: argparse.ArgumentParser = (
        commands.add_parser(name, help=what, **options) if commands else argparse.ArgumentParser(name, **options)
    )
    if commands:
        made.add_argument("--json", action="store_true", help="print JSON for scripts")
    return made


def _data_flags(command: argparse.ArgumentParser, *, defaults: bool = True) -> None:
    group = command.add_argument_group("data")
    group.add_argument("--text-column", default="text" if defaults else None, help="column of the text (text)")
    group.add_argument("--label-column", default="label" if defaults else None, help="column of the label (label)")
    group.add_argument("--encoding", help="of the file (default: UTF-8, or what its byte order mark says)")


def _training_flags(command: argparse.ArgumentParser) -> None:
    base = TrainSettings()
    command.add_argument(
        "model",
        help="alias (minilm-l6, minilm-l3), checkpoint folder, Hugging Face id, or the --state folder of `join`",
    )
    command.add_argument(
        "--data", required=True, type=Path, help="examples: CSV, TSV or JSON lines with a text and a label each"
    )
    command.add_argument("--test", type=Path, help="held-out examples (default: a tenth of --data)")
    command.add_argument(
        "--holdout",
        type=float,
        default=0.1,
        help="share of --data held out when there is no --test; 0 for none (%(default)s)",
    )
    command.add_argument(
        "--memory",
        default="auto",
        help="peak memory of training: 450MB, 60%% of what is available, or auto (%(default)s)",
    )
    command.add_argument("--time", help="longest training, for example 15m")
    command.add_argument("--epochs", type=int, default=base.epochs, help="(%(default)s)")
    command.add_argument("--batch-size", type=int, default=base.batch_size, help="(%(default)s)")
    command.add_argument("--learning-rate", type=float, default=base.learning_rate, help="of the blocks (%(default)s)")
    command.add_argument("--head-learning-rate", type=float, default=base.head_learning_rate, help="(%(default)s)")
    command.add_argument("--weight-decay", type=float, default=base.weight_decay, help="(%(default)s)")
    command.add_argument(
        "--optimizer", default=base.optimizer, help="adamw, or sgd, which needs less memory (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=base.seed, help="(%(default)s)")
    command.add_argument("--threads", type=int, help="(default: all cores)")
    command.add_argument(
        "--max-length", type=int, help="tokens after which a text is cut (default: the model's own, at most 128)"
    )
    command.add_argument("--family", default=DEFAULT_FAMILY, help="module that knows the architecture (%(default)s)")
    command.add_argument("--new-head", action="store_true", help="forget the checkpoint's own classes")
    _data_flags(command)
    command.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that cannot be used instead of stopping"
    )


def run_profile(args: argparse.Namespace) -> int:
    """profile"""
    found = local.Device.measure().profile
    if args.json:
        print_json(dataclasses.asdict(found))
        return 0
    unknown = "not known here"
    limit = mib(found.cgroup_limit_bytes) if found.cgroup_limit_bytes else "none"
    rows = [
        ("memory", f"{mib(found.ram_total_bytes)} in all, {mib(found.ram_available_bytes)} available"),
        (
            "cgroup limit",
            limit
            + (f", {mib(found.cgroup_available_bytes)} of it left" if found.cgroup_available_bytes is not None else ""),
        ),
        ("for training", f"{mib(memory_budget('auto', found))} (--memory auto)"),
        ("cores", str(found.cores)),
        ("matrix products", f"{found.gflops:.1f} GFLOP/s, float32"),
        ("memory bandwidth", f"{found.memory_gb_per_s:.1f} GB/s"),
        ("temperature", f"{found.temperature_c:.0f} C" if found.temperature_c is not None else unknown),
        (
            "battery",
            f"{found.battery_percent:.0f} %{' charging' if found.plugged_in else ''}"
            if found.battery_percent is not None
            else "none",
        ),
    ]
    for name, value in rows:
        print(f"{name:18}{value}")
    return 0


def _plan(args: argparse.Namespace) -> tuple[local.Planned, local.Device]:
    settings = TrainSettings(
        args.epochs,
        args.batch_size,
        args.learning_rate,
        args.head_learning_rate,
        args.weight_decay,
        args.optimizer,
        args.seed,
    )
    device = local.Device.measure(args.threads, speed=False)
    options = local.DataOptions(
        args.text_column, args.label_column, args.encoding, "skip" if args.skip_bad_rows else "error"
    )
    planned = local.plan(
        args.model, args.data, memory=args.memory, time=args.time, upload=args.upload, settings=settings, device=device, max_length=args.max_length,
        family=args.family, new_head=args.new_head, options=options, holdout=args.holdout, test=args.test, progress=note,
    )  # fmt: skip
    if planned.prepared.skipped:
        note(f"skipped {planned.prepared.skipped} bad rows; {'; '.join(planned.prepared.first_skipped[:3])}")
    return planned, device


def run_plan(args: argparse.Namespace) -> int:
    """plan"""
    planned, _ = _plan(args)
    budget = planned.budget
    if args.json:
        rows = [
            dataclasses.asdict(row) | {"fits": not why, "why_not": why}
            for row, why in zip(planned.rows, planned.why_not, strict=True)
        ]
        chosen = dataclasses.asdict(planned.chosen) if planned.chosen else None
        print_json(
            {
                "rows": rows,
                "chosen": chosen,
                "refusal": planned.refusal,
                "budget": dataclasses.asdict(budget),
                "data": dataclasses.asdict(planned.prepared.data),
            }
        )
        return 0 if planned.chosen else 5
    data = planned.prepared.data
    print(
        f"{data.num_examples} examples, {data.mean_length:.1f} tokens on average, {data.longest} at most, {len(planned.prepared.labels)} labels"
    )
    print(f"budgets: memory {mib(budget.memory_bytes)}, time {f'{budget.time_s:.0f} s' if budget.time_s else 'any'}, "
          f"upload {mib(budget.upload_bytes) if budget.upload_bytes else 'any'}\n")  # fmt: skip
    best = planned.chosen.chosen if planned.chosen else None
    lines = []
    for row, why in zip(planned.rows, planned.why_not, strict=True):
        depth = "head" if row.depth == 0 else f"{row.depth} of {planned.source.spec.num_blocks}"
        verdict = why or ("<- chosen: the deepest that fits, and the fastest of these" if row == best else "fits")
        lines.append(
            [
                depth,
                "yes" if row.checkpointing else "no",
                str(row.micro_batch),
                mib(row.peak_bytes),
                f"{row.step_s:.3f} s",
                f"{row.epoch_s:.1f} s",
                mib(row.upload_bytes),
                verdict,
            ]
        )
    print(table(["blocks", "checkpointing", "micro-batch", "peak memory", "step", "epoch", "upload", ""], lines))
    print("\npredicted, not measured: `edge-runtime train` reports both")
    if planned.refusal:
        note(planned.refusal)
        return 5
    return 0


def run_train(args: argparse.Namespace) -> int:
    """train"""
    planned, device = _plan(args)
    trained = local.train(planned, args.out, device=device, depth=args.depth, progress=Bar("training"))
    report = trained.report
    if args.json:
        print_json(
            dataclasses.asdict(report)
            | {
                "folder": str(trained.folder),
                "limit_bytes": planned.budget.memory_bytes,
                "enforced_by": trained.enforced_by,
            }
        )
        return 0
    what = (
        "the head"
        if report.depth == 0
        else f"the last {report.depth} of {planned.source.spec.num_blocks} blocks and the head"
    )
    rows = [
        (
            "trained",
            f"{what}{', with gradient checkpointing' if report.checkpointing else ''}, micro-batch {report.micro_batch}, {report.steps} steps",
        ),
        (
            "peak memory",
            f"{mib(report.peak_bytes)} measured (VmHWM), {mib(report.promised_peak_bytes)} promised, limit {mib(planned.budget.memory_bytes)} kept by {trained.enforced_by}",
        ),
        (
            "time",
            f"{report.train_s:.1f} s measured, {report.promised_s:.1f} s promised; {report.total_s:.1f} s with start and end",
        ),
        ("loss", f"{report.first_loss:.3f} -> {report.last_loss:.3f}"),
        (
            "accuracy",
            f"{100 * report.accuracy:.1f} % of the held-out examples"
            if report.accuracy is not None
            else "not measured: nothing was held out",
        ),
        ("model", str(trained.folder)),
    ]
    for name, value in rows:
        print(f"{name:14}{value}")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """export"""
    from edge_runtime.data import read_examples
    from edge_runtime.export import export_onnx

    checkpoint = find_checkpoint(args.model, family=args.family, progress=note)
    source = open_source(checkpoint, None, local.cache_folder())
    samples: Sequence[str] = SAMPLES
    if args.data:
        found = read_examples(
            args.data,
            text_column=args.text_column,
            label_column=args.label_column,
            encoding=args.encoding,
            bad_rows="skip",
        )
        samples = [row.text for row in found.rows[:64]]
    report = export_onnx(
        source.spec, source.weights, source.tokenizer.read_bytes(), args.out, samples=samples, metadata=source.metadata
    )
    if args.json:
        print_json(
            {
                "path": str(report.path),
                "num_bytes": report.num_bytes,
                "max_abs_diff": report.max_abs_diff,
                "seconds": report.seconds,
                "num_samples": report.num_samples,
            }
        )
    else:
        print(
            f"{report.path}: {mib(report.num_bytes)}, logits within {report.max_abs_diff:.1e} of torch on {report.num_samples} texts, {report.seconds:.1f} s"
        )
    return 0


def run_predict(args: argparse.Namespace) -> int:
    """predict"""
    from edge_runtime.data import iter_texts, read_examples
    from edge_runtime.predict import Predictor, evaluate

    if args.top < 1:
        raise UsageError(f"--top must be at least 1, it is {args.top}")
    if args.evaluate:
        rows = read_examples(
            args.evaluate, text_column=args.text_column, label_column=args.label_column, encoding=args.encoding
        ).rows
        accuracy = evaluate(args.model, ((row.text, row.label) for row in rows), args.threads)
        print_json({"accuracy": accuracy, "num_examples": len(rows)}) if args.json else print(
            f"accuracy {100 * accuracy:.2f} % of {len(rows)}"
        )
        return 0
    predictor = Predictor(args.model, args.threads)
    texts = iter(args.text) if args.text else iter_texts(args.file or sys.stdin.buffer)
    batch: list[str] = []
    live = not args.text and not args.file and sys.stdin.isatty()
    for text in texts:
        batch.append(text)
        if live or len(batch) == 256:
            _print_predictions(predictor, batch, args)
            batch = []
    _print_predictions(predictor, batch, args)
    return 0


def _print_predictions(predictor: Any, texts: list[str], args: argparse.Namespace) -> None:
    for text, found in zip(texts, predictor.predict(texts), strict=True):
        best = sorted(found.probabilities.items(), key=lambda item: -item[1])
        if args.json:
            print_json(
                {"text": text, "label": found.label, "probability": found.probability, "probabilities": dict(best)}
            )
        else:
            shown = ", ".join(f"{label} {100 * p:.1f} %" for label, p in best[: args.top])
            print(f"{shown}\t{text if len(text) <= 100 else text[:97] + '...'}")
    sys.stdout.flush()


def run_join(args: argparse.Namespace) -> int:
    """join"""
    from edge_runtime.agent import Agent, software
    from edge_runtime.credentials import read_credentials
    from edge_runtime.session import Session
    from edge_runtime.store import lock_folder
    from edge_runtime.topics import Topics
    from edge_runtime.transport import MqttTransport, Will
    from edge_runtime.wire import Status, encode

    who = read_credentials(args.config)
    settings = who.settings
    data = args.data or settings.data
    if not data:
        raise UsageError("name this device's examples: --data FILE, or data in the [device] section of the config")
    if not Path(data).exists():
        raise UsageError(f"{data} is missing: --data names this device's examples")
    state = Path(args.state or settings.state or f"edge-{who.device}").absolute()
    options = local.DataOptions(
        args.text_column or settings.text_column,
        args.label_column or settings.label_column,
        args.encoding or settings.encoding or None,
        "skip",
    )
    threads = args.threads or settings.threads or local.Device.measure(speed=False).threads
    time_s, upload = args.time or settings.time, args.upload or settings.upload
    log = EventLog(args.json)
    session = Session(
        Path(data).absolute(), state / "cache", memory=args.memory or settings.memory, time_s=parse_seconds(time_s) if time_s else None,
        upload_bytes=parse_bytes(upload) if upload else None, threads=threads, options=options, say=note,
    )  # fmt: skip
    session.budget()  # a budget that is no budget is said at once
    topics = Topics(who.realm)
    farewell = encode(Status("offline", software(), 0), sent_at=0.0, boot=bytes(8), sequence=0)
    transport = MqttTransport(
        who.host, who.port, who.device, who.secret, topics.device_filters(who.device), will=Will(topics.up(who.device, "st"), farewell),
        ca_file=Path(who.ca_file) if who.ca_file else None,
    )  # fmt: skip
    with lock_folder(state, "an agent"), until_told_to_stop() as keep_going:
        Agent(who.device, who.realm, state, session, transport, log, families=(who.family,)).run(keep_going)
    return 0


class EventLog:
    """The agent's events: JSON lines for scripts, short lines for people."""

    LINES: ClassVar[dict[str, Callable[[dict[str, Any]], str]]] = {
        "training": lambda e: f"round {e['round']}: training {what_is_trained(e['depth'])}, {e['steps']} steps, at most {mib(e['peak_bytes_promised'])}",
        "trained": lambda e: f"round {e['round']}: trained in {e['train_s']:.1f} s, peak {mib(e['peak_bytes'])} ({mib(e['promised_peak_bytes'])} promised), loss {e['last_loss']:.3f}",
        "committed": lambda e: f"round {e['round']}: the coordinator has the update ({mib(e['bytes_up'])} sent, {mib(e['bytes_down'])} received so far)",
        "model": lambda e: f"model {e['model_version']} is here",
        "fetching": lambda e: f"fetching model {e['model_version']}: {mib(e['num_bytes'])}",
    }  # fmt: skip

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._bar: Bar | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if self._json:
            print_json(event)
            return
        kind = event["event"]
        if kind == "step":
            self._bar = self._bar or Bar(f"round {event['round']}")
            self._bar(event["step"], event["steps"], event["loss"])
            return
        self._bar = None
        note(self.LINES.get(kind, plain_event)(event))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"edge-runtime {version('edge-runtime')}"
    except PackageNotFoundError:
        return "edge-runtime from a source folder"


if __name__ == "__main__":
    sys.exit(main())
