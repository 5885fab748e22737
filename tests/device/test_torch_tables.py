"""The torch backend reads the rows of a vocabulary that a text needs: the same bits, and the table never becomes resident."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import cost
from edge_runtime.model import ModelSpec
from edge_runtime.records import CostRow, Plan, TrainSettings
from edge_runtime.training.corpus import Batch
from edge_runtime.training.torch_backend import TorchBackend
from edge_runtime.weights import MappedTensor
from tests.networks import bert_spec, write_weights

VOCABULARY = 80_000
WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return bert_spec(32, 2, 64, blocks=1, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def weights(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, MappedTensor]:
    return write_weights(spec, tmp_path_factory.mktemp("weights") / "weights.f32")


def trained(spec: ModelSpec, weights: dict[str, MappedTensor]) -> tuple[TorchBackend, list[float]]:
    """A backend after some steps on texts with tokens from all over the vocabulary, and the losses."""
    plan = Plan(CostRow(1, False, 8, 0, 0.0, 0.0, 0), TrainSettings(batch_size=8), 3)
    backend, random = TorchBackend(spec, weights, plan, 1), np.random.default_rng(1)
    losses = []
    for _ in range(3):
        ids = random.integers(0, VOCABULARY, (8, 20))
        losses.append(backend.step(Batch(ids, np.ones_like(ids), random.integers(0, 3, 8))))
    return backend, losses


def resident_bytes(path: str, least: int) -> int:
    """Of this process' maps of a file that have at least so many bytes."""
    found, large = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            large = line.endswith(path) and int(match[2], 16) - int(match[1], 16) >= least
        elif large and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_a_vocabulary_is_a_table_and_positions_are_not(spec: ModelSpec) -> None:
    assert [t.name for t in spec.tensors if cost.is_table(t)] == [WORDS]


def test_its_rows_give_the_same_bits_as_the_mapped_table_which_stays_on_the_disk(
    spec: ModelSpec, weights: dict[str, MappedTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = weights[WORDS]
    by_row, losses = trained(spec, weights)
    assert resident_bytes(table.path, table.num_bytes) == 0
    monkeypatch.setattr(cost, "TABLE_BYTES", 1 << 40)
    mapped, others = trained(spec, weights)
    assert resident_bytes(table.path, table.num_bytes) > table.num_bytes / 4, "this is how it would be"
    assert losses == others
    for ours, theirs in zip(by_row.deltas(), mapped.deltas(), strict=True):
        assert ours[0] == theirs[0] and np.array_equal(ours[1], theirs[1])
