"""Values that a command line gives by name, ``name=value``: of a pipeline's call, and of the backend's options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hvcompile.errors import InputError
from hvcompile.inputs import finite


def assignments(texts: Sequence[str], option: str, example: str) -> dict[str, Any]:
    """Read ``name=value`` texts.

    Args:
        texts: as they were typed. A value is JSON where it reads as such, else text: 3, 0.1, true, null, "3".
        option: that gave them, for messages.
        example: of one, for messages.

    Raises:
        InputError: a text is no assignment, or a name is given twice.

    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise InputError(f"{option} {text!r} is no assignment: give name=value, such as {option} {example}")
        if name in found:
            raise InputError(f"{option} gives {name} twice: give it once")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError):  # no JSON, so it is text
        return text


def nested(flat: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Options of the backend from dotted names: ``{"a.b": 1}`` is ``{"a": {"b": 1}}``.

    Raises:
        InputError: a name is both a section and a value, or has more than two parts.

    """
    sections: dict[str, Any] = {}
    for name, value in flat.items():
        section, dot, field = name.partition(".")
        if "." in field or (dot and not (section and field)):
            raise InputError(f"{option} {name}: give a section, or section.field, such as first_block_cache.threshold")
        held = sections.setdefault(section, {} if dot else value)
        if dot and isinstance(held, dict):
            held[field] = value
        elif dot or held is not value:
            raise InputError(f"{option} gives {section} both as a whole and by its fields: give one of them")
    return sections


def merged(option: str, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the backend from several places.

    Args:
        option: that gives a field twice, for messages.
        parts: sections of options.

    Raises:
        InputError: two parts set one field.

    """
    result: dict[str, Any] = {}
    for part in parts:
        for section, setting in part.items():
            held = result.get(section)
            if section not in result:
                result[section] = dict(setting) if isinstance(setting, Mapping) else setting
            elif isinstance(held, dict) and isinstance(setting, Mapping) and not held.keys() & setting.keys():
                held.update(setting)
            else:
                raise InputError(f"{option} sets {section}, which another option of the command sets: leave one out")
    return result
