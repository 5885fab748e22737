"""What a candidate costs: peak memory, seconds, upload. Pure arithmetic over a model's shape, the data and a calibration.

The law for the peak follows `docs/memory.md`; what it cannot know of a machine (the size of the runtime, the speed of a
block) is measured once by the probe and comes in as a `Calibration`. Imports the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from edge_runtime.model import ModelSpec
from edge_runtime.records import Bytes, CostRow, Range, Seconds, TrainSettings

PADDING = 1.06  # padded tokens per real token with length bucketing, measured on TREC and Debian descriptions
MARGIN = 1.03  # the promise stands this much above the law, so that a device keeps it,
HEAP_BYTES = 12 << 20  # and this: holes in the heap, which come and go with the lengths of the texts
PIECES_BYTES = 8 << 20  # more of them where a batch is cut into pieces of different sizes
ROUND_BYTES = 1 << 20


@dataclass(frozen=True)
class DataShape:
    """What the costs depend on in a data set. Lengths in tokens, after truncation."""

    num_examples: int
    longest: int
    mean_length: float


@dataclass(frozen=True)
class Calibration:
    """What the probe measured for one model on one machine with one backend and thread count.

    Seconds are a line over the tokens of a micro-batch: fixed + per_token * tokens.
    """

    backend: Annotated[str, Range(1, 32)]
    runtime_bytes: Bytes  # resident memory of the process that the law does not explain
    forward_fixed_s: Seconds  # one block forward
    forward_per_token_s: Seconds
    train_fixed_s: Seconds  # one block forward and backward
    train_per_token_s: Seconds
    update_per_parameter_s: Seconds  # optimizer


@dataclass(frozen=True)
class ActivationLaw:
    """Bytes of activations in units of tokens * hidden * 4, fitted to measured peaks (`docs/memory.md`)."""

    per_block: float = 8.0  # plus 2 for each `hidden` of feed-forward width: 16 in all for BERT's 4
    per_inner: float = 2.0
    working: float = 4.0  # beside the saved ones, while a block runs backward
    prefix: float = 2.0  # for a block without gradients, times 2 + the feed-forward width: 12 in all for BERT's 4


LAW = ActivationLaw()


def static_bytes(spec: ModelSpec, depth: int, optimizer: str) -> int:
    """Weights and optimizer state, without gradients; frozen weights count as mapped pages, all of them touched."""
    frozen = sum(t.num_bytes for t in spec.tensors if t.part < spec.num_blocks - depth)
    copies = 3 if optimizer == "adamw" else 1
    return frozen + copies * upload_bytes(spec, depth)


def dynamic_bytes(spec: ModelSpec, depth: int, checkpointing: bool, tokens: int, pieces: int) -> int:
    """Peak of activations and gradients in a step of `pieces` micro-batches, the largest of `tokens` padded tokens.

    With one piece, gradients appear as activations go; with more, those of the pieces before are held throughout.
    """
    unit = 4 * tokens * spec.hidden
    wide = spec.feed_forward / spec.hidden
    prefix = LAW.prefix * (2 + wide) * unit
    saved = (LAW.per_block + LAW.per_inner * wide) * unit
    working = LAW.working * unit
    gradients = upload_bytes(spec, depth)
    largest = max(t.num_bytes for t in spec.suffix(depth))
    if depth == 0:
        at_start, at_end = prefix, float(gradients)
    else:
        at_start = (depth * unit + saved if checkpointing else depth * saved) + working
        at_end = gradients + saved + working
    peak = max(at_start + gradients, prefix + gradients) if pieces > 1 else max(at_start, at_end, prefix)
    return int(max(peak, gradients + 2 * largest))  # the optimizer's temporaries


def law_bytes(spec: ModelSpec, depth: int, checkpointing: bool, tokens: int, pieces: int, optimizer: str) -> int:
    """What the law says beside the runtime: static and dynamic."""
    return static_bytes(spec, depth, optimizer) + dynamic_bytes(spec, depth, checkpointing, tokens, pieces)


def upload_bytes(spec: ModelSpec, depth: int) -> int:
    """Bytes of an update in float32."""
    return sum(t.num_bytes for t in spec.suffix(depth))


def cost(
    spec: ModelSpec,
    data: DataShape,
    settings: TrainSettings,
    calibration: Calibration,
    depth: int,
    checkpointing: bool,
    micro_batch: int,
) -> CostRow:
    """The predicted cost of one candidate."""
    batch = max(1, min(settings.batch_size, data.num_examples))
    pieces = -(-batch // micro_batch)
    law = law_bytes(spec, depth, checkpointing, micro_batch * data.longest, pieces, settings.optimizer)
    holes = HEAP_BYTES + (PIECES_BYTES if pieces > 1 else 0)
    peak = int((calibration.runtime_bytes + law) * MARGIN + holes) // ROUND_BYTES * ROUND_BYTES + ROUND_BYTES
    tokens = batch * min(data.mean_length * PADDING, data.longest)

    def seconds(fixed_s: float, per_token_s: float) -> float:
        return pieces * fixed_s + tokens * per_token_s

    forward = seconds(calibration.forward_fixed_s, calibration.forward_per_token_s)
    train = seconds(calibration.train_fixed_s, calibration.train_per_token_s)
    step = (spec.num_blocks - depth) * forward + depth * train + (depth * forward if checkpointing else 0)
    step += forward  # embedding and head
    step += sum(t.size for t in spec.suffix(depth)) * calibration.update_per_parameter_s
    steps = data.num_examples / batch
    return CostRow(depth, checkpointing, micro_batch, peak, step, step * steps, upload_bytes(spec, depth))


def micro_batches(batch_size: int) -> Sequence[int]:
    """The micro-batches worth trying: the batch, halved until one example."""
    sizes = []
    while batch_size > 1:
        sizes.append(batch_size)
        batch_size = (batch_size + 1) // 2
    return [*sizes, 1]
