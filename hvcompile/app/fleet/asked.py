"""What a client sends, read with a limit on everything: no path, no pickle and no address in it is ever followed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvcompile.app.request.ask import LARGEST_SCALE, Ask
from hvcompile.app.request.serve import Size
from hvcompile.errors import InputError
from hvcompile.inputs import finite

MOST_BYTES = 2**16
"""Of a body: text alone."""
MOST_CHARACTERS = 4000
"""Of a prompt."""
MOST_FIELDS = 32
"""Of a form."""
FIELDS = ("prompt", "model", "size", "seconds", "seed", "steps", "guidance", "negative_prompt", "true_cfg")
_NUMBERS = ("seed", "steps", "guidance", "true_cfg")
_LARGEST = 10**30
"""Of a number of any kind; beyond, arithmetic and messages take long."""
JSON, FORM = "application/json", "multipart/form-data"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may ask for: the sizes, the most steps, and the frames a second of files."""

    sizes: tuple[Size, ...]
    most_steps: int
    fps: int


def asked(body: bytes, content_type: str, limits: Limits) -> Ask:
    """Read what a client asks for.

    Args:
        body: a JSON object, or a form as ``multipart/form-data``.
        content_type: of it, as the client says. Another than JSON or a form is refused: a browser sends plain text for
            any page, without asking.
        limits: what may be asked for.

    Raises:
        InputError: it can't be read, or asks for what is not served. The message holds nothing of what was sent but
            numbers and names of fields.

    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (JSON, FORM):
        raise InputError(f"the content type is neither {JSON} nor {FORM}: name the one that the body is")
    fields = _form(body, content_type) if kind == FORM else _json(body)
    for name in fields:
        if name == "input_reference":
            raise InputError("input_reference is not served here: this server makes videos of text alone")
        if name not in FIELDS:
            raise InputError(f"a field is unknown; allowed are {', '.join(FIELDS)}")
    given = {name: value for name, value in fields.items() if value is not None}
    for name in ("prompt", "negative_prompt"):
        if name in given and not isinstance(given[name], str):
            raise InputError(f"{name} is no text")
        if len(given.get(name, "")) > MOST_CHARACTERS:
            raise InputError(f"{name} has over {MOST_CHARACTERS} characters")
    if "prompt" not in given:
        raise InputError("prompt is missing: say what the video shows")
    size = _size(given.get("size"), given.get("seconds"), limits)
    numbers: dict[str, Any] = {name: _number(name, given[name]) for name in _NUMBERS if name in given}
    if numbers.get("steps", 1) > limits.most_steps:
        raise InputError(f"steps is over {limits.most_steps}, the most that are served")
    texts: dict[str, Any] = {name: given[name] for name in ("prompt", "negative_prompt") if name in given}
    return Ask(width=size.width, height=size.height, frames=size.frames, fps=limits.fps, **texts, **numbers)


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        content = json.loads(body.decode(), parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise InputError("the body is no JSON in UTF-8") from error
    if not isinstance(content, dict):
        raise InputError("the body is no JSON object")
    return content


def _form(body: bytes, content_type: str) -> Mapping[str, Any]:
    """The fields of a form, as RFC 7578 has it; a file in it is only seen to be one.

    Python's reader of mails reads forms too, but takes seconds for some of 64 KiB, and fails on others.
    """
    if not re.fullmatch(r"[\x20-\x7e]{1,300}", content_type):
        raise InputError("the content type can't be read")
    boundary = re.search(r";\s*boundary=(\"?)([0-9A-Za-z'()+_,./:=?-]{1,70})\1\s*(;|$)", content_type, re.IGNORECASE)
    if boundary is None:
        raise InputError("the body is no form: its boundary is missing")
    delimiter = b"\r\n--" + boundary[2].encode()
    whole = b"\r\n" + body
    if whole.count(delimiter) > MOST_FIELDS + 1:
        raise InputError(f"the form has too many fields: send {MOST_FIELDS} or fewer")
    first, *parts = whole.split(delimiter)
    if first or not parts or not parts.pop().startswith(b"--"):
        raise InputError("the body is no form: it does not begin and end with its boundary")
    fields: dict[str, Any] = {}
    for part in parts:
        name, content = _field(part)
        if name in fields:
            raise InputError("the form has a field twice: send each once")
        fields[name] = content
    return fields


def _field(part: bytes) -> tuple[str, str | bytes]:
    """The name and the text of a part of a form; of a file, no content."""
    head, blank, content = part.partition(b"\r\n\r\n")
    try:
        lines = head.decode().split("\r\n")
        told = [line for line in lines[1:] if line.lower().startswith("content-disposition:")]
        named = re.findall(r";\s*name=\"([^\"]{1,100})\"", told[0] if len(told) == 1 else "")
        if not blank or lines[0].strip() or len(named) != 1:
            raise InputError("the form has a field without a name")
        is_file = re.search(r";\s*filename\*?=", told[0], re.IGNORECASE)
        return named[0], b"" if is_file else content.decode()
    except UnicodeDecodeError as error:
        raise InputError("a field of the form is no text in UTF-8") from error


def _number(name: str, value: Any) -> int | float:
    """A number, from a form as text."""
    if isinstance(value, str):
        is_whole = re.fullmatch(r"-?[0-9]{1,20}", value)
        is_decimal = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", value)
        value = int(value) if is_whole else float(value) if is_decimal else None
    is_number = isinstance(value, int) or (isinstance(value, float) and name not in ("seed", "steps"))
    if not is_number or isinstance(value, bool) or not -_LARGEST <= value <= _LARGEST:
        raise InputError(f"{name} is no number that it may be")
    if name in ("guidance", "true_cfg") and not 0 <= value <= LARGEST_SCALE:
        raise InputError(f"{name} is not from 0 to {LARGEST_SCALE}")
    number: int | float = value
    return number


def _size(size: Any, seconds: Any, limits: Limits) -> Size:
    """The size that is served and fits best."""
    told = ", ".join(f"{item} with {item.frames} frames" for item in limits.sizes)
    fit = [item for item in limits.sizes if size is None or str(item) == size]
    if seconds is not None:
        number = _number("seconds", seconds)
        away = {item: abs(item.frames / limits.fps - number) for item in fit}
        fit = sorted((item for item in fit if away[item] <= 0.5), key=away.__getitem__)
    if not fit:
        raise InputError(f"size or seconds is not served: allowed are {told}, at {limits.fps} frames a second")
    return fit[0]
