"""Where a model's graphs come from: the cache, the family's package, a derivation in a worker; and when there are none."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_models import bert
from edge_runtime.errors import ModelError, TrainingFailed, WireError
from edge_runtime.graphs import find
from edge_runtime.graphs.bundle import decode_graphs
from edge_runtime.graphs.find import find_graphs, graphs_key, read_graphs
from edge_runtime.graphs.match import misfit
from edge_runtime.model import ModelSpec
from edge_runtime.weights import MappedTensor

BUNDLED = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}


WEIGHTS = {
    tensor.name: MappedTensor("weights", 0, tensor.shape) for tensor in bert.describe(BUNDLED, ["a", "b"], 20).tensors
}


def spec_of(**changes: Any) -> ModelSpec:
    return bert.describe({**BUNDLED, **changes}, ["a", "b"], 20)


class Worker:
    """In place of the worker process: writes some bytes, or fails."""

    def __init__(self, data: bytes = b"", error: Exception | None = None) -> None:
        self.data, self.error, self.jobs = data, error, list[Mapping[str, Any]]()

    def __call__(self, job: Mapping[str, Any]) -> dict[str, Any]:
        self.jobs.append(job)
        if self.error:
            raise self.error
        Path(job["graphs"]).parent.mkdir(parents=True, exist_ok=True)
        Path(job["graphs"]).write_bytes(self.data)
        return {}


@pytest.fixture
def shipped() -> bytes:
    path = bert.bundled_graphs(spec_of())
    assert path is not None
    return path.read_bytes()


@pytest.fixture
def worker(shipped: bytes, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Nothing is bundled, and a derivation gives what else would be."""
    monkeypatch.setattr(bert, "bundled_graphs", lambda spec: None)
    worker = Worker(shipped)
    monkeypatch.setattr(find, "run_worker", worker)
    return worker


def test_a_bundled_set_is_found_where_it_lies_and_nothing_is_written(tmp_path: Path) -> None:
    assert find_graphs(spec_of(), WEIGHTS, tmp_path) == bert.bundled_graphs(spec_of())
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_derived_once_and_then_found_in_the_cache(worker: Worker, tmp_path: Path) -> None:
    lines: list[str] = []
    path = find_graphs(spec_of(), WEIGHTS, tmp_path, progress=lines.append)
    assert path == tmp_path / "graphs" / f"{graphs_key(spec_of())}.graphs"
    assert find_graphs(spec_of(num_hidden_layers=7, vocab_size=99), WEIGHTS, tmp_path, progress=lines.append) == path
    assert len(worker.jobs) == len(lines) == 1
    assert worker.jobs[0]["job"] == "derive"


def test_the_cache_comes_before_the_bundled_set(shipped: bytes, tmp_path: Path) -> None:
    kept = tmp_path / "graphs" / f"{graphs_key(spec_of())}.graphs"
    kept.parent.mkdir()
    kept.write_bytes(shipped)
    assert find_graphs(spec_of(), WEIGHTS, tmp_path) == kept


@pytest.mark.parametrize("damage", [b"", b"EGS2", b"x" * 100], ids=["empty", "cut", "other"])
def test_a_damaged_cache_file_is_made_anew(worker: Worker, shipped: bytes, damage: bytes, tmp_path: Path) -> None:
    path = find_graphs(spec_of(), WEIGHTS, tmp_path)
    assert path is not None
    path.write_bytes(damage)
    assert find_graphs(spec_of(), WEIGHTS, tmp_path, derive=False) is None
    assert find_graphs(spec_of(), WEIGHTS, tmp_path) == path
    assert path.read_bytes() == shipped
    assert len(worker.jobs) == 2


def test_derived_graphs_that_do_not_fit_are_not_used(worker: Worker, tmp_path: Path) -> None:
    lines: list[str] = []
    assert find_graphs(spec_of(hidden_act="relu"), WEIGHTS, tmp_path, progress=lines.append) is None
    assert "not this one" in lines[-1]


def test_nothing_is_derived_where_it_is_not_wanted(worker: Worker, tmp_path: Path) -> None:
    assert find_graphs(spec_of(), WEIGHTS, tmp_path, derive=False) is None
    assert worker.jobs == []


def test_without_torch_absence_is_no_error(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    lines: list[str] = []
    assert find_graphs(spec_of(), WEIGHTS, tmp_path, progress=lines.append) is None
    assert lines == ["training graphs cannot be derived here: torch not installed"]
    assert worker.jobs == []


def test_a_family_that_cannot_be_derived_is_not_tried_at_each_start(worker: Worker, tmp_path: Path) -> None:
    worker.error = ModelError("edge_models.bert cannot be turned into training graphs: dynamic control flow")
    lines: list[str] = []
    for _ in range(3):
        assert find_graphs(spec_of(), WEIGHTS, tmp_path, progress=lines.append) is None
    assert len(worker.jobs) == 1
    assert sum("dynamic control flow" in line for line in lines) == 3


def test_a_derivation_that_ran_out_of_memory_is_tried_again(worker: Worker, tmp_path: Path) -> None:
    worker.error = TrainingFailed("killed", out_of_memory=True)
    assert find_graphs(spec_of(), WEIGHTS, tmp_path) is None
    worker.error = None
    assert find_graphs(spec_of(), WEIGHTS, tmp_path) is not None


def test_the_key_is_one_for_all_sizes_that_graphs_serve_and_another_for_every_other_model() -> None:
    key = graphs_key(spec_of())
    assert key == graphs_key(spec_of(num_hidden_layers=12, vocab_size=9, max_position_embeddings=30, type_vocab_size=3))
    others = [
        {"type_vocab_size": 0},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 1e-5},
        {"num_attention_heads": 4},
        {"hidden_size": 64},
    ]
    assert len({key, *(graphs_key(spec_of(**change)) for change in others)}) == 1 + len(others)


def test_an_edited_family_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "edited_family.py"
    text = "from edge_models.bert import describe, open_folder, build, GRAPH_FREE_CONFIG\n"
    source.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "edited_family", raising=False)
    spec = spec_of()
    own = ModelSpec(**{**spec.__dict__, "family": "edited_family"})
    before = graphs_key(own)
    source.write_text(text + "# another network\n")
    assert len({before, graphs_key(own), graphs_key(spec)}) == 3
    monkeypatch.delitem(sys.modules, "edited_family")


def test_a_file_that_cannot_be_read_is_an_error_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        read_graphs(tmp_path / "none.graphs")
    (tmp_path / "bad.graphs").write_bytes(b"bad")
    with pytest.raises(WireError):
        read_graphs(tmp_path / "bad.graphs")


@pytest.mark.parametrize("index", ["nothing", "mask"])
def test_a_set_that_numbers_rows_by_another_input_does_not_fit(index: str, shipped: bytes) -> None:
    graphs = decode_graphs(shipped)
    assert graphs.row_tables and graphs.fits(spec_of())
    wrong = dataclasses.replace(graphs, row_tables=dict.fromkeys(graphs.row_tables, index))
    assert not wrong.fits(spec_of()) and "numbers the rows" in str(misfit(wrong, spec_of()))
