"""From options and a model to what is simulated: data, this machine's calibration, devices of their classes. No rounds, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_coordinator.sim import ENGINES
from edge_coordinator.sim.classes import DeviceClass, deal, parse_shares, read_budgets, read_classes
from edge_coordinator.sim.data import packed, read_column, shape_of
from edge_coordinator.sim.devices import VirtualDevice, chance
from edge_coordinator.sim.partition import divide, parse_partition
from edge_coordinator.sim.speed import measured_gflops, scaled
from edge_runtime import hardware
from edge_runtime.budget import memory_budget
from edge_runtime.calibration import calibrate
from edge_runtime.cost import Calibration, DataShape
from edge_runtime.engine import Engine
from edge_runtime.errors import UsageError
from edge_runtime.local import DataOptions
from edge_runtime.model import ModelSpec
from edge_runtime.records import TrainSettings
from edge_runtime.source import Source
from edge_runtime.store import cache_folder
from edge_runtime.training.corpus import Corpus

MAX_DEVICES = 100_000


@dataclass(frozen=True)
class SimOptions:
    """What is simulated, besides what fleet.toml says.

    Attributes:
        devices: how many; None for `by:COLUMN` alone, where every value of the column is one.
        classes: names and shares of device classes; class_file: a TOML file with more of them.
        dropout: the probability that a device vanishes after it has got a plan.
        evaluate_every: rounds between two measurements of accuracy on `test`.
        threads: of one training; more than one may change the last bits of a model.
        workers: trainings at a time; None is one for each core. It changes nothing but how long it takes, and so does
        engine: "local", or "ray" for a cluster.
    """

    data: Path
    test: Path | None = None
    devices: int | None = None
    classes: str = "pi-4"
    class_file: Path | None = None
    partition: str = "iid"
    dropout: float = 0.0
    evaluate_every: int = 1
    threads: int = 1
    workers: int | None = 1
    engine: str = "local"
    reading: DataOptions = field(default_factory=DataOptions)

    @property
    def kinds(self) -> list[tuple[DeviceClass, float]]:
        """The device classes and their shares."""
        return parse_shares(self.classes, read_classes(self.class_file))


def check_options(options: SimOptions) -> None:
    """Raises: UsageError: a value makes no sense."""
    if not 0 <= options.dropout < 1:
        raise UsageError(f"--dropout must be from 0 to below 1, it is {options.dropout}")
    for flag, value in (
        ("--evaluate-every", options.evaluate_every),
        ("--threads", options.threads),
        ("--workers", 1 if options.workers is None else options.workers),
    ):
        if value < 1:
            raise UsageError(f"{flag} must be at least 1, it is {value}")
    if options.engine not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)}, it is {options.engine!r}")
    if options.devices is None and not parse_partition(options.partition).column:
        raise UsageError("--devices is missing: how many devices to simulate")
    if options.devices is not None and not 1 <= options.devices <= MAX_DEVICES:
        raise UsageError(f"--devices must be from 1 to {MAX_DEVICES}, it is {options.devices}")
    if options.class_file is not None and not options.class_file.is_file():
        raise UsageError(f"{options.class_file} is no file: give the classes to --class-file, or leave it away")
    if options.reading.bad_rows == "skip" and parse_partition(options.partition).column:
        raise UsageError("--skip-bad-rows cannot go with --partition by:COLUMN: correct the rows")
    for path in (options.data, options.test):
        if path is not None and not path.is_file():
            raise UsageError(f"{path} is no file: give the data to simulate with")


def make_devices(options: SimOptions, labels: Sequence[str], corpus: Corpus, seed: int) -> list[VirtualDevice]:
    """The devices with their classes, links and parts of the data. Args: labels: of the model, by number."""
    of_example = [labels[i] for i in corpus.labels]
    partition = parse_partition(options.partition)
    groups = None
    if partition.column:
        groups = read_column(options.data, partition.column, options.reading, len(of_example))

    def classes_of(number: int) -> list[DeviceClass]:
        order = sorted(range(number), key=lambda i: chance(seed, "class", i))
        return deal(options.kinds, number, order)

    parts, kinds = divide(partition, of_example, groups, options.devices, seed, classes_of)
    devices, own = [], read_budgets(options.class_file)
    for number, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        name, (low, high) = f"device-{number}", kind.uplink_bytes_per_s
        uplink = low + (high - low) * chance(seed, "uplink", name)
        devices.append(VirtualDevice(name, kind, packed(part), shape_of(corpus, part), uplink, own.get(name)))
    if unknown := sorted(own.keys() - {device.name for device in devices}):
        raise UsageError(
            f"{options.class_file}: there is no {unknown[0]}, the devices are device-0 to device-{len(devices) - 1}"
        )
    return devices


def calibrated(
    source: Source, engine: Engine, data: DataShape, settings: TrainSettings, threads: int, say: Callable[[str], None]
) -> Calibration:
    """This machine's calibration for a model, remembered or measured now."""
    say("measuring this machine with the model")
    room = memory_budget("auto", hardware.profile(speed=False))
    return calibrate(source, engine, data, settings, threads, cache_folder(), budget_bytes=room, limit_bytes=room)


def calibrations(
    measured: Calibration, spec: ModelSpec, data: DataShape, batch_size: int, kinds: Sequence[DeviceClass]
) -> Mapping[str, Calibration]:
    """This machine's calibration for each class: the same memory, the class's seconds."""
    here = measured_gflops(measured, spec, data, batch_size)
    return {kind.name: scaled(measured, here / kind.gflops) if kind.gflops else measured for kind in kinds}
