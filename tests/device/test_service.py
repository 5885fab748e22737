"""The systemd unit: what stands in it, what systemd itself says of it, and what is refused before anything is changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_runtime.cli import main
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.system.service import install, obstacle, uninstall, units
from edge_runtime.system.service_units import NAME, SERVING, Limits, Machine

HOME = "/home"
HERE = Machine(systemd=252, python="/bin/sh", torch=False)  # a program that is on every machine


def config(folder: Path, device: str = 'data = "/srv/texts.csv"', ca_file: str = "") -> Path:
    """A device's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pi-1.toml"
    fleet = 'realm = "farm"\ndevice = "pi-1"\nsecret = "s"\nhost = "hub.lan"\nport = 1883\n'
    path.write_text(f'[fleet]\n{fleet}ca_file = "{ca_file}"\n[device]\n{device}\n')
    return path


def unit(path: Path, limits: Limits, machine: Machine) -> str:
    """The agent's unit."""
    return units(path, limits, machine)[NAME]


def settings(text: str) -> dict[str, str]:
    """The last value of each key of a unit."""
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze, where it is."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("folder", ["plain", 'odd 100% $HOME "x" \\ é'])
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, folder: str) -> None:
    state = 'data = "/srv/a b.csv"\nstate = "/srv/100% $x"'
    for name, text in units(config(tmp_path / folder, state), Limits("600MB", "150%"), HERE, 8765).items():
        path = tmp_path / f"{name}.service"
        path.write_text(text)
        done = analyze("verify", str(path))
        assert (done.returncode, done.stderr) == (0, "")


def test_systemd_finds_the_unit_well_protected(tmp_path: Path) -> None:
    path = tmp_path / "edge-runtime.service"
    for torch, name in ((False, NAME), (True, NAME), (False, SERVING)):
        path.write_text(units(config(tmp_path), Limits(), Machine(252, "/bin/sh", torch), 8765)[name])
        done = analyze("security", "--offline=true", "--no-pager", str(path))
        if "nrecognized option" in done.stderr:
            pytest.skip("this systemd-analyze cannot judge a file")
        found = re.search(r"Overall exposure level for .+: ([\d.]+)", done.stdout)
        assert found and float(found[1]) <= 1.5, done.stdout + done.stderr


def test_limits_and_places_stand_in_the_unit(tmp_path: Path) -> None:
    found = settings(unit(config(tmp_path), Limits("600MB", "150%"), HERE))
    assert (found["MemoryMax"], found["CPUQuota"], found["MemorySwapMax"]) == ("600000000", "150%", "0")
    assert found["LoadCredential"] == f"device.toml:{tmp_path / 'pi-1.toml'}"
    assert found["ExecStart"].endswith("--config ${CREDENTIALS_DIRECTORY}/device.toml --state /var/lib/edge-runtime")
    assert (found["Type"], found["Restart"], found["User"]) == ("notify", "always", "edge-runtime")
    plain = settings(unit(config(tmp_path, 'state = "/srv/edge"'), Limits(), HERE))
    assert (plain["MemoryMax"], plain["ReadWritePaths"]) == ("80%", "/srv/edge")
    assert "CPUQuota" not in plain


def test_an_authority_beside_the_file_is_handed_over_with_it(tmp_path: Path) -> None:
    text = unit(config(tmp_path, ca_file="ca.pem"), Limits(), HERE)
    assert f"LoadCredential=ca.pem:{tmp_path / 'ca.pem'}\n" in text
    assert "LoadCredential=" not in unit(config(tmp_path, ca_file="/etc/ca.pem"), Limits(), HERE).replace(
        f"LoadCredential=device.toml:{tmp_path}", ""
    )


def test_a_newer_systemd_waits_longer_each_time(tmp_path: Path) -> None:
    older, newer = (settings(unit(config(tmp_path), Limits(), Machine(v, "/bin/sh", False))) for v in (253, 254))
    assert older["RestartSec"] == "60" and "RestartSteps" not in older
    assert (newer["RestartSec"], newer["RestartMaxDelaySec"]) == ("5", "600")
    with pytest.raises(UsageError, match="systemd is version 245, this service needs 247"):
        unit(config(tmp_path), Limits(), Machine(245, "/bin/sh", False))


def test_torch_may_write_code_as_it_runs(tmp_path: Path) -> None:
    with_torch, without = (
        settings(unit(config(tmp_path), Limits(), Machine(252, "/bin/sh", t))) for t in (True, False)
    )
    assert "MemoryDenyWriteExecute" not in with_torch
    assert without["MemoryDenyWriteExecute"] == "yes"


@pytest.mark.parametrize(
    "limits",
    [Limits("0%"), Limits("101%"), Limits("600"), Limits("much"), Limits(cpu_quota="0%"), Limits(cpu_quota="2")],
)
def test_a_limit_that_is_none_is_refused(tmp_path: Path, limits: Limits) -> None:
    with pytest.raises(UsageError):
        unit(config(tmp_path), limits, HERE)


@pytest.mark.parametrize(
    ("device", "ca_file", "python", "named"),
    [
        ("", "", "/bin/sh", "name this device's examples"),
        ('data = "texts.csv"', "", "/bin/sh", "data must be an absolute path"),
        ('data = "/srv/t.csv"\nstate = "edge"', "", "/bin/sh", "state must be an absolute path"),
        (f'data = "{HOME}/pi/t.csv"', "", "/bin/sh", f"does not see /home, and data is {HOME}/pi/t.csv: move it"),
        ('data = "/srv/t.csv"', "", f"{HOME}/pi/v/bin/python", "install edge-runtime below /usr/local/lib"),
        ('data = "/srv/t.csv"', "tls/ca.pem", "/bin/sh", "ca_file must be absolute, or a file beside pi-1.toml"),
        ('data = "/srv/t.csv"', f"{HOME}/pi/ca.pem", "/bin/sh", "does not see /home, and ca_file"),
    ],
)  # fmt: skip
def test_what_the_service_would_not_find_is_said_before(
    tmp_path: Path, device: str, ca_file: str, python: str, named: str
) -> None:
    assert named in obstacle(config(tmp_path, device, ca_file), python)


def test_a_device_whose_files_all_can_be_found_is_no_obstacle(tmp_path: Path) -> None:
    for ca_file in ("", "ca.pem", "/etc/edge/ca.pem"):
        assert obstacle(config(tmp_path, ca_file=ca_file), "/usr/local/lib/edge-runtime/bin/python") == ""


def test_print_shows_the_unit_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["service", "print", "--config", str(config(tmp_path)), "--memory-max", "60%"]) == 0
    shown = capsys.readouterr()
    assert settings(shown.out)["MemoryMax"] == "60%"
    assert [path.name for path in tmp_path.iterdir()] == ["pi-1.toml"]


def test_without_systemd_nothing_is_installed(tmp_path: Path) -> None:
    for action in (lambda: install(config(tmp_path), Limits(), root=tmp_path), lambda: uninstall(root=tmp_path)):
        with pytest.raises(UsageError, match="with sudo" if os.geteuid() else "systemd does not run this machine"):
            action()


class System:
    """A machine's programs for `install`: what was called, and which of them fails. systemd itself is not here."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        (root / "run/systemd/system").mkdir(parents=True)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr("sys.executable", "/usr/local/lib/edge-runtime/bin/python")
        self.root, self.failing, self.calls = root, failing, [""]

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.calls.append(" ".join(command))
        code = int(bool(self.failing) and self.calls[-1].startswith(self.failing))
        return subprocess.CompletedProcess(command, code, "systemd 252 (x)\n", "it failed\n")


def test_install_makes_the_user_and_starts_the_service_and_uninstall_leaves_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(tmp_path / "root", monkeypatch, failing="id ")
    (path,) = install(config(tmp_path), Limits(), root=system.root, run=system)
    assert settings(path.read_text())["User"] == "edge-runtime" and path.stat().st_mode & 0o777 == 0o644
    assert any(call.startswith("useradd --system") for call in system.calls)
    assert system.calls[-2:] == ["systemctl enable edge-runtime.service", "systemctl restart edge-runtime.service"]
    assert uninstall(root=system.root, run=system) and not path.exists()
    assert "systemctl disable --now edge-runtime.service" in system.calls
    assert not uninstall(root=system.root, run=system)


def test_what_answers_is_a_service_beside_the_agents_and_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(tmp_path / "root", monkeypatch)
    agent, server = install(config(tmp_path), Limits(), 9000, root=system.root, run=system)
    found = settings(server.read_text())
    assert found["ExecStart"].endswith("serve /var/lib/edge-runtime --port 9000")
    assert (found["User"], found["IPAddressAllow"], found["IPAddressDeny"]) == ("edge-runtime", "localhost", "any")
    assert int(found["CPUWeight"]) > int(settings(agent.read_text())["CPUWeight"])
    assert system.calls[-1] == "systemctl restart --no-block edge-runtime-serve.service"
    install(config(tmp_path), Limits(), root=system.root, run=system)
    assert agent.exists() and not server.exists()
    install(config(tmp_path), Limits(), 9000, root=system.root, run=system)
    assert uninstall(root=system.root, run=system) and not agent.exists() and not server.exists()


def test_data_that_the_services_user_may_not_read_stops_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(tmp_path / "root", monkeypatch, failing="runuser")
    with pytest.raises(UsageError, match="the user edge-runtime may not read /srv/texts.csv: sudo chgrp"):
        install(config(tmp_path), Limits(), root=system.root, run=system)
    assert not (system.root / "etc").exists()


def test_a_service_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = System(tmp_path / "root", monkeypatch, failing="systemctl restart")
    with pytest.raises(EdgeError, match="it failed; journalctl --unit edge-runtime says more"):
        install(config(tmp_path), Limits(), root=system.root, run=system)
