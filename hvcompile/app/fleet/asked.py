"""What a client sends, read with a limit on everything: no path, no pickle and no address in it is ever followed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvcompile.app.fleet import form
from hvcompile.app.request.ask import LARGEST_SCALE, Ask
from hvcompile.app.request.serve import Size
from hvcompile.errors import InputError
from hvcompile.inputs import finite

MOST_BYTES = 2**16
"""Of a body: text alone."""
MOST_CHARACTERS = 4000
"""Of a prompt."""
MOST_LISTED = 100
"""Videos of an answer."""
FIELDS = ("prompt", "model", "size", "seconds", "seed", "steps", "guidance", "negative_prompt", "true_cfg")
_NUMBERS = ("seed", "steps", "guidance", "true_cfg")
_LARGEST = 10**30
"""Of a number of any kind; beyond, arithmetic and messages take long."""
JSON, FORM = "application/json", "multipart/form-data"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may ask for: the model, the sizes, the most steps, and the frames a second of files."""

    model: str
    sizes: tuple[Size, ...]
    most_steps: int
    fps: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Which videos a client wants listed: how many at most, those after which, and whether the oldest come first."""

    limit: int = 20
    after: str | None = None
    is_ascending: bool = False


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
    sent = form.fields(body, content_type) if kind == FORM else _json(body)
    for name in sent:
        if name == "input_reference":
            raise InputError("input_reference is not served here: this server makes videos of text alone")
        if name not in FIELDS:
            raise InputError(f"a field is unknown: allowed are {', '.join(FIELDS)}")
    given = {name: value for name, value in sent.items() if value is not None}
    for name in ("prompt", "negative_prompt"):
        if name in given and not isinstance(given[name], str):
            raise InputError(f"{name} is no text")
        if len(given.get(name, "")) > MOST_CHARACTERS:
            raise InputError(f"{name} has over {MOST_CHARACTERS} characters")
    if given.get("model", limits.model) != limits.model:
        raise InputError(f"model is not served: allowed is {limits.model}, or none")
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
        content = json.loads(body.decode(), parse_constant=finite, parse_float=finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("the body is no JSON in UTF-8") from error
    if not isinstance(content, dict):
        raise InputError("the body is no JSON object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError("the body has a field twice: send each once")
    return found


def queried(pairs: Sequence[tuple[str, str]], allowed: Collection[str] = ()) -> dict[str, str]:
    """Read what stands behind the question mark of an address.

    Args:
        pairs: names and values.
        allowed: the names that may be there, each once.

    Raises:
        InputError: another is, or one is twice.

    """
    found = dict(pairs)
    if not set(found) <= set(allowed):
        raise InputError(f"a query parameter is unknown: allowed here are {', '.join(allowed) or 'none'}")
    if len(found) < len(pairs):
        raise InputError("a query parameter is there twice: send each once")
    return found


def listing(pairs: Sequence[tuple[str, str]]) -> Listing:
    """Read which videos a client wants listed; raises InputError where that can't be."""
    given = queried(pairs, ("limit", "after", "order"))
    text, order = given.get("limit", "20"), given.get("order", "desc")
    limit = int(text) if re.fullmatch("[0-9]{1,5}", text) else 0
    if not 1 <= limit <= MOST_LISTED:
        raise InputError(f"limit is no number from 1 to {MOST_LISTED}")
    if order not in ("asc", "desc"):
        raise InputError("order is neither asc nor desc")
    return Listing(limit=limit, after=given.get("after"), is_ascending=order == "asc")


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
