"""Int8 weights on a device's disk: near what they were made from, made once, private, bounded, anew when damaged."""

from __future__ import annotations

import os
import stat
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import ModelError, StoreError
from edge_runtime.graphs import quantized
from edge_runtime.graphs.quantized import INDEX, LEVELS, WEIGHTS, QuantizedTensors, quantize
from edge_runtime.model import EMBED, ModelSpec, TensorSpec
from edge_runtime.weights import MappedTensor, release_pages

Array = np.ndarray[Any, np.dtype[Any]]
BLOCKS, WIDTH, WIDE = 3, 5, 7


def spec_of() -> ModelSpec:
    """Blocks with two matrices and a vector."""
    tensors = [TensorSpec("embed", (9, WIDTH), EMBED)]
    for part in range(BLOCKS):
        shapes = {"up.weight": (WIDE, WIDTH), "up.bias": (WIDE,), "down.weight": (WIDTH, WIDE)}
        tensors += [TensorSpec(f"layer.{part}.{name}", shape, part) for name, shape in shapes.items()]
    tensors.append(TensorSpec("head", (2, WIDTH), BLOCKS))
    return ModelSpec("some.family", {}, ("no", "yes"), 8, BLOCKS, WIDTH, 1, WIDE, tuple(tensors))


SPEC = spec_of()


def store(folder: Path, values: Mapping[str, Array]) -> dict[str, MappedTensor]:
    """Tensors as one file each."""
    folder.mkdir(exist_ok=True)
    for name, array in values.items():
        (folder / name).write_bytes(array.astype("<f4").tobytes())
    return {name: MappedTensor(str(folder / name), 0, array.shape) for name, array in values.items()}


def values_of(seed: int = 0) -> dict[str, Array]:
    """Random values for every tensor."""
    random = np.random.default_rng(seed)
    return {t.name: random.standard_normal(t.shape).astype(np.float32) for t in SPEC.tensors}


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, MappedTensor]:
    return store(tmp_path / "model", values_of())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def folders(cache: Path) -> list[Path]:
    """The sets on disk."""
    return sorted((cache / "int8").iterdir())


def same(one: QuantizedTensors, other: QuantizedTensors, parts: range) -> bool:
    """Whether two sets hold the same bytes."""
    return all((array == other.feeds(part)[name]).all() for part in parts for name, array in one.feeds(part).items())


def test_every_weight_is_within_half_a_step_of_its_output(cache: Path, weights: dict[str, MappedTensor]) -> None:
    found = QuantizedTensors.open(cache, SPEC, weights, range(2))
    for part in range(2):
        feeds = found.feeds(part)
        assert set(feeds) == {f"{n}.weight:{kind}" for n in ("up", "down") for kind in ("q", "scale")}
        for name in ("up.weight", "down.weight"):
            weight = values_of()[f"layer.{part}.{name}"]
            integers, scale = feeds[f"{name}:q"], feeds[f"{name}:scale"]
            assert (integers.dtype, integers.shape) == (np.int8, weight.shape[::-1])
            assert (scale.dtype, scale.shape) == (np.float32, weight.shape[:1])
            assert (abs(integers.astype(int)).max(axis=0) == LEVELS).all()
            assert (abs(integers * scale - weight.T) <= 0.5001 * scale).all()
            assert integers.flags.c_contiguous


def test_it_is_made_once(cache: Path, weights: dict[str, MappedTensor], monkeypatch: pytest.MonkeyPatch) -> None:
    first = QuantizedTensors.open(cache, SPEC, weights, range(2))
    monkeypatch.setattr(quantized, "quantize", None)
    assert same(first, QuantizedTensors.open(cache, SPEC, weights, range(2)), range(2))


def test_its_name_changes_with_the_blocks_matrices_alone(cache: Path, tmp_path: Path) -> None:
    QuantizedTensors.open(cache, SPEC, store(tmp_path / "model", values_of()), range(2))
    for changed in ("embed", "head", "layer.2.up.weight", "layer.0.up.bias"):
        values = values_of()
        values[changed] = values[changed] + 1
        QuantizedTensors.open(cache, SPEC, store(tmp_path / "other", values), range(2))
        assert len(folders(cache)) == 1
    values["layer.1.down.weight"][-1, -1] += 1
    other = QuantizedTensors.open(cache, SPEC, store(tmp_path / "other", values), range(2))
    assert len(folders(cache)) == 2
    weight = values["layer.1.down.weight"]
    feeds = other.feeds(1)
    assert abs(feeds["down.weight:q"] * feeds["down.weight:scale"] - weight.T).max() < abs(weight).max() / LEVELS


def test_other_blocks_are_another_set(cache: Path, weights: dict[str, MappedTensor]) -> None:
    two = QuantizedTensors.open(cache, SPEC, weights, range(2))
    one = QuantizedTensors.open(cache, SPEC, weights, range(1))
    assert one.num_bytes < two.num_bytes
    assert same(one, two, range(1))
    with pytest.raises(KeyError):
        one.feeds(1)


def test_no_block_is_no_weight(cache: Path, weights: dict[str, MappedTensor]) -> None:
    assert QuantizedTensors.open(cache, SPEC, weights, range(0)).num_bytes == 0


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "gone", "empty"])
@pytest.mark.parametrize("name", [WEIGHTS, INDEX])
def test_a_damaged_set_is_made_anew(cache: Path, weights: dict[str, MappedTensor], name: str, damage: str) -> None:
    expected = QuantizedTensors.open(cache, SPEC, weights, range(2))
    contents = {part: {n: a.copy() for n, a in expected.feeds(part).items()} for part in range(2)}
    del expected
    path = folders(cache)[0] / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        flipped = bytes([*whole[:-9], whole[-9] ^ 4, *whole[-8:]])
        path.write_bytes({"flipped": flipped, "short": whole[:-1], "long": whole + b"x", "empty": b""}[damage])
    found = QuantizedTensors.open(cache, SPEC, weights, range(2))
    for part, feeds in contents.items():
        assert all((array == found.feeds(part)[n]).all() for n, array in feeds.items())
    assert path.read_bytes() == whole


@pytest.mark.parametrize("index", [b"[]", b"null", b'{"places": 3}', b"[" * 100_000])
def test_a_strange_index_is_a_damaged_one(cache: Path, weights: dict[str, MappedTensor], index: bytes) -> None:
    QuantizedTensors.open(cache, SPEC, weights, range(2))
    path = folders(cache)[0] / INDEX
    whole = path.read_bytes()
    path.write_bytes(index)
    QuantizedTensors.open(cache, SPEC, weights, range(2))
    assert path.read_bytes() == whole


def test_its_owner_alone_can_read_it(cache: Path, weights: dict[str, MappedTensor]) -> None:
    before = os.umask(0)
    try:
        QuantizedTensors.open(cache, SPEC, weights, range(2))
    finally:
        os.umask(before)
    (folder,) = folders(cache)
    assert {p.name for p in folder.iterdir()} == {WEIGHTS, INDEX}
    for path, mode in ((folder, 0o700), (folder.parent, 0o700), (folder / WEIGHTS, 0o600), (folder / INDEX, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_two_used_last_stay_and_an_open_one_keeps_working(cache: Path, tmp_path: Path) -> None:
    def opened(seed: int, now: float) -> tuple[QuantizedTensors, Path]:
        before = set((cache / "int8").glob("*"))
        found = QuantizedTensors.open(cache, SPEC, store(tmp_path / f"{seed}", values_of(seed)), range(2))
        new = {*folders(cache)} - before
        folder = new.pop() if new else made[seed][1]
        os.utime(folder, (now, now))
        return found, folder

    made: list[tuple[QuantizedTensors, Path]] = []
    made += [opened(0, 1.0)]
    made += [opened(1, 2.0)]
    opened(0, 3.0)
    made += [opened(2, 4.0)]
    assert folders(cache) == sorted([made[0][1], made[2][1]])
    assert made[1][0].feeds(1)["up.weight:q"].any()


def test_pages_that_were_let_go_come_back(cache: Path, weights: dict[str, MappedTensor]) -> None:
    found = QuantizedTensors.open(cache, SPEC, weights, range(2))
    before = found.feeds(1)["up.weight:q"].copy()
    release_pages(found.feeds(0)["up.weight:scale"])
    assert (found.feeds(1)["up.weight:q"] == before).all()


def test_making_it_holds_one_tensor_as_int8_and_some_rows(cache: Path, tmp_path: Path) -> None:
    shape = (3000, 2000)
    tensors = tuple(TensorSpec(f"layer.{part}.w", shape, part) for part in range(2))
    spec = ModelSpec("some.family", {}, ("no", "yes"), 8, 2, 2000, 1, 3000, tensors)
    (tmp_path / "w").write_bytes(np.random.default_rng(0).standard_normal(shape).astype("<f4").tobytes())
    weights = {t.name: MappedTensor(str(tmp_path / "w"), 0, shape) for t in tensors}
    tracemalloc.start()
    try:
        QuantizedTensors.open(cache, spec, weights, range(2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6_000_000 + 4 * 4 * quantized.CHUNK


def test_half_precision_and_odd_offsets_are_read(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float16)
    (tmp_path / "w").write_bytes(b"xxx" + weight.tobytes())
    integers, scale = quantize(MappedTensor(str(tmp_path / "w"), 3, (6, 4), "F16"))
    assert abs(integers * scale - weight.T).max() <= 0.51 * scale.max()


def test_many_rows_are_quantised_like_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = store(tmp_path, {"w": np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)})["w"]
    whole = quantize(tensor)
    monkeypatch.setattr(quantized, "CHUNK", 12)
    assert all((a == b).all() for a, b in zip(whole, quantize(tensor), strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-31])
def test_an_output_of_nothing_is_zero(tmp_path: Path, value: float) -> None:
    weight = np.full((2, 3), value, np.float32)
    weight[1] = [1, -2, 4]
    integers, scale = quantize(store(tmp_path, {"w": weight})["w"])
    assert integers.T.tolist() == [[0, 0, 0], [16, -32, 64]]
    assert scale.tolist() == [1 / LEVELS, 4 / LEVELS]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(cache: Path, tmp_path: Path, value: float) -> None:
    values = values_of()
    values["layer.0.up.weight"][3, 2] = value
    with pytest.raises(ModelError, match="not finite"):
        QuantizedTensors.open(cache, SPEC, store(tmp_path / "model", values), range(2))
    assert not list((cache / "int8").glob("*/*"))


def test_what_cannot_be_read_or_written_says_so(cache: Path, tmp_path: Path, weights: dict[str, MappedTensor]) -> None:
    cache.write_text("a file")
    with pytest.raises(StoreError):
        QuantizedTensors.open(cache, SPEC, weights, range(2))
    (tmp_path / "model" / "layer.1.up.weight").unlink()
    with pytest.raises(ModelError, match=r"layer\.1\.up\.weight"):
        QuantizedTensors.open(tmp_path / "other", SPEC, weights, range(2))
