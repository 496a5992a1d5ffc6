"""What a user gives as JSON: numbers, and files of options."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from hvcompile.errors import InputError


def finite(text: str) -> float:
    """A number as JSON has it, which knows neither NaN nor Infinity; for ``json.loads``, of which others are refused.

    Raises:
        ValueError: it is not finite.

    """
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def load_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of options, such as ``hvcompile tune`` writes, for ``torch.compile(options=...)``.

    Args:
        path: of a JSON object, a section an entry. What the sections say is checked when a model is compiled.

    Raises:
        InputError: there is no such file, or it holds something else.

    """
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
