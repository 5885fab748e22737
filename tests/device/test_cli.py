"""The command line of a device: how a call is read, and that a wrong one is told so with the exit code of its kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.cli import main, parse
from tests.e2e.fleets import tiny_model, write_data


def ends(arguments: list[str]) -> int:
    """The exit code of a call, whoever ends it."""
    try:
        return main(arguments)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


@pytest.mark.parametrize(
    "words",
    [
        ["m.onnx", "one", "two", "--top", "9"],
        ["m.onnx", "--top", "9", "one", "two"],
        ["--top", "9", "m.onnx", "one", "two"],
        ["m.onnx", "one", "--top", "9", "two"],
        ["m.onnx", "--top", "9", "--", "one", "two"],
        ["m.onnx", "one", "--top=9", "--", "two"],
    ],
)
def test_flags_of_predict_stand_before_between_and_after_the_texts(words: list[str]) -> None:
    parsed = parse(["predict", *words])
    assert (parsed.model, parsed.text, parsed.top) == (Path("m.onnx"), ["one", "two"], 9)


def test_a_text_may_look_like_a_number_a_dash_or_after_two_dashes_like_a_flag() -> None:
    assert parse(["predict", "m.onnx", "--top", "2", "-5", "-", "- and so on"]).text == ["-5", "-", "- and so on"]
    assert parse(["predict", "m.onnx", "--top", "2", "one", "--", "--two", "-h"]).text == ["one", "--two", "-h"]


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "m.onnx", "--tip", "9", "one"],
        ["predict", "m.onnx", "--top", "9", "one", "-x"],
        ["predict", "m.onnx", "--top", "0", "one"],
        ["predict", "m.onnx", "--threads", "-1", "one"],
        ["plan", "m", "--data", "d.csv", "--threads", "0"],
        ["profile", "more"],
        ["join", "--config", "c.toml", "--epochs", "3"],
    ],
)
def test_flags_and_words_that_a_command_does_not_know_are_usage_errors(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(words) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["one", "--file", "t.txt"], "texts and --file together"),
        (["one", "--evaluate", "d.csv"], "texts and --evaluate together"),
        (["--evaluate", "d.csv", "--file", "t.txt"], "--file and --evaluate together"),
    ],
)
def test_predict_takes_its_texts_from_one_place(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(["predict", "m.onnx", *words]) == 2
    assert named in capsys.readouterr().err


def test_an_export_to_a_folder_is_a_usage_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(["export", "no-such-model", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder: name the ONNX file to write" in capsys.readouterr().err


def test_a_training_without_a_place_for_its_model_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ends(["train", "no-such-model", "--data", "no-such-file.csv"]) == 2
    assert "name a folder for the model, --out, or for its adapters, --adapter-out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--max-length", "65"], 2, "max_length must be from 3 to the model's 64 positions, it is 65"),
        (["--max-length", "0"], 2, "max_length must be from 3"),
        (["--max-length", "2"], 2, "max_length must be from 3"),
        (["--family", "json"], 2, "'json' is not a model family"),
        (["--family", "no.such.module"], 2, "cannot be imported"),
        (["--memory", "450"], 2, "450 without a unit is bytes; did you mean 450MB?"),
        (["--memory", "450TB"], 2, "units are B, KB, MB, GB (of 1000), KiB, MiB, GiB or K, M, G (of 1024)"),
        (["--upload", "8"], 2, "did you mean 8MB?"),
        (["--time", "1d"], 2, "units are s, m and h"),
        (["--epochs", "0"], 2, "epochs must be from 1"),
        (["--holdout", "2"], 2, "between 0 and 1"),
        ([], 3, "has one label, 'yes': a classifier needs examples of two at least"),
    ],
)
def test_the_exit_code_tells_a_wrong_flag_from_wrong_data(
    tmp_path: Path, tiny: Path, flags: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "one-label.csv"
    data.write_text("text,label\n" + "some words,yes\n" * 20)
    assert ends(["plan", str(tiny), "--data", str(data), *flags]) == code
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_max_length_that_the_model_has_is_taken(tmp_path: Path, tiny: Path) -> None:
    data = write_data(tmp_path / "d.csv", 1)
    assert ends(["plan", str(tiny), "--data", str(data), "--max-length", "64", "--memory", "4GB", "--json"]) == 0
