"""Adapters as files: PEFT's read by us and ours by PEFT give the same logits; what is damaged or of another kind is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_models import bert
from edge_runtime.errors import ModelError, UsageError
from edge_runtime.layout import A, adapter_tensors, linear_layers
from edge_runtime.mapped_network import MappedNetwork
from edge_runtime.merging import with_adapter
from edge_runtime.peft import Adapter, check_adapter, fingerprint, read_adapter, write_adapter
from edge_runtime.predict import Predictor
from edge_runtime.source import find_checkpoint
from edge_runtime.store import cache_folder
from edge_runtime.weights import MappedTensor
from tests.golden.make_peft import GOLDEN, LABELS, SPEC, write_base, write_numbers

Array = np.ndarray[Any, np.dtype[Any]]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
TOKENS = [[5, 17, 80, 3, 44, 9], [7, 2, 61, 0, 0, 0]]
PEER = Path(__file__).parents[1] / "peft_peer.py"
FAMILY = "edge_models.bert"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A copy of the adapter that PEFT wrote."""
    return Path(shutil.copytree(GOLDEN / "theirs", tmp_path / "theirs"))


def logits(model: Path, adapter: Path | None) -> Array:
    """Ours, without torch."""
    path = bert.bundled_graphs(SPEC)
    assert path is not None
    from edge_runtime.graphs.find import read_graphs

    with with_adapter(find_checkpoint(str(model), progress=lambda line: None), adapter) as source:
        return MappedNetwork(source, read_graphs(path), 1).logits(np.array(TOKENS), np.array(MASK))


def peers(*arguments: str) -> Array:
    """What the other side says, if its environment was made by `tools/bench`."""
    made = sorted(cache_folder().glob("bench/peers-*/complete"))
    if not made:
        pytest.skip("transformers and peft are not here: `tools/bench training --quick` makes their environment")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(made[-1].parent / "bin" / "python"), str(PEER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def ours(folder: Path, ranks: dict[int, int], scales: dict[int, float]) -> Adapter:
    """An adapter of this project, random, with another rank and scale in each block."""
    tensors = write_numbers(folder / "ours.f32", [*adapter_tensors(SPEC, ranks, ["q", "up", "down"]), *SPEC.suffix(0)])
    head = {t.name: tensors.pop(t.name) for t in SPEC.suffix(0)}
    parts = {t.name.removesuffix(".weight"): t.part for t in SPEC.tensors}
    of = {name.removesuffix(A): scales[parts[name.removesuffix(A)]] for name in tensors if name.endswith(A)}
    return Adapter(tensors, of, head, LABELS, 30)


def test_an_adapter_that_peft_wrote_gives_its_logits(base: Path, theirs: Path) -> None:
    wanted = np.array(json.loads((GOLDEN / "theirs.json").read_text()))
    assert abs(logits(base, theirs) - wanted).max() < 1e-4
    assert abs(logits(base, None) - wanted).max() > 0.1


def test_what_we_write_is_what_peft_read_then(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "a", ours(tmp_path, {0: 2, 1: 4}, {0: 2.0, 1: 0.5}), "base")
    for file in (GOLDEN / "ours").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes(), file.name
    assert abs(logits(base, tmp_path / "a") - np.array(json.loads((GOLDEN / "ours.json").read_text()))).max() < 1e-4


@pytest.mark.slow
def test_peft_writes_and_reads_now_as_it_did_for_the_golden_files(base: Path, tmp_path: Path) -> None:
    made = peers("make", str(base), str(tmp_path / "theirs"))
    assert abs(logits(base, tmp_path / "theirs") - made).max() < 1e-4
    write_adapter(tmp_path / "a", ours(tmp_path, {0: 2, 1: 4}, {0: 2.0, 1: 0.5}), "base")
    assert abs(logits(base, tmp_path / "a") - peers("read", str(base), str(tmp_path / "a"))).max() < 1e-4


def test_an_adapter_that_was_written_is_read_again(tmp_path: Path) -> None:
    adapter = ours(tmp_path, {1: 3}, {1: 1.5})
    write_adapter(tmp_path / "a", adapter, "base")
    again = check_adapter(read_adapter(tmp_path / "a", FAMILY), SPEC, {})
    assert (again.scales, again.labels, again.max_length, again.rank) == (adapter.scales, LABELS, 30, 3)
    for name, place in {**adapter.tensors, **adapter.head}.items():
        assert np.array_equal({**again.tensors, **again.head}[name].array(), place.array())


def test_names_of_task_models_and_of_distilbert_are_understood(theirs: Path, base: Path) -> None:
    def renamed(name: str) -> str:
        return name.replace("model.encoder", "model.bert.encoder")

    wanted = logits(base, theirs)
    rewrite(theirs, rename=renamed)
    assert np.array_equal(logits(base, theirs), wanted)
    patterns = {"bert.encoder.layer.0.attention.self.query": 3, "layer.1.output.dense": 5}
    edit(theirs, alpha_pattern=patterns)
    assert np.array_equal(logits(base, theirs), wanted)
    rewrite(theirs, rename=lambda name: name.replace("bert.encoder.layer.0.attention.self.query",
                                                    "distilbert.transformer.layer.0.attention.q_lin"))  # fmt: skip
    edit(theirs, alpha_pattern={"q_lin": 3, "layer.1.output.dense": 5})
    assert np.array_equal(logits(base, theirs), wanted)


def test_a_head_that_reads_the_first_token_is_left_out(theirs: Path, base: Path, tmp_path: Path) -> None:
    edit(theirs, task_type="SEQ_CLS")
    assert read_adapter(theirs, FAMILY).head == {}
    bare = write_base(tmp_path / "bare", labels=False)
    with pytest.raises(ModelError, match="has no head that reads the mean of the tokens, nor has the model"):
        logits(bare, theirs)


def test_classes_without_names_are_called_as_transformers_does(theirs: Path, tmp_path: Path) -> None:
    bare = write_base(tmp_path / "bare", labels=False)
    assert Predictor(bare, 1, adapter=theirs).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def rewrite(
    folder: Path,
    rename: Callable[[str], str] = lambda name: name,
    change: Callable[[str, Array], Array] = lambda name, values: values,
) -> None:
    """Change names or values of an adapter's tensors."""
    import safetensors.numpy as files

    path = folder / "adapter_model.safetensors"
    tensors = {rename(name): change(name, values) for name, values in files.load_file(path).items()}
    files.save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_rslora": True}, "use_rslora = True"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias = lora_only"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"some_variant_of_tomorrow": {"on": True}}, "some_variant_of_tomorrow"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"peft_type": None}, "only LORA"),
        ({"lora_alpha": "8"}, "alpha of"),
        ({"lora_alpha": 0}, "alpha of"),
        ({"lora_alpha": float("nan")}, "alpha of"),
        ({"lora_alpha": 1e300}, "alpha of"),
        ({"lora_alpha": 10**400}, "alpha of"),
        ({"lora_alpha": True}, "alpha of"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "plain names"),
        ({"alpha_pattern": [1]}, "plain names"),
        ({"alpha_pattern": {"x" * 300: 2}}, "plain names"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_plain_lora_is_refused(changes: dict[str, Any], why: str, theirs: Path) -> None:
    edit(theirs, **changes)
    with pytest.raises(ModelError) as caught:
        read_adapter(theirs, FAMILY)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{", b"\xff", b"[" * 5000, b"{" + b" " * (2 << 20) + b"}", b'{"peft_type": ' + b"9" * 5000 + b"}"],
    ids=lambda raw: repr(raw[:10]),
)
def test_a_damaged_config_is_refused(raw: bytes, theirs: Path) -> None:
    for name in ("adapter_config.json", "edge.json"):
        broken = Path(shutil.copytree(theirs, theirs.parent / name))
        (broken / name).write_bytes(raw)
        with pytest.raises(ModelError):
            read_adapter(broken, FAMILY)


QUERY = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({f"{QUERY}.lora_B.weight": None}, "no pair of A and B"),
        ({f"{QUERY}.lora_A.weight": None}, "no A of rank"),
        ({f"{QUERY}.lora_A.weight": (3, 128)}, "no pair"),
        ({f"{QUERY}.lora_A.weight": (4, 64)}, "no pair"),
        ({f"{QUERY}.lora_A.weight": (0, 128), f"{QUERY}.lora_B.weight": (128, 0)}, "no A of rank"),
        ({f"{QUERY}.lora_A.weight": (512,)}, "no A of rank"),
        ({f"{QUERY}.lora_magnitude_vector.weight": (128,)}, "lora_magnitude_vector"),
        ({"base_model.model.encoder.layer.9.output.dense.lora_A.weight": (4, 512),
          "base_model.model.encoder.layer.9.output.dense.lora_B.weight": (128, 4)}, "no pair"),
        ({"base_model.model.encoder.layer.0.output.LayerNorm.weight": (128,)}, "LayerNorm"),
        ({"base_model.model.classifier.bias": None}, "head lacks 'classifier.bias'"),
        ({"base_model.model.classifier.bias": (4,)}, "classifier.bias"),
        ({"something.else": (4,)}, "something.else"),
    ],
    ids=lambda value: str(value)[-60:],
)  # fmt: skip
def test_tensors_that_are_not_this_models_are_refused(
    changed: dict[str, tuple[int, ...] | None], why: str, theirs: Path
) -> None:
    import safetensors.numpy as files

    path = theirs / "adapter_model.safetensors"
    tensors = files.load_file(path)
    for name, shape in changed.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)
    files.save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        check_adapter(read_adapter(theirs, FAMILY), SPEC, {})
    assert why in str(caught.value)


def test_values_that_are_not_finite_are_refused(theirs: Path) -> None:
    rewrite(theirs, change=lambda name, values: values * np.float32("inf") if "lora_A" in name else values)
    with pytest.raises(ModelError, match="not finite"):
        check_adapter(read_adapter(theirs, FAMILY), SPEC, {})


def test_an_adapter_is_for_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    base = write_numbers(tmp_path / "base.f32", SPEC.tensors)
    adapter = replace(ours(tmp_path, {1: 3}, {1: 1.5}), base=fingerprint(SPEC, base))
    write_adapter(tmp_path / "a", adapter, "base")
    read = read_adapter(tmp_path / "a", FAMILY)
    assert check_adapter(read, SPEC, base).base == adapter.base
    matrix = next(t for t in SPEC.tensors if t.name in linear_layers(SPEC))
    values = base[matrix.name].array() * np.float32(1.001)  # as with an adapter added in
    values.tofile(tmp_path / "other.f32")
    other = {**base, matrix.name: MappedTensor(str(tmp_path / "other.f32"), 0, matrix.shape)}
    with pytest.raises(ModelError, match="for another model, or this model has it in already"):
        check_adapter(read, SPEC, other)
    assert check_adapter(replace(read, base=""), SPEC, other), "one that says nothing, such as PEFT's, is taken"


def test_a_pickle_is_never_read(theirs: Path) -> None:
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    with pytest.raises(ModelError, match="a pickle that could run code"):
        read_adapter(theirs, FAMILY)


def test_an_adapter_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    adapter = ours(tmp_path, {1: 3}, {1: 1.5})
    write_adapter(tmp_path / "a", adapter, "base")
    write_adapter(tmp_path / "a", adapter, "base")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds other things"):
        write_adapter(tmp_path / "b", adapter, "base")
