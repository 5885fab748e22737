"""Derives the training graphs that come with `edge_models` for the common BERT shapes; rarely needed: after the
derivation (`edge_runtime/graphs`) or the network (`edge_models/_bert_torch.py`) has changed.

Graphs depend on no weights, so each is derived from a model of one block with random ones, in a process of its own, and
checked there against torch. The same versions of torch, onnxscript and onnx give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import edge_models
from edge_models import bert
from edge_runtime.graphs.find import derive_job
from edge_runtime.model import ConfigValue, ModelSpec
from edge_runtime.training.process import run_worker
from edge_runtime.weights import MappedTensor

FOLDER = Path(edge_models.__file__).parent / "graphs"
# (hidden, heads, feed_forward, token types): who has it
SHAPES = {
    (384, 12, 1536, 2): "MiniLM of 3, 6 and 12 blocks",
    (128, 2, 512, 2): "BERT tiny",
    (256, 4, 1024, 2): "BERT mini",
    (512, 8, 2048, 2): "BERT small",
    (768, 12, 3072, 2): "BERT base",
    (768, 12, 3072, 0): "DistilBERT",
    (312, 12, 1200, 2): "TinyBERT of 4 blocks",
}


def example(
    hidden: int, heads: int, feed_forward: int, types: int, file: Path
) -> tuple[ModelSpec, dict[str, MappedTensor]]:
    """A model of one block with random weights, which it writes to `file`."""
    config: dict[str, ConfigValue] = {
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
        "vocab_size": 997,
        "max_position_embeddings": 61,
        "type_vocab_size": types,
        "hidden_act": "gelu",
    }
    spec = bert.describe(config, ["no", "yes"], 61)
    random = np.random.default_rng(0)
    weights: dict[str, MappedTensor] = {}
    with file.open("wb") as out:
        for tensor in spec.tensors:
            values = random.normal(1.0 if tensor.name.endswith("LayerNorm.weight") else 0.0, 0.05, tensor.shape)
            weights[tensor.name] = MappedTensor(str(file), out.tell(), tensor.shape)
            out.write(values.astype("<f4").tobytes())
    return spec, weights


def derive(shape: tuple[int, int, int, int], folder: Path) -> Path:
    """One shape's graphs, in a worker; -> the file in `folder`."""
    hidden, heads, feed_forward, types = shape
    out = folder / bert.graphs_name(hidden, heads, feed_forward, types=bool(types))
    with tempfile.TemporaryDirectory() as scratch:
        spec, weights = example(hidden, heads, feed_forward, types, Path(scratch) / "weights.f32")
        run_worker(derive_job(spec, weights, out))
    out.chmod(0o644)
    return out


def main() -> int:
    """Derive all shapes, or those whose file names contain one of the arguments."""
    parser = argparse.ArgumentParser(prog="tools/graphs", description=__doc__)
    parser.add_argument("name", nargs="*", help="part of a file's name, for example 384-12; all of them without")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="derived at the same time (%(default)s)")
    given = parser.parse_args()
    shapes = [
        (h, n, f, t)
        for h, n, f, t in SHAPES
        if not given.name or any(part in bert.graphs_name(h, n, f, types=bool(t)) for part in given.name)
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.processes) as pool:
        for shape, path in zip(shapes, pool.map(lambda shape: derive(shape, given.out), shapes), strict=True):
            print(f"{path.name}  {path.stat().st_size} bytes  {SHAPES[shape]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
