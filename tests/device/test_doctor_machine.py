"""What `doctor` says of a machine, in file systems of our own, and of packages that are broken for real."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from edge_runtime.cli import main
from edge_runtime.system import doctor_machine as machine
from edge_runtime.system.doctor import Finding, show
from tests.device.test_hardware import lay_out

GIB = 1 << 30
CONTROLLERS = "sys/fs/cgroup/cgroup.controllers"
PI = "boot/firmware/cmdline.txt"
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
ZONE = "sys/class/thermal/thermal_zone0/temp"
FAN, CPU = ({f"sys/class/thermal/cooling_device{n}/type": t} for n, t in enumerate(("pwm-fan", "thermal-cpufreq-0")))


@pytest.mark.parametrize(
    ("build", "verdict", "advice"),
    [
        (((3, 11), "aarch64", "glibc"), "ok", ""),
        (((3, 12), "x86_64", ""), "warning", "need glibc"),
        (((3, 14), "aarch64", "glibc"), "warning", "3.10 to 3.13"),
    ],
)
def test_a_python_that_has_no_wheels_is_found(build: tuple, verdict: str, advice: str) -> None:  # type: ignore[type-arg]
    found = machine.interpreter(*build)
    assert found.verdict == verdict and advice in found.advice


def test_the_packages_of_this_environment_work() -> None:
    (found,) = machine.packages(
        {name: "1" for name in machine.PACKAGES if name not in machine.OPTIONAL}, machine.try_package
    )
    assert (found.verdict, found.found.count(" 1")) == ("ok", 6)


def test_a_package_that_is_missing_dies_or_is_anothers_is_named_with_what_to_do() -> None:
    def attempt(code: str) -> tuple[int, str]:
        """Real processes that end as a wrong wheel does."""
        if "onnxruntime" in code:
            return machine.try_package(f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})")
        if "tokenizers" in code:
            return machine.try_package("raise ImportError('tokenizers.so: wrong ELF class: ELFCLASS32')")
        return 0, ""

    versions = {"numpy": "2.4.6", "onnxruntime": "1.21.0", "tokenizers": "0.23.3", "psutil": "7", "msgpack": "1"}
    *broken, sound = machine.packages(versions, attempt)
    assert [(f.check, f.verdict) for f in broken] == [
        (name, "wrong") for name in ("onnxruntime", "tokenizers", "paho-mqtt")
    ]
    illegal, foreign, missing = broken
    assert illegal.found == "onnxruntime 1.21.0 dies with SIGILL" and "another version" in illegal.advice
    assert "wrong ELF class" in foreign.found and "--force-reinstall" in foreign.advice
    assert missing.found == "is not installed" and "pip install paho-mqtt" in missing.advice
    assert sound.found == "numpy 2.4.6, psutil 7, msgpack 1"


MOUNTS = r"""/dev/mmcblk0p2 / ext4 rw,noatime 0 0
tmpfs /run tmpfs rw,nosuid 0 0
/dev/sda1 /srv/usb\040stick vfat rw 0 0
/dev/sdb1 /srv/old ext4 ro,relatime 0 0
overlay /srv/over overlay rw,lowerdir=/a 0 0
tmpfs /srv/old/hidden tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("state", "writable", "verdict", "named"),
    [
        ("/var/lib/edge", True, "ok", "ext4 on /"),
        ("/var/lib/edge", False, "wrong", "not writable by this user"),
        ("/var/lib/edge", None, "unknown", "another user's"),
        ("/run/edge", True, "wrong", "in memory"),
        ("/runner/edge", True, "ok", "ext4 on /"),
        ("/srv/usb stick/edge", True, "warning", "vfat on /srv/usb stick"),
        ("/srv/old/edge", True, "wrong", "read-only"),
        ("/srv/old/hidden/edge", True, "wrong", "in memory"),
        ("/srv/over", True, "warning", "overlay"),
    ],
)
def test_a_state_folder_that_loses_what_is_written_is_found(
    tmp_path: Path, state: str, writable: bool | None, verdict: str, named: str
) -> None:
    root = lay_out(tmp_path, {"proc/self/mounts": MOUNTS})
    found = machine.state_folder(root, Path(state), writable=writable)
    assert found.verdict == verdict and named in found.found
    assert bool(found.advice) == (verdict != "ok")


def test_a_machine_that_lists_no_mounts_is_no_fault(tmp_path: Path) -> None:
    assert machine.state_folder(tmp_path, Path("/var/lib/edge"), writable=True).verdict == "unknown"


@pytest.mark.parametrize(
    ("free", "verdict"), [(100 << 20, "wrong"), (500 << 20, "warning"), (9 * GIB, "ok"), (None, "unknown")]
)
def test_a_full_disk_is_found(free: int | None, verdict: str) -> None:
    assert machine.disk_room(free, Path("/")).verdict == verdict


@pytest.mark.parametrize(
    ("now_s", "error_us", "synchronized", "verdict"),
    [
        (1.8e9, 20_000, False, "ok"),  # chrony, ntpd
        (1.8e9, 16_000_000, True, "ok"),  # systemd-timesyncd
        (1.8e9, 16_000_000, False, "warning"),
        (1.8e9, None, False, "unknown"),
        (3600.0, 20_000, True, "wrong"),
    ],
)
def test_a_clock_that_nobody_keeps_is_found(
    tmp_path: Path, now_s: float, error_us: int | None, synchronized: bool, verdict: str
) -> None:
    root = lay_out(tmp_path, {"run/systemd/timesync/synchronized": ""} if synchronized else {})
    assert machine.clock(root, now_s, error_us, tls=True).verdict == verdict


def test_the_kernel_says_how_far_the_clock_may_be_off() -> None:
    error_us = machine.clock_error_us()
    assert error_us is not None and 0 <= error_us <= 16_000_000


SWAPS = "Filename\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@pytest.mark.parametrize(
    ("rows", "verdict", "named"),
    [
        ("", "ok", "none"),
        ("/dev/zram0 partition 2097148 1024 100\n", "ok", "no budget counts it"),
        ("/dev/zram0 partition 2097148 2000000 100\n", "warning", "/dev/zram0 2047 MiB"),
        ("/var/swap file 204796 0 -2\n", "warning", "/var/swap 199 MiB"),
        ("/dev/mmcblk0p3 partition 204796 0 -2\n", "warning", "mmcblk"),
        ("/dev/nvme0n1p3 partition 204796 0 -2\n", "ok", "nvme"),
    ],
)
def test_swap_is_named_and_blamed_where_it_harms(tmp_path: Path, rows: str, verdict: str, named: str) -> None:
    found = machine.swap(lay_out(tmp_path, {"proc/swaps": SWAPS + rows}))
    assert found.verdict == verdict and named in found.found
    assert machine.swap(tmp_path / "elsewhere").verdict == "unknown"


CGROUPS = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t80\t1\nmemory\t0\t80\t{}\n"


@pytest.mark.parametrize(
    ("files", "verdict", "advice"),
    [
        ({CONTROLLERS: "cpuset cpu io memory pids\n"}, "ok", ""),
        ({"sys/fs/cgroup/memory/tasks": "", "proc/cgroups": CGROUPS.format(1)}, "ok", ""),
        ({CONTROLLERS: "cpu io", PI: "console=tty1 rootwait\n"}, "warning", f"add cgroup_enable=memory to the one line of /{PI}"),
        ({CONTROLLERS: "cpu io", "boot/cmdline.txt": "rootwait\n"}, "warning", "line of /boot/cmdline.txt"),
        ({CONTROLLERS: "cpu io", PI: "rootwait cgroup_enable=memory\n"}, "warning", "has cgroup_enable=memory already: reboot"),
        ({CONTROLLERS: "cpu io", PI: "cgroup_disable=memory rootwait\n"}, "warning", f"take cgroup_disable=memory out of /{PI}"),
        (
            {CONTROLLERS: "cpu", PI: "cgroup_enable=memory", "proc/cmdline": "cgroup_disable=memory cgroup_enable=memory\n"},
            "warning", "the kernel does not heed cgroup_enable=memory",
        ),
        ({CONTROLLERS: "cpu io"}, "warning", "the kernel's command line"),
        ({"proc/cgroups": CGROUPS.format(0)}, "warning", "the kernel's command line"),
        ({CONTROLLERS: "cpu io", "proc/cgroups": CGROUPS.format(1)}, "unknown", ""),
        ({}, "unknown", ""),
    ],
)  # fmt: skip
def test_a_memory_cgroup_that_is_switched_off_is_found(
    tmp_path: Path, files: dict[str, str], verdict: str, advice: str
) -> None:
    found = machine.memory_limits(lay_out(tmp_path, files))
    assert found.verdict == verdict and advice in found.advice


@pytest.mark.parametrize(
    ("files", "vcgencmd", "verdict", "named"),
    [
        ({ZONE: "48000"}, "throttled=0x0\n", "ok", "48 C, never throttled"),
        ({ZONE: "48000"}, "throttled=0x50005\n", "wrong", "now too low a voltage and throttling"),
        ({ZONE: "48000"}, "throttled=0x80000\n", "warning", "since the boot there was the soft temperature limit"),
        ({ZONE: "48000", THROTTLED: "50000\n"}, None, "warning", "since the boot there was too low a voltage and throttling"),
        ({ZONE: "48000", **CPU, "sys/class/thermal/cooling_device1/cur_state": "2"}, None, "wrong", "thermal-cpufreq-0"),
        ({ZONE: "48000", **FAN, "sys/class/thermal/cooling_device0/cur_state": "2"}, None, "ok", "not slowed down"),
        ({ZONE: "83000"}, None, "warning", "83 C"),
        ({ZONE: "83000"}, "VCHI initialization failed\n", "warning", "83 C"),
        ({}, None, "unknown", "no thermal sensor"),
    ],
)  # fmt: skip
def test_heat_and_a_weak_supply_are_found(
    tmp_path: Path, files: dict[str, str], vcgencmd: str | None, verdict: str, named: str
) -> None:
    found = machine.throttling(lay_out(tmp_path, files), vcgencmd)
    assert found.verdict == verdict and named in found.found


def test_what_is_wrong_is_in_the_exit_code_and_what_cannot_be_told_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fine = [Finding("swap", "ok", "none"), Finding("clock", "warning", "x", "keep it"), Finding("heat", "unknown", "y")]
    assert show(fine, as_json=False) == 0
    assert capsys.readouterr().out == "swap   ok       none\nclock  warning  x\nheat   unknown  y\n\nclock: keep it\n"
    assert show([*fine, Finding("disk", "wrong", "full", "free some")], as_json=True) == 1
    shown = json.loads(capsys.readouterr().out)
    assert not shown["ok"]
    assert shown["checks"][3] == {"check": "disk", "verdict": "wrong", "found": "full", "advice": "free some"}


def test_doctor_looks_at_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(machine, "installed", dict)  # each is tried above
    code = main(["doctor", "--state", str(tmp_path / "not" / "made" / "yet"), "--json"])
    found = {check["check"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert code == 1 and found["numpy"]["verdict"] == "wrong"
    assert found["disk room"]["verdict"] != "unknown" and str(tmp_path) in found["state folder"]["found"]
    assert found["fleet"]["verdict"] == "unknown" and not (tmp_path / "not").exists()
    assert os.listdir(tmp_path) == []
