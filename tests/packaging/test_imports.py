"""What each part may import, in interpreters of their own: the device runs without torch, the agent without numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.samples import DEVICE_COMMANDS

ROOT = Path(__file__).parents[2]
ROOTS = {"edge_runtime": ROOT / "edge_runtime", "edge_coordinator": ROOT / "coordinator" / "edge_coordinator"}
NEEDS_TORCH = (
    "edge_runtime.training.torch_adapters",
    "edge_runtime.training.torch_backend",
    "edge_runtime.graphs.derive",
    "edge_runtime.graphs.partition",
    "edge_runtime.graphs.quantize",
    "edge_runtime.graphs.verify",
)
BLOCKED = ("torch", "onnx", "onnxscript", "onnx_ir", "amqtt", "transformers", "safetensors", "sklearn")
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is blocked by this test", name=name)

sys.meta_path.insert(0, Blocked())
"""
MAIN = BLOCK + "from edge_runtime.cli import main; sys.exit(main(sys.argv[1:]))"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, check=False
    )


def modules() -> list[str]:
    """Every module of the device and the coordinator that works without torch."""
    found = []
    for name, folder in ROOTS.items():
        for source in sorted(folder.rglob("*.py")):
            parts = source.relative_to(folder).with_suffix("").parts
            found.append(".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)]))
    return [name for name in found if name not in NEEDS_TORCH]


@pytest.fixture(scope="module")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says "yes" where the words' numbers add up to more than 4."""
    import onnx
    from onnx import TensorProto, helper

    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "seq"]) for n in ("input_ids", "attention_mask")
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["real"]),
        helper.make_node("Cast", ["real"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["numbers", "one"], ["total"], keepdims=1),
        helper.make_node("Gemm", ["total", "slope", "offset"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("slope", TensorProto.FLOAT, [1, 2], [0.0, 1.0]),
        helper.make_tensor("offset", TensorProto.FLOAT, [2], [0.0, -4.0]),
    ]
    graph = helper.make_graph(nodes, "tiny", [ids, mask], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    words = {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1, "bad": 2, "good": 5}, "unk_token": "[UNK]"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words}
    entries = {
        "format": "edge-runtime 1",
        "family": "test",
        "labels": '["no", "yes"]',
        "max_length": "8",
        "tokenizer": json.dumps(tokenizer),
    }
    helper.set_model_props(model, entries)
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(model, str(path))
    return path


def loaded(code: str, *arguments: str) -> Any:
    """The JSON that a fresh interpreter prints last."""
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_without_torch(module: str) -> None:
    done = python(BLOCK + f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", NEEDS_TORCH)
def test_the_exceptions_do_need_torch(module: str) -> None:
    errors = python(BLOCK + f"import {module}").stderr
    assert "torch is blocked by this test" in errors or "onnx is blocked by this test" in errors


def test_model_families_import_and_describe_without_torch() -> None:
    done = python(BLOCK + "import edge_models, edge_models.bert, edge_models.hub, edge_models.packages")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [*DEVICE_COMMANDS, "models use"])
def test_help_works_without_torch(command: str) -> None:
    done = python(MAIN, *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: edge-runtime")


def test_profile_works_without_torch() -> None:
    found = loaded(MAIN, "profile", "--json")
    assert 0 < found["ram_available_bytes"] <= found["ram_total_bytes"]
    assert found["gflops"] > 0


def test_predict_works_without_torch(tiny_onnx: Path) -> None:
    done = python(MAIN, "predict", str(tiny_onnx), "good", "bad", "bad bad bad", "--json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["yes", "no", "yes"]


def test_torch_asked_for_and_not_installed_names_the_pip_command(tmp_path: Path) -> None:
    data = tmp_path / "texts.csv"
    data.write_text("text,label\ngood,yes\nbad,no\n")
    unknown = "import importlib.metadata as m; real = m.version\n"
    unknown += "def version(name):\n    if name == 'torch': raise m.PackageNotFoundError(name)\n    return real(name)\nm.version = version\n"
    done = python(
        unknown + MAIN,
        "train",
        str(tmp_path),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--backend",
        "torch",
    )
    assert done.returncode == 8
    assert "pip install '.[train]'" in done.stderr


def test_import_edge_runtime_loads_nothing_heavy() -> None:
    found = set(
        loaded(
            "import sys, json; before = set(sys.modules); import edge_runtime; print(json.dumps(sorted(set(sys.modules) - before)))"
        )
    )
    assert {name for name in found if name.partition(".")[0].startswith("edge_")} == {"edge_runtime"}
    heavy = {
        "numpy",
        "psutil",
        "msgpack",
        "onnxruntime",
        "tokenizers",
        "paho",
        "torch",
        "ssl",
        "asyncio",
        "sqlite3",
        "subprocess",
    }
    assert not heavy & {name.partition(".")[0] for name in found}


def test_onnxruntime_keeps_no_record_of_this_machine(tmp_path: Path, tiny_onnx: Path) -> None:
    code = "import os, sys; os.environ.update(HOME=sys.argv[2], XDG_CACHE_HOME=''); os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
    code += "from edge_runtime import Predictor; Predictor(sys.argv[1]).predict(['good']); import json; print(json.dumps('done'))"
    assert loaded(code, str(tiny_onnx), str(tmp_path)) == "done"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


AGENT = """
import json, sys
from pathlib import Path
import edge_models.bert, edge_runtime.cli, edge_runtime.join  # what `edge-runtime join` loads; the family comes with a manifest
from edge_runtime.agent import Agent
from edge_runtime.hardware import process_memory
from edge_runtime.local import DataOptions
from edge_runtime.session import Session
from edge_runtime.topics import Topics
from edge_runtime.transport import MqttTransport

folder = Path(sys.argv[1])
session = Session(folder / "texts.csv", folder / "cache", memory="auto", time_s=None, upload_bytes=None, threads=1, options=DataOptions(), say=print)
session.budget()
transport = MqttTransport("127.0.0.1", 1, "pi", "secret", Topics("fleet").device_filters("pi"))
agent = Agent("pi", "fleet", folder / "state", session, transport, print, families=("edge_models.bert",))
for _ in range(3):
    agent.tick()
print(json.dumps({"modules": sorted(sys.modules), "resident_bytes": process_memory()["VmRSS"]}))
"""


def test_the_idle_agent_is_small_and_knows_no_numbers(tmp_path: Path) -> None:
    from edge_runtime.budget import AGENT_RESERVE_BYTES

    found = loaded(AGENT, str(tmp_path))
    tops = {name.partition(".")[0] for name in found["modules"]}
    assert {"paho", "psutil", "msgpack"} <= tops
    assert not {"numpy", "onnxruntime", "torch", "onnx", "tokenizers", "edge_coordinator"} & tops
    assert found["resident_bytes"] < AGENT_RESERVE_BYTES
