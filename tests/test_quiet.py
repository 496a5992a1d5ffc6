"""What a user reads is ours alone: no complaints of imports, no loading bars; and errors are never hidden."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from hvcompile.app import quiet

SMALL = ["--frames", "5", "--height", "32", "--width", "48"]


def run(folder: Path, *arguments: str) -> tuple[list[str], list[str]]:
    """The lines that a command writes to its two streams."""
    command = [sys.executable, "-m", "hvcompile", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def first_cells(lines: list[str]) -> list[str]:
    return [line.strip("│ ").split("│")[0].strip() for line in lines if line.startswith("│")]


def test_an_explanation_prints_its_tables(tmp_path: Path) -> None:
    out, err = run(tmp_path, "explain", *SMALL)
    assert err == []
    assert out[0].strip() == "trunk"
    assert first_cells(out)[-1].startswith("sent and received")


def test_a_bench_says_what_it_does(tmp_path: Path) -> None:
    size = ["--blocks", "1+2", "--hidden", "32", "--frames", "5", "--height", "32", "--width", "32"]
    quick = ["--threads", "1", "--steps", "3", "--repeats", "1", "--lower", "eager", "--contenders", "hvfast"]
    out, err = run(tmp_path, "bench", *size, *quick, "--device", "cpu", "--no-shapes")
    systems = ("eager", "hvfast")
    assert err == [f"{system}: {doing}" for doing in ("compiling", "round 1 of 1", "steps") for system in systems]
    assert out[0].startswith("random weights, 1+2 blocks")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """A library of the kind that puts a handler of its own in place."""
    logger = logging.getLogger("a_library")
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    for name in ("a_library", "a_library.utils", "a_library.utils.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return logger


def test_warnings_while_importing_are_lowered_and_errors_stay(
    library: logging.Logger, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    part, show = logging.getLogger("a_library.part"), warnings.showwarning
    library.handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    with caplog.at_level(logging.DEBUG, "hvcompile.app.quiet"), quiet.importing("a_library"):
        part.warning("no %s here", "torchao")
        part.error("it is broken")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("later", FutureWarning, stacklevel=1)
            warnings.simplefilter("error")
            with pytest.raises(FutureWarning):
                warnings.warn("now", FutureWarning, stacklevel=1)
    part.warning("afterwards")
    assert capsys.readouterr().err == "it is broken\nafterwards\n"
    lowered, later = [record.getMessage() for record in caplog.records if record.name == "hvcompile.app.quiet"]
    assert lowered == "a_library.part: no torchao here"
    assert later.endswith("FutureWarning: later")
    assert warnings.showwarning is show


def test_that_caches_are_off_is_no_news_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        quiet.hide_cache_notice()
        warnings.warn("dynamo_pgo force disabled by torch.compiler.config.force_disable_caches", stacklevel=1)
        with pytest.warns(UserWarning, match="else"):
            warnings.warn("something else", stacklevel=1)
    assert capsys.readouterr().err == ""


def test_an_import_that_fails_still_fails() -> None:
    show = warnings.showwarning
    with pytest.raises(ModuleNotFoundError), quiet.importing("no_such_library"):
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401
    assert warnings.showwarning is show


FAKE_PYTHON = """#!/bin/sh
# Stands in for python: "-m venv FOLDER" makes an environment of stand-ins; pip talks unless it is told twice not to.
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    printf '#!/bin/sh\\necho "hvcompile $*"\\n' > "$3/bin/hvcompile" && chmod +x "$3/bin/hvcompile" ;;
  *"--quiet --quiet"*) ;;
  *) echo "[notice] a new release of pip" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_video_prints_our_own_lines(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    command = ["make", "video", f"PYTHON={python}", f"VENV={tmp_path / 'env'}", "PROMPT=a cat"]
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    runs = [
        subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
    ]
    first, second = (done.stdout.splitlines() for done in runs)
    assert first[0].startswith("An environment in ")
    assert first[1:] == second == ["hvcompile generate a cat --output out.mp4"]
    assert [done.stderr for done in runs] == ["", ""]
