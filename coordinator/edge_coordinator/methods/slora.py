"""SLoRA: some rounds train a sparse part of the matrices; what they changed becomes the adapters that LoRA begins with.

Babakniya, Elkordy, Ezzeldin, Liu, Song, El-Khamy, Avestimehr: "SLoRA: Federated Parameter Efficient Fine-Tuning of Language
Models", arXiv 2308.06522. Stage 1, R1 rounds: one random mask for each dense layer, of density d1, the same for every device
and round, from a seed; devices train and send the masked entries alone, and with p_k = n_k / sum n

    W <- W + sum p_k dW_k

Between the stages, for each such matrix, W_0 being that of the model which the run began with:

    dW = W_R1 - W_0 = U S V^T        B_0 = U_r S_r        A_0 = V_r^T        W <- W_0

Stage 2: federated LoRA as `lora` (FedIT) from A_0 and B_0, with scale 1 (alpha = r). The head is trained and averaged in both.
Paper's numbers: d1 = 10 %, r = 10, R1 about a third of the rounds. A density of 100 % is the variant with a full first stage.

Readings: a mask has one entry, drawn at random, in each run of round(1 / d1) consecutive ones (`edge_runtime/masks.py`). Biases,
layer norms and embeddings are not masked and stay as they are. In both stages devices that can train all blocks take part, as
with `lora`. Where dW has fewer directions than r, or is zero, the other rows of A are drawn as `lora`'s and the columns of B are
zero: zeros in both could never be trained. Where R1 is all the rounds there is no second stage: plain sparse training.
Memory of the start: one matrix of float64, its product with itself, and what the eigenvectors of that need.

`primed` puts such a start before any method with adapters. `slora-legend` is ours: LEGEND after it, a block's adapter of the rank
that LEGEND's distribution gives it. In its first stage each device trains masked entries of the deepest suffix that fits it, as
with CAFF. A device of less depth computes the blocks below with their primed adapters, which only others train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_coordinator.methods import legend, lora
from edge_coordinator.methods.best_product import best_product
from edge_coordinator.methods.method import Choice, Cohort, Method, Options, State, by_ask
from edge_runtime.asks import ASKS
from edge_runtime.records import TrainSettings

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def primed(then: Method, name: str) -> Method:
    """A method whose adapters begin with what rounds of sparse training have changed.

    Args:
        then: the method, which trains adapters in all its rounds.
        name: whose first stage says what the rounds before ask of a device, from tables and settings without adapters.
    """
    asks = ASKS[name]
    sparse = by_ask(asks.stages[0])

    def configure(state: State, cohort: Cohort) -> tuple[Mapping[str, Choice], State]:
        last = sparse_rounds(state, cohort.options)
        choices, after = (sparse if cohort.number <= last else then.configure)(state, cohort)
        return choices, {**after, "sparse_rounds": last}

    made = replace(then, summary=asks.summary, configure=configure, rank=asks.rank)
    return replace(made, round_settings=round_settings, prime=best_product)


def sparse_rounds(state: State, options: Options) -> int:
    """R1: as fleet.toml says, else as the run began with it, else a third of the rounds. So more rounds later do not move it."""
    return options.sparse_rounds or int(state.get("sparse_rounds", 0)) or max(1, round(options.rounds / 3))


def round_settings(state: State, number: int, settings: TrainSettings, options: Options) -> TrainSettings:
    """Masks and no adapters up to round R1; then adapters with scale 1."""
    if number > sparse_rounds(state, options):
        return replace(settings, lora_alpha=float(settings.lora_rank))
    every = round(1 / options.sparse_density)
    return replace(settings, lora_rank=0, mask_every=every, mask_seed=settings.seed)


METHOD = primed(lora.EVERYWHERE, "slora")
WITH_LEGEND = primed(legend.METHOD, "slora-legend")
