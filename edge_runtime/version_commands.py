"""`edge-runtime models`: which versions a device holds, which of them answers, and choosing another.

Not the versions themselves (`versions.py`), not the flags (`cli.py`). Only `commands.py` imports it, when the command runs.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from edge_runtime.console import print_json, table
from edge_runtime.errors import ModelError
from edge_runtime.planner import mib
from edge_runtime.versions import Held, Versions, is_state_folder, read_versions, rollback, use


def list_versions(args: Namespace) -> int:
    """Print the versions that are whole here, newest first."""
    versions = read_versions(_state(args.state))
    if args.json:
        for held in versions.held:
            print_json(_record(versions, held))
        return 0
    rows = [
        [str(h.manifest.version), h.manifest.method or "-", mib(_size(h)), mib(versions.own_bytes(h)), _words(versions, h)]
        for h in versions.held
    ]  # fmt: skip
    print(table(("model", "method", "size", "its own", ""), rows))
    return 0


def use_version(args: Namespace) -> int:
    """Pin a version, or follow the newest again."""
    number = None if args.version == "newest" else int(args.version)
    held = use(_state(args.state), number)
    if args.json:
        print_json({"model_version": held.manifest.version, "pinned": number is not None})
    else:
        stays = "and stays until you choose again" if number is not None else "and each newer one as it comes"
        print(f"model {held.manifest.version} answers, {stays}")
    return 0


def roll_back(args: Namespace) -> int:
    """Pin the version before the one that answers."""
    now, before = rollback(_state(args.state))
    number = now.manifest.version if now else None
    if args.json:
        print_json({"model_version": before.manifest.version, "pinned": True, "before": number})
    else:
        print(
            f"model {before.manifest.version} answers in place of {number}, and stays until `edge-runtime models use {args.state} newest`"
        )
    return 0


def _state(folder: Path) -> Path:
    if not is_state_folder(folder):
        raise ModelError(f"{folder} is not the --state folder of a device that holds a model: correct the path")
    return folder


def _size(held: Held) -> int:
    return sum(held.manifest.blobs().values())


def _record(versions: Versions, held: Held) -> dict[str, object]:
    return {
        "model_version": held.manifest.version,
        "manifest": held.blob.hex(),
        "method": held.manifest.method,
        "newest": held is versions.held[0],
        "answers": held == versions.answering,
        "pinned": held.blob.hex() == versions.choice.use,
        "checked": held.blob.hex() == versions.choice.checked,
        "bad": versions.choice.mark(held.blob).bad,
        "num_bytes": _size(held),
        "own_bytes": versions.own_bytes(held),
    }


def _words(versions: Versions, held: Held) -> str:
    record = _record(versions, held)
    words = [word for word in ("answers", "newest", "pinned", "checked") if record[word]]
    return ", ".join([*words, *([f"bad: {record['bad']}"] if record["bad"] else [])])
