"""Real memory limits for processes of a demo, bench or test: a cgroup each, v1 or v2, where this machine allows it.

A process joins before it becomes the program, so that all its memory counts. Needs root, or a delegated cgroup.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.hardware import memory_cgroups

JOIN = 'echo $$ > "$0"; exec "$@"'  # for sh -c: join the cgroup named by $0, then become the program


class MemoryLimit:
    """A memory cgroup below our own. `enforced` tells whether this machine allowed it."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.folder: Path | None = None
        for parent, version in memory_cgroups()[:1]:
            folder = parent / f"edge-{os.getpid()}-{name}"
            try:
                folder.mkdir()
                limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
                (folder / limit).write_text(str(limit_bytes))
                if version == 2 and (folder / "memory.swap.max").exists():
                    (folder / "memory.swap.max").write_text("0")
                self.folder = folder
            except OSError:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    @property
    def enforced(self) -> bool:
        """Whether the kernel keeps the limit."""
        return self.folder is not None

    def command(self, program: Sequence[str]) -> list[str]:
        """The program's command line, run within the limit."""
        if self.folder is None:
            return list(program)
        return ["/bin/sh", "-c", JOIN, str(self.folder / "cgroup.procs"), *program]

    def remove(self) -> None:
        """Delete the cgroup; its processes must have ended."""
        for _ in range(40):
            if self.folder is None or not self.folder.exists():
                return
            with contextlib.suppress(OSError):
                for child in self.folder.glob("edge-*"):
                    child.rmdir()
                self.folder.rmdir()
                return
            time.sleep(0.05)
