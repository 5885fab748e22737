"""`tools/bench predict`: answers of ours beside torch, transformers' pipeline and plain onnxruntime, on the same texts.

Interleaved: each repeat runs every row once in a fresh process; the lowest time of all repeats counts, since whatever
disturbs a run makes it slower, and the median of the memory. Imports `bench_common`, the data sets, training and export.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_models import hub
from edge_runtime import local
from edge_runtime.console import note, run_main
from edge_runtime.export import INT8, export_onnx
from edge_runtime.records import TrainSettings
from edge_runtime.source import find_checkpoint, open_source
from tools import bench_common as bench
from tools import datasets

MAX_LENGTH = 128
BATCH = 8
QUICK_TEXTS = 40
TIMES = ("cold_s", "one_ms", "eight_ms", "text_ms")


@dataclass(frozen=True)
class Entry:
    """A row: which file answers, and for a peer how."""

    name: str
    model: str  # of what `Models` has
    peer: str = ""


ENTRIES = (
    Entry("ours, int8 file", "int8"),
    Entry("ours, float32 file", "float32"),
    Entry("ours, its folder, mapped weights", "folder"),
    Entry("onnxruntime, int8 file", "int8", "onnxruntime"),
    Entry("onnxruntime, float32 file", "float32", "onnxruntime"),
    Entry("torch", "folder", "torch"),
    Entry("transformers pipeline", "folder", "pipeline"),
)
COLUMNS = {
    "name": "row",
    "cold_s": "first answer, s",
    "one_ms": "1 x 128, ms",
    "eight_ms": "8 x 128, ms",
    "text_ms": "a TREC question, ms",
    "first_anon_bytes": "anonymous then",
    "anon_bytes": "anonymous at the end",
    "rss_bytes": "resident at the end",
    "peak_rss_bytes": "peak RSS",
    "accuracy": "TREC accuracy",
    "detail": "how",
}


def main() -> int:
    """Parse and run; -> the exit code."""
    args = parser().parse_args()
    return run_main(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    """The bench's options."""
    made = bench.bench_parser(
        "predict",
        "Start, memory and latency of answering: ours beside torch, transformers' pipeline and plain onnxruntime.",
        "",
        "--quick --rows ours",
        "--out docs/results --json predict.json",
    )
    add = made.add_argument
    add("--repeats", type=bench.whole, default=5, help="processes of each row, interleaved (%(default)s)")
    add("--latencies", type=bench.whole, default=40, help="measured in each process; the lowest counts (%(default)s)")
    add("--model", help="a folder from `edge-runtime train` on TREC (default: minilm-l6 is trained for an epoch first)")
    return made


def run(args: argparse.Namespace) -> int:
    """All rows."""
    names = bench.chosen_names([entry.name for entry in ENTRIES], args.rows)
    if args.list:
        print("\n".join(names))
        return 0
    if args.quick:
        args.repeats, args.latencies = 1, 4
    entries = [entry for entry in ENTRIES if entry.name in names]
    machine = bench.machine()
    python = bench.peers_environment() if any(entry.peer for entry in entries) else None
    with bench.scratch() as scratch:
        rows = measure(entries, args, scratch, python)
    bench.finish(
        "predict",
        args,
        rows,
        title=f"Answers of {args.model or 'minilm-l6'}: {args.threads} thread(s)",
        columns=COLUMNS,
        notes=notes(args),
        versions=bench.versions(python),
        machine=machine,
        python=None,
    )
    return bench.exit_code(rows)


def measure(entries: Sequence[Entry], args: argparse.Namespace, scratch: Path, python: Path | None) -> list[bench.Row]:
    """Every entry `repeats` times in turn; -> rows in the entries' order."""
    data = datasets.load("trec", note)
    folder = Path(args.model) if args.model else trained(data.train, args, scratch)
    models, kept_float32 = exported(folder, data.test, scratch)
    asked = data.test[:QUICK_TEXTS] if args.quick else data.test
    joined = [" ".join(row.text for row in data.test[i * 20 : i * 20 + 20]) for i in range(BATCH)]  # 200 tokens or more
    job = {
        "folder": str(folder),
        "max_length": MAX_LENGTH,
        "threads": args.threads,
        "repeats": args.latencies,
        "long": joined,
        "texts": [row.text for row in asked],
        "labels": [row.label for row in asked],
    }
    runs: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in entries}
    failed: dict[str, str] = {}
    for repeat in range(args.repeats):
        for entry in entries:
            if entry.name not in failed:
                one(entry, job | {"model": str(models[entry.model])}, args, python, runs, failed, repeat)
    rows = [row_of(entry.name, runs[entry.name], failed.get(entry.name, "")) for entry in entries]
    for row in rows:
        if kept_float32 and "int8" in row["name"]:
            row["detail"] = "int8 lost too much: the file is float32"
    return rows


def one(
    entry: Entry,
    job: Mapping[str, Any],
    args: argparse.Namespace,
    python: Path | None,
    into: Mapping[str, list[dict[str, Any]]],
    failed: dict[str, str],
    repeat: int,
) -> None:
    """One process; a row that fails is told and left out, the others go on."""
    program = [sys.executable, "-m", "tools.bench_answer"]
    if entry.peer:
        program = [str(python), "-m", "tools.bench_peers.answer"]
    command = [*program, json.dumps({**job, "options": {"peer": entry.peer}})]
    ticker = bench.Ticker(entry.name)
    try:
        found = bench.run_fresh(command, bench.child_environment(args.threads), ticker)
    except bench.RowFailed as error:
        failed[entry.name] = f"failed: {error}"
        note(f"{entry.name}: failed: {error}")
        return
    finally:
        ticker.close()
    into[entry.name].append(found)
    note(
        f"{entry.name} ({repeat + 1} of {args.repeats}): first answer {found['cold_s']:.2f} s, 1 x {MAX_LENGTH} "
        f"{found['one_ms']:.1f} ms, {found['rss_bytes'] / bench.MIB:.0f} MiB"
    )


def row_of(name: str, runs: Sequence[Mapping[str, Any]], detail: str) -> bench.Row:
    """The lowest of each time, the median of everything else."""
    row = bench.median_row(name, runs)
    for key in COLUMNS:
        values = [run[key] for run in runs if key in run]
        if values and key not in row:
            row[key] = min(values) if key in TIMES else int(statistics.median(values))
    return {**row, "detail": detail}


def trained(rows: Sequence[datasets.Row], args: argparse.Namespace, scratch: Path) -> Path:
    """MiniLM-L6 after one epoch of its last two blocks over TREC's questions."""
    datasets.write_csv(rows, scratch / "train.csv")
    settings = TrainSettings(epochs=1, seed=args.seed)
    model = str(hub.resolve("minilm-l6", note))
    planned = local.plan(model, scratch / "train.csv", settings=settings, max_length=MAX_LENGTH, new_head=True)
    note("training the model that answers: one epoch")
    local.train(planned, scratch / "model", depth=2)
    return scratch / "model"


def exported(folder: Path, rows: Sequence[datasets.Row], scratch: Path) -> tuple[dict[str, Path], bool]:
    """The models by the names that entries have, and whether int8 was refused."""
    source = open_source(find_checkpoint(str(folder), progress=note), None, scratch)
    models = {"folder": folder, "float32": scratch / "float32.onnx", "int8": scratch / "int8.onnx"}
    examples = [(row.text, row.label) for row in rows]
    for precision in ("float32", INT8):
        report = export_onnx(
            source.spec,
            source.weights,
            source.tokenizer.read_bytes(),
            models[precision],
            samples=[text for text, _ in examples],
            metadata={},
            precision=precision,
            examples=examples,
        )
    return models, report.precision != INT8


def notes(args: argparse.Namespace) -> list[str]:
    """What one must know to read the table."""
    return [
        f"Times: the lowest of {args.repeats} interleaved processes, of {args.latencies} calls in each for 1 x {MAX_LENGTH}, "
        f"of a quarter as many for {BATCH} x {MAX_LENGTH}; tokenizing counts. Memory: the median of the processes.",
        "First answer: from the first line of the program, imports and loading included, the interpreter's own start not.",
        "Long texts are TREC's questions, twenty joined and cut at 128 tokens; the last column but one is one question a call.",
        "onnxruntime: transformers' tokenizer and a session with its own settings, as optimum has it, on the file of ours. "
        "torch: transformers' tokenizer and model. All compute the same network, with the same weights.",
        "Resident memory counts mapped files, the weights of the folder among them; anonymous memory does not.",
    ]


if __name__ == "__main__":
    sys.exit(main())
