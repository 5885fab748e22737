"""The demo's data sets: how each is read, and, where this machine has the data, how many rows it truly has."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from edge_models.packages import cached
from edge_runtime.data import read_examples
from edge_runtime.errors import DataError, UsageError
from tools import datasets
from tools.datasets import NEWS_FILES, NEWS_PACKAGE, TREC_FILE, TREC_PACKAGE, TREC_SHA256, DataSet, Row, load, write_csv
from tools.tfidf import sample, tfidf_accuracy

SEVEN = [f"HUM:ind who is number {i} ?" for i in range(7)]
EIGHT = [f"LOC:city where is number {i} ?" for i in range(8)]


def package(name: str, **fields: str) -> list[str]:
    fields = {"Section": "games", "Description": f"text of {name}", "Maintainer": "Ann <ann@example.org>", **fields}
    return [f"Package: {name}\n", *(f"{key}: {value}\n" for key, value in fields.items()), "\n"]


def many(section: str, count: int = datasets.DEBIAN_MIN_EXAMPLES) -> list[str]:
    return [line for i in range(count) for line in package(f"{section}-{i:03}", Section=section)]


def test_a_trec_question_counts_once_and_rare_labels_are_dropped() -> None:
    rows = datasets.parse_trec([*SEVEN, *EIGHT, *EIGHT, EIGHT[0].upper(), SEVEN[0]])
    assert Counter(row.label for row in rows) == {"LOC:city": 8}
    assert rows[0] == Row("where is number 0 ?", "LOC:city")


def test_debian_packages_of_one_source_and_section_give_the_first_row_by_name() -> None:
    lines = many("games") + package("zoo-b", Source="zoo (1.2)") + package("zoo-a", Source="zoo")
    rows = [row for row in datasets.parse_debian(lines) if "zoo" in row.text]
    assert rows == [Row("text of zoo-a", "games", "Ann <ann@example.org>")]


def test_debian_rows_do_not_depend_on_the_order_of_the_packages() -> None:
    first, second = package("zoo", Description="The same"), package("ape", Description="the same")
    forth = datasets.parse_debian(many("games") + first + second)
    assert forth == datasets.parse_debian(second + first + many("games"))
    assert [row.text for row in forth if row.text.lower() == "the same"] == ["the same"]


def test_debian_sections_that_are_no_subject_or_too_small_are_dropped() -> None:
    lines = [line for section in ("games", "libs", "doc", "oldlibs") for line in many(section)] + many("news", 10)
    assert {row.label for row in datasets.parse_debian(lines)} == {"games"}


def test_debian_sections_outside_main_count_as_their_subject_and_long_values_are_cut() -> None:
    extra = package("x", Section="non-free/games", Description="short\n and the long one\n .\n with more")
    assert Row("short", "games", "Ann <ann@example.org>") in datasets.parse_debian(
        "".join(many("games") + extra).splitlines()
    )


def test_newsgroups_rows_follow_four_header_lines() -> None:
    lines = ["Category\tText\n", "d\tstring\n", "class\t\n", "\n", "sci.med\tsome post\n", "sci.med\t \n"]
    assert datasets.parse_newsgroups(lines) == [Row("some post", "sci.med")]


def test_written_rows_read_back_with_the_device_code(tmp_path: Path) -> None:
    rows = [Row('a "quoted", text\nof two lines', "x", "group"), Row("héllo\r", "y")]
    write_csv(rows, tmp_path / "new" / "train.csv")
    found = read_examples(tmp_path / "new" / "train.csv")
    assert [(row.text, row.label) for row in found.rows] == [(row.text, row.label) for row in rows]


def test_an_unknown_data_set_is_a_usage_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="trec, trec-coarse, debian, newsgroups"):
        load("mnist")


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="there is no apt-cache here"):
        load("debian")


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="this machine has no apt")
def test_empty_apt_lists_ask_for_apt_get_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/cache";\n')
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    with pytest.raises(DataError, match="run sudo apt-get update"):
        load("debian")


def test_the_command_writes_nothing_and_says_why_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert datasets.main(["debian", "--dir", str(tmp_path / "out")]) == DataError.exit_code
    assert "error: the data set 'debian'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def no_text_is_in_train_and_test(data: DataSet) -> bool:
    return not {row.text for row in data.train} & {row.text for row in data.test}


needs_trec = pytest.mark.skipif(
    cached(TREC_PACKAGE, {TREC_FILE: TREC_SHA256}) is None,
    reason="not in the cache: run python -m tools.datasets trec --dir DIR once",
)


@needs_trec
def test_trec_has_45_labels_and_5357_questions() -> None:
    data = load("trec")
    assert (len(data.train), len(data.test)) == (4289, 1068)
    assert {row.label for row in data.train} == {row.label for row in data.test}
    assert len({row.label for row in data.train}) == 45
    assert no_text_is_in_train_and_test(data)


@needs_trec
def test_trec_coarse_is_the_same_questions_under_6_labels() -> None:
    fine, coarse = load("trec"), load("trec-coarse")
    assert [row.text for row in coarse.test] == [row.text for row in fine.test]
    assert {row.label for row in coarse.train} == {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}


@needs_trec
def test_tfidf_reaches_78_percent_on_trec() -> None:
    pytest.importorskip("sklearn")
    data = load("trec")
    assert tfidf_accuracy(data.train, data.test) == pytest.approx(0.78, abs=0.01)


@pytest.mark.skipif(
    cached(NEWS_PACKAGE, NEWS_FILES) is None,
    reason="not in the cache: run python -m tools.datasets newsgroups --dir DIR once",
)
def test_newsgroups_has_its_own_train_and_test_posts() -> None:
    data = load("newsgroups")
    assert (len(data.train), len(data.test)) == (11293, 7528)
    assert len({row.label for row in data.train}) == 20


def apt_has_lists() -> bool:
    if shutil.which("apt-cache") is None:
        return False
    return bool(subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=False).stdout[:1])


@pytest.mark.skipif(not apt_has_lists(), reason="apt has no package lists here: run apt-get update")
def test_debian_has_dozens_of_sections_and_maintainers_of_few_kinds() -> None:
    """Loose bounds: the archive differs from release to release. Debian 12: 26,015 and 6,502 rows, 40 labels."""
    data = load("debian")
    assert len(data.train) > 15_000
    assert len(data.train) / len(data.test) == pytest.approx(4, rel=0.01)
    assert 30 <= len({row.label for row in data.train}) <= 60
    assert len({row.group for row in data.train}) > 1000
    assert no_text_is_in_train_and_test(data)


def test_tfidf_tells_two_vocabularies_apart() -> None:
    pytest.importorskip("sklearn")
    rows = [Row(f"alpha beta {i}", "greek") for i in range(9)] + [Row(f"aleph bet {i}", "hebrew") for i in range(9)]
    assert tfidf_accuracy(rows, [Row("beta", "greek"), Row("bet", "hebrew"), Row("aleph", "greek")]) == pytest.approx(
        2 / 3
    )


def test_a_sample_is_the_same_each_time_and_at_most_all_rows() -> None:
    rows = [Row(str(i), "x") for i in range(50)]
    assert sample(rows, 10, seed=1) == sample(rows, 10, seed=1)
    assert len(set(sample(rows, 10, seed=1))) == 10
    assert sorted(sample(rows, None, seed=1), key=lambda row: int(row.text)) == rows
