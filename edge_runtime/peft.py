"""LoRA adapters as files that PEFT reads, and PEFT's: `adapter_config.json` beside `adapter_model.safetensors`.

A module's name in such a file is "base_model.model." and its name in the checkpoint, so PEFT puts an adapter of ours onto a
network whose modules are named like the checkpoint's, with the head (`modules_to_save`) as a linear layer on the mean of the
tokens. A third file, of ours alone, holds labels, max_length and the print of the base. What is read is hostile: bounded, checked, never a pickle.
Not the training (`training/adapters.py`). The format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError, UsageError
from edge_runtime.layout import A, B, linear_layers
from edge_runtime.model import ModelSpec, load_family
from edge_runtime.store import make_folder, write_json
from edge_runtime.weights import MappedTensor, read_json_object, read_safetensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
EDGE_FILE = "edge.json"
WANTED = f"{CONFIG_FILE} and {WEIGHTS_FILE}"
PREFIX = "base_model.model."
THEIRS = {".lora_A.weight": A, ".lora_B.weight": B}
MAX_RANK, MAX_ALPHA, MAX_LENGTH = 1024, 1e6, 1 << 17
PATTERN = re.compile(r"[\w.-]{1,200}")  # PEFT takes regular expressions, which a stranger could make run for ever
# Keys of a config that change nothing here: what they decide shows in the tensors, or matters to training with PEFT alone.
WITHOUT_EFFECT = frozenset(
    ["alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
     "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
     "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
     "revision", "target_modules", "task_type"]
)  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the base's weights stay as they are
HEADS_OF_PEFT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # transformers' classes, whose heads read something else


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, by this model's names.

    Attributes:
        tensors: A (rank, in) and B (out, rank) of each adapted layer by name (`layout.py`).
        scales: what B A is multiplied by, for each layer: its matrix's name without ".weight".
        head: the task head's tensors; empty where there is none that this family's network could use.
        labels: the head's classes, where they are known.
        max_length: tokens after which texts were cut, where it is known.
        base: the `fingerprint` of the model that it is added to, where it is known.
    """

    tensors: Mapping[str, MappedTensor]
    scales: Mapping[str, float]
    head: Mapping[str, MappedTensor] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    max_length: int | None = None
    base: str = ""

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(t.shape[0] for name, t in self.tensors.items() if name.endswith(A))


def read_adapter(folder: Path, family: str) -> Adapter:
    """Read an adapter's folder. Its names and shapes are compared with a model by `check_adapter`.

    Raises:
        ModelError: a file is missing or damaged, or it is an adapter that we cannot apply exactly.
    """
    config = read_json_object(folder / CONFIG_FILE, WANTED)
    _check_config(folder, config)
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(f"{folder} has only adapter_model.bin, a pickle that could run code: it is never read")
    public: Callable[[str], str] = getattr(load_family(family), "public_name", str)
    tensors: dict[str, MappedTensor] = {}
    head: dict[str, MappedTensor] = {}
    modules: dict[str, str] = {}  # ours -> theirs
    for theirs, tensor in read_safetensors(folder / WEIGHTS_FILE).items():
        if not theirs.startswith(PREFIX) or tensor.dtype[:1] == "I":
            raise ModelError(f"{folder / WEIGHTS_FILE} has {theirs[:200]!r} as {tensor.dtype}, which is of no adapter")
        name = theirs[len(PREFIX) :]
        ending = next((e for e in THEIRS if name.endswith(e)), None)
        if ending:
            module = name.removesuffix(ending)
            stem = public(module + ".weight").removesuffix(".weight")
            ours = stem + THEIRS[ending]
            if modules.setdefault(stem, module) != module:
                raise ModelError(f"{folder / WEIGHTS_FILE} has {stem[:200]!r} under two names")
        else:
            ours = public(name.replace(".modules_to_save", "").replace(".default", ""))
        of = tensors if ending else head
        if ours in of:
            raise ModelError(f"{folder / WEIGHTS_FILE} has {ours[:200]!r} twice")
        of[ours] = tensor
    if not tensors:
        raise ModelError(f"{folder / WEIGHTS_FILE} has no tensor of a LoRA adapter")
    foreign_head = config.get("task_type") in HEADS_OF_PEFT
    scales = _scales(folder, config, tensors, modules)
    return Adapter(tensors, scales, {} if foreign_head else head, *_ours(folder))


def fingerprint(spec: ModelSpec, weights: Mapping[str, MappedTensor]) -> str:
    """Of the matrices that adapters are added to: their names and first rows, which any training of them changes."""
    digest = hashlib.sha256()
    for name in linear_layers(spec):
        digest.update(name.encode() + b"\0" + weights[name].rows([0]).astype("<f4", copy=False).tobytes())
    return digest.hexdigest()[:32]


def check_adapter(adapter: Adapter, spec: ModelSpec, weights: Mapping[str, MappedTensor]) -> Adapter:
    """The adapter, if every tensor of it belongs to the model, and it says of no other base that it is for that.

    Raises:
        ModelError: one does not, a layer has only A or only B, or a value is not finite.
    """
    import numpy as np

    if adapter.base and adapter.base != fingerprint(spec, weights):
        raise ModelError(
            "the adapter is for another model, or this model has it in already: give the one that it was trained on"
        )
    shapes = {t.name.removesuffix(".weight"): t.shape for t in spec.tensors if t.name in linear_layers(spec)}
    heads = {t.name: t.shape for t in spec.suffix(0)}
    for stem in adapter.scales:
        given = adapter.tensors.get(stem + A), adapter.tensors.get(stem + B)
        sizes = tuple(t.shape for t in given if t is not None)
        outputs, inputs = shapes.get(stem, (0, 0))
        rank = sizes[0][0] if sizes and sizes[0] else 0
        if sizes != ((rank, inputs), (outputs, rank)) or not 1 <= rank <= MAX_RANK:
            raise ModelError(f"the adapter has {stem[:200]!r} of {sizes}, which is no pair of A and B for this model")
    if strange := [n for n, t in adapter.head.items() if heads.get(n) != t.shape]:
        raise ModelError(f"the adapter has {strange[0][:200]!r} of {adapter.head[strange[0]].shape}, the model has not")
    if adapter.head and len(adapter.head) != len(heads):
        raise ModelError(f"the adapter's head lacks {sorted(set(heads) - set(adapter.head))[0]!r}")
    for name, tensor in {**adapter.tensors, **adapter.head}.items():
        if not all(np.isfinite(piece).all() for piece in tensor.pieces()):
            raise ModelError(f"the adapter's {name[:200]!r} has values that are not finite")
    return adapter


def write_adapter(folder: Path, adapter: Adapter, base: str) -> None:
    """Write an adapter for PEFT. Args: base: what the checkpoint is called, for people.

    Raises:
        UsageError: the folder holds something else.
    """
    check_adapter_folder(folder)
    make_folder(folder)
    endings = {mine: ending for ending, mine in THEIRS.items()}
    named = []
    for name, tensor in {**adapter.tensors, **adapter.head}.items():
        stem, dot, last = name.rpartition(".")
        named.append((PREFIX + stem + endings.get(dot + last, dot + last), tensor))
    ranks = {stem: adapter.tensors[stem + A].shape[0] for stem in adapter.scales}
    rank = adapter.rank
    scale = next(adapter.scales[stem] for stem, own in ranks.items() if own == rank)
    alphas = {stem: scale * ranks[stem] for stem, scale in adapter.scales.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(ranks),
        "modules_to_save": list(dict.fromkeys(name.rpartition(".")[0] for name in adapter.head)) or None,
        "rank_pattern": {stem: own for stem, own in ranks.items() if own != rank},
        "alpha_pattern": {stem: _number(a) for stem, a in alphas.items() if a != scale * rank},
    }
    write_safetensors(folder / WEIGHTS_FILE, named)
    known = {"base": adapter.base} if adapter.base else {}
    write_json(folder / EDGE_FILE, {"labels": list(adapter.labels or ()), "max_length": adapter.max_length, **known})
    write_json(folder / CONFIG_FILE, config)


def check_adapter_folder(folder: Path) -> None:
    """Whether an adapter may be written there: a new or empty folder, or one that holds an adapter.

    Raises:
        UsageError: it is a file, or a folder with other things in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the adapter")
    others = [p.name for p in folder.glob("*") if not p.name.startswith(".")] if folder.exists() else []
    if others and CONFIG_FILE not in others:
        raise UsageError(f"{folder} holds other things ({sorted(others)[0]}): name a new folder for the adapter")


# what is read


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what would make another function of the same tensors. A key that is not known may be set to nothing only."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is an adapter of type {str(config.get('peft_type'))[:40]!r}, only LORA is read")
    wrong = [key for key, value in config.items() if value and key not in WITHOUT_EFFECT]
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_STARTS else []
    if wrong:
        shown = ", ".join(f"{key[:40]} = {str(config[key])[:40]}" for key in sorted(wrong)[:3])
        raise ModelError(f"{folder} was made with {shown}, which is not supported: only plain LoRA is")


def _scales(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, MappedTensor], modules: Mapping[str, str]
) -> dict[str, float]:
    """alpha / rank of each layer, its alpha as PEFT finds it: the first pattern that its module's name ends with."""
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    if not isinstance(patterns, dict) or not all(PATTERN.fullmatch(key) for key in patterns):
        raise ModelError(f"{folder}: alpha_pattern of {CONFIG_FILE} must map plain names of modules to numbers")
    found = {}
    for stem, module in modules.items():
        own: Any = next((value for key, value in patterns.items() if f".{module}".endswith(f".{key}")), alpha)
        a = tensors.get(stem + A)
        if type(own) not in (int, float) or not 0 < own <= MAX_ALPHA:
            raise ModelError(f"{folder}: alpha of {stem[:200]!r} must be a number above 0, it is {str(own)[:40]}")
        if a is None or len(a.shape) != 2 or not 1 <= a.shape[0] <= MAX_RANK:
            raise ModelError(f"{folder}: {stem[:200]!r} has no A of rank 1 to {MAX_RANK}")
        found[stem] = own / a.shape[0]
    return found


def _ours(folder: Path) -> tuple[tuple[str, ...] | None, int | None, str]:
    """Labels, max_length and the base, from the file that only we write."""
    if not (folder / EDGE_FILE).exists():
        return None, None, ""
    found = read_json_object(folder / EDGE_FILE, WANTED)
    labels, length = found.get("labels"), found.get("max_length")
    sound = isinstance(labels, list) and all(isinstance(label, str) and label for label in labels)
    base = found.get("base", "")
    if (
        not sound
        or not isinstance(base, str)
        or not (length is None or (type(length) is int and 0 < length <= MAX_LENGTH))
    ):
        raise ModelError(f"{folder / EDGE_FILE} must hold a list of texts as labels, a max_length, and a text as base")
    return tuple(labels or ()) or None, length, base


def _number(value: float) -> int | float:
    """Whole where it is: PEFT writes whole alphas."""
    return int(value) if value == int(value) else value
