"""What `tools/arm` works out without a network: apt's sources, requirements, the emulator's script, comparisons."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import UsageError
from tests.packaging.test_documents import OTHERS
from tools.arm import parser, work_folder
from tools.arm_apt import machine_sources, sources_for
from tools.arm_checks import alignment, logits_apart, step_apart
from tools.arm_userland import PI4, requirements, wrapper

NEW = """# the archive
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""
OLD = """deb [arch=amd64 signed-by=/etc/apt/keys/debian.gpg] http://old.example/debian bookworm main contrib # archive
#deb http://off.example/debian bookworm main
deb-src http://source.example/debian bookworm main
deb http://other.example/tool stable main
"""


def test_the_machines_own_debian_entries_become_those_of_another_release() -> None:
    assert sources_for([NEW], "bookworm", "trixie") == (
        "Types: deb\nURIs: http://mirror.example/debian\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        "Suites: trixie\nComponents: main\n"
    )
    assert sources_for([OLD, NEW], "bookworm", "bookworm").split("\n\n")[0] == (
        "Types: deb\nURIs: http://old.example/debian\nSigned-By: /etc/apt/keys/debian.gpg\nSuites: bookworm\nComponents: main"
    )


def test_sources_come_from_a_debian_machine_or_a_named_mirror(tmp_path: Path) -> None:
    (tmp_path / "etc/apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "etc/apt/sources.list.d/debian.sources").write_text(NEW)
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_CODENAME="bookworm"\n')
    assert "mirror.example" in machine_sources("trixie", "", tmp_path)
    (tmp_path / "etc/os-release").write_text("ID=ubuntu\nVERSION_CODENAME=noble\n")
    with pytest.raises(UsageError, match="--mirror"):
        machine_sources("trixie", "", tmp_path)
    assert "URIs: http://named.example\nSuites: trixie" in machine_sources("trixie", "http://named.example", tmp_path)


def test_the_script_that_stands_for_python_passes_every_word_on(tmp_path: Path) -> None:
    script = tmp_path / "a python"
    script.write_text(wrapper(Path("/bin/echo"), PI4, tmp_path / "root", script, "3.11"))
    script.chmod(0o755)
    done = subprocess.run([script, "-c", "two  words"], capture_output=True, text=True, check=True)
    expected = f"-cpu cortex-a72 -L {tmp_path}/root -0 {script} {tmp_path}/root/usr/bin/python3.11 -c two  words\n"
    assert done.stdout == expected


def test_what_is_fetched_is_the_base_install_and_pip() -> None:
    found = requirements((Path(__file__).parents[2] / "setup.cfg").read_text())
    assert found[-1] == "pip"
    assert {"numpy", "onnxruntime", "tokenizers"} <= {line.partition(">=")[0] for line in found}
    assert not any(line.startswith("torch") for line in found)


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not ours"):
        (tmp_path / "thesis.txt").touch()
        work_folder(tmp_path)
    own = work_folder(tmp_path / "own")
    (own / "results/old").touch()
    assert list((work_folder(own) / "results").iterdir()) == [own / "results/state"]


def test_logits_are_compared_without_what_softmax_takes_away() -> None:
    logits = np.array([1.0, -2.0, 0.5])
    one, other = (np.exp(x) / np.exp(x).sum() for x in (logits, logits + np.array([0.3, 0.0, 0.0])))
    assert logits_apart(*({"a": p[0], "b": p[1], "c": p[2]} for p in (one, one))) == 0
    assert logits_apart(*({"a": p[0], "b": p[1], "c": p[2]} for p in (one, other))) == pytest.approx(0.2)


def test_steps_are_compared_by_their_length_and_none_is_no_step() -> None:
    start = {"w": np.zeros(2, np.float32), "b": np.ones(1, np.float32)}
    one, other = ({"w": np.array([3.0, 4.0], np.float32), "b": np.full(1, b, np.float32)} for b in (1.0, 1.5))
    assert step_apart(start, other, one) == pytest.approx(0.1)
    assert step_apart(start, one, one) == 0
    assert step_apart(start, start, start) == 1


def test_a_shared_object_says_how_large_pages_may_be() -> None:
    assert alignment(Path(sys.executable).resolve().read_bytes()) >= 4096
    assert alignment(b"a text") == 0


def test_the_options_that_documents_name_exist() -> None:
    shown = parser().format_help()
    assert all(flag in shown for flag in OTHERS["tools/arm"]) and "examples:" in shown
