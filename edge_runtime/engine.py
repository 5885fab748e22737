"""Which backend trains here, and with what: the graph set of the model where there is one, else torch.

The graph backend needs a fraction of torch's memory at about its speed (`docs/decisions/0009-training-without-torch.md`),
so it is taken wherever the model's graphs are bundled, shipped by the fleet, or can be derived once with an installed torch.
Imports no backend.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.cost import GRAPH_BACKEND
from edge_runtime.errors import MissingExtra, UsageError
from edge_runtime.graphs.bundle import BIAS_GRAPH
from edge_runtime.graphs.find import find_graphs, read_graphs
from edge_runtime.optional import install_command
from edge_runtime.source import Source

INSTALL_TRAIN = install_command("train")
WITHOUT_TORCH = (
    "take a model that graphs are bundled for, such as minilm-l6, or derive them on another machine: docs/operations.md"
)
BACKENDS = ("auto", GRAPH_BACKEND, "torch")
PRECISIONS = ("float32", "int8")


@dataclass(frozen=True)
class EngineOptions:
    """What a person may ask for."""

    backend: str = "auto"
    precision: str = "float32"  # of the frozen prefix
    cache_prefix: bool = True


@dataclass(frozen=True)
class Engine:
    """What training runs on here."""

    backend: str
    graphs: Path | None  # the file of the graph set
    precision: str
    cached: bool

    def job(self, cache: Path) -> dict[str, object]:
        """What a worker's job needs of it."""
        return {
            "backend": self.backend,
            "graphs": str(self.graphs.absolute()) if self.graphs else None,
            "cache": str(cache.absolute()),
        }


def check_options(options: EngineOptions) -> EngineOptions:
    """The options, if they make sense.

    Raises:
        UsageError: an unknown backend or precision, or int8 with torch.
    """
    if options.backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}, it is {options.backend!r}")
    if options.precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, it is {options.precision!r}")
    if options.backend == "torch" and options.precision != "float32":
        raise UsageError("an int8 prefix needs the backend onnx: leave --backend or --precision away")
    return options


def find_engine(
    source: Source,
    options: EngineOptions,
    cache: Path,
    progress: Callable[[str], None],
    shipped: Path | None = None,
) -> Engine:
    """What trains `source` here.

    Args:
        shipped: the graph set that came with the model.

    Raises:
        UsageError: the options ask for what the only possible backend cannot do.
        MissingExtra: neither a graph set nor torch is here.
        ModelError, WireError: the shipped graph set cannot be read.
    """
    check_options(options)
    graphs = None
    if options.backend != "torch":
        graphs = shipped or find_graphs(source.spec, source.weights, cache, progress=progress)
    if graphs is not None:
        cached = options.cache_prefix and BIAS_GRAPH in read_graphs(graphs).graphs  # features alone lack the bias
        return Engine(GRAPH_BACKEND, graphs, options.precision, cached)
    if options.backend == GRAPH_BACKEND or options.precision != "float32":  # which torch does not do
        raise MissingExtra(
            "there are no training graphs for this model, and torch to derive them is not installed: "
            f"{INSTALL_TRAIN}, or {WITHOUT_TORCH}"
        )
    torch_version("this model has no training graphs, so training it needs torch")
    return Engine("torch", None, "float32", False)


def torch_version(why: str = "the backend torch needs torch") -> str:
    """The installed torch, without importing it. `why` it is wanted.

    Raises:
        MissingExtra: there is none.
    """
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra(f"{why}, which is not installed: {INSTALL_TRAIN}, or {WITHOUT_TORCH}") from None
