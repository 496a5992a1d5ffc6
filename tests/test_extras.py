"""A command without its extra says in one line what to install; packages are hidden in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvcompile.app import extras

COMMANDS = {
    "generate": ["a cat", "-o", "a.mp4"],
    "explain": [],
    "bench": [],
    "compare": ["a.mp4", "b.mp4"],
    "bisect": ["dump"],
}


def run(folder: Path, hidden: list[str], *arguments: str, call: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line, or other code, in a process that has none of these packages."""
    call = call or "import runpy; runpy.run_module('hvcompile', run_name='__main__')"
    code = f"import sys; sys.modules |= dict.fromkeys({hidden!r}); sys.argv = ['hvcompile', *{arguments!r}]; {call}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("hidden", "line"),
    [
        (["av"], "needs av, which is not installed"),
        (["skimage", "PIL", "jinja2"], "needs scikit-image, pillow and jinja2, which are not installed"),
        (["diffusers"], "needs diffusers, which is not installed"),
    ],
)
def test_a_command_without_its_extra(command: str, hidden: list[str], line: str, tmp_path: Path) -> None:
    if hidden == ["diffusers"] and command in ("compare", "bisect"):
        pytest.skip("it needs none")
    done = run(tmp_path, hidden, command, *COMMANDS[command])
    extra = "cli" if command in ("compare", "bisect") else "cli,diffusers"
    assert done.stderr == f"error: hvcompile {command} {line}: pip install 'hvcompile[{extra}]'\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hidden", ["typer", "rich"])
@pytest.mark.parametrize("call", ["", "from hvcompile.app.cli import app; app()"])
def test_no_command_line_at_all(hidden: str, call: str, tmp_path: Path) -> None:
    done = run(tmp_path, [hidden], "--help", call=call)
    assert done.stderr == f"error: hvcompile needs {hidden}, which is not installed: pip install 'hvcompile[cli]'\n"
    assert (done.returncode, done.stdout) == (2, "")


def test_help_needs_no_extra_but_the_command_line_s(tmp_path: Path) -> None:
    hidden = [*extras.EXTRAS["diffusers"], "av", "imageio", "skimage", "PIL", "jinja2"]
    for command in ([], ["generate"], ["bench"], ["explain"]):
        done = run(tmp_path, hidden, *command, "--help")
        assert done.returncode == 0, done.stderr
        assert "Usage: hvcompile" in done.stdout
        assert done.stderr == ""


def test_a_report_without_jinja2(tmp_path: Path) -> None:
    code = (
        "import hvcompile.report\n"
        "try: hvcompile.report.write('a.html')\n"
        "except hvcompile.HvcompileError as error: print(error)"
    )
    done = run(tmp_path, ["jinja2"], call=f"exec({code!r})")
    assert done.stdout == "a report needs jinja2, which is not installed: pip install 'hvcompile[cli]'\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_the_backend_needs_no_extra(tmp_path: Path) -> None:
    """What ``import hvcompile`` and the backend import is torch alone."""
    hidden = [module for modules in extras.EXTRAS.values() for module in modules]
    done = run(tmp_path, hidden, call="import hvcompile, hvcompile.backend, hvcompile.report")
    assert (done.returncode, done.stderr) == (0, "")
