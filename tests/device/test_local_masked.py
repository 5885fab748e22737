"""Sparse training on one device: the model that comes of it differs from its base at the mask's places, as a whole and as a delta."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import local
from edge_runtime.cli import main
from edge_runtime.engine import EngineOptions
from edge_runtime.errors import UsageError
from edge_runtime.layout import linear_layers
from edge_runtime.masks import indices
from edge_runtime.predict import Predictor
from edge_runtime.records import TrainSettings
from edge_runtime.source import find_checkpoint, open_source
from tests.golden.make_peft import GOLDEN, LABELS, write_base

TEXTS = ("good", "good bad good", "bad", "bad good")
EVERY, SEED = 3, 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a head."""
    return write_base(tmp_path_factory.mktemp("base"), labels=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((TEXTS[i % 4], LABELS[i % 3]) for i in range(24))])
    return path


@pytest.fixture(scope="module")
def plan(base: Path, data: Path) -> local.Planned:
    return planned(base, data)


def planned(base: Path, data: Path, **more: Any) -> local.Planned:
    settings = TrainSettings(
        batch_size=8, learning_rate=0.01, mask_every=EVERY, mask_seed=SEED, lora_targets=("q", "down")
    )
    device = local.Device.measure(1, speed=False)
    return local.plan(
        str(base), data, memory="2GB", settings=settings, device=device, engine=EngineOptions("onnx"), **more
    )


def weights(model: Path) -> dict[str, np.ndarray[Any, Any]]:
    source = open_source(find_checkpoint(str(model), progress=lambda line: None), LABELS, model.parent)
    return {name: np.array(place.array()) for name, place in source.weights.items()}


def test_the_model_differs_from_its_base_at_the_masks_places_and_in_the_head_and_as_a_delta_too(
    base: Path, plan: local.Planned, tmp_path: Path
) -> None:
    local.train(plan, tmp_path / "whole", depth=1)
    local.train(plan, tmp_path / "delta", depth=1, delta=True)
    before, after, again = (weights(folder) for folder in (base, tmp_path / "whole", tmp_path / "delta"))
    assert all(np.array_equal(after[name], again[name]) for name in after)
    spec = plan.source.spec
    chosen = {n for n, layer in linear_layers(spec).items() if layer in ("attention.self.query", "output.dense")}
    moved = 0
    for tensor in spec.tensors:
        changed = np.flatnonzero(after[tensor.name] != before.get(tensor.name, 0))
        if tensor.part == spec.num_blocks - 1 and tensor.name in chosen:
            moved += changed.size
            assert set(changed) <= set(indices(SEED, tensor.name, tensor.size, EVERY))
        elif tensor.part < spec.num_blocks:
            assert not changed.size, tensor.name
    entries = sum(t.size for t in spec.tensors if t.name in chosen and t.part == spec.num_blocks - 1)
    assert moved > 0.9 * entries / EVERY
    one, other = (Predictor(tmp_path / which, 1).predict(TEXTS) for which in ("whole", "delta"))
    assert [a.probabilities for a in one] == [a.probabilities for a in other]


def test_fewer_values_are_sent_and_held_than_of_whole_blocks(base: Path, data: Path, plan: local.Planned) -> None:
    settings = TrainSettings(batch_size=8)
    whole = local.plan(str(base), data, memory="2GB", settings=settings, device=local.Device.measure(1, speed=False),
                       engine=EngineOptions("onnx"))  # fmt: skip
    for sparse, dense in zip(plan.rows, whole.rows, strict=True):
        assert sparse.depth == dense.depth and sparse.peak_bytes <= dense.peak_bytes
        assert sparse.upload_bytes < dense.upload_bytes or sparse.depth == 0


def test_what_makes_no_sense_is_told_so(
    base: Path, data: Path, plan: local.Planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="--depth 0 trains the head alone, all of it"):
        local.train(plan, tmp_path / "m", depth=0)
    with pytest.raises(UsageError, match="there will be no adapters"):
        local.train(plan, tmp_path / "m", adapter_out=tmp_path / "a")
    with pytest.raises(UsageError, match="--mask-every trains entries of the matrices, --adapter goes on"):
        planned(base, data, adapter=GOLDEN)
    command = ["plan", str(base), "--data", str(data), "--memory", "2GB", "--mask-every", "3"]
    assert main([*command, "--lora-rank", "2"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main([*command, "--mask-seed", "-1"]) == 2
    assert main(command) == 0
    assert "one of 3 entries of the matrices" in capsys.readouterr().out
