"""What ``hvcompile doctor`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from hvcompile import outputs
from hvcompile.app.request.parameters import JsonFile


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where the findings go besides the screen. The fields are the parameters of the command."""

    json_file: JsonFile = None

    def check(self) -> None:
        """Raise InputError where the file can't be written."""
        if self.json_file is not None:
            outputs.check(self.json_file, name="json", kind="JSON file", suffixes=(".json",))
