"""Imports of what the base install does not have, with an error that names the pip command. Imports nothing heavy."""

from __future__ import annotations

import importlib
from types import ModuleType

from edge_runtime.errors import MissingExtra


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra carries it.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # the module is there, something inside it is not: that is not a missing extra
        raise MissingExtra(f"{module} is needed for this and is not installed: {install_command(extra)}") from error


def install_command(extra: str) -> str:
    """How a person gets an extra: from a checkout, since there is no package on an index."""
    return f"in the checkout, pip install '.[{extra}]'"
