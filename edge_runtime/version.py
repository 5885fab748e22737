"""Which edge-runtime this is, for status messages and `--version`.

Not here: the versions of torch and Python that a calibration belongs to (`calibration.py`). Imports nothing of ours.
"""

from __future__ import annotations


def software() -> str:
    """The installed version, or "source" where the package runs from a folder without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edge-runtime")
    except PackageNotFoundError:
        return "source"
