"""What a worker's job names, from JSON: the model and its weights, the plan, the backend on them. And the lines back.

The fields are those of `process.model_job` and `process.plan_job`; a job's own are read by what does it (`worker.py`,
`train_job.py`). What is large is imported only where a job needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cost import GRAPH_BACKEND
from edge_runtime.errors import ModelError
from edge_runtime.model import ModelSpec, load_family
from edge_runtime.records import Plan, Pruning
from edge_runtime.weights import MappedTensor
from edge_runtime.wire import from_plain, unpack_as

if TYPE_CHECKING:
    from edge_runtime.graphs.bundle import GraphSet
    from edge_runtime.training.loop import Backend

Job = Mapping[str, Any]


def emit(**fields: Any) -> None:
    """One line to the agent."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def spec_of(job: Job) -> ModelSpec:
    """The architecture a job speaks of."""
    return load_family(job["family"]).describe(job["config"], job["labels"], job["max_length"])


def weights_of(job: Job, what: str = "weights") -> dict[str, MappedTensor]:
    """Where a job's weights lie, or with "adapters" the A and B that training begins from."""
    return {
        name: MappedTensor(path, offset, tuple(shape), dtype)
        for name, (path, offset, shape, dtype) in job.get(what, {}).items()
    }


def plan_of(job: Job) -> Plan:
    """What a job is to train."""
    plan: Plan = from_plain(Plan, job["plan"], "plan")
    if "pruning" in job:
        plan = replace(plan, pruning=unpack_as(Pruning, bytes.fromhex(job["pruning"])))
    return plan


def backend_of(job: Job, spec: ModelSpec, plan: Plan) -> Backend:
    """The backend that the plan names."""
    return make_backend(job, plan, spec, frozen_of(job, spec, plan), weights_of(job, "adapters"))


def make_backend(
    job: Job, plan: Plan, spec: ModelSpec, weights: Mapping[str, MappedTensor], start: Mapping[str, MappedTensor]
) -> Backend:
    """The backend that the plan names, on these weights and with adapters that begin from `start`."""
    if plan.chosen.backend != GRAPH_BACKEND:
        from edge_runtime.training.torch_backend import TorchBackend

        return TorchBackend(spec, weights, plan, job["threads"], start)
    from edge_runtime.training.graph_backend import GraphBackend

    return GraphBackend(spec, weights, plan, graphs_of(job, spec), job["threads"], Path(job["cache"]), start)


def frozen_of(job: Job, spec: ModelSpec, plan: Plan) -> dict[str, MappedTensor]:
    """Where the weights lie, those of blocks that the plan does not train with what the fleet's adapters add to them."""
    from edge_runtime.version_weights import merged

    weights, adapters = weights_of(job), weights_of(job, "adapters")
    if not adapters:
        return weights
    below = spec.num_blocks - plan.chosen.depth
    return merged(spec, weights, adapters, job["adapter_scale"], Path(job["cache"]), below=below)


def graphs_of(job: Job, spec: ModelSpec) -> GraphSet:
    """The graph set that a job names, if it is this model's: it may have come over the network.

    Raises:
        ModelError: it is another model's.
    """
    from edge_runtime.graphs.find import read_graphs
    from edge_runtime.graphs.match import misfit

    graphs = read_graphs(Path(job["graphs"]))
    if reason := misfit(graphs, spec):
        raise ModelError(f"the training graphs in {job['graphs']} are not this model's: {reason}")
    return graphs
