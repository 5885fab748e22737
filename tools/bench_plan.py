"""`tools/bench plan`: what the planner promises beside what happens, for random configurations in fresh processes.

Each row plans one candidate with `edge_runtime.local` (its own calibration, as a user has it) and trains a few steps of it
on texts of mixed lengths, under a limit of the promise plus 5 % (a memory cgroup, where one can be made); peak is the
training process's VmHWM. Models: MiniLM-L6 and L3, and random weights of widths 128 and 768.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edge_models import bert, hub
from edge_runtime import local
from edge_runtime.console import note, run_main
from edge_runtime.cost import cost, micro_batches, trained
from edge_runtime.engine import EngineOptions
from edge_runtime.errors import EdgeError, TrainingFailed
from edge_runtime.model_folder import save_folder
from edge_runtime.planner import make_plan, mib
from edge_runtime.records import Budget, TrainSettings
from edge_runtime.weights import MappedTensor
from tools import bench_common as bench
from tools import datasets

CONFIGURATIONS, QUICK = 60, 8
STEPS = 8
RANDOM_SHAPES = {"random d=128": (128, 2, 4), "random d=768": (768, 12, 3)}  # width, heads, blocks
LIMIT = 1.05  # of the promise, in bytes
MASKS = (0, 0, 1, 10, 100)  # where there are no adapters: of so many entries of a matrix one is trained; 0: all
COLUMNS = {
    "name": "configuration",
    "promised_peak_bytes": "promised",
    "peak_rss_bytes": "measured",
    "error_share": "error",
    "promised_s_per_step": "s promised",
    "wall_s_per_step": "s measured",
    "seconds_error_share": "error",
}


def main(arguments: list[str] | None = None) -> int:
    """Run it."""
    what = "Peak memory and seconds a step as the planner promises them, beside what random configurations take."
    parser = bench.bench_parser("plan", what, "", "--quick", "--out docs/results --json plan.json", rows=False)
    parser.add_argument("--lora", action="store_true", help="adapters in every row")
    parser.add_argument("--configurations", type=bench.whole, help=f"how many ({CONFIGURATIONS}, quick {QUICK})")
    args = parser.parse_args(arguments)
    return run_main(lambda: measure(args))


def measure(args: argparse.Namespace) -> int:
    """Measure all configurations and print them."""
    choose, machine = random.Random(args.seed), bench.machine()
    masks = random.Random(f"{args.seed}/mask")  # of its own, so that the other draws are those of benches without masks
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edge-bench-plan.") as folder:
        scratch = Path(folder)
        models = {name: make_model(scratch, name, *shape) for name, shape in RANDOM_SHAPES.items()}
        models |= {alias: str(hub.resolve(alias, note)) for alias in ("minilm-l6", "minilm-l3")}
        texts = sample_texts(choose)
        os.environ["EDGE_CACHE"] = str(scratch / "cache")  # measured anew, and no features of an earlier bench
        count = args.configurations or (QUICK if args.quick else CONFIGURATIONS)
        for _ in range(2 * count):  # a configuration that makes no sense is left out
            if len(rows) == count:
                break
            row = configuration(choose, sorted(models), lora=args.lora)
            row["mask_every"] = 0 if row["lora_rank"] else masks.choice(MASKS)
            try:
                rows.append(row | run_row(row, models[row["model"]], texts, scratch, args.threads, choose))
            except EdgeError as error:
                if not (isinstance(error, TrainingFailed) and (error.out_of_memory or error.killed)):
                    note(f"left out: {row}: {error}")
                    continue
                rows.append(row | {"killed": True, "reason": str(error)})
            last = rows[-1]
            note(f"{len(rows)} of {count}: {last['name']}: " + (last.get("reason") or describe(last)))
    figures = summary(rows)
    bench.finish(
        "plan",
        args,
        rows,
        title=f"The planner's promises beside {len(rows)} random configurations, {args.threads} thread(s)",
        columns=COLUMNS,
        notes=notes(figures),
        versions=bench.versions(None),
        machine=machine,
        python=None,
        figures=figures,
    )
    return 0


def configuration(choose: random.Random, models: list[str], *, lora: bool = False) -> dict[str, Any]:
    """A random candidate, without its depth and micro-batch, which the model bounds."""
    backend = choose.choice(["onnx", "torch"] if lora else ["onnx", "onnx", "onnx", "torch"])
    row = {
        "model": choose.choice(models),
        "backend": backend,
        "batch_size": choose.choice([8, 16]),
        "max_length": choose.choice([32, 64, 128]),
        "optimizer": choose.choice(["adamw", "adamw", "adamw8bit", "sgd"]),
        "lora_rank": choose.choice([2, 8, 32] if lora else [0, 0, 4, 16]),
        "lora_targets": choose.choice(["", "", "q,v", "o,up,down"]),
        "ranks": choose.choice(["", "", "rising"]),  # of the blocks: up to lora_rank towards the output
        "adapters": choose.choice(["ab", "ab", "b"]),
        "precision": choose.choice(["float32", "float32", "int8"]) if backend == "onnx" else "float32",
        "cached": backend == "onnx" and choose.random() < 0.3,
        "share": choose.uniform(0.3, 1) if lora else choose.random(),
        "checkpointing": choose.random() < 0.4,
        "micro": choose.random(),
    }
    return row | {"name": f"{row['model']} {backend}"}


def run_row(
    row: dict[str, Any], model: str, texts: list[tuple[str, str]], scratch: Path, threads: int, choose: random.Random
) -> dict[str, Any]:
    """Plan one candidate, train it under its promise plus 5 %, and give both sides."""
    epochs = 2 if row["cached"] else 1
    settings = TrainSettings(
        epochs=epochs,
        batch_size=row["batch_size"],
        optimizer=row["optimizer"],
        lora_rank=row["lora_rank"],
        lora_targets=tuple(
            name for name in row["lora_targets"].split(",") if name and (row["lora_rank"] or row["mask_every"])
        ),
        mask_every=row["mask_every"],
        seed=1,
    )
    data = scratch / "data.jsonl"
    picked = choose.sample(texts, row["batch_size"] * STEPS)
    data.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in picked))
    device = local.Device.measure(threads, speed=False)
    engine = EngineOptions(row["backend"], row["precision"], row["cached"])
    planned = local.plan(
        model,
        data,
        memory="64GB",
        settings=settings,
        device=device,
        engine=engine,
        max_length=row["max_length"],
        new_head=True,
    )
    blocks = planned.source.spec.num_blocks
    depth = min(blocks, int(row["share"] * (blocks + 1)))
    sizes = micro_batches(row["batch_size"])
    micro = sizes[int(row["micro"] * len(sizes))]
    rank = row["lora_rank"]
    ranks = tuple(max(1, rank * (i + 1) // depth) for i in range(depth)) if rank and row["ranks"] else ()
    what = trained(planned.source.spec, depth, settings, ranks, row["adapters"])
    of_model = (planned.source.spec, planned.prepared.data, settings, planned.calibration)
    chosen = cost(*of_model, what, row["checkpointing"] and depth > 0, micro, row["cached"])
    carried_out = make_plan(chosen, planned.prepared.data, settings)
    if chosen.rank:
        carried_out = dataclasses.replace(carried_out, ranks=ranks, adapters=row["adapters"])
    limited = dataclasses.replace(
        planned,
        rows=(chosen,),
        why_not=("",),
        chosen=carried_out,
        budget=Budget(int(chosen.peak_bytes * LIMIT)),
    )
    report = local.train(limited, scratch / "out", device=device).report
    steps = max(1, report.steps - 1)
    return {
        "depth": depth,
        "micro_batch": chosen.micro_batch,
        "checkpointing": chosen.checkpointing,
        "name": f"{row['model']} {row['backend']} depth {depth} micro {chosen.micro_batch}"
        + (" checkpointed" if chosen.checkpointing else "")
        + (described(row, ranks) if chosen.rank else masked(row) if depth and row["mask_every"] else "")
        + (f" {row['precision']}" if row["precision"] != "float32" else "")
        + (" cached" if row["cached"] else "")
        + f" {row['optimizer']} {row['batch_size']} x {row['max_length']}",
        "promised_peak_bytes": chosen.peak_bytes,
        "peak_rss_bytes": report.peak_bytes,
        "error_share": chosen.peak_bytes / report.peak_bytes - 1,
        "promised_s_per_step": report.promised_s / report.steps,
        "wall_s_per_step": report.train_s / report.steps,
        "seconds_error_share": report.promised_s / report.train_s - 1,
        "cpu_s_per_step": report.cpu_s / report.steps,
        "steps": steps,
        "wall_s": report.total_s,
        "killed": False,
    }


def described(row: dict[str, Any], ranks: tuple[int, ...]) -> str:
    """The adapters of a row."""
    shown = f" rank {'-'.join(map(str, ranks or (row['lora_rank'],)))}"
    return shown + (f" {row['lora_targets']}" if row["lora_targets"] else "") + (" B" if row["adapters"] == "b" else "")


def masked(row: dict[str, Any]) -> str:
    """The mask of a row."""
    return f" one in {row['mask_every']}" + (f" {row['lora_targets']}" if row["lora_targets"] else "")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that count: signed errors are (promised - measured) / measured."""
    done = [row for row in rows if not row["killed"]]
    errors = [row["error_share"] for row in done]
    seconds = [row["seconds_error_share"] for row in done]
    return {
        "n": len(rows),
        "median_abs_error": statistics.median(abs(e) for e in errors) if errors else None,
        "worst_under": -min([0.0, *errors]),
        "worst_over": max([0.0, *errors]),
        "median_abs_seconds_error": statistics.median(abs(e) for e in seconds) if seconds else None,
        "seconds_within_20_percent": sum(abs(e) <= 0.2 for e in seconds) / max(1, len(seconds)),
        "killed": sum(row["killed"] for row in rows),
    }


def describe(row: dict[str, Any]) -> str:
    """One row in words."""
    return (
        f"{mib(row['promised_peak_bytes'])} promised, {mib(row['peak_rss_bytes'])} measured; "
        f"{row['promised_s_per_step']:.3f} s a step promised, {row['wall_s_per_step']:.3f} s measured"
    )


def notes(figures: dict[str, Any]) -> list[str]:
    """What one must know to read the table, and the figures that count."""
    found = [
        "Each row is planned with a calibration of its own model and machine, then trained in a fresh process; peak is VmHWM.",
        f"Each process had a limit of its promise plus 5 %; {figures['killed']} of {figures['n']} were killed.",
        "Seconds are of all steps, the first included.",
    ]
    if figures["median_abs_error"] is None:
        return found
    return [
        f"Peak: median absolute error {100 * figures['median_abs_error']:.1f} %, at worst {100 * figures['worst_under']:.1f} % "
        f"under and {100 * figures['worst_over']:.1f} % over.",
        f"Seconds: median absolute error {100 * figures['median_abs_seconds_error']:.1f} %; "
        f"{100 * figures['seconds_within_20_percent']:.0f} % of the rows within 20 %.",
        *found,
    ]


def sample_texts(choose: random.Random) -> list[tuple[str, str]]:
    """Real questions, joined to texts of many lengths, with their labels."""
    rows = [(row.text, row.label) for row in datasets.load("trec", note).train][:2000]
    return [
        (" ".join([text, *(choose.choice(rows)[0] for _ in range(choose.randint(0, 14)))]), label)
        for text, label in rows
    ]


def make_model(scratch: Path, name: str, width: int, heads: int, blocks: int) -> str:
    """A checkpoint folder with random weights of this shape."""
    base = Path(hub.resolve("minilm-l3", note))
    config: dict[str, int | float | str] = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }
    spec = bert.describe(config, ("a", "b"), 128)
    draw = np.random.default_rng(0)
    raw = scratch / f"{width}.f32"
    weights, offset = {}, 0
    with raw.open("wb") as file:
        for tensor in spec.tensors:
            ones = tensor.name.endswith("LayerNorm.weight")
            array = np.ones(tensor.shape) if ones else 0.02 * draw.standard_normal(tensor.shape)
            file.write(array.astype("<f4").tobytes())
            weights[tensor.name] = MappedTensor(str(raw), offset, tensor.shape)
            offset += tensor.num_bytes
    out = scratch / name.replace(" ", "-").replace("=", "")
    save_folder(out, spec, weights, base / "tokenizer.json")
    return str(out)


if __name__ == "__main__":
    sys.exit(main())
