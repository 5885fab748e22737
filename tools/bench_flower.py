"""Flower's side of `tools/bench federated`: SuperLink, two SuperNodes, `flwr run`, all from the peers' environment.

A deployment, not the simulation: each device is a SuperNode with its SuperExec, which starts a process for each message,
as Flower's documentation runs it. Imports `bench_common`, the data sets and the device's corpus; Flower itself never.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_models import hub
from edge_runtime.console import note
from edge_runtime.errors import EdgeError
from edge_runtime.records import TrainSettings
from edge_runtime.training.corpus import Corpus
from tools import bench_common as bench
from tools import datasets
from tools.bench_training import BATCH, tokenised

START_S, SETTLE_S, RUN_S, ASK_S = 120.0, 5.0, 3600.0, 30.0
PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "edge-bench"
version = "1.0.0"
description = "PEFT LoRA on Flower, for tools/bench federated"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "edge_bench.server:app"
clientapp = "edge_bench.client:app"

[tool.flwr.app.config]
job = "{job}"
"""
CONFIG = """\
[superlink]
default = "dep"

[superlink.dep]
address = "127.0.0.1:{port}"
insecure = true
"""


class Flower:
    """One run in a folder of its own."""

    def __init__(
        self,
        python: Path,
        folder: Path,
        args: argparse.Namespace,
        labels: Sequence[str],
        options: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self._programs, self._folder, self._args, self._labels = python.parent, folder, args, labels
        self._options = dict(options)
        self._settings = dataclasses.asdict(TrainSettings(batch_size=BATCH)) | dict(settings)
        self._environment = bench.child_environment(
            args.threads,
            FLWR_HOME=str(folder / "flwr"),
            FLWR_TELEMETRY_ENABLED="0",
            FLWR_DISABLE_UPDATE_CHECK="1",
            PATH=f"{python.parent}:/usr/bin:/bin",
        )

    def run(
        self,
        parts: Sequence[Sequence[datasets.Row]],
        test: Sequence[datasets.Row],
        max_length: int,
        through_proxy: Callable[[int], int],
        tag: Callable[[int], str],
    ) -> dict[str, Any]:
        """All rounds; -> the fields of `bench_federated.Run`.

        Args:
            through_proxy: port -> a port that counts and passes on.
            tag: number of a device -> NAME=VALUE for the environment of its processes.
        """
        job_file = self._job(parts, test, max_length)
        job = json.loads(job_file.read_text())
        port, begun = free_port(), time.monotonic()
        (self._folder / "flwr").mkdir()
        (self._folder / "flwr" / "config.toml").write_text(CONFIG.format(port=port))
        link = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--database", str(self._folder / "link.db")]
        self._start("superlink", ["flower-superlink", *link, "--disable-runtime-dependency-installation"], {})
        wait_for_port(port, lambda: self._words("superlink"))
        ports = []
        for number in range(len(parts)):
            name, _, value = tag(number).partition("=")
            own = free_port()
            ports.append(own)
            node = ["--insecure", "--superlink", f"127.0.0.1:{through_proxy(port)}", "--host", "127.0.0.1"]
            config = f"partition-id={number} num-partitions={len(parts)}"
            command = ["flower-supernode", *node, "--port", str(own), "--node-config", config]
            self._start(f"supernode-{number}", command, {name: value})
        for number, own in enumerate(ports):
            wait_for_port(own, lambda number=number: self._words(f"supernode-{number}"))  # type: ignore[misc]
        started_s = time.monotonic() - begun
        idle_from = time.monotonic() + SETTLE_S / 2
        time.sleep(SETTLE_S)
        idle_until = time.monotonic()
        wall_s = started_s + self._rounds(job)
        done = [json.loads(line) for line in Path(job["log"]).read_text().splitlines()]
        command = [str(self._programs / "python"), "-m", "tools.bench_peers.evaluate", str(job_file)]
        accuracy = bench.run_fresh(command, self._environment, lambda line: None)["accuracy"]
        return {
            "accuracy": accuracy,
            "wall_s": wall_s,
            "cpu_s_per_step": statistics.mean(one["cpu_s"] / one["steps"] for one in done),
            "idle_from": idle_from,
            "idle_until": idle_until,
            "detail": f"LoRA r 8, {len(done)} updates of {done[0]['payload_bytes'] / bench.MIB:.2f} MiB",
            "more": {
                "train_peak_rss_bytes": max(one["peak_rss_bytes"] for one in done),
                "train_s": sum(one["train_s"] for one in done),
                "payload_bytes_up": sum(one["payload_bytes"] for one in done),
            },
        }

    def _job(self, parts: Sequence[Sequence[datasets.Row]], test: Sequence[datasets.Row], max_length: int) -> Path:
        """What the app reads: model, tokens, batches of every device and round; and the app itself."""
        model = hub.resolve(self._args.model, note)
        corpora = [tokenised(part, self._labels, model, max_length, self._folder) for part in parts]
        rounds = range(1, self._args.rounds + 1)
        job_file = self._folder / "job.json"
        job = {
            "model": str(model),
            "labels": len(self._labels),
            "options": self._options,
            "settings": self._settings,
            "threads": self._args.threads,
            "seed": self._args.seed,
            "rounds": self._args.rounds,
            "corpora": [str(corpus) for corpus in corpora],
            "batches": [[Corpus(c).epoch(BATCH, self._args.seed + number) for number in rounds] for c in corpora],
            "test_corpus": str(tokenised(test, self._labels, model, max_length, self._folder)),
            "log": str(self._folder / "trained.jsonl"),
            "final": str(self._folder / "final.npz"),
        }
        job_file.write_text(json.dumps(job))
        app = self._folder / "app" / "edge_bench"
        app.mkdir(parents=True)
        (app / "__init__.py").touch()
        for part in ("client", "server"):
            shutil.copyfile(Path(__file__).parent / "bench_peers" / f"flower_{part}.py", app / f"{part}.py")
        (self._folder / "app" / "pyproject.toml").write_text(PYPROJECT.format(job=job_file))
        return job_file

    def _rounds(self, job: Mapping[str, Any]) -> float:
        """Start the app and wait for its last model; -> seconds."""
        begun = time.monotonic()
        asked = self._flwr("run", str(self._folder / "app"), "dep", "--format", "json")
        if not asked.get("success"):
            raise EdgeError(f"flwr run failed: {json.dumps(asked)[:300]}")
        log, final, seen, next_ask = Path(job["log"]), Path(job["final"]), 0, time.monotonic() + ASK_S
        while not final.exists():
            lines = log.read_text().splitlines() if log.exists() else []
            for line in lines[seen:]:
                one = json.loads(line)
                told = (
                    f"trained {one['steps']} steps in {one['train_s']:.0f} s, {time.monotonic() - begun:.0f} s so far"
                )
                note(f"  round {one['round']}: device-{one['partition'] + 1} {told}")
            seen = len(lines)
            now = time.monotonic()
            if now > begun + RUN_S:
                raise EdgeError(f"the run took longer than {RUN_S:.0f} s")
            if now > next_ask:  # seldom: each question is a Python process that takes time from the run
                next_ask = now + ASK_S
                status = json.dumps(self._flwr("list", "dep", "--format", "json"))
                if "finished:failed" in status or "finished:stopped" in status:
                    raise EdgeError(f"Flower's run failed: {self._words('superlink')}")
            time.sleep(0.2)
        return time.monotonic() - begun

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(self._programs / "flwr"), *arguments],
            env=self._environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise EdgeError(f"flwr {arguments[0]}: {(done.stderr or done.stdout).strip()[-300:]}") from None
        return found

    def _start(self, name: str, command: Sequence[str], more: Mapping[str, str]) -> None:
        with (self._folder / f"{name}.log").open("w") as log:
            subprocess.Popen(
                [str(self._programs / command[0]), *command[1:]],
                env={**self._environment, **more},
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _words(self, name: str) -> str:
        """The end of a process's log."""
        return "\n".join((self._folder / f"{name}.log").read_text(errors="replace").splitlines()[-15:])


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, words: Callable[[], str]) -> None:
    """Until somebody listens there.

    Raises:
        EdgeError: nobody does; with the last words of who should.
    """
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise EdgeError(f"nobody listens on port {port}: {words()}")
