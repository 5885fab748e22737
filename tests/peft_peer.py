"""The other side of the PEFT tests: runs where transformers and peft are, imports nothing of ours.

    python peft_peer.py make|read BASE ADAPTER -> JSON: logits of the adapted model on fixed tokens

`make` has PEFT write an adapter with ranks, alphas and layers of several kinds; `read` has it load one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model  # type: ignore[import-not-found, unused-ignore]
from transformers import BertConfig, BertModel  # type: ignore[import-not-found, unused-ignore]

TOKENS = [[5, 17, 80, 3, 44, 9], [7, 2, 61, 0, 0, 0]]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]


class MeanPooled(BertModel):  # type: ignore[misc, unused-ignore]
    """The network whose modules are named as in our checkpoints: the encoder, and a linear layer on the mean of the tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """(batch, seq) -> logits (batch, labels)."""
        hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(hidden.dtype)
        return self.classifier((hidden * weight).sum(1) / weight.sum(1))


def main(what: str, base: str, adapter: str) -> None:
    """Do it."""
    model = MeanPooled.from_pretrained(base, config=BertConfig.from_pretrained(base)).eval()
    if what == "read":
        model = PeftModel.from_pretrained(model, adapter)
    else:
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.1,
            target_modules=["query", "value", "output.dense"],
            modules_to_save=["classifier"],
            rank_pattern={"encoder.layer.1.attention.self.value": 2},
            alpha_pattern={"encoder.layer.0.attention.self.query": 3, "layer.1.output.dense": 5},
        )
        model = get_peft_model(model, config)
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(adapter)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS), torch.tensor(MASK))
    print(json.dumps(logits.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
