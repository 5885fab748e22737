"""How long training takes on a device class: this machine's calibration, scaled by counted FLOPs. Pure.

The calibration says how a step's seconds divide between blocks, embedding, head and optimizer; the class says how fast
a block is trained. Memory is not scaled: the same program holds the same bytes. Imports the cost records.
"""

from __future__ import annotations

from dataclasses import replace

from edge_runtime.cost import Calibration, DataShape
from edge_runtime.model import ModelSpec

TRAIN = 3  # forward, and backward with two products for each of its one: by the inputs and by the weights


def block_flops(spec: ModelSpec, length: float) -> float:
    """Forward FLOPs of one block for each token of a text of `length` tokens: two for each weight of its matrices, and
    attention's two products with `length` keys and values. Norms and activations are not counted."""
    weights = sum(t.size for t in spec.tensors if t.part == 0 and len(t.shape) == 2)
    return 2.0 * weights + 4.0 * length * spec.hidden


def measured_gflops(calibration: Calibration, spec: ModelSpec, data: DataShape, batch_size: int) -> float:
    """GFLOP/s at which the calibrated machine trains a block, in a batch of mean length."""
    tokens = batch_size * data.mean_length
    seconds = calibration.train_fixed_s / tokens + calibration.train_per_token_s
    return TRAIN * block_flops(spec, data.mean_length) / max(seconds, 1e-12) / 1e9


def scaled(calibration: Calibration, factor: float) -> Calibration:
    """The calibration of a machine that takes `factor` times as long for everything."""
    c = calibration
    return replace(
        c,
        forward_fixed_s=c.forward_fixed_s * factor,
        forward_per_token_s=c.forward_per_token_s * factor,
        train_fixed_s=c.train_fixed_s * factor,
        train_per_token_s=c.train_per_token_s * factor,
        update_per_parameter_s=c.update_per_parameter_s * factor,
        rest_fixed_s=c.rest_fixed_s * factor,
        rest_per_token_s=c.rest_per_token_s * factor,
        forward_step_s=c.forward_step_s * factor,
        entry_s=c.entry_s * factor,
        copy_s=c.copy_s * factor,
    )
