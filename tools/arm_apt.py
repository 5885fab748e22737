"""Debian packages of another release and architecture, by this machine's apt, without root and without touching it.

All comes from where apt already looks: it gets a state folder of its own, and the machine's own source entries with another
release in them. Packages are unpacked, never installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import UsageError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TRIES = 3  # of a download: mirrors change while they are read
KEPT_OPTIONS = {"signed-by": "Signed-By", "trusted": "Trusted"}


def sources_for(texts: Sequence[str], own: str, wanted: str) -> str:
    """This machine's entries for Debian release `own`, as entries for the release `wanted`: main alone, no updates.

    Args:
        texts: files of apt's sources, of either format.
    """
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        for fields in [*_paragraphs(text), *_one_line(text)]:
            words = fields.get("Suites", "").split()
            if own in words and "main" in fields.get("Components", "").split() and "deb" in fields["Types"].split():
                kept = {key: fields[key] for key in KEPT_OPTIONS.values() if key in fields}
                found.setdefault(fields["URIs"], {"Types": "deb", "URIs": fields["URIs"], **kept})
    entries = [{**fields, "Suites": wanted, "Components": "main"} for fields in found.values()]
    return "\n".join("".join(f"{key}: {value}\n" for key, value in entry.items()) for entry in entries)


def _paragraphs(text: str) -> list[dict[str, str]]:
    """Entries of a deb822 file that are not switched off."""
    found = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", block, re.MULTILINE))
        if "Types" in fields and "URIs" in fields and fields.get("Enabled", "yes").strip().lower() != "no":
            found.append({key: value.strip() for key, value in fields.items()})
    return found


def _one_line(text: str) -> list[dict[str, str]]:
    """Entries of a sources.list."""
    found = []
    for line in text.splitlines():
        if entry := re.match(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+?)\s*(?:#.*)?$", line):
            options = dict(option.split("=", 1) for option in (entry[1] or "").split() if "=" in option)
            kept = {name: options[key] for key, name in KEPT_OPTIONS.items() if key in options}
            found.append({"Types": "deb", "URIs": entry[2], "Suites": entry[3], "Components": entry[4], **kept})
    return found


def machine_sources(wanted: str, mirror: str, root: Path = Path("/")) -> str:
    """Sources for a Debian release: `mirror`'s, else what this machine's apt has.

    Raises:
        UsageError: this is no Debian, and no mirror was named.
    """
    if mirror:
        return f"Types: deb\nURIs: {mirror}\nSuites: {wanted}\nComponents: main\nSigned-By: {KEYRING}\n"
    folder = root / "etc/apt"
    files = [
        folder / "sources.list",
        *sorted(folder.glob("sources.list.d/*.list")),
        *folder.glob("sources.list.d/*.sources"),
    ]
    release = (root / "etc/os-release").read_text() if (root / "etc/os-release").exists() else ""
    own = re.search(r"^VERSION_CODENAME=\"?(\w+)", release, re.MULTILINE)
    found = sources_for([file.read_text() for file in files if file.is_file()], own[1] if own else "", wanted)
    if re.search(r"^ID=\"?debian\b", release, re.MULTILINE) is None or not found:
        raise UsageError(
            "apt has no Debian sources here: name a Debian mirror with --mirror, and install debian-archive-keyring"
        )
    return found


def call(command: Sequence[str | Path], what: str, advice: str, cwd: Path | None = None) -> str:
    """Run a command; -> what it printed.

    Raises:
        UsageError: it is not here or failed: what was wanted, its last words, what to do.
    """
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, cwd=cwd, check=False
        )
    except FileNotFoundError:
        raise UsageError(f"cannot {what}: there is no {command[0]} here") from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if re.match(r"E:|ERROR|error", line)]
        words = " ".join((said or done.stderr.strip().splitlines())[-3:])
        raise UsageError(f"cannot {what}: {words or f'ended with {done.returncode}'}: {advice}")
    return done.stdout


@dataclass(frozen=True)
class Apt:
    """apt for one Debian release and architecture, with all its state in `folder`."""

    folder: Path
    release: str
    architecture: str
    mirror: str

    def command(self, *words: str | Path) -> list[str | Path]:
        """An apt-get command line that touches nothing outside of the folder."""
        options = {
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Sandbox::User": "root",  # its own user cannot write to our folder
            "Debug::NoLocking": "1",
            "Dir::State": self.folder,
            "Dir::State::Lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            "Dir::Etc::sourcelist": self.folder / "debian.sources",
            "Dir::Etc::sourceparts": "/dev/null",
        }
        return ["apt-get", "-q", *(word for key, value in options.items() for word in ("-o", f"{key}={value}")), *words]

    def fetch(self, *words: str) -> None:
        """Update the lists, then `apt-get WORDS` in the folder, where packages stay; three tries.

        Raises:
            UsageError: it cannot be had.
        """
        for part in ("lists/partial", "cache/archives/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        (self.folder / "debian.sources").write_text(machine_sources(self.release, self.mirror))
        what = f"fetch {words[-1]} of Debian {self.release} for {self.architecture}"
        advice = "look at the network, and whether apt's mirror has that release; try again later"
        for left in reversed(range(TRIES)):
            with contextlib.suppress(UsageError) if left else contextlib.nullcontext():
                call(self.command("update", "--error-on=any"), what, advice)
                call(self.command(*words), what, advice, cwd=self.folder)
                return


def unpack(package: Path, folder: Path, members: Sequence[str] = ()) -> None:
    """Unpack a Debian package into a folder, or those of its files alone that match."""
    folder.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
        chosen = ["--wildcards", *members] if members else []
        done = subprocess.run(
            ["tar", "-x", "-C", folder, *chosen], stdin=archive.stdout, capture_output=True, text=True, check=False
        )
    if done.returncode or archive.returncode:
        raise UsageError(f"cannot unpack {package}: {done.stderr.strip()[-200:]}: delete it and start again")
