"""An ARM userland in a folder: QEMU, Debian's Python for ARM, and the wheels a device would install. No root, no container.

Nothing is installed on this machine; packages are unpacked. What was fetched is found again by the next run. Not here: where
Debian's packages come from (`arm_apt.py`), what is tried in the userland (`arm_checks.py`).
"""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edge_runtime.errors import UsageError
from tools.arm_apt import Apt, call, unpack

ROOT = Path(__file__).parents[1]
QEMU_FROM = "trixie"  # Debian 12's QEMU 7.2 crashes on these wheels
FROM_CHECKOUT = (
    "setup.cfg",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "edge_runtime",
    "coordinator",
    "models",
)
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """What is emulated: a Debian architecture, QEMU's program and processor, what Python calls the machine."""

    debian: str
    qemu: str
    cpu: str


PI4 = Machine("arm64", "qemu-aarch64", "cortex-a72")
PI2 = Machine("armhf", "qemu-arm", "cortex-a7")
SYSTEMS = {"debian-12": ("bookworm", "3.11"), "debian-13": ("trixie", "3.13")}  # Raspberry Pi OS 12 and 13


def qemu(work: Path, mirror: str, say: Say) -> Path:
    """-> the folder with Debian 13's QEMU programs, unpacked."""
    folder = work / "qemu"
    if not folder.exists():
        say("QEMU: fetching Debian 13's (71 MB)")
        own = call(["dpkg", "--print-architecture"], "tell this machine's architecture", "this needs Debian or Ubuntu")
        apt = Apt(work / f"apt-{QEMU_FROM}-{own.strip()}", QEMU_FROM, own.strip(), mirror)
        apt.fetch("download", "qemu-user")
        unpack(
            max(apt.folder.glob("qemu-user_*.deb"), key=os.path.getmtime),
            work / "qemu.part",
            ("*/qemu-aarch64", "*/qemu-arm"),
        )
        (work / "qemu.part/usr/bin").rename(folder)
    said = call([folder / PI4.qemu, "--version"], "run QEMU", "delete the work folder")
    say(f"QEMU: {said.splitlines()[0]}")
    return folder


@dataclass(frozen=True)
class Userland:
    """A Python for ARM that runs here: `python` is a script that runs it under QEMU.

    The kernel runs scripts, so a child process that is started by `sys.executable` is emulated too, and pip's scripts work.
    """

    machine: Machine
    root: Path  # the unpacked Debian packages
    environment: Path  # laid out as a virtual environment
    version: str  # of Python

    @property
    def python(self) -> Path:
        """What a virtual environment has as bin/python."""
        return self.environment / "bin/python"

    @property
    def packages(self) -> Path:
        """Where pip installs to."""
        return self.environment / f"lib/python{self.version}/site-packages"

    def run(
        self,
        *words: str | Path,
        variables: Mapping[str, str | Path] = MappingProxyType({}),
        limit_s: float = 600,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run this Python with nothing of our own environment's packages, caches and pip settings; it may fail.

        Args:
            variables: of its environment, beside ours.
            limit_s: after which it is killed and counts as failed.
        """
        own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "EDGE_"))}
        command = [str(self.python), *map(str, words)]
        more = {"PIP_CONFIG_FILE": os.devnull, **{key: str(value) for key, value in variables.items()}}
        done = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", env={**own, **more}, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = done.communicate(timeout=limit_s)
        except BaseException as error:
            os.killpg(done.pid, signal.SIGKILL)
            out, err = done.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            err += f"\nkilled after {limit_s:.0f} s"
        return subprocess.CompletedProcess(command, done.returncode, out, err)


def userland(work: Path, machine: Machine, system: str, programs: Path, mirror: str, say: Say) -> Userland:
    """Python and what it needs from a Debian release's packages, unpacked, with an empty environment."""
    release, version = SYSTEMS[system]
    root = work / f"{system}-{machine.debian}"
    if not root.exists():
        say(f"userland: fetching Python {version} of {system} for {machine.debian} (16 MB)")
        apt = Apt(work / f"apt-{release}-{machine.debian}", release, machine.debian, mirror)
        names = (f"python{version}-minimal", f"libpython{version}-stdlib", "libstdc++6")
        apt.fetch("install", "--yes", "--no-install-recommends", "--download-only", *names)
        part = work / f"{root.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        for package in sorted((apt.folder / "cache/archives").glob("*.deb")):
            unpack(package, part)
        if not (
            part / "lib"
        ).exists():  # of packages since Debian 13: base-files, which is not among them, has this link
            (part / "lib").symlink_to("usr/lib")
        part.rename(root)
    made = Userland(machine, root, work / f"venv-{system}-{machine.debian}", version)
    shutil.rmtree(made.environment, ignore_errors=True)
    made.packages.mkdir(parents=True)
    made.python.parent.mkdir()
    made.python.write_text(wrapper(programs / machine.qemu, machine, root, made.python, version))
    made.python.chmod(0o755)
    (made.environment / "pyvenv.cfg").write_text(
        f"home = {root}/usr/bin\ninclude-system-site-packages = false\nversion = {version}\n"
    )
    done = made.run("-c", "import platform, sys; print('Python', sys.version.split()[0], platform.machine())")
    if done.returncode:
        raise UsageError(f"{made.python} does not run: {done.stderr.strip()[-200:]}: delete {root} and start again")
    say(f"userland: {done.stdout.strip()}")
    return made


def wrapper(program: Path, machine: Machine, root: Path, python: Path, version: str) -> str:
    """The script that stands as bin/python: QEMU with Debian's Python, told that it is called as the script."""
    words = [program, "-cpu", machine.cpu, "-L", root, "-0", python, root / f"usr/bin/python{version}"]
    return f'#!/bin/sh\nulimit -c 0\nexec {shlex.join(map(str, words))} "$@"\n'


def requirements(setup_cfg: str) -> list[str]:
    """What the base install needs, and pip, with which it is installed."""
    config = configparser.ConfigParser()
    config.read_string(setup_cfg)
    return [line for line in config["options"]["install_requires"].splitlines() if line.strip()] + ["pip"]


def wheels(work: Path, version: str, say: Say) -> Path:
    """-> the folder with edge-runtime's wheel, made from this checkout, and the base install's for aarch64, fetched once."""
    wanted = "\n".join(requirements((ROOT / "setup.cfg").read_text()))
    folder, source = work / f"wheels-{version}", work / "source"
    listed = folder / "requirements.txt"
    if not listed.exists() or listed.read_text() != wanted:
        say(f"wheels: fetching the base install's for aarch64 and Python {version} (50 MB)")
        part = work / f"wheels-{version}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / listed.name).write_text(wanted)
        download: list[str | Path] = [*PIP, "download", "-q", "--dest", part, "--python-version", version]
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        advice = "look at the network and pip's settings (pip config list)"
        call([*download, "--only-binary=:all:", *platforms, "-r", part / listed.name], "fetch the wheels", advice)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    shutil.rmtree(source, ignore_errors=True)
    for name in FROM_CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source)
    for before in folder.glob("edge_runtime-*.whl"):
        before.unlink()
    build: list[str | Path] = [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    call(build, "make edge-runtime's wheel", "read the message")
    return folder
