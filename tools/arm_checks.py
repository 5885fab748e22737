"""What is tried in the ARM userland, most of it against this machine: install, profile, predict, train, and who is turned away.

A check takes a `Lab` and returns what it found in words, or raises `CheckFailed`. Not here: how the userland is made
(`arm_userland.py`) and the order of the checks (`arm.py`).
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from edge_models.hub import resolve
from edge_runtime.weights import read_safetensors
from tools import datasets
from tools.arm_apt import call
from tools.arm_userland import PIP, PLATFORMS, ROOT, Say, Userland

GOAL_BYTES = 200_000_000  # of the base install
TRAIN_ROWS, TEXTS, STEP_ROWS = 640, 32, 8
LOGITS, LOSS, STEP = 1e-4, 1e-4, 1e-3  # the most that this machine and the emulated one may differ
PI5_PAGE = 16 << 10
DEPTH = 2  # blocks that the step trains
ILLEGAL = "onnxruntime==1.21.0"  # dies with SIGILL on a Raspberry Pi 4
LIMIT_S = 3600  # of one command under QEMU


class CheckFailed(Exception):
    """What a check found instead of what it wanted."""


@dataclass(frozen=True)
class Lab:
    """Where the checks work."""

    work: Path
    wheels: Path
    arm: Userland
    narrow: Userland  # of 32 bits
    say: Say

    def cache(self, name: str) -> Path:
        """The cache folder of one of the two machines, within the work folder."""
        return self.work / "results" / f"cache-{name}"

    def emulated(self, *words: str | Path, codes: Sequence[int] = (0,), **variables: str | Path) -> str:
        """Run the installed `edge-runtime` under QEMU; -> what it printed.

        Raises:
            CheckFailed: it ended with another exit code, or with a traceback.
        """
        cache = {"EDGE_CACHE": self.cache("arm"), **variables}
        done = self.arm.run(self.arm.python.with_name("edge-runtime"), *words, variables=cache, limit_s=LIMIT_S)
        return _sound(done, f"edge-runtime {words[0]} under QEMU", codes)

    def here(self, *words: str | Path) -> str:
        """Run this checkout's `edge-runtime` on this machine; -> what it printed."""
        variables = {**os.environ, "EDGE_CACHE": str(self.cache("here"))}
        command = [sys.executable, "-m", "edge_runtime.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, check=False)
        return _sound(done, f"edge-runtime {words[0]} on this machine", (0,))


def _sound(done: subprocess.CompletedProcess[str], what: str, codes: Sequence[int]) -> str:
    if done.returncode not in codes or "Traceback" in done.stderr:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise CheckFailed(f"{what} ended with {done.returncode}: {last[-400:]}")
    return done.stdout


def install(lab: Lab) -> str:
    """pip under QEMU installs the base from wheels alone."""
    (pip,), (ours,) = lab.wheels.glob("pip-*.whl"), lab.wheels.glob("edge_runtime-*.whl")
    done = lab.arm.run(pip / "pip", "install", "-q", "--no-index", "--find-links", lab.wheels, ours, limit_s=LIMIT_S)
    _sound(done, "pip install", (0,))
    files = [file for file in lab.arm.packages.rglob("*") if file.is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    compiled = sum(file.stat().st_size for file in files if file.suffix == ".pyc")
    versions = sorted(folder.name[: -len(".dist-info")] for folder in lab.arm.packages.glob("*.dist-info"))
    lab.say("installed: " + ", ".join(versions))
    fetched = sum(file.stat().st_size for file in lab.wheels.glob("*.whl") if file != pip)
    found = f"{len(versions)} packages, {fetched / 1e6:.0f} MB to download, {num_bytes / 1e6:.0f} MB installed ({compiled / 1e6:.0f} of it bytecode)"
    if num_bytes > GOAL_BYTES:
        raise CheckFailed(f"{found}; the goal is {GOAL_BYTES / 1e6:.0f} MB")
    return found


def pages(lab: Lab) -> str:
    """What was installed loads where memory pages are larger than 4 KiB, as a Raspberry Pi 5's."""
    found = {file.name: alignment(file.read_bytes()) for file in lab.arm.packages.rglob("*") if ".so" in file.name}
    found = {name: least for name, least in found.items() if least}
    if not found or min(found.values()) < PI5_PAGE:
        raise CheckFailed(
            f"not loadable with pages of 16 KiB: {[n for n in found if found[n] < PI5_PAGE] or 'no file'}"
        )
    return f"{len(found)} shared objects load with pages of up to {min(found.values()) >> 10} KiB"


def alignment(elf: bytes) -> int:
    """The least alignment of the segments that are loaded, in bytes: pages must not be larger. 0 for no 64-bit ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return 0
    start, size, count = (struct.unpack_from(kind, elf, at)[0] for kind, at in (("<Q", 32), ("<H", 54), ("<H", 56)))
    segments = [struct.unpack_from("<I44xQ", elf, start + i * size) for i in range(count)]  # type, ..., alignment
    return min((align for kind, align in segments if kind == 1), default=0)


def commands(lab: Lab) -> str:
    """The installed command says its version and its commands."""
    version, shown = lab.emulated("--version"), lab.emulated("--help")
    if not version.startswith("edge-runtime ") or "predict" not in shown:
        raise CheckFailed(f"--version said {version!r}, --help {shown[:80]!r}")
    return version.strip()


def profile(lab: Lab) -> str:
    """The machine is measured."""
    found = json.loads(lab.emulated("profile", "--json"))
    if not (
        found["ram_total_bytes"] > 0 and found["cores"] > 0 and found["gflops"] > 0 and found["memory_gb_per_s"] > 0
    ):
        raise CheckFailed(f"profile found {found}")
    return f"{found['cores']} cores, {found['gflops']:.2f} GFLOP/s emulated"


def doctor(lab: Lab) -> str:
    """Doctor finds Python and every package of the base install in order."""
    verdicts = {check["check"]: check for check in _examined(lab)}
    for name in ("Python", "packages"):
        if verdicts.get(name, {}).get("verdict") != "ok":
            raise CheckFailed(f"doctor says {verdicts.get(name)}")
    return f"{len(verdicts)} checks; Python {verdicts['Python']['found']}; {verdicts['packages']['found']}"


def wrong_wheel(lab: Lab) -> str:
    """Doctor names a wheel that dies with SIGILL on this processor."""
    folder = lab.work / "illegal"
    if not folder.exists():
        wheel = [*PIP, "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", lab.arm.version]
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        call([*wheel, *platforms, "--dest", lab.wheels / "illegal", ILLEGAL], f"fetch {ILLEGAL}", "look at the network")
        (file,) = (lab.wheels / "illegal").glob("*.whl")
        call([sys.executable, "-m", "zipfile", "-e", file, folder], f"unpack {file.name}", "delete it")
    (found,) = (c for c in _examined(lab, PYTHONPATH=folder) if c["check"] == "onnxruntime")
    if found["verdict"] != "wrong" or "SIGILL" not in found["found"]:
        raise CheckFailed(f"doctor says {found}")
    return f"{found['found']}: {found['advice']}"


def _examined(lab: Lab, **variables: str | Path) -> list[dict[str, Any]]:
    out = lab.emulated("doctor", "--json", "--state", lab.work / "results/state", codes=(0, 1), **variables)
    checks: list[dict[str, Any]] = json.loads(out)["checks"]
    return checks


def prepare(lab: Lab) -> None:
    """On this machine: questions, and a MiniLM-L6 whose head and last blocks were trained on them for 40 steps."""
    results = lab.work / "results"
    data = datasets.load("trec-coarse", lab.say)
    for name, rows in (
        ("train", data.train[:TRAIN_ROWS]),
        ("texts", data.test[:TEXTS]),
        ("step", data.train[:STEP_ROWS]),
    ):
        datasets.write_csv(rows, results / f"{name}.csv")
    (results / "texts.json").write_text(json.dumps([row.text for row in data.test[:TEXTS]]))
    base = resolve("minilm-l6", lab.say)
    lab.here(
        "train",
        base,
        "--data",
        results / "train.csv",
        "--holdout",
        "0",
        "--depth",
        str(DEPTH),
        "--backend",
        "onnx",
        "--out",
        results / "model",
    )


def predict(lab: Lab) -> str:
    """The same labels as here, and the same logits but for rounding."""
    texts = json.loads((lab.work / "results/texts.json").read_text())
    model = lab.work / "results/model"
    there, here = (_answers(run("predict", model, "--json", "--", *texts)) for run in (lab.emulated, lab.here))
    if len(there) != len(texts) or [a["label"] for a in there] != [a["label"] for a in here]:
        raise CheckFailed(f"the labels differ: {[a['label'] for a in there]}, here {[a['label'] for a in here]}")
    apart = max(logits_apart(a["probabilities"], b["probabilities"]) for a, b in zip(there, here, strict=True))
    found = f"{len(texts)} questions, the same labels, logits within {apart:.1e}"
    if apart > LOGITS:
        raise CheckFailed(f"{found}; wanted {LOGITS:.0e}")
    return found


def _answers(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


def logits_apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest difference of two predictions' logits, which are their log probabilities but for the mean."""

    def centred(probabilities: Mapping[str, float]) -> dict[str, float]:
        logs = {label: log(p) for label, p in probabilities.items()}
        return {label: value - sum(logs.values()) / len(logs) for label, value in logs.items()}

    return max(abs(value - centred(other)[label]) for label, value in centred(one).items())


def train(lab: Lab) -> str:
    """One step of the last two blocks without torch: the same loss as here, and the same step."""
    there, here = _steps(lab, "float32")
    results = lab.work / "results"
    apart = step_apart(*(_tensors(results / name) for name in ("model", "float32-arm", "float32-here")))
    losses = abs(there["first_loss"] - here["first_loss"])
    found = f"{STEP_ROWS} questions, the last {there['depth']} blocks, loss {there['first_loss']:.6f}, {losses:.1e} from here's; step {apart:.1e} of its length from here's; {_memory(there)}"
    if losses > LOSS or apart > STEP or there["depth"] != DEPTH or there["backend"] != "onnx":
        raise CheckFailed(f"{found}; wanted {LOSS:.0e} and {STEP:.0e}")
    return found


def train_int8(lab: Lab) -> str:
    """The same with the frozen blocks in 8 bits."""
    there, here = _steps(lab, "int8")
    losses = abs(there["first_loss"] - here["first_loss"])
    found = f"loss {there['first_loss']:.6f}, {losses:.1e} from here's; {_memory(there)}"
    if losses > LOSS or there["precision"] != "int8":
        raise CheckFailed(f"{found}; wanted {LOSS:.0e}")
    return found


def _memory(report: Mapping[str, Any]) -> str:
    """With QEMU's own memory in it."""
    mib = 1 << 20
    return f"peak {report['peak_bytes'] // mib} MiB of {report['promised_peak_bytes'] // mib} promised, kept by {report['enforced_by']}"


def _steps(lab: Lab, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """One step of gradient descent, under QEMU and here; -> both reports."""
    results = lab.work / "results"
    words: list[str | Path] = ["train", results / "model", "--data", results / "step.csv", "--holdout", "0"]
    words += [
        "--depth",
        str(DEPTH),
        "--batch-size",
        str(STEP_ROWS),
        "--backend",
        "onnx",
        "--no-prefix-cache",
        "--precision",
        precision,
    ]
    words += [
        "--json",
        "--optimizer",
        "sgd",
        "--learning-rate",
        "0.1",
        "--head-learning-rate",
        "0.1",
    ]  # its step is the gradient
    there = lab.emulated(*words, "--out", results / f"{precision}-arm")
    here = lab.here(*words, "--out", results / f"{precision}-here")
    return json.loads(there), json.loads(here)


def _tensors(folder: Path) -> dict[str, Any]:
    """A model folder's tensors, mapped."""
    return {name: tensor.array() for name, tensor in read_safetensors(folder / "model.safetensors").items()}


def step_apart(start: Mapping[str, Any], one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far apart two steps from `start` end, as a share of the second's length; both must have trained something."""
    import numpy as np

    def length(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
        return float(np.sqrt(sum(np.square(a[name] - b[name], dtype=np.float64).sum() for name in a)))

    return length(one, other) / length(other, start) if length(one, start) else 1.0


def narrow(lab: Lab) -> str:
    """A Python of 32 bits is turned away in one line, when it is started and when it is installed."""
    said = []
    for words in (("-c", "from edge_runtime.start import main; raise SystemExit(main())"), ("setup.py",)):
        done = lab.narrow.run(*words, cwd=lab.work / "source")
        if done.returncode != 1 or "needs a 64-bit system" not in done.stderr or done.stderr.count("\n") != 1:
            raise CheckFailed(f"{words} ended with {done.returncode}: {done.stdout[-200:]}{done.stderr[-200:]}")
        said.append(done.stderr.strip())
    return said[0]


CHECKS: dict[str, Callable[[Lab], str]] = {
    "install": install,
    "pages": pages,
    "commands": commands,
    "profile": profile,
    "doctor": doctor,
    "wrong wheel": wrong_wheel,
    "predict": predict,
    "train": train,
    "train int8": train_int8,
    "32 bits": narrow,
}
