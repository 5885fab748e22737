"""`edge-runtime plan --method`: what this device would do under the methods of a fleet, measured on a real small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.asks import ASKS
from edge_runtime.cli import main
from edge_runtime.errors import DoesNotFit, UsageError
from edge_runtime.method_plans import names_of
from tests.e2e.fleets import tiny_model, write_data


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A call for a model of two blocks, whose figures are measured once."""
    folder = tmp_path_factory.mktemp("plans")
    model, data = tiny_model(folder / "tiny"), write_data(folder / "data.csv", 0, 40)
    return ["plan", str(model), "--data", str(data), "--max-length", "32", "--lora-rank", "8", "--memory", "2GB"]


def plans(call: list[str], capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> dict[tuple[str, int], Any]:
    """What is printed for scripts, by method and stage."""
    capsys.readouterr()
    assert main([*call, "--json", *more]) == code
    found = json.loads(capsys.readouterr().out)["plans"]
    return {(one["method"], one["stage"]): one for one in found}


@pytest.mark.slow
def test_every_method_says_what_it_would_give_or_what_is_lacking(
    call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 both blocks take 69 kB, adapters of rank 8 in them 29 kB, a tenth of their entries 7 kB, the head 0.4 kB."""
    found = plans(call, capsys, "--method", "all", "--upload", "20kB")
    assert list(found) == [(name, n) for name, asks in ASKS.items() for n in range(1, 1 + len(asks.stages))]
    given = {of: (one["row"]["depth"], one["row"]["rank"]) for of, one in found.items() if one["row"]}
    assert given[("caff", 1)] == (0, 0) and given[("lora-suffix", 1)] == (1, 8) and given[("hetlora", 1)] == (2, 4)
    assert given[("ffa-lora", 1)] == (2, 8) and given[("slora", 1)] == (2, 0) and ("slora", 2) not in given
    assert found[("full", 1)]["why_not"].startswith("upload 0.1 MiB > 0.0 MiB") and ("full", 1) not in given
    assert given[("legend", 1)] == (1, 8) and found[("legend", 1)]["ranks"] == [8] and found[("legend", 1)]["beyond"]
    assert found[("slora", 1)]["mask_every"] == 10 and found[("slora", 1)]["row"]["upload_bytes"] < 8000
    assert main([*call, "--method", "slora", "--upload", "20kB"]) == 0
    shown = capsys.readouterr().out
    assert "one of 10 entries in all 2 blocks" in shown and "2 of 2  nothing" in shown


@pytest.mark.slow
def test_one_method_for_which_nothing_fits_is_an_exit_code(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plans(call, capsys, "--method", "exclusive", "--upload", "20kB", code=DoesNotFit.exit_code)
    assert plans(call, capsys, "--method", "exclusive")[("exclusive", 1)]["row"]["depth"] == 2


def test_a_method_that_there_is_not_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--method must be all or one of caff"):
        names_of("fedavg")
    call = ["plan", "minilm-l3", "--data", str(tmp_path / "none.csv"), "--method", "fedavg"]
    assert main(call) == UsageError.exit_code
    assert main([*call[:-1], "lora", "--adapter", str(tmp_path)]) == UsageError.exit_code
    assert "leave --adapter away" in capsys.readouterr().err
