"""The predicted cost of a plan: how it grows and shrinks, and that it adds up. How true it is, the benches tell."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_models import bert
from edge_runtime.cost import (
    Calibration,
    DataShape,
    Point,
    Share,
    Trained,
    block_shares,
    cost,
    dynamic_bytes,
    graph_law_bytes,
    graph_peak_bytes,
    law_bytes,
    masking_s,
    micro_batches,
    padded_tokens,
    shape_of,
    static_bytes,
    trained,
)
from edge_runtime.records import CostRow, TrainSettings
from edge_runtime.training.corpus import Corpus
from edge_runtime.wire import from_plain, to_plain
from tests.networks import bert_spec
from tests.samples import quickly, small_spec

SPEC = small_spec(4, 64)
BERT: dict[str, int | float | str] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 90,
    "max_position_embeddings": 60,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
DATA = DataShape(1000, 120, 30.0)
SETTINGS = TrainSettings(epochs=2, batch_size=16)
CALIBRATION = Calibration("torch", 100 << 20, 1e-3, 2e-5, 3e-3, 7e-5, 1e-9, rest_fixed_s=1e-3, rest_per_token_s=2e-5)

DEPTHS = st.integers(0, 4)
TOKENS = st.integers(1, 20_000)
PIECES = st.integers(1, 16)


def priced(
    depth: int,
    checkpointing: bool = False,
    micro_batch: int = 16,
    data: DataShape = DATA,
    settings: TrainSettings = SETTINGS,
    calibration: Calibration = CALIBRATION,
) -> CostRow:
    """The cost with this file's model and machine."""
    return cost(SPEC, data, settings, calibration, trained(SPEC, depth, settings), checkpointing, micro_batch)


def suffix(depth: int) -> Trained:
    """What is trained at this depth without adapters."""
    return trained(SPEC, depth, SETTINGS)


def test_upload_is_the_bytes_of_the_suffix() -> None:
    head = 4 * (2 * 64 + 1)
    block = 4 * (64 * 64 + 64)
    assert [priced(depth).upload_bytes for depth in range(5)] == [head + depth * block for depth in range(5)]


def test_adamw_holds_three_copies_of_what_is_trained_and_sgd_one_and_frozen_weights_are_held_once() -> None:
    whole = sum(t.num_bytes for t in SPEC.tensors)
    for depth in range(5):
        assert static_bytes(SPEC, suffix(depth), "sgd") == whole
        assert static_bytes(SPEC, suffix(depth), "adamw") == whole + 2 * suffix(depth).num_bytes


@quickly(80)
@given(depth=st.integers(1, 4), tokens=TOKENS, pieces=PIECES, checkpointing=st.booleans())
def test_a_deeper_suffix_more_tokens_or_more_pieces_never_need_less_memory(
    depth: int, tokens: int, pieces: int, checkpointing: bool
) -> None:
    here = dynamic_bytes(SPEC, suffix(depth), checkpointing, tokens, pieces)
    assert here >= dynamic_bytes(SPEC, suffix(depth - 1), checkpointing and depth > 1, tokens, pieces)
    assert here >= dynamic_bytes(SPEC, suffix(depth), checkpointing, tokens - 1, pieces)
    assert dynamic_bytes(SPEC, suffix(depth), checkpointing, tokens, pieces + 1) >= here
    for optimizer in ("adamw", "sgd"):
        assert law_bytes(SPEC, suffix(depth), checkpointing, tokens, pieces, optimizer) == here + static_bytes(
            SPEC, suffix(depth), optimizer
        )


@quickly(80)
@given(depth=st.integers(2, 4), tokens=TOKENS, pieces=PIECES)
def test_checkpointing_two_blocks_or_more_never_needs_more_memory(depth: int, tokens: int, pieces: int) -> None:
    assert dynamic_bytes(SPEC, suffix(depth), True, tokens, pieces) <= dynamic_bytes(
        SPEC, suffix(depth), False, tokens, pieces
    )


def test_long_sequences_make_checkpointing_save_most_of_the_activations() -> None:
    assert dynamic_bytes(SPEC, suffix(4), True, 10_000, 1) < 0.5 * dynamic_bytes(SPEC, suffix(4), False, 10_000, 1)


def test_gradients_are_always_room_for() -> None:
    for depth in range(5):
        assert dynamic_bytes(SPEC, suffix(depth), False, 1, 1) >= suffix(depth).num_bytes


def test_the_promised_peak_is_above_the_law_and_a_whole_number_of_mib() -> None:
    for depth in range(5):
        for size in (1, 4, 16):
            row = priced(depth, micro_batch=size)
            law = law_bytes(SPEC, suffix(depth), False, size * DATA.longest, 16 // size, "adamw")
            assert row.peak_bytes > CALIBRATION.runtime_bytes + law
            assert row.peak_bytes % (1 << 20) == 0


@quickly(80)
@given(
    depth=DEPTHS,
    size=st.sampled_from([1, 2, 4, 8]),
    examples=st.integers(1, 5000),
    longest=st.integers(2, 512),
    share=st.floats(0.1, 1),
)
def test_time_grows_with_depth_checkpointing_and_pieces(
    depth: int, size: int, examples: int, longest: int, share: float
) -> None:
    data = DataShape(examples, longest, max(1.0, longest * share))
    row = priced(depth, False, size, data)
    assert 0 < row.step_s < math.inf
    if depth:
        assert row.step_s >= priced(depth - 1, False, size, data).step_s
        assert row.step_s < priced(depth, True, size, data).step_s
    assert row.step_s >= priced(depth, False, 2 * size, data).step_s
    assert row.epoch_s == pytest.approx(row.step_s * examples / min(16, examples))


def test_a_step_of_several_pieces_pays_the_fixed_time_of_each() -> None:
    """Five forwards (two frozen blocks, embedding and head count one) and two blocks trained, for each piece."""
    more = priced(2, micro_batch=4).step_s - priced(2, micro_batch=16).step_s
    assert more == pytest.approx(3 * (3 * CALIBRATION.forward_fixed_s + 2 * CALIBRATION.train_fixed_s))


def test_reading_a_frozen_blocks_weights_again_costs_once_for_all_pieces_of_a_step() -> None:
    slow_disk = dataclasses.replace(CALIBRATION, forward_step_s=0.5)
    for size in (16, 4):
        more = priced(1, micro_batch=size, calibration=slow_disk).step_s - priced(1, micro_batch=size).step_s
        assert more == pytest.approx(0.5 * 3)


def test_a_mask_costs_for_each_entry_and_for_each_time_that_a_block_is_made_dense() -> None:
    what = dataclasses.replace(trained(SPEC, 2, SETTINGS), masked=1000, dense=5000)
    graphs = dataclasses.replace(CALIBRATION, backend="onnx", entry_s=1e-3, copy_s=1e-4)
    assert masking_s(trained(SPEC, 2, SETTINGS), graphs, 10, 4, False) == 0, "no mask"
    one, four = (masking_s(what, graphs, 10, pieces, False) for pieces in (1, 4))
    assert one == pytest.approx(2 * 5000 * 1e-4 + (1 + 3 / 2) * 1000 * 1e-3), (
        "one block made anew forward, one backward"
    )
    assert four == pytest.approx(8 * 5000 * 1e-4 + (4 + 9 / 2) * 1000 * 1e-3)
    assert masking_s(what, graphs, 10, 4, True) < four, "layer by layer no block is made twice on the way back"
    assert masking_s(what, graphs, 1, 4, False) < four, "all entries are copied, without looking for them"
    assert masking_s(what, dataclasses.replace(graphs, backend="torch"), 10, 4, False) == pytest.approx(6 * 1000 * 1e-3)


def test_the_peak_follows_the_longest_text_and_the_time_the_mean() -> None:
    longer = dataclasses.replace(DATA, longest=240)
    assert priced(3, data=longer).peak_bytes > priced(3).peak_bytes
    assert priced(3, data=longer).step_s == priced(3).step_s
    denser = dataclasses.replace(DATA, mean_length=60.0)
    assert priced(3, data=denser).peak_bytes == priced(3).peak_bytes
    assert priced(3, data=denser).step_s > priced(3).step_s


def test_a_step_never_counts_more_tokens_than_full_length() -> None:
    full = DataShape(1000, 50, 50.0)
    tokens = 16 * 50
    expected = 5 * (CALIBRATION.forward_fixed_s + tokens * CALIBRATION.forward_per_token_s)
    head_only = expected + (2 * 64 + 1) * CALIBRATION.update_per_parameter_s
    assert priced(0, data=full).step_s == pytest.approx(head_only)


def test_fewer_examples_than_a_batch_are_one_small_batch_and_none_cost_nothing() -> None:
    few = priced(1, micro_batch=5, data=DataShape(5, 120, 30.0))
    assert few.epoch_s == few.step_s
    assert few.step_s < priced(1).step_s
    none = priced(1, micro_batch=1, data=DataShape(0, 120, 30.0))
    assert none.epoch_s == 0.0
    assert none.peak_bytes > 0


@quickly(60)
@given(batch=st.integers(1, 4096))
def test_micro_batches_halve_from_the_batch_to_one_and_cover_it_in_few_pieces(batch: int) -> None:
    sizes = micro_batches(batch)
    assert sizes[0] == batch
    assert sizes[-1] == 1
    assert all(a > b >= a / 2 for a, b in itertools.pairwise(sizes))


def test_a_row_and_a_calibration_may_travel() -> None:
    row = priced(2)
    assert from_plain(CostRow, to_plain(row), "row") == row
    assert from_plain(Calibration, to_plain(CALIBRATION), "calibration") == CALIBRATION


def test_the_tokens_of_a_batch_are_those_that_the_corpus_gives(tmp_path: Path) -> None:
    lengths = [4 + i * i % 97 for i in range(700)]
    np.save(tmp_path / "tokens.npy", np.ones(sum(lengths), np.int32))
    np.save(tmp_path / "starts.npy", np.cumsum([0, *lengths]))
    np.save(tmp_path / "labels.npy", np.zeros(len(lengths), np.int32))
    corpus, shape = Corpus(tmp_path), shape_of(np.bincount(lengths).tolist())
    assert (shape.num_examples, shape.longest) == (700, max(lengths))
    assert shape.mean_length == pytest.approx(sum(lengths) / 700)
    for micro_batch in (1, 4, 16):
        pieces = [p for b in corpus.epoch(16, 1) for p in corpus.batch(b).split(micro_batch)]
        tokens = sum(piece.ids.size for piece in pieces) * 16 / 700
        assert padded_tokens(shape, 16, micro_batch) == pytest.approx(tokens, rel=0.02)


def test_texts_of_one_length_have_no_padding() -> None:
    assert padded_tokens(shape_of([0, 0, 0, 0, 0, 90]), 16, 4) == 16 * 5
    assert padded_tokens(DataShape(90, 5, 5.0), 16, 4) == 16 * 5


LORA = TrainSettings(lora_rank=8)


def test_adapters_are_priced_by_what_is_really_trained() -> None:
    spec = bert.describe(BERT, ("a", "b"), 60)
    head, matrices = 2 * 128 + 2, 4 * (128 + 128) + 2 * (128 + 512)
    assert trained(spec, 2, LORA).total == head + 2 * 8 * matrices
    assert trained(spec, 3, LORA, (1, 2, 4)).total == head + 7 * matrices
    assert trained(spec, 3, LORA, (1, 2, 4)).one_block == head + 4 * matrices
    some = dataclasses.replace(LORA, lora_targets=("q", "down"))
    assert trained(spec, 1, some).total == head + 8 * (128 + 128 + 128 + 512)
    only_b = trained(spec, 1, some, adapters="b")
    assert (only_b.total, only_b.still) == (head + 8 * (128 + 128), 8 * (128 + 512))
    assert trained(spec, 0, LORA).total == head
    assert (
        static_bytes(spec, trained(spec, 2, LORA), "sgd") == sum(t.num_bytes for t in spec.tensors) + 4 * 16 * matrices
    )


MASKED = TrainSettings(mask_every=10)


def test_masked_entries_are_priced_by_their_number_their_places_and_one_dense_block() -> None:
    spec = bert.describe(BERT, ("a", "b"), 60)
    head, matrix, wide = 2 * 128 + 2, 128 * 128, 128 * 512
    dense, entries = 4 * matrix + 2 * wide, 4 * math.ceil(matrix / 10) + 2 * math.ceil(wide / 10)
    what = trained(spec, 2, MASKED)
    assert (what.total, what.masked, what.one_block) == (head + 2 * entries, 2 * entries, head + entries)
    assert (what.dense, what.largest_dense) == (dense, wide)
    frozen, batch = sum(t.num_bytes for t in spec.tensors), 4 * (2 * 64 + 2 * 64) * 128
    held = 12 * (head + 2 * entries) + 2 * entries  # a byte tells where an entry is
    assert static_bytes(spec, what, "adamw") == frozen + held - 4 * (head + 2 * entries)  # in matrices that are copies
    one = graph_law_bytes(spec, what, False, 64, 64, "adamw")
    block = dense + 9 * 128 + 512  # with its vectors, whose gradients the graph makes too
    assert one == held + 4 * (head + entries) + 4 * (dense + block) + batch
    far = trained(spec, 2, TrainSettings(mask_every=300))
    assert far.held_bytes("sgd") == 4 * far.total + 2 * far.masked
    assert trained(spec, 0, MASKED) == trained(spec, 0, SETTINGS)
    some = trained(spec, 2, dataclasses.replace(MASKED, lora_targets=("q",)))
    assert (some.dense, some.largest_dense, some.total) == (matrix, matrix, head + 2 * math.ceil(matrix / 10))
    assert some.made == block, "the graph makes the gradients of the others too"


@quickly(40)
@given(depth=st.integers(2, 3), tokens=TOKENS, pieces=PIECES, checkpointing=st.booleans(), every=st.integers(10, 1000))
def test_a_mask_of_two_blocks_or_more_never_needs_more_memory_than_whole_blocks(
    depth: int, tokens: int, pieces: int, checkpointing: bool, every: int
) -> None:
    spec = bert.describe(BERT, ("a", "b"), 60)
    settings = TrainSettings(mask_every=every)
    sparse, whole = trained(spec, depth, settings), trained(spec, depth, SETTINGS)
    for law in (
        lambda what: law_bytes(spec, what, checkpointing, tokens, pieces, "adamw"),
        lambda what: graph_law_bytes(spec, what, checkpointing, tokens, pieces * tokens, "adamw"),
    ):
        assert law(sparse) < law(whole)


def test_lower_ranks_fewer_layers_and_b_alone_never_cost_more_than_the_row_they_come_from() -> None:
    spec = bert.describe(BERT, ("a", "b"), 60)
    measured = dataclasses.replace(CALIBRATION, rank=8, saved_per_token_bytes=40 * 128)

    def of(settings: TrainSettings, ranks: Sequence[int] = (), adapters: str = "ab") -> CostRow:
        return cost(spec, DATA, settings, measured, trained(spec, 3, settings, ranks, adapters), False, 8)

    whole = of(LORA)
    less = [
        of(LORA, ranks=(1, 4, 8)),
        of(dataclasses.replace(LORA, lora_targets=("q",))),
        of(LORA, adapters="b"),
    ]
    assert whole.rank == 8
    for row in less:
        assert row.peak_bytes <= whole.peak_bytes
        assert row.step_s < whole.step_s
        assert row.upload_bytes < whole.upload_bytes
    assert whole.upload_bytes < of(SETTINGS).upload_bytes


def test_what_a_block_with_adapters_keeps_is_what_was_measured() -> None:
    spec = bert.describe(BERT, ("a", "b"), 60)
    what = trained(spec, 2, LORA)
    few, many = (dynamic_bytes(spec, what, False, 4000, 1, saved) for saved in (6000, 7000))
    assert many - few == 2 * 4000 * 1000


def test_a_pruned_block_counts_by_what_is_left_of_it() -> None:
    whole = bert_spec(128, 4, 512, blocks=3)
    config = bert.with_widths(whole.config, [4, 2, 1], [512, 256, 128])
    spec = bert.describe(config, whole.labels, 40)
    assert block_shares(whole) == [Share(1.0, 1.0)] * 3
    assert [share.work for share in block_shares(spec)] == [1.0, 0.5, 0.25]
    shares = [share.activations for share in block_shares(spec)]
    assert shares[0] == 1 > shares[1] > 0.5 and shares[1] > shares[2] > 0.25
    settings, data = TrainSettings(), DataShape(1000, 40, 20.0)
    for backend in ("torch", "onnx"):
        measured = Calibration(
            backend, 50 << 20, 0.0, 1e-5, 0.0, 3e-5, 0.0,
            head_peaks=(Point(40, 60 << 20),), block_peaks=(Point(40, 64 << 20),), probed_depth=1, saved_per_token_bytes=9000,
        )  # fmt: skip
        for depth in (1, 2, 3):
            rows = [cost(s, data, settings, measured, trained(s, depth, settings), False, 16) for s in (whole, spec)]
            assert rows[1].step_s < 0.8 * rows[0].step_s and rows[1].upload_bytes < rows[0].upload_bytes
    uniform = bert.describe(bert.with_widths(whole.config, [2] * 3, [256] * 3), whole.labels, 40)
    row, half = (cost(s, data, settings, measured, trained(s, 3, settings), False, 16) for s in (whole, uniform))
    assert half.step_s == pytest.approx(row.step_s / 2)


def test_earlier_blocks_that_are_wider_than_the_measured_ones_raise_the_promise() -> None:
    whole = bert_spec(128, 4, 512, blocks=4)
    settings = TrainSettings()
    peaks = {}
    measured = Calibration(
        "onnx", 0, 0.0, 1e-5, 0.0, 3e-5, 0.0,
        head_peaks=(Point(40, 40 << 20),), block_peaks=(Point(40, 80 << 20),), probed_depth=2, saved_per_token_bytes=9000,
    )  # fmt: skip
    for first in (1, 2, 4):
        config = bert.with_widths(whole.config, [first, 1, 1, 1], [128 * first, 128, 128, 128])
        spec = bert.describe(config, whole.labels, 40)
        law = [graph_law_bytes(spec, trained(spec, 4, settings), c, 640, 640, "adamw") for c in (False, True)]
        peaks[first] = [
            graph_peak_bytes(spec, settings, measured, trained(spec, 4, settings), c, 640, 640) - law[c]
            for c in (False, True)
        ]
    for checkpointing in (0, 1):
        assert peaks[1][checkpointing] < peaks[2][checkpointing] < peaks[4][checkpointing]
