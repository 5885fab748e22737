"""Codecs: what comes back is near what went in, right in the mean, and no bytes whatever break the decoder."""

from __future__ import annotations

import math
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edge_runtime.codecs import BLOCK, CODECS, DENSE_SIZE, SECTION, Codec, update_bytes
from edge_runtime.encoding import decode_section, encode_section, pack_file, read_update, rounding, write_update
from edge_runtime.errors import TrainingFailed, WireError
from edge_runtime.model import ModelSpec
from tests.samples import quickly, small_spec

Array = np.ndarray[Any, np.dtype[Any]]
SPEC = small_spec(2, 300)  # its matrices are larger than DENSE_SIZE and than a section
NAMES = st.sampled_from(sorted(CODECS))
FINITE = st.floats(-8, 8, width=32)
SECTIONS = npst.arrays(np.float32, st.integers(1, 400), elements=FINITE)


def near(codec: Codec, values: Array, found: Array) -> None:
    """Each value within the error that its codec may make."""
    if codec.bits == 32:
        assert np.array_equal(found, values)
    elif codec.bits == 16:
        assert (np.abs(found - values) <= np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)).all()
    else:
        most = (1 << (codec.bits - 1)) - 1
        for start in range(0, values.size, BLOCK):
            block = values[start : start + BLOCK].astype(np.float64)
            step = np.abs(block).max() / most * (1 + 2.0**-7) + 2.0**-133  # rounded up to 8 bits of mantissa
            assert np.abs(found[start : start + BLOCK] - block).max() <= step * (1 + 1e-6)


@quickly(200)
@given(values=SECTIONS, name=NAMES, seed=st.integers(0, 1 << 62))
def test_what_comes_back_is_within_the_codecs_error_and_has_the_promised_size(
    values: Array, name: str, seed: int
) -> None:
    codec = CODECS[name]
    data = encode_section(codec, values, rounding(seed))
    assert len(data) == codec.section_bytes(values.size)
    found = decode_section(codec, values.size, data)
    assert found.dtype == np.float32
    if codec.sparse:
        sent = np.flatnonzero(found)
        kept = codec.kept(values.size)
        assert sent.size <= kept
        smallest = np.sort(np.abs(values))[values.size - kept]
        assert (np.abs(values[sent]) >= smallest).all(), "what is sent is of the largest magnitudes"
        bound = np.abs(values).max() / 127 * (1 + 2.0**-7) + 2.0**-133
        assert (np.abs(found[sent] - values[sent]) <= bound * (1 + 1e-6)).all()
    else:
        near(codec, values, found)


@quickly(60)
@given(values=SECTIONS, name=NAMES, seed=st.integers(0, 1 << 62))
def test_the_same_seed_gives_the_same_bytes(values: Array, name: str, seed: int) -> None:
    codec = CODECS[name]
    assert encode_section(codec, values, rounding(seed)) == encode_section(codec, values, rounding(seed))


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_stochastic_rounding_is_right_in_the_mean(name: str, scale: float) -> None:
    """The mean of n roundings has a standard error of at most step / (2 sqrt(n)); five of them are allowed."""
    codec, times = CODECS[name], 4000
    values = (np.random.default_rng(5).normal(0, scale, BLOCK)).astype(np.float32)
    random = rounding(1)
    total = np.zeros(BLOCK)
    for _ in range(times):
        total += decode_section(codec, BLOCK, encode_section(codec, values, random))
    step = np.abs(values).max() / ((1 << (codec.bits - 1)) - 1) * (1 + 2.0**-7)
    assert np.abs(total / times - values).max() <= 5 * step / (2 * math.sqrt(times))


def test_top_k_sends_the_largest_and_leaves_the_rest() -> None:
    values = np.linspace(-1, 0.5, 1000, dtype=np.float32)
    found = decode_section(CODECS["topk10"], 1000, encode_section(CODECS["topk10"], values, rounding(0)))
    assert np.flatnonzero(found).tolist() == list(range(100))
    assert np.abs(found[:100] - values[:100]).max() <= 1.01 / 127


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("values", [[0.0], [0.0] * 130, [1e-45] * 3, [-8.0, 8.0] * 70, [1e-38, 1.0]])
def test_zeros_the_smallest_and_the_largest_values_pass(name: str, values: list[float]) -> None:
    array = np.array(values, np.float32)
    found = decode_section(CODECS[name], array.size, encode_section(CODECS[name], array, rounding(3)))
    assert np.abs(found).max() <= 8 * (1 + 2.0**-7)
    assert not found[array == 0].any()


# hostile bytes


@quickly(300)
@given(data=st.data(), name=NAMES, count=st.integers(1, 300))
def test_any_bytes_of_the_right_size_give_finite_values_or_are_refused(data: Any, name: str, count: int) -> None:
    size = CODECS[name].section_bytes(count)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    try:
        found = decode_section(CODECS[name], count, raw)
    except WireError as error:
        assert len(str(error)) < 200
    else:
        assert found.shape == (count,)
        assert np.isfinite(found).all()


@quickly(200)
@given(values=SECTIONS, name=NAMES, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_that_flips_is_refused_or_gives_finite_values(values: Array, name: str, place: float, bit: int) -> None:
    raw = bytearray(encode_section(CODECS[name], values, rounding(0)))
    raw[int(place * len(raw))] ^= 1 << bit
    try:
        found = decode_section(CODECS[name], values.size, bytes(raw))
    except WireError:
        return
    assert found.shape == values.shape
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("change", [-1, 1, -1000])
def test_a_section_of_another_size_is_refused(name: str, change: int) -> None:
    data = encode_section(CODECS[name], np.ones(200, np.float32), rounding(0))
    with pytest.raises(WireError, match="a section of"):
        decode_section(CODECS[name], 200, data[:change] if change < 0 else data + bytes(change))


# whole updates


def deltas(spec: ModelSpec, depth: int, seed: int = 0, scale: float = 0.01) -> dict[str, Array]:
    """A value for every trained tensor."""
    chance = np.random.default_rng(seed)
    return {t.name: chance.normal(0, scale, t.size).astype(np.float32) for t in spec.suffix(depth)}


def pieces(found: dict[str, Array], size: int) -> Iterator[tuple[str, Array]]:
    """Tensors cut into pieces, as a backend gives them."""
    for name, values in found.items():
        for start in range(0, values.size, size):
            yield name, values[start : start + size]


def written(path: Path, name: str, found: dict[str, Array], *, piece: int = 1 << 18, seed: int = 9) -> Path:
    """An update's file."""
    with path.open("wb") as file:
        write_update(file, name, {n: v.size for n, v in found.items()}, pieces(found, piece), seed)
    return path


def read(path: Path, name: str, depth: int, spec: ModelSpec = SPEC) -> dict[str, Array]:
    """Every tensor of an update."""
    found: dict[str, list[Array]] = {t.name: [] for t in spec.suffix(depth)}
    for tensor, start, values in read_update(path, spec.suffix(depth), name):
        assert start == sum(v.size for v in found[tensor.name])
        found[tensor.name].append(values)
    return {n: np.concatenate(v) for n, v in found.items()}


@pytest.mark.parametrize("name", sorted(CODECS))
def test_an_update_comes_back_tensor_for_tensor_with_and_without_zlib(tmp_path: Path, name: str) -> None:
    original = deltas(SPEC, 2)
    path = written(tmp_path / "update", name, original)
    assert path.stat().st_size == update_bytes(SPEC.suffix(2), name)
    found = read(path, name, 2)
    for tensor, values in original.items():
        codec = CODECS[name].of(values.size)
        if not codec.sparse:
            near(codec, values, found[tensor])
        else:
            assert 0.05 / codec.one_in < np.count_nonzero(found[tensor]) / values.size <= 1.01 / codec.one_in
    with (tmp_path / "packed").open("wb") as file:
        assert pack_file(path, file) == file.tell()
    again = read(tmp_path / "packed", name + "+zlib", 2)
    assert all(np.array_equal(again[n], found[n]) for n in found)


@quickly(10)
@given(name=NAMES, piece=st.integers(1000, 200_000))
def test_the_bytes_do_not_depend_on_how_tensors_are_cut_into_pieces(tmp_path: Path, name: str, piece: int) -> None:
    original = deltas(SPEC, 1)
    whole = written(tmp_path / "whole", name, original).read_bytes()
    assert written(tmp_path / "pieces", name, original, piece=piece).read_bytes() == whole


def test_float32_is_the_format_of_every_version_so_far(tmp_path: Path) -> None:
    original = deltas(SPEC, 2)
    assert written(tmp_path / "u", "f32", original).read_bytes() == b"".join(v.tobytes() for v in original.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_written(tmp_path: Path, bad: float) -> None:
    original = deltas(SPEC, 1)
    original["head.w"][3] = bad
    with pytest.raises(TrainingFailed, match=r"head\.w are not finite after training: lower the learning rate"):
        written(tmp_path / "u", "int8", original)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("change", [-1, 1, 70_000])
def test_an_update_that_is_cut_or_has_more_behind_it_is_refused(tmp_path: Path, name: str, change: int) -> None:
    path = written(tmp_path / "u", name, deltas(SPEC, 1))
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(WireError):
        read(path, name, 1)
    whole = zlib.compress(data)
    path.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    with pytest.raises(WireError):
        read(path, name + "+zlib", 1)


def test_a_zlib_bomb_costs_no_more_memory_than_a_section(tmp_path: Path) -> None:
    """100 KB that are 100 MiB of zeros: sound as far as the plan goes, too long at its end."""
    (tmp_path / "bomb").write_bytes(zlib.compress(bytes(100 << 20)))
    tracemalloc.start()
    with pytest.raises(WireError, match="more bytes than its plan"):
        for _ in read_update(tmp_path / "bomb", SPEC.suffix(2), "f16+zlib"):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


@quickly(60)
@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_zlib_stream_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "u").write_bytes(data)
    with pytest.raises(WireError):
        read(tmp_path / "u", "int8+zlib", 0)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_writing_and_reading_hold_some_sections_in_memory(tmp_path: Path, name: str) -> None:
    """A tensor of 16 MiB, in pieces of 1 MiB."""
    spec = small_spec(1, 2048)
    size = spec.suffix(1)[0].size
    assert size == 64 * SECTION > DENSE_SIZE

    def zeros() -> Iterator[tuple[str, Array]]:
        for tensor in spec.suffix(1):
            for start in range(0, tensor.size, 1 << 18):
                yield tensor.name, np.full(min(1 << 18, tensor.size - start), 0.5, np.float32)

    tracemalloc.start()
    with (tmp_path / "u").open("wb") as file:
        write_update(file, name, {t.name: t.size for t in spec.suffix(1)}, zeros(), 1)
    for _ in read_update(tmp_path / "u", spec.suffix(1), name):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 << 20
