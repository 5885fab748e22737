"""What a model is, in names, shapes and numbers: enough to plan, to ship and to aggregate it.

Holds no weights and imports no torch: both sides of the wire use it. Where the weights lie is `weights.py`; what
a model family's module must offer is the `Family` protocol below.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edge_runtime.errors import ModelError

if TYPE_CHECKING:
    from edge_runtime.weights import MappedTensor

EMBED = -1  # the part number of everything before block 0
ConfigValue = int | float | str


@dataclass(frozen=True)
class TensorSpec:
    """One named float32 tensor of a model.

    Attributes:
        name: the public checkpoint's parameter name.
        shape: its dimensions; () is a scalar.
        part: EMBED, the number of its block, or the number of blocks for the head. So the suffix of depth t is
            every tensor with `part >= num_blocks - t`, and depth 0 is the head alone.
    """

    name: str
    shape: tuple[int, ...]
    part: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes as float32."""
        return 4 * self.size

    @property
    def is_adapted(self) -> bool:
        """Whether LoRA gives it an adapter: the matrix of a linear layer in a block."""
        return len(self.shape) == 2 and self.name.endswith(".weight")


@dataclass(frozen=True)
class ModelSpec:
    """An architecture with its task: what a family's `describe` returns.

    Attributes:
        family: import name of the family's module, for example "edge_models.bert".
        config: what the family needs to build the network again; flat, JSON values only.
        labels: the classes in the order of the logits.
        max_length: tokens after which a text is cut.
        num_blocks, hidden, heads, feed_forward: the shape that the cost formulas use.
        tensors: every tensor, in the one order used for manifests and updates.
    """

    family: str
    config: Mapping[str, ConfigValue]
    labels: tuple[str, ...]
    max_length: int
    num_blocks: int
    hidden: int
    heads: int
    feed_forward: int
    tensors: tuple[TensorSpec, ...]

    def suffix(self, depth: int) -> tuple[TensorSpec, ...]:
        """The tensors trained at suffix depth `depth` (0 = head only), in the model's order."""
        if not 0 <= depth <= self.num_blocks:
            raise ValueError(f"depth {depth} of a model with {self.num_blocks} blocks")
        return tuple(t for t in self.tensors if t.part >= self.num_blocks - depth)

    def part_bytes(self, part: int) -> int:
        """Bytes of one part as float32."""
        return sum(t.num_bytes for t in self.tensors if t.part == part)


class Family(Protocol):
    """What a model family's module offers. `describe` and `open_folder` work without torch.

    It may also have LAYER_NAMES, short names of a block's linear layers, such as {"q": "attention.self.query"}, and
    `public_name(name)`, the spec's name of a tensor that other tools call differently. What can be pruned it tells with
    HEAD_LAYERS and CHANNEL_LAYERS, (layers of whose rows, layers of whose columns) a head (hidden / heads of them) or a
    channel is made, and `with_widths(config, heads, channels)`, the config of a model with so many in each block.
    """

    def describe(self, config: Mapping[str, ConfigValue], labels: Sequence[str], max_length: int) -> ModelSpec:
        """The architecture as names, shapes and numbers."""

    def open_folder(self, folder: Path) -> tuple[dict[str, ConfigValue], dict[str, MappedTensor]]:
        """Config and tensor locations of a checkpoint folder; head tensors may be missing."""

    def build(self, spec: ModelSpec, tensors: Mapping[str, Any]) -> SplitModel:
        """The torch network over the given torch tensors, which it uses without copying."""


class SplitModel(Protocol):
    """A network cut where a suffix can begin (a `torch.nn.Module` whose parameter names are those of the spec).

    ids and mask are (batch, seq) int64, mask 1 for a token and 0 for padding.
    """

    blocks: Any  # torch.nn.ModuleList, applied in order: block(hidden, bias) -> hidden

    def embed(self, ids: Any, mask: Any) -> tuple[Any, Any]:
        """-> hidden (batch, seq, hidden) and the attention bias that every block gets."""

    def head(self, hidden: Any, mask: Any) -> Any:
        """-> logits (batch, labels)."""


def load_family(name: str) -> Family:
    """Import a family's module by name.

    Raises:
        ModelError: there is no such module, or it lacks a function of `Family`.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelError(f"model family {name!r} cannot be imported: it is no module's name")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"model family {name!r} cannot be imported ({error}): install it or correct the name"
        ) from None
    missing = [f for f in ("describe", "open_folder", "build") if not callable(getattr(module, f, None))]
    if missing:
        raise ModelError(f"{name!r} is not a model family: it has no {', '.join(missing)}()")
    return cast(Family, module)
