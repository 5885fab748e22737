"""One row of ours of `tools/bench predict` in a fresh process: `python -m tools.bench_answer JOB`, a JSON line out."""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import json  # noqa: E402  # what is imported from here on counts as start
import sys  # noqa: E402

from tools.bench_peers.measure import measure, tell  # noqa: E402


def main() -> None:
    """Open with the public `Predictor`, measure, print."""
    job = json.loads(sys.argv[1])
    from edge_runtime import Predictor

    predictor = Predictor(job["model"], job["threads"])
    tell(measure(job, STARTED, lambda texts: [found.label for found in predictor.predict(texts)]))


if __name__ == "__main__":
    main()
