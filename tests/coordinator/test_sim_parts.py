"""The parts of the simulation that decide: classes, clock, partitions, speed, downloads, results. No training, no broker."""

from __future__ import annotations

import csv
import importlib.util
import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from edge_coordinator.sim.choose import Candidate, best, depth_of, described, held_by
from edge_coordinator.sim.classes import BUILT_IN, OwnBudget, deal, parse_shares, read_budgets, read_classes
from edge_coordinator.sim.clock import Clock
from edge_coordinator.sim.compare import plot, summarise, text_table
from edge_coordinator.sim.data import packed
from edge_coordinator.sim.devices import Downloads, Plans, VirtualDevice, chance
from edge_coordinator.sim.partition import divide, parse_partition
from edge_coordinator.sim.results import Results
from edge_coordinator.sim.speed import TRAIN, block_flops, measured_gflops, scaled
from edge_models import bert
from edge_runtime.cost import Calibration, DataShape, cost, trained
from edge_runtime.errors import MissingExtra, StoreError, UsageError
from edge_runtime.manifest import make_manifest
from edge_runtime.records import Budget, TrainSettings

CONFIG = {
    "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256, "vocab_size": 100,
    "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
SPEC = bert.describe(CONFIG, ("a", "b"), 32)
HERE = Calibration(
    "onnx",
    1 << 20,
    0.001,
    1e-5,
    0.002,
    4e-5,
    1e-9,
    rest_per_token_s=1e-6,
    forward_step_s=1e-3,
    entry_s=1e-8,
    copy_s=1e-9,
)
DATA = DataShape(160, 24, 20.0)


# classes


def test_jetson_step_times_are_in_legends_ratio() -> None:
    tx2, nx, agx = (BUILT_IN[f"jetson-{name}"].gflops or 0.0 for name in ("tx2", "nx", "agx"))
    assert (agx / tx2, agx / nx) == (pytest.approx(2.6), pytest.approx(1.4))


def test_a_file_brings_classes_and_replaces_built_in_ones(tmp_path: Path) -> None:
    file = tmp_path / "classes.toml"
    file.write_text(
        '[mine]\nmemory = "450MB"\ngflops = 7\nuplink = ["1MB", 2e6]\ndownlink = "10MB"\navailability = 0.25\ntime = "15m"\nupload = "2MB"\n'
        '[pi-4]\nmemory = "1GiB"\n'
    )
    found = read_classes(file)
    mine = found["mine"]
    assert (mine.memory_bytes, mine.gflops, mine.uplink_bytes_per_s) == (450_000_000, 7.0, (1e6, 2e6))
    assert (mine.downlink_bytes_per_s, mine.availability, mine.time_s, mine.upload_bytes) == (
        1e7,
        0.25,
        900.0,
        2_000_000,
    )
    assert (found["pi-4"].memory_bytes, found["pi-4"].gflops) == (1 << 30, None)
    assert found["pi-5"] == BUILT_IN["pi-5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mine]\ngflops = 7\n", "needs memory"),
        ('[mine]\nmemory = "1GB"\nspeed = 7\n', "has no 'speed'"),
        ('[mine]\nmemory = "1GB"\ngflops = 0\n', "gflops must be a number from 0.001 to 1e.09"),
        ('[mine]\nmemory = "1GB"\ngflops = true\n', "gflops must be a number from"),
        ('[mine]\nmemory = "1GB"\ngflops = 1e-300\n', "gflops must be a number from"),
        ('[mine]\nmemory = "1GB"\nuplink = 2e12\n', "uplink must be a number from 1 to 1e.12"),
        ('[mine]\nmemory = "1GB"\ndownlink = nan\n', "downlink must be a number from 1 to 1e.12"),
        ('[mine]\nmemory = "1GB"\navailability = 1.5\n', "availability must be a number from 0.001 to 1"),
        ('[mine]\nmemory = "1GB"\navailability = 1e-9\n', "availability must be a number from 0.001 to 1"),
        ("[mine]\nmemory = 0\n", "memory must be above 0"),
        ('[mine]\nmemory = "1GB"\nuplink = ["3MB", "1MB"]\n', "lowest, highest"),
        ('[mine]\nmemory = "lots"\n', "is not a size"),
        ("mine = 3\n", "must be a section"),
        ('["My class"]\nmemory = "1GB"\n', "device class"),
        ("[mine\n", "classes.toml"),
    ],
)
def test_a_class_file_that_is_wrong_says_where(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_classes(file)


def test_every_device_has_a_class_and_the_shares_are_kept() -> None:
    shares = parse_shares("pi-zero-2w:2, pi-4:1,pi-5", BUILT_IN)
    dealt = deal(shares, 10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert Counter(kind.name for kind in dealt) == {"pi-zero-2w": 5, "pi-4": 3, "pi-5": 2}
    assert dealt[9].name == "pi-zero-2w"
    assert dealt[0].name == "pi-5"


@pytest.mark.parametrize("text", ["pi-9", "pi-4:0", "pi-4:x", "pi-4,pi-4", "", "pi-4:inf"])
def test_shares_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="class|share"):
        parse_shares(text, BUILT_IN)


# clock


def test_the_clock_goes_to_what_is_due_and_keeps_the_order_of_equals() -> None:
    clock, done = Clock(), list[tuple[str, float]]()

    def act(name: str) -> None:
        done.append((name, clock()))
        if name == "b":
            clock.at(0.0, act, "too late for that: now")

    for time_s, name in ((5.0, "c"), (2.0, "a"), (2.0, "b")):
        clock.at(time_s, act, name)
    while clock.step():
        pass
    assert done == [("a", 2.0), ("b", 2.0), ("too late for that: now", 2.0), ("c", 5.0)]


# partitions


@pytest.mark.parametrize("text", ["", "iid:3", "dirichlet", "dirichlet:x", "shards:0.5", "by:", "by", "random"])
def test_a_partition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--partition"):
        parse_partition(text)


@pytest.mark.parametrize("text", ["dirichlet:0", "strength:-1", "dirichlet:nan", "shards:300"])
def test_a_partition_that_cannot_be_made_is_named_with_its_flag(text: str) -> None:
    kinds = deal(parse_shares("pi-5", BUILT_IN), 9, range(9))
    with pytest.raises(UsageError, match=f"--partition {text}"):
        divide(parse_partition(text), ["a", "b"] * 20, None, 9, 1, lambda n: kinds)


@pytest.mark.parametrize("text", ["iid", "dirichlet:0.5", "shards:2", "strength:0.1"])
def test_a_partition_uses_every_example_once(text: str) -> None:
    labels = [f"class {i % 7}" for i in range(200)]
    shares = parse_shares("pi-zero-2w:1,pi-5:1", BUILT_IN)
    parts, kinds = divide(parse_partition(text), labels, None, 9, 1, lambda n: deal(shares, n, range(n)))
    assert sorted(i for part in parts for i in part) == list(range(200))
    assert len(parts) == len(kinds) == 9
    assert min(map(len, parts)) >= 1


def test_by_column_makes_a_device_of_each_value_or_of_the_largest() -> None:
    shares = parse_shares("pi-4", BUILT_IN)
    groups = ["ann", "bob", "ann", "eve", "bob", "ann"]
    for number, expected in ((None, [[0, 2, 5], [1, 4], [3]]), (2, [[0, 2, 5], [1, 4]])):
        parts, _ = divide(parse_partition("by:user"), ["x"] * 6, groups, number, 0, lambda n: deal(shares, n, range(n)))
        assert parts == expected
    with pytest.raises(UsageError, match="4 devices need as many groups"):
        divide(parse_partition("by:user"), ["x"] * 6, groups, 4, 0, lambda n: deal(shares, n, range(n)))


def test_the_number_of_devices_must_be_named_where_the_data_does_not_say_it() -> None:
    with pytest.raises(UsageError, match="--devices"):
        divide(parse_partition("iid"), ["x"], None, None, 0, lambda n: [])


def test_strength_ties_labels_to_classes_and_a_large_a_does_not() -> None:
    labels = [f"class {i % 10}" for i in range(1000)]
    shares = parse_shares("pi-5:1,pi-zero-2w:1", BUILT_IN)

    def share_of_weak(text: str) -> list[float]:
        parts, kinds = divide(parse_partition(text), labels, None, 10, 3, lambda n: deal(shares, n, range(n)))
        weak = Counter(
            labels[i] for part, kind in zip(parts, kinds, strict=True) if kind.name == "pi-zero-2w" for i in part
        )
        return [weak[label] / 100 for label in sorted(set(labels))]

    tied, loose = share_of_weak("strength:0.01"), share_of_weak("strength:10000")
    assert all(share < 0.05 or share > 0.95 for share in tied)
    assert all(0.4 < share < 0.6 for share in loose)


# speed


def test_a_blocks_flops_are_those_that_torch_counts() -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {t.name: torch.zeros(t.shape) for t in SPEC.tensors}
    network = bert.build(SPEC, tensors)
    ids = torch.ones((2, 20), dtype=torch.int64)
    hidden, mask = network.embed(ids, torch.ones_like(ids))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # its products are counted
        network.blocks[0](hidden, mask)
    assert counter.get_total_flops() == 40 * block_flops(SPEC, 20)


def test_a_class_trains_blocks_at_its_gflops() -> None:
    gflops = 2.0
    calibration = scaled(HERE, measured_gflops(HERE, SPEC, DATA, 16) / gflops)
    settings = TrainSettings(batch_size=16)
    rows = [
        cost(
            SPEC,
            DATA,
            settings,
            replace(
                calibration,
                forward_fixed_s=0.0,
                forward_per_token_s=0.0,
                forward_step_s=0.0,
                update_per_parameter_s=0.0,
            ),
            trained(SPEC, depth, settings),
            False,
            16,
        )
        for depth in (1, 2)
    ]
    one_block_s = rows[1].step_s - rows[0].step_s
    exact_s = 16 * 20 * TRAIN * block_flops(SPEC, 20) / (gflops * 1e9)
    assert one_block_s == pytest.approx(exact_s)


def test_memory_does_not_depend_on_the_class() -> None:
    slow = scaled(HERE, 100.0)
    settings = TrainSettings(mask_every=10)
    rows = [cost(SPEC, DATA, settings, c, trained(SPEC, 2, settings), False, 8) for c in (HERE, slow)]
    assert rows[0].peak_bytes == rows[1].peak_bytes
    assert rows[1].step_s == pytest.approx(100 * rows[0].step_s)


def test_a_device_may_have_budgets_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "classes.toml"
    file.write_text('[mine]\nmemory = "1GB"\ntime = "10m"\n[device-3]\nupload = "5MB"\ntime = "9s"\n')
    mine, own = read_classes(file)["mine"], read_budgets(file)
    assert "device-3" not in read_classes(file)
    assert own["device-3"].instead_of(mine) == Budget(10**9, 9.0, 5_000_000)
    assert OwnBudget().instead_of(mine) == Budget(10**9, 600.0, None)
    file.write_text("[device-3]\ngflops = 5\n")
    with pytest.raises(UsageError, match=r"\[device-3\] has no 'gflops'; a device has memory, time, upload"):
        read_budgets(file)
    file.write_text('[device-3]\nmemory = "0MB"\n')
    with pytest.raises(UsageError, match=r"\[device-3\] memory must be above 0"):
        read_budgets(file)


# the choice among networks


def test_the_network_of_which_the_devices_train_most_blocks_is_chosen_and_of_equals_the_deeper() -> None:
    small, large = Candidate("l3", 3, {"a": 3, "b": 2}), Candidate("l6", 6, {"a": 6, "b": 1})
    assert best([small, large]) is large
    assert best([small, Candidate("l6", 6, {"a": 3, "b": 1})]) is small
    assert best([Candidate("l6", 6, {"a": 4, "b": 1}), small]) == Candidate("l6", 6, {"a": 4, "b": 1}), "a tie"


def test_a_network_of_which_some_device_cannot_train_a_block_is_not_chosen() -> None:
    large, small = Candidate("l6", 6, {"a": 6, "b": 6, "c": 0}), Candidate("l3", 3, {"a": 1, "b": 1, "c": 1})
    assert best([large, small]) is small
    assert best([large]) is best([]) is None
    rows = described([large, small])
    assert [row["chosen"] for row in rows] == [False, True]
    assert (rows[0]["mean_depth"], rows[0]["least_depth"], rows[0]["devices_by_depth"]) == (4.0, 0, {"0": 1, "6": 2})


def test_what_keeps_a_device_from_a_block_more_is_told() -> None:
    kind = replace(BUILT_IN["pi-4"], name="k", memory_bytes=1 << 30, time_s=None, upload_bytes=None)
    plans, settings = Plans(SPEC, {"k": replace(HERE, backend="torch")}, cached=False), TrainSettings()
    device = VirtualDevice("a", kind, packed(range(160)), DATA, 1e6)
    assert depth_of(plans, device, settings) == 3
    assert held_by(plans, device, settings, 3) == ()
    one_block = 4 * sum(t.size for t in SPEC.tensors if t.part >= 2)
    slow = replace(device, kind=replace(kind, upload_bytes=one_block))
    assert (depth_of(plans, slow, settings), held_by(plans, slow, settings, 1)) == (1, ("upload",))


# downloads


def test_a_device_fetches_what_has_changed_since_the_version_it_holds() -> None:
    def version(number: int, changed: tuple[int, ...]) -> object:
        blobs = {t.name: bytes([number if t.part in changed else 1]) * 32 for t in SPEC.tensors}
        return make_manifest(SPEC, blobs, b"t" * 32, 1000, version=number)

    first, second, third = version(1, ()), version(2, (2, 3)), version(3, (3,))
    downloads = Downloads()
    assert downloads.publish(first, second) == [2, 3]  # type: ignore[arg-type]
    whole = sum(t.num_bytes for t in SPEC.tensors)
    assert downloads.num_bytes(second, 50, 0) == whole + 1000 + 50  # type: ignore[arg-type]
    assert downloads.num_bytes(second, 50, 1) == SPEC.part_bytes(2) + SPEC.part_bytes(3) + 50  # type: ignore[arg-type]
    assert downloads.num_bytes(second, 50, 2) == 0  # type: ignore[arg-type]
    downloads.changed[3] = 3
    assert downloads.num_bytes(third, 50, 2) == SPEC.part_bytes(3) + 50  # type: ignore[arg-type]


def test_a_device_is_a_small_record() -> None:
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    devices = [
        VirtualDevice(f"device-{i}", BUILT_IN["pi-4"], packed(range(50)), replace(DATA), 1e6) for i in range(1000)
    ]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / len(devices) < 1000


def test_chances_depend_on_all_that_they_are_told_and_are_even() -> None:
    draws = [chance(1, "online", 2, f"device-{i}") for i in range(2000)]
    assert draws == [chance(1, "online", 2, f"device-{i}") for i in range(2000)]
    assert len(set(draws)) == 2000
    assert 0.45 < sum(draws) / 2000 < 0.55
    assert 0 <= min(draws) < max(draws) < 1


# results

ROUNDS = [
    {"round": 0, "state": "start", "closed_s": 0.0, "round_s": 0.0, "accuracy": 0.2, "accuracy_of": {"pi-4": 0.1, "pi-5": 0.3}, "devices": []},
    {"round": 1, "state": "published", "closed_s": 90.0, "round_s": 90.0, "waiting_s": 5.0, "bytes_up": 1 << 20, "bytes_down": 3 << 20, "accuracy": 0.7,
     "accuracy_of": {"pi-4": 0.5, "pi-5": 0.8}, "devices": [{"device": "device-0", "status": "committed"}, {"device": "device-1", "status": "late"}]},
    {"round": 2, "state": "failed", "closed_s": 4000.0, "round_s": 3910.0, "waiting_s": None, "bytes_up": 0, "bytes_down": 0, "devices": []},
]  # fmt: skip
SETTINGS = {
    "run": {"method": "caff"},
    "figures": {
        name: {"gflops": BUILT_IN[name].gflops, "memory_bytes": BUILT_IN[name].memory_bytes}
        for name in ("pi-4", "pi-5")
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A simulation's results."""
    results = Results(tmp_path)
    results.settings(SETTINGS, lambda: {"calibration": "calibrated"})
    for row in ROUNDS:
        results.add(dict(row))
    results.write_tables()
    return tmp_path


def test_a_line_that_a_kill_cut_off_is_no_line(folder: Path) -> None:
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 3, "st')
    results = Results(folder)
    assert list(results.rows()) == ROUNDS
    results.add({"round": 3, "devices": []})
    assert [row["round"] for row in Results(folder).rows()] == [0, 1, 2, 3]


def test_other_settings_are_refused_and_the_same_keep_their_calibration(folder: Path) -> None:
    results = Results(folder)
    assert results.settings(SETTINGS, lambda: pytest.fail("measured again"))["calibration"] == "calibrated"
    with pytest.raises(UsageError, match="another --test: none, now one"):
        results.settings({**SETTINGS, "test": "a hash"}, dict)
    with pytest.raises(UsageError, match="another run"):
        results.settings({**SETTINGS, "run": {"method": "head"}}, dict)


def test_the_tables_hold_what_the_lines_hold(folder: Path) -> None:
    with (folder / "rounds.csv").open(newline="") as file:
        rounds = list(csv.DictReader(file))
    assert [row["closed_s"] for row in rounds] == ["0.0", "90.0", "4000.0"]
    assert [row["accuracy_of_pi-5"] for row in rounds] == ["0.3", "0.8", ""]
    with (folder / "devices.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"round": "1", "device": "device-0", "status": "committed"},
            {"round": "1", "device": "device-1", "status": "late"},
        ]


def test_rounds_whose_settings_are_gone_or_damaged_are_not_gone_on_with(folder: Path) -> None:
    (folder / "sim.json").write_text("[]")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"sim.json is .*: simulate into another folder"):
            Results(folder).settings(SETTINGS, dict)
        (folder / "sim.json").unlink(missing_ok=True)


@pytest.mark.parametrize("line", ["5", "{}", "[" * 100_000, '{"round": "1"}', "x"])
def test_a_line_that_is_no_round_is_named(folder: Path, line: str) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match=r"rounds.jsonl is damaged \(line 4 is no round\)"):
        Results(folder)


@pytest.mark.parametrize("damage", ["{}", "[]", '{"run": 3}', '{"run": {"method": "caff"}, "figures": {}}'])
def test_a_comparison_of_what_is_damaged_says_so(folder: Path, damage: str) -> None:
    (folder / "sim.json").write_text(damage)
    with pytest.raises(StoreError, match="damaged"):
        summarise(folder, None)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_keeps_texts_that_look_like_something_else(tmp_path: Path) -> None:
    from pyarrow import parquet

    results = Results(tmp_path)
    kinds = ["null", "nan", "007"]
    results.add(
        {"round": 1, "reason": "", "devices": [{"device": f"device-{i}", "class": k} for i, k in enumerate(kinds)]}
    )
    results.write_tables()
    assert [row["class"] for row in parquet.read_table(tmp_path / "devices.parquet").to_pylist()] == kinds
    assert parquet.read_table(tmp_path / "rounds.parquet").to_pylist() == [{"round": 1, "reason": ""}]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_holds_what_the_lines_hold(folder: Path) -> None:
    from pyarrow import parquet

    rows = parquet.read_table(folder / "rounds.parquet").to_pylist()
    assert [row["closed_s"] for row in rows] == [0.0, 90.0, 4000.0]
    assert [row["accuracy_of_pi-5"] for row in rows] == [0.3, 0.8, None]


def test_a_comparison_tells_when_the_target_was_reached_and_how_the_weakest_class_does(folder: Path) -> None:
    row = summarise(folder, 0.6)
    assert (row["method"], row["devices"], row["rounds"], row["failed"]) == ("caff", 2, 2, 1)
    assert (row["time_s"], row["round_s"], row["waiting_s"], row["target_s"]) == (4000.0, 2000.0, 5.0, 90.0)
    assert (row["accuracy"], row["weakest_class"], row["weakest_class_accuracy"]) == (0.7, "pi-4", 0.5)
    assert summarise(folder, 0.9)["target_s"] is None
    header, _, line = text_table([row], 0.6).splitlines()
    assert header.endswith("to 60 %")
    assert line.endswith("90.0 s")
    assert "1:06:40" in line


def test_what_is_no_simulation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no simulation"):
        summarise(tmp_path, None)


def test_a_plot_needs_matplotlib_and_says_so(folder: Path) -> None:
    out = folder / "plot.png"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(MissingExtra, match=r"\.\[sim\]"):
            plot([folder], out)
    else:
        plot([folder], out)
        assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_plot_that_cannot_be_written_says_so(folder: Path) -> None:
    for out in (folder, folder / "nowhere" / "plot.png", folder / "plot.docx"):
        with pytest.raises(UsageError, match=str(out)):
            plot([folder], out)


def test_a_plot_without_any_accuracy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sim.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(UsageError, match="--test"):
        plot([tmp_path], tmp_path / "plot.png")
