"""Tensors in files: what one writes the other reads, mapped and not copied, and like the safetensors library."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ModelError
from edge_runtime.weights import ITEM_BYTES, MappedTensor, read_safetensors, write_safetensors
from tests.samples import quickly

Array = np.ndarray[Any, np.dtype[Any]]


def stored(folder: Path, name: str, values: Array) -> MappedTensor:
    """A float32 array as a blob of its own."""
    path = folder / hashlib.sha256(name.encode()).hexdigest()
    path.write_bytes(values.astype("<f4").tobytes())
    return MappedTensor(str(path), 0, values.shape)


@quickly(60)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    random = np.random.default_rng(seed)
    shapes.pop("__metadata__", None)
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [(name, stored(tmp_path, name, array)) for name, array in arrays.items()])
    found = read_safetensors(path)
    assert list(found) == list(arrays)
    for name, tensor in found.items():
        assert tensor.shape == arrays[name].shape
        assert tensor.array().shape == arrays[name].shape
        assert tensor.array().tobytes() == arrays[name].tobytes()


def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_safetensors(ours, [(n, stored(tmp_path, n, a)) for n, a in arrays.items()])
    read = safetensors.load_file(ours)
    assert {n: a.tolist() for n, a in read.items()} == {n: a.tolist() for n, a in arrays.items()}
    safetensors.save_file(
        {**arrays, "half": np.array([1.5], np.float16), "long": np.array([7], np.int64)},
        theirs,
        metadata={"any": "thing"},
    )
    found = {name: tensor.array() for name, tensor in read_safetensors(theirs).items()}
    assert {n: a.tolist() for n, a in found.items()} == {
        **{n: a.tolist() for n, a in arrays.items()},
        "half": [1.5],
        "long": [7.0],
    }
    assert all(array.dtype == np.float32 for array in found.values())


@pytest.mark.parametrize(
    ("dtype", "raw"),
    [
        ("F32", np.array([-1.5, 0.0, 3e38], np.float32).tobytes()),
        ("F16", np.array([-1.5, 0.0, 65504], np.float16).tobytes()),
        ("BF16", np.array([0xBFC0, 0, 0x7F7F], "<u2").tobytes()),
        ("F64", np.array([-1.5, 0.0, 1e300], np.float64).tobytes()),
        ("I64", np.array([-3, 0, 1 << 40], np.int64).tobytes()),
        ("I32", np.array([-3, 0, 1 << 20], np.int32).tobytes()),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_every_dtype_is_handed_out_as_float32(tmp_path: Path, dtype: str, raw: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"pad" + raw)
    array = MappedTensor(str(path), 3, (3,), dtype).array()
    assert array.dtype == np.float32
    assert array[0] in (-1.5, -3.0)
    assert array[1] == 0.0
    assert array[2] > 60_000
    assert MappedTensor(str(path), 3, (3,), dtype).num_bytes == len(raw) == 3 * ITEM_BYTES[dtype]


def test_float32_is_mapped_and_not_copied_and_writing_to_it_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(8 << 20))
    tracemalloc.start()
    array = MappedTensor(str(path), 0, (2 << 20,)).array()
    array[5] = 1.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert path.read_bytes() == bytes(8 << 20)


def test_an_empty_tensor_needs_no_bytes_of_any_file() -> None:
    assert MappedTensor("/nowhere", 0, (0, 5)).array().shape == (0, 5)


def test_data_begins_at_a_multiple_of_8_bytes(tmp_path: Path) -> None:
    for name in ("a", "ab", "abc", "abcd", "ä"):
        path = tmp_path / "m"
        write_safetensors(path, [(name, stored(tmp_path, "x", np.array([1], np.float32)))])
        assert read_safetensors(path)[name].offset % 8 == 0


def test_writing_holds_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(bytes(4 << 20))
    tensors = [(f"t{i}", MappedTensor(str(blob), 0, (1 << 20,))) for i in range(12)]
    tracemalloc.start()
    write_safetensors(tmp_path / "m", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
    assert (tmp_path / "m").stat().st_size > 48 << 20


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_safetensors(path, [("a", stored(tmp_path, "a", np.array([1, 2], np.float32)))])
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError):
        write_safetensors(path, [("a", MappedTensor(str(tmp_path / "none"), 0, (2,)))])
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_safetensors(path, [("a", stored(tmp_path, "a", np.arange(4, dtype=np.float32)))])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="m"):
            read_safetensors(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelError, match="cannot read"):
            read_safetensors(path)


def test_a_header_longer_than_16_mib_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", (16 << 20) + 1))
        file.truncate(64 << 20)
    tracemalloc.start()
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_unknown_dtype_is_named_with_those_there_are(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(ModelError, match="'a' has dtype F8_E4M3, wanted one of F32, F16"):
        read_safetensors(tmp_path / "m")
