"""`tools/bench gains`: what equal steps of training a suffix give, by its depth and by what of it is trained.

The figures that the method `auto` chooses by (`coordinator/edge_coordinator/methods/auto.py`). One training after the other in this
process, no fleet: the blocks of a suffix in full, adapters of them, or masked entries, each from the same checkpoint with the
same batches. Imports `bench_common`, `bench_training`'s corpus and the device's training; no torch.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_models import hub
from edge_runtime.codecs import update_bytes
from edge_runtime.console import note, run_main
from edge_runtime.errors import UsageError
from edge_runtime.graphs.find import find_graphs, read_graphs
from edge_runtime.layout import layout
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.source import find_checkpoint, open_source
from edge_runtime.training.corpus import Corpus
from edge_runtime.training.graph_backend import GraphBackend
from edge_runtime.training.loop import Progress, accuracy, run, steps_per_epoch
from tools import bench_common as bench
from tools import datasets
from tools.bench_training import TREC_LENGTH, tokenised

BATCH = 16
RANK = 8
EVERY = 10
KINDS = ("full", "adapters", "sparse")
RATES = {"full": (1.0, 2.5), "adapters": (0.5, 1.0), "sparse": (1.0, 2.5, 5.0)}  # times the usual learning rate
QUICK = (96, 64)  # training and test examples
COLUMNS = {
    "name": "what is trained",
    "bytes_up": "bytes of an update",
    "accuracy": "TREC accuracy",
    "spread": "+- over seeds",
    "gained": "points above the head alone",
}


@dataclass(frozen=True)
class Candidate:
    """What is trained: `kind` of the last `depth` blocks, at `rate` times the usual learning rate."""

    kind: str
    depth: int
    rate: float

    def plan(self, seed: int, num_examples: int) -> Plan:
        """One epoch; what it costs is of no interest here."""
        usual, how = TrainSettings(batch_size=BATCH, seed=seed), {}
        if self.kind == "adapters" and self.depth:
            how = {"lora_rank": RANK, "adapter_learning_rate": self.rate * usual.adapter_learning_rate}
        elif self.depth:
            how = {"learning_rate": self.rate * usual.learning_rate}
            how |= {"mask_every": EVERY, "mask_seed": seed} if self.kind == "sparse" else {}
        settings = TrainSettings(batch_size=BATCH, seed=seed, **how)  # type: ignore[arg-type]
        row = CostRow(self.depth, False, BATCH, 0, 0.0, 0.0, 0, backend="onnx", rank=settings.lora_rank)
        return Plan(row, settings, steps_per_epoch(num_examples, BATCH), adapters="ab" if row.rank else "")

    def name(self, num_blocks: int) -> str:
        """For people."""
        return f"{self.kind} {self.depth} of {num_blocks} at rate x {self.rate:g}" if self.depth else "head"


def main() -> int:
    """Parse and run; -> the exit code."""
    args = parser().parse_args()
    return run_main(lambda: measure(args))


def parser() -> argparse.ArgumentParser:
    """The bench's options."""
    what = "Accuracy on TREC after equal steps, by the depth of the suffix and by what of it is trained."
    made = bench.bench_parser("gains", what, "--seeds 3 --out docs/results", "--rows 'head,2 of 3' --steps 60")
    made.add_argument("--steps", type=bench.whole, default=120, help=f"of {BATCH} examples each (%(default)s)")
    made.add_argument("--seeds", type=bench.whole, default=1, help="runs, from --seed on (%(default)s)")
    made.add_argument("--model", default="minilm-l3", help="alias, folder or Hugging Face id (%(default)s)")
    return made


def candidates(num_blocks: int) -> Iterator[Candidate]:
    """The head alone, then every kind, depth and rate."""
    yield Candidate("full", 0, 1.0)
    for kind in KINDS:
        for depth in range(1, num_blocks + 1):
            for rate in RATES[kind]:
                yield Candidate(kind, depth, rate)


def measure(args: argparse.Namespace) -> int:
    """All rows."""
    machine = bench.machine()
    with bench.scratch() as scratch:
        model = Model(args, scratch)
        all_of = {one.name(model.spec.num_blocks): one for one in candidates(model.spec.num_blocks)}
        names = bench.chosen_names(list(all_of), args.rows)
        if args.list:
            print("\n".join(names))
            return 0
        seeds = range(args.seed, args.seed + (1 if args.quick else args.seeds))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for seed in seeds:
            model.shuffle(seed)
            for name in names:
                runs[name].append(model.train(all_of[name], seed))
                note(f"{name}, seed {seed}: {100 * runs[name][-1]['accuracy']:.2f} %, {runs[name][-1]['wall_s']:.0f} s")
    head = mean(runs["head"]) if "head" in runs else None
    rows = [row(name, found, head) for name, found in runs.items()]
    title = f"Gains: {args.model} on TREC after {args.steps} steps of {BATCH} questions"
    bench.finish("gains", args, rows, title=title, columns=COLUMNS, notes=notes(args), versions=bench.versions(None),
                 machine=machine, python=None)  # fmt: skip
    return 0


class Model:
    """The checkpoint that every training begins from, and the questions."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.data = datasets.load("trec", note)
        self.labels = sorted({example.label for example in [*self.data.train, *self.data.test]})
        self.folder = hub.resolve(args.model, note)
        checkpoint = find_checkpoint(str(self.folder), max_length=TREC_LENGTH, new_head=True, progress=note)
        self.source = open_source(checkpoint, self.labels, scratch)
        self.spec = self.source.spec
        graphs = find_graphs(self.source.spec, self.source.weights, scratch, progress=note)
        if graphs is None:
            raise UsageError(f"{args.model} has no training graphs: choose another --model")
        self.graphs = read_graphs(graphs)
        test = self.data.test[: QUICK[1]] if args.quick else self.data.test
        self.test = self._tokenised(test, "test")

    def shuffle(self, seed: int) -> None:
        """Take the questions of a seed."""
        rows = list(self.data.train)
        random.Random(seed).shuffle(rows)
        self.train_rows = self._tokenised(rows[: QUICK[0] if self.args.quick else BATCH * self.args.steps], f"{seed}")

    def _tokenised(self, rows: list[datasets.Row], name: str) -> Corpus:
        return Corpus(tokenised(rows, self.labels, self.folder, TREC_LENGTH, self.scratch / name))

    def train(self, candidate: Candidate, seed: int) -> dict[str, Any]:
        """One training; -> how good the model is, and what its update would weigh."""
        begun, plan = time.perf_counter(), candidate.plan(seed, len(self.train_rows))
        backend = GraphBackend(self.spec, self.source.weights, plan, self.graphs, self.args.threads, self.scratch)
        run(backend, self.train_rows, plan, Progress(), lambda step, loss: None)
        return {
            "accuracy": accuracy(backend, self.test, BATCH),
            "bytes_up": update_bytes(layout(self.spec, plan), "f32"),
            "wall_s": time.perf_counter() - begun,
            "seed": seed,
        }


def mean(runs: list[dict[str, Any]]) -> float:
    """Accuracy over the seeds."""
    return float(np.mean([found["accuracy"] for found in runs]))


def row(name: str, runs: list[dict[str, Any]], head: float | None) -> bench.Row:
    """One candidate: means over the seeds, and their standard deviation."""
    return bench.make_row(
        name,
        bytes_up=runs[0]["bytes_up"],
        accuracy=mean(runs),
        wall_s=float(np.mean([found["wall_s"] for found in runs])),
        spread=f"{100 * float(np.std([found['accuracy'] for found in runs])):.2f}",
        gained=None if head is None else f"{100 * (mean(runs) - head):+.2f}",
        runs=runs,
    )


def notes(args: argparse.Namespace) -> list[str]:
    """What one must know to read the table."""
    return [
        f"Adapters of rank {RANK} in all layers, sparse: one entry in {EVERY} of each matrix; the head with all of them.",
        f"{BATCH * args.steps} questions once, 45 classes, at most {TREC_LENGTH} tokens; the mean of {args.seeds} seed(s) from "
        f"{args.seed} on. Rates are times 2e-4 for blocks and their entries, 2e-3 for adapters; the head's is 2e-3. AdamW.",
        "Other work ran beside it: its seconds are worth nothing.",
    ]


if __name__ == "__main__":
    sys.exit(main())
