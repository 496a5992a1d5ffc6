"""The tables of options in ``docs/options.md``, made from the passes: fields, types, defaults and docstrings.

``python docs/tables.py`` writes them between two markers; ``python docs/tables.py --check`` changes nothing and leaves
with 1 where the file differs from what it would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the passes of this checkout, whatever is installed

from hvcompile.passes import PASSES  # noqa: E402
from hvcompile.pipeline import Pass  # noqa: E402

FILE = ROOT / "docs" / "options.md"
BEGIN = "<!-- Written by `python docs/tables.py`: change the passes' docstrings, not what follows. -->"
END = "<!-- End of what `python docs/tables.py` writes. -->"


def descriptions(kind: type[Pass]) -> dict[str, str]:
    """What a pass's docstring says of each field, in Markdown: the entries below ``Args:``.

    Raises:
        ValueError: a field has no entry, or an entry no field.

    """
    texts: dict[str, str] = {}
    name = ""
    for line in _section_lines(inspect.getdoc(kind) or "", "Args:"):
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name, texts[entry[1]] = entry[1], entry[2]
        elif name:
            texts[name] += f" {line.strip()}"
    fields = [field.name for field in dataclasses.fields(kind)]
    if sorted(texts) != sorted(fields):
        raise ValueError(f"{kind.__name__} has the fields {fields}, and its docstring has {sorted(texts)} under Args")
    return {field: _sentence(texts[field]) for field in fields}


def _section_lines(text: str, heading: str) -> Iterator[str]:
    """The lines of a Google-style section."""
    lines = iter(text.splitlines())
    for line in lines:
        if line == heading:
            break
    for line in lines:
        if line and not line.startswith("    "):
            return
        if line:
            yield line


def _sentence(text: str) -> str:
    """A description as the sentence of a table's cell."""
    text = text.replace("``", "`").replace("|", r"\|").strip()
    text = "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in re.split("(`[^`]*`)", text))
    text = text[0].upper() + text[1:] if text[0].isalpha() else text
    return text if text.endswith(".") else f"{text}."


def type_name(hint: Any) -> str:
    """A field's type as a user writes it."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    return "None" if hint is types.NoneType else str(hint.__name__)


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default as a user writes it."""
    setting = list(field.default) if isinstance(field.default, tuple) else field.default
    return f'`"{setting}"`' if isinstance(setting, str) else f"`{setting!r}`"


def table(section: str) -> str:
    """One section's heading, the passes that it belongs to, and a row an option."""
    kinds = [kind for kind in PASSES if kind.section == section]
    lines = [f"### `{section}`", "", f"Of {' and '.join(f'`{kind.__name__}`' for kind in kinds)}.", ""]
    columns = ["option", "type", "default", "what it sets", *["pass"] * (len(kinds) > 1)]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for kind in kinds:
        hints, texts = typing.get_type_hints(kind), descriptions(kind)
        for field in dataclasses.fields(kind):
            cells = [f"`{section}.{field.name}`", type_name(hints[field.name]), default(field), texts[field.name]]
            cells += [f"`{kind.__name__}`"] * (len(kinds) > 1)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The page's text with the tables as they should be.

    Raises:
        ValueError: the page lacks a marker.

    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{FILE} has no lines {BEGIN!r} and {END!r}")
    sections = dict.fromkeys(kind.section for kind in PASSES)
    return "\n\n".join([before + begin, *map(table, sections), end + after])


def main() -> None:
    """Write the tables, or check them."""
    text = FILE.read_text("utf-8")
    wanted = updated(text)
    if sys.argv[1:] == ["--check"]:
        if text != wanted:
            raise SystemExit(f"{FILE} differs from the passes: run python docs/tables.py")
    elif sys.argv[1:]:
        raise SystemExit("python docs/tables.py takes --check or nothing")
    else:
        FILE.write_text(wanted, "utf-8")


if __name__ == "__main__":
    main()
