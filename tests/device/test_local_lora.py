"""LoRA on one device: what `train` writes as a model and as an adapter, beginning from one, and what makes no sense."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import local
from edge_runtime.cli import main
from edge_runtime.engine import EngineOptions
from edge_runtime.errors import UsageError
from edge_runtime.layout import A, B
from edge_runtime.peft import read_adapter
from edge_runtime.predict import Predictor
from edge_runtime.records import TrainSettings
from edge_runtime.source import find_checkpoint, open_source
from tests.golden.make_peft import GOLDEN, LABELS, write_base

TEXTS = ("good", "good bad good", "bad", "bad good")
FAMILY = "edge_models.bert"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a head."""
    return write_base(tmp_path_factory.mktemp("base"), labels=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        rows = [(TEXTS[i % 4], LABELS[i % 3]) for i in range(24)]
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def planned(base: Path, data: Path, adapter: Path | None = None, **settings: Any) -> local.Planned:
    return local.plan(
        str(base),
        data,
        memory="2GB",
        settings=TrainSettings(batch_size=8, adapter_learning_rate=0.02, **settings),
        device=local.Device.measure(1, speed=False),
        engine=EngineOptions("onnx"),
        adapter=adapter,
    )


@pytest.fixture(scope="module")
def plan(base: Path, data: Path) -> local.Planned:
    """With adapters of rank 4 for two layers of each block."""
    return planned(base, data, lora_rank=4, lora_targets=("q", "down"))


def weights(model: Path) -> dict[str, np.ndarray[Any, Any]]:
    source = open_source(find_checkpoint(str(model), progress=lambda line: None), LABELS, model.parent)
    return {name: np.array(place.array()) for name, place in source.weights.items()}


def same(one: Predictor, other: Predictor) -> bool:
    """Whether two models answer alike."""
    pairs = zip(one.predict(TEXTS), other.predict(TEXTS), strict=True)
    return all(a.probabilities == pytest.approx(b.probabilities, abs=1e-5) for a, b in pairs)


def test_the_adapter_over_the_base_is_the_model_and_training_can_go_on_from_it(
    base: Path, data: Path, plan: local.Planned, tmp_path: Path
) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    trained = local.train(plan, model, depth=1, adapter_out=adapter)
    assert trained.report.rank == 4
    assert same(Predictor(model, 1), Predictor(base, 1, adapter=adapter))
    before, after = weights(base), weights(model)
    moved = {name for name in after if name not in before or not np.array_equal(before[name], after[name])}
    stems = {"encoder.layer.1.attention.self.query", "encoder.layer.1.output.dense"}
    assert moved == {f"{stem}.weight" for stem in stems} | {"classifier.weight", "classifier.bias"}
    assert set(read_adapter(adapter, FAMILY).scales) == stems

    on = planned(base, data, adapter, lora_rank=6)
    assert on.prepared.labels == LABELS
    assert on.chosen is not None and on.chosen.settings.lora_targets == ("attention.self.query", "output.dense")
    deeper = tmp_path / "deeper"
    local.train(on, None, depth=2, adapter_out=deeper)
    first, second = (read_adapter(folder, FAMILY) for folder in (adapter, deeper))
    assert len(second.scales) == 4 and second.rank == 6
    for stem in stems:
        product = [s.scales[stem] * s.tensors[stem + B].array() @ s.tensors[stem + A].array() for s in (first, second)]
        assert 0 < abs(product[1] - product[0]).max() < 0.3 * abs(product[0]).max() + 0.1
    assert not (deeper / "model.safetensors").exists()


def test_a_given_adapter_counts_in_blocks_that_are_not_trained(base: Path, data: Path, tmp_path: Path) -> None:
    plan = planned(base, data, GOLDEN / "ours")
    assert plan.chosen is not None and plan.chosen.settings.lora_rank == 4
    whole, head = tmp_path / "whole", tmp_path / "head"
    local.train(plan, whole, depth=0, adapter_out=head)
    assert same(Predictor(whole, 1), Predictor(base, 1, adapter=head))
    given, kept = read_adapter(GOLDEN / "ours", FAMILY), read_adapter(head, FAMILY)
    assert kept.scales == given.scales
    for name, place in given.tensors.items():
        assert np.array_equal(kept.tensors[name].array(), place.array())
    assert not np.array_equal(kept.head["classifier.weight"].array(), given.head["classifier.weight"].array())


def test_what_makes_no_sense_is_told_so(base: Path, data: Path, plan: local.Planned, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"choose from q, k, v, o, up, down"):
        planned(base, data, lora_rank=2, lora_targets=("w",))
    with pytest.raises(UsageError, match="give their --lora-rank too"):
        planned(base, data, lora_targets=("q",))
    with pytest.raises(UsageError, match=r"--lora-rank 129 is above the smaller side"):
        planned(base, data, lora_rank=129)
    with pytest.raises(UsageError, match="the adapter has rank 4"):
        planned(base, data, GOLDEN / "ours", lora_rank=2)
    with pytest.raises(UsageError, match="which is not among --lora-targets"):
        planned(base, data, GOLDEN / "ours", lora_targets=("q",))
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--depth 0 trains the head alone"):
        local.train(plan, out, depth=0)
    with pytest.raises(UsageError, match="name a folder for the model"):
        local.train(plan, None)
    with pytest.raises(UsageError, match="one folder"):
        local.train(plan, out, adapter_out=out)
    assert plan.chosen is not None
    without = replace(plan.chosen, settings=TrainSettings(), chosen=replace(plan.chosen.chosen, rank=0))
    with pytest.raises(UsageError, match="no adapters to write"):
        local.train(replace(plan, chosen=without), out, adapter_out=tmp_path / "a")
    assert not out.exists()


def test_the_command_line_passes_names_of_layers_on(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        str(base),
        "--data",
        str(data),
        "--memory",
        "2GB",
        "--lora-rank",
        "2",
        "--lora-targets",
        "q, x",
    ]
    assert main(arguments) == 2
    assert "'x' is no linear layer of this model's blocks: choose from q, k, v" in capsys.readouterr().err
