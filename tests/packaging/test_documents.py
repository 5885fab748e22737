"""The documents against the code: flags, commands, exit codes, events, fields, links. What drifts fails here."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import edge_runtime
from edge_coordinator import cli as coordinator
from edge_coordinator.config import BrokerSection, ModelSection, RunSection
from edge_coordinator.ledger import Member
from edge_coordinator.methods import METHODS
from edge_runtime import cli as device
from edge_runtime import wire
from edge_runtime.credentials import DeviceSection
from edge_runtime.errors import EdgeError
from edge_runtime.records import Budget, CostRow, Plan, Pruning, TrainReport, TrainSettings
from tests.samples import DEVICE_COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS: dict[str, Callable[[list[str]], int]] = {"edge-runtime": device.main, "edge-coordinator": coordinator.main}
COMMAND = re.compile(r"\b(edge-runtime|edge-coordinator)((?: [^`\n#|;&<>]*)?)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHERS = {  # flags of other programs that the documents speak of
    "tools/demo": {
        "--data",
        "--model",
        "--method",
        "--devices",
        "--rounds",
        "--seed",
        "--alpha",
        "--broker",
        "--dir",
        "--json",
        "--help",
    },
    "tools.datasets": {"--dir"},
    "tools/arm": {"--system", "--mirror", "--work"},
    "tools/bench": {
        "--steps",
        "--repeats",
        "--configurations",
        "--lora",
        "--rows",
        "--out",
        "--quick",
        "--methods",
        "--page",
        "--data",
        "--fleets",
        "--seeds",
        "--rates",
        "--models",
        "--work",
    },
}


@pytest.fixture(scope="module")
def flags() -> dict[str, dict[str, set[str]]]:
    """Program -> command -> the flags that its --help shows; "" is the program without a command."""
    found: dict[str, dict[str, set[str]]] = {}
    for program, main in PROGRAMS.items():
        top = help_of(main, [])
        commands = re.findall(r"^    ([a-z]+)(?:  |$)", top, re.MULTILINE)
        found[program] = {"": set(FLAG.findall(top))}
        for command in commands:
            found[program][command] = set(FLAG.findall(help_of(main, [command])))
    for nested in ("compare", "choose"):
        found["edge-coordinator"]["sim"] |= set(FLAG.findall(help_of(coordinator.main, ["sim", nested])))
    for nested in ("install", "print", "uninstall"):
        found["edge-runtime"]["service"] |= set(FLAG.findall(help_of(device.main, ["service", nested])))
    return found


def help_of(main: Callable[[list[str]], int], arguments: list[str]) -> str:
    """What --help prints, without the examples below it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    return out.getvalue().partition("\nexamples:")[0]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def mentions(document: str) -> Iterator[tuple[str, list[str]]]:
    """Every call of ours in code blocks and in `code`: the program and its words."""
    code = [block for _, block in FENCE.findall(document)] + re.findall(r"`([^`\n]+)`", FENCE.sub("", document))
    for piece in code:
        for line in piece.splitlines():
            if not line.lstrip().startswith("#"):
                for program, rest in COMMAND.findall(line):
                    yield program, shlex.split(rest.replace("...", ""))


def test_both_commands_have_their_commands(flags: dict[str, dict[str, set[str]]]) -> None:
    assert set(flags["edge-runtime"]) == set(DEVICE_COMMANDS)
    assert set(flags["edge-coordinator"]) == {
        "",
        "init",
        "enroll",
        "serve",
        "broker",
        "devices",
        "runs",
        "models",
        "sim",
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_line_in_a_document_is_one_that_exists(path: Path, flags: dict[str, dict[str, set[str]]]) -> None:
    for program, words in mentions(text(path)):
        if words and not words[0].startswith("-"):
            assert words[0] in flags[program], f"{program} {words[0]}"
            known = flags[program][words[0]]
        else:
            known = flags[program][""] if not words else set().union(*flags[program].values())
        assert set(FLAG.findall(" ".join(words))) <= known, f"{program} {' '.join(words)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_that_a_document_names_exists(path: Path, flags: dict[str, dict[str, set[str]]]) -> None:
    ours = set().union(*(known for commands in flags.values() for known in commands.values()))
    assert set(FLAG.findall(text(path))) <= ours | set().union(*OTHERS.values())


def test_the_readme_shows_every_command(flags: dict[str, dict[str, set[str]]]) -> None:
    shown = {(program, words[0]) for program, words in mentions(text(ROOT / "README.md")) if words}
    for command in ("profile", "plan", "train", "join", "export", "predict", "serve", "models"):
        assert ("edge-runtime", command) in shown
    for command in ("init", "enroll", "serve", "models"):
        assert ("edge-coordinator", command) in shown


def test_demo_has_the_flags_that_documents_use() -> None:
    source = text(ROOT / "tools" / "demo.py") + "".join(text(p) for p in (ROOT / "tools").glob("demo*/*.py"))
    for flag in OTHERS["tools/demo"] - {"--help"}:
        assert f'"{flag}"' in source


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_documents_uses_public_names(path: Path) -> None:
    for language, block in FENCE.findall(text(path)):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    assert node.module == "edge_runtime"
                    assert {alias.name for alias in node.names} <= set(edge_runtime.__all__)


def test_the_readme_lists_every_exit_code() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", text(ROOT / "README.md"), re.MULTILINE)}
    assert table == {0, 130, EdgeError.exit_code, *(error.exit_code for error in EdgeError.__subclasses__())}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text(path))):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text(linked)), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"`((?:edge_runtime|coordinator|models|tests|tools|docs)/[\w./-]+)`", text(path)):
        assert (ROOT / name).exists(), name


def events(folder: str) -> set[str]:
    """The events that the sources of one side emit."""
    sources = "".join(text(p) for p in (ROOT / folder).rglob("*.py"))
    return set(re.findall(r'"event": "([a-z-]+)"', sources))


def test_operations_lists_every_event_of_both_sides() -> None:
    document = text(ROOT / "docs" / "operations.md")
    of_coordinator, of_device = document.split("`edge-coordinator serve --json`:")[1].split(
        "`edge-runtime join --json`:"
    )
    for event in events("coordinator"):
        assert f"`{event}`" in of_coordinator
    acks = {"committed", "rejected", "late", "excluded", "declined", "problem", "storage-error"}  # named by a variable
    for event in events("edge_runtime") | acks:
        assert f"`{event}`" in of_device
    for field in dataclasses.fields(TrainReport):
        assert field.name in of_device


def test_wire_names_every_message_and_field() -> None:
    document = text(ROOT / "docs" / "wire.md")
    for kind, record in wire.MESSAGES.items():
        (paragraph,) = re.findall(rf"^\*\*`{kind}`\*\*(.+?)\n\n", document, re.MULTILINE | re.DOTALL)
        for field in dataclasses.fields(record):
            assert re.search(rf"`?\b{field.name}\b`?", paragraph), f"{kind}.{field.name}"
    records = document.split("Records inside:")[1].split("## Blobs")[0]
    for record in (TrainSettings, Budget, CostRow, Plan, Pruning):
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in records, field.name


def test_wire_gives_the_limits_of_the_code() -> None:
    from edge_coordinator.aggregate import MAX_DELTA, MAX_EXAMPLES, MAX_MEMBERS
    from edge_runtime.manifest import MAX_TENSOR_BYTES
    from edge_runtime.transfer import CREDIT_BYTES, CREDIT_CHUNKS, FIRST_CHUNK_BYTES
    from edge_runtime.transport import MAX_MESSAGE_BYTES

    document = text(ROOT / "docs" / "wire.md")
    assert (wire.PROTOCOL, wire.MAX_CONTROL_BYTES, wire.MAX_CHUNK_BYTES) == (1, 16 << 10, 256 << 10)
    assert wire.MAX_JOIN_BYTES == 128 << 10
    assert (CREDIT_BYTES, CREDIT_CHUNKS, FIRST_CHUNK_BYTES) == (4 << 20, 16, 64 << 10)
    assert (wire.MAX_MANIFEST_BYTES, MAX_TENSOR_BYTES) == (512 << 10, 8 << 30)
    assert (MAX_MEMBERS, MAX_EXAMPLES, MAX_DELTA) == (2000, 1 << 20, 8.0)
    assert wire.CHUNK_HEADER.size == 4 + 32 + 8 + 4 + 4
    for number in (
        f"{MAX_MESSAGE_BYTES:,} bytes",
        "at most 16 chunks and 4 MiB",
        "512 KiB, 64 MiB, 8 GiB",
        "16 KiB; `join` 128 KiB",
        "| 2000 |",
        "| 2^20 |",
    ):
        assert number in document


def test_memory_has_the_constants_of_the_law() -> None:
    from edge_runtime import cost

    document = text(ROOT / "docs" / "memory.md")
    law = cost.LAW
    assert (law.per_block, law.per_inner, law.working, law.prefix) == (8, 2, 4, 2)
    for formula in (
        "saved    = (8 + 2 f/d) u",
        "prefix   = (4 + 2 f/d) u",
        "working  = 4 u",
        "one trained block keeps",
    ):
        assert formula in document
    assert f"* {cost.MARGIN} + {cost.HEAP_BYTES >> 20} MiB" in document
    assert f"{cost.BUCKETS} batches that are sorted by length together" in document


def test_methods_lists_every_method() -> None:
    document = text(ROOT / "docs" / "methods.md")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", document, re.MULTILINE)) == set(METHODS)


def test_simulation_lists_classes_with_their_figures_partitions_and_keys() -> None:
    from edge_coordinator.sim.classes import BUILT_IN, KEYS
    from edge_coordinator.sim.partition import HELP

    document = text(ROOT / "docs" / "simulation.md")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| .+? \| (\d+) (MiB|GiB) \| ([\d.]+) \|", document, re.MULTILINE)
    shown = {name: (int(size) << {"MiB": 20, "GiB": 30}[unit], float(gflops)) for name, size, unit, gflops in rows}
    assert set(shown) == set(BUILT_IN)
    for name, (budget, gflops) in shown.items():
        assert BUILT_IN[name].memory_bytes == budget
        assert BUILT_IN[name].gflops == pytest.approx(gflops, rel=0.01)
    assert set(re.findall(r"^\| `([a-z]+)[:`]", document, re.MULTILINE)) - {"rounds", "sim"} == set(
        re.findall(r"(?:^|; )([a-z]+)", HELP)
    )
    (block,) = re.findall(r"```toml\n(.+?)```", document, re.DOTALL)
    assert set(re.findall(r"^([a-z]+) = ", block, re.MULTILINE)) == set(KEYS)


def test_the_class_file_of_the_document_is_one_that_can_be_read(tmp_path: Path) -> None:
    from edge_coordinator.sim.classes import read_classes

    (block,) = re.findall(r"```toml\n(.+?)```", text(ROOT / "docs" / "simulation.md"), re.DOTALL)
    (tmp_path / "my.toml").write_text(block)
    assert read_classes(tmp_path / "my.toml")["gateway"].availability == 0.8


def test_round_lists_the_states_of_a_member() -> None:
    document = text(ROOT / "docs" / "round.md")
    (named,) = re.findall(r"status is (.+?)\.", (Member.__doc__ or "").replace("\n", " "))
    for status in re.split(r", | or ", named):
        assert f"| `{status.strip()}` |" in document


def test_configuration_keys_that_operations_names_exist() -> None:
    sections = (ModelSection, RunSection, BrokerSection, DeviceSection, TrainSettings)
    known = {field.name for section in sections for field in dataclasses.fields(section)}
    document = text(ROOT / "docs" / "operations.md") + text(ROOT / "docs" / "round.md")
    assert {
        "announce_host",
        "certfile",
        "keyfile",
        "ca_file",
        "join_timeout_s",
        "report_timeout_s",
        "overselection",
    } <= known
    for key in re.findall(r"`\[(?:model|run|broker|train|device)\] (\w+)", document):
        assert key in known


def test_decisions_are_numbered_without_gaps_and_dated() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        assert text(page).startswith(f"# {page.name[:4]} ")
        assert re.match(r"# .+\n\n\d{4}-\d\d-\d\d, (accepted|replaced by \d{4})\.\n", text(page))
        assert len(text(page).splitlines()) <= 60
