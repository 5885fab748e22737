"""Labels from an exported file with real weights, and files that are not ours."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edge_models import bert, hub
from edge_runtime.errors import DataError, ModelError, UsageError
from edge_runtime.export import export_onnx
from edge_runtime.predict import BATCH_TOKENS, FORMAT, MAX_WINDOWS, Predictor, evaluate, length_buckets, softmax
from edge_runtime.tokenize import Tokenizer, pad
from edge_runtime.weights import MappedTensor

KNOWN = {  # a few texts a label; the head is their mean embeddings
    "food": ["How do I bake bread?", "A recipe for tomato soup", "Which cheese goes with red wine?"],
    "sport": ["Who won the football match?", "She ran the marathon in record time", "The rules of basketball"],
    "money": ["My bank charged a fee", "How do I pay my taxes?", "The stock market fell today"],
}
NEW = [
    ("Roast the potatoes in the oven with garlic", "food"),
    ("The tennis player won the final", "sport"),
    ("I want to transfer money to a savings account", "money"),
    ("Vegetable curry with rice", "food"),
    ("A goal in the last minute of the game", "sport"),
    ("The interest rate of the mortgage rose", "money"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM-L3 with a head made from KNOWN, exported."""
    folder = hub.resolve("minilm-l3", print)
    config, tensors = bert.open_folder(folder)
    raw = (folder / "tokenizer.json").read_bytes()
    spec = bert.describe(config, list(KNOWN), 64)
    weights = {n: torch.from_numpy(t.array()) for n, t in tensors.items()}
    whole = weights | {"classifier.weight": torch.eye(384), "classifier.bias": torch.zeros(384)}
    encoder = bert.build(bert.describe(config, [str(i) for i in range(384)], 64), whole)
    centroids = []
    for texts in KNOWN.values():
        ids, mask = pad(Tokenizer.from_bytes(raw, 64).encode_batch(texts), 0)
        with torch.inference_mode():
            mean = encoder(torch.from_numpy(ids), torch.from_numpy(mask)).mean(0)
        centroids.append(mean / mean.norm())
    head = tmp_path_factory.mktemp("head") / "head.raw"
    head.write_bytes(torch.stack(centroids).numpy().tobytes() + bytes(4 * len(KNOWN)))
    tensors["classifier.weight"] = MappedTensor(str(head), 0, (len(KNOWN), 384))
    tensors["classifier.bias"] = MappedTensor(str(head), 4 * 384 * len(KNOWN), (len(KNOWN),))
    out = tmp_path_factory.mktemp("model") / "model.onnx"
    metadata = {"model": "cafe", "method": "caff"}
    export_onnx(spec, tensors, raw, out, samples=[text for text, _ in NEW], metadata=metadata)
    return out


@pytest.fixture(scope="module")
def predictor(path: Path) -> Predictor:
    return Predictor(path, threads=2)


def test_new_texts_get_the_label_of_the_texts_like_them(predictor: Predictor) -> None:
    found = predictor.predict([text for text, _ in NEW])
    assert [p.label for p in found] == [label for _, label in NEW]
    assert all(p.probability == max(p.probabilities.values()) for p in found)
    assert all(list(p.probabilities) == list(KNOWN) for p in found)
    assert all(math.isclose(sum(p.probabilities.values()), 1) for p in found)


def test_of_a_long_text_the_start_is_read_and_it_says_so(path: Path) -> None:
    start, rest = NEW[0][0], " ".join(text for text, label in NEW if label == "sport")
    predictor = Predictor(path, threads=2)
    short, cut = predictor.predict([start, " ".join([start] * 20) + rest * 50])
    assert not short.truncated and cut.truncated and predictor.num_truncated == 1
    assert cut.label == "food"


def test_windows_read_a_long_text_to_its_end_and_average(path: Path) -> None:
    sport = " ".join(text for text, label in NEW if label == "sport")
    text = NEW[0][0] + ". " + " ".join([sport] * 30)
    predictor = Predictor(path, threads=2, long="window")
    short, found = predictor.predict([NEW[0][0], text])
    assert (short.windows, found.label, found.truncated) == (1, "sport", False)
    assert found.windows > 5 and predictor.num_truncated == 0
    rows, _ = predictor._version.tokenizer.windows(text, MAX_WINDOWS)
    network = predictor._version.logits
    each = [softmax(network(*pad([row], 0)))[0] for row in rows]
    mean = np.average(each, axis=0, weights=[len(row) - 2 for row in rows])
    np.testing.assert_allclose(list(found.probabilities.values()), mean, atol=1e-6)
    with pytest.raises(UsageError, match="truncate or window"):
        Predictor(path, long="all")


@pytest.mark.parametrize("text", ["bread " * 1_700_000, " " * 10_000_000, "x" * 10_000_000, "\ud800\x00\x1b" * 50_000])
def test_windows_of_huge_texts_are_bounded(path: Path, text: str) -> None:
    predictor = Predictor(path, threads=2, long="window")
    (found,) = predictor.predict([text])
    assert found.windows <= MAX_WINDOWS
    assert found.truncated == (found.windows == MAX_WINDOWS)
    assert math.isclose(sum(found.probabilities.values()), 1)


def test_the_predictor_tells_what_the_file_is(predictor: Predictor) -> None:
    assert predictor.labels == tuple(KNOWN)
    assert predictor.max_length == 64
    wanted = {"family": "edge_models.bert", "model": "cafe", "method": "caff", "precision": "float32", "opset": "20"}
    assert wanted.items() <= predictor.metadata.items()


def test_order_and_probabilities_do_not_depend_on_the_other_texts(predictor: Predictor) -> None:
    rng = random.Random(0)
    words = " ".join(text for texts in KNOWN.values() for text in texts).split()
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 70))) for _ in range(80)]
    together = predictor.predict(texts)
    for text, one in zip(texts, together, strict=True):
        (alone,) = predictor.predict([text])
        assert alone.label == one.label
        assert list(one.probabilities.values()) == pytest.approx(list(alone.probabilities.values()), abs=1e-5)


@pytest.mark.parametrize("text", ["", "\0", "\ud800", " " * 10_000_000, "soup " * 2_000_000, "x" * 1_000_000])
def test_hostile_texts_get_a_label(predictor: Predictor, text: str) -> None:
    (found,) = predictor.predict([text])
    assert found.label in KNOWN
    assert 0 <= found.probability <= 1


def test_no_text_gives_no_prediction_and_a_bare_text_is_refused(predictor: Predictor) -> None:
    assert predictor.predict([]) == []
    with pytest.raises(UsageError, match=r"predict\(\[text\]\)"):
        predictor.predict("soup")


@pytest.mark.parametrize(("wrong", "name"), [(None, "NoneType"), (7, "int"), (b"soup", "bytes"), (["soup"], "list")])
def test_what_is_no_text_is_named_with_its_place(predictor: Predictor, wrong: Any, name: str) -> None:
    with pytest.raises(UsageError, match=rf"number 2 \(from 0\) is {name}, not str"):
        predictor.predict(["soup", "tennis", wrong])


def test_threads_can_share_a_predictor(predictor: Predictor) -> None:
    texts = [text for text, _ in NEW]
    wanted, found = predictor.predict(texts), []
    threads = [threading.Thread(target=lambda: found.append(predictor.predict(texts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4


def test_evaluate_gives_the_share_of_right_labels_of_a_stream(path: Path) -> None:
    assert evaluate(path, iter(NEW)) == 1.0
    assert evaluate(path, [*NEW[:3], (NEW[0][0], "sport")]) == 0.75


def test_evaluate_refuses_unknown_labels_and_nothing(path: Path) -> None:
    with pytest.raises(DataError, match="row 2 has label 'sports'"):
        evaluate(path, [NEW[0], ("x", "sports")])
    with pytest.raises(DataError, match="no row"):
        evaluate(path, [])


def test_predicting_imports_no_torch_and_stays_small(path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.modules["torch"] = sys.modules["onnx"] = sys.modules["edge_models"] = None
from edge_runtime.predict import Predictor
assert "numpy" not in sys.modules and "onnxruntime" not in sys.modules
predictor = Predictor({str(path)!r}, threads=1)
predictor.predict(["soup " * n for n in range(100)])
status = Path("/proc/self/status")  # not getrusage: its peak is the parent's until exec
print(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line) if status.exists() else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert 1024 * int(done.stdout) < 1.5 * path.stat().st_size + (100 << 20)  # 165 of 199 MiB on x86-64


def test_internal_batches_hold_every_row_once_and_few_tokens() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 700) for _ in range(300)]
    batches = list(length_buckets(lengths, BATCH_TOKENS))
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= BATCH_TOKENS for b in batches)
    assert len(batches) < 1.1 * sum(lengths) / BATCH_TOKENS + 150
    assert list(length_buckets([], 8)) == []


def test_softmax_survives_any_finite_logits() -> None:
    probabilities = softmax(np.array([[1e30, -1e30], [3e38, 3e38], [0, math.log(3)]], np.float32))
    np.testing.assert_allclose(probabilities, np.array([[1, 0], [0.5, 0.5], [0.25, 0.75]]), atol=1e-7)


def small_file(path: Path, entries: dict[str, str | None], scale: float = 1.0) -> Path:
    """An ONNX file with our inputs, output and metadata, but for `entries`, that multiplies the text's length."""
    tokenizer = (hub.resolve("minilm-l6", print) / "tokenizer.json").read_text()
    good = {"format": FORMAT, "labels": '["a", "b", "c"]', "max_length": "8", "tokenizer": tokenizer, "family": "none"}
    ints, floats = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info(n, ints, ["batch", "seq"]) for n in ("input_ids", "attention_mask")]
    nodes = [
        onnx.helper.make_node("Cast", ["attention_mask"], ["mask"], to=floats),
        onnx.helper.make_node("ReduceSum", ["mask", "axis"], ["length"], keepdims=1),
        onnx.helper.make_node("Mul", ["length", "scale"], ["logits"]),
    ]
    constants = [
        onnx.helper.make_tensor("axis", ints, [1], [1]),
        onnx.helper.make_tensor("scale", floats, [1, 3], [0, 0, scale]),
    ]
    output = onnx.helper.make_tensor_value_info("logits", floats, ["batch", 3])
    graph = onnx.helper.make_graph(nodes, "g", inputs, [output], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.helper.set_model_props(model, {k: v for k, v in {**good, **entries}.items() if v is not None})
    onnx.save(model, str(path))
    return path


def test_the_small_file_below_is_accepted_when_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    (found,) = Predictor(small_file(tmp_path / "m.onnx", {})).predict(["one two"])  # 4 tokens
    assert found.label == "c"
    assert found.probability == pytest.approx(math.exp(4) / (math.exp(4) + 2))


@pytest.mark.parametrize(
    "entry",
    [
        {"format": None},
        {"format": "edge-runtime 99"},
        {"labels": None},
        {"labels": "[1, 2"},
        {"labels": "7"},
        {"labels": "[" * 100_000},
        {"labels": '["a", "b"]'},
        {"labels": "[1, 2, 3]"},
        {"labels": '["a", "a", "b"]'},
        {"max_length": None},
        {"max_length": "many"},
        {"max_length": "-1"},
        {"max_length": "1000000000"},
        {"tokenizer": None},
        {"tokenizer": "{}"},
    ],
)
def test_a_file_with_a_missing_or_damaged_entry_is_refused(tmp_path: Path, entry: dict[str, str | None]) -> None:
    with pytest.raises(ModelError, match=r"export it again|wanted .* logits|fetch tokenizer"):
        Predictor(small_file(tmp_path / "m.onnx", entry))


@pytest.mark.parametrize("damage", [b"", b"not onnx", b"\x08\x0a", bytes(1000), "cut"])
def test_a_file_that_is_no_onnx_model_is_refused_quietly(
    path: Path, tmp_path: Path, damage: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    data = path.read_bytes()[:1_000_000] if damage == "cut" else damage
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"m\.onnx is damaged or no ONNX model"):
        Predictor(tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ModelError, match="no model file"):
        Predictor(tmp_path / "none.onnx")


def test_somebody_elses_onnx_model_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="not a model exported by this edge-runtime"):
        Predictor(tmp_path / "m.onnx")


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error_and_not_a_label(tmp_path: Path, scale: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        Predictor(small_file(tmp_path / "m.onnx", {}, scale)).predict(["soup"])
