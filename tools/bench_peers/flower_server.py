"""Flower's ServerApp of `tools/bench federated`: FedAvg over the adapters of all devices; the last one goes to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord  # type: ignore[import-not-found, unused-ignore]
from flwr.serverapp import ServerApp  # type: ignore[import-not-found, unused-ignore]
from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found, unused-ignore]

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator, unused-ignore]
def main(grid: Any, context: Any) -> None:
    """All rounds."""
    from tools.bench_peers import peer_model

    job = json.loads(Path(context.run_config["job"]).read_text())
    model = peer_model.build(job["model"], job["labels"], job["options"], job["seed"])
    first = ArrayRecord({name: p.detach() for name, p in peer_model.trained_parameters(model).items()})
    devices = len(job["corpora"])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
    result = strategy.start(grid=grid, initial_arrays=first, num_rounds=job["rounds"])
    arrays = {name: tensor.numpy() for name, tensor in result.arrays.to_torch_state_dict().items()}
    final = Path(job["final"])
    with final.with_suffix(".part").open("wb") as file:
        np.savez(file, **arrays)
    os.replace(final.with_suffix(".part"), final)  # it appears whole: that is how the bench knows that the run is done
