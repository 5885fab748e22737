"""A model version as one blob: what is described is what devices read, and families are imported only when allowed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_models import bert
from edge_runtime.errors import ModelError, WireError
from edge_runtime.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    StoredTensor,
    check_family,
    decode_manifest,
    encode_manifest,
    make_manifest,
)
from edge_runtime.model import ModelSpec, load_family
from edge_runtime.store import BlobStore
from tests.samples import BLOB, OTHER, quickly, small_manifest, small_spec, values

CONFIG: dict[str, int | float | str] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def described(spec: ModelSpec, **changes: Any) -> Manifest:
    """A manifest of `spec` with made-up hashes."""
    blobs = {t.name: hashlib.sha256(t.name.encode()).digest() for t in spec.tensors}
    return dataclasses.replace(make_manifest(spec, blobs, OTHER, 700, version=5, method="caff", parent=BLOB), **changes)


@pytest.fixture
def bert_spec() -> ModelSpec:
    return bert.describe(CONFIG, ["no", "yes"], 16)


def test_a_described_model_arrives_as_the_same_architecture(bert_spec: ModelSpec) -> None:
    for spec in (small_spec(), small_spec(7, 11), bert_spec):
        manifest = described(spec)
        data = encode_manifest(manifest)
        assert decode_manifest(data) == manifest
        assert decode_manifest(data).spec == spec
        assert encode_manifest(decode_manifest(data)) == data


def test_the_same_manifest_is_the_same_bytes_whatever_the_order_of_its_config() -> None:
    spec = small_spec()
    turned = dataclasses.replace(spec, config=dict(reversed(list(spec.config.items()))))
    assert encode_manifest(described(spec)) == encode_manifest(described(turned))


def test_blobs_are_the_tensors_and_the_tokenizer_with_their_sizes_each_once() -> None:
    manifest = small_manifest()
    sizes = manifest.blobs()
    assert sizes[manifest.tokenizer] == 700
    assert sizes[manifest.tensors[0].blob] == 4 * 5 * 3
    assert sizes[manifest.tensors[-1].blob] == 4, "a scalar"
    assert len(sizes) == len(manifest.tensors) + 1
    first, second, *rest = manifest.tensors
    shared = dataclasses.replace(
        manifest, tensors=(first, dataclasses.replace(second, blob=first.blob, shape=first.shape), *rest)
    )
    assert len(decode_manifest(encode_manifest(shared)).blobs()) == len(sizes) - 1


def test_tensors_lie_where_the_store_has_their_blobs(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    spec = small_spec()
    blobs = {t.name: store.put(bytes([i]) * t.num_bytes) for i, t in enumerate(spec.tensors)}
    manifest = make_manifest(spec, blobs, OTHER, 700, version=1)
    for i, (tensor, mapped) in enumerate(zip(spec.tensors, manifest.mapped(store).values(), strict=True)):
        assert mapped.array().tobytes() == bytes([i]) * tensor.num_bytes
        assert mapped.shape == tensor.shape


def test_a_bert_of_24_blocks_needs_below_64_kib() -> None:
    large = CONFIG | {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "vocab_size": 30522}
    data = encode_manifest(described(bert.describe(large, [f"label {i}" for i in range(50)], 16)))
    assert len(data) < 64 << 10
    assert decode_manifest(data).num_blocks == 24


def test_a_manifest_over_the_limit_is_not_written() -> None:
    labels = tuple(f"{i:0200}" for i in range(3000))
    with pytest.raises(ModelError, match=f"the limit is {MAX_MANIFEST_BYTES}: fewer labels or tensors"):
        encode_manifest(small_manifest(labels=labels))
    with pytest.raises(WireError, match="over the limit"):
        decode_manifest(bytes(MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize(
    "changes", [{"labels": ("a" * 201, "b")}, {"family": "f" * 65}, {"labels": ("a", "a")}, {"num_blocks": 9}]
)
def test_what_no_device_would_accept_is_refused_where_it_is_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="this model cannot be described to devices"):
        encode_manifest(small_manifest(**changes))


@quickly(60)
@given(data=st.data())
def test_a_manifest_that_holds_together_is_accepted_and_any_other_is_refused(data: st.DataObject) -> None:
    """The rules once more, in other words: against records that are within their bounds and otherwise random."""
    manifest: Manifest = data.draw(values(Manifest))
    tensors = data.draw(
        st.lists(values(StoredTensor).map(_small), min_size=1, max_size=6, unique_by=lambda t: (t.name, t.blob))
    )
    config = data.draw(st.sampled_from(['{"a": 1, "b": "x", "c": 0.5}', "{}", "[]", "x"]))
    manifest = dataclasses.replace(
        manifest, num_blocks=data.draw(st.integers(1, 2)), tensors=tuple(tensors), config_json=config,
        adapters=(), adapter_scale=0.0,
    )  # fmt: skip
    sound = (
        config.startswith("{")
        and len({t.name for t in tensors}) == len(tensors)
        and len(set(manifest.labels)) == len(manifest.labels)
        and {t.part for t in tensors} | {-1} == set(range(-1, manifest.num_blocks + 1))
        and manifest.tokenizer not in {t.blob for t in tensors}
    )
    if sound:
        assert decode_manifest(encode_manifest(manifest)) == manifest
    else:
        with pytest.raises(ModelError):
            encode_manifest(manifest)


def _small(tensor: StoredTensor) -> StoredTensor:
    return dataclasses.replace(tensor, shape=tuple(min(n, 9) for n in tensor.shape), part=tensor.part % 5 - 1)


# adapters


def adapted(spec: ModelSpec, *, rank: int = 2, **changes: Any) -> Manifest:
    """A manifest with adapters of some matrices, made-up hashes."""
    found = []
    for tensor in spec.tensors:
        if tensor.name.endswith(("query.weight", "intermediate.dense.weight")):
            (outputs, inputs), stem = tensor.shape, tensor.name.removesuffix(".weight")
            for name, shape in ((stem + ".lora_a", (rank, inputs)), (stem + ".lora_b", (outputs, rank))):
                blob = hashlib.sha256(name.encode()).digest()
                found.append(StoredTensor(name, shape, tensor.part, blob))
    return described(spec, **{"adapters": tuple(found), "adapter_scale": 2.0, **changes})


def test_adapters_are_blobs_of_the_version_and_not_of_the_architecture(bert_spec: ModelSpec) -> None:
    manifest, plain = adapted(bert_spec), described(bert_spec)
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert check_family(manifest, ("edge_models.bert",)) == manifest.spec == plain.spec
    fresh = set(manifest.blobs()) - set(plain.blobs())
    assert {manifest.blobs()[blob] for blob in fresh} == {4 * 2 * 8, 4 * 2 * 16}
    assert set(manifest.mapped_adapters(BlobStore(Path("nowhere")))) == {t.name for t in manifest.adapters}
    named = [t.name for t in manifest.trainable]
    assert named[: len(plain.tensors) - 2] == [t.name for t in plain.tensors[:-2]]
    assert named[-2:] == [t.name for t in bert_spec.suffix(0)], "the head is last, as in an update with adapters"


def test_adapters_that_are_not_pairs_of_the_models_matrices_are_refused(bert_spec: ModelSpec) -> None:
    sound = adapted(bert_spec)
    a, b, *rest = sound.adapters
    for adapters in (
        (b, a, *rest),
        (a, *rest),
        (*rest, a, b),
        (a, b, a, b, *rest),
        (dataclasses.replace(a, name="encoder.layer.0.attention.self.LayerNorm.lora_a"), b, *rest),
        (dataclasses.replace(a, part=1), b, *rest),
        (dataclasses.replace(a, shape=(3, 8)), b, *rest),
        (dataclasses.replace(a, shape=(2, 9)), b, *rest),
        (dataclasses.replace(a, shape=()), b, *rest),
        (dataclasses.replace(a, shape=(0, 8)), dataclasses.replace(b, shape=(8, 0)), *rest),
        (dataclasses.replace(a, shape=(1025, 8)), dataclasses.replace(b, shape=(8, 1025)), *rest),
    ):
        with pytest.raises(ModelError, match="cannot be described to devices"):
            encode_manifest(dataclasses.replace(sound, adapters=adapters))
    for changes in ({"adapters": ()}, {"adapter_scale": 0.0}):
        with pytest.raises(ModelError, match="adapters without a scale, or a scale without adapters"):
            encode_manifest(dataclasses.replace(sound, **changes))


# families


def test_a_model_of_an_allowed_family_is_taken_when_the_family_describes_it_so(bert_spec: ModelSpec) -> None:
    assert check_family(described(bert_spec), ("other", "edge_models.bert")) == bert_spec
    blocks = bert_spec.num_blocks
    config = bert.with_widths(bert_spec.config, [1] * blocks, range(2, 2 + blocks))
    pruned = bert.describe(config, bert_spec.labels, bert_spec.max_length)
    assert check_family(described(pruned), ("edge_models.bert",)) == pruned != bert_spec


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 33},
        {"hidden": 9},
        {"heads": 1},
        {"labels": ("no", "yes", "perhaps")},
        {"config_json": json.dumps(CONFIG | {"num_hidden_layers": 3})},
        {"config_json": json.dumps(CONFIG | {"hidden_size": 1 << 40})},
        {"config_json": json.dumps(CONFIG | {"hidden_act": "\ud800"})},
        {"config_json": json.dumps(CONFIG | {"vocab_size": True})},
        {"config_json": "{}"},
    ],
)
def test_a_manifest_that_its_family_does_not_describe_is_refused(bert_spec: ModelSpec, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        check_family(described(bert_spec, **changes), ("edge_models.bert",))


def test_a_tensor_that_is_renamed_reshaped_moved_or_missing_is_refused(bert_spec: ModelSpec) -> None:
    manifest = described(bert_spec)
    first, *rest = manifest.tensors
    for tensors in (
        (dataclasses.replace(first, name="other"), *rest),
        (dataclasses.replace(first, shape=(*first.shape, 1)), *rest),
        (dataclasses.replace(first, part=0), *rest),
        (*rest, first),
        tuple(rest),
    ):
        with pytest.raises(ModelError, match="the fleet's model is not what edge_models.bert describes"):
            check_family(dataclasses.replace(manifest, tensors=tensors), ("edge_models.bert",))


def test_a_family_that_is_not_allowed_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name comes over the network."""
    (tmp_path / "evil_family.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for family in ("evil_family", "os", "antigravity"):
        with pytest.raises(ModelError, match="this device allows edge_models.bert"):
            check_family(small_manifest(family=family), ("edge_models.bert",))
    assert not (tmp_path / "was-here").exists()
    assert "antigravity" not in sys.modules


def test_a_module_that_is_no_family_or_not_there_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'json' is not a model family: it has no describe, open_folder, build"):
        load_family("json")
    for name in ("no_such_module", "edge_models.none"):
        with pytest.raises(ModelError, match="install it or correct the name"):
            load_family(name)


@pytest.mark.parametrize("name", ["", ".", "..bert", ".bert", "a..b", "a/b", "é\0"])
def test_a_name_that_no_module_can_have_is_refused_too(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be imported"):
        load_family(name)
