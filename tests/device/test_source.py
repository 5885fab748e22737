"""Where a model is written: never over anybody's other files."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.cost import Calibration, DataShape
from edge_runtime.engine import Engine
from edge_runtime.errors import UsageError
from edge_runtime.local import Device, Planned, Prepared, train
from edge_runtime.model import ModelSpec
from edge_runtime.model_folder import check_model_folder, save_folder
from edge_runtime.records import Budget
from edge_runtime.source import Source, find_checkpoint, open_source
from tests.e2e.fleets import LABELS, tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A small model with a new head."""
    folder = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return open_source(find_checkpoint(str(folder), progress=print), LABELS, tmp_path_factory.mktemp("scratch"))


def save(out: Path, source: Source) -> ModelSpec:
    save_folder(out, source.spec, source.weights, source.tokenizer)
    return source.spec


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_folder_an_empty_one_and_one_with_hidden_files_may_take_a_model(tmp_path: Path, source: Source) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".gitignore").write_text("*")
    for name in ("new", "empty", "hidden"):
        spec = save(tmp_path / name, source)
        checkpoint = find_checkpoint(str(tmp_path / name), progress=print)
        assert open_source(checkpoint, None, tmp_path).spec == spec


def test_a_model_that_we_wrote_may_be_written_over(tmp_path: Path, source: Source) -> None:
    save(tmp_path / "m", source)
    (tmp_path / "m" / "model.onnx").write_bytes(b"made of it")
    check_model_folder(tmp_path / "m")
    save(tmp_path / "m", source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", b"years of work"),
        ("config.json", b'{"model_type": "bert"}'),
        ("config.json", b"\xff\xfe\x00"),
        ("config.json", b""),
        ("model.safetensors", b"of somebody else"),
        ("photos/1.jpg", b"\xff\xd8"),
    ],
)
def test_a_folder_with_other_things_is_refused_by_name_and_stays_as_it_is(
    tmp_path: Path, source: Source, name: str, content: bytes
) -> None:
    out = tmp_path / "mine"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"holds other things \({name.split('/')[0]}\): name a new folder"):
        save(out, source)
    assert contents(out) == {name: content}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, source: Source) -> None:
    (tmp_path / "m").write_bytes(b"a file")
    with pytest.raises(UsageError, match="is a file: name a folder"):
        save(tmp_path / "m", source)
    assert (tmp_path / "m").read_bytes() == b"a file"


def test_training_says_so_before_it_begins(tmp_path: Path, source: Source) -> None:
    (tmp_path / "notes.txt").write_bytes(b"mine")
    prepared = Prepared(tmp_path, None, DataShape(1, 1, 1.0), LABELS, 0, ())
    engine, calibration = Engine("torch", None, "float32", False), Calibration("torch", 0, 0, 0, 0, 0, 0)
    planned = Planned((), (), None, "nothing fits", Budget(1), source, prepared, engine, calibration)
    with pytest.raises(UsageError, match="holds other things"):
        train(planned, tmp_path, device=Device.measure(speed=False))
    assert contents(tmp_path) == {"notes.txt": b"mine"}
