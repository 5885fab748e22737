"""The small public surface of `import edge_runtime`: what it names, and that no more and no less is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import edge_runtime
from edge_runtime.errors import EdgeError

PUBLIC = {"DataOptions", "Device", "Prediction", "Predictor", "TrainSettings", "plan", "train"}


def test_all_is_sorted_and_complete() -> None:
    assert list(edge_runtime.__all__) == sorted(PUBLIC)


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(edge_runtime.__file__).read_text())
    (checking,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {
        alias.name: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(seen) == PUBLIC
    for name, module in seen.items():
        assert getattr(edge_runtime, name) is getattr(importlib.import_module(str(module)), name)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(edge_runtime, name))


def test_star_import_gives_exactly_these() -> None:
    code = "from edge_runtime import *; print(sorted(n for n in dir() if not n.startswith('__')))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(shown) == sorted(PUBLIC)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = edge_runtime.Trainer


def test_every_error_has_an_exit_code_of_its_own_and_says_when() -> None:
    errors: list[type[EdgeError]] = [
        EdgeError,
        *(e for e in EdgeError.__subclasses__() if not e.__module__.startswith("tools.")),
    ]
    assert len({error.exit_code for error in errors}) == len(errors)
    for error in errors:
        assert f"Exit code {error.exit_code}." in (inspect.getdoc(error) or "")
