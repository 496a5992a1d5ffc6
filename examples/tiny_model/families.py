"""The families by name, and the family of a pipeline."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from family import Family
from hunyuan_video import HunyuanVideo
from wan import Wan


class Name(StrEnum):
    """A family, as the command line names it."""

    HUNYUAN_VIDEO = "hunyuan_video"
    WAN = "wan"


FAMILIES: Final[dict[Name, Family]] = {Name.HUNYUAN_VIDEO: HunyuanVideo(), Name.WAN: Wan()}


def family_of(pipe: Any) -> Family:
    """Find the family of a pipeline that is loaded; ValueError where it is of none."""
    for family in FAMILIES.values():
        if isinstance(pipe, family.pipeline):
            return family
    names = ", ".join(family.pipeline.__name__ for family in FAMILIES.values())
    raise ValueError(f"a {type(pipe).__name__} is of none of the families: {names}")
