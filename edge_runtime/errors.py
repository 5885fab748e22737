"""Every error a caller of edge-runtime can meet, sorted by what the caller can do about it.

The messages say what was wanted, what came and what to do. `exit_code` is what the command lines return; the
codes are documented in README.md and stay stable. Imports nothing.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Root of the tree. Exit code 1."""

    exit_code = 1


class UsageError(EdgeError):
    """The call, a flag or a configuration file is wrong: correct it and call again. Exit code 2."""

    exit_code = 2


class DataError(EdgeError):
    """A data file or one of its rows cannot be used: correct the file. Exit code 3."""

    exit_code = 3


class ModelError(EdgeError):
    """A checkpoint, manifest or exported model cannot be used: fetch it again or choose another. Exit code 4."""

    exit_code = 4


class BadVersion(ModelError):
    """One version of a fleet's model cannot be used here, another may. Exit code 4, as `ModelError`."""

    def __init__(self, message: str, *, version: int, manifest: bytes) -> None:
        super().__init__(message)
        self.version = version
        self.manifest = manifest  # SHA-256 of its manifest


class DoesNotFit(EdgeError):
    """Nothing fits the budgets: raise a budget or choose a smaller model. Exit code 5."""

    exit_code = 5

    def __init__(self, message: str, *, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class TrainingFailed(EdgeError):
    """The training process ended without a result (killed, out of memory, not finite). Exit code 6."""

    exit_code = 6

    def __init__(self, message: str, *, out_of_memory: bool = False, killed: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory
        self.killed = killed  # by something else than its limit: the same again may work


class ConnectionFailed(EdgeError):
    """The broker or the coordinator cannot be reached or refuses us: check address and credentials. Exit code 7."""

    exit_code = 7


class MissingExtra(EdgeError):
    """An optional part is not installed: run the pip command in the message. Exit code 8."""

    exit_code = 8


class WireError(EdgeError):
    """Bytes from the network that no decoder accepts. The only error a decoder raises. Exit code 9."""

    exit_code = 9


class StoreError(EdgeError):
    """The disk is full or a stored file is damaged. Exit code 10."""

    exit_code = 10
