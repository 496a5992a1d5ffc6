"""``options`` and ``mode`` of ``torch.compile``: parsed and validated before any compile time is spent.

``options`` is a dict of sections. A pass's section is one of:

- ``False``: off.
- ``True``, or an empty dict: on with its defaults; an error where it can't apply.
- A dict of its fields. Passes may share a section; those of which the dict asks for something are asked for by name.
- The pass itself, a frozen dataclass, or a list of several that share the section. It counts like a dict of the fields
  that differ from their defaults.

A field asks for something if it is True, or else neither False nor None nor what it is by default. ``{"hoist": False}``
switches a part of a pass off, and where there is nothing to switch off nothing is amiss.

A section left out is on where it applies. A pass with a ``switch`` is off unless that field, or ``mode="max"``, says
otherwise. Five keys are no pass's: ``mode`` (where ``torch.compile`` is given options, it takes no mode), ``dump`` (a
directory), ``dump_limit_gib`` (how much of the weights a dump may keep), ``lower`` (what the rewritten graph is handed
to), and ``guards`` (how Dynamo checks before a call that the model is as it was).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvcompile.errors import OptionError
from hvcompile.inputs import MADE_FOR
from hvcompile.pipeline import Pass, require_type
from hvcompile.torch_private.lowering import LOWERINGS

MODES = ("default", "exact", "max")
GENERAL = ("mode", "dump", "dump_limit_gib", "lower", "guards")
"""Keys of ``options`` that are no pass's section."""
GUARDS = ("quick", "dynamo")
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
    guards: str = "quick"


def parse(pass_types: Sequence[type[Pass]], options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Validate what the user gave.

    Args:
        pass_types: all passes, in the order in which they run.
        options: as given to ``torch.compile``.
        mode: None, "default", "exact" or "max"; may stand in ``options`` instead.

    Raises:
        OptionError: an unknown key, a wrong type or a value out of range; names the key and what is allowed.

    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options is a {type(options).__name__}; allowed is a dict of sections")
    sections = dict(options or {})
    mode = _mode(mode, sections)
    fields: dict[str, list[str]] = {}
    for kind in pass_types:
        fields.setdefault(kind.section, []).extend(field.name for field in dataclasses.fields(kind))
    _require_known(sections, [*fields, *GENERAL], "options")
    requests = {
        section: _Request.read(section, sections[section], pass_types) for section in fields if section in sections
    }

    passes, switched_off = [], []
    for kind in pass_types:
        request = requests.get(kind.section, _Request())
        configured = request.configure(kind, is_max=mode == "max")
        asked = request.asks_for(configured)
        if mode == "exact" and not kind.is_exact:
            if asked:
                raise OptionError(
                    f"options ask for {_spelled(kind)}, which mode='exact' rules out: it changes numerics"
                )
            switched_off.append((kind.__name__, "mode='exact' keeps only passes that do not change numerics"))
        elif request.is_off:
            switched_off.append((kind.__name__, f"options[{kind.section!r}] is False"))
        else:
            passes.append((configured, asked))
    return Options(
        passes=tuple(passes),
        switched_off=tuple(switched_off),
        lower=_lowering(sections.get("lower", "inductor")),
        dump=_directory(sections["dump"], "options['dump']") if "dump" in sections else _dump_from_environment(),
        dump_limit_gib=_limit(sections.get("dump_limit_gib", DUMP_LIMIT_GIB)),
        guards=_guards(sections.get("guards", "quick")),
    )


def _mode(mode: Any, sections: Mapping[str, Any]) -> str | None:
    """The mode, wherever it was given."""
    for where, choice in (("mode", mode), ("options['mode']", sections.get("mode"))):
        if choice is not None and not (isinstance(choice, str) and choice in MODES):
            raise OptionError(f"{where} is {choice!r}; allowed is one of {', '.join(map(repr, MODES))}")
    inside: str | None = sections.get("mode")
    if mode is not None and inside is not None and mode != inside:
        raise OptionError(f"mode is {mode!r} and options['mode'] is {inside!r}; give one of the two")
    return mode if inside is None else inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """What one section of the options says.

    ``is_on`` is True or False where the section is, None elsewhere; ``fields`` are those of a dict, None where there is
    no dict; ``passes`` are ready made.
    """

    is_on: bool | None = None
    fields: Mapping[str, Any] | None = None
    passes: tuple[Pass, ...] = ()

    @classmethod
    def read(cls, section: str, setting: Any, pass_types: Sequence[type[Pass]]) -> _Request:
        """Read a section.

        Raises:
            OptionError: it is nothing that a section may be.

        """
        kinds = [kind for kind in pass_types if kind.section == section]
        names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
        where = f"options[{section!r}]"
        if isinstance(setting, bool):
            return cls(is_on=setting)
        if isinstance(setting, Mapping):
            _require_known(setting, names, where)
            return cls(fields=setting)
        passes = tuple(setting) if isinstance(setting, (list, tuple)) else (setting,)
        if not passes or not all(isinstance(item, Pass) for item in passes):
            raise OptionError(
                f"{where} is {setting!r}; allowed is False (off), True (on), a dict of its fields "
                f"({', '.join(names)}), or {' or '.join(kind.__name__ for kind in kinds)} itself, or a list of these"
            )
        for item in passes:
            if type(item) not in kinds:
                allowed = " or ".join(kind.__name__ for kind in kinds)
                raise OptionError(
                    f"{where} has a {type(item).__name__}, which is none of this section; allowed is {allowed}"
                )
        if len({type(item) for item in passes}) < len(passes):
            raise OptionError(
                f"{where} has two of one kind; allowed is one {' and one '.join(k.__name__ for k in kinds)}"
            )
        return cls(passes=passes)

    @property
    def is_off(self) -> bool:
        """Whether the section switches its passes off."""
        return self.is_on is False

    def asks_for(self, configured: Pass) -> bool:
        """Whether the section asks for a pass by name, so that it is an error where it can't apply.

        Args:
            configured: the pass as the section wants it.

        """
        kind = type(configured)
        own = self._own(kind)
        if kind.switch:
            return kind.switch in own and getattr(configured, kind.switch) is True
        if self.passes and not own:
            return any(type(item) is kind for item in self.passes)
        if not self.fields and not own:
            return self.is_on is True or self.fields is not None
        return any(asks_for_something(configured, name) for name in own)

    def configure(self, kind: type[Pass], *, is_max: bool) -> Pass:
        """The pass as the section wants it.

        Raises:
            OptionError: a field has a wrong type or a value out of range, or is given to a pass that does not run.

        """
        own = self._own(kind)
        if kind.switch and is_max:
            own = {kind.switch: True, **own}
        configured = kind(**own)
        idle = [name for name in own if name != kind.switch and asks_for_something(configured, name)]
        if kind.switch and idle and not getattr(configured, kind.switch):
            raise OptionError(f"{kind.section}.{idle[0]} is given, which does nothing unless {_spelled(kind)} is True")
        return configured

    def _own(self, kind: type[Pass]) -> dict[str, Any]:
        """A pass's fields that the section sets; of one that is ready made, those that differ from their defaults."""
        ready = next((item for item in self.passes if type(item) is kind), None)
        if ready is not None:
            settings = {field.name: (getattr(ready, field.name), field.default) for field in dataclasses.fields(kind)}
            return {name: setting for name, (setting, default) in settings.items() if setting != default}
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: setting for name, setting in (self.fields or {}).items() if name in names}


def asks_for_something(configured: Pass, name: str) -> bool:
    """Whether a field of a pass asks for something: True does, and else what is no False, no None and no default."""
    (default,) = [field.default for field in dataclasses.fields(configured) if field.name == name]
    setting = getattr(configured, name)
    return setting is True or (setting is not None and setting is not False and setting != default)


def _spelled(kind: type[Pass]) -> str:
    return f"{kind.section + '.' + kind.switch if kind.switch else kind.section!r}"


def _require_known(keys: Mapping[Any, Any], allowed: Iterable[str], where: str) -> None:
    allowed = list(allowed)
    for key in keys:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if key == MADE_FOR:
                hint = "; read the file by hvcompile.load_options, which takes that entry off"
            raise OptionError(f"unknown key {key!r} in {where}; allowed are {', '.join(map(repr, allowed))}{hint}")


def _lowering(setting: Any) -> str:
    if not isinstance(setting, str) or setting not in LOWERINGS:
        raise OptionError(f"options['lower'] is {setting!r}; allowed is one of {', '.join(map(repr, LOWERINGS))}")
    return setting


def _guards(setting: Any) -> str:
    if not isinstance(setting, str) or setting not in GUARDS:
        raise OptionError(f"options['guards'] is {setting!r}; allowed is one of {', '.join(map(repr, GUARDS))}")
    return setting


def _limit(setting: Any) -> float:
    require_type(setting, float, "options['dump_limit_gib']")
    if not setting >= 0:
        raise OptionError(f"options['dump_limit_gib'] is {setting}; allowed is a number of GiB, 0 or more")
    return float(setting)


def _dump_from_environment() -> Path | None:
    setting = os.environ.get(DUMP_VARIABLE)
    return _directory(setting, f"the environment variable {DUMP_VARIABLE}") if setting else None


def _directory(setting: Any, where: str) -> Path:
    if not isinstance(setting, (str, os.PathLike)) or not str(setting):
        raise OptionError(f"{where} is {setting!r}; allowed is the path of a directory")
    path = Path(setting).expanduser()
    if path.exists() and not path.is_dir():
        raise OptionError(f"{where} is {str(path)!r}, which is a file; give a directory, new or existing")
    return path
