"""What the devices made of a round, for the rule that closes it: exact means, and the updates' adapters matrix by matrix.

One matrix and one device's adapter of it are in memory at a time. What a codec sent is unpacked to float32 on this disk
first, so that each matrix can be read by itself: 4 bytes for each trained value of each update, as long as the round closes.
numpy; no torch, no network, no ledger. Implements `methods.method.Collected`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_coordinator.aggregate import Partial, Update, mean_changes
from edge_coordinator.methods.method import Change
from edge_runtime.encoding import read_update
from edge_runtime.errors import StoreError, WireError
from edge_runtime.layout import MASKED, A, B, scale
from edge_runtime.masks import indices
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.prune_plan import kept_of
from edge_runtime.records import TrainSettings
from edge_runtime.weights import MappedTensor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]
    Places = tuple[Array | None, Array | None]


@dataclass(frozen=True)
class DeviceReport:
    """What a device's part in a round came to."""

    num_examples: int
    kept: bytes  # of a pruned model; empty: all
    seconds: float  # of its training, and of sending where its uplink is known
    first_loss: float
    last_loss: float


class CollectedRound:
    """A round that closes.

    Attributes:
        number: of the round.
        settings: those of the round's plans, with the run's seed.
        spec: the whole model.
        reports: what each device's part came to, in the order of their names.
        adapted: the matrices that have an adapter, in the model's order.
    """

    def __init__(
        self, number: int, settings: TrainSettings, spec: ModelSpec, reports: Mapping[str, DeviceReport], summed: Sequence[TensorSpec], partial: Partial,
        adapters: Mapping[str, MappedTensor], updates: Sequence[RawUpdate], mixed: Sequence[TensorSpec] = (),
    ) -> None:  # fmt: skip
        """Args: partial: sums over `summed`; adapters: the published A and B; updates: by device, in order; mixed: matrices of
        which each device trained what its own plan says.
        """
        self.number, self.settings, self.spec, self.reports = number, settings, spec, reports
        self.adapted = list(mixed) or [t for t in spec.tensors if t.name.removesuffix(".weight") + A in adapters]
        self._sizes = {t.name: t.size for t in spec.tensors}
        self._summed, self._partial, self._adapters, self._updates = summed, partial, adapters, updates

    def means(self) -> Iterator[Change]:
        """The mean delta of each tensor that was summed up; of masked entries as their matrix, zero elsewhere."""
        for change in mean_changes(self._summed, self._partial):
            yield self._scattered(change) if change.name.endswith(MASKED) else change

    def _scattered(self, change: Change) -> Change:
        import numpy as np

        name = change.name.removesuffix(MASKED) + ".weight"
        values = np.zeros(self._sizes[name])
        values[indices(self.settings.mask_seed, name, values.size, self.settings.mask_every)] = change.values
        return Change(name, values)

    def adapter(self, matrix: TensorSpec) -> tuple[Array, Array]:
        """The published A and B, float64."""
        a, b = (self._adapters[matrix.name.removesuffix(".weight") + end] for end in (A, B))
        return a.array().astype("<f8"), b.array().astype("<f8")

    def dense(self, matrix: TensorSpec) -> Sequence[DenseChange]:
        """What each device changed in a matrix."""
        stem = matrix.name.removesuffix(".weight")
        trained = [u for u in self._updates if not u.places.keys().isdisjoint((matrix.name, stem + A, stem + MASKED))]
        return [DenseChange(update.num_examples, update, matrix) for update in trained]

    def trained(self, matrix: TensorSpec) -> Sequence[TrainedAdapter]:
        """The adapters of a matrix by device."""
        stem = matrix.name.removesuffix(".weight")
        a, b = self._adapters[stem + A], self._adapters[stem + B]
        return [
            TrainedAdapter(
                u.device, u.num_examples, a, b, u.places[stem + A], u.places[stem + B], self._kept(u.device, matrix)
            )
            for u in self._updates
            if stem + A in u.places
        ]

    def _kept(self, device: str, matrix: TensorSpec) -> Places:
        """The rows and columns of a matrix that a device has kept."""
        kept = self.reports[device].kept
        if not kept:
            return None, None
        from edge_runtime.pruning import cut_rows

        return cut_rows(self.spec, kept_of(self.spec, kept), matrix)


@dataclass(frozen=True)
class RawUpdate:
    """A device's deltas as float32 on this disk, each by its name."""

    device: str
    num_examples: int
    places: Mapping[str, MappedTensor]
    settings: TrainSettings = field(default_factory=TrainSettings)  # of its plan, where they differ between devices


@dataclass(frozen=True)
class DenseChange:
    """What one device changed in one matrix, whether it trained it whole, some entries, or an adapter of its own."""

    num_examples: int
    update: RawUpdate
    matrix: TensorSpec

    def load(self) -> Array:
        """-> (outputs, inputs), float64; zero where it trained nothing."""
        import numpy as np

        places, settings, matrix = self.update.places, self.update.settings, self.matrix
        stem = matrix.name.removesuffix(".weight")
        if matrix.name in places:
            return places[matrix.name].array().astype("<f8").reshape(matrix.shape)
        if stem + A in places:
            from edge_runtime.training.adapters import random_a

            a, b = (places[stem + end].array().astype("<f8") for end in (A, B))
            product: Array = b @ (random_a(settings.seed, stem + A, *a.shape) + a)
            return scale(settings) * product
        dense = np.zeros(matrix.size)
        entries = places[stem + MASKED].array()
        dense[indices(settings.mask_seed, matrix.name, matrix.size, settings.mask_every)] = entries
        return dense.reshape(matrix.shape)


@dataclass(frozen=True)
class TrainedAdapter:
    """One device's adapter of one matrix: what it began from, cut to its rank and to what it has kept, and its deltas."""

    device: str
    num_examples: int
    start_a: MappedTensor
    start_b: MappedTensor
    delta_a: MappedTensor
    delta_b: MappedTensor
    places: Places = (None, None)

    @property
    def rank(self) -> int:
        """At most the published adapter's."""
        return self.delta_a.shape[0]

    def load(self) -> tuple[Array, Array]:
        """-> A (rank, inputs), B (outputs, rank), float64."""
        from edge_runtime.pruning import cut

        rows, columns = self.places
        a = cut(self.start_a.array()[: self.rank], None, columns).astype("<f8") + self.delta_a.array()
        b = cut(self.start_b.array()[:, : self.rank], rows, None).astype("<f8") + self.delta_b.array()
        return a, b


def unpack(update: Update, scratch: Path) -> RawUpdate:
    """An update's deltas by name; what is not float32 yet is written to `scratch`.

    Raises:
        StoreError: the update is not there any more as it was checked.
    """
    path = update.path
    if update.codec != "f32":
        path = scratch
        try:
            with path.open("wb") as file:
                for _, _, delta in read_update(update.path, update.layout, update.codec):
                    file.write(delta.astype("<f4", copy=False).tobytes())
        except (WireError, OSError) as error:
            raise StoreError(f"{update.path} cannot be unpacked: {error}") from None
    if path.stat().st_size != sum(t.num_bytes for t in update.layout):
        raise StoreError(f"{update.path} is damaged: the disk has lost bytes that were there")
    places, offset = {}, 0
    for tensor in update.layout:
        places[tensor.name] = MappedTensor(str(path), offset, tensor.shape)
        offset += tensor.num_bytes
    return RawUpdate(update.device, update.num_examples, places)
