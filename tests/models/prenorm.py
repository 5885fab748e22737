"""A family as a user would write one, unlike BERT: pre-norm, rectified, every second block without attention.

The bias has one slope a head and keeps every token from looking ahead: (batch, heads, seq, seq).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.model import EMBED, ConfigValue, ModelSpec, TensorSpec

GRAPH_FREE_CONFIG = frozenset({"layers", "vocab", "positions"})


class Attention(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(hidden), heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, seq, hidden = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = x + self.out(attended.transpose(1, 2).reshape(batch, seq, hidden))
        return out


class Gated(nn.Module):
    """x + down(relu(up(norm(x))) * sigmoid(gate(norm(x)))), scaled by a vector."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up, self.gate, self.down = nn.Linear(hidden, wide), nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.dropout = nn.Dropout(0.5)  # of no effect in evaluation, which is what graphs compute

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        normed = self.norm(x)
        out: Tensor = x + self.scale * self.dropout(
            self.down(F.relu(self.up(normed)) * torch.sigmoid(self.gate(normed)))
        )
        return out


class PreNorm(nn.Module):
    """ids and mask (batch, seq) -> logits (batch, labels)."""

    def __init__(self, c: Mapping[str, Any], labels: int) -> None:
        super().__init__()
        self.heads = c["heads"]
        self.words, self.positions = nn.Embedding(c["vocab"], c["hidden"]), nn.Embedding(c["positions"], c["hidden"])
        self.blocks = nn.ModuleList(
            Gated(c["hidden"], c["wide"]) if i % 2 else Attention(c["hidden"], c["heads"]) for i in range(c["layers"])
        )
        self.final, self.classify = nn.LayerNorm(c["hidden"]), nn.Linear(c["hidden"], labels)

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(ids.shape[1])
        distance = (places[:, None] - places[None]).to(self.words.weight.dtype)  # (seq, seq)
        slopes = 0.5 ** (1 + torch.arange(self.heads).to(distance.dtype))
        bias = -distance.clamp(min=0) * slopes[:, None, None] - 1e9 * (distance < 0).to(distance.dtype)
        padding = (1 - mask[:, None, None, :].to(distance.dtype)) * -1e9
        return self.words(ids) * 3.0 + self.positions(places), bias[None] + padding

    def head(self, hidden: Tensor, mask: Tensor) -> Tensor:
        last = mask.sum(1) - 1  # the last token has seen the others
        out: Tensor = self.classify(self.final(hidden[torch.arange(hidden.shape[0]), last]))
        return out

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden, bias = self.embed(ids, mask)
        for block in self.blocks:
            hidden = block(hidden, bias)
        return self.head(hidden, mask)


def describe(config: Mapping[str, ConfigValue], labels: Sequence[str], max_length: int) -> ModelSpec:
    """As a family must."""
    with torch.device("meta"):
        model = PreNorm(config, len(labels))
    layers = int(config["layers"])

    def part(name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1])
        return EMBED if name.startswith(("words", "positions")) else layers

    tensors = [TensorSpec(name, tuple(p.shape), part(name)) for name, p in model.named_parameters()]
    sizes = (int(config[key]) for key in ("hidden", "heads", "wide"))
    return ModelSpec("prenorm", dict(config), tuple(labels), max_length, layers, *sizes, tuple(tensors))


def open_folder(folder: Path) -> Any:
    """No checkpoints of it exist."""
    raise NotImplementedError


def build(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> PreNorm:
    """As a family must."""
    with torch.device("meta"):
        model = PreNorm(spec.config, len(spec.labels))
    model.load_state_dict(dict(tensors), assign=True)
    return model
