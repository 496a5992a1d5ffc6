"""A command from the fields of its request: names, defaults, help, and the values that reach the request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from hvcompile.app.cli.signature import taking

Size = Annotated[int | None, typer.Option(help="Pixels.")]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Of every kind that commands have."""

    prompt: Annotated[str, typer.Argument(help="What it shows.")]
    words: Annotated[tuple[str, ...], typer.Argument(help="More of it.")] = ()
    height: Size = None
    width: Size = None
    fp8: Annotated[bool | None, typer.Option("--fp8/--no-fp8", help="In float8.")] = None
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.")] = Path("out.mp4")
    keys: Annotated[tuple[str, ...], typer.Option(help="Which.")] = ("a", "b")


@pytest.fixture
def seen() -> list[Request]:
    return []


@pytest.fixture
def app(seen: list[Request]) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command()
    @taking(Request)
    def draw(request: Request) -> None:
        """Draw it."""
        seen.append(request)

    return app


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["x"], {}),
        (["x", "y", "z", "--height", "3"], {"words": ("y", "z"), "height": 3}),
        (["x", "--fp8", "-o", "a.mp4"], {"fp8": True, "output": Path("a.mp4")}),
        (["x", "--no-fp8", "--width", "4"], {"fp8": False, "width": 4}),
        (["x", "--keys", "c, d,,e"], {"keys": ("c", "d", "e")}),
        (["x", "--keys", ","], {"keys": ()}),
    ],
)
def test_what_is_typed_reaches_the_request(
    app: typer.Typer, seen: list[Request], arguments: list[str], fields: dict[str, Any]
) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert seen == [Request(prompt="x", **fields)]


def test_the_help_and_what_is_wrong(app: typer.Typer) -> None:
    text = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160"}).output.split())
    for part in (
        "Draw it.",
        "What it shows. [required]",
        "--height",
        "Pixels.",
        "-o",
        "[default: out.mp4]",
        "--no-fp8",
    ):
        assert part in text
    assert "[default: a,b]" in text
    assert CliRunner().invoke(app, []).exit_code == 2
    wrong = CliRunner().invoke(app, ["x", "--height", "tall"])
    assert wrong.exit_code == 2
    assert "--height" in wrong.output


def test_a_field_that_is_no_parameter() -> None:
    @dataclass
    class Bare:
        size: int = 3

    @dataclass
    class Twice:
        size: Annotated[int, typer.Option(), typer.Argument()] = 3

    for request, number in ((Bare, 0), (Twice, 2)):
        with pytest.raises(TypeError, match=f"field 'size' needs one typer.Option or typer.Argument, and has {number}"):
            taking(request)
