"""Sphinx's settings: ``sphinx-build -W -b html docs build/docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the docstrings of this checkout, whatever is installed

from hvcompile.version import __version__  # noqa: E402

project = "hvcompile"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "hvcompile"
html_show_copyright = False
exclude_patterns = ["pictures/*.py"]

myst_heading_anchors = 3  # the anchors that a code host gives headings

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _name_files_outside(app: Any, page: str, source: list[str]) -> None:
    """Turn links to files beside ``docs`` into their names: they lead somewhere on a code host, and nowhere here."""
    source[0] = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", source[0])


def setup(app: Any) -> None:
    """Connect what is of this project alone."""
    app.connect("source-read", _name_files_outside)
