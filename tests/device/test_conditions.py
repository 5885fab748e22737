"""When a device may train: what people write, what the machine says in folders laid out here, and that it does not flap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_runtime import gate as gate_module
from edge_runtime import sensors as sensors_module
from edge_runtime.conditions import (
    EXAMPLES,
    HOLD_S,
    Condition,
    Readings,
    Stand,
    Unmet,
    after,
    kept_free_bytes,
    parse_conditions,
    shown,
    unmet,
    words,
)
from edge_runtime.errors import UsageError
from edge_runtime.gate import LOOK_S, TELL_S, Gate
from edge_runtime.sensors import Own, Sensors, charging
from edge_runtime.system import doctor

MIB = 1 << 20
WELL = Readings(busy_share=0.02, charging=True, temperature_c=55.0, minute=23 * 60, load=0.4, free_bytes=900 * MIB)

# what people write


def test_all_conditions_are_read_as_they_are_written() -> None:
    found = parse_conditions(EXAMPLES)
    assert found == (
        Condition("idle"),
        Condition("charging"),
        Condition("temperature", 70),
        Condition("time", 22 * 60, 6 * 60),
        Condition("load", 1.5),
        Condition("free-memory", 200_000_000),
    )
    assert parse_conditions(", ".join(map(shown, found[:5]))) == found[:5]
    assert kept_free_bytes(found) == 200_000_000 and parse_conditions("  ") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temperatur<70", "'temperatur<70' is no condition"),
        ("idle,", "'' is no condition"),
        ("idle, idle", "idle is there twice"),
        ("idle<10", "the condition idle is written idle, it is 'idle<10'"),
        ("load>1", "the condition load is written load<1.5, it is 'load>1'"),
        ("load", "the condition load is written load<1.5"),
        ("load<many", "load wants a number, it is 'many'"),
        ("load<0", "load can never hold with 0"),
        ("load<nan", "load wants a number"),
        ("free-memory>200", "did you mean 200MB"),
        ("time=22-6", "wants hours and minutes as 22:00-06:00, it is '22-6'"),
        ("time=24:00-06:00", "wants hours and minutes"),
        ("time=22:60-06:00", "wants hours and minutes"),
        ("time=06:00-06:00", "opens and closes at once"),
    ],
)
def test_what_is_no_condition_is_named_with_what_was_wanted(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_conditions(text)
    assert words in str(error.value)


# whether they hold


@pytest.mark.parametrize(
    ("text", "change", "said"),
    [
        ("idle", {"busy_share": 0.43}, "others use 43% of the processors, wanted below 10%"),
        ("charging", {"charging": False}, "on battery, wanted charging"),
        ("temperature<70", {"temperature_c": 70.0}, "temperature 70.0, wanted below 70"),
        ("time=22:00-06:00", {"minute": 6 * 60}, "time 06:00, wanted 22:00 to 06:00"),
        ("load<1.5", {"load": 2.3}, "load 2.30, wanted below 1.5"),
        ("free-memory>200MiB", {"free_bytes": 200 * MIB}, "free memory 200 MiB, wanted above 200 MiB"),
        ("temperature<70", {"temperature_c": None}, "temperature: cannot be read now"),
    ],
)
def test_a_condition_holds_or_says_what_was_read_and_wanted(text: str, change: dict[str, float], said: str) -> None:
    conditions = parse_conditions(text)
    assert unmet(conditions, WELL) == ()
    (found,) = unmet(conditions, dataclasses.replace(WELL, **change))
    assert found == Unmet(conditions[0].name, said)


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("22:00-06:00", (22 * 60, 23 * 60 + 59, 0, 5 * 60 + 59), (6 * 60, 12 * 60, 21 * 60 + 59)),
        ("09:30-17:00", (9 * 60 + 30, 16 * 60 + 59), (0, 9 * 60 + 29, 17 * 60)),
        ("20:00-24:00", (20 * 60, 23 * 60 + 59), (0, 19 * 60 + 59)),
    ],
)
def test_a_window_may_go_beyond_midnight(window: str, inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
    conditions = parse_conditions(f"time={window}")
    for minute in (*inside, *outside):
        assert bool(unmet(conditions, dataclasses.replace(WELL, minute=minute))) == (minute in outside)


def test_training_stops_at_once_and_goes_on_only_when_all_has_held_for_a_while() -> None:
    hot = (Unmet("temperature", "too hot"),)
    stand = after(Stand(is_open=True), hot, 0.0)
    assert not stand.is_open and words(stand) == "too hot"
    stand = after(stand, (), 5.0)
    assert not stand.is_open and "hold again" in words(stand)
    stand = after(stand, hot, 5.0 + HOLD_S - 1)
    stand = after(stand, (), 5.0 + HOLD_S)
    assert not after(stand, (), 5.0 + 2 * HOLD_S - 1).is_open, "it begins to count anew"
    stand = after(stand, (), 5.0 + 2 * HOLD_S)
    assert stand.is_open and words(stand) == ""
    assert after(stand, (), 99.0) == stand


# what the machine says


def lay(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def process_stat(user: int, system: int, ended_user: int = 0, ended_system: int = 0, state: str = "S") -> str:
    return f"7 (a (bad) name) {state} 1 7 7 0 -1 4 0 0 0 0 {user} {system} {ended_user} {ended_system} 39 19 1 0 0\n"


def test_the_use_of_the_processors_is_that_of_others(tmp_path: Path) -> None:
    now = 100.0
    lay(tmp_path, {"proc/stat": "cpu 1000 0 100 5000 50 0 0 0 0 0\n", "proc/self/stat": process_stat(10, 0)})
    sensors = Sensors(tmp_path, lambda: now)
    assert sensors.read().busy_share is None, "one look tells nothing"
    now += 2
    # of 400 ticks 150 idle, 10 waiting for the disk; ours 20 + a child that ended 30 + the training 120: others 70
    lay(
        tmp_path,
        {
            "proc/stat": "cpu 1120 80 140 5150 60 0 0 900 0 0\n",
            "proc/self/stat": process_stat(25, 5, 20, 10),
            "proc/7/stat": process_stat(100, 20, 99, 99),
        },
    )
    assert sensors.read(Own(7)).busy_share == pytest.approx(70 / 400)
    now += 60
    lay(tmp_path, {"proc/stat": "cpu 1120 80 140 6150 60 0 0 900 0 0\n"})
    assert sensors.read(Own(7)).busy_share == pytest.approx(0), "only the last seconds count"


def test_the_load_is_without_what_training_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors_module, "LOAD_S", 1e-6)  # no memory: the average is what runs now
    now = 0.0
    lay(tmp_path, {"proc/loadavg": "3.50 1 1 4/99 7\n", "proc/7/task/7/stat": process_stat(0, 0, state="R")})
    lay(tmp_path, {"proc/7/task/8/stat": process_stat(0, 0, state="D"), "proc/7/task/9/stat": process_stat(0, 0)})
    sensors = Sensors(tmp_path, lambda: now)
    now += 1
    assert sensors.read(Own(7)).load == pytest.approx(1.5)
    now += 1
    assert sensors.read().load == pytest.approx(3.5)


def test_free_memory_is_what_is_left_with_the_training_in_memory_whether_it_is_there_or_not(tmp_path: Path) -> None:
    lay(tmp_path, {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {500 << 10} kB\n"})
    sensors = Sensors(tmp_path)
    assert sensors.read().free_bytes == 500 * MIB
    assert sensors.read(Own(0, 300 * MIB)).free_bytes == 200 * MIB, "saved, and not in memory now"
    lay(tmp_path, {"proc/meminfo": f"MemAvailable: {200 << 10} kB\n", "proc/7/status": f"VmRSS: {300 << 10} kB\n"})
    assert sensors.read(Own(7, 300 * MIB)).free_bytes == 200 * MIB, "in memory: else it would leave and come back"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"BAT0/type": "Battery", "BAT0/status": "Discharging", "AC/type": "Mains", "AC/online": "0"}, False),
        ({"BAT0/type": "Battery", "BAT0/status": "Unknown", "AC/type": "Mains", "AC/online": "0"}, False),
        ({"BAT0/type": "Battery", "BAT0/status": "Not charging", "AC/type": "Mains", "AC/online": "1"}, True),
        ({"b/type": "Battery", "b/status": "Discharging", "USB/type": "USB_PD", "USB/online": "1"}, True),
        ({"BAT0/type": "Battery", "BAT0/status": "Charging"}, True),
        ({"BAT0/type": "Battery", "BAT0/status": "Discharging"}, False),
        ({"BAT0/type": "Battery", "BAT0/status": "Unknown"}, None),
        ({"mouse/type": "Battery", "mouse/scope": "Device", "mouse/status": "Discharging"}, True),
        ({"BAT0/type": "Battery", "BAT0/present": "0", "AC/type": "Mains", "AC/online": "0"}, True),
    ],
)
def test_a_device_charges_that_is_plugged_in_or_has_no_battery(
    files: dict[str, str], expected: bool | None, tmp_path: Path
) -> None:
    lay(tmp_path / "sys/class/power_supply", files)
    assert charging(tmp_path) is expected


# the gate


def test_a_condition_that_this_machine_can_never_tell_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="temperature<70 cannot be told here: this device has no thermal sensor"):
        Gate(parse_conditions("charging, temperature<70"), Sensors(tmp_path))
    lay(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "41000"})
    assert Gate(parse_conditions("charging, temperature<70"), Sensors(tmp_path)).is_open


def test_a_wait_is_told_when_it_begins_then_once_a_minute_and_when_it_is_another(tmp_path: Path) -> None:
    now = 0.0
    heat, load = "sys/class/thermal/thermal_zone0/temp", "proc/loadavg"
    lay(tmp_path, {heat: "71000", load: "0.1 0 0\n"})
    gate = Gate(parse_conditions("temperature<70, load<1"), Sensors(tmp_path, lambda: now), clock=lambda: now)
    assert not gate.is_open and gate.words == "temperature 71.0, wanted below 70"
    lay(tmp_path, {heat: "72000"})
    now += 2 * LOOK_S
    gate.look()
    assert gate.words == "temperature 71.0, wanted below 70", "the same wait: nobody is told each second"
    now += TELL_S
    gate.look()
    assert gate.words == "temperature 72.0, wanted below 70"
    lay(tmp_path, {load: "4 0 0\n"})
    now += LOOK_S
    gate.look()
    assert gate.words == "temperature 72.0, wanted below 70; load 4.00, wanted below 1"
    lay(tmp_path, {heat: "60000", load: "0.1 0 0\n"})
    for _ in range(3):
        now += HOLD_S
        gate.look()
    assert gate.is_open and gate.words == ""


def test_waiting_tells_what_for_and_ends_when_all_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = 0.0, list[str]()
    lay(tmp_path, {"proc/loadavg": "4 0 0\n"})

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 3:
            lay(tmp_path, {"proc/loadavg": "0.5 0 0\n"})

    monkeypatch.setattr(gate_module.time, "sleep", sleep)
    Gate(parse_conditions("load<1"), Sensors(tmp_path, lambda: now), lambda: now).wait(told.append)
    assert told[0] == "waiting: load 4.00, wanted below 1" and len(told) == 2 and HOLD_S < now < 3 * HOLD_S


# the doctor


def test_the_doctor_says_what_the_conditions_read_and_which_can_never_be_told(tmp_path: Path) -> None:
    lay(tmp_path, {"proc/loadavg": "4 0 0\n", "proc/meminfo": f"MemAvailable: {500 << 10} kB\n"})
    sensors = Sensors(tmp_path)
    none = doctor.conditions("", sensors)
    assert (
        none.verdict == "ok"
        and "charging, no thermal sensor" in none.found
        and "load 4.00, free memory 500 MiB" in none.found
    )
    assert doctor.conditions("load<5", sensors).found == "hold now: load<5"
    waiting = doctor.conditions("charging, load<1.5", sensors)
    assert (waiting.verdict, waiting.found) == ("warning", "waiting: load 4.00, wanted below 1.5")
    assert doctor.conditions("temperature<70", sensors).verdict == "wrong"
    assert "no condition" in doctor.conditions("cold", sensors).found
