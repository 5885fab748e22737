"""A simulation whose trainings run on Ray: the same bits as on this machine. Skipped where Ray is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_coordinator.sim.ray_engine import RayEngine, paths_of, relocated
from edge_runtime.errors import MissingExtra
from tests.e2e.test_simulation import World, residuals, rounds_of, simulate, tensors

HERE = importlib.util.find_spec("ray") is not None


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of this machine, whose workers find the sources and nothing that another test left."""
    if not HERE:
        pytest.skip("ray is not installed: pip install 'ray>=2.40'")
    import ray as library

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(p) for p in sys.path if p))
    library.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    library.shutdown()


def test_trainings_on_ray_give_the_same_simulation_bit_for_bit(
    ray: None, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> None:
    world = World(tmp_path_factory.mktemp("ray"), model)
    local, cluster = (world.fleet(name, goal=2, codec="topk10", method="lora") for name in ("local", "cluster"))
    options = world.options(devices=2, classes="here", partition="iid", dropout=0.0)
    simulate(local, options)
    simulate(cluster, replace(options, engine="ray", workers=None))
    assert rounds_of(cluster) == rounds_of(local)
    assert tensors(cluster) == tensors(local)
    assert residuals(cluster) == residuals(local)
    assert residuals(local)


@pytest.mark.skipif(HERE, reason="ray is installed")
def test_without_ray_the_error_names_the_command_that_installs_it() -> None:
    with pytest.raises(MissingExtra, match=r"\[ray\]"):
        RayEngine(1)


def test_every_file_of_the_model_gets_its_place_on_the_node() -> None:
    table = {"w": ("/a", 0, (2,), "F32"), "b": ("/b", 4, (1,), "F32")}
    job = {"weights": table, "adapters": {"A": ("/c", 0, (1,), "F32")}, "graphs": "/g", "corpus": "/stays"}
    assert paths_of(job) == {"/a", "/b", "/c", "/g"}
    moved = relocated(job, lambda path: f"/there{path}")
    assert moved["weights"] == {"w": ("/there/a", 0, (2,), "F32"), "b": ("/there/b", 4, (1,), "F32")}
    assert (moved["adapters"]["A"][0], moved["graphs"], moved["corpus"]) == ("/there/c", "/there/g", "/stays")
    assert relocated({"weights": {}}, lambda path: "") == {"weights": {}}
