"""The whole weights of a fleet's model version: with what its adapters add, W + scale * B A, as files that are mapped like any.

For what runs no adapters: blocks below those that a device trains, evaluation, export, prediction; the last three of what is left of
a pruned version. Made once below a cache
folder and found again; a few sets are kept. Not adapters of PEFT or of one device (`merging.py`, which adds up as this does).
Imports weights and the store; numpy inside functions, a mebibyte at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import StoreError
from edge_runtime.layout import A, B
from edge_runtime.model import ModelSpec
from edge_runtime.store import disk_errors, make_folder
from edge_runtime.weights import MappedTensor, read_safetensors

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

FOLDER = "merged"  # below the cache folder
KEEP = 4  # sets, the last used; and for each process its own last ones, which others must not delete
PIECE = 1 << 18  # values of a product in memory
TRIES = 20  # of making a set that others delete
_held: dict[
    Path, int
] = {}  # sets that this process may still open files of: their folders, locked, the last used at the end


def merged(
    spec: ModelSpec, weights: Mapping[str, MappedTensor], adapters: Mapping[str, MappedTensor], scale: float, cache: Path, *,
    below: int | None = None,
) -> dict[str, MappedTensor]:  # fmt: skip
    """The weights, those that have an adapter which adds something in files below `cache`.

    Args:
        weights, adapters: in files that are named by their content, such as blobs: the set is found again by these names.
        below: only of parts below this one; None: of all.

    Raises:
        StoreError: the disk is full or cannot be written.
    """
    pairs: dict[str, tuple[MappedTensor, MappedTensor]] = {}
    for tensor in spec.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem + A in adapters and (below is None or tensor.part < below) and _adds(adapters[stem + B]):
            pairs[tensor.name] = adapters[stem + A], adapters[stem + B]
    if not pairs:
        return dict(weights)
    folder = cache / FOLDER / _key(pairs, weights, scale)
    _held_or_made(folder, lambda: _make(folder, pairs, weights, scale))
    _evict(folder)
    places = {n: MappedTensor(str(folder / str(i)), 0, weights[n].shape) for i, n in enumerate(pairs)}
    return {**weights, **places}


def left(
    spec: ModelSpec, weights: Mapping[str, MappedTensor], kept: bytes, cache: Path
) -> tuple[ModelSpec, dict[str, MappedTensor]]:
    """What is left of a version: the smaller model, those of its tensors that are smaller in a file below `cache`.

    Args:
        weights: of the whole model, as `merged` gives them.
        kept: of a manifest; empty: all.

    Raises:
        WireError: that is not of this model; UsageError: it cannot be pruned; StoreError: as `merged`.
    """
    from edge_runtime.prune_plan import kept_of
    from edge_runtime.pruned_weights import write_pruned
    from edge_runtime.pruning import pruned_spec

    if not kept:
        return spec, dict(weights)
    chosen = kept_of(spec, kept)
    made_from = [kept.hex(), [[t.name, *_place(weights[t.name], 2)] for t in spec.tensors]]
    path = cache / FOLDER / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32] / "left.safetensors"
    with disk_errors(path):
        _held_or_made(path.parent, lambda: make_folder(path.parent))
    if not path.is_file():
        write_pruned(spec, chosen, weights, path)
    _evict(path.parent)
    return pruned_spec(spec, chosen), {**weights, **(read_safetensors(path) if path.is_file() else {})}


def pieces(weight: MappedTensor, a: MappedTensor, b: MappedTensor, scale: float) -> Iterator[Array]:
    """A matrix with its adapter, flat little-endian float32, some rows at a time: the sum is rounded once."""
    inputs, start = a.array().astype("<f8"), 0
    outputs, rows = b.array(), max(1, PIECE // a.shape[1])
    for piece in weight.pieces(rows * a.shape[1]):
        added = outputs[start : start + rows].astype("<f8") @ inputs
        start += rows
        yield (piece + scale * added.reshape(-1)).astype("<f4")


def _adds(b: MappedTensor) -> bool:
    return any(piece.any() for piece in b.pieces())


def _key(
    pairs: Mapping[str, tuple[MappedTensor, MappedTensor]], weights: Mapping[str, MappedTensor], scale: float
) -> str:
    made_from = [scale, [[name, _place(weights[name]), *map(_place, pair)] for name, pair in pairs.items()]]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def _place(tensor: MappedTensor, names: int = 1) -> list[object]:
    """What tells a tensor from others, by the last names of its path."""
    return [*Path(tensor.path).parts[-names:], tensor.offset, tensor.shape, tensor.dtype]


def _make(
    folder: Path, pairs: Mapping[str, tuple[MappedTensor, MappedTensor]], weights: Mapping[str, MappedTensor], scale: float
) -> None:  # fmt: skip
    """All files, in a folder that appears whole."""
    with disk_errors(folder):
        make_folder(folder.parent)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft."))
        try:
            for number, (name, pair) in enumerate(pairs.items()):
                with (draft / str(number)).open("wb") as file:
                    for piece in pieces(weights[name], *pair, scale):
                        file.write(piece.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            with contextlib.suppress(OSError):  # another process was faster
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _held_or_made(folder: Path, make: Callable[[], None]) -> None:
    for _ in range(TRIES):  # another process may delete it between
        if _hold(folder):
            return
        make()
    raise StoreError(f"{folder} cannot be made or opened: make its folder one that this user may write")


def _hold(folder: Path) -> bool:
    """Keep a set from being deleted by other processes, as long as it is among the last that this one used; -> whether it is there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not folder.is_dir() or os.fstat(descriptor).st_ino != folder.stat().st_ino:  # it was being deleted
        os.close(descriptor)
        return False
    if folder in _held:
        os.close(_held.pop(folder))
    _held[folder] = descriptor
    while len(_held) > KEEP:
        os.close(_held.pop(next(iter(_held))))
    return True


def _evict(used: Path) -> None:
    """Leave the sets that were last used and those that are held, and no draft that is older than they are."""
    with contextlib.suppress(OSError):  # others delete and make them meanwhile
        os.utime(used)
        sets = sorted(used.parent.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
        for folder in sets[KEEP:]:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a set that nobody holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
