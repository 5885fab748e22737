"""A fleet's folder: fleet.toml, the ledger, the coordinator's own secret, and what is done to them from outside a run.

    fleet.toml  ledger.db  coordinator.secret  store/  updates/  optimizer/  devices/NAME.toml

Imports config, ledger and models; opens no network.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edge_coordinator.config import CONFIG_FILE, TEMPLATE, FleetConfig, load_config
from edge_coordinator.ledger import Ledger
from edge_coordinator.methods import METHODS
from edge_coordinator.models import Models
from edge_coordinator.secrets import hash_secret, new_secret, verify_secret
from edge_runtime.credentials import Credentials, format_credentials, toml_text
from edge_runtime.data import read_examples
from edge_runtime.errors import DataError, StoreError, UsageError
from edge_runtime.records import TrainSettings
from edge_runtime.store import atomic_writer, disk_errors, sync_folder
from edge_runtime.topics import COORDINATOR, check_id

SECRET_FILE = "coordinator.secret"
LEDGER_FILE = "ledger.db"
SIMULATED = "simulation"  # in the ledger: this folder is no real fleet's
EVERYWHERE = ("0.0.0.0", "::", "")  # addresses to listen on that nobody can connect to


class Fleet:
    """An open fleet folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: FleetConfig = load_config(folder)
        self.ledger = Ledger(folder / LEDGER_FILE)
        self._check_ledger()
        self._check_name()
        self._own_secret()

    def refuse_simulated(self) -> None:
        """Raises: UsageError: this folder is a simulation's."""
        if self.ledger.get(SIMULATED) is not None:
            raise UsageError(
                f"{self.folder} is a simulation's, whose devices are made up: `edge-coordinator init` another folder for "
                "a real fleet; `models --export` gives the simulation's model"
            )

    def models(self, progress: Callable[[str], None]) -> Models:
        """The model versions; the first is imported when there is none yet.

        Raises:
            UsageError: fleet.toml now names other labels than the fleet's model has.
            StoreError: the newest version is not whole.
        """
        models = Models(self.folder, self.ledger)
        newest = models.newest()
        if newest is None:
            progress(f"importing {self.config.model.base} as model version 1")
            models.import_first(self.config.model, time.time(), progress)
        elif newest[0].labels != self.config.model.labels or newest[0].max_length != self.config.model.max_length:
            raise UsageError(
                f"{self.folder / CONFIG_FILE}: [model] labels and max_length cannot change once the fleet has a model: "
                "put them back, or `edge-coordinator init` another folder"
            )
        else:
            models.check(newest[0])
        return models

    def secret(self) -> str:
        """The coordinator's own secret at the broker.

        Raises:
            StoreError: its file cannot be read or is empty.
        """
        path = self.folder / SECRET_FILE
        try:
            secret = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {path} ({error}): remove it, and another secret is made") from None
        if not secret:
            raise StoreError(f"{path} is empty: remove it, and another secret is made")
        return secret

    def users(self) -> list[tuple[str, str]]:
        """Everybody who may connect, with the hashes of their secrets."""
        found = [(COORDINATOR, self.ledger.get("coordinator_secret") or "")]
        for row in self.ledger.devices():
            if hashed := self.ledger.secret(row["device"]):
                found.append((row["device"], hashed))
        return found

    def lookup(self) -> Callable[[str], str | None]:
        """For the embedded broker's thread: a user's stored hash, read afresh at each login."""
        opened: list[Ledger] = []

        def find(user: str) -> str | None:
            if not opened:
                opened.append(Ledger(self.folder / LEDGER_FILE))
            return opened[0].get("coordinator_secret") if user == COORDINATOR else opened[0].secret(user)

        return find

    def broker_address(self) -> tuple[str, int]:
        """Where this machine reaches the broker."""
        broker = self.config.broker
        return ("127.0.0.1" if broker.host in EVERYWHERE else broker.host), broker.port

    def certificate(self) -> tuple[Path | None, Path | None]:
        """The broker's certificate chain and key, for TLS."""
        broker = self.config.broker
        return (Path(broker.certfile) if broker.certfile else None), (Path(broker.keyfile) if broker.keyfile else None)

    def enroll(self, device: str, out: Path, *, renew: bool = False, host: str | None = None) -> Credentials:
        """Give a device its credentials as one file; the secret is stored only as a hash.

        Raises:
            UsageError: the name is no id, is taken, or the file exists already.
        """
        return self.enroll_all({device: out}, renew=renew, host=host)[0]

    def enroll_all(
        self, files: Mapping[str, Path], *, renew: bool = False, host: str | None = None
    ) -> list[Credentials]:
        """Give each device its file, or none of them anything. Args: files: by device.

        Raises:
            UsageError: as `enroll`, for the first device that is wrong.
        """
        enrolled = {row["device"] for row in self.ledger.devices()}
        for device, out in files.items():
            if check_id("device", device) == COORDINATOR:
                raise UsageError(f"no device may be called {COORDINATOR}")
            if out.is_dir():
                raise UsageError(f"{out} is a folder: remove it, or name another place with --out")
            if out.exists() and device not in enrolled:
                raise UsageError(
                    f"{out} exists already, and no {device} is enrolled: remove it, or name another place with --out"
                )
            if out.exists() and not renew:
                raise UsageError(f"{out} exists already: --renew replaces it and its secret")
        made = [self._credentials(device, host) for device in files]
        with self.ledger.transaction():
            for one in made:
                if renew:
                    self.ledger.renew(one.device, hash_secret(one.secret))
                else:
                    self.ledger.enroll(one.device, hash_secret(one.secret), time.time())
            _write_all({files[one.device]: format_credentials(one).encode() for one in made})
        return made

    def _credentials(self, device: str, host: str | None) -> Credentials:
        broker, secret = self.config.broker, new_secret()
        announced = host or broker.announce_host or self.broker_address()[0]
        ca_file = str(Path(broker.ca_file).absolute()) if broker.ca_file else ""
        return Credentials(self.config.realm, device, secret, announced, broker.port, ca_file, self.config.model.family)

    def _check_ledger(self) -> None:
        """A ledger that knows nothing yet beside tensors is not the one that they belong to.

        The name is written before any tensor is, so that a first start which was killed at any point may be repeated.
        """
        if self.ledger.get("realm") is None and any((self.folder / "store" / "blobs").glob("*/*")):
            self.ledger.close()
            raise StoreError(
                f"{self.folder / LEDGER_FILE} is new or empty, and {self.folder / 'store'} holds models of a fleet: put "
                "the ledger back from a backup, or, to begin anew without these models, `edge-coordinator init` another folder"
            )

    def _check_name(self) -> None:
        """The name is part of every device's topics: once devices have it, it cannot change."""
        known = self.ledger.get("realm")
        if known is None:
            self.ledger.put("realm", self.config.realm)
        elif known != self.config.realm:
            raise UsageError(
                f"{self.folder / CONFIG_FILE}: [fleet] name was {known!r} and cannot become {self.config.realm!r}, "
                "the devices' credentials hold it: put it back, or `edge-coordinator init` another folder"
            )

    def _own_secret(self) -> None:
        path = self.folder / SECRET_FILE
        if not path.exists():
            with atomic_writer(path) as file:
                file.write(new_secret().encode())
        if not verify_secret(
            self.secret(), self.ledger.get("coordinator_secret") or ""
        ):  # new, or killed between the two
            self.ledger.put("coordinator_secret", hash_secret(self.secret()))


def _write_all(files: Mapping[Path, bytes]) -> None:
    """Write files that appear once all of them are on the disk, or not at all."""
    drafts = {out: out.with_name(f".{out.name}.new") for out in files}
    try:
        for out, data in files.items():
            with atomic_writer(drafts[out]) as file:
                file.write(data)
        for out, draft in drafts.items():
            with disk_errors(out):
                draft.replace(out)
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()
    for folder in {out.parent for out in files}:
        sync_folder(folder)


def init(
    folder: Path,
    *,
    name: str | None = None,
    base: str = "minilm-l6",
    family: str = "edge_models.bert",
    labels: Sequence[str] = (),
    max_length: int = 128,
    method: str = "caff",
    rounds: int = 10,
    goal: int = 2,
    quorum: int = 1,
    seed: int = 0,
    port: int = 1883,
) -> Path:
    """Write a commented fleet.toml; -> its path.

    Raises:
        UsageError: there is one already, or a value is wrong.
    """
    path = folder / CONFIG_FILE
    if path.exists():
        raise UsageError(f"{path} exists already: edit it, or choose another folder")
    name = name or re.sub(r"[^a-z0-9_-]+", "-", folder.absolute().name.lower())[:36].strip("-") or "fleet"
    settings = TrainSettings()
    if Path(base).is_dir():
        base = str(Path(base).absolute())
    text = TEMPLATE.format(
        name=toml_text(check_id("fleet name", name)),
        base=toml_text(base),
        family=toml_text(family),
        labels=", ".join(toml_text(label) for label in labels),
        max_length=max_length,
        method=toml_text(method),
        methods=", ".join(METHODS),
        rounds=rounds,
        goal=goal,
        quorum=quorum,
        seed=seed,
        port=port,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
    )
    with atomic_writer(path) as file:
        file.write(text.encode())
    if labels:
        try:
            load_config(folder)
        except UsageError:
            path.unlink()
            raise
    return path


def labels_of(
    data: Path,
    text_column: str,
    label_column: str,
    *,
    encoding: str | None = None,
    skip_bad_rows: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[str, ...]:
    """The labels of a data file, for fleet.toml.

    Raises:
        DataError: it cannot be read, has a row that cannot be used and is not to be skipped, or has one label alone.
    """
    columns = {"text_column": text_column, "label_column": label_column}
    found = read_examples(data, **columns, encoding=encoding, bad_rows="skip" if skip_bad_rows else "error")
    if found.skipped:
        progress(f"skipped {found.num_skipped} bad rows; line {found.skipped[0].line}: {found.skipped[0].reason}")
    if len(found.labels) < 2:
        raise DataError(f"{data} has one label, {found.labels[0]!r}: a classifier needs examples of two at least")
    return found.labels
