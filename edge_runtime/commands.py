"""What each command of `edge-runtime` does: calls the device's functions, prints the answer, returns the exit code.

Not here: flags and help (`cli.py`), how flags and the config file make an agent (`join.py`), the work itself. May import
every module of the device; what only one command needs is imported inside it, so that the others start without it.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_runtime import local
from edge_runtime.budget import keeping_free, memory_budget
from edge_runtime.conditions import kept_free_bytes, parse_conditions, readings_in_words
from edge_runtime.console import Bar, note, print_json, printable, table
from edge_runtime.engine import EngineOptions
from edge_runtime.errors import DoesNotFit, EdgeError, UsageError
from edge_runtime.gate import Gate
from edge_runtime.planner import mib
from edge_runtime.records import DeviceProfile, TrainSettings
from edge_runtime.sensors import Sensors

if TYPE_CHECKING:
    from edge_runtime.data import Example
    from edge_runtime.export import Int8Check
    from edge_runtime.predict import Predictor

SAMPLES = (
    "How far is it from Denver to Aspen ?",
    "What is the name of the river that runs through the old town, and why was it once feared by the people who lived there ?",
    "Hello.",
    "The library parses configuration files and reports errors with line and column numbers.",
)
PREDICT_TEXTS = 256  # read before they are classified together


def run_profile(args: Namespace) -> int:
    """Measure this machine and print what bounds training on it."""
    sensors = Sensors()
    now = sensors.settled()  # before our own probe
    found = local.Device.measure().profile
    if args.json:
        print_json(dataclasses.asdict(found) | {"conditions": dataclasses.asdict(now)})
    else:
        _print_fields(18, [*_profile_fields(found), ("for --when", readings_in_words(now))])
    return 0


def _profile_fields(found: DeviceProfile) -> list[tuple[str, str]]:
    unknown = "not known here"
    limit = mib(found.cgroup_limit_bytes) if found.cgroup_limit_bytes else "none"
    if found.cgroup_available_bytes is not None:
        limit += f", {mib(found.cgroup_available_bytes)} of it left"
    battery = "none"
    if found.battery_percent is not None:
        battery = f"{found.battery_percent:.0f} %{' charging' if found.plugged_in else ''}"
    return [
        ("memory", f"{mib(found.ram_total_bytes)} in all, {mib(found.ram_available_bytes)} available"),
        ("cgroup limit", limit),
        ("for training", f"{mib(memory_budget('auto', found))} (--memory auto)"),
        ("cores", str(found.cores)),
        ("matrix products", f"{found.gflops:.1f} GFLOP/s, float32"),
        ("memory bandwidth", f"{found.memory_gb_per_s:.1f} GB/s"),
        ("temperature", f"{found.temperature_c:.0f} C" if found.temperature_c is not None else unknown),
        ("battery", battery),
    ]


def run_plan(args: Namespace) -> int:
    """Print every candidate with its predicted cost, what fits, and the choice; that nothing fits is an exit code."""
    if args.method:
        return _run_plan_of_methods(args)
    planned, _ = _plan(args, _settings(args))
    if args.json:
        print_json(_plan_record(planned))
    else:
        _print_plan(planned)
    return 0 if planned.chosen else DoesNotFit.exit_code


def _run_plan_of_methods(args: Namespace) -> int:
    """Print what this device would train under one method of a fleet, or under each."""
    from edge_runtime.method_plans import method_plans, names_of, shown

    if args.adapter:
        raise UsageError("a fleet begins with its own adapters: leave --adapter away, or --method")
    plans, planned = method_plans(names_of(args.method), _settings(args), lambda settings: _plan(args, settings)[0])
    if args.json:
        print_json({"plans": [plan.record() for plan in plans], **_limits_record(planned)})
    else:
        _print_limits(planned)
        print("\n" + shown(plans, planned.source.spec.num_blocks))
        print("\npredicted, not measured; alone in the fleet, with what its fleet.toml says unless it is changed")
    return 0 if any(plan.row for plan in plans) else DoesNotFit.exit_code


def _settings(args: Namespace) -> TrainSettings:
    """How to train, by the flags."""
    return TrainSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        head_learning_rate=args.head_learning_rate,
        weight_decay=args.weight_decay,
        optimizer=args.optimizer,
        seed=args.seed,
        lora_rank=args.lora_rank,
        adapter_learning_rate=args.adapter_learning_rate,
        lora_alpha=args.lora_alpha,
        lora_targets=args.lora_targets,
        mask_every=args.mask_every,
        mask_seed=args.mask_seed,
    )


def _plan(args: Namespace, settings: TrainSettings) -> tuple[local.Planned, local.Device]:
    """The plan for the flags that `plan` and `train` share, and the device it is for."""
    device = local.Device.measure(args.threads, speed=False)
    free_bytes = kept_free_bytes(parse_conditions(getattr(args, "when", "")))
    device = dataclasses.replace(device, profile=keeping_free(device.profile, free_bytes))
    bad_rows = "skip" if args.skip_bad_rows else "error"
    planned = local.plan(
        args.model,
        args.data,
        memory=args.memory,
        time=args.time,
        upload=args.upload,
        settings=settings,
        device=device,
        max_length=args.max_length,
        family=args.family,
        new_head=args.new_head,
        options=local.DataOptions(args.text_column, args.label_column, args.encoding, bad_rows),
        engine=EngineOptions(args.backend, args.precision, not args.no_prefix_cache),
        holdout=args.holdout,
        test=args.test,
        adapter=args.adapter,
        depth=getattr(args, "depth", None),
        progress=note,
    )
    if full := planned.prepared.full:
        longest = planned.source.spec.max_length
        note(
            f"{full} of {planned.prepared.data.num_examples} texts fill {longest} tokens; what they have beyond is cut off"
        )
    if planned.prepared.skipped:
        note(f"skipped {planned.prepared.skipped} bad rows; {'; '.join(planned.prepared.first_skipped[:3])}")
    return planned, device


def _plan_record(planned: local.Planned) -> dict[str, Any]:
    return {
        "rows": [
            dataclasses.asdict(row) | {"fits": not why, "why_not": why}
            for row, why in zip(planned.rows, planned.why_not, strict=True)
        ],
        "chosen": dataclasses.asdict(planned.chosen) if planned.chosen else None,
        "refusal": planned.refusal,
        **_limits_record(planned),
    }


def _limits_record(planned: local.Planned) -> dict[str, Any]:
    return {"budget": dataclasses.asdict(planned.budget), "data": dataclasses.asdict(planned.prepared.data)}


def _print_limits(planned: local.Planned) -> None:
    data, budget = planned.prepared.data, planned.budget
    print(
        f"{data.num_examples} examples, {data.mean_length:.1f} tokens on average, {data.longest} at most, "
        f"{len(planned.prepared.labels)} labels"
    )
    print(
        f"budgets: memory {mib(budget.memory_bytes)}, time {f'{budget.time_s:.0f} s' if budget.time_s else 'any'}, "
        f"upload {mib(budget.upload_bytes) if budget.upload_bytes else 'any'}"
    )


def _print_plan(planned: local.Planned) -> None:
    _print_limits(planned)
    row = planned.rows[-1]
    print(
        f"backend {row.backend}"
        + (f", LoRA adapters of rank {row.rank}" if row.rank else "")
        + (", sparse: " + _masked(planned) + "the blocks" if _masked(planned) else "")
        + (f", frozen blocks in {row.precision}" if row.precision != "float32" else "")
        + (", frozen blocks' outputs cached after the first epoch" if planned.rows[0].cached else "")
        + "\n"
    )
    header = ("blocks", "checkpointing", "micro-batch", "peak memory", "step", "epoch", "upload", "")
    print(table(header, _plan_cells(planned)))
    print("\npredicted, not measured: `edge-runtime train` reports both")
    if planned.refusal:
        note(planned.refusal)


def _plan_cells(planned: local.Planned) -> list[list[str]]:
    best = planned.chosen.chosen if planned.chosen else None
    chosen = "<- chosen: the deepest that fits, and the fastest of these"
    return [
        [
            "head" if row.depth == 0 else f"{row.depth} of {planned.source.spec.num_blocks}",
            "yes" if row.checkpointing else "no",
            str(row.micro_batch),
            mib(row.peak_bytes),
            f"{row.step_s:.3f} s",
            f"{row.epoch_s:.1f} s",
            mib(row.upload_bytes),
            why_not or (chosen if row == best else "fits"),
        ]
        for row, why_not in zip(planned.rows, planned.why_not, strict=True)
    ]


def run_train(args: Namespace) -> int:
    """Plan, finetune in a worker process within the budget, save the model, and print what was promised and measured."""
    local.check_outputs(args.out, args.adapter_out, delta=args.delta)
    gate = Gate(parse_conditions(args.when)) if args.when else None
    if gate:
        gate.wait(note)
    planned, device = _plan(args, _settings(args))
    how = {"delta": args.delta, "adapter_out": args.adapter_out, "gate": gate, "note": note}
    trained = local.train(planned, args.out, device=device, depth=args.depth, **how, progress=Bar("training"))
    if args.json:
        print_json(
            dataclasses.asdict(trained.report)
            | {
                "folder": str(trained.folder),
                "limit_bytes": planned.budget.memory_bytes,
                "enforced_by": trained.enforced_by,
            }
        )
    else:
        _print_fields(14, _trained_fields(planned, trained))
    return 0


def _trained_fields(planned: local.Planned, trained: local.Trained) -> list[tuple[str, str]]:
    report = trained.report
    what = "the head"
    if report.rank:
        what = f"adapters of rank {report.rank} in the last {report.depth} of {planned.source.spec.num_blocks} blocks, and the head"
    elif report.depth:
        what = f"{_masked(planned)}the last {report.depth} of {planned.source.spec.num_blocks} blocks and the head"
    if report.checkpointing:
        what += ", with gradient checkpointing"
    what += f", micro-batch {report.micro_batch}, {report.steps} steps"
    if report.backed_off:
        what += f" (memory got short: {report.backed_off} times it went on in smaller pieces)"
    accuracy = "not measured: nothing was held out"
    if report.accuracy is not None:
        accuracy = f"{100 * report.accuracy:.1f} % of the held-out examples"
    return [
        ("backend", report.backend),
        ("trained", what),
        (
            "peak memory",
            f"{mib(report.peak_bytes)} measured (VmHWM), {mib(report.promised_peak_bytes)} promised, "
            f"limit {mib(planned.budget.memory_bytes)} kept by {trained.enforced_by}",
        ),
        (
            "time",
            f"{report.train_s:.1f} s measured, {report.promised_s:.1f} s promised; "
            f"{report.total_s:.1f} s with start and end"
            + (f", {report.paused_s:.1f} s paused" if report.paused_s else ""),
        ),
        ("loss", f"{report.first_loss:.3f} -> {report.last_loss:.3f}"),
        ("accuracy", accuracy),
        ("model", str(trained.folder)),
    ]


def _masked(planned: local.Planned) -> str:
    """How much of the blocks is trained, before their name; empty for all of them."""
    every = planned.chosen.settings.mask_every if planned.chosen else 0
    return f"one of {every} entries of the matrices in " if every else ""


def _print_fields(width: int, fields: Sequence[tuple[str, str]]) -> None:
    for name, value in fields:
        print(f"{name:{width}}{value}")


def run_prune(args: Namespace) -> int:
    """Write a model without the heads and channels of the smallest weights, and print what is left."""
    from edge_runtime.local_prune import prune

    found = prune(args.model, args.sparsity, args.out, family=args.family, progress=note)
    if args.json:
        print_json(dataclasses.asdict(found) | {"folder": str(found.folder)})
        return 0
    fields = [("gone", f"{100 * found.sparsity:.1f} % of the values of the blocks' matrices")]
    for number, what in enumerate(("heads", "channels")):
        of, left = ([widths[number] for widths in by_block] for by_block in (found.widths_before, found.widths))
        fields.append((what, f"{sum(left)} of {sum(of)} are left: {' '.join(map(str, left))}, block by block"))
    fields.append(("parameters", f"{found.parameters_before / 1e6:.1f} M -> {found.parameters / 1e6:.1f} M"))
    _print_fields(14, [*fields, ("model", str(found.folder))])
    return 0


def run_export(args: Namespace) -> int:
    """Write a model as one ONNX file; print how far it is from the model and, for int8, what that costs."""
    from edge_runtime.export import INT8, check_file, export_onnx
    from edge_runtime.merging import open_with_adapter

    check_file(args.out)
    rows = _read_rows(args.data, args, bad_rows="skip") if args.data else ()
    samples: Sequence[str] = [row.text for row in rows] or SAMPLES
    examples = [(row.text, row.label) for row in rows]
    with open_with_adapter(args.model, args.adapter, args.family, note) as source:
        tokenizer = source.tokenizer.read_bytes()
        report = export_onnx(
            source.spec,
            source.weights,
            tokenizer,
            args.out,
            samples=samples,
            metadata=source.metadata,
            graphs=source.graphs,
            precision=args.precision,
            examples=examples,
            progress=note,
        )
    if args.json:
        print_json(dataclasses.asdict(report) | {"path": str(report.path)})
        return 0
    print(
        f"{report.path}: {report.precision}, {mib(report.num_bytes)}, float32 logits within {report.max_abs_diff:.1e} of "
        f"{report.compared_with} on {report.num_samples} texts, {report.seconds:.1f} s"
    )
    if report.int8:
        refused = "" if report.precision == INT8 else ": int8 loses too much, the file is float32"
        print(f"int8 beside float32: {_int8_cost(report.int8)}{refused}")
    return 0


def _int8_cost(found: Int8Check) -> str:
    same = f"{100 * found.agreement:.1f} % of {found.num_examples} texts get the same label"
    if found.accuracy_int8 is None or found.accuracy_float32 is None:
        return f"{same} (no labelled examples: name some with --data)"
    return f"accuracy {100 * found.accuracy_int8:.2f} % instead of {100 * found.accuracy_float32:.2f} %, {same}"


def run_predict(args: Namespace) -> int:
    """Classify texts from the flags, a file or standard input; with --evaluate print the accuracy on a file instead."""
    from edge_runtime.data import iter_texts
    from edge_runtime.predict import Predictor

    given = [
        name for name, value in (("texts", args.text), ("--file", args.file), ("--evaluate", args.evaluate)) if value
    ]
    if len(given) > 1:
        raise UsageError(
            f"predict takes texts, --file or --evaluate, not {' and '.join(given)} together: leave out one"
        )
    predictor = Predictor(
        args.model, args.threads, family=args.family, adapter=args.adapter, long=args.long, progress=note
    )
    if predictor.metadata.get("model_version") == "1":
        note("this is the fleet's model 1, from before the first round")
    if args.evaluate:
        _print_accuracy(predictor, args)
        _warn_of_long(predictor, args.long)
        return 0
    file = None if args.file == Path("-") else args.file
    texts = iter(args.text) if args.text else iter_texts(file or sys.stdin.buffer, args.encoding)
    typed = not args.text and not file and sys.stdin.isatty()  # then each line has its answer at once
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if typed or len(batch) == PREDICT_TEXTS:
            _print_predictions(predictor, batch, args)
            batch = []
            _refresh(predictor)
    _print_predictions(predictor, batch, args)
    _warn_of_long(predictor, args.long)
    return 0


def _warn_of_long(predictor: Predictor, long: str) -> None:
    if predictor.num_truncated:
        what = "" if long == "window" else ": --long window reads on, and averages"
        read = f"{predictor.max_length} tokens" if long != "window" else "was read of them"
        note(f"texts that have more than {read}, of which the rest did not count: {predictor.num_truncated}{what}")


def _refresh(predictor: Predictor) -> None:
    """Go on with the agent's newest model; what is wrong with it is no reason to stop."""
    try:
        if predictor.refresh():
            note(f"going on with model {predictor.metadata.get('model_version')}")
    except EdgeError as error:
        note(f"going on with model {predictor.metadata.get('model_version')}, the newest cannot be used: {error}")


def _print_accuracy(predictor: Predictor, args: Namespace) -> None:
    from edge_runtime.predict import evaluate

    rows = _read_rows(args.evaluate, args, "skip" if args.skip_bad_rows else "error")
    accuracy = evaluate(predictor, ((row.text, row.label) for row in rows))
    if args.json:
        print_json({"accuracy": accuracy, "num_examples": len(rows)})
    else:
        print(f"accuracy {100 * accuracy:.2f} % of {len(rows)}")


def _print_predictions(predictor: Predictor, texts: Sequence[str], args: Namespace) -> None:
    for text, found in zip(texts, predictor.predict(texts), strict=True):
        best = sorted(found.probabilities.items(), key=lambda item: -item[1])
        if args.json:
            record = {"text": text, "label": found.label, "probability": found.probability}
            record |= {"probabilities": dict(best), "model_version": found.model_version}
            print_json(record | {"truncated": found.truncated, "windows": found.windows})
        else:
            shown = ", ".join(f"{label} {100 * p:.1f} %" for label, p in best[: args.top])
            print(printable(f"{shown}\t{text if len(text) <= 100 else text[:97] + '...'}"))
    sys.stdout.flush()


def _read_rows(path: Path, args: Namespace, bad_rows: Literal["error", "skip"] = "error") -> tuple[Example, ...]:
    from edge_runtime.data import read_examples

    columns = {"text_column": args.text_column, "label_column": args.label_column}
    return read_examples(path, **columns, encoding=args.encoding, bad_rows=bad_rows).rows


def run_join(args: Namespace) -> int:
    """Take part in a fleet until told to stop."""
    from edge_runtime.join import join  # agent and transport: one command needs them

    join(args)
    return 0


def run_serve(args: Namespace) -> int:
    """Answer over HTTP until told to stop."""
    from edge_runtime.serving.serve import serve  # asyncio and the server: one command needs them

    return serve(args)


def run_ask(args: Namespace) -> int:
    """Have texts classified by a device of the fleet."""
    from edge_runtime.serving.ask import ask

    return ask(args)


def run_models_list(args: Namespace) -> int:
    """Print the versions that a device holds."""
    from edge_runtime.version_commands import list_versions

    return list_versions(args)


def run_models_use(args: Namespace) -> int:
    """Pin a version, or follow the newest again."""
    from edge_runtime.version_commands import use_version

    return use_version(args)


def run_models_rollback(args: Namespace) -> int:
    """Pin the version before the one that answers."""
    from edge_runtime.version_commands import roll_back

    return roll_back(args)
