"""Finds a model's training graphs: in the cache, among those that come with its family, else derived where torch is.

Deriving takes a minute or two and much memory, so it is done once, in a process of its own, and kept. A model without
graphs is no error: it trains with torch. Imports no torch, no onnx and no onnxruntime.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from edge_runtime.errors import EdgeError, ModelError
from edge_runtime.graphs.bundle import FORMAT, MAX_FILE_BYTES, GraphSet, decode_graphs
from edge_runtime.graphs.match import essential_config
from edge_runtime.model import ModelSpec, load_family
from edge_runtime.store import atomic_writer
from edge_runtime.training.process import model_job, run_worker
from edge_runtime.weights import MappedTensor

DERIVATION = 2  # one more where `derive.py` makes other graphs of the same model: 1 had none for blocks of any width
NEEDED = ("torch", "onnx", "onnxscript")  # for deriving


def find_graphs(
    spec: ModelSpec,
    weights: Mapping[str, MappedTensor],
    cache: Path,
    *,
    derive: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Path | None:
    """A file with graphs that fit the model, or None: there are none and they cannot be derived here.

    Args:
        spec, weights: the model.
        cache: the folder in which derived graphs are kept, below "graphs".
        derive: whether they may be derived, which takes a minute or two.
        progress: gets lines of text, the reason for None among them.
    """
    kept = cache / "graphs" / f"{graphs_key(spec)}.graphs"
    if _fits(kept, spec):
        return kept
    bundled: Callable[[ModelSpec], Path | None] = getattr(load_family(spec.family), "bundled_graphs", lambda spec: None)
    shipped = bundled(spec)
    if shipped is not None and _fits(shipped, spec):
        return shipped
    if not derive:
        return None
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        progress(f"training graphs cannot be derived here: {', '.join(lacking)} not installed")
        return None
    return _derive(spec, weights, kept, progress)


def read_graphs(path: Path) -> GraphSet:
    """The graphs of a file.

    Raises:
        ModelError: it cannot be read.
        WireError: it is damaged.
    """
    try:
        with path.open("rb") as file:
            return decode_graphs(file.read(MAX_FILE_BYTES + 1))
    except OSError as error:
        raise ModelError(f"cannot read the training graphs in {path}: {error.strerror}") from None


def derive_job(spec: ModelSpec, weights: Mapping[str, MappedTensor], graphs: Path) -> dict[str, object]:
    """The worker's job that derives a model's graphs and writes them to the file `graphs`."""
    return {**model_job("derive", spec, weights), "graphs": str(graphs.absolute())}


def graphs_key(spec: ModelSpec) -> str:
    """A hash of what the graphs depend on; the family's module is part of it, so that an edited one gets new graphs."""
    source = b""
    with contextlib.suppress(OSError):
        source = Path(importlib.import_module(spec.family).__file__ or "").read_bytes()
    config = essential_config(spec.family, spec.config)
    what = [FORMAT, DERIVATION, spec.family, hashlib.sha256(source).hexdigest(), config, spec.hidden]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _fits(path: Path, spec: ModelSpec) -> bool:
    try:
        return path.is_file() and read_graphs(path).fits(spec)
    except (EdgeError, OSError):  # damaged, or of another version: made anew
        return False


def _derive(
    spec: ModelSpec, weights: Mapping[str, MappedTensor], kept: Path, progress: Callable[[str], None]
) -> Path | None:
    refused = kept.with_suffix(
        f".refused-{importlib.metadata.version('torch')}"
    )  # by this torch: not tried at each start
    with contextlib.suppress(OSError):
        progress(refused.read_text(errors="replace")[:500])
        return None
    progress("deriving training graphs, once for this kind of model: a minute or two")
    try:
        run_worker(derive_job(spec, weights, kept))
    except EdgeError as error:
        reason = f"no training graphs for this model, it trains with torch: {error}"
        progress(reason)
        if isinstance(error, ModelError):  # it would end like this again
            with contextlib.suppress(EdgeError, OSError), atomic_writer(refused) as file:
                file.write(reason.encode(errors="replace"))
        return None
    if not _fits(kept, spec):
        progress("the derived training graphs serve other models of this family, not this one: it trains with torch")
        return None
    return kept
