"""The peers' model, set up as their documentation shows: transformers, whole or in part, or with PEFT's LoRA.

Shared by `train.py` and by Flower's client and server. Runs in the peers' environment; imports nothing of ours. The
data is what our tokeniser wrote (`edge_runtime/training/corpus.py`), read here with numpy, so that every row of a bench
trains the same tokens in the same batches and no peer pays for reading text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

HEAD = "classifier"  # part of the names of the head's parameters, ours and transformers'
LORA_RANK, LORA_ALPHA = 8, 16


def reset_peak() -> None:
    """Let VmHWM of this process begin anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class MeanPooled(torch.nn.Module):
    """An encoder, the mean over real tokens and a linear layer: the head that the checkpoint was made for."""

    def __init__(self, encoder: Any, hidden: int, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = torch.nn.Linear(hidden, num_labels)
        torch.nn.init.zeros_(self.classifier.weight)  # as ours: a new head says nothing about any class
        torch.nn.init.zeros_(self.classifier.bias)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, seq) -> logits (batch, labels)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(hidden.dtype)
        logits: torch.Tensor = self.classifier((hidden * weight).sum(1) / weight.sum(1))
        return logits


class Pooled(torch.nn.Module):
    """transformers' own model for sequence classification: its pooler on the first token, and a linear layer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, seq) -> logits (batch, labels)."""
        logits: torch.Tensor = self.inner(input_ids=ids, attention_mask=mask).logits
        return logits


def build(folder: str, num_labels: int, options: Mapping[str, Any], seed: int) -> torch.nn.Module:
    """The model of one row, its trained parameters requiring gradients.

    Args:
        options: "train" is "full", "last" (with "blocks") or "lora"; "dropout" False switches off the config's own;
            "checkpointing" True; "head" is "mean" (as ours) or "pooler" (transformers' for sequence classification).
    """
    from transformers import (  # type: ignore[import-not-found, unused-ignore]
        AutoConfig,
        AutoModel,
        AutoModelForSequenceClassification,
    )

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, num_labels=num_labels)
    if not options.get("dropout", True):
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    mean = options.get("head", "mean") == "mean"
    if mean:
        inner = AutoModel.from_pretrained(folder, config=config, add_pooling_layer=False)
    else:
        inner = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    if options.get("checkpointing"):
        inner.gradient_checkpointing_enable()
    if options["train"] == "lora":
        inner = _with_lora(inner, mean=mean)
    model: torch.nn.Module = MeanPooled(inner, config.hidden_size, num_labels) if mean else Pooled(inner)
    if options["train"] == "last":
        first = config.num_hidden_layers - int(options["blocks"])
        trained = tuple(f"layer.{i}." for i in range(first, config.num_hidden_layers))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(HEAD in name or "pooler" in name or any(part in name for part in trained))
    elif options["train"] not in ("full", "lora"):
        raise SystemExit(f"no such row: {options['train']!r}")
    return model


def _with_lora(inner: Any, *, mean: bool) -> Any:
    """LoRA on all linear layers but the head, which is trained whole."""
    from peft import LoraConfig, TaskType, get_peft_model  # type: ignore[import-not-found, unused-ignore]

    task = TaskType.FEATURE_EXTRACTION if mean else TaskType.SEQ_CLS
    return get_peft_model(
        inner, LoraConfig(task_type=task, r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear")
    )


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What training changes, by name: this, in float32, is what a device would send."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer(model: torch.nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW, the head with a learning rate of its own, as in ours."""
    named = trained_parameters(model)
    head = [p for name, p in named.items() if HEAD in name]
    rest = [p for name, p in named.items() if HEAD not in name]
    groups = [{"params": rest, "lr": settings["learning_rate"]}, {"params": head, "lr": settings["head_learning_rate"]}]
    return torch.optim.AdamW(groups, weight_decay=settings["weight_decay"])


class Tokens:
    """A tokenised data set on disk, memory-mapped."""

    def __init__(self, folder: str) -> None:
        self.tokens, self.starts, self.labels = (
            np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("tokens", "starts", "labels")
        )

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, mask (batch, seq) and labels (batch,), padded to the longest text."""
        texts = [self.tokens[self.starts[i] : self.starts[i + 1]] for i in indices]
        ids = np.zeros((len(texts), max(len(text) for text in texts)), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels = self.labels[list(indices)].astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)

    def in_order_of_length(self, batch_size: int) -> Iterator[list[int]]:
        """Every example once, for testing."""
        order = sorted(range(len(self)), key=lambda i: int(self.starts[i + 1] - self.starts[i]))
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def step(model: torch.nn.Module, adamw: torch.optim.Optimizer, batch: Any) -> float:
    """The loop's body as transformers' documentation has it; -> the loss."""
    ids, mask, labels = batch
    loss = torch.nn.functional.cross_entropy(model(ids, mask), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    adamw.step()
    adamw.zero_grad()
    return float(loss.detach())


def accuracy(model: torch.nn.Module, data: Tokens, batch_size: int) -> float:
    """Share of a data set that the model classifies rightly."""
    model.eval()
    right = 0
    with torch.no_grad():
        for indices in data.in_order_of_length(batch_size):
            ids, mask, labels = data.batch(indices)
            right += int((model(ids, mask).argmax(-1) == labels).sum())
    return right / len(data)
