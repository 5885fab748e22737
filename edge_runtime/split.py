"""Divides labelled examples: into train and test, and over the devices of a made-up fleet.

Pure functions of their arguments. Not here: reading (`data.py`), batches (`training/`). Imports `errors` only.

The same seed gives the same split on every platform and Python version. Hence no numpy generator, whose streams may
change between versions (NEP 19), and of `random.Random` only `random()`, the one method whose sequence Python promises
to keep, and `gammavariate`, which is a formula over it.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from edge_runtime.errors import DataError, UsageError

MAX_ALPHA = 1e6  # above, the shares differ by less than 0.1 %: that is `iid`, and larger values overflow


class Labelled(Protocol):
    """Anything with a label, such as `data.Example`."""

    @property
    def label(self) -> str:
        """The class."""


Row = TypeVar("Row", bound=Labelled)
Item = TypeVar("Item")


def train_test(rows: Sequence[Row], test_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide at random, each label by itself: about `test_share` (0 to 1) of it is for testing, at least one is not.

    Both lists keep the order of `rows`. A label's division does not depend on the other labels.

    Raises:
        DataError: there are so few examples of each label that none is left for testing.
        UsageError: the share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise UsageError(f"the test share is a number between 0 and 1, not {test_share}")
    held: set[int] = set()
    for label, indices in _by_label([row.label for row in rows]).items():
        num_test = min(round(test_share * len(indices)), len(indices) - 1)
        held.update(_shuffled(indices, random.Random(f"train_test/{seed}/{label}"))[:num_test])
    if not held:
        raise DataError(
            f"of {len(rows)} examples, a test share of {test_share} leaves none of any label for testing: "
            "raise the share, add examples or give a test file"
        )
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def iid(labels: Sequence[str], num_devices: int, seed: int) -> list[list[int]]:
    """Deal the examples at random, equally many to each device (give or take one). -> indices of each, ascending.

    Raises:
        UsageError: there are fewer examples than devices, or no device.
    """
    _check_devices(len(labels), num_devices, 1)
    order = _shuffled(range(len(labels)), random.Random(f"iid/{seed}"))
    return [sorted(order[device::num_devices]) for device in range(num_devices)]


def shards(labels: Sequence[str], num_devices: int, shards_per_device: int, seed: int) -> list[list[int]]:
    """The "pathological" split of McMahan et al. 2017, section 3 (arXiv:1602.05629). -> indices of each, ascending.

    The examples, sorted by label, are cut into equal runs, and each device gets `shards_per_device` of them: it sees
    hardly more labels than that.

    Raises:
        UsageError: there are fewer examples than shards, or no device.
    """
    num_shards = num_devices * shards_per_device
    if shards_per_device < 1:
        raise UsageError(f"shards_per_device is at least 1, not {shards_per_device}")
    _check_devices(len(labels), num_devices, shards_per_device)
    rng = random.Random(f"shards/{seed}")
    order = [i for indices in _by_label(labels).values() for i in _shuffled(indices, rng)]
    cuts = [len(order) * shard // num_shards for shard in range(num_shards + 1)]
    dealt = _shuffled(range(num_shards), rng)
    return [sorted(i for s in dealt[d::num_devices] for i in order[cuts[s] : cuts[s + 1]]) for d in range(num_devices)]


def dirichlet(
    labels: Sequence[str], num_devices: int, alpha: float, seed: int, min_examples: int = 1
) -> list[list[int]]:
    """Share each label's examples out by a draw from Dirichlet(alpha). -> indices of each device, ascending.

    The split of Yurochkin et al. 2019, section 4 (arXiv:1905.12022): the smaller alpha, the fewer devices hold most of
    a label; about 0.1 is hard, 100 is nearly `iid`. They draw again until every device has enough; we let the richest
    devices give, which always ends. Every example is used exactly once.

    Raises:
        UsageError: alpha is not in (0, `MAX_ALPHA`], or the examples are fewer than num_devices x min_examples.
    """
    if not 0 < alpha <= MAX_ALPHA:
        raise UsageError(f"alpha is a number above 0 and up to {MAX_ALPHA:g}, not {alpha}: for an even split use iid")
    _check_devices(len(labels), num_devices, min_examples)
    rng = random.Random(f"dirichlet/{seed}")
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    for indices in _by_label(labels).values():
        order = _shuffled(indices, rng)
        begin = 0
        for device, count in enumerate(_apportion(len(order), _dirichlet_draw([alpha] * num_devices, rng))):
            devices[device] += order[begin : begin + count]
            begin += count
    _give_to_the_poor(devices, min_examples, rng)
    return [sorted(indices) for indices in devices]


def by_group(groups: Sequence[str], num_devices: int | None = None) -> list[list[int]]:
    """One device for each group, for example each user of a data set. -> indices of each, ascending; groups sorted.

    With fewer devices than groups the largest groups are taken, and the examples of the others are left out.

    Raises:
        UsageError: there are fewer groups than devices.
    """
    found = _by_label(groups)
    wanted = len(found) if num_devices is None else num_devices
    _check_devices(len(groups), wanted, 1)
    if wanted > len(found):
        raise UsageError(f"{wanted} devices need as many groups, there are {len(found)}: take fewer devices")
    kept = set(sorted(found, key=lambda group: (-len(found[group]), group))[:wanted])
    return [indices for group, indices in found.items() if group in kept]


def strength(labels: Sequence[str], ranks: Sequence[int], alpha: float, seed: int) -> list[list[int]]:
    """Tie labels to groups of devices: each label is shared out between the groups by a draw from a Dirichlet
    distribution whose mean is the groups' sizes, and evenly within a group. -> indices of each device, ascending.

    Every device holds at least one example, and every example is used once. The smaller alpha, the more of a label is in
    one group alone: where groups are device classes, whoever leaves out weak devices loses their labels.

    Args:
        ranks: the group of each device.
        alpha: concentration for each group, as in `dirichlet` where the groups are of one size.

    Raises:
        UsageError: alpha is not in (0, `MAX_ALPHA`], or there are fewer examples than devices.
    """
    if not 0 < alpha <= MAX_ALPHA:
        raise UsageError(f"alpha is a number above 0 and up to {MAX_ALPHA:g}, not {alpha}: for an even split use iid")
    _check_devices(len(labels), len(ranks), 1)
    members: dict[int, list[int]] = defaultdict(list)
    for device, rank in enumerate(ranks):
        members[rank].append(device)
    groups = sorted(members)
    alphas = [alpha * len(groups) * len(members[g]) / len(ranks) for g in groups]
    rng = random.Random(f"strength/{seed}")
    devices: list[list[int]] = [[] for _ in ranks]
    for indices in _by_label(labels).values():
        order = _shuffled(indices, rng)
        begin = 0
        for group, count in zip(groups, _apportion(len(order), _dirichlet_draw(alphas, rng)), strict=True):
            for i in order[begin : begin + count]:
                poorest = min(members[group], key=lambda device: len(devices[device]))
                devices[poorest].append(i)
            begin += count
    _give_to_the_poor(devices, 1, rng)
    return [sorted(indices) for indices in devices]


def _give_to_the_poor(devices: list[list[int]], min_examples: int, rng: random.Random) -> None:
    """Let the richest devices give until every one has enough."""
    for poor in devices:
        while len(poor) < min_examples:
            rich = max(devices, key=len)
            poor.append(rich.pop(int(rng.random() * len(rich))))


def _dirichlet_draw(alphas: Sequence[float], rng: random.Random) -> list[float]:
    """A draw from a Dirichlet distribution: gamma draws over their sum."""
    draws = [rng.gammavariate(alpha, 1.0) for alpha in alphas]
    total = math.fsum(draws)
    if total == 0:  # every draw underflowed: alpha is tiny, where the distribution's limit is all to one device
        draws[int(rng.random() * len(draws))] = total = 1.0
    return [draw / total for draw in draws]


def _apportion(count: int, shares: Sequence[float]) -> list[int]:
    """`count` as whole numbers in proportion to the shares: rounded down, and the rest to the largest remainders."""
    parts = [int(count * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: parts[i] - count * shares[i])
    for i in range(count - sum(parts)):
        parts[by_remainder[i]] += 1
    return parts


def _by_label(labels: Sequence[str]) -> dict[str, list[int]]:
    """The indices of each label's examples, labels sorted."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        found[label].append(i)
    return dict(sorted(found.items()))


def _shuffled(items: Iterable[Item], rng: random.Random) -> list[Item]:
    """`random.shuffle` may change between Python versions; sorting by `random()` may not."""
    return sorted(items, key=lambda _: rng.random())


def _check_devices(num_examples: int, num_devices: int, min_examples: int) -> None:
    if num_devices < 1:
        raise UsageError(f"a split needs at least one device, not {num_devices}")
    if num_examples < num_devices * min_examples:
        raise UsageError(
            f"{num_devices} devices with at least {min_examples} examples each need {num_devices * min_examples}, "
            f"there are {num_examples}: take fewer devices or more data"
        )
