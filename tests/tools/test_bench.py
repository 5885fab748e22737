"""The benches without their peers: options, rows, pages and what is read from /proc. What they measure needs the peers."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from edge_runtime.records import CostRow
from tools import bench_codecs, bench_federated, bench_methods, bench_ours, bench_predict, bench_training
from tools import bench_common as bench

MACHINE = {"cpu": "a chip", "cores": 2, "ram_gib": 1.0, "system": "Linux", "load": "0.00"}


def cost(depth: int, checkpointing: bool, micro_batch: int, peak: int) -> CostRow:
    return CostRow(depth, checkpointing, micro_batch, peak, step_s=1.0, epoch_s=1.0, upload_bytes=1)


def test_a_row_has_every_key_and_the_median_of_its_runs() -> None:
    runs = [
        {"peak_rss_bytes": peak, "cpu_s_per_step": cpu, "accuracy": None}
        for peak, cpu in ((3, 0.3), (1, 0.1), (2, 0.5))
    ]
    row = bench.median_row("ours", runs)
    assert set(bench.ROW) <= set(row)
    assert (row["peak_rss_bytes"], row["cpu_s_per_step"]) == (2, 0.3)
    assert row["accuracy"] is None and row["wall_s"] is None and row["bytes_up"] is None
    assert row["runs"] == runs


def test_a_row_that_failed_is_still_a_row() -> None:
    row = bench.median_row("ours", [])
    assert [row[key] for key in bench.ROW] == ["ours", None, None, None, None, None]
    assert bench.cells([row], bench_training.COLUMNS)[0][:6] == ["ours", "-", "-", "-", "-", "-"]


def test_a_failed_row_is_the_exit_code_and_one_that_this_version_lacks_is_not() -> None:
    assert bench.exit_code([bench.make_row("a", detail="this version has no backend"), bench.make_row("b")]) == 0
    assert bench.exit_code([bench.make_row("a"), bench.make_row("b", detail="failed: killed")]) == 1


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("peak_rss_bytes", 278 << 20, "278 MiB"),
        ("bytes_up", 1_396_404, "1.33 MiB"),
        ("accuracy", 0.8867, "88.7 %"),
        ("cpu_s_per_step", 1.0139, "1.014"),
        ("wall_s", 261.04, "261.0"),
        ("accuracy", None, "-"),
        ("accuracy", 0.0, "0.0 %"),
    ],
)
def test_numbers_are_shown_with_their_unit(key: str, value: float | None, text: str) -> None:
    assert bench.shown(key, value) == text


def test_json_and_page_say_where_and_how_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--quick", "--rows", "last 2"])
    args = bench_training.parser().parse_args(
        ["--quick", "--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "o")]
    )
    rows = [bench.make_row("ours", peak_rss_bytes=1 << 20, cpu_s_per_step=1.0, detail="torch")]
    bench.finish(
        "training", args, rows, title="T", columns=bench_training.COLUMNS, notes=["a note"],
        versions={"torch": "2.13.0"}, machine=MACHINE, python=None,
    )  # fmt: skip
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(bench.ROW) <= set(found["rows"][0])
    assert found["quick"] is True and found["versions"] == {"torch": "2.13.0"} and found["date"]
    assert found == json.loads((tmp_path / "o" / "training.json").read_text())
    page = (tmp_path / "o" / "training.md").read_text()
    assert "| ours | 1.00 MiB | 1.000 | - | - | - | torch |" in page
    for said in (
        "Quick run",
        "- a note",
        "a chip, 2 cores",
        "torch 2.13.0",
        "tools/bench training --quick --rows 'last 2'",
    ):
        assert said in page
    assert "1.00 MiB" in capsys.readouterr().out


def test_rows_are_chosen_by_a_part_of_their_name() -> None:
    names = [entry.name for entry in bench_training.ENTRIES]
    assert bench.chosen_names(names, None) == names
    assert bench.chosen_names(names, "PEFT,full") == [n for n in names if "PEFT" in n or "full" in n]
    with pytest.raises(UsageError, match="no row has 'jax' in its name; there are: ours, onnx, last 2;"):
        bench.chosen_names(names, "PEFT,jax")


@pytest.mark.parametrize("module", [bench_training, bench_federated, bench_predict])
def test_every_row_has_a_name_of_its_own_and_ours_come_first(module: object) -> None:
    names = [entry.name for entry in module.ENTRIES]  # type: ignore[attr-defined]
    assert len(set(names)) == len(names)
    ours = [name.startswith("ours") for name in names]
    assert ours == sorted(ours, reverse=True)


@pytest.mark.parametrize("name", ["training", "federated", "codecs", "methods", "predict"])
@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--seed", "x"], ["--jsn"], ["--json"]])
def test_a_wrong_call_ends_with_two(name: str, wrong: list[str]) -> None:
    parsers = {
        "training": bench_training.parser,
        "federated": bench_federated.parser,
        "codecs": bench_codecs.parser,
        "methods": bench_methods.parser,
        "predict": bench_predict.parser,
    }
    parser = parsers[name]()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(wrong)
    assert ended.value.code == 2


@pytest.mark.parametrize("name", ["training", "federated"])
def test_the_list_needs_no_peers(name: str) -> None:
    command = [sys.executable, "-m", f"tools.bench_{name}", "--list", "--rows", "PEFT"]
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout and all("PEFT" in line for line in done.stdout.splitlines())


def test_the_memory_of_a_row_of_ours_is_that_of_the_plan_it_names() -> None:
    rows = (cost(2, False, 16, 500), cost(2, False, 4, 400), cost(2, True, 4, 450), cost(6, False, 16, 900))
    assert bench_ours.memory_of(rows, {"depth": 2}) == bench_ours.OPEN_MEMORY
    assert bench_ours.memory_of(rows, {"depth": 2, "memory": "450MB"}) == "450MB"
    assert bench_ours.memory_of(rows, {"depth": 2, "memory": "least"}) == "400"
    assert bench_ours.memory_of(rows, {"depth": 2, "checkpointing": True}) == "450"
    assert bench_ours.memory_of(rows, {"depth": 2, "micro_batch": 16}) == "500"
    with pytest.raises(SystemExit, match="no row"):
        bench_ours.memory_of(rows, {"depth": 6, "checkpointing": True})


def test_a_row_whose_option_this_version_lacks_is_told_apart_from_a_failure() -> None:
    assert {"depth", "memory", "checkpointing", "learning_rate", "time"} <= bench_ours.known_options()
    assert "made_up" not in bench_ours.known_options()


def test_a_fresh_process_gives_its_result_and_its_seconds() -> None:
    heard: list[dict[str, object]] = []
    code = "import json; print('words'); print(json.dumps({'step': 1, 'steps': 1})); print(json.dumps({'result': {'a': 1}}))"
    found = bench.run_fresh([sys.executable, "-c", code], bench.child_environment(), heard.append)
    assert found["a"] == 1 and found["wall_s"] > 0 and heard == [{"step": 1, "steps": 1}]


def test_a_process_without_result_fails_with_its_last_words() -> None:
    with pytest.raises(bench.RowFailed, match="no such luck"):
        bench.run_fresh([sys.executable, "-c", "raise SystemExit('no such luck')"], bench.child_environment(), print)


def test_what_was_started_is_found_by_its_tag_and_ended_even_if_its_parent_is_gone() -> None:
    tag = f"EDGE_BENCH_TEST={os.getpid()}"
    name, _, value = tag.partition("=")
    environment = {**os.environ, name: value}
    subprocess.run(["sh", "-c", "sleep 60 & sleep 60 &"], env=environment, check=True)  # both lose their parent
    deadline = time.monotonic() + 10  # what is just being executed has no environment yet
    while len(bench.tagged(tag)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(bench.tagged(tag)) == 2
    bench.end_all(tag)
    assert bench.tagged(tag) == []


def test_idle_is_the_median_with_the_fewest_processes() -> None:
    first = [(0.0, 1, 9, 100), (1.0, 2, 9, 900), (2.0, 1, 9, 300), (3.0, 1, 9, 200)]
    assert bench_federated.idle_of([first, [(0.0, 2, 9, 400)], []]) == 300
    assert bench_federated.idle_of([[], []]) is None


def test_the_memory_of_a_process_is_read_and_of_none_is_nothing() -> None:
    peak, now = bench_federated.memory_of(os.getpid())
    assert peak >= now > 1 << 20
    assert bench_federated.memory_of(1 << 30) == (0, 0)


def test_the_proxy_counts_what_passes_each_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                asked = b""
                while len(asked) < 5:
                    asked += peer.recv(5)
                peer.sendall(b"abc")

        threading.Thread(target=answer, daemon=True).start()
        with bench_federated.Proxy(server.getsockname()[1]) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port), 5) as device:
                device.sendall(b"12345")
                assert device.recv(16) == b"abc"
            assert (proxy.bytes_up, proxy.bytes_down) == (5, 3)


def test_the_entry_names_its_benches_and_refuses_others() -> None:
    done = subprocess.run([bench.ROOT / "tools" / "bench", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "training" in done.stderr and "federated" in done.stderr and "common" not in done.stderr


def test_negative_epochs_are_refused_before_anything_is_installed() -> None:
    args = argparse.Namespace(**vars(bench_training.parser().parse_args(["--epochs", "-1"])))
    with pytest.raises(UsageError, match="--epochs is 0 or more"):
        bench_training.run(args)


def test_of_several_processes_the_lowest_times_and_the_middle_memory_count() -> None:
    runs = [{"one_ms": ms, "rss_bytes": ms, "accuracy": 0.5} for ms in (9.0, 3.0, 4.0)]
    row = bench_predict.row_of("ours", runs, "")
    assert (row["one_ms"], row["rss_bytes"], row["accuracy"], "cold_s" in row) == (3.0, 4, 0.5, False)
