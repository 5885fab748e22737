"""Small BERTs with random weights, for what both backends and their graphs must do alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_models import bert
from edge_runtime.model import ModelSpec
from edge_runtime.weights import MappedTensor


def bert_spec(
    hidden: int = 128, heads: int = 2, wide: int = 512, types: int = 2, *, blocks: int = 3, labels: int = 3, **more: Any
) -> ModelSpec:
    """A BERT of this shape, with texts of at most 40 tokens. Args: more: of its config."""
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": wide,
        "vocab_size": 90,
        "max_position_embeddings": 40,
        "type_vocab_size": types,
        "hidden_act": "gelu",
        **more,
    }
    return bert.describe(config, [f"label {i}" for i in range(labels)], 40)


def write_random(file: Path, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, MappedTensor]:
    """Tensors of about the size that keeps activations near one, so that no gradient is all rounding."""
    random, places = np.random.default_rng(seed), {}
    with file.open("wb") as out:
        for name, shape in shapes.items():
            norm = len(shape) == 1 and name.endswith("weight")
            values = random.normal(1.0 if norm else 0.0, 0.2 if len(shape) == 1 else shape[1] ** -0.5, shape)
            places[name] = MappedTensor(str(file), out.tell(), shape)
            out.write(values.astype("<f4").tobytes())
    return places


def write_weights(spec: ModelSpec, file: Path, seed: int = 0) -> dict[str, MappedTensor]:
    """All tensors of a network, as `write_random`."""
    return write_random(file, {t.name: t.shape for t in spec.tensors}, seed)
