"""A model's own folder answers as its exported file does, and an agent's is followed from version to version."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from edge_models import bert, hub
from edge_runtime import commands, merging, source
from edge_runtime.cli import main
from edge_runtime.errors import BadVersion, EdgeError, MissingExtra, ModelError, WireError
from edge_runtime.export import export_onnx
from edge_runtime.graphs import find
from edge_runtime.graphs.bundle import GraphSet
from edge_runtime.manifest import encode_manifest, make_manifest
from edge_runtime.mapped_network import MappedNetwork
from edge_runtime.model import ModelSpec
from edge_runtime.model_folder import save_folder
from edge_runtime.predict import Predictor
from edge_runtime.source import MANIFEST_FILE, STORE_FOLDER
from edge_runtime.store import BlobStore, atomic_writer, cache_folder
from edge_runtime.weights import MappedTensor
from tests.e2e.fleets import CONFIG, LABELS, tiny_model

TEXTS = ["the red river of Paris", "seven", "", "a thousand yellow mountains " * 20]


def random_text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(" ".join(TEXTS).split(), k=words))


def with_head(
    base: Path, scratch: Path, labels: Sequence[str] = LABELS, seed: int = 0, max_length: int = 32
) -> tuple[ModelSpec, dict[str, MappedTensor]]:
    """A checkpoint with a random head for these labels."""
    config, weights = bert.open_folder(base)
    spec = bert.describe(config, labels, max_length)
    scratch.mkdir(parents=True, exist_ok=True)
    for tensor in spec.suffix(0):
        path = scratch / f"{tensor.name}-{seed}"
        np.random.default_rng(seed).normal(0, 1, tensor.shape).astype("<f4").tofile(path)
        weights[tensor.name] = MappedTensor(str(path), 0, tensor.shape)
    return spec, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder without a head, of a shape that graphs are bundled for."""
    with mock.patch.dict(CONFIG, hidden_size=128, intermediate_size=512):
        return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with a head, as `train` writes it."""
    out = tmp_path_factory.mktemp("model")
    spec, weights = with_head(base, out / "head")
    save_folder(out / "model", spec, weights, base / "tokenizer.json")
    return out / "model"


class Agent:
    """The folder of an agent, as `ModelKeeper` keeps it: one version at a time, the blobs of older ones deleted."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.store = BlobStore(folder / STORE_FOLDER)

    def hold(self, version: int, labels: Sequence[str] = LABELS, **changes: Any) -> None:
        """Become whole in another version: a head from its number, everything else as it was."""
        spec, weights = with_head(self.base, self.folder / ".made", labels, seed=version)
        blobs = {name: self.store.put(weights[name].array().tobytes()) for name in weights}
        tokenizer = (self.base / "tokenizer.json").read_bytes()
        manifest = make_manifest(spec, blobs, self.store.put(tokenizer), len(tokenizer), version=version, method="full")
        manifest = dataclasses.replace(manifest, **changes)
        with atomic_writer(self.folder / MANIFEST_FILE) as file:
            file.write(encode_manifest(manifest))
        self.store.keep_only(manifest.blobs())


@pytest.fixture
def agent(tmp_path: Path, base: Path) -> Agent:
    """One that holds version 1."""
    found = Agent(tmp_path / "agent", base)
    found.hold(1)
    return found


def probabilities(predictor: Predictor, texts: Sequence[str] = TEXTS) -> np.ndarray[Any, np.dtype[Any]]:
    return np.array([list(found.probabilities.values()) for found in predictor.predict(texts)])


# the same answers


def test_real_weights_answer_from_their_folder_as_from_the_exported_file(tmp_path: Path) -> None:
    base = hub.resolve("minilm-l6", print)
    spec, weights = with_head(base, tmp_path / "head", ("a", "b", "c", "d"), max_length=128)
    save_folder(tmp_path / "model", spec, weights, base / "tokenizer.json")
    tokenizer = (base / "tokenizer.json").read_bytes()
    export_onnx(spec, weights, tokenizer, tmp_path / "m.onnx", samples=TEXTS, metadata={})
    chance = random.Random(0)
    texts = [random_text(chance, words) for words in (0, 1, 5, 5, 20, 60, 100, 127, 300)]
    wanted = probabilities(Predictor(tmp_path / "m.onnx", 2), texts)
    assert np.ptp(wanted, axis=0).max() > 0.1
    np.testing.assert_allclose(probabilities(Predictor(tmp_path / "model", 2), texts), wanted, atol=1e-5)


def test_a_folder_and_an_agents_folder_answer_as_the_network_in_torch(folder: Path, agent: Agent) -> None:
    import torch

    from edge_runtime.tokenize import Tokenizer, pad

    predictor = Predictor(folder)
    assert (predictor.labels, predictor.max_length, predictor.metadata) == (LABELS, 32, {"model": "model"})
    for model, seed, version in ((predictor, 0, None), (Predictor(agent.folder), 1, 1)):
        spec, weights = with_head(agent.base, agent.folder / ".made", seed=seed)
        network = bert.build(spec, {n: torch.from_numpy(t.array()) for n, t in weights.items()})
        rows = Tokenizer.from_file(folder / "tokenizer.json", 32).encode_batch(TEXTS)
        with torch.inference_mode():
            wanted = network(*map(torch.from_numpy, pad(rows, 0))).softmax(-1).numpy()
        np.testing.assert_allclose(probabilities(model), wanted, atol=1e-5)
        assert {found.model_version for found in model.predict(TEXTS)} == {version}


def test_weights_of_half_precision_are_converted(base: Path, folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    half = shutil.copytree(folder, tmp_path / "half")
    tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors")
    np.testing.assert_allclose(probabilities(Predictor(half)), probabilities(Predictor(folder)), atol=5e-3)


def test_the_weights_are_maps_of_the_file_and_nothing_is_copied(folder: Path) -> None:
    network = network_of(Predictor(folder))
    assert all(isinstance(array, np.memmap) for array in network._arrays.values())


CHILD = """
import sys
for name in ("torch", "onnx", "onnxscript", "safetensors"): sys.modules[name] = None
from pathlib import Path
from edge_runtime.predict import Predictor
predictor = Predictor(sys.argv[1], 1)
print([found.label for found in predictor.predict(["soup " * n for n in range(100)])][-1])
"""


def test_a_folder_answers_without_torch(folder: Path) -> None:
    wanted = Predictor(folder).predict(["soup " * 99])[0].label  # and the graphs are known from here on
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, wanted, "")


def network_of(predictor: Predictor) -> MappedNetwork:
    assert predictor._version.network
    return predictor._version.network


# from version to version


def test_a_newer_version_is_taken_over_and_what_did_not_change_keeps_its_map(agent: Agent) -> None:
    predictor = Predictor(agent.folder)
    first, before, tokenizer = network_of(predictor), probabilities(predictor), predictor._version.tokenizer
    assert not predictor.refresh()
    agent.hold(2)
    assert (probabilities(predictor) == before).all()  # also where its blobs are deleted: their maps hold them
    assert predictor.refresh()
    assert not predictor.refresh()
    second = network_of(predictor)
    kept = [place for place in second._arrays if place in first._arrays]
    assert len(kept) == len(second._arrays) - 2  # all but the head
    assert all(second._arrays[place] is first._arrays[place] for place in kept)
    assert second._graphs is first._graphs
    assert predictor._version.tokenizer is tokenizer
    assert predictor.metadata == {"model_version": "2", "method": "full"}
    assert {found.model_version for found in predictor.predict(TEXTS)} == {2}
    np.testing.assert_array_equal(probabilities(predictor), probabilities(Predictor(agent.folder)))


def test_a_version_with_other_labels_and_length_is_taken_over(agent: Agent) -> None:
    predictor = Predictor(agent.folder)
    agent.hold(2, ("yes", "no"), max_length=16)
    assert predictor.refresh()
    assert (predictor.labels, predictor.max_length) == (("yes", "no"), 16)
    assert {found.label for found in predictor.predict(TEXTS)} <= {"yes", "no"}


def test_the_same_version_written_again_is_no_newer_one(agent: Agent) -> None:
    predictor = Predictor(agent.folder)
    agent.hold(1)
    assert not predictor.refresh()


def test_what_has_no_versions_is_never_refreshed(folder: Path) -> None:
    predictor = Predictor(folder)
    os.utime(folder / "config.json")
    assert not predictor.refresh()


def test_threads_get_whole_answers_while_versions_come(agent: Agent) -> None:
    predictor, failed, seen = Predictor(agent.folder, 1), [], set()
    wanted = {}
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                found = predictor.predict(TEXTS)
                versions = {one.model_version for one in found}
                assert len(versions) == 1
                labels = [tuple(one.probabilities) for one in found]
                assert set(labels) == {names(*versions)}
                wanted.setdefault(*versions, found)  # every thread's answers of one version are the same
                assert wanted[versions.pop()] == found
                seen.update(one.model_version for one in found)
                predictor.refresh()
            except BaseException as error:  # told below, by the test's own thread
                failed.append(error)
                return

    def names(version: int) -> tuple[str, ...]:
        return LABELS if version == 1 else (f"first of {version}", f"second of {version}")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in range(2, 12):
        agent.hold(version, names(version))
        predictor.refresh()
    done.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(seen) > 2
    predictor.refresh()
    assert predictor.labels == names(11)


def test_a_version_that_is_replaced_while_it_is_opened_gives_the_newer_one(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, real = [2, 3], merging.open_source

    def late(*arguments: Any) -> source.Source:
        if opens:
            agent.hold(opens.pop(0))  # after the manifest was read, before its blobs are opened
        return real(*arguments)

    monkeypatch.setattr(merging, "open_source", late)
    predictor = Predictor(agent.folder)
    assert predictor.metadata["model_version"] == "3"
    assert not predictor.refresh()


def test_a_version_that_cannot_be_used_leaves_the_one_before_and_is_told_once(agent: Agent) -> None:
    predictor = Predictor(agent.folder)
    before = probabilities(predictor)
    (agent.folder / MANIFEST_FILE).write_bytes(b"damaged")
    with pytest.raises(WireError):
        predictor.refresh()
    assert not predictor.refresh()
    assert (probabilities(predictor) == before).all()
    (agent.folder / MANIFEST_FILE).unlink()
    assert not predictor.refresh()
    agent.hold(3)
    assert predictor.refresh()


# what is no model


def damage(folder: Path, kind: str) -> str:
    """-> what the error says."""
    weights = folder / "model.safetensors"
    if kind == "cut":
        os.truncate(weights, weights.stat().st_size - 4)
        return "match its shape|cut off"
    if kind == "no weights":
        weights.unlink()
        return "has no model.safetensors"
    if kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        return "has no tokenizer.json"
    if kind == "another tokenizer":
        words = {f"w{i}": i for i in range(40_000)}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        return "they are not a pair"
    if kind == "no config":
        (folder / "config.json").unlink()
        return r"config\.json is missing"
    (folder / "config.json").write_text("[" * 100_000 if kind == "deep config" else '{"model_type": "other"}')
    return "cannot read|wanted 'bert'"


@pytest.mark.parametrize(
    "kind", ["cut", "no weights", "no tokenizer", "another tokenizer", "no config", "deep config", "other config"]
)
def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    with pytest.raises(ModelError, match=damage(mine, kind)):
        Predictor(mine)


def test_a_folder_without_a_head_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match="no classification head: train it first"):
        Predictor(base)


def test_an_agent_without_a_whole_model_is_told_from_a_wrong_folder(tmp_path: Path, agent: Agent) -> None:
    BlobStore(tmp_path / "new" / STORE_FOLDER)
    with pytest.raises(ModelError, match="holds no whole model yet"):
        Predictor(tmp_path / "new")
    largest = max(agent.store.folder.rglob("blobs/*/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 100)
    with pytest.raises(ModelError, match="gone or cut off"):
        Predictor(agent.folder)
    largest.unlink()
    with pytest.raises(ModelError, match="lacks 1 blobs of its model"):
        Predictor(agent.folder)


def test_where_no_graphs_are_known_the_error_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_graphs", lambda *arguments, **options: None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[train\]' to derive them once, or .* export"):
        Predictor(folder)


def test_weights_of_other_shapes_and_graphs_of_other_models_are_refused(
    folder: Path, base: Path, tmp_path: Path
) -> None:
    spec, weights = with_head(base, tmp_path)
    opened = source.Source(spec, weights, folder / "tokenizer.json", {})
    with pytest.raises(ModelError, match="has no graph 'embed'"):
        MappedNetwork(opened, GraphSet("other.family", {}, 128, {}), 1)
    good = network_of(Predictor(folder)).graph_set
    weights["classifier.bias"] = weights["classifier.weight"]
    with pytest.raises(ModelError, match=r"needs 'classifier.bias' of \(3,\), it has \(3, 128\)"):
        MappedNetwork(opened, good, 1)


def test_graphs_that_came_with_an_agents_model_are_used_if_they_fit(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = with_head(agent.base, agent.folder / ".made")
    path = find.find_graphs(spec, weights, cache_folder())
    assert path
    data = path.read_bytes()
    monkeypatch.setattr(find, "find_graphs", lambda *arguments, **options: None)
    agent.hold(2, graphs=agent.store.put(data), graphs_bytes=len(data))
    assert Predictor(agent.folder).metadata["model_version"] == "2"
    agent.hold(3, graphs=agent.store.put(b"damaged"), graphs_bytes=7)
    with pytest.raises(BadVersion, match="model 3: not a graph set") as refused:
        Predictor(agent.folder)
    assert refused.value.version == 3


# the command


def test_predict_takes_a_folder_and_says_which_version_answered(
    folder: Path, agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, version in ((folder, None), (agent.folder, 1)):
        assert main(["predict", str(model), "seven", "red", "--json"]) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["model_version"] for record in records] == [version] * 2
        assert set(records[0]["probabilities"]) == set(LABELS)


def test_predict_prints_a_line_for_each_text_and_nothing_that_moves_the_cursor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(folder), "a\nb", "c\rd\x1b]0;x\x07\x1b[2J", "\u202ered"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and all(c.isprintable() or c in "\n\t" for c in out)
    file = tmp_path / "texts.txt"
    file.write_bytes("caf\xe9 seven\n".encode("latin-1"))
    assert main(["predict", str(folder), "--file", str(file), "--encoding", "latin-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "caf\xe9 seven"
    assert main(["predict", str(folder), "--file", str(file), "--encoding", "nosuch"]) != 0
    assert "nosuch" in capsys.readouterr().err


def test_predict_leaves_out_rows_that_cannot_be_used_where_it_is_told_to(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "some.csv"
    data.write_text(f"text,label\nred,{LABELS[0]}\nseven,\n")
    assert main(["predict", str(folder), "--evaluate", str(data)]) != 0
    assert "--skip-bad-rows" in capsys.readouterr().err
    assert main(["predict", str(folder), "--evaluate", str(data), "--skip-bad-rows", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_examples"] == 1


def test_predict_says_where_it_did_not_read_all_of_a_text_and_reads_it_in_windows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_text = "seven red " * 400
    for flags, truncated, said in (([], True, "of which the rest did not count: 1"), (["--long", "window"], False, "")):
        assert main(["predict", str(folder), "seven", long_text, "--json", *flags]) == 0
        out, err = capsys.readouterr()
        short, found = (json.loads(line) for line in out.splitlines())
        assert (short["truncated"], short["windows"]) == (False, 1)
        assert (found["truncated"], found["windows"] > 1) == (truncated, not truncated)
        assert said in err and ("--long window" in err) == truncated


@pytest.mark.parametrize("flags", [[], ["--file", "-"]])
def test_predict_goes_on_with_the_newest_version_between_windows(
    agent: Agent, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(given: Any, encoding: str | None) -> Iterator[str]:
        assert given is sys.stdin.buffer
        yield "first"
        agent.hold(2)
        yield "second"
        (agent.folder / MANIFEST_FILE).write_bytes(b"damaged")
        yield "third"

    monkeypatch.setattr(commands, "PREDICT_TEXTS", 1)
    monkeypatch.setattr("edge_runtime.data.iter_texts", lines)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["predict", str(agent.folder), "--json", *flags]) == 0
    shown = capsys.readouterr()
    records = [json.loads(line) for line in shown.out.splitlines()]
    assert [(record["text"], record["model_version"]) for record in records] == [
        ("first", 1),
        ("second", 1),
        ("third", 2),
    ]
    assert "going on with model 2\n" in shown.err
    assert "going on with model 2, the newest cannot be used: " in shown.err


def test_every_error_of_opening_is_one_of_ours(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EdgeError, match=r"config\.json is missing"):
        Predictor(tmp_path / "empty")
