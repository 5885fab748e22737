"""The lines that the probe lays through measured seconds, and the process in which it measures peaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.cost import Point
from edge_runtime.errors import ModelError, TrainingFailed
from edge_runtime.training.probe import in_child, line
from tests.samples import quickly

SIZES = (16, 64, 256)


@quickly(100)
@given(fixed=st.floats(0, 1), slope=st.floats(1e-6, 1))
def test_points_on_a_line_give_the_line(fixed: float, slope: float) -> None:
    found = line([(tokens, fixed + slope * tokens) for tokens in SIZES])
    assert found[0] + 100 * found[1] == pytest.approx(fixed + 100 * slope, rel=1e-6)


def test_one_point_is_all_slope() -> None:
    assert line([(50, 2.0)]) == (0.0, 0.04)


def test_neither_part_is_ever_negative() -> None:
    fixed, slope = line([(16, 0.1), (64, 0.9), (256, 5.0)])  # steeper and steeper
    assert fixed == 0 and slope > 0
    assert line([(16, 0.3), (64, 0.2), (256, 0.1)]) == (pytest.approx(0.2), 0.0)


def test_the_error_is_spread_by_ratio_and_not_by_seconds() -> None:
    measured = [(16, 0.01), (64, 0.05), (256, 0.12)]
    fixed, slope = line(measured)
    assert all(abs((fixed + slope * tokens) / taken - 1) < 0.3 for tokens, taken in measured)


def test_what_takes_no_time_is_no_division_by_zero() -> None:
    assert line([(16, 0.0), (64, 0.0), (256, 0.0)]) == (0.0, 0.0)


def test_what_a_child_measures_comes_back() -> None:
    assert in_child(lambda: (Point(1, 2), Point(3, 4))) == (Point(1, 2), Point(3, 4))


def test_a_childs_model_error_is_told_and_any_other_end_is_one() -> None:
    def refuse() -> tuple[Point, ...]:
        raise ModelError("the graph is of another model")

    with pytest.raises(ModelError, match="of another model"):
        in_child(refuse)
    with pytest.raises(TrainingFailed) as ended:
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[arg-type,return-value]
    assert ended.value.killed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child ends with its measurement")
def test_a_child_does_not_outlive_who_forked_it() -> None:
    code = """
import os, time
from edge_runtime.training.probe import in_child

def measure():
    print(os.getpid(), flush=True)
    time.sleep(120)
    return ()

in_child(measure)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_alive(child):
        time.sleep(0.02)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
