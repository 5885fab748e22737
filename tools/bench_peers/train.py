"""One row of `tools/bench training` in a fresh process: `python -m tools.bench_peers.train JOB`, JSON lines out.

JOB is a JSON object: model, corpus, test_corpus, batches, labels, options, settings, threads, seed. Runs in the peers'
environment. The peak is VmHWM of this process since its first line, read when the last step is done.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def main() -> None:
    """Train, measure, print."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # before torch is imported: its import counts
    job = json.loads(sys.argv[1])
    import torch

    from tools.bench_peers import peer_model

    torch.set_num_threads(job["threads"])
    model = peer_model.build(job["model"], job["labels"], job["options"], job["seed"])
    trained = peer_model.trained_parameters(model)
    adamw = peer_model.optimizer(model, job["settings"])
    data = peer_model.Tokens(job["corpus"])
    batches = json.loads(Path(job["batches"]).read_text())
    model.train()
    cpu: list[float] = []
    losses: list[float] = []
    begun, shown = time.perf_counter(), 0.0
    for number, indices in enumerate(batches, 1):
        before = time.process_time()
        losses.append(peer_model.step(model, adamw, data.batch(indices)))
        cpu.append(time.process_time() - before)
        if time.perf_counter() - shown > 1:
            shown = time.perf_counter()
            say(step=number, steps=len(batches), loss=round(losses[-1], 4))
    train_s = time.perf_counter() - begun
    peak = peer_model.peak_bytes()
    found = None
    if job["test_corpus"]:
        found = peer_model.accuracy(model, peer_model.Tokens(job["test_corpus"]), job["settings"]["batch_size"])
    say(
        result={
            "peak_rss_bytes": peak,
            "cpu_s_per_step": statistics.median(cpu[1:] or cpu),
            "train_s": train_s,
            "process_s": time.perf_counter() - STARTED,
            "bytes_up": sum(4 * p.numel() for p in trained.values()),
            "accuracy": found,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "steps": len(batches),
        }
    )


def say(**fields: Any) -> None:
    """One line for the bench."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
