"""What `edge_runtime.training.optimizers` promises: torch's results, in place, in little memory, also with 8-bit states."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.records import TrainSettings
from edge_runtime.training import optimizers
from edge_runtime.training.optimizers import (
    BLOCK,
    MIN_QUANTISED,
    OPTIMIZERS,
    PART,
    Buffers,
    Optimizer,
    QuantisedMoment,
    code_book,
    parts,
    state_bytes_per_parameter,
)

Array = np.ndarray[Any, np.dtype[Any]]
SETTINGS = TrainSettings(learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1)
SHAPES = {"block.weight": (70, 33), "block.bias": (33,), "head.weight": (3, 33), "head.bias": (3,)}
HEAD = ("head.weight", "head.bias")


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def after_steps(optimizer: str, steps: int) -> tuple[dict[str, Array], dict[str, Array], list[dict[str, Array]]]:
    """The weights before and after `steps` updates, and the gradients."""
    rng = np.random.default_rng(0)
    before = {name: normal(rng, *shape, scale=0.1) for name, shape in SHAPES.items()}
    gradients = [{name: normal(rng, *shape) for name, shape in SHAPES.items()} for _ in range(steps)]
    weights = {name: weight.copy() for name, weight in before.items()}
    ours = Optimizer(replace(SETTINGS, optimizer=optimizer), HEAD)
    for step in gradients:
        ours.begin_step()
        for name, gradient in step.items():
            ours.update(name, weights[name], gradient.copy())
    return before, weights, gradients


def updated(optimizer: str, weight: Array, gradients: list[Array], **changes: Any) -> Array:
    """One tensor's weights after its gradients."""
    ours, weight = Optimizer(replace(SETTINGS, optimizer=optimizer, **changes), ()), weight.copy()
    for gradient in gradients:
        ours.begin_step()
        ours.update("w", weight, gradient.copy())
    return weight


def roundtrip(values: Array, *, signed: bool) -> Array:
    moment, buffers, result = QuantisedMoment(values.size, signed=signed), Buffers.new(), values.copy()
    for part in parts(values.size):
        index = buffers.index[: part.stop - part.start]
        moment.store(part, result[part], buffers.first[: index.size], index)
        moment.load(part, result[part], index)
    return result


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "sgd"])
def test_weights_after_20_steps_are_those_of_torch_optim(optimizer: str) -> None:
    torch = pytest.importorskip("torch")
    before, weights, gradients = after_steps(optimizer, 20)
    theirs = {name: torch.nn.Parameter(torch.from_numpy(weight.copy())) for name, weight in before.items()}
    groups = [
        {
            "params": [parameter],
            "lr": SETTINGS.head_learning_rate if name in HEAD else SETTINGS.learning_rate,
            "weight_decay": SETTINGS.weight_decay if optimizer == "adamw" and parameter.dim() > 1 else 0.0,
        }
        for name, parameter in theirs.items()
    ]
    reference = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8),
        "momentum": lambda: torch.optim.SGD(groups, momentum=0.9),
        "sgd": lambda: torch.optim.SGD(groups),
    }[optimizer]()
    for step in gradients:
        for name, gradient in step.items():
            theirs[name].grad = torch.from_numpy(gradient)
        reference.step()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, theirs[name].detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1e-8, 1e-6])
def test_gradients_of_epsilons_size_move_weights_as_in_torch_optim(scale: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(9)
    weight, gradients = normal(rng, 500, scale=0.1), [normal(rng, 500, scale=scale) for _ in range(20)]
    theirs = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    reference = torch.optim.AdamW([theirs], lr=SETTINGS.learning_rate, eps=1e-8, weight_decay=0)
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient)
        reference.step()
    ours = updated("adamw", weight, gradients)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_adamw_decays_matrices_and_not_vectors(optimizer: str) -> None:
    zeros, ones = np.zeros(2 * MIN_QUANTISED, np.float32), np.ones(2 * MIN_QUANTISED, np.float32)
    assert (updated(optimizer, ones, [zeros]) == 1).all()
    decayed = updated(optimizer, ones.reshape(4, -1), [zeros.reshape(4, -1)])
    np.testing.assert_allclose(decayed, 1 - SETTINGS.learning_rate * SETTINGS.weight_decay, rtol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_head_has_its_own_learning_rate(optimizer: str) -> None:
    before, weights, gradients = after_steps(optimizer, 1)
    for name in ("block.bias", "head.bias"):
        rate = SETTINGS.head_learning_rate if name in HEAD else SETTINGS.learning_rate
        gradient = gradients[0][name]
        moved = before[name] - weights[name]
        expected = rate * (np.sign(gradient) if optimizer.startswith("adamw") else gradient)
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_gradients_give_the_same_bits(optimizer: str) -> None:
    rng = np.random.default_rng(1)
    weight, gradients = normal(rng, 9000), [normal(rng, 9000) for _ in range(5)]
    assert updated(optimizer, weight, gradients).tobytes() == updated(optimizer, weight, gradients).tobytes()


BORDERS = sorted({size + d for size in (0, BLOCK, MIN_QUANTISED, PART, PART + BLOCK) for d in (-1, 0, 1)} - {-1})


@settings(deadline=None, max_examples=60)
@given(
    optimizer=st.sampled_from(OPTIMIZERS),
    size=st.sampled_from(BORDERS) | st.integers(0, PART + 3 * BLOCK),
    blocks=st.sampled_from([1, 2, 3, 64]),
    seed=st.integers(0, 1000),
)
def test_the_parts_a_tensor_is_cut_into_change_no_bit(optimizer: str, size: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, gradients = normal(rng, size), [normal(rng, size) for _ in range(3)]
    usual = updated(optimizer, weight, gradients)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "PART", blocks * BLOCK)
        assert updated(optimizer, weight, gradients).tobytes() == usual.tobytes()


@given(size=st.sampled_from(BORDERS) | st.integers(0, 5 * PART))
def test_parts_cover_a_tensor_once_and_begin_at_blocks(size: int) -> None:
    covered = [i for part in parts(size) for i in (part.start, part.stop)]
    assert covered[:1] + covered[-1:] == ([0, size] if size else [])
    assert covered[1:-1:2] == covered[2::2]
    assert all(part.start % BLOCK == 0 and 0 < part.stop - part.start <= PART for part in parts(size))


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_has_256_values_from_a_ten_millionth_to_one(signed: bool) -> None:
    book = code_book(signed=signed)
    assert book.shape == (256,) and (np.diff(book) > 0).all() and book[-1] == 1
    assert book[0] == pytest.approx(-0.99296875) if signed else book[0] == 0
    assert np.abs(book[book != 0]).min() == pytest.approx(5.5e-7 if signed else 3.25e-7)


@settings(deadline=None, max_examples=60)
@given(
    signed=st.booleans(),
    size=st.integers(1, 3 * BLOCK),
    decades=st.integers(0, 12),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_a_value_comes_back_as_the_nearest_code_to_within_a_bin(
    signed: bool, size: int, decades: int, exponent: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = (10.0 ** (exponent - rng.uniform(0, decades, size))).astype(np.float32)
    if signed:
        values *= rng.choice(np.float32([-1, 1]), size)
    book, back = code_book(signed=signed), roundtrip(values, signed=signed)
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        scale = np.abs(values[block]).max()
        normalised = (values[block] / scale).astype(np.float64)
        nearest = np.abs(normalised[:, None] - book).min(axis=1)
        error = np.abs(normalised - back[block] / scale)
        floor = 0 if signed else 3.26e-7  # the second moment's smallest code, taken instead of zero
        assert (error <= np.maximum(nearest + np.abs(normalised) * 2.0**-8, floor) + 1e-7 * np.abs(normalised)).all()


def test_a_second_moment_comes_back_zero_only_where_it_was_and_never_negative() -> None:
    rng = np.random.default_rng(2)
    values = normal(rng, 3 * BLOCK) ** 2 * (10.0 ** rng.uniform(-20, 0, 3 * BLOCK)).astype(np.float32)
    values[::7] = 0
    back = roundtrip(values, signed=False)
    assert (back >= 0).all() and ((back == 0) == (values == 0)).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.0, 3e38])
def test_a_block_of_any_one_magnitude_comes_back(signed: bool, value: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        back = roundtrip(np.full(BLOCK, value, np.float32), signed=signed)
    np.testing.assert_allclose(back, np.float32(value), rtol=1e-6, atol=1e-38)


def test_8_bit_states_of_zero_gradients_leave_vectors_alone() -> None:
    weight = normal(np.random.default_rng(3), 3 * BLOCK)
    with np.errstate(all="raise"):
        assert (updated("adamw8bit", weight, [np.zeros(3 * BLOCK, np.float32)] * 3) == weight).all()


def test_a_huge_gradient_in_8_bit_states_spoils_no_other_block_and_causes_no_large_step() -> None:
    """Beside 1e6 the block's other moments round to nothing; a step divided by epsilon would be 1e5 here."""
    rng = np.random.default_rng(4)
    weight, zeros = normal(rng, 4 * BLOCK), np.zeros(4 * BLOCK, np.float32)
    gradients = [normal(rng, 4 * BLOCK) for _ in range(20)]
    plain = updated("adamw8bit", weight, [*gradients, zeros, zeros])
    for gradient in gradients:
        gradient[BLOCK + 5] = 1e3 if gradient is not gradients[0] else 1e6
    spoilt = updated("adamw8bit", weight, [*gradients, zeros, zeros])
    others = np.r_[0:BLOCK, 2 * BLOCK : 4 * BLOCK]
    assert (spoilt[others] == plain[others]).all()
    assert np.abs(spoilt - weight).max() < 2 * 22 * SETTINGS.learning_rate  # Adam moves about a rate a step


def test_a_gradient_that_is_not_a_number_shows_in_the_weights_with_8_bit_states_too() -> None:
    gradient = np.ones(2 * MIN_QUANTISED, np.float32)
    gradient[3] = np.nan
    assert np.isnan(updated("adamw8bit", np.ones_like(gradient), [gradient, np.ones_like(gradient)])[3])


def test_small_tensors_keep_float32_states() -> None:
    rng = np.random.default_rng(5)
    weight, gradients = normal(rng, MIN_QUANTISED - 1), [normal(rng, MIN_QUANTISED - 1) for _ in range(4)]
    assert (updated("adamw8bit", weight, gradients) == updated("adamw", weight, gradients)).all()
    weight, gradients = normal(rng, MIN_QUANTISED), [normal(rng, MIN_QUANTISED) for _ in range(4)]
    assert (updated("adamw8bit", weight, gradients) != updated("adamw", weight, gradients)).any()


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    """Handwritten digits as 512 random features, so that the weights are many enough for 8-bit states."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    projection = normal(np.random.default_rng(6), pixels.shape[1], 512, scale=1 / 8)
    return np.maximum((pixels / 16).astype(np.float32) @ projection, 0), labels


def logistic_regression(optimizer: str, features: Array, labels: Array, steps: int) -> float:
    """The mean cross-entropy over all rows after `steps` batches of 64."""
    rng = np.random.default_rng(7)
    weight, bias = np.zeros((features.shape[1], 10), np.float32), np.zeros(10, np.float32)
    ours = Optimizer(TrainSettings(learning_rate=2e-3, optimizer=optimizer), ())

    def probabilities(rows: Any) -> Array:
        logits = features[rows] @ weight + bias
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]

    for _ in range(steps):
        rows = rng.integers(0, len(labels), 64)
        error = probabilities(rows)
        error[np.arange(64), labels[rows]] -= 1
        error /= 64
        ours.begin_step()
        ours.update("weight", weight, features[rows].T @ error)
        ours.update("bias", bias, error.sum(axis=0))
    every = np.arange(len(labels))
    return float(-np.log(probabilities(every)[every, labels]).mean())


@pytest.mark.parametrize("steps", [50, 600])
def test_8_bit_adamw_reaches_the_loss_of_adamw_on_handwritten_digits(digits: tuple[Array, Array], steps: int) -> None:
    full, quantised = (logistic_regression(name, *digits, steps) for name in ("adamw", "adamw8bit"))
    print(f"{steps} steps: loss {full:.5f} with float32 states, {quantised:.5f} with 8-bit ones")
    assert full < (1.2 if steps == 50 else 0.15) < np.log(10)
    assert quantised == pytest.approx(full, rel=0.03)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_is_the_promised_state_and_less_than_a_mebibyte_for_a_moment(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        optimizers, "page_zeros", lambda shape, kind="float32": np.zeros(shape, kind)
    )  # tracemalloc does not see pages that are mapped
    size = 4 << 20
    weight, gradient = np.ones((size >> 10, 1 << 10), np.float32), np.ones((size >> 10, 1 << 10), np.float32)
    small = np.ones(MIN_QUANTISED, np.float32)
    code_book.cache_clear()
    optimizers._code_table.cache_clear()
    tracemalloc.start()
    try:
        ours = Optimizer(replace(SETTINGS, optimizer=optimizer), ())
        ours.begin_step()
        ours.update("small", small, small.copy())
        shared, _ = tracemalloc.get_traced_memory()  # buffers and tables, the same for every tensor
        ours.update("large", weight, gradient)
        state = tracemalloc.get_traced_memory()[0] - shared
        ours.begin_step()
        ours.update("large", weight, gradient)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{optimizer}: {state / size:.4f} bytes per parameter, {(peak - state) / 1024:.0f} KiB beside")
    assert state == pytest.approx(size * state_bytes_per_parameter(optimizer), rel=0.01, abs=4096)
    assert peak - state < 1 << 20


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.astype(np.float64), "must be float32, it is float64"),
        (lambda a: a.T, "must be C-contiguous"),
        (lambda a: np.broadcast_to(a[0], a.shape), "must be C-contiguous"),
        (lambda a: a[:4], "must have one shape"),
        (lambda a: np.frombuffer(a.tobytes(), np.float32).reshape(a.shape), "is read-only"),
    ],
)
def test_arrays_that_cannot_be_updated_in_place_are_refused_and_not_copied(
    spoil: Callable[[Array], Array], message: str
) -> None:
    good = np.ones((8, 8), np.float32)
    for weight, gradient in ((spoil(good.copy()), good.copy()), (good.copy(), spoil(good.copy()))):
        ours = Optimizer(SETTINGS, ())
        ours.begin_step()
        with pytest.raises(ValueError, match=message):
            ours.update("w", weight, gradient)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "momentum"])
def test_a_tensor_that_changes_its_size_is_refused(optimizer: str) -> None:
    ours = Optimizer(replace(SETTINGS, optimizer=optimizer), ())
    ours.begin_step()
    for size in (2 * MIN_QUANTISED, 2 * MIN_QUANTISED + 1):
        array = np.ones(size, np.float32)
        if size % 2:
            with pytest.raises(ValueError, match="had 8192 values at its first update, has 8193"):
                ours.update("w", array, array.copy())
        else:
            ours.update("w", array, array.copy())


def test_an_update_before_the_first_step_is_refused() -> None:
    with pytest.raises(ValueError, match="call begin_step first"):
        Optimizer(SETTINGS, ()).update("w", np.ones(1, np.float32), np.ones(1, np.float32))


def test_another_optimizer_is_refused_by_name() -> None:
    for call in (lambda: state_bytes_per_parameter("lion"), lambda: Optimizer(replace(SETTINGS, optimizer="lion"), ())):
        with pytest.raises(ValueError, match="adamw, adamw8bit, momentum, sgd, it is 'lion'"):
            call()


def test_a_weight_may_be_a_memory_map(tmp_path: Any) -> None:
    rng = np.random.default_rng(8)
    weight, gradient = normal(rng, 50, 100), normal(rng, 50, 100)
    weight.tofile(tmp_path / "weight")
    mapped = np.memmap(tmp_path / "weight", np.float32, mode="c", shape=(50, 100))
    ours = Optimizer(SETTINGS, ())
    ours.begin_step()
    ours.update("w", mapped, gradient.copy())
    assert (mapped == updated("adamw", weight, [gradient])).all()
