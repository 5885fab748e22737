"""What a pruned model keeps: bits on the wire, smaller tensors, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_models import bert
from edge_runtime import pruning
from edge_runtime.errors import ModelError, WireError
from edge_runtime.model import ModelSpec
from edge_runtime.pruned_weights import write_pruned
from edge_runtime.pruning import Kept
from edge_runtime.weights import read_safetensors
from tests.networks import bert_spec, write_weights

SPEC = bert_spec(24, 4, 20, blocks=3)


@st.composite
def kepts(draw: st.DrawFn, spec: ModelSpec = SPEC) -> Kept:
    """Some groups of each block, at least one of each kind."""

    def mask(count: int) -> np.ndarray:
        found = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        found[draw(st.integers(0, count - 1))] = True
        return found

    widths = pruning.block_widths(spec)
    return Kept.of([mask(heads) for heads, _ in widths], [mask(wide) for _, wide in widths])


def test_a_full_model_is_the_model_itself() -> None:
    full = Kept.full(SPEC)
    assert pruning.block_widths(SPEC) == [(4, 20)] * 3
    assert pruning.pruned_spec(SPEC, full) == SPEC and full.sparsity(SPEC) == 0
    assert bert.describe(bert.with_widths(SPEC.config, [4] * 3, [20] * 3), SPEC.labels, 40) == SPEC
    assert all(pruning.cut_rows(SPEC, full, t) == (None, None) for t in SPEC.tensors)


@given(kepts())
def test_what_is_kept_travels_as_bytes_and_describes_a_model(kept: Kept) -> None:
    data = kept.encode()
    assert pruning.decode_kept(SPEC, data) == kept and len(data) == 3 * (1 + 3)
    spec = pruning.pruned_spec(SPEC, kept)
    assert pruning.block_widths(spec) == [(kept.num_heads(b), kept.num_channels(b)) for b in range(3)]
    assert bert.describe(spec.config, spec.labels, spec.max_length) == spec
    gone = sum(t.size for t in SPEC.tensors if t.is_adapted and t.part >= 0) - sum(
        t.size for t in spec.tensors if t.is_adapted and t.part >= 0
    )
    assert kept.sparsity(SPEC) == pytest.approx(gone / pruning.matrix_parameters(SPEC) if gone else 0)
    assert kept.within(Kept.full(SPEC)) and kept.within(kept)
    assert Kept.full(SPEC).within(kept) == (kept == Kept.full(SPEC))


@given(kepts())
def test_tensors_are_cut_to_the_smaller_model_and_expand_back_with_zeros(kept: Kept) -> None:
    spec = pruning.pruned_spec(SPEC, kept)
    for whole, smaller in zip(SPEC.tensors, spec.tensors, strict=True):
        values = 1 + np.arange(whole.size, dtype=np.float32).reshape(whole.shape)
        rows, columns = pruning.cut_rows(SPEC, kept, whole)
        part = pruning.cut(values, rows, columns)
        assert part.shape == smaller.shape
        back = pruning.expanded(part, whole.shape, rows, columns)
        assert np.array_equal(back[back != 0], part.reshape(-1)) and np.array_equal(back[back != 0], values[back != 0])


def test_cutting_twice_is_cutting_once() -> None:
    """What is kept of a pruned model counts that model's own groups."""
    once = Kept.of([np.array([1, 0, 1, 1], bool)] * 3, [np.arange(20) % 2 == 0] * 3)
    again = Kept.of([np.array([0, 1, 1], bool)] * 3, [np.arange(10) > 4] * 3)
    both = Kept.of([np.array([0, 0, 1, 1], bool)] * 3, [(np.arange(20) % 2 == 0) & (np.arange(20) > 9)] * 3)
    smaller = pruning.pruned_spec(SPEC, once)
    assert pruning.pruned_spec(smaller, again) == pruning.pruned_spec(SPEC, both)
    tensor = next(t for t in SPEC.tensors if t.name.endswith("1.output.dense.weight"))
    values = np.arange(tensor.size).reshape(tensor.shape)
    first = pruning.cut(values, *pruning.cut_rows(SPEC, once, tensor))
    place = next(t for t in smaller.tensors if t.name == tensor.name)
    second = pruning.cut(first, *pruning.cut_rows(smaller, again, place))
    assert np.array_equal(second, pruning.cut(values, *pruning.cut_rows(SPEC, both, tensor)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xf0\xff\xff\xf0" * 2, "have more heads"),
        (b"\xf0\xff\xff\xf0" * 3 + b"\0", "wanted 12"),
        (b"\xf8\xff\xff\xf0" * 3, "heads of block 0 beyond its 4"),
        (b"\xf0\xff\xff\xf0" * 2 + b"\xf0\xff\xff\xf1", "channels of block 2 beyond its 20"),
        (b"\xf0\xff\xff\xf0" + b"\0\xff\xff\xf0" * 2, "no heads of block 1"),
        (b"\xf0\0\0\0" * 3, "no channels of block 0"),
        (b"", "have more heads"),
    ],
)
def test_hostile_bytes_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        pruning.decode_kept(SPEC, data)


@pytest.mark.parametrize(
    "text", ["4,4", "4,4,0", "4,4,x", "4,4,-1", "4,4,4,", "", "4,4,9999", 4, None, "4," * 9999 + "4"]
)
def test_a_hostile_config_is_refused(text: object) -> None:
    with pytest.raises(ModelError, match="heads_by_block must be 3 numbers from 1 to 1024"):
        bert.describe({**SPEC.config, "heads_by_block": text}, SPEC.labels, 40)  # type: ignore[dict-item]


def test_the_smaller_tensors_are_one_file_and_the_others_stay(tmp_path: Path) -> None:
    weights = write_weights(SPEC, tmp_path / "weights.f32")
    full = np.ones(4, bool), np.ones(20, bool)
    kept = Kept.of([full[0], np.arange(4) > 1, full[0]], [full[1], np.arange(20) > 1, full[1]])
    found = write_pruned(SPEC, kept, weights, tmp_path / "pruned.safetensors")
    written = read_safetensors(tmp_path / "pruned.safetensors")
    changed = {name for name in found if found[name] != weights[name]}
    assert changed == set(written) and all(found[n] == written[n] for n in written)
    assert {n.split(".")[2] for n in changed} == {"1"} and len(changed) == 10
    for tensor in pruning.pruned_spec(SPEC, kept).tensors:
        assert found[tensor.name].array().shape == tensor.shape
    query = "encoder.layer.1.attention.self.query.weight"
    assert np.array_equal(found[query].array(), weights[query].array()[12:])
    down = "encoder.layer.1.output.dense.weight"
    assert np.array_equal(found[down].array(), weights[down].array()[:, 2:])


def test_a_pruned_network_is_the_whole_one_with_zeros(tmp_path: Path) -> None:
    """What is gone might as well have been zero: a head by its output columns, a channel by its own."""
    import torch

    weights = write_weights(SPEC, tmp_path / "weights.f32")
    kept = Kept.of([np.arange(4) > b for b in range(3)], [np.arange(20) % (b + 2) > 0 for b in range(3)])
    spec = pruning.pruned_spec(SPEC, kept)
    small = write_pruned(SPEC, kept, weights, tmp_path / "pruned.safetensors")
    whole = {n: torch.from_numpy(np.array(t.array())) for n, t in weights.items()}
    for tensor in SPEC.tensors:
        _, columns = pruning.cut_rows(SPEC, kept, tensor)
        if columns is not None:
            gone = np.setdiff1d(np.arange(tensor.shape[1]), columns)
            whole[tensor.name][:, gone] = 0
    ids = torch.arange(22).reshape(2, 11)
    mask = torch.ones(2, 11, dtype=torch.int64)
    with torch.no_grad():
        wanted = bert.build(SPEC, whole)(ids, mask)
        found = bert.build(spec, {n: torch.from_numpy(t.array()) for n, t in small.items()})(ids, mask)
    assert torch.allclose(found, wanted, atol=1e-6)
