"""`--partition`: from a text to each device's examples. Pure; the splits themselves are `edge_runtime.split`'s.

The result is index lists over one data set, so that memory grows with the examples and not with the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_coordinator.sim.classes import DeviceClass
from edge_runtime import split
from edge_runtime.errors import UsageError

HELP = (
    "iid; dirichlet:A (each label shared out with concentration A); shards:K (K runs of the data sorted by label for each "
    "device); by:COLUMN (a device for each value of a column, for example each user); strength:A (labels tied to device "
    "classes)"
)


@dataclass(frozen=True)
class Partition:
    """How the examples are divided: `kind` and its argument."""

    kind: str
    argument: str = ""

    @property
    def column(self) -> str | None:
        """The column whose values are the devices, for `by:COLUMN`."""
        return self.argument if self.kind == "by" else None


def parse_partition(text: str) -> Partition:
    """ "dirichlet:0.5" -> kind and argument.

    Raises:
        UsageError: there is no such partition, or its argument is wrong.
    """
    kind, _, argument = text.partition(":")
    if kind == "iid" and not argument:
        return Partition(kind)
    if kind == "by" and argument:
        return Partition(kind, argument)
    if kind in ("dirichlet", "strength", "shards"):
        try:
            (int if kind == "shards" else float)(argument)
            return Partition(kind, argument)
        except ValueError:
            pass
    raise UsageError(f"--partition {text!r} must be one of: {HELP}")


def divide(
    partition: Partition,
    labels: Sequence[str],
    groups: Sequence[str] | None,
    num_devices: int | None,
    seed: int,
    classes_of: Callable[[int], Sequence[DeviceClass]],
) -> tuple[list[list[int]], Sequence[DeviceClass]]:
    """-> (the indices of each device's examples, the class of each device).

    Args:
        labels, groups: of each example; groups for `by:COLUMN` alone.
        num_devices: None is allowed for `by:COLUMN` alone: every group is a device.
        classes_of: the classes of so many devices.

    Raises:
        UsageError: as the splits, naming the flag; or the number of devices is missing.
    """
    if partition.kind == "by":
        assert groups is not None, "read with the data"
        parts = split.by_group(groups, num_devices)
        return parts, classes_of(len(parts))
    if num_devices is None:
        raise UsageError("--devices is missing: how many devices to simulate")
    if num_devices < 1:
        raise UsageError(f"--devices must be at least 1, it is {num_devices}")
    classes = classes_of(num_devices)
    try:
        return _parts(partition, labels, classes, seed), classes
    except UsageError as error:
        said = f"{partition.kind}:{partition.argument}" if partition.argument else partition.kind
        raise UsageError(f"--partition {said}: {error}") from None


def _parts(partition: Partition, labels: Sequence[str], classes: Sequence[DeviceClass], seed: int) -> list[list[int]]:
    """The indices of each device's examples, where the number of devices is given."""
    num_devices = len(classes)
    if partition.kind == "iid":
        return split.iid(labels, num_devices, seed)
    if partition.kind == "dirichlet":
        return split.dirichlet(labels, num_devices, float(partition.argument), seed)
    if partition.kind == "shards":
        return split.shards(labels, num_devices, int(partition.argument), seed)
    order = sorted({c.name: c.strength for c in classes}.items(), key=lambda item: (item[1], item[0]))
    rank = {name: number for number, (name, _) in enumerate(order)}
    return split.strength(labels, [rank[c.name] for c in classes], float(partition.argument), seed)
