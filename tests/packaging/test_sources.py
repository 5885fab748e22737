"""All sources: they parse on the oldest Python we promise, and name no machine and no package index."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("edge_runtime", "coordinator", "models", "tests", "tools", "docs", ".ci")
TEXTS = (".py", ".md", ".cfg", ".toml", ".sh", "")
OLDEST = (3, 10)
# Written in pieces, so that this file does not name them itself.
INDEX = "|".join(
    (
        "py" + "pi" + r"\.org",
        "python" + r"hosted\.org",
        "index" + r"-url\W+(?:file|http)",
        r"download\.py" + r"torch\.org",
    )
)
PLACES = "|".join(("/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/[a-z]", "/tmp" + r"/[a-z]", "/o" + "pt/"))


def files() -> Iterator[Path]:
    """Every text of the repository that people write."""
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in TEXTS and path.name != ".git":
            yield path
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            hidden = any(
                part.startswith(".") or part == "__pycache__" or part.endswith(".egg-info")
                for part in path.relative_to(ROOT / folder).parts
            )
            if path.is_file() and not hidden and path.suffix in TEXTS:
                yield path


SOURCES = [path for path in files() if path.suffix == ".py"]


def test_there_are_sources() -> None:
    assert len(SOURCES) > 50


def test_every_source_parses_as_the_oldest_python() -> None:
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=OLDEST)


def test_every_import_of_the_standard_library_is_as_old() -> None:
    """feature_version checks the grammar alone: newer modules and names would pass it."""
    newer = {"tomllib", "wsgiref.types"}
    names = {
        ("typing", n)
        for n in ("Self", "override", "assert_never", "LiteralString", "Never", "Unpack", "TypeVarTuple", "NotRequired")
    }
    names |= {
        ("enum", "StrEnum"),
        ("datetime", "UTC"),
        ("contextlib", "chdir"),
        ("itertools", "batched"),
        ("asyncio", "TaskGroup"),
        ("asyncio", "timeout"),
    }
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            id(n)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "version_info" in ast.unparse(node.test)
            for n in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in guarded:
                continue
            if isinstance(node, ast.Import):
                assert not newer & {alias.name for alias in node.names}, f"{path}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module not in newer, f"{path}:{node.lineno}"
                assert not names & {(node.module or "", alias.name) for alias in node.names}, f"{path}:{node.lineno}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in names, f"{path}:{node.lineno}"


@pytest.mark.parametrize("pattern", [INDEX, PLACES], ids=["index", "machine"])
def test_no_file_names_a_package_index_or_a_place_on_somebodys_machine(pattern: str) -> None:
    found = []
    for path in files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if re.search(rf"(?<![\w.~$)}}-])(?:{pattern})" if pattern is PLACES else pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_every_module_opens_with_what_it_is() -> None:
    for path in SOURCES:
        if "tests" not in path.relative_to(ROOT).parts[:1]:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_this_python_is_one_that_we_promise() -> None:
    assert OLDEST <= sys.version_info[:2] <= (3, 13)
