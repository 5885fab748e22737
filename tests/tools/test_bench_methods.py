"""The bench of methods: a grid whose fleets are what they say, that is not run twice, and rows and plots that hold what came out."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_coordinator.methods import METHODS
from edge_coordinator.sim.choose import depth_of
from edge_coordinator.sim.classes import DeviceClass, OwnBudget, read_budgets, read_classes
from edge_coordinator.sim.data import packed
from edge_coordinator.sim.devices import Plans, VirtualDevice
from edge_coordinator.sim.speed import scaled
from edge_models import bert
from edge_runtime.cost import Calibration, DataShape
from edge_runtime.errors import UsageError
from edge_runtime.records import TrainSettings
from tests.e2e.fleets import tiny_model, write_data
from tools import bench_methods, datasets
from tools.bench_methods_grid import (  # fmt: skip
    BLOCKS,
    DATA,
    JETSON,
    LIMITS,
    OPEN_MEMORY,
    Cell,
    Grid,
    Scale,
    Setting,
    WrongThirds,
    budgets,
    class_file,
    outcome,
    time_to,
)
from tools.bench_methods_plot import draw_settings, mean_points, spread, style

CONFIG = {
    "model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 100,
    "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
SPEC = bert.describe(CONFIG, ("a", "b"), 32)
HERE = Calibration("torch", 1 << 20, 0.001, 1e-5, 0.002, 4e-5, 1e-9, rest_per_token_s=1e-6)
SETTING = Setting("trec", "dirichlet:0.5", "memory")


def fleet(examples: int = 100) -> tuple[Plans, list[VirtualDevice]]:
    """Twelve devices of unlike data and the three classes."""
    kinds = itertools.cycle(DeviceClass(name, OPEN_MEMORY, 10.0) for name in BLOCKS)
    plans = Plans(SPEC, {name: scaled(HERE, 1.0 + n) for n, name in enumerate(BLOCKS)}, False)
    shapes = [DataShape(examples + 37 * i, 20 + i, 12.0 + 0.5 * i) for i in range(12)]
    return plans, [VirtualDevice(f"device-{i}", kind, packed([0]), shape, 1e6) for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))]  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS)
def test_a_third_can_train_everything_a_third_two_blocks_and_a_third_one(limits: str, tmp_path: Path) -> None:
    plans, devices = fleet()
    (tmp_path / "classes.toml").write_text(class_file(budgets(plans, devices, TrainSettings(), limits)))
    own = read_budgets(tmp_path / "classes.toml")
    depths = {d.name: depth_of(plans, replace(d, own=own.get(d.name)), TrainSettings()) for d in devices}
    assert [depths[d.name] for d in devices] == [{"one": 1, "two": 2, "all": 4}[d.kind.name] for d in devices]
    classes = read_classes(tmp_path / "classes.toml")
    assert [classes[name].memory_bytes for name in BLOCKS] == [OPEN_MEMORY] * 3
    assert classes["one"].strength < classes["two"].strength < classes["all"].strength


def test_thirds_that_cannot_be_true_are_an_error() -> None:
    plans, devices = fleet()
    weak = [replace(d, own=OwnBudget(memory_bytes=1 << 20)) if d.kind.name == "all" else d for d in devices]
    tight = [replace(d, kind=replace(d.kind, upload_bytes=1)) for d in weak]
    with pytest.raises(
        WrongThirds, match=r"device-\d+ of class \w+, with \d+ examples, can train 0 blocks under memory"
    ):
        budgets(plans, tight, TrainSettings(), "memory")


def test_the_methods_are_the_coordinators_and_those_of_the_first_result_are_usual() -> None:
    args = bench_methods.parser().parse_args([])
    usual = args.methods.split(",")
    assert usual[0] == "caff" and set(usual) <= set(METHODS)
    assert bench_methods.chosen(",".join(METHODS), list(METHODS), "--methods") == list(METHODS)
    with pytest.raises(UsageError, match="--methods: there is no 'cafe'; there are caff, "):
        bench_methods.chosen("caff,cafe", list(METHODS), "--methods")


def test_every_data_set_has_a_partition_of_its_own_unless_others_are_asked_for() -> None:
    asked = ["--data", "trec,debian", "--fleets", "memory,open"]
    settings = bench_methods.settings_of(bench_methods.parser().parse_args(asked))
    assert [s.name for s in settings] == ["trec, dirichlet:0.5, memory", "trec, dirichlet:0.5, open", "debian, by:group, memory", "debian, by:group, open"]  # fmt: skip
    others = bench_methods.parser().parse_args([*asked, "--partitions", "iid,strength:0.1"])
    assert len(bench_methods.settings_of(others)) == 8
    with pytest.raises(UsageError, match="--partition 'halves'"):
        bench_methods.settings_of(bench_methods.parser().parse_args(["--partitions", "halves"]))
    assert set(DATA) == set(datasets.NAMES)


def test_every_cell_has_a_folder_of_its_own() -> None:
    cells = [Cell(s, model, method, rate, seed, tuning)
             for s in (SETTING, replace(SETTING, fleet="open"), replace(SETTING, partition="dirichlet:0.1"))
             for model in ("minilm-l6", "minilm-l3") for method in METHODS for rate in (0.5, 1.0) for seed in (1, 2) for tuning in (False, True)]  # fmt: skip
    assert len({cell.folder for cell in cells}) == len(cells)


def test_rates_are_chosen_once_for_all_fleets_and_the_reference_is_without_limits() -> None:
    settings = [
        replace(SETTING, data=data, fleet=fleet) for data in ("trec", "debian") for fleet in ("memory", "upload")
    ]
    plan = bench_methods.Plan(settings, ["caff", "full"], ["minilm-l6"], [0.5, 1.0], 7, 3)
    of = {
        (s, m): (plan.tried(s, m, "minilm-l6"), plan.runs(s, m, "minilm-l6", 0.5))
        for s in settings
        for m in ("caff", "full")
    }
    for data in (0, 2):
        memory, upload = settings[data : data + 2]
        assert of[memory, "caff"][0] == of[upload, "caff"][0]
        assert [cell.setting for cell in of[upload, "caff"][1].values()] == [upload] * 3
        assert of[memory, "full"] == of[upload, "full"]
        assert {cell.setting.fleet for cells in of[upload, "full"] for cell in cells.values()} == {"open"}
    assert all(cell.seed == 7 and cell.tuning for cell in of[settings[0], "caff"][0].values())
    assert len(plan) == 2 * (2 * 2 + 2 * 3 + 3)  # rates of both methods; caff under two limits, full under none
    assert len(bench_methods.Plan(settings, ["caff"], ["minilm-l6"], [1.0], 7, 3)) == 4 * 3


def test_the_best_rate_is_taken_and_of_equals_the_usual_one() -> None:
    assert bench_methods.best_rate({0.5: 0.7, 1.0: 0.6, 2.0: 0.5}) == 0.5
    assert bench_methods.best_rate({0.5: 0.7, 1.0: 0.7, 2.0: 0.7}) == 1.0
    assert bench_methods.rates_of("2,0.5") == [0.5, 2.0]
    for wrong in ("", "a", "0", "-1", "1,,2"):
        with pytest.raises(UsageError, match="--rates"):
            bench_methods.rates_of(wrong)


def rounds(last: float) -> list[dict[str, Any]]:
    """A cell's rounds, as the simulator writes them."""
    done = {"device": "device-0", "class": "one", "status": "committed", "peak_bytes": 100 << 20}
    out = {"device": "device-1", "class": "all", "status": "excluded"}
    return [
        {"round": 0, "closed_s": 0.0, "accuracy": 0.1, "accuracy_of": {"one": 0.1}, "devices": []},
        {"round": 1, "closed_s": 60.0, "bytes_up": 5, "devices": [done, out]},
        {"round": 2, "closed_s": 90.0, "bytes_up": 7, "accuracy": last, "accuracy_of": {"one": 0.5, "all": 0.7}, "devices": [done, out]},
    ]  # fmt: skip


def a_row(name: str, *accuracies: float) -> dict[str, Any]:
    runs = {seed: outcome(rounds(accuracy)) for seed, accuracy in enumerate(accuracies)}
    return bench_methods.row(name, SETTING, 1.0, {1.0: 0.5}, runs)


def test_a_row_has_means_over_seeds_and_the_runs_beside_them() -> None:
    row = a_row("caff", 0.6, 0.7)
    assert (row["accuracy"], row["spread"], row["bytes_up"]) == (pytest.approx(0.65), "7.1 %", 12)
    assert (row["weak_share"], row["middle_share"], row["strong_share"]) == (0.5, None, 0.7)
    assert (row["taking_part_share"], row["virtual_s"], row["peak_bytes"]) == (0.5, 90.0, 100 << 20)
    assert row["runs"][1]["points"] == [
        {"round": 0, "s": 0.0, "bytes_up": 0, "accuracy": 0.1},
        {"round": 2, "s": 90.0, "bytes_up": 12, "accuracy": 0.7},
    ]
    assert mean_points(row["runs"], "s") == [(0.0, pytest.approx(0.1), 0.1, 0.1), (90.0, pytest.approx(0.65), 0.6, 0.7)]


def test_an_accuracy_is_the_mean_of_the_last_two_that_were_measured() -> None:
    rows = rounds(0.6)
    more = {
        **rows[2],
        "round": 3,
        "closed_s": 120.0,
        "accuracy": 0.8,
        "accuracy_of": {"one": 0.3},
        "waiting_s": 10.0,
        "round_s": 40.0,
    }
    found = outcome([*rows, more])
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["accuracy_of"] == {"one": pytest.approx(0.4), "all": 0.7}
    assert found["waiting_share"] == 0.25


def test_the_time_to_a_target_lies_on_the_line_between_two_rounds() -> None:
    points = outcome(rounds(0.6))["points"]
    assert time_to(points, 0.35) == pytest.approx(45.0)
    assert (time_to(points, 0.05), time_to(points, 0.7)) == (0.0, None)
    rows = [a_row("caff", 0.6, 0.7), a_row("lora", 0.8, 0.8), a_row("head", 0.2, 0.2)]
    assert bench_methods.reach(rows, None) == {SETTING.name: pytest.approx(0.65)}
    assert rows[0]["target_time"] == "not by all seeds"
    assert rows[1]["target_s"] == pytest.approx(90 * 0.55 / 0.7)
    bench_methods.reach(rows, 0.6)
    assert rows[0]["target_s"] == pytest.approx((90 + 75) / 2)


def test_legends_fleet_has_its_classes_and_no_limits() -> None:
    setting = replace(SETTING, fleet="jetson")
    assert setting.classes == JETSON and set(JETSON) <= set(read_classes(None))
    assert [read_classes(None)[name].strength for name in JETSON] == sorted(
        read_classes(None)[name].strength for name in JETSON
    )
    assert bench_methods.unlimited(setting, "full") == setting


def test_labels_keep_their_order_and_their_distance() -> None:
    assert spread([1.0, 5.0, 9.0], 1.0) == [1.0, 5.0, 9.0]
    found = spread([5.0, 5.0, 5.1, 20.0], 2.0)
    assert sorted(found) == [found[0], found[1], found[2], found[3]]
    assert all(b - a >= 2.0 - 1e-9 for a, b in itertools.pairwise(found))
    assert found[3] == 20.0
    assert len({tuple(style(n).values()) for n in range(21)}) == 21


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_plot_of_each_setting_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    drawn = draw_settings([a_row(name, 0.6, 0.7) for name in METHODS], tmp_path)
    (path,) = drawn.values()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    svg = path.read_text()
    assert all(f"> {name}</text>" in svg or f">{name}</text>" in svg for name in METHODS)


def test_a_cell_is_simulated_once_and_its_fleet_plans_as_its_classes_say(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str, progress: object) -> datasets.DataSet:
        parts = []
        for seed in (0, 1):
            with write_data(tmp_path / f"{seed}.csv", seed, count=90).open() as file:
                next(file)
                lines = [line.strip().rsplit(",", 1) for line in file]
            parts.append([datasets.Row(text, label) for text, label in lines])
        return datasets.DataSet(name, *parts, licence="", source="")

    monkeypatch.setattr(datasets, "load", made)
    grid = Grid(tmp_path / "work", Scale(3, 3, 1, 1, 5000), str(model), print)
    cell = Cell(Setting("trec", "iid", "upload"), str(model), "caff", 2.0, 1)
    assert grid.curve(cell) is None
    rows = grid.simulate(cell, lambda row: None, lambda: True)
    assert {d["class"]: d["depth"] for d in rows[1]["devices"]} == {"one": 1, "two": 2, "all": 2}
    assert grid.curve(cell) == rows
    assert "learning_rate = 0.0004" in (tmp_path / "work" / cell.folder / "fleet.toml").read_text()
    assert outcome(rows)["taking_part_share"] == 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")
