"""What the end-to-end tests share: the small model, a warm cache, and the undisturbed run that others are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.fleets import Fleet, running, tiny_model


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    tensors: list[str]
    counted: list[tuple[int, str, int]]
    cache: Path  # a device's cache after it: tokenised data and calibration


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's folder."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Two devices, two rounds, nothing goes wrong."""
    fleet = Fleet(tmp_path_factory.mktemp("reference"), model)
    with running(fleet):
        fleet.start_all()
        fleet.wait(fleet.finished)
    return Reference(fleet.tensors(), fleet.counted(), fleet.folder / "device-0" / "cache")
