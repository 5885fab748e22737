"""A folder that holds a trained model: written so that a kill at any moment leaves the old model or the new one, never of both.

    .next.PID.*/   being written
    .next/         whole: `finish_folder` moves its files to their places, the config last
    config.json, model.safetensors or delta.safetensors, tokenizer.json

Not how such a folder is read (`source.py`). Imports the store and the weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.errors import UsageError
from edge_runtime.model import ModelSpec, load_family
from edge_runtime.store import (
    atomic_writer,
    disk_errors,
    file_sha256,
    gone_if_empty,
    read_json,
    scratch_folder,
    sync_folder,
    write_json,
)
from edge_runtime.weights import MappedTensor, write_safetensors

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
DELTA_FILE = "delta.safetensors"  # in place of WEIGHTS_FILE: the tensors that are not those of the base folder
BASE_KEY = "edge_base"  # in config.json beside it: which folder that is
NEXT = ".next"
DRAFT = NEXT + "."  # and the number of the process


def check_model_folder(out: Path) -> None:
    """Whether a model may be written to `out`: a new or empty folder, or one that holds a model that we wrote.

    Raises:
        UsageError: it is a file, or a folder with other things in it.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: name a folder for the model")
    others = [p.name for p in out.glob("*") if not p.name.startswith(".")] if out.exists() else []
    if others and '"edge_family"' not in read_config(out):
        raise UsageError(f"{out} holds other things ({sorted(others)[0]}): name a new folder for the model")


def save_folder(
    out: Path,
    spec: ModelSpec,
    weights: Mapping[str, MappedTensor],
    tokenizer: Path,
    base: Path | None = None,
    *,
    has_head: bool = True,
) -> None:
    """Write a checkpoint folder: config.json, model.safetensors and tokenizer.json, which other tools read too.

    Without `has_head` a model that knows no classes, as pretrained ones are. With `base`, a checkpoint folder, only the tensors that are not that folder's are written, to delta.safetensors, and
    config.json names it: only edge-runtime reads that, and only while the base stays as it is.

    A process that is killed leaves the model that was there, or the new one whole: the next command that opens the folder finishes.
    """
    check_model_folder(out)
    config: dict[str, Any] = {
        **spec.config,
        "model_type": spec.family.rsplit(".", 1)[-1],
        "edge_family": spec.family,
        "edge_max_length": spec.max_length,
    }
    if has_head:
        config["id2label"] = {str(i): label for i, label in enumerate(spec.labels)}
        config["label2id"] = {label: i for i, label in enumerate(spec.labels)}
    finish_folder(out)
    with disk_errors(out), gone_if_empty(out), scratch_folder(out, DRAFT) as draft:
        if base is None:
            tensors = [t for t in spec.tensors if has_head or t.part < spec.num_blocks]
            write_safetensors(draft / WEIGHTS_FILE, [(t.name, weights[t.name]) for t in tensors])
        else:
            _, there = load_family(spec.family).open_folder(base)
            changed = [(t.name, weights[t.name]) for t in spec.tensors if weights[t.name] != there.get(t.name)]
            write_safetensors(draft / DELTA_FILE, changed)
            config[BASE_KEY] = {"folder": str(base), "files": identities(there)}
        with atomic_writer(draft / TOKENIZER_FILE, mode=0o644) as file:
            file.write(tokenizer.read_bytes())
        write_json(draft / CONFIG_FILE, config)
        draft.rename(out / NEXT)
        sync_folder(out)
        finish_folder(out)


def finish_folder(folder: Path) -> None:
    """Put a model that was written whole in the place of the one before it, where a process was killed between its files.

    Raises:
        StoreError: this user may not write there.
    """
    waiting = folder / NEXT
    if not waiting.is_dir():
        return
    with disk_errors(folder), contextlib.suppress(FileNotFoundError):  # another process does the same
        found = {path.name for path in waiting.iterdir()}
        if CONFIG_FILE in found:  # it goes last
            is_delta = BASE_KEY in read_json(waiting / CONFIG_FILE)
            for name in (DELTA_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CONFIG_FILE):
                if name == CONFIG_FILE:
                    (folder / (WEIGHTS_FILE if is_delta else DELTA_FILE)).unlink(missing_ok=True)
                if name in found:
                    os.replace(waiting / name, folder / name)
        waiting.rmdir()
        sync_folder(folder)


def read_config(folder: Path) -> str:
    """The text of a folder's config.json, "" where there is none that can be read."""
    try:
        return (folder / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def identities(weights: Mapping[str, MappedTensor]) -> dict[str, dict[str, int | str]]:
    """What tells each file of these tensors from any other, by its name; for `unchanged`."""
    return {path.name: _identity(path) for path in _files(weights)}


def unchanged(weights: Mapping[str, MappedTensor], recorded: Any) -> bool:
    """Whether the tensors' files are those that were recorded; a copy with another time is."""
    files = _files(weights)
    if not isinstance(recorded, dict) or set(recorded) != {path.name for path in files}:
        return False
    for path in files:
        then, status = recorded[path.name], os.stat(path)
        if not isinstance(then, dict) or then.get("num_bytes") != status.st_size:
            return False
        if then.get("mtime_ns") != status.st_mtime_ns and then.get("sha256") != file_sha256(path).hex():
            return False
    return True


def _files(weights: Mapping[str, MappedTensor]) -> list[Path]:
    return [Path(path) for path in sorted({t.path for t in weights.values()})]


def _identity(path: Path) -> dict[str, int | str]:
    """Its hash; its length and time say cheaply that nobody has written to it."""
    status = path.stat()
    return {"sha256": file_sha256(path).hex(), "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
