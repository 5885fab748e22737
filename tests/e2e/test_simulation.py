"""Simulated fleets with real training: against a real fleet over MQTT, after kills, with drop-outs and deadlines."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_coordinator.cli import main
from edge_coordinator.fleet import Fleet as FleetFolder
from edge_coordinator.fleet import init
from edge_coordinator.models import Models
from edge_coordinator.sim.data import cut, shape_of
from edge_coordinator.sim.making import SimOptions
from edge_coordinator.sim.simulation import Simulation
from edge_runtime.data import Example
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.local import DataOptions, read_shape
from edge_runtime.store import cache_folder
from edge_runtime.training.corpus import Corpus, build_corpus
from tests.e2e.conftest import Reference
from tests.e2e.fleets import LABELS, tiny_model, write_data

CLASSES = '[here]\nmemory = "2GB"\n[slow]\nmemory = "1GB"\ngflops = 0.5\nuplink = 1000\n[shy]\nmemory = "2GB"\ngflops = 1\navailability = 0.5\n'


class World:
    """Data, classes and a cache that simulations of one test session share."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.data, self.test, self.classes = folder / "train.csv", folder / "test.csv", folder / "classes.toml"
        self.classes.write_text(CLASSES)
        write_data(self.data, 0, count=60)
        write_data(self.test, 99, count=30)

    def fleet(
        self,
        name: str,
        *,
        rounds: int = 2,
        goal: int = 3,
        quorum: int = 1,
        timeout_s: float | None = None,
        codec: str = "f32",
        optimizer: str = "fedadam",  # one that has a state
        method: str = "caff",
    ) -> Path:
        """A folder with fleet.toml."""
        path = init(
            self.folder / name, name="test", base=str(self.model), labels=LABELS, max_length=32, method=method, rounds=rounds, goal=goal, quorum=quorum, seed=3
        )  # fmt: skip
        text = path.read_text().replace('server_optimizer = "fedavg"', f'server_optimizer = "{optimizer}"')
        text = text.replace('codec = "f32"', f'codec = "{codec}"').replace('method = "caff"', f'method = "{method}"')
        path.write_text(text.replace("report_timeout_s = 3600.0", f"report_timeout_s = {timeout_s or 3600.0}"))
        return path.parent

    def options(self, **changes: Any) -> SimOptions:
        """Six devices of two classes, some of them not always there."""
        usual = SimOptions(self.data, self.test, 6, "here:2,shy:1", self.classes, "dirichlet:1", 0.2)
        return replace(usual, **changes)


@pytest.fixture(scope="module")
def world(model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("sim"), model)


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    """A simulation that ran to its end in one go."""
    folder = world.fleet("undisturbed")
    simulate(folder, world.options())
    return folder


def simulate(
    folder: Path,
    options: SimOptions,
    progress: Callable[[dict[str, Any]], None] = print,
    keep_going: Callable[[], bool] = lambda: True,
) -> Simulation:
    simulation = Simulation(folder, options, progress=progress, say=print, keep_going=keep_going)
    simulation.run()
    return simulation


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> list[str]:
    """The newest model, bit for bit."""
    newest = Models(folder, FleetFolder(folder).ledger).newest()
    assert newest
    return [t.blob.hex() for t in newest[0].tensors]


def like_the_real_one(
    world: World, reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch, codec: str = "f32"
) -> Path:
    """Simulate what the two devices of `fleets.Fleet` do over MQTT; -> the simulation's folder."""
    cache = shutil.copytree(reference.cache, folder / "cache")
    if (cache_folder() / "graphs").exists():  # the coordinator's: the small model's graphs are derived once
        shutil.copytree(cache_folder() / "graphs", cache / "graphs", dirs_exist_ok=True)
    monkeypatch.setenv("EDGE_CACHE", str(cache))
    data = folder / "all.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "device"])
        for number in range(2):
            with write_data(folder / f"{number}.csv", number).open(newline="") as one:
                writer.writerows([*row, f"user {number}"] for row in list(csv.reader(one))[1:])
    made = world.fleet(f"like-the-real-one-{codec}", goal=2, quorum=2, codec=codec, optimizer="fedavg")
    simulate(made, SimOptions(data, classes="here", class_file=world.classes, partition="by:device"))
    return made


def test_a_simulated_run_gives_the_model_of_a_real_run_over_mqtt_bit_for_bit(
    reference: Reference, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = like_the_real_one(world, reference, tmp_path, monkeypatch)
    ledger = FleetFolder(folder).ledger
    counted = [(n, c.device, c.num_examples) for n in (1, 2) for c in ledger.contributions("first", n).values()]
    assert counted == reference.counted
    assert tensors(folder) == reference.tensors


def test_how_many_train_at_a_time_changes_nothing(undisturbed: Path, world: World) -> None:
    folder = world.fleet("two-workers")
    simulate(folder, world.options(workers=2))
    assert rounds_of(folder) == rounds_of(undisturbed)
    assert tensors(folder) == tensors(undisturbed)


def test_another_seed_gives_another_simulation(undisturbed: Path, world: World) -> None:
    folder = world.fleet("other-seed", rounds=1)
    path = folder / "fleet.toml"
    path.write_text(path.read_text().replace("seed = 3", "seed = 4"))
    simulate(folder, world.options())
    assert rounds_of(folder)[1]["devices"] != rounds_of(undisturbed)[1]["devices"]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_stopped_and_started_again_it_ends_as_if_undisturbed(at: int, undisturbed: Path, world: World) -> None:
    folder = world.fleet(f"stopped-{at}")
    seen: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        simulate(folder, world.options(), seen.append, lambda: len(seen) < at)
    simulate(folder, world.options())
    assert rounds_of(folder) == rounds_of(undisturbed)
    assert tensors(folder) == tensors(undisturbed)


def test_killed_and_started_again_it_ends_as_if_undisturbed(undisturbed: Path, world: World) -> None:
    folder = world.fleet("killed")
    options = [
        "--data",
        world.data,
        "--test",
        world.test,
        "--devices",
        "6",
        "--classes",
        "here:2,shy:1",
        "--class-file",
        world.classes,
    ]
    command = [
        "-m",
        "edge_coordinator.cli",
        "sim",
        "--fleet",
        folder,
        *options,
        "--partition",
        "dirichlet:1",
        "--dropout",
        "0.2",
        "--workers",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=environment, start_new_session=True)
    end = time.monotonic() + 120
    while len(list((folder / "work").glob("*.json"))) < 2:  # two trainings are done, the round is not
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert main([*map(str, command[2:]), "--json"]) == 0
    assert rounds_of(folder) == rounds_of(undisturbed)
    assert tensors(folder) == tensors(undisturbed)


def test_a_finished_simulation_is_not_simulated_again_and_may_have_more_rounds(world: World) -> None:
    folder = world.fleet("longer", rounds=1)
    simulate(folder, world.options())
    seen: list[dict[str, Any]] = []
    simulate(folder, world.options(), seen.append)
    assert seen == []
    path = folder / "fleet.toml"
    path.write_text(path.read_text().replace("rounds = 1", "rounds = 2"))
    simulate(folder, world.options())
    assert [row["round"] for row in rounds_of(folder)] == [0, 1, 2]


def test_a_folder_keeps_to_its_simulation(undisturbed: Path, world: World) -> None:
    with pytest.raises(UsageError, match="another dropout: 0.2, now 0.1"):
        simulate(undisturbed, world.options(dropout=0.1))
    with pytest.raises(UsageError, match="another reading"):
        simulate(undisturbed, world.options(reading=DataOptions(bad_rows="skip")))


def test_wrong_options_do_not_hold_a_folder(world: World, tmp_path: Path) -> None:
    folder = world.fleet("corrected", rounds=1)
    budgets = tmp_path / "classes.toml"
    budgets.write_text(world.classes.read_text() + '[device-9]\ntime = "9s"\n')
    for wrong, message in (
        ({"devices": 60_000}, "60000 devices"),
        ({"partition": "by:nope"}, "nope"),
        ({"class_file": budgets}, "there is no device-9, the devices are device-0 to device-5"),
    ):
        with pytest.raises(EdgeError, match=message):
            simulate(folder, world.options(**wrong))
    simulate(folder, world.options())
    assert rounds_of(folder)[-1]["round"] == 1


def test_a_run_with_adapters_that_is_stopped_in_its_first_round_ends_as_if_undisturbed(world: World) -> None:
    """Its first version has no adapters: those that round 1 begins with count as fetched with it, and not again in round 2."""
    options = world.options(test=None)
    whole, broken = (world.fleet(name, method="ffa-lora", rounds=2) for name in ("ffa-whole", "ffa-broken"))
    simulate(whole, options)
    seen: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        simulate(broken, options, seen.append, lambda: len(seen) < 2)
    simulate(broken, options)
    assert rounds_of(broken) == rounds_of(whole)
    parts = rounds_of(whole)[1]
    assert set(parts["changed_parts"]) < set(parts["begun_parts"]) | {2}, "A has not changed in round 1"


def test_an_update_that_is_gone_or_cut_is_trained_again(undisturbed: Path, world: World) -> None:
    folder = world.fleet("cut")
    seen: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        simulate(folder, world.options(), seen.append, lambda: len(seen) < 3)
    updates = sorted((folder / "work").glob("*.update"))
    assert updates
    for number, path in enumerate(updates):
        path.unlink() if number % 2 else os.truncate(path, 100)
    simulate(folder, world.options())
    assert rounds_of(folder) == rounds_of(undisturbed)
    assert tensors(folder) == tensors(undisturbed)


def test_a_real_fleets_folder_is_refused(world: World) -> None:
    folder = world.fleet("real")
    FleetFolder(folder).enroll("pi-1", folder / "devices" / "pi-1.toml")
    with pytest.raises(UsageError, match="a real fleet's"):
        simulate(folder, world.options())


def test_times_come_from_bytes_links_and_the_plans_seconds(undisturbed: Path) -> None:
    first, second = rounds_of(undisturbed)[1:]
    for row in (first, second):
        done = [d for d in row["devices"] if d["status"] == "committed"]
        assert len(done) == row["committed"] > 0
        joined_s = max(d["download_s"] for d in row["devices"] if "depth" in d)
        for device in done:
            assert 1e6 <= device["bytes_up"] / device["upload_s"] <= 3.1e6
            took_s = joined_s + device["train_s"] + device["upload_s"]
            assert device["finished_s"] - row["opened_s"] == pytest.approx(took_s, abs=1e-4)
        ends = [d["finished_s"] for d in done]
        assert row["waiting_s"] == pytest.approx(sum(max(ends) - e for e in ends) / len(ends), abs=1e-4)
        expected_s = max(ends) - row["opened_s"] if len(done) == 3 else joined_s + 3600.0
        assert row["round_s"] == pytest.approx(expected_s, abs=1e-4)
    fetched = [d for d in first["devices"] if d.get("bytes_down")]
    assert all(d["bytes_down"] / d["download_s"] == pytest.approx(15e6, rel=1e-3) for d in fetched)
    both = {d["device"] for d in first["devices"]} & {d["device"] for d in second["devices"]}
    bytes_down = [{d["device"]: d["bytes_down"] for d in row["devices"]} for row in (first, second)]
    assert both
    assert all(0 < bytes_down[1][name] < bytes_down[0][name] for name in both)


def test_a_round_ends_at_its_deadline_without_those_who_are_late(world: World) -> None:
    folder = world.fleet("deadline", rounds=1, goal=4, timeout_s=5.0)
    simulate(folder, world.options(devices=4, classes="here:1,slow:1", partition="iid", dropout=0.0))
    row = rounds_of(folder)[1]
    assert {d["class"]: d["status"] for d in row["devices"]} == {"here": "committed", "slow": "late"}
    assert row["state"] == "published"
    joined_s = max(d["download_s"] for d in row["devices"])
    assert row["round_s"] == pytest.approx(joined_s + 5.0, abs=1e-4)


def test_a_round_of_drop_outs_fails_at_its_deadline_and_the_model_stays(world: World) -> None:
    folder = world.fleet("drop-outs", rounds=1, goal=4, timeout_s=60.0)
    simulate(folder, world.options(devices=4, classes="here", partition="iid", dropout=0.999999))
    row = rounds_of(folder)[1]
    assert (row["state"], row["dropped"], row["committed"], row["model_version"]) == ("failed", 4, 0, 1)
    assert row["accuracy"] == rounds_of(folder)[0]["accuracy"]


def test_whom_nothing_fits_is_counted_and_the_round_goes_on(world: World) -> None:
    tiny = world.folder / "tiny.toml"
    tiny.write_text(CLASSES + '[tiny]\nmemory = "2MB"\n')
    folder = world.fleet("tiny", rounds=1, goal=4)
    simulate(folder, world.options(devices=4, classes="here:3,tiny:1", class_file=tiny, partition="iid", dropout=0.0))
    row = rounds_of(folder)[1]
    assert (row["state"], row["unable"], row["committed"]) == ("published", 1, 3)


def test_a_run_in_which_nothing_fits_says_why_and_ends_with_another_exit_code(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = world.folder / "only-tiny.toml"
    tiny.write_text('[tiny]\nmemory = "2MB"\n')
    folder = world.fleet("only-tiny", rounds=1, goal=4)
    command = [
        "sim",
        "--fleet",
        folder,
        "--data",
        world.data,
        "--devices",
        3,
        "--classes",
        "tiny",
        "--class-file",
        tiny,
    ]
    assert main([*map(str, command)]) == 5
    row = rounds_of(folder)[1]
    assert row["state"] == "failed" and "3 unable: " in row["reason"] and "MiB" in row["reason"]
    said = capsys.readouterr().err
    assert "3 unable" in said and "goal is 4 of 3 devices" in said and "no round was published" in said


def test_the_model_of_a_simulation_is_listed_and_exported_like_any(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = rounds_of(undisturbed)[-1]["model_version"]
    assert main(["models", "--fleet", str(undisturbed), "--export", str(version), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main(["sim", "compare", str(undisturbed), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["accuracy"] == rounds_of(undisturbed)[-1]["accuracy"]


def test_a_part_is_the_data_set_that_a_device_would_have_made(world: World, tmp_path: Path) -> None:
    simulation = Simulation(
        world.fleet("parts"), world.options(dropout=0.0), progress=print, say=print, keep_going=lambda: True
    )
    part = list(simulation.virtual.devices["device-2"].part)
    with world.data.open(newline="") as file:
        rows = list(csv.DictReader(file))
    examples = [Example(rows[i]["text"], rows[i]["label"], 1) for i in part]
    tokenizer = (world.model / "tokenizer.json").read_bytes()
    made = build_corpus(examples, tokenizer, LABELS, 32, tmp_path / "made")
    cut(simulation.corpus, part, tmp_path / "part")
    for name in ("tokens", "starts", "labels"):
        whole, own = np.load(made / f"{name}.npy"), np.load(tmp_path / "part" / f"{name}.npy")
        assert whole.dtype == own.dtype
        assert np.array_equal(whole, own)
    assert read_shape(tmp_path / "part") == read_shape(made) == shape_of(simulation.corpus, part)
    assert len(Corpus(tmp_path / "part")) == len(part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 1.0}, "--dropout"),
        ({"evaluate_every": 0}, "--evaluate-every"),
        ({"workers": 0}, "--workers"),
        ({"data": Path("nowhere.csv")}, "nowhere.csv is no file"),
        ({"partition": "by:label", "reading": DataOptions(bad_rows="skip")}, "--skip-bad-rows"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, world: World) -> None:
    with pytest.raises(UsageError, match=message):
        Simulation(world.folder, world.options(**changes), progress=print, say=print, keep_going=lambda: True)


def test_updates_go_in_the_fleets_codec_and_are_as_large_as_they_are(world: World) -> None:
    sent = {}
    for codec in ("f32", "int8"):
        folder = world.fleet(f"codec-{codec}", rounds=1, goal=2, codec=codec)
        simulate(folder, world.options(devices=2, classes="here", partition="iid", dropout=0.0))
        row = rounds_of(folder)[1]
        assert (row["state"], row["committed"]) == ("published", 2)
        sent[codec] = row["bytes_up"]
    assert sent["int8"] < 0.3 * sent["f32"]


def residuals(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "residual").glob("*"))}


def test_what_top_k_left_out_is_sent_later_and_a_stop_at_any_point_changes_nothing(world: World) -> None:
    """Stopped after a round's line is written and before it is settled, and then within a round."""
    options = world.options(devices=2, classes="here", partition="iid", dropout=0.0, test=None)
    whole, broken = (world.fleet(name, goal=2, codec="topk10") for name in ("topk-whole", "topk-broken"))
    simulate(whole, options)
    assert len(set(residuals(whole).values())) == 2, "each device has its own"

    def stop_at_line(row: dict[str, Any]) -> None:
        if "closed_s" in row and row["round"] == 1:
            raise KeyboardInterrupt

    seen: list[dict[str, Any]] = []
    for progress, keep_going in ((stop_at_line, lambda: True), (seen.append, lambda: len(seen) < 1)):
        with pytest.raises(KeyboardInterrupt):
            simulate(broken, options, progress, keep_going)
    simulate(broken, options)
    assert rounds_of(broken) == rounds_of(whole)
    assert tensors(broken) == tensors(whole)
    assert residuals(broken) == residuals(whole)


def test_an_upload_budget_leads_to_a_smaller_codec_in_the_simulation_too(world: World) -> None:
    classes = world.folder / "upload.toml"
    classes.write_text('[wide]\nmemory = "2GB"\n[narrow]\nmemory = "2GB"\nupload = "8KB"\n')
    folder = world.fleet("auto", rounds=1, goal=2, codec="auto")
    options = world.options(devices=2, classes="wide,narrow", class_file=classes, partition="iid", dropout=0.0)
    simulate(folder, options)
    sent = {d["class"]: d["bytes_up"] for d in rounds_of(folder)[1]["devices"]}
    assert 0 < sent["narrow"] <= 8000 < sent["wide"]


def test_a_simulations_folder_is_no_fleets(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["serve"], ["enroll", "pi-1"], ["broker"]):
        assert main([*command, "--fleet", str(undisturbed)]) == UsageError.exit_code
        assert "is a simulation's" in capsys.readouterr().err


def test_the_choice_among_networks_goes_by_what_the_devices_can_train(
    world: World, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow = tiny_model(tmp_path / "shallow", blocks=1)
    classes = tmp_path / "classes.toml"
    classes.write_text('[any]\nmemory = "2GB"\n[narrow]\nmemory = "2GB"\nupload = "45KB"\n')
    command = [
        "sim",
        "choose",
        str(shallow),
        str(model),
        "--fleet",
        str(world.fleet("choose")),
        "--data",
        str(world.data),
    ]
    options = ["--devices", "4", "--classes", "any,narrow", "--class-file", str(classes), "--json"]
    assert main([*command, *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mean_depth"], row["chosen"]) for row in rows] == [(1.0, False), (1.5, True)]


def test_legend_gives_a_slow_device_fewer_blocks_and_a_stop_changes_nothing(world: World) -> None:
    options = world.options(devices=3, classes="here:2,slow:1", partition="iid", dropout=0.0)
    folders = [world.fleet(f"legend-{name}", method="legend") for name in ("whole", "stopped")]
    simulate(folders[0], options)
    seen: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        simulate(folders[1], options, seen.append, lambda: len(seen) < 2)
    simulate(folders[1], options)
    assert rounds_of(folders[0]) == rounds_of(folders[1])
    assert tensors(folders[0]) == tensors(folders[1])
    for round_ in rounds_of(folders[0])[1:]:
        depths = {row["class"]: row["depth"] for row in round_["devices"]}
        assert depths["slow"] < depths["here"]
