"""What a method is: how plans are chosen, how their results become one model, and what it remembers between rounds.

A method is pure: state in, state out. The state is plain JSON values; the run keeps it in the ledger in one transaction with
what it belongs to, so that a coordinator which was killed goes on to the same bits. A method sees cost tables, names, shapes
and numbers, and arrays one tensor at a time; never a socket, a file or torch. Imports the runtime's records; numpy where
arrays are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edge_runtime.asks import ASKS, Ask, Asker
from edge_runtime.model import ModelSpec, TensorSpec
from edge_runtime.records import CostRow, Pruning, TrainSettings
from edge_runtime.wire import Join

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

State = Mapping[str, Any]  # plain JSON values; {} before the first round
Tables = Mapping[str, Sequence[CostRow]]


@dataclass(frozen=True)
class Options:
    """What fleet.toml says to the methods that have a choice, in [run].

    Attributes:
        rank_distribution: of LEGEND, one of `legend.DISTRIBUTIONS`.
        rank_budget: of LEGEND, the sum of the ranks of all blocks; 0: that of the arithmetic one up to the run's rank.
        suffix_depths: of LEGEND, "even" (its own rule) or "deepest" (CAFF's).
        waiting_share: of LEGEND, how much of a round's time devices may wait on average.
        sparse_rounds: of SLoRA, the rounds of its first stage; 0: about a third of the run's.
        sparse_density: of SLoRA, the share of the entries that its first stage trains.
        rounds: of the run.
        sparsity: of FedSpine and its baselines, the share of the blocks' matrices that is gone in the end.
        prune_rounds: of them, the rounds in which devices prune; 0: about half of the run's.
    """

    rank_distribution: str = "arithmetic"
    rank_budget: int = 0
    suffix_depths: str = "even"
    waiting_share: float = 0.1
    sparse_rounds: int = 0
    sparse_density: float = 0.1
    rounds: int = 1
    sparsity: float = 0.5
    prune_rounds: int = 0


@dataclass(frozen=True)
class Stage:
    """What a method asks of all devices in a round.

    Attributes:
        settings: as devices are told them.
        adapters: what of LoRA adapters devices train and send: "ab", "b" (A stays), "fresh" (of their own, which no version has),
            or "" (the blocks, or entries of them). With "fresh" and a mask in the settings each device trains one of all kinds.
        ranks: of the published adapters of each block, from input to output; empty: the settings' in all.
        prunes: devices may leave groups out; else the model is whole again.
    """

    settings: TrainSettings
    adapters: str = ""
    ranks: tuple[int, ...] = ()
    prunes: bool = False


@dataclass(frozen=True)
class Cohort:
    """What a method knows when it plans a round.

    Attributes:
        joins: what each device said.
        tables: of that, the rows within the device's own budgets that this method and model can use.
        settings: of the round's stage.
    """

    number: int
    joins: Mapping[str, Join]
    tables: Tables
    num_blocks: int
    settings: TrainSettings
    options: Options


@dataclass(frozen=True)
class Choice:
    """What a method decides for one device: a row of its cost table, or why it has none this round."""

    row: CostRow | None
    why: str = ""
    ranks: tuple[int, ...] = ()  # of the adapters in each trained block, none above the row's; empty: the row's in all
    pruning: Pruning | None = None


@dataclass(frozen=True)
class Change:
    """A change of one tensor of the model or of its adapters.

    Attributes:
        values: float64; what is added to the tensor, and passes through the server optimizer.
        replaces: `values` are the tensor itself instead, and no optimizer sees them.
    """

    name: str
    values: Array
    replaces: bool = False


class Report(Protocol):
    """What a device's part in a round came to."""

    @property
    def num_examples(self) -> int:
        """Its examples."""

    @property
    def kept(self) -> bytes:
        """What it has kept of a pruned model; empty: all."""

    @property
    def seconds(self) -> float:
        """Of its training, and of sending where the device knows its uplink."""

    @property
    def first_loss(self) -> float:
        """Of its first step."""

    @property
    def last_loss(self) -> float:
        """Over its last steps."""


class Trained(Protocol):
    """One device's adapter of one matrix, after its training."""

    @property
    def device(self) -> str:
        """Whose it is."""

    @property
    def places(self) -> tuple[Array | None, Array | None]:
        """The rows and columns of the matrix that the device has kept; None: all."""

    @property
    def num_examples(self) -> int:
        """The device's."""

    @property
    def rank(self) -> int:
        """At most the published adapter's."""

    def load(self) -> tuple[Array, Array]:
        """-> A (rank, inputs), B (outputs, rank), float64, of the rows and columns that are kept. Read from disk at each call."""


class Dense(Protocol):
    """What one device changed in one matrix."""

    @property
    def num_examples(self) -> int:
        """The device's."""

    def load(self) -> Array:
        """-> (outputs, inputs), float64; zero where it trained nothing. Made at each call."""


class Collected(Protocol):
    """What the devices made of a round, when it closes."""

    @property
    def number(self) -> int:
        """Of the round."""

    @property
    def settings(self) -> TrainSettings:
        """Those of the round's plans, with the run's seed."""

    @property
    def spec(self) -> ModelSpec:
        """The whole model."""

    @property
    def reports(self) -> Mapping[str, Report]:
        """What each device's part in the round came to, in the order of their names."""

    @property
    def adapted(self) -> Sequence[TensorSpec]:
        """The matrices that have an adapter, or may have one in a plan where kinds are mixed, in the model's order."""

    def means(self) -> Iterator[Change]:
        """The mean delta of each tensor over the devices that trained it, weighted by their examples, from exact sums.

        Of a matrix of which entries were trained: zero for all others.

        Of a method with `keeps_updates` only tensors of the model itself, such as the head's: not adapters.
        """

    def adapter(self, matrix: TensorSpec) -> tuple[Array, Array]:
        """The published A and B of a matrix, which devices began from, float64."""

    def dense(self, matrix: TensorSpec) -> Sequence[Dense]:
        """What each device changed in a matrix, in whatever way, in the order of their names. Only where kinds are mixed."""

    def trained(self, matrix: TensorSpec) -> Sequence[Trained]:
        """The adapters of a matrix by device, in the order of the devices' names. Only with `keeps_updates`."""


Configure = Callable[[State, Cohort], tuple[Mapping[str, Choice], State]]
Aggregate = Callable[[State, Collected], tuple[Iterator[Change], State]]
BlockRanks = Callable[[int, TrainSettings, Options], tuple[int, ...]]
RoundSettings = Callable[[State, int, TrainSettings, Options], TrainSettings]  # of a round, from the run's
Prime = Callable[["Array", "Array"], "tuple[Array, Array]"]
KeptAfter = Callable[[State], bytes]  # what the version after a round keeps of the whole model; empty: all


def one_rank(num_blocks: int, settings: TrainSettings, options: Options) -> tuple[int, ...]:
    """The run's rank in all blocks."""
    return ()


def the_runs(state: State, number: int, settings: TrainSettings, options: Options) -> TrainSettings:
    """The run's settings in all rounds."""
    return settings


def all_kept(state: State) -> bytes:
    """Nothing is pruned."""
    return b""


def averaged(state: State, collected: Collected) -> tuple[Iterator[Change], State]:
    """Every tensor: the mean over the devices that trained it (FedAvg, McMahan et al., arXiv 1602.05629, layer by layer)."""
    return collected.means(), state


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        summary: one line for lists and help texts.
        configure: the plans of a cohort.
        aggregate: the changes of the model, one at a time, and the next state.
        adapters: as in a `Stage`.
        rank: of the adapters where fleet.toml names none.
        block_ranks: the rank of the published adapters of each block, from input to output; empty: the run's in all.
        keeps_updates: `aggregate` needs the updates themselves, so that they stay on disk until the round closes; else they
            are summed up as they come.
        remakes_adapters: A and B get another basis each round, so what a codec left out of them cannot be sent later.
        round_settings: those of a round; where they have no rank, no adapters are trained in it.
        prime: of a run whose matrices were trained before its adapters: from what it changed in a matrix (outputs, inputs) and
            a fresh A (rank, inputs), float64, to the A and B that adapters begin with; the matrix goes back to what it was.
        prunes: devices leave heads and channels out.
        kept: what of the model is kept, from the method's state after a round; asked where it prunes.
    """

    summary: str
    configure: Configure
    aggregate: Aggregate = averaged
    adapters: str = ""
    block_ranks: BlockRanks = one_rank
    keeps_updates: bool = False
    remakes_adapters: bool = False
    rank: int = 8
    round_settings: RoundSettings = the_runs
    prime: Prime | None = None
    prunes: bool = False
    kept: KeptAfter = all_kept

    def stage(self, state: State, number: int, num_blocks: int, settings: TrainSettings, options: Options) -> Stage:
        """What a round asks of the devices. Args: settings: the run's."""
        settings = self.round_settings(state, number, settings, options)
        if not self.adapters or not settings.lora_rank:
            return Stage(settings)
        return Stage(settings, self.adapters, self.block_ranks(num_blocks, settings, options), self.prunes)


def by_ask(ask: Ask) -> Configure:
    """A `configure` that gives each device what its own table asks for, and remembers nothing."""

    def configure(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
        asker = Asker(cohort.num_blocks, cohort.settings)
        return {device: Choice(ask.pick(rows, asker)) for device, rows in cohort.tables.items()}, state

    return configure


def alone(
    name: str, aggregate: Aggregate = averaged, *, keeps_updates: bool = False, remakes_adapters: bool = False
) -> Method:
    """A method of one stage in which each device is given what its own table asks for (`edge_runtime/asks.py`)."""
    asks = ASKS[name]
    (ask,) = asks.stages
    return Method(
        asks.summary,
        by_ask(ask),
        aggregate,
        adapters=ask.adapters,
        keeps_updates=keeps_updates,
        remakes_adapters=remakes_adapters,
        rank=asks.rank,
    )
