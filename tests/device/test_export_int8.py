"""int8 files: what plain onnxruntime makes of them, when one is refused, and that none needs torch or the onnx package."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edge_models import bert
from edge_runtime.cli import main
from edge_runtime.errors import StoreError
from edge_runtime.export import ExportReport, Int8Check, export_onnx
from edge_runtime.model import ModelSpec
from edge_runtime.model_folder import save_folder
from edge_runtime.predict import INPUTS, Predictor
from edge_runtime.weights import MappedTensor, read_safetensors
from tests.e2e.test_full_disk import small_disk
from tests.networks import bert_spec, write_random

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).parents[2]
CRASHING = ROOT / "tests/e2e/crashing.py"
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(80))]
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "[UNK]"},
    }
).encode()
CHANCE = random.Random(0)
TEXTS = [" ".join(CHANCE.choices(WORDS[2:], k=CHANCE.randint(1, 30))) for _ in range(200)]


def model(folder: Path, spec: ModelSpec, changes: Mapping[str, Array] | None = None) -> Path:
    """A model's folder with random weights; `changes` replaces some."""
    folder.mkdir()
    weights = write_random(folder / "raw", {t.name: t.shape for t in spec.tensors})
    for name, values in (changes or {}).items():
        values.astype("<f4").tofile(folder / name)
        weights[name] = MappedTensor(str(folder / name), 0, values.shape)
    (folder / "tokens").write_bytes(TOKENIZER)
    save_folder(folder / "model", spec, weights, folder / "tokens")
    return folder / "model"


def export(folder: Path, spec: ModelSpec, out: Path, **options: Any) -> ExportReport:
    weights = read_safetensors(folder / "model.safetensors")
    return export_onnx(spec, weights, TOKENIZER, out, samples=TEXTS, metadata={}, precision="int8", **options)


def logits(path: Path, ids: Array, mask: Array) -> Array:
    """By onnxruntime with its own settings, nothing of ours."""
    found: Array = onnxruntime.InferenceSession(str(path)).run(None, dict(zip(INPUTS, (ids, mask), strict=True)))[0]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Path]:
    spec = bert_spec()
    return spec, model(tmp_path_factory.mktemp("whole") / "m", spec)


def test_an_int8_file_runs_in_plain_onnxruntime_and_a_text_does_not_depend_on_its_neighbours(
    whole: tuple[ModelSpec, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = whole
    exact = Predictor(folder).predict(TEXTS)
    (tmp_path / "x.csv").write_text(
        "text,label\n" + "".join(f"{t},{p.label}\n" for t, p in zip(TEXTS, exact, strict=True))
    )
    files = {p: tmp_path / p for p in ("float32", "int8")}
    told = {}
    for precision, file in files.items():
        data = ["--data", str(tmp_path / "x.csv"), "--json"]
        assert main(["export", str(folder), "--out", str(file), "--precision", precision, *data]) == 0
        told[precision] = json.loads(capsys.readouterr().out)
    assert told["float32"]["int8"] is None
    assert told["int8"]["precision"] == "int8"
    assert told["int8"]["int8"]["accuracy_float32"] == 1.0
    assert told["int8"]["num_bytes"] < 0.35 * told["float32"]["num_bytes"]
    ids = np.random.default_rng(0).integers(0, 82, (4, 33))
    mask = (np.arange(33) < [[33], [20], [9], [1]]).astype(np.int64)
    wanted, got = (logits(files[p], ids, mask) for p in files)
    assert 1e-6 < np.abs(wanted - got).max() < 0.1 * np.abs(wanted).max()
    alone = np.concatenate([logits(files["int8"], ids[i : i + 1], mask[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(alone, got, atol=1e-5)
    kept = onnxruntime.InferenceSession(str(files["int8"])).get_modelmeta().custom_metadata_map
    one, other = (Predictor(file).metadata["weights_sha256"] for file in files.values())
    assert (kept["precision"], kept["opset"], one) == ("int8", "20", other)
    assert json.loads(kept["labels"]) == ["label 0", "label 1", "label 2"]


def test_weights_that_int8_spoils_give_the_float32_file_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A channel that is always 0 has weights of 10,000: float32 does not mind, in int8 all other weights round to 0."""
    spec = bert_spec()
    made = write_random(tmp_path / "raw", {t.name: t.shape for t in spec.tensors})
    changes = {}
    for name, tensor in made.items():
        array = np.array(tensor.array())
        if "intermediate.dense.weight" in name:
            array[:, 0] = 1e4
        elif "attention.output.LayerNorm" in name:
            array[0] = 0
        changes[name] = array
    folder, out = model(tmp_path / "m", spec, changes), tmp_path / "out.onnx"
    exact = Predictor(folder).predict(TEXTS)
    (tmp_path / "x.csv").write_text(
        "text,label\n" + "".join(f"{t},{p.label}\n" for t, p in zip(TEXTS, exact, strict=True))
    )
    assert (
        main(["export", str(folder), "--out", str(out), "--precision", "int8", "--data", str(tmp_path / "x.csv")]) == 0
    )
    assert "int8 loses too much, the file is float32" in capsys.readouterr().out
    assert Predictor(out).metadata["precision"] == "float32"
    assert [p.label for p in Predictor(out).predict(TEXTS)] == [p.label for p in exact]
    report = export(folder, spec, out)  # without labels
    assert report.precision == "float32"
    assert report.int8 is not None and report.int8.accuracy_int8 is None and report.int8.agreement < 0.99


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (Int8Check(1000, 0.9, 0.885, 0.88), True),
        (Int8Check(1000, 0.99, 0.885, 0.879), False),
        (Int8Check(1000, 0.9, 0.88, 0.9), True),
        (Int8Check(1000, 0.995), True),
        (Int8Check(1000, 0.994), False),
    ],
)
def test_half_a_point_of_accuracy_or_of_agreement_may_be_lost(check: Int8Check, passed: bool) -> None:
    assert check.passed is passed


def test_a_model_whose_blocks_were_pruned_differently_exports(tmp_path: Path) -> None:
    usual = bert_spec()
    spec = bert.describe(bert.with_widths(usual.config, [1, 2, 2], [40, 512, 7]), usual.labels, 40)
    folder = model(tmp_path / "m", spec)
    report = export(folder, spec, tmp_path / "x.onnx")
    exact = Predictor(folder).predict(TEXTS)
    found = Predictor(report.path).predict(TEXTS)
    assert report.precision == "int8"
    assert np.mean([a.label == b.label for a, b in zip(exact, found, strict=True)]) >= 0.995
    assert (
        max(abs(a.probabilities["label 0"] - b.probabilities["label 0"]) for a, b in zip(exact, found, strict=True))
        < 0.1
    )


CHILD = """
import sys
for name in ("torch", "onnx", "onnxscript", "onnx_ir"): sys.modules[name] = None
from edge_runtime.cli import main
sys.exit(main(["export", sys.argv[1], "--out", sys.argv[2], "--precision", "int8", "--json"]))
"""


def test_neither_torch_nor_onnx_is_needed(whole: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    _, folder = whole
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "a.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["compared_with"] == "its graphs"
    assert json.loads(done.stdout)["max_abs_diff"] < 1e-4


def test_a_full_disk_leaves_the_old_file(whole: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    spec, folder = whole
    with small_disk(tmp_path / "disk", "1M") as disk:
        (disk / "m.onnx").write_bytes(b"the version before")
        with pytest.raises(StoreError, match="no space left"):
            export(folder, spec, disk / "m.onnx")
        assert [p.name for p in disk.iterdir()] == ["m.onnx"]
        assert (disk / "m.onnx").read_bytes() == b"the version before"


def test_killed_at_a_write_the_old_file_or_the_new_one_is_there_and_the_next_export_leaves_nothing_else(
    whole: tuple[ModelSpec, Path], tmp_path: Path
) -> None:
    _, folder = whole
    out = tmp_path / "m[1].onnx"
    out.write_bytes(b"the version before")
    path = os.pathsep.join((str(ROOT), *filter(None, sys.path)))
    deaths = 0
    for crash_at in itertools.count(1, 3):
        export = ["edge_runtime.cli", "export", str(folder), "--out", str(out), "--precision", "int8"]
        command = [sys.executable, str(CRASHING), str(crash_at), *export]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        deaths += 1
        assert out.read_bytes() == b"the version before" or Predictor(out).predict(TEXTS[:3])
        assert len(list(tmp_path.iterdir())) <= 2, "what the kill before left is gone"
    assert deaths >= 4
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert Predictor(out).predict(TEXTS[:3])
