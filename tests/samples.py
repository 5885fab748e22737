"""One sound value of every record that travels, random ones for hypothesis, a small model: what several tests need.

Every field of the fixed values is given, so that another default changes no golden byte. Imports the runtime.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from typing import Annotated, Any, Union

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from edge_runtime.manifest import Manifest, StoredTensor
from edge_runtime.model import EMBED, ModelSpec, TensorSpec
from edge_runtime.records import Budget, CostRow, Plan, Pruning, Range, TrainSettings
from edge_runtime.wire import (
    DEFAULT_INT,
    DEFAULT_TEXT,
    Ack,
    Answer,
    Ask,
    BlobRange,
    Coordinator,
    Grant,
    Join,
    Missing,
    Model,
    Need,
    Offer,
    Round,
    Status,
    encode,
)

DEVICE_COMMANDS = (
    "", "profile", "plan", "train", "join", "prune", "export", "predict", "serve", "ask", "models", "doctor", "service",
)  # fmt: skip
BOOT = bytes.fromhex("b007b007b007b007")
NONCE = bytes(range(16))
BLOB = hashlib.sha256(b"blob").digest()
OTHER = hashlib.sha256(b"other").digest()
HEAD_ROW = CostRow(0, False, 16, 180 << 20, 0.25, 12.5, 9_240)
DEEP_ROW = CostRow(2, True, 4, 250 << 20, 1.75, 87.5, 3_600_000, codec="int8")
SETTINGS = TrainSettings(1, 16, 3e-4, 3e-3, 0.01, "adamw", 7)
BUDGET = Budget(300 << 20, 900.0, None)

MESSAGES: dict[str, Any] = {
    "st": Status("online", "0.1.0", 3, "training", 4, 17, 120),
    "coord": Coordinator("up", 2, "0.1.0"),
    "model": Model(3, BLOB, 51_200, False),
    "round": Round("first", 4, 2, 3, "caff", SETTINGS, 60.0),
    "join": Join("first", 4, BOOT, 800, BUDGET, (HEAD_ROW, DEEP_ROW), 180 << 20, ""),
    "grant": Grant(
        "first", 4, NONCE, 3, Plan(DEEP_ROW, SETTINGS, 50, (), "", Pruning(b"\xa8\xff", 0.5, 20, "lora")), 3600.0
    ),
    "offer": Offer("first", 4, NONCE, BLOB, 3_500_000, "int8+zlib", 800, 88.25, 240 << 20, 1.5, 0.75, b"\xa0\x0f"),
    "ack": Ack("first", 4, "rejected", "the update has 3 bytes, its plan 4: größer", BLOB),
    "need": Need((BlobRange(BLOB, 0, 65_536), BlobRange(OTHER, 1 << 20, 5 << 20))),
    "missing": Missing(BLOB),
    "ask": Ask(NONCE, ("Where is the Louvre ?", "")),
    "answer": Answer(NONCE, ("place", "größe"), (0.75, 1.0), 3, ""),
}


def quickly(max_examples: int) -> settings:
    """The same examples at every run, however slow the machine."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None, suppress_health_check=health
    )


def message(kind: str) -> bytes:
    """The fixed message of a kind, in its envelope."""
    return encode(MESSAGES[kind], sent_at=1_700_000_000.5, boot=BOOT, sequence=42)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value that a type hint of a record allows, bounds included; lists stay short."""
    bounds: Range | None = None
    if typing.get_origin(kind) is Annotated:
        kind, *extra = typing.get_args(kind)
        bounds = next((e for e in extra if isinstance(e, Range)), None)
    if typing.get_origin(kind) in (Union, types.UnionType):
        (inner,) = [c for c in typing.get_args(kind) if c is not type(None)]
        return st.none() | values(Annotated[inner, bounds] if bounds else inner)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{f.name: values(hints[f.name]) for f in dataclasses.fields(kind)})
    if typing.get_origin(kind) is tuple:
        low = int(bounds.low) if bounds else 0
        return st.lists(values(typing.get_args(kind)[0]), min_size=low, max_size=low + 3).map(tuple)
    if kind is bool:
        return st.booleans()
    if kind is int:
        bounds = bounds or DEFAULT_INT
        return st.integers(int(bounds.low), int(bounds.high))
    if kind is float:
        low_high = (bounds.low, bounds.high) if bounds else (None, None)
        return st.floats(*low_high, allow_nan=False, allow_infinity=False)
    bounds = bounds or DEFAULT_TEXT
    make = st.binary if kind is bytes else _text
    return make(min_size=int(bounds.low), max_size=int(bounds.high))


def _text(min_size: int, max_size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=min_size, max_size=min(max_size, min_size + 20))


def small_spec(num_blocks: int = 2, width: int = 3) -> ModelSpec:
    """A made-up architecture: an embedding, blocks of two tensors, a head with a scalar."""
    tensors = [TensorSpec("embed", (5, width), EMBED)]
    for block in range(num_blocks):
        tensors += [
            TensorSpec(f"block.{block}.w", (width, width), block),
            TensorSpec(f"block.{block}.b", (width,), block),
        ]
    tensors += [TensorSpec("head.w", (2, width), num_blocks), TensorSpec("head.scale", (), num_blocks)]
    config: dict[str, int | float | str] = {"layers": num_blocks, "eps": 1e-12, "act": "gelu"}
    return ModelSpec("some.family", config, ("no", "yes"), 64, num_blocks, width, 1, 4 * width, tuple(tensors))


def small_manifest(**changes: Any) -> Manifest:
    """A sound manifest of `small_spec()`, or one with changes."""
    spec = small_spec()
    tensors = tuple(
        StoredTensor(t.name, t.shape, t.part, hashlib.sha256(t.name.encode()).digest()) for t in spec.tensors
    )
    manifest = Manifest(
        format=1,
        version=3,
        family=spec.family,
        config_json='{"act": "gelu", "eps": 1e-12, "layers": 2}',
        labels=spec.labels,
        max_length=spec.max_length,
        num_blocks=spec.num_blocks,
        hidden=spec.hidden,
        heads=spec.heads,
        feed_forward=spec.feed_forward,
        tokenizer=OTHER,
        tokenizer_bytes=700,
        tensors=tensors,
        method="caff",
        parent=BLOB,
    )
    return dataclasses.replace(manifest, **changes)
