"""Opens a model wherever it lies: a checkpoint folder, an alias or hub id, or the model that an agent holds.

Hands out names, shapes and file locations; loads nothing. The family's module is imported by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError, UsageError
from edge_runtime.manifest import Manifest, check_family
from edge_runtime.model import ConfigValue, Family, ModelSpec, TensorSpec, load_family
from edge_runtime.model_folder import (
    BASE_KEY,
    CONFIG_FILE,
    DELTA_FILE,
    TOKENIZER_FILE,
    finish_folder,
    read_config,
    unchanged,
)
from edge_runtime.optional import require
from edge_runtime.store import BlobStore, atomic_writer
from edge_runtime.weights import MappedTensor, read_safetensors

DEFAULT_FAMILY = "edge_models.bert"
DEFAULT_MAX_LENGTH = 128
MIN_LENGTH = 3  # tokens: one of the text between the two that most tokenizers add
MAX_LENGTH = 1 << 17
MANIFEST_FILE = "model.msgpack"  # in an agent's folder: the manifest of the newest version it holds whole
STORE_FOLDER = "store"


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, before it is known which classes it is to tell apart."""

    folder: Path
    tokenizer: Path
    max_length: int
    labels: tuple[str, ...] | None  # of its own head; None without one
    family: str
    manifest: Manifest | None = None  # for an agent's folder: of the version that answers
    version: bytes = b""  # hash of that manifest


@dataclass(frozen=True)
class Source:
    """A model whose tensors are on this disk."""

    spec: ModelSpec
    weights: Mapping[str, MappedTensor]
    tokenizer: Path
    metadata: Mapping[str, str]  # where it comes from: model version, method
    base: Path | None = None  # the checkpoint folder that holds its whole model; None for an agent's, which changes
    graphs: Path | None = None  # the graph set that came with an agent's model


def find_checkpoint(
    reference: str,
    *,
    max_length: int | None = None,
    family: str = DEFAULT_FAMILY,
    new_head: bool = False,
    progress: Callable[[str], None],
) -> Checkpoint:
    """Find a model by folder, alias, hub id, or the folder of an agent.

    Args:
        new_head: forget the head that the checkpoint may have, for a task with other classes.

    Raises:
        UsageError: max_length is not one that the model has, or `family` is no family's module.
        ModelError: there is no such model, or it is damaged.
    """
    from edge_runtime.versions import answering, is_state_folder

    folder = resolve(reference, progress)
    if is_state_folder(folder):
        held = answering(folder)
        manifest = held.manifest
        tokenizer = BlobStore(folder / STORE_FOLDER).path(manifest.tokenizer)
        labels = None if new_head else manifest.labels
        length = _length(max_length, manifest.spec.config, manifest.max_length)
        return Checkpoint(folder, tokenizer, length, labels, manifest.family, manifest, held.blob)
    if (folder / STORE_FOLDER).is_dir() and not (folder / CONFIG_FILE).exists():
        raise ModelError(f"{folder} is of an agent that holds no whole model yet: let it fetch one")
    try:
        module = load_family(family)
    except ModelError as error:  # not the checkpoint's fault: somebody named this module
        raise UsageError(str(error)) from None
    config, weights, _ = _open_folder(module, folder)
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    tokenizer = folder / TOKENIZER_FILE
    if not tokenizer.exists():
        raise ModelError(
            f"{folder} has no tokenizer.json: save the tokenizer in the `tokenizers` format beside the model"
        )
    own_length = raw.get("edge_max_length") or min(
        DEFAULT_MAX_LENGTH, int(config.get("max_position_embeddings", DEFAULT_MAX_LENGTH))
    )
    length = _length(max_length, config, own_length)
    labels = None if new_head else _own_labels(raw, {name: t.shape for name, t in weights.items()})
    return Checkpoint(folder, tokenizer, length, labels, family)


def _length(asked: int | None, config: Mapping[str, ConfigValue], own_length: int) -> int:
    """The max_length that was asked for, if the model has so many positions, else its own."""
    longest = int(config.get("max_position_embeddings", MAX_LENGTH))
    if asked is not None and not MIN_LENGTH <= asked <= longest:
        raise UsageError(f"max_length must be from {MIN_LENGTH} to the model's {longest} positions, it is {asked}")
    return own_length if asked is None else asked


def open_source(checkpoint: Checkpoint, labels: Sequence[str] | None, scratch: Path) -> Source:
    """Where the checkpoint's tensors lie, with a head of zeros in `scratch` where it has none for these labels.

    A fleet's adapters are merged, and of a pruned version it is what is left, so that the weights are all of the model.

    Raises:
        ModelError: the checkpoint is damaged, or has no head and no labels are given.
    """
    labels = checkpoint.labels or labels
    if labels is None:
        raise ModelError(f"{checkpoint.folder} has no classification head: train it first, or give the labels")
    module = load_family(checkpoint.family)
    base = graphs = None
    if checkpoint.manifest is not None:
        spec = check_family(checkpoint.manifest, (checkpoint.family,))
        store = BlobStore(checkpoint.folder / STORE_FOLDER)
        if missing := [blob for blob in checkpoint.manifest.blobs() if not store.has(blob)]:
            raise ModelError(
                f"{checkpoint.folder} lacks {len(missing)} blobs of its model: let the agent fetch them again"
            )
        weights = _whole(checkpoint.manifest, store, scratch)
        metadata = {"model_version": str(checkpoint.manifest.version), "method": checkpoint.manifest.method}
        spec = module.describe(spec.config, labels, checkpoint.max_length)
        if checkpoint.manifest.kept:
            from edge_runtime.version_weights import left

            spec, weights = left(spec, weights, checkpoint.manifest.kept, scratch)
        graphs = store.path(checkpoint.manifest.graphs) if checkpoint.manifest.graphs else None
    else:
        config, weights, base = _open_folder(module, checkpoint.folder)
        metadata = {"model": checkpoint.folder.name}
        spec = module.describe(config, labels, checkpoint.max_length)
    for tensor in spec.suffix(0):
        if checkpoint.labels is None or tensor.name not in weights:
            weights[tensor.name] = zeros(scratch, tensor.shape)
    return Source(spec, weights, checkpoint.tokenizer, metadata, base, graphs)


def _whole(manifest: Manifest, store: BlobStore, scratch: Path) -> dict[str, MappedTensor]:
    """An agent's weights, with what the fleet's adapters add to them in files below `scratch`."""
    weights = manifest.mapped(store)
    if not manifest.adapters:
        return weights
    from edge_runtime.version_weights import merged

    return merged(manifest.spec, weights, manifest.mapped_adapters(store), manifest.adapter_scale, scratch)


def resolve(reference: str, progress: Callable[[str], None]) -> Path:
    """The folder of a reference, fetching it if it is an alias or a hub id."""
    if Path(reference).is_dir():
        return Path(reference).absolute()
    hub = require("edge_models.hub", extra="train")
    folder: Path = hub.resolve(reference, progress)
    return folder.absolute()


def zeros(scratch: Path, shape: tuple[int, ...]) -> MappedTensor:
    """A file of zeros: a new head says nothing about any class, and the features are not disturbed while it learns."""
    num_bytes = 4 * math.prod(shape)
    path = scratch / f"zeros-{num_bytes}"
    if not path.exists() or path.stat().st_size != num_bytes:
        with atomic_writer(path) as file:
            file.write(bytes(num_bytes))
    return MappedTensor(str(path), 0, shape)


def _own_labels(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    """The labels that a finetuned checkpoint's config.json names, if it has a head for just so many."""
    named = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(named, dict) or (len(named),) not in shapes.values() or "edge_family" not in config:
        return None
    ordered = [named.get(str(i)) for i in range(len(named))]
    return tuple(ordered) if all(isinstance(label, str) and label for label in ordered) else None  # type: ignore[arg-type]


def delta_base(source: Source, out: Path) -> Path:
    """The folder that a delta of `source`, written to `out`, refers to.

    Raises:
        UsageError: there is none, or it is `out`.
    """
    if source.base is None:
        raise UsageError("a delta of an agent's model would break with its next version: leave --delta away")
    if out.resolve() == source.base.resolve():
        raise UsageError(f"{out} holds the base that the delta refers to: name another folder, or leave --delta away")
    return source.base


def _open_folder(module: Family, folder: Path) -> tuple[dict[str, ConfigValue], dict[str, MappedTensor], Path]:
    """Config, tensors and base of a checkpoint folder: itself, or of a delta the folder that holds the other tensors."""
    finish_folder(folder)
    try:
        raw = json.loads(read_config(folder))
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or BASE_KEY not in raw:
        config, weights = module.open_folder(folder)  # which says what is wrong with config.json
        return config, dict(weights), folder
    named = raw[BASE_KEY]
    if not isinstance(named, dict) or not isinstance(named.get("folder"), str):
        raise ModelError(f"{folder}: {BASE_KEY} of its {CONFIG_FILE} is damaged: train the model again")
    base = Path(named["folder"])
    if not base.is_dir():
        raise ModelError(f"{folder} holds only what training changed of {base}, which is gone: put it back there")
    config, weights = module.open_folder(base)
    same_config = all(raw.get(key) == value for key, value in config.items())
    if not same_config or not unchanged(weights, named.get("files")):
        raise ModelError(
            f"{folder} holds only what training changed of {base}, which is another model now: put it back"
        )
    delta = read_safetensors(folder / DELTA_FILE)
    labels = _own_labels(raw, {name: t.shape for name, t in delta.items()})  # what is trained includes the head
    known = {t.name: t.shape for t in module.describe(config, labels, MIN_LENGTH).tensors} if labels else {}
    if strange := [name for name, tensor in delta.items() if tensor.shape != known.get(name)]:
        raise ModelError(f"{folder / DELTA_FILE} has {strange[0]!r}, which this model does not have in that shape")
    return config, {**weights, **delta}, base


def add_update(
    tensors: Sequence[TensorSpec], start: Callable[[TensorSpec], Any], update: Path, folder: Path
) -> dict[str, MappedTensor]:
    """What an update's float32 deltas make of their tensors, written as files below `folder`, one in memory at a time.

    Args:
        tensors: those of the update, in its order.
        start: the array that each was trained from.
    """
    result, offset = {}, 0
    for number, tensor in enumerate(tensors):
        delta = MappedTensor(str(update), offset, tensor.shape).array()
        path = folder / f"{number}.f32"
        (start(tensor) + delta).astype("<f4", copy=False).tofile(path)
        result[tensor.name] = MappedTensor(str(path), 0, tensor.shape)
        offset += delta.nbytes
    if offset != update.stat().st_size:
        raise ModelError(f"the update {update} has {update.stat().st_size} bytes, its plan {offset}")
    return result
