"""Checkpoint folders from strangers: whatever the bytes, a ModelError or a checked result, and nothing outside read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_models import bert
from edge_runtime.errors import ModelError

CONFIG: dict[str, Any] = {
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "vocab_size": 5,
    "max_position_embeddings": 8,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
SPEC = bert.describe(CONFIG, ["a", "b"], 8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SHARED_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def weights_file() -> tuple[dict[str, Any], bytes]:
    """Header and data of a good safetensors file."""
    header, offset = {}, 0
    for t in SPEC.tensors:
        header[t.name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, offset + t.num_bytes]}
        offset += t.num_bytes
    return header, bytes(offset)


def safetensors(header: Any, data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


GOOD = safetensors(*weights_file())


def write(folder: Path, *, config: Any = CONFIG, **files: bytes) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in (files or {"model": GOOD}).items():
        (folder / f"{name}.safetensors").write_bytes(data)
    return folder


def opens_or_refuses(folder: Path) -> None:
    """What every test here asks for."""
    try:
        config, tensors = bert.open_folder(folder)
    except ModelError as error:
        assert len(str(error)) < 2000
        return
    labels = len(tensors["classifier.bias"].array()) if "classifier.bias" in tensors else 2
    spec = bert.describe(config, [str(i) for i in range(labels)], 8)
    assert {n: t.shape for n, t in tensors.items()}.items() <= {t.name: t.shape for t in spec.tensors}.items()
    for tensor in tensors.values():
        assert tensor.array().shape == tensor.shape


def test_the_good_folder_opens(tmp_path: Path) -> None:
    config, tensors = bert.open_folder(write(tmp_path))
    assert config == CONFIG
    assert list(tensors) == [t.name for t in SPEC.tensors]


@settings(deadline=None)
@given(st.sampled_from([*CONFIG, "model_type", "position_embedding_type", "is_decoder", "dim", "n_heads"]), JSON)
@example("hidden_size", 1 << 70)
@example("num_attention_heads", 0)
@example("layer_norm_eps", math.nan)
@example("layer_norm_eps", math.inf)
@example("hidden_act", ["gelu"])
@example("hidden_act", "x" * 10_000_000)
@example("model_type", {"a": []})
def test_any_value_in_a_config_gives_a_spec_or_a_short_model_error(key: str, value: Any) -> None:
    try:
        spec = bert.describe({**CONFIG, key: value}, ["a", "b"], 2)
    except ModelError as error:
        assert len(str(error)) < 500
        return
    assert bert.describe(spec.config, spec.labels, 2) == spec
    assert all(n > 0 for t in spec.tensors for n in t.shape)
    json.dumps(dict(spec.config), allow_nan=False)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(CONFIG)), JSON), JSON, JSON)
def test_any_config_labels_and_length_give_a_spec_or_a_model_error(config: Any, labels: Any, length: Any) -> None:
    try:
        bert.describe({**CONFIG, **config}, labels, length)
    except ModelError:
        return


@SHARED_FOLDER
@given(st.binary(max_size=200))
@example(b"")
@example(b"[]")
@example(b"null")
@example(b"[" * 200_000)
@example(b'{"hidden_size": ' + b"9" * 5000 + b"}")
@example(b"\xff\xfe{}")
def test_any_bytes_as_config_json_are_refused(tmp_path: Path, raw: bytes) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ModelError):
        bert.open_folder(tmp_path)


@SHARED_FOLDER
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_of_the_weights_never_give_another_shape(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(GOOD)
    for position, value in changes:
        damaged[position] = value
    opens_or_refuses(write(tmp_path, model=bytes(damaged)))


@SHARED_FOLDER
@given(st.integers(0, len(GOOD) - 1))
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelError):
        bert.open_folder(write(tmp_path, model=GOOD[:length]))


@SHARED_FOLDER
@given(st.sampled_from([t.name for t in SPEC.tensors]), st.sampled_from(["dtype", "shape", "data_offsets"]), JSON)
@example("classifier.weight", "shape", [1 << 32, 1 << 32])
@example("classifier.weight", "shape", [2, 4, 1 << 70, 0])
@example("classifier.weight", "shape", [2.0, 4.0])
@example("classifier.weight", "shape", [True, 8])
@example("classifier.weight", "data_offsets", [-32, 0])
@example("classifier.weight", "data_offsets", [1 << 70, (1 << 70) + 32])
@example("classifier.bias", "shape", [])
@example("classifier.bias", "shape", [0])
def test_any_value_in_the_weights_header_is_checked(tmp_path: Path, name: str, key: str, value: Any) -> None:
    header, data = weights_file()
    header[name][key] = value
    opens_or_refuses(write(tmp_path, model=safetensors(header, data)))


@SHARED_FOLDER
@given(JSON)
@example([])
@example({"embeddings.LayerNorm.bias": None})
@example({"__metadata__": 1})
def test_any_json_as_the_weights_header_is_checked(tmp_path: Path, header: Any) -> None:
    opens_or_refuses(write(tmp_path, model=safetensors(header, b"")))


def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for claim in (len(GOOD), 1 << 40, (1 << 64) - 1):
        with pytest.raises(ModelError, match="not a safetensors file"):
            bert.open_folder(write(tmp_path, model=struct.pack("<Q", claim) + GOOD[8:]))


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x\0.safetensors",
        "config.json",
        ".safetensors",
        7,
        None,
    ],
)
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "outside.safetensors").write_bytes(GOOD)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, part=GOOD)
    names = {t.name: "part.safetensors" for t in SPEC.tensors} | {"embeddings.LayerNorm.bias": shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="names of safetensors files beside it"):
        bert.open_folder(folder)


@SHARED_FOLDER
@given(JSON)
@example({"weight_map": {}})
@example({"weight_map": []})
@example({"weight_map": {"x": "missing.safetensors"}})
@example({"weight_map": {"x": "part.safetensors"}})
def test_any_json_as_the_index_is_refused(tmp_path: Path, index: Any) -> None:
    write(tmp_path, part=GOOD)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError):
        bert.open_folder(tmp_path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError):
        bert.open_folder(tmp_path)
