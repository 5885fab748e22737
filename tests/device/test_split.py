"""What `edge_runtime.split` promises: the same split everywhere, nothing lost, nothing twice."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import DataError, UsageError
from edge_runtime.split import MAX_ALPHA, dirichlet, iid, shards, train_test

LABELS = [f"class {i % 10}" for i in range(1000)]


@dataclass(frozen=True)
class Labelled:
    number: int
    label: str


def rows(**counts: int) -> list[Labelled]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Labelled(i, label) for i, label in enumerate(labels)]


def test_each_label_gives_its_share_to_the_test_rows() -> None:
    train, test = train_test(rows(a=100, b=50, c=10), 0.2, seed=0)
    assert Counter(row.label for row in test) == {"a": 20, "b": 10, "c": 2}
    assert Counter(row.label for row in train) == {"a": 80, "b": 40, "c": 8}


def test_train_and_test_together_are_the_rows_in_their_order() -> None:
    given_rows = rows(a=30, b=7)
    train, test = train_test(given_rows, 0.3, seed=4)
    assert sorted(train + test, key=lambda row: row.number) == given_rows
    assert train == sorted(train, key=lambda row: row.number)
    assert test == sorted(test, key=lambda row: row.number)


def test_a_label_keeps_at_least_one_example_for_training() -> None:
    train, test = train_test(rows(a=1, b=2), 0.99, seed=0)
    assert Counter(row.label for row in train) == {"a": 1, "b": 1}
    assert Counter(row.label for row in test) == {"b": 1}


def test_another_label_does_not_change_how_a_label_is_divided() -> None:
    alone = train_test(rows(a=40), 0.25, seed=3)[1]
    beside = train_test(rows(a=40, b=13), 0.25, seed=3)[1]
    assert [row for row in beside if row.label == "a"] == alone


def test_another_seed_divides_otherwise() -> None:
    assert train_test(rows(a=100), 0.5, seed=0) != train_test(rows(a=100), 0.5, seed=1)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan])
def test_a_test_share_outside_0_to_1_is_a_usage_error(share: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        train_test(rows(a=10), share, seed=0)


def test_too_few_examples_for_a_test_set_is_a_data_error() -> None:
    with pytest.raises(DataError, match="leaves none of any label for testing"):
        train_test(rows(a=2, b=1), 0.2, seed=0)


def test_splits_are_the_same_on_every_platform_and_python() -> None:
    """Golden values: a change here breaks the comparison with every figure measured before."""
    labels = ["a", "b", "b", "a", "c", "a", "c", "b", "a", "b", "c", "a"]
    assert [row.number for row in train_test(rows(a=6, b=4), 0.5, seed=7)[1]] == [0, 3, 5, 6, 8]
    assert iid(labels, 3, seed=7) == [[3, 4, 6, 9], [1, 2, 10, 11], [0, 5, 7, 8]]
    assert shards(labels, 3, 2, seed=7) == [[1, 4, 9, 10], [2, 3, 5, 6], [0, 7, 8, 11]]
    assert dirichlet(labels, 3, 0.5, seed=7) == [[0, 5, 6, 8, 10, 11], [2, 7, 9], [1, 3, 4]]
    assert dirichlet(labels, 3, 2.0, seed=7) == [[1, 2, 8], [0, 5, 6, 9], [3, 4, 7, 10, 11]]


@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=1, max_size=60),
    num_devices=st.integers(1, 20),
    alpha=st.sampled_from([1e-9, 0.01, 0.5, 1.0, 3.0, MAX_ALPHA]),
    seed=st.integers(0, 1000),
    min_examples=st.integers(0, 5),
)
def test_dirichlet_uses_every_example_once_and_gives_each_device_its_minimum(
    labels: list[str], num_devices: int, alpha: float, seed: int, min_examples: int
) -> None:
    if len(labels) < num_devices * min_examples:
        with pytest.raises(UsageError, match="take fewer devices or more data"):
            dirichlet(labels, num_devices, alpha, seed, min_examples)
        return
    devices = dirichlet(labels, num_devices, alpha, seed, min_examples)
    assert len(devices) == num_devices
    assert sorted(i for indices in devices for i in indices) == list(range(len(labels)))
    assert min(map(len, devices)) >= min_examples
    assert all(indices == sorted(indices) for indices in devices)


@given(num_examples=st.integers(1, 60), num_devices=st.integers(1, 12), per_device=st.integers(1, 4))
def test_iid_and_shards_use_every_example_once(num_examples: int, num_devices: int, per_device: int) -> None:
    labels = [str(i % 3) for i in range(num_examples)]
    if num_examples >= num_devices:
        devices = iid(labels, num_devices, seed=1)
        assert sorted(i for indices in devices for i in indices) == list(range(num_examples))
        assert max(map(len, devices)) - min(map(len, devices)) <= 1
    if num_examples >= num_devices * per_device:
        devices = shards(labels, num_devices, per_device, seed=1)
        assert sorted(i for indices in devices for i in indices) == list(range(num_examples))
        assert min(map(len, devices)) >= per_device


def label_entropy_bits(devices: list[list[int]]) -> float:
    """The mean over devices of the entropy of their labels."""
    total = 0.0
    for indices in devices:
        for count in Counter(LABELS[i] for i in indices).values():
            total -= count / len(indices) * math.log2(count / len(indices))
    return total / len(devices)


def test_a_smaller_alpha_makes_devices_more_alike_inside_and_more_different_outside() -> None:
    hard, mild, even = (label_entropy_bits(dirichlet(LABELS, 10, alpha, seed=0)) for alpha in (0.1, 1.0, 1000.0))
    assert hard < mild - 0.5 < even - 1.0
    assert even > math.log2(10) - 0.05


def test_a_device_with_two_shards_of_equal_classes_sees_two_labels_at_most() -> None:
    devices = shards(LABELS, 5, 2, seed=0)
    assert max(len({LABELS[i] for i in indices}) for indices in devices) <= 2
    assert {len(indices) for indices in devices} == {200}


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, 1e7])
def test_an_alpha_that_is_no_positive_number_is_a_usage_error(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha is a number above 0"):
        dirichlet(LABELS, 3, alpha, seed=0)


def test_no_device_or_no_shard_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="at least one device"):
        iid(LABELS, 0, seed=0)
    with pytest.raises(UsageError, match="shards_per_device is at least 1"):
        shards(LABELS, 2, 0, seed=0)
    with pytest.raises(UsageError, match="take fewer devices"):
        shards(LABELS, 600, 2, seed=0)
