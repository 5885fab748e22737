"""A model version: its architecture, labels, and the SHA-256 of every tensor. So a device fetches only what changed.

The manifest is itself a blob; a version is named by its number and the manifest's hash. Imports no numpy, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from edge_runtime.errors import ModelError, WireError
from edge_runtime.layout import A, B
from edge_runtime.model import EMBED, ModelSpec, TensorSpec, load_family
from edge_runtime.records import Count, KeptGroups, Name, Range, Sha256
from edge_runtime.store import BlobStore
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import MAX_MANIFEST_BYTES, pack, unpack_as

FORMAT = 1
MAX_TENSOR_BYTES = 8 << 30
MAX_GRAPHS_BYTES = 16 << 20
MAX_RANK = 1024  # of an adapter, as in a plan
Dimension = Annotated[int, Range(0, 1 << 40)]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the architecture with the hash of its float32 bytes."""

    name: Annotated[str, Range(1, 200)]
    shape: Annotated[tuple[Dimension, ...], Range(0, 8)]
    part: Annotated[int, Range(EMBED, 1000)]
    blob: Sha256

    @property
    def num_bytes(self) -> int:
        """Size of the blob."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """One model version. `spec` gives the architecture without the hashes."""

    format: Annotated[int, Range(FORMAT, FORMAT)]
    version: Count
    family: Name
    config_json: Annotated[str, Range(2, 16 << 10)]
    labels: Annotated[tuple[Annotated[str, Range(1, 200)], ...], Range(1, 4096)]
    max_length: Annotated[int, Range(2, 1 << 20)]
    num_blocks: Annotated[int, Range(1, 1000)]
    hidden: Annotated[int, Range(1, 1 << 20)]
    heads: Annotated[int, Range(1, 1 << 16)]
    feed_forward: Annotated[int, Range(1, 1 << 20)]
    tokenizer: Sha256
    tokenizer_bytes: Annotated[int, Range(1, 64 << 20)]
    tensors: Annotated[tuple[StoredTensor, ...], Range(1, 8192)]
    method: Annotated[str, Range(0, 64)] = ""
    parent: Annotated[bytes, Range(0, 32)] = b""
    graphs: Annotated[bytes, Range(0, 32)] = b""  # the graph set that devices without torch train with
    graphs_bytes: Annotated[int, Range(0, MAX_GRAPHS_BYTES)] = 0
    adapters: Annotated[tuple[StoredTensor, ...], Range(0, 8192)] = ()  # A and B of LoRA, for what devices train next
    adapter_scale: Annotated[float, Range(0, 1e6)] = 0.0  # the model's weights are those above + adapter_scale * B A
    kept: KeptGroups = b""  # of a pruned model, whose whole tensors are above; empty: all

    @property
    def spec(self) -> ModelSpec:
        """The architecture in names, shapes and numbers."""
        tensors = tuple(TensorSpec(t.name, t.shape, t.part) for t in self.tensors)
        shape = (self.num_blocks, self.hidden, self.heads, self.feed_forward)
        return ModelSpec(self.family, json.loads(self.config_json), self.labels, self.max_length, *shape, tensors)

    @property
    def trainable(self) -> tuple[TensorSpec, ...]:
        """All that an update may hold, in an order that every update keeps: the model's, adapters before the head."""
        adapters = tuple(TensorSpec(t.name, t.shape, t.part) for t in self.adapters)
        tensors = self.spec.tensors
        head = next(i for i, t in enumerate(tensors) if t.part == self.num_blocks)
        return tensors[:head] + adapters + tensors[head:]

    def blobs(self) -> dict[bytes, int]:
        """Every blob the version consists of, with its size: the tensors, the tokenizer and the graph set."""
        sizes = {t.blob: t.num_bytes for t in (*self.tensors, *self.adapters)}
        sizes[self.tokenizer] = self.tokenizer_bytes
        if self.graphs:
            sizes[self.graphs] = self.graphs_bytes
        return sizes

    def mapped(self, store: BlobStore) -> dict[str, MappedTensor]:
        """Where the tensors lie in a store that holds them, without what adapters add to them."""
        return {t.name: MappedTensor(str(store.path(t.blob)), 0, t.shape) for t in self.tensors}

    def mapped_adapters(self, store: BlobStore) -> dict[str, MappedTensor]:
        """Where A and B lie, by name."""
        return {t.name: MappedTensor(str(store.path(t.blob)), 0, t.shape) for t in self.adapters}


def make_manifest(
    spec: ModelSpec,
    blobs: Mapping[str, bytes],
    tokenizer: bytes,
    tokenizer_bytes: int,
    *,
    version: int,
    method: str = "",
    parent: bytes = b"",
    graphs: bytes = b"",
    graphs_bytes: int = 0,
) -> Manifest:
    """The manifest of `spec` whose tensors have the hashes `blobs`."""
    return Manifest(
        format=FORMAT,
        version=version,
        family=spec.family,
        config_json=json.dumps(dict(spec.config), sort_keys=True),
        labels=spec.labels,
        max_length=spec.max_length,
        num_blocks=spec.num_blocks,
        hidden=spec.hidden,
        heads=spec.heads,
        feed_forward=spec.feed_forward,
        tokenizer=tokenizer,
        tokenizer_bytes=tokenizer_bytes,
        tensors=tuple(StoredTensor(t.name, t.shape, t.part, blobs[t.name]) for t in spec.tensors),
        method=method,
        parent=parent,
        graphs=graphs,
        graphs_bytes=graphs_bytes,
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's bytes: the same value gives the same bytes.

    Raises:
        ModelError: no device would accept it.
    """
    data = pack(manifest)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ModelError(
            f"the model's manifest has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}: fewer labels or tensors"
        )
    try:
        decode_manifest(data)
    except WireError as error:  # rather here than on every device
        raise ModelError(f"this model cannot be described to devices: {error}") from None
    return data


def decode_manifest(data: bytes) -> Manifest:
    """Read and check a manifest.

    Raises:
        WireError: it is damaged or does not hold together.
    """
    manifest: Manifest = unpack_as(Manifest, data, MAX_MANIFEST_BYTES)
    try:
        config = json.loads(manifest.config_json)
    except (ValueError, RecursionError):
        raise WireError("the manifest's config is not JSON") from None
    if not isinstance(config, dict) or not all(type(v) in (int, float, str, bool) for v in config.values()):
        raise WireError("the manifest's config must be a flat map of numbers and texts")
    if any(isinstance(v, float) and not math.isfinite(v) for v in config.values()):
        raise WireError("the manifest's config has a number that is not finite")
    names = [t.name for t in (*manifest.tensors, *manifest.adapters)]
    if len(set(names)) != len(names) or len(set(manifest.labels)) != len(manifest.labels):
        raise WireError("the manifest names a tensor or a label twice")
    parts = {t.part for t in manifest.tensors}
    if not set(range(manifest.num_blocks + 1)) <= parts or max(parts) > manifest.num_blocks:
        raise WireError("the manifest's tensors do not cover its blocks and head")
    if any(t.num_bytes > MAX_TENSOR_BYTES for t in manifest.tensors):
        raise WireError("a tensor of the manifest is absurdly large")
    _check_adapters(manifest)
    sizes: dict[bytes, int] = {manifest.tokenizer: manifest.tokenizer_bytes}
    if manifest.graphs and (len(manifest.graphs) != 32 or not manifest.graphs_bytes):
        raise WireError("the manifest's graph set has no proper hash or size")
    if manifest.graphs and sizes.setdefault(manifest.graphs, manifest.graphs_bytes) != manifest.graphs_bytes:
        raise WireError("the manifest gives one blob two sizes")
    for t in (*manifest.tensors, *manifest.adapters):
        if sizes.setdefault(t.blob, t.num_bytes) != t.num_bytes:
            raise WireError("the manifest gives one blob two sizes")
    return manifest


def _check_adapters(manifest: Manifest) -> None:
    """Whether the adapters are pairs of A (rank, inputs) and B (outputs, rank), in the order of their matrices."""
    blocks = (t for t in manifest.tensors if 0 <= t.part < manifest.num_blocks)
    matrices = {t.name.removesuffix(".weight"): t for t in blocks if len(t.shape) == 2 and t.name.endswith(".weight")}
    stems = [t.name.removesuffix(A) for t in manifest.adapters[::2]]
    order = [stem for stem in matrices if stem in set(stems)]
    if stems != order or len(manifest.adapters) != 2 * len(stems):
        raise WireError("the manifest's adapters are not those of its matrices, in their order")
    for stem, a, b in zip(stems, manifest.adapters[::2], manifest.adapters[1::2], strict=True):
        matrix, rank = matrices[stem], a.shape[0] if a.shape else 0
        fits = (a.shape, b.shape) == ((rank, matrix.shape[1]), (matrix.shape[0], rank)) and 1 <= rank <= MAX_RANK
        if (a.name, b.name) != (stem + A, stem + B) or {a.part, b.part} != {matrix.part} or not fits:
            raise WireError(f"the manifest's adapter of {stem} does not fit its matrix")
    if bool(manifest.adapters) != (manifest.adapter_scale > 0):
        raise WireError("the manifest has adapters without a scale, or a scale without adapters")


def check_family(manifest: Manifest, allowed: tuple[str, ...]) -> ModelSpec:
    """The spec, if this device knows the family and the family describes the same tensors.

    The family's name comes from the network and names a module to import, so only those in `allowed` are.

    Raises:
        ModelError: the family is not allowed here, or it describes another network.
    """
    if manifest.family not in allowed:
        raise ModelError(
            f"the fleet's model is of family {manifest.family!r}, this device allows {', '.join(allowed)}: see --family"
        )
    spec = manifest.spec
    described = load_family(manifest.family).describe(spec.config, spec.labels, spec.max_length)
    if described != spec:
        raise ModelError(
            f"the fleet's model is not what {manifest.family} describes: update edge-runtime on this device or the coordinator"
        )
    return spec
