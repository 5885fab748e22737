"""`tools/bench codecs`: accuracy on TREC against the bytes of an update, for every codec and for suffix depths 1 and 2.

A fleet without its network: some devices with random shares of TREC's questions train each round from the newest model with the
graph backend, write their updates as the training process does (rounding, error feedback, zlib), and the coordinator's own
sums make the next model. Every codec of a depth begins from the same model with the same batches; the trainings of the first
round, which are the same for all, are done once. Imports `bench_common`, `bench_training`'s corpus, both sides of ours; no torch.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edge_coordinator.aggregate import Update, apply, check_update, fold, mean_changes
from edge_models import hub
from edge_runtime.codecs import CODECS, PACKED, update_bytes
from edge_runtime.console import note, run_main
from edge_runtime.encoding import pack_file, write_update
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.graphs.bundle import GraphSet
from edge_runtime.graphs.find import find_graphs, read_graphs
from edge_runtime.layout import sent
from edge_runtime.model import ModelSpec
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.residual import Residual, error_feedback
from edge_runtime.source import find_checkpoint, open_source
from edge_runtime.store import BlobStore
from edge_runtime.training.corpus import Corpus
from edge_runtime.training.graph_backend import GraphBackend
from edge_runtime.training.loop import Progress, accuracy, run, steps_per_epoch
from edge_runtime.training.prefix_cache import PrefixCache, prefix_key
from edge_runtime.training.train_job import PACKED_PAYS
from edge_runtime.weights import MappedTensor
from tools import bench_common as bench
from tools import datasets
from tools.bench_training import TREC_LENGTH, tokenised

DEPTHS = (1, 2)
BATCH = 16
LORA_RANK = 8  # of the adapters, in all blocks and float32, that updates are compared with
QUICK = (96, 64)  # training and test examples
LINE = "0" * 64
CACHE_BYTES = 4 << 30
COLUMNS = {
    "name": "codec",
    "bytes_up": "bytes of an update",
    "smaller": "smaller than f32",
    "lora_share": f"of LoRA r {LORA_RANK}",
    "accuracy": "TREC accuracy",
    "gained": "points beside f32",
}


def main() -> int:
    """Parse and run; -> the exit code."""
    args = parser().parse_args()
    return run_main(lambda: measure(args))


def parser() -> argparse.ArgumentParser:
    """The bench's options."""
    what = "Accuracy on TREC against the bytes of an update, for every codec and for suffix depths 1 and 2."
    made = bench.bench_parser(
        "codecs", what, "", "--rows '2 in f32,2 in topk10' --rounds 3", "--out docs/results --json codecs.json"
    )
    made.add_argument("--devices", type=bench.whole, default=2, help="that share the questions (%(default)s)")
    made.add_argument("--rounds", type=bench.whole, default=5, help="of one epoch each (%(default)s)")
    made.add_argument(
        "--seeds", type=bench.whole, default=1, help="runs, from --seed on; the mean counts (%(default)s)"
    )
    made.add_argument("--model", default="minilm-l6", help="alias, folder or Hugging Face id (%(default)s)")
    return made


def name_of(depth: int, codec: str) -> str:
    """A row's name."""
    return f"last {depth} in {codec}"


def measure(args: argparse.Namespace) -> int:
    """All rows, float32 of a depth first."""
    names = bench.chosen_names([name_of(depth, codec) for depth in DEPTHS for codec in CODECS], args.rows)
    if args.list:
        print("\n".join(names))
        return 0
    if args.quick:
        args.rounds, args.seeds = min(args.rounds, 2), 1
    machine = bench.machine()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with bench.scratch() as scratch:
        for seed in range(args.seed, args.seed + args.seeds):
            fleet = Fleet(args, seed, scratch / str(seed))
            for depth in DEPTHS:
                for codec in CODECS:
                    if (name := name_of(depth, codec)) in runs:
                        runs[name].append(fleet.train(depth, codec))
                        note(f"{name}, seed {seed}: " + described(runs[name][-1]))
            spec = fleet.spec
            shutil.rmtree(scratch / str(seed))
    lora = update_bytes(sent(spec, spec.num_blocks, (LORA_RANK,) * spec.num_blocks, TrainSettings(), "ab"), "f32")
    rows = [row(name, runs[name], runs.get(name_of(depth, "f32"), []), spec, depth, lora)
            for depth in DEPTHS for name in names if name.startswith(f"last {depth} ")]  # fmt: skip
    bench.finish(
        "codecs",
        args,
        rows,
        title=f"Codecs: {args.model} on TREC, {args.devices} devices, {args.rounds} rounds of an epoch each",
        columns=COLUMNS,
        notes=notes(args, lora),
        versions=bench.versions(None),
        machine=machine,
        python=None,
        figures={"lora_bytes": lora},
    )
    return 0


def described(found: Mapping[str, Any]) -> str:
    """A run for people."""
    return f"{bench.shown('bytes_up', found['bytes_up'])} an update, accuracy {100 * found['accuracy']:.2f} %, {found['wall_s']:.0f} s"


def row(
    name: str,
    runs: Sequence[Mapping[str, Any]],
    whole: Sequence[Mapping[str, Any]],
    spec: ModelSpec,
    depth: int,
    lora: int,
) -> bench.Row:
    """One codec: means over the seeds; `whole` are the runs of float32."""
    right = float(np.mean([found["accuracy"] for found in runs]))
    sent = int(np.mean([found["bytes_up"] for found in runs]))
    gained = 100 * (right - float(np.mean([found["accuracy"] for found in whole]))) if whole else None
    return bench.make_row(
        name,
        bytes_up=sent,
        accuracy=right,
        wall_s=float(np.mean([found["wall_s"] for found in runs])),
        smaller=f"{update_bytes(spec.suffix(depth), 'f32') / sent:.1f} x",
        lora_share=sent / lora,
        gained=None if gained is None else f"{gained:+.2f}",
        runs=[dict(found) for found in runs],
    )


class Fleet:
    """Devices with their shares of the data, and the model that they begin from."""

    def __init__(self, args: argparse.Namespace, seed: int, scratch: Path) -> None:
        self.args, self.seed, self.scratch = args, seed, scratch
        scratch.mkdir(parents=True)
        data = datasets.load("trec", note)
        train, test = (data.train[: QUICK[0]], data.test[: QUICK[1]]) if args.quick else (data.train, data.test)
        labels = sorted({example.label for example in [*train, *test]})
        random.Random(seed).shuffle(train)
        folder = hub.resolve(args.model, note)
        source = open_source(
            find_checkpoint(str(folder), max_length=TREC_LENGTH, new_head=True, progress=note), labels, scratch
        )
        self.spec = source.spec
        graphs = find_graphs(source.spec, source.weights, scratch, progress=note)
        if graphs is None:
            raise UsageError(f"{args.model} has no training graphs: choose another --model")
        self.graphs: GraphSet = read_graphs(graphs)
        self.store = BlobStore(scratch / "store")
        self.first = {t.name: self.store.put(source.weights[t.name].array().tobytes()) for t in source.spec.tensors}
        shares = [train[number :: args.devices] for number in range(args.devices)]
        self.corpora = [
            Corpus(tokenised(share, labels, folder, TREC_LENGTH, scratch / f"data-{number}"))
            for number, share in enumerate(shares)
        ]
        self.test = Corpus(tokenised(test, labels, folder, TREC_LENGTH, scratch / "data-test"))

    def train(self, depth: int, codec: str) -> dict[str, Any]:
        """All rounds in one codec; -> what the updates weighed, and how good the model is."""
        begun, model, sent = time.perf_counter(), dict(self.first), []
        place = self.scratch / f"{depth}-{codec}"
        for round_ in range(1, self.args.rounds + 1):
            updates = [self.update(depth, codec, model, round_, number, place) for number in range(self.args.devices)]
            sent += [update.path.stat().st_size for update in updates]
            partial = fold(self.spec.tensors, None, updates, place / "sum")
            paths = {name: self.store.path(blob) for name, blob in model.items()}
            model |= apply(mean_changes(self.spec.tensors, partial), paths, self.store)
        backend = GraphBackend(self.spec, self.mapped(model), self.plan(depth, codec, 0, 0), self.graphs,
                               self.args.threads, self.scratch)  # fmt: skip
        right = accuracy(backend, self.test, BATCH)
        shutil.rmtree(place)
        return {
            "accuracy": right,
            "bytes_up": int(np.mean(sent)),
            "wall_s": time.perf_counter() - begun,
            "seed": self.seed,
        }

    def update(
        self, depth: int, codec: str, model: Mapping[str, bytes], round_: int, number: int, place: Path
    ) -> Update:
        """One device's update of a round."""
        place.mkdir(exist_ok=True)
        plan = self.plan(depth, codec, round_, number)
        sizes = {t.name: t.size for t in self.spec.suffix(depth)}
        raw = (self.scratch if round_ == 1 else place) / f"depth-{depth}-device-{number}.f32"
        if round_ > 1 or not raw.exists():
            with raw.open("wb") as file:
                file.writelines(piece.tobytes() for _, piece in self.trained(plan, model, number))
        residual = Residual(place / f"residual-{number}")
        path = place / f"update-{number}"
        deltas = pieces(raw, sizes)
        with path.open("wb") as file:
            if CODECS[codec].sparse:
                with error_feedback(residual.kept, residual.draft, LINE, round_, sizes) as feedback:
                    write_update(file, codec, sizes, deltas, plan.settings.seed, feedback)
                residual.stage()
                residual.settle(committed=True)
            else:
                write_update(file, codec, sizes, deltas, plan.settings.seed)
        name, packed = codec, path.with_suffix(".zlib")
        if codec != "f32":
            with packed.open("wb") as file:
                pays = pack_file(path, file) <= PACKED_PAYS * path.stat().st_size
            if pays:
                path, name = packed, codec + PACKED
        update = Update(str(number), path, len(self.corpora[number]), self.spec.suffix(depth), name)
        if reason := check_update(update):
            raise EdgeError(f"the coordinator would refuse this update: {reason}")
        return update

    def trained(self, plan: Plan, model: Mapping[str, bytes], number: int) -> Iterator[tuple[str, Any]]:
        """The deltas of one epoch on a device's data."""
        corpus, weights = self.corpora[number], self.mapped(model)
        key = prefix_key(self.spec, weights, plan.chosen.depth, corpus.folder.name, "float32", model)
        backend = GraphBackend(self.spec, weights, plan, self.graphs, self.args.threads, self.scratch)
        cache = PrefixCache.open(self.scratch, key, corpus, self.spec.hidden, CACHE_BYTES)
        if cache is None:
            run(backend, corpus, plan, Progress(), lambda step, loss: None)
        else:
            with closing(cache):
                run(backend, corpus, plan, Progress(), lambda step, loss: None, cache)
        yield from backend.deltas()

    def plan(self, depth: int, codec: str, round_: int, number: int) -> Plan:
        """One epoch; what it costs is of no interest here."""
        seed = self.seed * 1_000_000 + round_ * 1000 + number
        settings = TrainSettings(epochs=1, batch_size=BATCH, seed=seed, codec=codec)
        chosen = CostRow(depth, False, BATCH, 0, 0.0, 0.0, 0, backend="onnx", codec=codec)
        return Plan(chosen, settings, steps_per_epoch(len(self.corpora[number]), BATCH))

    def mapped(self, model: Mapping[str, bytes]) -> dict[str, MappedTensor]:
        """Where a model's tensors lie."""
        return {t.name: MappedTensor(str(self.store.path(model[t.name])), 0, t.shape) for t in self.spec.tensors}


def pieces(raw: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
    """A float32 update's tensors."""
    with raw.open("rb") as file:
        for name, size in sizes.items():
            yield name, np.frombuffer(file.read(4 * size), "<f4")


def notes(args: argparse.Namespace, lora: int) -> list[str]:
    """What one must know to read the table."""
    return [
        f"Bytes of an update: the mean over devices and rounds, after zlib where it saves {100 * (1 - PACKED_PAYS):.0f} % or more.",
        f"LoRA r {LORA_RANK} on all linear layers of all blocks with the head, float32: {lora:,} bytes.",
        f"Accuracy after {args.rounds} rounds on TREC's test questions, 45 classes, at most {TREC_LENGTH} tokens; the mean of "
        f"{args.seeds} seed(s) from {args.seed} on. Points beside f32 of the same depth, same batches.",
        "topk codecs with error feedback on each device. AdamW, learning rate 2e-4, of the head 2e-3.",
    ]


if __name__ == "__main__":
    sys.exit(main())
