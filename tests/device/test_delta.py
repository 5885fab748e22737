"""A finetuned model as a small delta beside its base: it reads as the whole one does, or says what became of the base."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from edge_runtime.cli import main
from edge_runtime.errors import ModelError, UsageError
from edge_runtime.model_folder import CONFIG_FILE, NEXT, save_folder
from edge_runtime.predict import Predictor
from edge_runtime.source import Source, delta_base, find_checkpoint, open_source
from edge_runtime.weights import MappedTensor, read_safetensors
from tests.e2e.fleets import CONFIG, LABELS, tiny_model, write_data

HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small encoder without a head, of a shape that graphs are bundled for."""
    with mock.patch.dict(CONFIG, hidden_size=128, intermediate_size=512):
        return tiny_model(tmp_path / "base")


def open_it(folder: Path) -> Source:
    return open_source(find_checkpoint(str(folder), progress=print), LABELS, folder.parent)


def changed(source: Source, depth: int, seed: int) -> dict[str, MappedTensor]:
    """The weights as after training the last blocks and the head."""
    weights = dict(source.weights)
    for tensor in source.spec.suffix(depth):
        path = source.tokenizer.parent.parent / f"{tensor.name}-{seed}"
        np.random.default_rng(seed).normal(0, 0.5, tensor.shape).astype("<f4").tofile(path)
        weights[tensor.name] = MappedTensor(str(path), 0, tensor.shape)
    return weights


def save(out: Path, source: Source, weights: dict[str, MappedTensor], base: Path | None) -> Path:
    save_folder(out, source.spec, weights, source.tokenizer, base)
    return out


def same_tensors(one: Source, other: Source) -> bool:
    names = [t.name for t in one.spec.tensors]
    return one.spec == other.spec and all((one.weights[n].array() == other.weights[n].array()).all() for n in names)


@pytest.fixture
def delta(base: Path, tmp_path: Path) -> Path:
    """A head trained on `base`."""
    source = open_it(base)
    return save(tmp_path / "delta", source, changed(source, 0, 1), source.base)


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
@pytest.mark.parametrize("is_delta", [False, True])
def test_a_kill_between_the_files_of_a_model_leaves_the_new_one_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int, is_delta: bool
) -> None:
    source, out = open_it(base), tmp_path / "out"
    before = save(out, source, changed(source, 1, 1), source.base if not is_delta else None)
    new = changed(source, 1, 2)
    wanted = save(tmp_path / "wanted", source, new, source.base if is_delta else None)
    done: list[Path] = []

    def dying(source: Path, target: Path) -> None:
        if Path(source).parent.name == NEXT:
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        if moved < 3:
            with pytest.raises(KeyboardInterrupt):
                save(out, source, new, source.base if is_delta else None)
            assert (out / NEXT / CONFIG_FILE).exists()
        else:
            save(out, source, new, source.base if is_delta else None)
    assert same_tensors(open_it(before), open_it(wanted))
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in wanted.iterdir())


def test_a_kill_while_the_files_are_written_leaves_the_model_that_was_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = open_it(base), tmp_path / "out"
    save(out, source, changed(source, 1, 1), None)
    wanted = save(tmp_path / "wanted", source, changed(source, 1, 1), None)
    draft = out / f"{NEXT}.999999999.x"  # of a process that is gone
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    assert same_tensors(open_it(out), open_it(wanted))
    save(out, source, changed(source, 1, 2), None)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_delta_holds_what_was_trained_and_reads_as_the_whole_model(base: Path, tmp_path: Path) -> None:
    source = open_it(base)
    for depth, most in ((0, 4_000), (1, 1_000_000)):
        weights = changed(source, depth, 1)
        whole = save(tmp_path / f"whole-{depth}", source, weights, None)
        delta = save(tmp_path / f"delta-{depth}", source, weights, delta_base(source, tmp_path / f"delta-{depth}"))
        assert sorted(p.name for p in delta.iterdir()) == ["config.json", "delta.safetensors", "tokenizer.json"]
        assert set(read_safetensors(delta / "delta.safetensors")) == {t.name for t in source.spec.suffix(depth)}
        assert (delta / "delta.safetensors").stat().st_size < most
        assert same_tensors(open_it(delta), open_it(whole))
        texts = ["red", "the river of it"]
        assert [p.probabilities for p in Predictor(delta).predict(texts)] == [
            p.probabilities for p in Predictor(whole).predict(texts)
        ]


def test_a_delta_of_a_delta_refers_to_the_first_base(delta: Path, base: Path, tmp_path: Path) -> None:
    source = open_it(delta)
    weights = changed(source, 1, 2)
    again = save(tmp_path / "again", source, weights, delta_base(source, tmp_path / "again"))
    shutil.rmtree(delta)
    assert open_it(again).base == base
    assert all((open_it(again).weights[n].array() == weights[n].array()).all() for n in weights)


def test_a_base_that_was_copied_back_is_the_same(delta: Path, base: Path) -> None:
    shutil.copytree(base, base.with_name("copy"))
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="which is gone: put it back there"):
        open_it(delta)
    base.with_name("copy").rename(base)
    os.utime(base / "model.safetensors", ns=(5, 5))
    assert open_it(delta).base == base


@pytest.mark.parametrize("kind", ["a value", "the length", "the config", "no weights", "other files"])
def test_a_base_that_changed_is_refused(delta: Path, base: Path, kind: str) -> None:
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    wanted = "is another model now: put it back"
    if kind == "a value":
        data[-1] ^= 1
        path.write_bytes(data)
    elif kind == "the length":
        path.write_bytes(data + bytes(4))
    elif kind == "the config":
        (base / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    elif kind == "no weights":
        path.unlink()
        wanted = r"has no model\.safetensors"
    else:
        places = dict.fromkeys(read_safetensors(path), "one.safetensors")
        path.rename(base / "one.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelError, match=wanted):
        open_it(delta)
    with pytest.raises(ModelError, match=wanted):
        Predictor(delta)


@pytest.mark.parametrize(
    "entry",
    [None, 7, {}, {"folder": 7}, {"folder": ".", "files": None}, {"folder": ".", "files": {"model.safetensors": 7}}],
)
def test_a_damaged_reference_is_refused(delta: Path, base: Path, entry: Any) -> None:
    config = json.loads((delta / "config.json").read_text())
    if isinstance(entry, dict) and entry.get("folder") == ".":
        entry["folder"] = str(base)
    (delta / "config.json").write_text(json.dumps(config | {"edge_base": entry}))
    with pytest.raises(ModelError, match="is damaged: train the model again|is another model now"):
        open_it(delta)


def test_a_delta_that_is_cut_off_gone_or_of_other_shapes_is_refused(delta: Path, base: Path) -> None:
    path = delta / "delta.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ModelError, match="match its shape"):
        open_it(delta)
    path.write_bytes(data.replace(b'"classifier.bias":', b'"classifier.biaS":'))
    with pytest.raises(ModelError, match=r"delta\.safetensors .*'classifier\.biaS'"):
        open_it(delta)
    path.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        open_it(delta)


def test_a_folder_holds_one_model_whole_or_as_a_delta(delta: Path, tmp_path: Path) -> None:
    source = open_it(delta)
    weights = changed(source, 1, 3)
    save(delta, source, weights, None)
    assert not (delta / "delta.safetensors").exists()
    whole = open_it(delta)
    assert whole.base == delta
    save(delta, source, weights, source.base)
    assert not (delta / "model.safetensors").exists()
    assert open_it(delta).base == source.base


def test_a_delta_over_its_own_base_or_of_an_agents_model_is_refused(base: Path, tmp_path: Path) -> None:
    source = open_it(base)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(UsageError, match="holds the base"):
        delta_base(source, tmp_path / "link")
    with pytest.raises(UsageError, match="an agent's model would break with its next version"):
        delta_base(Source(source.spec, source.weights, source.tokenizer, {}), tmp_path / "out")


def test_train_writes_a_delta_and_trains_and_predicts_from_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "d.csv", 1)
    call = ["--data", str(data), "--memory", "4GB", "--depth", "0", "--delta"]
    assert main(["train", str(base), *call, "--out", str(tmp_path / "one")]) == 0
    assert main(["train", str(tmp_path / "one"), *call, "--out", str(tmp_path / "two")]) == 0
    assert set(read_safetensors(tmp_path / "two" / "delta.safetensors")) == HEAD
    assert main(["train", str(base), *call, "--out", str(base)]) == 2
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "two"), "the red of it"]) == 0
    assert capsys.readouterr().out.split()[0] in LABELS
