"""What the benches share: options, the peers' environment, fresh processes that are measured, results as table and plot.

Not here: what is measured (`bench_training.py`, `bench_federated.py`) and what runs in the peers' environment
(`bench_peers/`). A row is a plain record with the keys of `ROW`; whatever else a bench knows of it stands beside them.
Imports the device's console, errors and store, `edge_models.packages` and `tools.datasets`' records.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

from edge_models.packages import locked
from edge_runtime.console import note, table
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.store import cache_folder

ROOT = Path(__file__).resolve().parent.parent
ROW = ("name", "peak_rss_bytes", "cpu_s_per_step", "wall_s", "bytes_up", "accuracy")
PEERS = ("transformers==5.23.0", "peft==0.21.2", "flwr==1.41.0", "matplotlib==3.11.2")
RUN_TAG = f"EDGE_BENCH_RUN={os.getpid()}-{time.time_ns()}"  # in the environment of every process that we start
QUIET_LOAD = 0.5  # processes wanting to run, on average, above which a measurement is told to be disturbed
MIB = 1 << 20

Row = dict[str, Any]


class PeersMissing(EdgeError):
    """The peers' environment cannot be made."""


class RowFailed(EdgeError):
    """A process that was to be measured ended without a result."""


class RowUnavailable(EdgeError):
    """This version of ours cannot do what a row asks: it is left out, which is no failure."""


# options


def bench_parser(name: str, what: str, *examples: str, rows: bool = True) -> argparse.ArgumentParser:
    """A bench's command line with the options that all of them have; `rows`: its rows have names to choose from."""
    made = argparse.ArgumentParser(
        prog=f"tools/bench {name}",
        description=what,
        epilog="\n  ".join(["examples:", *(f"tools/bench {name} {e}".rstrip() for e in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--json", type=Path, metavar="FILE", help='write {"rows": [...]}; each row has ' + ", ".join(ROW))
    add("--seed", type=int, default=1, help="(%(default)s)")
    add("--quick", action="store_true", help="few steps: shows that everything runs, measures nothing of worth")
    add("--threads", type=whole, default=1, help="of each training process (%(default)s)")
    if rows:
        add("--rows", metavar="TEXT[,TEXT]", help="only rows whose name contains one of these")
        add("--list", action="store_true", help="print the names of all rows and stop")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write a Markdown page there, with plots where a bench has them, for example docs/results",
    )
    return made


def whole(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, it is {text!r}")
    return int(text)


def chosen_names(names: Sequence[str], wanted: str | None) -> list[str]:
    """The names that contain one of the wanted texts, all without any.

    Raises:
        UsageError: a wanted text is in no name.
    """
    if not wanted:
        return list(names)
    parts = [part.strip() for part in wanted.split(",")]
    for part in parts:
        if not part or not any(part in name for name in names):
            raise UsageError(f"--rows: no row has {part!r} in its name; there are: {'; '.join(names)}")
    return [name for name in names if any(part in name for part in parts)]


# rows


def make_row(name: str, **values: Any) -> Row:
    """A row with every key of `ROW`, None where a bench does not measure it, and what else it knows."""
    return {"name": name, **{key: values.pop(key, None) for key in ROW[1:]}, **values}


def median_row(name: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    """Several runs of one row: the median of each number, the single runs beside them."""

    def middle(key: str) -> Any:
        values = [run[key] for run in runs if run.get(key) is not None]
        return statistics.median(values) if values else None

    row = make_row(name, **{key: middle(key) for key in ROW[1:]})
    for key in ("peak_rss_bytes", "bytes_up"):
        row[key] = None if row[key] is None else int(row[key])
    return {**row, "runs": [dict(run) for run in runs]}


def exit_code(rows: Sequence[Row]) -> int:
    """1 if a row failed; one that this version cannot do is no failure."""
    return int(any(str(row.get("detail", "")).startswith("failed") for row in rows))


def shown(key: str, value: Any) -> str:
    """A cell for people."""
    if value is None:
        return "-"
    if key.endswith("_bytes") or key.startswith("bytes_"):
        return f"{value / MIB:.0f} MiB" if value >= 100 * MIB else f"{value / MIB:.2f} MiB"
    if key == "accuracy" or key.endswith("_share"):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if key.endswith("_s_per_step") else f"{value:.1f}" if isinstance(value, float) else str(value)


def cells(rows: Sequence[Row], columns: Mapping[str, str]) -> list[list[str]]:
    """Rows as texts under `columns`: key -> heading."""
    return [[shown(key, row.get(key)) for key in columns] for row in rows]


def write_rows(path: Path, results: Mapping[str, Any]) -> None:
    """What `--json` writes: rows, and what they were measured with."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def markdown(results: Mapping[str, Any], columns: Mapping[str, str], notes: Sequence[str], plot: str) -> str:
    """The page for docs/results."""
    machine, lines = results["machine"], [f"# {results['title']}", ""]
    if results["quick"]:
        lines += ["**Quick run: shows that it works, the numbers are worth nothing.**", ""]
    lines += ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(results["rows"], columns)]
    lines += ["", *(f"- {text}" for text in notes), ""]
    if plot:
        lines += [f"![{results['title']}]({plot})", ""]
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB, {machine['system']}; "
        f"load {machine['load']} at the start; {results['date']}.",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in results['versions'].items())}.",
        "",
        f"Command: `{results['command']}`",
        "",
    ]
    return "\n".join(lines)


def finish(
    name: str,
    args: argparse.Namespace,
    rows: Sequence[Row],
    *,
    title: str,
    columns: Mapping[str, str],
    notes: Sequence[str],
    versions: Mapping[str, str],
    machine: Mapping[str, Any],
    python: Path | None,
    figures: Mapping[str, Any] | None = None,
    page: str = "",
) -> None:
    """Print the table; write what --json and --out ask for. `figures`, of all rows, go before them; no plot without `python`; `page`: the files' name, where it is not the bench's."""
    results = {
        "title": title,
        **(figures or {}),
        "rows": list(rows),
        "quick": bool(args.quick),
        "seed": args.seed,
        "machine": dict(machine),
        "date": date.today().isoformat(),
        "versions": dict(versions),
        "command": shlex.join(["tools/bench", name, *sys.argv[1:]]),
        "notes": list(notes),
    }
    print(table(list(columns.values()), cells(rows, columns)))
    for text in notes:
        print(text)
    if args.quick:
        print("quick run: the numbers are worth nothing")
    if args.json:
        write_rows(args.json, results)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = page or name
        raw, plot = args.out / f"{name}.json", args.out / f"{name}.svg"
        write_rows(raw, results)
        drawn = python is not None and draw(python, raw, plot)
        text = args.out / f"{name}.md"
        text.write_text(markdown(results, columns, notes, plot.name if drawn else ""), encoding="utf-8")
        note(f"wrote {text}, {raw}{f', {plot}' if drawn else ' (no plot: matplotlib failed)' if python else ''}")


def draw(python: Path, rows: Path, plot: Path) -> bool:
    """The plot, with the peers' matplotlib; -> whether it was made."""
    command = [str(python), "-m", "tools.bench_peers.plot", str(rows), str(plot)]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        note(done.stderr.strip()[-500:])
    return done.returncode == 0


# the machine


def machine() -> dict[str, Any]:
    """What the numbers were measured on; says so where other work disturbs them."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        note(f"other work runs beside this (load {load:.1f}): its times will not be worth much")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{_distribution()}, Linux {platform.release()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "load": f"{load:.2f}",
    }


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def versions(python: Path | None) -> dict[str, str]:
    """What was measured: ours, and, where the peers' environment is given, what is in it."""
    found = {"Python": platform.python_version()}
    for package in ("edge-runtime", "torch", "onnxruntime", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        found["edge-runtime"] = f"{found.get('edge-runtime', '')} ({commit.stdout.strip()})".strip()
    if python is not None:
        names = [requirement.partition("==")[0] for requirement in PEERS] + ["torch", "onnxruntime"]
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
        out = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
        found |= {(f"peers' {n}" if n in found else n): v for n, v in json.loads(out).items() if n != "matplotlib"}
    return found


# the peers' environment


def peers_environment() -> Path:
    """The Python of a virtual environment with the peers, made once in the cache folder (some minutes, 1.5 GB).

    EDGE_PEERS_VENV names another one, which must have them already.

    Raises:
        PeersMissing: pip cannot install them.
    """
    if own := os.environ.get("EDGE_PEERS_VENV"):
        return Path(own) / "bin" / "python"
    same = ("torch", "onnxruntime")  # as in our environment
    wanted = [*(f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in same), *PEERS]
    key = hashlib.sha256(json.dumps([wanted, platform.python_version()]).encode()).hexdigest()[:12]
    folder = cache_folder() / "bench" / f"peers-{key}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f"{folder.name}.lock"):
        if (folder / "complete").exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)  # of an installation that was interrupted
        note(f"making the peers' environment in {folder}: {', '.join(wanted)} (some minutes, once)")
        _run([sys.executable, "-m", "venv", str(folder)])
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        try:
            _run([*install, *wanted])
        except PeersMissing as error:  # the index may no longer serve one of them: the newest, and the table says which
            note(f"{error}: taking the newest of each instead; the table says which they are")
            _run([*install, *wanted[: len(same)], *(requirement.partition("==")[0] for requirement in PEERS)])
        (folder / "complete").touch()
    return python


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or [""]
        raise PeersMissing(f"{' '.join(command[1:4])} failed: {said[0][:300]}")


# fresh processes


def child_environment(threads: int = 1, **more: str) -> dict[str, str]:
    """For every process that is measured, ours and the peers': the same threads, no network, our tag."""
    tag, _, value = RUN_TAG.partition("=")
    return {
        **os.environ,
        tag: value,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **more,
    }


def run_fresh(
    command: Sequence[str], environment: Mapping[str, str], progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run a process that prints JSON lines; -> the line {"result": ...}, and its seconds as "wall_s".

    Raises:
        RowFailed: it ended without.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us: `scratch` ends what runs
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    assert process.stdout and process.stderr
    readers = [
        threading.Thread(target=_lines_to, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_lines_to, args=(process.stderr, lambda e: errors.append(e or "")), daemon=True),
    ]
    for reader in readers:
        reader.start()
    result = None
    while (line := lines.get()) is not None:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "result" in found:
                result = found["result"]
            elif isinstance(found, dict):
                progress(found)
    process.wait()
    wall_s = time.perf_counter() - begun
    readers[1].join(5)
    if result is None:
        said = [line.strip() for line in errors if line.strip()] or [f"exit status {process.returncode}"]
        raise RowFailed(said[-1][:300])
    return {**result, "wall_s": wall_s}


def _lines_to(stream: Any, put: Callable[[str | None], Any]) -> None:
    for line in stream:
        put(line)
    put(None)


class Ticker:
    """A row's progress: one line that rewrites itself on a terminal, nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._live = what, sys.stderr.isatty()

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Show {"step", "steps", ...}, or {"note": text}."""
        if "note" in line:
            note(f"  {line['note']}")
        elif self._live and "step" in line:
            sys.stderr.write(f"\r\x1b[K  {self._what}: step {line['step']}/{line['steps']}")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave a clean line."""
        if self._live:
            sys.stderr.write("\r\x1b[K")


# processes by what their environment says of them


def tagged(tag: str) -> list[int]:
    """Processes that have "NAME=VALUE" in their environment: those that we started and all that these started.

    Unlike the tree of parents, this loses none whose parent has ended. A process has no environment for a moment while it
    is being replaced by another program.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if tag.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end_all(tag: str = RUN_TAG) -> None:
    """End every process with the tag but this one: asked first, then killed."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        for pid in tagged(tag):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not tagged(tag):
                return
            time.sleep(0.1)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a block. However that ends, by Ctrl-C or SIGTERM too, neither it stays nor anything that was started."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    folder = Path(tempfile.mkdtemp(prefix="edge-bench-"))
    try:
        yield folder
    finally:
        for number in numbers:  # a second Ctrl-C must not leave half of them
            signal.signal(number, signal.SIG_IGN)
        end_all()
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
