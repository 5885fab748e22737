"""LoRA in a torch network: its linear layers exchanged for ones that add scale * B A x. Imports torch; used by its backend.

The values are those of `adapters.py`, in the same memory. Nothing of an output's size is kept or made beside the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.errors import ModelError
from edge_runtime.layout import A, B
from edge_runtime.training.adapters import LoraAdapters


class AdaptedLinear(nn.Module):
    """W x + bias + scale * B A x, A (rank, in), B (out, rank) (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, layer: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a, self.lora_b, self.scale = a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        low = F.linear(rows, self.lora_a)  # (rows, rank)
        out = F.linear(rows, self.weight, self.bias).addmm_(low, self.lora_b.t(), alpha=self.scale)
        return out.view(*x.shape[:-1], out.shape[-1])


def adapt(network: Any, adapters: LoraAdapters) -> dict[str, nn.Parameter]:
    """Give a network its adapters; -> those that are trained, by name.

    Raises:
        ModelError: what should get one is no `torch.nn.Linear`.
    """
    parameters = {
        name: nn.Parameter(torch.from_numpy(value), requires_grad=name in adapters.trained)
        for name, value in adapters.tensors.items()
    }
    for name in parameters:
        path = name.removesuffix(A)
        if path == name:
            continue
        parent, _, leaf = path.rpartition(".")
        layer = network.get_submodule(path)
        if not isinstance(layer, nn.Linear):
            raise ModelError(f"{path} is a {type(layer).__name__}, an adapter needs a torch.nn.Linear: leave it out")
        adapted = AdaptedLinear(layer, parameters[path + A], parameters[path + B], float(adapters.scale))
        setattr(network.get_submodule(parent), leaf, adapted)
    return {name: parameters[name] for name in adapters.trained}
