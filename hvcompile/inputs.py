"""What a user gives as JSON: numbers, and files of options."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvcompile.errors import InputError

log = logging.getLogger(__name__)

MADE_FOR = "made_for"
"""The entry of a file of options that says what ``hvcompile tune`` found them with; it is no section."""


def finite(text: str) -> float:
    """A number as JSON has it, which knows neither NaN nor Infinity; for ``json.loads``, of which others are refused.

    Raises:
        ValueError: it is not finite.

    """
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def load_options(path: str | os.PathLike[str], *, num_steps: int | None = None) -> dict[str, Any]:
    """Read a file of options, such as ``hvcompile tune`` writes, for ``torch.compile(options=...)``.

    Args:
        path: of a JSON object, a section an entry. What the sections say is checked when a model is compiled.
        num_steps: how many steps the pipeline's progress bar will count, which with a second-order sampler are more
            than it is asked for. A schedule that was made for another number is told of in the log, as a warning. None
            asks nothing.

    Raises:
        InputError: there is no such file, or it holds something else.

    """
    options, made_for = read_options(path)
    if num_steps is not None:
        for line in unlike(options, made_for, num_steps=num_steps):
            log.warning("options %r: %s", str(path), line)
    return options


def read_options(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections of a file of options, and what it says that they were made for. Raises as ``load_options``."""
    options = _read(path)
    made_for = _made_for(options, path)
    return {name: section for name, section in options.items() if name != MADE_FOR}, made_for


def unlike(options: Mapping[str, Any], made_for: Mapping[str, Any], **now: Any) -> list[str]:
    """In what a fixed schedule, if options hold one, was made for something else than it serves now; a line or none.

    Args:
        options: of the backend.
        made_for: see the function; "num_steps", "sampler" and "model".
        now: some of the same.

    """
    cache = options.get("first_block_cache")
    if not isinstance(cache, Mapping) or not cache.get("computed_steps"):
        return []
    words = {"num_steps": "{} steps", "sampler": "the sampler {}", "model": "the model {}"}
    known = [name for name in words if made_for.get(name) is not None and now.get(name) is not None]
    other = [name for name in known if os.path.normpath(str(made_for[name])) != os.path.normpath(str(now[name]))]
    if not other:
        return []
    then, today = (", ".join(words[name].format(given[name]) for name in other) for given in (made_for, now))
    why = "other steps may suit it better" if other == ["model"] else "the steps in its list mean other ones here"
    return [f"the schedule was made for {then}, and this is {today}: {why}. hvcompile tune finds one for it"]


def _made_for(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    found = content.get(MADE_FOR, {})
    if not isinstance(found, dict):
        raise InputError(f"options {str(path)!r}: {MADE_FOR} is a {type(found).__name__}; allowed is an object")
    for name, kind, allowed in (("num_steps", int, "a whole number"), ("sampler", str, "text"), ("model", str, "text")):
        held = found.get(name)
        if isinstance(held, bool) or not isinstance(held, kind | None):
            raise InputError(f"options {str(path)!r}: {MADE_FOR}.{name} is {held!r}; allowed is {allowed}, or null")
    return found


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text("utf-8-sig"), parse_constant=finite, parse_float=finite)
    except OSError as error:
        raise InputError(
            f"options {str(path)!r} can't be read ({error.strerror or error}): give a JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"options {str(path)!r} is no JSON ({error}): give an object of sections") from error
    if not isinstance(content, dict):
        raise InputError(f"options {str(path)!r} holds a {type(content).__name__}: give an object of sections")
    return content
