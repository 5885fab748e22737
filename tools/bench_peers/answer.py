"""One peer's row of `tools/bench predict` in a fresh process: `python -m tools.bench_peers.answer JOB`, a JSON line out.

Runs in the peers' environment, as the documentation of transformers, and of optimum for onnxruntime, shows it: the fast
tokenizer, and torch, a pipeline or an onnxruntime session with its own settings. The network is the one that ours
trained: BERT's encoder, the mean of the tokens, a linear layer.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import json  # noqa: E402  # what is imported from here on counts as start
import sys  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from tools.bench_peers.measure import Answer, measure, tell  # noqa: E402


def main() -> None:
    """Open, measure, print."""
    job = json.loads(sys.argv[1])
    rows = {"torch": with_torch, "pipeline": with_pipeline, "onnxruntime": with_onnxruntime}
    tell(measure(job, STARTED, rows[job["options"]["peer"]](job)))


def with_torch(job: Mapping[str, Any]) -> Answer:
    """transformers' tokenizer and model."""
    import torch

    torch.set_num_threads(job["threads"])
    tokenizer, model, names = tokenizer_of(job), classifier(job["folder"]), labels_of(job)

    def answer(texts: Sequence[str]) -> list[str]:
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=job["max_length"], return_tensors="pt"
        )
        with torch.inference_mode():
            logits = model(tokens["input_ids"], tokens["attention_mask"]).logits
        return [names[i] for i in logits.argmax(-1).tolist()]

    return answer


def with_pipeline(job: Mapping[str, Any]) -> Answer:
    """transformers' pipeline for text classification."""
    import torch
    from transformers import TextClassificationPipeline  # type: ignore[import-not-found, unused-ignore]

    torch.set_num_threads(job["threads"])
    names = labels_of(job)
    pipe = TextClassificationPipeline(model=classifier(job["folder"]), tokenizer=tokenizer_of(job))
    pipe.model.config.id2label = dict(enumerate(names))

    def answer(texts: Sequence[str]) -> list[str]:
        found = pipe(list(texts), batch_size=len(texts), truncation=True, max_length=job["max_length"])
        return [one["label"] for one in found]

    return answer


def with_onnxruntime(job: Mapping[str, Any]) -> Answer:
    """transformers' tokenizer and a session with onnxruntime's own settings, as optimum has it."""
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    tokenizer, names = tokenizer_of(job), labels_of(job)

    def answer(texts: Sequence[str]) -> list[str]:
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=job["max_length"], return_tensors="np"
        )
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return [names[i] for i in session.run(None, inputs)[0].argmax(-1).tolist()]

    return answer


def tokenizer_of(job: Mapping[str, Any]) -> Any:
    """The model's own fast tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(Path(job["folder"]) / "tokenizer.json"), pad_token="[PAD]")


def labels_of(job: Mapping[str, Any]) -> list[str]:
    """In the order of the logits."""
    config = json.loads((Path(job["folder"]) / "config.json").read_text())
    return [config["id2label"][str(i)] for i in range(len(config["id2label"]))]


def classifier(folder: str) -> Any:
    """The trained network as a model of transformers."""
    import torch
    from safetensors.torch import load_file
    from transformers import BertModel, BertPreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput  # type: ignore[import-not-found, unused-ignore]

    class MeanPooled(BertPreTrainedModel):  # type: ignore[misc]
        """BERT, the mean of the tokens, a linear layer."""

        def __init__(self, inner: Any, weight: Any, bias: Any) -> None:
            super().__init__(inner.config)
            self.encoder = inner
            self.classifier = torch.nn.Linear(weight.shape[1], weight.shape[0])
            self.classifier.weight.data, self.classifier.bias.data = weight, bias

        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask[:, :, None].to(hidden.dtype)
            return SequenceClassifierOutput(logits=self.classifier((hidden * weight).sum(1) / weight.sum(1)))

    inner = BertModel.from_pretrained(folder, add_pooling_layer=False)
    head = load_file(str(Path(folder) / "model.safetensors"))
    return MeanPooled(inner, head["classifier.weight"], head["classifier.bias"]).eval()


if __name__ == "__main__":
    main()
