"""edge-runtime on an emulated Raspberry Pi 4: Debian's Python for ARM and the real wheels under QEMU, checked against this machine.

Run it as `tools/arm`, which makes the environment first. Here are its options and the order in which things happen; the
userland is in `arm_userland.py`, what is checked in `arm_checks.py`. Prints each step with its time, then a line for each check.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from edge_models.packages import cache_folder
from edge_runtime.console import run_main
from edge_runtime.errors import EdgeError, UsageError
from tools import arm_checks
from tools.arm_userland import PI2, PI4, SYSTEMS, qemu, userland, wheels

MARKER = ".edge-arm"


def main() -> int:
    """Parse and run; -> the exit code."""
    args = parser().parse_args()
    return run_main(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="tools/arm",
        description="Installs and runs edge-runtime as a Raspberry Pi 4 (Cortex-A72) would, under QEMU, without root: "
        "fetches Debian's Python for ARM, QEMU and the aarch64 wheels once, then takes some minutes.",
        epilog="examples:\n  tools/arm\n  tools/arm --system debian-13\n"
        "  tools/arm --work /var/tmp/arm --mirror http://debian.example/debian      # where apt has no Debian sources",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    systems = "Debian 12 has Python 3.11, as Raspberry Pi OS 12; Debian 13 has 3.13 (%(default)s)"
    made.add_argument("--system", choices=list(SYSTEMS), default="debian-12", help=systems)
    work = "what is fetched is kept here and found again (default: arm in edge-runtime's cache folder)"
    made.add_argument("--work", type=Path, metavar="FOLDER", help=work)
    made.add_argument("--mirror", default="", metavar="URL", help="a Debian mirror (default: the one in apt's sources)")
    return made


def run(args: argparse.Namespace) -> int:
    """Everything: fetch, unpack, check; -> the exit code: 0 only if every check passed."""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {line}", flush=True)

    work = work_folder(args.work or cache_folder() / "arm")
    say(
        f"{args.system} on {PI4.cpu}, from {platform.machine()}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, in {work}"
    )
    programs = qemu(work, args.mirror, say)
    arm, narrow = (userland(work, machine, args.system, programs, args.mirror, say) for machine in (PI4, PI2))
    lab = arm_checks.Lab(work, wheels(work, arm.version, say), arm, narrow, say)
    say("this machine: training MiniLM-L6 on questions, which is the model from here on")
    arm_checks.prepare(lab)
    failed = 0
    lines = []
    for name, check in arm_checks.CHECKS.items():
        say(f"check: {name}")
        begun = time.monotonic()
        try:
            verdict, found = "passed", check(lab)
        except (arm_checks.CheckFailed, EdgeError) as error:
            verdict, found = "FAILED", str(error)
            failed += 1
        say(f"       {verdict}")
        lines.append(f"{name:12} {verdict}  {time.monotonic() - begun:6.1f} s  {found}")
    print("\n" + "\n".join(lines))
    print(f"\n{len(lines) - failed} of {len(lines)} checks passed, {time.monotonic() - started:.0f} s")
    return EdgeError.exit_code if failed else 0


def work_folder(folder: Path) -> Path:
    """The folder, which is ours, with an empty one for this run's results."""
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise UsageError(f"{folder} has files that are not ours: name an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    shutil.rmtree(folder / "results", ignore_errors=True)
    (folder / "results/state").mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
