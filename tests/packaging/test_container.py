"""The Dockerfile against the project: it copies what the wheel is made of, installs no torch, runs without rights.

No container is built here: that needs a base image, which a test cannot fetch.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from tests.packaging.test_build import FILES

ROOT = Path(__file__).parents[2]
LINES = [line.strip() for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()]
STEPS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]


def steps(name: str) -> list[str]:
    """What follows each instruction of that name."""
    return [rest for step, rest in STEPS if step == name]


def test_the_first_stage_copies_what_the_wheel_is_made_of_and_nothing_is_ignored() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {
        line.split("=")[1].strip().split("/")[0] for line in config["options"]["package_dir"].split("\n") if line
    }
    copied = {word for rest in steps("COPY") if not rest.startswith("--") for word in rest.split()[:-1]}
    assert copied == {*FILES, *folders}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


def test_both_stages_begin_with_a_python_that_we_promise() -> None:
    found = [re.fullmatch(r"python:3\.(\d+)-slim(?: AS \w+)?", rest) for rest in steps("FROM")]
    assert len(found) == 2 and all(match and 10 <= int(match[1]) <= 13 for match in found)
    assert len({match[1] for match in found if match}) == 1


def test_it_installs_the_base_alone_from_wheels_and_runs_without_rights() -> None:
    (install,) = [rest for rest in steps("RUN") if "pip install" in rest]
    assert "--only-binary=:all: /wheel/*.whl" in install and "[" not in install
    assert steps("USER") == ["10001:10001"] and "useradd --uid 10001" in install
    assert steps("ENTRYPOINT") == ['["edge-runtime"]']
