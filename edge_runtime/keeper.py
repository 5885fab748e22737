"""Keeps the fleet's newest model whole on this device's disk: fetches what is missing, swaps versions in one rename.

A version counts as held when every blob of it is here and verified; until then the one before stays usable. After any
trouble (full disk, lost chunks, an evicted blob) it begins again with what is still missing. Older versions stay as
`versions.py` says, and go where the disk has no room for a newer one. No topics, no clock of its own.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.errors import EdgeError, StoreError, WireError
from edge_runtime.manifest import Manifest, check_family, decode_manifest
from edge_runtime.source import MANIFEST_FILE, STORE_FOLDER
from edge_runtime.store import BlobStore, file_sha256
from edge_runtime.transfer import Receiver
from edge_runtime.versions import forget_choice, make_room, read_versions, take_over
from edge_runtime.wire import Model, Need

MAX_BAD_HASHES = 3
ROOM_BYTES = 1 << 20  # beyond what is fetched: the small files that go with it
MISSING_S = 30.0  # after the coordinator lacked a blob, until it is asked again
Emit = Callable[[dict[str, Any]], None]


class ModelKeeper:
    """The model of one device.

    Attributes:
        manifest: the version that is held whole, or None.
        announced: the newest version that the coordinator spoke of.
    """

    def __init__(self, folder: Path, families: tuple[str, ...], emit: Emit) -> None:
        self._folder, self._families, self._emit = folder, families, emit
        self.store = BlobStore(folder / STORE_FOLDER)
        self.announced: Model | None = None
        self._receiver = Receiver(self.store)
        self._incoming: Manifest | None = None
        self._bad_hashes = 0
        self._refused: bytes | None = None  # a manifest that this device cannot use: not fetched again and again
        self._held_blob = b""
        self._ask_at = 0.0  # not before: the coordinator lacked a blob
        self.manifest = self._load()

    @property
    def held(self) -> int:
        """The version held, 0 for none."""
        return self.manifest.version if self.manifest else 0

    @property
    def up_to_date(self) -> bool:
        """What is held is what the coordinator announced: the same manifest, not only the same number."""
        return self.announced is not None and self.announced.manifest == self._held_blob

    def announce(self, model: Model) -> None:
        """The coordinator speaks of a version. Versions only grow."""
        if model.version < self.held:
            reason = "the fleet was begun anew? remove this device's state folder to follow it"
            self._emit({"event": "old-model", "announced": model.version, "held": self.held, "reason": reason})
        elif self.announced is None or model.manifest != self.announced.manifest:
            self.announced, self._bad_hashes, self._ask_at = model, 0, 0.0
            self._start_again()
        else:
            self.announced = model

    def requests(self, now: float) -> Need | None:
        """What to ask for now. Begins or resumes the fetch where one is due.

        Raises:
            EdgeError, OSError: the version cannot be used here, or the disk is full. Call `pause` and try again later.
        """
        model = self.announced
        if model is None or model.manifest in (self._held_blob, self._refused) or now < self._ask_at:
            return None
        if self._incoming is None:
            if self.store.has(model.manifest) and file_sha256(self.store.path(model.manifest)) != model.manifest:
                self.store.delete(model.manifest)  # damaged since it was fetched: it must not pass for a bad version
            self._receiver.want(model.manifest, model.manifest_bytes, now)
            if self.store.has(model.manifest):
                self._begin(model, now)
        return self._receiver.requests(now)

    def accept(self, blob: bytes, offset: int, data: bytes, now: float) -> None:
        """A chunk came."""
        if self._receiver.accept(blob, offset, data, now) is not False:
            return
        self._emit({"event": "bad-hash", "blob": blob.hex()})
        self._bad_hashes += 1
        if self._bad_hashes >= MAX_BAD_HASHES and self.announced:
            self._refused, self._bad_hashes = self.announced.manifest, 0
            self._start_again()
            raise WireError(f"model {self.announced.version} does not have the hashes it was announced with")

    def complete(self) -> bool:
        """Whether the announced version has just become whole; if so, it is ours now, with one before it to go back to."""
        model, manifest = self.announced, self._incoming
        if model is None or manifest is None or not self._receiver.idle:
            return False
        take_over(self._folder, self.store, manifest, self.store.path(model.manifest).read_bytes())
        self.manifest, self._incoming, self._held_blob = manifest, None, model.manifest
        return True

    def reconnected(self, now: float) -> None:
        """What was asked for is not on its way any more."""
        self._receiver.restart(now)

    def missing(self, blob: bytes, now: float) -> None:
        """The coordinator does not have a blob: a newer version will be announced, or its disk mended some time."""
        if now >= self._ask_at:
            what = f"model {self.announced.version}" if self.announced else "the model"
            self._emit({"event": "problem", "reason": f"the coordinator lacks a part of {what}, {blob.hex()[:12]}"})
        self._ask_at = now + MISSING_S
        self._receiver.cancel(blob)
        self._start_again()

    def pause(self) -> None:
        """Stop fetching; what has come stays on disk."""
        self._start_again()

    def _start_again(self) -> None:
        self._receiver.forget_all()
        self._incoming = None

    def _begin(self, model: Model, now: float) -> None:
        try:
            manifest = decode_manifest(self.store.path(model.manifest).read_bytes())
            if manifest.version != model.version:
                raise WireError(f"the manifest is of version {manifest.version}, version {model.version} was announced")
            check_family(manifest, self._families)
        except EdgeError:
            self._refused = model.manifest
            raise
        self._incoming = manifest
        for blob, size in manifest.blobs().items():
            self._drop_cut_short(blob, size)
            self._receiver.want(blob, size, now)
        if shutil.disk_usage(self._folder).free < self._receiver.missing_bytes + ROOM_BYTES:
            for version in make_room(self._folder, self.store, [model.manifest, *manifest.blobs()]):
                self._emit({"event": "dropped", "model_version": version, "for_version": manifest.version})
        self._emit({"event": "fetching", "model_version": manifest.version, "num_bytes": self._receiver.missing_bytes})

    def _load(self) -> Manifest | None:
        try:
            read_versions(self._folder)
        except StoreError as error:
            self._emit({"event": "storage-error", "reason": f"{error}; done, pins and marks are forgotten"})
            forget_choice(self._folder)
        try:
            data = (self._folder / MANIFEST_FILE).read_bytes()
            manifest = decode_manifest(data)
            check_family(manifest, self._families)
        except FileNotFoundError:
            return None
        except (EdgeError, OSError) as error:
            reason = f"the stored model is not usable, it is fetched again: {error}"
            self._emit({"event": "storage-error", "reason": reason})
            return None
        for blob, size in manifest.blobs().items():
            self._drop_cut_short(blob, size)
        if not all(self.store.has(blob) for blob in manifest.blobs()):
            return None
        self._held_blob = hashlib.sha256(data).digest()
        return manifest

    def _drop_cut_short(self, blob: bytes, size: int) -> None:
        """Forget a blob that a failing disk has cut short, so that it is fetched again."""
        if self.store.has(blob) and self.store.size(blob) != size:
            self.store.delete(blob)
