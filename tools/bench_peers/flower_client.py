"""Flower's ClientApp of `tools/bench federated`: PEFT LoRA on this device's examples, one epoch a round.

The message-based API of Flower 1.41. Model and data as `train.py`. What it did goes as a JSON line to the job's log.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import (  # type: ignore[import-not-found, unused-ignore]
    ArrayRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # type: ignore[import-not-found, unused-ignore]

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator, unused-ignore]
def train(message: Any, context: Any) -> Any:
    """Load the global adapter, train one epoch, reply with the adapter."""
    import torch

    from tools.bench_peers import peer_model

    job = json.loads(Path(context.run_config["job"]).read_text())
    number, round_ = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    torch.set_num_threads(job["threads"])
    model = peer_model.build(job["model"], job["labels"], job["options"], job["seed"] + round_)
    load(model, message.content["arrays"].to_torch_state_dict())
    data = peer_model.Tokens(job["corpora"][number])
    adamw = peer_model.optimizer(model, job["settings"])
    model.train()
    cpu, begun = time.process_time(), time.perf_counter()
    losses = [peer_model.step(model, adamw, data.batch(b)) for b in job["batches"][number][round_ - 1]]
    arrays = ArrayRecord({name: p.detach() for name, p in peer_model.trained_parameters(model).items()})
    done = {
        "partition": number,
        "round": round_,
        "steps": len(losses),
        "train_s": time.perf_counter() - begun,
        "cpu_s": time.process_time() - cpu,
        "loss": sum(losses) / len(losses),
        "payload_bytes": arrays.count_bytes(),
        "peak_rss_bytes": peer_model.peak_bytes(),
    }
    with Path(job["log"]).open("a") as file:
        file.write(json.dumps(done) + "\n")
    metrics = MetricRecord({"num-examples": len(data), "loss": done["loss"]})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def load(model: Any, state: dict[str, Any]) -> None:
    """Put the trained parameters in place; every one of them must be there."""
    from tools.bench_peers import peer_model

    missing = set(peer_model.trained_parameters(model)) ^ set(state)
    if missing:
        raise SystemExit(f"the adapter does not fit the model: {sorted(missing)[:3]}")
    model.load_state_dict(state, strict=False)


__all__ = ["Context", "app", "load", "train"]
