"""The exported file: what it computes, what it carries, what it does not say about this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edge_models import bert, hub
from edge_runtime.errors import ModelError, UsageError
from edge_runtime.export import ExportReport, export_onnx
from edge_runtime.model import ModelSpec
from edge_runtime.predict import FORMAT, Predictor, open_session, run_session
from edge_runtime.tokenize import Tokenizer, pad
from edge_runtime.weights import MappedTensor

SAMPLES = ["Who wrote Hamlet?", "", "How far is the moon from the earth? " * 20, "Where is Oslo?", "\0 x"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "where", "when", "is", "it"]
Array = np.ndarray[Any, Any]
Parts = tuple[ModelSpec, dict[str, MappedTensor], bytes]


def place(path: Path, arrays: dict[str, Array]) -> dict[str, MappedTensor]:
    """Arrays as one raw file of mapped tensors."""
    places, offset = {}, 0
    with path.open("wb") as file:
        for name, array in arrays.items():
            places[name] = MappedTensor(str(path), offset, array.shape)
            offset += file.write(np.ascontiguousarray(array, "<f4").tobytes())
    return places


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """MiniLM-L3 with a random head of three labels."""
    folder = hub.resolve("minilm-l3", print)
    config, tensors = bert.open_folder(folder)
    spec = bert.describe(config, ["person", "number", "Ort \u2713"], 64)
    rng = np.random.default_rng(0)
    head = {t.name: rng.normal(0, 0.3, t.shape) for t in spec.suffix(0)}
    tensors |= place(tmp_path_factory.mktemp("head") / "head.raw", head)
    return spec, tensors, (folder / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def exported(real: Parts, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    out = tmp_path_factory.mktemp("export") / "sub" / "model.onnx"
    spec, tensors, tokenizer = real
    metadata = {"model": "ab" * 32, "method": "legend"}
    return export_onnx(spec, tensors, tokenizer, out, samples=SAMPLES, metadata=metadata)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """One block with random weights and nine words."""
    config: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "relu"}
    config |= {"intermediate_size": 12, "max_position_embeddings": 4, "type_vocab_size": 0, "vocab_size": len(WORDS)}
    spec = bert.describe(config, ["yes", "no"], 4)
    rng = np.random.default_rng(0)
    arrays = {t.name: rng.normal(0, 0.5, t.shape) for t in spec.tensors}
    special = {w: {"id": w, "ids": [WORDS.index(w)], "tokens": [w]} for w in ("[CLS]", "[SEP]")}
    single: list[Any] = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    model = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "[UNK]"}
    post = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    post["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    raw = json.dumps({**tokenizer, "post_processor": post}).encode()
    return spec, place(tmp_path_factory.mktemp("tiny") / "weights.raw", arrays), raw


def values(parts: Parts) -> list[bytes]:
    """What the weights' hash is of."""
    spec, tensors, _ = parts
    return [
        json.dumps([t.name, list(t.shape)]).encode() + tensors[t.name].array().astype("<f4").tobytes()
        for t in spec.tensors
    ]


def torch_logits(parts: Parts, ids: Array, mask: Array) -> Array:
    spec, tensors, _ = parts
    model = bert.build(spec, {name: torch.from_numpy(tensor.array()) for name, tensor in tensors.items()})
    with torch.inference_mode():
        logits: Array = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return logits


def test_the_report_says_what_was_written_and_how_far_it_is_from_torch(exported: ExportReport) -> None:
    assert exported.num_bytes == exported.path.stat().st_size
    assert 0 < exported.max_abs_diff <= 1e-4
    assert exported.num_samples == len(SAMPLES)
    assert exported.seconds > 0
    assert [p.name for p in exported.path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 64), (2, 1), (3, 5), (17, 33), (2, 64)])
def test_any_batch_and_sequence_up_to_max_length_gives_torchs_logits(
    real: Parts, exported: ExportReport, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 30522, shape)
    mask = (np.arange(shape[1]) < rng.integers(0, shape[1] + 1, (shape[0], 1))).astype(np.int64)  # rows of no token too
    got = run_session(open_session(exported.path), ids, mask)
    assert np.abs(got - torch_logits(real, ids, mask)).max() <= 1e-4


def test_the_file_is_a_valid_onnx_model_that_carries_everything(real: Parts, exported: ExportReport) -> None:
    model = onnx.load(str(exported.path), load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert model.ir_version == 9
    inputs = [(i.name, i.type.tensor_type.elem_type) for i in model.graph.input]
    assert inputs == [("input_ids", onnx.TensorProto.INT64), ("attention_mask", onnx.TensorProto.INT64)]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert not any(i.external_data for i in model.graph.initializer)
    spec, _, tokenizer = real
    assert {p.key: p.value for p in model.metadata_props} == {
        "format": FORMAT,
        "family": "edge_models.bert",
        "labels": json.dumps(list(spec.labels)),
        "max_length": "64",
        "tokenizer": tokenizer.decode(),
        "model": "ab" * 32,
        "method": "legend",
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "weights_sha256": hashlib.sha256(b"".join(values(real))).hexdigest(),
        "precision": "float32",
        "opset": "20",
        "onnxruntime": ">=1.17",
    }


def test_the_file_says_nothing_about_the_exporting_machine(exported: ExportReport) -> None:
    model = onnx.load(str(exported.path))
    del model.metadata_props[:]  # ours: the tokenizer's words may look like anything
    noted = (*model.graph.node, *model.graph.initializer, *model.graph.value_info)
    assert not any(n.metadata_props or n.doc_string for n in noted)
    assert not model.functions
    del model.graph.initializer[:]
    text = model.SerializeToString()
    for trace in (b".py", b"site-packages", b"edge_models", b"/home", b"/root", b"/tmp", str(Path.cwd()).encode()):
        assert trace not in text


def test_exporting_prints_and_logs_nothing(tiny: Parts, tmp_path: Path) -> None:
    spec, tensors, tokenizer = tiny
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    code = f"""
from pathlib import Path
from edge_models import bert
from edge_runtime.export import export_onnx
from edge_runtime.weights import MappedTensor
spec = bert.describe({dict(spec.config)!r}, {spec.labels!r}, 4)
raw = Path({str(tmp_path)!r}, "tokenizer.json").read_bytes()
export_onnx(spec, {tensors!r}, raw, Path({str(tmp_path)!r}, "out.onnx"), samples=["who is it"], metadata={{}})
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    ids, mask = pad(Tokenizer.from_bytes(tokenizer, 4).encode_batch(["who is it", "where"]), 0)
    got = run_session(open_session(tmp_path / "out.onnx"), ids, mask)
    assert np.abs(got - torch_logits(tiny, ids, mask)).max() <= 1e-4
    assert Predictor(tmp_path / "out.onnx").predict(["who is it"])[0].label in spec.labels


def test_weights_that_are_not_finite_leave_no_file_and_keep_the_old_one(tiny: Parts, tmp_path: Path) -> None:
    spec, tensors, tokenizer = tiny
    broken = tensors | place(tmp_path / "head.raw", {"classifier.bias": np.array([np.nan, 0])})
    out = tmp_path / "model" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"the version before")
    with pytest.raises(ModelError, match="not finite"):
        export_onnx(spec, broken, tokenizer, out, samples=["who"], metadata={})
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]
    assert out.read_bytes() == b"the version before"


def test_a_file_that_does_not_agree_with_torch_is_not_written(tiny: Parts, tmp_path: Path) -> None:
    """Logits of about 1e6 differ by more than 1e-4 in float32 whoever computes them."""
    spec, tensors, tokenizer = tiny
    rng = np.random.default_rng(0)
    huge = tensors | place(tmp_path / "head.raw", {"classifier.weight": rng.normal(0, 1e7, (2, 8))})
    with pytest.raises(ModelError, match=r"differs from torch by .* nothing was written"):
        export_onnx(spec, huge, tokenizer, tmp_path / "out" / "model.onnx", samples=["who is it", "it"], metadata={})
    assert list((tmp_path / "out").iterdir()) == []


def test_parts_that_do_not_fit_together_are_refused_before_the_work(tiny: Parts, real: Parts, tmp_path: Path) -> None:
    spec, tensors, tokenizer = tiny
    out = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match="30522 tokens, the model 9"):
        export_onnx(spec, tensors, real[2], out, samples=["who"], metadata={})
    with pytest.raises(ModelError, match="tokenizer is damaged"):
        export_onnx(spec, tensors, tokenizer[:-9], out, samples=["who"], metadata={})
    missing = {n: t for n, t in tensors.items() if n != "classifier.bias"}
    with pytest.raises(ModelError, match=r"lacks 1 tensors, the first is 'classifier\.bias'"):
        export_onnx(spec, missing, tokenizer, out, samples=["who"], metadata={})
    with pytest.raises(ModelError, match=r"not a model family|cannot be imported"):
        export_onnx(dataclasses.replace(spec, family="json"), tensors, tokenizer, out, samples=["who"], metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("samples", "metadata", "told"),
    [
        ([], {}, "at least one sample"),
        ("who", {}, "a list"),
        (["who"], {"labels": "x"}, "'labels' is not"),
        (["who"], {"n": 1}, "'n' is not"),
    ],
)
def test_a_wrong_call_is_a_usage_error(tiny: Parts, tmp_path: Path, samples: Any, metadata: Any, told: str) -> None:
    spec, tensors, tokenizer = tiny
    with pytest.raises(UsageError, match=told):
        export_onnx(spec, tensors, tokenizer, tmp_path / "model.onnx", samples=samples, metadata=metadata)
