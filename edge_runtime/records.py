"""The values that travel between the parts: profile, budget, cost row, settings, plan, report. Frozen; units in names.

The bounds beside the types are enforced where such a record arrives over the wire (`wire.py`); inside one process they
are documentation. Imports nothing of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number, or of the length of a text, bytes or tuple."""

    low: float
    high: float


Bytes = Annotated[int, Range(0, 1 << 50)]
Seconds = Annotated[float, Range(0, 1e9)]
Count = Annotated[int, Range(0, 1 << 31)]
Sha256 = Annotated[bytes, Range(32, 32)]
Name = Annotated[str, Range(1, 64)]
Reason = Annotated[str, Range(0, 500)]
Ranks = Annotated[tuple[Annotated[int, Range(1, 1024)], ...], Range(0, 1000)]
MAX_KEPT_BYTES = 12 << 10  # of what a pruned model keeps, a bit a head or channel: with it a control message has room
KeptGroups = Annotated[bytes, Range(0, MAX_KEPT_BYTES)]  # as `pruning.Kept.encode`; empty: all


@dataclass(frozen=True)
class DeviceProfile:
    """What a machine can do now. `None` where the machine does not tell."""

    ram_total_bytes: Bytes
    ram_available_bytes: Bytes
    cgroup_limit_bytes: Bytes | None  # the lowest limit of the process's cgroup and its ancestors
    cgroup_available_bytes: Bytes | None  # that limit less what the cgroup cannot give back
    cores: Count
    gflops: Annotated[float, Range(0, 1e9)]  # float32 matrix product of a block's shape, all usable cores
    memory_gb_per_s: Annotated[float, Range(0, 1e6)]  # copy, read plus written bytes
    temperature_c: Annotated[float, Range(-100, 300)] | None = None
    battery_percent: Annotated[float, Range(0, 100)] | None = None
    plugged_in: bool | None = None

    @property
    def memory_limit_bytes(self) -> int:
        """What this process may hold at most: RAM, or the cgroup limit where it is lower."""
        return min(self.ram_total_bytes, self.cgroup_limit_bytes or self.ram_total_bytes)

    @property
    def memory_available_bytes(self) -> int:
        """What can be had now."""
        if self.cgroup_available_bytes is None:
            return self.ram_available_bytes
        return min(self.ram_available_bytes, self.cgroup_available_bytes)


@dataclass(frozen=True)
class Budget:
    """What training may use. `None` is no limit."""

    memory_bytes: Bytes  # peak resident memory of the training process
    time_s: Seconds | None = None  # for all local epochs of one round
    upload_bytes: Bytes | None = None  # of one update


@dataclass(frozen=True)
class TrainSettings:
    """How to train, the same for every device of a run."""

    epochs: Annotated[int, Range(1, 1000)] = 1
    batch_size: Annotated[int, Range(1, 4096)] = 16
    learning_rate: Annotated[float, Range(0, 10)] = 2e-4
    head_learning_rate: Annotated[float, Range(0, 10)] = 2e-3
    weight_decay: Annotated[float, Range(0, 1)] = 0.01
    optimizer: Annotated[str, Range(3, 16)] = "adamw"  # or "adamw8bit", "momentum", "sgd"
    seed: Annotated[int, Range(0, (1 << 63) - 1)] = 0
    lora_rank: Annotated[int, Range(0, 1024)] = 0  # of LoRA, the largest; 0 trains the blocks themselves
    adapter_learning_rate: Annotated[float, Range(0, 10)] = 2e-3
    codec: Name = "f32"  # of updates (`codecs.py`), or "auto": the finest that a device's upload budget allows
    lora_alpha: Annotated[float, Range(1e-3, 1e6)] = 16.0  # B A is scaled by lora_alpha / lora_rank everywhere
    lora_targets: Annotated[tuple[Name, ...], Range(0, 32)] = ()  # layers with adapters (`layout.py`); empty: all
    proximal_mu: Annotated[float, Range(0, 1e3)] = 0.0  # FedProx: gradients get mu * (w - w at the round's start)
    mask_every: Annotated[int, Range(0, 1 << 16)] = (
        0  # of this many entries of a matrix one is trained; 0: all, and vectors too
    )
    mask_seed: Annotated[int, Range(0, (1 << 63) - 1)] = 0  # draws them (`masks.py`)


@dataclass(frozen=True)
class CostRow:
    """One candidate plan and what it is predicted to cost."""

    depth: Annotated[int, Range(0, 1000)]  # 0 = head only
    checkpointing: bool
    micro_batch: Annotated[int, Range(1, 4096)]
    peak_bytes: Bytes  # resident memory of the training process
    step_s: Seconds  # one optimizer step on a batch of mean length
    epoch_s: Seconds
    upload_bytes: Bytes
    backend: Name = "torch"  # or "onnx"
    rank: Annotated[int, Range(0, 1024)] = 0  # of LoRA adapters in the trained blocks; 0 trains the blocks themselves
    precision: Name = "float32"  # of the frozen prefix; or "int8"
    cached: bool = False  # the frozen prefix's output is kept on disk from the first epoch on
    later_epoch_s: Seconds = 0.0  # an epoch after the first; 0 is the same
    codec: Name = "f32"  # of the update, which has `upload_bytes` in it
    mask_every: Annotated[int, Range(0, 1 << 16)] = 0  # of this many entries of a matrix one is trained; 0: all

    def total_s(self, epochs: int) -> float:
        """Seconds of all epochs."""
        return self.epoch_s + (epochs - 1) * (self.later_epoch_s or self.epoch_s)


@dataclass(frozen=True)
class Pruning:
    """How a device prunes while it trains adapters (`prune_plan.py`)."""

    kept: KeptGroups  # what the device begins with
    to: Annotated[float, Range(0, 0.99)]  # the sparsity that it ends with
    every: Annotated[int, Range(1, 1 << 20)]  # steps between two prunings, at most
    by: Name  # how importance is told: "lora", "magnitude" or "taylor"


@dataclass(frozen=True)
class Plan:
    """What one device trains, and the peak and time promised for it."""

    chosen: CostRow
    settings: TrainSettings
    steps: Count  # optimizer steps over all epochs
    ranks: Ranks = ()  # of the adapters in each trained block; empty: chosen.rank
    # trained and sent: "ab", "b" (A stays as it is), "fresh" (both, of a model that has none), or "": dense deltas
    adapters: Annotated[str, Range(0, 8)] = ""
    pruning: Pruning | None = None

    @property
    def block_ranks(self) -> tuple[int, ...]:
        """The rank of the adapters in each trained block; 0 where the block itself is trained."""
        return self.ranks or (self.chosen.rank,) * self.chosen.depth


@dataclass(frozen=True)
class TrainReport:
    """What a training run did, measured beside promised."""

    depth: int
    checkpointing: bool
    micro_batch: int
    backend: str
    num_examples: int
    steps: int
    first_loss: float
    last_loss: float  # mean over the last tenth of the steps
    train_s: float  # wall seconds of the steps
    total_s: float  # wall seconds of the whole process
    peak_bytes: int  # VmHWM
    promised_peak_bytes: int
    promised_s: float
    accuracy: float | None = None  # on the held-out rows, where there were any
    cpu_s: float = 0.0  # processor seconds of the steps, all threads
    start_s: float = 0.0  # wall seconds from the start of the process to the end of the first step
    rank: int = 0
    precision: str = "float32"
    cached: bool = False
    backed_off: int = 0  # how often it went on in smaller pieces because memory got short
    codec: Name = "f32"  # of the update as it is sent, with "+zlib" behind it where that made it smaller
    sparsity: float = 0.0  # share of the blocks' matrices that is pruned at the end
    kept: Annotated[str, Range(0, 2 * MAX_KEPT_BYTES)] = ""  # what of a pruned model is kept then, as hex
    paused_s: float = 0.0  # it waited for its conditions; in none of the other seconds
