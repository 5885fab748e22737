"""Ctrl-C at the very beginning, while the modules of a command are still loading."""

from __future__ import annotations

import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.start import NARROW

ROOT = Path(__file__).parents[2]
INTERRUPTED_AT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {late!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from {module} import main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["edge_runtime.start", "edge_coordinator.start"])
@pytest.mark.parametrize("late", ["{package}.cli", "edge_runtime.console", "edge_runtime.data"])
def test_ctrl_c_while_modules_load_is_one_plain_line(module: str, late: str) -> None:
    code = INTERRUPTED_AT.format(module=module, late=late.format(package=module.partition(".")[0]))
    if module == "edge_runtime.start" and late == "edge_runtime.data":
        code = code.replace("edge_runtime.data", "edge_runtime.commands")
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_ctrl_c_that_a_library_turns_into_an_import_error_of_its_own_is_no_traceback(tmp_path: Path) -> None:
    """As numpy and onnxruntime do, whose modules in C were loading others when it came."""
    (tmp_path / "library.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n"
        "    raise ImportError('its core failed to import') from None\n"
    )
    (tmp_path / "program.py").write_text("def main():\n    import library\n")
    for program, expected in (("program", (130, "", "stopped\n")), ("missing", (1, "", "ModuleNotFoundError"))):
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edge_runtime.start import start; sys.exit(start({program!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == expected[:2]
        assert expected[2] in done.stderr and (expected[0] == 1 or done.stderr == expected[2])


def test_what_is_installed_starts_there_and_has_loaded_nothing_before() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for line in config["options.entry_points"]["console_scripts"].split("\n"):
        if line:
            name, _, place = line.partition(" = ")
            module, _, function = place.partition(":")
            assert callable(getattr(importlib.import_module(module), function))
            code = f"import sys, {module}; print([m for m in sys.modules if m.startswith('edge_')])"
            shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            assert not {"edge_runtime.cli", "edge_coordinator.cli", "edge_runtime.console"} & set(eval(shown)), name


@pytest.mark.parametrize(
    "program", ["from edge_runtime.start import main; sys.exit(main())", "import runpy; runpy.run_path('setup.py')"]
)
def test_a_python_of_32_bits_is_refused_in_one_line_before_anything_is_loaded_or_built(program: str) -> None:
    """As 32-bit Raspberry Pi OS has it, also above a 64-bit kernel. `tools/arm` does it with a real one."""
    code = f"import sys; sys.maxsize = 2**31 - 1; {program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.removeprefix("error: ").splitlines()
    assert said == [NARROW]
