"""`edge-runtime prune`: a smaller folder of real weights that trains, exports and answers as any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_models import bert, hub
from edge_runtime import cli
from edge_runtime.errors import UsageError
from edge_runtime.export import export_onnx
from edge_runtime.local_prune import by_magnitude, prune
from edge_runtime.model_folder import save_folder
from edge_runtime.predict import Predictor
from edge_runtime.pruning import block_widths, kept_groups, pruned_spec
from edge_runtime.source import find_checkpoint, open_source
from edge_runtime.weights import read_safetensors, write_arrays
from tests.networks import bert_spec, write_weights

TEXTS = ["Who wrote Hamlet?", "Where is Oslo?", "How far is the moon from the earth, and how do we know? " * 3, "x"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM-L3 with a head of its own, as a training leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    base = hub.resolve("minilm-l3", print)
    config, weights = bert.open_folder(base)
    spec = bert.describe(config, ["person", "place", "number"], 64)
    random = np.random.default_rng(0)
    heads = {t.name: random.normal(0, 0.3, t.shape) for t in spec.suffix(0)}
    weights |= write_arrays(folder / "head", [(n, a.shape, lambda a=a: a) for n, a in heads.items()])  # type: ignore[misc]
    save_folder(folder / "model", spec, weights, base / "tokenizer.json")
    return folder / "model"


def test_half_of_real_weights_is_a_smaller_model_that_exports_and_answers_alike(trained: Path, tmp_path: Path) -> None:
    found = prune(str(trained), 0.5, tmp_path / "half")
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert [sum(n) for n in zip(*found.widths, strict=True)] == [18, 2304] and len(set(found.widths)) > 1
    checkpoint = find_checkpoint(str(tmp_path / "half"), progress=print)
    source = open_source(checkpoint, None, tmp_path)
    assert checkpoint.labels == ("person", "place", "number")
    assert tuple(block_widths(source.spec)) == found.widths and source.spec.max_length == 64
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (trained, tmp_path / "half")]
    assert sizes[0] - sizes[1] == pytest.approx(4 * (found.parameters_before - found.parameters), abs=100)
    out = tmp_path / "half.onnx"
    tokenizer = (trained / "tokenizer.json").read_bytes()
    report = export_onnx(source.spec, source.weights, tokenizer, out, samples=TEXTS, metadata={})
    assert report.num_bytes == pytest.approx(sizes[1] + len(tokenizer), rel=0.01)
    whole, folder, file = (Predictor(path) for path in (trained, tmp_path / "half", out))
    told = [[list(p.probabilities.values()) for p in model.predict(TEXTS)] for model in (whole, folder, file)]
    assert np.abs(np.subtract(told[1], told[2])).max() < 1e-5 < np.abs(np.subtract(told[0], told[1])).max()


def test_the_command_tells_what_is_left_of_a_model_without_a_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["prune", "minilm-l3", "--sparsity", "0.25", "--out", str(out)]) == 0
    assert "27 of 36 are left" in (told := capsys.readouterr().out) and "25.0 % of the values" in told
    assert not any(name.startswith("classifier") for name in read_safetensors(out / "model.safetensors"))
    assert "id2label" not in json.loads((out / "config.json").read_text())
    assert cli.main(["prune", str(out), "--sparsity", "0.25", "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert sum(heads for heads, _ in again["widths"]) == 20  # 27 - 7: of what was left
    labels = ["a", "b"]
    assert open_source(find_checkpoint(str(out), progress=print), labels, tmp_path).spec.labels == tuple(labels)


def test_the_largest_weights_stay_and_one_group_of_each_kind_in_every_block(tmp_path: Path) -> None:
    spec = bert_spec(24, 4, 20, blocks=3)
    weights = {n: np.array(t.array()) for n, t in write_weights(spec, tmp_path / "weights").items()}
    weights["encoder.layer.1.attention.self.value.weight"][6:12] *= 9  # head 1
    weights["encoder.layer.2.attention.output.dense.weight"][:, 18:] *= 9  # head 3
    weights["encoder.layer.0.intermediate.dense.weight"][7] *= 9
    weights["encoder.layer.0.output.dense.weight"][:, 11] *= 9
    places = write_arrays(tmp_path / "changed", [(n, a.shape, lambda a=a: a) for n, a in weights.items()])  # type: ignore[misc]
    kept = by_magnitude(spec, places, 0.75)
    assert [kept_groups(spec, kept, b)[0].tolist().index(True) for b in (1, 2)] == [1, 3]
    assert [kept.num_heads(b) for b in range(3)] == [1, 1, 1]
    assert kept_groups(spec, kept, 0)[1][[7, 11]].all()
    assert sum(kept.num_channels(b) for b in range(3)) == 15
    assert pruned_spec(spec, by_magnitude(spec, places, 0.001)) == spec


@pytest.mark.parametrize(
    ("sparsity", "reason"),
    [(0.0, "above 0"), (1.0, "below 1"), (float("nan"), "above 0"), (0.95, "at most 0.917 is possible")],
)
def test_a_sparsity_that_cannot_be_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, sparsity: float, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        prune(str(trained), sparsity, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_that_does_not_say_what_its_heads_are_cannot_be_pruned(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(bert, "HEAD_LAYERS")
    with pytest.raises(UsageError, match="does not say what a head and a channel are made of"):
        prune(str(trained), 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()
