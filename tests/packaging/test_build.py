"""What a user gets: the source archive and the wheel, built from a copy and installed into a folder of its own."""

from __future__ import annotations

import configparser
import email
import email.message
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("edge_runtime", "coordinator", "models", "tests", "tools")


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def roots(config: configparser.ConfigParser) -> dict[str, Path]:
    """Import package -> its folder."""
    pairs = (line.split("=") for line in lines(config["options"]["package_dir"]))
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


def packages_in(roots: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """Every folder with an __init__.py below the source roots, and its import name."""
    for name, folder in roots.items():
        for init in folder.rglob("__init__.py"):
            yield ".".join([name, *init.parent.relative_to(folder).parts]), init.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archive and the wheel, which is made from the archive and not from the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".*"))
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
        command.append("--no-isolation")  # else pip fetches the setuptools that pyproject.toml wants
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Iterator[zipfile.ZipFile]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    return email.message_from_string(dist_info(wheel, "METADATA"))


def test_setup_cfg_lists_exactly_the_packages_that_exist(
    config: configparser.ConfigParser, roots: dict[str, Path]
) -> None:
    listed = lines(config["options"]["packages"])
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(name for name, _ in packages_in(roots))


def test_every_folder_with_sources_is_a_package(roots: dict[str, Path]) -> None:
    for folder in roots.values():
        assert all((source.parent / "__init__.py").exists() for source in folder.rglob("*.py"))


def test_every_root_package_is_marked_as_typed(config: configparser.ConfigParser, roots: dict[str, Path]) -> None:
    assert all((folder / "py.typed").read_bytes() == b"" for folder in roots.values())
    listed = {name: [p.strip() for p in files.split(",")] for name, files in config["options.package_data"].items()}
    assert all(files[0] == "py.typed" for files in listed.values())
    assert {name: files[1:] for name, files in listed.items() if files[1:]} == {"edge_models": ["graphs/*.graphs"]}
    assert listed.keys() == roots.keys()


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile, roots: dict[str, Path]) -> None:
    expected = {f"{name}/py.typed" for name in roots}
    for package, folder in packages_in(roots):
        expected |= {f"{package.replace('.', '/')}/{source.name}" for source in folder.glob("*.py")}
    graphs = list((roots["edge_models"] / "graphs").glob("*.graphs"))
    assert len(graphs) >= 7
    expected |= {f"edge_models/graphs/{path.name}" for path in graphs}
    found = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert found == expected


def test_the_wheel_is_for_any_machine(wheel: zipfile.ZipFile) -> None:
    assert "Root-Is-Purelib: true" in dist_info(wheel, "WHEEL")
    assert "Tag: py3-none-any" in dist_info(wheel, "WHEEL")


def test_the_wheel_has_both_commands(wheel: zipfile.ZipFile, config: configparser.ConfigParser) -> None:
    found = configparser.ConfigParser()
    found.read_string(dist_info(wheel, "entry_points.txt"))
    wanted = dict(line.split(" = ") for line in lines(config["options.entry_points"]["console_scripts"]))
    assert dict(found["console_scripts"]) == wanted
    assert set(wanted) == {"edge-runtime", "edge-coordinator"}


def test_the_wheel_says_its_licence_and_python(wheel: zipfile.ZipFile, metadata: email.message.Message) -> None:
    assert dist_info(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


def test_a_plain_install_brings_no_torch(metadata: email.message.Message) -> None:
    plain = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    names = {r.split(";")[0].split(">")[0].split("<")[0].split("=")[0].strip() for r in plain}
    assert names == {"numpy", "onnxruntime", "tokenizers", "psutil", "msgpack", "paho-mqtt", "tomli"}


def test_the_archive_holds_what_the_wheel_is_made_of(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        *FILES,
        "edge_runtime/py.typed",
        "coordinator/edge_coordinator/cli.py",
        "models/edge_models/bert.py",
    } <= names


def test_the_installed_wheel_runs_without_the_checkout(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.whl")
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(path),
    ]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL)
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}
    for program in ("edge-runtime", "edge-coordinator"):
        command = [sys.executable, str(target / "bin" / program), "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
        assert shown.stdout.startswith(f"usage: {program}")
    where = "import edge_runtime, edge_coordinator, edge_models as m; print(edge_runtime.__file__, edge_coordinator.__file__, m.__file__)"
    files = subprocess.run(
        [sys.executable, "-c", where], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert all(file.startswith(str(target)) for file in files.stdout.split())
