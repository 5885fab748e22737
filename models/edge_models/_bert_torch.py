"""The BERT encoder with a mean-pooling head, in plain torch: the only module of `edge_models.bert` that needs torch.

Parameter names are those of the public checkpoints (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), so a
safetensors file's tensors are its parameters. Not a training loop: no dropout, no loss; freezing, adapters and
checkpointing are put around it by `edge_runtime.training`. Imports torch and nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact, by erf
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Embeddings(nn.Module):
    """Word + position + the first token type, normalised. (batch, seq) ids -> (batch, seq, hidden)."""

    def __init__(self, vocab: int, positions: int, types: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.word_embeddings = _table(vocab, hidden)
        self.position_embeddings = _table(positions, hidden)
        self.token_type_embeddings = _table(types, hidden) if types else None  # DistilBERT has none
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, seq) int64 -> (batch, seq, hidden)."""
        x = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings.weight[0]  # one text, never a pair
        out: Tensor = self.LayerNorm(x)
        return out


def _table(rows: int, hidden: int) -> nn.Embedding:
    """An embedding without random values: drawing them on the meta device would import torch._dynamo (71 MiB)."""
    table: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call, unused-ignore]
        torch.empty(rows, hidden), freeze=False
    )
    return table


class SelfAttention(nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, hidden: int, head_size: int, heads: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.query = nn.Linear(hidden, heads * head_size)
        self.key = nn.Linear(hidden, heads * head_size)
        self.value = nn.Linear(hidden, heads * head_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (batch, seq, hidden), bias (batch, 1, 1, seq) added to the scores -> (batch, seq, heads * head_size)."""
        batch, seq, _ = x.shape
        wide = self.query.weight.shape[0]
        split = (batch, seq, wide // self.head_size, self.head_size)
        q, k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (batch, heads, seq, head_size)
        return out.transpose(1, 2).reshape(batch, seq, wide)


class AddNorm(nn.Module):
    """A projection, the residual and LayerNorm, in this order (post-norm)."""

    def __init__(self, inputs: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (batch, seq, inputs), residual (batch, seq, hidden) -> (batch, seq, hidden)."""
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


class Attention(nn.Module):
    """Self-attention with output projection; `self` and `output` are the checkpoints' names."""

    def __init__(self, hidden: int, head_size: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self = SelfAttention(hidden, head_size, heads)
        self.output = AddNorm(heads * head_size, hidden, eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """As `Block.forward`."""
        out: Tensor = self.output(self.self(x, bias), x)
        return out


class Intermediate(nn.Module):
    """The widening half of the feed-forward layer."""

    def __init__(self, hidden: int, wide: int, activation: str) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, wide)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, wide)."""
        return self.activation(self.dense(x))


class Block(nn.Module):
    """One transformer layer, the unit that a plan freezes, trains or recomputes."""

    def __init__(self, hidden: int, head_size: int, heads: int, wide: int, eps: float, activation: str) -> None:
        super().__init__()
        self.attention = Attention(hidden, head_size, heads, eps)
        self.intermediate = Intermediate(hidden, wide, activation)
        self.output = AddNorm(wide, hidden, eps)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """hidden (batch, seq, hidden), bias (batch, 1, 1, seq) -> (batch, seq, hidden)."""
        x = self.attention(hidden, bias)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class Encoder(nn.Module):
    """Holds the blocks under the checkpoints' name `encoder.layer`."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(blocks)


class Bert(nn.Module):
    """ids and mask, (batch, seq) int64 with mask 1 for a token and 0 for padding -> logits (batch, labels)."""

    def __init__(self, embeddings: Embeddings, blocks: list[Block], classifier: nn.Linear) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = Encoder(blocks)
        self.classifier = classifier

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer layers in order; each is called as block(hidden, bias) -> hidden."""
        return self.encoder.layer

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-> hidden (batch, seq, hidden) and the bias (batch, 1, 1, seq): 0 for a token, very negative for padding.

        Half of the lowest number, so that a score added to it cannot reach -inf: a row without any token then
        attends evenly to its padding instead of giving NaN, and the head ignores it.
        """
        hidden: Tensor = self.embeddings(ids)
        padding = 1.0 - mask[:, None, None, :].to(hidden.dtype)
        return hidden, padding * (torch.finfo(hidden.dtype).min / 2)

    def head(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The mean over real tokens and a linear layer: (batch, seq, hidden) -> (batch, labels)."""
        weight = mask[:, :, None].to(hidden.dtype)  # (batch, seq, 1)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        logits: Tensor = self.classifier(mean)
        return logits

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """-> logits (batch, labels)."""
        hidden, bias = self.embed(ids, mask)
        for block in self.blocks:
            hidden = block(hidden, bias)
        return self.head(hidden, mask)
