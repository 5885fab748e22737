"""What a candidate costs: peak memory, seconds, upload. Pure arithmetic over a model's shape, the data and a calibration.

The law for the peak follows `docs/memory.md`; what it cannot know of a machine (the size of the runtime, the speed of a
block) is measured once by the probe and comes in as a `Calibration`. Imports the records.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from edge_runtime.codecs import update_bytes
from edge_runtime.graphs.bundle import part_tensors, unpruned
from edge_runtime.layout import adapted, place_bytes, sent
from edge_runtime.model import EMBED, ModelSpec, TensorSpec
from edge_runtime.records import Bytes, CostRow, Range, Seconds, TrainSettings
from edge_runtime.training.optimizers import state_bytes_per_parameter

MARGIN = 1.02  # the promise stands this much above the law, so that a device keeps it,
HEAP_BYTES = 10 << 20  # and this: holes in the heap, which come and go with the lengths of the texts
PIECES_BYTES = 8 << 20  # more of them where a batch is cut into pieces of different sizes
TABLE_BYTES = 4 << 20  # of a table of the embedding from here on rows are read as texts need them: it is not mapped
ROUND_BYTES = 1 << 20
QUANTILES = 128
BUCKETS = 16  # batches whose examples are sorted by length together
GRAPH_BACKEND = "onnx"
GRAPH_MARGIN, GRAPH_HEAP_BYTES = 1.02, 11 << 20  # the same for the graph backend, whose working memory is measured
CACHE_BUFFERS = 4  # batches of features in memory while the cache is read ahead


@dataclass(frozen=True)
class DataShape:
    """What the costs depend on in a data set. Lengths in tokens, after truncation."""

    num_examples: int
    longest: int
    mean_length: float
    lengths: tuple[int, ...] = ()  # at evenly spaced quantiles, ascending; none: all are as long as the mean


def shape_of(histogram: Sequence[int]) -> DataShape:
    """The shape of data of which `histogram[n]` texts have n tokens."""
    count, cumulated = sum(histogram), list(itertools.accumulate(histogram))
    quantiles = [bisect_right(cumulated, (i + 0.5) / QUANTILES * count) for i in range(QUANTILES)]
    longest = max(n for n, texts in enumerate(histogram) if texts)
    mean = sum(n * texts for n, texts in enumerate(histogram)) / count
    return DataShape(count, longest, mean, tuple(quantiles))


@functools.lru_cache(maxsize=256)
def padded_tokens(data: DataShape, batch: int, micro_batch: int) -> float:
    """Tokens of a batch, with the padding that is left when texts of like length are together, each piece padded to its longest.

    As `training.corpus` does it: BUCKETS batches are sorted by length together.
    """
    together = max(1, min(data.num_examples, batch * BUCKETS))
    lengths = data.lengths or (math.ceil(data.mean_length),)
    ascending = [lengths[int((i + 0.5) / together * len(lengths))] for i in range(together)]
    tokens = 0
    for start in range(0, together, batch):
        stop = min(start + batch, together)
        for piece in range(start, stop, micro_batch):
            end = min(piece + micro_batch, stop)
            tokens += (end - piece) * ascending[end - 1]
    return tokens * batch / together


@dataclass(frozen=True)
class Point:
    """A measured peak."""

    tokens: Annotated[int, Range(1, 1 << 40)]
    peak_bytes: Bytes


@dataclass(frozen=True)
class Calibration:
    """What the probe measured for one model on one machine with one backend and thread count.

    Seconds are a line over the tokens of a micro-batch: fixed + per_token * tokens. A frozen block forward takes `forward_step_s`
    more, once for all micro-batches of a step: its weights come from the file again. A block's are of one that is not pruned.
    """

    backend: Annotated[str, Range(1, 32)]
    runtime_bytes: Bytes  # resident memory of the process that the law does not explain
    forward_fixed_s: Seconds  # one block forward
    forward_per_token_s: Seconds
    train_fixed_s: Seconds  # one block forward and backward, as whole steps tell it
    train_per_token_s: Seconds
    update_per_parameter_s: Seconds  # optimizer
    rank: Annotated[int, Range(0, 1024)] = 0  # of the LoRA adapters that were measured
    precision: Annotated[str, Range(1, 32)] = "float32"  # of the frozen prefix
    rest_fixed_s: Seconds = 0.0  # embedding and head
    rest_per_token_s: Seconds = 0.0
    # Backend "onnx": what the law of `graph_law_bytes` does not explain, by the padded tokens of a micro-batch.
    head_peaks: Annotated[tuple[Point, ...], Range(0, 16)] = ()  # the head alone trained
    block_peaks: Annotated[tuple[Point, ...], Range(0, 16)] = ()  # one or two blocks, as `probed_depth` says
    probed_depth: Annotated[int, Range(0, 2)] = 0
    saved_per_token_bytes: Bytes = 0  # for each further trained block, without checkpointing; torch: with adapters
    correction: Annotated[float, Range(1, 16)] = 1.0  # of every promised peak, after a process was killed at its limit
    forward_step_s: Seconds = 0.0
    entry_s: Seconds = 0.0  # to put a masked entry into its matrix, or take it out of a gradient
    copy_s: Seconds = 0.0  # to copy one value of a matrix


@dataclass(frozen=True)
class ActivationLaw:
    """Bytes of activations in units of tokens * hidden * 4, fitted to measured peaks (`docs/memory.md`)."""

    per_block: float = 8.0  # plus 2 for each `hidden` of feed-forward width: 16 in all for BERT's 4
    per_inner: float = 2.0
    working: float = 4.0  # beside the saved ones, while a block runs backward
    adapted: float = 1.1  # times the feed-forward width more with adapters: 8.4 in all for BERT's 4
    prefix: float = 2.0  # for a block without gradients, times 2 + the feed-forward width: 12 in all for BERT's 4


LAW = ActivationLaw()


@dataclass(frozen=True)
class Trained:
    """What a candidate trains, in numbers of values."""

    depth: int
    rank: int  # the largest of its adapters; 0 where the blocks themselves are trained
    total: int
    one_block: int  # the most of one block, with the head; blocks of a pruned model count by the most of each tensor
    largest: int  # of one tensor
    still: int = 0  # in adapters' A that stay as they are, beside the trained ones
    update: tuple[TensorSpec, ...] = ()  # what is sent
    masked: int = 0  # of the total: entries of matrices that are trained sparsely
    dense: int = 0  # values of the most such matrices of one block
    made: int = 0  # values of all of one block's gradients, which a graph makes wanted or not
    largest_dense: int = 0  # of the largest matrix that is trained sparsely
    place_bytes: int = 0  # what tells where the masked entries are

    @property
    def num_bytes(self) -> int:
        """Their float32 bytes, or those of their gradients."""
        return 4 * self.total

    def held_bytes(self, optimizer: str) -> int:
        """With their optimizer states, and where they are."""
        return int((4 + state_bytes_per_parameter(optimizer)) * self.total) + 4 * self.still + self.place_bytes


def trained(
    spec: ModelSpec, depth: int, settings: TrainSettings, ranks: Sequence[int] = (), adapters: str = "ab"
) -> Trained:
    """What a suffix of `depth` blocks trains: the blocks and the head, or with `settings.lora_rank` adapters and the head.

    Args:
        ranks: of the adapters in each of its blocks, none above `settings.lora_rank`; empty: all of them that.
        adapters: what of them is trained and sent, as in a plan: "b" trains B alone; "" trains both and sends the suffix.
    """
    ranks = ranks or (settings.lora_rank,) * depth

    def those(what: str) -> tuple[TensorSpec, ...]:
        return sent(spec, depth, ranks, settings, what)

    update = those(adapters)
    tensors = update if adapters else those("ab")
    total, head = (sum(t.size for t in tensors if t.part >= first) for first in (EMBED, spec.num_blocks))
    one_block = head + _one_block(spec, [t for t in tensors if t.part < spec.num_blocks])
    still = sum(t.size for t in those("ab")) - total if adapters == "b" else 0
    found = Trained(depth, max(ranks, default=0), total, one_block, max(t.size for t in tensors), still, update)
    return _with_mask(found, spec, settings, head) if settings.mask_every and depth else found


def _one_block(spec: ModelSpec, tensors: Sequence[TensorSpec]) -> int:
    """The most values of one block; the blocks of a pruned model take over each other's memory tensor by tensor."""
    of_part: dict[int, list[int]] = {}
    for tensor in tensors:
        of_part.setdefault(tensor.part, []).append(tensor.size)
    if any(share.work < 1 for share in block_shares(spec)):
        return sum(map(max, itertools.zip_longest(*of_part.values(), fillvalue=0)))
    return max(map(sum, of_part.values()), default=0)


def _with_mask(what: Trained, spec: ModelSpec, settings: TrainSettings, head: int) -> Trained:
    """What is trained sparsely in the last `what.depth` blocks beside the `head` values of the head."""
    blocks = dict.fromkeys(range(spec.num_blocks - what.depth, spec.num_blocks), 1)
    matrices = [t for t, _ in adapted(spec, blocks, settings.lora_targets)]
    dense, made = _one_block(spec, matrices), _one_block(spec, [t for t in spec.tensors if t.part in blocks])
    largest = max((t.size for t in matrices), default=0)
    masked, of_each = what.total - head, place_bytes(settings.mask_every)
    places = of_each * masked
    return replace(what, masked=masked, dense=dense, made=made, largest_dense=largest, place_bytes=places)


@dataclass(frozen=True)
class Share:
    """A pruned block as shares of the block with all of its heads and channels; 1 where nothing of it is gone.

    Attributes:
        activations: of their bytes, by the widths of the matrices.
        work: of the operations, by the parameters of the matrices.
    """

    activations: float
    work: float


def block_shares(spec: ModelSpec) -> list[Share]:
    """Each block's shares."""
    sizes = {n for t in spec.tensors if 0 <= t.part < spec.num_blocks and t.is_adapted for n in t.shape}
    usual = sizes <= {spec.hidden, spec.feed_forward}  # then the family need not be asked
    whole = spec if usual else unpruned(spec)
    if whole is spec:
        return [Share(1.0, 1.0)] * spec.num_blocks
    sums = []
    for of in (spec, whole):
        matrices = [[t for t in part_tensors(of, part) if t.is_adapted] for part in range(of.num_blocks)]
        sums.append([(sum(sum(t.shape) for t in block), sum(t.size for t in block)) for block in matrices])
    return [Share(widths / all_widths, size / all_) for (widths, size), (all_widths, all_) in zip(*sums, strict=True)]


def static_bytes(spec: ModelSpec, what: Trained, optimizer: str) -> int:
    """Weights and optimizer state, without gradients; frozen weights count as mapped pages, all of them touched, but for tables.

    Masked entries are in private copies of their matrices, which take the place of mapped pages.
    """
    cut = spec.num_blocks - (0 if what.rank or what.masked else what.depth)
    mapped = sum(t.num_bytes for t in spec.tensors if t.part < cut and not is_table(t))
    return mapped + what.held_bytes(optimizer) - 4 * what.masked


def is_table(tensor: TensorSpec) -> bool:
    """Whether it is a table, such as a vocabulary, whose rows are read from the file where texts need them."""
    return tensor.part == EMBED and len(tensor.shape) == 2 and tensor.num_bytes >= TABLE_BYTES


def graph_law_bytes(
    spec: ModelSpec, what: Trained, checkpointing: bool, tokens: int, batch_tokens: int, optimizer: str
) -> int:
    """What the graph backend holds throughout a step, without what a micro-batch of `tokens` needs (that is measured).

    Gradients are summed over micro-batches for every trained block, or, layer by layer, for one block at a time; a further
    micro-batch's gradients of one block stand beside them. With a mask the sums are of masked entries, and beside them stand one
    block's matrices and all of its gradients, dense. Hidden states of the whole batch: before and after a frozen block,
    and with checkpointing each trained block's input and two gradients.
    """
    pieces, depth = -(-batch_tokens // tokens), what.depth
    all_blocks = pieces > 1 and depth > 0 and not checkpointing
    sums = 4 * what.one_block
    if what.masked:
        sums = (what.num_bytes if all_blocks else sums) + 4 * (what.dense + what.made)
    elif pieces > 1:
        sums += what.num_bytes if all_blocks else 4 * what.one_block
    states = min(2, 1 + spec.num_blocks - depth) * batch_tokens
    states += (depth + 1) * batch_tokens if checkpointing else 2 * tokens
    return what.held_bytes(optimizer) + sums + 4 * states * spec.hidden


def graph_peak_bytes(
    spec: ModelSpec,
    settings: TrainSettings,
    calibration: Calibration,
    what: Trained,
    checkpointing: bool,
    tokens: int,
    batch_tokens: int,
) -> int:
    """Peak of the graph backend, with micro-batches of `tokens` padded tokens in a batch of `batch_tokens`."""
    c, depth = calibration, what.depth
    held = graph_law_bytes(spec, what, checkpointing, tokens, batch_tokens, settings.optimizer)
    head = held + between(c.head_peaks, tokens)
    if depth == 0:
        return int(head)
    shares = [share.activations for share in block_shares(spec)]
    trained, probed = shares[-depth:], shares[spec.num_blocks - c.probed_depth :]
    kept = (max(trained) if checkpointing else sum(trained)) - sum(
        probed
    )  # of what a block keeps, that the probe did not
    block = between(c.block_peaks, tokens)
    if probed and max(trained) > max(probed):
        block += (max(trained) / max(probed) - 1) * max(0.0, block - between(c.head_peaks, tokens))
    return int(max(head, held + block + kept / shares[-1] * c.saved_per_token_bytes * tokens))


def between(points: Sequence[Point], tokens: int) -> float:
    """The line through the two measured points around `tokens`, or the nearest two, continued; of one, a share and no less."""
    if len(points) < 2:
        return points[0].peak_bytes * max(1.0, tokens / points[0].tokens) if points else 0.0
    number = sum(p.tokens < tokens for p in points[1:-1])
    low, high = points[number], points[number + 1]
    slope = (high.peak_bytes - low.peak_bytes) / max(1, high.tokens - low.tokens)
    return low.peak_bytes + max(0.0, slope) * (tokens - low.tokens)


def dynamic_bytes(
    spec: ModelSpec, what: Trained, checkpointing: bool, tokens: int, pieces: int, saved_per_token: int = 0
) -> int:
    """Peak of activations and gradients in a step of `pieces` micro-batches, the largest of `tokens` padded tokens.

    With one piece, gradients appear as activations go; with more, those of the pieces before are held throughout.

    Args:
        saved_per_token: bytes that a block with adapters keeps for its backward pass, which depend on the targets; 0: as a
            block that is trained itself.
    """
    unit = 4 * tokens * spec.hidden
    wide = spec.feed_forward / spec.hidden
    shares = [share.activations for share in block_shares(spec)]
    prefix = LAW.prefix * (2 + wide) * unit * max(shares)
    saved = (LAW.per_block + LAW.per_inner * wide) * unit
    if what.rank and saved_per_token:
        saved = saved_per_token * tokens / shares[-1]  # the last block's were measured
    working = (LAW.working + (LAW.adapted * wide if what.rank else 0)) * unit
    gradients, depth = what.num_bytes + 4 * what.largest_dense, what.depth  # of masked matrices one at a time is dense
    if depth == 0:
        at_start, at_end = prefix, float(gradients)
    else:
        trained = shares[-depth:]
        largest, working = max(trained) * saved, max(trained) * working
        at_start = (depth * unit + largest if checkpointing else sum(trained) * saved) + working
        at_end = gradients + largest + working
    peak = max(at_start + gradients, prefix + gradients) if pieces > 1 else max(at_start, at_end, prefix)
    return int(max(peak, gradients + 2 * 4 * what.largest))  # the optimizer's temporaries


def law_bytes(
    spec: ModelSpec,
    what: Trained,
    checkpointing: bool,
    tokens: int,
    pieces: int,
    optimizer: str,
    saved_per_token: int = 0,
) -> int:
    """What the law says beside the runtime: static and dynamic."""
    dynamic = dynamic_bytes(spec, what, checkpointing, tokens, pieces, saved_per_token)
    return static_bytes(spec, what, optimizer) + dynamic


def cost(
    spec: ModelSpec,
    data: DataShape,
    settings: TrainSettings,
    calibration: Calibration,
    what: Trained,
    checkpointing: bool,
    micro_batch: int,
    cached: bool = False,
    codec: str = "f32",
) -> CostRow:
    """The predicted cost of one candidate that trains `what` (`trained`)."""
    c, depth, batch = calibration, what.depth, max(1, min(settings.batch_size, data.num_examples))
    micro_batch = min(micro_batch, batch)
    pieces = -(-batch // micro_batch)
    cached = cached and c.backend == GRAPH_BACKEND and depth < spec.num_blocks
    if c.backend == GRAPH_BACKEND:
        law = graph_peak_bytes(spec, settings, c, what, checkpointing, micro_batch * data.longest, batch * data.longest)
        law += CACHE_BUFFERS * 4 * batch * data.longest * spec.hidden if cached else 0
        peak = law * GRAPH_MARGIN + GRAPH_HEAP_BYTES
    else:
        of_micro_batch = (micro_batch * data.longest, pieces, settings.optimizer, c.saved_per_token_bytes)
        law = law_bytes(spec, what, checkpointing, *of_micro_batch)
        peak = (c.runtime_bytes + law) * MARGIN + HEAP_BYTES + (PIECES_BYTES if pieces > 1 else 0)
    peak *= c.correction
    tokens = padded_tokens(data, batch, micro_batch)

    def seconds(fixed_s: float, per_token_s: float) -> float:
        return pieces * fixed_s + tokens * per_token_s

    forward = c.forward_step_s + seconds(c.forward_fixed_s, c.forward_per_token_s)
    train = seconds(c.train_fixed_s, c.train_per_token_s)
    work, cut = [share.work for share in block_shares(spec)], spec.num_blocks - depth
    again = work[cut:] if c.backend != GRAPH_BACKEND else work[cut:-1]  # blocks that checkpointing runs twice
    prefix = sum(work[:cut]) * forward
    step = sum(work[cut:]) * train + (sum(again) * forward if checkpointing else 0)
    step += seconds(c.rest_fixed_s, c.rest_per_token_s)
    step += what.total * c.update_per_parameter_s + masking_s(what, c, settings.mask_every, pieces, checkpointing)
    steps = data.num_examples / batch
    return CostRow(
        depth,
        checkpointing,
        micro_batch,
        int(peak) // ROUND_BYTES * ROUND_BYTES + ROUND_BYTES,
        step + prefix,
        (step + prefix) * steps,
        update_bytes(what.update, codec),
        backend=c.backend,
        rank=what.rank,
        precision=c.precision,
        cached=cached,
        later_epoch_s=step * steps if cached else 0.0,
        codec=codec,
        mask_every=settings.mask_every if what.masked else 0,
    )


def masking_s(what: Trained, calibration: Calibration, every: int, pieces: int, checkpointing: bool) -> float:
    """Seconds of a step that masks cost: entries are taken out of each micro-batch's gradients and put into matrices.

    The graph backend makes a block's matrices dense whenever another block's took their place.
    """
    if not what.masked:
        return 0.0
    c, depth = calibration, what.depth
    entry_s = c.copy_s if every == 1 else c.entry_s
    if c.backend != GRAPH_BACKEND:
        return (pieces + 2) * what.masked * entry_s
    made = 2 * depth - 1 if checkpointing else pieces * (2 * depth - 2)
    return made * what.dense * c.copy_s + (pieces + (made + 1) / depth) * what.masked * entry_s


def micro_batches(batch_size: int) -> Sequence[int]:
    """The micro-batches worth trying: the batch, halved until one example."""
    sizes = []
    while batch_size > 1:
        sizes.append(batch_size)
        batch_size = (batch_size + 1) // 2
    return [*sizes, 1]
