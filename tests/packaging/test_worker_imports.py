"""The training process stays lean: what torch would load behind our back is 70 MB that a device does not have.

A fresh interpreter runs the jobs of the worker, as they are, on a small random BERT.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from edge_models import bert
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.weights import MappedTensor, write_safetensors
from edge_runtime.wire import to_plain

CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 12,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
LABELS = ("no", "yes")
FORBIDDEN = (
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "sympy",
    "transformers",
    "onnx",
    "onnxruntime",
    "edge_coordinator",
)
# What `import torch` loads by itself in part; to use any of it is what imports torch._dynamo.
NOT_MORE = ("torch.optim", "torch.utils.checkpoint", "torch.export", "torch.fx")
JOBS = """
import json, sys
job = json.loads(sys.argv[1])
from edge_runtime.training import worker
early = sorted(m for m in ("torch", "numpy") if m in sys.modules)
made = worker.corpus(job)
without = "torch" in sys.modules
import torch
bare = sorted(sys.modules)
job["corpus"] = made["folder"]
job["test_corpus"] = made["test_folder"]
worker.probe(job)
reports = [worker.train({**job, "plan": plan})["report"] for plan in job["plans"]]
print(json.dumps({"early": early, "without": without, "bare": bare, "reports": reports, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint, data and plans with and without checkpointing."""
    folder = tmp_path_factory.mktemp("tiny")
    spec = bert.describe(CONFIG, LABELS, 16)
    random = np.random.default_rng(0)
    places = []
    for number, tensor in enumerate(spec.tensors):
        path = folder / f"{number}.raw"
        random.normal(0, 0.3, tensor.shape).astype("<f4").tofile(path)
        places.append((tensor.name, MappedTensor(str(path), 0, tensor.shape)))
    write_safetensors(folder / "model.safetensors", places)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    words = {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, "unk_token": "[UNK]"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (folder / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *(("good good", "yes"), ("bad", "no")) * 4])
    config, weights = bert.open_folder(folder)
    plans = [
        Plan(
            CostRow(depth, checkpointing, 2, 0, 0.0, 0.0, 0, rank=rank),
            TrainSettings(batch_size=4, optimizer=optimizer, lora_rank=rank, proximal_mu=0.1, mask_every=every),
            2,
            adapters="ab" if rank else "",
        )
        for depth, checkpointing, optimizer, rank, every in (
            (2, False, "adamw", 0, 0),
            (3, True, "adamw", 0, 0),
            (0, False, "sgd", 0, 0),
            (1, True, "sgd", 0, 0),
            (2, True, "adamw", 2, 0),
            (2, False, "adamw", 0, 3),
        )
    ]
    return {
        "family": "edge_models.bert",
        "config": config,
        "labels": LABELS,
        "max_length": 16,
        "weights": {name: (w.path, w.offset, w.shape, w.dtype) for name, w in weights.items()},
        "data": str(folder / "texts.csv"),
        "tokenizer": str(folder / "tokenizer.json"),
        "cache": str(folder / "corpora"),
        "holdout": 0.25,
        "test": None,
        "seed": 0,
        "text_column": "text",
        "label_column": "label",
        "encoding": None,
        "bad_rows": "error",
        "mean": 8,
        "longest": 8,
        "optimizer": "adamw",
        "rank": 0,
        "targets": [],
        "precision": "float32",
        "room": None,
        "limit": 1 << 60,
        "backend": "torch",
        "graphs": None,
        "threads": 1,
        "update": str(folder / "update.f32"),
        "plans": to_plain(plans),
    }


@pytest.fixture(scope="module")
def found(job: dict[str, Any]) -> Any:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", JOBS, json.dumps(job)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # before it, the worker's own lines of progress


def test_every_plan_was_trained(found: Any) -> None:
    assert [r["steps"] for r in found["reports"]] == [2] * 6


def test_training_loads_neither_dynamo_nor_sympy_nor_transformers(found: Any) -> None:
    assert below(FORBIDDEN, found["modules"]) == []


def test_training_loads_no_more_of_torch_than_torch_itself_does(found: Any) -> None:
    assert below(NOT_MORE, set(found["modules"]) - set(found["bare"])) == []


def below(names: tuple[str, ...], modules: Iterable[str]) -> list[str]:
    """The modules that are one of `names` or inside one."""
    return sorted(m for m in modules if m.startswith(tuple(f"{name}." for name in names)) or m in names)


def test_tokenising_needs_no_torch(found: Any) -> None:
    assert found["early"] == []
    assert found["without"] is False
