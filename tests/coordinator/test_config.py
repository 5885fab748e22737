"""fleet.toml: what a person writes is read as it stands, or the key that is wrong is named."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_coordinator.config import CONFIG_FILE, BrokerSection, ModelSection, RunSection, load_config
from edge_coordinator.fleet import init
from edge_coordinator.methods import METHODS
from edge_coordinator.server_optimizer import ServerSettings
from edge_runtime.errors import UsageError
from edge_runtime.records import TrainSettings
from edge_runtime.wire import Round, decode, encode
from tests.samples import quickly

LEAST = '[fleet]\nname = "farm"\n[model]\nlabels = ["no", "yes"]\n'


def write(folder: Path, text: str | bytes) -> Path:
    """A folder with this fleet.toml."""
    (folder / CONFIG_FILE).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def with_key(section: str, key: str, value: str) -> str:
    """The least sound file with one key more, or another value."""
    if section == "model" and key == "labels":
        return LEAST.replace('["no", "yes"]', value)
    return LEAST + f"{key} = {value}\n" if section == "model" else LEAST + f"[{section}]\n{key} = {value}\n"


def test_a_fleet_needs_a_name_and_labels_and_has_a_default_for_all_else(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LEAST))
    assert (config.realm, config.folder) == ("farm", tmp_path)
    assert config.model == ModelSection(labels=("no", "yes"))
    assert (config.run, config.train, config.broker) == (RunSection(), TrainSettings(), BrokerSection())


def test_every_value_is_read(tmp_path: Path) -> None:
    text = """
    [fleet]
    name = "f_1-x"
    [model]
    base = "/models/x"
    family = "my.family"
    labels = ["ä", "b c", "\\U0001F525"]
    max_length = 64
    [run]
    name = "second"
    method = "straggler"
    rounds = 3
    goal = 20
    quorum = 5
    overselection = 2
    join_timeout_s = 1.5
    report_timeout_s = 10
    pause_s = 0
    [train]
    epochs = 2
    batch_size = 8
    learning_rate = 1
    head_learning_rate = 0.5
    weight_decay = 0
    optimizer = "sgd"
    seed = 9223372036854775807
    [broker]
    kind = "external"
    host = "h"
    port = 8883
    announce_host = "a"
    ca_file = "/ca"
    certfile = "/c"
    keyfile = "/k"
    """
    config = load_config(write(tmp_path, text))
    assert config.model == ModelSection("/models/x", "my.family", ("ä", "b c", "🔥"), 64)
    assert config.run == dataclasses.replace(
        RunSection("second", "straggler", 3, 20, 5, 2.0), join_timeout_s=1.5, report_timeout_s=10.0, pause_s=0.0
    )
    assert config.train == TrainSettings(2, 8, 1.0, 0.5, 0.0, "sgd", (1 << 63) - 1)
    assert config.broker == BrokerSection("external", "h", 8883, "a", "/ca", "/c", "/k")
    assert all(type(getattr(config.run, f.name)) is type(f.default) for f in dataclasses.fields(RunSection))


def test_certificates_are_found_from_the_folder_of_the_file_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(tmp_path / "farm", labels=["no", "yes"])
    path = tmp_path / "farm" / CONFIG_FILE
    text = path.read_text()
    for key, value in (("ca_file", "tls/ca.pem"), ("certfile", "../cert.pem"), ("keyfile", "/etc/key.pem")):
        text = text.replace(f'{key} = ""', f'{key} = "{value}"')
    path.write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in (tmp_path / "farm", Path("../farm")):
        broker = load_config(folder).broker
        assert Path(broker.ca_file).is_absolute() and Path(broker.certfile).is_absolute()
        assert Path(broker.ca_file).resolve() == tmp_path / "farm" / "tls" / "ca.pem"
        assert Path(broker.certfile).resolve() == tmp_path / "cert.pem"
        assert broker.keyfile == "/etc/key.pem"


def test_the_commented_file_that_init_writes_has_every_key_at_its_default(tmp_path: Path) -> None:
    init(tmp_path, name="farm", labels=["no", "yes"])
    config = load_config(tmp_path)
    assert config.model == ModelSection(labels=("no", "yes"))
    assert (config.run, config.train, config.broker) == (RunSection(), TrainSettings(), BrokerSection())
    text = (tmp_path / CONFIG_FILE).read_text()
    for cls in (ModelSection, RunSection, TrainSettings, BrokerSection):
        for field in dataclasses.fields(cls):
            assert f"\n{field.name} = " in text, f"the template does not show {field.name}"
    for method in METHODS:
        assert method in text


@pytest.mark.parametrize(("name", "own"), [("fedavg", 1.0), ("fedavgm", 1.0), ("fedadam", 0.03), ("fedyogi", 0.03)])
def test_a_server_optimizer_has_a_rate_of_its_own_that_may_be_replaced(tmp_path: Path, name: str, own: float) -> None:
    text = LEAST + f'[run]\nserver_optimizer = "{name}"\nserver_beta2 = 0.5\n'
    assert load_config(write(tmp_path, text)).run.server_settings == ServerSettings(name, own, 0.9, 0.5, 1e-3)
    assert load_config(write(tmp_path, text + "server_learning_rate = 2\n")).run.server_settings.learning_rate == 2.0


def with_method(folder: Path, method: str, **train: str) -> Path:
    """A fleet's folder with a method and keys of [train]."""
    path = init(folder / method, name="farm", labels=["no", "yes"], method=method)
    text = path.read_text()
    for key, value in train.items():
        text = re.sub(rf"^{key} = \S+", f"{key} = {value}", text, flags=re.MULTILINE)
    path.write_text(text)
    return path.parent


def test_a_method_with_adapters_has_a_rank_and_any_other_none(tmp_path: Path) -> None:
    for name, method in METHODS.items():
        assert load_config(with_method(tmp_path / "plain", name)).train.lora_rank == (
            method.rank if method.adapters else 0
        )
        ranked = with_method(tmp_path / "ranked", name, lora_rank="5")
        if method.adapters:
            assert load_config(ranked).train.lora_rank == 5
        else:
            with pytest.raises(
                UsageError, match="lora_rank must be 0 with the method .*: adapters are trained by lora,"
            ):
                load_config(ranked)


def test_a_mask_is_of_methods_without_adapters(tmp_path: Path) -> None:
    for name, method in METHODS.items():
        masked = with_method(tmp_path, name, mask_every="4")
        if method.adapters:
            with pytest.raises(UsageError, match=f"mask_every must be 0 with the method {name}, which trains adapters"):
                load_config(masked)
        else:
            assert load_config(masked).train.mask_every == 4


@pytest.mark.parametrize("codec", ["topk10", "auto"])
def test_what_a_codec_leaves_out_cannot_wait_for_adapters_that_are_made_anew(codec: str, tmp_path: Path) -> None:
    for name in ("flexlora", "flora"):
        with pytest.raises(UsageError, match=f"codec must be one of f32, f16, int8, int4 with the method {name}"):
            load_config(with_method(tmp_path, name, codec=f'"{codec}"'))
    assert load_config(with_method(tmp_path, "hetlora", codec=f'"{codec}"')).train.codec == codec


def test_targets_of_adapters_are_a_list_of_names(tmp_path: Path) -> None:
    assert load_config(with_method(tmp_path, "lora", lora_targets='["q", "v"]')).train.lora_targets == ("q", "v")


WRONG = [
    ("model", "base", "5", "[model] base must be str"),
    ("model", "labels", '"yes"', "[model] labels must be a list of texts"),
    ("model", "labels", "[1, 2]", "[model] labels must be a list of texts"),
    ("model", "labels", '["a", ""]', "[model] labels must be a list of texts"),
    ("model", "max_length", "2", "[model] max_length must be from 3 to 131072"),
    ("model", "max_length", "131073", "[model] max_length must be from 3 to 131072"),
    ("model", "labels", "[]", "[model] labels must name at least two"),
    ("model", "labels", '["a"]', "[model] labels must name at least two"),
    ("model", "labels", '["a", "a"]', "[model] labels must name at least two different"),
    ("model", "labels", f'["a", "{"x" * 201}"]', "[model] labels may be 4096 classes, each of at most 200"),
    ("model", "labels", str([f"l{i}" for i in range(4097)]), "[model] labels may be 4096 classes"),
    ("model", "max_length", "1.5", "[model] max_length must be int"),
    ("model", "max_length", "true", "[model] max_length must be int"),
    ("run", "name", '"a/b"', "run name 'a/b' must be 1 to 36"),
    ("run", "method", '"cafe"', "[run] method must be one of caff, full"),
    ("run", "rounds", "0", "[run] rounds must be 1 to 100000"),
    ("run", "rounds", "100001", "[run] rounds must be 1 to 100000"),
    ("run", "rounds", "1.0", "[run] rounds must be int, it is 1.0"),
    ("run", "goal", "0", "[run] wants 1 <= quorum <= goal <= 2000, they are 1 and 0"),
    ("run", "goal", "2001", "[run] wants 1 <= quorum <= goal <= 2000"),
    ("run", "quorum", "3", "[run] wants 1 <= quorum <= goal <= 2000, they are 3 and 2"),
    ("run", "overselection", "0.9", "overselection 1 to 10"),
    ("run", "overselection", "nan", "[run] overselection must be a finite number"),
    ("run", "join_timeout_s", "0", "[run] join_timeout_s must be above 0"),
    ("run", "join_timeout_s", "nan", "[run] join_timeout_s must be a finite number, it is nan"),
    ("run", "report_timeout_s", "inf", "[run] report_timeout_s must be a finite number, it is inf"),
    ("run", "report_timeout_s", "2e9", "[run] report_timeout_s must be above 0 and below 1e9"),
    ("run", "report_timeout_s", "1" + "0" * 400, "[run] report_timeout_s must be a finite number"),
    ("run", "pause_s", "-1", "[run] pause_s must be"),
    ("run", "pause_s", '"1m"', "[run] pause_s must be a finite number, it is '1m'"),
    ("run", "server_optimizer", '"adam"', "[run] server_optimizer must be one of fedavg, fedavgm, fedadam, fedyogi"),
    ("run", "server_learning_rate", "-1", "[run] server_learning_rate must be from 0 to 100"),
    ("run", "server_momentum", "1", "[run] server_momentum must be from 0 to 0.9999"),
    ("run", "server_beta2", "1.0", "[run] server_beta2 must be from 0 to 0.9999"),
    ("run", "server_tau", "0", "[run] server_tau must be from 1e-12 to 1, it is 0.0"),
    ("run", "sparse_rounds", "-1", "[run] sparse_rounds must be 0 to rounds, 10, it is -1"),
    ("run", "sparse_rounds", "11", "[run] sparse_rounds must be 0 to rounds, 10, it is 11"),
    ("run", "sparse_rounds", "0.5", "[run] sparse_rounds must be int, it is 0.5"),
    ("run", "sparse_density", "0", "[run] sparse_density must be from 0.0001 to 1, it is 0.0"),
    ("run", "sparse_density", "1.1", "[run] sparse_density must be from 0.0001 to 1, it is 1.1"),
    ("run", "sparse_density", "nan", "[run] sparse_density must be a finite number"),
    ("train", "mask_every", "-1", "mask_every must be from 0 to 65536, it is -1"),
    ("train", "mask_seed", str(1 << 63), "mask_seed must be from 0"),
    ("train", "epochs", "0", "epochs must be from 1 to 1000"),
    ("train", "batch_size", "5000", "batch_size must be from 1 to 4096"),
    ("train", "learning_rate", "nan", "[train] learning_rate must be a finite number"),
    ("train", "learning_rate", "-1", "learning_rate must be from 0 to 10"),
    ("train", "optimizer", '"lion"', "optimizer must be one of adamw, adamw8bit"),
    ("train", "proximal_mu", "-0.1", "proximal_mu must be from 0 to 1000.0, it is -0.1"),
    ("train", "proximal_mu", "nan", "[train] proximal_mu must be a finite number"),
    ("train", "seed", "-1", "seed must be from 0"),
    ("train", "seed", str(1 << 63), "seed must be from 0"),
    ("broker", "kind", '"mosquitto"', "[broker] kind must be embedded or external"),
    ("broker", "port", "65536", "[broker] port must be 0 to 65535"),
    ("broker", "port", '"1883"', "[broker] port must be int, it is '1883'"),
    ("broker", "host", "[]", "[broker] host must be str"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_key(
    tmp_path: Path, section: str, key: str, value: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(write(tmp_path, with_key(section, key, value)))
    assert message in str(caught.value)


@pytest.mark.parametrize("section", ["model", "run", "train", "broker"])
def test_an_unknown_key_is_named_with_those_there_are(tmp_path: Path, section: str) -> None:
    with pytest.raises(UsageError, match=rf"\[{section}\] has no 'naem'; it has \w+, \w+"):
        load_config(write(tmp_path, with_key(section, "naem", "1")))


def test_an_unknown_section_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"unknown section \[trian\]; there are \[fleet\], \[model\], \[run\], \[train\], \[broker\]"
    ):
        load_config(write(tmp_path, LEAST + "[trian]\nepochs = 1\n"))


@pytest.mark.parametrize("section", ["model", "run", "train", "broker"])
def test_a_value_in_place_of_a_section_is_named(tmp_path: Path, section: str) -> None:
    text = f'{section} = 5\n[fleet]\nname = "farm"\n'
    with pytest.raises(UsageError, match=rf"{section} must be a section: \[{section}\]"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["", "fleet = 5", "fleet = []", "[[fleet]]", "[fleet]", "[fleet]\nname = 5", "[model]\nlabels = ['a', 'b']"]
)
def test_a_fleet_without_a_name_is_told_so(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"\[fleet\] needs a name"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("name", ["", "Farm", "a b", "a/b", "#", "+", "é", "x" * 37, "a\\n", "a.b"])
def test_a_name_that_could_change_a_topic_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="must be 1 to 36 of a-z, 0-9, '-' and '_'"):
        load_config(write(tmp_path, LEAST.replace('"farm"', f'"{name}"')))


@pytest.mark.parametrize("content", [b"\xff", b"[fleet", b"name", b"\0", LEAST.encode() * 2, b"a = " + b"[" * 20_000])
def test_what_is_no_toml_is_refused_and_the_file_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match=CONFIG_FILE):
        load_config(write(tmp_path, content))


def test_a_base_that_is_a_folder_beside_the_file_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "farm"
    (folder / "base").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for base, expected in (("base", str(folder / "base")), ("elsewhere", "elsewhere"), ("minilm-l6", "minilm-l6")):
        config = load_config(write(Path("farm"), with_key("model", "base", f'"{base}"')))
        assert config.model.base == expected


def test_a_missing_file_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="make one with `edge-coordinator init"):
        load_config(tmp_path)


VALUES: list[Any] = [
    "true",
    "-1",
    "0",
    "1",
    "2.5",
    "nan",
    "inf",
    "1e400",
    '"x"',
    '""',
    "[]",
    '["a", "b"]',
    "{}",
    "1979-05-27",
    str(1 << 70),
]


@quickly(150)
@given(
    section=st.sampled_from(["fleet", "model", "run", "train", "broker"]),
    key=st.sampled_from(
        [f.name for cls in (ModelSection, RunSection, TrainSettings, BrokerSection) for f in dataclasses.fields(cls)]
    ),
    value=st.sampled_from(VALUES),
)
def test_a_file_that_is_accepted_is_one_that_can_be_announced_to_devices(
    tmp_path: Path, section: str, key: str, value: str
) -> None:
    text = (
        LEAST.replace('"farm"', '"farm"\n' + f"{key} = {value}")
        if section == "fleet"
        else with_key(section, key, value)
    )
    try:
        config = load_config(write(tmp_path, text))
    except UsageError:
        return
    run = config.run
    round_ = Round(run.name, run.rounds, 1, 1, run.method, config.train, run.join_timeout_s)
    assert decode(encode(round_, sent_at=0.0, boot=bytes(8), sequence=0), "round").body == round_
    assert all(map(math.isfinite, (run.report_timeout_s, run.pause_s, run.overselection)))
    assert 0 < run.report_timeout_s <= 1e9


@quickly(80)
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda t: (LEAST + t).encode("utf-8", "replace")))
def test_random_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    try:
        load_config(write(tmp_path, content))
    except UsageError as error:
        assert len(str(error)) > 10
