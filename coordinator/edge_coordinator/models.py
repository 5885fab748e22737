"""Model versions: importing the first one, publishing the next, exporting any. Names, shapes and bytes; no torch.

Tensors of published versions are blobs in `store/`, which any device of the fleet may fetch; updates are kept apart in
`updates/`, and the server optimizer's states in `optimizer/`, which no device can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_coordinator.aggregate import Partial, Update, apply, fold
from edge_coordinator.collected import CollectedRound, DeviceReport, unpack
from edge_coordinator.config import ModelSection
from edge_coordinator.ledger import Contribution, Ledger, ModelRow, read_join
from edge_coordinator.methods.method import Change, Method, Stage
from edge_coordinator.server_optimizer import ServerOptimizer, ServerSettings
from edge_coordinator.start_version import Primer, begin, has_adapters
from edge_runtime import prune_plan
from edge_runtime.errors import ModelError, StoreError, UsageError, WireError
from edge_runtime.graphs.find import find_graphs
from edge_runtime.kinds import FRESH
from edge_runtime.layout import A, masked_tensors, targets
from edge_runtime.manifest import Manifest, StoredTensor, decode_manifest, encode_manifest, make_manifest
from edge_runtime.model import TensorSpec
from edge_runtime.model_folder import save_folder
from edge_runtime.peft import Adapter, fingerprint, write_adapter
from edge_runtime.records import Plan, TrainSettings
from edge_runtime.source import Source, find_checkpoint, open_source
from edge_runtime.store import BlobStore, cache_folder
from edge_runtime.version_weights import left, merged
from edge_runtime.wire import unpack_as

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

KEEP_VERSIONS = 3  # besides the first and the run's start; others keep their row in the ledger and lose their tensors
FOLD_AT = 8  # committed updates that are summed up into one partial, so that disk use stays bounded


class Models:
    """The versions of one fleet."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.ledger = ledger
        self.store = BlobStore(folder / "store")
        self.updates = BlobStore(folder / "updates")
        self.states = BlobStore(folder / "optimizer")  # of the server optimizer; no device can read these either

    def import_first(self, section: ModelSection, now: float, progress: Callable[[str], None]) -> Manifest:
        """Version 1: the base checkpoint with a head for the fleet's labels, cut into blobs."""
        checkpoint = find_checkpoint(
            section.base, max_length=section.max_length, family=section.family, progress=progress
        )
        if checkpoint.labels and tuple(checkpoint.labels) != section.labels:
            raise UsageError(
                f"{section.base} has a head for {len(checkpoint.labels)} other labels than fleet.toml names: make them the same"
            )
        source = open_source(checkpoint, section.labels, self.store.folder)
        blobs = {}
        for tensor in source.spec.tensors:
            array = source.weights[tensor.name].array()
            blobs[tensor.name] = self.store.put(array.astype("<f4", copy=False).tobytes())
        tokenizer = source.tokenizer.read_bytes()
        graphs = self._graphs(source, progress)
        manifest = make_manifest(
            source.spec,
            blobs,
            self.store.put(tokenizer),
            len(tokenizer),
            version=1,
            graphs=self.store.put(graphs) if graphs else b"",
            graphs_bytes=len(graphs),
        )
        blob = self.store.put(encode_manifest(manifest))
        with self.ledger.transaction():
            self.ledger.add_model(1, blob, "", 0, {"base": section.base}, now)
        return manifest

    def _graphs(self, source: Source, progress: Callable[[str], None]) -> bytes:
        """The graph set that devices without torch train with; none where it is not bundled and cannot be derived."""
        path = find_graphs(source.spec, source.weights, cache_folder(), progress=progress)
        if path is None:
            progress("this model has no training graphs here: devices need torch to train it")
            return b""
        return path.read_bytes()

    def newest(self) -> tuple[Manifest, bytes] | None:
        """-> (manifest, its hash) of the published version.

        Raises:
            StoreError: its manifest is gone or damaged.
        """
        row = self.ledger.newest_model()
        return (self.manifest(row), row.manifest) if row else None

    def manifest(self, row: ModelRow) -> Manifest:
        """Read a version's manifest from the store.

        Raises:
            ModelError: the version is no longer kept; StoreError: it is, and its manifest is gone or damaged.
        """
        if row not in self._kept():
            raise ModelError(
                f"the tensors of model {row.version} are no longer kept: "
                f"those of the newest {KEEP_VERSIONS} versions, of the first, and of the one that the run began with are"
            )
        path = self.store.path(row.manifest)
        try:
            return decode_manifest(path.read_bytes())
        except FileNotFoundError:
            raise _damaged(row.version, f"its manifest {path} is missing") from None
        except WireError as error:
            raise _damaged(row.version, f"its manifest {path} cannot be read ({error})") from None

    def check(self, manifest: Manifest) -> None:
        """Whether every blob of a version is there in its length.

        Raises:
            StoreError: one is not; names the first.
        """
        wrong = []
        for blob, num_bytes in manifest.blobs().items():
            path = self.store.path(blob)
            if not path.exists():
                wrong.append(f"{path} is missing")
            elif path.stat().st_size != num_bytes:
                wrong.append(f"{path} has {path.stat().st_size} bytes and should have {num_bytes}")
        if wrong:
            more = f" and {len(wrong) - 1} more files are wrong" if len(wrong) > 1 else ""
            raise _damaged(manifest.version, wrong[0] + more)

    def fold(self, run: str, number: int, base: Manifest, committed: Mapping[str, Contribution]) -> Partial | None:
        """Add the committed updates that are not in the partial sum yet; the sum and who is in it in one transaction."""
        found = self.ledger.partial(run, number)
        old_blob = found[0] if found else None
        partial = Partial(self.updates.path(found[0]), found[1]) if found else None
        fresh = {device: c for device, c in committed.items() if not c.folded}
        if not fresh:
            return partial
        summed = _summed(base, self._settings(run, number, fresh))
        made = fold(summed, partial, self._updates(run, number, base, fresh), self._draft("close.sum"))
        blob = self.updates.adopt(made.path)
        with self.ledger.transaction():
            self.ledger.set_partial(run, number, blob, made.weights, list(fresh))
        for done in {c.blob for c in fresh.values()} | ({old_blob} if old_blob and old_blob != blob else set()):
            self.updates.delete(done)
        return Partial(self.updates.path(blob), made.weights)

    def optimizer(self, run: str, version: int, settings: ServerSettings) -> ServerOptimizer:
        """The server optimizer with its states of a model version: none of another optimizer or another run."""
        return ServerOptimizer(settings, self.ledger.optimizer_states(run, version, settings.name), self.states)

    def collect(
        self, run: str, number: int, base: Manifest, committed: Mapping[str, Contribution], method: Method, settings: TrainSettings
    ) -> CollectedRound:  # fmt: skip
        """What the devices made of a round, for the method: sums alone, or with the updates themselves.

        Updates that are kept stay on the disk until the round is in the ledger, so that this may be repeated.

        Args: settings: the run's; what counts is what the round's plans were made with, whatever fleet.toml says by now.
        """
        settings = replace(self._settings(run, number, committed), seed=settings.seed)
        adapters = base.mapped_adapters(self.store)
        if method.adapters == FRESH:
            return self._collect_mixed(run, number, base, committed, settings)
        summed = _summed(base, settings)
        if not method.keeps_updates:
            partial = self.fold(run, number, base, committed)
            assert partial is not None, "a round closes with at least one contribution"
            return CollectedRound(number, settings, base.spec, {}, summed, partial, adapters, ())
        updates = self._updates(run, number, base, committed)
        reports = {device: self._report(run, number, device, committed[device]) for device in sorted(committed)}
        summed = [t for t in summed if t.name not in adapters]
        partial = fold(summed, None, updates, self._draft("close.sum"))
        raw = [unpack(update, self._draft(f"close.{i}")) for i, update in enumerate(updates)]
        return CollectedRound(number, settings, base.spec, reports, summed, partial, adapters, raw)

    def _report(self, run: str, number: int, device: str, item: Contribution) -> DeviceReport:
        """What a device's part in a round came to, as the ledger has it."""
        said, member = item.metrics, self.ledger.member(run, number, device)
        assert member, "only members contribute"
        uplink = read_join(member).uplink_bytes_per_s if member.join_message else 0.0
        sending_s = said.get("num_bytes", 0) / uplink if uplink else 0.0
        losses = said.get("first_loss", 0.0), said.get("last_loss", 0.0)
        return DeviceReport(item.num_examples, item.kept, said.get("train_s", 0.0) + sending_s, *losses)

    def _collect_mixed(
        self, run: str, number: int, base: Manifest, committed: Mapping[str, Contribution], settings: TrainSettings
    ) -> CollectedRound:
        """As `collect`, where each device trained what its own plan says: sums of all but the matrices that differ in kind."""
        chosen = targets(base.spec, settings.lora_targets)
        matrices = [t for t in base.spec.tensors if t.name in chosen]
        summed = [t for t in base.spec.tensors if t.name not in chosen]
        updates = self._updates(run, number, base, committed)
        partial = fold(summed, None, updates, self._draft("close.sum"))
        raw = [replace(unpack(update, self._draft(f"close.{i}")), settings=self._plan(run, number, update.device).settings)
               for i, update in enumerate(updates)]  # fmt: skip
        return CollectedRound(number, settings, base.spec, {}, summed, partial, {}, raw, matrices)

    def _settings(self, run: str, number: int, committed: Iterable[str]) -> TrainSettings:
        """What the plans of a round have in common, all but the seed: that of any device that committed."""
        return self._plan(run, number, min(committed)).settings

    def _plan(self, run: str, number: int, device: str) -> Plan:
        member = self.ledger.member(run, number, device)
        assert member and member.plan is not None, "only planned devices contribute"
        plan: Plan = unpack_as(Plan, member.plan)
        return plan

    def _updates(self, run: str, number: int, base: Manifest, committed: Mapping[str, Contribution]) -> list[Update]:
        """Updates as the plans say that they are laid out, in the order of the devices' names."""
        found = []
        for device in sorted(committed):
            item = committed[device]
            tensors = prune_plan.sent(base.spec, self._plan(run, number, device), item.kept)
            found.append(Update(device, self.updates.path(item.blob), item.num_examples, tensors, item.codec))
        return found

    def _draft(self, name: str) -> Path:
        """A file that the next `clean` deletes."""
        return self.updates.folder / "partial" / f"{name}.tmp"

    def next_version(
        self,
        base: Manifest,
        base_blob: bytes,
        changes: Iterable[Change],
        method: str,
        optimizer: ServerOptimizer | None = None,
        kept: bytes = b"",
    ) -> tuple[Manifest, bytes]:
        """The model after changes, taken one at a time: changed tensors as new blobs, and the manifest; not yet in the ledger.

        Args: optimizer: what the changes pass through; kept: of a pruned model, empty for a whole one.

        Raises:
            ModelError: a tensor would not be finite.
        """
        paths = {t.name: self.store.path(t.blob) for t in (*base.tensors, *base.adapters)}
        changed = apply(changes, paths, self.store, *([optimizer.step] if optimizer else []))

        def after(tensors: Sequence[StoredTensor]) -> tuple[StoredTensor, ...]:
            return tuple(replace(t, blob=changed.get(t.name, t.blob)) for t in tensors)

        return self._publish(
            replace(base, tensors=after(base.tensors), adapters=after(base.adapters), kept=kept), base_blob, method
        )

    def with_adapters(
        self, base: Manifest, base_blob: bytes, stage: Stage, method: str, primer: Primer | None = None
    ) -> tuple[Manifest, bytes] | None:
        """The model as a stage begins with it, its own adapters and no others; None if it is so already.

        Raises:
            UsageError: a target is no linear layer of the model.
        """
        if has_adapters(base, stage):
            return None
        return self._publish(begin(base, stage, self.store, primer), base_blob, method)

    def _publish(self, changed: Manifest, base_blob: bytes, method: str) -> tuple[Manifest, bytes]:
        """A version's manifest with other tensors, as the version after it."""
        manifest = replace(changed, version=changed.version + 1, method=method, parent=base_blob)
        return manifest, self.store.put(encode_manifest(manifest))

    def export_adapter(self, version: int, out: Path) -> None:
        """Write a version's adapters and head as a folder that PEFT reads too, for the base checkpoint.

        Raises:
            UsageError: there is no such version, it has no adapters, or they are not for the base; else as `export_folder`.
        """
        manifest = self._whole(version)
        if not manifest.adapters:
            raise UsageError(f"model {version} has no adapters: leave --adapter-out away")
        if manifest.kept:
            raise UsageError(f"model {version} is pruned, its adapters are no model of their own: export it with --out")
        first = self.ledger.models()[0]
        if not _same_base(manifest, self.manifest(first)):
            raise UsageError(
                f"the adapters of model {version} belong to matrices that this fleet has trained, not to those of its base: "
                "export the whole model with --out"
            )
        tensors, weights = manifest.mapped_adapters(self.store), manifest.mapped(self.store)
        scales = {name.removesuffix(A): manifest.adapter_scale for name in tensors if name.endswith(A)}
        head = {t.name: weights[t.name] for t in manifest.spec.suffix(0)}
        base = fingerprint(manifest.spec, weights)
        adapter = Adapter(tensors, scales, head, manifest.labels, manifest.max_length, base)
        write_adapter(out, adapter, str(first.metrics.get("base", "")))

    def _whole(self, version: int) -> Manifest:
        """A version whose every blob is here."""
        rows = {row.version: row for row in self.ledger.models()}
        if version not in rows:
            raise UsageError(f"there is no model version {version}; there are {', '.join(map(str, rows)) or 'none'}")
        manifest = self.manifest(rows[version])
        self.check(manifest)
        return manifest

    def clean(self) -> None:
        """Delete what no kept version and no open round needs."""
        wanted: set[bytes] = set()
        for row in self._kept():
            if self.store.has(row.manifest):
                wanted |= {row.manifest, *self.manifest(row).blobs()}
        self.store.keep_only(wanted)
        self.updates.keep_only(self.ledger.live_blobs())
        self.states.keep_only(self.ledger.optimizer_blobs())

    def _kept(self) -> Sequence[ModelRow]:
        """The versions whose tensors are kept."""
        rows, start = self.ledger.models(), self.ledger.run_start()
        return [
            row for i, row in enumerate(rows) if i in (0, *range(len(rows))[-KEEP_VERSIONS:]) or row.version == start
        ]

    def export_folder(self, version: int, out: Path) -> None:
        """Write a version as a checkpoint folder, its adapters merged into the matrices; of a pruned one what is left.

        Raises:
            UsageError: there is no such version; ModelError: its tensors are no longer kept; StoreError: they are damaged.
        """
        manifest = self._whole(version)
        weights, adapters = manifest.mapped(self.store), manifest.mapped_adapters(self.store)
        cache = cache_folder()
        whole = merged(manifest.spec, weights, adapters, manifest.adapter_scale, cache)
        spec, whole = left(manifest.spec, whole, manifest.kept, cache)
        save_folder(out, spec, whole, self.store.path(manifest.tokenizer))


def _summed(base: Manifest, settings: TrainSettings) -> Sequence[TensorSpec]:
    """All that updates of plans with these settings may hold and that is summed up, in an order that every update keeps."""
    if settings.mask_every:
        return (*masked_tensors(base.spec, base.num_blocks, settings), *base.spec.suffix(0))
    return base.trainable


def _same_base(manifest: Manifest, first: Manifest) -> bool:
    """Whether a version's tensors, but for the head, are those of the first one."""
    own = {t.name: t.blob for t in first.tensors}
    return all(own[t.name] == t.blob for t in manifest.tensors if t.part < manifest.num_blocks)


def _damaged(version: int, what: str) -> StoreError:
    return StoreError(
        f"the fleet's store is damaged, model {version} is not whole: {what}: put the fleet's folder back from a backup, "
        "or `models --export` a version that is whole and begin another fleet with it"
    )


def describe_versions(ledger: Ledger) -> Sequence[Mapping[str, Any]]:
    """For `edge-coordinator models`."""
    return [
        {
            "version": r.version,
            "run": r.run,
            "round": r.round,
            "created_at": r.created_at,
            "manifest": r.manifest.hex(),
            **r.metrics,
        }
        for r in ledger.models()
    ]
