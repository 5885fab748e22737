"""What the machine tells, in file systems of our own: cgroups of both versions, nested and absent, thermal zones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_runtime import hardware
from edge_runtime.hardware import cgroup_memory, measure_speed, memory_cgroups, process_memory, reset_peak, temperature
from edge_runtime.wire import from_plain, to_plain

MIB = 1 << 20
V1_NO_LIMIT = "9223372036854771712"


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """A file system below `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def version_2(root: Path, path: str, groups: dict[str, dict[str, str]]) -> Path:
    """A machine with the unified hierarchy, this process in `path`."""
    files = {"proc/self/cgroup": f"0::{path}\n"}
    for group, values in groups.items():
        files |= {f"sys/fs/cgroup{group}/{name}": f"{value}\n" for name, value in values.items()}
    return lay_out(root, files)


def version_1(root: Path, path: str, groups: dict[str, dict[str, str]]) -> Path:
    """A machine with one hierarchy a controller, this process in `path` of memory's."""
    files = {"proc/self/cgroup": f"11:cpuset:/x\n9:memory:{path}\n4:cpu,cpuacct:/x\n1:name=systemd:/x\n0::/\n"}
    for group, values in groups.items():
        files |= {f"sys/fs/cgroup/memory{group}/{name}": f"{value}\n" for name, value in values.items()}
    return lay_out(root, files)


def test_a_machine_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) == (None, None)
    assert memory_cgroups(tmp_path) == []
    assert cgroup_memory(lay_out(tmp_path, {"proc/self/cgroup": ""})) == (None, None)


def test_version_2_gives_the_limit_and_what_is_left_with_file_pages_counted_as_free(tmp_path: Path) -> None:
    stat = f"anon {80 * MIB}\ninactive_file {30 * MIB}\nactive_file {10 * MIB}\nslab 5"
    group = {"memory.max": str(512 * MIB), "memory.high": "max", "memory.current": str(120 * MIB), "memory.stat": stat}
    root = version_2(tmp_path, "/app.slice", {"/app.slice": group})
    assert cgroup_memory(root) == (512 * MIB, 512 * MIB - 80 * MIB)


def test_version_2_max_is_no_limit(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/a", {"/a": {"memory.max": "max", "memory.high": "max", "memory.current": "5"}})
    assert cgroup_memory(root) == (None, None)


def test_version_2_high_is_a_limit_too_where_it_is_lower(tmp_path: Path) -> None:
    root = version_2(
        tmp_path, "/a", {"/a": {"memory.max": str(400 * MIB), "memory.high": str(300 * MIB), "memory.current": "0"}}
    )
    assert cgroup_memory(root) == (300 * MIB, 300 * MIB)


def test_version_2_the_lowest_limit_of_all_ancestors_counts_and_the_least_room_of_all(tmp_path: Path) -> None:
    groups = {
        "": {"cgroup.procs": ""},  # the root has no limit files
        "/user.slice": {"memory.max": str(600 * MIB), "memory.current": str(590 * MIB)},
        "/user.slice/app": {"memory.max": str(200 * MIB), "memory.current": str(50 * MIB)},
        "/user.slice/app/worker": {"memory.max": "max", "memory.current": str(40 * MIB)},
        "/user.slice/other": {"memory.max": str(MIB), "memory.current": str(MIB)},
    }
    root = version_2(tmp_path, "/user.slice/app/worker", groups)
    assert cgroup_memory(root) == (200 * MIB, 10 * MIB), "the neighbours of the slice leave 10 MiB"
    assert [folder.name for folder, _ in memory_cgroups(root)] == ["worker", "app", "user.slice", "cgroup"]


def test_inside_a_container_the_mount_itself_is_our_group(tmp_path: Path) -> None:
    """/proc/self/cgroup may name the host's path, which does not exist below the container's mount."""
    root = version_2(
        tmp_path, "/docker/0123456789ab", {"": {"memory.max": str(256 * MIB), "memory.current": str(6 * MIB)}}
    )
    assert cgroup_memory(root) == (256 * MIB, 250 * MIB)


def test_a_path_above_the_namespace_is_no_way_out_of_the_mount(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/../..", {"": {"memory.max": str(256 * MIB), "memory.current": "0"}})
    lay_out(tmp_path, {"sys/memory.max": "5", "memory.max": "5"})
    assert cgroup_memory(root)[0] == 256 * MIB


def test_version_1_gives_the_limit_and_what_is_left_with_file_pages_counted_as_free(tmp_path: Path) -> None:
    stat = f"cache 1\ninactive_file 99999999999\ntotal_inactive_file {20 * MIB}\ntotal_active_file {4 * MIB}"
    group = {"memory.limit_in_bytes": str(300 * MIB), "memory.usage_in_bytes": str(100 * MIB), "memory.stat": stat}
    root = version_1(tmp_path, "/docker/abc", {"/docker/abc": group})
    assert cgroup_memory(root) == (300 * MIB, 224 * MIB)


def test_version_1_a_number_near_2_to_63_is_no_limit(tmp_path: Path) -> None:
    root = version_1(tmp_path, "/", {"": {"memory.limit_in_bytes": V1_NO_LIMIT, "memory.usage_in_bytes": "7"}})
    assert cgroup_memory(root) == (None, None)


def test_version_1_ancestors_count(tmp_path: Path) -> None:
    groups = {
        "": {"memory.limit_in_bytes": V1_NO_LIMIT, "memory.usage_in_bytes": str(900 * MIB)},
        "/a": {"memory.limit_in_bytes": str(150 * MIB), "memory.usage_in_bytes": str(140 * MIB)},
        "/a/b": {"memory.limit_in_bytes": str(500 * MIB), "memory.usage_in_bytes": str(20 * MIB)},
    }
    assert cgroup_memory(version_1(tmp_path, "/a/b", groups)) == (150 * MIB, 10 * MIB)


def test_the_innermost_groups_can_be_left_out(tmp_path: Path) -> None:
    groups = {
        "/a": {"memory.limit_in_bytes": str(500 * MIB), "memory.usage_in_bytes": str(40 * MIB)},
        "/a/b": {"memory.limit_in_bytes": str(150 * MIB), "memory.usage_in_bytes": str(20 * MIB)},
    }
    root = version_1(tmp_path, "/a/b", groups)
    assert cgroup_memory(root) == (150 * MIB, 130 * MIB)
    assert cgroup_memory(root, skip=1) == (500 * MIB, 460 * MIB)
    assert cgroup_memory(root, skip=9) == (None, None)


def test_a_hybrid_machine_takes_the_version_that_holds_memory(tmp_path: Path) -> None:
    root = version_1(tmp_path, "/a", {"/a": {"memory.limit_in_bytes": str(64 * MIB), "memory.usage_in_bytes": "0"}})
    lay_out(root, {"sys/fs/cgroup/unified/cgroup.procs": "", "proc/self/cgroup": "9:memory:/a\n0::/user.slice\n"})
    assert cgroup_memory(root) == (64 * MIB, 64 * MIB)


def test_a_group_over_its_limit_has_no_room_and_never_less(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/a", {"/a": {"memory.max": str(MIB), "memory.current": str(5 * MIB)}})
    assert cgroup_memory(root) == (MIB, 0)


def test_more_file_pages_than_use_is_not_more_room_than_the_limit(tmp_path: Path) -> None:
    root = version_2(
        tmp_path, "/a", {"/a": {"memory.max": str(MIB), "memory.current": "5", "memory.stat": "inactive_file 999"}}
    )
    assert cgroup_memory(root) == (MIB, MIB)


def test_a_limit_without_a_count_of_what_is_used_still_counts(tmp_path: Path) -> None:
    assert cgroup_memory(version_2(tmp_path, "/a", {"/a": {"memory.max": str(MIB)}})) == (MIB, MIB)


@pytest.mark.parametrize("content", ["", "many", "-", "max"])
def test_unreadable_numbers_are_no_limit(tmp_path: Path, content: str) -> None:
    root = version_2(
        tmp_path, "/a", {"/a": {"memory.max": content, "memory.current": content, "memory.stat": "x\ny z w"}}
    )
    assert cgroup_memory(root) == (None, None)


def test_the_temperature_is_that_of_the_hottest_plausible_zone(tmp_path: Path) -> None:
    assert temperature(tmp_path) is None
    zones = {"0": "48312\n", "1": "61000\n", "2": "-274000\n", "3": "999000\n", "4": "", "5": "broken"}
    lay_out(tmp_path, {f"sys/class/thermal/thermal_zone{n}/temp": text for n, text in zones.items()})
    assert temperature(tmp_path) == 61.0


def test_a_thermal_zone_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").mkdir(parents=True)
    assert temperature(tmp_path) is None


def test_the_profile_of_this_machine_is_one_that_may_travel() -> None:
    profile = hardware.profile(speed=False)
    assert from_plain(type(profile), to_plain(profile), "profile") == profile
    assert 0 < profile.memory_available_bytes <= profile.ram_total_bytes
    assert profile.memory_limit_bytes <= profile.ram_total_bytes
    assert 1 <= profile.cores <= (os.cpu_count() or 1)
    assert (profile.gflops, profile.memory_gb_per_s) == (0.0, 0.0)
    assert (profile.battery_percent is None) or 0 <= profile.battery_percent <= 100


def test_the_speed_of_this_machine_is_positive_and_finite() -> None:
    gflops, gb_per_s = measure_speed(0.02)
    assert 0 < gflops < 1e6
    assert 0 < gb_per_s < 1e5


def test_the_memory_of_a_process_is_read_in_bytes_and_a_missing_process_has_none() -> None:
    found = process_memory()
    assert set(found) == {"VmHWM", "VmRSS", "RssAnon", "VmSwap"}
    assert 4 * MIB < found["RssAnon"] <= found["VmRSS"] <= found["VmHWM"]
    assert process_memory(2**22 + 1) == {}


def test_the_peak_begins_anew_after_a_reset() -> None:
    block = bytearray(os.urandom(1)) * (64 * MIB)
    peak = process_memory()["VmHWM"]
    del block
    reset_peak()
    found = process_memory()
    near_now = found["VmHWM"] <= found["VmRSS"] + 16 * MIB < peak
    assert near_now or found["VmHWM"] == peak, "where clear_refs may not be written, nothing happens"
