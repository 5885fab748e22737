"""Adapters that PEFT wrote and read, with the logits it gave: `python -m tests.golden.make_peft` where `tools/bench` made its environment.

The base model's numbers come from a formula, so that it need not be kept. The files are made anew only when their format changes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_models import bert
from edge_runtime.model import TensorSpec
from edge_runtime.model_folder import save_folder
from edge_runtime.weights import MappedTensor

GOLDEN = Path(__file__).parent / "peft"
LABELS = ("left", "middle", "right")
CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 90,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
SPEC = bert.describe(CONFIG, LABELS, 30)


def write_numbers(path: Path, tensors: Sequence[TensorSpec]) -> dict[str, MappedTensor]:
    """Tensors whose values look random and are the same everywhere: Knuth's multiplicative hash of their places."""
    places, count = {}, 1
    with path.open("wb") as file:
        for tensor in tensors:
            hashed = (np.arange(count, count + tensor.size, dtype=np.uint64) * 2654435761) % (1 << 32)
            values = (hashed / (1 << 31) - 1).reshape(tensor.shape) * (3 / max(tensor.shape[-1:] or (1,))) ** 0.5
            if len(tensor.shape) == 1 and tensor.name.endswith("weight"):
                values = 1 + 0.1 * values
            places[tensor.name] = MappedTensor(str(path), file.tell(), tensor.shape)
            file.write(values.astype("<f4").tobytes())
            count += tensor.size
    return places


def write_base(folder: Path, *, labels: bool = True) -> Path:
    """The base model as a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, "unk_token": "[UNK]"}
    tokenizer = folder.parent / f"{folder.name}.tokenizer.json"
    tokenizer.write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words})
    )
    save_folder(folder, SPEC, write_numbers(folder.parent / f"{folder.name}.f32", SPEC.tensors), tokenizer)
    if not labels:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "label" not in k}))
    return folder


def main(python: str) -> None:
    """Write them. Args: python: of an environment with transformers and peft."""
    from edge_runtime.peft import write_adapter
    from tests.device.test_peft import PEER, ours

    shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base = write_base(scratch / "base")
        write_adapter(GOLDEN / "ours", ours(scratch, {0: 2, 1: 4}, {0: 2.0, 1: 0.5}), "base")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for what, adapter in (("make", "theirs"), ("read", "ours")):
            command = [python, str(PEER), what, str(base), str(GOLDEN / adapter)]
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            (GOLDEN / f"{adapter}.json").write_text(out.splitlines()[-1] + "\n")
    config = json.loads((GOLDEN / "theirs" / "adapter_config.json").read_text())
    (GOLDEN / "theirs" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "base"}, indent=2)
    )
    (GOLDEN / "theirs" / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1])
