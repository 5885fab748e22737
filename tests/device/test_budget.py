"""Budgets as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.budget import (
    AGENT_RESERVE_BYTES,
    RESERVE_BYTES,
    STEP_BYTES,
    UNIT_NAMES,
    UNITS,
    memory_budget,
    parse_bytes,
    parse_seconds,
)
from edge_runtime.errors import UsageError
from edge_runtime.records import DeviceProfile
from tests.samples import quickly

MIB = 1 << 20


def machine(total: int, available: int, limit: int | None = None, below_limit: int | None = None) -> DeviceProfile:
    """A profile of which only the memory matters."""
    return DeviceProfile(total, available, limit, below_limit, 4, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("450000000", 450_000_000),
        ("1048576", 1 << 20),
        ("450B", 450),
        ("450MB", 450_000_000),
        ("450mb", 450_000_000),
        (" 450 MB ", 450_000_000),
        ("450MiB", 450 * MIB),
        ("450M", 450 * MIB),
        ("1k", 1024),
        ("1kb", 1000),
        ("1.5GiB", 3 << 29),
        ("1.5 gb", 1_500_000_000),
        ("2G", 2 << 30),
        ("0.5B", 0),
        ("1048576gib", 1 << 50),
    ],
)
def test_a_size_is_read_in_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "MB",
        "-1",
        "-1MB",
        "1e9",
        "1.MB",
        ".5GB",
        "1,5GB",
        "4 50MB",
        "450TB",
        "450 MB x",
        "nan",
        "inf",
        "0x10",
        "450MB\n;",
        "auto",
        "50%",
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="write for example 450MB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["450", " 600 ", "8", "0.5", "1048575"])
def test_a_small_number_without_a_unit_was_meant_as_megabytes(text: str) -> None:
    with pytest.raises(UsageError, match=f"^{text.strip()} without a unit is bytes; did you mean {text.strip()}MB"):
        parse_bytes(text)
    with pytest.raises(UsageError, match="did you mean"):
        memory_budget(text, machine(8 << 30, 4 << 30))


def test_what_is_no_unit_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="units are B, KB, MB, GB"):
        parse_bytes("450TB")
    for unit in UNITS:
        assert not unit or unit in UNIT_NAMES.lower()
    with pytest.raises(UsageError, match="units are s, m and h"):
        parse_seconds("3 days")


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "1125899906842625", "1048577gib"])
def test_a_size_that_no_message_could_carry_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="more than any device has"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), ("15m", 900.0), ("2h", 7200.0), ("1.5h", 5400.0), (" 3 m ", 180.0), ("0", 0.0)],
)
def test_a_duration_is_read_in_seconds_minutes_and_hours(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1d", "1h30m", "1e3", "s", "nan", "inf"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="write for example 90s, 15m or 2h"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["9" * 400, "1000000001", "300000h"])
def test_a_duration_beyond_30_years_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="longer than anybody waits"):
        parse_seconds(text)


@quickly(200)
@given(text=st.text(max_size=12) | st.from_regex(r"[0-9.]{1,6} ?[a-zA-Z%]{0,3}", fullmatch=True))
def test_any_text_is_a_sane_budget_or_a_usage_error(text: str) -> None:
    for parse in (parse_bytes, parse_seconds):
        try:
            assert 0 <= parse(text) <= 1 << 50
        except UsageError as error:
            assert len(str(error)) < 320
    try:
        assert 0 <= memory_budget(text, machine(8 << 30, 4 << 30)) <= 4 << 30
    except UsageError as error:
        assert len(str(error)) < 320


def test_auto_is_what_is_free_rounded_down_so_that_noise_does_not_change_the_plan() -> None:
    assert memory_budget("auto", machine(512 * MIB, 123 * MIB)) == 104 * MIB
    assert memory_budget("auto", machine(512 * MIB, 120 * MIB)) == 104 * MIB
    assert memory_budget("auto", machine(4096 * MIB, 7 * MIB)) == 0


def test_auto_leaves_a_reserve_that_grows_with_the_machine() -> None:
    assert memory_budget("auto", machine(512 * MIB, 400 * MIB)) == 384 * MIB
    assert memory_budget("auto", machine(8192 * MIB, 4096 * MIB)) == (4096 - 246) // 8 * 8 * MIB


def test_auto_leaves_the_agent_its_reserve_below_the_limit_of_ram_or_cgroup() -> None:
    for limit in (256 * MIB, 512 * MIB):
        room = (limit - AGENT_RESERVE_BYTES - RESERVE_BYTES) // STEP_BYTES * STEP_BYTES
        assert memory_budget("auto", machine(limit, limit)) == room
        assert memory_budget("auto", machine(4096 * MIB, 3000 * MIB, limit, limit - MIB)) == room
        assert memory_budget("auto", machine(4096 * MIB, 3000 * MIB, limit, 100 * MIB)) == 80 * MIB
    assert memory_budget("auto", machine(32 * MIB, 32 * MIB)) == 0


def test_a_percentage_is_that_share_of_what_is_available() -> None:
    assert memory_budget("60%", machine(4096 * MIB, 1000 * MIB)) == 600 * MIB
    assert memory_budget("60%", machine(4096 * MIB, 1000 * MIB, 500 * MIB, 200 * MIB)) == 120 * MIB
    assert memory_budget("12.5%", machine(4096 * MIB, 1024 * MIB)) == 128 * MIB
    assert memory_budget("100%", machine(4096 * MIB, 1000 * MIB)) == 1000 * MIB


@pytest.mark.parametrize("text", ["0%", "-5%", "101%", "nan%", "inf%", "%", "x%", "5%%"])
def test_a_percentage_outside_0_to_100_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="above 0% and at most 100%"):
        memory_budget(text, machine(8 << 30, 4 << 30))


def test_a_size_is_taken_as_it_is_but_never_more_than_there_is() -> None:
    assert memory_budget("450MB", machine(4096 * MIB, 1000 * MIB)) == 450_000_000
    assert memory_budget("450MB", machine(4096 * MIB, 100 * MIB)) == 100 * MIB
    assert memory_budget("450MB", machine(4096 * MIB, 1000 * MIB, 128 * MIB, 60 * MIB)) == 60 * MIB


@quickly(100)
@given(
    total=st.integers(0, 1 << 40),
    share=st.floats(0, 1),
    limit=st.none() | st.integers(1, 1 << 40),
    left=st.floats(0, 1),
)
def test_no_budget_is_above_what_is_available_and_automatic_ones_are_whole_steps(
    total: int, share: float, limit: int | None, left: float
) -> None:
    profile = machine(total, int(total * share), limit, None if limit is None else int(limit * left))
    for text in ("auto", "37%", "100%"):
        budget = memory_budget(text, profile)
        assert 0 <= budget <= profile.memory_available_bytes
        assert budget % STEP_BYTES == 0
    assert memory_budget("1GB", profile) == min(10**9, profile.memory_available_bytes)


@pytest.mark.parametrize("text", ["0", "0MB", "0.5B"])
def test_no_memory_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="write for example 300MB, or auto"):
        memory_budget(text, machine(4 << 30, 2 << 30))
