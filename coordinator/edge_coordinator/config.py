"""`fleet.toml`: what a person decides about a fleet and its run. Read once, checked, frozen.

Imports the runtime's records; opens no network and no ledger.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_coordinator.methods.legend import DEPTHS, DISTRIBUTIONS
from edge_coordinator.methods.method import Options
from edge_coordinator.server_optimizer import OWN_RATES, SERVER_OPTIMIZERS, ServerSettings
from edge_runtime.codecs import AUTO, CODECS
from edge_runtime.errors import UsageError
from edge_runtime.planner import check_settings
from edge_runtime.records import TrainSettings
from edge_runtime.source import MAX_LENGTH, MIN_LENGTH
from edge_runtime.topics import check_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FILE = "fleet.toml"
MAX_SPARSITY = 0.95


@dataclass(frozen=True)
class ModelSection:
    """[model]: what is finetuned."""

    base: str = "minilm-l6"
    family: str = "edge_models.bert"
    labels: tuple[str, ...] = ()
    max_length: int = 128


@dataclass(frozen=True)
class RunSection:
    """[run]: the rounds."""

    name: str = "first"
    method: str = "caff"
    rounds: int = 10
    goal: int = 2  # updates that end a round early
    quorum: int = 1  # updates without which a round fails
    overselection: float = 1.3  # devices admitted for each update wanted
    join_timeout_s: float = 300.0
    report_timeout_s: float = 3600.0
    pause_s: float = 0.0  # between rounds
    server_optimizer: str = "fedavg"  # what is made of the mean delta (`server_optimizer.py`)
    server_learning_rate: float = 0.0  # 0 is the optimizer's own
    server_momentum: float = 0.9  # of fedavgm; b1 of fedadam and fedyogi
    server_beta2: float = 0.99  # of fedadam and fedyogi, as tau
    server_tau: float = 1e-3
    rank_distribution: str = "arithmetic"  # of the method legend, as the three below (`methods/method.py`)
    rank_budget: int = 0
    suffix_depths: str = "even"
    waiting_share: float = 0.1
    sparse_rounds: int = 0  # of the method slora, as the one below
    sparse_density: float = 0.1
    sparsity: float = 0.5  # of the methods that prune, as the one below
    prune_rounds: int = 0

    @property
    def method_options(self) -> Options:
        """What the methods that have a choice are told."""
        legend = (self.rank_distribution, self.rank_budget, self.suffix_depths, self.waiting_share)
        slora = (self.sparse_rounds, self.sparse_density)
        return Options(*legend, *slora, self.rounds, self.sparsity, self.prune_rounds)

    @property
    def server_settings(self) -> ServerSettings:
        """The server optimizer with its numbers."""
        rate = self.server_learning_rate or OWN_RATES[self.server_optimizer]
        return ServerSettings(self.server_optimizer, rate, self.server_momentum, self.server_beta2, self.server_tau)


@dataclass(frozen=True)
class BrokerSection:
    """[broker]: where MQTT is spoken. `embedded` runs one in this process; `external` uses yours."""

    kind: str = "embedded"
    host: str = "127.0.0.1"
    port: int = 1883
    announce_host: str = ""  # what devices connect to, where it differs from host
    ca_file: str = ""
    certfile: str = ""
    keyfile: str = ""


@dataclass(frozen=True)
class FleetConfig:
    """All of fleet.toml."""

    realm: str
    model: ModelSection
    run: RunSection
    train: TrainSettings
    broker: BrokerSection
    folder: Path = field(default=Path())


def load_config(folder: Path) -> FleetConfig:
    """Read `fleet.toml` in `folder`.

    Raises:
        UsageError: it is missing, no TOML, or a value is wrong; names the key.
    """
    path = folder / CONFIG_FILE
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: make one with `edge-coordinator init {folder}`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from None
    unknown = set(raw) - {"fleet", "model", "run", "train", "broker"}
    if unknown:
        raise UsageError(
            f"{path}: unknown section [{sorted(unknown)[0]}]; there are [fleet], [model], [run], [train], [broker]"
        )
    fleet = raw.get("fleet")
    realm = fleet.get("name") if isinstance(fleet, dict) else None
    if not isinstance(realm, str):
        raise UsageError(f"{path}: [fleet] needs a name")
    config = FleetConfig(
        realm=check_id("fleet name", realm),
        model=_base_beside(_section(ModelSection, raw, "model", path), folder),
        run=_section(RunSection, raw, "run", path),
        train=check_settings(_section(TrainSettings, raw, "train", path)),
        broker=_beside(_section(BrokerSection, raw, "broker", path), folder),
        folder=folder,
    )
    _check(config, path)
    return dataclasses.replace(config, train=_adapters(config, path))


def _section(cls: type[Any], raw: dict[str, Any], name: str, path: Path) -> Any:
    values = raw.get(name, {})
    known = {f.name: f for f in dataclasses.fields(cls)}
    found: dict[str, Any] = {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {name} must be a section: [{name}]")
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{path}: [{name}] has no {key!r}; it has {', '.join(known)}")
        wanted = type(known[key].default)
        if wanted is tuple:
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                raise UsageError(f"{path}: [{name}] {key} must be a list of texts")
            value = tuple(value)
        elif wanted is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if type(value) is not wanted or (isinstance(value, float) and not math.isfinite(value)):
            kind = "a finite number" if wanted is float else wanted.__name__
            raise UsageError(f"{path}: [{name}] {key} must be {kind}, it is {value!r}")
        found[key] = value
    return cls(**found)


def _base_beside(model: ModelSection, folder: Path) -> ModelSection:
    """With its base as an absolute path, where it names a folder beside fleet.toml; an alias or an id stays what it is."""
    beside = os.path.join(folder, model.base)
    return dataclasses.replace(model, base=os.path.abspath(beside)) if model.base and os.path.isdir(beside) else model


def _beside(broker: BrokerSection, folder: Path) -> BrokerSection:
    """With its files as absolute paths: a relative one is taken from the folder of fleet.toml."""

    def whole(path: str) -> str:
        return str((folder / path).absolute()) if path else ""

    return dataclasses.replace(
        broker, ca_file=whole(broker.ca_file), certfile=whole(broker.certfile), keyfile=whole(broker.keyfile)
    )


def _check(config: FleetConfig, path: Path) -> None:
    run, model = config.run, config.model
    from edge_coordinator.methods import METHODS

    if run.method not in METHODS:
        raise UsageError(f"{path}: [run] method must be one of {', '.join(METHODS)}, it is {run.method!r}")
    check_id("run name", run.name)
    if not 1 <= run.quorum <= run.goal <= 2000:
        raise UsageError(f"{path}: [run] wants 1 <= quorum <= goal <= 2000, they are {run.quorum} and {run.goal}")
    if not 1 <= run.rounds <= 100_000 or not 1 <= run.overselection <= 10:
        raise UsageError(f"{path}: [run] rounds must be 1 to 100000 and overselection 1 to 10")
    for key in ("join_timeout_s", "report_timeout_s", "pause_s"):
        if not (0 if key == "pause_s" else 1e-3) <= getattr(run, key) <= 1e9:
            raise UsageError(f"{path}: [run] {key} must be above 0 and below 1e9 seconds, it is {getattr(run, key)}")
    _check_server(run, path)
    _check_options(run, path)
    if len(model.labels) < 2 or len(set(model.labels)) != len(model.labels):
        raise UsageError(f"{path}: [model] labels must name at least two different classes")
    if len(model.labels) > 4096 or max(map(len, model.labels)) > 200:
        raise UsageError(f"{path}: [model] labels may be 4096 classes, each of at most 200 characters")
    if not MIN_LENGTH <= model.max_length <= MAX_LENGTH:
        raise UsageError(
            f"{path}: [model] max_length must be from {MIN_LENGTH} to {MAX_LENGTH}, it is {model.max_length}"
        )
    if config.broker.kind not in ("embedded", "external"):
        raise UsageError(f"{path}: [broker] kind must be embedded or external, it is {config.broker.kind!r}")
    if not 0 <= config.broker.port <= 65535:
        raise UsageError(f"{path}: [broker] port must be 0 to 65535, it is {config.broker.port}")


def _check_options(run: RunSection, path: Path) -> None:
    for key, known in (("rank_distribution", DISTRIBUTIONS), ("suffix_depths", DEPTHS)):
        if getattr(run, key) not in known:
            raise UsageError(f"{path}: [run] {key} must be one of {', '.join(known)}, it is {getattr(run, key)!r}")
    if not 0 <= run.rank_budget <= 1_000_000:
        raise UsageError(f"{path}: [run] rank_budget must be 0 to 1000000, it is {run.rank_budget}")
    if not 0 <= run.waiting_share <= 1:
        raise UsageError(f"{path}: [run] waiting_share must be from 0 to 1, it is {run.waiting_share}")
    if not 0 <= run.sparse_rounds <= run.rounds:
        raise UsageError(f"{path}: [run] sparse_rounds must be 0 to rounds, {run.rounds}, it is {run.sparse_rounds}")
    if not 1e-4 <= run.sparse_density <= 1:
        raise UsageError(f"{path}: [run] sparse_density must be from 0.0001 to 1, it is {run.sparse_density}")
    if not 0 <= run.prune_rounds <= run.rounds:
        raise UsageError(f"{path}: [run] prune_rounds must be 0 to rounds, {run.rounds}, it is {run.prune_rounds}")
    if not 0 < run.sparsity <= MAX_SPARSITY:
        raise UsageError(f"{path}: [run] sparsity must be above 0 and at most {MAX_SPARSITY}, it is {run.sparsity}")


def _check_server(run: RunSection, path: Path) -> None:
    if run.server_optimizer not in SERVER_OPTIMIZERS:
        known = ", ".join(SERVER_OPTIMIZERS)
        raise UsageError(f"{path}: [run] server_optimizer must be one of {known}, it is {run.server_optimizer!r}")
    limits = {
        "server_learning_rate": (0, 100),
        "server_momentum": (0, 0.9999),
        "server_beta2": (0, 0.9999),
        "server_tau": (1e-12, 1),
    }
    for key, (low, high) in limits.items():
        if not low <= getattr(run, key) <= high:
            raise UsageError(f"{path}: [run] {key} must be from {low:g} to {high:g}, it is {getattr(run, key)}")


def _adapters(config: FleetConfig, path: Path) -> TrainSettings:
    """The settings with a rank where the method trains adapters.

    Raises:
        UsageError: a rank for a method that trains none, a mask for one that trains adapters, or a codec that does not
            suit the method.
    """
    from edge_coordinator.methods import METHODS

    name, train = config.run.method, config.train
    method = METHODS[name]
    if not method.adapters:
        if train.lora_rank:
            known = ", ".join(n for n, m in METHODS.items() if m.adapters)
            raise UsageError(
                f"{path}: [train] lora_rank must be 0 with the method {name}: adapters are trained by {known}"
            )
        return train
    if train.mask_every:
        raise UsageError(
            f"{path}: [train] mask_every must be 0 with the method {name}, which trains adapters; the rounds of slora without "
            "them have [run] sparse_density"
        )
    if method.prunes and (train.lora_targets or train.proximal_mu):
        raise UsageError(
            f"{path}: [train] lora_targets must be empty and proximal_mu 0 with the method {name}: importance is told by the "
            "adapters of all matrices, and what is pruned has no start to be held near"
        )
    if method.remakes_adapters and (train.codec == AUTO or CODECS[train.codec].sparse):
        dense = ", ".join(n for n, codec in CODECS.items() if not codec.sparse)
        raise UsageError(
            f"{path}: [train] codec must be one of {dense} with the method {name}, it is {train.codec!r}: what an update "
            "leaves out would be added to adapters that are made anew each round"
        )
    return dataclasses.replace(train, lora_rank=train.lora_rank or method.rank)


TEMPLATE = """\
# A fleet of edge-runtime devices. `edge-coordinator serve` in this folder runs it.

[fleet]
name = {name}                 # a-z, 0-9, '-' and '_': part of every MQTT topic

[model]
base = {base}                 # an alias (minilm-l6, minilm-l3), a checkpoint folder (seen from this one), or a Hugging Face id
family = {family}   # the module that knows the architecture
max_length = {max_length}                # tokens; longer texts are cut
labels = [{labels}]

[run]
name = "first"                # another name begins another run, from the newest model
method = {method}               # {methods}
rounds = {rounds}
goal = {goal}                      # updates that complete a round
quorum = {quorum}                    # fewer at the deadline: the round fails and the model stays
overselection = 1.3           # devices admitted for each update wanted
join_timeout_s = 300.0        # how long a round waits for devices to join; goes on at once when all that are online have
report_timeout_s = 3600.0     # how long devices may train and send
pause_s = 0.0                 # between rounds
server_optimizer = "fedavg"   # what is made of the mean of the updates: fedavg, fedavgm, fedadam, fedyogi
server_learning_rate = 0.0    # 0: the optimizer's own, 1 for fedavg and fedavgm, 0.03 for the others
server_momentum = 0.9         # of fedavgm, and the first beta of fedadam and fedyogi
server_beta2 = 0.99           # of fedadam and fedyogi, as tau
server_tau = 0.001
rank_distribution = "arithmetic"  # of legend and slora-legend: arithmetic, uniform, halving or decreasing ranks over the blocks
rank_budget = 0               # of legend, the sum of all blocks' ranks; 0: of the arithmetic one up to lora_rank
suffix_depths = "even"        # of legend: depths that make devices end together; or "deepest", what fits each
waiting_share = 0.1           # of legend: how much of a round's time devices may wait on average
sparse_rounds = 0             # of slora and slora-legend: rounds of sparse training before those with adapters; 0: a third of all
sparse_density = 0.1          # of slora and slora-legend: the share of the entries of each matrix that they train; 1.0: all; of auto: at most 0.5
sparsity = 0.5                # of fedspine and prune-...: the share of the blocks' matrices that is pruned in the end
prune_rounds = 0              # of them: rounds in which devices prune; later ones recover; 0: half of all

[train]                       # the same for every device
epochs = 1                    # local epochs a round
batch_size = 16
learning_rate = {learning_rate}
head_learning_rate = {head_learning_rate}
weight_decay = 0.01
optimizer = "adamw"           # adamw8bit, momentum and sgd need less memory
lora_rank = 0                 # of the methods with LoRA adapters, the largest; 0 is 8 with them, 10 after a sparse start
lora_alpha = 16.0             # adapters count lora_alpha / lora_rank times; after a sparse start once, whatever stands here
lora_targets = []             # layers that have adapters or masks, such as "q", "v"; none named: all
adapter_learning_rate = 0.002
proximal_mu = 0.0             # above 0: FedProx, which holds local weights near those of the round's start
codec = "f32"                 # of updates: f32, f16, int8, int4, topk10, topk1; "auto": the finest within a device's --upload
mask_every = 0                # above 0: of so many entries of each matrix one is trained; only without adapters
mask_seed = 0                 # draws them; of slora's the seed below does
seed = {seed}

[broker]
kind = "embedded"             # or "external": your own, see `edge-coordinator broker`
host = "127.0.0.1"            # "0.0.0.0" to be reached from other machines
port = {port}
announce_host = ""            # the name or address that devices connect to, where it is not `host`
certfile = ""                 # TLS for the broker we run: certificate chain and key (PEM), paths from this folder
keyfile = ""
ca_file = ""                  # what devices check the broker's certificate against
"""
