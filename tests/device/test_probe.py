"""The lines that the probe lays through measured seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.training.probe import line
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
