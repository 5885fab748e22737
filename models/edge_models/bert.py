"""The BERT family (BERT, MiniLM, DistilBERT): shapes, checkpoint folders and, through `build`, the torch network.

Offers the functions of `edge_runtime.model.Family`. `describe` and `open_folder` need neither torch nor numpy and
treat what they read as hostile; only `build` imports torch (in `_bert_torch.py`). Parameter names are those of the
public checkpoints; the head is a linear layer on the mean of the tokens (`classifier`), so poolers and heads for
other tasks are ignored. Not a tokenizer, not a trainer. May import `edge_runtime`'s model, weights and errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError
from edge_runtime.model import EMBED, ConfigValue, ModelSpec, TensorSpec
from edge_runtime.weights import MappedTensor, read_json_object, read_safetensors

if TYPE_CHECKING:
    from edge_models._bert_torch import Bert

MAX_LABELS = 1 << 16
WANTED = "config.json and model.safetensors"
ACTIVATIONS = ("gelu", "gelu_new", "relu")

# Whole numbers that a config must have, with the range that is taken for sane.
COUNTS = {
    "hidden_size": (1, 1 << 14),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 1 << 10),
    "intermediate_size": (1, 1 << 17),
    "vocab_size": (1, 1 << 22),
    "max_position_embeddings": (2, 1 << 17),
    "type_vocab_size": (0, 1 << 10),
}
DISTILBERT_CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
DISTILBERT_NAMES = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
DISTILBERT_LAYER = re.compile(r"transformer\.layer\.(\d+)\.(.+)\.(weight|bias)")
OLD_NORM_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
HEAD_NAMES = ("classifier.weight", "classifier.bias")
LAYER_NAMES = {  # a block's linear layers by their short names
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
# A pruned model's blocks have heads and channels of their own number, as text between commas: config key -> all of them.
# The size of a head, hidden_size / num_attention_heads, stays.
WIDTHS_BY_BLOCK = {"heads_by_block": "num_attention_heads", "channels_by_block": "intermediate_size"}
# What pruning takes away together: (layers of whose rows, layers of whose columns) one head or channel is made.
HEAD_LAYERS = (("attention.self.query", "attention.self.key", "attention.self.value"), ("attention.output.dense",))
CHANNEL_LAYERS = (("intermediate.dense",), ("output.dense",))
# They size tensors or count blocks; whether there are token types at all shows in the embedding's tensors.
GRAPH_FREE_CONFIG = frozenset(
    {"num_hidden_layers", "vocab_size", "max_position_embeddings", "type_vocab_size", *WIDTHS_BY_BLOCK}
)


def describe(config: Mapping[str, ConfigValue], labels: Sequence[str], max_length: int) -> ModelSpec:
    """The architecture as names, shapes and numbers.

    Args:
        config: as from `open_folder`, from a checkpoint's config.json or from another spec; unknown keys are dropped.
        labels: at least two different names, in the order of the logits.
        max_length: tokens after which a text is cut, from 2 to the config's max_position_embeddings.

    Raises:
        ModelError: the config is of another family, lacks something or has absurd values.
    """
    c = _checked_config(config)
    labels = _checked_labels(labels)
    positions = int(c["max_position_embeddings"])
    if not isinstance(max_length, int) or not 2 <= max_length <= positions:
        raise ModelError(f"max_length must be from 2 to the model's {positions} positions, it is {max_length!r}")
    return ModelSpec(
        family="edge_models.bert",
        config=c,
        labels=labels,
        max_length=max_length,
        num_blocks=int(c["num_hidden_layers"]),
        hidden=int(c["hidden_size"]),
        heads=int(c["num_attention_heads"]),
        feed_forward=int(c["intermediate_size"]),
        tensors=tuple(_tensor_specs(c, len(labels))),
    )


def with_widths(
    config: Mapping[str, ConfigValue], heads: Sequence[int], channels: Sequence[int]
) -> dict[str, ConfigValue]:
    """The config of a model whose blocks have so many heads and feed-forward channels, from the first block on.

    Raises:
        ModelError: there is not one number for each block, or one is absurd.
    """
    by_block = {"heads_by_block": _joined(heads), "channels_by_block": _joined(channels)}
    return _checked_config({**config, **by_block})


def open_folder(folder: Path) -> tuple[dict[str, ConfigValue], dict[str, MappedTensor]]:
    """Config and tensor locations of a checkpoint folder: config.json with model.safetensors, whole or in shards.

    The head (`classifier.*`) is among the tensors only if the folder has one that reads the mean of the tokens.

    Raises:
        ModelError: a file is missing or damaged, or the tensors are not those that the config asks for.
    """
    raw = read_json_object(folder / "config.json", WANTED)
    config = _checked_config(raw)
    stored = _stored_tensors(folder)
    tensors: dict[str, MappedTensor] = {}
    for old, tensor in stored.items():
        name = public_name(old)
        if name in tensors:
            raise ModelError(f"{folder} has {_short(name)} twice, with and without its old name: repair the checkpoint")
        tensors[name] = tensor
    pooled = any(n.startswith(("pooler.", "pre_classifier.")) for n in tensors)  # that head does not read the mean
    labels = 0 if pooled else _head_labels(tensors)
    wanted = {t.name: t.shape for t in _tensor_specs(config, labels) if labels or t.part != config["num_hidden_layers"]}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ModelError(f"{folder} lacks the tensor {name!r} of {shape}: not a checkpoint of this config.json")
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in ("F32", "F16", "BF16", "F64"):
            raise ModelError(f"{folder}: {name!r} should be floats of {shape}, it is {tensor.dtype} of {tensor.shape}")
    return config, {name: tensors[name] for name in wanted}


def build(spec: ModelSpec, tensors: Mapping[str, Any]) -> Bert:
    """The torch network over the given tensors, used as they are: no copy, nothing initialised.

    Args:
        spec: from `describe`.
        tensors: a floating-point torch tensor of the right shape for every name of the spec.

    Raises:
        ModelError: a tensor is missing or has another shape.
    """
    import torch
    from torch import nn

    from edge_models._bert_torch import Bert, Block, Embeddings

    c, given = _checked_config(spec.config), {}
    for t in spec.tensors:
        shape = tuple(tensors[t.name].shape) if t.name in tensors else None
        if shape != t.shape:
            raise ModelError(f"the model needs {t.name!r} of {t.shape}, it got {'none' if shape is None else shape}")
        given[t.name] = tensors[t.name]
    eps, activation = float(c["layer_norm_eps"]), str(c["hidden_act"])
    words, positions = int(c["vocab_size"]), int(c["max_position_embeddings"])
    with torch.device("meta"):
        model = Bert(
            Embeddings(words, positions, int(c["type_vocab_size"]), spec.hidden, eps),
            [Block(spec.hidden, spec.hidden // spec.heads, *width, eps, activation) for width in _widths(c)],
            nn.Linear(spec.hidden, len(spec.labels)),
        )
    model.load_state_dict(given, assign=True)
    return model


def bundled_graphs(spec: ModelSpec) -> Path | None:
    """The training graphs that come with this package for the common shapes (`tools/graphs` makes them)."""
    c = spec.config
    if c["hidden_act"] != "gelu" or c["layer_norm_eps"] != 1e-12:
        return None
    name = graphs_name(spec.hidden, spec.heads, spec.feed_forward, types=bool(c["type_vocab_size"]))
    path = Path(__file__).parent / "graphs" / name
    return path if path.is_file() else None


def graphs_name(hidden: int, heads: int, feed_forward: int, *, types: bool) -> str:
    """The name of a bundled set's file. `types`: with token type embeddings (DistilBERT has none)."""
    return f"bert-{hidden}-{heads}-{feed_forward}{'' if types else '-untyped'}.graphs"


def _checked_config(config: Mapping[str, Any]) -> dict[str, ConfigValue]:
    """The flat values that `describe` needs, each within its range; `config` may be anything JSON can say."""
    kind, positions = config.get("model_type", "bert"), config.get("position_embedding_type", "absolute")
    if kind == "distilbert":
        if config.get("sinusoidal_pos_embds"):
            raise ModelError("a DistilBERT with sinusoidal positions is not supported: use one with learned positions")
        config = {"type_vocab_size": 0, **{DISTILBERT_CONFIG.get(k, k): v for k, v in config.items()}}
    elif kind != "bert":
        raise ModelError(f"the config is of a {_short(kind)} model, wanted 'bert' or 'distilbert': use its own family")
    if positions != "absolute":
        raise ModelError(f"position_embedding_type must be 'absolute', it is {_short(positions)}: not supported")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ModelError("the config is of a decoder (is_decoder, add_cross_attention), wanted an encoder")
    checked: dict[str, ConfigValue] = {}
    for key, (low, high) in COUNTS.items():
        value = config.get(key)
        if type(value) is not int or not low <= value <= high:
            raise ModelError(f"config: {key} must be a whole number from {low} to {high}, it is {_short(value)}")
        checked[key] = value
    hidden, heads = int(checked["hidden_size"]), int(checked["num_attention_heads"])
    if hidden % heads:
        raise ModelError(f"config: hidden_size {hidden} does not divide by num_attention_heads {heads}: correct one")
    eps = config.get("layer_norm_eps", 1e-12)  # old checkpoints leave BERT's own value out
    if type(eps) is not float or not 0.0 < eps <= 0.1:  # NaN fails the comparison
        raise ModelError(f"config: layer_norm_eps must be above 0 and at most 0.1, it is {_short(eps)}")
    activation = config.get("hidden_act")
    if activation not in ACTIVATIONS:
        raise ModelError(f"config: hidden_act must be one of {', '.join(ACTIVATIONS)}, it is {_short(activation)}")
    by_block = {key: _by_block(config, checked, key) for key in WIDTHS_BY_BLOCK}
    widths = {key: _joined(n) for key, n in by_block.items() if set(n) != {checked[WIDTHS_BY_BLOCK[key]]}}
    return {**checked, "layer_norm_eps": eps, "hidden_act": activation, **widths}


def _by_block(config: Mapping[str, Any], checked: Mapping[str, ConfigValue], key: str) -> list[int]:
    """How many heads or channels each block has; all of them where the config does not say."""
    blocks, full = int(checked["num_hidden_layers"]), WIDTHS_BY_BLOCK[key]
    if key not in config:
        return [int(checked[full])] * blocks
    (low, high), text = COUNTS[full], config[key]
    if isinstance(text, str) and re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text) and len(text) <= 7 * blocks:
        counts = [int(n) for n in text.split(",")]
        if len(counts) == blocks and all(low <= n <= high for n in counts):
            return counts
    raise ModelError(
        f"config: {key} must be {blocks} numbers from {low} to {high} between commas, it is {_short(text)}"
    )


def _joined(counts: Sequence[int]) -> str:
    return ",".join(str(n) for n in counts)


def _widths(checked: Mapping[str, ConfigValue]) -> list[tuple[int, int]]:
    """Heads and channels of each block."""
    heads, channels = (_by_block(checked, checked, key) for key in WIDTHS_BY_BLOCK)
    return list(zip(heads, channels, strict=True))


def _checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) and label for label in labels):
        raise ModelError("labels must be a list of non-empty texts")
    if not 2 <= len(labels) <= MAX_LABELS or len(set(labels)) != len(labels):
        raise ModelError(f"labels must be from 2 to {MAX_LABELS} different texts, they are {_short(list(labels))}")
    return tuple(labels)


def _tensor_specs(config: Mapping[str, ConfigValue], labels: int) -> list[TensorSpec]:
    """Every tensor in the model's order: embeddings, block 0 onwards, head."""
    hidden, depth = int(config["hidden_size"]), int(config["num_hidden_layers"])
    head_size = hidden // int(config["num_attention_heads"])
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    specs = [
        TensorSpec(f"embeddings.{name}_embeddings.weight", (int(config[key]), hidden), EMBED)
        for name, key in tables.items()
        if config[key]
    ]

    def add(module: str, outputs: int, inputs: int | None, part: int) -> None:
        specs.append(TensorSpec(f"{module}.weight", (outputs,) if inputs is None else (outputs, inputs), part))
        specs.append(TensorSpec(f"{module}.bias", (outputs,), part))

    add("embeddings.LayerNorm", hidden, None, EMBED)
    for part, (heads, wide) in enumerate(_widths(config)):
        layer = f"encoder.layer.{part}"
        for name in ("query", "key", "value"):
            add(f"{layer}.attention.self.{name}", heads * head_size, hidden, part)
        add(f"{layer}.attention.output.dense", hidden, heads * head_size, part)
        add(f"{layer}.attention.output.LayerNorm", hidden, None, part)
        add(f"{layer}.intermediate.dense", wide, hidden, part)
        add(f"{layer}.output.dense", hidden, wide, part)
        add(f"{layer}.output.LayerNorm", hidden, None, part)
    add("classifier", labels, hidden, depth)
    return specs


def _stored_tensors(folder: Path) -> dict[str, MappedTensor]:
    """The tensors of model.safetensors, or of the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_safetensors(single)
    if index.exists():
        places = read_json_object(index, WANTED).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in places.values()
        ):
            raise ModelError(f"{index} must map tensors to names of safetensors files beside it: fetch it again")
        shards = {name: read_safetensors(folder / name) for name in sorted(set(places.values()))}
        if missing := [name for name, shard in places.items() if name not in shards[shard]]:
            raise ModelError(f"{index} promises {_short(missing[0])} in a shard that does not have it: fetch it again")
        return {name: shards[shard][name] for name, shard in places.items()}
    if (folder / "pytorch_model.bin").exists():
        raise ModelError(
            f"{folder} has only pytorch_model.bin, a pickle that could run code: it is never read. "
            "Convert it to model.safetensors on a machine where you trust it"
        )
    raise ModelError(f"{folder} has no model.safetensors (nor its index): wanted a checkpoint folder")


def public_name(name: str) -> str:
    """Today's BERT name of a checkpoint's or an adapter's tensor: without the task model's prefix, LayerNorm's old names, DistilBERT's names."""
    for prefix in ("bert.", "distilbert."):
        name = name[len(prefix) :] if name.startswith(prefix) else name
    for old, new in OLD_NORM_NAMES.items():
        name = name[: -len(old)] + new if name.endswith(old) else name
    if (match := DISTILBERT_LAYER.fullmatch(name)) and match[2] in DISTILBERT_NAMES:
        return f"encoder.layer.{match[1]}.{DISTILBERT_NAMES[match[2]]}.{match[3]}"
    return name


def _head_labels(tensors: Mapping[str, MappedTensor]) -> int:
    """How many labels the folder's own head has; 0 without one."""
    shapes = [tensors[name].shape for name in HEAD_NAMES if name in tensors]
    return math.prod(shapes[-1]) if len(shapes) == len(HEAD_NAMES) else 0


def _short(value: object) -> str:
    """A value for a message, cut so that a hostile one cannot flood the log."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
