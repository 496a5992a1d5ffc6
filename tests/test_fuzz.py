"""A hundred wrong command lines, drawn from a seed: each ends with a line that says so, and no traceback."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hvcompile.app import cli

COUNT = 100

Value = Callable[[random.Random], str]


def one_of(*values: str) -> Value:
    return lambda draw: draw.choice(values)


NO_COUNT = one_of("0", "-1", "-99999999999999999999", "x", "1.5", "", "1e3", "nan", "\N{ARABIC-INDIC DIGIT THREE}x")
NO_NUMBER = one_of("nan", "inf", "-1", "x", "", "-0.0001", "1e999")
NO_MODEL = one_of(
    "", "..", "/etc/hostname", "a/b/c", "~nobody/x", "/no/such", "\udcff", "x" * 300, "none.py", "x" * 300 + ".py", "."
)
NO_FILE = one_of("/", ".", "no/such/a.mp4", "a.txt", "", "x" * 300 + ".mp4", "/proc/a.mp4", "/dev/null")
NO_ASSIGNMENT = one_of("", "=", "a", "=3", "a.b.c=1")
NO_OPTION = one_of(
    "nonsense=1", "fp8=3", "first_block_cache.threshold=-1", "first_block_cache=[1]", "lower=5", "mode=x", ".a=1"
)
NO_SEEDS = one_of("", "-", "3-1", "1,1", "0-", "a", "1-2-3", "0-99999999999", ",")
NO_WORD = one_of("toaster", "cuda:99", "meta", "", "int8", "-", "\N{SNOWMAN}")

WRONG: dict[str, dict[str, Value]] = {
    "generate": {
        **dict.fromkeys(("--steps", "--frames", "--height", "--width", "--fps"), NO_COUNT),
        **dict.fromkeys(("--guidance", "--true-cfg", "--threshold", "--rank-timeout"), NO_NUMBER),
        **dict.fromkeys(("--output", "--json", "--html", "--sheet"), NO_FILE),
        **dict.fromkeys(("--image", "--last-image", "--prompts", "--options"), one_of("none", "/", "", __file__ + "x")),
        **dict.fromkeys(("--device", "--dtype", "--mode"), NO_WORD),
        "--model": NO_MODEL,
        "--seed": one_of("x", "", "1e3", str(2**64), "-" + "9" * 30),
        "--seeds": NO_SEEDS,
        "--set": NO_ASSIGNMENT,
        "--option": NO_OPTION,
        "--dump": one_of(__file__),
        "--no-such-option": one_of("1"),
    },
    "explain": {
        **dict.fromkeys(("--frames", "--height", "--width"), NO_COUNT),
        **dict.fromkeys(("--json", "--html"), NO_FILE),
        **dict.fromkeys(("--gpu", "--dtype", "--mode"), NO_WORD),
        "": NO_MODEL,
    },
    "lower": {
        **dict.fromkeys(("--frames", "--height", "--width", "--ranks"), NO_COUNT),
        **dict.fromkeys(("--gpu", "--dtype", "--mode"), NO_WORD),
        "": NO_MODEL,
    },
    "bench": {
        **dict.fromkeys(("--tokens", "--hidden", "--steps", "--repeats", "--threads"), NO_COUNT),
        **dict.fromkeys(("--device", "--dtype", "--contenders", "--blocks"), NO_WORD),
        "--threshold": NO_NUMBER,
    },
    "compare": {"": one_of("none.mp4", "/", "", __file__)},
    "bisect": {"": one_of("none", "/", "", __file__, "/dev"), "--tolerance": NO_NUMBER, "--lower": NO_WORD},
    "tune": {
        **dict.fromkeys(("--steps", "--frames", "--height", "--width"), NO_COUNT),
        **dict.fromkeys(("--psnr", "--worst-psnr", "--speedup"), NO_NUMBER),
        **dict.fromkeys(("--output", "--json", "--plot"), NO_FILE),
        **dict.fromkeys(("--prompts", "--options", "--image"), one_of("none", "/", "", __file__ + "x")),
        **dict.fromkeys(("--device", "--dtype", "--offload"), NO_WORD),
        "--model": NO_MODEL,
        "--seeds": NO_SEEDS,
        "--option": one_of("first_block_cache.threshold=0.1", "first_block_cache=true", "fp8=3"),
    },
    "warm": {
        "--steps": NO_COUNT,
        "--sizes": one_of("x", "1x", "0x0x0", "48", "48x32x17x1", "-1x2"),
        "--output": one_of(__file__, "/", "/etc"),
        **dict.fromkeys(("--device", "--dtype", "--mode"), NO_WORD),
        "--option": NO_OPTION,
        "": NO_MODEL,
    },
    "doctor": {"--json": NO_FILE, "--no-such-option": one_of("1")},
}


def line(draw: random.Random) -> list[str]:
    """A command and one to three parts of it that are wrong, among what is right."""
    command = draw.choice(list(WRONG))
    parts = [command]
    if command in ("generate", "tune") and draw.random() < 0.9:
        parts.append(draw.choice(["a red circle", "", "x" * 5000, "\N{SNOWMAN}", "--", "-"]))
    for option in draw.sample(sorted(WRONG[command]), min(draw.randint(1, 3), len(WRONG[command]))):
        parts += [option] if option else []
        parts.append(WRONG[command][option](draw))
    return parts


def test_wrong_command_lines_end_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(20)
    for _ in range(COUNT):
        arguments = line(draw)
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 2, (arguments, done.output, done.exception)
        assert isinstance(done.exception, SystemExit), (arguments, done.exception)
        assert "Traceback" not in done.output, arguments
        assert done.stderr.strip(), arguments
        assert not list(tmp_path.iterdir()), arguments
