"""The command line of a device: `edge-runtime profile | plan | train | join | prune | export | predict | serve | ask | models | doctor | service`.

Flags and help only: every command has `--help` with examples, and those that scripts read have `--json`. What a command
does is in `commands.py` and `system/commands.py`. Imports them, `console` and the defaults that the help shows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from edge_runtime import commands as do
from edge_runtime.conditions import EXAMPLES
from edge_runtime.console import EXIT_CODES, Commands, new_parser, run_main
from edge_runtime.engine import BACKENDS, PRECISIONS
from edge_runtime.records import TrainSettings
from edge_runtime.source import DEFAULT_FAMILY
from edge_runtime.system import commands as system
from edge_runtime.training.optimizers import OPTIMIZERS
from edge_runtime.version import software

MERGED = "LoRA adapters, ours or PEFT's, to add into the model, which may be an alias then"
WHEN = f"train only while these hold, and pause meanwhile; any of: {EXAMPLES}"

_parser = partial(new_parser, exit_codes=EXIT_CODES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code."""
    parsed = parse(arguments)
    return run_main(lambda: int(parsed.run(parsed)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The call. Texts of `predict` may stand after a flag too, where argparse itself no longer takes them."""
    top = parser()
    parsed, left = top.parse_known_args(arguments)
    if left and (parsed.command != "predict" or any(_is_flag(word) for word in _before_dashes(left))):
        top.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        parsed.text += [*_before_dashes(left), *left[len(_before_dashes(left)) + 1 :]]
    return parsed


def _before_dashes(words: Sequence[str]) -> Sequence[str]:
    """What stands before `--`, after which every word is a text."""
    return words[: words.index("--")] if "--" in words else words


def _is_flag(word: str) -> bool:
    """As argparse sees it: a dash, a number or words in quotes are texts."""
    return re.fullmatch(r"-[^ ]+", word) is not None and re.fullmatch(r"-\d+|-\d*\.\d+", word) is None


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _parser(
        None,
        "edge-runtime",
        "Finetune a small transformer within this device's real memory, alone or in a fleet, and answer with it.",
        "edge-runtime profile",
        "edge-runtime plan minilm-l6 --data texts.csv --memory 600MB",
        "edge-runtime train minilm-l6 --data texts.csv --out my-model",
        "edge-runtime export my-model --out my-model.onnx",
        "edge-runtime predict my-model.onnx 'Where is the Louvre ?'",
    )
    top.add_argument("--version", action="version", version=f"edge-runtime {software()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_profile,
        _add_plan,
        _add_train,
        _add_join,
        _add_prune,
        _add_export,
        _add_predict,
        _add_serve,
        _add_ask,
        _add_models,
        _add_doctor,
        _add_service,
    ):
        add(commands)
    return top


def _add_profile(commands: Commands) -> None:
    profile = _parser(
        commands,
        "profile",
        "Measure this machine: memory and its real limit, cores, speed, temperature, battery.",
        "edge-runtime profile --json",
    )
    profile.set_defaults(run=do.run_profile)


def _add_plan(commands: Commands) -> None:
    plan = _parser(
        commands,
        "plan",
        "Show what could be trained here, at what cost, what fits, and the choice.",
        "edge-runtime plan minilm-l6 --data texts.csv",
        "edge-runtime plan ./my-model --data texts.jsonl --memory 450MB --time 10m --upload 8MB",
        "edge-runtime plan minilm-l6 --data texts.csv --memory 300MB --method all",
    )
    _training_flags(plan)
    plan.add_argument("--upload", help="most bytes of one update, for example 8MB")
    method = "what a fleet with this method would have this device train, or with each: all"
    plan.add_argument("--method", help=method)
    plan.set_defaults(run=do.run_plan)


def _add_train(commands: Commands) -> None:
    train = _parser(
        commands,
        "train",
        "Finetune a model on this device, within a memory budget, without any coordinator.",
        "edge-runtime train minilm-l6 --data texts.csv --out my-model",
        "edge-runtime train minilm-l3 --data t.csv --test held.csv --out m --memory 400MB --epochs 3",
        "edge-runtime train minilm-l6 --data t.csv --lora-rank 8 --lora-targets q,v --adapter-out my-adapter",
    )
    _training_flags(train)
    train.add_argument("--out", type=Path, help="folder for the finetuned model; one that is there already is replaced")
    adapters = "folder for the LoRA adapters and the head alone, which PEFT reads too; with or instead of --out"
    train.add_argument("--adapter-out", type=Path, metavar="FOLDER", help=adapters)
    train.add_argument(
        "--depth", type=int, help="train this suffix depth instead of the deepest that fits (0 = the head)"
    )
    delta = "write only the trained tensors; the model's folder must then stay as it is and where it is"
    train.add_argument("--delta", action="store_true", help=delta)
    train.add_argument("--when", default="", metavar="CONDITIONS", help=WHEN)
    train.set_defaults(run=do.run_train, upload=None)


def _add_join(commands: Commands) -> None:
    join = _parser(
        commands,
        "join",
        "Take part in a fleet until told to stop.",
        "edge-runtime join --config pi-7.toml --data texts.csv --state /var/lib/edge",
        "edge-runtime join --config pi-7.toml --memory 450MB --upload 8MB",
        "edge-runtime join --config pi-7.toml --when 'idle, charging, temperature<70, time=22:00-06:00'",
    )
    join.add_argument(
        "--config", required=True, type=Path, help="the file that `edge-coordinator enroll` made for this device"
    )
    # From here each flag has the name of a field of the [device] section, which holds where it is not given.
    join.add_argument("--data", help="this device's examples: CSV, TSV or JSON lines")
    join.add_argument("--state", help="folder for the model and unfinished work (default: ./edge-DEVICE)")
    join.add_argument("--memory", help="peak memory of training: 450MB, 60%% or auto")
    join.add_argument("--time", help="longest training in one round, for example 15m")
    join.add_argument("--upload", help="most bytes of one update, for example 8MB")
    join.add_argument("--threads", type=_count, help="threads for training (default: all cores)")
    join.add_argument("--when", metavar="CONDITIONS", help=WHEN)
    _engine_flags(join, defaults=False)
    _data_flags(join, defaults=False)
    join.set_defaults(run=do.run_join)


def _add_prune(commands: Commands) -> None:
    prune = _parser(
        commands,
        "prune",
        "Make a model smaller and faster: drop the attention heads and feed-forward channels of the smallest weights. "
        "Needs no data; train the result, since its answers are worse until then.",
        "edge-runtime prune minilm-l6 --sparsity 0.5 --out minilm-half",
        "edge-runtime prune my-model --sparsity 0.3 --out smaller && edge-runtime train smaller --data t.csv --out m",
    )
    prune.add_argument(
        "model",
        help="alias, checkpoint folder, Hugging Face id, a folder from `train`, or the --state folder of `join`",
    )
    prune.add_argument(
        "--sparsity", required=True, type=float, help="share of the heads and channels that goes, for example 0.5"
    )
    prune.add_argument(
        "--out", required=True, type=Path, help="folder for the smaller model; one that is there already is replaced"
    )
    prune.add_argument("--family", default=DEFAULT_FAMILY, help="module that knows the architecture (%(default)s)")
    prune.set_defaults(run=do.run_prune)


def _add_export(commands: Commands) -> None:
    export = _parser(
        commands,
        "export",
        "Write a model as one ONNX file that plain onnxruntime runs, checked before it appears.",
        "edge-runtime export my-model --out my-model.onnx",
        "edge-runtime export my-model --out small.onnx --precision int8 --data test.csv",
        "edge-runtime export /var/lib/edge --out fleet.onnx --data texts.csv",
    )
    export.add_argument("model", help="a folder from `train`, or the --state folder of `join`")
    export.add_argument("--out", required=True, type=Path, help="the ONNX file to write")
    export.add_argument("--adapter", type=Path, metavar="FOLDER", help=MERGED)
    export.add_argument("--data", type=Path, help="held-out examples to compare on (default: a few built-in sentences)")
    export.add_argument(
        "--precision",
        choices=("float32", "int8"),
        default="float32",
        help="int8 is written if it loses at most half a point of accuracy on --data, else float32 (%(default)s)",
    )
    export.add_argument("--family", default=DEFAULT_FAMILY, help="module that knows the architecture (%(default)s)")
    _data_flags(export)
    export.set_defaults(run=do.run_export)


def _add_predict(commands: Commands) -> None:
    predict = _parser(
        commands,
        "predict",
        "Classify texts with a trained model; needs no torch.",
        "edge-runtime predict my-model 'Where is the Louvre ?' 'Who wrote Emma ?'",
        "edge-runtime predict m.onnx --file texts.txt --json",
        "cat texts.txt | edge-runtime predict /var/lib/edge",
    )
    model = "a folder from `train`, the --state folder of `join`, or an ONNX file from `edge-runtime export`"
    predict.add_argument("model", type=Path, help=model)
    predict.add_argument("text", nargs="*", help="texts to classify (default: one for each line of standard input)")
    predict.add_argument("--adapter", type=Path, metavar="FOLDER", help=MERGED)
    predict.add_argument("--file", type=Path, help="read one text from each line of this file (-: standard input)")
    predict.add_argument("--evaluate", type=Path, metavar="DATA", help="print the accuracy on a labelled file instead")
    predict.add_argument("--top", type=_count, default=1, help="labels to show for each text (%(default)s)")
    predict.add_argument("--threads", type=_count, help="threads (default: physical cores)")
    _long_flag(predict)
    family = "module that knows the architecture of a folder from `train` (%(default)s)"
    predict.add_argument("--family", default=DEFAULT_FAMILY, help=family)
    _data_flags(predict)
    predict.add_argument(
        "--skip-bad-rows", action="store_true", help="of --evaluate: leave out rows that cannot be used"
    )
    predict.set_defaults(run=do.run_predict)


def _add_doctor(commands: Commands) -> None:
    doctor = _parser(
        commands,
        "doctor",
        "Look for what commonly goes wrong on a device and say what to do. Changes nothing; ends with 1 where something is wrong.",
        "edge-runtime doctor",
        "sudo edge-runtime doctor --config pi-7.toml --json",
    )
    config = (
        "the device's file of `edge-coordinator enroll`: broker, certificates, credentials and clock are looked at too"
    )
    doctor.add_argument("--config", type=Path, help=config)
    state = (
        "the --state folder of `join` (default: the [device] section's, else that of the service, else ./edge-DEVICE)"
    )
    doctor.add_argument("--state", type=Path, help=state)
    doctor.set_defaults(run=system.run_doctor)


def _add_service(commands: Commands) -> None:
    service = _parser(
        commands,
        "service",
        "Run `join`, and `serve` beside it, as systemd services with a user of their own, limits and a watchdog; all settings are the [device] section's.",
        "edge-runtime service print --config pi-7.toml",
        "sudo edge-runtime service install --config pi-7.toml --memory-max 600MB --serve 8765",
        "sudo edge-runtime service uninstall",
    )
    actions = service.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for name, what, run in (
        ("install", "Write the units, start them now and at every boot; needs root.", system.run_service_install),
        ("print", "Show the units and install nothing.", system.run_service_print),
        ("uninstall", "Stop the services and remove their units; needs root.", system.run_service_uninstall),
    ):
        config = "" if name == "uninstall" else " --config pi-7.toml"
        action = _parser(actions, name, what, f"edge-runtime service {name}{config}", nested=True)
        action.set_defaults(run=run)
        if config:
            _unit_flags(action)


def _unit_flags(action: argparse.ArgumentParser) -> None:
    """What a unit is made of."""
    made = "the file that `edge-coordinator enroll` made for this device; it needs data in its [device] section"
    action.add_argument("--config", required=True, type=Path, help=made)
    memory = "most memory of agent and training together: 600MB, or a share of the RAM (%(default)s)"
    action.add_argument("--memory-max", default="80%", help=memory.replace("%(default)s", "80%%"))
    quota = "most processor time, 100%% being one core (default: all that nobody else wants)"
    action.add_argument("--cpu-quota", default="", help=quota)
    serve = "answer over HTTP too, on this port of loopback, with the newest model that is well (default: no)"
    action.add_argument("--serve", type=_unprivileged_port, metavar="PORT", help=serve)


def _long_flag(action: argparse.ArgumentParser) -> None:
    what = (
        "texts of more tokens than the model reads at once: read the start, or all in windows and average (%(default)s)"
    )
    action.add_argument("--long", choices=("truncate", "window"), default="truncate", help=what)


def _add_serve(commands: Commands) -> None:
    serve = _parser(
        commands,
        "serve",
        "Answer over HTTP until told to stop; of a device's folder with the newest model that is well.",
        "edge-runtime serve /var/lib/edge",
        "edge-runtime serve my-model.onnx --port 9000",
        "curl -H 'Content-Type: application/json' -d '{\"text\": \"Who wrote Emma ?\"}' http://127.0.0.1:8765/predict",
    )
    model = "the --state folder of `join`, a folder from `train`, or an ONNX file from `edge-runtime export`"
    serve.add_argument("model", type=Path, help=model)
    host = "address to listen on; another than loopback is open to whoever reaches it, without a password (%(default)s)"
    serve.add_argument("--host", default="127.0.0.1", help=host)
    serve.add_argument("--port", type=_port, default=8765, help="0: any that is free (%(default)s)")
    config = "file of an enrolled name, another than the agent's: answer over the fleet's broker too"
    serve.add_argument("--config", type=Path, help=config)
    serve.add_argument(
        "--allow", type=_names, metavar="NAME[,NAME]", help="enrolled names that may ask over the broker"
    )
    serve.add_argument("--adapter", type=Path, metavar="FOLDER", help=MERGED)
    serve.add_argument("--threads", type=_count, help="threads of one answer (default: physical cores)")
    _long_flag(serve)
    family = "module that knows the architecture of a folder from `train` (%(default)s)"
    serve.add_argument("--family", default=DEFAULT_FAMILY, help=family)
    serve.set_defaults(run=do.run_serve)


def _add_ask(commands: Commands) -> None:
    ask = _parser(
        commands,
        "ask",
        "Have texts classified by a device of the fleet, over the fleet's broker.",
        "edge-runtime ask --config desk.toml pi-1-answers 'Where is the Louvre ?'",
    )
    ask.add_argument(
        "--config", required=True, type=Path, help="the file that `edge-coordinator enroll` made for the asker"
    )
    ask.add_argument("device", help="the name that `edge-runtime serve --config` answers under")
    ask.add_argument("text", nargs="+", help="texts to classify, at most 64 and 16 KiB in all")
    ask.add_argument("--timeout", type=_count, default=15, metavar="SECONDS", help="(%(default)s)")
    ask.set_defaults(run=do.run_ask)


def _add_models(commands: Commands) -> None:
    models = _parser(
        commands,
        "models",
        "List the model versions that a device holds, or choose the one that answers.",
        "edge-runtime models list /var/lib/edge",
        "edge-runtime models use /var/lib/edge 7",
        "edge-runtime models use /var/lib/edge newest",
        "edge-runtime models rollback /var/lib/edge",
    )
    verbs = models.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, what, run in (
        ("list", "Show the versions that are whole, newest first.", do.run_models_list),
        ("use", "Pin a version, or follow the newest again.", do.run_models_use),
        ("rollback", "Pin the version before the one that answers.", do.run_models_rollback),
    ):
        one = _parser(verbs, verb, what, f"edge-runtime models {verb} /var/lib/edge", nested=True)
        one.add_argument("state", type=Path, help="the --state folder of `join`")
        one.set_defaults(run=run)
        if verb == "use":
            one.add_argument("version", type=_version, help="a number that `models list` shows, or newest")


def _version(text: str) -> str:
    """`newest`, or a whole number from 1."""
    return text if text == "newest" else str(_count(text))


def _port(text: str) -> int:
    """A port number."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, it is {text!r}")
    return int(text)


def _unprivileged_port(text: str) -> int:
    """A port number that a service without rights may take."""
    if (port := _port(text)) < 1024:
        raise argparse.ArgumentTypeError(f"must be from 1024 to 65535, it is {text!r}")
    return port


def _count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, it is {text!r}")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(","))


def _training_flags(command: argparse.ArgumentParser) -> None:
    """The flags of `plan` and `train`: model, data and budgets, then how to train."""
    add = command.add_argument
    add(
        "model",
        help="alias (minilm-l6, minilm-l3), checkpoint folder, Hugging Face id, or the --state folder of `join`",
    )
    add("--data", required=True, type=Path, help="examples: CSV, TSV or JSON lines with a text and a label each")
    add("--test", type=Path, help="held-out examples (default: a tenth of --data)")
    holdout = "share of --data held out when there is no --test; 0 for none (%(default)s)"
    add("--holdout", type=float, default=0.1, help=holdout)
    adapter = "folder of LoRA adapters to begin from, ours or PEFT's; its rank and layers hold unless others are given"
    add("--adapter", type=Path, metavar="FOLDER", help=adapter)
    memory = "peak memory of training: 450MB, 60%% of what is available, or auto (%(default)s)"
    add("--memory", default="auto", help=memory)
    add("--time", help="longest training, for example 15m")
    _settings_flags(command)
    add("--threads", type=_count, help="(default: all cores)")
    _engine_flags(command)
    add("--max-length", type=int, help="tokens after which a text is cut (default: the model's own, at most 128)")
    add("--family", default=DEFAULT_FAMILY, help="module that knows the architecture (%(default)s)")
    add("--new-head", action="store_true", help="forget the checkpoint's own classes")
    _data_flags(command)
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used instead of stopping")


def _settings_flags(command: argparse.ArgumentParser) -> None:
    """One flag for each field of `TrainSettings`."""
    add, base = command.add_argument, TrainSettings()
    add("--epochs", type=int, default=base.epochs, help="(%(default)s)")
    add("--batch-size", type=int, default=base.batch_size, help="(%(default)s)")
    add("--learning-rate", type=float, default=base.learning_rate, help="of the blocks (%(default)s)")
    add("--head-learning-rate", type=float, default=base.head_learning_rate, help="(%(default)s)")
    add("--weight-decay", type=float, default=base.weight_decay, help="(%(default)s)")
    add(
        "--optimizer",
        default=base.optimizer,
        choices=OPTIMIZERS,
        help="with 8, 2, 4 or 0 bytes of state for each trained weight, in this order (%(default)s)",
    )
    add("--seed", type=int, default=base.seed, help="(%(default)s)")
    rank = "train LoRA adapters of this rank instead of the blocks themselves (%(default)s = the blocks)"
    add("--lora-rank", type=int, default=base.lora_rank, help=rank)
    add("--lora-alpha", type=float, default=base.lora_alpha, help="adapters count alpha / rank times (%(default)s)")
    layers = (
        "linear layers that get them, or a mask: q,k,v,o,up,down or ends of names such as attention.self.query (all)"
    )
    add("--lora-targets", type=_names, default=base.lora_targets, metavar="NAME[,NAME]", help=layers)
    mask = (
        "train one entry, drawn at random, in each N of the blocks' matrices, and no vectors (%(default)s = train all)"
    )
    add("--mask-every", type=int, default=base.mask_every, metavar="N", help=mask)
    add("--mask-seed", type=int, default=base.mask_seed, help="draws the entries (%(default)s)")
    add("--adapter-learning-rate", type=float, default=base.adapter_learning_rate, help="of adapters (%(default)s)")


def _engine_flags(command: argparse.ArgumentParser, *, defaults: bool = True) -> None:
    """What training runs on."""
    group = command.add_argument_group("engine")
    backend = "onnx needs no torch and least memory; auto takes it wherever the model's graphs can be had (auto)"
    group.add_argument("--backend", choices=BACKENDS, default="auto" if defaults else None, help=backend)
    precision = "of the frozen blocks: float32 or int8 (float32)"
    group.add_argument("--precision", choices=PRECISIONS, default="float32" if defaults else None, help=precision)
    group.add_argument("--no-prefix-cache", action="store_true", help="do not keep the frozen blocks' outputs on disk")


def _data_flags(command: argparse.ArgumentParser, *, defaults: bool = True) -> None:
    """How a data file is to be read."""
    group = command.add_argument_group("data")
    group.add_argument("--text-column", default="text" if defaults else None, help="column of the text (text)")
    group.add_argument("--label-column", default="label" if defaults else None, help="column of the label (label)")
    group.add_argument("--encoding", help="of the file (default: UTF-8, or what its byte order mark says)")


if __name__ == "__main__":
    sys.exit(main())
