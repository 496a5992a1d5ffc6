"""``options`` and ``mode`` of ``torch.compile``: parsed and validated before any compile time is spent.

``options`` is a dict of sections. A pass's section is ``False`` (off), ``True`` (on with its defaults; an error where
it can't apply) or a dict of its fields; a section left out is on where it applies. Passes may share a section: those
that a dict has fields of are asked for by name. One with a ``switch`` is off unless that field, or ``mode="max"``, says
otherwise. ``dump`` is a directory, ``lower``
what the rewritten graph is handed to, ``dump_limit_gib`` how much of the weights a dump may keep.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvcompile.errors import OptionError
from hvcompile.pipeline import Pass
from hvcompile.torch_private.lowering import LOWERINGS

MODES = ("default", "exact", "max")
DUMP_VARIABLE = "HVCOMPILE_DUMP"
DUMP_LIMIT_GIB = 2.0  # a tiny model's weights are kept without asking, those of a full-size one are not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Validated options: the passes to run, each with whether the user asked for it by name."""

    passes: tuple[tuple[Pass, bool], ...]
    switched_off: tuple[tuple[str, str], ...]
    lower: str
    dump: Path | None
    dump_limit_gib: float


def parse(pass_types: Sequence[type[Pass]], options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Validate what the user gave.

    Args:
        pass_types: all passes, in the order in which they run.
        options: as given to ``torch.compile``.
        mode: None, "default", "exact" or "max".

    Raises:
        OptionError: an unknown key, a wrong type or a value out of range; names the key and what is allowed.

    """
    if mode is not None and mode not in MODES:
        raise OptionError(f"mode is {mode!r}; allowed is one of {', '.join(map(repr, MODES))}")
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options is a {type(options).__name__}; allowed is a dict of sections")
    given = dict(options or {})
    fields: dict[str, list[str]] = {}
    for item in pass_types:
        fields.setdefault(item.section, []).extend(field.name for field in dataclasses.fields(item))
    _require_known(given, [*fields, "dump", "dump_limit_gib", "lower"], "options")
    for section, names in fields.items():
        _require_section(given.get(section, True), names, f"options[{section!r}]")

    passes, switched_off = [], []
    for item in pass_types:
        setting = given.get(item.section)
        asked, own = _asked(item, setting)
        if mode == "exact" and not item.is_exact:
            if asked:
                raise OptionError(
                    f"options ask for {_spelled(item)}, which mode='exact' rules out: it changes numerics"
                )
            switched_off.append((item.__name__, "mode='exact' keeps only passes that do not change numerics"))
        elif setting is False:
            switched_off.append((item.__name__, f"options[{item.section!r}] is False"))
        else:
            if item.switch and mode == "max":
                own = {item.switch: True, **own}
            passes.append((_configure(item, own), asked))
    return Options(
        passes=tuple(passes),
        switched_off=tuple(switched_off),
        lower=_lowering(given.get("lower", "inductor")),
        dump=_directory(given["dump"], "options['dump']") if "dump" in given else _dump_from_environment(),
        dump_limit_gib=_limit(given.get("dump_limit_gib", DUMP_LIMIT_GIB)),
    )


def _asked(item: type[Pass], setting: Any) -> tuple[bool, dict[str, Any]]:
    """Whether a section asks for a pass by name, and what it has of its fields."""
    if not isinstance(setting, Mapping):
        return setting is True and not item.switch, {}
    own = {name: setting[name] for name in setting if name in [field.name for field in dataclasses.fields(item)]}
    if item.switch:
        return own.get(item.switch) is True, own
    return bool(own) or not setting, own


def _spelled(item: type[Pass]) -> str:
    return f"{item.section + '.' + item.switch if item.switch else item.section!r}"


def _require_section(setting: Any, fields: Sequence[str], where: str) -> None:
    if isinstance(setting, Mapping):
        _require_known(setting, fields, where)
    elif not isinstance(setting, bool):
        raise OptionError(
            f"{where} is {setting!r}; allowed is False (off), True (on), or a dict of its fields: {', '.join(fields)}"
        )


def _configure(item: type[Pass], own: Mapping[str, Any]) -> Pass:
    hints = typing.get_type_hints(item)
    for name, held in own.items():
        _require_type(held, hints[name], f"{item.section}.{name}")
    others = [name for name in own if name != item.switch]
    if item.switch and others and not own.get(item.switch):
        raise OptionError(f"{item.section}.{others[0]} is given, which does nothing unless {_spelled(item)} is True")
    return item(**{name: tuple(held) if isinstance(held, list) else held for name, held in own.items()})


def _require_known(given: Mapping[Any, Any], allowed: Iterable[str], where: str) -> None:
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"unknown key {key!r} in {where}; allowed are {', '.join(map(repr, allowed))}{hint}")


def _require_type(held: Any, hint: Any, name: str) -> None:
    if typing.get_origin(hint) is tuple:  # of any length; a list does as well
        (kind, _) = typing.get_args(hint)
        if not isinstance(held, (list, tuple)) or not all(isinstance(item, kind) for item in held):
            raise OptionError(f"{name} is {held!r}; allowed is a list of {kind.__name__}")
        return
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        exact = isinstance(held, kind) and (kind is bool or not isinstance(held, bool))
        if exact or (kind is float and isinstance(held, numbers.Real) and not isinstance(held, bool)):
            return
    wanted = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
    raise OptionError(f"{name} is {held!r}, a {type(held).__name__}; allowed is {wanted}")


def _lowering(held: Any) -> str:
    if not isinstance(held, str) or held not in LOWERINGS:
        raise OptionError(f"options['lower'] is {held!r}; allowed is one of {', '.join(map(repr, LOWERINGS))}")
    return held


def _limit(held: Any) -> float:
    _require_type(held, float, "options['dump_limit_gib']")
    if not held >= 0:
        raise OptionError(f"options['dump_limit_gib'] is {held}; allowed is a number of GiB, 0 or more")
    return float(held)


def _dump_from_environment() -> Path | None:
    held = os.environ.get(DUMP_VARIABLE)
    return _directory(held, f"the environment variable {DUMP_VARIABLE}") if held else None


def _directory(held: Any, where: str) -> Path:
    if not isinstance(held, (str, os.PathLike)) or not str(held):
        raise OptionError(f"{where} is {held!r}; allowed is the path of a directory")
    path = Path(held).expanduser()
    if path.exists() and not path.is_dir():
        raise OptionError(f"{where} is {str(path)!r}, which is a file; give a directory, new or existing")
    return path
