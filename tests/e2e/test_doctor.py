"""`edge-runtime doctor` in a real fleet: all well, refused, and with an agent that must not be disturbed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.cli import main
from edge_runtime.credentials import read_credentials
from edge_runtime.system import doctor_machine
from edge_runtime.system.doctor_fleet import ask, skew
from edge_runtime.topics import Topics
from edge_runtime.transport import MqttTransport
from tests.e2e.fleets import Fleet, running


def test_doctor_tells_a_fleet_that_is_well_from_one_that_is_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_machine, "installed", lambda: dict.fromkeys(doctor_machine.PACKAGES, "1"))
    monkeypatch.setattr(doctor_machine, "try_package", lambda code: (0, ""))  # they are in other tests
    fleet = Fleet(tmp_path, model, devices=1)
    config = fleet.fleet / "devices" / "device-0.toml"

    def doctor() -> dict[str, Any]:
        main(["doctor", "--config", str(config), "--state", str(tmp_path / "device-0"), "--json"])
        return {check["check"]: check for check in json.loads(capsys.readouterr().out)["checks"]}

    assert doctor()["broker"]["verdict"] == "wrong"
    with running(fleet):
        fleet.start("coordinator")
        fleet.wait(lambda: fleet.events("coordinator", "round-opened"))
        found = doctor()
        for check in ("credentials", "broker", "certificate", "login", "coordinator", "clock skew"):
            assert found[check]["verdict"] == "ok", found[check]
        assert not fleet.events("coordinator", "status"), "the question changes nothing"

        who = read_credentials(config)
        transport = MqttTransport(
            who.host, who.port, who.device, who.secret, Topics(who.realm).device_filters(who.device)
        )
        late = skew(ask(transport, who, clock=lambda: time.time() - 3600))
        assert late.verdict == "wrong" and late.found.startswith(("3600.", "3599.")) and "behind" in late.found

        fleet.start("device-0")
        fleet.wait(lambda: fleet.events("device-0", "connected"))
        assert "is running" in doctor()["coordinator"]["found"]
        assert not fleet.events("device-0", "disconnected")
        fleet.kill("device-0")

        config.write_text(config.read_text().replace(who.secret, "x" * 40))
        found = doctor()
        assert found["login"]["verdict"] == "wrong" and "enroll --renew" in found["login"]["advice"]
