"""Weights that a checkpoint lacks: libraries draw them at random and go on. Here that is an error of one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvcompile.app import quiet
from hvcompile.errors import InputError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# transformers 5: a page that begins so, and a table of a row for each name, or for several such as layer.{0, 1}.bias.
_REPORT = re.compile(r"^(?P<kind>\w+) LOAD REPORT from: (?P<place>.+)$", re.MULTILINE)
_ROW = re.compile(r"^(?P<name>\S.*?) *\| *(?P<status>MISSING|MISMATCH) *\|", re.MULTILINE)
# diffusers 0.42: one line, the names as Python writes a list.
_WARNING = re.compile(
    r"^Some weights of (?P<kind>\w+) were not initialized from the model checkpoint at (?P<place>.+?) and are newly "
    r"initialized: \[(?P<names>.*?)\]",
    re.DOTALL,
)


@contextlib.contextmanager
def refused(model: str) -> Iterator[None]:
    """Within, a part of a pipeline that is loaded without all of its weights is an error.

    Args:
        model: the pipeline, for the message.

    Raises:
        InputError: a part lacks weights, or has some of another shape than its configuration asks for.

    """
    with (
        quiet.hearing("transformers", "LOAD REPORT") as reports,
        quiet.hearing("diffusers", "and are newly initialized: ") as warnings,
    ):
        try:
            yield
        except InputError as error:
            _refuse(model, reports, "MISMATCH", "have another shape than its configuration asks for in", error)
            raise
    _refuse(model, reports, "MISSING", "lack", None)
    for text in warnings:
        found = _WARNING.search(text)
        if found is not None:
            names = [name.strip(" '\"") for name in found["names"].split(",")]
            raise InputError(_message(model, found["place"], found["kind"], "lack", sorted(names)))


def _refuse(model: str, reports: Sequence[str], status: str, what: str, cause: Exception | None) -> None:
    """Raise InputError for the first report that has a row of this status."""
    for text in reports:
        plain = _COLOUR.sub("", text)
        head = _REPORT.search(plain)
        names = [row["name"] for row in _ROW.finditer(plain) if row["status"] == status]
        if head is not None and names:
            raise InputError(_message(model, head["place"], head["kind"], what, names)) from cause


def _message(model: str, place: str, kind: str, what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:2]) + (" and others" if len(names) > 2 else "")
    return f"model {model!r}: the weights of {Path(place).name} ({kind}) {what} {shown}: copy or download it again"
