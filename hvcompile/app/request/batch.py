"""What ``hvcompile batch`` is asked for."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile import outputs
from hvcompile.app.request.ask import PICTURE_FIELDS, Ask, identity, parsed
from hvcompile.app.request.clips import Clips, check_apart
from hvcompile.app.request.fleet import Fleet
from hvcompile.app.request.generate import PICTURES, VIDEOS
from hvcompile.app.request.parameters import JsonFile
from hvcompile.errors import HvcompileError, InputError, one_line
from hvcompile.inputs import finite

MOST_BYTES = 2**20
"""Of a line."""
LONGEST_NAME = 200
"""Bytes of a file's name in UTF-8, without its ending; file systems take 255 with it."""
DIGITS = 6
"""Of a number that is a file's name. It must not follow from how many lines there are: a file may get more of them."""
MOST_TOLD = 20
"""Lines that are wrong of which is told."""
MANIFEST = "manifest.jsonl"
"""The list of what is done, beside the videos."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the file: its number from 1, what it asks for, the stem of its file, and its identity."""

    number: int
    ask: Ask
    stem: str
    identity: str


@dataclass(frozen=True, kw_only=True)
class Request(Fleet):
    """Which videos to make, where they go, and what makes them. The fields are the command's parameters."""

    prompts: Annotated[Path, typer.Argument(help='A file with a JSON object a line: {"prompt": ..., "seed": 3}.')]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A directory for the videos, and the list of what is done.")
    ] = Path("videos")
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a diffusers pipeline (default: an embedded tiny one).")
    ] = None
    fps: Annotated[int, typer.Option(help="Frames a second, where a line asks for none.")] = 24
    attempts: Annotated[int, typer.Option(help="How often a video is tried, elsewhere where that can be.")] = 3
    timeout: Annotated[float | None, typer.Option(help="Seconds that a video may take (default: no limit).")] = None
    json_file: JsonFile = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes and errors.")] = False

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the lines; loads nothing."""
        if self.attempts < 1:
            raise InputError(f"attempts is {self.attempts}: give 1 or more")
        if self.timeout is not None and not 0 < self.timeout < 1e9:
            raise InputError(f"timeout is {self.timeout:g}: give a number of seconds above 0")
        Ask(prompt="-", fps=self.fps)
        if self.json_file is not None:
            outputs.check(self.json_file, name="json", kind="JSON file", suffixes=(".json",))
        read = {"prompts": self.prompts} | ({"options": self.options_file} if self.options_file is not None else {})
        check_apart(read, [("the list of what is done", self.output / MANIFEST), ("json", self.json_file)])
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {str(self.output)!r} is a file: give a directory")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output).close()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"output {str(self.output)!r} can't be written ({reason}): give another place") from error
        self.check_fleet(self.model)

    @property
    def base(self) -> Clips:
        """What all lines share."""
        return self.clips(self.model)

    def lines(self) -> tuple[Line, ...]:
        """Read the file of prompts.

        Raises:
            InputError: it can't be read, holds nothing, or has lines that are wrong: the message has the number of each
                and what is wrong with it.

        """
        base, found, wrong = self.base, list[Line](), list[str]()
        texts = _texts(self.prompts)
        taken: dict[str, int] = {}
        for number, text in texts.items():
            try:
                content = _object(text)
                ask, name = parsed(content)
                ask = self._placed(ask, content.get("fps") is not None)
                _check_options(ask, base)
                stem = _stem(name) if name is not None else f"{number:0{DIGITS}d}"
                if stem.lower() in taken:
                    raise InputError(f"its file {stem!r} is that of line {taken[stem.lower()]} too: give another name")
                taken[stem.lower()] = number
                found.append(Line(number=number, ask=ask, stem=stem, identity=identity(ask, base, self.ranks)))
            except (HvcompileError, OSError) as error:
                wrong.append(f"line {number}: {one_line(error)}")
        raise_wrong(self.prompts, wrong)
        return tuple(found)

    def _placed(self, ask: Ask, has_fps: bool) -> Ask:
        """With the paths of its pictures seen from here, which have to be there, and the command's own choices.

        A line that gives a size, or guidance, as the command has it is then of one shape with one that gives none.
        """
        from hvcompile.app import pictures

        changed: dict[str, Any] = {} if has_fps else {"fps": self.fps}
        common = ("frames", "height", "width", "guidance")
        changed |= {name: getattr(self, name) for name in common if getattr(ask, name) is None}
        for name in PICTURE_FIELDS:
            place = getattr(ask, name)
            if place is not None:
                path = (self.prompts.parent / place).resolve()
                pictures.read(path, name)
                changed[name] = str(path)
        return dataclasses.replace(ask, **changed)


def raise_wrong(file: Path, wrong: list[str]) -> None:
    """Raise InputError that lists the lines that are wrong, if any."""
    if wrong:
        more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        raise InputError(f"prompts {str(file)!r}: {'; '.join(wrong[:MOST_TOLD])}{more}; nothing was started")


def _texts(path: Path) -> dict[int, str]:
    """The lines of a file that say something, by number."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"prompts {str(path)!r} is no text in UTF-8: give one JSON object a line") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"prompts {str(path)!r} can't be read ({reason}): give a file of JSON lines") from error
    texts = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not texts:
        raise InputError(f"prompts {str(path)!r} holds no line: give one JSON object a line")
    return texts


def _object(text: str) -> Any:
    """What a line holds."""
    if len(text) > MOST_BYTES:
        raise InputError(f"it has {len(text)} characters: give {MOST_BYTES} or fewer")
    try:
        return json.loads(text, parse_constant=finite, parse_float=finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'it is no JSON ({error}): give an object such as {{"prompt": "a cat"}}') from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError("it has a key twice: give each once")
    return found


def _stem(name: str) -> str:
    """The stem of a file that a line names."""
    stem = name
    for suffix in (*VIDEOS[:1], *PICTURES[:1]):
        stem = stem.removesuffix(suffix)
    size = len(stem.encode("utf-8", "surrogatepass"))
    if size > LONGEST_NAME:
        raise InputError(f"name {name[:40]!r} has {size} bytes in UTF-8: give {LONGEST_NAME} or fewer")
    if not re.fullmatch(r"[\w][\w .()+=@,-]*", stem) or stem.endswith((" ", ".")):
        raise InputError(
            f"name {name[:40]!r} is no file name: give letters, digits and -_.,+=@() alone, and no directory"
        )
    if stem.lower() == Path(MANIFEST).stem:
        raise InputError("name 'manifest' is taken by the list of what is done: give another")
    return stem


def _check_options(ask: Ask, base: Clips) -> None:
    """Raise InputError, or OptionError, where the backend would not take a video's options."""
    if ask.options:
        from hvcompile.options import parse
        from hvcompile.passes import PASSES

        parse(PASSES, ask.of(base).backend_options(), base.mode)
