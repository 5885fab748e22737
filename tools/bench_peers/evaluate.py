"""The accuracy of the adapter that Flower's server wrote: `python -m tools.bench_peers.evaluate JOB_FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Load, count, print."""
    import numpy as np
    import torch

    from tools.bench_peers import peer_model

    job = json.loads(Path(sys.argv[1]).read_text())
    model = peer_model.build(job["model"], job["labels"], job["options"], job["seed"])
    with np.load(job["final"]) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if set(state) != set(peer_model.trained_parameters(model)):
        raise SystemExit("the final adapter does not fit the model")
    model.load_state_dict(state, strict=False)
    data = peer_model.Tokens(job["test_corpus"])
    print(json.dumps({"result": {"accuracy": peer_model.accuracy(model, data, job["settings"]["batch_size"])}}))


if __name__ == "__main__":
    main()
